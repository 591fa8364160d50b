//! Whose a disk image is: a record beside it.
//!
//! Owns: the file `<image>.vmft-owner`, where the image's file really is (`host/image.rs`). Must never: decide who may
//! have the image (the claim does), replace a record that its caller does not know, or say that the image is still ours
//! without having asked the storage.
//!
//! ```text
//!   no record ── take ──> ours ─┬─ another takes it ──> lost, for good
//!       ^                       └─ release (the guest has ended) ─┐
//!       └─────────────────────────────────────────────────────────┘
//! ```
//!
//! A new owner renames its record over the old one. The old one's file, which the old owner holds open, then has no name
//! any more, and that is what the old owner asks for before each write: one request about the open file, which no cache
//! of its host may answer and for which no clock counts.
//!
//! A hard link to the record would keep a name for it. So the new owner also empties a file that it has replaced and that
//! still has a name. And the old owner relies on the count only while the file's status is as it was when its name was
//! last seen to lead to it: a link, a rename, a removal and a change of its length all change the time of its last
//! change. If that differs, the name is looked up again. Times may be coarse, so a status counts only once it has been
//! the same for `SETTLED_AFTER`; until then each question looks the name up. The look-up may be answered from a cache
//! of the host (docs/reference.md: `lookupcache=none`); the two means before it are not.
//!
//! Not covered: a write that has left this process when the record is replaced; a record that is replaced between the
//! moment at which `take` reads it and the renaming: the last to rename has the image, and the other one notices; block
//! devices, which have nothing beside them that two hosts see.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ft_log::MAX_OWNER_BYTES;

use super::image::{Image, ImageError, Status, beside, is_stale, place_of};
use super::{random_bytes, sync_directory};

/// Longer than the steps in which any file system counts time.
const SETTLED_AFTER: Duration = Duration::from_secs(3);

/// An image that belongs to this monitor, unless another one has taken it since.
#[derive(Debug)]
pub struct Ownership {
    image: Arc<Image>,
    path: PathBuf,
    record: Vec<u8>,
    file: File,
    seen: Mutex<Seen>,
}

/// The record's status when its name was last seen to lead to it.
#[derive(Debug)]
struct Seen {
    status: Status,
    since: Instant,
    settled: bool,
}

/// Whether the image is still ours.
#[derive(Debug)]
pub enum Owned {
    /// It was when the storage was asked.
    Yes,
    /// Another monitor has taken it, or the record was removed.
    No,
    /// The storage did not say.
    Unknown(io::Error),
}

/// Why an image cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    /// The image is unfit.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Its record is not the one that was to be replaced.
    #[error("the record of the disk image's owner is another one now")]
    Other {
        /// The record; `None`: there is none.
        found: Option<Vec<u8>>,
    },
    /// The storage refuses.
    #[error("the record of the disk image's owner, '{path}', cannot be read or written: {source}")]
    Io {
        /// The record's path.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl TakeError {
    /// Is it certain, so that trying again makes no difference?
    pub fn is_certain(&self) -> bool {
        match self {
            Self::Image(error) => error.is_certain(),
            Self::Other { .. } => true,
            Self::Io { .. } => false,
        }
    }
}

/// The path of the record of the image that is really at `place`.
pub fn path_of(place: &Path) -> PathBuf {
    beside(place, ".vmft-owner")
}

/// The record of the owner of the image that `path` leads to, and where it is or would be. An image that does not exist has
/// none; whoever opens it says so.
pub fn find(path: &Path) -> Result<(Option<Vec<u8>>, PathBuf), TakeError> {
    let place = match place_of(path) {
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => path.to_owned(),
        place => place?,
    };
    let record = path_of(&place);
    let found = open(&record, OpenOptions::new().read(true))?;
    Ok((found.map(|(_, content)| content), record))
}

/// The record of the owner of `image`, if it has one.
pub fn read(image: &Image) -> Result<Option<Vec<u8>>, TakeError> {
    Ok(open(&path_of(image.path()), OpenOptions::new().read(true))?.map(|(_, content)| content))
}

/// Opens and reads the record at `path`, if there is one.
fn open(path: &Path, options: &OpenOptions) -> Result<Option<(File, Vec<u8>)>, TakeError> {
    let failed = |source| TakeError::Io { path: path.to_owned(), source };
    let file = match options.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    if Status::of(&file).map_err(failed)?.names == Some(0) {
        let why = "it is being replaced now, or the storage is not mounted as docs/reference.md says";
        return Err(failed(io::Error::other(why)));
    }
    let mut content = Vec::new();
    // A byte more than any record has, so that one that is too long is no record.
    (&file).take(MAX_OWNER_BYTES as u64 + 1).read_to_end(&mut content).map_err(failed)?;
    Ok(Some((file, content)))
}

impl Ownership {
    /// Makes `image` ours. `known`: the record that it has now, as far as the caller knows; `None`: it has none. That may
    /// be `record` itself, from an attempt that failed half-way.
    ///
    /// # Errors
    /// The image is unfit, its record is not the known one, or the storage refuses.
    pub fn take(image: &Arc<Image>, record: &[u8], known: Option<&[u8]>) -> Result<Self, TakeError> {
        image.check()?;
        let path = path_of(image.path());
        let failed = |source| TakeError::Io { path: path.clone(), source };
        let former = open(&path, OpenOptions::new().read(true).write(true))?;
        let found = former.as_ref().map(|(_, content)| &content[..]);
        if found != known && found != Some(record) {
            return Err(TakeError::Other { found: found.map(<[u8]>::to_vec) });
        }
        let file = put(&path, record).map_err(failed)?;
        if let Some((former, _)) = former {
            let names = Status::of(&former).map(|status| status.names);
            // Also where nobody says how many it has.
            if !matches!(names, Ok(Some(0))) && !matches!(&names, Err(error) if is_stale(error)) {
                former.set_len(0).map_err(failed)?;
            }
        }
        let status = Status::of(&file).map_err(failed)?;
        let seen = Mutex::new(Seen { status, since: Instant::now(), settled: false });
        Ok(Self { image: Arc::clone(image), path, record: record.to_vec(), file, seen })
    }

    /// Asks the storage.
    pub fn ask(&self) -> Owned {
        let status = match Status::of(&self.file) {
            Ok(status) => status,
            Err(error) if is_stale(&error) => return Owned::No,
            Err(error) => return Owned::Unknown(error),
        };
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let same = status == seen.status;
        if same && seen.settled {
            return Owned::Yes;
        }
        if status.names == Some(0) || status.len_bytes != self.record.len() as u64 {
            return Owned::No;
        }
        match Status::at(&self.path) {
            Ok(named) if named.id == status.id => {}
            Ok(_) => return Owned::No,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Owned::No,
            Err(error) => return Owned::Unknown(error),
        }
        if same {
            // Where names are not counted, only the name tells.
            seen.settled = status.names.is_some() && seen.since.elapsed() > SETTLED_AFTER;
        } else {
            *seen = Seen { status, since: Instant::now(), settled: false };
        }
        Owned::Yes
    }

    /// The image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// What the record says.
    pub fn record(&self) -> &[u8] {
        &self.record
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

/// Puts a file with `record` at `path`, in place of whatever is there.
fn put(path: &Path, record: &[u8]) -> io::Result<File> {
    let mut id = [0; 8];
    random_bytes(&mut id)?;
    let temporary = beside(path, &format!("-{:016x}", u64::from_le_bytes(id)));
    let written = write_durably(&temporary, record).and_then(|file| {
        fs::rename(&temporary, path)?;
        Ok(file)
    });
    let file = written.inspect_err(|_| {
        // It may not be there; what stays behind is never looked at.
        let _ = fs::remove_file(&temporary);
    })?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    sync_directory(directory.unwrap_or(Path::new(".")))?;
    Ok(file)
}

fn write_durably(path: &Path, record: &[u8]) -> io::Result<File> {
    let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
    file.write_all(record)?;
    file.sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    struct Case {
        directory: TempDir,
        path: PathBuf,
    }

    impl Case {
        fn new() -> Self {
            let directory = TempDir::new().unwrap();
            let path = directory.path().canonicalize().unwrap().join("disk.img");
            fs::write(&path, [0; 512]).unwrap();
            Self { directory, path }
        }

        fn image(&self, name: &str) -> Arc<Image> {
            let path = self.directory.path().join(name);
            Arc::new(Image::of(&path, &File::open(&path).unwrap()).unwrap().unwrap())
        }

        fn try_take(&self, record: &str, known: Option<&str>) -> Result<Ownership, TakeError> {
            Ownership::take(&self.image("disk.img"), record.as_bytes(), known.map(str::as_bytes))
        }

        fn take(&self, record: &str, known: Option<&str>) -> Ownership {
            self.try_take(record, known).unwrap()
        }

        fn record(&self) -> PathBuf {
            path_of(&self.path)
        }

        fn read(&self) -> Option<String> {
            read(&self.image("disk.img")).unwrap().map(|record| String::from_utf8(record).unwrap())
        }
    }

    fn is_lost(owner: &Ownership) -> bool {
        match owner.ask() {
            Owned::Yes => false,
            Owned::No => true,
            Owned::Unknown(error) => panic!("{error}"),
        }
    }

    #[test]
    fn the_last_to_take_an_image_has_it() {
        let case = Case::new();
        assert_eq!(case.read(), None);
        let first = case.take("first", None);
        assert!(!is_lost(&first));
        let second = case.take("second", Some("first"));
        assert!(is_lost(&first) && !is_lost(&second));
        first.release().unwrap();
        assert_eq!(case.read().as_deref(), Some("second"), "the first one has nothing to release");
        second.release().unwrap();
        assert_eq!(case.read(), None);
        assert_eq!(fs::read_dir(case.directory.path()).unwrap().count(), 1, "nothing but the image is left");
    }

    #[test]
    fn a_record_that_is_not_known_is_not_replaced() {
        let case = Case::new();
        let theirs = case.take("theirs", None);
        for known in [None, Some("ours")] {
            let refused = case.try_take("new", known).unwrap_err();
            let TakeError::Other { found } = &refused else { panic!("{refused}") };
            assert_eq!(found.as_deref(), Some(&b"theirs"[..]));
            assert!(refused.is_certain() && !is_lost(&theirs));
        }
        theirs.release().unwrap();
        let gone = case.try_take("new", Some("theirs")).unwrap_err();
        assert!(matches!(gone, TakeError::Other { found: None }), "{gone}");
        // An attempt that failed behind the renaming.
        let ours = case.take("new", None);
        let again = case.take("new", None);
        assert!(is_lost(&ours) && !is_lost(&again));
    }

    #[test]
    fn a_record_that_somebody_removed_is_nobodys() {
        let case = Case::new();
        let owner = case.take("ours", None);
        fs::remove_file(case.record()).unwrap();
        assert!(is_lost(&owner));
    }

    /// Whoever takes the image does, with another record of the same length, and so does who replaces the record by hand.
    #[test]
    fn a_hard_link_to_the_record_keeps_nothing() {
        for by_hand in [false, true] {
            for settled in [false, true] {
                let case = Case::new();
                let owner = case.take("ours", None);
                owner.seen.lock().unwrap().settled = settled;
                // The clock that dates changes has moved on, as it has whenever a status counts as settled.
                let probe = case.directory.path().join("probe");
                let date = |path: &Path| Status::at(path).unwrap().changed;
                while settled && (!probe.exists() || date(&probe) == date(&case.record())) {
                    fs::write(&probe, "").unwrap();
                }
                let kept = case.directory.path().join("kept");
                fs::hard_link(case.record(), &kept).unwrap();
                assert!(!is_lost(&owner), "it is still the image's record");
                if by_hand {
                    let new = case.directory.path().join("new");
                    fs::write(&new, "else").unwrap();
                    fs::rename(&new, case.record()).unwrap();
                } else {
                    let new = case.take("else", Some("ours"));
                    assert!(!is_lost(&new));
                    assert_eq!(fs::read(&kept).unwrap(), b"", "the old one says so wherever it is kept");
                }
                assert!(is_lost(&owner), "by hand: {by_hand}, settled: {settled}");
            }
        }
    }

    #[test]
    fn a_record_that_is_only_touched_stays_its_owners() {
        let case = Case::new();
        let owner = case.take("ours", None);
        owner.seen.lock().unwrap().settled = true;
        let mut mode = fs::metadata(case.record()).unwrap().permissions();
        mode.set_readonly(true);
        fs::set_permissions(case.record(), mode).unwrap();
        assert!(!is_lost(&owner));
    }

    #[test]
    fn links_to_an_image_lead_to_one_record_or_to_none() {
        let case = Case::new();
        symlink(&case.path, case.directory.path().join("link.img")).unwrap();
        let first = Ownership::take(&case.image("link.img"), b"first", None).unwrap();
        assert_eq!(case.read().as_deref(), Some("first"), "the record is beside the image");
        assert_eq!(find(&case.directory.path().join("link.img")).unwrap().1, case.record());
        let second = case.take("second", Some("first"));
        assert!(is_lost(&first) && !is_lost(&second));
        fs::hard_link(&case.path, case.directory.path().join("hard.img")).unwrap();
        for name in ["hard.img", "disk.img"] {
            let refused = Ownership::take(&case.image(name), b"third", Some(b"second")).unwrap_err();
            assert!(matches!(refused, TakeError::Image(ImageError::Linked { .. })), "{refused}");
        }
        assert!(!is_lost(&second));
    }

    #[test]
    fn an_image_that_cannot_be_taken_stays_with_its_owner() {
        let case = Case::new();
        let owner = case.take("ours", None);
        // A directory is in the place of the record.
        let other = case.directory.path().join("other.img");
        fs::write(&other, [0; 512]).unwrap();
        fs::create_dir(path_of(&other)).unwrap();
        let refused = Ownership::take(&case.image("other.img"), b"theirs", None).unwrap_err();
        assert!(!refused.is_certain(), "{refused}");
        assert!(!is_lost(&owner));
        assert_eq!(
            fs::read_dir(case.directory.path()).unwrap().count(),
            4,
            "what was written is removed again"
        );
    }
}
