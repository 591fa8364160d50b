//! What an operator asks of a monitor on this host: `vmft status`, and orders.
//!
//! Owns: how answers are printed. Must never: touch a guest but through its monitor's control socket.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::{CommandError, say};
use crate::config::{ShutdownArgs, StatusArgs, TargetArgs};
use crate::control::client::{ClientError, ask};
use crate::control::protocol::{Answer, Command, Direction, Refusal, Role, Status};
use crate::control::socket;
use crate::launch::{Ending, LaunchError};

/// Why an operator does not get what was asked for.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum OperateError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the monitor refuses: {}", .0.text)]
    Refused(Refusal),
    #[error("{0}")]
    Failed(String),
    #[error("{answer}; but standard output cannot be written: {source}")]
    Unsaid {
        answer: String,
        #[source]
        source: std::io::Error,
    },
}

/// How long an order may take that needs no more than a boundary or a claim.
const ORDER_TIME: Duration = Duration::from_secs(10);
/// How long the pair may take to be protected again with its roles switched: all of the guest's memory is sent.
const SWITCH_TIME: Duration = Duration::from_secs(120);
/// Pause between two looks at how things stand.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The control socket of the monitor that is meant.
fn path(target: &TargetArgs) -> Result<PathBuf, CommandError> {
    Ok(match &target.control {
        Some(path) => path.clone(),
        None => socket::default_path(&target.name)?,
    })
}

/// `vmft status`.
pub fn status(args: &StatusArgs) -> Result<Ending, CommandError> {
    let status = current(&path(&args.target)?)?;
    if args.json {
        let text = serde_json::to_string_pretty(&status)
            .map_err(|error| LaunchError::host("write the status")(error.into()))?;
        say(text)?;
    } else {
        say(text(&status).trim_end())?;
    }
    Ok(Ending::Orderly)
}

/// `vmft switch`: returns when the pair is protected again, the other way round.
pub fn switch(target: &TargetArgs) -> Result<Ending, CommandError> {
    let path = path(target)?;
    let view = current(&path)?.view;
    order(&path, Command::Switch)?;
    let deadline = Instant::now() + SWITCH_TIME;
    loop {
        // The monitor is not there for a moment, while it starts anew.
        if let Ok(Answer::Status(status)) = ask(&path, Command::Status) {
            if status.role == Role::Backup && status.protected {
                let primary = status.peer.map_or_else(|| "the former backup".into(), |peer| peer.to_string());
                return done(format!("{primary} runs the guest now, and {} follows", status.host));
            }
            if status.role == Role::Primary && status.view > view {
                return Err(
                    OperateError::Failed(format!("the roles are not switched: {}", status.cause)).into()
                );
            }
        }
        wait(deadline, SWITCH_TIME, "the pair is not protected again")?;
    }
}

/// `vmft pause`: returns when the guest stands.
pub fn pause(target: &TargetArgs) -> Result<Ending, CommandError> {
    let path = path(target)?;
    let deadline = Instant::now() + ORDER_TIME;
    loop {
        // Again each time: it also takes the guest to a boundary.
        order(&path, Command::Pause)?;
        if current(&path)?.figures.and_then(|figures| figures.primary).is_some_and(|primary| primary.paused) {
            return done("the guest stands".into());
        }
        wait(deadline, ORDER_TIME, "the guest does not stand yet")?;
    }
}

/// `vmft resume`.
pub fn resume(target: &TargetArgs) -> Result<Ending, CommandError> {
    done(order(&path(target)?, Command::Resume)?)
}

/// `vmft shutdown`: presses the guest's power button; with `force`, ends it without asking, and returns when its monitor
/// has ended.
pub fn shutdown(args: &ShutdownArgs) -> Result<Ending, CommandError> {
    let path = path(&args.target)?;
    if !args.force {
        return done(order(&path, Command::Shutdown)?);
    }
    // Said at once, and waited for even if nobody can hear it.
    let said = done(order(&path, Command::PowerOff)?);
    let deadline = Instant::now() + ORDER_TIME;
    while !matches!(ask(&path, Command::Status), Err(ClientError::NoMonitor { .. })) {
        wait(deadline, ORDER_TIME, "its monitor has not ended")?;
    }
    said
}

/// `vmft drop-backup`: returns when the guest runs without it.
pub fn drop_backup(target: &TargetArgs) -> Result<Ending, CommandError> {
    let path = path(target)?;
    let view = current(&path)?.view;
    let said = done(order(&path, Command::DropBackup)?);
    let deadline = Instant::now() + ORDER_TIME;
    while current(&path)?.view == view {
        wait(deadline, ORDER_TIME, "the next view is not claimed")?;
    }
    said
}

/// Says what an order has come to. It is carried out, whether or not this can be said.
fn done(answer: String) -> Result<Ending, CommandError> {
    match say(&answer) {
        Ok(()) => Ok(Ending::Orderly),
        Err(CommandError::Output { source }) => Err(OperateError::Unsaid { answer, source }.into()),
        Err(error) => Err(error),
    }
}

/// Has `command` carried out, and says what the monitor says.
fn order(path: &Path, command: Command) -> Result<String, OperateError> {
    match ask(path, command)? {
        Answer::Done(text) => Ok(text),
        Answer::Refused(refusal) => Err(OperateError::Refused(refusal)),
        Answer::Status(_) => Err(OperateError::Failed("the monitor answered with its status".into())),
    }
}

fn current(path: &Path) -> Result<Box<Status>, OperateError> {
    match ask(path, Command::Status)? {
        Answer::Status(status) => Ok(status),
        Answer::Refused(refusal) => Err(OperateError::Refused(refusal)),
        Answer::Done(text) => Err(OperateError::Failed(format!("the monitor answered '{text}'"))),
    }
}

/// Pauses before another look, unless it is too late for one.
fn wait(deadline: Instant, time: Duration, what: &str) -> Result<(), OperateError> {
    if Instant::now() >= deadline {
        let s = time.as_secs();
        return Err(OperateError::Failed(format!(
            "after {s} s {what}; `vmft status` tells how things stand"
        )));
    }
    std::thread::sleep(LOOK_EVERY);
    Ok(())
}

/// The status as lines for a person.
fn text(status: &Status) -> String {
    let mut out = String::new();
    // Writing to a text cannot fail.
    let _ = lines(status, &mut out);
    out
}

fn lines(status: &Status, out: &mut String) -> std::fmt::Result {
    let Status { name, host, pid, view, version, uptime_s, since_s, cause, .. } = status;
    let role = match status.role {
        Role::None => "neither primary nor backup",
        Role::Primary => "primary",
        Role::Backup => "backup",
        Role::Standby => "standby",
    };
    writeln!(out, "guest {name}: {role}, view {view}")?;
    let protected = if status.protected { "protected" } else { "not protected" };
    writeln!(out, "  {protected} for {since_s} s: {cause}")?;
    if let Some(peer) = &status.peer {
        writeln!(out, "  peer: {peer}")?;
    }
    if let Some(transfer) = &status.transfer {
        let (way, host) = match transfer.direction {
            Direction::Sending => ("sending to", &transfer.host),
            Direction::Receiving => ("receiving from", &transfer.host),
        };
        write!(out, "  transfer: {way} {host}, {} %", transfer.percent)?;
        if let (Some(rounds), Some(pages)) = (transfer.rounds, transfer.pages_again) {
            write!(out, "; {rounds} rounds, {pages} pages again")?;
        }
        writeln!(out)?;
    }
    if let Some(figures) = &status.figures {
        let log = &figures.log;
        writeln!(out, "  at anchor {}", figures.anchors)?;
        write!(out, "  log: {} bytes/s, {} bytes, {} batches", log.bytes_per_s, log.bytes, log.batches)?;
        match log.queued_bytes {
            Some(queued) => writeln!(out, ", {queued} bytes not executed yet")?,
            None => writeln!(out)?,
        }
        if let Some(primary) = &figures.primary {
            if primary.paused {
                writeln!(out, "  the guest is paused")?;
            }
            writeln!(
                out,
                "  lag: {} ms now, {} us median, {} us 99th percentile; guest held up for {} ms",
                primary.lag_ms, primary.lag_p50_us, primary.lag_p99_us, primary.paced_ms
            )?;
            writeln!(
                out,
                "  outputs: {}, {} waiting; delay {} us mean, {} us longest; {} waited for the lease",
                primary.outputs,
                primary.outputs_held,
                primary.output_delay_sum_us.checked_div(primary.outputs).unwrap_or(0),
                primary.output_delay_max_us,
                primary.lease_refusals
            )?;
            writeln!(
                out,
                "  checkpoints: {}, {} pages; pause {} us median, {} us 99th percentile; events wait up to {} ms",
                primary.checkpoints,
                primary.checkpoint_pages,
                primary.checkpoint_pause_p50_us,
                primary.checkpoint_pause_p99_us,
                primary.defer_ms
            )?;
        }
    }
    writeln!(out, "  monitor: process {pid} on {host} for {uptime_s} s, version {version}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::{Figures, LogFigures, Peer, Transfer};

    #[test]
    fn a_person_reads_a_few_lines() {
        let status = Status {
            name: "web".into(),
            host: "beta".into(),
            pid: 17,
            version: "0.1.0+00".into(),
            role: Role::Backup,
            cause: "vmft backup was started".into(),
            peer: Some(Peer { host: Some("alpha".into()), address: "192.0.2.1:7700".into(), listen: None }),
            transfer: Some(Transfer {
                direction: Direction::Receiving,
                host: "alpha".into(),
                percent: 40,
                ..Transfer::default()
            }),
            figures: Some(Figures {
                anchors: 9,
                log: LogFigures { queued_bytes: Some(5), ..LogFigures::default() },
                primary: None,
            }),
            ..Status::default()
        };
        assert_eq!(
            text(&status),
            "guest web: backup, view 0\n\
             \x20 not protected for 0 s: vmft backup was started\n\
             \x20 peer: alpha (192.0.2.1:7700)\n\
             \x20 transfer: receiving from alpha, 40 %\n\
             \x20 at anchor 9\n\
             \x20 log: 0 bytes/s, 0 bytes, 0 batches, 5 bytes not executed yet\n\
             \x20 monitor: process 17 on beta for 0 s, version 0.1.0+00\n"
        );
    }
}
