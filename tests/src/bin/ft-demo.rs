//! The program behind `run-ft.sh`: the demo of [`vmft_tests::demo`], with its report on standard output.

use std::process::ExitCode;

use vmft_tests::demo::{self, Options, USAGE};

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(mistake) => {
            eprintln!("run-ft.sh: {mistake}");
            return ExitCode::from(2);
        }
    };
    match demo::run(&options) {
        Ok(report) => {
            println!("{report}");
            if report.failures().is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("run-ft.sh: {error}");
            ExitCode::FAILURE
        }
    }
}
