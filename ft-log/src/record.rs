//! The entries of a log, as values.
//!
//! Owns: [`Entry`] and the [`Cursor`] that deltas are relative to. Must never: know how they are stored
//! (`codec.rs`) or sent (`stream.rs`).

use crate::digest::StateDigest;
use crate::event::{Event, GuestTime};
use crate::position::Position;

/// One step of the guest's history that its own state does not determine.
///
/// `anchor` counts the exits that the guest's own instructions caused since the guest's start, and the forced stops;
/// "at anchor k" means the boundary after exit k was handled. Anchors and times never go back from entry to entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The guest read a clock and got `now`. Its own exit asks for it, so the order is its position.
    Clock {
        /// Clock reads since the last such entry that got what [`crate::ClockModel`] predicts.
        unlogged: u64,
        /// What the guest got.
        now: GuestTime,
    },
    /// `event` reaches the guest at `anchor`.
    Event {
        /// The boundary at which it applies.
        anchor: u64,
        /// What reaches the guest.
        event: Event,
    },
    /// The general registers at `anchor`, to notice a divergence.
    Check {
        /// The boundary at which the digest was taken.
        anchor: u64,
        /// Rolling digest of the registers at every anchor so far.
        digest: u32,
    },
    /// The guest was stopped between two of its own exits, so that an event could reach it. That counts as an
    /// anchor: `anchor` is one more than the guest had.
    Stop {
        /// The boundary that the stop makes.
        anchor: u64,
        /// Where it is.
        position: Position,
    },
    /// The log ends here; nothing follows.
    End {
        /// The last boundary.
        anchor: u64,
        /// The whole guest at that boundary.
        digest: StateDigest,
    },
}

/// Where a log stands: what the next entry's deltas are relative to.
///
/// Encoder and decoder start from the values that belong to the snapshot, and move alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Time of the last `Clock` or `Tick`.
    pub time: GuestTime,
    /// Anchor of the last entry that has one.
    pub anchor: u64,
}
