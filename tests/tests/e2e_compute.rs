//! A guest whose processor is never idle and makes no exits for long gets its events all the same, and is replayed and
//! taken over like any other.
//!
//! `VMFT_COMPUTE_S` is how long it computes in each test (default 15 seconds), `VMFT_INTERRUPTS` how often each small
//! guest is interrupted (default 60), `VMFT_COMPUTE_KILLS` how many primaries are killed (default 2).

use std::error::Error;
use std::fs;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmft_tests::client::{Client, Config};
use vmft_tests::harness::{self, Case, TestResult};
use vmft_tests::hosts::{Ending, build_small_guests};
use vmft_tests::pair::{
    Guest, LONG, Monitor, PAIR_FIGURES, PROTECTED, SERVICE_READY, SHORT, SharedSite, TAKEOVER,
    count_from_environment, field,
};

static SITE: SharedSite = SharedSite::new(2);

/// Two endless loops in user space, and beside them fork and exec, disk writes with fsync, and frames.
const WORK: &str = "loops,busy";
/// How often something that changes by itself is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// So often must the guest have been stopped for an event, or the test has tested nothing.
const STOPS_MIN: u64 = 50;

fn main() -> ExitCode {
    let status = harness::run(&[
        Case::on_hosts(
            "small_guests_stopped_anywhere_replay_equal",
            small_guests_stopped_anywhere_replay_equal,
        ),
        Case::on_hosts("changing_page_tables_replay_equal", changing_page_tables_replay_equal),
        Case::on_hosts("computing_guest_replays_equal", computing_guest_replays_equal),
        Case::on_hosts("computing_guest_outlives_its_primary", computing_guest_outlives_its_primary),
    ]);
    SITE.close();
    status
}

/// What the small guests do, each in ring 0 and ring 3: see `vmm/examples/small_guests/code.rs`.
const BEHAVIOURS: [&str; 7] = ["loop", "store", "rep-movs", "sti", "self-modifying", "fpu-sse", "exception"];

fn small_guests_stopped_anywhere_replay_equal() -> TestResult {
    let interrupts = count_from_environment("VMFT_INTERRUPTS", 60);
    SITE.run(|site| {
        let volume = site.volume()?;
        fs::copy(build_small_guests()?, volume.local.join("small_guests"))?;
        let program = format!("{}/small_guests", volume.path);
        for (behaviour, ring) in BEHAVIOURS.into_iter().flat_map(|name| [(name, "0"), (name, "3")]) {
            let recording = format!("{}/{behaviour}-{ring}", volume.path);
            let interrupts = interrupts.to_string();
            let recorded = site.host(1).run(&[&program, &recording, behaviour, ring, &interrupts], LONG)?;
            assert_eq!(recorded.ending, Ending::Exited(0), "{behaviour} {ring}: {:?}", recorded.stderr);
            let whole = recorded.stderr.iter().find(|line| line.contains("forced_stops"));
            let stops = whole.and_then(|line| field(line, "forced_stops")).ok_or("no count of stops")?;
            assert!(stops >= 10, "{behaviour} in ring {ring} was stopped only {stops} times");
            let replayer = site.start(2, &["replay".to_owned(), recording.clone()])?;
            let replayed = replayer.wait(LONG)?;
            assert_eq!(replayed.ending, Ending::Exited(0), "{behaviour} {ring}: {:?}", replayed.stderr);
            println!("{behaviour} in ring {ring}: {stops} forced stops, {}", replayed.stdout.join(" "));
            fs::remove_file(volume.local.join(format!("{behaviour}-{ring}")))?;
        }
        Ok(())
    })
}

fn guest() -> Guest {
    Guest { work: WORK, ..Guest::default() }
}

fn compute_time() -> Duration {
    Duration::from_secs(u64::from(count_from_environment("VMFT_COMPUTE_S", 15)))
}

fn more_replies(client: &Client, count: usize) -> TestResult {
    let all = client.wait_for_replies(client.answered() + count, LONG);
    if all { Ok(()) } else { Err("the client gets no more replies".into()) }
}

/// Page tables that change all the time: what a processor remembers of them must not reach the guest.
fn changing_page_tables_replay_equal() -> TestResult {
    SITE.run(|site| {
        let volume = site.volume()?;
        let recording = format!("{}/recording", volume.path);
        let guest = Guest { work: "paging,poweroff-after-ready", memory_mib: 80, ..Guest::default() };
        let mut arguments = vec!["record".to_owned(), recording.clone()];
        arguments.extend(site.guest_options(&guest, &volume));
        let recorder = site.start(1, &arguments)?;
        recorder.wait_for_line("vmft-work: paging done", 2 * LONG)?;
        println!("{}", recorder.wait_for_line("the recording is whole", LONG)?);
        assert_eq!(recorder.wait(SHORT)?.ending, Ending::Exited(0));
        let replayer = site.start(2, &["replay".to_owned(), recording])?;
        println!("{}", replayer.wait_for_line("replay equal", 2 * LONG)?);
        assert_eq!(replayer.wait(SHORT)?.ending, Ending::Exited(0));
        Ok(())
    })
}

fn computing_guest_replays_equal() -> TestResult {
    SITE.run(|site| {
        let volume = site.volume()?;
        let recording = format!("{}/recording", volume.path);
        let mut arguments = vec!["record".to_owned(), recording.clone()];
        arguments.extend(site.guest_options(&guest(), &volume));
        let recorder = site.start(1, &arguments)?;
        recorder.wait_for_line(SERVICE_READY, LONG)?;
        let client = site.client(Config::default())?;
        thread::sleep(compute_time());
        more_replies(&client, 10)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;
        recorder.kill(Signal::SIGTERM)?;
        let whole = recorder.wait_for_line("the recording is whole", SHORT)?;
        println!("{whole}");
        assert_eq!(recorder.wait(SHORT)?.ending, Ending::Exited(0));
        assert!(field(&whole, "forced_stops").is_some_and(|stops| stops >= STOPS_MIN), "{whole}");

        let replayer = site.start(2, &["replay".to_owned(), recording])?;
        let equal = replayer.wait_for_line("replay equal", LONG)?;
        println!("{equal}");
        assert_eq!(replayer.wait(SHORT)?.ending, Ending::Exited(0));
        Ok(())
    })
}

fn computing_guest_outlives_its_primary() -> TestResult {
    let kills = count_from_environment("VMFT_COMPUTE_KILLS", 2);
    SITE.run(|site| {
        let volume = site.volume()?;
        let (mut primary, mut backup) = site.start_pair(&guest(), &volume)?;
        let client = site.client(Config::default())?;
        for view in 2..kills + 2 {
            more_replies(&client, 20)?;
            thread::sleep(compute_time() / kills);
            println!("{}", wait_for_stops(&primary)?);
            primary.kill(Signal::SIGKILL)?;
            println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
            more_replies(&client, 20)?;
            let next = site.start_backup(primary.host, backup.host, &guest(), &volume)?;
            backup.wait_for_line(&format!("{PROTECTED} view={view}"), LONG)?;
            (primary, backup) = (backup, next);
        }
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// Waits until the guest was stopped often enough since the backup joined, and gives the line that says so.
fn wait_for_stops(primary: &Monitor) -> Result<String, Box<dyn Error>> {
    let deadline = Instant::now() + LONG;
    loop {
        let output = primary.output();
        let figures = output.iter().rev().find(|line| line.contains(PAIR_FIGURES));
        match figures.filter(|line| field(line, "checkpoints").is_some_and(|stops| stops >= STOPS_MIN)) {
            Some(figures) => return Ok(figures.clone()),
            None if Instant::now() > deadline => return Err("the guest is not stopped".into()),
            None => thread::sleep(LOOK),
        }
    }
}
