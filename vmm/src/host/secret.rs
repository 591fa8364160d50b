//! Files that only their owner may read.
//!
//! Owns: reading them. Must never: take one that others on this host can use, or show what is in it.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// The bits that no mode may have.
const NOT_OWNERS: u32 = 0o077;

/// Why a secret is not read.
#[derive(Debug, Error)]
pub enum SecretError {
    /// It is not there, or the host does not let it be read.
    #[error("'{path}' cannot be read: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe or the like.
    #[error("'{path}' is not a regular file", path = path.display())]
    NotAFile {
        /// What is there.
        path: PathBuf,
    },
    /// It is no secret.
    #[error(
        "'{path}' can be used by others than its owner (mode {mode:04o}): if nobody has read it, `chmod 600 {path}`; \
         else make another secret",
        path = path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
}

/// The first `max_bytes` of a file that only its owner may read.
pub fn read_secret(path: &Path, max_bytes: usize) -> Result<Vec<u8>, SecretError> {
    let failed = |source| SecretError::Read { path: path.to_owned(), source };
    // A pipe without a writer would not open.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(SecretError::NotAFile { path: path.to_owned() });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & NOT_OWNERS != 0 {
        return Err(SecretError::Exposed { path: path.to_owned(), mode });
    }
    let mut contents = Vec::new();
    file.take(max_bytes as u64).read_to_end(&mut contents).map_err(failed)?;
    Ok(contents)
}
