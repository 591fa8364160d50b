//! The machine code of guests of a few hundred bytes, each with one behaviour that a forced stop may meet.
//!
//! Owns: the guests' memory layout. Must never: depend on anything that is not in the guest.
//!
//! ```text
//!   entry: 8259A and 8254 are set up, interrupts on ──> behaviour, for ever, in ring 0 or 3
//!   timer interrupt: one more; enough of them: CLI, HLT ends the guest
//! ```

use iced_x86::IcedError;
use iced_x86::code_asm::*;

/// Memory of the guest.
pub const MEMORY_MIB: u64 = 64;
/// Where the parts of the guest lie, guest-physical and linear alike.
pub const ENTRY: u64 = 0x8000;
pub const BODY: u64 = 0x1_0000;
pub const TIMER: u64 = 0xa000;
pub const INVALID_OPCODE: u64 = 0xb000;
pub const TSS: u64 = 0x5100;
pub const STACK_0: u64 = 0x2_8000;
const STACK_3: u64 = 0x3_0000;
const COUNT: u64 = 0x4_0000;
const DATA: u64 = 0x5_0000;
/// Two areas of 16 MiB.
const SOURCE: u64 = 16 << 20;
const TARGET: u64 = 32 << 20;
const COPY_WORDS: u64 = (16 << 20) / 8;

pub const CODE_0: u16 = 0x08;
pub const DATA_0: u16 = 0x10;
const DATA_3: u64 = 0x18 | 3;
const CODE_3: u64 = 0x20 | 3;
/// Interrupts on, and ports and CLI allowed in ring 3.
const RFLAGS_3: u64 = 0x3202;

/// 1,193,182 Hz / 1,000.
const PIT_DIVISOR: u32 = 1_193;
pub const TIMER_VECTOR: u32 = 0x20;

/// What a guest does.
pub const BEHAVIOURS: [&str; 7] =
    ["loop", "store", "rep-movs", "sti", "self-modifying", "fpu-sse", "exception"];

/// Sets up the interrupt controllers and the timer, and goes to the behaviour in `ring`.
pub fn entry(ring: u8) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let outputs: [(u32, u32); 13] = [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, TIMER_VECTOR),
        (0xa1, TIMER_VECTOR + 8),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, 0xfe),
        (0xa1, 0xff),
        // Channel 0, both bytes, mode 2.
        (0x43, 0x34),
        (0x40, PIT_DIVISOR & 0xff),
        (0x40, PIT_DIVISOR >> 8),
    ];
    for (port, value) in outputs {
        a.mov(al, value as i32)?;
        a.out(port as i32, al)?;
    }
    a.mov(rsp, STACK_0)?;
    if ring == 0 {
        a.sti()?;
        a.mov(rax, BODY)?;
        a.jmp(rax)?;
    } else {
        for value in [DATA_3, STACK_3, RFLAGS_3, CODE_3, BODY] {
            a.mov(rax, value)?;
            a.push(rax)?;
        }
        a.iretq()?;
    }
    a.assemble(ENTRY)
}

/// Counts interrupts; the last of `interrupts` ends the guest.
pub fn timer(interrupts: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut last = a.create_label();
    a.push(rax)?;
    a.inc(dword_ptr(COUNT))?;
    a.cmp(dword_ptr(COUNT), interrupts as i32)?;
    a.jae(last)?;
    a.mov(al, 0x20)?;
    a.out(0x20, al)?;
    a.pop(rax)?;
    a.iretq()?;
    a.set_label(&mut last)?;
    a.cli()?;
    a.hlt()?;
    a.assemble(TIMER)
}

/// Goes on behind the two bytes of UD2.
pub fn invalid_opcode() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.add(qword_ptr(rsp), 2)?;
    a.iretq()?;
    a.assemble(INVALID_OPCODE)
}

/// The code of a behaviour; `None` if there is no such one.
pub fn body(behaviour: &str) -> Option<Result<Vec<u8>, IcedError>> {
    let body: fn(&mut CodeAssembler) -> Result<(), IcedError> = match behaviour {
        "loop" => |a| {
            a.inc(rax)?;
            a.lea(rbx, rbx + rax * 2 + 1)?;
            a.xor(rcx, rbx)
        },
        "store" => |a| a.add(qword_ptr(DATA), 1),
        "rep-movs" => |a| {
            a.inc(qword_ptr(SOURCE))?;
            a.mov(rsi, SOURCE)?;
            a.mov(rdi, TARGET)?;
            a.mov(rcx, COPY_WORDS)?;
            a.rep().movsq()
        },
        "sti" => |a| {
            a.inc(rax)?;
            a.cli()?;
            a.inc(rbx)?;
            a.sti()?;
            a.inc(rcx)
        },
        "self-modifying" => |a| {
            // The operand of the second instruction, whose address the first one names.
            a.inc(byte_ptr(BODY + 8))?;
            a.mov(al, 0)?;
            a.add(rbx, rax)
        },
        "fpu-sse" => |a| {
            a.fld1()?;
            a.fadd_2(st0, st1)?;
            a.cvtsi2sd(xmm1, rax)?;
            a.addsd(xmm0, xmm1)?;
            a.paddq(xmm2, xmm0)?;
            a.inc(rax)
        },
        "exception" => |a| {
            a.inc(rax)?;
            a.ud2()
        },
        _ => return None,
    };
    let assemble = || {
        let mut a = CodeAssembler::new(64)?;
        if behaviour == "fpu-sse" {
            a.fninit()?;
            a.fldz()?;
        }
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        body(&mut a)?;
        if behaviour == "fpu-sse" {
            a.fstp(st1)?;
        }
        a.jmp(again)?;
        a.assemble(BODY)
    };
    Some(assemble())
}
