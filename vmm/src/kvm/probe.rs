//! What only measurements of the host need of KVM.
//!
//! Owns: nothing. Must never: be used for a guest that runs on.

use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug, kvm_guest_debug_arch};

use super::{KvmError, Vcpu};

/// DR7: breakpoint 0 on, on execution, of one byte; bit 10 is always one (Intel SDM volume 3, 18.2.4).
const DR7_EXECUTE_0: u64 = 1 << 10 | 1 << 1;

impl Vcpu {
    /// Makes the guest leave with [`super::Exit::Step`] before it executes the instruction at `linear`.
    pub fn break_at(&self, linear: u64) -> Result<(), KvmError> {
        let mut arch = kvm_guest_debug_arch::default();
        arch.debugreg[0] = linear;
        arch.debugreg[7] = DR7_EXECUTE_0;
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        self.fd()
            .set_guest_debug(&kvm_guest_debug { control, arch, ..Default::default() })
            .map_err(KvmError::call("KVM_SET_GUEST_DEBUG"))
    }
}
