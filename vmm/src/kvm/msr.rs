//! Which MSRs KVM may handle by itself: those that are the guest's own state and nothing else.
//!
//! Owns: KVM's MSR filter. Must never: let an MSR through whose value is the host's or counts something; the machine
//! answers all others (`machine/msr.rs`).

use kvm_ioctls::{Cap, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use super::{KvmError, enable_cap};

/// Every MSR that a guest with our CPUID table can change and later see, and that KVM keeps: SYSENTER, SYSCALL, GS
/// bases, PAT. It is saved with the vCPU. EFER, FS and GS bases are too, with the special registers.
pub(super) const SAVED: [u32; 9] = [
    0x174,       // IA32_SYSENTER_CS
    0x175,       // IA32_SYSENTER_ESP
    0x176,       // IA32_SYSENTER_EIP
    0x277,       // IA32_PAT
    0xc000_0081, // STAR
    0xc000_0082, // LSTAR
    0xc000_0083, // CSTAR
    0xc000_0084, // SFMASK
    0xc000_0102, // KERNEL_GS_BASE
];
/// EFER, FS base, GS base.
const IN_SPECIAL_REGISTERS: [u32; 3] = [0xc000_0080, 0xc000_0100, 0xc000_0101];

/// Makes the guest leave at every access to an MSR that is not its own state.
pub(super) fn filter(vm: &VmFd) -> Result<(), KvmError> {
    let reasons = MsrExitReason::Unknown | MsrExitReason::Inval | MsrExitReason::Filter;
    let reasons = u64::from(reasons.bits());
    enable_cap(vm, Cap::X86UserSpaceMsr as u32, reasons, "KVM_ENABLE_CAP(X86_USER_SPACE_MSR)")?;
    // One range for each: 12 of the 16 that there may be.
    let ranges: Vec<MsrFilterRange<'_>> = SAVED
        .into_iter()
        .chain(IN_SPECIAL_REGISTERS)
        .map(|base| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: 1,
            bitmap: &[1],
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(KvmError::call("KVM_X86_SET_MSR_FILTER"))
}
