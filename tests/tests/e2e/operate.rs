//! What an operator sees of a pair, and what an operator can do with it.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use vmft_tests::client::Client;
use vmft_tests::events::{DISMISSED, GUEST_ENDED, PROTECTED, TAKEOVER, UNPROTECTED};
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, Link, Output};
use vmft_tests::pair::{Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, Volume, load, more_replies};

use crate::SITES;

/// How often something that changes by itself is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Port of the monitors' metrics.
const METRICS_PORT: u16 = 9177;
/// Runs the monitor with its log in a pipe, and a process that reads it.
const LOGGED: (&str, &str) = (
    "/tmp/logged",
    "#!/bin/sh\n\
     rm -f /tmp/log.pipe && mkfifo /tmp/log.pipe\n\
     cat /tmp/log.pipe >/tmp/log & echo $! >/tmp/reader\n\
     exec /images/vmft \"$@\" 2>/tmp/log.pipe\n",
);

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("status_tells_each_phase_on_both_sides", status_tells_each_phase_on_both_sides),
    Case::on_hosts(
        "switches_pauses_and_a_shutdown_lose_nothing",
        switches_pauses_and_a_shutdown_lose_nothing,
    ),
    Case::on_hosts(
        "a_backup_that_is_let_go_makes_room_for_another",
        a_backup_that_is_let_go_makes_room_for_another,
    ),
    Case::on_hosts(
        "a_switch_that_fails_leaves_the_guest_where_it_is",
        a_switch_that_fails_leaves_the_guest_where_it_is,
    ),
    Case::on_hosts("a_log_that_nobody_reads_stops_no_takeover", a_log_that_nobody_reads_stops_no_takeover),
];

/// Runs a command of an operator's on host `number`.
fn operate(site: &Site, number: u8, arguments: &[&str]) -> Result<Output, Box<dyn std::error::Error>> {
    let program = site.image("vmft");
    let mut argv = vec![program.as_str()];
    argv.extend(arguments);
    Ok(site.host(number).run(&argv, LONG)?)
}

/// What the monitor on host `number` says of itself.
fn status(site: &Site, number: u8) -> Result<Value, Box<dyn std::error::Error>> {
    let output = operate(site, number, &["status", "--json"])?;
    if !output.success() {
        return Err(format!("no status of host {number}: {:?}", output.stderr).into());
    }
    Ok(serde_json::from_str(&output.stdout.join("\n"))?)
}

/// Waits until the monitor on host `number` says something of itself that `is` wanted.
fn wait_for_status(
    site: &Site,
    number: u8,
    what: &str,
    is: impl Fn(&Value) -> bool,
) -> Result<Value, Box<dyn std::error::Error>> {
    let deadline = Instant::now() + LONG;
    loop {
        let status = status(site, number)?;
        if is(&status) {
            return Ok(status);
        }
        if Instant::now() > deadline {
            return Err(format!("host {number} is not {what}: {status}").into());
        }
        thread::sleep(LOOK);
    }
}

/// Fails unless these fields have these values.
fn assert_fields(status: &Value, fields: &[(&str, Value)]) {
    for (field, wanted) in fields {
        assert_eq!(status.pointer(field), Some(wanted), "{field} in {status}");
    }
}

fn status_tells_each_phase_on_both_sides() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let metrics = ["--metrics".to_owned(), format!("0.0.0.0:{METRICS_PORT}")];
        let primary = site.start_primary_with(1, &guest, &volume, &metrics)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let alone = status(site, 1)?;
        assert_fields(
            &alone,
            &[
                ("/name", "guest".into()),
                ("/host", "host1".into()),
                ("/pid", primary.pid().into()),
                ("/role", "primary".into()),
                ("/view", 1.into()),
                ("/protected", false.into()),
                ("/cause", "vmft primary was started".into()),
            ],
        );
        assert_eq!((alone.get("peer"), alone.get("transfer")), (None, None), "{alone}");
        assert!(alone.pointer("/figures/anchors").and_then(Value::as_u64).unwrap_or(0) > 1_000, "{alone}");

        second_monitor_is_refused(site, &guest, &volume)?;
        let backup =
            site.start_backup_with(2, 1, &guest, &volume, &metrics.each_ref().map(String::as_str))?;
        let sending = wait_for_status(site, 1, "sending", |status| status.get("transfer").is_some())?;
        assert_fields(
            &sending,
            &[
                ("/transfer/direction", "sending".into()),
                ("/transfer/host", "host2".into()),
                ("/protected", false.into()),
            ],
        );
        primary.wait_for_line(PROTECTED, LONG)?;
        let client = site.client(load())?;
        more_replies(&client, 50)?;
        protected_on_both_sides(site)?;
        scrape(site, 1, "primary", "lag_seconds")?;
        scrape(site, 2, "backup", "log_queued_bytes")?;

        primary.kill(Signal::SIGKILL)?;
        backup.wait_for_line(TAKEOVER, SHORT)?;
        let taken_over = status(site, 2)?;
        assert_fields(
            &taken_over,
            &[("/role", "primary".into()), ("/view", 3.into()), ("/protected", false.into())],
        );
        assert!(
            taken_over["cause"].as_str().is_some_and(|cause| cause.contains("connection")),
            "{taken_over}"
        );
        more_replies(&client, 20)?;
        site.check(&client.stop(SHORT))?;

        // What the killed one left does not keep another from starting, and that one's end leaves nothing.
        let again = site.start_backup(1, 2, &guest, &volume)?;
        backup.wait_for_line(&format!("{PROTECTED} view=4"), LONG)?;
        assert_fields(&status(site, 1)?, &[("/role", "backup".into()), ("/pid", again.pid().into())]);
        again.kill(Signal::SIGTERM)?;
        assert_eq!(again.wait(SHORT)?.ending, Ending::Exited(0));
        let gone = operate(site, 1, &["status"])?;
        assert_eq!(gone.ending, Ending::Exited(1));
        let said = gone.stderr.join("\n");
        assert!(said.contains("no monitor answers at /run/vmft/guest.sock"), "{said}");
        backup.wait_for_line(UNPROTECTED, SHORT)?;
        let left = status(site, 2)?;
        assert_fields(&left, &[("/view", 5.into()), ("/protected", false.into())]);
        assert!(left["cause"].as_str().is_some_and(|cause| cause.contains("operator")), "{left}");
        Ok(())
    })
}

/// A pair under load in view 2, the primary on host 1.
fn protected_on_both_sides(site: &Site) -> TestResult {
    let counted =
        |status: &Value| status.pointer("/figures/log/bytes_per_s").and_then(Value::as_u64) > Some(0);
    let primary = wait_for_status(site, 1, "sending log", counted)?;
    assert_fields(
        &primary,
        &[
            ("/role", "primary".into()),
            ("/view", 2.into()),
            ("/protected", true.into()),
            ("/peer/host", "host2".into()),
        ],
    );
    for figure in ["/figures/log/batches", "/figures/primary/outputs", "/figures/primary/output_delay_sum_us"]
    {
        assert!(primary.pointer(figure).and_then(Value::as_u64) > Some(0), "{figure} in {primary}");
    }
    let backup = status(site, 2)?;
    assert_fields(
        &backup,
        &[
            ("/role", "backup".into()),
            ("/view", 2.into()),
            ("/protected", true.into()),
            ("/peer/host", "host1".into()),
            ("/peer/address", site.log_address(1).into()),
        ],
    );
    assert!(backup.pointer("/figures/anchors").and_then(Value::as_u64) > Some(1_000), "{backup}");
    let text = operate(site, 2, &["status"])?.stdout.join("\n");
    assert!(text.starts_with("guest guest: backup, view 2\n  protected for "), "{text}");
    Ok(())
}

/// Fails unless Prometheus gets from host `number` the metrics of the `role` of a pair in view 2, and of them `own`, a gauge that
/// only that role has.
fn scrape(site: &Site, number: u8, role: &str, own: &str) -> TestResult {
    let address = SocketAddr::from((site.host(number).address(Link::Guest), METRICS_PORT));
    let mut stream = site.net().connect(address, SHORT)??;
    stream.set_read_timeout(Some(SHORT))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").ok_or("no head")?;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    for line in [format!("# HELP vmft_{own} "), format!("# TYPE vmft_{own} gauge\n")] {
        assert!(body.contains(&line), "no {line:?} in {body}");
    }
    let role = format!("vmft_role{{role=\"{role}\"}} 1\n");
    for wanted in [role.as_str(), "vmft_view 2.0\n", "vmft_protected 1.0\n"] {
        assert!(body.contains(wanted), "no {wanted:?} in {body}");
    }
    Ok(())
}

/// Host 1 has a monitor already, whose socket another does not take.
fn second_monitor_is_refused(site: &mut Site, guest: &Guest, volume: &Volume) -> TestResult {
    let output = site.start_backup(1, 1, guest, volume)?.wait(SHORT)?;
    assert_eq!(output.ending, Ending::Exited(1));
    let said = output.stderr.join("\n");
    assert!(said.contains("a monitor that lives has its control socket at /run/vmft/guest.sock"), "{said}");
    Ok(())
}

/// Runs an operator's command that must succeed.
fn succeed(site: &Site, number: u8, arguments: &[&str]) -> TestResult {
    let output = operate(site, number, arguments)?;
    if output.success() {
        Ok(())
    } else {
        Err(format!("{arguments:?} on host {number}: {}: {:?}", output.ending, output.stderr).into())
    }
}

/// Fails unless an operator's command is refused with this in the sentence.
fn assert_refused(site: &Site, number: u8, arguments: &[&str], with: &str) -> TestResult {
    let output = operate(site, number, arguments)?;
    assert_eq!(output.ending, Ending::Exited(1), "{arguments:?}: {:?}", output.stdout);
    let said = output.stderr.join("\n");
    assert!(said.contains(with), "{arguments:?}: {said}");
    Ok(())
}

/// Who is what, seen from both sides.
fn assert_roles(site: &Site, primary: u8, backup: u8, view: u64) -> TestResult {
    for (number, role, peer) in [(primary, "primary", backup), (backup, "backup", primary)] {
        let peer = format!("host{peer}");
        assert_fields(
            &status(site, number)?,
            &[
                ("/role", role.into()),
                ("/view", view.into()),
                ("/protected", true.into()),
                ("/peer/host", peer.into()),
            ],
        );
    }
    Ok(())
}

fn switches_pauses_and_a_shutdown_lose_nothing() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (first, second) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 30)?;
        for command in ["switch", "pause", "resume", "shutdown", "drop-backup"] {
            let primary = format!("the primary is host1 ({})", site.log_address(1));
            assert_refused(site, 2, &[command], &primary)?;
        }
        switch(site, &first, &second, 3)?;
        more_replies(&client, 30)?;
        switch(site, &second, &first, 5)?;
        more_replies(&client, 30)?;
        assert_eq!((first.ending(), second.ending()), (None, None));
        let claims: Vec<String> = (1..=6).map(|view| format!("guest.view-{view}")).collect();
        assert_eq!(volume.claims()?, claims, "a takeover is a view, and so is each pair");
        pause_and_resume(site, &client, &guest)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;

        succeed(site, 1, &["shutdown"])?;
        for monitor in [&first, &second] {
            let output = monitor.wait(LONG)?;
            assert_eq!(output.ending, Ending::Exited(0), "host {}: {:?}", monitor.host, output.stderr);
            let powered_off =
                output.stderr.iter().any(|line| line.contains(&format!("{GUEST_ENDED} how=\"power-off\"")));
            assert!(powered_off, "host {}: {:?}", monitor.host, output.stderr);
        }
        let pressed = first.output().iter().any(|line| line.contains("the power button was pressed"));
        assert!(pressed, "the guest saw no power button");
        volume.assert_ended()
    })
}

/// Switches the roles of a pair, which takes the guest over in `view`, and is protected again in the one behind.
fn switch(site: &Site, primary: &Monitor, backup: &Monitor, view: u64) -> TestResult {
    succeed(site, primary.host, &["switch"])?;
    println!("{}", backup.wait_for_line(&format!("{TAKEOVER} view={view}"), SHORT)?);
    backup.wait_for_line(&format!("{PROTECTED} view={}", view + 1), SHORT)?;
    assert_roles(site, backup.host, primary.host, view + 1)
}

/// Pauses the guest of a pair in view 6, whose primary is on host 1, for longer than the silence that counts as failure.
fn pause_and_resume(site: &Site, client: &Client, guest: &Guest) -> TestResult {
    succeed(site, 1, &["pause"])?;
    let before = status(site, 1)?;
    assert_fields(&before, &[("/figures/primary/paused", true.into())]);
    let answered = client.answered();
    // Not a condition to wait for: that nothing happens.
    thread::sleep(Duration::from_millis(u64::from(guest.timeout_ms) + 1_000));
    assert!(client.answered() <= answered + 4, "a guest that stands answers no more than what was under way");
    assert_roles(site, 1, 2, 6)?;
    assert_eq!(status(site, 1)?.pointer("/figures/anchors"), before.pointer("/figures/anchors"));
    assert_refused(site, 1, &["shutdown"], "resume it first")?;
    succeed(site, 1, &["resume"])?;
    more_replies(client, 30)
}

/// The guest is not handed to a backup, of view 4, that does not answer: it stays, and that one finds its claim lost.
fn switch_to_a_frozen_backup(site: &Site, primary: &Monitor, backup: &Monitor) -> TestResult {
    backup.kill(Signal::SIGSTOP)?;
    assert_refused(
        site,
        primary.host,
        &["switch"],
        "the roles are not switched: the backup has been silent",
    )?;
    primary.wait_for_line(&format!("{UNPROTECTED} view=5"), SHORT)?;
    backup.kill(Signal::SIGCONT)?;
    let output = backup.wait(SHORT)?;
    assert_eq!(output.ending, Ending::Exited(3), "{:?}", output.stderr);
    Ok(())
}

/// A backup that was handed the guest and cannot claim it, since its storage hangs, loses it to the former primary.
fn switch_to_a_backup_that_cannot_claim(site: &Site, primary: &Monitor, backup: &Monitor) -> TestResult {
    site.host(backup.host).hang_storage();
    assert_refused(
        site,
        primary.host,
        &["switch"],
        "the roles are not switched: the backup did not take the guest over",
    )?;
    primary.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?;
    // Its claim gets through now, too late.
    site.host(backup.host).resume_storage();
    let output = backup.wait(SHORT)?;
    assert_eq!(output.ending, Ending::Exited(3), "{:?}", output.stderr);
    Ok(())
}

fn a_switch_that_fails_leaves_the_guest_where_it_is() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 30)?;
        switch_to_a_backup_that_cannot_claim(site, &primary, &backup)?;
        more_replies(&client, 30)?;
        let another = site.start_backup(3, 1, &guest, &volume)?;
        primary.wait_for_line(&format!("{PROTECTED} view=4"), LONG)?;
        switch_to_a_frozen_backup(site, &primary, &another)?;
        more_replies(&client, 30)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)
    })
}

fn a_backup_that_is_let_go_makes_room_for_another() -> TestResult {
    SITES.run(|site| {
        let (guest, volume) = (Guest::default(), site.volume()?);
        let (primary, backup) = site.start_pair(&guest, &volume)?;
        let client = site.client(load())?;
        more_replies(&client, 30)?;
        succeed(site, 1, &["drop-backup"])?;
        let output = backup.wait(SHORT)?;
        assert_eq!(output.ending, Ending::Exited(0), "{:?}", output.stderr);
        assert!(output.stderr.iter().any(|line| line.contains(DISMISSED)), "{:?}", output.stderr);
        primary.wait_for_line(&format!("{UNPROTECTED} view=3"), SHORT)?;
        assert_refused(site, 1, &["drop-backup"], "no backup that follows")?;
        assert_refused(site, 1, &["switch"], "no backup that follows")?;
        more_replies(&client, 20)?;

        let another = site.start_backup(3, 1, &guest, &volume)?;
        primary.wait_for_line(&format!("{PROTECTED} view=4"), LONG)?;
        assert_roles(site, 1, 3, 4)?;
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;

        succeed(site, 1, &["shutdown", "--force"])?;
        for monitor in [&primary, &another] {
            assert_eq!(monitor.wait(SHORT)?.ending, Ending::Exited(0), "host {}", monitor.host);
        }
        volume.assert_ended()
    })
}

/// The reader of the log on host `number` dies.
fn lose_log_reader(site: &Site, number: u8) -> TestResult {
    site.host(number).run(&["sh", "-c", "kill -9 $(cat /tmp/reader)"], SHORT)?;
    Ok(())
}

/// The reader of the log on host `number` hangs, and its pipe is full.
fn stop_log_reader(site: &Site, number: u8) -> TestResult {
    let script = "kill -STOP $(cat /tmp/reader); head -c 300000 /dev/zero >/tmp/log.pipe & \
                  until grep -q pipe_write /proc/$!/wchan; do usleep 10000; done";
    let output = site.host(number).run(&["sh", "-c", script], SHORT)?;
    if output.success() { Ok(()) } else { Err(format!("the pipe is not full: {:?}", output.stderr).into()) }
}

/// Waits until the monitor on host `number` runs the guest in `view`, with or without a backup.
fn wait_for_primary(site: &Site, number: u8, view: u64, protected: bool) -> TestResult {
    let what = format!("the primary of view {view}, protected: {protected}");
    let status = wait_for_status(site, number, &what, |status| {
        status["role"] == "primary" && status["view"] == view && status["protected"] == protected
    })?;
    println!("host {number}: {what}: {}", status["cause"]);
    Ok(())
}

fn a_log_that_nobody_reads_stops_no_takeover() -> TestResult {
    SITES.run(|site| {
        let (path, script) = LOGGED;
        [1, 2]
            .into_iter()
            .try_for_each(|number| site.host(number).push(Path::new(path), 0o755, script.as_bytes()))?;
        let (guest, volume) = (Guest::default(), site.volume()?);
        let logged = |site: &mut Site, number: u8, primary: u8| {
            let arguments = site.backup_arguments(number, primary, &guest, &volume);
            site.start_program(number, path, &arguments)
        };
        let arguments = site.primary_arguments(1, &guest, &volume);
        let first = site.start_program(1, path, &arguments)?;
        first.wait_for_line(SERVICE_READY, LONG)?;
        let second = site.start_backup(2, 1, &guest, &volume)?;
        wait_for_primary(site, 1, 2, true)?;
        let client = site.client(load())?;
        more_replies(&client, 20)?;

        // A primary whose log is not read loses its backup.
        stop_log_reader(site, 1)?;
        second.kill(Signal::SIGKILL)?;
        wait_for_primary(site, 1, 3, false)?;
        more_replies(&client, 20)?;
        second.wait_ending(SHORT)?;

        // A backup whose log cannot be written loses its primary, and gets a backup then.
        let second = logged(site, 2, 1)?;
        wait_for_primary(site, 1, 4, true)?;
        lose_log_reader(site, 2)?;
        first.kill(Signal::SIGKILL)?;
        wait_for_primary(site, 2, 5, false)?;
        more_replies(&client, 20)?;
        first.wait_ending(SHORT)?;

        // A backup whose log is not read loses its primary.
        let first = logged(site, 1, 2)?;
        wait_for_primary(site, 2, 6, true)?;
        stop_log_reader(site, 1)?;
        second.kill(Signal::SIGKILL)?;
        wait_for_primary(site, 1, 7, false)?;
        more_replies(&client, 20)?;
        let report = client.stop(SHORT);
        println!("{}", report.summary());
        site.check(&report)?;
        first.kill(Signal::SIGTERM)?;
        assert_eq!(first.wait(SHORT)?.ending, Ending::Exited(0));
        volume.assert_ended()
    })
}
