//! Positions without a performance counter: the monitor steps through the guest and counts.
//!
//! Owns: that count. Must never: skip an instruction. Each costs several system calls, so this is for small guests and
//! for testing what finds positions.

use devices::GuestRam;
use ft_log::PositionSource;

use super::stepper::{Stepped, Stepper};
use super::{BranchCounter, PositionError};
use crate::kvm::{Exit, Vcpu};

/// By how many branches an alarm rings late, one alarm after the other.
pub type Skid = Box<dyn FnMut() -> u64>;

/// Counts exactly.
#[derive(Default)]
pub struct Step {
    stepper: Stepper,
    count: u64,
    alarm: Option<u64>,
    /// What an alarm may be late, and what it is.
    skid: Option<(u64, Skid)>,
}

impl Step {
    /// Rings its alarms late, as a real counter does: by what `skid` says, which should not be more than `most`.
    pub fn with_skid(most: u64, skid: Skid) -> Self {
        Self { skid: Some((most, skid)), ..Self::default() }
    }
}

impl BranchCounter for Step {
    fn source(&self) -> PositionSource {
        PositionSource::Step
    }

    fn restart(&mut self) -> Result<(), PositionError> {
        (self.stepper, self.count) = (Stepper::default(), 0);
        Ok(())
    }

    fn count(&mut self) -> Result<u64, PositionError> {
        Ok(self.count)
    }

    fn enter(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Exit, PositionError> {
        let exit = loop {
            let Stepped { conditional, exit, .. } = self.stepper.step(vcpu, ram)?;
            self.count += u64::from(conditional);
            if exit != Exit::Step {
                break exit;
            }
            if self.alarm.is_some_and(|alarm| self.count >= alarm) {
                break Exit::Kicked;
            }
        };
        vcpu.single_step(false)?;
        Ok(exit)
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
