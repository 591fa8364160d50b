//! `/dev/kvm` and the virtual machine: capabilities, memory slots.
//!
//! Owns: the KVM system and VM handles. Must never: create an in-kernel interrupt controller, timer or
//! eventfd binding; each would reach the guest past the log.

use std::sync::Arc;

use devices::{GuestRam, layout::HPET_BASE};
use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_EXCEPTION_PAYLOAD, KVM_MAX_CPUID_ENTRIES,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::dirty::{self, DirtyLog, Slots};
use super::fitness::{self, Modules, Unfit};
use super::read_page::ReadPage;
use super::{KvmError, Vcpu, enable_cap, msr};

/// Three pages that Intel's KVM needs for real-mode emulation; outside of RAM and of device windows.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The KVM system handle.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and refuses a KVM that lacks what deterministic replay needs.
    ///
    /// # Errors
    /// No `/dev/kvm`, no permission, a software KVM, shadow paging, or a missing capability, each named.
    pub fn open() -> Result<Self, KvmError> {
        let (kvm, unfit) = Self::examine()?;
        if let Some(reason) = unfit.first() {
            return Err(KvmError::Unfit(*reason));
        }
        if let Err(why) = Modules::of_host().nested_paging() {
            tracing::warn!("it is not known whether this host's KVM uses nested paging: {why}");
        }
        Ok(kvm)
    }

    /// Opens `/dev/kvm` and says everything that is wrong with it.
    ///
    /// # Errors
    /// No `/dev/kvm`, or no permission.
    pub fn examine() -> Result<(Self, Vec<Unfit>), KvmError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|error| {
            let advice = match error.errno() {
                libc::ENOENT => {
                    "Load the module (`modprobe kvm-intel` or `modprobe kvm-amd`) and enable virtualisation in the firmware"
                }
                libc::EACCES | libc::EPERM => "Run as root or join the group that owns /dev/kvm",
                _ => "Run `vmft doctor` to see what this host offers",
            };
            KvmError::Open(error.into(), advice)
        })?;
        let unfit = fitness::unfit(&Modules::of_host(), |capability| {
            fd.check_extension_raw(libc::c_ulong::from(capability))
        });
        Ok((Self { fd }, unfit))
    }

    /// What CPUID this host can show to a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::call("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Makes a virtual machine whose memory is `ram`. `ram` must outlive the result.
    pub fn create_vm(&self, ram: GuestRam) -> Result<Vm, KvmError> {
        let fd = self.fd.create_vm().map_err(KvmError::call("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
        // Without it an exception on its way into the guest is saved as if it were delivered, and the RF flag that KVM
        // sets on delivery is missing in the frame that a follower's guest pushes.
        enable_cap(&fd, KVM_CAP_EXCEPTION_PAYLOAD, 1, "KVM_ENABLE_CAP(EXCEPTION_PAYLOAD)")?;
        dirty::enable(&fd)?;
        msr::filter(&fd)?;
        let mut slots = Vec::new();
        for (slot, region) in ram.iter().enumerate() {
            let userspace_addr = region
                .get_host_address(vm_memory::MemoryRegionAddress(0))
                .map_err(|error| KvmError::BadState(format!("guest memory has no host address: {error}")))?;
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: userspace_addr as u64,
                flags: 0,
            };
            // SAFETY: the region is mapped for as long as `ram` lives, `Vm` keeps a clone of it, and the
            // regions of a GuestRam never overlap.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
            slots.push(region);
        }
        let hpet = ReadPage::map(&fd, slots.len(), HPET_BASE)?;
        Ok(Vm { fd: Arc::new(fd), ram, slots: Slots::new(slots), hpet })
    }
}

/// One virtual machine.
pub struct Vm {
    fd: Arc<VmFd>,
    ram: GuestRam,
    slots: Slots,
    hpet: ReadPage,
}

impl Vm {
    /// What the guest reads at [`HPET_BASE`]: 8 bytes at each offset, from now on. The vCPU stands still.
    pub fn show_hpet(&self, registers: &[(u64, u64)]) {
        self.hpet.show(registers);
    }

    /// Finds out from now on which pages the guest writes, or no longer. At first all count as written.
    pub fn track_writes(&mut self, on: bool) -> Result<(), KvmError> {
        self.slots.track(&self.fd, on)
    }

    /// For each piece of memory the number of its first page, and a bit for each page that was written.
    pub fn written_pages(&self) -> Result<Vec<(u64, Vec<u64>)>, KvmError> {
        self.slots.written(&self.fd)
    }

    /// Marks pages of piece `index` of memory as clean: those whose bits are set.
    pub fn mark_clean(&self, index: usize, bits: &mut [u64]) -> Result<(), KvmError> {
        self.slots.mark_clean(&self.fd, index, bits)
    }

    /// Marks all pages as clean.
    pub fn mark_all_clean(&self) -> Result<(), KvmError> {
        self.slots.take(&self.fd).map(drop)
    }

    /// For other threads: what is written from now on. Writes are tracked.
    pub fn dirty_log(&self) -> DirtyLog {
        self.slots.log(&self.fd, &self.ram)
    }

    /// Makes the vCPU forget what it remembers of the guest's page tables; memory may have changed below it. What
    /// [`Self::written_pages`] says is of no use afterwards.
    pub fn flush_translations(&mut self) -> Result<(), KvmError> {
        self.slots.flush_translations(&self.fd)
    }

    /// Makes the guest's one vCPU with the given CPUID table.
    pub fn create_vcpu(&self, cpuid: &CpuId) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(0).map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        // Paravirtual clocks and the like are non-deterministic; without this KVM offers them to a guest
        // that uses their MSRs without having found them in CPUID.
        let enforce = kvm_enable_cap {
            cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
            args: [1, 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&enforce).map_err(KvmError::call("KVM_ENABLE_CAP(ENFORCE_PV_FEATURE_CPUID)"))?;
        fd.set_cpuid2(cpuid).map_err(KvmError::call("KVM_SET_CPUID2"))?;
        Ok(Vcpu::new(fd))
    }
}
