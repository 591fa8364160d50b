//! REP MOVS and REP STOS, a page at a time: stepped by iterations, a copy of megabytes would take minutes.
//!
//! Owns: iterations that cannot fault or leave a trace that the CPU's would not, since the CPU has just done one in the same
//! pages. Must never: do the last one, by which the CPU ends the instruction.

use devices::GuestRam;
use iced_x86::{Code, Instruction, OpKind, Register};
use kvm_bindings::kvm_regs;

use crate::kvm::{KvmError, PAGE_BYTES, Vcpu};

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

    /// Goes on to the last iteration in the pages that the one before has touched. The guest stands at `regs`, between two.
    pub(super) fn go_on(self, vcpu: &Vcpu, ram: &GuestRam, regs: &kvm_regs) -> Result<(), KvmError> {
        let mut count = self.iterations(regs);
        if self.copies && count > 0 {
            let (Some(source), Some(target)) = (vcpu.translate(regs.rsi)?, vcpu.translate(regs.rdi)?) else {
                return Ok(());
            };
            count = self.independent(source, target, count);
        }
        if count == 0 {
            return Ok(());
        }
        let len_bytes = count * self.element_bytes;
        let mut bytes = vec![0; len_bytes as usize];
        if self.copies {
            if !vcpu.read_linear(ram, regs.rsi, &mut bytes)? {
                return Ok(());
            }
        } else {
            let element = regs.rax.to_le_bytes();
            let element = &element[..self.element_bytes as usize];
            bytes.chunks_exact_mut(element.len()).for_each(|place| place.copy_from_slice(element));
        }
        if !vcpu.write_linear(ram, regs.rdi, &bytes)? {
            return Ok(());
        }
        let mut regs = *regs;
        regs.rcx -= count;
        regs.rdi += len_bytes;
        if self.copies {
            regs.rsi += len_bytes;
        }
        vcpu.set_registers(&regs)
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
    use iced_x86::{Decoder, DecoderOptions};

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
    fn a_copy_that_reads_what_it_writes_is_cut_short() {
        assert_eq!(BYTES.independent(0x1000, 0x1001, 100), 1);
        assert_eq!(WORDS.independent(0x1000, 0x1004, 100), 0);
        assert_eq!(WORDS.independent(0x1000, 0x1100, 100), 32);
        assert_eq!(WORDS.independent(0x1100, 0x1000, 100), 100, "what is written was read before");
        assert_eq!(WORDS.independent(0x1000, 0x9000, 100), 100);
    }
}
