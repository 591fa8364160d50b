//! What the monitor does when it is given something wrong: one sentence that names it, a status other than 0, and
//! nothing left behind; and what strangers on the log port can do: nothing. What it refuses before it asks for KVM is in
//! `vmm/tests/cli.rs`.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use vmft_tests::client::{Config, Sample};
use vmft_tests::events::{PROTECTED, STARTED};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Capture, Ending, Link, Output, build_vmft, make_disk};
use vmft_tests::pair::{Guest, LOG_PORT, LONG, Monitor, Random, SERVICE_READY, SHORT, Site, Volume};

use crate::SITES;

/// Longest that the primary may keep a connection on which nobody says who he is.
const GREETING_MAX: Duration = Duration::from_secs(15);

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("unusable_files_are_refused", unusable_files_are_refused),
    Case::on_hosts("unusable_networks_and_directories_are_refused", unusable_networks_are_refused),
    Case::on_hosts("unfit_hosts_are_refused", unfit_hosts_are_refused),
    Case::on_hosts("what_another_monitor_has_is_refused", what_another_monitor_has_is_refused),
    Case::on_hosts("images_that_are_not_the_primarys_are_refused", other_images_are_refused),
    Case::on_hosts("backups_with_another_key_or_none_are_refused", other_keys_are_refused),
    Case::on_hosts("log_link_shows_nothing_of_the_guest", log_link_shows_nothing),
    Case::on_hosts("strangers_on_the_log_port_disturb_nothing", strangers_disturb_nothing),
];

/// Runs a command line and says what it has left behind: interfaces, files and monitors that were not there before. The id of a
/// shared directory stays for good once it is made.
const LEAVES_NOTHING: &str = "look() { ls /sys/class/net; find /shared /tmp | grep -v vmft-id; pidof vmft; }
    before=$(look); \"$@\"; status=$?; after=$(look)
    [ \"$before\" = \"$after\" ] || echo \"left behind: $after; before: $before\"
    exit $status";

/// Words of a command line.
fn words(line: &str) -> Vec<String> {
    line.split_whitespace().map(String::from).collect()
}

/// Fails unless `output` is a refusal in one sentence that holds all of `says`.
fn assert_refusal(line: &str, output: &Output, says: &[&str]) {
    assert_eq!(output.ending, Ending::Exited(1), "`{line}`: {:?}", output.stderr);
    // What is said on the way is not the refusal.
    let is_news = |line: &&String| line.contains(" INFO ") || line.contains(" WARN ");
    let said: Vec<&String> = output.stderr.iter().filter(|line| !is_news(line)).collect();
    let [sentence] = said[..] else { panic!("`{line}` does not say one sentence: {:?}", output.stderr) };
    println!("{sentence}");
    assert!(sentence.starts_with("vmft: "), "`{line}`: {sentence}");
    for what in says {
        assert!(sentence.contains(what), "`{line}` does not say '{what}': {sentence}");
    }
}

/// Runs `vmft` on host `number`; it must refuse and leave nothing behind.
fn refused(site: &Site, number: u8, line: &str, says: &[&str]) -> TestResult {
    let program = site.image("vmft");
    let mut argv = vec!["sh", "-c", LEAVES_NOTHING, "sh", &program];
    argv.extend(line.split_whitespace());
    let output = site.host(number).run(&argv, SHORT)?;
    assert_refusal(line, &output, says);
    let left = output.stdout.iter().find(|line| line.starts_with("left behind: "));
    assert_eq!(left, None, "`{line}`");
    Ok(())
}

fn unusable_files_are_refused() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let (path, local) = (volume.path.as_str(), &volume.local);
        let kernel = fs::read(vmft_tests::hosts::Images::ensure()?.kernel())?;
        fs::write(local.join("short"), &kernel[..100])?;
        fs::write(local.join("truncated"), &kernel[..kernel.len() / 2])?;
        fs::write(local.join("text"), "not a kernel\n".repeat(1_000))?;
        fs::write(local.join("empty"), "")?;
        File::create(local.join("huge"))?.set_len(200 << 20)?;
        File::create(local.join("odd.img"))?.set_len(100_001)?;
        let run = format!("run --kernel {}", site.kernel());
        for (line, says) in [
            (format!("run --kernel {path}/none"), &["kernel", "none", "No such file"][..]),
            (format!("run --kernel {path}"), &["kernel", path]),
            (format!("run --kernel {path}/empty"), &["empty is not a kernel", "an empty file"]),
            (
                format!("run --kernel {path}/short"),
                &["short is not a kernel", "only the beginning", "Copy it again"],
            ),
            (
                format!("run --kernel {path}/text"),
                &["text is not a kernel", "a text file", "vmlinux", "bzImage"],
            ),
            (
                format!("run --kernel {path}/truncated"),
                &["truncated is incomplete", "ends before its packed kernel", "Copy it again"],
            ),
            (format!("{run} --initrd {path}/none"), &["initrd", "none", "No such file"]),
            (format!("{run} --initrd {path}/empty"), &["initrd", "empty is an empty file"]),
            (
                format!("{run} --memory-mib 128 --initrd {path}/huge"),
                &["initrd", "huge does not fit in 128 MiB", "--memory-mib"],
            ),
            (format!("{run} --memory-mib 32"), &["kernel", "does not fit in 32 MiB", "--memory-mib"]),
            (format!("{run} --memory-mib 524288"), &["524288 MiB", "--memory-mib"]),
            (format!("{run} --disk {path}/none.img"), &["none.img' does not exist", "truncate -s"]),
            (format!("{run} --disk {path}"), &["neither a file nor a block device"]),
            (format!("{run} --disk {path}/odd.img"), &["odd.img' has 100001 bytes", "multiple of 512"]),
            (format!("{run} --disk {path}/empty"), &["empty' has 0 bytes", "multiple of 512"]),
            (
                format!("record {path}/text --kernel {}", site.kernel()),
                &["text exists already", "another name"],
            ),
            (format!("record {path}/none/recording --kernel {}", site.kernel()), &["none/recording"]),
            (format!("record {path}/recording --kernel {path}/none"), &["kernel", "No such file"]),
            (format!("replay {path}/none"), &["none"]),
            (format!("replay {path}"), &[path]),
            (format!("replay {path}/text"), &["text is not a recording"]),
        ] {
            refused(site, 1, &line, says)?;
        }
        Ok(())
    })
}

fn unusable_networks_are_refused() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let path = volume.path.as_str();
        let kernel = site.kernel();
        let own = site.host(1).address(Link::Log);
        let security = volume.security().join(" ");
        let backup = format!("backup {security} --arbiter dir:{path} --connect-timeout-ms 300 --connect");
        // Something else where the primary is to be.
        let _talking = site.host(1).spawn(&["sh", "-c", "yes | nc -l -p 7002"])?;
        let listening = "until netstat -ltn | grep -q ':7002 '; do usleep 10000; done";
        site.host(1).run(&["sh", "-c", listening], SHORT)?;
        for (line, says) in [
            (
                format!("run --kernel {kernel} --tap none0"),
                &["Tap 'none0' does not exist", "ip tuntap add none0"][..],
            ),
            (format!("run --kernel {kernel} --tap eth1"), &["'eth1' is not a single-queue tap"]),
            (format!("run --kernel {kernel} --tap a/b"), &["a/b"]),
            (
                format!("standby --listen {own}:7000 --hosts {own}:7000 {security} --arbiter dir:{path}"),
                &["--hosts names this host alone", "name the others"],
            ),
            (
                format!("standby --listen 0.0.0.0:7000 --hosts {own}:7000 {security} --arbiter dir:{path}"),
                &["--hosts names this host alone"],
            ),
            (
 format!("backup --arbiter dir:{path} --connect-timeout-ms 300 --connect 127.0.0.1:7999"), &["no primary answers at 127.0.0.1:7999"]),
            (format!("{backup} {own}:7999"), &["no primary answers at", ":7999", "--listen"]),
            (format!("{backup} 10.78.0.250:7000"), &["no primary answers at 10.78.0.250:7000"]),
            (format!("{backup} {own}:7002"), &["primary at", ":7002"]),
            (
                format!("primary --kernel {kernel} {security} --listen {own}:7000 --arbiter dir:/images"),
                &["/images' cannot be written", "Read-only"],
            ),
            (
                format!("backup --connect {own}:7000 {security} --arbiter dir:/images"),
                &["/images' cannot be written"],
            ),
            (
                format!("standby --listen {own}:7000 --hosts 10.78.0.102 {security} --arbiter dir:{path} --tap none0"),
                &["Tap 'none0' does not exist", "ip tuntap add none0"],
            ),
            (
                format!(
                    "standby --listen {own}:7000 --hosts 10.78.0.102 {security} --arbiter dir:{path} --disk {path}/none.img"
                ),
                &["none.img' does not exist"],
            ),
        ] {
            refused(site, 1, &line, says)?;
        }
        Ok(())
    })
}

fn unfit_hosts_are_refused() -> TestResult {
    SITES.run(|site| {
        let line = format!("run --kernel {}", site.kernel());
        let under =
            |before: &str, after: &str| format!("{before}; /images/vmft {line}; s=$?; {after}; exit $s");
        let no_device = under("mv /dev/kvm /dev/kvm.away", "mv /dev/kvm.away /dev/kvm");
        let no_right = format!(
            "echo nobody:x:65534:65534::/:/bin/sh >/etc/passwd; start-stop-daemon -S -c nobody -x /images/vmft -- {line}"
        );
        // As it looks on a host with that module.
        let software =
            under("mount -t tmpfs none /sys/module; mkdir /sys/module/kvm_pvm", "umount /sys/module");
        let cases: [(&str, &[&str]); 3] = [
            (&no_device, &["cannot open /dev/kvm: No such file", "modprobe kvm"]),
            (&no_right, &["cannot open /dev/kvm: Permission denied", "as root or join the group"]),
            (&software, &["KVM is unfit: it is kvm-pvm", "VT-x or AMD-V is needed", "vmft doctor"]),
        ];
        let no_counter = format!("record /tmp/r --kernel {} --position pmu", site.kernel());
        let says = ["`pmu` on this host", "no performance counters", "--position checkpoint, or auto"];
        refused(site, 1, &no_counter, &says)?;
        for (script, says) in cases {
            let output = site.host(1).run(&["sh", "-c", script], SHORT)?;
            assert_refusal(script, &output, says);
        }
        Ok(())
    })?;
    // The real thing, where it is.
    if Path::new("/sys/module/kvm_pvm").exists() {
        let mut vmft = Command::new(build_vmft()?);
        let output = vmft.args(["run", "--kernel", "/none"]).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        print!("{said}");
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("it is kvm-pvm") && said.lines().count() == 1, "{said}");
    }
    Ok(())
}

fn running_primary(site: &mut Site, volume: &Volume) -> Result<Monitor, Box<dyn std::error::Error>> {
    let primary = site.start_primary(1, &Guest::default(), volume)?;
    primary.wait_for_line(SERVICE_READY, LONG)?;
    Ok(primary)
}

fn what_another_monitor_has_is_refused() -> TestResult {
    SITES.run(|site| {
        let (volume, other) = (site.volume()?, site.volume()?);
        make_disk(&volume.local.join("small.img"), 32)?;
        let primary = running_primary(site, &volume)?;
        let client = site.client(Config { interval: Duration::from_millis(50), ..Config::default() })?;

        let (kernel, path) = (site.kernel(), &volume.path);
        let run = format!("run --kernel {kernel}");
        let security = volume.security().join(" ");
        let second = format!("primary --kernel {kernel} {security} --arbiter dir:{path}");
        let process = format!("process {}", primary.pid());
        for (line, says) in [
            (format!("{run} --disk {path}/disk.img"), &["disk.img' is in use by another monitor"][..]),
            (format!("{run} --tap tap0"), &["Tap 'tap0' is in use", "its own tap"]),
            (format!("{second} --name other --listen 10.78.0.101:7000"), &[":7000", "in use", "--listen"]),
            (
                format!("{second} --listen 10.78.0.101:7001"),
                &["guest 'guest' is already run by host1", &process, "view 1"],
            ),
        ] {
            refused(site, 1, &line, says)?;
        }
        let timeout = Guest::default().timeout_ms;
        let address = "the primary at 10.78.0.101:7000 refuses this backup: ";
        let backup = |shared: &str, disk: &str, rest: &str| {
            format!(
                "backup --connect 10.78.0.101:7000 {security} --arbiter dir:{shared} --disk {disk} {rest}"
            )
        };
        let disk = volume.disk();
        let fitting = format!("--tap tap0 --timeout-ms {timeout}");
        let slower = format!("--tap tap0 --timeout-ms {}", timeout + 200);
        for (line, says) in [
            (
                backup(path, &disk, &format!("{fitting} --name other")),
                &[address, "host2 wants to follow guest \"other\"", "\"guest\""][..],
            ),
            (
                backup(path, &format!("{path}/small.img"), &fitting),
                &[address, "33554432 bytes", "67108864 bytes"],
            ),
            (
                backup(&other.path, &disk, &fitting),
                &[address, "asks the arbiter", "the same one with --arbiter"],
            ),
            (backup(path, &disk, &slower), &[address, "--timeout-ms", "must be equal"]),
            (
                backup(path, &disk, &format!("{fitting} --position step")),
                &[address, "finds forced stops by step", "the primary by checkpoint", "--position"],
            ),
            (backup(path, &disk, &format!("--timeout-ms {timeout}")), &["--tap"]),
            (
                format!(
                    "primary --kernel {kernel} {security} --arbiter dir:{} --listen 10.78.0.102:7000 --disk {disk}",
                    other.path
                ),
                &["disk.img' belongs to guest 'guest', which host1", &process, "view 1", "disk.img.vmft-owner"],
            ),
        ] {
            refused(site, 2, &line, says)?;
        }
        assert_eq!(volume.claims()?, ["guest.view-1"], "a refused backup must not change who runs the guest");
        assert!(client.wait_for_replies(client.answered() + 20, LONG), "the guest does not answer");
        assert_eq!(primary.ending(), None);
        site.check(&client.stop(SHORT))
    })
}

/// A guest called "other" on host 2, with `other.img` of `volume`.
fn other_guest(site: &mut Site, volume: &Volume) -> Result<Monitor, Box<dyn std::error::Error>> {
    fs::copy(volume.local.join("disk.img"), volume.local.join("other.img"))?;
    let path = &volume.path;
    let line = format!(
        "primary --name other --kernel {} --initrd {} --memory-mib 128 {} --arbiter dir:{path} --listen 10.78.0.102:7001 \
         --disk {path}/other.img",
        site.kernel(),
        site.image("guest.cpio.gz"),
        volume.security().join(" ")
    );
    let other = site.start(2, &words(&line))?;
    other.wait_for_line(STARTED, LONG)?;
    Ok(other)
}

/// The command line of a backup on host 2 with this disk.
fn backup_with(volume: &Volume, disk: &str) -> String {
    format!(
        "backup --connect 10.78.0.101:7000 --arbiter dir:{} {} --tap tap0 --timeout-ms {} --disk {disk}",
        volume.path,
        volume.security().join(" "),
        Guest::default().timeout_ms
    )
}

fn other_images_are_refused() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let (path, local) = (volume.path.clone(), volume.local.clone());
        let primary = site.start_primary(1, &Guest::default(), &volume)?;
        primary.wait_for_line(STARTED, LONG)?;
        let other = other_guest(site, &volume)?;
        let owner = local.join("other.img.vmft-owner");
        let record = fs::read(&owner)?;
        fs::copy(local.join("disk.img"), local.join("copy.img"))?;
        fs::copy(local.join("disk.img"), local.join("exact.img"))?;
        fs::copy(local.join("disk.img.vmft-owner"), local.join("exact.img.vmft-owner"))?;
        let theirs = format!("its owner is guest 'other' of host host2 (process {}, view 1)", other.pid());
        let not = |name: &str| {
            format!("disk image \"{path}/{name}\" is not the primary's, \"{path}/disk.img\"")
        };
        for (name, why) in [
            ("copy.img", "it has no record of an owner beside it"),
            ("other.img", &theirs),
            ("exact.img", "the record of its owner is a copy, as the image is"),
        ] {
            let says = [&not(name), why, "Give both the same file"];
            refused(site, 2, &backup_with(&volume, &format!("{path}/{name}")), &says)?;
            primary.wait_for_line(&not(name), SHORT)?;
        }
        assert_eq!(fs::read(&owner)?, record, "the other guest's image has another owner");

        let second = |disk: &str| {
            format!(
                "primary --name second --kernel {} {} --arbiter dir:{path} --listen 10.78.0.102:7002 --disk {disk}",
                site.kernel(),
                volume.security().join(" ")
            )
        };
        let starts = [second(&format!("{path}/link.img")), second(&format!("{path}/hard.img")), second("/tmp/m.img")];
        std::os::unix::fs::symlink("disk.img", local.join("link.img"))?;
        let says = ["link.img' belongs to guest 'guest', which host1", "disk.img.vmft-owner"];
        refused(site, 2, &starts[0], &says)?;
        fs::hard_link(local.join("disk.img"), local.join("hard.img"))?;
        let linked = "has 2 names (hard links)";
        refused(site, 2, &starts[1], &[linked])?;
        for name in ["hard.img", "disk.img"] {
            refused(site, 2, &backup_with(&volume, &format!("{path}/{name}")), &[linked])?;
        }
        fs::remove_file(local.join("hard.img"))?;
        let mount = format!("touch /tmp/m.img; mount --bind {path}/disk.img /tmp/m.img");
        site.host(2).run(&["sh", "-c", &mount], SHORT)?;
        let mounted = refused(site, 2, &starts[2], &["m.img' is mounted as a single file"]);
        site.host(2).run(&["sh", "-c", "umount /tmp/m.img; rm /tmp/m.img"], SHORT)?;
        mounted?;
        assert_eq!(volume.claims()?, ["guest.view-1", "other.view-1"], "nothing refused has claimed anything");
        assert_eq!((primary.ending(), other.ending()), (None, None));
        Ok(())
    })
}

fn other_keys_are_refused() -> TestResult {
    SITES.run(|site| {
        let (volume, other) = (site.volume()?, site.volume()?);
        let primary = running_primary(site, &volume)?;
        let client = site.client(Config { interval: Duration::from_millis(20), ..Config::default() })?;
        let address = "the primary at 10.78.0.101:7000 cannot be followed: ";
        let backup = format!(
            "backup --connect 10.78.0.101:7000 --arbiter dir:{} --disk {} --tap tap0 --timeout-ms {}",
            volume.path,
            volume.disk(),
            Guest::default().timeout_ms
        );
        for (security, says, primary_says) in [
            (other.security().join(" "), "The peer does not have the key", "The peer does not have the key"),
            (
                "--insecure".into(),
                "The peer has a key and this",
                "This monitor has a key and the peer has none",
            ),
        ] {
            let heard = primary.output().len();
            refused(site, 2, &format!("{backup} {security}"), &[address, says, "--key-file"])?;
            let said = "came to nothing address=10.78.0.102:";
            let told = |line: &String| line.contains(said) && line.contains(primary_says);
            let deadline = Instant::now() + SHORT;
            while !primary.output()[heard..].iter().any(told) {
                assert!(Instant::now() < deadline, "the primary does not say '{primary_says}'");
            }
        }
        assert!(client.wait_for_replies(client.answered() + 20, LONG), "the guest does not answer");
        assert_eq!(primary.ending(), None);
        // The primary has not been disturbed: whoever has the key gets the guest.
        site.start_backup(2, 1, &Guest::default(), &volume)?;
        primary.wait_for_line(PROTECTED, LONG)?;
        let claims = ["guest.view-1", "guest.view-2"];
        assert_eq!(volume.claims()?, claims, "only the pair that was formed is a view of its own");
        site.check(&client.stop(SHORT))
    })
}

/// The same pair without a key is the proof that the captured frames would show something.
fn log_link_shows_nothing() -> TestResult {
    SITES.run(|site| {
        for (has_key, shows) in [(false, true), (true, false)] {
            let mut volume = site.volume()?;
            volume.key = volume.key.filter(|_| has_key);
            let (primary, _) = site.start_pair(&Guest::default(), &volume)?;
            let capture = Capture::start(site.net(), 1, Link::Log)?;
            let mut stream = site.connect()?;
            stream.write_all(b"PUT 1 account a-secret-of-the-guest\n")?;
            stream.set_read_timeout(Some(SHORT))?;
            let mut reply = [0; 5];
            stream.read_exact(&mut reply)?;
            assert_eq!(&reply, b"OK 1 ");
            let frames = capture.frames(2_048)?;
            let seen =
                |text: &[u8]| frames.iter().any(|frame| frame.windows(text.len()).any(|part| part == text));
            println!("with a key: {has_key}; {} frames of the log link", frames.len());
            assert!(!frames.is_empty(), "nothing was captured");
            assert_eq!(seen(b"a-secret-of-the-guest"), shows, "with a key: {has_key}");
            // Heartbeats go along, and say who they are.
            assert!(seen(b"VMFTBEAT"), "no heartbeat was captured");
            assert_eq!(primary.ending(), None);
            site.end_processes()?;
        }
        Ok(())
    })
}

/// A stranger's connection to the log port.
fn stranger(site: &Site) -> Result<TcpStream, Box<dyn std::error::Error>> {
    let address = SocketAddr::from((site.host(1).address(Link::Log), LOG_PORT));
    let stream = site.net().connect(address, SHORT)??;
    stream.set_read_timeout(Some(GREETING_MAX))?;
    Ok(stream)
}

/// Waits until the primary closes the connection.
fn wait_for_close(what: &str, mut stream: &TcpStream) -> TestResult {
    let started = Instant::now();
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(_) if started.elapsed() < GREETING_MAX => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            other => return Err(format!("{what}: not closed within {GREETING_MAX:?}: {other:?}").into()),
        }
    }
    println!("{what}: closed after {} ms", started.elapsed().as_millis());
    Ok(())
}

/// Descriptors and threads of a monitor.
fn holdings(site: &Site, monitor: &Monitor) -> Result<String, Box<dyn std::error::Error>> {
    let pid = monitor.pid();
    let count = format!("ls /proc/{pid}/fd | wc -l; ls /proc/{pid}/task | wc -l");
    Ok(site.host(monitor.host).run(&["sh", "-c", &count], SHORT)?.stdout.join(" "))
}

/// The middle one of the times from request to reply.
fn median_ms<'a>(samples: impl Iterator<Item = &'a Sample>) -> f64 {
    let mut times: Vec<f64> =
        samples.filter_map(|sample| Some((sample.replied? - sample.sent).as_secs_f64() * 1_000.0)).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn strangers_disturb_nothing() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let primary = running_primary(site, &volume)?;
        let mut random = Random::from_environment();
        let client = site.client(Config { interval: Duration::from_millis(20), ..Config::default() })?;
        assert!(client.wait_for_replies(100, LONG), "the guest does not answer");
        let (undisturbed, held) = (client.answered(), holdings(site, &primary)?);

        random_bytes(site, &mut random)?;
        nonsense_behind_a_right_opening(site, &mut random)?;
        silent_crowd(site)?;
        slow_talker(site)?;
        datagrams(site, &mut random)?;
        assert_eq!(primary.ending(), None);

        let disturbed = client.answered();
        assert!(disturbed > undisturbed, "the guest did not answer during all this");
        let deadline = Instant::now() + SHORT;
        while holdings(site, &primary)? != held {
            assert!(
                Instant::now() < deadline,
                "descriptors and threads: {held}, now {}",
                holdings(site, &primary)?
            );
        }
        site.start_backup(2, 1, &Guest::default(), &volume)?;
        primary.wait_for_line(PROTECTED, LONG)?;
        assert!(client.wait_for_replies(client.answered() + 20, LONG), "the guest does not answer any more");
        let report = client.stop(SHORT);
        let before = median_ms(report.samples[..undisturbed].iter());
        let during = median_ms(report.samples[undisturbed..disturbed].iter());
        println!("median latency {before:.1} ms before, {during:.1} ms during; {}", report.summary());
        assert!(during < 2.0 * before + 50.0, "the client had to wait {during} ms, before {before} ms");
        site.check(&report)
    })
}

fn random_bytes(site: &Site, random: &mut Random) -> TestResult {
    for _ in 0..10 {
        let bytes: Vec<u8> = (0..4_096).map(|_| random.between(0, 255) as u8).collect();
        let mut stream = stranger(site)?;
        // The primary may close before it has read all of it.
        let _ = stream.write_all(&bytes);
        wait_for_close("random bytes", &stream)?;
    }
    Ok(())
}

/// A right opening, which the primary itself shows, and then nonsense where the handshake belongs.
fn nonsense_behind_a_right_opening(site: &Site, random: &mut Random) -> TestResult {
    for round in 0..10 {
        let mut stream = stranger(site)?;
        let mut opening = [0; 16];
        stream.read_exact(&mut opening)?;
        stream.write_all(&opening)?;
        let len = if round == 0 { 12 << 20 } else { random.between(1, 200) };
        let bytes: Vec<u8> = (0..len).map(|_| random.between(0, 255) as u8).collect();
        // As above.
        let _ = stream.write_all(&bytes);
        wait_for_close("nonsense behind an opening", &stream)?;
    }
    Ok(())
}

/// Twenty at once that say nothing.
fn silent_crowd(site: &Site) -> TestResult {
    let crowd = (0..20).map(|_| stranger(site)).collect::<Result<Vec<_>, _>>()?;
    crowd.iter().try_for_each(|stream| wait_for_close("one of a silent crowd", stream))
}

/// One that always says a little more, too little.
fn slow_talker(site: &Site) -> TestResult {
    let mut stream = stranger(site)?;
    let mut preamble = [0; 12];
    stream.read_exact(&mut preamble)?;
    let mut talk = stream.try_clone()?;
    let talker = thread::spawn(move || {
        // The primary ends it.
        while talk.write_all(&[preamble[0]]).is_ok() {
            preamble.rotate_left(1);
            thread::sleep(Duration::from_secs(1));
        }
    });
    wait_for_close("a slow talker", &stream)?;
    // What is written to a closed connection fails at the second attempt.
    talker.join().map_err(|_| "the talker panicked")?;
    Ok(())
}

fn datagrams(site: &Site, random: &mut Random) -> TestResult {
    let address = SocketAddr::from((site.host(1).address(Link::Log), LOG_PORT));
    let socket = site.net().enter(|| UdpSocket::bind("0.0.0.0:0"))??;
    for _ in 0..1_000 {
        let len = random.between(0, 100);
        let bytes: Vec<u8> = (0..len).map(|_| random.between(0, 255) as u8).collect();
        socket.send_to(&bytes, address)?;
    }
    Ok(())
}
