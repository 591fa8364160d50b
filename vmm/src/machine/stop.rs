//! Forced stops: naming the one where the guest stands, and taking another guest to it.
//!
//! Owns: the rule that makes a position one instruction only: it is the first one behind a conditional branch. Must
//! never: call a guest arrived that is anywhere else.
//!
//! ```text
//!   a live guest:  kicked ── step until a conditional branch is done ─┬─ its number is the position
//!                                                                     └─ none comes: nameless, a checkpoint is needed
//!   a follower:    alarm short of the number, by what alarms may be late ── step ─┬─ arrived, registers equal
//!                                                                                 └─ missed, and said how
//! ```

use std::fmt;

use ft_log::{Counted, Position, REGISTERS, Registers};
use kvm_bindings::kvm_regs;

use super::{Clock, Machine, MachineError, Reached};
use crate::kvm::Exit;
use crate::position::{BranchCounter, PositionError, Stepped, Stepper};

/// Steps after which a guest without conditional branches is left nameless, and the same for pages of string instructions.
const STEPS_MAX: u32 = 256;
const STRING_STEPS_MAX: u32 = 8_192;
/// RFLAGS.RF: no part of what the guest computes, and its value depends on how the guest was stopped.
const RFLAGS_RF: u64 = 1 << 16;

/// What naming a stop came to.
pub(super) enum Name {
    /// The guest stands there.
    Found(Position),
    /// The guest has left by an exit of its own, or can take the interrupt that waits for it.
    Exit(Exit),
    /// There is no name.
    None,
}

/// A forced stop that a follower's guest did not come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missed {
    target: Counted,
    branches: u64,
    registers: Registers,
    how: How,
}

/// How a stop was missed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum How {
    /// The alarm rang too late, or a step went too far.
    Overshot,
    /// The guest cannot be stepped through.
    Unsteppable(String),
    /// The guest left by an exit before it.
    Exit(Exit),
    /// It is there, with other registers.
    Differs,
    /// Not at all: that was asked for.
    Injected,
}

impl Missed {
    /// Is another guest the reason? Else the way to the stop is, and nothing is known against the guest before it.
    pub fn is_divergence(&self) -> bool {
        matches!(self.how, How::Exit(_) | How::Differs)
    }

    /// What was to be found.
    pub fn expected(&self) -> String {
        format!("a forced stop behind branch {} at {:#x}", self.target.branches, self.target.registers[RIP])
    }

    /// What was found instead.
    pub fn found(&self) -> String {
        let how = match &self.how {
            How::Overshot => "the guest has gone past it".to_owned(),
            How::Unsteppable(why) => why.clone(),
            How::Exit(exit) => format!("the guest left before it: {exit:?}"),
            How::Differs => "it is there with other registers".to_owned(),
            How::Injected => "an injected fault".to_owned(),
        };
        let at = self.registers[RIP];
        let names = REGISTERS.iter().zip(&self.target.registers).zip(&self.registers);
        let differing: Vec<String> = names
            .filter(|((_, target), found)| target != found)
            .map(|((name, target), found)| format!("{name} {found:#x} instead of {target:#x}"))
            .collect();
        let differing = if differing.is_empty() { "none".to_owned() } else { differing.join(", ") };
        format!("{how}; behind branch {} at {at:#x}; differing registers: {differing}", self.branches)
    }
}

impl fmt::Display for Missed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a forced stop was missed: expected {}, found {}", self.expected(), self.found())
    }
}

/// RIP's place in a position's registers.
const RIP: usize = 16;

fn registers_of(regs: &kvm_regs) -> Registers {
    [
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rsp,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags & !RFLAGS_RF,
    ]
}

impl Machine {
    /// From now on `counter` supplies the positions of forced stops; without one each is a checkpoint.
    pub fn count_branches(&mut self, counter: Option<Box<dyn BranchCounter>>) {
        self.counter = counter;
    }

    /// Gives the counter back; this guest is of no use any more.
    pub fn into_counter(self) -> Option<Box<dyn BranchCounter>> {
        self.counter
    }

    /// A stop at which this guest stands, as if it were missed. For tests of what follows.
    pub fn injected_miss(&self) -> Box<Missed> {
        let registers = registers_of(&self.vcpu.last_registers());
        let target = Counted { branches: 0, registers };
        Box::new(Missed { target, branches: 0, registers, how: How::Injected })
    }

    /// Can a forced stop have another position than a checkpoint?
    pub fn counts_branches(&self) -> bool {
        self.counter.is_some()
    }

    /// Gives the place where the guest stands a name, a little further on.
    pub(super) fn name_stop(&mut self) -> Result<Name, MachineError> {
        let Some(mut counter) = self.counter.take() else { return Ok(Name::None) };
        let name = self.next_branch(counter.as_mut());
        self.counter = Some(counter);
        self.vcpu.single_step(false)?;
        match name {
            Err(PositionError::Unsteppable { rip, what }) => {
                tracing::debug!(rip = format_args!("{rip:#x}"), what, "a forced stop has no name");
                Ok(Name::None)
            }
            other => Ok(other?),
        }
    }

    fn next_branch(&mut self, counter: &mut dyn BranchCounter) -> Result<Name, PositionError> {
        let mut stepper = Stepper::default();
        let mut count = counter.count()?;
        let (mut steps, mut string_steps) = (0, 0);
        while steps < STEPS_MAX && string_steps < STRING_STEPS_MAX {
            let Stepped { conditional, in_string, exit } = stepper.step(&mut self.vcpu, &self.ram)?;
            counter.stepped(conditional);
            let before = std::mem::replace(&mut count, counter.count()?);
            match exit {
                Exit::Step if in_string => string_steps += 1,
                Exit::Step => steps += 1,
                // What the guest is to be stopped for is still due.
                Exit::Kicked => {}
                exit => return Ok(Name::Exit(exit)),
            }
            // A step may have been as long as a handler, of whose branches nothing is known.
            if conditional && count == before + 1 {
                let registers = registers_of(&self.vcpu.registers()?);
                let counted = Counted { branches: count, registers };
                return Ok(Name::Found(Position::Counted(Box::new(counted))));
            }
        }
        tracing::debug!(steps, string_steps, "a forced stop has no name: no conditional branch comes");
        Ok(Name::None)
    }

    /// Runs the guest to the forced stop `target`. If an interrupt waits, the guest does not take it before: a live guest is
    /// not stopped then.
    pub fn run_to_position<C: Clock>(
        &mut self,
        clock: &mut C,
        target: &Counted,
    ) -> Result<Reached, C::Error> {
        let Some(mut counter) = self.counter.take() else {
            let reason = "its log has positions of counted branches, and nobody counts them here";
            return Err(MachineError::BadState(reason.into()).into());
        };
        let arrival = self.arrive(counter.as_mut(), clock, target);
        let branches = counter.count().map_err(MachineError::from)?;
        self.counter = Some(counter);
        self.vcpu.single_step(false).map_err(MachineError::from)?;
        let registers = registers_of(&self.vcpu.registers().map_err(MachineError::from)?);
        let how = match arrival? {
            Some(how) => how,
            None if registers == target.registers => {
                self.halted = false;
                self.anchors += 1;
                return Ok(Reached::ForcedStop(Position::Counted(Box::new(target.clone()))));
            }
            None => How::Differs,
        };
        Ok(Reached::Missed(Box::new(Missed { target: target.clone(), branches, registers, how })))
    }

    /// `None`: the guest is behind the branch.
    fn arrive<C: Clock>(
        &mut self,
        counter: &mut dyn BranchCounter,
        clock: &mut C,
        target: &Counted,
    ) -> Result<Option<How>, C::Error> {
        if let Some(exit) = self.early_exit {
            return Ok(Some(How::Exit(exit)));
        }
        self.vm.show_hpet(&self.board.hpet_registers());
        self.offer_interrupt()?;
        counter.restart().map_err(MachineError::from)?;
        let short = target.branches.saturating_sub(counter.skid_max() + 1);
        if short > 0 {
            counter.set_alarm(Some(short)).map_err(MachineError::from)?;
            while counter.count().map_err(MachineError::from)? < short {
                match counter.enter(&mut self.vcpu, &self.ram).map_err(MachineError::from)? {
                    Exit::Kicked => {
                        clock.kicked(self)?;
                    }
                    exit => return Ok(Some(How::Exit(exit))),
                }
            }
            counter.set_alarm(None).map_err(MachineError::from)?;
        }
        let mut stepper = Stepper::default();
        while counter.count().map_err(MachineError::from)? < target.branches {
            let Stepped { conditional, exit, .. } = match stepper.step(&mut self.vcpu, &self.ram) {
                Ok(step) => step,
                Err(error @ PositionError::Unsteppable { .. }) => {
                    return Ok(Some(How::Unsteppable(error.to_string())));
                }
                Err(error) => return Err(MachineError::from(error).into()),
            };
            counter.stepped(conditional);
            match exit {
                Exit::Step => {}
                Exit::Kicked => {
                    clock.kicked(self)?;
                }
                exit => return Ok(Some(How::Exit(exit))),
            }
            if conditional && counter.count().map_err(MachineError::from)? == target.branches {
                return Ok(None);
            }
        }
        Ok(Some(How::Overshot))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_stop_names_target_place_and_registers() {
        let mut registers = [7; REGISTERS.len()];
        registers[RIP] = 0x1000;
        let target = Counted { branches: 300, registers };
        (registers[RIP], registers[2]) = (0x1004, 6);
        let missed = Missed { target, branches: 302, registers, how: How::Overshot };
        assert!(!missed.is_divergence());
        assert_eq!(
            missed.to_string(),
            "a forced stop was missed: expected a forced stop behind branch 300 at 0x1000, found the guest has gone \
             past it; behind branch 302 at 0x1004; differing registers: rcx 0x6 instead of 0x7, rip 0x1004 instead of \
             0x1000"
        );
    }
}
