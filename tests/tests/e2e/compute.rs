//! A guest whose processor is never idle and makes no exits for long gets its events all the same, and is replayed and
//! taken over like any other.
//!
//! `VMFT_COMPUTE_S` is how long it computes in each test (default 15 seconds), `VMFT_INTERRUPTS` how often each small
//! guest is interrupted (default 45), `VMFT_COMPUTE_KILLS` how many primaries are killed (default 2).

use std::error::Error;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use ft_log::{CheckpointDecoder, LogPart, RecordingReader};
use nix::sys::signal::Signal;
use vmft_tests::client::{Client, Config};
use vmft_tests::events::{
    BACKUP_LOST, DESYNCHRONISED, FIGURES, PROTECTED, RECEIVING, TAKEOVER, THROTTLED, TRANSFER_FAILED,
    TRANSFER_FINAL, UNPROTECTED,
};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, Link, build_small_guests};
use vmft_tests::pair::{
    Guest, LONG, Monitor, Random, SERVICE_READY, SHORT, Site, Volume, count_from_environment, field,
    more_replies,
};

#[path = "../../../vmm/examples/small_guests/behaviours.rs"]
mod behaviours;

use behaviours::BEHAVIOURS;

use crate::SITES;

/// A guest that fills its memory with noise writes several times as much, on a slow machine too.
const NARROW_MBIT_PER_S: u32 = 20;
/// What a primary says while it sends its guest: first when all of it was sent, with what was written meanwhile left.
const ALL_SENT_ONCE: &str = "event=sending percent=100";

/// Two endless loops in user space, and beside them fork and exec, disk writes with fsync, and frames.
const WORK: &str = "loops,busy";
/// How often something that changes by itself is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// So often must the guest have been stopped for an event, or the test has tested nothing.
const STOPS_MIN: u64 = 50;

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("small_guests_stopped_anywhere_replay_equal", small_guests_stopped_anywhere_replay_equal),
    Case::on_hosts("stepping_changes_nothing", stepping_changes_nothing),
    Case::on_hosts("stepping_towards_nothing_ends", stepping_towards_nothing_ends),
    Case::on_hosts("late_alarms_find_the_stop_or_miss_it", late_alarms_find_the_stop_or_miss_it),
    Case::on_hosts("changing_page_tables_replay_equal", changing_page_tables_replay_equal),
    Case::on_hosts("computing_guest_replays_equal", computing_guest_replays_equal),
    Case::on_hosts("backup_that_misses_a_stop_gets_the_guest_anew", backup_that_misses_a_stop),
    Case::on_hosts("backup_joins_while_the_guest_runs", backup_joins_while_the_guest_runs),
    Case::on_hosts("guest_that_outruns_its_transfer_is_slowed", guest_that_outruns_its_transfer),
    Case::on_hosts("computing_guest_outlives_its_primary", computing_guest_outlives_its_primary),
];

/// The one without any conditional branch that a forced stop could be named by.
const NAMELESS: &str = "store";
/// The one that steps itself: where it does, a forced stop has no name.
const DEBUGS_ITSELF: &str = "trap-flag";
/// So many steps lead through `loop`, in ring 0 and in ring 3: on a host without breakpoints a step runs through the timer's
/// handler.
const LOOP_STEPS: [u64; 2] = [4_085, 4_094];
const LOOP_STEPS_WITH_BREAKPOINTS: [u64; 2] = [4_091, 4_100];
/// A stepped guest is interrupted once where others are so often.
const STEP_INTERRUPTS: u32 = 3;
/// Longest that an interrupt of a small guest may take: a copy of 16 MiB is stepped through to its end.
const INTERRUPT_MAX: Duration = Duration::from_secs(2);
/// Memory of a small guest: 64 MiB.
const SMALL_GUEST_PAGES: u64 = 64 << 8;
/// Pages of checkpoints behind which a recorder writes a batch.
const WAITING_PAGES: usize = 4_096;
/// Exit status of `small_guests`.
const MISSED: i32 = 5;

fn in_both_rings(behaviours: &[&'static str]) -> Vec<(&'static str, &'static str)> {
    behaviours.iter().flat_map(|name| [(*name, "0"), (*name, "3")]).collect()
}

/// Puts the program `small_guests` onto the hosts.
fn small_guests(volume: &Volume) -> Result<String, Box<dyn Error>> {
    fs::copy(build_small_guests()?, volume.local.join("small_guests"))?;
    Ok(format!("{}/small_guests", volume.path))
}

/// The sources of positions that hosts have; a host for `pmu` says so itself.
fn sources(site: &Site) -> Result<Vec<&'static str>, Box<dyn Error>> {
    let doctor = site.host(1).run(&["/images/vmft", "doctor"], SHORT)?.stdout;
    let mut sources = vec!["checkpoint", "step"];
    if doctor.iter().any(|line| line.contains("fit (pmu)")) {
        sources.push("pmu");
    } else {
        println!("not tested here: --position pmu, for which these hosts lack a counter");
    }
    Ok(sources)
}

fn small_guests_stopped_anywhere_replay_equal() -> TestResult {
    let interrupts = count_from_environment("VMFT_INTERRUPTS", 45);
    SITES.run(|site| {
        let volume = site.volume()?;
        let program = small_guests(&volume)?;
        for source in sources(site)? {
            for (behaviour, ring) in in_both_rings(&BEHAVIOURS) {
                let interrupts = if source == "step" { interrupts / STEP_INTERRUPTS } else { interrupts };
                small_guest(site, &volume, &program, [source, behaviour, ring], interrupts)?;
            }
        }
        Ok(())
    })
}

fn small_guest(
    site: &mut Site,
    volume: &Volume,
    program: &str,
    [source, behaviour, ring]: [&str; 3],
    interrupts: u32,
) -> TestResult {
    let what = format!("{behaviour} in ring {ring} by {source}");
    let recording = format!("{}/small", volume.path);
    let count = interrupts.to_string();
    let patience = LONG + interrupts * INTERRUPT_MAX;
    let recorded =
        site.host(1).run(&[program, "record", &recording, behaviour, ring, &count, source], patience)?;
    assert_eq!(recorded.ending, Ending::Exited(0), "{what}: {:?}", recorded.stderr);
    let whole =
        recorded.stderr.iter().find(|line| line.contains("forced_stops")).ok_or("no count of stops")?;
    let number = |name| field(whole, name).ok_or("no such figure");
    let (stops, checkpoints) = (number("forced_stops")?, number("checkpoints")?);
    assert!(stops >= 10, "{what} was stopped only {stops} times");
    match behaviour {
        _ if source == "checkpoint" => assert_eq!(checkpoints, stops, "{what}"),
        NAMELESS => assert_eq!(checkpoints, stops, "{what}"),
        DEBUGS_ITSELF => assert!(checkpoints > 0, "{what}: {stops} stops were named"),
        _ => assert_eq!(checkpoints, 0, "{what}"),
    }
    let replayed = site.start(2, &["replay".to_owned(), recording])?.wait(patience)?;
    assert_eq!(replayed.ending, Ending::Exited(0), "{what}: {:?}", replayed.stderr);
    assert_few_pages_wait(&volume.local.join("small"))?;
    println!("{what}: {stops} forced stops, {checkpoints} checkpoints, {}", replayed.stdout.join(" "));
    Ok(fs::remove_file(volume.local.join("small"))?)
}

/// Fails if a replay of this recording of a small guest has to hold much more than a checkpoint of it in memory.
fn assert_few_pages_wait(recording: &Path) -> TestResult {
    let mut reader = RecordingReader::open(recording)?;
    io::copy(&mut reader.snapshot(), &mut io::sink())?;
    let mut decoder = CheckpointDecoder::new(SMALL_GUEST_PAGES);
    let (mut waiting, mut most, mut largest) = (0, 0, 0);
    while let Some(part) = reader.next_part()? {
        match part {
            LogPart::Checkpoint(piece) => {
                let pages = decoder.accept(&piece)?.map_or(0, |checkpoint| checkpoint.pages.len());
                waiting += pages;
                most = most.max(waiting);
                largest = largest.max(pages);
            }
            LogPart::Batch(_) => waiting = 0,
        }
    }
    assert!(most <= WAITING_PAGES + largest, "{most} pages of checkpoints before a batch, {largest} of one");
    Ok(())
}

/// What finds a position must leave no trace in the guest.
fn stepping_changes_nothing() -> TestResult {
    SITES.run(|site| {
        let program = small_guests(&site.volume()?)?;
        let doctor = site.host(1).run(&["/images/vmft", "doctor"], SHORT)?.stdout;
        let unarmed = doctor.iter().any(|line| line.contains("never fired"));
        let loop_steps = if unarmed { LOOP_STEPS } else { LOOP_STEPS_WITH_BREAKPOINTS };
        for (behaviour, ring) in in_both_rings(&BEHAVIOURS) {
            let compared = site.host(1).run(&[&program, "compare", behaviour, ring], LONG)?;
            println!("{behaviour} in ring {ring}: {}", compared.stdout.join(" "));
            assert_eq!(compared.ending, Ending::Exited(0), "{behaviour} {ring}: {:?}", compared.stderr);
            if behaviour == "loop" {
                let line = compared.stdout.last().ok_or("no output")?;
                let expected = loop_steps[usize::from(ring == "3")];
                assert_eq!(field(line, "steps"), Some(expected), "in ring {ring}");
            }
        }
        Ok(())
    })
}

/// A branch that does not come, and a handler that does not end within a step: neither holds the monitor.
fn stepping_towards_nothing_ends() -> TestResult {
    SITES.run(|site| {
        let program = small_guests(&site.volume()?)?;
        let aimed = site.host(1).run(&[&program, "aim", NAMELESS, "3"], 2 * LONG)?;
        println!("{NAMELESS} in ring 3: {}", aimed.stdout.join(" "));
        assert_eq!(aimed.ending, Ending::Exited(MISSED), "{:?}", aimed.stderr);
        let said = aimed.stdout.join(" ");
        assert!(said.contains("stepped through for 16384 instructions"), "{said}");
        let aimed = site.host(1).run(&[&program, "aim", "endless-handler", "3"], 2 * LONG)?;
        println!("endless-handler in ring 3: {}", aimed.stdout.join(" "));
        assert_eq!(aimed.ending, Ending::Exited(MISSED), "{:?}", aimed.stderr);
        let said = aimed.stdout.join(" ");
        assert!(said.contains("does not end") || said.contains("16384 instructions"), "{said}");
        Ok(())
    })
}

/// Alarms that ring late, now and then much too late: the exact instruction, or a report that it was missed.
fn late_alarms_find_the_stop_or_miss_it() -> TestResult {
    let interrupts = count_from_environment("VMFT_INTERRUPTS", 45);
    SITES.run(|site| {
        let volume = site.volume()?;
        let program = small_guests(&volume)?;
        let mut random = Random::from_environment();
        let (mut equal, mut missed) = (0, 0);
        for (behaviour, ring) in in_both_rings(&["loop", "flags", "page-fault", "system-call"]) {
            let recording = format!("{}/{behaviour}-{ring}", volume.path);
            let count = (interrupts / STEP_INTERRUPTS).to_string();
            let recorded =
                site.host(1).run(&[&program, "record", &recording, behaviour, ring, &count, "step"], LONG)?;
            assert_eq!(recorded.ending, Ending::Exited(0), "{:?}", recorded.stderr);
            for _ in 0..4 {
                let seed = random.between(1, u64::from(u32::MAX)).to_string();
                let replayed = site.host(2).run(&[&program, "replay", &recording, &seed], LONG)?;
                match replayed.ending {
                    Ending::Exited(0) => equal += 1,
                    Ending::Exited(MISSED) => {
                        println!("{behaviour} in ring {ring}, seed {seed}: {}", replayed.stdout.join(" "));
                        missed += 1;
                    }
                    other => return Err(format!("{other:?}: {:?}", replayed.stderr).into()),
                }
            }
        }
        println!("{equal} replays equal, {missed} missed a stop");
        assert!(equal > 0 && missed > 0, "only one of the two was tested: {equal} equal, {missed} missed");
        Ok(())
    })
}

fn guest() -> Guest {
    Guest { work: WORK, ..Guest::default() }
}

fn compute_time() -> Duration {
    Duration::from_secs(u64::from(count_from_environment("VMFT_COMPUTE_S", 15)))
}

/// Page tables that change all the time: what a processor remembers of them must not reach the guest.
fn changing_page_tables_replay_equal() -> TestResult {
    let (mut anchors, mut stops) = (0, 0);
    let rounds = count_from_environment("VMFT_PAGINGS", 1);
    for _ in 0..rounds {
        SITES.run(|site| {
            let more = page_tables_replay_equal(site)?;
            (anchors, stops) = (anchors + more.0, stops + more.1);
            Ok(())
        })?;
    }
    println!("{} recordings replayed equal: {anchors} anchors, {stops} forced stops", 2 * rounds);
    Ok(())
}

/// Records a guest on each host and replays it on the other one. Answers the anchors and forced stops of both.
fn page_tables_replay_equal(site: &mut Site) -> Result<(u64, u64), Box<dyn Error>> {
    let mut recorders = Vec::new();
    for host in [1, 2] {
        let volume = site.volume()?;
        let recording = format!("{}/recording", volume.path);
        let guest = Guest { work: "paging,poweroff-after-ready", memory_mib: 80, ..Guest::default() };
        let mut arguments = vec!["record".to_owned(), recording.clone()];
        arguments.extend(site.guest_options(&guest, &volume));
        recorders.push((site.start(host, &arguments)?, volume, recording));
    }
    let (mut anchors, mut stops) = (0, 0);
    let mut replayers = Vec::new();
    for (recorder, volume, recording) in recorders {
        recorder.wait_for_line("vmft-work: paging done", 2 * LONG)?;
        let whole = recorder.wait_for_line("the recording is whole", LONG)?;
        println!("{whole}");
        anchors += field(&whole, "anchors").ok_or("no anchors")?;
        stops += field(&whole, "forced_stops").ok_or("no forced stops")?;
        assert_eq!(recorder.wait(SHORT)?.ending, Ending::Exited(0));
        let other = 3 - recorder.host;
        replayers.push((site.start(other, &["replay".to_owned(), recording])?, volume));
    }
    for (replayer, volume) in replayers {
        println!("{}", replayer.wait_for_line("replay equal", 2 * LONG)?);
        assert_eq!(replayer.wait(SHORT)?.ending, Ending::Exited(0));
        fs::remove_dir_all(&volume.local)?;
    }
    Ok((anchors, stops))
}

fn computing_guest_replays_equal() -> TestResult {
    SITES.run(|site| {
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
        // Replay takes about as long as the recording did.
        let equal = replayer.wait_for_line("replay equal", LONG + compute_time())?;
        println!("{equal}");
        assert_eq!(replayer.wait(SHORT)?.ending, Ending::Exited(0));
        Ok(())
    })
}

/// A primary without a backup, and a client of its guest.
fn start_alone(site: &mut Site, guest: &Guest, volume: &Volume) -> Result<(Monitor, Client), Box<dyn Error>> {
    let primary = site.start_primary(1, guest, volume)?;
    primary.wait_for_line(SERVICE_READY, LONG)?;
    Ok((primary, site.client(Config::default())?))
}

/// It must not take over with the guest that it has, even if the primary dies just then, and be a backup again.
fn backup_that_misses_a_stop() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let guest = guest();
        let (primary, client) = start_alone(site, &guest, &volume)?;
        let backup = site.start_backup_with(2, 1, &guest, &volume, &["--inject-missed-stop", "20"])?;
        println!("{}", backup.wait_for_line(DESYNCHRONISED, LONG)?);
        println!("{}", primary.wait_for_event(BACKUP_LOST, "Missed", SHORT)?);
        primary.wait_for_line(UNPROTECTED, SHORT)?;
        primary.wait_for_lines(PROTECTED, 2, LONG)?;
        more_replies(&client, 20)?;
        primary.kill(Signal::SIGKILL)?;
        println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// Requests are answered while the guest is sent; a transfer that breaks is as if it had never been.
fn backup_joins_while_the_guest_runs() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let guest = guest();
        let (primary, client) = start_alone(site, &guest, &volume)?;
        more_replies(&client, 10)?;

        let first = site.start_backup(2, 1, &guest, &volume)?;
        primary.wait_for_line("event=sending percent=25", LONG)?;
        first.kill(Signal::SIGKILL)?;
        println!("{}", primary.wait_for_line(TRANSFER_FAILED, LONG)?);
        more_replies(&client, 10)?;
        assert_eq!(volume.claims()?, ["guest.view-1"], "nobody was lost, so nobody has to claim anything");

        let second = site.start_backup(2, 1, &guest, &volume)?;
        second.wait_for_line(RECEIVING, LONG)?;
        let before = client.answered();
        println!("{}", primary.wait_for_line(TRANSFER_FINAL, LONG)?);
        let meanwhile = client.answered() - before;
        assert!(meanwhile > 0, "no request was answered while the guest was sent");
        println!("{meanwhile} requests answered while the guest was sent");
        primary.wait_for_line(PROTECTED, LONG)?;
        more_replies(&client, 10)?;
        primary.kill(Signal::SIGKILL)?;
        second.wait_for_line(TAKEOVER, SHORT)?;
        more_replies(&client, 10)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// A guest that writes pages which cannot be compressed, faster than the link takes them, is slowed until they can be sent.
/// The primary says so, the guest answers meanwhile, and is protected in the end.
fn guest_that_outruns_its_transfer() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let guest = Guest { work: "noise2", ..Guest::default() };
        let (primary, client) = start_alone(site, &guest, &volume)?;
        more_replies(&client, 10)?;
        let backup = site.start_backup(2, 1, &guest, &volume)?;
        primary.wait_for_line(ALL_SENT_ONCE, LONG)?;
        let before = client.answered();
        site.net().narrow(2, Link::Log, NARROW_MBIT_PER_S)?;
        println!("{}", primary.wait_for_line(TRANSFER_FINAL, LONG)?);
        site.net().widen(2, Link::Log)?;
        assert!(client.answered() > before, "no request was answered while the guest was sent");
        println!("{} times slowed: {}", primary.count(THROTTLED), primary.wait_for_line(THROTTLED, SHORT)?);
        println!("{}", primary.wait_for_line(PROTECTED, LONG)?);
        more_replies(&client, 10)?;
        primary.kill(Signal::SIGKILL)?;
        backup.wait_for_line(TAKEOVER, SHORT)?;
        more_replies(&client, 10)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn computing_guest_outlives_its_primary() -> TestResult {
    let kills = count_from_environment("VMFT_COMPUTE_KILLS", 2);
    SITES.run(|site| {
        let volume = site.volume()?;
        let (mut primary, mut backup) = site.start_pair(&guest(), &volume)?;
        let client = site.client(Config::default())?;
        // A takeover is a view, and so is the pair after it.
        for view in (4..).step_by(2).take(kills as usize) {
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
        let figures = output.iter().rev().find(|line| line.contains(FIGURES));
        match figures.filter(|line| field(line, "checkpoints").is_some_and(|stops| stops >= STOPS_MIN)) {
            Some(figures) => return Ok(figures.clone()),
            None if Instant::now() > deadline => return Err("the guest is not stopped".into()),
            None => thread::sleep(LOOK),
        }
    }
}
