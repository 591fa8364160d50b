//! Where a monitor's control socket is, and how it gets there.
//!
//! Owns: the socket's file. Must never: take the place of a monitor that lives, or leave the file behind at its end.
//!
//! The file has mode 0600 from its first moment on: who may connect is who may act as the monitor's user. A file that
//! nobody listens on was left by a monitor that was killed, and is replaced. A lock on the directory keeps two starting
//! monitors from replacing each other's.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use thiserror::Error;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// Why a monitor has no control socket.
#[derive(Debug, Error)]
pub enum SocketError {
    /// There is no directory for it by default.
    #[error(
        "there is no place for the control socket: XDG_RUNTIME_DIR is not set, and only root may use /run/vmft; \
         give one with --control"
    )]
    NoPlace,
    /// Another monitor is there.
    #[error(
        "a monitor that lives has its control socket at {path}; one monitor of a guest can run here, \
         or each needs a --control of its own",
        path = path.display()
    )]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{path} is there already and is no socket; choose another path with --control", path = path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The host refuses.
    #[error("the control socket {path} cannot be made: {source}; choose another path with --control", path = path.display())]
    Host {
        /// The path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The path for the guest called `name` if none was given: `/run/vmft/NAME.sock` for root, else
/// `$XDG_RUNTIME_DIR/vmft/NAME.sock`.
pub fn default_path(name: &str) -> Result<PathBuf, SocketError> {
    place(nix::unistd::geteuid().is_root(), std::env::var_os("XDG_RUNTIME_DIR"), name)
}

fn place(root: bool, runtime: Option<OsString>, name: &str) -> Result<PathBuf, SocketError> {
    let base = match (root, runtime) {
        (true, _) => PathBuf::from("/run"),
        (false, Some(runtime)) if !runtime.is_empty() => PathBuf::from(runtime),
        (false, _) => return Err(SocketError::NoPlace),
    };
    Ok(base.join("vmft").join(format!("{name}.sock")))
}

/// A socket that is listened on. Its file goes away on drop.
#[derive(Debug)]
pub struct ControlSocket {
    /// Where clients connect.
    pub listener: UnixListener,
    path: PathBuf,
    /// Device and number of the file, to remove no other's.
    file: (u64, u64),
}

impl ControlSocket {
    /// Listens at `path`. Its directory is made, for this user only, if it is not there.
    pub fn open(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::Host { path: path.into(), source };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        let handle = File::open(directory).map_err(failed)?;
        let _lock =
            Flock::lock(handle, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))?;
        make_room(path)?;
        let listener = listen_at(path).map_err(failed)?;
        let file = identity(path).map_err(failed)?;
        Ok(Self { listener, path: path.into(), file })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|file| file == self.file)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the control socket cannot be removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// Removes what a dead monitor left at `path`.
fn make_room(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::Host { path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(SocketError::NoSocket { path: path.into() });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Whoever has no room for another connection lives.
        Ok(_) => Err(SocketError::InUse { path: path.into() }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            Err(SocketError::InUse { path: path.into() })
        }
        Err(error) => Err(failed(error)),
    }
}

fn listen_at(path: &Path) -> io::Result<UnixListener> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    // The file that `bind` makes takes the socket's mode.
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    bind(socket.as_raw_fd(), &address)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn places_are_as_documented() {
        let shown = |root, runtime: Option<&str>| {
            place(root, runtime.map(OsString::from), "web").map(|path| path.display().to_string())
        };
        assert_eq!(shown(true, Some("/run/user/0")).unwrap(), "/run/vmft/web.sock");
        assert_eq!(shown(false, Some("/run/user/7")).unwrap(), "/run/user/7/vmft/web.sock");
        assert!(matches!(shown(false, None), Err(SocketError::NoPlace)));
        assert!(matches!(shown(false, Some("")), Err(SocketError::NoPlace)));
    }

    #[test]
    fn the_file_is_its_users_only_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmft/web.sock");
        let socket = ControlSocket::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o7777, 0o700);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_monitors_socket_is_replaced_and_a_living_ones_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file, as a killed monitor does");
        let socket = ControlSocket::open(&path).unwrap();
        let refused = ControlSocket::open(&path).unwrap_err();
        assert!(matches!(refused, SocketError::InUse { .. }), "{refused}");
        assert!(refused.to_string().contains(&path.display().to_string()), "{refused}");
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn anothers_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.sock");
        fs::write(&path, "something else").unwrap();
        assert!(matches!(ControlSocket::open(&path), Err(SocketError::NoSocket { .. })));
        fs::remove_file(&path).unwrap();
        let first = ControlSocket::open(&path).unwrap();
        fs::rename(&path, directory.path().join("moved")).unwrap();
        let second = ControlSocket::open(&path).unwrap();
        drop(first);
        assert!(path.exists(), "the second one's file");
        drop(second);
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let refused = ControlSocket::open(&directory.path().join("x".repeat(200))).unwrap_err();
        assert!(refused.to_string().contains("--control"), "{refused}");
    }
}
