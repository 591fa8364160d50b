//! A host of the demo and a monitor at work on it, wherever the host is.
//!
//! Owns: the two interfaces, their use of test hosts, and the passing on of what a monitor prints. Must never: know
//! what a monitor is for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::DemoError;
use crate::events::FIGURES;
use crate::hosts::{Ending, HostProcess, TestHost};

/// How often the output of a monitor is passed on.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(20);
/// Limit for a command that only touches files or asks a monitor.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

/// One of the two hosts.
pub(super) trait Host {
    /// Name for people.
    fn name(&self) -> String;
    /// Starts a program.
    fn start(&self, argv: &[&str]) -> Result<Arc<dyn Monitor>, DemoError>;
    /// Runs a shell command to its end, which must be a success; returns what it printed.
    fn shell(&self, script: &str) -> Result<String, DemoError>;
}

/// A program at work on a host.
pub(super) trait Monitor: Send + Sync {
    /// The lines of both its streams behind the first `seen`.
    fn lines_from(&self, seen: usize) -> Vec<String>;
    /// What it has printed on standard output after the last line end.
    fn unfinished_line(&self) -> String;
    /// How it ended, if it has.
    fn ending(&self) -> Option<Ending>;
    /// Kills it with SIGKILL.
    fn kill(&self) -> Result<(), DemoError>;

    /// Waits for a line behind the first `seen` that `wanted` accepts; returns it and the number of lines up to its
    /// end. `None`: it did not come in time, or the program has ended without it.
    fn wait_for(
        &self,
        mut seen: usize,
        timeout: Duration,
        wanted: &dyn Fn(&str) -> bool,
    ) -> Option<(String, usize)> {
        let deadline = Instant::now() + timeout;
        loop {
            // Asked for first: what it printed before its end counts.
            let over = self.ending().is_some() || Instant::now() > deadline;
            for line in self.lines_from(seen) {
                seen += 1;
                if wanted(&line) {
                    return Some((line, seen));
                }
            }
            if over {
                return None;
            }
            thread::sleep(FOLLOW_INTERVAL);
        }
    }
}

impl Host for TestHost {
    fn name(&self) -> String {
        format!("host {}", self.index())
    }

    fn start(&self, argv: &[&str]) -> Result<Arc<dyn Monitor>, DemoError> {
        Ok(Arc::new(self.spawn(argv)?))
    }

    fn shell(&self, script: &str) -> Result<String, DemoError> {
        let output = self.run(&["sh", "-c", script], COMMAND_TIMEOUT)?;
        if output.success() {
            return Ok(output.stdout.join("\n"));
        }
        let (command, said) = (script.to_owned(), output.stderr.join("; "));
        Err(DemoError::Command { command, host: Host::name(self), ending: output.ending.to_string(), said })
    }
}

impl Monitor for HostProcess {
    fn lines_from(&self, seen: usize) -> Vec<String> {
        self.output_from(seen)
    }

    fn unfinished_line(&self) -> String {
        HostProcess::unfinished_line(self)
    }

    fn ending(&self) -> Option<Ending> {
        HostProcess::ending(self)
    }

    fn kill(&self) -> Result<(), DemoError> {
        Ok(HostProcess::kill(self, Signal::SIGKILL)?)
    }
}

/// Passes what a monitor prints on to standard error, until it is dropped.
pub(super) struct Follower {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Follower {
    /// Puts `name` before each line. Leaves out the figures that the report is made of.
    pub(super) fn start(name: String, monitor: Arc<dyn Monitor>) -> Follower {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut seen = 0;
            loop {
                // Asked for first, so that the last lines are not lost.
                let last = stopped.load(Ordering::SeqCst);
                let lines = monitor.lines_from(seen);
                seen += lines.len();
                for line in lines.iter().filter(|line| !line.contains(FIGURES)) {
                    eprintln!("{name} | {line}");
                }
                if last {
                    return;
                }
                thread::sleep(FOLLOW_INTERVAL);
            }
        });
        Follower { stop, thread: Some(thread) }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("The output of a monitor could not be passed on.");
        }
    }
}
