//! Runs end-to-end tests, a few at the same time, and says honestly which could not run.
//!
//! Each of the tests that run at the same time has hosts of its own, in a network of its own. So they share this machine's
//! processors and nothing else; a test that needs these too says so ([`Case::alone`]) and runs when no other does.
//!
//! A test names what it needs of the machine ([`Need`]). If something is missing, the test is skipped, the reason is
//! printed, and the summary counts it. With `VMFT_REQUIRE_ALL=1` in the environment it fails instead: for machines
//! that are meant to have everything. The last line is `N passed, N failed, N skipped`.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{PoisonError, RwLock};
use std::thread;
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

/// A module of tests: its name, and what it has.
pub type Module = (&'static str, &'static [Case]);

/// A test.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Its name: what it shows.
    pub name: &'static str,
    /// What it needs.
    pub needs: &'static [Need],
    /// The test itself. It fails by an error or a panic.
    pub run: fn() -> TestResult,
    /// It runs when no other test does.
    pub alone: bool,
}

impl Case {
    /// A test that needs all that test hosts need.
    pub const fn on_hosts(name: &'static str, run: fn() -> TestResult) -> Case {
        Case::with(TEST_HOSTS, name, run)
    }

    /// A test that needs this.
    pub const fn with(needs: &'static [Need], name: &'static str, run: fn() -> TestResult) -> Case {
        Case { name, needs, run, alone: false }
    }

    /// The same test, which runs when no other does: its guest's time-outs are shorter than those of other tests.
    pub const fn alone(self) -> Case {
        Case { alone: true, ..self }
    }
}

/// How many tests run at the same time: `VMFT_SITES`, or as many as have four processors each. Two on a machine with two
/// processors slow each other down so far that small guests are stopped too seldom to show anything.
fn at_the_same_time() -> usize {
    let given = std::env::var("VMFT_SITES").ok().and_then(|text| text.parse().ok());
    let processors = thread::available_parallelism().map_or(1, usize::from);
    given.unwrap_or(processors / 4).max(1)
}

/// Runs the tests that the command line selects, as `cargo test` does, under the names `module::name`. For the `main` of a
/// test without harness.
pub fn run(modules: &[Module]) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = arguments.test_threads.or_else(|| Some(at_the_same_time()));
    let require_all = std::env::var_os("VMFT_REQUIRE_ALL").is_some_and(|value| value == "1");
    let mut cases: Vec<(&str, Case)> =
        modules.iter().flat_map(|(module, cases)| cases.iter().map(move |case| (*module, *case))).collect();
    // Whoever waits for the others to end keeps others from starting.
    cases.sort_by_key(|(_, case)| case.alone);
    let trials = cases
        .into_iter()
        .map(|(module, case)| trial(format!("{module}::{}", case.name), case, require_all))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    if !arguments.list {
        let (passed, failed) = (conclusion.num_passed, conclusion.num_failed);
        println!("{passed} passed, {failed} failed, {} skipped", conclusion.num_ignored);
    }
    conclusion.exit_code()
}

/// Runs a test and says how long it took, since what is slow here is slow for everybody.
fn timed(name: &str, case: Case) -> Result<(), Failed> {
    /// Written while a test runs alone.
    static MACHINE: RwLock<()> = RwLock::new(());
    let _alone = case.alone.then(|| MACHINE.write().unwrap_or_else(PoisonError::into_inner));
    let _among_others = (!case.alone).then(|| MACHINE.read().unwrap_or_else(PoisonError::into_inner));
    let started = Instant::now();
    let result = (case.run)().map_err(|error| Failed::from(error.to_string()));
    eprintln!("{name} took {:.0} s", started.elapsed().as_secs_f64());
    result
}

fn trial(name: String, case: Case, require_all: bool) -> Trial {
    match first_missing(case.needs) {
        None => Trial::test(name.clone(), move || timed(&name, case)),
        Some(reason) if require_all => {
            Trial::test(name, move || Err(format!("This machine cannot run it: {reason}.").into()))
        }
        Some(reason) => {
            eprintln!("SKIPPED {name}: {reason}");
            Trial::test(name, || Ok(())).with_ignored_flag(true)
        }
    }
}
