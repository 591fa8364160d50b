//! Why something on a test host failed.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// A failure of a test host, its network or a process on it.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A program of this machine could not be started.
    #[error("Cannot run '{program}': {source}; is it installed, and are you root?")]
    Tool {
        /// The program and its arguments.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program of this machine failed.
    #[error("'{program}' failed with {status}: {stderr}")]
    ToolFailed {
        /// The program and its arguments.
        program: String,
        /// Its exit status.
        status: String,
        /// What it said.
        stderr: String,
    },
    /// A file or directory of this machine could not be used.
    #[error("Cannot use {path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The test's network namespace cannot be entered.
    #[error("Cannot enter the network namespace '{namespace}': {reason}")]
    Namespace {
        /// Its name.
        namespace: String,
        /// Why.
        reason: String,
    },
    /// A host did not come up.
    #[error("Host {host} did not start within {timeout:?}: {reason}. The end of its console:\n{console}")]
    Boot {
        /// Name of the host.
        host: String,
        /// The limit.
        timeout: Duration,
        /// What is missing.
        reason: String,
        /// The last lines of its console.
        console: String,
    },
    /// The agent does not answer: the host is dead, stopped or cut off.
    #[error("Host {host} does not answer: {source}. The end of its console:\n{console}")]
    Unreachable {
        /// Name of the host.
        host: String,
        /// Why.
        source: io::Error,
        /// The last lines of its console.
        console: String,
    },
    /// The agent refused a request.
    #[error("Host {host} refused: {reason}")]
    Refused {
        /// Name of the host.
        host: String,
        /// What the agent said.
        reason: String,
    },
    /// A process did not do what was waited for in time.
    #[error(
        "{what} did not happen within {timeout:?} in '{command}' on host {host}. The end of its output:\n{output}"
    )]
    Timeout {
        /// What was waited for.
        what: String,
        /// The limit.
        timeout: Duration,
        /// The process.
        command: String,
        /// Name of the host.
        host: String,
        /// The last lines of its output.
        output: String,
    },
    /// A process ended, or its host was lost, before it did what was waited for.
    #[error(
        "{what} cannot happen any more: '{command}' on host {host} {ending}. The end of its output:\n{output}"
    )]
    Ended {
        /// What was waited for.
        what: String,
        /// The process.
        command: String,
        /// Name of the host.
        host: String,
        /// How it ended.
        ending: String,
        /// The last lines of its output.
        output: String,
    },
}

impl HostError {
    /// For `map_err`: names the path that could not be used.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> HostError {
        let path = path.into();
        move |source| HostError::File { path, source }
    }
}
