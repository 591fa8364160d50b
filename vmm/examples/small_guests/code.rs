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
pub const PAGE_FAULT: u64 = 0xc000;
pub const SYSTEM_CALL: u64 = 0xd000;
pub const GENERAL_PROTECTION: u64 = 0xe000;
pub const DEBUG: u64 = 0xf000;
pub const SOFTWARE: u64 = 0xf800;
pub const PAGE_DIRECTORY: u64 = 0x3000;
pub const TSS: u32 = 0x5100;
pub const STACK_0: u64 = 0x2_8000;
const STACK_3: u64 = 0x3_0000;
const COUNT: u64 = 0x4_0000;
const FAULTS: u64 = 0x4_0008;
const DATA: u64 = 0x5_0000;
const DEBUGS: u64 = 0x4_0010;
/// Code that a page fault rewrites.
const REWRITTEN: u64 = 0x4_8000;
const REP_STOSB: u32 = 0xaaf3;
/// `loop` to itself: as many turns as the string has elements.
const LOOP: u32 = 0xfee2;
const RET: u32 = 0xc3;
const NOP: i32 = 0x90;
const PUSHFQ_JMP_RSI: i32 = 0xe6_ff9c;
const TRAP_FLAG: i32 = 0x100;
/// A page of 2 MiB that ring 3 may not reach, and one that it may not reach before its first fault.
pub const RING_0_PAGE: u64 = 50 << 20;
pub const LATE_PAGE: u64 = 52 << 20;
/// Behind the end of memory.
const NOT_MAPPED: u64 = MEMORY_MIB << 20;
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
/// Selectors for SYSCALL, and those for SYSRET less 16.
const STAR: u64 = (CODE_3 - 16) << 48 | (CODE_0 as u64) << 32;
/// Interrupts off, and the trap flag.
const SFMASK: u64 = 0x300;
const SYSTEM_CALL_MSRS: [(u32, u64); 3] =
    [(0xc000_0081, STAR), (0xc000_0082, SYSTEM_CALL), (0xc000_0084, SFMASK)];

/// How many pauses of a guest are looked at.
pub const PAUSES: usize = 4;
const PAUSE_PORT: u32 = 0x80;

/// 1,193,182 Hz / 1,000, and / 20.
pub const EVERY_MS: u32 = 1_193;
pub const EVERY_50_MS: u32 = 59_659;
pub const TIMER_VECTOR: u32 = 0x20;
pub const SOFTWARE_VECTOR: u32 = 0x30;

/// Exits of the entry code.
pub const ENTRY_EXITS: usize = 13;

/// Sets up the interrupt controllers and the timer with its divisor, and goes to the behaviour in `ring`.
pub fn entry(ring: u8, pit_divisor: u32) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let outputs: [(u32, u32); ENTRY_EXITS] = [
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
        (0x40, pit_divisor & 0xff),
        (0x40, pit_divisor >> 8),
    ];
    for (port, value) in outputs {
        a.mov(al, value as i32)?;
        a.out(port as i32, al)?;
    }
    for (msr, value) in SYSTEM_CALL_MSRS {
        a.mov(ecx, msr)?;
        a.mov(eax, value as u32)?;
        a.mov(edx, (value >> 32) as u32)?;
        a.wrmsr()?;
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

/// Goes on after three bytes, those of SYSRET.
pub fn general_protection() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.add(rsp, 8)?;
    a.inc(r14)?;
    a.add(qword_ptr(rsp), 3)?;
    a.iretq()?;
    a.assemble(GENERAL_PROTECTION)
}

/// Counts debug exceptions.
pub fn debug() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.inc(dword_ptr(DEBUGS))?;
    a.iretq()?;
    a.assemble(DEBUG)
}

/// Answers INT n.
pub fn software() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.inc(r14)?;
    a.iretq()?;
    a.assemble(SOFTWARE)
}

/// What a page fault of `behaviour` leads to.
pub fn page_fault(behaviour: &str) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    a.add(rsp, 8)?;
    a.inc(dword_ptr(FAULTS))?;
    match behaviour {
        "string-rewritten" => rewrite_code(&mut a, LOOP)?,
        "flags-fault" => map_or_rewrite(&mut a)?,
        "endless-handler" => {
            let mut here = a.create_label();
            a.set_label(&mut here)?;
            a.jmp(here)?;
        }
        _ => skip_load(&mut a)?,
    }
    a.iretq()?;
    a.assemble(PAGE_FAULT)
}

/// Goes on behind the three bytes of the load that faulted, with branches of its own before.
fn skip_load(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut odd = a.create_label();
    a.test(dword_ptr(FAULTS), 1)?;
    a.jnz(odd)?;
    a.inc(r14)?;
    a.set_label(&mut odd)?;
    a.add(qword_ptr(rsp), 3)
}

/// Makes the instruction that faulted another one of two bytes.
fn rewrite_code(a: &mut CodeAssembler, code: u32) -> Result<(), IcedError> {
    a.push(rax)?;
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.mov(word_ptr(rax), code as i32)?;
    a.pop(rax)
}

/// Lets ring 3 reach the late page; for the other one, makes the instruction a NOP.
fn map_or_rewrite(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut late, mut done) = (a.create_label(), a.create_label());
    a.push(rax)?;
    a.mov(rax, cr2)?;
    a.cmp(rax, LATE_PAGE as i32)?;
    a.jae(late)?;
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.mov(byte_ptr(rax), NOP)?;
    a.jmp(done)?;
    a.set_label(&mut late)?;
    a.or(dword_ptr(page_entry(LATE_PAGE)), 4)?;
    a.invlpg(ptr(rax))?;
    a.set_label(&mut done)?;
    a.pop(rax)
}

/// Where the page directory has the entry for `address`.
pub const fn page_entry(address: u64) -> u64 {
    PAGE_DIRECTORY + (address >> 21) * 8
}

/// Goes back to the ring that EDI says.
pub fn system_call() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut ring_3 = a.create_label();
    a.add(rbx, r11)?;
    a.test(edi, edi)?;
    a.jnz(ring_3)?;
    a.push(r11)?;
    a.popfq()?;
    a.jmp(rcx)?;
    a.set_label(&mut ring_3)?;
    a.sysretq()?;
    a.assemble(SYSTEM_CALL)
}

/// How often a guest with pauses goes round, four times each, between two of them.
pub fn pause_turns(behaviour: &str) -> u32 {
    match behaviour {
        "rep-movs" => 1,
        "string-rewritten" | "sti-look-alike" => 3,
        "strings" | "flags-fault" | "trap-flag" | "interrupt" | "sysret" => 10,
        _ => 50,
    }
}

/// The code of a behaviour; `None` if there is no such one. With `pause_turns` it writes a port after so many turns.
pub fn body(behaviour: &str, pause_turns: Option<u32>) -> Option<Result<Vec<u8>, IcedError>> {
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
        "strings" => |a| {
            // Reads what it has just written, and both cross a page's end.
            a.inc(qword_ptr(SOURCE + 0xfb0))?;
            a.mov(rsi, SOURCE + 0xfb0)?;
            a.mov(rdi, SOURCE + 0xfb3)?;
            a.mov(rcx, 100u64)?;
            a.rep().movsb()?;
            // At odd addresses, so that an element lies in two pages.
            a.inc(rax)?;
            a.mov(rdi, TARGET + 0xffd)?;
            a.mov(rcx, 3_000u64)?;
            a.rep().stosw()?;
            // To below, over what is still to be read.
            a.mov(rsi, TARGET + 0x1000)?;
            a.mov(rdi, TARGET + 0xff4)?;
            a.mov(rcx, 600u64)?;
            a.rep().movsq()?;
            // Downwards.
            a.std()?;
            a.mov(rcx, 20u64)?;
            a.rep().movsd()?;
            a.cld()
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
        "page-fault" => |a| {
            a.mov(edx, NOT_MAPPED as u32)?;
            a.mov(rax, ptr(rdx))?;
            a.inc(rbx)
        },
        "system-call" => |a| {
            a.mov(edi, cs)?;
            a.and(edi, 3)?;
            a.syscall()?;
            a.inc(rax)
        },
        "flags" => |a| {
            a.inc(rax)?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.lea(rbx, rbx + rcx * 2)?;
            a.push(rcx)?;
            a.popfq()
        },
        "flags-fault" => flags_fault,
        "endless-handler" => |a| a.mov(al, byte_ptr(NOT_MAPPED)),
        "trap-flag" => trap_flag,
        "interrupt" => |a| {
            a.int(SOFTWARE_VECTOR as i32)?;
            // A divide error; its handler skips two bytes.
            a.xor(edx, edx)?;
            a.div(edx)?;
            a.inc(rax)
        },
        "sysret" => sysret,
        "string-rewritten" => string_rewritten,
        "sti-look-alike" => sti_look_alike,
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
        // A store without any conditional branch has no place that a count of them could name.
        if behaviour != "store" {
            a.inc(r15)?;
            a.test(r15, 3)?;
            a.jnz(again)?;
        }
        if let Some(turns) = pause_turns {
            a.inc(r13)?;
            a.cmp(r13, turns as i32)?;
            a.jb(again)?;
            a.xor(r13, r13)?;
            a.out(PAUSE_PORT as i32, al)?;
        }
        a.jmp(again)?;
        a.assemble(BODY)
    };
    Some(assemble())
}

/// PUSHF onto a page that ring 3 may not reach, and that the fault makes another instruction; then onto one that the first
/// fault makes reachable.
fn flags_fault(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut ring_0 = a.create_label();
    a.mov(edi, cs)?;
    a.and(edi, 3)?;
    a.jz(ring_0)?;
    a.mov(rdx, rsp)?;
    a.mov(ebx, REWRITTEN as u32)?;
    a.mov(dword_ptr(rbx), PUSHFQ_JMP_RSI)?;
    let mut back = a.create_label();
    a.lea(rsi, ptr(back))?;
    a.mov(rsp, RING_0_PAGE + 0x1008)?;
    a.jmp(rbx)?;
    a.set_label(&mut back)?;
    a.mov(rsp, LATE_PAGE + 0x1008)?;
    a.pushfq()?;
    a.pop(rcx)?;
    a.add(rax, rcx)?;
    a.mov(rsp, rdx)?;
    a.set_label(&mut ring_0)?;
    a.pushfq()?;
    a.pop(rcx)?;
    a.add(rax, rcx)
}

/// Sets its own trap flag for some instructions.
fn trap_flag(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.or(qword_ptr(rsp), TRAP_FLAG)?;
    a.popfq()?;
    a.inc(rax)?;
    a.lea(rbx, ptr(rbx + rax))?;
    a.pushfq()?;
    a.and(qword_ptr(rsp), !TRAP_FLAG)?;
    a.popfq()?;
    a.inc(rax)
}

/// Ring 0 leaves for ring 3 by it; from then on it is a #GP.
fn sysret(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut next = a.create_label();
    a.lea(rcx, ptr(next))?;
    a.mov(r11d, RFLAGS_3 as u32)?;
    a.sysretq()?;
    a.set_label(&mut next)?;
    a.inc(rax)
}

/// A fill of a page that ring 3 may not reach; the fault makes it a loop.
fn string_rewritten(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ebx, REWRITTEN as u32)?;
    a.mov(dword_ptr(rbx), (RET << 16 | REP_STOSB) as i32)?;
    a.mov(rdi, RING_0_PAGE + 0x100)?;
    a.mov(ecx, 100)?;
    a.inc(rax)?;
    a.call(rbx)
}

/// Interrupts that wait are taken after an instruction that ends as STI does, before one that stores the flags. A guest that
/// sees a trap flag in them crashes.
fn sti_look_alike(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let (mut wait, mut sees, mut clean) = (a.create_label(), a.create_label(), a.create_label());
    a.cli()?;
    a.mov(ecx, 200)?;
    a.set_label(&mut wait)?;
    a.dec(ecx)?;
    a.jnz(wait)?;
    a.sti()?;
    a.mov(al, 0xfb_u32 as i32 - 0x100)?;
    a.pushfq()?;
    a.pop(rcx)?;
    a.test(ecx, TRAP_FLAG)?;
    a.jnz(sees)?;
    a.mov(edi, cs)?;
    a.and(edi, 3)?;
    a.cli()?;
    a.sti()?;
    a.mov(al, 0xfb_u32 as i32 - 0x100)?;
    a.syscall()?;
    a.test(r11d, TRAP_FLAG)?;
    a.jz(clean)?;
    a.set_label(&mut sees)?;
    // There is no handler.
    a.int3()?;
    a.set_label(&mut clean)?;
    a.inc(rax)
}
