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
//!   in both, the number of steps without a conditional branch is limited
//! ```

use std::fmt;

use ft_log::{Counted, Position, REGISTERS, Registers};
use kvm_bindings::kvm_regs;

use super::{Clock, Machine, MachineError, Reached};
use crate::kvm::Exit;
use crate::position::{BRANCHLESS_STEPS_MAX, BranchCounter, PositionError, Stepped, Stepper};

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
    /// None if they could not be counted.
    branches: Option<u64>,
    registers: Registers,
    how: How,
}

/// How a stop was missed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum How {
    /// The alarm rang too late, or a step went too far.
    Overshot,
    /// The guest cannot be stepped there, or not within the limit of steps.
    OutOfReach(String),
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
            How::OutOfReach(why) => why.clone(),
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
        let behind = match self.branches {
            Some(branches) => format!("behind branch {branches}"),
            None => "behind branches that were not counted".to_owned(),
        };
        format!("{how}; {behind} at {at:#x}; differing registers: {differing}")
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
        Box::new(Missed { target, branches: Some(0), registers, how: How::Injected })
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
        let branches = counter.count().ok();
        self.counter = Some(counter);
        self.vcpu.single_step(false).map_err(MachineError::from)?;
        let registers = registers_of(&self.vcpu.registers().map_err(MachineError::from)?);
        let how = match arrival {
            Ok(()) if registers == target.registers => {
                self.halted = false;
                self.anchors += 1;
                return Ok(Reached::ForcedStop(Position::Counted(Box::new(target.clone()))));
            }
            Ok(()) => How::Differs,
            Err(NotThere::Missed(how)) => how,
            Err(NotThere::Failed(error)) => return Err(error),
        };
        Ok(Reached::Missed(Box::new(Missed { target: target.clone(), branches, registers, how })))
    }

    /// Takes the guest to the first instruction behind the branch.
    fn arrive<C: Clock>(
        &mut self,
        counter: &mut dyn BranchCounter,
        clock: &mut C,
        target: &Counted,
    ) -> Result<(), NotThere<C::Error>> {
        if let Some(exit) = self.early_exit {
            return Err(NotThere::Missed(How::Exit(exit)));
        }
        self.vm.show_hpet(&self.board.hpet_registers());
        self.offer_interrupt()?;
        counter.restart()?;
        let short = target.branches.saturating_sub(counter.skid_max() + 1);
        if short > 0 {
            counter.set_alarm(Some(short))?;
            while counter.count()? < short {
                let exit = counter.enter(&mut self.vcpu, &self.ram)?;
                // Without a count nothing is known of where it has left.
                counter.count()?;
                self.go_on_after(exit, clock)?;
            }
            counter.set_alarm(None)?;
        }
        let mut stepper = Stepper::default();
        while counter.count()? < target.branches {
            stepper.expect_branch(&self.vcpu, BRANCHLESS_STEPS_MAX)?;
            let Stepped { conditional, exit, .. } = stepper.step(&mut self.vcpu, &self.ram)?;
            counter.stepped(conditional);
            self.go_on_after(exit, clock)?;
            if conditional && counter.count()? == target.branches {
                return Ok(());
            }
        }
        Err(NotThere::Missed(How::Overshot))
    }

    fn go_on_after<C: Clock>(&self, exit: Exit, clock: &mut C) -> Result<(), NotThere<C::Error>> {
        match exit {
            Exit::Step => Ok(()),
            Exit::Kicked => clock.kicked(self).map(drop).map_err(NotThere::Failed),
            exit => Err(NotThere::Missed(How::Exit(exit))),
        }
    }
}

/// Why a guest did not come to a stop.
enum NotThere<E> {
    Missed(How),
    Failed(E),
}

impl<E: From<MachineError>> From<MachineError> for NotThere<E> {
    fn from(error: MachineError) -> Self {
        Self::Failed(error.into())
    }
}

impl<E: From<MachineError>> From<PositionError> for NotThere<E> {
    fn from(error: PositionError) -> Self {
        match error {
            PositionError::Unsteppable { .. } | PositionError::NoBranch { .. } => {
                Self::Missed(How::OutOfReach(error.to_string()))
            }
            error => MachineError::from(error).into(),
        }
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
        let missed = Missed { target, branches: Some(302), registers, how: How::Overshot };
        assert!(!missed.is_divergence());
        assert_eq!(
            missed.to_string(),
            "a forced stop was missed: expected a forced stop behind branch 300 at 0x1000, found the guest has gone \
             past it; behind branch 302 at 0x1004; differing registers: rcx 0x6 instead of 0x7, rip 0x1004 instead of \
             0x1000"
        );
    }

    #[test]
    fn a_stop_out_of_reach_is_missed_and_no_divergence() {
        let errors = [
            PositionError::NoBranch { rip: 0x2000, steps: BRANCHLESS_STEPS_MAX },
            PositionError::Unsteppable { rip: 0x2000, what: "the guest debugs itself" },
        ];
        for error in errors {
            let NotThere::<MachineError>::Missed(how) = error.into() else { panic!("not missed") };
            let target = Counted { branches: 300, registers: [0; REGISTERS.len()] };
            let missed = Missed { target, branches: None, registers: [0; REGISTERS.len()], how };
            assert!(!missed.is_divergence());
            assert!(missed.found().contains("0x2000"), "{missed}");
            assert!(missed.found().contains("not counted"), "{missed}");
        }
    }
}
