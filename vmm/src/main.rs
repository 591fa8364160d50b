//! The monitor's program: parses the command line, runs the command, gives its exit status.
//!
//! Status 0: as asked. 1: error. 2: wrong command line. 3: another monitor owns the guest. 4: the guest
//! diverged from the log. 5: the guest crashed. 101: a thread panicked.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use nix::sys::signal::{SigHandler, Signal, signal};
use tracing_subscriber::EnvFilter;
use vmft::commands::{self, CommandError};
use vmft::config::Cli;
use vmft::host::log::{self, LogWriter};
use vmft::launch::LaunchError;

fn main() -> ExitCode {
    if let Err(error) = log::start() {
        // Nothing runs yet that this could hold up, and nothing more can be done if it fails.
        let _ = writeln!(io::stderr(), "vmft: this host cannot start a thread: {error}");
        return ExitCode::FAILURE;
    }
    log::end_on_panic();
    let status = run();
    log::flush();
    ExitCode::from(status)
}

fn run() -> u8 {
    // A limit on the size of files is an error of the write that meets it, not the end of the monitor.
    // SAFETY: it installs no handler.
    if let Err(error) = unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) } {
        return failed(&LaunchError::host("ignore a signal")(error.into()).into());
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(wrong) if wrong.use_stderr() => {
            log::line(wrong.render().to_string().trim_end());
            return 2;
        }
        Err(help) => {
            return match help.print().and_then(|()| io::stdout().flush()) {
                Ok(()) => 0,
                Err(source) => failed(&CommandError::Output { source }),
            };
        }
    };
    let level = match cli.verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .log_internal_errors(false)
        .with_writer(LogWriter)
        .init();
    match commands::execute(cli) {
        Ok(ending) => ending.status(),
        Err(error) => failed(&error),
    }
}

fn failed(error: &CommandError) -> u8 {
    log::line(format_args!("vmft: {}", vmft::with_causes(error)));
    error.status()
}
