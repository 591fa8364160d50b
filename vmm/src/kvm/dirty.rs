//! Which pages of guest memory were written: by the guest itself, KVM's dirty log; by its devices, the memory's own.
//!
//! Owns: the memory slots' tracking. Must never: take part in anything else than finding out what differs. Followers'
//! devices write what the primary's do, so only a guest on its way to a follower ([`DirtyLog`]) needs theirs.
//! States: off -> on, everything counts as written -> pages marked clean count again once they are written.
//!
//! A clean page costs the guest a fault at its next write, one that is left as written costs nothing.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_LOG_DIRTY_PAGES, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_userspace_memory_region,
};
use std::sync::Arc;

use devices::GuestRam;
use kvm_ioctls::VmFd;
use vm_memory::GuestMemoryBackend;

use super::{KvmError, enable_cap};

/// KVM_CLEAR_DIRTY_LOG: absent from kvm-ioctls; `_IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)`.
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = 0xc018_aec0;
/// Pages in a word of a bitmap.
const WORD_PAGES: usize = u64::BITS as usize;

/// Lets `vm` keep pages as written until they are marked clean one by one.
pub(super) fn enable(vm: &VmFd) -> Result<(), KvmError> {
    let flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags, "KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)")
}

/// The numbers of the pages whose bits are set, rising; `bitmaps` as [`Slots::written`] gives them.
pub fn page_numbers(bitmaps: &[(u64, Vec<u64>)]) -> impl Iterator<Item = u64> {
    bitmaps.iter().flat_map(|(first, bits)| {
        bits.iter().enumerate().flat_map(move |(index, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(first + (index * WORD_PAGES) as u64 + u64::from(bit))
            })
        })
    })
}

/// How many pages [`page_numbers`] names.
pub fn page_count(bitmaps: &[(u64, Vec<u64>)]) -> u64 {
    bitmaps.iter().flat_map(|(_, bits)| bits).map(|word| u64::from(word.count_ones())).sum()
}

/// Guest memory as KVM has it, with or without tracking.
#[derive(Clone, Debug)]
pub(super) struct Slots {
    slots: Vec<kvm_userspace_memory_region>,
    tracked: bool,
}

impl Slots {
    pub(super) fn new(slots: Vec<kvm_userspace_memory_region>) -> Self {
        Self { slots, tracked: false }
    }

    /// Turns tracking on, with everything counting as written, or off.
    pub(super) fn track(&mut self, vm: &VmFd, on: bool) -> Result<(), KvmError> {
        if self.tracked == on {
            return Ok(());
        }
        for slot in &mut self.slots {
            slot.flags = if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
            // SAFETY: the slot is the one that `vm` has already, with other flags; its memory is still mapped.
            unsafe { vm.set_user_memory_region(*slot) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        self.tracked = on;
        Ok(())
    }

    /// For each slot its first page's number and a bit for each page that was written.
    pub(super) fn written(&self, vm: &VmFd) -> Result<Vec<(u64, Vec<u64>)>, KvmError> {
        let page_of = |slot: &kvm_userspace_memory_region| slot.guest_phys_addr / ft_log::PAGE_BYTES as u64;
        self.slots
            .iter()
            .map(|slot| {
                vm.get_dirty_log(slot.slot, slot.memory_size as usize)
                    .map(|bits| (page_of(slot), bits))
                    .map_err(KvmError::call("KVM_GET_DIRTY_LOG"))
            })
            .collect()
    }

    /// Marks the pages whose bits are set as clean; `bits` is for the slot number `index`.
    pub(super) fn mark_clean(&self, vm: &VmFd, index: usize, bits: &mut [u64]) -> Result<(), KvmError> {
        let slot = &self.slots[index];
        let clear = kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages: (slot.memory_size / ft_log::PAGE_BYTES as u64) as u32,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
        };
        assert!(bits.len() * WORD_PAGES >= clear.num_pages as usize, "a bit for each page");
        // SAFETY: the bitmap has a bit for each of `num_pages` pages, and KVM only reads it.
        let result = unsafe { vmm_sys_util::ioctl::ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG, &clear) };
        if result < 0 {
            let source = std::io::Error::last_os_error();
            return Err(KvmError::Call { call: "KVM_CLEAR_DIRTY_LOG", source });
        }
        Ok(())
    }

    /// As [`Self::written`], and marks all pages as clean.
    pub(super) fn take(&self, vm: &VmFd) -> Result<Vec<(u64, Vec<u64>)>, KvmError> {
        let written = self.written(vm)?;
        for (index, (_, bits)) in written.iter().enumerate() {
            self.mark_clean(vm, index, &mut bits.clone())?;
        }
        Ok(written)
    }

    /// For other threads: this guest's log.
    pub(super) fn log(&self, vm: &Arc<VmFd>, ram: &GuestRam) -> DirtyLog {
        DirtyLog { vm: Arc::clone(vm), slots: self.clone(), ram: ram.clone() }
    }

    /// Makes the vCPU forget address translations. KVM does that for itself whenever it protects a page, so one page
    /// that counts as written is marked clean. Only for a guest whose log nobody else reads.
    pub(super) fn flush_translations(&mut self, vm: &VmFd) -> Result<(), KvmError> {
        if !self.clean_one(vm)? {
            self.track(vm, false)?;
            self.track(vm, true)?;
            self.clean_one(vm)?;
        }
        Ok(())
    }

    fn clean_one(&self, vm: &VmFd) -> Result<bool, KvmError> {
        let Some((_, mut bits)) = self.written(vm)?.into_iter().next() else { return Ok(false) };
        let Some(word) = bits.iter().position(|word| *word != 0) else { return Ok(false) };
        let lowest = bits[word] & bits[word].wrapping_neg();
        bits.fill(0);
        bits[word] = lowest;
        self.mark_clean(vm, 0, &mut bits).map(|()| true)
    }
}

/// What is written to the memory of a tracked guest, by itself and by its devices. Any thread may look, also while the
/// guest runs.
#[derive(Clone)]
pub struct DirtyLog {
    vm: Arc<VmFd>,
    slots: Slots,
    ram: GuestRam,
}

impl DirtyLog {
    /// Whose memory it is.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The pages written since the last call, as [`page_numbers`] takes them. From now on they count as clean: whoever
    /// copies them afterwards and looks here again misses nothing.
    pub fn take(&self) -> Result<Vec<(u64, Vec<u64>)>, KvmError> {
        let mut written = self.slots.take(&self.vm)?;
        // The memory's regions are the slots, in their order.
        for ((_, bits), region) in written.iter_mut().zip(self.ram.iter()) {
            let by_devices = (**region).bitmap().get_and_reset();
            bits.iter_mut().zip(by_devices).for_each(|(bits, more)| *bits |= more);
        }
        Ok(written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_numbers_are_those_of_the_bits_from_the_piece_on() {
        let bitmaps = [(0, vec![0b101, 0, 1 << 63]), (0x10_0000, vec![2])];
        assert_eq!(page_numbers(&bitmaps).collect::<Vec<_>>(), [0, 2, 191, 0x10_0001]);
        assert_eq!(page_count(&bitmaps), 4);
        assert_eq!(page_numbers(&[(7, vec![0])]).count(), 0);
    }
}
