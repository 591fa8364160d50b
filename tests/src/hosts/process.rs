//! A process on a test host, as the test sees it: its output so far and how it ended.
//!
//! States: running -> exited(status) | killed(signal) | lost (the connection broke: the host is dead, or the
//! control link is cut). Dropping the handle of a running process kills the process.

use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::HostError;
use super::host::{Answers, tail};
use super::protocol::{self, Event, Request, Stream};

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(i32),
    /// Unknown: the connection to its host broke for this reason.
    Lost(String),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ending::Exited(status) => write!(f, "exited with status {status}"),
            Ending::Killed(signal) => write!(f, "was killed by signal {signal}"),
            Ending::Lost(reason) => write!(f, "was lost with its host ({reason})"),
        }
    }
}

/// What a process did, once it has ended.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended; never [`Ending::Lost`] in the result of [`HostProcess::wait`].
    pub ending: Ending,
    /// Lines of its standard output.
    pub stdout: Vec<String>,
    /// Lines of its standard error.
    pub stderr: Vec<String>,
}

impl Output {
    /// True if it exited with status 0.
    pub fn success(&self) -> bool {
        self.ending == Ending::Exited(0)
    }
}

#[derive(Debug)]
struct Line {
    stream: Stream,
    at: Instant,
    text: String,
}

#[derive(Debug, Default)]
struct Progress {
    lines: Vec<Line>,
    /// The start of a line of standard output that has no end yet.
    unfinished: String,
    ending: Option<Ending>,
}

impl Progress {
    fn lines_of(&self, wanted: Stream) -> Vec<String> {
        self.lines.iter().filter(|line| line.stream == wanted).map(|line| line.text.clone()).collect()
    }
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

impl Shared {
    fn said(&self, stream: Stream, text: String) {
        let mut progress = self.progress();
        if stream == Stream::Stdout {
            progress.unfinished.clear();
        }
        progress.lines.push(Line { stream, at: Instant::now(), text });
        drop(progress);
        self.changed.notify_all();
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A process on a test host.
#[derive(Debug)]
pub struct HostProcess {
    host: String,
    command: String,
    pid: u32,
    control: Arc<TcpStream>,
    shared: Arc<Shared>,
}

impl HostProcess {
    /// Follows a process whose agent has sent its first answer.
    pub(super) fn attach(
        host: String,
        command: String,
        control: Arc<TcpStream>,
        answers: Answers,
    ) -> Result<HostProcess, HostError> {
        let Event::Started { pid } = answers.first else {
            let reason = format!("'{command}' did not start: {:?}", answers.first);
            return Err(HostError::Refused { host, reason });
        };
        let shared = Arc::new(Shared::default());
        let follower = Arc::clone(&shared);
        let mut reader = answers.reader;
        thread::spawn(move || {
            loop {
                let ending = match protocol::receive(&mut reader) {
                    Ok(Some(Event::Line(stream, text))) => {
                        follower.said(stream, text);
                        continue;
                    }
                    Ok(Some(Event::Unfinished(stream, text))) => {
                        if stream == Stream::Stdout {
                            follower.progress().unfinished = text;
                        }
                        continue;
                    }
                    Ok(Some(Event::Exited(status))) => Ending::Exited(status),
                    Ok(Some(Event::Killed(signal))) => Ending::Killed(signal),
                    Ok(Some(other)) => Ending::Lost(format!("unexpected message {other:?}")),
                    Ok(None) => Ending::Lost("connection closed".into()),
                    Err(error) => Ending::Lost(error.to_string()),
                };
                follower.progress().ending = Some(ending);
                follower.changed.notify_all();
                return;
            }
        });
        Ok(HostProcess { host, command, pid, control, shared })
    }

    /// Number of the process on its host.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for a line, of either stream, that contains `text`; lines from before the call count. Returns it.
    pub fn wait_for_line(&self, text: &str, timeout: Duration) -> Result<String, HostError> {
        let found = |progress: &Progress| {
            progress.lines.iter().map(|line| &line.text).find(|line| line.contains(text)).cloned()
        };
        self.wait_until(&format!("A line with '{text}'"), timeout, found)
    }

    /// Waits for the end of the process.
    pub fn wait(&self, timeout: Duration) -> Result<Output, HostError> {
        self.wait_until("The end", timeout, |progress| match &progress.ending {
            Some(Ending::Lost(_)) | None => None,
            Some(ending) => Some(Output {
                ending: ending.clone(),
                stdout: progress.lines_of(Stream::Stdout),
                stderr: progress.lines_of(Stream::Stderr),
            }),
        })
    }

    /// Waits until the process has ended or its host is lost.
    pub fn wait_ending(&self, timeout: Duration) -> Result<Ending, HostError> {
        self.wait_until("The end", timeout, |progress| progress.ending.clone())
    }

    /// How the process ended, if it has.
    pub fn ending(&self) -> Option<Ending> {
        self.shared.progress().ending.clone()
    }

    /// All lines of both streams so far, in the order in which they arrived.
    pub fn output(&self) -> Vec<String> {
        self.output_from(0)
    }

    /// The lines that came after the first `seen` of them, to follow a process as it goes.
    pub fn output_from(&self, seen: usize) -> Vec<String> {
        self.shared.progress().lines.iter().skip(seen).map(|line| line.text.clone()).collect()
    }

    /// What it has printed on standard output after the last line end.
    pub fn unfinished_line(&self) -> String {
        self.shared.progress().unfinished.clone()
    }

    /// All lines of both streams so far, each with the time of its arrival here.
    pub fn timed_output(&self) -> Vec<(Instant, String)> {
        self.shared.progress().lines.iter().map(|line| (line.at, line.text.clone())).collect()
    }

    /// Sends a signal to the process and its group.
    pub fn kill(&self, signal: Signal) -> Result<(), HostError> {
        protocol::send(&mut &*self.control, &Request::Signal(signal as i32)).map_err(|source| {
            HostError::Unreachable { host: self.host.clone(), source, console: String::new() }
        })
    }

    /// Waits until `done` gives a result, the process has ended without one, or time is up.
    fn wait_until<T>(
        &self,
        what: &str,
        timeout: Duration,
        done: impl Fn(&Progress) -> Option<T>,
    ) -> Result<T, HostError> {
        let deadline = Instant::now() + timeout;
        let mut progress = self.shared.progress();
        loop {
            if let Some(result) = done(&progress) {
                return Ok(result);
            }
            let output = |progress: &Progress| {
                let lines: Vec<&str> = progress.lines.iter().map(|line| line.text.as_str()).collect();
                tail(&lines.join("\n"))
            };
            let (what, command, host) = (what.to_owned(), self.command.clone(), self.host.clone());
            if let Some(ending) = &progress.ending {
                let ending = ending.to_string();
                return Err(HostError::Ended { what, command, host, ending, output: output(&progress) });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HostError::Timeout { what, timeout, command, host, output: output(&progress) });
            }
            progress =
                self.shared.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for HostProcess {
    fn drop(&mut self) {
        // The agent kills the process when the connection ends. It may have ended already.
        let _ = self.control.shutdown(Shutdown::Both);
    }
}
