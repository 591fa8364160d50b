//! Positions without a performance counter: the monitor steps through the guest and counts.
//!
//! Owns: that count. Must never: skip an instruction, or give a count where one was skipped. Each costs several system
//! calls, so this is for small guests and for testing what finds positions.
//!
//! ```text
//!   counting ── an instruction that cannot be stepped over ──> running free, no count ── next boundary ──> counting
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::GuestRam;
use ft_log::PositionSource;

use super::stepper::{Stepped, Stepper};
use super::{BRANCHLESS_STEPS_MAX, BranchCounter, PositionError};
use crate::kvm::{Exit, Vcpu};

/// By how many branches an alarm rings late, one alarm after the other.
pub type Skid = Box<dyn FnMut() -> u64>;

/// Counts exactly.
#[derive(Default)]
pub struct Step {
    stepper: Stepper,
    count: u64,
    steps: Arc<AtomicU64>,
    /// Why there is no count since the boundary, if there is none.
    lost: Option<(u64, &'static str)>,
    alarm: Option<u64>,
    /// What an alarm may be late, and what it is.
    skid: Option<(u64, Skid)>,
}

impl Step {
    /// Rings its alarms late, as a real counter does: by what `skid` says, which should not be more than `most`.
    pub fn with_skid(most: u64, skid: Skid) -> Self {
        Self { skid: Some((most, skid)), ..Self::default() }
    }

    /// Steps since this counter was made, for others to read while it counts.
    pub fn steps(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.steps)
    }

    /// Steps until the guest leaves, an alarm rings, or an instruction comes that cannot be stepped over.
    fn step_on(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Exit, PositionError> {
        loop {
            if self.alarm.is_some() {
                self.stepper.expect_branch(vcpu, BRANCHLESS_STEPS_MAX)?;
            }
            let Stepped { conditional, exit, .. } = self.stepper.step(vcpu, ram)?;
            self.count += u64::from(conditional);
            if exit != Exit::Step {
                return Ok(exit);
            }
            self.steps.fetch_add(1, Ordering::Relaxed);
            if self.alarm.is_some_and(|alarm| self.count >= alarm) {
                return Ok(Exit::Kicked);
            }
        }
    }
}

impl BranchCounter for Step {
    fn source(&self) -> PositionSource {
        PositionSource::Step
    }

    fn restart(&mut self) -> Result<(), PositionError> {
        (self.stepper, self.count, self.lost) = (Stepper::default(), 0, None);
        Ok(())
    }

    fn count(&mut self) -> Result<u64, PositionError> {
        self.lost.map_or(Ok(self.count), |(rip, what)| Err(PositionError::Unsteppable { rip, what }))
    }

    fn enter(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Exit, PositionError> {
        if self.lost.is_none() {
            let exit = self.step_on(vcpu, ram);
            vcpu.single_step(false)?;
            match exit {
                Err(PositionError::Unsteppable { rip, what }) => {
                    tracing::debug!(
                        rip = format_args!("{rip:#x}"),
                        what,
                        "branches are not counted any more"
                    );
                    self.lost = Some((rip, what));
                }
                other => return other,
            }
        }
        Ok(vcpu.enter()?)
    }

    fn set_alarm(&mut self, branches: Option<u64>) -> Result<(), PositionError> {
        let late = self.skid.as_mut().map_or(0, |(_, skid)| skid());
        self.alarm = branches.map(|branches| branches + late);
        Ok(())
    }

    fn skid_max(&self) -> u64 {
        self.skid.as_ref().map_or(0, |(most, _)| *most)
    }

    fn stepped(&mut self, conditional: bool) {
        self.count += u64::from(conditional);
    }
}
