//! A short campaign of faults: each of several kinds once, on three hosts, under clients whose history is checked.
//!
//! `make campaign SEED=.. FAULTS=..` runs others; docs/reliability.md says what they do and what longer ones gave.

use vmft_tests::campaign;
use vmft_tests::harness::{Case, TestResult};

/// Of its first faults, each is of another kind.
const SEED: u64 = 1;
const FAULTS: usize = 5;

/// The tests.
pub const CASES: &[Case] =
    &[Case::on_hosts("short_campaign_is_survived", short_campaign_is_survived).alone()];

fn short_campaign_is_survived() -> TestResult {
    let failures = campaign::run(SEED, FAULTS)?.failures();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n").into()) }
}
