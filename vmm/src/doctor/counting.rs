//! Performance counters: can they tell where in a guest something happened?
//!
//! Owns: these measurements. Must never: guess. Without counters, everything that only they can show is "not
//! measured"; and never fail a host, which is fit for checkpoints without them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::guest::{ProbeError, Ring};
use super::{Bench, Check, Finding, Verdict};
use crate::kvm::kick_signal;
use crate::pmu::counter::Counter;
use crate::pmu::events::{AMD_SPEC_LOCK_MAP_COMMIT, BranchEvent, Erratum, branch_event};
use crate::pmu::host::{HostPmu, freezes_on_smi, may_always_count, perf_event_paranoid};

const PRESENT: &str = "pmu";
const COUNTS: &str = "pmu counts";
const SKID: &str = "pmu skid";
const ERRATA: &str = "pmu errata";

const WITHOUT: &str = "nothing to do: the monitor takes checkpoints of guests that only compute. For counters \
                       use bare metal, or a virtual machine with a virtual PMU";

const PORT_MIDDLE: u8 = 0x10;
const PORT_LAST: u8 = 0x11;

/// 1,000 conditional branches, with an exit to the monitor and one that KVM handles in between.
#[rustfmt::skip]
const BRANCHES: [u8; 24] = [
    0xb9, 0xf4, 1, 0, 0,    // 00     mov ecx, 500
    0xff, 0xc9,             // 05  1: dec ecx
    0x75, 0xfc,             // 07     jnz 1b
    0xe6, PORT_MIDDLE,      // 09     out PORT_MIDDLE, al
    0xb9, 0xf4, 1, 0, 0,    // 0b     mov ecx, 500
    0xff, 0xc9,             // 10  2: dec ecx
    0x75, 0xfc,             // 12     jnz 2b
    0x0f, 0xa2,             // 14     cpuid
    0xe6, PORT_LAST,        // 16     out PORT_LAST, al
];
const BRANCHES_EXPECTED: u64 = 1_000;
const RUNS: u32 = 1_000;

#[rustfmt::skip]
const ENDLESS: [u8; 5] = [
    0x48, 0xff, 0xc9,       // 00  1: dec rcx
    0x75, 0xfb,             // 03     jnz 1b
];
const OVERFLOWS: u64 = 200;
/// Behind which an overflow is due; another one each time, so that they do not fall into step with anything.
const PERIOD_MIN: u64 = 20_000;
const PERIOD_STEP: u64 = 37;

/// All that is said about counters; without a bench, why there is none.
pub fn checks(bench: Result<&Bench, &String>) -> Vec<Check> {
    let mut checks = match bench {
        Err(why) => all_unmeasured(PRESENT, why),
        Ok(bench) => match find(bench) {
            Err(finding) => {
                let mut checks = all_unmeasured(COUNTS, "there are no counters to measure");
                checks.insert(0, Check::new(PRESENT, finding));
                checks
            }
            Ok((pmu, event)) => measure(bench, &pmu, &event),
        },
    };
    checks.iter_mut().for_each(|check| check.counting = true);
    checks.push(Check::new("perf_event_paranoid", paranoid()));
    checks
}

/// Not measured: all lines from `first` on.
fn all_unmeasured(first: &str, why: &str) -> Vec<Check> {
    [PRESENT, COUNTS, SKID, ERRATA]
        .into_iter()
        .skip_while(|name| *name != first)
        .map(|name| Check::new(name, Finding::not_measured(why)))
        .collect()
}

fn find(bench: &Bench) -> Result<(HostPmu, BranchEvent), Finding> {
    let pmu = HostPmu::find().ok_or_else(|| {
        Finding::degraded("this host's kernel drives no performance counters of the CPU", WITHOUT)
    })?;
    let event = branch_event(&bench.cpu, pmu.core).ok_or_else(|| {
        let seen = format!("no event is known that counts branches exactly on {}", bench.cpu);
        Finding::degraded(seen, WITHOUT)
    })?;
    if let Some(cpus) = &pmu.cpus {
        stay_on(cpus)?;
    }
    match Counter::guest_branches(&pmu, &event) {
        Ok(_) => Ok((pmu, event)),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Err(Finding::degraded(
            format!("counting a guest's branches is not permitted: {error}"),
            "run as root, grant CAP_PERFMON, or set the sysctl kernel.perf_event_paranoid to 1",
        )),
        Err(error) => {
            let seen = format!("the branches of {} cannot be counted: {error}", event.microarchitecture);
            Err(Finding::degraded(seen, WITHOUT))
        }
    }
}

/// A hybrid CPU's cores count different events: measures on those that guests should run on.
fn stay_on(cpus: &[usize]) -> Result<(), Finding> {
    let mut set = CpuSet::new();
    let chosen = cpus.iter().try_for_each(|cpu| set.set(*cpu));
    chosen.and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)).map_err(|error| {
        let seen =
            format!("this is a hybrid CPU, and the doctor may not run on its fast cores {cpus:?}: {error}");
        Finding::degraded(seen, "allow the monitor to run on the fast cores")
    })
}

fn measure(bench: &Bench, pmu: &HostPmu, event: &BranchEvent) -> Vec<Check> {
    let on = match &pmu.cpus {
        Some(cpus) => format!(", on the fast cores {cpus:?} only: keep guests there"),
        None => String::new(),
    };
    let seen = format!("{}, raw event {:#x}{on}", event.microarchitecture, event.config);
    let or_trouble = |result: Result<Finding, ProbeError>| {
        result.unwrap_or_else(|error| Finding::degraded(error.to_string(), WITHOUT))
    };
    vec![
        Check::new(PRESENT, Finding::ok(seen)),
        Check::new(COUNTS, or_trouble(counts(bench, pmu, event))),
        Check::new(SKID, or_trouble(skid(bench, pmu, event))),
        Check::new(ERRATA, or_trouble(errata(pmu, event))),
    ]
}

/// What positions need of a counter.
#[derive(Clone, Debug)]
pub struct Measured {
    /// The counters that have it.
    pub pmu: HostPmu,
    /// What it counts.
    pub event: BranchEvent,
    /// By how many branches its overflows come late, with room to spare.
    pub skid_max: u64,
}

/// Least room for late overflows: what a few more measurements might show.
const SKID_MIN: u64 = 64;

/// The counter of this host, if it may be relied on. Else: why not, and what to do.
pub fn measured(bench: &Bench) -> Result<Measured, String> {
    let why_not = |finding: Finding| match finding.advice {
        Some(advice) => format!("{}; {advice}", finding.seen),
        None => finding.seen,
    };
    let (pmu, event) = find(bench).map_err(why_not)?;
    let mut late = Vec::new();
    let findings = [
        counts(bench, &pmu, &event),
        errata(&pmu, &event),
        lateness(bench, &pmu, &event).map(|measured| {
            late = measured;
            judge_skid(&mut late, &event)
        }),
    ];
    for finding in findings {
        let finding = finding.map_err(|error| error.to_string())?;
        if finding.verdict != Verdict::Ok {
            return Err(why_not(finding));
        }
    }
    // Sorted by the judgement.
    let most = late.last().copied().unwrap_or(event.skid_max);
    Ok(Measured { pmu, event, skid_max: (2 * most).clamp(SKID_MIN, event.skid_max.max(SKID_MIN)) })
}

fn counts(bench: &Bench, pmu: &HostPmu, event: &BranchEvent) -> Result<Finding, ProbeError> {
    let mut guest = bench.guest(&BRANCHES)?;
    let mut counter = Counter::guest_branches(pmu, event)?;
    counter.start()?;
    let mut seen = Vec::new();
    for run in 0..RUNS {
        let ring = Ring::BOTH[run as usize % 2];
        let before = counter.read()?;
        guest.start(ring, |_| {})?;
        guest.expect_port(PORT_MIDDLE, "the port between the branches")?;
        guest.expect_port(PORT_LAST, "the port behind the branches")?;
        seen.push(counter.read()? - before);
    }
    Ok(judge_counts(&seen))
}

fn judge_counts(seen: &[u64]) -> Finding {
    let wrong: Vec<u64> = seen.iter().copied().filter(|count| *count != BRANCHES_EXPECTED).collect();
    match (wrong.iter().min(), wrong.iter().max()) {
        (Some(least), Some(most)) => Finding::degraded(
            format!(
                "{} of {} equal runs did not count {BRANCHES_EXPECTED} branches but {least} to {most}",
                wrong.len(),
                seen.len()
            ),
            "look at the errata below, end other users of counters (perf, the NMI watchdog: sysctl \
             kernel.nmi_watchdog=0), then try again",
        ),
        _ => Finding::ok(format!("{} equal runs counted {BRANCHES_EXPECTED} branches each", seen.len())),
    }
}

fn skid(bench: &Bench, pmu: &HostPmu, event: &BranchEvent) -> Result<Finding, ProbeError> {
    Ok(judge_skid(&mut lateness(bench, pmu, event)?, event))
}

/// By how many branches overflows come late.
fn lateness(bench: &Bench, pmu: &HostPmu, event: &BranchEvent) -> Result<Vec<u64>, ProbeError> {
    let mut guest = bench.guest(&ENDLESS)?;
    let mut late = Vec::new();
    for number in 0..OVERFLOWS {
        let period = PERIOD_MIN + number * PERIOD_STEP;
        let mut counter = Counter::guest_branches_with_signal(pmu, event, period, kick_signal())?;
        guest.start(Ring::BOTH[number as usize % 2], |_| {})?;
        counter.start()?;
        let mut count = 0;
        let stop = guest.go_until(|_| {
            count = counter.read()?;
            Ok(count >= period)
        })?;
        if let Some(found) = stop {
            return Err(ProbeError::Elsewhere { expected: "an overflow", found });
        }
        late.push(count - period);
    }
    Ok(late)
}

fn judge_skid(late: &mut [u64], event: &BranchEvent) -> Finding {
    late.sort_unstable();
    let most = late.last().copied().unwrap_or_default();
    let median = late.get(late.len() / 2).copied().unwrap_or_default();
    let seen = format!(
        "{} overflows came {median} branches late (median), {most} at most: {}",
        late.len(),
        histogram(late)
    );
    if most > event.skid_max {
        let advice =
            format!("the monitor allows for {} on this CPU; keep the host less busy", event.skid_max);
        return Finding::degraded(seen, advice);
    }
    let rare = if event.skid_unbounded { "; more is known to happen, seldom, on this CPU" } else { "" };
    Finding::ok(format!("{seen}{rare}"))
}

/// How many in each range between powers of two.
fn histogram(values: &[u64]) -> String {
    let mut ranges = BTreeMap::new();
    for value in values {
        *ranges.entry(u64::BITS - value.leading_zeros()).or_insert(0_u32) += 1;
    }
    let parts: Vec<String> = ranges
        .into_iter()
        .map(|(bits, count)| match bits {
            0 | 1 => format!("{bits}: {count}"),
            _ => format!("{}-{}: {count}", 1_u64 << (bits - 1), u64::MAX >> (u64::BITS - bits)),
        })
        .collect();
    parts.join(", ")
}

fn errata(pmu: &HostPmu, event: &BranchEvent) -> Result<Finding, ProbeError> {
    Ok(match event.erratum {
        Erratum::SpecLockMap => spec_lock_map(locked_commits(pmu)?),
        Erratum::SmiFreeze => smi_freeze(freezes_on_smi()),
    })
}

/// Locked instructions that took part in SpecLockMap.
fn locked_commits(pmu: &HostPmu) -> Result<u64, ProbeError> {
    let mut counter = Counter::host_user(pmu, AMD_SPEC_LOCK_MAP_COMMIT)?;
    counter.start()?;
    let number = AtomicU32::new(0);
    for _ in 0..100 {
        std::hint::black_box(&number).fetch_add(1, Ordering::SeqCst);
    }
    counter.stop()?;
    Ok(counter.read()?)
}

fn spec_lock_map(commits: u64) -> Finding {
    if commits == 0 {
        return Finding::ok("SpecLockMap is off");
    }
    Finding::degraded(
        "SpecLockMap is on, which counts some branches of locked code twice",
        "set bit 54 of MSR 0xc0011020 on all processors after each boot",
    )
}

fn smi_freeze(freezes: Option<bool>) -> Finding {
    match freezes {
        Some(true) => Finding::ok("counters stand still while the firmware runs (SMI)"),
        Some(false) => Finding::degraded(
            "counters go on while the firmware runs (SMI)",
            "echo 1 > /sys/devices/cpu/freeze_on_smi (cpu_core on a hybrid CPU) after each boot",
        ),
        None => Finding::not_measured("this kernel does not say whether counters stand still in an SMI"),
    }
}

fn paranoid() -> Finding {
    judge_paranoid(perf_event_paranoid(), may_always_count())
}

fn judge_paranoid(level: Option<i32>, privileged: bool) -> Finding {
    match level {
        None => Finding::degraded(
            "this host's kernel has no perf events",
            "nothing to do, unless the CPU has counters: then use a kernel with CONFIG_PERF_EVENTS",
        ),
        Some(level) if level <= 1 => {
            Finding::ok(format!("{level}: whoever may use KVM may count its guests"))
        }
        Some(level) if privileged => Finding::ok(format!("{level}, and this user may count nevertheless")),
        Some(level) => Finding::degraded(
            format!("{level}: this user may not count what guests do"),
            "run as root, grant CAP_PERFMON, or set the sysctl kernel.perf_event_paranoid to 1",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(skid_unbounded: bool) -> BranchEvent {
        BranchEvent {
            microarchitecture: "test",
            config: 1,
            skid_max: 100,
            skid_unbounded,
            erratum: Erratum::SmiFreeze,
        }
    }

    #[test]
    fn one_wrong_count_is_one_too_many() {
        let mut seen = [BRANCHES_EXPECTED; 1_000];
        assert_eq!(judge_counts(&seen).verdict, Verdict::Ok);
        seen[999] += 1;
        let finding = judge_counts(&seen);
        assert_eq!(finding.verdict, Verdict::Degraded);
        assert!(finding.seen.starts_with("1 of 1000 equal runs"), "{}", finding.seen);
    }

    #[test]
    fn skid_is_judged_by_the_worst() {
        let finding = judge_skid(&mut [3, 0, 100, 1, 17], &event(false));
        assert_eq!(finding.verdict, Verdict::Ok);
        assert_eq!(
            finding.seen,
            "5 overflows came 3 branches late (median), 100 at most: 0: 1, 1: 1, 2-3: 1, 16-31: 1, 64-127: 1"
        );
        assert_eq!(judge_skid(&mut [101, 0], &event(true)).verdict, Verdict::Degraded);
        assert!(judge_skid(&mut [0], &event(true)).seen.contains("seldom"));
    }

    #[test]
    fn ranges_of_a_histogram_meet() {
        assert_eq!(histogram(&[0, 1, 2, 3, 4, 7, 8]), "0: 1, 1: 1, 2-3: 2, 4-7: 2, 8-15: 1");
        assert_eq!(histogram(&[u64::MAX]), format!("{}-{}: 1", 1_u64 << 63, u64::MAX));
        assert_eq!(histogram(&[]), "");
    }

    #[test]
    fn who_may_count_is_judged_by_level_and_rights() {
        for (level, privileged, verdict) in [
            (None, true, Verdict::Degraded),
            (Some(-1), false, Verdict::Ok),
            (Some(1), false, Verdict::Ok),
            (Some(2), false, Verdict::Degraded),
            (Some(2), true, Verdict::Ok),
            (Some(4), false, Verdict::Degraded),
        ] {
            assert_eq!(judge_paranoid(level, privileged).verdict, verdict, "{level:?} {privileged}");
        }
    }

    #[test]
    fn errata_are_judged() {
        assert_eq!(spec_lock_map(0).verdict, Verdict::Ok);
        assert_eq!(spec_lock_map(1).verdict, Verdict::Degraded);
        assert_eq!(smi_freeze(Some(true)).verdict, Verdict::Ok);
        assert_eq!(smi_freeze(Some(false)).verdict, Verdict::Degraded);
        assert_eq!(smi_freeze(None).verdict, Verdict::NotMeasured);
    }

    #[test]
    fn the_branches_are_as_many_as_is_said() {
        let loops = u64::from(u32::from_le_bytes([BRANCHES[1], BRANCHES[2], BRANCHES[3], BRANCHES[4]]));
        assert_eq!(2 * loops, BRANCHES_EXPECTED);
    }
}
