//! One instruction of the guest at a time.
//!
//! Owns: keeping the trap flag, by which KVM steps, out of the guest. Must never: leave it in anything that the guest can
//! read: what PUSHF stores, the frame of an exception, R11 behind SYSCALL; give a program what its page tables or its
//! ring refuse; stay where it is without saying so.
//!
//! ```text
//!   SYSCALL, SYSRET:  done here, since the CPU would run on after them
//!   all others:       trap flag on ──> enter ──> KVM_EXIT_DEBUG ──> the flag is taken out of what was stored
//!   neither is exact: Unsteppable, and the guest is as it was
//! ```
//! Of REP MOVS and REP STOS a step takes a page: the CPU does the first iteration there, `strings.rs` more.
//! Where an instruction faults, breakpoints of the CPU stop the guest at the handler. A host without them (QEMU's emulated
//! AMD-V) runs it to the end of the handler, and the step is that long: the trap flag is in the frame meanwhile.
//! A guest with a trap flag of its own is not stepped: KVM would take its debug exceptions for ends of steps.

use devices::GuestRam;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction};
use kvm_bindings::{kvm_regs, kvm_sregs};

use super::PositionError;
use super::instructions::{GENERAL_PROTECTION, INVALID_OPCODE, Image, PAGE_FAULT, Way, own_vector, way};
use super::strings::Strings;
use super::system_call::{self, Msrs, Outcome};
use super::trap_flag::{FramePlace, RFLAGS_TF, clean_pushed};
use crate::kvm::paging::AddressSpace;
use crate::kvm::{Exit, Handler, Vcpu};

const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_SFMASK: u32 = 0xc000_0084;
const EFER_LMA: u64 = 1 << 10;
/// Longest instruction.
const CODE_BYTES: usize = 15;
/// Signals that a handler may take within a step; a handler without an end takes more.
const HANDLER_KICKS_MAX: u32 = 256;

const DEBUGS_ITSELF: &str = "the guest debugs itself";
const SEGMENTS: &str = "it is in a mode with segments or 16 bits";

/// Takes a guest from instruction to instruction. Afterwards [`Vcpu::single_step`] has to be switched off.
#[derive(Debug)]
pub struct Stepper {
    /// Something else than a step came last: I/O may be unfinished, and something on its way into the guest.
    fresh: bool,
    /// Steps since the last conditional branch, pages of strings not counted.
    idle_steps: u32,
}

impl Default for Stepper {
    fn default() -> Self {
        Self { fresh: true, idle_steps: 0 }
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
    ///
    /// # Errors
    /// [`PositionError::Unsteppable`] if it cannot be done exactly. Unless a handler without an end was entered, the guest
    /// is as it was.
    pub fn step(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Stepped, PositionError> {
        let stepped = self.any_step(vcpu, ram)?;
        if stepped.conditional {
            self.idle_steps = 0;
        } else if stepped.exit == Exit::Step && !stepped.in_string {
            self.idle_steps += 1;
        }
        Ok(stepped)
    }

    /// Fails if `steps_max` steps have passed without a conditional branch: whoever waits for one has waited enough.
    ///
    /// # Errors
    /// [`PositionError::NoBranch`].
    pub fn expect_branch(&self, vcpu: &Vcpu, steps_max: u32) -> Result<(), PositionError> {
        if self.idle_steps < steps_max {
            return Ok(());
        }
        Err(PositionError::NoBranch { rip: vcpu.last_registers().rip, steps: self.idle_steps })
    }

    fn any_step(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Stepped, PositionError> {
        if self.fresh
            && let Some(exit) = vcpu.complete()?
        {
            return Ok(Stepped::plain(exit));
        }
        let view = View { ram, regs: &vcpu.registers()?, sregs: &vcpu.special_registers()? };
        let delivering = if self.fresh { vcpu.delivering()? } else { None };
        if self.fresh && (vcpu.has_breakpoints()? || view.regs.rflags & RFLAGS_TF != 0) {
            return Err(view.unsteppable(DEBUGS_ITSELF));
        }
        let instruction = if delivering.is_some() { None } else { view.decode()? };
        let way = instruction.as_ref().map_or(Way::Plain, way);
        match way {
            Way::Never(what) => return Err(view.unsteppable(what)),
            Way::LoadsFlags(image) => view.check_flags(image)?,
            Way::Enters | Way::Leaves => {
                if view.system_call(vcpu, way, instruction.as_ref())? {
                    self.fresh = false;
                    return Ok(Stepped::plain(Exit::Step));
                }
            }
            Way::Plain | Way::StoresFlags { .. } => {}
        }
        let frame = FramePlace::of(view.delivery(), view.regs, view.sregs);
        vcpu.single_step_to(&view.stops(vcpu, instruction.as_ref(), delivering)?)?;
        self.fresh = false;
        let exit = enter(vcpu, view.regs.rip)?;
        self.fresh = exit != Exit::Step;
        let now = vcpu.last_registers();
        if let Some(frame) = frame {
            let next_ip = instruction.map(|instruction| instruction.next_ip());
            frame.clean(view.delivery(), view.regs, view.sregs, next_ip);
        }
        if exit == Exit::Kicked && now.rip != view.regs.rip {
            return Err(view.unsteppable("a handler that the step led to does not end"));
        }
        let Some(instruction) = instruction.filter(|_| exit == Exit::Step) else {
            return Ok(Stepped::plain(exit));
        };
        if let Way::StoresFlags { len_bytes } = way {
            let places = (instruction.next_ip(), view.stack(now.rsp)?);
            clean_pushed(view.space(), (view.regs, &now), places, len_bytes);
        }
        if stands_still(&instruction, view.regs, &now) {
            return Err(view.unsteppable("a step leads nowhere"));
        }
        let in_string = view.go_on_in_string(vcpu, &now)?;
        let conditional = is_done(&instruction, now.rip);
        tracing::trace!(
            from = format_args!("{:#x}", view.regs.rip),
            to = format_args!("{:#x}", now.rip),
            conditional,
            "step"
        );
        Ok(Stepped { conditional, in_string, exit })
    }
}

/// Enters the guest at `rip` until the step is done or the guest leaves. A handler that runs within the step runs to its end.
fn enter(vcpu: &mut Vcpu, rip: u64) -> Result<Exit, PositionError> {
    let mut kicks = 0;
    loop {
        match vcpu.enter()? {
            Exit::Kicked if vcpu.last_registers().rip != rip && kicks < HANDLER_KICKS_MAX => kicks += 1,
            exit => return Ok(exit),
        }
    }
}

/// Is `instruction` a conditional branch that leads to `rip`?
fn is_done(instruction: &Instruction, rip: u64) -> bool {
    instruction.flow_control() == FlowControl::ConditionalBranch
        && (rip == instruction.next_ip() || rip == instruction.near_branch_target())
}

/// Has a step changed nothing, although `instruction` is no jump to itself?
fn stands_still(instruction: &Instruction, before: &kvm_regs, now: &kvm_regs) -> bool {
    let jumps = matches!(
        instruction.flow_control(),
        FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::IndirectBranch
    );
    !jumps && before == now
}

/// Where breakpoints stop a step that begins at `rip` with an instruction that ends at `next_ip`, or with a delivery.
///
/// A breakpoint on that instruction would stop the guest before it, again and again. If it faults, the CPU comes to the same
/// handler with the trap flag off; the breakpoint after the instruction stops it then.
fn breakpoints(handlers: &[u64], rip: u64, next_ip: Option<u64>, delivers: bool) -> Vec<u64> {
    let place = |handler: &u64| {
        if *handler != rip || delivers { Some(*handler) } else { next_ip }
    };
    handlers.iter().filter_map(place).collect()
}

/// The guest as it is before a step.
struct View<'a> {
    ram: &'a GuestRam,
    regs: &'a kvm_regs,
    sregs: &'a kvm_sregs,
}

impl View<'_> {
    fn unsteppable(&self, what: &'static str) -> PositionError {
        PositionError::Unsteppable { rip: self.regs.rip, what }
    }

    fn space(&self) -> AddressSpace<'_> {
        AddressSpace::of_instruction(self.ram, self.sregs, self.regs.rflags)
    }

    fn delivery(&self) -> AddressSpace<'_> {
        AddressSpace::of_delivery(self.ram, self.sregs)
    }

    /// Breakpoints at the handlers that a step may lead to.
    fn stops(
        &self,
        vcpu: &Vcpu,
        instruction: Option<&Instruction>,
        delivering: Option<u8>,
    ) -> Result<Vec<u64>, PositionError> {
        let own = instruction.map(|instruction| own_vector(instruction, self.sregs.cr0));
        let vectors = [PAGE_FAULT, GENERAL_PROTECTION, delivering.unwrap_or(INVALID_OPCODE)];
        let mut handlers = Vec::new();
        for vector in vectors.into_iter().chain(own) {
            match vcpu.handler(self.ram, self.sregs, vector)? {
                Some(Handler { own_stack: true, .. }) => {
                    return Err(self.unsteppable("its handlers have stacks of their own"));
                }
                Some(Handler { at, .. }) => handlers.push(at),
                None => {}
            }
        }
        let next_ip = instruction.map(Instruction::next_ip);
        Ok(breakpoints(&handlers, self.regs.rip, next_ip, delivering.is_some()))
    }

    /// The next instruction; none if the guest may not execute it, or there is none, which is a fault.
    fn decode(&self) -> Result<Option<Instruction>, PositionError> {
        let cs = &self.sregs.cs;
        let bits = match (cs.l, cs.db, cs.base) {
            _ if self.sregs.efer & EFER_LMA == 0 => return Err(self.unsteppable(SEGMENTS)),
            (1, _, _) => 64,
            (0, 1, 0) => 32,
            _ => return Err(self.unsteppable(SEGMENTS)),
        };
        let mut code = [0; CODE_BYTES];
        // It may end before a page that is not there.
        let known = self.space().code(self.regs.rip, &mut code);
        let mut decoder = Decoder::with_ip(bits, &code[..known], self.regs.rip, DecoderOptions::NONE);
        Ok(Some(decoder.decode()).filter(|instruction| !instruction.is_invalid()))
    }

    /// The linear address of the stack pointer `rsp`.
    fn stack(&self, rsp: u64) -> Result<u64, PositionError> {
        match (self.sregs.cs.l, self.sregs.ss.db, self.sregs.ss.base) {
            (1, _, _) => Ok(rsp),
            (_, 1, 0) => Ok(rsp & 0xffff_ffff),
            _ => Err(self.unsteppable(SEGMENTS)),
        }
    }

    /// Refuses flags on the stack with which the guest would debug itself.
    fn check_flags(&self, image: Image) -> Result<(), PositionError> {
        let mut flags = [0; 8];
        let at = self.stack(self.regs.rsp)?.wrapping_add(image.offset);
        if !self.space().read(at, &mut flags[..image.len_bytes]) {
            return Err(self.unsteppable("it loads flags that cannot be read before"));
        }
        if u64::from_le_bytes(flags) & RFLAGS_TF != 0 {
            return Err(self.unsteppable(DEBUGS_ITSELF));
        }
        Ok(())
    }

    /// Does what SYSCALL or SYSRET does. False: it is a fault, which the CPU has to raise.
    fn system_call(
        &self,
        vcpu: &Vcpu,
        way: Way,
        instruction: Option<&Instruction>,
    ) -> Result<bool, PositionError> {
        let Some(instruction) = instruction else { return Ok(false) };
        let [star, lstar, sfmask] = [vcpu.msr(MSR_STAR)?, vcpu.msr(MSR_LSTAR)?, vcpu.msr(MSR_SFMASK)?];
        let msrs = Msrs { star, lstar, sfmask };
        let outcome = if way == Way::Enters {
            system_call::enter(self.regs, self.sregs, msrs, instruction.next_ip())
        } else {
            system_call::leave(self.regs, self.sregs, msrs)
        };
        match outcome {
            Outcome::Done(done) => {
                if !self.space().was_accessed(self.regs.rip) {
                    return Err(self.unsteppable("a system call in a page that was never accessed"));
                }
                let (regs, sregs) = *done;
                vcpu.set_special_registers(&sregs)?;
                vcpu.set_registers(&regs)?;
                Ok(true)
            }
            Outcome::Fault => Ok(false),
            Outcome::Never(what) => Err(self.unsteppable(what)),
        }
    }

    /// If the step was an iteration of a string instruction, which stands there still: does more of them.
    fn go_on_in_string(&self, vcpu: &Vcpu, now: &kvm_regs) -> Result<bool, PositionError> {
        if now.rip != self.regs.rip {
            return Ok(false);
        }
        let here = View { regs: now, ..*self };
        let Some(strings) = here.decode()?.and_then(|it| Strings::of(&it, now.rflags)) else {
            return Ok(false);
        };
        if !strings.has_led(self.regs, now) {
            return Ok(false);
        }
        if let Some(regs) = strings.go_on(here.space(), now) {
            vcpu.set_registers(&regs)?;
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> Instruction {
        Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
    }

    #[test]
    fn no_breakpoint_lies_on_the_instruction_that_is_stepped() {
        let handlers = [0x9000, 0xa000, 0xb000];
        assert_eq!(breakpoints(&handlers, 0x1000, Some(0x1003), false), handlers);
        assert_eq!(breakpoints(&handlers, 0xa000, Some(0xa003), false), [0x9000, 0xa003, 0xb000]);
        assert_eq!(breakpoints(&handlers, 0xa000, None, false), [0x9000, 0xb000], "it cannot be fetched");
        assert_eq!(breakpoints(&[0xa000; 3], 0xa000, Some(0xa001), false), [0xa001; 3]);
    }

    #[test]
    fn a_delivery_stops_at_its_handler_wherever_the_guest_stands() {
        assert_eq!(breakpoints(&[0x9000], 0x9000, None, true), [0x9000]);
    }

    #[test]
    fn only_a_jump_may_lead_to_itself() {
        let regs = kvm_regs { rip: 0x1000, ..Default::default() };
        let later = kvm_regs { rip: 0x1001, ..regs };
        assert!(stands_still(&decoded(&[0x90]), &regs, &regs));
        assert!(!stands_still(&decoded(&[0x90]), &regs, &later));
        assert!(!stands_still(&decoded(&[0xeb, 0xfe]), &regs, &regs), "jmp $");
        assert!(!stands_still(&decoded(&[0x74, 0xfe]), &regs, &regs), "je $");
        assert!(!stands_still(&decoded(&[0xff, 0xe0]), &regs, &regs), "jmp rax");
    }
}
