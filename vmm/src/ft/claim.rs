//! The right to run the guest: who has claimed which view.
//!
//! Owns: what a claim says, and what follows from the arbiter's answer. Must never: guess. An answer that does
//! not come, or a claim that cannot be understood, is neither a win nor a loss.
//!
//! A *view* is a number that rises with each change of who runs the guest. Whoever makes the record of view N at the
//! arbiter (`ft/arbiter`) runs the guest in view N; everyone else has lost that view for good:
//!
//! ```text
//!   create(view, claim) -> New: Won
//!                          Exists: our uuid (an answer that was lost): Won, another's: Lost, damaged: an error
//!                          Unknown: Unknown, resolved by claiming again with the same owner
//! ```
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
//! end                   so that a claim that was cut off is seen
//! ```

use std::sync::Arc;

use super::arbiter::{Arbiter, ArbiterError, ArbiterSpec, Created};

const CLAIM_HEADER: &str = "vmft-claim 1";
const END: &str = "end";
/// Longest name of a guest: names made of it stay short enough for every file system.
const MAX_GUEST_NAME_BYTES: usize = 64;
const MAX_HOST_BYTES: usize = 255;

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
    /// The arbiter cannot be used.
    #[error(transparent)]
    Arbiter(#[from] ArbiterError),
}

/// The claims of one guest at one arbiter. All methods may take as long as the arbiter does.
#[derive(Clone, Debug)]
pub struct Claims {
    arbiter: Arc<dyn Arbiter>,
    guest: String,
}

impl Claims {
    /// Checks that claims for `guest` can be made at the arbiter.
    pub fn open(arbiter: &ArbiterSpec, guest: &str) -> Result<Self, ClaimError> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if guest.is_empty()
            || guest.len() > MAX_GUEST_NAME_BYTES
            || guest.starts_with('.')
            || !guest.bytes().all(allowed)
        {
            return Err(ClaimError::BadGuestName { name: guest.to_owned() });
        }
        Ok(Self { arbiter: arbiter.open()?, guest: guest.to_owned() })
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

    /// Claims `view` for `owner`. May be repeated with the same owner at will.
    pub fn claim(&self, view: u64, owner: &Owner) -> Result<Outcome, ClaimError> {
        if owner.host.is_empty()
            || owner.host.len() > MAX_HOST_BYTES
            || owner.host.chars().any(char::is_control)
        {
            return Err(ClaimError::BadHostName { host: owner.host.clone() });
        }
        let record = encode_claim(&self.guest, view, owner);
        match self.arbiter.create(&self.guest, view, record.as_bytes())? {
            Created::New => Ok(Outcome::Won),
            Created::Exists(record) => {
                let holder = self.decode(&record, view)?;
                Ok(if holder.uuid == owner.uuid { Outcome::Won } else { Outcome::Lost { holder } })
            }
            Created::Unknown { why } => Ok(Outcome::Unknown { why }),
        }
    }

    /// The guest of `owner`, who holds `view`, has ended in an orderly way. The claims stay, so that a member
    /// of the pair that was frozen meanwhile finds its next view taken.
    pub fn end(&self, view: u64, owner: &Owner) -> Result<Outcome, ClaimError> {
        self.claim(view + 1, &Owner { role: ClaimRole::Ended, ..owner.clone() })
    }

    /// The highest view that is claimed, and by whom.
    pub fn latest(&self) -> Result<Option<(u64, Owner)>, ClaimError> {
        let latest = self.arbiter.latest(&self.guest)?;
        latest.map(|(view, record)| Ok((view, self.decode(&record, view)?))).transpose()
    }

    /// The claim of `view` by `owner`, for whoever is to read it elsewhere.
    pub fn record(&self, view: u64, owner: &Owner) -> String {
        encode_claim(&self.guest, view, owner)
    }

    fn decode(&self, record: &[u8], view: u64) -> Result<Owner, ClaimError> {
        decode_claim(record, &self.guest, view)
            .map_err(|why| ClaimError::Damaged { place: self.arbiter.place(&self.guest, view), why })
    }
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
    let record = read_record(contents)?;
    if record.guest != guest {
        return Err(format!("it is a claim for guest '{}'", record.guest));
    }
    if record.view != view {
        return Err(format!("it is a claim for view '{}'", record.view));
    }
    Ok(record.owner)
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
}

/// Reads a claim of whatever guest and view. An error says what is wrong with it.
pub fn read_record(contents: &[u8]) -> Result<Record, String> {
    let mut lines = Lines::start(contents, CLAIM_HEADER)?;
    let guest = lines.field("guest")?.to_owned();
    let numbered = lines.field("view")?;
    let view: u64 = numbered.parse().map_err(|_| format!("'{numbered}' is not a view"))?;
    // One way to write a number.
    if view.to_string() != numbered {
        return Err(format!("'{numbered}' is not a view"));
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
    Ok(Record { guest, view, owner: Owner { host, pid, uuid, role } })
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

pub(super) fn to_hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}

pub(super) fn from_hex(text: &str) -> Result<[u8; 16], String> {
    let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let value = digits.then(|| u128::from_str_radix(text, 16).ok()).flatten();
    value.map(u128::to_be_bytes).ok_or_else(|| format!("'{text}' is not 32 hex digits"))
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
    use crate::ft::arbiter::random_id;

    fn owner(number: u8) -> Owner {
        Owner { host: "node-a".into(), pid: 1234, uuid: [number; 16], role: ClaimRole::Backup }
    }

    fn open(directory: &Path) -> Claims {
        Claims::open(&ArbiterSpec::Directory(directory.to_owned()), "web-1").unwrap()
    }

    fn claims() -> (TempDir, Claims) {
        let directory = TempDir::new().unwrap();
        let claims = open(directory.path());
        (directory, claims)
    }

    #[test]
    fn a_claim_is_stored_as_documented() {
        let (directory, claims) = claims();
        assert_eq!(claims.claim(3, &owner(0xa5)).unwrap(), Outcome::Won);
        let golden = "vmft-claim 1\nguest web-1\nview 3\nrole backup\nhost node-a\npid 1234\n\
                      uuid a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5\nend\n";
        assert_eq!(fs::read_to_string(directory.path().join("web-1.view-3")).unwrap(), golden);
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            2,
            "it and the id: the temporary file is gone"
        );
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
        let claims = open(Path::new(&directory));
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
                let (view, pid) = line.split_once(' ').unwrap();
                wins.push((view.parse::<u64>().unwrap(), pid.parse::<u32>().unwrap()));
            }
        }
        wins.sort_unstable();
        let holder_of = |view| {
            let record = fs::read(directory.path().join(format!("web-1.view-{view}"))).unwrap();
            (view, decode_claim(&record, "web-1", view).unwrap().pid)
        };
        assert_eq!(wins, (1..=50).map(holder_of).collect::<Vec<_>>());
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
    fn an_ended_guest_leaves_a_claim_that_nobody_can_win_again() {
        let (_directory, claims) = claims();
        claims.claim(1, &owner(1)).unwrap();
        assert_eq!(claims.end(1, &owner(1)).unwrap(), Outcome::Won);
        let ended = Owner { role: ClaimRole::Ended, ..owner(1) };
        assert_eq!(claims.latest().unwrap(), Some((2, ended.clone())));
        assert_eq!(claims.claim(2, &owner(2)).unwrap(), Outcome::Lost { holder: ended });
    }

    #[test]
    fn names_that_are_none_are_refused_by_reason() {
        let (directory, claims) = claims();
        let spec = ArbiterSpec::Directory(directory.path().to_owned());
        for name in ["", ".hidden", "a/b", "a b", "ä", &"x".repeat(65)] {
            let refused = Claims::open(&spec, name);
            assert!(matches!(refused, Err(ClaimError::BadGuestName { .. })), "{name:?}");
        }
        let nameless = Owner { host: "a\nb".into(), ..owner(1) };
        assert!(matches!(claims.claim(1, &nameless), Err(ClaimError::BadHostName { .. })));
    }
}
