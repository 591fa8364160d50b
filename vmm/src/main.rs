//! The monitor's program: parses the command line, runs the command, gives its exit status.
//!
//! Status 0: as asked. 1: error. 2: wrong command line. 3: another monitor owns the guest. 4: the guest
//! diverged from the log. 5: the guest crashed.

use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use vmft::commands;
use vmft::config::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let level = match cli.verbose {
        0 => "info",
        1 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt().with_env_filter(filter).with_target(false).with_writer(std::io::stderr).init();
    match commands::execute(cli) {
        Ok(ending) => ExitCode::from(ending.status()),
        Err(error) => {
            eprintln!("vmft: {}", vmft::with_causes(&error));
            ExitCode::from(error.status())
        }
    }
}
