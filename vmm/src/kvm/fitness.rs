//! What makes a KVM unfit before any guest runs: its kind, and what it lacks.
//!
//! Owns: the words for it. The monitor's refusal and `vmft doctor` both take them from here. Must never:
//! measure; what only a guest can show is `doctor`'s.

use std::fmt;
use std::path::Path;

use kvm_bindings::{
    KVM_CAP_DEBUGREGS, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_READONLY_MEM, KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SYNC_REGS,
    KVM_CAP_VCPU_EVENTS, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XCRS, KVM_CAP_XSAVE,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

/// Why no guest can be held deterministically on this KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// kvm-pvm.
    SoftwareKvm,
    /// It lacks something.
    Capability(&'static str),
}

impl Unfit {
    /// What was seen.
    pub fn seen(self) -> String {
        match self {
            Self::SoftwareKvm => {
                "it is kvm-pvm, a software KVM that emulates ring 0 and cannot mask CPUID in \
                                  ring 3"
                    .into()
            }
            Self::Capability(name) => format!("it lacks {name}"),
        }
    }

    /// What helps.
    pub fn advice(self) -> &'static str {
        match self {
            Self::SoftwareKvm => "a host with VT-x or AMD-V is needed",
            Self::Capability(_) => "a host kernel of Linux 5.10 or newer with a stock KVM is needed",
        }
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.seen(), self.advice())
    }
}

/// A capability, which KVM answers with more than 0, and the bits that its answer must have.
struct Needed {
    capability: u32,
    bits: u32,
    name: &'static str,
}

const fn needed(capability: u32, name: &'static str) -> Needed {
    Needed { capability, bits: 0, name }
}

const NEEDED: [Needed; 12] = [
    needed(KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM"),
    needed(KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS"),
    needed(KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT"),
    needed(KVM_CAP_SET_GUEST_DEBUG, "KVM_CAP_SET_GUEST_DEBUG"),
    needed(KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    needed(KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    needed(KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    needed(KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    needed(KVM_CAP_EXCEPTION_PAYLOAD, "KVM_CAP_EXCEPTION_PAYLOAD"),
    needed(KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"),
    needed(KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
    needed(KVM_CAP_ENFORCE_PV_FEATURE_CPUID, "KVM_CAP_ENFORCE_PV_FEATURE_CPUID"),
];

/// Answers with the two bits that [`super::dirty`] turns on.
const DIRTY_LOG: Needed = Needed {
    capability: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    bits: KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
    name: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2",
};

/// The name of the loaded KVM module, as `/sys/module` shows it.
pub fn host_flavour() -> &'static str {
    ["kvm_pvm", "kvm_amd", "kvm_intel"]
        .into_iter()
        .find(|module| Path::new("/sys/module").join(module).exists())
        .unwrap_or("unknown")
}

/// What is wrong with a KVM of this flavour whose answer to KVM_CHECK_EXTENSION is `answer`.
pub(super) fn unfit(flavour: &str, answer: impl Fn(u32) -> i32) -> Vec<Unfit> {
    let kind = (flavour == "kvm_pvm").then_some(Unfit::SoftwareKvm);
    let lacking = NEEDED.iter().chain([&DIRTY_LOG]).filter(|needed| {
        let answer = answer(needed.capability);
        answer <= 0 || answer as u32 & needed.bits != needed.bits
    });
    kind.into_iter().chain(lacking.map(|needed| Unfit::Capability(needed.name))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a stock KVM of Linux 6.1 answers.
    fn stock(capability: u32) -> i32 {
        match capability {
            KVM_CAP_SYNC_REGS => 7,
            KVM_CAP_XSAVE => 4096,
            KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => 3,
            _ => 1,
        }
    }

    #[test]
    fn a_stock_kvm_is_fit() {
        assert_eq!(unfit("kvm_amd", stock), []);
    }

    #[test]
    fn each_capability_is_missed_by_name() {
        for needed in NEEDED.iter().chain([&DIRTY_LOG]) {
            let without = |capability| if capability == needed.capability { 0 } else { stock(capability) };
            assert_eq!(unfit("kvm_intel", without), [Unfit::Capability(needed.name)]);
        }
    }

    #[test]
    fn a_dirty_log_that_starts_clean_is_not_enough() {
        let old =
            |capability| if capability == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 { 1 } else { stock(capability) };
        assert_eq!(unfit("kvm_intel", old), [Unfit::Capability(DIRTY_LOG.name)]);
    }

    #[test]
    fn a_software_kvm_is_named_first() {
        assert_eq!(unfit("kvm_pvm", |_| 0).first(), Some(&Unfit::SoftwareKvm));
        assert_eq!(unfit("kvm_pvm", stock), [Unfit::SoftwareKvm]);
    }
}
