//! A page that the guest reads as memory and whose writes are exits.
//!
//! Owns: the page and its slot in KVM. Must never: be written while the vCPU runs.

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{MmapRegion, VolatileMemory};

use super::KvmError;

/// The page's size, which is that of a guest's pages.
const BYTES: usize = ft_log::PAGE_BYTES;

/// The page, zero at first. It must outlive the guest.
pub(super) struct ReadPage(MmapRegion<()>);

impl ReadPage {
    /// A page at guest physical address `gpa`, which belongs to nothing else, in the free slot `slot` of `vm`.
    pub(super) fn map(vm: &VmFd, slot: usize, gpa: u64) -> Result<Self, KvmError> {
        let page = MmapRegion::new(BYTES)
            .map_err(|error| KvmError::BadState(format!("no memory for a page of registers: {error}")))?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: gpa,
            memory_size: BYTES as u64,
            userspace_addr: page.as_ptr() as u64,
            flags: KVM_MEM_READONLY,
        };
        // SAFETY: the page is mapped for as long as the result lives, which `Vm` keeps, and `gpa` is no part of RAM.
        unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        Ok(Self(page))
    }

    /// Sets 8 bytes at each offset. The vCPU stands still.
    pub(super) fn show(&self, registers: &[(u64, u64)]) {
        for (offset, value) in registers {
            // What is outside of the page belongs to no register of it.
            if let Ok(place) = self.0.get_ref::<u64>(*offset as usize) {
                place.store(value.to_le());
            }
        }
    }
}
