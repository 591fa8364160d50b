//! Who decides when the arbiter is an etcd of three members, what happens while most of it does not answer, and what a fence
//! holds back.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use vmft_tests::client::Client;
use vmft_tests::events::{
    CLAIM_UNDECIDED, IMAGE_LOST, NOT_FENCED, PROTECTED, RECEIVING, TAKEOVER, TRANSFER_FAILED, UNPROTECTED,
};
use vmft_tests::harness::{Case, Need, TestResult};
use vmft_tests::hosts::{Ending, Etcd, Link};
use vmft_tests::pair::{
    Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, Volume, exactly_one, field, load, more_replies,
};

use crate::SITES;

const NEEDS: &[Need] = &[Need::Root, Need::Tun, Need::Qemu, Need::Etcd];
/// The record of the disk's owner.
const OWNER: &str = "disk.img.vmft-owner";
/// For how long nothing may happen while the arbiter or a fence is awaited.
const WAITING: Duration = Duration::from_secs(3);

/// The tests.
pub const CASES: &[Case] = &[
    Case::with(NEEDS, "etcd_decides_and_without_its_majority_nobody_goes_on", etcd_decides),
    Case::on_hosts("fence_and_disk_hold_a_takeover_and_a_former_primary", fence_and_disk),
    Case::on_hosts("images_that_change_hands_are_not_taken_over", changed_images_are_not_taken),
];

/// Nothing is answered for a while, and neither monitor goes on or ends.
fn assert_all_wait(client: &Client, monitors: &[&Monitor], signs: &[&str]) -> TestResult {
    // What left the guest before is still on its way to the client.
    thread::sleep(Duration::from_millis(200));
    let before: Vec<usize> = monitors.iter().map(|monitor| count(monitor, signs)).collect();
    let answered = client.answered();
    // Not a condition to wait for: nothing is to happen.
    thread::sleep(WAITING);
    let after: Vec<usize> = monitors.iter().map(|monitor| count(monitor, signs)).collect();
    assert_eq!(client.answered(), answered, "the guest answered while its monitor had no right to run it");
    assert_eq!(before, after, "a monitor went on");
    for monitor in monitors {
        assert_eq!(monitor.ending(), None, "{:?}", monitor.output().last());
    }
    Ok(())
}

fn count(monitor: &Monitor, signs: &[&str]) -> usize {
    signs.iter().map(|sign| monitor.count(sign)).sum()
}

/// A volume of which the claims are at an etcd.
fn volume_with_etcd(site: &mut Site, etcd: &Etcd) -> Result<Volume, Box<dyn std::error::Error>> {
    let mut volume = site.volume()?;
    etcd.admit(&volume.local)?;
    volume.arbiter = format!("etcd:{}", Etcd::endpoints());
    volume.arbiter_options = Etcd::options(&volume.path);
    Ok(volume)
}

/// While `primary` runs the guest, another one is told who does.
fn second_is_refused(site: &mut Site, guest: &Guest, volume: &Volume, primary: &Monitor) -> TestResult {
    let refusal = site.start_primary(2, guest, volume)?.wait(SHORT)?;
    let sentence = refusal.stderr.last().ok_or("the second primary says nothing")?;
    println!("{sentence}");
    assert_eq!(refusal.ending, Ending::Exited(1), "{sentence}");
    let holder = format!("already run by host1 (process {}): it holds view 2", primary.pid());
    let endpoints = Etcd::endpoints();
    for part in [
        holder,
        format!("at etcd:{endpoints}"),
        format!("etcdctl --endpoints={endpoints} --cacert={}/etcd-ca ", volume.path),
    ] {
        assert!(sentence.contains(&part), "{sentence}");
    }
    Ok(())
}

fn etcd_decides() -> TestResult {
    SITES.run(|site| {
        let mut etcd = Etcd::start(site.net(), "silent")?;
        let (guest, volume) = (Guest::default(), volume_with_etcd(site, &etcd)?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        second_is_refused(site, &guest, &volume, &primary)?;
        etcd.freeze(0..3, true);
        more_replies(&client, 20)?;
        assert_eq!(primary.count(CLAIM_UNDECIDED), 0, "as long as both live, nobody asks the arbiter");
        // Two of three go on without it.
        etcd.kill(0);

        // Both want the next view, and neither is told.
        site.host(1).cut(Link::Log)?;
        // The arbiter is on the log link as well: host 1 reaches it again once that is whole.
        primary.wait_for_line(CLAIM_UNDECIDED, SHORT)?;
        backup.wait_for_line(CLAIM_UNDECIDED, SHORT)?;
        site.host(1).restore(Link::Log)?;
        assert_all_wait(&client, &[&primary, &backup], &[TAKEOVER, UNPROTECTED])?;
        for monitor in [&primary, &backup] {
            assert_eq!(monitor.count(CLAIM_UNDECIDED), 1, "it is said once");
        }
        etcd.freeze(0..3, false);
        let (goes_on, stops) = exactly_one(&primary, &backup)?;
        more_replies(&client, 20)?;

        let view = join_without_arbiter(site, &guest, &volume, &client, (&mut etcd, goes_on, stops.host))?;
        // The one that is left is killed while the arbiter has no majority.
        let next = site.start_backup(stops.host, goes_on.host, &guest, &volume)?;
        goes_on.wait_for_line(&format!("{PROTECTED} view={}", view + 1), LONG)?;
        more_replies(&client, 20)?;
        etcd.freeze(1..2, true);
        goes_on.kill(Signal::SIGKILL)?;
        next.wait_for_line(CLAIM_UNDECIDED, SHORT)?;
        assert_all_wait(&client, &[&next], &[TAKEOVER])?;
        etcd.freeze(1..2, false);
        println!("{}", next.wait_for_line(&format!("{TAKEOVER} view={}", view + 2), SHORT)?);
        more_replies(&client, 20)?;
        let claims: Vec<String> =
            (1..=view + 2).map(|view| format!("/vmft/claims/guest/view-{view:020}")).collect();
        assert_eq!(etcd.keys("/vmft/claims/")?, claims);
        assert_eq!(volume.claims()?, Vec::<String>::new(), "no claim is a file");
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

/// While the arbiter has no majority no backup can join, and the guest of `goes_on` answers as before. The view in which it is
/// then: whether the backup was recorded meanwhile is the arbiter's secret, and no record is left that names it.
fn join_without_arbiter(
    site: &mut Site,
    guest: &Guest,
    volume: &Volume,
    client: &Client,
    (etcd, goes_on, on): (&mut Etcd, &Monitor, u8),
) -> Result<u64, Box<dyn std::error::Error>> {
    let (alone, protected) = (goes_on.count(UNPROTECTED), goes_on.count(PROTECTED));
    let early = site.start_backup(on, goes_on.host, guest, volume)?;
    // By then it has asked the arbiter who that is, and nobody has asked yet for its record.
    early.wait_for_line(RECEIVING, LONG)?;
    etcd.freeze(1..2, true);
    let line =
        goes_on.wait_for_event(TRANSFER_FAILED, "the arbiter has not recorded it as the backup", LONG)?;
    println!("{line}");
    more_replies(client, 20)?;
    assert_eq!(early.wait(SHORT)?.ending, Ending::Exited(1));
    assert_eq!((goes_on.count(UNPROTECTED), goes_on.count(PROTECTED)), (alone, protected));
    etcd.freeze(1..2, false);
    goes_on.wait_for_lines(UNPROTECTED, alone + 1, SHORT)?;
    let output = goes_on.output();
    let line =
        output.iter().rev().find(|line| line.contains(UNPROTECTED)).ok_or("it does not say its view")?;
    println!("{line}");
    assert_eq!(goes_on.count(UNPROTECTED), alone + 1);
    more_replies(client, 20)?;
    Ok(field(line, "view").ok_or("no view")?)
}

/// Takes the disk of `primary`, on the storage itself. Its claim and its lease hold, as those of a host that was paused seem
/// to it to do.
fn take_disk(primary: &Monitor, view: u64, volume: &Volume) -> TestResult {
    let (owner, new) = (volume.local.join(OWNER), volume.local.join("new"));
    let record = fs::read_to_string(&owner)?;
    let expected = format!("\nview {view}\nrole backup\nhost host{}\npid {}\n", primary.host, primary.pid());
    assert!(record.contains(&expected), "{record}");
    fs::write(&new, record.replace(&format!("host{}", primary.host), "host9"))?;
    fs::rename(&new, &owner)?;
    println!("{}", primary.wait_for_line(IMAGE_LOST, SHORT)?);
    let image = fs::read(volume.local.join("disk.img"))?;
    // Not a condition to wait for: nothing is to happen.
    thread::sleep(WAITING);
    assert!(fs::read(volume.local.join("disk.img"))? == image, "it wrote to an image that is another's");
    assert_eq!(primary.ending(), None);
    Ok(())
}

fn fence_and_disk() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (mode, told) = (volume.local.join("mode"), volume.local.join("told"));
        let script = "cd \"${0%/*}\"\n\
                      echo \"$VMFT_GUEST $VMFT_VIEW $VMFT_PEER_HOST $VMFT_PEER_ADDRESS $1\" >>told\n\
                      case $(cat mode) in fail) exit 3;; hang) sleep 600;; esac\n";
        fs::write(volume.local.join("fence"), script)?;
        let command = format!("/bin/sh {}/fence now", volume.path);
        let fenced = ["--fence-cmd", command.as_str(), "--fence-timeout-ms", "1000"];
        fs::write(&mode, "fail")?;

        let primary = site.start_primary(1, &guest, &volume)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let backup = site.start_backup_with(2, 1, &guest, &volume, &fenced)?;
        primary.wait_for_line(PROTECTED, LONG)?;
        let client = site.client(load())?;
        more_replies(&client, 20)?;
        primary.kill(Signal::SIGKILL)?;
        let line = backup.wait_for_line(NOT_FENCED, SHORT)?;
        println!("{line}");
        assert!(line.contains("'/bin/sh' ended with exit status 3"), "{line}");
        assert_all_wait(&client, &[&backup], &[TAKEOVER])?;
        fs::write(&mode, "hang")?;
        println!("{}", backup.wait_for_line("'/bin/sh' did not end within 1000 ms", SHORT)?);
        assert_all_wait(&client, &[&backup], &[TAKEOVER])?;
        fs::write(&mode, "ok")?;
        println!("{}", backup.wait_for_line(&format!("{TAKEOVER} view=3"), SHORT)?);
        more_replies(&client, 20)?;
        let lines = fs::read_to_string(&told)?;
        let expected = "guest 3 host1 10.78.0.101 now";
        assert!(lines.lines().count() > 2 && lines.lines().all(|line| line == expected), "{lines}");

        // A primary that hands its guest over needs no fence, and none would let this backup go live.
        fs::write(&mode, "fail")?;
        fs::remove_file(&told)?;
        let next = site.start_backup_with(1, 2, &guest, &volume, &fenced)?;
        backup.wait_for_line(&format!("{PROTECTED} view=4"), LONG)?;
        backup.kill(Signal::SIGTERM)?;
        println!("{}", next.wait_for_line(&format!("{TAKEOVER} view=5"), SHORT)?);
        more_replies(&client, 20)?;
        assert!(!told.exists(), "a primary was fenced that had left");
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;

        let client = site.client(load())?;
        take_disk(&next, 5, &volume)?;
        client.stop(Duration::ZERO);
        Ok(())
    })
}

/// Between the join and the takeover another guest takes the image, or a copy is put in its place. The backup knows the image by
/// a link.
fn changed_images_are_not_taken() -> TestResult {
    SITES.run(|site| {
        for (new, name, why) in [
            ("record", OWNER, "has another owner than before: its owner is guest 'mail' of host host1"),
            ("copy.img", "disk.img", "was replaced or removed"),
        ] {
            let (guest, volume) = (Guest::default(), site.volume()?);
            let local = &volume.local;
            symlink("disk.img", local.join("link.img"))?;
            let primary = site.start_primary(1, &guest, &volume)?;
            let line = format!(
                "backup --connect {} --connect-timeout-ms 60000 --arbiter dir:{path} {} --tap tap0 --timeout-ms {} --disk \
                 {path}/link.img",
                site.log_address(1),
                volume.security().join(" "),
                guest.timeout_ms,
                path = volume.path
            );
            let words: Vec<String> = line.split_whitespace().map(String::from).collect();
            let backup = site.start(2, &words)?;
            primary.wait_for_line(PROTECTED, LONG)?;
            let record = fs::read_to_string(local.join(OWNER))?;
            fs::write(local.join("record"), record.replace("guest guest", "guest mail"))?;
            fs::copy(local.join("disk.img"), local.join("copy.img"))?;
            fs::rename(local.join(new), local.join(name))?;
            let owner = fs::read(local.join(OWNER))?;
            primary.kill(Signal::SIGKILL)?;
            let output = backup.wait(SHORT)?;
            let sentence = output.stderr.last().ok_or("the backup says nothing")?;
            println!("{sentence}");
            assert_eq!(output.ending, Ending::Exited(1), "{sentence}");
            for part in ["vmft: this backup does not take the guest over: ", why, "It has claimed nothing"] {
                assert!(sentence.contains(part), "{sentence}");
            }
            assert_eq!(volume.claims()?, ["guest.view-1", "guest.view-2"]);
            assert_eq!(fs::read(local.join(OWNER))?, owner, "the image has another owner");
            site.end_processes()?;
        }
        Ok(())
    })
}
