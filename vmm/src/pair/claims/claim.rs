//! The right to run the guest: who has claimed which view.
//!
//! Owns: what a claim says, and what follows from the arbiter's answer. Must never: guess. An answer that does
//! not come, or a claim that cannot be understood, is neither a win nor a loss.
//!
//! A *view* is a number that rises with each change of who runs the guest, or who its backup is. Whoever makes the record
//! of view N at the arbiter (`pair/claims/arbiter`) runs the guest in view N; everyone else has lost that view for good. Only who
//! was a member of view N - 1, its primary or its backup, may do that; whoever claims reads that record first:
//!
//! ```text
//!   record of view - 1: names us, or says that the guest had ended ── create(view, claim) -> New: Won
//!   │  not readable: an error; does not name us: NotMember            Exists, with our uuid (an answer that was lost):
//!   v                                                                   the same backup: Won, another: Otherwise
//!   nothing is claimed                                                Exists, another's: Lost; damaged: an error
//!                                                                     Unknown: Unknown, resolved by claiming again
//! ```
//!
//! A claim is text, a field per line, this order, each line ended by a line feed:
//!
//! ```text
//! vmft-claim 2          magic and version
//! guest web-1           the guest's name
//! view 3                decimal
//! role backup           what the claimant was before: primary or backup; or ended: the guest's life is over
//! host node-b           the claimant's host, at most 255 bytes, no control characters
//! pid 1234              its process there
//! uuid 32 hex digits    one life of one monitor
//! backup none           the view's backup: none, or 32 hex digits (the life of its monitor), a space and its host
//! end                   so that a claim that was cut off is seen
//! ```

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use ft_log::{from_hex, to_hex};

use crate::pair::claims::arbiter::EtcdFiles;
use crate::pair::claims::arbiter::{Arbiter, ArbiterError, ArbiterSpec, Created};

const CLAIM_HEADER: &str = "vmft-claim 2";
const NO_BACKUP: &str = "none";
const END: &str = "end";
/// Longest name of a guest: names made of it stay short enough for every file system.
const MAX_GUEST_NAME_BYTES: usize = 64;
const MAX_HOST_BYTES: usize = 255;
/// What is remembered: a view's record, and the one before.
const RECORDS_KNOWN: usize = 2;

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

/// A monitor as the backup of a view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its host's name.
    pub host: String,
    /// As [`Owner::uuid`].
    pub uuid: [u8; 16],
}

/// The answer to a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The view is ours, with the backup that was asked for.
    Won,
    /// The view is ours, with another backup: an earlier claim of ours was made, and its answer lost.
    Otherwise,
    /// The view is another monitor's.
    Lost {
        /// Whose it is.
        holder: Owner,
        /// That was not that monitor's to claim: a sentence that says so and why.
        breach: Option<String>,
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
    /// A claim is not as this module writes it.
    #[error(
        "The claim {place} is damaged ({why}); find out which monitor runs the guest before it is removed by hand"
    )]
    Damaged {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// The view before has no record any more.
    #[error(
        "View {view} cannot be claimed: the record of the view before, {place}, is gone, and only a member of that view may \
         claim the next one; restore the arbiter's records"
    )]
    NoRecord {
        /// The view.
        view: u64,
        /// Where the record was.
        place: String,
    },
    /// This monitor was neither primary nor backup in the view before.
    #[error("View {view} is not this monitor's to claim: {why}")]
    NotMember {
        /// The view.
        view: u64,
        /// Who the members of the view before are.
        why: String,
    },
    /// The arbiter cannot be used.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
}

/// The claims of one guest at one arbiter. All methods may take as long as the arbiter does.
#[derive(Clone, Debug)]
pub struct Claims {
    arbiter: Arc<dyn Arbiter>,
    guest: String,
    /// The last records that were made or read here. They never change, so they need not be read again.
    known: Arc<Mutex<BTreeMap<u64, Record>>>,
}

impl Claims {
    /// Checks that claims for `guest` can be made at the arbiter.
    pub fn open(arbiter: &ArbiterSpec, etcd: &EtcdFiles, guest: &str) -> Result<Self, ClaimError> {
        if !is_guest_name(guest) {
            return Err(ClaimError::BadGuestName { name: guest.to_owned() });
        }
        Ok(Self { arbiter: arbiter.open(etcd)?, guest: guest.to_owned(), known: Arc::default() })
    }

    /// The id of the arbiter: equal on two hosts that ask the same one.
    pub fn arbiter_id(&self) -> [u8; 16] {
        self.arbiter.id()
    }

    /// The arbiter.
    pub fn arbiter(&self) -> &dyn Arbiter {
        &*self.arbiter
    }

    /// How an operator removes all claims of the guest: an imperative.
    pub fn removal(&self) -> String {
        self.arbiter.removal(&self.guest)
    }

    /// Claims `view` for `owner`, with `backup` or without one. May be repeated with the same owner at will.
    pub fn claim(&self, view: u64, owner: &Owner, backup: Option<&Member>) -> Result<Outcome, ClaimError> {
        check_host(&owner.host)?;
        backup.map_or(Ok(()), |backup| check_host(&backup.host))?;
        let before = self.before(view)?;
        if let Some(why) = self.breach(before.as_ref(), &owner.uuid) {
            return Err(ClaimError::NotMember { view, why });
        }
        let (guest, owner, backup) = (self.guest.clone(), owner.clone(), backup.cloned());
        let asked = Record { guest, view, owner, backup };
        match self.arbiter.create(&self.guest, view, write_record(&asked).as_bytes())? {
            Created::New => {
                self.note(&asked);
                Ok(Outcome::Won)
            }
            Created::Exists(record) => {
                let found = self.decode(&record, view)?;
                let outcome = self.judge(&asked, &found, before.as_ref());
                self.note(&found);
                Ok(outcome)
            }
            Created::Unknown { why } => Ok(Outcome::Unknown { why }),
        }
    }

    /// What it means for `asked` that the view has the record `found`.
    fn judge(&self, asked: &Record, found: &Record, before: Option<&Record>) -> Outcome {
        if found.owner.uuid != asked.owner.uuid {
            let breach = self.sentence(before, found);
            return Outcome::Lost { holder: found.owner.clone(), breach };
        }
        match (found.owner.role == ClaimRole::Ended, asked.owner.role == ClaimRole::Ended) {
            // Another thread of this monitor has ended it: there is nothing to go on with.
            (true, false) => Outcome::Unknown { why: "this monitor has recorded the guest's end".to_owned() },
            (false, true) => Outcome::Otherwise,
            _ if found.backup_life() == asked.backup_life() => Outcome::Won,
            _ => Outcome::Otherwise,
        }
    }

    /// The guest of `owner`, who holds `view`, has ended in an orderly way. The claims stay, so that a member
    /// of the pair that was frozen meanwhile finds its next view taken.
    pub fn end(&self, mut view: u64, owner: &Owner) -> Result<Outcome, ClaimError> {
        let owner = Owner { role: ClaimRole::Ended, ..owner.clone() };
        loop {
            view += 1;
            match self.claim(view, &owner, None)? {
                // Of a claim whose answer this monitor did not get.
                Outcome::Otherwise => {}
                outcome => return Ok(outcome),
            }
        }
    }

    /// The record of the highest view that is claimed.
    pub fn latest(&self) -> Result<Option<Record>, ClaimError> {
        let latest = self.arbiter.latest(&self.guest)?;
        latest.map(|(view, record)| self.decode(&record, view)).transpose()
    }

    /// The record of `view`, if there is one.
    pub fn read(&self, view: u64) -> Result<Option<Record>, ClaimError> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&view).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let Some(record) = self.arbiter.read(&self.guest, view)? else { return Ok(None) };
        let record = self.decode(&record, view)?;
        self.note(&record);
        Ok(Some(record))
    }

    /// What is wrong with `record`, which another monitor has made, as a sentence: its primary was no member of the view
    /// before.
    pub fn breach_of(&self, record: &Record) -> Result<Option<String>, ClaimError> {
        Ok(self.sentence(self.before(record.view)?.as_ref(), record))
    }

    fn sentence(&self, before: Option<&Record>, record: &Record) -> Option<String> {
        let Record { view, owner, .. } = record;
        let why = self.breach(before, &owner.uuid)?;
        Some(format!("view {view} was not {}'s to claim: {why}", owner.host))
    }

    /// The claim of `view` by `owner`, without a backup, for whoever is to read it elsewhere.
    pub fn record(&self, view: u64, owner: &Owner) -> String {
        write_record(&Record { guest: self.guest.clone(), view, owner: owner.clone(), backup: None })
    }

    fn note(&self, record: &Record) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(record.view, record.clone());
        while known.len() > RECORDS_KNOWN {
            known.pop_first();
        }
    }

    /// The record whose members may claim `view`; `None`: it is the first.
    fn before(&self, view: u64) -> Result<Option<Record>, ClaimError> {
        match view.checked_sub(1) {
            None | Some(0) => Ok(None),
            Some(before) => match self.read(before)? {
                Some(record) => Ok(Some(record)),
                None => Err(ClaimError::NoRecord { view, place: self.arbiter.place(&self.guest, before) }),
            },
        }
    }

    /// Why the monitor with this life may not claim the view behind `before`, if it may not.
    fn breach(&self, before: Option<&Record>, uuid: &[u8; 16]) -> Option<String> {
        let before = before?;
        let Record { view, owner, backup, .. } = before;
        // Once the guest has ended, whoever starts it first has it.
        let is_member = owner.role == ClaimRole::Ended
            || owner.uuid == *uuid
            || backup.as_ref().is_some_and(|backup| backup.uuid == *uuid);
        let others = || {
            let backup = backup.as_ref().map_or_else(
                || "no backup".to_owned(),
                |backup| format!("the backup {} (life {})", backup.host, to_hex(&backup.uuid)),
            );
            format!(
                "the view before, {view} ({}), has the primary {} (process {}, life {}) and {backup}, and life {} is neither",
                self.arbiter.place(&self.guest, *view),
                owner.host,
                owner.pid,
                to_hex(&owner.uuid),
                to_hex(uuid)
            )
        };
        (!is_member).then(others)
    }

    fn decode(&self, record: &[u8], view: u64) -> Result<Record, ClaimError> {
        decode_claim(record, &self.guest, view)
            .map_err(|why| ClaimError::Damaged { place: self.arbiter.place(&self.guest, view), why })
    }
}

fn is_guest_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=MAX_GUEST_NAME_BYTES).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(allowed)
}

/// Can `host` be written into a claim?
pub fn check_host(host: &str) -> Result<(), ClaimError> {
    if host.is_empty() || host.len() > MAX_HOST_BYTES || host.chars().any(char::is_control) {
        return Err(ClaimError::BadHostName { host: host.to_owned() });
    }
    Ok(())
}

fn role_name(role: ClaimRole) -> &'static str {
    match role {
        ClaimRole::Primary => "primary",
        ClaimRole::Backup => "backup",
        ClaimRole::Ended => "ended",
    }
}

fn decode_claim(contents: &[u8], guest: &str, view: u64) -> Result<Record, String> {
    let record = read_record(contents)?;
    if record.guest != guest {
        return Err(format!("it is a claim for guest '{}'", record.guest));
    }
    if record.view != view {
        return Err(format!("it is a claim for view '{}'", record.view));
    }
    Ok(record)
}

/// What a claim says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The guest's name.
    pub guest: String,
    /// The view.
    pub view: u64,
    /// Who claims it.
    pub owner: Owner,
    /// Who is the backup in it.
    pub backup: Option<Member>,
}

impl Record {
    fn backup_life(&self) -> Option<[u8; 16]> {
        self.backup.as_ref().map(|backup| backup.uuid)
    }
}

/// A claim as it is stored. Guest and hosts have been checked.
pub fn write_record(record: &Record) -> String {
    let Record { guest, view, owner, backup } = record;
    let backup = match backup {
        Some(Member { host, uuid }) => format!("{} {host}", to_hex(uuid)),
        None => NO_BACKUP.to_owned(),
    };
    format!(
        "{CLAIM_HEADER}\nguest {guest}\nview {view}\nrole {}\nhost {}\npid {}\nuuid {}\nbackup {backup}\n{END}\n",
        role_name(owner.role),
        owner.host,
        owner.pid,
        to_hex(&owner.uuid),
    )
}

/// Reads a claim of whatever guest and view. An error says what is wrong with it. One form for each claim: what is read
/// is what [`write_record`] writes.
pub fn read_record(contents: &[u8]) -> Result<Record, String> {
    let mut lines = Lines::start(contents, CLAIM_HEADER)?;
    let guest = lines.field("guest")?.to_owned();
    if !is_guest_name(&guest) {
        return Err(format!("'{}' is not a guest name", guest.escape_debug()));
    }
    let view = number(lines.field("view")?, "view")?;
    let role = match lines.field("role")? {
        name if name == role_name(ClaimRole::Primary) => ClaimRole::Primary,
        name if name == role_name(ClaimRole::Backup) => ClaimRole::Backup,
        name if name == role_name(ClaimRole::Ended) => ClaimRole::Ended,
        name => return Err(format!("'{name}' is not a role")),
    };
    let host = host_of(lines.field("host")?)?;
    let pid = number(lines.field("pid")?, "process")?;
    let uuid = id_of(lines.field("uuid")?)?;
    let backup = match lines.field("backup")? {
        NO_BACKUP => None,
        named => {
            let (uuid, host) = named.split_once(' ').ok_or_else(|| format!("'{named}' is not a backup"))?;
            Some(Member { host: host_of(host)?, uuid: id_of(uuid)? })
        }
    };
    lines.end()?;
    Ok(Record { guest, view, owner: Owner { host, pid, uuid, role }, backup })
}

/// A number that is written in the one way there is.
fn number<T: FromStr + ToString>(text: &str, what: &str) -> Result<T, String> {
    let value: Option<T> = text.parse().ok().filter(|value: &T| value.to_string() == text);
    value.ok_or_else(|| format!("'{}' is not a {what}", text.escape_debug()))
}

fn host_of(text: &str) -> Result<String, String> {
    check_host(text).map_err(|_| format!("'{}' is not a host", text.escape_debug()))?;
    Ok(text.to_owned())
}

/// The rest of a file of lines.
pub(super) struct Lines<'a>(&'a str);

impl<'a> Lines<'a> {
    pub(super) fn start(contents: &'a [u8], header: &str) -> Result<Self, String> {
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

    pub(super) fn field(&mut self, name: &str) -> Result<&'a str, String> {
        let line = self.next()?;
        line.strip_prefix(name)
            .and_then(|value| value.strip_prefix(' '))
            .ok_or_else(|| format!("'{line}' is where '{name}' should be"))
    }

    pub(super) fn end(mut self) -> Result<(), String> {
        let line = self.next()?;
        if line == END && self.0.is_empty() {
            Ok(())
        } else {
            Err("it does not end where it should".to_owned())
        }
    }
}

/// Sixteen bytes in hexadecimal digits: the id of an arbiter, or the life of a monitor.
pub(super) fn id_of(text: &str) -> Result<[u8; 16], String> {
    from_hex(text).ok_or_else(|| format!("'{text}' is not 32 hex digits"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::process::Command;
    use std::sync::Barrier;
    use std::thread;

    use tempfile::TempDir;

    use super::*;
    use crate::pair::claims::arbiter::random_id;

    fn owner(number: u8) -> Owner {
        Owner { host: "node-a".into(), pid: 1234, uuid: [number; 16], role: ClaimRole::Backup }
    }

    fn member(number: u8) -> Member {
        Member { host: "node-b".into(), uuid: [number; 16] }
    }

    fn spec(directory: &Path) -> ArbiterSpec {
        ArbiterSpec::Directory(directory.to_owned())
    }

    fn claims() -> (TempDir, Claims) {
        let directory = TempDir::new().unwrap();
        let claims = Claims::open(&spec(directory.path()), &EtcdFiles::default(), "web-1").unwrap();
        (directory, claims)
    }

    /// What a monitor finds that knows nothing yet.
    fn anew(directory: &TempDir) -> Claims {
        Claims::open(&spec(directory.path()), &EtcdFiles::default(), "web-1").unwrap()
    }

    fn alone(claims: &Claims, view: u64, number: u8) -> Result<Outcome, ClaimError> {
        claims.claim(view, &owner(number), None)
    }

    fn lost_to(number: u8) -> Outcome {
        Outcome::Lost { holder: owner(number), breach: None }
    }

    #[test]
    fn a_claim_is_stored_as_documented() {
        let (directory, claims) = claims();
        assert_eq!(alone(&claims, 1, 7).unwrap(), Outcome::Won);
        assert_eq!(claims.claim(2, &owner(7), Some(&member(0xa5))).unwrap(), Outcome::Won);
        assert_eq!(alone(&claims, 3, 0xa5).unwrap(), Outcome::Won);
        let golden = |view: u64, uuid: &str, backup: &str| {
            format!(
                "vmft-claim 2\nguest web-1\nview {view}\nrole backup\nhost node-a\npid 1234\nuuid {uuid}\n\
                 backup {backup}\nend\n"
            )
        };
        let (seven, a5) = ("07".repeat(16), "a5".repeat(16));
        let pair = golden(2, &seven, &format!("{a5} node-b"));
        assert_eq!(fs::read_to_string(directory.path().join("web-1.view-2")).unwrap(), pair);
        let taken_over = golden(3, &a5, "none");
        assert_eq!(fs::read_to_string(directory.path().join("web-1.view-3")).unwrap(), taken_over);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            4,
            "they and the id: the temporary files are gone"
        );
        let record = Record { guest: "web-1".into(), view: 2, owner: owner(7), backup: Some(member(0xa5)) };
        assert_eq!(read_record(pair.as_bytes()), Ok(record.clone()));
        assert_eq!(claims.read(2).unwrap(), Some(record));
        assert_eq!(claims.read(4).unwrap(), None);
    }

    #[test]
    fn a_view_is_won_once_and_its_owner_may_ask_again() {
        let (directory, claims) = claims();
        assert_eq!(alone(&claims, 1, 1).unwrap(), Outcome::Won);
        assert_eq!(alone(&claims, 1, 2).unwrap(), lost_to(1));
        assert_eq!(alone(&claims, 1, 1).unwrap(), Outcome::Won);
        assert_eq!(claims.claim(2, &owner(1), Some(&member(2))).unwrap(), Outcome::Won);
        assert_eq!(claims.claim(2, &owner(1), Some(&member(2))).unwrap(), Outcome::Won);
        // An answer was lost, and the backup with it.
        assert_eq!(claims.claim(2, &owner(1), Some(&member(3))).unwrap(), Outcome::Otherwise);
        assert_eq!(alone(&claims, 2, 1).unwrap(), Outcome::Otherwise);
        assert_eq!(alone(&anew(&directory), 3, 2).unwrap(), Outcome::Won);
        assert_eq!(alone(&claims, 3, 1).unwrap(), lost_to(2));
        assert_eq!(claims.latest().unwrap().map(|record| record.owner), Some(owner(2)));
    }

    #[test]
    fn only_a_member_of_the_view_before_may_claim_one() {
        let (directory, claims) = claims();
        alone(&claims, 1, 1).unwrap();
        claims.claim(2, &owner(1), Some(&member(2))).unwrap();
        for stranger in [&claims, &anew(&directory)] {
            let refused = alone(stranger, 3, 9).unwrap_err().to_string();
            let (one, two, nine) = ("01".repeat(16), "02".repeat(16), "09".repeat(16));
            let expected = format!(
                "View 3 is not this monitor's to claim: the view before, 2 ('{}'), has the primary node-a (process 1234, \
                 life {one}) and the backup node-b (life {two}), and life {nine} is neither",
                directory.path().join("web-1.view-2").display()
            );
            assert_eq!(refused, expected);
        }
        let gone = alone(&anew(&directory), 5, 1).unwrap_err();
        assert!(matches!(gone, ClaimError::NoRecord { view: 5, .. }), "{gone}");
        assert_eq!(claims.latest().unwrap().map(|record| record.view), Some(2), "nothing was claimed");
    }

    #[test]
    fn who_meets_a_claim_that_was_not_its_makers_says_so() {
        let (directory, claims) = claims();
        alone(&claims, 1, 1).unwrap();
        let intruder = Record { guest: "web-1".into(), view: 2, owner: owner(9), backup: None };
        fs::write(directory.path().join("web-1.view-2"), write_record(&intruder)).unwrap();
        let Outcome::Lost { holder, breach: Some(breach) } = alone(&claims, 2, 1).unwrap() else {
            panic!("not noticed");
        };
        assert_eq!(holder, owner(9));
        assert!(breach.contains("and no backup, and life 0909"), "{breach}");
        assert_eq!(anew(&directory).breach_of(&intruder).unwrap(), Some(breach));
        let rightful = Record { owner: owner(1), ..intruder };
        assert_eq!(claims.breach_of(&rightful).unwrap(), None);
    }

    #[test]
    fn of_many_threads_exactly_one_wins_each_view() {
        let (directory, _claims) = claims();
        let barrier = Barrier::new(8);
        for guest in 1..=20 {
            let claims =
                Claims::open(&spec(directory.path()), &EtcdFiles::default(), &format!("web-{guest}"))
                    .unwrap();
            let outcomes: Vec<Outcome> = thread::scope(|scope| {
                let start = |number| {
                    let (claims, barrier) = (&claims, &barrier);
                    scope.spawn(move || {
                        barrier.wait();
                        alone(claims, 1, number).unwrap()
                    })
                };
                let threads: Vec<_> = (0..8).map(start).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let holder = claims.latest().unwrap().unwrap().owner;
            for (number, outcome) in outcomes.into_iter().enumerate() {
                let ours = holder.uuid == [number as u8; 16];
                assert_eq!(outcome == Outcome::Won, ours);
                assert!(ours || outcome == lost_to(holder.uuid[0]));
            }
        }
    }

    /// The other end of the test below: claims what its environment says and prints the outcome.
    #[test]
    fn claim_as_another_process() {
        let Ok(directory) = std::env::var("VMFT_TEST_CLAIM_DIRECTORY") else { return };
        let me = Owner { pid: std::process::id(), uuid: random_id().unwrap(), ..owner(0) };
        for guest in 1..=50 {
            let claims =
                Claims::open(&spec(Path::new(&directory)), &EtcdFiles::default(), &format!("web-{guest}"))
                    .unwrap();
            match claims.claim(1, &me, None).unwrap() {
                Outcome::Won => println!("\nclaimed {guest} {}", me.pid),
                Outcome::Lost { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn of_many_processes_exactly_one_wins_each_view() {
        let (directory, _claims) = claims();
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
                let (guest, pid) = line.split_once(' ').unwrap();
                wins.push((guest.parse::<u64>().unwrap(), pid.parse::<u32>().unwrap()));
            }
        }
        wins.sort_unstable();
        let holder_of = |guest| {
            let record = fs::read(directory.path().join(format!("web-{guest}.view-1"))).unwrap();
            (guest, read_record(&record).unwrap().owner.pid)
        };
        assert_eq!(wins, (1..=50).map(holder_of).collect::<Vec<_>>());
    }

    #[test]
    fn a_damaged_claim_decides_nothing() {
        let (directory, claims) = claims();
        let whole = write_record(&Record {
            guest: "web-1".into(),
            view: 1,
            owner: owner(1),
            backup: Some(member(2)),
        });
        let damage: [Vec<u8>; 15] = [
            Vec::new(),
            whole[..whole.len() - 1].into(),
            whole.replace("claim 2", "claim 1").into(),
            whole.replace("web-1", "web-2").into(),
            whole.replace("view 1", "view 8").into(),
            whole.replace("host node-a", "host node\ta").into(),
            whole.replace("host node-a", "host ").into(),
            whole.replace("pid 1234", "pid -1").into(),
            whole.replace("pid 1234", "pid +1234").into(),
            whole.replace("pid 1234", "pid 01234").into(),
            whole.replace("uuid 01", "uuid 0x").into(),
            whole.replace("backup 02", "backup 0x").into(),
            whole.replace(" node-b", "").into(),
            whole.replace("backup ", "").into(),
            [whole.as_bytes(), b"more\n"].concat(),
        ];
        for contents in damage {
            fs::write(directory.path().join("web-1.view-1"), &contents).unwrap();
            let text = String::from_utf8_lossy(&contents);
            for result in [
                alone(&claims, 1, 1).map(|_| ()),
                claims.latest().map(|_| ()),
                alone(&claims, 2, 1).map(|_| ()),
            ] {
                assert!(matches!(result, Err(ClaimError::Damaged { .. })), "{text}");
            }
        }
    }

    #[test]
    fn an_ended_guest_leaves_a_claim_that_nobody_can_win_again() {
        let (directory, claims) = claims();
        alone(&claims, 1, 1).unwrap();
        assert_eq!(claims.end(1, &owner(1)).unwrap(), Outcome::Won);
        let ended = Owner { role: ClaimRole::Ended, ..owner(1) };
        let record = Record { guest: "web-1".into(), view: 2, owner: ended, backup: None };
        assert_eq!(claims.latest().unwrap(), Some(record));
        assert!(matches!(alone(&claims, 2, 1).unwrap(), Outcome::Unknown { .. }), "it is over");
        // Whoever starts the guest again was no member.
        let next = anew(&directory);
        assert!(matches!(alone(&next, 2, 5), Err(ClaimError::NotMember { .. })));
        assert_eq!(alone(&next, 3, 5).unwrap(), Outcome::Won);
    }

    #[test]
    fn a_frozen_backup_finds_that_the_guest_has_ended_and_a_late_backup_ends_nothing() {
        let (directory, claims) = claims();
        alone(&claims, 1, 1).unwrap();
        claims.claim(2, &owner(1), Some(&member(2))).unwrap();
        // The primary does not know whether that was made.
        assert_eq!(claims.end(1, &owner(1)).unwrap(), Outcome::Won);
        let holder = Owner { role: ClaimRole::Ended, ..owner(1) };
        assert_eq!(alone(&anew(&directory), 3, 2).unwrap(), Outcome::Lost { holder, breach: None });
    }

    #[test]
    fn names_that_are_none_are_refused_by_reason() {
        let (directory, claims) = claims();
        let spec = spec(directory.path());
        for name in ["", ".hidden", "a/b", "a b", "ä", &"x".repeat(65)] {
            let refused = Claims::open(&spec, &EtcdFiles::default(), name);
            assert!(matches!(refused, Err(ClaimError::BadGuestName { .. })), "{name:?}");
        }
        let nameless = Owner { host: "a\nb".into(), ..owner(1) };
        assert!(matches!(claims.claim(1, &nameless, None), Err(ClaimError::BadHostName { .. })));
        let backup = Member { host: String::new(), ..member(2) };
        assert!(matches!(claims.claim(1, &owner(1), Some(&backup)), Err(ClaimError::BadHostName { .. })));
    }
}
