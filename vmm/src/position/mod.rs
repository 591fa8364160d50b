//! Positions between a guest's own exits: how many conditional branches it has executed since the last one.
//!
//! Owns: who counts ([`BranchCounter`]), and stepping through a guest. Must never: change what the guest computes.
//!
//! Conditional branches are counted because nothing else is: an interrupt, a fault or an exit of the host adds none. A
//! forced stop always is the first instruction behind one of them, so its number alone says where it is.

mod instructions;
mod pmu;
mod step;
mod stepper;
mod strings;
mod system_call;
mod trap_flag;

use devices::GuestRam;
use ft_log::PositionSource;
use thiserror::Error;

use crate::kvm::{Exit, KvmError, Vcpu};

pub use step::Step;
pub use stepper::{Stepped, Stepper};

/// Steps without a conditional branch after which a guest that is to come to one is given up. Code of so many instructions
/// in a row does not exist; a loop of unconditional branches does.
pub const BRANCHLESS_STEPS_MAX: u32 = 16_384;

/// Counts the conditional branches of the guest. All of it on the vCPU's thread.
pub trait BranchCounter {
    /// Which source of positions it is.
    fn source(&self) -> PositionSource;
    /// The guest stands at a boundary; from here on counting starts at 0.
    fn restart(&mut self) -> Result<(), PositionError>;
    /// Conditional branches since the boundary.
    ///
    /// # Errors
    /// [`PositionError::Unsteppable`] where they cannot be counted any more before the next boundary.
    fn count(&mut self) -> Result<u64, PositionError>;
    /// Enters the guest as [`Vcpu::enter`] does. [`Exit::Kicked`] comes also when an alarm rings.
    fn enter(&mut self, vcpu: &mut Vcpu, ram: &GuestRam) -> Result<Exit, PositionError>;
    /// An alarm at so many branches since the boundary, or none. It rings late.
    fn set_alarm(&mut self, branches: Option<u64>) -> Result<(), PositionError>;
    /// By how many branches an alarm may ring late, as far as is known.
    fn skid_max(&self) -> u64;
    /// A [`Stepper`] has taken the guest over an instruction, a conditional branch or another.
    fn stepped(&mut self, conditional: bool);
}

/// What can go wrong with positions.
#[derive(Debug, Error)]
pub enum PositionError {
    /// KVM refused or failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The counter refused or failed.
    #[error("the guest's branches cannot be counted any more: {0}")]
    Counter(#[source] std::io::Error),
    /// The guest has an instruction that cannot be stepped over.
    #[error("the guest cannot be stepped through at {rip:#x}: {what}")]
    Unsteppable {
        /// Where.
        rip: u64,
        /// Why not.
        what: &'static str,
    },
    /// The branch that the guest was to be stepped to does not come.
    #[error(
        "the guest was stepped through for {steps} instructions up to {rip:#x}, and none of them was a conditional branch"
    )]
    NoBranch {
        /// Where it stands.
        rip: u64,
        /// Steps since the last conditional branch, or since the first.
        steps: u32,
    },
    /// What was asked for cannot be had here.
    #[error(
        "there is no position source `{wanted}` on this host: {why}. Take --position checkpoint, or auto"
    )]
    Missing {
        /// What was asked for.
        wanted: PositionSource,
        /// Why not.
        why: String,
    },
}

/// Which source is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// The best that this host has.
    Auto,
    /// This one or none.
    Source(PositionSource),
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "auto" { Ok(Self::Auto) } else { name.parse().map(Self::Source) }
    }
}

/// The counter for `wanted`; none where each stop is a checkpoint. Call on the vCPU's thread, before there is a guest.
pub fn choose(wanted: Wanted) -> Result<Option<Box<dyn BranchCounter>>, PositionError> {
    match wanted {
        Wanted::Source(PositionSource::Checkpoint) => Ok(None),
        Wanted::Source(PositionSource::Step) => Ok(Some(Box::new(Step::default()))),
        Wanted::Source(wanted @ PositionSource::Pmu) => match pmu::Pmu::open() {
            Ok(counter) => Ok(Some(Box::new(counter))),
            Err(why) => Err(PositionError::Missing { wanted, why }),
        },
        Wanted::Auto => match pmu::Pmu::open() {
            Ok(counter) => Ok(Some(Box::new(counter))),
            Err(why) => {
                tracing::info!("forced stops are checkpoints: {why}");
                Ok(None)
            }
        },
    }
}

/// The source that `counter` is, or checkpoints where there is none.
pub fn source_of(counter: Option<&dyn BranchCounter>) -> PositionSource {
    counter.map_or(PositionSource::Checkpoint, BranchCounter::source)
}
