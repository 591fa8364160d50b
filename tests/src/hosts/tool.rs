//! Runs programs of this machine (`ip`, `qemu`, `mke2fs`) with errors that name them.

use std::ffi::OsStr;
use std::process::{Command, Stdio};

use super::HostError;

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
