//! Measures whether this host can hold a guest deterministically, and how well.
//!
//! Owns: the list of checks, their order, and the verdict. Must never: change the host, use another guest
//! than its own, or say more than was seen.
//!
//! ```text
//! /dev/kvm ─> flavour, capabilities, cpu ─(well)─> Bench ─> execution, isolation ─┐
//!                                      └(not)─> not measured ──────────────────┼─> Report ─> Fitness
//! counting (counters), arbiter, surroundings (tun, peer) ──────────────────────┘
//! ```
//! A guest is started only where the structural checks hold, one at a time, each for one measurement.

mod arbiter;
mod counting;
mod execution;
mod guest;
mod isolation;
mod surroundings;
mod watchdog;

use std::fmt;
use std::net::SocketAddr;

pub use counting::Measured;
use ft_log::CpuIdentity;
use guest::{Guest, ProbeError};
use kvm_bindings::CpuId;
use serde::Serialize;
use watchdog::Watchdog;

use crate::boot::cpuid_table;
use crate::kvm::{Kvm, KvmError, Modules, Unfit, install_kick_handler};
use crate::pair::claims::arbiter::ArbiterSpec;
use crate::pair::claims::arbiter::EtcdFiles;

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Not as it should be, and the monitor works nevertheless.
    Degraded,
    /// The monitor does not work here, or not as the command line says.
    Failed,
    /// It could not be found out.
    NotMeasured,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
            Self::NotMeasured => "not measured",
        })
    }
}

/// What was seen, and what helps.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Finding {
    verdict: Verdict,
    seen: String,
    advice: Option<String>,
}

impl Finding {
    fn ok(seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, seen: seen.into(), advice: None }
    }

    fn degraded(seen: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Degraded, seen: seen.into(), advice: Some(advice.into()) }
    }

    fn failed(seen: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Failed, seen: seen.into(), advice: Some(advice.into()) }
    }

    fn not_measured(why: impl Into<String>) -> Self {
        Self { verdict: Verdict::NotMeasured, seen: why.into(), advice: None }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at.
    pub name: &'static str,
    /// What came of it.
    pub verdict: Verdict,
    /// What was seen, or why nothing was.
    pub seen: String,
    /// What to do.
    pub advice: Option<String>,
    /// Is it of interest only for positions by counters?
    #[serde(skip)]
    counting: bool,
}

impl Check {
    fn new(name: &'static str, Finding { verdict, seen, advice }: Finding) -> Self {
        Self { name, verdict, seen, advice, counting: false }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<20} {:<13} {}", self.name, self.verdict, self.seen)?;
        self.advice.as_ref().map_or(Ok(()), |advice| write!(f, "; {advice}"))
    }
}

/// What this host is good for: where in a guest that only computes the monitor can place an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fitness {
    /// At an instruction that counters name.
    Pmu,
    /// At a checkpoint.
    Checkpoint,
    /// It runs no guest, or not as the command line says.
    Unfit,
}

impl fmt::Display for Fitness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pmu => "fit (pmu)",
            Self::Checkpoint => "fit (checkpoint)",
            Self::Unfit => "unfit",
        })
    }
}

impl Serialize for Fitness {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Everything that was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What follows from the checks.
    pub verdict: Fitness,
    /// The checks, in the order in which they were made.
    pub checks: Vec<Check>,
}

impl Report {
    fn new(checks: Vec<Check>) -> Self {
        let any = |wanted: fn(&Check) -> bool| checks.iter().any(wanted);
        let verdict = if any(|check| check.verdict == Verdict::Failed) {
            Fitness::Unfit
        } else if any(|check| check.counting && check.verdict != Verdict::Ok) {
            Fitness::Checkpoint
        } else {
            Fitness::Pmu
        };
        Self { verdict, checks }
    }

    /// The first check that makes the host unfit.
    pub fn reason(&self) -> Option<&Check> {
        self.checks.iter().find(|check| check.verdict == Verdict::Failed)
    }
}

/// What shall be looked at besides the host itself.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Where claims will be made.
    pub arbiter: Option<ArbiterSpec>,
    /// How an etcd is asked.
    pub etcd: EtcdFiles,
    /// A primary's --listen address.
    pub peer: Option<SocketAddr>,
}

/// What guests are made of, and who takes them out of KVM.
struct Bench {
    kvm: Kvm,
    cpuid: CpuId,
    cpu: CpuIdentity,
    watchdog: Watchdog,
}

impl Bench {
    fn new(kvm: Kvm, cpuid: CpuId, cpu: CpuIdentity) -> Result<Self, String> {
        install_kick_handler().map_err(|error| error.to_string())?;
        let watchdog = Watchdog::start().map_err(|error| format!("no thread can be started: {error}"))?;
        Ok(Self { kvm, cpuid, cpu, watchdog })
    }

    fn guest(&self, code: &[u8]) -> Result<Guest, ProbeError> {
        self.guest_that_sees(&self.cpuid, code)
    }

    fn guest_that_sees(&self, cpuid: &CpuId, code: &[u8]) -> Result<Guest, ProbeError> {
        Guest::new(&self.kvm, cpuid, code, self.watchdog.watch())
    }
}

/// A measurement in a guest, and whether guests need what it measures.
struct Probe {
    name: &'static str,
    needed: bool,
    run: fn(&Bench) -> Result<Finding, ProbeError>,
}

const PROBES: [Probe; 7] = [
    Probe { name: "single-step", needed: true, run: execution::single_step },
    Probe { name: "breakpoints", needed: false, run: execution::breakpoints },
    Probe { name: "interrupt window", needed: true, run: execution::interrupt_window },
    Probe { name: "cr4.tsd trap", needed: true, run: isolation::tsc_trap },
    Probe { name: "cpuid masking", needed: true, run: isolation::cpuid_masking },
    Probe { name: "msr filter", needed: true, run: isolation::msr_filter },
    Probe { name: "dirty log", needed: true, run: isolation::dirty_log },
];

/// Looks at everything.
pub fn examine(options: &Options) -> Report {
    let (mut checks, bench) = structure();
    match &bench {
        Ok(bench) => checks.extend(PROBES.iter().map(|probe| Check::new(probe.name, probe.run(bench)))),
        Err(why) => {
            let unmeasured = |probe: &Probe| Check::new(probe.name, Finding::not_measured(why.clone()));
            checks.extend(PROBES.iter().map(unmeasured));
        }
    }
    checks.extend(counting::checks(bench.as_ref()));
    checks.push(Check::new("tun", surroundings::tun()));
    if let Some(arbiter) = &options.arbiter {
        checks.push(Check::new("arbiter", arbiter::examine(arbiter, &options.etcd)));
    }
    if let Some(address) = options.peer {
        checks.push(Check::new("peer", surroundings::peer(address)));
    }
    Report::new(checks)
}

/// This host's counter for positions, measured now. Else: why there is none, and what to do.
pub fn position_counter() -> Result<Measured, String> {
    counting::measured(&structure().1?)
}

impl Probe {
    fn run(&self, bench: &Bench) -> Finding {
        (self.run)(bench).unwrap_or_else(|error| {
            let seen = error.to_string();
            if self.needed {
                Finding::failed(seen, "use a stock KVM on VT-x or AMD-V, and look at the host's kernel log")
            } else {
                Finding::degraded(seen, "nothing to do: the monitor does without")
            }
        })
    }
}

/// What can be said without a guest. Only where all of it is well, there is something to measure with; else
/// the reason why there is not.
fn structure() -> (Vec<Check>, Result<Bench, String>) {
    let no_guest = || Err("no guest can be started here".to_owned());
    let (kvm, unfit) = match Kvm::examine() {
        Ok(examined) => examined,
        Err(error) => return (vec![Check::new("kvm", no_kvm(&error))], no_guest()),
    };
    let modules = Modules::of_host();
    let mut checks = vec![
        Check::new("kvm", flavour(&unfit, modules.flavour())),
        Check::new("nested paging", nested_paging(&unfit, &modules)),
        Check::new("capabilities", capabilities(&unfit)),
    ];
    let table = kvm.supported_cpuid().map_err(|error| error.to_string());
    let table = table.and_then(|supported| cpuid_table(&supported).map_err(|error| error.to_string()));
    let bench = match table {
        Err(seen) => {
            let advice = "a CPU of the x86-64-v2 level is needed, whole, if this host is a virtual machine";
            checks.push(Check::new("cpu", Finding::failed(seen, advice)));
            no_guest()
        }
        Ok((cpuid, cpu)) => {
            checks.push(Check::new("cpu", Finding::ok(cpu.to_string())));
            if unfit.is_empty() { Bench::new(kvm, cpuid, cpu) } else { no_guest() }
        }
    };
    // A host on which what guests need was not measured is not fit.
    if let (Err(why), true) = (&bench, checks.iter().all(|check| check.verdict != Verdict::Failed)) {
        checks.push(Check::new("guests", Finding::failed(why.clone(), "look at the limits of this user")));
    }
    (checks, bench)
}

fn no_kvm(error: &KvmError) -> Finding {
    match error {
        KvmError::Open(source, advice) => Finding::failed(format!("cannot open /dev/kvm: {source}"), *advice),
        other => Finding::failed(other.to_string(), "look at the host's kernel log"),
    }
}

fn nested_paging(unfit: &[Unfit], modules: &Modules) -> Finding {
    if unfit.contains(&Unfit::SoftwareKvm) {
        return Finding::not_measured("kvm-pvm has none");
    }
    if let Some(reason) = unfit.iter().find(|reason| matches!(reason, Unfit::ShadowPaging(_))) {
        return Finding::failed(reason.seen(), reason.advice());
    }
    match modules.nested_paging() {
        Ok(nested) => Finding::ok(nested.name),
        Err(why) => {
            Finding::degraded(why, "make sure that KVM was not told to do without: replays differ then")
        }
    }
}

fn flavour(unfit: &[Unfit], name: &'static str) -> Finding {
    match (unfit.contains(&Unfit::SoftwareKvm), name) {
        (true, _) => Finding::failed(Unfit::SoftwareKvm.seen(), Unfit::SoftwareKvm.advice()),
        (false, "unknown") => Finding::degraded(
            "this CPU's module (kvm_intel or kvm_amd) is not in /sys/module",
            "rely on the measurements below",
        ),
        (false, known) => Finding::ok(known),
    }
}

fn capabilities(unfit: &[Unfit]) -> Finding {
    match unfit.iter().find(|reason| matches!(reason, Unfit::Capability(_))) {
        None => Finding::ok("complete"),
        Some(first) => {
            let all = unfit.iter().filter(|reason| matches!(reason, Unfit::Capability(_)));
            let seen: Vec<String> = all.map(|reason| reason.seen()).collect();
            Finding::failed(seen.join(", "), first.advice())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(verdict: Verdict, counting: bool) -> Check {
        let finding = Finding { verdict, seen: "seen".into(), advice: None };
        Check { counting, ..Check::new("name", finding) }
    }

    #[test]
    fn the_verdict_follows_from_the_worst() {
        use Verdict::{Degraded, Failed, NotMeasured, Ok};
        for (checks, verdict) in [
            (vec![check(Ok, false), check(Ok, true)], Fitness::Pmu),
            (vec![check(Degraded, false), check(NotMeasured, false), check(Ok, true)], Fitness::Pmu),
            (vec![check(Ok, false), check(NotMeasured, true)], Fitness::Checkpoint),
            (vec![check(Ok, false), check(Degraded, true)], Fitness::Checkpoint),
            (vec![check(Degraded, true), check(Failed, false)], Fitness::Unfit),
        ] {
            assert_eq!(Report::new(checks.clone()).verdict, verdict, "{checks:?}");
        }
    }

    #[test]
    fn lines_hold_name_verdict_what_was_seen_and_what_to_do() {
        let line = Check::new("tun", Finding::degraded("seen", "do this")).to_string();
        assert_eq!(line, "tun                  degraded      seen; do this");
        let line = Check::new("single-step", Finding::not_measured("because")).to_string();
        assert_eq!(line, "single-step          not measured  because");
    }

    #[test]
    fn a_report_as_json_has_the_words_of_the_lines() {
        let checks = vec![Check::new("tun", Finding::failed("seen", "do this"))];
        let json = serde_json::to_string(&Report::new(checks)).unwrap();
        let check = r#"{"name":"tun","verdict":"failed","seen":"seen","advice":"do this"}"#;
        let expected = format!(r#"{{"verdict":"unfit","checks":[{check}]}}"#);
        assert_eq!(json, expected);
        assert_eq!(serde_json::to_string(&Verdict::NotMeasured).unwrap(), r#""not-measured""#);
        assert_eq!(Fitness::Checkpoint.to_string(), "fit (checkpoint)");
    }

    #[test]
    fn what_is_missing_is_said_in_the_monitors_words() {
        let unfit = [Unfit::SoftwareKvm, Unfit::Capability("KVM_CAP_A"), Unfit::Capability("KVM_CAP_B")];
        let finding = flavour(&unfit, "kvm_pvm");
        let refusal = KvmError::Unfit(unfit[0]).to_string();
        assert!(refusal.contains(&finding.seen) && refusal.contains(&finding.advice.unwrap()), "{refusal}");
        let finding = capabilities(&unfit);
        assert_eq!(finding.seen, "it lacks KVM_CAP_A, it lacks KVM_CAP_B");
        let refusal = KvmError::Unfit(unfit[1]).to_string();
        assert!(
            refusal.contains("it lacks KVM_CAP_A") && refusal.contains(&finding.advice.unwrap()),
            "{refusal}"
        );
    }
}
