//! Runs programs of this machine (`ip`, `qemu`, `mke2fs`) with errors that name them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use super::HostError;

/// A program of this machine in the background. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Background {
    child: Child,
    program: String,
    log: PathBuf,
}

impl Background {
    /// Starts a program; what it prints goes to the file `log`.
    pub(super) fn start(command: &mut Command, log: PathBuf) -> Result<Background, HostError> {
        let program = describe(command);
        let output = File::create(&log).map_err(HostError::file(&log))?;
        let errors = output.try_clone().map_err(HostError::file(&log))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|source| HostError::Tool { program: program.clone(), source })?;
        Ok(Background { child, program, log })
    }

    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// The error to report if it has ended by itself.
    pub(super) fn check(&mut self) -> Result<(), HostError> {
        match self.child.try_wait() {
            Ok(Some(status)) => Err(HostError::ToolFailed {
                program: self.program.clone(),
                status: status.to_string(),
                stderr: self.log(),
            }),
            _ => Ok(()),
        }
    }

    /// What it has printed.
    pub(super) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Number of the process.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            // It has not been waited for, so the number is its own; an error means that it has just ended.
            let _ = signal::kill(Pid::from_raw(self.child.id() as i32), signal);
        }
    }

    /// Kills it if it still runs, and waits for its end.
    pub(super) fn kill(&mut self) {
        // Errors mean that it has ended before.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Runs a command line to its end and returns its standard output. Words are separated by spaces.
pub(super) fn run(line: &str) -> Result<String, HostError> {
    let mut words = line.split_whitespace();
    output(Command::new(words.next().unwrap_or_default()).args(words))
}

/// Runs a command to its end and returns its standard output.
pub(super) fn output(command: &mut Command) -> Result<String, HostError> {
    let program = describe(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| HostError::Tool { program: program.clone(), source })?;
    if !output.status.success() {
        return Err(HostError::ToolFailed {
            program,
            status: output.status.to_string(),
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The command as a person would type it.
pub(super) fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
