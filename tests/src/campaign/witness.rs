//! Sees from outside which host speaks for the guest and which writes its disk, and judges whether it was one at a time.
//!
//! Outside is this machine: the ports of the guests' bridge, and the file servers through which hosts write the image.
//! Nothing that a monitor says of itself is taken for seen; only the order of takeovers is its statement.
//!
//! **What is allowed.** Hosts must be seen in the order in which they took the guest over: once the new one was seen,
//! the old one must not be, until it takes over again. One exception: a host that was frozen may have had one frame, or
//! one request to its disk, under way in its kernel or in the emulated device, which its monitor let go before the
//! freeze and which nothing can call back. So of a host that goes on after a freeze one such sighting is counted as
//! *late*, if it comes at once. A monitor that acts without the right to has more to send than one.
//!
//! **What is not seen.** Reads. A write of the old host before the first write of the new one. The order of two writers
//! that both write within the moment that it takes to look.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::hosts::{HostError, Net, Senders, TestHost, Writers};
use crate::lock;
use crate::pair::GUEST_MAC;

/// How long a thread waits before it looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long after it goes on a frozen host may be seen once.
const AT_ONCE: Duration = Duration::from_millis(100);
/// By how much later than a new host's first frame its monitor's line may arrive.
const LINE_DELAY: Duration = Duration::from_secs(3);

/// Something from a host was seen at this time since the campaign's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sighting {
    /// When.
    pub at: Duration,
    /// From which host.
    pub host: u8,
}

/// When hosts that stood still went on.
#[derive(Debug, Clone, Default)]
pub struct Resumes(Arc<Mutex<Vec<Sighting>>>);

impl Resumes {
    /// A host is about to go on.
    pub fn note(&self, host: u8, at: Duration) {
        lock(&self.0).push(Sighting { at, host });
    }

    /// All so far.
    pub fn all(&self) -> Vec<Sighting> {
        lock(&self.0).clone()
    }
}

/// Which process writes what which host writes.
#[derive(Debug, Clone, Default)]
pub struct Disks(Arc<Mutex<HashMap<i32, u8>>>);

impl Disks {
    /// A host has booted.
    pub fn note(&self, host: &TestHost) {
        if let Some(pid) = host.storage_pid() {
            lock(&self.0).insert(pid as i32, host.index());
        }
    }
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Frames from the guest's address.
    pub frames: Vec<Sighting>,
    /// Writes to its disk image.
    pub writes: Vec<Sighting>,
    /// What could not be seen, or not be understood.
    pub errors: Vec<String>,
}

/// Two threads that look.
#[derive(Debug)]
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Witness {
    /// Begins to look. Times are since `epoch`.
    pub fn start(net: &Arc<Net>, disk: &Path, disks: Disks, epoch: Instant) -> Result<Witness, HostError> {
        let (seen, over) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let writers = Writers::watch(disk)?;
        let senders = net.enter(|| Senders::watch(net, GUEST_MAC))??;
        let threads = vec![
            thread::spawn({
                let (net, seen, over) = (Arc::clone(net), Arc::clone(&seen), Arc::clone(&over));
                move || {
                    let looked = net.enter(|| look_at_frames(senders, &seen, &over, epoch));
                    if let Err(error) = looked.and_then(|looked| looked) {
                        lock(&seen).errors.push(error.to_string());
                    }
                }
            }),
            thread::spawn({
                let (seen, over) = (Arc::clone(&seen), Arc::clone(&over));
                move || {
                    if let Err(error) = look_at_writes(&writers, &disks, &seen, &over, epoch) {
                        lock(&seen).errors.push(error.to_string());
                    }
                }
            }),
        ];
        Ok(Witness { seen, over, threads })
    }

    /// Ends, and tells what was seen.
    pub fn stop(mut self) -> Seen {
        self.end();
        lock(&self.seen).clone()
    }

    fn end(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                lock(&self.seen).errors.push("a thread of the witness panicked".into());
            }
        }
    }
}

impl Drop for Witness {
    /// They hold on to the network, which is to go away.
    fn drop(&mut self) {
        self.end();
    }
}

fn look_at_frames(
    mut senders: Senders,
    seen: &Mutex<Seen>,
    over: &AtomicBool,
    epoch: Instant,
) -> Result<(), HostError> {
    while !over.load(Ordering::Relaxed) {
        let hosts = senders.hosts(LOOK)?;
        let at = epoch.elapsed();
        lock(seen).frames.extend(hosts.into_iter().map(|host| Sighting { at, host }));
    }
    Ok(())
}

fn look_at_writes(
    writers: &Writers,
    disks: &Disks,
    seen: &Mutex<Seen>,
    over: &AtomicBool,
    epoch: Instant,
) -> Result<(), HostError> {
    while !over.load(Ordering::Relaxed) {
        let processes = writers.processes(LOOK)?;
        let at = epoch.elapsed();
        let (disks, mut seen) = (lock(&disks.0), lock(seen));
        for process in processes {
            match disks.get(&process) {
                Some(host) => seen.writes.push(Sighting { at, host: *host }),
                None => seen.errors.push(format!("process {process}, of no host, wrote the guest's disk")),
            }
        }
    }
    Ok(())
}

/// What follows from sightings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Sightings of hosts that had been frozen, of which one is allowed.
    pub late: usize,
    /// The others out of order, as sentences.
    pub violations: Vec<String>,
}

/// Compares what was seen with who ran the guest, one after the other, and when that was heard.
pub fn judge(
    what: &str,
    sightings: &[Sighting],
    tenures: &[(u8, Duration)],
    resumes: &[Sighting],
) -> Judgement {
    let mut judgement = Judgement::default();
    let mut unused: Vec<Sighting> = resumes.to_vec();
    let mut now = 0;
    for sighting in sightings {
        let fits =
            |(host, heard): &(u8, Duration)| *host == sighting.host && sighting.at + LINE_DELAY >= *heard;
        if tenures.get(now).is_some_and(fits) {
            continue;
        }
        if let Some(later) = tenures.iter().skip(now + 1).position(fits) {
            now += 1 + later;
            continue;
        }
        let excuse = unused.iter().position(|resume| {
            resume.host == sighting.host && resume.at <= sighting.at && sighting.at <= resume.at + AT_ONCE
        });
        if let Some(excuse) = excuse {
            unused.remove(excuse);
            judgement.late += 1;
            continue;
        }
        let owner = tenures.get(now).map_or(0, |(host, _)| *host);
        judgement.violations.push(format!(
            "{what} of host {} at {:.3} s, when the guest was host {owner}'s",
            sighting.host,
            sighting.at.as_secs_f64()
        ));
    }
    judgement
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(at_ms: u64, host: u8) -> Sighting {
        Sighting { at: Duration::from_millis(at_ms), host }
    }

    fn judged(sightings: &[(u64, u8)], tenures: &[(u8, u64)], resumes: &[(u64, u8)]) -> (usize, usize) {
        let list = |pairs: &[(u64, u8)]| pairs.iter().map(|(ms, host)| at(*ms, *host)).collect::<Vec<_>>();
        let tenures: Vec<_> = tenures.iter().map(|(host, ms)| (*host, Duration::from_millis(*ms))).collect();
        let judgement = judge("a frame", &list(sightings), &tenures, &list(resumes));
        (judgement.late, judgement.violations.len())
    }

    #[test]
    fn hosts_that_take_turns_are_in_order() {
        let tenures = [(1, 0), (2, 10_000), (3, 20_000), (1, 30_000)];
        let seen = [(1, 1), (9_990, 1), (9_995, 2), (10_050, 2), (20_001, 3), (31_000, 1)];
        assert_eq!(judged(&seen, &tenures, &[]), (0, 0));
        assert_eq!(judged(&[(1, 1), (25_000, 3)], &tenures, &[]), (0, 0), "host 2 had nothing to send");
    }

    #[test]
    fn a_host_that_speaks_after_its_successor_is_a_violation() {
        let tenures = [(1, 0), (2, 10_000), (1, 30_000)];
        assert_eq!(judged(&[(1, 1), (10_001, 2), (10_002, 1), (10_003, 2)], &tenures, &[]), (0, 1));
    }

    #[test]
    fn a_host_that_never_had_the_guest_is_a_violation() {
        assert_eq!(judged(&[(1, 1), (2, 3)], &[(1, 0), (2, 10_000)], &[]), (0, 1));
    }

    #[test]
    fn one_sighting_right_after_a_freeze_is_late_and_more_are_violations() {
        let tenures = [(1, 0), (2, 10_000)];
        let seen = [(1, 1), (10_001, 2), (15_010, 1), (15_020, 2)];
        assert_eq!(judged(&seen, &tenures, &[(15_000, 1)]), (1, 0));
        assert_eq!(judged(&seen, &tenures, &[(14_000, 1)]), (0, 1), "too long after it");
        assert_eq!(judged(&seen, &tenures, &[(15_000, 2)]), (0, 1), "another host's");
        let seen = [(1, 1), (10_001, 2), (15_010, 1), (15_011, 1)];
        assert_eq!(judged(&seen, &tenures, &[(15_000, 1)]), (1, 1));
    }
}
