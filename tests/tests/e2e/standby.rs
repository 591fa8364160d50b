//! Hosts that stand by: a guest without a backup gets one by itself after a fault, from whoever is fit. How soon, it prints.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use vmft_tests::client::Config;
use vmft_tests::events::{RESTART, STANDBY, TAKEOVER, UNPROTECTED};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, Link, build_vmft, make_disk, make_key};
use vmft_tests::pair::{Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, Volume, more_replies};

use crate::SITES;

/// Not that of the other hosts' processors.
const OTHER_STEPPING: u8 = 2;

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("protection_returns_by_itself_after_each_fault", protection_returns_by_itself),
    Case::on_hosts("a_host_that_hears_nobody_lets_the_other_go_first", cut_off_host_goes_last),
    Case::on_hosts("unfit_standbys_are_refused_by_name_and_passed_over", unfit_standbys_are_refused),
];

/// A primary on host 1 that looks for its backup.
fn start_primary(
    site: &mut Site,
    guest: &Guest,
    volume: &Volume,
) -> Result<Monitor, Box<dyn std::error::Error>> {
    let hosts = site.hosts_option();
    let primary = site.start_primary_with(1, guest, volume, &hosts)?;
    primary.wait_for_line(SERVICE_READY, LONG)?;
    Ok(primary)
}

/// Waits until the guest on `primary` is protected in `view`. Fails unless that is by the monitor on `backup`.
fn assert_protected(primary: &Monitor, view: u64, backup: u8, fault: (&str, Instant)) -> TestResult {
    let (host, at) = primary.wait_until_protected(view)?;
    let took = at.saturating_duration_since(fault.1);
    println!("{}: protected again after {} ms, by host {host}", fault.0, took.as_millis());
    assert_eq!(host, backup, "the wrong host follows");
    Ok(())
}

fn protection_returns_by_itself() -> TestResult {
    SITES.run(|site| {
        // Most of the time goes into sending the guest, which emulated hosts do slowly: it is a small one with little to do.
        let (guest, volume) = (Guest { memory_mib: 96, ..Guest::default() }, site.volume()?);
        let first = start_primary(site, &guest, &volume)?;
        let standbys = [site.start_standby(2, &guest, &volume)?, site.start_standby(3, &guest, &volume)?];
        let (host, _) = first.wait_until_protected(2)?;
        let [second, third] = standbys;
        let (backup, spare) = if host == 2 { (second, third) } else { (third, second) };
        let config = Config { interval: Duration::from_millis(250), ..Config::default() };
        let client = site.client(config)?;
        more_replies(&client, 5)?;

        let killed = ("the backup was killed", Instant::now());
        backup.kill(Signal::SIGKILL)?;
        first.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?;
        assert_protected(&first, 4, spare.host, killed)?;
        backup.wait_ending(SHORT)?;
        // As a service manager would.
        let again = site.start_standby(backup.host, &guest, &volume)?;
        again.wait_for_line(STANDBY, SHORT)?;
        more_replies(&client, 5)?;

        let killed = ("the primary was killed", Instant::now());
        first.kill(Signal::SIGKILL)?;
        spare.wait_for_line(&format!("{TAKEOVER} view=5"), SHORT)?;
        assert_protected(&spare, 6, again.host, killed)?;
        first.wait_ending(SHORT)?;
        let first = site.start_standby(1, &guest, &volume)?;
        first.wait_for_line(STANDBY, SHORT)?;
        more_replies(&client, 5)?;

        let frozen = ("the primary's host was frozen", Instant::now());
        site.host(spare.host).stop();
        again.wait_for_line(&format!("{TAKEOVER} view=7"), SHORT)?;
        assert_protected(&again, 8, 1, frozen)?;
        more_replies(&client, 5)?;
        assert_eq!(spare.count(STANDBY), 1);
        site.host(spare.host).cont();
        zombie_stands_by(&spare)?;

        let killed = ("the backup was killed, and a former zombie was left", Instant::now());
        first.kill(Signal::SIGKILL)?;
        again.wait_for_line(&format!("{UNPROTECTED} view=9"), SHORT)?;
        assert_protected(&again, 10, spare.host, killed)?;
        more_replies(&client, 5)?;
        again.kill(Signal::SIGKILL)?;
        spare.wait_for_line(&format!("{TAKEOVER} view=11"), SHORT)?;
        more_replies(&client, 5)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn cut_off_host_goes_last() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest { memory_mib: 96, ..Guest::default() }, site.volume()?);
        let first = start_primary(site, &guest, &volume)?;
        let [second, third] =
            [site.start_standby(2, &guest, &volume)?, site.start_standby(3, &guest, &volume)?];
        let (host, _) = first.wait_until_protected(2)?;
        let (backup, spare) = if host == 2 { (second, third) } else { (third, second) };
        let client = site.client(Config { interval: Duration::from_millis(250), ..Config::default() })?;
        more_replies(&client, 5)?;

        // Both claim the next view, and either could win it. Protection can return only where the third host is heard.
        let cut = ("the backup's host was cut off", Instant::now());
        site.host(backup.host).cut(Link::Log)?;
        first.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?;
        assert_protected(&first, 4, spare.host, cut)?;
        assert_eq!(backup.count(TAKEOVER), 0);
        site.host(backup.host).restore(Link::Log)?;
        zombie_stands_by(&backup)?;
        more_replies(&client, 5)?;

        let cut = ("the primary's host was cut off", Instant::now());
        site.host(first.host).cut(Link::Log)?;
        spare.wait_for_line(&format!("{TAKEOVER} view=5"), SHORT)?;
        assert_protected(&spare, 6, backup.host, cut)?;
        assert_eq!(first.count(UNPROTECTED), 1);
        site.host(first.host).restore(Link::Log)?;
        first.wait_for_lines(STANDBY, 1, SHORT)?;
        more_replies(&client, 5)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// Waits until a monitor that has lost its claim waits as a standby, in the same process.
fn zombie_stands_by(monitor: &Monitor) -> TestResult {
    println!("{}", monitor.wait_for_line(RESTART, SHORT)?);
    monitor.wait_for_lines(STANDBY, 2, SHORT)
}

/// Waits until `primary` and `standby` have said why that one is refused, in words that begin as given.
fn assert_refused(primary: &Monitor, standby: &Monitor, cause: &str) -> TestResult {
    println!("{}", primary.wait_for_line(&format!("a backup was refused: {cause}"), LONG)?);
    standby.wait_for_line(&format!("refuses this backup: {cause}"), SHORT)?;
    Ok(())
}

fn end(monitor: &Monitor) -> TestResult {
    assert_eq!(monitor.ending(), None, "a standby that was refused goes on waiting");
    monitor.kill(Signal::SIGTERM)?;
    assert_eq!(monitor.wait(SHORT)?.ending, Ending::Exited(0));
    Ok(())
}

/// Another version, another disk, another key, another processor: each is refused, and in the end one that fits is found.
fn unfit_standbys_are_refused() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let other_version = volume.local.join("vmft-other");
        fs::copy(build_vmft()?, &other_version)?;
        fs::OpenOptions::new().append(true).open(&other_version)?.write_all(&[0])?;
        make_disk(&volume.local.join("small.img"), 32)?;
        make_key(&build_vmft()?, &volume.local.join("other.key"))?;
        let primary = start_primary(site, &guest, &volume)?;

        let arguments = site.standby_arguments(2, &guest, &volume, &volume.disk());
        let other_version = site.start_program(2, &format!("{}/vmft-other", volume.path), &arguments)?;
        let version_cause = "Backup host host2 runs monitor version";
        assert_refused(&primary, &other_version, version_cause)?;

        let small = format!("{}/small.img", volume.path);
        let other_disk = site.start(3, &site.standby_arguments(3, &guest, &volume, &small))?;
        let disk_cause = "Backup host host3 has a disk of 33554432 bytes, the primary has a disk of 67108864";
        assert_refused(&primary, &other_disk, disk_cause)?;
        end(&other_disk)?;

        let mut arguments = site.standby_arguments(3, &guest, &volume, &volume.disk());
        for argument in &mut arguments {
            *argument = argument.replace("pair.key", "other.key");
        }
        let other_key = site.start(3, &arguments)?;
        let key_cause = "The peer does not have the key that this monitor has";
        for monitor in [&primary, &other_key] {
            println!("{}", monitor.wait_for_line(key_cause, SHORT)?);
        }
        end(&other_key)?;

        site.host(3).kill();
        site.reboot_as(3, OTHER_STEPPING)?;
        let other_cpu = site.start_standby(3, &guest, &volume)?;
        let cpu_cause = "Backup host host3 has the CPU";
        assert_refused(&primary, &other_cpu, cpu_cause)?;

        end(&other_version)?;
        let fit = site.start_standby(2, &guest, &volume)?;
        let (host, _) = primary.wait_until_protected(2)?;
        assert_eq!(host, fit.host, "the host that fits follows");
        for (standby, cause) in [
            (&other_version, version_cause),
            (&other_disk, disk_cause),
            (&other_key, key_cause),
            (&other_cpu, cpu_cause),
        ] {
            for monitor in [&primary, standby] {
                let said = monitor.count(cause);
                assert_eq!(said, 1, "host {} says it once and not each time: {cause}", monitor.host);
            }
        }
        end(&other_cpu)
    })
}
