//! `dir:PATH`: records as files in a directory that both hosts share.
//!
//! Owns: one file per claimed view, and the directory's id. Must never: show a half-written record, or take an
//! error for a refusal.
//!
//! ```text
//! temporary file: record, fsync -> link(temporary, <guest>.view-<N>) -> fsync of the directory -> unlink(temporary)
//!                                  |- created: New
//!                                  |- exists: read it, fsync of the directory: Exists
//!                                  '- other error: read it; not there or not readable: Unknown
//! ```
//!
//! `link` is atomic on local file systems, NFS and virtiofs, and the name never shows a half-written file. A call
//! takes as long as the file system does.
//!
//! The file `vmft-id` holds `vmft-directory 1`, a line with 32 hex digits, and `end`. It is looked at before each
//! claim: where another directory has come to this path, or none is mounted any more, nothing is claimed.
//!
//! Not covered: directories that two hosts see through caches which do not agree on whether a name exists.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use ft_log::to_hex;
use nix::errno::Errno;

use super::{Arbiter, ArbiterError, Created, decode_id, encode_id, random_id};
use crate::host::sync_directory;

const HEADER: &str = "vmft-directory 1";
const ID_FILE: &str = "vmft-id";
/// More than any valid file has.
const MAX_FILE_BYTES: u64 = 4_096;

/// A directory that claims can be made in. Its methods may take as long as the file system does.
#[derive(Debug)]
pub(super) struct Directory {
    path: PathBuf,
    id: [u8; 16],
}

impl Directory {
    /// Checks that claims can be made at `path`, and makes its id on first use.
    pub(super) fn open(path: &Path) -> Result<Self, ArbiterError> {
        probe(path)?;
        Ok(Self { path: path.to_owned(), id: find_or_make_id(path)? })
    }

    /// Whether this is still the directory that was opened. Else: why not.
    fn is_the_same(&self) -> Result<(), String> {
        let path = self.path.join(ID_FILE);
        let read =
            read_small(&path).map_err(|error| error.to_string()).and_then(|text| decode_id(HEADER, &text));
        let why = match read {
            Ok(id) if id == self.id => return Ok(()),
            Ok(_) => "it holds another id".to_owned(),
            Err(why) => why,
        };
        Err(format!(
            "'{}' is not known to be the directory that it was ('{ID_FILE}': {why}); mount that again",
            self.path.display()
        ))
    }

    /// What an attempt to create the record has led to.
    fn judge(&self, path: &Path, linked: io::Result<()>) -> Result<Created, ArbiterError> {
        let found = match linked {
            Ok(()) => Created::New,
            Err(error) => match read_small(path) {
                Ok(record) => Created::Exists(record),
                Err(read) if read.kind() == io::ErrorKind::NotFound && is_full(&error) => {
                    let why = ArbiterError::Full { path: self.path.clone() }.to_string();
                    return Ok(Created::Unknown { why });
                }
                Err(read) if read.kind() == io::ErrorKind::NotFound && is_refusal(&error) => {
                    return Err(ArbiterError::NotMade { path: path.to_owned(), source: error });
                }
                Err(read) => {
                    let why = format!("creating '{}': {error}; reading it back: {read}", path.display());
                    return Ok(Created::Unknown { why });
                }
            },
        };
        // The record must outlive a crash of the file server.
        match sync_directory(&self.path) {
            Ok(()) => Ok(found),
            Err(error) => {
                let why = format!("'{}' may not be durable: {error}", path.display());
                Ok(Created::Unknown { why })
            }
        }
    }

    fn path_of(&self, guest: &str, view: u64) -> PathBuf {
        self.path.join(format!("{guest}.view-{view}"))
    }

    /// The claimed views, rising.
    fn views(&self, guest: &str) -> io::Result<Vec<u64>> {
        let mut views = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            views.extend(view_of(guest, &entry?.file_name()));
        }
        views.sort_unstable();
        Ok(views)
    }
}

impl fmt::Display for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dir:{}", self.path.display())
    }
}

impl Arbiter for Directory {
    fn id(&self) -> [u8; 16] {
        self.id
    }

    fn create(&self, guest: &str, view: u64, record: &[u8]) -> Result<Created, ArbiterError> {
        if let Err(why) = self.is_the_same() {
            return Ok(Created::Unknown { why });
        }
        let path = self.path_of(guest, view);
        let temporary = match Temporary::create(&self.path, record) {
            Ok(temporary) => temporary,
            // There may be a record nevertheless, and it tells who has the view.
            Err(error) if is_full(&error) => return self.judge(&path, Err(error)),
            Err(source) => return Err(ArbiterError::NotMade { path, source }),
        };
        let linked = fs::hard_link(&temporary.path, &path);
        self.judge(&path, linked)
    }

    fn read(&self, guest: &str, view: u64) -> Result<Option<Vec<u8>>, ArbiterError> {
        let path = self.path_of(guest, view);
        match read_small(&path) {
            Ok(record) => Ok(Some(record)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(ArbiterError::Io { path, source }),
        }
    }

    fn latest(&self, guest: &str) -> Result<Option<(u64, Vec<u8>)>, ArbiterError> {
        let views = self.views(guest);
        let views = views.map_err(|source| ArbiterError::Io { path: self.path.clone(), source })?;
        for view in views.into_iter().rev() {
            // It may have been removed since the directory was listed.
            if let Some(record) = self.read(guest, view)? {
                return Ok(Some((view, record)));
            }
        }
        Ok(None)
    }

    fn place(&self, guest: &str, view: u64) -> String {
        format!("'{}'", self.path_of(guest, view).display())
    }

    fn removal(&self, guest: &str) -> String {
        format!("remove {}.view-*", self.path.join(guest).display())
    }
}

/// Checks that files can be created in the directory `path`, and leaves nothing there.
pub fn probe(path: &Path) -> Result<(), ArbiterError> {
    let owned = || path.to_owned();
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => {}
        Ok(_) => return Err(ArbiterError::NotADirectory { path: owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ArbiterError::Missing { path: owned() });
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(ArbiterError::NotADirectory { path: owned() });
        }
        Err(source) => return Err(ArbiterError::Io { path: owned(), source }),
    }
    // Permissions do not tell about read-only mounts or servers that map users; trying does.
    Temporary::create(path, b"probe").and_then(Temporary::remove).map_err(|source| {
        if is_full(&source) {
            ArbiterError::Full { path: owned() }
        } else {
            ArbiterError::NotWritable { path: owned(), source }
        }
    })
}

fn find_or_make_id(directory: &Path) -> Result<[u8; 16], ArbiterError> {
    let path = directory.join(ID_FILE);
    let not_made = |source| ArbiterError::NotMade { path: path.clone(), source };
    let damaged = |why| ArbiterError::DamagedId { place: format!("'{}'", path.display()), why };
    let id = match read_small(&path) {
        Ok(text) => return decode_id(HEADER, &text).map_err(damaged),
        Err(error) if error.kind() == io::ErrorKind::NotFound => random_id().map_err(not_made)?,
        Err(source) => return Err(ArbiterError::Io { path, source }),
    };
    let temporary = Temporary::create(directory, encode_id(HEADER, &id).as_bytes()).map_err(not_made)?;
    let linked = fs::hard_link(&temporary.path, &path);
    // What counts is the file, not who made it or what `link` answered.
    match read_small(&path) {
        Ok(text) => decode_id(HEADER, &text).map_err(damaged),
        Err(source) => Err(not_made(linked.err().unwrap_or(source))),
    }
}

fn view_of(guest: &str, file_name: &OsStr) -> Option<u64> {
    let digits = file_name.to_str()?.strip_prefix(guest)?.strip_prefix(".view-")?;
    let view = digits.parse::<u64>().ok()?;
    // One way to write a number: "+1" and "01" are not ours.
    (view.to_string() == digits).then_some(view)
}

/// A file with a random name, durable, removed on drop.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn create(directory: &Path, contents: &[u8]) -> io::Result<Self> {
        // No guest's name starts with a dot.
        let path = directory.join(format!(".vmft-{}", to_hex(&random_id()?)));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let temporary = Self { path };
        file.write_all(contents)?;
        file.sync_all()?;
        Ok(temporary)
    }

    fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // What stays behind is never looked at.
        let _ = fs::remove_file(&self.path);
    }
}

/// Whether there is no room, which may change.
fn is_full(error: &io::Error) -> bool {
    [Errno::ENOSPC, Errno::EDQUOT].iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// Whether `link` was refused for certain, so that the name does not appear later either.
fn is_refusal(error: &io::Error) -> bool {
    let refusals =
        [Errno::EPERM, Errno::EACCES, Errno::EROFS, Errno::EMLINK, Errno::ENOSYS, Errno::EOPNOTSUPP];
    refusals.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut contents)?;
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Barrier;
    use std::thread;

    use tempfile::TempDir;

    use super::*;

    fn directory() -> (TempDir, Directory) {
        let temporary = TempDir::new().unwrap();
        let directory = Directory::open(temporary.path()).unwrap();
        (temporary, directory)
    }

    fn create(directory: &Directory, view: u64, record: &str) -> Created {
        directory.create("web-1", view, record.as_bytes()).unwrap()
    }

    fn latest(directory: &Directory) -> Option<(u64, Vec<u8>)> {
        directory.latest("web-1").unwrap()
    }

    #[test]
    fn a_view_gets_one_record_for_good() {
        let (_temporary, directory) = directory();
        assert_eq!(latest(&directory), None);
        assert_eq!(create(&directory, 9, "a"), Created::New);
        assert_eq!(create(&directory, 10, "b"), Created::New);
        assert_eq!(create(&directory, 9, "c"), Created::Exists(b"a".to_vec()));
        assert_eq!(directory.read("web-1", 9).unwrap(), Some(b"a".to_vec()));
        assert_eq!(directory.read("web-1", 8).unwrap(), None);
        assert_eq!(latest(&directory), Some((10, b"b".to_vec())));
    }

    #[test]
    fn an_answer_that_was_lost_is_read_back() {
        let (_temporary, directory) = directory();
        let path = directory.path_of("web-1", 1);
        let lost_answer = || Err(io::Error::from_raw_os_error(libc::EIO));
        let nothing_there = directory.judge(&path, lost_answer()).unwrap();
        assert!(matches!(nothing_there, Created::Unknown { .. }));
        assert_eq!(create(&directory, 1, "a"), Created::New);
        assert_eq!(directory.judge(&path, lost_answer()).unwrap(), Created::Exists(b"a".to_vec()));
    }

    #[test]
    fn a_refusal_is_told_from_an_unclear_answer() {
        let (_temporary, directory) = directory();
        let judge = |errno| {
            let path = directory.path_of("web-1", 1);
            directory.judge(&path, Err(io::Error::from_raw_os_error(errno)))
        };
        assert!(matches!(judge(libc::EPERM), Err(ArbiterError::NotMade { .. })));
        for errno in [libc::EIO, libc::ESTALE, libc::ETIMEDOUT, libc::EINTR, libc::ENOSPC] {
            assert!(matches!(judge(errno), Ok(Created::Unknown { .. })), "errno {errno}");
        }
    }

    #[test]
    fn other_guests_and_other_files_are_not_looked_at() {
        let (temporary, directory) = directory();
        for name in ["web-1.view-", "web-1.view-09", "web-1.view-+9", "web-1.view-9.view-8", "web-10.view-9"]
        {
            fs::write(temporary.path().join(name), "not a claim of this guest").unwrap();
        }
        assert_eq!(latest(&directory), None);
        assert_eq!(create(&directory, u64::MAX, "a"), Created::New);
        assert_eq!(latest(&directory), Some((u64::MAX, b"a".to_vec())));
    }

    #[test]
    fn all_who_look_at_a_directory_see_one_id() {
        let temporary = TempDir::new().unwrap();
        let barrier = Barrier::new(8);
        let ids: Vec<[u8; 16]> = thread::scope(|scope| {
            let look = |_| {
                scope.spawn(|| {
                    barrier.wait();
                    Directory::open(temporary.path()).unwrap().id()
                })
            };
            let threads: Vec<_> = (0..8).map(look).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_ne!(directory().1.id(), ids[0], "another directory has another id");
        fs::write(temporary.path().join("vmft-id"), "vmft-directory 1\nid 12\nend\n").unwrap();
        assert!(matches!(Directory::open(temporary.path()), Err(ArbiterError::DamagedId { .. })));
    }

    #[test]
    fn a_directory_id_is_stored_as_documented() {
        let golden = "vmft-directory 1\nid 000102030405060708090a0b0c0d0e0f\nend\n";
        let id = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(encode_id(HEADER, &id), golden);
        assert_eq!(decode_id(HEADER, golden.as_bytes()), Ok(id));
    }

    #[test]
    fn a_directory_that_is_not_the_one_it_was_decides_nothing() {
        let (temporary, directory) = directory();
        let id = temporary.path().join(ID_FILE);
        let whole = fs::read(&id).unwrap();
        // As under a mount that is gone, with another one in its place, and with a damaged file.
        fs::remove_file(&id).unwrap();
        for contents in [None, Some(encode_id(HEADER, &[1; 16])), Some("vmft-dir".into())] {
            if let Some(contents) = contents {
                fs::write(&id, contents).unwrap();
            }
            let Created::Unknown { why } = create(&directory, 1, "a") else { panic!("it decided") };
            assert!(why.contains("mount that again"), "{why}");
        }
        assert_eq!(latest(&directory), None);
        fs::write(&id, whole).unwrap();
        assert_eq!(create(&directory, 1, "a"), Created::New);
    }

    #[test]
    fn unusable_directories_are_refused_by_reason() {
        let temporary = TempDir::new().unwrap();
        let open = |path: &Path| Directory::open(path).unwrap_err();
        assert!(matches!(open(&temporary.path().join("none")), ArbiterError::Missing { .. }));
        let file = temporary.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(open(&file), ArbiterError::NotADirectory { .. }));
        assert!(matches!(open(&file.join("below")), ArbiterError::NotADirectory { .. }));
        // Nobody, root included, creates files there.
        assert!(matches!(open(Path::new("/proc")), ArbiterError::NotWritable { .. }));
    }

    /// The body of the test below, in a mount namespace of its own.
    fn fill_and_free(path: &Path) {
        let directory = Directory::open(path).unwrap();
        assert_eq!(create(&directory, 1, "a"), Created::New);
        let ballast = path.join("ballast");
        let filled = fs::write(&ballast, vec![0; 1 << 20]).unwrap_err();
        assert_eq!(filled.raw_os_error(), Some(libc::ENOSPC), "{filled}");

        let Created::Unknown { why } = create(&directory, 2, "b") else { panic!("no room, yet decided") };
        assert!(why.contains("is full; free some space"), "{why}");
        let refusal = Directory::open(path).unwrap_err();
        assert!(matches!(refusal, ArbiterError::Full { .. }), "{refusal}");
        assert_eq!(create(&directory, 1, "c"), Created::Exists(b"a".to_vec()), "what is there can be read");
        assert_eq!(latest(&directory), Some((1, b"a".to_vec())));
        let names = fs::read_dir(path).unwrap().count();
        assert_eq!(names, 3, "id, claim and ballast: no attempt left anything");

        fs::remove_file(&ballast).unwrap();
        assert_eq!(create(&directory, 2, "b"), Created::New);
    }

    #[test]
    fn a_full_directory_decides_nothing_until_there_is_room() {
        if let Ok(path) = std::env::var("VMFT_TEST_TMPFS") {
            return fill_and_free(Path::new(&path));
        }
        let temporary = TempDir::new().unwrap();
        let script = "mount -t tmpfs -o size=64k none \"$VMFT_TEST_TMPFS\" && exec \"$0\" --nocapture \
                      a_full_directory_decides_nothing_until_there_is_room";
        let output = Command::new("unshare")
            .args(["--mount", "--map-root-user", "sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .env("VMFT_TEST_TMPFS", temporary.path())
            .output();
        match output {
            Ok(output) if output.status.success() => {
                assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
            }
            Ok(output) if String::from_utf8_lossy(&output.stdout).is_empty() => println!(
                "SKIPPED a full directory: no tmpfs can be mounted here: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ),
            Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stdout)),
            Err(error) => println!("SKIPPED a full directory: unshare cannot be run: {error}"),
        }
    }
}
