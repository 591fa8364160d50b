//! Whether the right to run a guest can be claimed at an arbiter.
//!
//! Owns: these measurements. Must never: leave anything behind there.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::Finding;
use super::surroundings::{median, milliseconds};
use crate::pair::claims::arbiter::EtcdFiles;
use crate::pair::claims::arbiter::etcd::{CallError, Cluster};
use crate::pair::claims::arbiter::{Access, ArbiterSpec, dir, random_id};
use crate::with_causes;

const SYNCS: usize = 5;
const TRANSACTIONS: usize = 5;
/// More than this eats into the time that a takeover may take.
const SYNC_MAX: Duration = Duration::from_millis(100);

/// Can the right to run a guest be claimed there?
pub fn examine(arbiter: &ArbiterSpec, etcd: &EtcdFiles) -> Finding {
    match arbiter {
        ArbiterSpec::Directory(path) => directory(path),
        ArbiterSpec::Etcd(endpoints) => cluster(endpoints, etcd),
    }
}

/// A transaction that changes nothing, at each endpoint.
fn cluster(endpoints: &[String], etcd: &EtcdFiles) -> Finding {
    let access = match Access::read(etcd) {
        Ok(access) => access,
        Err(error) => return Finding::failed(error.to_string(), "correct the option"),
    };
    let cluster = Cluster::new(endpoints, access);
    let measure = |endpoint: &String| {
        let version = cluster.version(endpoint)?;
        let times = (0..TRANSACTIONS).map(|_| cluster.round_trip(endpoint)).collect::<Result<Vec<_>, _>>()?;
        Ok::<_, CallError>((version, median(times)))
    };
    let mut seen = Vec::new();
    let (mut answer, mut slow) = (0, false);
    for endpoint in endpoints {
        seen.push(match measure(endpoint) {
            Ok((version, round_trip)) => {
                answer += 1;
                slow |= round_trip > SYNC_MAX;
                let time = milliseconds(round_trip);
                format!("{endpoint}: etcd {version}, a transaction that changes nothing takes {time}")
            }
            Err(error) => error.to_string(),
        });
    }
    let seen = seen.join("; ");
    if answer == 0 {
        return Finding::failed(seen, "start an etcd 3.4 or newer there, or correct --arbiter");
    }
    if answer < endpoints.len() {
        return Finding::degraded(seen, "the others are asked instead: mend it before they fail too");
    }
    if slow {
        return Finding::degraded(
            seen,
            "a takeover waits for that: use a nearer etcd, or faster storage for it",
        );
    }
    Finding::ok(seen)
}

fn directory(directory: &Path) -> Finding {
    // What the monitor itself would say of it.
    if let Err(error) = dir::probe(directory) {
        return Finding::failed(with_causes(&error), "--arbiter must name it as primary and backup will");
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

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_good_directory_is_left_as_it_was() {
        let temporary = tempfile::tempdir().unwrap();
        let finding = directory(temporary.path());
        assert!(matches!(finding.verdict, Verdict::Ok | Verdict::Degraded), "{}", finding.seen);
        assert!(finding.seen.contains("created once only"), "{}", finding.seen);
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_directory_and_a_file_fail_in_the_monitors_words() {
        let temporary = tempfile::tempdir().unwrap();
        let finding = directory(&temporary.path().join("none"));
        assert_eq!(finding.verdict, Verdict::Failed);
        assert!(finding.seen.contains("none' does not exist; create it"), "{}", finding.seen);
        let file = temporary.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(directory(&file).seen.contains("file' is not a directory"));
    }
}
