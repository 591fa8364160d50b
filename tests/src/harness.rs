//! Runs end-to-end tests one after the other and says honestly which could not run.
//!
//! A test names what it needs of the machine ([`Need`]). If something is missing, the test is skipped, the reason is
//! printed, and the summary counts it. With `VMFT_REQUIRE_ALL=1` in the environment it fails instead: for machines
//! that are meant to have everything. The last line is `N passed, N failed, N skipped`.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use libtest_mimic::{Arguments, Failed, Trial};

use crate::hosts;

/// What a test returns: any error fails it.
pub type TestResult = Result<(), Box<dyn Error>>;

/// Something that a machine must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// The right to make network namespaces.
    Root,
    /// /dev/net/tun.
    Tun,
    /// etcd and its control program.
    Etcd,
    /// debootstrap, and the keys of Debian's archive.
    Debootstrap,
    /// Debian's archive, or what was fetched from it before.
    DebianArchive,
    /// QEMU, its virtiofsd and what `guest-images/build.sh` uses.
    Qemu,
}

/// All that test hosts need.
pub const TEST_HOSTS: &[Need] = &[Need::Root, Need::Tun, Need::Qemu];

impl Need {
    /// Why this machine does not have it.
    fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!nix::unistd::geteuid().is_root()).then(|| "it needs root".to_owned()),
            Need::Tun => missing_file("/dev/net/tun"),
            Need::Etcd => ["etcd", "etcdctl"].into_iter().find_map(missing_program),
            Need::Debootstrap => missing_program("debootstrap")
                .or_else(|| missing_file("/usr/share/keyrings/debian-archive-keyring.gpg")),
            Need::DebianArchive => hosts::archive_missing(),
            Need::Qemu => ["ip", "tc", "qemu-system-x86_64", "busybox", "cpio", "modprobe", "mke2fs"]
                .into_iter()
                .find_map(missing_program)
                .or_else(|| missing_file("/usr/lib/qemu/virtiofsd")),
        }
    }
}

fn missing_file(path: &str) -> Option<String> {
    (!Path::new(path).exists()).then(|| format!("there is no {path}"))
}

fn missing_program(name: &str) -> Option<String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|dir| dir.join(name).exists());
    (!found).then(|| format!("the program '{name}' is not installed"))
}

/// Why this machine does not have all of `needs`; `None` if it has.
pub fn first_missing(needs: &[Need]) -> Option<String> {
    needs.iter().find_map(|need| need.missing())
}

/// A test.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name: what it shows.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// The test itself. It fails by an error or a panic.
    pub run: fn() -> TestResult,
}

impl Case {
    /// A test that needs all that test hosts need.
    pub const fn on_hosts(name: &'static str, run: fn() -> TestResult) -> Case {
        Case { name, needs: TEST_HOSTS, run }
    }
}

/// Runs the tests that the command line selects, as `cargo test` does. For the `main` of a test without harness.
pub fn run(cases: &[Case]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    // The hosts of one test use all processors of a small machine.
    arguments.test_threads = Some(1);
    let require_all = std::env::var_os("VMFT_REQUIRE_ALL").is_some_and(|value| value == "1");
    let trials = cases.iter().map(|&case| trial(case, require_all)).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        let (passed, failed) = (conclusion.num_passed, conclusion.num_failed);
        println!("{passed} passed, {failed} failed, {} skipped", conclusion.num_ignored);
    }
    conclusion.exit_code()
}

/// Runs a test and says how long it took, since what is slow here is slow for everybody.
fn timed(case: Case) -> Result<(), Failed> {
    let started = Instant::now();
    let result = (case.run)().map_err(|error| Failed::from(error.to_string()));
    eprintln!("{} took {:.0} s", case.name, started.elapsed().as_secs_f64());
    result
}

fn trial(case: Case, require_all: bool) -> Trial {
    match first_missing(case.needs) {
        None => Trial::test(case.name, move || timed(case)),
        Some(reason) if require_all => {
            Trial::test(case.name, move || Err(format!("This machine cannot run it: {reason}.").into()))
        }
        Some(reason) => {
            eprintln!("SKIPPED {}: {reason}", case.name);
            Trial::test(case.name, || Ok(())).with_ignored_flag(true)
        }
    }
}
