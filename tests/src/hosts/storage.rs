//! Shared storage that can be filled, and who writes a file of it.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

use super::{HostError, Net};

/// Name of the file that takes up the space.
const FILLER: &str = "filler";
const BLOCK: [u8; 4096] = [0; 4096];

/// A directory of this machine that is a small file system. It goes away with the network for which it was made.
#[derive(Debug)]
pub struct SmallDir {
    path: PathBuf,
}

impl SmallDir {
    /// Makes the directory, which must be inside the run directory of `_net`. Hosts that export it or a directory
    /// above it must start later.
    pub fn make(_net: &Net, path: &Path, kib: u32) -> Result<SmallDir, HostError> {
        fs::create_dir(path).map_err(HostError::file(path))?;
        let (kind, size) = (Some("tmpfs"), format!("size={kib}k"));
        mount(kind, path, kind, MsFlags::empty(), Some(size.as_str()))
            .map_err(|error| HostError::file(path)(error.into()))?;
        Ok(SmallDir { path: path.to_owned() })
    }

    /// Leaves no space for anything.
    pub fn fill(&self) -> Result<(), HostError> {
        let path = self.path.join(FILLER);
        let fill = || -> io::Result<()> {
            let mut file = File::create(&path)?;
            loop {
                match file.write(&BLOCK) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
                    Err(error) => return Err(error),
                }
            }
        };
        fill().map_err(HostError::file(&path))
    }

    /// Undoes [`SmallDir::fill`].
    pub fn empty(&self) -> Result<(), HostError> {
        let path = self.path.join(FILLER);
        fs::remove_file(&path).map_err(HostError::file(&path))
    }
}

/// Sees who writes to a file: the processes of this machine, in order.
#[derive(Debug)]
pub struct Writers {
    group: Fanotify,
    path: PathBuf,
}

impl Writers {
    /// Of `path`, from now on.
    pub fn watch(path: &Path) -> Result<Writers, HostError> {
        let open = || -> nix::Result<Fanotify> {
            let flags = InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK | InitFlags::FAN_CLASS_NOTIF;
            let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC)?;
            group.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_MODIFY, AT_FDCWD, Some(path))?;
            Ok(group)
        };
        let group = open().map_err(|error| HostError::file(path)(error.into()))?;
        Ok(Writers { group, path: path.to_owned() })
    }

    /// Waits for a write, for `timeout` at most. Returns the processes that have written since the last call. The
    /// kernel keeps only the first of the writes of each that nobody has looked at yet, so whoever asks seldom sees
    /// less of the order.
    pub fn processes(&self, timeout: Duration) -> Result<Vec<i32>, HostError> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.group.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(HostError::file(&self.path)(error.into())),
        }
        let mut processes = Vec::new();
        loop {
            match self.group.read_events() {
                Ok(events) => {
                    for event in events {
                        if event.mask().contains(MaskFlags::FAN_Q_OVERFLOW) {
                            let reason = io::Error::other("so many writes that some were not seen");
                            return Err(HostError::file(&self.path)(reason));
                        }
                        processes.push(event.pid());
                    }
                }
                Err(Errno::EAGAIN) => return Ok(processes),
                Err(Errno::EINTR) => {}
                Err(error) => return Err(HostError::file(&self.path)(error.into())),
            }
        }
    }
}
