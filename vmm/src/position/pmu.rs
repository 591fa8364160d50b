//! Positions from the CPU's counter of retired conditional branches.
//!
//! Owns: the counter of the running guest. Must never: be trusted before it was measured (`doctor/counting.rs`).

use devices::GuestRam;
use ft_log::PositionSource;

use super::{BranchCounter, PositionError};
use crate::doctor;
use crate::kvm::{Exit, Vcpu, kick_signal};
use crate::pmu::counter::Counter;

/// A period that does not end.
const NEVER: u64 = 1 << 46;

/// The counter.
pub(super) struct Pmu {
    counter: Counter,
    skid_max: u64,
    base: u64,
}

impl Pmu {
    /// Opens it, if this host's counter is exact and its alarms are not too late. Else: why not.
    pub(super) fn open() -> Result<Self, String> {
        let measured = doctor::position_counter()?;
        let mut counter =
            Counter::guest_branches_with_signal(&measured.pmu, &measured.event, NEVER, kick_signal())
                .map_err(|error| format!("the counter of branches cannot be opened: {error}"))?;
        counter.start().map_err(|error| format!("the counter of branches cannot be started: {error}"))?;
        Ok(Self { counter, skid_max: measured.skid_max, base: 0 })
    }
}

impl BranchCounter for Pmu {
    fn source(&self) -> PositionSource {
        PositionSource::Pmu
    }

    fn restart(&mut self) -> Result<(), PositionError> {
        self.base = self.counter.read().map_err(PositionError::Counter)?;
        Ok(())
    }

    fn count(&mut self) -> Result<u64, PositionError> {
        Ok(self.counter.read().map_err(PositionError::Counter)? - self.base)
    }

    fn enter(&mut self, vcpu: &mut Vcpu, _: &GuestRam) -> Result<Exit, PositionError> {
        Ok(vcpu.enter()?)
    }

    fn set_alarm(&mut self, branches: Option<u64>) -> Result<(), PositionError> {
        let left = match branches {
            None => NEVER,
            Some(branches) => branches.saturating_sub(self.count()?).max(1),
        };
        self.counter.set_period(left).map_err(PositionError::Counter)
    }

    fn skid_max(&self) -> u64 {
        self.skid_max
    }

    fn stepped(&mut self, _: bool) {
        // The CPU counts what is stepped over, too.
    }
}
