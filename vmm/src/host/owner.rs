//! Whose a disk image is: a record beside it.
//!
//! Owns: the file `<image>.vmft-owner`. Must never: decide who may have the image (the claim does), or say that it is
//! still ours without having asked the storage.
//!
//! ```text
//!   no record ── take ──> ours ─┬─ another takes it ──> lost, for good
//!       ^                       └─ release (the guest has ended) ─┐
//!       └─────────────────────────────────────────────────────────┘
//! ```
//!
//! A new owner renames its record over the old one. The old one's file, which the old owner holds open, then has no name
//! any more, and that is what the old owner asks for before each write: one request, which no cache of its host may answer
//! and for which no clock counts.
//!
//! Not covered: a write that has left this process when the record is replaced; block devices, which have nothing beside
//! them that two hosts see; file systems that do not count names.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::{random_bytes, sync_directory};

/// More than any record has.
const MAX_RECORD_BYTES: u64 = 4_096;

/// An image that belongs to this monitor, unless another one has taken it since.
#[derive(Debug)]
pub struct Ownership {
    path: PathBuf,
    record: File,
}

/// Whether the image is still ours.
#[derive(Debug)]
pub enum Owned {
    /// It was when the storage was asked.
    Yes,
    /// Another monitor has taken it.
    No,
    /// The storage did not say.
    Unknown(io::Error),
}

/// The record's path: beside `image`, where every host looks that knows the image by this name.
pub fn path_of(image: &Path) -> PathBuf {
    let mut path = OsString::from(image);
    path.push(".vmft-owner");
    path.into()
}

/// The record of the owner that `image` has, if it has one.
pub fn read(image: &Path) -> io::Result<Option<Vec<u8>>> {
    let mut record = Vec::new();
    match File::open(path_of(image)) {
        Ok(file) => file.take(MAX_RECORD_BYTES).read_to_end(&mut record).map(|_| Some(record)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Ownership {
    /// Makes `image` ours, whoever had it. `None`: nothing can be kept beside it.
    pub fn take(image: &Path, record: &[u8]) -> io::Result<Option<Self>> {
        if fs::metadata(image)?.file_type().is_block_device() {
            return Ok(None);
        }
        let path = path_of(image);
        let mut id = [0; 8];
        random_bytes(&mut id)?;
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!("-{:016x}", u64::from_le_bytes(id)));
        let written = write_durably(Path::new(&temporary), record).and_then(|file| {
            fs::rename(&temporary, &path)?;
            Ok(file)
        });
        let file = written.inspect_err(|_| {
            // It may not be there; what stays behind is never looked at.
            let _ = fs::remove_file(&temporary);
        })?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_directory(directory.unwrap_or(Path::new(".")))?;
        match names(&file)? {
            Some(1) => Ok(Some(Self { path, record: file })),
            _ => {
                tracing::warn!(owner = %path.display(),
                    "The file system does not count a file's names; a takeover of the image will not be noticed by it.");
                Ok(None)
            }
        }
    }

    /// Asks the storage.
    pub fn ask(&self) -> Owned {
        match names(&self.record) {
            Ok(Some(0)) => Owned::No,
            Ok(_) => Owned::Yes,
            // So a file server calls a file that it has removed.
            Err(error) if error.raw_os_error() == Some(Errno::ESTALE as i32) => Owned::No,
            Err(error) => Owned::Unknown(error),
        }
    }

    /// The record's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Nobody needs the image any more. Leaves another's record alone.
    pub fn release(&self) -> io::Result<()> {
        match self.ask() {
            Owned::Yes => fs::remove_file(&self.path),
            Owned::No => Ok(()),
            Owned::Unknown(error) => Err(error),
        }
    }
}

fn write_durably(path: &Path, record: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(record)?;
    file.sync_all()?;
    Ok(file)
}

/// How many names an open file has, as the storage says now. `None`: it does not say.
fn names(file: &File) -> io::Result<Option<u32>> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_FORCE_SYNC;
    // SAFETY: all-zero bytes are a `statx`, which has integers only.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string and the kernel writes one `statx` to `found`; both outlive the call.
    let status =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_NLINK, &raw mut found) };
    Errno::result(status)?;
    Ok((found.stx_mask & libc::STATX_NLINK != 0).then_some(found.stx_nlink))
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn image() -> (TempDir, PathBuf) {
        let directory = TempDir::new().unwrap();
        let image = directory.path().join("disk.img");
        fs::write(&image, [0; 512]).unwrap();
        (directory, image)
    }

    fn take(image: &Path, record: &str) -> Ownership {
        Ownership::take(image, record.as_bytes()).unwrap().unwrap()
    }

    #[test]
    fn the_last_to_take_an_image_has_it() {
        let (directory, image) = image();
        assert_eq!(read(&image).unwrap(), None);
        let first = take(&image, "first");
        assert!(matches!(first.ask(), Owned::Yes));
        let second = take(&image, "second");
        assert!(matches!((first.ask(), second.ask()), (Owned::No, Owned::Yes)));
        first.release().unwrap();
        assert_eq!(read(&image).unwrap(), Some(b"second".to_vec()), "the first one has nothing to release");
        second.release().unwrap();
        assert_eq!(read(&image).unwrap(), None);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing but the image is left");
    }

    #[test]
    fn a_record_that_somebody_removed_is_nobodys() {
        let (_directory, image) = image();
        let owner = take(&image, "ours");
        fs::remove_file(path_of(&image)).unwrap();
        assert!(matches!(owner.ask(), Owned::No));
    }

    #[test]
    fn an_image_that_cannot_be_taken_stays_with_its_owner() {
        let (directory, image) = image();
        let owner = take(&image, "ours");
        assert!(Ownership::take(&directory.path().join("none.img"), b"theirs").is_err());
        // A directory is in the place of the record, so that the renaming fails.
        let other = directory.path().join("other.img");
        fs::write(&other, [0; 512]).unwrap();
        fs::create_dir(path_of(&other)).unwrap();
        assert!(Ownership::take(&other, b"theirs").is_err());
        assert!(matches!(owner.ask(), Owned::Yes));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 4, "what was written is removed again");
    }
}
