//! The trap flag, where a step has left it in the guest's memory.
//!
//! Owns: taking it out again. Must never: change a word that the step has not stored, or that the guest itself could not have
//! stored there. So a word counts as stored by the step only if it is new and exactly what the CPU stores.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::kvm::paging::AddressSpace;

pub(super) const RFLAGS_TF: u64 = 1 << 8;
pub(super) const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_VM: u64 = 1 << 17;
/// What the CPU pushes without an error code: RIP, CS, RFLAGS, RSP, SS.
const FRAME_WORDS: usize = 5;
const FRAME_ALIGNMENT: u64 = 16;
/// RSP0 in a 64-bit TSS.
const TSS_RSP0: u64 = 4;

type Frame = [u64; FRAME_WORDS];

/// Where the frame of an exception or interrupt would lie, and what lies there before the step.
#[derive(Clone, Copy, Debug)]
pub(super) struct FramePlace {
    start: u64,
    before: Option<Frame>,
}

impl FramePlace {
    /// For a guest that stands at `regs`; none if its task state segment cannot be read.
    pub(super) fn of(delivery: AddressSpace<'_>, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Self> {
        let stack = if sregs.ss.dpl == 0 {
            regs.rsp
        } else {
            let mut rsp0 = [0; 8];
            delivery
                .read(sregs.tr.base.wrapping_add(TSS_RSP0), &mut rsp0)
                .then_some(u64::from_le_bytes(rsp0))?
        };
        let end = stack & !(FRAME_ALIGNMENT - 1);
        let start = end.wrapping_sub(FRAME_WORDS as u64 * 8);
        Some(Self { start, before: frame_at(delivery, start) })
    }

    /// If the step from `regs` over an instruction that ends at `next_ip` has left its frame there: takes the trap flag out.
    pub(super) fn clean(
        &self,
        delivery: AddressSpace<'_>,
        regs: &kvm_regs,
        sregs: &kvm_sregs,
        next_ip: Option<u64>,
    ) {
        let Some(now) = frame_at(delivery, self.start) else { return };
        if self.before != Some(now) && is_frame_of(&now, regs, sregs, next_ip) {
            let flags = now[2] & !RFLAGS_TF;
            delivery.write(self.start + 2 * 8, &flags.to_le_bytes());
        }
    }
}

fn frame_at(delivery: AddressSpace<'_>, start: u64) -> Option<Frame> {
    let mut bytes = [0; FRAME_WORDS * 8];
    if !delivery.read(start, &mut bytes) {
        return None;
    }
    let mut frame = [0; FRAME_WORDS];
    for (word, bytes) in frame.iter_mut().zip(bytes.as_chunks().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    Some(frame)
}

/// Is `frame` what the CPU pushes for a guest at `regs` that is stepped?
fn is_frame_of(frame: &Frame, regs: &kvm_regs, sregs: &kvm_sregs, next_ip: Option<u64>) -> bool {
    let [rip, cs, rflags, rsp, ss] = *frame;
    (rip == regs.rip || Some(rip) == next_ip)
        && cs == u64::from(sregs.cs.selector)
        && rflags & !RFLAGS_RF == (regs.rflags | RFLAGS_TF) & !RFLAGS_RF
        && rsp == regs.rsp
        && ss == u64::from(sregs.ss.selector)
}

/// If a PUSHF of so many bytes has led from `regs` to `now`, and stored the flags at `stack`: takes the trap flag out.
pub(super) fn clean_pushed(
    space: AddressSpace<'_>,
    (regs, now): (&kvm_regs, &kvm_regs),
    (next_ip, stack): (u64, u64),
    len_bytes: usize,
) {
    let done = now.rip == next_ip && now.rsp == regs.rsp.wrapping_sub(len_bytes as u64);
    let mut stored = [0; 8];
    if !done || !space.read(stack, &mut stored[..len_bytes]) {
        return;
    }
    let mut expected = ((regs.rflags | RFLAGS_TF) & !(RFLAGS_RF | RFLAGS_VM)).to_le_bytes();
    expected[len_bytes..].fill(0);
    if stored == expected {
        let clean = u64::from_le_bytes(stored) & !RFLAGS_TF;
        space.write(stack, &clean.to_le_bytes()[..len_bytes]);
    }
}

#[cfg(test)]
mod tests {
    use devices::GuestRam;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::segments;

    const STACK: u64 = 0x8000;
    /// Present, writable, accessed, dirty; for ring 3 too.
    const USER_PAGE: u64 = 0x67;
    const KERNEL_PAGE: u64 = 0x63;

    /// The first 2 MiB, each page with the bits `page`, and registers in `ring`.
    fn guest(ring: u8, page: u64) -> (GuestRam, kvm_regs, kvm_sregs) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 21)]).unwrap();
        for (table, entry) in
            [(0x1000, 0x2000 | USER_PAGE), (0x2000, 0x3000 | USER_PAGE), (0x3000, page | 0x80)]
        {
            ram.write_obj(entry, GuestAddress(table)).unwrap();
        }
        ram.write_obj(STACK, GuestAddress(0x5000 + TSS_RSP0)).unwrap();
        let mut sregs =
            kvm_sregs { cr0: 0x8001_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
        (sregs.cs, sregs.ss) = (segments::code_64(0x20, ring), segments::data(0x18, ring));
        sregs.tr.base = 0x5000;
        let regs = kvm_regs { rip: 0x7000, rsp: 0x9000, rflags: 0x202, ..Default::default() };
        (ram, regs, sregs)
    }

    fn word(ram: &GuestRam, at: u64) -> u64 {
        ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// What is in memory where a frame would be after a step that left `frame` there.
    fn cleaned(frame: Frame, before: Frame) -> u64 {
        let (ram, regs, sregs) = guest(3, KERNEL_PAGE);
        let start = STACK - 40;
        ram.write_obj(before, GuestAddress(start)).unwrap();
        let delivery = AddressSpace::of_delivery(&ram, &sregs);
        let place = FramePlace::of(delivery, &regs, &sregs).unwrap();
        ram.write_obj(frame, GuestAddress(start)).unwrap();
        place.clean(delivery, &regs, &sregs, Some(0x7003));
        word(&ram, start + 16)
    }

    #[test]
    fn a_frame_of_the_step_loses_the_trap_flag() {
        let frame = [0x7000, 0x20, 0x1_0302, 0x9000, 0x18];
        assert_eq!(cleaned(frame, [0; 5]), 0x1_0202, "a fault");
        assert_eq!(cleaned([0x7003, 0x20, 0x302, 0x9000, 0x18], [0; 5]), 0x202, "INT n");
    }

    #[test]
    fn other_words_keep_the_trap_flag() {
        let frame = [0x7000, 0x20, 0x302, 0x9000, 0x18];
        assert_eq!(cleaned(frame, frame), 0x302, "it was there before");
        for (index, other) in [(0, 0x7001), (1, 0x23), (2, 0x306), (3, 0x9008), (4, 0x10)] {
            let mut wrong = frame;
            wrong[index] = other;
            assert_eq!(cleaned(wrong, [0; 5]), wrong[2], "word {index} is not the CPU's");
        }
    }

    fn after_pushf(page: u64, ring: u8, stored: u64, change: fn(&mut kvm_regs)) -> u64 {
        let (ram, regs, sregs) = guest(ring, page);
        let mut now = kvm_regs { rip: 0x7001, rsp: regs.rsp - 8, ..regs };
        change(&mut now);
        ram.write_obj(stored, GuestAddress(regs.rsp - 8)).unwrap();
        let space = AddressSpace::of_instruction(&ram, &sregs, regs.rflags);
        clean_pushed(space, (&regs, &now), (0x7001, regs.rsp - 8), 8);
        word(&ram, regs.rsp - 8)
    }

    #[test]
    fn pushed_flags_lose_the_trap_flag_and_nothing_else_does() {
        assert_eq!(after_pushf(USER_PAGE, 3, 0x302, |_| {}), 0x202);
        assert_eq!(after_pushf(USER_PAGE, 3, 0xaa302, |_| {}), 0xaa302, "data of the program");
        assert_eq!(after_pushf(USER_PAGE, 3, 0x302, |now| now.rip = 0x7000), 0x302, "it has not begun");
        assert_eq!(after_pushf(USER_PAGE, 3, 0x302, |now| now.rsp += 8), 0x302, "something else was done");
        assert_eq!(after_pushf(KERNEL_PAGE, 3, 0x302, |_| {}), 0x302, "no page of the program");
    }
}
