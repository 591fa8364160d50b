//! The test hosts themselves: what the other end-to-end tests take for granted.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use std::{fs, thread};

use nix::sys::signal::Signal;
use vmft_tests::client::{Client, Config, dump};
use vmft_tests::harness::{Case, Need, TestResult};
use vmft_tests::hosts::{Ending, HostConfig, HostError, HostKind, Images, Link, Net, TestHost};

use crate::SITES;

const SHORT: Duration = Duration::from_secs(10);

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("host_has_kvm_and_runs_commands", host_has_kvm_and_runs_commands),
    Case::on_hosts("files_can_be_pushed_and_pulled", files_can_be_pushed_and_pulled),
    Case::on_hosts("processes_end_as_told", processes_end_as_told),
    Case::on_hosts("claim_on_shared_directory_has_one_winner", claim_has_one_winner),
    Case::on_hosts("cut_link_is_silent_until_restored", cut_link_is_silent),
    Case::on_hosts("stopped_host_goes_on_where_it_was", stopped_host_goes_on),
    Case::on_hosts("killed_host_is_reported_and_can_return", killed_host_is_reported),
    Case::on_hosts("host_that_cannot_boot_says_why", host_that_cannot_boot_says_why),
    Case::with(&[Need::Root, Need::Tun], "client_sees_a_cut_link_as_a_pause", client_sees_a_pause),
];

/// A network, and a directory for hosts to share, without hosts.
struct Ground {
    net: Arc<Net>,
    config: HostConfig,
}

impl Ground {
    fn new(kind: HostKind) -> Result<Ground, HostError> {
        let net = Arc::new(Net::new()?);
        let shared = net.run_dir().join("shared");
        fs::create_dir(&shared).map_err(|source| HostError::File { path: shared.clone(), source })?;
        let images = Images::ensure()?;
        let staged = net.stage_images(&images, &[images.demo()])?;
        let config = HostConfig { kind, ..HostConfig::new(1, &shared, &staged) };
        Ok(Ground { net, config })
    }
}

fn sh(host: &TestHost, script: &str) -> Result<(Ending, String), HostError> {
    let output = host.run(&["sh", "-c", script], SHORT)?;
    Ok((output.ending, output.stdout.join("\n")))
}

fn host_has_kvm_and_runs_commands() -> TestResult {
    SITES.run(|site| {
        let host = site.host(1);

        let script = "echo $COLOUR; pwd; echo complaint >&2; exit 7";
        let process =
            host.spawn_with(&["sh", "-c", script], &[("COLOUR", "green")], Some(Path::new("/proc")))?;
        let output = process.wait(SHORT)?;
        assert_eq!(output.ending, Ending::Exited(7));
        assert_eq!(output.stdout, ["green", "/proc"]);
        assert_eq!(output.stderr, ["complaint"]);

        let (ending, seen) =
            sh(host, "[ -c /dev/kvm ] && ls /images && cat /sys/class/net/br0/brif/tap0/port_id")?;
        assert_eq!(ending, Ending::Exited(0), "{seen}");
        assert!(seen.contains("guest.cpio.gz") && seen.contains("vmlinuz"), "{seen}");
        // A program in memory that the file server has written may run as what was there before.
        let (ending, seen) = sh(host, "grep ' /images/vmft ' /proc/mounts")?;
        assert!(ending == Ending::Exited(0) && !seen.contains("virtiofs"), "not a copy: {seen}");

        let refused = host.spawn(&["/no/such/program"]).expect_err("no such program");
        assert!(refused.to_string().contains("/no/such/program"), "{refused}");
        Ok(())
    })
}

fn files_can_be_pushed_and_pulled() -> TestResult {
    SITES.run(|site| {
        let host = site.host(1);
        let bytes: Vec<u8> = (0..3_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let path = Path::new("/tmp/file");
        host.push(path, 0o750, &bytes)?;
        assert!(host.pull(path)? == bytes, "the bytes came back different");
        assert_eq!(sh(host, "stat -c %a /tmp/file")?.1, "750");
        assert!(matches!(host.pull(Path::new("/tmp/none")), Err(HostError::Refused { .. })));
        assert!(matches!(host.push(Path::new("/none/file"), 0o644, b"x"), Err(HostError::Refused { .. })));
        // The agent has survived the refusals.
        assert_eq!(sh(host, "echo alive")?.1, "alive");
        Ok(())
    })
}

fn processes_end_as_told() -> TestResult {
    SITES.run(|site| {
        let host = site.host(1);

        let process = host.spawn(&[
            "sh",
            "-c",
            "trap 'echo caught; exit 5' TERM; echo set; while :; do sleep 0.1; done",
        ])?;
        process.wait_for_line("set", SHORT)?;
        process.kill(Signal::SIGTERM)?;
        assert_eq!(process.wait(SHORT)?.ending, Ending::Exited(5));

        let process = host.spawn(&["sleep", "1000"])?;
        process.kill(Signal::SIGKILL)?;
        assert_eq!(process.wait(SHORT)?.ending, Ending::Killed(Signal::SIGKILL as i32));

        let early = host
            .spawn(&["echo", "only this"])?
            .wait_for_line("something else", SHORT)
            .expect_err("the process prints no such line");
        assert!(matches!(early, HostError::Ended { .. }), "{early}");
        let late = host
            .spawn(&["sleep", "1001"])?
            .wait(Duration::from_millis(300))
            .expect_err("the process sleeps on");
        assert!(matches!(late, HostError::Timeout { .. }), "{late}");

        // The handle of `sleep 1001` is gone, so the process must go; its end is awaited on the host.
        assert_eq!(
            sh(host, "while pgrep -f 'sleep 100[1]'; do sleep 0.1; done >/dev/null; echo gone")?.1,
            "gone"
        );
        Ok(())
    })
}

fn claim_has_one_winner() -> TestResult {
    SITES.run(|site| {
        const ROUNDS: usize = 30;
        let hosts = [site.host(1), site.host(2)];
        // Both wait for each other before each claim, by files that the other must see appear.
        let script = "i=0
            while [ $i -lt $ROUNDS ]; do
                echo $HOST >/shared/own.$HOST.$i
                until [ -e /shared/own.$OTHER.$i ]; do :; done
                ln /shared/own.$HOST.$i /shared/link.$i 2>/dev/null && echo link $i
                (set -C; echo $HOST >/shared/excl.$i) 2>/dev/null && echo excl $i
                i=$((i + 1))
            done";
        let rounds = ROUNDS.to_string();
        let processes = [("1", "2"), ("2", "1")].map(|(own, other)| {
            let host = &hosts[usize::from(own == "2")];
            let env = [("HOST", own), ("OTHER", other), ("ROUNDS", rounds.as_str())];
            host.spawn_with(&["sh", "-c", script], &env, None)
        });
        let mut wins = Vec::new();
        for process in processes {
            wins.extend(process?.wait(Duration::from_secs(60))?.stdout);
        }
        wins.sort();
        let mut expected: Vec<String> =
            (0..ROUNDS).flat_map(|i| [format!("link {i}"), format!("excl {i}")]).collect();
        expected.sort();
        assert_eq!(wins, expected, "each claim must have exactly one winner");
        Ok(())
    })
}

fn cut_link_is_silent() -> TestResult {
    SITES.run(|site| {
        let hosts = [site.host(1), site.host(2)];
        let ping = |link: Link| {
            let target = hosts[1].address(link);
            sh(hosts[0], &format!("ping -c 1 -W 2 {target} >/dev/null")).map(|(ending, _)| ending)
        };
        let (answered, silent) = (Ending::Exited(0), Ending::Exited(1));
        assert_eq!((ping(Link::Log)?, ping(Link::Guest)?), (answered.clone(), answered.clone()));

        hosts[1].cut(Link::Log)?;
        assert_eq!((ping(Link::Log)?, ping(Link::Guest)?), (silent.clone(), answered.clone()), "log cut");
        assert_eq!(sh(hosts[1], "cat /sys/class/net/eth1/carrier")?.1, "1", "the host must not be told");
        hosts[1].restore(Link::Log)?;
        hosts[0].cut(Link::Guest)?;
        assert_eq!((ping(Link::Log)?, ping(Link::Guest)?), (answered.clone(), silent), "guest cut");
        hosts[0].restore(Link::Guest)?;
        assert_eq!((ping(Link::Log)?, ping(Link::Guest)?), (answered.clone(), answered), "all restored");
        Ok(())
    })
}

fn stopped_host_goes_on() -> TestResult {
    SITES.run(|site| {
        let host = site.host(1);
        let process =
            host.spawn(&["sh", "-c", "i=0; while :; do echo line $i; i=$((i + 1)); sleep 0.05; done"])?;
        process.wait_for_line("line 2", SHORT)?;
        host.stop();
        // What was under way when the host stopped is read in this time.
        thread::sleep(Duration::from_millis(300));
        let before = process.output().len();
        thread::sleep(Duration::from_millis(700));
        assert_eq!(process.output().len(), before, "a stopped host must be silent");
        assert!(host.is_running() && process.ending().is_none());
        host.cont();
        process.wait_for_line(&format!("line {}", before + 5), SHORT)?;
        let output = process.output();
        let expected: Vec<String> = (0..output.len()).map(|i| format!("line {i}")).collect();
        assert_eq!(output, expected, "nothing may be lost or repeated");
        Ok(())
    })
}

fn killed_host_is_reported() -> TestResult {
    SITES.run(|site| {
        let hosts = [site.host(1), site.host(2)];
        let process = hosts[0].spawn(&["sleep", "1000"])?;
        hosts[0].kill();
        assert!(matches!(process.wait_ending(SHORT)?, Ending::Lost(_)));
        assert!(!hosts[0].is_running());
        let error = hosts[0].run(&["true"], SHORT).expect_err("the host is dead");
        assert!(matches!(error, HostError::Unreachable { .. }), "{error}");
        assert!(error.to_string().contains("no power"), "{error}");
        let console = hosts[0].console();
        let last = console.lines().last().ok_or("it has written nothing to its console")?;
        assert!(error.to_string().contains(&format!("  | {last}")), "the console belongs to it: {error}");
        assert_eq!(sh(hosts[1], "echo alive")?.1, "alive");

        site.reboot(1)?;
        let peer = site.host(2).address(Link::Log);
        assert_eq!(sh(site.host(1), &format!("ping -c 1 -W 2 {peer} >/dev/null"))?.0, Ending::Exited(0));
        Ok(())
    })
}

fn host_that_cannot_boot_says_why() -> TestResult {
    let ground = Ground::new(HostKind::Qemu)?;
    let no_directory = HostConfig { images: PathBuf::from("/no/such/directory"), ..ground.config.clone() };
    let error = TestHost::boot(&ground.net, no_directory).expect_err("there is nothing to mount");
    assert!(matches!(error, HostError::ToolFailed { .. }), "{error}");
    assert!(error.to_string().contains("/no/such/directory"), "{error}");

    let hopeless = HostConfig { boot_timeout: Duration::from_millis(300), ..ground.config.clone() };
    let error =
        TestHost::boot(&ground.net, HostConfig { index: 2, ..hopeless }).expect_err("no time to boot");
    assert!(matches!(error, HostError::Boot { .. }), "{error}");

    let host = TestHost::start(&ground.net, HostConfig { index: 3, ..ground.config.clone() })?;
    host.kill();
    let error = host.wait_ready().expect_err("it has no power");
    assert!(error.to_string().contains("the machine has ended"), "{error}");
    Ok(())
}

fn client_sees_a_pause() -> TestResult {
    let ground = Ground::new(HostKind::Netns)?;
    let host = TestHost::boot(&ground.net, ground.config.clone())?;
    let program = host.images_dir().join("vmft-demo").display().to_string();
    let log = host.shared_dir().join("log").display().to_string();
    let service = host.spawn(&[&program, "0.0.0.0:7777", &log])?;
    service.wait_for_line("vmft-demo: ready", SHORT)?;
    let address = SocketAddr::from((host.address(Link::Guest), 7777));
    let connect = || ground.net.connect(address, SHORT);

    let client = Client::start(connect()??, Config::default())?;
    assert!(client.wait_for_replies(50, SHORT), "the service does not answer");
    let pause = Duration::from_millis(400);
    host.cut(Link::Guest)?;
    thread::sleep(pause);
    host.restore(Link::Guest)?;
    let answered = client.answered();
    assert!(client.wait_for_replies(answered + 50, SHORT), "the connection does not recover");
    let report = client.stop(SHORT);
    assert!(report.is_clean(), "{}: {:?}", report.summary(), report.wrong);
    assert!(report.blackout_ms >= 400.0, "{}", report.summary());
    let stored = dump(connect()??, SHORT)?;
    assert!(!stored.is_empty());
    assert_eq!(report.missing_from(&stored), Vec::<String>::new());

    // Now the service dies under a client: that must not look clean.
    let client = Client::start(connect()??, Config { sole_writer: false, ..Config::default() })?;
    assert!(client.wait_for_replies(10, SHORT), "the service does not answer");
    service.kill(Signal::SIGKILL)?;
    service.wait(SHORT)?;
    let report = client.stop(SHORT);
    assert!(report.broken.is_some() && !report.is_clean(), "{}", report.summary());
    Ok(())
}
