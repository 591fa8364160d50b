//! `vmft-campaign SEED FAULTS`: a campaign of faults on three test hosts; `make campaign` runs it.
//!
//! Status: 0 if all held, 1 if something did not, 2 for a wrong command line.

use std::process::ExitCode;

use vmft_tests::campaign;
use vmft_tests::harness::{TEST_HOSTS, first_missing};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match &arguments[..] {
        [seed, faults] => seed.parse().ok().zip(faults.parse().ok()),
        _ => None,
    };
    let Some((seed, faults)) = parsed else {
        eprintln!("vmft-campaign SEED FAULTS: two numbers");
        return ExitCode::from(2);
    };
    if let Some(why) = first_missing(TEST_HOSTS) {
        eprintln!("This machine cannot run a campaign: {why}.");
        return ExitCode::FAILURE;
    }
    match campaign::run(seed, faults) {
        Ok(report) if report.failures().is_empty() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
