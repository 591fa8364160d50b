//! A pair of monitors survives what befalls either of them, and never runs the guest twice.
//!
//! `VMFT_KILLS` is the number of moments at which the primary is killed (default 4: one of each kind), `VMFT_SEED`
//! repeats the moments of an earlier run.

use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmft_tests::client::Client;
use vmft_tests::events::{GUEST_ENDED, PROTECTED, RECEIVING, SENDING, TAKEOVER, UNPROTECTED};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Capture, Ending, HostError, Link};
use vmft_tests::pair::{
    GUEST_MAC, Guest, LONG, Monitor, Random, SERVICE_READY, SHORT, Site, Volume, count_from_environment,
    exactly_one, field, file_hash, load, more_replies,
};

use crate::SITES;

/// How often something that changes by itself is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Options of a backup that is started with its primary, which takes long to start on an emulated host.
const PATIENT: &[&str] = &["--connect-timeout-ms", "60000"];

/// What a guest that works at `idt-address` says before the virtual address of that table.
const IDT_ADDRESS: &str = "vmft-work: idt_table at";

/// Where Linux maps its image, which the monitor loads without moving it (Documentation/arch/x86/x86_64/mm.rst).
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("killed_primary_is_survived_at_any_moment", killed_primary_is_survived_at_any_moment),
    Case::on_hosts("lost_host_is_survived", lost_host_is_survived),
    Case::on_hosts("cut_logging_link_leaves_exactly_one", cut_logging_link_leaves_exactly_one),
    Case::on_hosts("frozen_primary_that_returns_does_nothing", frozen_primary_that_returns_does_nothing),
    Case::on_hosts("killed_backup_is_replaced", killed_backup_is_replaced),
    Case::on_hosts("stopped_backup_claims_nothing", stopped_backup_claims_nothing),
    Case::on_hosts("stopped_primary_hands_over", stopped_primary_hands_over),
    Case::on_hosts("guest_that_powers_off_ends_both", guest_that_powers_off_ends_both),
    Case::on_hosts("guest_that_crashes_ends_both", guest_that_crashes_ends_both),
    Case::on_hosts(
        "guest_that_crashes_on_the_primary_only_goes_on",
        guest_that_crashes_on_the_primary_only_goes_on,
    ),
    Case::on_hosts("guest_stays_alone_without_a_backup", guest_stays_alone_without_a_backup),
];

/// A moment at which a primary is killed.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// While the snapshot is on its way, from this percentage on: there is no pair yet.
    Transfer { percent: u64 },
    /// So long after the pair was formed, early in the guest's boot.
    Boot { after: Duration },
    /// After so many replies to a client.
    Load { replies: usize },
    /// The same, with a write to the disk that has not been answered yet.
    DiskWrite { replies: usize },
}

impl Moment {
    fn draw(index: u32, random: &mut Random) -> Moment {
        match index % 4 {
            0 => Moment::Transfer { percent: 25 * random.between(0, 2) },
            1 => Moment::Boot { after: Duration::from_millis(random.between(0, 3_000)) },
            2 => Moment::Load { replies: random.between(1, 150) as usize },
            _ => Moment::DiskWrite { replies: random.between(1, 50) as usize },
        }
    }
}

fn killed_primary_is_survived_at_any_moment() -> TestResult {
    let mut random = Random::from_environment();
    let count = count_from_environment("VMFT_KILLS", 4);
    let moments: Vec<Moment> = (0..count).map(|index| Moment::draw(index, &mut random)).collect();
    let mut with_client = Vec::new();
    SITES.run(|site| {
        for moment in moments {
            match moment {
                Moment::Transfer { percent } => kill_during_transfer(site, percent)?,
                Moment::Boot { after } => kill_during_boot(site, after)?,
                Moment::Load { .. } | Moment::DiskWrite { .. } => with_client.push(moment),
            }
            site.end_processes()?;
        }
        kill_again_and_again(site, &with_client)
    })
}

fn kill_during_transfer(site: &mut Site, percent: u64) -> TestResult {
    let (guest, volume) = (Guest::default(), site.volume()?);
    let primary = site.start_primary(1, &guest, &volume)?;
    primary.wait_for_line(SERVICE_READY, LONG)?;
    let backup = site.start_backup(2, 1, &guest, &volume)?;
    match percent {
        0 => backup.wait_for_line(RECEIVING, SHORT)?,
        _ => primary.wait_for_line(&format!("{SENDING} percent={percent}"), SHORT)?,
    };
    primary.kill(Signal::SIGKILL)?;
    let output = backup.wait(SHORT)?;
    assert_eq!(output.ending, Ending::Exited(1), "{:?}", output.stderr);
    let said = output.stderr.last().ok_or("the backup says nothing")?;
    println!("killed from {percent} % of the transfer on: {said}");
    assert!(said.starts_with("vmft: ") && said.contains("before the pair was formed"), "{said}");
    assert_eq!(volume.claims()?, ["guest.view-1"], "a backup that never followed must claim nothing");
    Ok(())
}

fn kill_during_boot(site: &mut Site, after: Duration) -> TestResult {
    let (guest, volume) = (Guest::default(), site.volume()?);
    let primary = site.start_primary(1, &guest, &volume)?;
    let backup = site.start_backup_with(2, 1, &guest, &volume, PATIENT)?;
    primary.wait_for_line(PROTECTED, LONG)?;
    // Not a condition to wait for: the moment that was drawn.
    thread::sleep(after);
    primary.kill(Signal::SIGKILL)?;
    let line = backup.wait_for_line(TAKEOVER, SHORT)?;
    println!("killed {after:?} into the boot: {line}");
    let is_up = primary.output().iter().any(|line| line.contains(SERVICE_READY));
    if !is_up {
        backup.wait_for_line(SERVICE_READY, LONG)?;
    }
    let client = site.client(load())?;
    more_replies(&client, 30)?;
    site.check(&client.stop(SHORT))
}

/// Kills one primary after the other under one client, whose one connection survives them all.
fn kill_again_and_again(site: &mut Site, moments: &[Moment]) -> TestResult {
    let (guest, volume) = (Guest::default(), site.volume()?);
    let (mut primary, mut backup) = site.start_pair(&guest, &volume)?;
    let client = site.client(load())?;
    // A takeover is a view, and so is the pair after it.
    for (moment, view) in moments.iter().zip((3..).step_by(2)) {
        match *moment {
            Moment::DiskWrite { replies } => {
                more_replies(&client, replies)?;
                kill_with_write_outstanding(site, &client, &primary)?;
            }
            Moment::Load { replies } => {
                more_replies(&client, replies)?;
                primary.kill(Signal::SIGKILL)?;
            }
            Moment::Transfer { .. } | Moment::Boot { .. } => return Err("not a moment with a client".into()),
        }
        let line = backup.wait_for_line(&format!("{TAKEOVER} view={view}"), SHORT)?;
        println!("killed at {moment:?}: {line}");
        if let (Moment::DiskWrite { .. }, Some(again)) = (moment, field(&line, "disk_again")) {
            assert!(again > 0, "no disk write was outstanding: {line}");
        }
        more_replies(&client, 20)?;
        let next = site.start_backup(primary.host, backup.host, &guest, &volume)?;
        backup.wait_for_line(&format!("{PROTECTED} view={}", view + 1), LONG)?;
        (primary, backup) = (backup, next);
    }
    more_replies(&client, 20)?;
    let report = client.stop(SHORT);
    println!("{}", report.summary());
    site.check(&report)
}

/// Kills the primary while its storage hangs with a write that the client waits for.
fn kill_with_write_outstanding(site: &Site, client: &Client, primary: &Monitor) -> TestResult {
    let host = site.host(primary.host);
    host.hang_storage();
    let mut answered = client.answered();
    loop {
        // Replies to what was written before may still come; then none does.
        thread::sleep(Duration::from_millis(300));
        if client.answered() == answered {
            break;
        }
        answered = client.answered();
    }
    primary.kill(Signal::SIGKILL)?;
    // The thread that waits for the storage cannot die before that answers, but the others can.
    let dead = format!("until grep -q '^State:.Z' /proc/{}/status; do usleep 5000; done", primary.pid());
    host.run(&["sh", "-c", &dead], SHORT)?;
    host.resume_storage();
    Ok(())
}

fn lost_host_is_survived() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (_, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 50)?;
        site.host(1).kill();
        println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
        more_replies(&client, 50)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn cut_logging_link_leaves_exactly_one() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 50)?;
        site.host(1).cut(Link::Log)?;
        let (goes_on, _) = exactly_one(&primary, &backup)?;
        more_replies(&client, 50)?;
        assert_eq!(goes_on.ending(), None);
        assert_eq!(volume.claims()?, ["guest.view-1", "guest.view-2", "guest.view-3"]);
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn frozen_primary_that_returns_does_nothing() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let mut requests = site.connect()?;
        requests.set_read_timeout(Some(LONG))?;
        let mut replies = BufReader::new(requests.try_clone()?).lines();
        requests.write_all(b"PUT 1 key before\n")?;
        assert_eq!(replies.next().transpose()?, Some("OK 1 1".into()));
        // Frozen while nothing is written: a write that the host's kernel has taken lands when it returns, and nothing but
        // a fence can hold it back (docs/failure-model.md).
        wait_until_quiet(&volume)?;
        site.host(1).stop();
        // This goes to the frozen host: when it returns, its guest has something to answer and to write.
        requests.write_all(b"PUT 2 key after\n")?;
        println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
        assert_eq!(replies.next().transpose()?, Some("OK 2 2".into()));
        wait_until_quiet(&volume)?;

        let disk = volume.local.join("disk.img");
        let before = (file_hash(&disk)?, fs::metadata(&disk)?.modified()?);
        let from_old_host = Capture::start(site.net(), 1, Link::Guest)?;
        site.host(1).cont();
        let output = primary.wait(SHORT)?;
        assert_eq!(output.ending, Ending::Exited(3), "{:?}", output.stderr);
        assert_eq!(from_old_host.count_from(GUEST_MAC)?, 0, "the returned monitor let frames out");
        let after = (file_hash(&disk)?, fs::metadata(&disk)?.modified()?);
        assert_eq!(before, after, "the returned monitor wrote to the disk");
        println!("{}", output.stderr.last().map_or("", String::as_str));

        let client = site.client(load())?;
        more_replies(&client, 20)?;
        site.check(&client.stop(SHORT))
    })
}

/// Waits until the guest has not written to its disk for longer than the five seconds after which its file system
/// writes what it has kept back.
fn wait_until_quiet(volume: &Volume) -> TestResult {
    let disk = volume.local.join("disk.img");
    let deadline = Instant::now() + LONG;
    loop {
        if fs::metadata(&disk)?.modified()?.elapsed()? > Duration::from_secs(8) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err("the idle guest does not stop writing to its disk".into());
        }
        thread::sleep(LOOK);
    }
}

fn killed_backup_is_replaced() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 20)?;
        backup.kill(Signal::SIGKILL)?;
        println!("{}", primary.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?);
        more_replies(&client, 20)?;
        backup.wait_ending(SHORT)?;

        let backup = site.start_backup(2, 1, &guest, &volume)?;
        println!("{}", primary.wait_for_line(&format!("{PROTECTED} view=4"), LONG)?);
        more_replies(&client, 20)?;
        primary.kill(Signal::SIGKILL)?;
        println!("{}", backup.wait_for_line(&format!("{TAKEOVER} view=5"), SHORT)?);
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn stopped_backup_claims_nothing() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 20)?;
        assert_eq!(end(&backup)?, Ending::Exited(0));
        primary.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?;
        more_replies(&client, 20)?;
        assert_eq!(primary.ending(), None);
        // The pair, and the guest that goes on alone.
        for (view, is_pair) in [(1, false), (2, true), (3, false)] {
            let claim = fs::read_to_string(volume.local.join(format!("guest.view-{view}")))?;
            assert!(claim.contains("\nrole primary\n") && claim.contains("\nhost host1\n"), "{claim}");
            assert_eq!(
                (claim.contains(" host2\nend\n"), claim.contains("\nbackup none\n")),
                (is_pair, !is_pair)
            );
        }
        site.check(&client.stop(SHORT))
    })
}

fn stopped_primary_hands_over() -> TestResult {
    assert_taken_over(&Guest::default(), |_, primary| {
        assert_eq!(end(primary)?, Ending::Exited(0));
        Ok(())
    })
}

/// The guest, which a client uses, is taken over from a primary that `leaves`, and its life then ended.
fn assert_taken_over(guest: &Guest, leaves: impl Fn(&Site, &Monitor) -> TestResult) -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let (primary, backup) = site.start_pair(guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 20)?;
        leaves(site, &primary)?;
        println!("{}", backup.wait_for_line(TAKEOVER, SHORT)?);
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;
        assert_eq!(end(&backup)?, Ending::Exited(0));
        volume.assert_ended()
    })
}

/// Asks a monitor to stop and waits for that.
fn end(monitor: &Monitor) -> Result<Ending, HostError> {
    monitor.kill(Signal::SIGTERM)?;
    Ok(monitor.wait(SHORT)?.ending)
}

/// Runs a pair whose guest ends by itself, with `status` on both, each of which says `why`.
fn assert_both_end(
    site: &mut Site,
    work: &'static str,
    status: i32,
    how: &str,
) -> Result<Volume, Box<dyn Error>> {
    let (guest, volume) = (Guest { work, ..Guest::default() }, site.volume()?);
    let primary = site.start_primary(1, &guest, &volume)?;
    let backup = site.start_backup_with(2, 1, &guest, &volume, PATIENT)?;
    primary.wait_for_line(PROTECTED, LONG)?;
    for monitor in [&primary, &backup] {
        let output = monitor.wait(LONG)?;
        assert_eq!(output.ending, Ending::Exited(status), "host {}: {:?}", monitor.host, output.stderr);
        let ended = format!("{GUEST_ENDED} how=\"{how}\"");
        let said = output.stderr.iter().any(|line| line.contains(&ended));
        assert!(said, "host {}: {:?}", monitor.host, output.stderr);
    }
    assert_eq!(backup.count(TAKEOVER), 0);
    volume.assert_ended()?;
    Ok(volume)
}

fn guest_that_powers_off_ends_both() -> TestResult {
    SITES.run(|site| {
        let work = "poweroff-after-ready";
        let volume = assert_both_end(site, work, 0, "power-off")?;
        // So the guest may be started anew, and nobody that was frozen meanwhile can take it over.
        let again = site.start_primary(2, &Guest { work, ..Guest::default() }, &volume)?;
        assert_eq!(again.wait(LONG)?.ending, Ending::Exited(0));
        volume.assert_ended()
    })
}

fn guest_that_crashes_ends_both() -> TestResult {
    SITES.run(|site| assert_both_end(site, "halt-after-ready", 5, "halted").map(drop))
}

fn guest_that_crashes_on_the_primary_only_goes_on() -> TestResult {
    let guest = Guest { work: "idt-address", ..Guest::default() };
    assert_taken_over(&guest, |site, primary| {
        forget_interrupt_table(site, primary, &guest)?;
        assert_eq!(primary.wait(SHORT)?.ending, Ending::Exited(5));
        Ok(())
    })
}

/// The memory of the primary's host fails where the guest's interrupt descriptor table is, which crashes the guest at
/// its next interrupt. KVM does not see that write and the guest makes none there once it has booted, so no checkpoint
/// takes the failure to the backup.
fn forget_interrupt_table(site: &Site, monitor: &Monitor, guest: &Guest) -> TestResult {
    let said = monitor.wait_for_line(IDT_ADDRESS, LONG)?;
    let address = said.trim_end().rsplit(' ').next().unwrap_or_default();
    let table = u64::from_str_radix(address, 16)
        .ok()
        .and_then(|address| address.checked_sub(KERNEL_MAP))
        .ok_or_else(|| format!("no address: {said}"))?;
    let bytes = u64::from(guest.memory_mib) << 20;
    let pid = monitor.pid();
    let host = site.host(monitor.host);
    let maps = host.run(&["cat", &format!("/proc/{pid}/maps")], SHORT)?.stdout;
    let mapping = maps.iter().find_map(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let [start, end] = [start, end].map(|address| u64::from_str_radix(address, 16).ok());
        start.filter(|start| end == Some(start + bytes))
    });
    let start = mapping.ok_or_else(|| format!("no mapping of {bytes} bytes: {maps:?}"))?;
    let (memory, seek) = (format!("of=/proc/{pid}/mem"), format!("seek={}", (start + table) >> 12));
    let zeroes = ["dd", "if=/dev/zero", &memory, "bs=4096", &seek, "count=1", "conv=notrunc"];
    let output = host.run(&zeroes, SHORT)?;
    assert_eq!(output.ending, Ending::Exited(0), "{:?}", output.stderr);
    Ok(())
}

fn guest_stays_alone_without_a_backup() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let primary = site.start_primary(1, &guest, &volume)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let client = site.client(load())?;
        more_replies(&client, 50)?;
        site.check(&client.stop(SHORT))?;
        assert_eq!(volume.claims()?, ["guest.view-1"]);
        assert_eq!(end(&primary)?, Ending::Exited(0));
        volume.assert_ended()
    })
}
