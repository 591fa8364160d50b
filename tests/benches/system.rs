//! What a pair costs and how fast it takes over, on test hosts: `cargo bench -p vmft-tests --bench system`.
//!
//! Arguments are names of sections; none means all. `VMFT_BENCH_ROUNDS` (default 3) is the number of boots of each
//! kind, of transfers, of lost hosts and of standbys called in, `VMFT_BENCH_KILLS` (default 10) that of killed monitors,
//! `VMFT_BENCH_FAULTS` (default 450, 50 of each kind) that of faults.
//!
//! Prints a table for `docs/benchmarks.md`. Nothing here passes or fails by a time: machines are noisy, so that
//! ratios of one run mean more than any figure.

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmft_tests::campaign;
use vmft_tests::client::{Client, Config, Gaps, Report};
use vmft_tests::events::{FIGURES, PROTECTED, TAKEOVER, TRANSFER_FINAL, UNPROTECTED};
use vmft_tests::harness::{TEST_HOSTS, first_missing};
use vmft_tests::pair::{Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, count_from_environment, field};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

type Section = fn(&mut Site) -> Outcome;

/// Name, number of hosts, what it does.
const SECTIONS: &[(&str, u8, Section)] = &[
    ("boot", 2, boot),
    ("requests", 2, requests),
    ("log", 2, log),
    ("compute", 2, compute),
    ("loops", 2, loops),
    ("transfer", 2, transfer),
    ("kill", 2, killed_monitors),
    ("loss", 2, lost_hosts),
    ("protected", 3, protected_again),
];

/// The last section: a campaign, with hosts of its own.
const FAULTS: &str = "faults";
/// The one of `docs/reliability.md`.
const FAULTS_SEED: u64 = 51;

/// How long requests are made, and how long an idle guest's log is counted.
const REQUESTS_TIME: Duration = Duration::from_secs(20);
const IDLE_TIME: Duration = Duration::from_secs(60);
/// What a guest that has just booted still does goes unmeasured.
const SETTLE_TIME: Duration = Duration::from_secs(5);
/// More than the interval between two lines of figures.
const FIGURES_INTERVAL: Duration = Duration::from_millis(1_500);

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if let Some(why) = first_missing(TEST_HOSTS) {
        println!("SKIPPED system benchmark: {why}");
        return ExitCode::SUCCESS;
    }
    let names: Vec<&str> = SECTIONS.iter().map(|(name, ..)| *name).chain([FAULTS]).collect();
    if let Some(name) = wanted.iter().find(|name| !names.contains(&name.as_str())) {
        eprintln!("There is no section '{name}'; there are {}.", names.join(", "));
        return ExitCode::from(2);
    }
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|wanted| wanted == name);
    let run = || -> Outcome {
        let mut booted: Option<(u8, Site)> = None;
        println!("| What | Figure |\n| --- | --- |");
        for (name, hosts, section) in SECTIONS {
            if is_wanted(name) {
                // The old hosts are gone before new ones are booted.
                let mut site = match booted.take().filter(|(count, _)| count == hosts) {
                    Some((_, site)) => site,
                    None => Site::boot(*hosts)?,
                };
                if let Err(error) = section(&mut site) {
                    eprintln!("{}", site.logs());
                    return Err(format!("section {name}: {error}").into());
                }
                site.end_processes()?;
                booted = Some((*hosts, site));
            }
        }
        drop(booted);
        if is_wanted(FAULTS) { faults() } else { Ok(()) }
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Blackouts and times until protected again, by kind of fault.
fn faults() -> Outcome {
    let report = campaign::run(FAULTS_SEED, count_from_environment("VMFT_BENCH_FAULTS", 450) as usize)?;
    if report.failures().is_empty() { Ok(()) } else { Err("section faults: the campaign failed".into()) }
}

fn row(what: &str, figure: &str) {
    println!("| {what} | {figure} |");
}

fn rounds() -> u32 {
    count_from_environment("VMFT_BENCH_ROUNDS", 3)
}

/// A guest as users have it: the monitors' own time-out.
fn guest(work: &'static str) -> Guest {
    Guest { memory_mib: 256, work, timeout_ms: 500, ..Guest::default() }
}

/// Median, smallest and largest.
fn spread(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn spread_text(values: &mut [f64], unit: &str) -> String {
    let count = values.len();
    let (median, min, max) = spread(values);
    format!("{median:.0} {unit} (median of {count}; {min:.0} to {max:.0})")
}

/// Starts a guest without fault tolerance.
fn start_alone(site: &mut Site, guest: &Guest) -> Outcome<Monitor> {
    let volume = site.volume()?;
    let mut arguments = vec!["run".to_owned()];
    arguments.extend(site.guest_options(guest, &volume));
    Ok(site.start(1, &arguments)?)
}

/// Starts both monitors at once, so that the guest boots with a backup.
fn start_together(site: &mut Site, guest: &Guest) -> Outcome<(Monitor, Monitor)> {
    let volume = site.volume()?;
    let primary = site.start_primary(1, guest, &volume)?;
    let backup = site.start_backup(2, 1, guest, &volume)?;
    Ok((primary, backup))
}

fn boot(site: &mut Site) -> Outcome {
    let (mut alone_ms, mut pair_ms) = (Vec::new(), Vec::new());
    for _ in 0..rounds() {
        let started = Instant::now();
        let monitor = start_alone(site, &guest("none"))?;
        monitor.wait_for_line(SERVICE_READY, LONG)?;
        alone_ms.push(started.elapsed().as_secs_f64() * 1e3);
        site.end_processes()?;

        let started = Instant::now();
        let (primary, _) = start_together(site, &guest("none"))?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        pair_ms.push(started.elapsed().as_secs_f64() * 1e3);
        if !primary.output().iter().any(|line| line.contains(PROTECTED)) {
            return Err("the guest booted without its backup".into());
        }
        site.end_processes()?;
    }
    row("boot to service-ready, alone", &spread_text(&mut alone_ms, "ms"));
    row("boot to service-ready, pair", &spread_text(&mut pair_ms, "ms"));
    row("boot, pair / alone", &format!("{:.2}", spread(&mut pair_ms).0 / spread(&mut alone_ms).0));
    Ok(())
}

/// Sends requests for a while.
fn load(site: &Site, window: usize) -> Outcome<Report> {
    let client = site.client(Config { window, value_len: 100, ..Config::default() })?;
    std::thread::sleep(REQUESTS_TIME);
    let report = client.stop(SHORT);
    site.check(&report)?;
    Ok(report)
}

fn requests_row(who: &str, window: usize, report: &Report) {
    row(
        &format!("requests, {window} outstanding, {who}"),
        &format!("{:.0} /s, p50 {:.1} ms, p99 {:.1} ms", report.replies_per_s, report.p50_ms, report.p99_ms),
    );
}

fn requests(site: &mut Site) -> Outcome {
    let windows = [1, 8];
    let monitor = start_alone(site, &guest("none"))?;
    monitor.wait_for_line(SERVICE_READY, LONG)?;
    let mut alone = Vec::new();
    for window in windows {
        alone.push(load(site, window)?);
        requests_row("alone", window, &alone[alone.len() - 1]);
    }
    site.end_processes()?;

    let volume = site.volume()?;
    let (primary, backup) = site.start_pair(&guest("none"), &volume)?;
    for (window, alone) in windows.into_iter().zip(&alone) {
        let from = Instant::now();
        let pair = load(site, window)?;
        requests_row("pair", window, &pair);
        row(
            &format!("requests, {window} outstanding, pair / alone"),
            &format!(
                "rate {:.2}, p50 {:.2}, p99 {:.2}",
                pair.replies_per_s / alone.replies_per_s,
                pair.p50_ms / alone.p50_ms,
                pair.p99_ms / alone.p99_ms
            ),
        );
        let bytes = log_bytes(&primary, from, from + REQUESTS_TIME)?;
        row(
            &format!("log under requests, {window} outstanding"),
            &format!(
                "{:.0} bytes/s, {:.0} bytes/request",
                bytes / REQUESTS_TIME.as_secs_f64(),
                bytes / pair.samples.len() as f64
            ),
        );
    }
    pair_rows("under requests", &primary)?;
    snapshot_row(&primary, &backup)?;
    memory_row("primary", site, &primary)?;
    memory_row("backup", site, &backup)
}

/// What the primary itself says of the pair.
fn pair_rows(when: &str, primary: &Monitor) -> Outcome {
    let output = primary.output();
    let line = output.iter().rev().find(|line| line.contains(FIGURES)).ok_or("no figures")?;
    let number = |name| field(line, name).ok_or(format!("no {name} in: {line}"));
    let ms = |name| number(name).map(|us| us as f64 / 1e3);
    for (what, words, first, second) in [
        ("backup's lag", ["p50", "p99"], "lag_p50_us", "lag_p99_us"),
        ("output held back", ["mean", "longest"], "delay_mean_us", "delay_max_us"),
        ("pause of a checkpoint", ["p50", "p99"], "pause_p50_us", "pause_p99_us"),
    ] {
        let figures = format!("{} {:.1} ms, {} {:.1} ms", words[0], ms(first)?, words[1], ms(second)?);
        row(&format!("{what} {when}"), &figures);
    }
    row(&format!("guest held up by pacing {when}"), &format!("{} ms in all", number("paced_ms")?));
    row(&format!("longest unanswered time {when}"), &format!("{} ms", number("silence_max_ms")?));
    Ok(())
}

fn snapshot_row(primary: &Monitor, backup: &Monitor) -> Outcome {
    let sent = primary.wait_for_line(TRANSFER_FINAL, SHORT)?;
    let following = backup.wait_for_line("following view=", SHORT)?;
    let ms = |line: &str, name| field(line, name).ok_or(format!("no {name} in: {line}"));
    row(
        "snapshot of a booted guest of 256 MiB",
        &format!(
            "guest stands still for {} ms, then {} ms; loaded after {} ms",
            ms(&sent, "first_pause_ms")?,
            ms(&sent, "pause_ms")?,
            ms(&following, "took_ms")?
        ),
    );
    Ok(())
}

/// Gives a guest that writes its memory at some rate to a backup, again and again.
fn transfer(site: &mut Site) -> Outcome {
    for (what, work) in [("idle", "none"), ("writing 10 MiB/s", "rate10"), ("writing 100 MiB/s", "rate100")] {
        let (guest, volume) = (guest(work), site.volume()?);
        let primary = site.start_primary(1, &guest, &volume)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        std::thread::sleep(SETTLE_TIME);
        let (mut pause_ms, mut took_ms, mut held_ms) = (Vec::new(), Vec::new(), Vec::new());
        for round in 1..=u64::from(rounds()) {
            let view = 2 * round;
            let backup = site.start_backup(2, 1, &guest, &volume)?;
            let loaded = primary.wait_for_line(&format!("{PROTECTED} view={view}"), LONG)?;
            let sent = primary
                .output()
                .into_iter()
                .rfind(|line| line.contains(TRANSFER_FINAL))
                .ok_or("nothing was sent")?;
            let figure = |name| field(&sent, name).ok_or(format!("no {name} in: {sent}"));
            pause_ms.push(figure("first_pause_ms")?.max(figure("pause_ms")?) as f64);
            took_ms.push(figure("took_ms")? as f64);
            held_ms.push(field(&loaded, "loaded_after_ms").ok_or("no loaded_after_ms")? as f64);
            backup.kill(Signal::SIGKILL)?;
            primary.wait_for_line(&format!("{UNPROTECTED} view={}", view + 1), SHORT)?;
        }
        let [pause, took, held] = [pause_ms, took_ms, held_ms].map(|mut ms| spread_text(&mut ms, "ms"));
        let figures = format!("longest stop {pause}; sent in {took}; output waits for {held}");
        row(&format!("transfer, 256 MiB, {what}"), &figures);
        site.end_processes()?;
    }
    Ok(())
}

/// Resident memory of a monitor, without the guest's own.
fn memory_row(who: &str, site: &Site, monitor: &Monitor) -> Outcome {
    let file = format!("/proc/{}/smaps", monitor.pid());
    let smaps = site.host(monitor.host).run(&["cat", &file], SHORT)?;
    let guest_kib = 256 << 10;
    let (mut size, mut total) = (0, 0);
    for line in &smaps.stdout {
        let kib = || line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        if line.starts_with("Size:") {
            size = kib();
        } else if line.starts_with("Rss:") && size < guest_kib {
            total += kib();
        }
    }
    row(&format!("memory of the {who} beyond the guest's"), &format!("{:.1} MiB", total as f64 / 1024.0));
    Ok(())
}

/// Bytes of log sent between two moments.
fn log_bytes(primary: &Monitor, from: Instant, to: Instant) -> Outcome<f64> {
    counted(primary, "log_bytes", from, to)
}

/// By how much a count rose between two moments, interpolated between the primary's lines of figures.
fn counted(primary: &Monitor, count: &str, from: Instant, to: Instant) -> Outcome<f64> {
    // So that there is a line behind `to`.
    std::thread::sleep((to + FIGURES_INTERVAL).saturating_duration_since(Instant::now()));
    let points: Vec<(Instant, f64)> = primary
        .timed_output()
        .into_iter()
        .filter(|(_, line)| line.contains(FIGURES))
        .filter_map(|(at, line)| Some((at, field(&line, count)? as f64)))
        .collect();
    let at = |moment: Instant| -> Outcome<f64> {
        let next = points.iter().position(|(at, _)| *at >= moment).ok_or("no figures behind the moment")?;
        let Some((before, after)) = next.checked_sub(1).map(|before| (points[before], points[next])) else {
            return Ok(points[next].1);
        };
        let part = (moment - before.0).as_secs_f64() / (after.0 - before.0).as_secs_f64();
        Ok(before.1 + part * (after.1 - before.1))
    };
    Ok(at(to)? - at(from)?)
}

/// When the guest printed a line with `text`.
fn printed_at(monitor: &Monitor, text: &str) -> Outcome<Instant> {
    monitor.wait_for_line(text, 2 * LONG)?;
    let found = monitor.timed_output().into_iter().find(|(_, line)| line.contains(text));
    Ok(found.ok_or("the line is gone")?.0)
}

/// Lets the guest do the same work alone and in a pair; `steps` are names and the ends of what it prints.
fn work(site: &mut Site, work: &'static str, steps: &[(&str, &str)]) -> Outcome<Monitor> {
    let monitor = start_alone(site, &guest(work))?;
    let mut at = printed_at(&monitor, SERVICE_READY)?;
    let mut alone_s = Vec::new();
    for (_, done) in steps {
        let end = printed_at(&monitor, done)?;
        alone_s.push((end - at).as_secs_f64());
        at = end;
    }
    site.end_processes()?;

    let (primary, _backup) = start_together(site, &guest(work))?;
    let mut at = printed_at(&primary, SERVICE_READY)?;
    for ((what, done), alone_s) in steps.iter().zip(alone_s) {
        let end = printed_at(&primary, done)?;
        let (bytes, pair_s) = (log_bytes(&primary, at, end)?, (end - at).as_secs_f64());
        row(
            &format!("{what}: log"),
            &format!("{bytes:.0} bytes in {pair_s:.1} s, {:.0} bytes/s", bytes / pair_s),
        );
        let stops = counted(&primary, "checkpoints", at, end)?;
        let pages = counted(&primary, "checkpoint_pages", at, end)?;
        row(
            &format!("{what}: checkpoints"),
            &format!("{:.1} /s, {:.0} pages each", stops / pair_s, pages / stops.max(1.0)),
        );
        row(
            &format!("{what}: time, pair / alone"),
            &format!("{:.2} (alone {alone_s:.1} s)", pair_s / alone_s),
        );
        at = end;
    }
    pair_rows("from boot to there", &primary)?;
    Ok(primary)
}

fn compute(site: &mut Site) -> Outcome {
    const STEPS: [(&str, &str); 6] = [
        // Its first checkpoint holds what the boot has written; the second loop is without that.
        ("tight loop behind the boot", "loop done"),
        ("tight loop", "loop-again done"),
        ("writing 1 MiB over and over", "dirty1 done"),
        ("writing 10 MiB over and over", "dirty10 done"),
        ("writing 100 MiB over and over", "dirty100 done"),
        ("300 fork/execs", "fork300 done"),
    ];
    work(site, "loop,loop-again,dirty1,dirty10,dirty100,fork300", &STEPS).map(drop)
}

/// Requests beside nothing and beside two busy loops, alone and as a pair.
fn loops(site: &mut Site) -> Outcome {
    for (beside, work) in [("an idle guest", "none"), ("two busy loops", "loops")] {
        let monitor = start_alone(site, &guest(work))?;
        monitor.wait_for_line(SERVICE_READY, LONG)?;
        let alone = load(site, 1)?;
        requests_row(&format!("alone, beside {beside}"), 1, &alone);
        site.end_processes()?;
        let volume = site.volume()?;
        let (primary, _backup) = site.start_pair(&guest(work), &volume)?;
        let from = Instant::now();
        let pair = load(site, 1)?;
        requests_row(&format!("pair, beside {beside}"), 1, &pair);
        let seconds = REQUESTS_TIME.as_secs_f64();
        let bytes = log_bytes(&primary, from, from + REQUESTS_TIME)?;
        let stops = counted(&primary, "checkpoints", from, from + REQUESTS_TIME)?;
        row(&format!("log, requests beside {beside}"), &format!("{:.0} bytes/s", bytes / seconds));
        row(&format!("checkpoints, requests beside {beside}"), &format!("{:.1} /s", stops / seconds));
        pair_rows(&format!("beside {beside}"), &primary)?;
        site.end_processes()?;
    }
    Ok(())
}

fn log(site: &mut Site) -> Outcome {
    const STEPS: [(&str, &str); 2] =
        [("hashing 64 MiB", "vmft-work: hash64"), ("300 fork/execs", "fork300 done")];
    let primary = work(site, "hash64,fork300", &STEPS)?;
    std::thread::sleep(SETTLE_TIME);
    let from = Instant::now();
    let bytes = log_bytes(&primary, from, from + IDLE_TIME)?;
    row("log of an idle guest", &format!("{:.0} bytes/s", bytes / IDLE_TIME.as_secs_f64()));
    Ok(())
}

/// A pair under one client, whose primary is taken away again and again.
struct Takeovers {
    client: Client,
    started: Instant,
    /// When the primary failed, and when the client was served again.
    failures: Vec<(Duration, Duration)>,
    noticed_ms: Vec<f64>,
}

impl Takeovers {
    fn start(site: &Site) -> Outcome<Takeovers> {
        let client = site.client(Config { window: 1, value_len: 100, ..Config::default() })?;
        Ok(Takeovers { client, started: Instant::now(), failures: Vec::new(), noticed_ms: Vec::new() })
    }

    fn more_replies(&self, count: usize) -> Outcome {
        let all = self.client.wait_for_replies(self.client.answered() + count, LONG);
        if all { Ok(()) } else { Err("the client gets no more replies".into()) }
    }

    /// Makes the primary fail by `fail`, and waits until the client is served again.
    fn take_over(&mut self, backup: &Monitor, fail: impl FnOnce() -> Outcome) -> Outcome {
        self.more_replies(50)?;
        let failed_at = self.started.elapsed();
        fail()?;
        let line = backup.wait_for_line(TAKEOVER, SHORT)?;
        self.noticed_ms.push(field(&line, "took_ms").ok_or("no took_ms")? as f64);
        self.more_replies(20)?;
        // Later, the next backup joins: the guest stands still for its snapshot, which is another figure.
        self.failures.push((failed_at, self.started.elapsed()));
        Ok(())
    }

    fn rows(mut self, site: &Site, what: &str) -> Outcome {
        let report = self.client.stop(SHORT);
        site.check(&report)?;
        let gap = |(failed_at, served_at): &(Duration, Duration)| {
            let samples = report.samples.iter().filter(|sample| sample.sent < *served_at).cloned();
            Gaps::of(&samples.collect::<Vec<_>>(), *failed_at).after_ms
        };
        let mut blackouts: Vec<f64> = self.failures.iter().map(gap).collect();
        row(&format!("blackout after {what}"), &spread_text(&mut blackouts, "ms"));
        row(&format!("from noticing to running, after {what}"), &spread_text(&mut self.noticed_ms, "ms"));
        row(&format!("requests lost / repeated / out of order, {what}"), "0 / 0 / 0");
        Ok(())
    }
}

/// The view of the pair behind takeover `round`, from 1: the first pair has view 2, and a takeover is a view of its own.
fn pair_view(round: u32) -> u32 {
    2 * round + 2
}

fn killed_monitors(site: &mut Site) -> Outcome {
    let volume = site.volume()?;
    let (mut primary, mut backup) = site.start_pair(&guest("none"), &volume)?;
    let mut takeovers = Takeovers::start(site)?;
    for round in 1..=count_from_environment("VMFT_BENCH_KILLS", 10) {
        let view = pair_view(round);
        takeovers.take_over(&backup, || Ok(primary.kill(Signal::SIGKILL)?))?;
        let next = site.start_backup(primary.host, backup.host, &guest("none"), &volume)?;
        backup.wait_for_line(&format!("{PROTECTED} view={view}"), LONG)?;
        (primary, backup) = (backup, next);
    }
    takeovers.rows(site, "SIGKILL of the monitor")
}

fn lost_hosts(site: &mut Site) -> Outcome {
    let volume = site.volume()?;
    let (mut primary, mut backup) = site.start_pair(&guest("none"), &volume)?;
    let mut takeovers = Takeovers::start(site)?;
    for round in 1..=rounds() {
        let view = pair_view(round);
        takeovers.take_over(&backup, || {
            site.host(primary.host).kill();
            Ok(())
        })?;
        site.reboot(primary.host)?;
        let next = site.start_backup(primary.host, backup.host, &guest("none"), &volume)?;
        backup.wait_for_line(&format!("{PROTECTED} view={view}"), LONG)?;
        (primary, backup) = (backup, next);
    }
    takeovers.rows(site, "the loss of a host (time-out 500 ms)")
}

/// Kills the primary again and again, each time with a standby that waits.
fn protected_again(site: &mut Site) -> Outcome {
    let (guest, volume) = (guest("none"), site.volume()?);
    let hosts = site.hosts_option();
    let mut primary = site.start_primary_with(1, &guest, &volume, &hosts)?;
    primary.wait_for_line(SERVICE_READY, LONG)?;
    let mut others = vec![site.start_standby(2, &guest, &volume)?, site.start_standby(3, &guest, &volume)?];
    let (mut backup, _) = primary.wait_until_protected(2)?;
    let client = site.client(Config { window: 1, value_len: 100, ..Config::default() })?;
    let (mut takeover_ms, mut fault_ms) = (Vec::new(), Vec::new());
    for round in 1..=rounds() {
        let view = pair_view(round);
        if !client.wait_for_replies(client.answered() + 50, LONG) {
            return Err("the client gets no more replies".into());
        }
        let index = others.iter().position(|other| other.host == backup).ok_or("an unknown backup")?;
        let (killed, next) = (primary, others.swap_remove(index));
        let failed_at = Instant::now();
        killed.kill(Signal::SIGKILL)?;
        let taken_over_at = printed_at(&next, &format!("{TAKEOVER} view={}", view - 1))?;
        let (host, protected_at) = next.wait_until_protected(view.into())?;
        takeover_ms.push((protected_at - taken_over_at).as_secs_f64() * 1e3);
        fault_ms.push((protected_at - failed_at).as_secs_f64() * 1e3);
        killed.wait_ending(SHORT)?;
        others.push(site.start_standby(killed.host, &guest, &volume)?);
        (primary, backup) = (next, host);
    }
    site.check(&client.stop(SHORT))?;
    row("protected again, from the takeover on", &spread_text(&mut takeover_ms, "ms"));
    row("protected again, from SIGKILL of the primary's monitor on", &spread_text(&mut fault_ms, "ms"));
    Ok(())
}
