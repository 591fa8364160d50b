//! The right to run the guest, as files in a directory that both hosts share.
//!
//! Owns: one file per claimed view, and the directory's id. Must never: guess. An answer that does not come,
//! or a file that cannot be understood, is neither a win nor a loss.
//!
//! A *view* is a number that rises with each change of who runs the guest. Whoever creates the file
//! `<guest>.view-<N>` runs the guest in view N; everyone else has lost that view for good:
//!
//! ```text
//! temporary file: contents, fsync -> link(temporary, <guest>.view-<N>) -> fsync of the directory -> unlink(temporary)
//!                                    |- created: Won
//!                                    |- exists: read it; our uuid (an answer that was lost): Won, else: Lost
//!                                    '- other error: read it; not there or not readable: Unknown
//! ```
//!
//! `link` is atomic on local file systems, NFS and virtiofs, and the name never shows a half-written file.
//! [`Outcome::Unknown`] is resolved by claiming again with the same owner.
//!
//! A claim is text, a field per line, this order, each line ended by a line feed:
//!
//! ```text
//! vmft-claim 1          magic and version
//! guest web-1           the guest's name
//! view 3                decimal
//! role backup           what the claimant was before: primary or backup; or ended: the guest's life is over
//! host node-b           the claimant's host, at most 255 bytes, no control characters
//! pid 1234              its process there
//! uuid 32 hex digits    one life of one monitor
//! end                   so that a file that was cut off is seen
//! ```
//!
//! The file `vmft-id` holds `vmft-directory 1`, a line with 32 hex digits, and `end`.
//!
//! Not covered: directories that two hosts see through caches which do not agree on whether a name exists.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::host::random_bytes;

const CLAIM_HEADER: &str = "vmft-claim 1";
const DIRECTORY_HEADER: &str = "vmft-directory 1";
const DIRECTORY_ID_FILE: &str = "vmft-id";
const END: &str = "end";
/// Longest name of a guest: its files' names stay short enough for every file system.
const MAX_GUEST_NAME_BYTES: usize = 64;
const MAX_HOST_BYTES: usize = 255;
/// More than any valid file has.
const MAX_FILE_BYTES: u64 = 4_096;

/// What a monitor is when it makes a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimRole {
    /// It runs the guest.
    Primary,
    /// It follows.
    Backup,
    /// Its guest has ended: nobody runs the guest in this view.
    Ended,
}

/// A monitor that claims views.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Its host's name.
    pub host: String,
    /// Its process there.
    pub pid: u32,
    /// Random, made when the monitor started.
    pub uuid: [u8; 16],
    /// What it is at the time of the claim.
    pub role: ClaimRole,
}

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The view is ours.
    Won,
    /// The view is another monitor's.
    Lost {
        /// Whose it is.
        holder: Owner,
    },
    /// The claim may or may not have been made. Nothing may be done on the strength of it; claim again.
    Unknown {
        /// What went wrong.
        why: String,
    },
}

/// Why claims cannot be used. None of these means that a view was lost.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The name is not fit for a file name.
    #[error("'{name}' is not a guest name: use 1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.'")]
    BadGuestName {
        /// As given.
        name: String,
    },
    /// The owner cannot be written into a claim.
    #[error("'{host}' is not a host name: it must have 1 to 255 bytes and no control characters")]
    BadHostName {
        /// As given.
        host: String,
    },
    /// There is no such directory.
    #[error(
        "Claims directory '{path}' does not exist; create it on storage that both hosts see, and mount it here"
    )]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// It is something else.
    #[error("Claims directory '{path}' is not a directory")]
    NotADirectory {
        /// What is there.
        path: PathBuf,
    },
    /// Nothing can be created in it.
    #[error("Claims directory '{path}' cannot be written; both monitors need to create files in it")]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file system refused for certain: no claim was made.
    #[error("No claim was made, since '{path}' cannot be created (hard links must be possible there)")]
    NotMade {
        /// The claim.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file is not as this module writes it.
    #[error(
        "'{path}' is damaged ({why}); find out which monitor runs the guest before it is removed by hand"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Anything else that the host refuses.
    #[error("'{path}' cannot be used")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// The claims of one guest in one directory. All methods may take as long as the file system does.
#[derive(Clone, Debug)]
pub struct Claims {
    directory: PathBuf,
    guest: String,
}

impl Claims {
    /// Checks that claims for `guest` can be made in `directory`.
    pub fn open(directory: &Path, guest: &str) -> Result<Self, ClaimError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if guest.is_empty()
            || guest.len() > MAX_GUEST_NAME_BYTES
            || guest.starts_with('.')
            || !guest.bytes().all(allowed)
        {
            return Err(ClaimError::BadGuestName { name: guest.to_owned() });
        }
        let path = || directory.to_owned();
        match fs::metadata(directory) {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(ClaimError::NotADirectory { path: path() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ClaimError::Missing { path: path() });
            }
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
                return Err(ClaimError::NotADirectory { path: path() });
            }
            Err(source) => return Err(ClaimError::Io { path: path(), source }),
        }
        // Permissions do not tell about read-only mounts or servers that map users; trying does.
        Temporary::create(directory, "probe")
            .and_then(Temporary::remove)
            .map_err(|source| ClaimError::NotWritable { path: path(), source })?;
        Ok(Self { directory: path(), guest: guest.to_owned() })
    }

    /// The id of the directory: equal on two hosts that see the same one. Made on first use.
    pub fn directory_id(&self) -> Result<[u8; 16], ClaimError> {
        let path = self.directory.join(DIRECTORY_ID_FILE);
        let not_made = |source| ClaimError::NotMade { path: path.clone(), source };
        let id = match read_small(&path) {
            Ok(text) => return decode_directory_id(&text).map_err(|why| damaged(&path, why)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => random_id().map_err(not_made)?,
            Err(source) => return Err(ClaimError::Io { path, source }),
        };
        let temporary = Temporary::create(&self.directory, &encode_directory_id(&id)).map_err(not_made)?;
        let linked = fs::hard_link(&temporary.path, &path);
        // What counts is the file, not who made it or what `link` answered.
        match read_small(&path) {
            Ok(text) => decode_directory_id(&text).map_err(|why| damaged(&path, why)),
            Err(source) => Err(not_made(linked.err().unwrap_or(source))),
        }
    }

    /// Claims `view` for `owner`. May be repeated with the same owner at will.
    pub fn claim(&self, view: u64, owner: &Owner) -> Result<Outcome, ClaimError> {
        let path = self.path_of(view);
        if owner.host.is_empty()
            || owner.host.len() > MAX_HOST_BYTES
            || owner.host.chars().any(char::is_control)
        {
            return Err(ClaimError::BadHostName { host: owner.host.clone() });
        }
        let temporary = Temporary::create(&self.directory, &encode_claim(&self.guest, view, owner))
            .map_err(|source| ClaimError::NotMade { path: path.clone(), source })?;
        let linked = fs::hard_link(&temporary.path, &path);
        self.judge(view, owner, linked)
    }

    /// The guest of `owner`, who holds `view`, has ended in an orderly way. The claims stay, so that a member
    /// of the pair that was frozen meanwhile finds its next view taken.
    pub fn end(&self, view: u64, owner: &Owner) -> Result<Outcome, ClaimError> {
        self.claim(view + 1, &Owner { role: ClaimRole::Ended, ..owner.clone() })
    }

    /// The highest view that is claimed, and by whom.
    pub fn latest(&self) -> Result<Option<(u64, Owner)>, ClaimError> {
        for view in self.views()?.into_iter().rev() {
            match self.read(view) {
                Ok(Ok(holder)) => return Ok(Some((view, holder))),
                Ok(Err(why)) => return Err(damaged(&self.path_of(view), why)),
                // Released since the directory was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(ClaimError::Io { path: self.path_of(view), source }),
            }
        }
        Ok(None)
    }

    /// What an attempt to create the claim has led to.
    fn judge(&self, view: u64, owner: &Owner, linked: io::Result<()>) -> Result<Outcome, ClaimError> {
        let path = self.path_of(view);
        if let Err(error) = linked {
            match self.read(view) {
                Ok(Ok(holder)) if holder.uuid == owner.uuid => {}
                Ok(Ok(holder)) => return Ok(Outcome::Lost { holder }),
                Ok(Err(why)) => return Err(damaged(&path, why)),
                Err(read) if read.kind() == io::ErrorKind::NotFound && is_refusal(&error) => {
                    return Err(ClaimError::NotMade { path, source: error });
                }
                Err(read) => {
                    let why = format!("creating '{}': {error}; reading it back: {read}", path.display());
                    return Ok(Outcome::Unknown { why });
                }
            }
        }
        // The claim must outlive a crash of the file server.
        match sync_directory(&self.directory) {
            Ok(()) => Ok(Outcome::Won),
            Err(error) => {
                let why = format!("'{}' may not be durable: {error}", path.display());
                Ok(Outcome::Unknown { why })
            }
        }
    }

    fn path_of(&self, view: u64) -> PathBuf {
        self.directory.join(format!("{}.view-{view}", self.guest))
    }

    /// The holder of `view`; inside: what is wrong with the file.
    fn read(&self, view: u64) -> io::Result<Result<Owner, String>> {
        Ok(decode_claim(&read_small(&self.path_of(view))?, &self.guest, view))
    }

    /// The claimed views, rising.
    fn views(&self) -> Result<Vec<u64>, ClaimError> {
        let list = || -> io::Result<Vec<u64>> {
            let mut views = Vec::new();
            for entry in fs::read_dir(&self.directory)? {
                views.extend(self.view_of(&entry?.file_name()));
            }
            views.sort_unstable();
            Ok(views)
        };
        list().map_err(|source| ClaimError::Io { path: self.directory.clone(), source })
    }

    fn view_of(&self, file_name: &OsStr) -> Option<u64> {
        let digits = file_name.to_str()?.strip_prefix(self.guest.as_str())?.strip_prefix(".view-")?;
        let view = digits.parse::<u64>().ok()?;
        // One way to write a number: "+1" and "01" are not ours.
        (view.to_string() == digits).then_some(view)
    }
}

/// Sixteen random bytes, for [`Owner::uuid`].
pub fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    random_bytes(&mut id)?;
    Ok(id)
}

/// A file with a random name, durable, removed on drop.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn create(directory: &Path, contents: &str) -> io::Result<Self> {
        // No guest's name starts with a dot.
        let path = directory.join(format!(".vmft-{}", to_hex(&random_id()?)));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        let temporary = Self { path };
        file.write_all(contents.as_bytes())?;
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

/// Whether `link` was refused for certain, so that the name does not appear later either.
fn is_refusal(error: &io::Error) -> bool {
    let refusals = [
        Errno::EPERM,
        Errno::EACCES,
        Errno::EROFS,
        Errno::ENOSPC,
        Errno::EDQUOT,
        Errno::EMLINK,
        Errno::ENOSYS,
        Errno::EOPNOTSUPP,
    ];
    refusals.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory)?.sync_all() {
        // Some network file systems have no fsync for directories; their server is then durable by itself.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut contents)?;
    Ok(contents)
}

fn damaged(path: &Path, why: String) -> ClaimError {
    ClaimError::Damaged { path: path.to_owned(), why }
}

fn role_name(role: ClaimRole) -> &'static str {
    match role {
        ClaimRole::Primary => "primary",
        ClaimRole::Backup => "backup",
        ClaimRole::Ended => "ended",
    }
}

fn encode_claim(guest: &str, view: u64, owner: &Owner) -> String {
    format!(
        "{CLAIM_HEADER}\nguest {guest}\nview {view}\nrole {}\nhost {}\npid {}\nuuid {}\n{END}\n",
        role_name(owner.role),
        owner.host,
        owner.pid,
        to_hex(&owner.uuid),
    )
}

fn decode_claim(contents: &[u8], guest: &str, view: u64) -> Result<Owner, String> {
    let mut lines = Lines::start(contents, CLAIM_HEADER)?;
    let named = lines.field("guest")?;
    if named != guest {
        return Err(format!("it is a claim for guest '{named}'"));
    }
    let numbered = lines.field("view")?;
    if numbered != view.to_string() {
        return Err(format!("it is a claim for view '{numbered}'"));
    }
    let role = match lines.field("role")? {
        name if name == role_name(ClaimRole::Primary) => ClaimRole::Primary,
        name if name == role_name(ClaimRole::Backup) => ClaimRole::Backup,
        name if name == role_name(ClaimRole::Ended) => ClaimRole::Ended,
        name => return Err(format!("'{name}' is not a role")),
    };
    let host = lines.field("host")?.to_owned();
    let pid = lines.field("pid")?;
    let pid = pid.parse().map_err(|_| format!("'{pid}' is not a process"))?;
    let uuid = from_hex(lines.field("uuid")?)?;
    lines.end()?;
    Ok(Owner { host, pid, uuid, role })
}

fn encode_directory_id(id: &[u8; 16]) -> String {
    format!("{DIRECTORY_HEADER}\nid {}\n{END}\n", to_hex(id))
}

fn decode_directory_id(contents: &[u8]) -> Result<[u8; 16], String> {
    let mut lines = Lines::start(contents, DIRECTORY_HEADER)?;
    let id = from_hex(lines.field("id")?)?;
    lines.end()?;
    Ok(id)
}

/// The rest of a file of lines.
struct Lines<'a>(&'a str);

impl<'a> Lines<'a> {
    fn start(contents: &'a [u8], header: &str) -> Result<Self, String> {
        let text = str::from_utf8(contents).map_err(|_| "it is not text".to_owned())?;
        let mut lines = Self(text);
        let found = lines.next()?;
        if found != header {
            return Err(format!("it starts with '{found}' and not with '{header}'"));
        }
        Ok(lines)
    }

    fn next(&mut self) -> Result<&'a str, String> {
        let (line, rest) = self.0.split_once('\n').ok_or("it is cut off")?;
        self.0 = rest;
        Ok(line)
    }

    fn field(&mut self, name: &str) -> Result<&'a str, String> {
        let line = self.next()?;
        line.strip_prefix(name)
            .and_then(|value| value.strip_prefix(' '))
            .ok_or_else(|| format!("'{line}' is where '{name}' should be"))
    }

    fn end(mut self) -> Result<(), String> {
        let line = self.next()?;
        if line == END && self.0.is_empty() {
            Ok(())
        } else {
            Err("it does not end where it should".to_owned())
        }
    }
}

fn to_hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}

fn from_hex(text: &str) -> Result<[u8; 16], String> {
    let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let value = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
    value.map(u128::to_be_bytes).ok_or_else(|| format!("'{text}' is not 32 hex digits"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Barrier;

    use tempfile::TempDir;

    use std::thread;

    use super::*;

    fn owner(number: u8) -> Owner {
        Owner { host: "node-a".into(), pid: 1234, uuid: [number; 16], role: ClaimRole::Backup }
    }

    fn claims() -> (TempDir, Claims) {
        let directory = TempDir::new().unwrap();
        let claims = Claims::open(directory.path(), "web-1").unwrap();
        (directory, claims)
    }

    #[test]
    fn a_claim_is_stored_as_documented() {
        let (directory, claims) = claims();
        assert_eq!(claims.claim(3, &owner(0xa5)).unwrap(), Outcome::Won);
        let golden = "vmft-claim 1\nguest web-1\nview 3\nrole backup\nhost node-a\npid 1234\n\
                      uuid a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5\nend\n";
        assert_eq!(fs::read_to_string(directory.path().join("web-1.view-3")).unwrap(), golden);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "the temporary file is gone");
    }

    #[test]
    fn a_view_is_won_once_and_its_owner_may_ask_again() {
        let (_directory, claims) = claims();
        assert_eq!(claims.claim(1, &owner(1)).unwrap(), Outcome::Won);
        assert_eq!(claims.claim(1, &owner(2)).unwrap(), Outcome::Lost { holder: owner(1) });
        assert_eq!(claims.claim(1, &owner(1)).unwrap(), Outcome::Won);
        assert_eq!(claims.claim(2, &owner(2)).unwrap(), Outcome::Won);
        assert_eq!(claims.latest().unwrap(), Some((2, owner(2))));
    }

    #[test]
    fn of_many_threads_exactly_one_wins_each_view() {
        let (_directory, claims) = claims();
        let barrier = Barrier::new(8);
        for view in 1..=20 {
            let outcomes: Vec<Outcome> = thread::scope(|scope| {
                let start = |number| {
                    let (claims, barrier) = (&claims, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        claims.claim(view, &owner(number)).unwrap()
                    })
                };
                let threads: Vec<_> = (0..8).map(start).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let (_, holder) = claims.latest().unwrap().unwrap();
            for (number, outcome) in outcomes.into_iter().enumerate() {
                let ours = holder.uuid == [number as u8; 16];
                assert_eq!(outcome == Outcome::Won, ours);
                assert!(ours || outcome == Outcome::Lost { holder: holder.clone() });
            }
        }
    }

    /// The other end of the test below: claims what its environment says and prints the outcome.
    #[test]
    fn claim_as_another_process() {
        let Ok(directory) = std::env::var("VMFT_TEST_CLAIM_DIRECTORY") else { return };
        let me = Owner { pid: std::process::id(), uuid: random_id().unwrap(), ..owner(0) };
        let claims = Claims::open(Path::new(&directory), "web-1").unwrap();
        for view in 1..=50 {
            match claims.claim(view, &me).unwrap() {
                Outcome::Won => println!("\nclaimed {view} {}", me.pid),
                Outcome::Lost { .. } => {}
                Outcome::Unknown { why } => panic!("{why}"),
            }
        }
    }

    #[test]
    fn of_many_processes_exactly_one_wins_each_view() {
        let (directory, claims) = claims();
        let start = |_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["claim_as_another_process", "--nocapture"])
                .env("VMFT_TEST_CLAIM_DIRECTORY", directory.path())
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap()
        };
        let children: Vec<_> = (0..4).map(start).collect();
        let mut wins = Vec::new();
        for child in children {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            let text = String::from_utf8(output.stdout).unwrap();
            for line in text.lines().filter_map(|line| line.strip_prefix("claimed ")) {
                let (view, pid) = line.split_once(' ').unwrap();
                wins.push((view.parse::<u64>().unwrap(), pid.parse::<u32>().unwrap()));
            }
        }
        wins.sort_unstable();
        let holders = (1..=50).map(|view| (view, claims.read(view).unwrap().unwrap().pid));
        assert_eq!(wins, holders.collect::<Vec<_>>());
    }

    #[test]
    fn an_answer_that_was_lost_is_read_back() {
        let (_directory, claims) = claims();
        let lost_answer = || Err(io::Error::from_raw_os_error(libc::EIO));
        let nothing_there = claims.judge(1, &owner(1), lost_answer()).unwrap();
        assert!(matches!(nothing_there, Outcome::Unknown { .. }));
        assert_eq!(claims.claim(1, &owner(1)).unwrap(), Outcome::Won);
        assert_eq!(claims.judge(1, &owner(1), lost_answer()).unwrap(), Outcome::Won);
        assert_eq!(claims.judge(1, &owner(2), lost_answer()).unwrap(), Outcome::Lost { holder: owner(1) });
    }

    #[test]
    fn a_refusal_is_told_from_an_unclear_answer() {
        let (_directory, claims) = claims();
        let refused = claims.judge(1, &owner(1), Err(io::Error::from_raw_os_error(libc::EPERM)));
        assert!(matches!(refused, Err(ClaimError::NotMade { .. })));
        for errno in [libc::EIO, libc::ESTALE, libc::ETIMEDOUT, libc::EINTR] {
            let outcome = claims.judge(1, &owner(1), Err(io::Error::from_raw_os_error(errno)));
            assert!(matches!(outcome, Ok(Outcome::Unknown { .. })), "errno {errno}");
        }
    }

    #[test]
    fn a_damaged_claim_decides_nothing() {
        let (directory, claims) = claims();
        let whole = encode_claim("web-1", 7, &owner(1));
        let damage: [Vec<u8>; 8] = [
            Vec::new(),
            whole[..whole.len() - 1].into(),
            whole.replace("claim 1", "claim 2").into(),
            whole.replace("web-1", "web-2").into(),
            whole.replace("view 7", "view 8").into(),
            whole.replace("pid 1234", "pid -1").into(),
            whole.replace("uuid 01", "uuid 0x").into(),
            [whole.as_bytes(), b"more\n"].concat(),
        ];
        for contents in damage {
            fs::write(directory.path().join("web-1.view-7"), &contents).unwrap();
            let text = String::from_utf8_lossy(&contents);
            for result in [claims.claim(7, &owner(1)).map(|_| ()), claims.latest().map(|_| ())] {
                assert!(matches!(result, Err(ClaimError::Damaged { .. })), "{text}");
            }
        }
    }

    #[test]
    fn other_guests_and_other_files_are_not_looked_at() {
        let (directory, claims) = claims();
        for name in ["web-1.view-", "web-1.view-09", "web-1.view-+9", "web-1.view-9.view-8", "web-10.view-9"]
        {
            fs::write(directory.path().join(name), "not a claim of this guest").unwrap();
        }
        assert_eq!(claims.latest().unwrap(), None);
        claims.claim(u64::MAX, &owner(1)).unwrap();
        assert_eq!(claims.latest().unwrap(), Some((u64::MAX, owner(1))));
    }

    #[test]
    fn an_ended_guest_leaves_a_claim_that_nobody_can_win_again() {
        let (_directory, claims) = claims();
        claims.claim(1, &owner(1)).unwrap();
        assert_eq!(claims.end(1, &owner(1)).unwrap(), Outcome::Won);
        let ended = Owner { role: ClaimRole::Ended, ..owner(1) };
        assert_eq!(claims.latest().unwrap(), Some((2, ended.clone())));
        assert_eq!(claims.claim(2, &owner(2)).unwrap(), Outcome::Lost { holder: ended });
    }

    #[test]
    fn all_who_look_at_a_directory_see_one_id() {
        let directory = TempDir::new().unwrap();
        let barrier = Barrier::new(8);
        let ids: Vec<[u8; 16]> = thread::scope(|scope| {
            let look = |_| {
                scope.spawn(|| {
                    let claims = Claims::open(directory.path(), "web-1").unwrap();
                    barrier.wait();
                    claims.directory_id().unwrap()
                })
            };
            let threads: Vec<_> = (0..8).map(look).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_ne!(claims().1.directory_id().unwrap(), ids[0], "another directory has another id");
        fs::write(directory.path().join("vmft-id"), "vmft-directory 1\nid 12\nend\n").unwrap();
        let claims = Claims::open(directory.path(), "web-1").unwrap();
        assert!(matches!(claims.directory_id(), Err(ClaimError::Damaged { .. })));
    }

    #[test]
    fn a_directory_id_is_stored_as_documented() {
        let golden = "vmft-directory 1\nid 000102030405060708090a0b0c0d0e0f\nend\n";
        let id = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        assert_eq!(encode_directory_id(&id), golden);
        assert_eq!(decode_directory_id(golden.as_bytes()), Ok(id));
    }

    #[test]
    fn unusable_directories_and_names_are_refused_by_reason() {
        let directory = TempDir::new().unwrap();
        let open = |path: &Path| Claims::open(path, "web-1").unwrap_err();
        assert!(matches!(open(&directory.path().join("none")), ClaimError::Missing { .. }));
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(open(&file), ClaimError::NotADirectory { .. }));
        assert!(matches!(open(&file.join("below")), ClaimError::NotADirectory { .. }));
        // Nobody, root included, creates files there.
        assert!(matches!(open(Path::new("/proc")), ClaimError::NotWritable { .. }));
        for name in ["", ".hidden", "a/b", "a b", "ä", &"x".repeat(65)] {
            let refused = Claims::open(directory.path(), name);
            assert!(matches!(refused, Err(ClaimError::BadGuestName { .. })), "{name:?}");
        }
        let claims = Claims::open(directory.path(), "web-1").unwrap();
        let nameless = Owner { host: "a\nb".into(), ..owner(1) };
        assert!(matches!(claims.claim(1, &nameless), Err(ClaimError::BadHostName { .. })));
    }
}
