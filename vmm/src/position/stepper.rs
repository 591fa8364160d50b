//! One instruction of the guest at a time.
//!
//! Owns: keeping the trap flag, by which KVM steps, out of the guest. Must never: leave it in anything that the guest can
//! read: what PUSHF stores, the frame of an exception, R11 behind SYSCALL.
//!
//! ```text
//!   SYSCALL, SYSRET:  done here, since the CPU would run on behind them
//!   all others:       trap flag on ──> enter ──> KVM_EXIT_DEBUG ──> the flag is taken out of what was stored
//! ```
//! Of REP MOVS and REP STOS a step takes a page: the CPU does the first iteration there, `strings.rs` more.
//! Where an instruction faults, breakpoints of the CPU stop the guest at the handler. A host without them (QEMU's emulated
//! AMD-V) runs it to the end of the handler, and the step is that long: the trap flag is in the frame meanwhile.

use devices::GuestRam;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::PositionError;
use super::strings::Strings;
use crate::kvm::{Exit, KvmError, PAGE_BYTES, Vcpu, segments};

const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
const RFLAGS_ONE: u64 = 1 << 1;
/// What SYSRET takes of R11 (AMD64 APM volume 3).
const RFLAGS_SYSRET: u64 = 0x3c_7fd7;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;
/// Longest instruction.
const CODE_BYTES: usize = 15;
/// Words of the frame that the CPU pushes without an error code: RIP, CS, RFLAGS, RSP, SS.
const FRAME_WORDS: u64 = 5;
const FRAME_ALIGNMENT: u64 = 16;
/// RSP0 in a 64-bit TSS.
const TSS_RSP0: u64 = 4;

const INVALID_OPCODE: u8 = 6;
const GENERAL_PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// Takes a guest from instruction to instruction. Afterwards [`Vcpu::single_step`] has to be switched off.
#[derive(Debug)]
pub struct Stepper {
    /// Something else than a step came last: I/O may be unfinished, and something on its way into the guest.
    fresh: bool,
}

impl Default for Stepper {
    fn default() -> Self {
        Self { fresh: true }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stepped {
    /// Was a conditional branch executed, taken or not, and nothing else?
    pub conditional: bool,
    /// Is a REP MOVS or REP STOS under way?
    pub in_string: bool,
    /// [`Exit::Step`]: the step is done. [`Exit::Kicked`]: it is too, or it has not begun. Others come in between.
    pub exit: Exit,
}

impl Stepped {
    fn plain(exit: Exit) -> Self {
        Self { conditional: false, in_string: false, exit }
    }
}

impl Stepper {
    /// One step.
    pub fn step(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Stepped, PositionError> {
        if self.fresh
            && let Some(exit) = vcpu.complete()?
        {
            return Ok(Stepped::plain(exit));
        }
        let regs = vcpu.registers()?;
        let sregs = vcpu.special_registers()?;
        let delivering = if self.fresh { vcpu.delivering()? } else { None };
        if self.fresh && (vcpu.has_breakpoints()? || regs.rflags & RFLAGS_TF != 0) {
            return Err(unsteppable(&regs, "the guest debugs itself"));
        }
        self.fresh = false;
        let view = View { vcpu, ram, regs: &regs, sregs: &sregs };
        let instruction = if delivering.is_some() { None } else { view.decode()? };
        if let Some(instruction) = instruction
            && view.system_call(&instruction)?
        {
            return Ok(Stepped::plain(Exit::Step));
        }
        let frame = view.frame()?;
        let handlers =
            view.handlers(&[PAGE_FAULT, GENERAL_PROTECTION, delivering.unwrap_or(INVALID_OPCODE)])?;
        vcpu.single_step_to(&handlers)?;
        let exit = loop {
            match vcpu.enter()? {
                // A handler that runs within this step runs to its end.
                Exit::Kicked if vcpu.last_registers().rip != regs.rip => {}
                exit => break exit,
            }
        };
        self.fresh = exit != Exit::Step;
        let now = vcpu.last_registers();
        let view = View { vcpu, ram, regs: &regs, sregs: &sregs };
        view.clean_frame(frame, instruction.as_ref())?;
        let stores_flags =
            |it: &Instruction| matches!(it.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq);
        if exit == Exit::Step && instruction.as_ref().is_some_and(stores_flags) {
            view.clean_word(now.rsp)?;
        }
        let conditional = exit == Exit::Step && instruction.is_some_and(|it| is_done(&it, now.rip));
        let under_way = exit == Exit::Step && now.rip == regs.rip;
        let strings = instruction.filter(|_| under_way).and_then(|it| Strings::of(&it, now.rflags));
        if let Some(strings) = strings {
            strings.go_on(vcpu, ram, &now)?;
        }
        tracing::trace!(
            from = format_args!("{:#x}", regs.rip),
            to = format_args!("{:#x}", now.rip),
            conditional,
            ?exit,
            "step"
        );
        Ok(Stepped { conditional, in_string: strings.is_some(), exit })
    }
}

/// Is `instruction` a conditional branch that leads to `rip`?
fn is_done(instruction: &Instruction, rip: u64) -> bool {
    instruction.flow_control() == FlowControl::ConditionalBranch
        && (rip == instruction.next_ip() || rip == instruction.near_branch_target())
}

fn unsteppable(regs: &kvm_regs, what: &'static str) -> PositionError {
    PositionError::Unsteppable { rip: regs.rip, what }
}

/// The guest as it is before a step.
struct View<'a> {
    vcpu: &'a Vcpu,
    ram: &'a GuestRam,
    regs: &'a kvm_regs,
    sregs: &'a kvm_sregs,
}

impl View<'_> {
    fn handlers(&self, vectors: &[u8]) -> Result<Vec<u64>, KvmError> {
        let mut handlers = Vec::new();
        for vector in vectors {
            handlers.extend(self.vcpu.handler(self.ram, self.sregs, *vector)?);
        }
        Ok(handlers)
    }

    /// The next instruction; none if it cannot be read, which is a fault.
    fn decode(&self) -> Result<Option<Instruction>, PositionError> {
        let cs = &self.sregs.cs;
        let bits = match (cs.l, cs.db, cs.base) {
            (1, _, _) => 64,
            (0, 1, 0) => 32,
            _ => return Err(unsteppable(self.regs, "it is in a mode with segments or 16 bits")),
        };
        let mut code = [0; CODE_BYTES];
        // It may end before a page that is not there.
        let mut known = 0;
        while known < CODE_BYTES {
            let at = self.regs.rip.wrapping_add(known as u64);
            let piece = ((PAGE_BYTES - at % PAGE_BYTES) as usize).min(CODE_BYTES - known);
            if !self.vcpu.read_linear(self.ram, at, &mut code[known..known + piece])? {
                break;
            }
            known += piece;
        }
        let mut decoder = Decoder::with_ip(bits, &code[..known], self.regs.rip, DecoderOptions::NONE);
        Ok(Some(decoder.decode()).filter(|instruction| !instruction.is_invalid()))
    }

    /// Does what SYSCALL or SYSRET does, if it is one (AMD64 APM volume 3). The CPU would take the trap flag with it.
    fn system_call(&self, instruction: &Instruction) -> Result<bool, PositionError> {
        let enters = match instruction.mnemonic() {
            Mnemonic::Syscall if self.sregs.cs.l == 1 => true,
            Mnemonic::Sysretq => false,
            Mnemonic::Syscall | Mnemonic::Sysret | Mnemonic::Sysenter | Mnemonic::Sysexit => {
                return Err(unsteppable(self.regs, "a system call of 32-bit code"));
            }
            _ => return Ok(false),
        };
        let star = self.vcpu.msr(MSR_STAR)?;
        let (mut regs, mut sregs) = (*self.regs, *self.sregs);
        let (code, stack, ring) = if enters {
            regs.rcx = instruction.next_ip();
            regs.r11 = regs.rflags & !RFLAGS_RF;
            regs.rip = self.vcpu.msr(MSR_LSTAR)?;
            regs.rflags = regs.r11 & !self.vcpu.msr(MSR_SFMASK)?;
            let code = (star >> 32) as u16 & !3;
            (code, code + 8, 0)
        } else {
            regs.rip = regs.rcx;
            regs.rflags = regs.r11 & RFLAGS_SYSRET | RFLAGS_ONE;
            let base = (star >> 48) as u16;
            ((base + 16) | 3, (base + 8) | 3, 3)
        };
        (sregs.cs, sregs.ss) = (segments::code_64(code, ring), segments::data(stack, ring));
        self.vcpu.set_special_registers(&sregs)?;
        self.vcpu.set_registers(&regs)?;
        Ok(true)
    }

    /// Where the frame of an exception or interrupt would lie, by its upper end.
    fn frame(&self) -> Result<u64, KvmError> {
        if self.sregs.ss.dpl == 0 {
            return Ok(self.regs.rsp & !(FRAME_ALIGNMENT - 1));
        }
        let mut rsp0 = [0; 8];
        self.vcpu.read_linear(self.ram, self.sregs.tr.base.wrapping_add(TSS_RSP0), &mut rsp0)?;
        Ok(u64::from_le_bytes(rsp0) & !(FRAME_ALIGNMENT - 1))
    }

    /// If the step has left its frame below `end`: takes the trap flag out of it.
    fn clean_frame(&self, end: u64, instruction: Option<&Instruction>) -> Result<(), KvmError> {
        let start = end.wrapping_sub(FRAME_WORDS * 8);
        let mut rip = [0; 8];
        if !self.vcpu.read_linear(self.ram, start, &mut rip)? {
            return Ok(());
        }
        let rip = u64::from_le_bytes(rip);
        if rip == self.regs.rip || instruction.is_some_and(|instruction| rip == instruction.next_ip()) {
            self.clean_word(start + 2 * 8)?;
        }
        Ok(())
    }

    /// Takes the trap flag out of the flags that were stored at `linear`.
    fn clean_word(&self, linear: u64) -> Result<(), KvmError> {
        let mut flags = [0; 2];
        if self.vcpu.read_linear(self.ram, linear, &mut flags)? {
            let clean = u16::from_le_bytes(flags) & !(RFLAGS_TF as u16);
            self.vcpu.write_linear(self.ram, linear, &clean.to_le_bytes())?;
        }
        Ok(())
    }
}
