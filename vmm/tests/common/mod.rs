//! The monitor's program, run to its end by tests that need neither KVM nor another host.

use std::fs;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Limit for what takes less than a second: a process that is still there after it hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// The monitor with the words of `line`; its standard output goes nowhere.
pub fn vmft(line: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmft"));
    command.args(line.split_whitespace()).stdout(Stdio::null()).env_remove("RUST_LOG");
    command
}

/// Runs `command` to its end, which must come.
pub fn end_of(command: &mut Command) -> ExitStatus {
    let mut child = command.stdin(Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{command:?} hangs");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// As [`end_of`]. Also what it has written to standard error.
pub fn end_and_stderr(command: &mut Command) -> (ExitStatus, String) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let status = end_of(command.stderr(file.reopen().unwrap()));
    (status, fs::read_to_string(file.path()).unwrap())
}
