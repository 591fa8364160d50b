//! REP MOVS and REP STOS, a page at a time: stepped by iterations, a copy of megabytes would take minutes.
//!
//! Owns: iterations that cannot fault or leave a trace that the CPU's would not, since the CPU has just done one in the same
//! pages. Must never: do the last one, by which the CPU ends the instruction; rely on what stood there before the step, whose
//! page faults may have changed the code; reach memory that the guest's page tables refuse.

use iced_x86::{Code, Instruction, OpKind, Register};
use kvm_bindings::kvm_regs;

use crate::kvm::PAGE_BYTES;
use crate::kvm::paging::{Access, AddressSpace};

const RFLAGS_DF: u64 = 1 << 10;

/// REP MOVS or REP STOS, upwards, in a flat address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strings {
    element_bytes: u64,
    copies: bool,
}

impl Strings {
    /// What `instruction` is, if it is one of them.
    pub(super) fn of(instruction: &Instruction, rflags: u64) -> Option<Self> {
        let (element_bytes, copies) = match instruction.code() {
            Code::Movsb_m8_m8 => (1, true),
            Code::Movsw_m16_m16 => (2, true),
            Code::Movsd_m32_m32 => (4, true),
            Code::Movsq_m64_m64 => (8, true),
            Code::Stosb_m8_AL => (1, false),
            Code::Stosw_m16_AX => (2, false),
            Code::Stosd_m32_EAX => (4, false),
            Code::Stosq_m64_RAX => (8, false),
            _ => return None,
        };
        // Other sizes of addresses have other kinds of operands.
        let flat = instruction.op0_kind() == OpKind::MemoryESRDI
            && (!copies || instruction.op1_kind() == OpKind::MemorySegRSI)
            && instruction.segment_prefix() == Register::None;
        let plain = flat && instruction.has_rep_prefix() && rflags & RFLAGS_DF == 0;
        plain.then_some(Self { element_bytes, copies })
    }

    /// Did the CPU do one iteration between these registers, and nothing else?
    pub(super) fn has_led(self, before: &kvm_regs, now: &kvm_regs) -> bool {
        let mut expected = *before;
        expected.rcx = expected.rcx.wrapping_sub(1);
        expected.rdi = expected.rdi.wrapping_add(self.element_bytes);
        if self.copies {
            expected.rsi = expected.rsi.wrapping_add(self.element_bytes);
        }
        // RF says that the instruction is under way.
        expected.rflags = now.rflags;
        expected == *now
    }

    /// Goes on to the last iteration in the pages that the one before has touched. The guest stands at `regs`, between two;
    /// the answer is where it stands then, or none if the CPU has to go on by itself.
    pub(super) fn go_on(self, space: AddressSpace<'_>, regs: &kvm_regs) -> Option<kvm_regs> {
        let mut count = self.iterations(regs);
        if count == 0 || space.same_page(regs.rip, regs.rdi) {
            return None;
        }
        if self.copies {
            let source = space.translate(regs.rsi, Access::Read)?;
            count = self.independent(source, space.translate(regs.rdi, Access::Write)?, count);
        }
        let len_bytes = count * self.element_bytes;
        let mut bytes = vec![0; len_bytes as usize];
        if self.copies {
            if !space.read(regs.rsi, &mut bytes) {
                return None;
            }
        } else {
            let element = regs.rax.to_le_bytes();
            let element = &element[..self.element_bytes as usize];
            bytes.chunks_exact_mut(element.len()).for_each(|place| place.copy_from_slice(element));
        }
        if count == 0 || !space.write(regs.rdi, &bytes) {
            return None;
        }
        let mut regs = *regs;
        regs.rcx -= count;
        regs.rdi += len_bytes;
        if self.copies {
            regs.rsi += len_bytes;
        }
        Some(regs)
    }

    /// How many iterations but the last lie in the pages of the one before.
    fn iterations(self, regs: &kvm_regs) -> u64 {
        let room = |address: u64| {
            let into = address % PAGE_BYTES;
            // Else the iteration before was in another page, or in both.
            if into < self.element_bytes { 0 } else { (PAGE_BYTES - into) / self.element_bytes }
        };
        let source = if self.copies { room(regs.rsi) } else { u64::MAX };
        regs.rcx.saturating_sub(1).min(room(regs.rdi)).min(source)
    }

    /// How many of `count` iterations read nothing that one of them has written, with guest-physical addresses.
    fn independent(self, source: u64, target: u64, count: u64) -> u64 {
        if target > source { count.min((target - source) / self.element_bytes) } else { count }
    }
}

#[cfg(test)]
mod tests {
    use devices::GuestRam;
    use iced_x86::{Decoder, DecoderOptions};
    use kvm_bindings::kvm_sregs;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn decoded(bits: u32, bytes: &[u8]) -> Instruction {
        Decoder::with_ip(bits, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    const BYTES: Strings = Strings { element_bytes: 1, copies: true };
    const WORDS: Strings = Strings { element_bytes: 8, copies: true };

    #[test]
    fn plain_copies_and_fills_are_known() {
        let of = |bytes: &[u8]| Strings::of(&decoded(64, bytes), 2);
        assert_eq!(of(&[0xf3, 0xa4]), Some(BYTES), "rep movsb");
        assert_eq!(of(&[0xf3, 0x48, 0xa5]), Some(WORDS), "rep movsq");
        assert_eq!(of(&[0xf3, 0xab]), Some(Strings { element_bytes: 4, copies: false }), "rep stosd");
        assert_eq!(of(&[0xf3, 0x66, 0xab]), Some(Strings { element_bytes: 2, copies: false }), "rep stosw");
    }

    #[test]
    fn what_is_not_plain_is_left_to_the_cpu() {
        for (what, bytes) in [
            ("movsb once", &[0xa4][..]),
            ("rep movsb from GS", &[0x65, 0xf3, 0xa4]),
            ("rep movsb with 32-bit addresses", &[0x67, 0xf3, 0xa4]),
            ("rep lodsb", &[0xf3, 0xac]),
            ("repe cmpsb", &[0xf3, 0xa6]),
        ] {
            assert_eq!(Strings::of(&decoded(64, bytes), 2), None, "{what}");
        }
        assert_eq!(Strings::of(&decoded(64, &[0xf3, 0xa4]), RFLAGS_DF), None, "downwards");
        assert_eq!(Strings::of(&decoded(32, &[0xf3, 0xa4]), 2), None, "32-bit code");
    }

    #[test]
    fn iterations_stay_in_the_pages_of_the_one_before() {
        let at = |rcx, rsi, rdi| kvm_regs { rcx, rsi, rdi, ..Default::default() };
        assert_eq!(BYTES.iterations(&at(5_000, 0x1001, 0x5001)), 4_095);
        assert_eq!(BYTES.iterations(&at(5_000, 0x1f01, 0x5001)), 255, "the source's page ends first");
        assert_eq!(BYTES.iterations(&at(10, 0x1001, 0x5001)), 9, "the last is the CPU's");
        assert_eq!(BYTES.iterations(&at(0, 0x1001, 0x5001)), 0);
        assert_eq!(BYTES.iterations(&at(10, 0x2000, 0x5001)), 0, "nothing is known of this page");
        assert_eq!(WORDS.iterations(&at(5_000, 0x1004, 0x5008)), 0, "the one before lay in two pages");
        assert_eq!(WORDS.iterations(&at(5_000, 0x100c, 0x5008)), 510, "the next in both is left out");
        let fill = Strings { copies: false, ..BYTES };
        assert_eq!(fill.iterations(&at(5_000, 0x2000, 0x5001)), 4_095, "a fill has no source");
    }

    #[test]
    fn an_iteration_changes_its_registers_only() {
        let before = kvm_regs { rcx: 9, rsi: 0x100, rdi: 0x200, rax: 5, rflags: 2, ..Default::default() };
        let now = kvm_regs { rcx: 8, rsi: 0x108, rdi: 0x208, rflags: 0x1_0002, ..before };
        assert!(WORDS.has_led(&before, &now));
        assert!(!WORDS.has_led(&before, &before), "it has not begun");
        assert!(!BYTES.has_led(&before, &now), "another element");
        assert!(!WORDS.has_led(&before, &kvm_regs { rax: 6, ..now }), "a handler has run");
        let fill = Strings { copies: false, ..WORDS };
        assert!(fill.has_led(&before, &kvm_regs { rsi: 0x100, ..now }));
    }

    /// Present, accessed, dirty; writable; for ring 3 too.
    const PRESENT: u64 = 0x61;
    const WRITABLE: u64 = 2;
    const USER: u64 = 4;

    /// Registers and memory after a REP STOSB of ring 3 into the page with the bits `target`; it stands in another one.
    fn fill_page(target: u64) -> (Option<kvm_regs>, u64) {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let tables = [
            (0x1000, 0x2000 | PRESENT | WRITABLE | USER),
            (0x2000, 0x3000 | PRESENT | WRITABLE | USER),
            (0x3000, 0x4000 | PRESENT | WRITABLE | USER),
            (0x4000 + 5 * 8, 0x5000 | target),
            (0x4000 + 6 * 8, 0x6000 | PRESENT | USER),
        ];
        for (at, entry) in tables {
            ram.write_obj::<u64>(entry, GuestAddress(at)).unwrap();
        }
        let mut sregs =
            kvm_sregs { cr0: 0x8001_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
        sregs.ss.dpl = 3;
        let regs =
            kvm_regs { rip: 0x6000, rcx: 800, rdi: 0x5001, rax: 0x77, rflags: 2, ..Default::default() };
        let space = AddressSpace::of_instruction(&ram, &sregs, regs.rflags);
        let led_to = Strings { copies: false, ..BYTES }.go_on(space, &regs);
        (led_to, ram.read_obj(GuestAddress(0x5001)).unwrap())
    }

    #[test]
    fn only_pages_that_the_guest_may_write_are_written() {
        let (regs, filled) = fill_page(PRESENT | WRITABLE | USER);
        assert_eq!(regs.map(|regs| (regs.rcx, regs.rdi)), Some((1, 0x5001 + 799)));
        assert_eq!(filled, 0x7777_7777_7777_7777);
        for (what, target) in [
            ("a page of ring 0", PRESENT | WRITABLE),
            ("a read-only page", PRESENT | USER),
            ("a page that was never written", 0x21 | WRITABLE | USER),
            ("no page", WRITABLE | USER),
        ] {
            assert_eq!(fill_page(target), (None, 0), "{what}");
        }
    }

    #[test]
    fn a_copy_that_reads_what_it_writes_is_cut_short() {
        assert_eq!(BYTES.independent(0x1000, 0x1001, 100), 1);
        assert_eq!(WORDS.independent(0x1000, 0x1004, 100), 0);
        assert_eq!(WORDS.independent(0x1000, 0x1100, 100), 32);
        assert_eq!(WORDS.independent(0x1100, 0x1000, 100), 100, "what is written was read before");
        assert_eq!(WORDS.independent(0x1000, 0x9000, 100), 100);
    }
}
