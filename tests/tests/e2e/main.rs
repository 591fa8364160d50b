//! End-to-end tests: the monitor as a program, real guests, real faults, on test hosts.
//!
//! Each module is about one matter. Tests take a site of [`SITES`], which is booted once and stays for the next test; those
//! about hosts that are made in a particular way boot their own.

mod arbiter;
mod campaign;
mod cli;
mod compute;
mod distribution;
mod doctor;
mod heal;
mod hosts;
mod kernels;
mod operate;
mod pair;
mod replay;
mod standby;

use std::process::ExitCode;

use vmft_tests::harness;
use vmft_tests::pair::SharedSites;

/// Sites for all tests.
static SITES: SharedSites = SharedSites::new(3);

fn main() -> ExitCode {
    let status = harness::run(&[
        ("arbiter", arbiter::CASES),
        ("campaign", campaign::CASES),
        ("cli", cli::CASES),
        ("compute", compute::CASES),
        ("distribution", distribution::CASES),
        ("doctor", doctor::CASES),
        ("heal", heal::CASES),
        ("hosts", hosts::CASES),
        ("kernels", kernels::CASES),
        ("operate", operate::CASES),
        ("pair", pair::CASES),
        ("replay", replay::CASES),
        ("standby", standby::CASES),
    ]);
    SITES.close();
    status
}
