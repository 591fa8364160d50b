//! Which event counts retired conditional branches, by CPU.
//!
//! Owns: the table. Must never: read anything of the host; it is a pure function of what CPUID says. A CPU
//! that is not in it has no event: a guess would count something else.
//!
//! Only events that are counted at retirement and that speculation, interrupts and faults do not disturb are
//! of use. Sources: Intel SDM volume 3B, chapter 20 (`BR_INST_RETIRED`); AMD's processor programming
//! references (PMCx0D1, retired conditional branch instructions). Which of them count exactly, and how late
//! their overflow interrupts come, is the experience of rr (`PerfCounters`), which lives on these events.
//!
//! Left out: Intel before Nehalem and AMD before Zen (no such event, or it counts inexactly), and models of
//! which the sources do not agree what they are.

use ft_log::CpuIdentity;

/// Which of a hybrid CPU's cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoreKind {
    /// All cores are alike, or this is one of the fast ones.
    Performance,
    /// One of the small ones of a hybrid CPU.
    Efficient,
}

/// A defect or setting of the CPU that makes counts inexact.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Erratum {
    /// AMD Zen: with the optimisation SpecLockMap on, locked instructions that are started speculatively and
    /// repeated count their branches twice.
    SpecLockMap,
    /// Intel: branches that the firmware executes in system management mode count, unless counters freeze
    /// there.
    SmiFreeze,
}

/// How to count on a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BranchEvent {
    /// The CPU's lineage, for people.
    pub microarchitecture: &'static str,
    /// `perf_event_attr.config` of the raw event.
    pub config: u64,
    /// Branches by which an overflow may be reported late.
    pub skid_max: u64,
    /// Is the skid known to exceed `skid_max` now and then?
    pub skid_unbounded: bool,
    /// What may be wrong.
    pub erratum: Erratum,
}

/// BR_INST_RETIRED.CONDITIONAL: event C4, unit mask 01.
const INTEL_CONDITIONAL: u64 = 0x01c4;
/// BR_INST_RETIRED.COND since Ice Lake: unit mask 11.
const INTEL_COND: u64 = 0x11c4;
/// The same since Lion Cove, which has a second unit mask in bits 40 to 47.
const INTEL_COND_UMASK2: u64 = 1 << 40 | INTEL_COND;
/// BR_INST_RETIRED.JCC or COND of the small cores: unit mask 7E.
const INTEL_ATOM_COND: u64 = 0x7ec4;
/// Retired conditional branch instructions.
const AMD_CONDITIONAL: u64 = 0xd1;
/// Retired locked instructions of the kind that SpecLockMap commits: PMCx025, unit mask 08.
pub const AMD_SPEC_LOCK_MAP_COMMIT: u64 = 0x0825;

const INTEL_SKID_MAX: u64 = 100;
const INTEL_HYBRID_SKID_MAX: u64 = 125;
const AMD_SKID_MAX: u64 = 10_000;

const fn intel(microarchitecture: &'static str, config: u64, skid_max: u64) -> BranchEvent {
    BranchEvent { microarchitecture, config, skid_max, skid_unbounded: false, erratum: Erratum::SmiFreeze }
}

const fn amd(microarchitecture: &'static str) -> BranchEvent {
    BranchEvent {
        microarchitecture,
        config: AMD_CONDITIONAL,
        skid_max: AMD_SKID_MAX,
        skid_unbounded: true,
        erratum: Erratum::SpecLockMap,
    }
}

/// The event for a CPU. `None`: it has none that is known to be exact.
pub fn branch_event(cpu: &CpuIdentity, core: CoreKind) -> Option<BranchEvent> {
    match (&cpu.vendor, cpu.family) {
        (b"GenuineIntel", 6) => intel_family_6(cpu.model, core),
        (b"AuthenticAMD", 0x17) => Some(amd("AMD Zen or Zen 2")),
        (b"AuthenticAMD", 0x19) => Some(amd("AMD Zen 3 or Zen 4")),
        (b"AuthenticAMD", 0x1a) => Some(amd("AMD Zen 5")),
        _ => None,
    }
}

fn intel_family_6(model: u8, core: CoreKind) -> Option<BranchEvent> {
    if core == CoreKind::Efficient {
        let name = match model {
            0x97 | 0x9a | 0xb7 | 0xba | 0xbf => "Intel Gracemont",
            0xaa => "Intel Crestmont",
            0xb5 | 0xbd | 0xc5 | 0xc6 => "Intel Skymont",
            _ => return None,
        };
        return Some(intel(name, INTEL_ATOM_COND, INTEL_HYBRID_SKID_MAX));
    }
    let (name, config, skid_max) = match model {
        0x1a | 0x1e | 0x2e => ("Intel Nehalem", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x25 | 0x2c | 0x2f => ("Intel Westmere", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x2a | 0x2d => ("Intel Sandy Bridge", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x3a | 0x3e => ("Intel Ivy Bridge", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x3c | 0x3f | 0x45 | 0x46 => ("Intel Haswell", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x3d | 0x47 | 0x4f | 0x56 => ("Intel Broadwell", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x4e | 0x55 | 0x5e => ("Intel Skylake or Cascade Lake", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x8e | 0x9e => ("Intel Kaby Lake or Coffee Lake", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0xa5 | 0xa6 => ("Intel Comet Lake", INTEL_CONDITIONAL, INTEL_SKID_MAX),
        0x6a | 0x6c | 0x7d | 0x7e => ("Intel Ice Lake", INTEL_COND, INTEL_SKID_MAX),
        0x8c | 0x8d => ("Intel Tiger Lake", INTEL_COND, INTEL_SKID_MAX),
        0xa7 => ("Intel Rocket Lake", INTEL_COND, INTEL_SKID_MAX),
        0x97 | 0x9a => ("Intel Alder Lake", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0xb7 | 0xba | 0xbf => ("Intel Raptor Lake", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0x8f => ("Intel Sapphire Rapids", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0xcf => ("Intel Emerald Rapids", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0xad => ("Intel Granite Rapids", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0xaa => ("Intel Meteor Lake", INTEL_COND, INTEL_HYBRID_SKID_MAX),
        0xbd => ("Intel Lunar Lake", INTEL_COND_UMASK2, INTEL_HYBRID_SKID_MAX),
        0xb5 | 0xc5 | 0xc6 => ("Intel Arrow Lake", INTEL_COND_UMASK2, INTEL_HYBRID_SKID_MAX),
        0x37 | 0x4c | 0x57 => ("Intel Silvermont", INTEL_ATOM_COND, INTEL_SKID_MAX),
        0x5c | 0x5f | 0x7a => ("Intel Goldmont", INTEL_ATOM_COND, INTEL_SKID_MAX),
        0x96 | 0x9c => ("Intel Tremont", INTEL_ATOM_COND, INTEL_SKID_MAX),
        0xbe => ("Intel Gracemont", INTEL_ATOM_COND, INTEL_SKID_MAX),
        _ => return None,
    };
    Some(intel(name, config, skid_max))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(vendor: &[u8; 12], family: u16, model: u8, core: CoreKind) -> Option<(u64, u64)> {
        let cpu = CpuIdentity { vendor: *vendor, family, model, stepping: 3 };
        branch_event(&cpu, core).map(|event| (event.config, event.skid_max))
    }

    #[test]
    fn each_lineage_has_its_event() {
        use CoreKind::{Efficient, Performance};
        for (vendor, family, model, core, expected) in [
            (b"GenuineIntel", 6, 0x1a, Performance, Some((0x01c4, 100))), // Nehalem
            (b"GenuineIntel", 6, 0x55, Performance, Some((0x01c4, 100))), // Skylake server
            (b"GenuineIntel", 6, 0xa5, Performance, Some((0x01c4, 100))), // Comet Lake
            (b"GenuineIntel", 6, 0x6a, Performance, Some((0x11c4, 100))), // Ice Lake server
            (b"GenuineIntel", 6, 0x8f, Performance, Some((0x11c4, 125))), // Sapphire Rapids
            (b"GenuineIntel", 6, 0x97, Performance, Some((0x11c4, 125))), // Alder Lake, fast core
            (b"GenuineIntel", 6, 0x97, Efficient, Some((0x7ec4, 125))),   // Alder Lake, small core
            (b"GenuineIntel", 6, 0xbd, Performance, Some((0x100_0000_11c4, 125))), // Lunar Lake
            (b"GenuineIntel", 6, 0xbd, Efficient, Some((0x7ec4, 125))),
            (b"GenuineIntel", 6, 0x5f, Performance, Some((0x7ec4, 100))), // Goldmont
            (b"AuthenticAMD", 0x17, 0x31, Performance, Some((0xd1, 10_000))), // Zen 2
            (b"AuthenticAMD", 0x19, 0x11, Performance, Some((0xd1, 10_000))), // Zen 4
            (b"AuthenticAMD", 0x1a, 0x02, Performance, Some((0xd1, 10_000))), // Zen 5
        ] {
            assert_eq!(event(vendor, family, model, core), expected, "{family:#x} {model:#x} {core:?}");
        }
    }

    #[test]
    fn an_unknown_cpu_has_no_event() {
        let core = CoreKind::Performance;
        assert_eq!(event(b"GenuineIntel", 6, 0x0f, core), None, "Merom");
        assert_eq!(event(b"GenuineIntel", 6, 0xff, core), None);
        assert_eq!(event(b"GenuineIntel", 15, 0x1a, core), None, "Pentium 4");
        assert_eq!(event(b"AuthenticAMD", 0x15, 0x02, core), None, "Piledriver");
        assert_eq!(event(b"AuthenticAMD", 15, 107, core), None, "QEMU's own");
        assert_eq!(event(b"HygonGenuine", 0x18, 0x01, core), None);
        assert_eq!(event(b"GenuineIntel", 6, 0x55, CoreKind::Efficient), None, "not hybrid");
    }

    #[test]
    fn the_event_and_its_mask_are_all_that_is_set() {
        for model in 0..=u8::MAX {
            for core in [CoreKind::Performance, CoreKind::Efficient] {
                let Some(event) = intel_family_6(model, core) else { continue };
                assert_eq!(event.config & 0xff, 0xc4, "{model:#x}");
                assert_eq!(event.config & !(1 << 40 | 0xffff), 0, "{model:#x}: the kernel sets the rest");
                assert_eq!((event.erratum, event.skid_unbounded), (Erratum::SmiFreeze, false));
            }
        }
    }
}
