//! What a pair needs around a host: taps, the shared directory, the way to the peer.
//!
//! Owns: these measurements. Must never: leave anything behind in the directory, or say more to the peer than
//! that somebody connects.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Finding;
use crate::ft::claim::{Claims, random_id};
use crate::host::tap::TapError;
use crate::with_causes;

const TUN: &str = "/dev/net/tun";
/// Any valid name; nothing is stored under it.
const GUEST: &str = "doctor";
const SYNCS: usize = 5;
const CONNECTS: usize = 7;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// More than this holds each output of the guest back noticeably.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(10);
/// More than this eats into the time that a takeover may take.
const SYNC_MAX: Duration = Duration::from_millis(100);

/// Can there be taps?
pub fn tun() -> Finding {
    match OpenOptions::new().read(true).write(true).open(TUN) {
        Ok(_) => Finding::ok(format!("{TUN} can be opened")),
        Err(source) => {
            let error = TapError::NoDriver { source };
            Finding::degraded(
                with_causes(&error),
                "guests with a network card (--tap) are refused until then",
            )
        }
    }
}

/// Can the right to run a guest be claimed in this directory?
pub fn shared_directory(directory: &Path) -> Finding {
    // What the monitor itself would say of it.
    if let Err(error) = Claims::open(directory, GUEST) {
        return Finding::failed(with_causes(&error), "--shared must name it as primary and backup will");
    }
    match Names::new(directory).and_then(|names| names.measure()) {
        Err(error) => Finding::failed(
            format!("in '{}' {error}", directory.display()),
            "use storage with hard links and fsync: NFS, virtiofs or a cluster file system",
        ),
        Ok(sync) => {
            let seen = format!(
                "'{}': a name is created once only; fsync takes {}",
                directory.display(),
                milliseconds(sync)
            );
            if sync > SYNC_MAX {
                return Finding::degraded(seen, "a takeover waits for that: use faster storage");
            }
            Finding::ok(seen)
        }
    }
}

/// Two names in a directory, removed on drop.
struct Names {
    directory: PathBuf,
    first: PathBuf,
    second: PathBuf,
}

impl Names {
    fn new(directory: &Path) -> io::Result<Self> {
        let id = u128::from_le_bytes(random_id()?);
        let name = |part: &str| directory.join(format!(".vmft-doctor-{id:032x}-{part}"));
        Ok(Self { directory: directory.to_owned(), first: name("a"), second: name("b") })
    }

    /// The median time of an fsync of a file and its directory. An error's sentence goes on behind "in
    /// DIRECTORY".
    fn measure(&self) -> io::Result<Duration> {
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"))
        };
        let mut file = File::create_new(&self.first).map_err(failed("no file can be created"))?;
        fs::hard_link(&self.first, &self.second).map_err(failed("no hard link can be made"))?;
        match fs::hard_link(&self.first, &self.second) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(failed("a second link of the same name fails in an unexpected way")(error));
            }
            Ok(()) => return Err(io::Error::other("a name can be created twice")),
        }
        let mut times = Vec::new();
        for _ in 0..SYNCS {
            let started = Instant::now();
            file.write_all(b"vmft-doctor\n").map_err(failed("nothing can be written"))?;
            file.sync_all().map_err(failed("fsync of a file fails"))?;
            match File::open(&self.directory).and_then(|directory| directory.sync_all()) {
                // Some network file systems have none for directories; their server is durable by itself.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result.map_err(failed("fsync of the directory fails"))?,
            }
            times.push(started.elapsed());
        }
        Ok(median(times))
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        // They may not have been created; what stays behind is never looked at.
        let _ = fs::remove_file(&self.second);
        let _ = fs::remove_file(&self.first);
    }
}

/// How long does a round trip to the peer take?
pub fn peer(address: SocketAddr) -> Finding {
    let mut times = Vec::new();
    for _ in 0..CONNECTS {
        let started = Instant::now();
        if let Err(error) = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            let error = match error.kind() {
                ErrorKind::TimedOut => format!("nothing within {} s", CONNECT_TIMEOUT.as_secs()),
                _ => error.to_string(),
            };
            return Finding::failed(
                format!("{address} does not answer: {error}"),
                "start a primary there (--peer takes its --listen address); check link, routes, firewalls",
            );
        }
        times.push(started.elapsed());
    }
    let round_trip = median(times);
    let seen = format!("{address} answers within {}", milliseconds(round_trip));
    if round_trip > ROUND_TRIP_MAX {
        return Finding::degraded(seen, "each output of the guest waits for that: use a faster link");
    }
    Finding::ok(seen)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn milliseconds(time: Duration) -> String {
    format!("{:.3} ms (median)", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_good_directory_is_left_as_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let finding = shared_directory(directory.path());
        assert!(matches!(finding.verdict, Verdict::Ok | Verdict::Degraded), "{}", finding.seen);
        assert!(finding.seen.contains("created once only"), "{}", finding.seen);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_directory_and_a_file_fail_in_the_monitors_words() {
        let directory = tempfile::tempdir().unwrap();
        let finding = shared_directory(&directory.path().join("none"));
        assert_eq!(finding.verdict, Verdict::Failed);
        assert!(finding.seen.contains("none' does not exist; create it"), "{}", finding.seen);
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(shared_directory(&file).seen.contains("file' is not a directory"));
    }

    #[test]
    fn a_peer_that_listens_is_measured_and_one_that_does_not_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let finding = peer(address);
        assert_ne!(finding.verdict, Verdict::Failed, "{}", finding.seen);
        assert!(finding.seen.contains("answers within"), "{}", finding.seen);
        drop(listener);
        let finding = peer(address);
        assert_eq!(finding.verdict, Verdict::Failed);
        assert!(finding.seen.contains("does not answer: Connection refused"), "{}", finding.seen);
    }

    #[test]
    fn the_median_is_that_of_the_sorted_times() {
        let ms = Duration::from_millis;
        assert_eq!(median(vec![ms(9), ms(1), ms(5)]), ms(5));
        assert_eq!(median(Vec::new()), Duration::ZERO);
    }
}
