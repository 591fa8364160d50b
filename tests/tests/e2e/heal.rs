//! A backup whose guest is corrupted, or that cannot keep up: it never goes live, and the pair heals or goes on without it.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmft_tests::client::{Client, Config};
use vmft_tests::events::{
    BACKUP_LOST, DESYNCHRONISED, DIVERGED, FIGURES, PROTECTED, REPORT_WRITTEN, TAKEOVER, UNPROTECTED,
};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, Images, archive_with_init};
use vmft_tests::pair::{Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, Volume, field, more_replies};

use crate::SITES;

/// How often something that changes by itself is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// How far a backup may be behind in these tests.
const LAG_LIMIT_MS: u64 = 4_000;
/// A word that the guest's service stores, and that its memory loses on a backup.
const MARKER: &str = "a-word-that-only-memory-holds";
/// It is stored so often, under so many keys. So it fills pages that nothing else is written to, and a checkpoint, which has
/// all pages that were, does not bring it back.
const REPEATED: usize = 270;
const KEYS: u64 = 4;

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("corrupted_backups_heal_and_take_over", corrupted_backups_heal_and_take_over),
    Case::on_hosts(
        "backup_that_keeps_diverging_never_goes_live",
        backup_that_keeps_diverging_never_goes_live,
    ),
    Case::on_hosts("slow_backup_is_borne_up_to_the_limit", slow_backup_is_borne_up_to_the_limit),
    Case::on_hosts("modules_that_read_the_counter_are_named", modules_that_read_the_counter_are_named),
];

/// A load of synced writes and reads.
fn load() -> Config {
    Config { window: 4, ..Config::default() }
}

/// Puts a directory for reports beside the guest's disk, and gives the options for it.
fn report_options(volume: &Volume) -> Result<[String; 2], Box<dyn Error>> {
    fs::create_dir(volume.local.join("reports"))?;
    Ok(["--report-dir".into(), format!("{}/reports", volume.path)])
}

/// The reports of one host, of one kind, oldest first.
fn reports(volume: &Volume, host: u8, kind: &str) -> Result<Vec<String>, Box<dyn Error>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(volume.local.join("reports"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("guest.host{host}.")) && name.ends_with(kind) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// One request of the guest's service on a connection of its own.
fn ask(site: &Site, request: &str) -> Result<String, Box<dyn Error>> {
    let mut stream = site.connect()?;
    stream.set_read_timeout(Some(SHORT))?;
    stream.write_all(format!("{request}\n").as_bytes())?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    Ok(reply.trim_end().to_owned())
}

/// Fails unless the service has what was stored.
fn assert_stored(site: &Site) -> TestResult {
    let value = MARKER.repeat(REPEATED);
    for key in 1..=KEYS {
        assert_eq!(ask(site, &format!("GET {key} marker{key}"))?, format!("VAL {key} {value}"));
    }
    Ok(())
}

fn corrupted_backups_heal_and_take_over() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let options = report_options(&volume)?;
        let primary = site.start_primary_with(1, &guest, &volume, &options)?;
        let options = options.each_ref().map(String::as_str);
        primary.wait_for_line(SERVICE_READY, LONG)?;
        for key in 1..=KEYS {
            let stored = ask(site, &format!("PUT {key} marker{key} {}", MARKER.repeat(REPEATED)))?;
            assert!(stored.starts_with(&format!("OK {key} ")), "{stored}");
        }
        let client = site.client(load())?;

        let register = ["--inject-corruption", "500:register"];
        let backup = site.start_backup_with(2, 1, &guest, &volume, &[&register[..], &options].concat())?;
        heals(&client, &primary, &backup, || Ok(()))?;
        assert_eq!(reports(&volume, 1, ".txt")?.len(), 1, "the primary writes down what it knows");
        primary.kill(Signal::SIGKILL)?;
        println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
        more_replies(&client, 20)?;
        replays_equal(site, &volume, (2, 1))?;

        let memory = ["--inject-corruption", &format!("1:memory={MARKER}")];
        let next = site.start_backup_with(1, 2, &guest, &volume, &[&memory[..], &options].concat())?;
        heals(&client, &backup, &next, || {
            // What only memory holds shows when the guest lets it out.
            println!("{}", next.wait_for_line("an injected fault corrupts this guest", LONG)?);
            assert_stored(site)
        })?;
        backup.kill(Signal::SIGKILL)?;
        println!("{}", next.wait_for_line(TAKEOVER, SHORT)?);
        assert_stored(site)?;
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// `backup` finds that its guest differs, once `provoke` has brought it to light, and follows again.
fn heals(
    client: &Client,
    primary: &Monitor,
    backup: &Monitor,
    provoke: impl FnOnce() -> TestResult,
) -> TestResult {
    let protected = primary.count(PROTECTED);
    primary.wait_for_lines(PROTECTED, protected + 1, LONG)?;
    provoke()?;
    println!("{}", backup.wait_for_line(DIVERGED, LONG)?);
    backup.wait_for_line(DESYNCHRONISED, SHORT)?;
    println!("{}", primary.wait_for_event(BACKUP_LOST, "Diverged", SHORT)?);
    println!("{}", backup.wait_for_line(REPORT_WRITTEN, SHORT)?);
    println!("{}", primary.wait_for_line(REPORT_WRITTEN, SHORT)?);
    let before = client.answered();
    primary.wait_for_lines(PROTECTED, protected + 2, LONG)?;
    println!("{} replies from the report until protected again", client.answered() - before);
    assert!(client.answered() > before, "no request was answered meanwhile");
    more_replies(client, 20)
}

/// The log that a corrupted backup was sent is sound, so its replay on host `on` is equal.
fn replays_equal(site: &mut Site, volume: &Volume, (of, on): (u8, u8)) -> TestResult {
    let recordings = reports(volume, of, ".rec")?;
    let [recording] = &recordings[..] else { return Err(format!("{recordings:?}").into()) };
    let replayer = site.start(on, &["replay".to_owned(), format!("{}/reports/{recording}", volume.path)])?;
    println!("{}", replayer.wait_for_line("so the log is sound, and the backup's host erred", LONG)?);
    assert_eq!(replayer.wait(SHORT)?.ending, Ending::Exited(0));
    let text = fs::read_to_string(volume.local.join("reports").join(recording.replace(".rec", ".txt")))?;
    assert!(
        text.contains("expected:") && text.contains("last entries") && text.contains(recording),
        "{text}"
    );
    Ok(())
}

fn backup_that_keeps_diverging_never_goes_live() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let primary = site.start_primary(1, &guest, &volume)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let client = site.client(load())?;
        let again = ["--inject-corruption", "200:register", "--inject-again"];
        let backup = site.start_backup_with(2, 1, &guest, &volume, &again)?;
        let output = backup.wait(LONG)?;
        assert_eq!(output.ending, Ending::Exited(4), "{:?}", output.stderr);
        println!("{}", output.stderr.last().map_or("", String::as_str));
        assert!(output.stderr.iter().any(|line| line.contains("3 times within 10 minutes")));
        assert_eq!(output.stderr.iter().filter(|line| line.contains(DESYNCHRONISED)).count(), 3);
        primary.wait_for_line(&format!("{UNPROTECTED} view=7"), SHORT)?;
        more_replies(&client, 10)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;

        let backup = site.start_backup_with(2, 1, &guest, &volume, &again[..2])?;
        backup.wait_for_line(DESYNCHRONISED, LONG)?;
        primary.kill(Signal::SIGKILL)?;
        let output = backup.wait(LONG)?;
        assert_eq!(output.ending, Ending::Exited(4), "{:?}", output.stderr);
        let said = output.stderr.last().ok_or("the backup says nothing")?;
        println!("{said}");
        assert!(said.contains("so it does not take over"), "{said}");
        assert!(!output.stderr.iter().any(|line| line.contains(TAKEOVER)), "{:?}", output.stderr);
        Ok(())
    })
}

fn slow_backup_is_borne_up_to_the_limit() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let limit = ["--lag-limit-ms".to_owned(), LAG_LIMIT_MS.to_string()];
        let primary = site.start_primary_with(1, &guest, &volume, &limit)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let client = site.client(load())?;

        let stalled = format!("{}:1000:1", LAG_LIMIT_MS / 3);
        let backup = site.start_backup_with(2, 1, &guest, &volume, &["--inject-slowness", &stalled])?;
        primary.wait_for_line(PROTECTED, LONG)?;
        wait_for_figures(&primary, "lag_p99_us", LAG_LIMIT_MS * 1_000 / 4)?;
        more_replies(&client, 20)?;
        assert!(!said(&primary, BACKUP_LOST), "a backup that catches up in time is not given up");
        backup.kill(Signal::SIGTERM)?;
        assert_eq!(backup.wait(SHORT)?.ending, Ending::Exited(0));
        primary.wait_for_line(UNPROTECTED, SHORT)?;

        let slow = site.start_backup_with(2, 1, &guest, &volume, &["--inject-slowness", "20:200:1000000"])?;
        primary.wait_for_lines(PROTECTED, 2, LONG)?;
        let (before, started) = (client.answered(), Instant::now());
        let lost = primary.wait_for_event(BACKUP_LOST, "it answers, but its guest is", LONG)?;
        let (slowly, took) = (client.answered() - before, started.elapsed());
        println!("{lost}");
        println!("{slowly} replies in {:.1} s with a backup at a crawl", took.as_secs_f64());
        assert!(slowly > 0, "no request was answered while the backup was behind");
        let behind = lost.split(" guest is ").nth(1).and_then(|rest| rest.split(' ').next());
        let behind_ms: u64 = behind.ok_or("no lag")?.parse()?;
        assert!((LAG_LIMIT_MS..LAG_LIMIT_MS + 1_500).contains(&behind_ms), "{lost}");
        wait_for_figures(&primary, "paced_ms", 1)?;
        primary.wait_for_lines(UNPROTECTED, 2, LONG)?;
        let (before, started) = (client.answered(), Instant::now());
        more_replies(&client, 60)?;
        let alone = (client.answered() - before) as f64 / started.elapsed().as_secs_f64();
        println!("{alone:.0} replies/s without it");
        assert!(slowly as f64 / took.as_secs_f64() < alone, "the guest was not slowed");
        assert_eq!(slow.wait(SHORT)?.ending, Ending::Exited(3), "its execution stops, wherever it is");
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn said(monitor: &Monitor, text: &str) -> bool {
    monitor.output().iter().any(|line| line.contains(text))
}

/// Waits until the figures of the pair show at least `least` for `name`.
fn wait_for_figures(monitor: &Monitor, name: &str, least: u64) -> TestResult {
    let deadline = Instant::now() + LONG;
    loop {
        let output = monitor.output();
        let mut figures = output.iter().filter(|line| line.contains(FIGURES));
        if figures.any(|line| field(line, name).is_some_and(|value| value >= least)) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{name} does not get to {least}").into());
        }
        thread::sleep(LOOK);
    }
}

/// Loads a module with RDTSCs that the monitor's rewriting of the kernel does not reach; nothing runs them.
const INIT_WITH_KVM: &[u8] = b"#!/bin/busybox sh
for module in irqbypass kvm; do busybox insmod /modules/$module.ko || exit; done
echo vmft-modules: loaded
while :; do busybox sleep 1; done
";

fn modules_that_read_the_counter_are_named() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        // Later archives replace what earlier ones hold. Each starts at a multiple of four.
        let mut initrd = fs::read(Images::ensure()?.host_initrd())?;
        initrd.resize(initrd.len().next_multiple_of(4), 0);
        initrd.extend(archive_with_init(INIT_WITH_KVM));
        fs::write(volume.local.join("initrd"), initrd)?;
        let guest = Guest { initrd: Some(format!("{}/initrd", volume.path)), ..Guest::default() };
        let primary = site.start_primary(1, &guest, &volume)?;
        primary.wait_for_line("vmft-modules: loaded", LONG)?;
        println!(
            "{}",
            primary.wait_for_line("RDTSC or RDTSCP in kernel code that the guest has loaded", LONG)?
        );
        let backup =
            site.start_backup_with(2, 1, &guest, &volume, &["--inject-corruption", "10:register"])?;
        println!("{}", backup.wait_for_line("  likely cause: ", LONG)?);
        println!("{}", primary.wait_for_line("; likely cause: ", SHORT)?);
        Ok(())
    })
}
