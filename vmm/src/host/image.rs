//! Which file a disk image is, whatever it is called.
//!
//! Owns: a descriptor of the file that names it without opening it, the place where it really is, and marks beside it.
//! Must never: read or write the image, or take another file for it because path, size or content are alike.
//!
//! ```text
//!   path given ── links resolved ──> place of the file ── check ─┬─ one name, this name, this file: fit
//!                                                                └─ more names, a mount of its own, another file: unfit
//! ```
//!
//! What a pair keeps beside an image, the owner's record above all, is only worth something if everybody who uses the
//! file looks in the same place. So the place is that of the file, not of a symbolic link to it, and a file that has
//! several such places (hard links, a bind mount of the file alone) is refused.
//!
//! Two hosts need not have the same inode numbers for one file. What tells that they see the same one is a *mark*: an
//! empty file with a random name that one host makes beside the image and the other finds there. A copy does not have
//! it, even if the owner's record was copied along.
//!
//! Not covered: block devices; a file system that does not count names may have others.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ft_log::to_hex;
use nix::errno::Errno;

use super::random_bytes;

/// Why an image is not fit for a pair.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Hard links.
    #[error(
        "disk image '{path}' has {names} names (hard links), and a monitor that uses another one would not find its \
         owner. Remove the others (`find DIRECTORY -samefile {path}` lists them), or give the guest a copy"
    )]
    Linked {
        /// The image.
        path: PathBuf,
        /// How many.
        names: u32,
    },
    /// A bind mount of the file.
    #[error(
        "disk image '{path}' is mounted as a single file, so that its owner's record would not be beside the file itself. \
         Mount its directory in place of it"
    )]
    Mounted {
        /// The image.
        path: PathBuf,
    },
    /// Another file has its name, or none has.
    #[error(
        "disk image '{path}' was replaced or removed: it is not the file any more that this monitor has opened"
    )]
    Replaced {
        /// The image.
        path: PathBuf,
    },
    /// The storage did not say.
    #[error("disk image '{path}' cannot be examined: {source}")]
    Io {
        /// The image.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl ImageError {
    /// Is it certain, so that asking again later makes no difference?
    pub fn is_certain(&self) -> bool {
        !matches!(self, Self::Io { .. })
    }
}

/// A file by what no name changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileId {
    device: (u32, u32),
    inode: u64,
}

/// What the storage says of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) id: FileId,
    /// `None`: the file system does not count them.
    pub(super) names: Option<u32>,
    pub(super) len_bytes: u64,
    /// When anything of it, its names included, was last changed.
    pub(super) changed: (i64, u32),
    is_mount: bool,
}

impl Status {
    /// Of an open file. The storage is asked, not this host's cache.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Self::ask(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)
    }

    /// Of the file that is called `path`, which may be a symbolic link itself.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        Self::ask(libc::AT_FDCWD, &path, libc::AT_SYMLINK_NOFOLLOW)
    }

    fn ask(directory: RawFd, path: &std::ffi::CStr, flags: i32) -> io::Result<Self> {
        let wanted = libc::STATX_NLINK | libc::STATX_INO | libc::STATX_SIZE | libc::STATX_CTIME;
        // SAFETY: all-zero bytes are a `statx`, which has integers only.
        let mut found: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: `path` is a C string and the kernel writes one `statx` to `found`; both outlive the call.
        let status = unsafe {
            libc::statx(directory, path.as_ptr(), flags | libc::AT_STATX_FORCE_SYNC, wanted, &raw mut found)
        };
        Errno::result(status)?;
        Ok(Self {
            id: FileId { device: (found.stx_dev_major, found.stx_dev_minor), inode: found.stx_ino },
            names: (found.stx_mask & libc::STATX_NLINK != 0).then_some(found.stx_nlink),
            len_bytes: found.stx_size,
            changed: (found.stx_ctime.tv_sec, found.stx_ctime.tv_nsec),
            is_mount: found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0,
        })
    }
}

/// The file of a disk image.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    id: FileId,
}

impl Image {
    /// The file that is open as `file` and was given as `path`. `None`: it is a block device.
    ///
    /// # Errors
    /// `path` leads to another file by now, or the storage does not answer.
    pub fn of(path: &Path, file: &File) -> Result<Option<Self>, ImageError> {
        let failed = |source| ImageError::Io { path: path.to_owned(), source };
        if file.metadata().map_err(failed)?.file_type().is_block_device() {
            return Ok(None);
        }
        let place = place_of(path)?;
        // Neither the lock nor the state of the open file depends on this descriptor.
        let named = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&place).map_err(failed)?;
        let id = Status::of(file).map_err(failed)?.id;
        if Status::of(&named).map_err(failed)?.id != id {
            return Err(ImageError::Replaced { path: place });
        }
        Ok(Some(Self { path: place, file: named, id }))
    }

    /// Where the file really is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Is it still this file, under its one name?
    ///
    /// # Errors
    /// It is not, or the storage does not say.
    pub fn check(&self) -> Result<(), ImageError> {
        let path = || self.path.clone();
        let failed = |source| ImageError::Io { path: path(), source };
        let names = match Status::of(&self.file) {
            Ok(status) => status.names,
            // So a file server calls a file that it has removed.
            Err(error) if is_stale(&error) => Some(0),
            Err(error) => return Err(failed(error)),
        };
        match names {
            Some(0) => return Err(ImageError::Replaced { path: path() }),
            Some(names) if names > 1 => return Err(ImageError::Linked { path: path(), names }),
            // A name that is not there need not be gone for good: the storage may not be mounted.
            Some(_) | None => {}
        }
        let here = Status::at(&self.path).map_err(failed)?;
        if here.id != self.id {
            return Err(ImageError::Replaced { path: path() });
        }
        if here.is_mount {
            return Err(ImageError::Mounted { path: path() });
        }
        Ok(())
    }

    /// Leaves a mark beside the image, for another host to find.
    pub fn leave_mark(&self) -> io::Result<Mark> {
        let mut id = [0; 16];
        random_bytes(&mut id)?;
        let path = self.mark_path(&id);
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Mark { id, path })
    }

    /// Is this mark beside the image?
    pub fn has_mark(&self, id: &[u8; 16]) -> io::Result<bool> {
        match Status::at(&self.mark_path(id)) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn mark_path(&self, id: &[u8; 16]) -> PathBuf {
        beside(&self.path, &format!(".vmft-mark-{}", to_hex(id)))
    }
}

/// A mark beside an image, until dropped.
#[derive(Debug)]
pub struct Mark {
    id: [u8; 16],
    path: PathBuf,
}

impl Mark {
    /// Its id, which nobody can guess.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("The mark {} stays, and may be removed: {error}", self.path.display());
        }
    }
}

/// Where the file really is that `path` leads to.
pub(super) fn place_of(path: &Path) -> Result<PathBuf, ImageError> {
    fs::canonicalize(path).map_err(|source| ImageError::Io { path: path.to_owned(), source })
}

/// The file whose name is that of `path` with `suffix`.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(suffix);
    path.into()
}

/// Does the storage say that the file is no more?
pub(super) fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::ESTALE as i32)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    /// A directory with an image in it, and the image.
    fn image() -> (TempDir, PathBuf) {
        let directory = TempDir::new().unwrap();
        let path = directory.path().canonicalize().unwrap().join("disk.img");
        fs::write(&path, [0; 512]).unwrap();
        (directory, path)
    }

    fn find(path: &Path) -> Image {
        Image::of(path, &File::open(path).unwrap()).unwrap().unwrap()
    }

    #[test]
    fn an_image_is_found_at_its_own_place_through_any_link() {
        let (directory, path) = image();
        let (link, elsewhere) = (directory.path().join("link.img"), directory.path().join("elsewhere"));
        symlink(&path, &link).unwrap();
        symlink(directory.path(), &elsewhere).unwrap();
        for name in [&path, &link, &elsewhere.join("disk.img"), &elsewhere.join("link.img")] {
            let image = find(name);
            assert_eq!(image.path(), path);
            image.check().unwrap();
        }
    }

    #[test]
    fn an_image_with_another_name_is_unfit_until_that_is_removed() {
        let (directory, path) = image();
        let (image, other) = (find(&path), directory.path().join("other.img"));
        fs::hard_link(&path, &other).unwrap();
        for image in [&image, &find(&other)] {
            let error = image.check().unwrap_err();
            assert!(matches!(error, ImageError::Linked { names: 2, .. }) && error.is_certain(), "{error}");
        }
        fs::remove_file(&other).unwrap();
        image.check().unwrap();
    }

    #[test]
    fn an_image_that_was_replaced_is_not_the_one_that_was_opened() {
        let (directory, path) = image();
        let (file, image) = (File::open(&path).unwrap(), find(&path));
        let copy = directory.path().join("copy.img");
        fs::copy(&path, &copy).unwrap();
        // Whoever keeps the old one under another name is no better off.
        for kept in [true, false] {
            if kept {
                fs::rename(&path, directory.path().join("kept.img")).unwrap();
                assert!(!image.check().unwrap_err().is_certain(), "it may be moved back");
            } else {
                fs::remove_file(directory.path().join("kept.img")).unwrap();
            }
            fs::copy(&copy, &path).unwrap();
            let error = image.check().unwrap_err();
            assert!(matches!(error, ImageError::Replaced { .. }) && error.is_certain(), "{error}");
            assert!(matches!(Image::of(&path, &file), Err(ImageError::Replaced { .. })));
        }
        fs::remove_file(&path).unwrap();
        symlink(&copy, &path).unwrap();
        assert!(matches!(image.check(), Err(ImageError::Replaced { .. })));
    }

    #[test]
    fn a_mark_is_found_beside_the_image_and_nowhere_else() {
        let (directory, path) = image();
        let link = directory.path().join("link.img");
        symlink(&path, &link).unwrap();
        let other = directory.path().join("other.img");
        fs::copy(&path, &other).unwrap();
        let mark = find(&path).leave_mark().unwrap();
        assert!(find(&link).has_mark(&mark.id()).unwrap());
        assert!(!find(&other).has_mark(&mark.id()).unwrap());
        assert!(!find(&path).has_mark(&[7; 16]).unwrap());
        drop(mark);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 3, "the mark is gone");
    }
}
