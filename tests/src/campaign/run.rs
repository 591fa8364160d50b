//! The campaign's course: quiet, fault, undone, protected and served again, quiet.

use std::error::Error;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::clients::{REPLY_TIMEOUT, Registers};
use super::history::{History, Verdict};
use super::injury::{Injury, Tools};
use super::report::{Report, Survived};
use super::schedule::{Fault, schedule};
use super::services::Services;
use super::witness::{Disks, Resumes, Seen, Witness, judge};
use crate::client::{self, Client, Config, dump};
use crate::hosts::SmallDir;
use crate::pair::{Guest, SHORT, Site};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const HOSTS: u8 = 3;
/// Clients with keys in common.
const CLIENTS: usize = 3;
/// Name and size of the claims directory. A claim takes a page.
const CLAIMS: &str = "claims";
const CLAIMS_KIB: u32 = 8 << 10;
/// How long the guest may be without protection, or its clients without replies, before the campaign has failed.
const DEADLINE: Duration = Duration::from_secs(60);
/// The pair is at rest when it has been protected for so long: more than the time-out, so that nothing that a fault
/// has led to is still to be noticed.
const QUIET: Duration = Duration::from_millis(1_500);
/// Of the pairs. Emulated hosts are often late; a time-out that is over too soon costs a takeover, nothing else.
const TIMEOUT_MS: u32 = 1_000;
/// Replies, to all clients together, that show that they are served.
const SERVED: usize = 12;
const LOOK: Duration = Duration::from_millis(20);

/// Runs the campaign with this seed, and says how it goes. If it fails, what the monitors said is kept in
/// `target/campaign/seed-N`. An error means that there was no campaign.
pub fn run(seed: u64, count: usize) -> Outcome<Report> {
    println!("campaign seed={seed} faults={count}");
    for (number, fault) in (1..).zip(schedule(seed, count)) {
        println!("  {number}: {fault}");
    }
    let mut campaign = Campaign::boot(seed)?;
    let report = campaign.course(&schedule(seed, count));
    print!("{report}");
    if !report.failures().is_empty() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../target/campaign/seed-{seed}"));
        campaign.keep_logs(&dir, &report)?;
        println!("what the monitors said: {}", dir.display());
    }
    Ok(report)
}

struct Campaign {
    seed: u64,
    site: Site,
    services: Services,
    tools: Tools,
    witness: Option<Witness>,
    load: Option<Load>,
}

/// The clients.
struct Load {
    /// Keeps several requests under way, on keys of its own.
    counting: Client,
    /// When that one started, since the campaign's start.
    counting_from: Duration,
    registers: Registers,
}

impl Load {
    fn start(site: &Site, seed: u64, epoch: Instant) -> Outcome<Load> {
        let streams = (0..CLIENTS).map(|_| site.connect()).collect::<Outcome<Vec<_>>>()?;
        let registers = Registers::start(streams, seed, epoch)?;
        let config = Config {
            window: 2,
            value_len: 200,
            key_prefix: "own".into(),
            sole_writer: false,
            reply_timeout: REPLY_TIMEOUT,
            ..Config::default()
        };
        let counting_from = epoch.elapsed();
        Ok(Load { counting: site.client(config)?, counting_from, registers })
    }

    fn answered(&self) -> usize {
        self.counting.answered() + self.registers.answered()
    }
}

/// A fault that was survived, before the clients' books are closed.
struct Past {
    fault: Fault,
    host: Option<u8>,
    from: Duration,
    until: Duration,
    protected_after: Option<Duration>,
}

impl Campaign {
    fn boot(seed: u64) -> Outcome<Campaign> {
        let mut claims = None;
        let mut site = Site::boot_with(HOSTS, |net, shared| {
            claims = Some(SmallDir::make(net, &shared.join(CLAIMS), CLAIMS_KIB)?);
            Ok(())
        })?;
        let claims = claims.ok_or("the claims directory was not made")?;
        let disks = Disks::default();
        (1..=HOSTS).for_each(|number| disks.note(site.host(number)));
        let volume = site.volume_with_claims_in(CLAIMS)?;
        let epoch = Instant::now();
        let disk = site.local_path(&volume.disk());
        let witness = Witness::start(site.net(), &disk, disks.clone(), epoch)?;
        let guest = Guest { timeout_ms: TIMEOUT_MS, ..Guest::default() };
        let started = Services::start(&mut site, HOSTS, guest, volume, epoch);
        let services = started.inspect_err(|_| eprintln!("{}", site.logs()))?;
        let tools = Tools { claims, resumes: Resumes::default(), disks, epoch };
        Ok(Campaign { seed, site, services, tools, witness: Some(witness), load: None })
    }

    /// All faults, then the books.
    fn course(&mut self, faults: &[Fault]) -> Report {
        let mut past = Vec::new();
        let stopped = self.faults(faults, &mut past).err().map(|error| error.to_string());
        let ended = self.tools.epoch.elapsed();
        let mut report = Report {
            seed: self.seed,
            wanted: faults.len(),
            survived: Vec::new(),
            took: Duration::ZERO,
            answered: 0,
            client_errors: Vec::new(),
            lost: 0,
            repeated: 0,
            out_of_order: 0,
            missing: Vec::new(),
            linearizable: Verdict::Linearizable,
            seen: (0, 0),
            late: (0, 0),
            two_at_a_time: Vec::new(),
            useless: Vec::new(),
            stopped,
        };
        if let Some(load) = self.load.take() {
            report.took = ended.saturating_sub(load.counting_from);
            self.close_books(load, &past, &mut report);
        }
        if let Some(witness) = self.witness.take() {
            self.judge(&witness.stop(), &mut report);
        }
        report
    }

    fn faults(&mut self, faults: &[Fault], past: &mut Vec<Past>) -> Outcome {
        self.load = Some(Load::start(&self.site, self.seed, self.tools.epoch)?);
        self.rest(None)?;
        for (number, &fault) in (1..).zip(faults) {
            // Not a condition to wait for: the moment that was drawn.
            thread::sleep(fault.after);
            let mut injury = Injury::begin(fault, &self.site, &self.services, &self.tools)?;
            let host = injury.host.map_or_else(|| "-".to_owned(), |host| host.to_string());
            println!("{:8.3} s  {number}: {fault}; host {host}", injury.at.as_secs_f64());
            let until =
                self.rest(Some(&mut injury)).map_err(|error| format!("fault {number}, {fault}: {error}"))?;
            let protected_after = self.services.standing().protected_after(injury.at);
            match protected_after {
                Some(after) => println!("            protected again after {:.3} s", after.as_secs_f64()),
                None => println!("            protected all the time"),
            }
            let host = injury.host;
            past.push(Past { fault, host, from: injury.at, until, protected_after });
        }
        Ok(())
    }

    /// Waits until the fault is undone, the guest protected and at rest, and clients are served. Returns when it was
    /// protected and served.
    fn rest(&mut self, mut injury: Option<&mut Injury>) -> Outcome<Duration> {
        let epoch = self.tools.epoch;
        let deadline = Instant::now() + DEADLINE;
        let mut undone_at = None;
        let mut answered_then = 0;
        let mut served_at = None;
        loop {
            let load = self.load.as_ref().ok_or("there are no clients")?;
            let standing = self.services.standing();
            let undone = match &mut injury {
                Some(injury) => injury.tend(&mut self.site, standing.backup().is_some(), &self.tools)?,
                None => true,
            };
            if undone && undone_at.is_none() {
                undone_at = Some(epoch.elapsed());
                answered_then = load.answered();
            }
            let errors = load.registers.errors();
            if !errors.is_empty() {
                return Err(errors.join("; ").into());
            }
            if undone && load.answered() >= answered_then + SERVED && served_at.is_none() {
                served_at = Some(epoch.elapsed());
            }
            let out_of_reach = injury.as_ref().and_then(|injury| injury.out_of_reach());
            self.services.tend(&mut self.site, out_of_reach)?;
            if let (Some(undone_at), Some(served_at), Some(latest)) =
                (undone_at, served_at, standing.latest())
                && standing.backup().is_some()
                && latest.at.max(undone_at) + QUIET < epoch.elapsed()
            {
                return Ok(latest.at.max(served_at));
            }
            if Instant::now() > deadline {
                let state = standing.latest().map(|latest| format!("{latest:?}"));
                return Err(format!(
                    "not protected and served within {DEADLINE:?}; undone: {undone}, served: {}, standing: {state:?}",
                    served_at.is_some()
                )
                .into());
            }
            thread::sleep(LOOK);
        }
    }

    fn close_books(&self, load: Load, past: &[Past], report: &mut Report) {
        let Load { counting, counting_from, registers } = load;
        let counted = counting.stop(SHORT);
        let (mut history, errors) = registers.stop();
        report.client_errors = errors;
        report.client_errors.extend(counted.broken.iter().map(|why| format!("counting client: {why}")));
        report.client_errors.extend(counted.wrong.iter().map(|what| format!("counting client: {what}")));
        report.lost = counted.lost.len();
        report.repeated = counted.repeated.len();
        report.out_of_order = counted.out_of_order.len();
        let replies = replies(&counted, counting_from, &history);
        report.answered = replies.iter().map(Vec::len).sum();
        report.survived = past
            .iter()
            .map(|past| Survived {
                fault: past.fault,
                host: past.host,
                blackout: blackout(&replies, past.from, past.until),
                protected_after: past.protected_after,
            })
            .collect();
        let asked = self.tools.epoch.elapsed();
        let stored = self.site.connect().and_then(|stream| Ok(dump(stream, SHORT)?));
        match stored {
            Ok(stored) => {
                report.missing = counted.missing_from(&stored);
                history.add_final_state(&stored, asked, self.tools.epoch.elapsed());
            }
            Err(error) => report.missing.push(format!("what is stored cannot be asked: {error}")),
        }
        let started = Instant::now();
        report.linearizable = history.check();
        println!(
            "{} operations on common keys checked in {:.1} s",
            history.operations().len(),
            started.elapsed().as_secs_f64()
        );
    }

    fn judge(&self, seen: &Seen, report: &mut Report) {
        let standing = self.services.standing();
        let (tenures, resumes) = (standing.tenures(), self.tools.resumes.all());
        let frames = judge("a frame", &seen.frames, &tenures, &resumes);
        let writes = judge("a disk write", &seen.writes, &tenures, &resumes);
        report.seen = (seen.frames.len(), seen.writes.len());
        report.late = (frames.late, writes.late);
        report.useless = self.services.useless_backups();
        report.two_at_a_time = standing.contradictions();
        report.two_at_a_time.extend(frames.violations);
        report.two_at_a_time.extend(writes.violations);
        report.two_at_a_time.extend(seen.errors.iter().cloned());
        for (what, count) in [("frame", seen.frames.len()), ("disk write", seen.writes.len())] {
            if count == 0 {
                report.two_at_a_time.push(format!("no {what} was seen at all, so nothing is shown"));
            }
        }
    }

    fn keep_logs(&self, dir: &Path, report: &Report) -> Outcome {
        std::fs::create_dir_all(dir)?;
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text);
        write("report.md", &report.to_string())?;
        for (name, text) in self.site.timed_logs(self.tools.epoch) {
            write(&name, &text)?;
        }
        Ok(())
    }
}

/// When replies came to each client.
fn replies(counted: &client::Report, counting_from: Duration, history: &History) -> Vec<Vec<Duration>> {
    let mut by_client = vec![Vec::new(); CLIENTS + 1];
    by_client[0].extend(counted.samples.iter().filter_map(|sample| Some(sample.replied? + counting_from)));
    for operation in history.operations() {
        if let Some((at, _)) = &operation.returned {
            by_client[operation.client as usize].push(*at);
        }
    }
    by_client.iter_mut().for_each(|replies| replies.sort_unstable());
    by_client
}

/// The longest time that a client was without a reply and that touches the time from `from` to `until`.
fn blackout(replies: &[Vec<Duration>], from: Duration, until: Duration) -> Duration {
    let gaps = replies.iter().flat_map(|replies| replies.windows(2));
    gaps.filter(|gap| gap[1] > from && gap[0] < until).map(|gap| gap[1] - gap[0]).max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blackout_is_the_worst_clients_longest_gap_around_the_fault() {
        let ms = |times: &[u64]| times.iter().map(|ms| Duration::from_millis(*ms)).collect::<Vec<_>>();
        let replies = [ms(&[0, 900, 1_000, 1_300, 1_400]), ms(&[0, 990, 1_200, 1_700, 3_700])];
        let blackout = |from, until| {
            blackout(&replies, Duration::from_millis(from), Duration::from_millis(until)).as_millis()
        };
        assert_eq!(blackout(1_250, 1_400), 500);
        assert_eq!(blackout(1_000, 1_150), 300, "the one under way when the fault ends counts");
        assert_eq!(blackout(5_000, 6_000), 0);
    }
}
