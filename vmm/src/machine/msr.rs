//! The MSRs that are not the guest's own state: each is a constant, the guest's clock, or does not exist.
//!
//! Owns: the list. Must never: ask the host. Pure.

/// What a read gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The time stamp counter: guest time, as RDTSC.
    TimeStampCounter,
    /// Always this.
    Value(u64),
    /// There is no such MSR: #GP.
    Fault,
}

const IA32_TSC: u32 = 0x10;

/// MSRs that kernels read or write without asking CPUID, with the value that they always have.
const CONSTANTS: [(u32, u64); 8] = [
    (0x17, 0),           // IA32_PLATFORM_ID
    (0x1b, 0xfee0_0000), // IA32_APIC_BASE: disabled
    (0x3a, 1),           // IA32_FEATURE_CONTROL: locked, nothing enabled
    (0x8b, 0),           // IA32_BIOS_SIGN_ID, PATCH_LEVEL: no microcode update
    (0x1a0, 1),          // IA32_MISC_ENABLE: fast strings
    (0xc001_0015, 0),    // HWCR
    (0xc001_0055, 0),    // interrupt pending message: C1E is off
    (0xc001_1029, 2),    // DE_CFG: LFENCE is serialising
];

/// What a read of MSR `index` gets.
pub fn read(index: u32) -> Answer {
    if index == IA32_TSC {
        return Answer::TimeStampCounter;
    }
    let constant = CONSTANTS.iter().find(|(known, _)| *known == index);
    constant.map_or(Answer::Fault, |(_, value)| Answer::Value(*value))
}

/// HWCR's bit that switches a cache's flush filter off: written by Linux, and without an effect that could be seen.
const HWCR: u32 = 0xc001_0015;
const HWCR_FLUSH_FILTER_OFF: u64 = 1 << 6;

/// Is a write of `value` to MSR `index` taken? It then changes nothing. Otherwise the guest gets a #GP.
pub fn write(index: u32, value: u64) -> bool {
    let ignored = if index == HWCR { HWCR_FLUSH_FILTER_OFF } else { 0 };
    matches!(read(index), Answer::Value(constant) if constant == value & !ignored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_the_guests_clock_or_does_not_exist() {
        assert_eq!(read(IA32_TSC), Answer::TimeStampCounter);
        // APERF, MPERF, IA32_PMC0, K7_PERFCTR0, KVM's clock.
        for index in [0xe8, 0xe7, 0xc1, 0xc001_0004, 0x4b56_4d01] {
            assert_eq!(read(index), Answer::Fault, "{index:#x}");
            assert!(!write(index, 0), "{index:#x}");
        }
    }

    #[test]
    fn constants_take_writes_of_themselves_only() {
        for (index, value) in CONSTANTS {
            assert!(write(index, value), "{index:#x}");
            assert!(!write(index, value ^ 1), "{index:#x}");
        }
        assert!(write(HWCR, HWCR_FLUSH_FILTER_OFF));
    }
}
