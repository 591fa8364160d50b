//! `--fence-cmd`: a command that makes sure of the old primary's host before the guest goes on here.
//!
//! Owns: running it, its time limit, and its repetition. Must never: let the guest go on after anything but exit status
//! 0, or leave a process of a command behind that took too long.
//!
//! ```text
//!   claim won ──> command ─┬─ status 0 in time ──> the guest goes on
//!      ^                   └─ any other end, or none in time (killed) ──> said; pause ─┐
//!      └──────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! The command runs without a shell, in a process group of its own, with no input; what it prints is read line by line
//! and becomes lines of the monitor's log: it never waits for whoever reads those. It is told what happened by its environment:
//!
//! | `VMFT_GUEST` | the guest's name |
//! | `VMFT_VIEW` | the view that was claimed |
//! | `VMFT_PEER_HOST` | the name of the other monitor's host |
//! | `VMFT_PEER_ADDRESS` | its IP address on the log link |
//! | `VMFT_REASON` | why it counts as lost, in a sentence |
//!
//! Not covered: a command that says 0 and has done nothing.

use std::fmt;
use std::io::{self, BufRead, BufReader, PipeReader, Read};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigHandler, SigSet, Signal, killpg, signal};
use nix::unistd::Pid;
use thiserror::Error;

use crate::host::LogEvent;
use crate::host::spawn;
use crate::run::StopSignal;

/// Pause before a command that failed is run again.
const AGAIN: Duration = Duration::from_secs(1);
/// Pause between two looks at whether a command has ended.
const POLL: Duration = Duration::from_millis(10);

/// Longest line of a command's output; what is longer becomes several.
const OUTPUT_LINE_BYTES: u64 = 4 << 10;

/// Why a command has not fenced, or cannot.
#[derive(Debug, Error)]
pub enum FenceError {
    /// It is not there, or not a program.
    #[error("--fence-cmd: '{program}' cannot be run: {why}")]
    NotAProgram {
        /// As given.
        program: String,
        /// What is wrong with it.
        why: String,
    },
    /// It could not be started or watched.
    #[error("'{program}' cannot be run: {source}")]
    Host {
        /// As given.
        program: String,
        /// What the host said.
        source: io::Error,
    },
    /// It said no.
    #[error("'{program}' ended with {how}, and not with exit status 0")]
    Failed {
        /// As given.
        program: String,
        /// Its exit status or signal.
        how: String,
    },
    /// It was killed, since the monitor is to stop.
    #[error("'{program}' was killed, since this monitor is to stop")]
    Stopped {
        /// As given.
        program: String,
    },
    /// It was killed, since it took too long.
    #[error("'{program}' did not end within {limit_ms} ms (--fence-timeout-ms) and was killed")]
    Hung {
        /// As given.
        program: String,
        /// The limit.
        limit_ms: u64,
    },
}

/// What `--fence-cmd` says: a program by its absolute path, and its arguments, quoted as for a shell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FenceCommand {
    program: String,
    arguments: Vec<String>,
}

impl FromStr for FenceCommand {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words = shlex::split(text).ok_or_else(|| format!("a quote in '{text}' is not closed"))?;
        let mut words = words.into_iter();
        match words.next() {
            Some(program) if program.starts_with('/') => Ok(Self { program, arguments: words.collect() }),
            Some(program) => Err(format!("'{program}' is not the absolute path of a program")),
            None => Err("the program is missing".into()),
        }
    }
}

/// What the command is told.
#[derive(Clone, Debug)]
pub struct Occasion {
    /// The guest's name.
    pub guest: String,
    /// The view that was claimed.
    pub view: u64,
    /// The name of the other monitor's host.
    pub peer_host: String,
    /// Its address on the log link.
    pub peer_address: IpAddr,
    /// Why it counts as lost.
    pub reason: String,
}

/// A command that can be run.
#[derive(Clone, Debug)]
pub struct Fence {
    command: FenceCommand,
    limit: Duration,
}

impl Fence {
    /// Checks that the program of `command` is there. Each run of it may take `limit`.
    pub fn new(command: &FenceCommand, limit: Duration) -> Result<Self, FenceError> {
        let refused = |why: String| FenceError::NotAProgram { program: command.program.clone(), why };
        let found =
            std::fs::metadata(Path::new(&command.program)).map_err(|error| refused(error.to_string()))?;
        if !found.is_file() || found.permissions().mode() & 0o111 == 0 {
            return Err(refused("it is not an executable file".into()));
        }
        Ok(Self { command: command.clone(), limit })
    }

    /// Runs the command until it says 0. False: `stop` was set first.
    pub fn until_done(&self, occasion: &Occasion, stop: &StopSignal) -> bool {
        let started = Instant::now();
        tracing::warn!(view = occasion.view, peer = %occasion.peer_host, command = %self,
            "fencing the other host: the guest waits for this command");
        while !stop.is_set() {
            match self.run(occasion, stop) {
                Ok(()) => {
                    let took_ms = started.elapsed().as_millis() as u64;
                    tracing::warn!(view = occasion.view, took_ms, "the other host is fenced");
                    return true;
                }
                Err(error) => tracing::error!(
                    event = %LogEvent::NotFenced,
                    view = occasion.view,
                    "not fenced, so the guest waits; trying again: {error}"
                ),
            }
            stop.wait(AGAIN);
        }
        false
    }

    fn run(&self, occasion: &Occasion, stop: &StopSignal) -> Result<(), FenceError> {
        let program = || self.command.program.clone();
        let failed = |source| FenceError::Host { program: program(), source };
        let (output, printed) = io::pipe().map_err(failed)?;
        // Not waited for: what the command leaves running may keep its end of the pipe for as long as it likes.
        spawn("fence-output", move || log_output(output)).map_err(failed)?;
        let mut command = Command::new(&self.command.program);
        // SAFETY: between fork and exec this makes two system calls that may be made there, and allocates nothing.
        unsafe { command.pre_exec(restore_signals) };
        let child = command
            .args(&self.command.arguments)
            .env("VMFT_GUEST", &occasion.guest)
            .env("VMFT_VIEW", occasion.view.to_string())
            .env("VMFT_PEER_HOST", &occasion.peer_host)
            .env("VMFT_PEER_ADDRESS", occasion.peer_address.to_string())
            .env("VMFT_REASON", &occasion.reason)
            .stdin(Stdio::null())
            .stdout(Stdio::from(printed.try_clone().map_err(failed)?))
            .stderr(Stdio::from(printed))
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        // It has this process's ends of the pipe.
        drop(command);
        let mut group = Group { leader: child, ended: false };
        let deadline = Instant::now() + self.limit;
        loop {
            match group.try_wait().map_err(failed)? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(FenceError::Failed { program: program(), how: how(status) }),
                None if stop.is_set() => return Err(FenceError::Stopped { program: program() }),
                None if Instant::now() >= deadline => {
                    return Err(FenceError::Hung {
                        program: program(),
                        limit_ms: self.limit.as_millis() as u64,
                    });
                }
                None => {
                    stop.wait(POLL);
                }
            }
        }
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.command.program)?;
        self.command.arguments.iter().try_for_each(|argument| write!(f, " {argument}"))
    }
}

/// A command and what it has started. Killed on drop, unless the command has ended.
struct Group {
    leader: Child,
    ended: bool,
}

impl Group {
    fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let status = self.leader.try_wait()?;
        self.ended = status.is_some();
        Ok(status)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.ended {
            // Its leader has not been waited for, so the number is not another group's. Errors mean that it is gone.
            let _ = killpg(Pid::from_raw(self.leader.id() as i32), Signal::SIGKILL);
            let _ = self.leader.wait();
        }
    }
}

/// The monitor's threads block the signals that stop it, and ignore one; a command needs them.
fn restore_signals() -> io::Result<()> {
    // SAFETY: it installs no handler.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigDfl) }?;
    SigSet::empty().thread_set_mask().map_err(io::Error::from)
}

/// Logs what a command prints, until nobody has its end of the pipe any more.
fn log_output(output: PipeReader) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    while matches!(output.by_ref().take(OUTPUT_LINE_BYTES).read_until(b'\n', &mut line), Ok(len) if len > 0) {
        tracing::warn!("the fence command says: {}", String::from_utf8_lossy(line.trim_ascii_end()));
        line.clear();
    }
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "no status".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::run::StopKind;
    use std::thread;

    fn occasion() -> Occasion {
        Occasion {
            guest: "web-1".into(),
            view: 7,
            peer_host: "node-a".into(),
            peer_address: IpAddr::from([192, 0, 2, 1]),
            reason: "the primary is silent".into(),
        }
    }

    fn shell(script: &str, limit: Duration) -> Fence {
        let command = FenceCommand { program: "/bin/sh".into(), arguments: vec!["-c".into(), script.into()] };
        Fence::new(&command, limit).unwrap()
    }

    fn run(script: &str) -> Result<(), FenceError> {
        shell(script, Duration::from_secs(20)).run(&occasion(), &StopSignal::default())
    }

    #[test]
    fn only_exit_status_0_counts() {
        run("exit 0").unwrap();
        for (script, how) in
            [("exit 1", "exit status 1"), ("exit 255", "exit status 255"), ("kill -9 $$", "signal 9")]
        {
            let error = run(script).unwrap_err();
            assert!(matches!(error, FenceError::Failed { .. }) && error.to_string().contains(how), "{error}");
        }
    }

    #[test]
    fn a_command_can_be_stopped_although_the_monitor_blocks_signals() {
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let error = run("kill -TERM $$; exit 0").unwrap_err();
        assert!(error.to_string().contains("signal 15"), "{error}");
    }

    #[test]
    fn the_command_is_told_what_happened_and_has_no_input() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("told");
        let names = "$VMFT_GUEST|$VMFT_VIEW|$VMFT_PEER_HOST|$VMFT_PEER_ADDRESS|$VMFT_REASON";
        run(&format!("echo \"{names}|$(cat)\" >{}", file.display())).unwrap();
        let told = fs::read_to_string(file).unwrap();
        assert_eq!(told, "web-1|7|node-a|192.0.2.1|the primary is silent|\n");
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_all_that_it_has_started() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("sleep 600 & echo $! >{}; wait", file.display());
        let error =
            shell(&script, Duration::from_millis(500)).run(&occasion(), &StopSignal::default()).unwrap_err();
        assert!(matches!(error, FenceError::Hung { .. }), "{error}");
        assert!(error.to_string().contains("within 500 ms (--fence-timeout-ms)"), "{error}");
        let pid = fs::read_to_string(&file).unwrap();
        let state = format!("/proc/{}/stat", pid.trim());
        let deadline = Instant::now() + Duration::from_secs(20);
        // Gone, or waiting for init to look at it.
        while fs::read_to_string(&state).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < deadline, "it still runs");
        }
    }

    #[test]
    fn a_command_is_run_again_until_it_says_0_or_the_monitor_is_stopped() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tries");
        let second = format!("echo >>{0}; [ $(wc -l <{0}) = 2 ]", file.display());
        assert!(shell(&second, Duration::from_secs(20)).until_done(&occasion(), &StopSignal::default()));
        assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 2);
        let begun = directory.path().join("begun");
        let endless = shell(&format!("touch {}; sleep 600", begun.display()), Duration::from_secs(600));
        let stop = StopSignal::default();
        thread::scope(|scope| {
            let ended = scope.spawn(|| endless.until_done(&occasion(), &stop));
            while !begun.exists() {
                thread::yield_now();
            }
            stop.set(StopKind::Leave);
            assert!(!ended.join().unwrap());
        });
    }

    #[test]
    fn commands_are_parsed_or_refused() {
        let parsed: FenceCommand = "/sbin/fence --host 'a b' -x".parse().unwrap();
        assert_eq!(parsed.program, "/sbin/fence");
        assert_eq!(parsed.arguments, ["--host", "a b", "-x"]);
        for (text, why) in [
            ("", "program is missing"),
            ("fence now", "'fence' is not the absolute path"),
            ("/sbin/fence 'a", "is not closed"),
        ] {
            let refusal = text.parse::<FenceCommand>().unwrap_err();
            assert!(refusal.contains(why), "{text}: {refusal}");
        }
        for program in ["/none", "/", "/etc/passwd"] {
            let command = program.parse().unwrap();
            let refusal = Fence::new(&command, AGAIN).unwrap_err();
            assert!(matches!(refusal, FenceError::NotAProgram { .. }), "{program}: {refusal}");
        }
    }
}
