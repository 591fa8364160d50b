//! The file with the secret of a pair, and whether a pair may do without.
//!
//! Owns: reading and creating key files (their text is `ft-log/src/key.rs`), and the rule that only loopback may be
//! used in the open. Must never: overwrite a file, take a key that others on this host can read, or print one.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ft_log::{KEY_BYTES, Key, KeyError, MAX_KEY_FILE_BYTES, create_private};
use thiserror::Error;

use crate::host::{SecretError, random_bytes, read_secret};

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyFileError {
    /// Nothing is there.
    #[error(
        "key file '{path}' does not exist: copy it from the other host, or make it with `vmft keygen {path}`",
        path = path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be read, or by too many.
    #[error("key file {source}")]
    Secret {
        /// Why.
        #[source]
        source: SecretError,
    },
    /// It does not hold a key.
    #[error("'{path}' cannot be used as a key: {source}. Copy it again from the host where it was made", path = path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: KeyError,
    },
    /// There is a file already.
    #[error("'{path}' exists already, and a key is never overwritten; choose another name", path = path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// It cannot be written.
    #[error("key file '{path}' cannot be made: {source}", path = path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Others could take part.
    #[error(
        "{option} {address} is not a loopback address, and without a key whoever reaches it can read and change the \
         guest: make a key with `vmft keygen FILE`, copy it to the other host, and start both with --key-file FILE; \
         or, on a link that nobody else can reach, start both with --insecure"
    )]
    NotLoopback {
        /// Whose address it is.
        option: &'static str,
        /// The address.
        address: SocketAddr,
    },
}

/// Makes a new key, readable by its owner only, and waits until it is on the disk.
pub fn create(path: &Path) -> Result<(), KeyFileError> {
    let failed = |source| KeyFileError::Create { path: path.to_owned(), source };
    let mut bytes = [0; KEY_BYTES];
    random_bytes(&mut bytes).map_err(failed)?;
    let mut file = match create_private(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(KeyFileError::Exists { path: path.to_owned() });
        }
        other => other.map_err(failed)?,
    };
    let written = file.write_all(Key::new(bytes).to_text().as_bytes()).and_then(|()| file.sync_all());
    written.map_err(|source| {
        // What is there is of no use, and would be in the way of the next attempt.
        let _ = std::fs::remove_file(path);
        failed(source)
    })
}

/// The key in a file.
pub fn load(path: &Path) -> Result<Key, KeyFileError> {
    let text = read_secret(path, MAX_KEY_FILE_BYTES).map_err(|source| match source {
        SecretError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            KeyFileError::Missing { path: path.to_owned() }
        }
        source => KeyFileError::Secret { source },
    })?;
    Key::from_text(&text).map_err(|source| KeyFileError::Content { path: path.to_owned(), source })
}

/// The key of a pair whose monitors meet at `addresses`, each with its option; or `None` if they may talk in the open:
/// on loopback, or because the operator says so.
pub fn for_pair(
    key_file: Option<&Path>,
    insecure: bool,
    addresses: &[(&'static str, SocketAddr)],
) -> Result<Option<Key>, KeyFileError> {
    if let Some(path) = key_file {
        return load(path).map(Some);
    }
    let reachable = addresses.iter().find(|(_, address)| !address.ip().to_canonical().is_loopback());
    match reachable {
        Some(&(option, address)) if !insecure => Err(KeyFileError::NotLoopback { option, address }),
        Some((option, address)) => {
            tracing::warn!(
                "{option} {address}: the log link is neither encrypted nor authenticated (--insecure)"
            );
            Ok(None)
        }
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_new_key_is_for_its_owner_only_and_unlike_any_other() {
        let directory = directory();
        let (first, second) = (directory.path().join("a"), directory.path().join("b"));
        create(&first).unwrap();
        create(&second).unwrap();
        assert_eq!(fs::metadata(&first).unwrap().mode() & 0o777, 0o600);
        assert_eq!(load(&first).unwrap(), load(&first).unwrap());
        assert_ne!(load(&first).unwrap(), load(&second).unwrap());
        assert_eq!(for_pair(Some(&first), false, &[]).unwrap(), Some(load(&first).unwrap()));
    }

    #[test]
    fn nothing_is_overwritten() {
        let directory = directory();
        let path = directory.path().join("key");
        fs::write(&path, "of value").unwrap();
        let said = create(&path).unwrap_err().to_string();
        assert!(said.contains("key' exists already") && said.contains("another name"), "{said}");
        assert_eq!(fs::read(&path).unwrap(), b"of value");
        let said = create(&directory.path().join("none/key")).unwrap_err().to_string();
        assert!(said.contains("none/key' cannot be made: No such file"), "{said}");
    }

    #[test]
    fn unusable_files_are_refused_by_name() {
        let directory = directory();
        let path = directory.path().join("key");
        let said = |path: &Path| crate::with_causes(&load(path).unwrap_err());
        assert!(said(&path).contains("key' does not exist"), "{}", said(&path));
        assert!(said(&path).contains("`vmft keygen "), "{}", said(&path));
        assert!(said(directory.path()).contains("is not a regular file"), "{}", said(directory.path()));
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(said(&pipe).contains("pipe' is not a regular file"), "{}", said(&pipe));

        create(&path).unwrap();
        for mode in [0o604, 0o640, 0o610, 0o602] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let said = said(&path);
            assert!(said.contains(&format!("key' can be used by others than its owner (mode {mode:04o})")));
            assert!(said.contains("`chmod 600 "), "{said}");
        }
        fs::set_permissions(&path, Permissions::from_mode(0o400)).unwrap();
        load(&path).unwrap();
        let text = fs::read(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, &text[..text.len() - 1]).unwrap();
        let said = said(&path);
        assert!(said.contains("key' cannot be used as a key: it is damaged"), "{said}");
        assert!(said.contains("Copy it again"), "{said}");
    }

    #[test]
    fn only_loopback_may_go_without_a_key_unless_told() {
        let address = |text: &str| [("--listen", text.parse().unwrap())];
        for loopback in ["127.0.0.1:1", "127.3.4.5:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert_eq!(for_pair(None, false, &address(loopback)).unwrap(), None, "{loopback}");
        }
        for other in ["192.0.2.1:7000", "0.0.0.0:1", "[::]:1", "[2001:db8::1]:1"] {
            let said = for_pair(None, false, &address(other)).unwrap_err().to_string();
            for part in [&format!("--listen {other}")[..], "`vmft keygen FILE`", "--key-file", "--insecure"] {
                assert!(said.contains(part), "{said}");
            }
            assert_eq!(for_pair(None, true, &address(other)).unwrap(), None);
        }
    }
}
