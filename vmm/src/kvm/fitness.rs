//! What makes a KVM unfit before any guest runs: its kind, and what it lacks.
//!
//! Owns: the words for it. The monitor's refusal and `vmft doctor` both take them from here. Must never:
//! measure; what only a guest can show is `doctor`'s.

use std::arch::x86_64::__cpuid;
use std::fmt;
use std::path::PathBuf;

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
    /// Its module does not use nested paging.
    ShadowPaging(&'static Nested),
    /// It lacks something.
    Capability(&'static str),
}

/// A kind of nested paging: what the processor calls it, and who says whether it is used.
#[derive(Debug, PartialEq, Eq)]
pub struct Nested {
    /// As the processor's manual calls it.
    pub name: &'static str,
    module: &'static str,
    parameter: &'static str,
}

const EPT: Nested = Nested { name: "EPT", module: "kvm_intel", parameter: "ept" };
const NPT: Nested = Nested { name: "NPT", module: "kvm_amd", parameter: "npt" };

impl Unfit {
    /// What was seen.
    pub fn seen(self) -> String {
        match self {
            Self::SoftwareKvm => {
                "it is kvm-pvm, a software KVM that emulates ring 0 and cannot mask CPUID in \
                                  ring 3"
                    .into()
            }
            Self::ShadowPaging(Nested { name, module, parameter }) => format!(
                "it maps the guest by shadow page tables and not by {name} (parameter {parameter} of {module}), and replays \
                 differ"
            ),
            Self::Capability(name) => format!("it lacks {name}"),
        }
    }

    /// What helps.
    pub fn advice(self) -> String {
        match self {
            Self::SoftwareKvm => "a host with VT-x or AMD-V is needed".into(),
            Self::ShadowPaging(Nested { name, module, parameter }) => format!(
                "load {module} with {parameter}=1 (`modprobe -r {module}; modprobe {module} {parameter}=1`, and look for \
                 {parameter}=0 in /etc/modprobe.d and on the kernel's command line); a processor without {name} is not enough"
            ),
            Self::Capability(_) => "a host kernel of Linux 5.10 or newer with a stock KVM is needed".into(),
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

/// What `/sys/module` says of KVM.
pub struct Modules {
    root: PathBuf,
    /// The nested paging of this CPU, whose module drives KVM unless it is kvm-pvm. Modules that are built into the kernel
    /// are there on any CPU.
    nested: &'static Nested,
}

impl Modules {
    /// This host's.
    pub fn of_host() -> Self {
        // Bit 2 of ECX: SVM (AMD64 Architecture Programmer's Manual, volume 3, appendix E.4).
        let has_svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & 1 << 2 != 0;
        Self { root: "/sys/module".into(), nested: if has_svm { &NPT } else { &EPT } }
    }

    /// The name of the module that drives KVM, or "unknown".
    pub fn flavour(&self) -> &'static str {
        ["kvm_pvm", self.nested.module]
            .into_iter()
            .find(|module| self.root.join(module).exists())
            .unwrap_or("unknown")
    }

    /// The nested paging that the module uses, or why it is not known. That there is none is what [`unfit`] says.
    pub fn nested_paging(&self) -> Result<&'static Nested, String> {
        self.uses_nested().map(|_| self.nested)
    }

    fn uses_nested(&self) -> Result<bool, String> {
        let Nested { module, parameter, .. } = self.nested;
        let path = self.root.join(module).join("parameters").join(parameter);
        let value = std::fs::read_to_string(&path)
            .map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        match value.trim() {
            "Y" | "1" => Ok(true),
            "N" | "0" => Ok(false),
            other => Err(format!("{} says '{other}', and neither Y nor N", path.display())),
        }
    }
}

/// What is wrong with a KVM of these modules whose answer to KVM_CHECK_EXTENSION is `answer`.
pub(super) fn unfit(modules: &Modules, answer: impl Fn(u32) -> i32) -> Vec<Unfit> {
    let kind = if modules.flavour() == "kvm_pvm" {
        Some(Unfit::SoftwareKvm)
    } else {
        (modules.uses_nested() == Ok(false)).then_some(Unfit::ShadowPaging(modules.nested))
    };
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

    /// A host with these modules and their parameters.
    fn host(nested: &'static Nested, parameters: &[(&str, &str)]) -> (tempfile::TempDir, Modules) {
        let directory = tempfile::tempdir().unwrap();
        for (path, value) in parameters {
            let path = directory.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        }
        let root = directory.path().to_owned();
        (directory, Modules { root, nested })
    }

    fn stock_host() -> (tempfile::TempDir, Modules) {
        host(&NPT, &[("kvm_amd/parameters/npt", "Y\n")])
    }

    #[test]
    fn a_stock_kvm_is_fit() {
        let (_directory, modules) = stock_host();
        assert_eq!((modules.flavour(), unfit(&modules, stock)), ("kvm_amd", vec![]));
        assert_eq!(modules.nested_paging(), Ok(&NPT));
    }

    #[test]
    fn shadow_paging_is_unfit_and_told_with_what_to_do() {
        for (nested, path, value) in [
            (&EPT, "kvm_intel/parameters/ept", "N\n"),
            (&NPT, "kvm_amd/parameters/npt", "N\n"),
            (&NPT, "kvm_amd/parameters/npt", "0\n"),
        ] {
            let (_directory, modules) = host(nested, &[(path, value)]);
            assert_eq!(unfit(&modules, stock), [Unfit::ShadowPaging(nested)]);
            let told = Unfit::ShadowPaging(nested).to_string();
            let Nested { module, parameter, .. } = nested;
            assert!(told.contains(&format!("load {module} with {parameter}=1")), "{told}");
        }
    }

    #[test]
    fn only_the_module_of_this_cpu_counts() {
        let built_in = [("kvm_intel/parameters/ept", "N\n"), ("kvm_amd/parameters/npt", "Y\n")];
        let (_directory, modules) = host(&NPT, &built_in);
        assert_eq!((modules.flavour(), unfit(&modules, stock)), ("kvm_amd", vec![]));
        let (_directory, modules) = host(&EPT, &built_in);
        assert_eq!(
            (modules.flavour(), unfit(&modules, stock)),
            ("kvm_intel", vec![Unfit::ShadowPaging(&EPT)])
        );
    }

    #[test]
    fn a_parameter_that_cannot_be_read_is_told_and_not_refused() {
        for (files, why) in [
            (&[("kvm_intel/refcnt", "0")][..], "ept cannot be read: No such file"),
            (&[("kvm_intel/parameters/ept", "maybe\n")], "ept says 'maybe', and neither Y nor N"),
            (&[], "ept cannot be read"),
        ] {
            let (_directory, modules) = host(&EPT, files);
            assert_eq!(unfit(&modules, stock), []);
            let told = modules.nested_paging().unwrap_err();
            assert!(told.contains(why), "{told}");
        }
    }

    #[test]
    fn each_capability_is_missed_by_name() {
        for needed in NEEDED.iter().chain([&DIRTY_LOG]) {
            let without = |capability| if capability == needed.capability { 0 } else { stock(capability) };
            assert_eq!(unfit(&stock_host().1, without), [Unfit::Capability(needed.name)]);
        }
    }

    #[test]
    fn a_dirty_log_that_starts_clean_is_not_enough() {
        let old =
            |capability| if capability == KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 { 1 } else { stock(capability) };
        assert_eq!(unfit(&stock_host().1, old), [Unfit::Capability(DIRTY_LOG.name)]);
    }

    #[test]
    fn a_software_kvm_is_named_first() {
        let (_directory, modules) = host(&NPT, &[("kvm_pvm/refcnt", "0"), ("kvm_amd/parameters/npt", "N")]);
        assert_eq!(unfit(&modules, |_| 0).first(), Some(&Unfit::SoftwareKvm));
        assert_eq!(unfit(&modules, stock), [Unfit::SoftwareKvm]);
    }
}
