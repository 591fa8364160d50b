//! What an instruction means for a step over it.
//!
//! Owns: which instructions meet the trap flag, by which KVM steps, or an exception of their own. Must never: look at the
//! guest; `stepper.rs` does.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

pub(super) const DIVIDE_ERROR: u8 = 0;
const BREAKPOINT: u8 = 3;
const OVERFLOW: u8 = 4;
const BOUND_RANGE: u8 = 5;
pub(super) const INVALID_OPCODE: u8 = 6;
const NOT_AVAILABLE: u8 = 7;
const NOT_PRESENT: u8 = 11;
const STACK_FAULT: u8 = 12;
pub(super) const GENERAL_PROTECTION: u8 = 13;
pub(super) const PAGE_FAULT: u8 = 14;
const X87_ERROR: u8 = 16;
const SIMD_ERROR: u8 = 19;

const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;

/// Flags on the stack, at `offset` bytes from its top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Image {
    pub(super) offset: u64,
    pub(super) len_bytes: usize,
}

/// How a step over an instruction is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The CPU does it.
    Plain,
    /// The CPU does it, and stores the flags at the new top of the stack.
    StoresFlags { len_bytes: usize },
    /// The CPU does it, and takes the flags from there.
    LoadsFlags(Image),
    /// SYSCALL: the CPU would store the trap flag in R11.
    Enters,
    /// SYSRET: the CPU would load the flags from R11, and run on.
    Leaves,
    /// Not at all.
    Never(&'static str),
}

/// How `instruction` is stepped over.
pub(super) fn way(instruction: &Instruction) -> Way {
    let image = |offset, len_bytes| Way::LoadsFlags(Image { offset, len_bytes });
    match instruction.mnemonic() {
        Mnemonic::Pushf => Way::StoresFlags { len_bytes: 2 },
        Mnemonic::Pushfd => Way::StoresFlags { len_bytes: 4 },
        Mnemonic::Pushfq => Way::StoresFlags { len_bytes: 8 },
        Mnemonic::Popf => image(0, 2),
        Mnemonic::Popfd => image(0, 4),
        Mnemonic::Popfq => image(0, 8),
        // Behind RIP and CS.
        Mnemonic::Iret => image(4, 2),
        Mnemonic::Iretd => image(8, 4),
        Mnemonic::Iretq => image(16, 8),
        // With more prefixes than REX.W, processors differ.
        Mnemonic::Syscall if instruction.len() == 2 => Way::Enters,
        Mnemonic::Sysretq if instruction.len() == 3 => Way::Leaves,
        Mnemonic::Syscall
        | Mnemonic::Sysret
        | Mnemonic::Sysretq
        | Mnemonic::Sysenter
        | Mnemonic::Sysexit
        | Mnemonic::Sysexitq => Way::Never("a system call of 32-bit code, or with prefixes"),
        // Its own debug exception would be taken for the step's.
        Mnemonic::Int1 => Way::Never("the guest debugs itself"),
        Mnemonic::Mov | Mnemonic::Pop if loads(instruction, Register::SS) => {
            Way::Never("it loads SS, and the CPU would step over the next instruction too")
        }
        Mnemonic::Mov if instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_dr() => {
            Way::Never("the guest sets breakpoints")
        }
        _ => Way::Plain,
    }
}

fn loads(instruction: &Instruction, register: Register) -> bool {
    instruction.op0_kind() == OpKind::Register && instruction.op0_register() == register
}

/// The exception or interrupt, besides #PF, #GP and #UD, that `instruction` most likely leads to.
pub(super) fn own_vector(instruction: &Instruction, cr0: u64) -> u8 {
    let changes_segment = instruction.op_count() > 0
        && instruction.op0_kind() == OpKind::Register
        && instruction.op0_register().is_segment_register();
    match instruction.mnemonic() {
        Mnemonic::Int => instruction.immediate8(),
        Mnemonic::Int3 => BREAKPOINT,
        Mnemonic::Into => OVERFLOW,
        Mnemonic::Bound => BOUND_RANGE,
        Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Aam => DIVIDE_ERROR,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf => NOT_PRESENT,
        _ if changes_segment => NOT_PRESENT,
        _ if uses_vectors(instruction) => {
            if cr0 & CR0_TS != 0 {
                NOT_AVAILABLE
            } else {
                SIMD_ERROR
            }
        }
        _ if is_x87(instruction) => {
            if cr0 & (CR0_TS | CR0_EM) != 0 {
                NOT_AVAILABLE
            } else {
                X87_ERROR
            }
        }
        _ => STACK_FAULT,
    }
}

fn is_x87(instruction: &Instruction) -> bool {
    use iced_x86::CpuidFeature::{FPU, FPU287, FPU387};
    instruction.mnemonic() == Mnemonic::Wait
        || instruction.cpuid_features().iter().any(|feature| matches!(feature, FPU | FPU287 | FPU387))
}

fn uses_vectors(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|index| {
        instruction.op_kind(index) == OpKind::Register && instruction.op_register(index).is_vector_register()
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn decoded(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    #[test]
    fn instructions_that_meet_the_trap_flag_are_known() {
        let image = |offset, len_bytes| Way::LoadsFlags(Image { offset, len_bytes });
        for (what, bytes, expected) in [
            ("pushfq", &[0x9c][..], Way::StoresFlags { len_bytes: 8 }),
            ("pushf", &[0x66, 0x9c], Way::StoresFlags { len_bytes: 2 }),
            ("popfq", &[0x9d], image(0, 8)),
            ("popf", &[0x66, 0x9d], image(0, 2)),
            ("iretq", &[0x48, 0xcf], image(16, 8)),
            ("iretd", &[0xcf], image(8, 4)),
            ("syscall", &[0x0f, 0x05], Way::Enters),
            ("sysretq", &[0x48, 0x0f, 0x07], Way::Leaves),
            ("mov eax, ss", &[0x8c, 0xd0], Way::Plain),
            ("mov ds, eax", &[0x8e, 0xd8], Way::Plain),
            ("mov rax, dr6", &[0x0f, 0x21, 0xf0], Way::Plain),
            ("nop", &[0x90], Way::Plain),
        ] {
            assert_eq!(way(&decoded(bytes)), expected, "{what}");
        }
        for (what, bytes) in [
            ("syscall with an operand size", &[0x66, 0x0f, 0x05][..]),
            ("sysretq with an operand size", &[0x66, 0x48, 0x0f, 0x07]),
            ("sysretd", &[0x0f, 0x07]),
            ("sysenter", &[0x0f, 0x34]),
            ("int1", &[0xf1]),
            ("mov ss, eax", &[0x8e, 0xd0]),
            ("mov dr7, rax", &[0x0f, 0x23, 0xf8]),
        ] {
            assert!(matches!(way(&decoded(bytes)), Way::Never(_)), "{what}");
        }
        let locked = decoded(&[0xf0, 0x0f, 0x05]);
        assert!(locked.is_invalid(), "LOCK SYSCALL is the CPU's to refuse");
    }

    #[test]
    fn exceptions_of_an_instruction_are_known() {
        for (what, bytes, expected) in [
            ("int 80", &[0xcd, 0x80][..], 0x80),
            ("int3", &[0xcc], BREAKPOINT),
            ("div rcx", &[0x48, 0xf7, 0xf1], DIVIDE_ERROR),
            ("fadd", &[0xd8, 0xc1], X87_ERROR),
            ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1], SIMD_ERROR),
            ("mov ds, eax", &[0x8e, 0xd8], NOT_PRESENT),
            ("push rax", &[0x50], STACK_FAULT),
        ] {
            assert_eq!(own_vector(&decoded(bytes), 0), expected, "{what}");
        }
        assert_eq!(own_vector(&decoded(&[0xd8, 0xc1]), CR0_TS), NOT_AVAILABLE);
    }
}
