//! The loop that moves a guest from boundary to boundary; one for primary, backup, recording and replay.
//!
//! Owns: the order of things at a boundary. Must never: know which role it plays; that is the [`Door`]'s.
//!
//! ```text
//!   boundary k: door.boundary() applies the events of k (from the host or from the log), may wait
//!      │                                    └── effects of these events ── door.publish()
//!      ▼
//!   machine.run_to_anchor()  clock reads are answered by the door
//!      │                     a forced stop: door.stopped() logs where
//!      ▼
//!   door.publish()           log up to exit k+1 is complete; its effects may go once that is acknowledged
//! ```

mod alone;
mod code_watch;
mod divergence;
mod faults;
mod follow;
mod live;
mod vcpu_handle;

use devices::Effect;
use ft_log::{Counted, Position};
use thiserror::Error;

use crate::machine::{Clock, GuestEnd, Machine, MachineError, Missed, Reached};

pub use alone::{FileLog, NoLog};
pub use divergence::{Divergence, Recent};
pub use faults::{CorruptAt, Faults, Slowness};
pub use follow::{Follow, PartSource};
pub use live::{HostSide, HostTime, INBOX_EVENTS, Live, LogSink};
pub use vcpu_handle::{Control, Mailbox, StopKind, StopSignal, VcpuHandle};

/// Where everything that is not a function of guest state comes in, and where effects go out.
pub trait Door: Clock<Error = RunError> {
    /// Applies the events of the machine's present boundary. Waits while the guest is halted.
    fn boundary(&mut self, machine: &mut Machine, effects: &mut Vec<Effect>) -> Result<Next, RunError>;
    /// The guest leaves the boundary now.
    fn entering(&mut self, machine: &Machine);
    /// The guest stands at a forced stop.
    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<(), RunError>;
    /// The guest did not come to a forced stop.
    fn missed(&self, _: &Machine, missed: Box<Missed>) -> RunError {
        RunError::Missed(missed)
    }
    /// The machine stands at a boundary with its last exit handled: takes what it produced.
    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError>;
    /// The guest was broken off between two anchors, on request.
    fn broken_off(&mut self, machine: &mut Machine) -> Result<(), RunError>;
    /// The guest's life is over.
    fn ended(&mut self, machine: &mut Machine, end: GuestEnd) -> Result<(), RunError>;
}

/// What follows a boundary.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Let the guest run.
    Enter,
    /// Let it run to this forced stop.
    EnterTo(Box<Counted>),
    /// Leave the loop.
    Stop(Stopped),
}

/// Why the loop was left, with the machine intact at a boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The guest's life ended.
    GuestEnded(GuestEnd),
    /// Somebody asked the monitor to stop.
    Requested,
    /// Followers only: every entry of the log has been applied and there will be no more.
    LogEnded,
    /// Followers only: the recording's end was reached and every digest was equal.
    ReplayEqual,
}

/// What can go wrong while a guest runs.
#[derive(Debug, Error)]
pub enum RunError {
    /// The machine failed.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The guest could not be taken to a forced stop; it is not known to differ from the log.
    #[error("{0}")]
    Missed(Box<Missed>),
    /// The log cannot be read or written.
    #[error(transparent)]
    Log(#[from] ft_log::LogError),
    /// This guest is not the one that the log describes.
    #[error("{0}")]
    Diverged(Box<Divergence>),
    /// The recording cannot be read or written.
    #[error(transparent)]
    Recording(#[from] ft_log::RecordingError),
    /// A checkpoint of the log cannot be read.
    #[error("the log's checkpoint cannot be used: {0}")]
    Checkpoint(#[from] ft_log::CheckpointError),
    /// The log says that there is a checkpoint, and there is none.
    #[error("the log stops the guest at anchor {anchor} with a checkpoint that it does not hold")]
    NoCheckpoint {
        /// The stop.
        anchor: u64,
    },
    /// The connection to the other side failed.
    #[error(transparent)]
    Stream(#[from] ft_log::StreamError),
    /// The host gives no random bytes.
    #[error("this host gives no random bytes: {0}")]
    Random(#[source] std::io::Error),
    /// The recording stops before its end entry.
    #[error("the recording ends at anchor {anchor} without an end mark: it is incomplete")]
    Truncated {
        /// Where replay stood.
        anchor: u64,
    },
    /// A snapshot could not be taken or sent.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::SnapshotError),
    /// The monitor was told to stop while the guest was running.
    #[error("the monitor was asked to stop")]
    StopRequested,
}

/// Runs the guest until something ends the loop.
pub fn run<D: Door>(machine: &mut Machine, door: &mut D) -> Result<Stopped, RunError> {
    let mut effects = Vec::new();
    loop {
        if let Some(end) = machine.end() {
            door.ended(machine, end)?;
            return Ok(Stopped::GuestEnded(end));
        }
        let target = match door.boundary(machine, &mut effects)? {
            Next::Stop(stopped) => return Ok(stopped),
            Next::Enter => None,
            Next::EnterTo(target) => Some(target),
        };
        if !effects.is_empty() {
            door.publish(machine, &mut effects)?;
        }
        door.entering(machine);
        let reached = match target {
            None => machine.run_to_anchor(door, &mut effects),
            Some(target) => machine.run_to_position(door, &target),
        };
        match reached {
            Ok(Reached::Exit) => {}
            Ok(Reached::ForcedStop(position)) => door.stopped(machine, position)?,
            Ok(Reached::Missed(missed)) => return Err(door.missed(machine, missed)),
            Err(RunError::StopRequested) => {
                // Between two anchors: the log is complete up to the last one, and ends there.
                door.broken_off(machine)?;
                return Ok(Stopped::Requested);
            }
            Err(error) => return Err(error),
        }
        door.publish(machine, &mut effects)?;
    }
}
