//! Files that hold a guest's memory, or a key.
//!
//! Owns: how they come into being and get their names. Must never: let anybody but their owner read one, or replace or
//! follow what is there already, be it planted or an earlier recording.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reading and writing for the owner. The umask can only take rights away.
const OWNER_ONLY: u32 = 0o600;

/// Creates a file that only its owner may read, and opens it for writing.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] if there is anything of that name, even a link that leads nowhere.
pub fn create_private(path: &Path) -> io::Result<File> {
    // Whoever creates a file exclusively does not follow a link in its place (open(2), O_EXCL).
    OpenOptions::new().write(true).create_new(true).mode(OWNER_ONLY).open(path)
}

/// Renames a file of this process to a name that is free.
///
/// # Errors
/// [`ErrorKind::AlreadyExists`] if there is anything of that name.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    match fs::hard_link(from, to) {
        Ok(()) => fs::remove_file(from),
        // A file system that knows no second names (FAT) knows no owners either, from whom a name could be kept.
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::Unsupported) => {
            match to.symlink_metadata() {
                Ok(_) => Err(ErrorKind::AlreadyExists.into()),
                Err(_) => fs::rename(from, to),
            }
        }
        Err(error) => Err(error),
    }
}
