//! The pair's protocol as state machines: every decision about who runs the guest and what may leave.
//!
//! Owns: the lease, the judging of silences, lags and ends of the link, claims and what follows from their answers, the
//! output rule. Must never: do I/O, read a clock, wait, or start a thread. Time comes in as a duration since the host's
//! start, messages and the arbiter's answers as calls; what is to be done comes out as values. The monitor's threads call
//! exactly this code, and so does the model that `tests/protocol_model` explores.
//!
//! ```text
//! Primary:  Alone (view v) ── v + 1 claimed, with a backup ──> Named ── attach ──> Paired (view v + 1)
//!           Paired ── backup lost ──> Orphaned ── v + 2 claimed, without ──> Alone (view v + 2)
//! Backup:   Following (view v + 1) ── link ended ──> Waiting ── the primary lets nothing out any more ──> Claiming v + 2
//! Output:   may_leave, asked for each by the gate where outputs wait
//! ```
//!
//! A *view* is a number, a primary, and a backup or none. Whoever has claimed it runs the guest in it; the arbiter gives
//! each to one life of one monitor, and keeps with it who the backup is. Only these two may claim the next one.

mod backup;
mod heartbeats;
mod primary;

use std::time::Duration;

pub use backup::{Backup, LinkLoss, Next, Verdict};
pub use heartbeats::{Hearing, Questions};
pub use primary::{ANOTHER_IS_JOINING, Duty, Epoch, JoinError, Leave, Loss, Needed, Phase, Primary};

/// Part of the timeout for which an answer of the backup lets output go. The rest covers clocks that run at different
/// speeds and the time from the question to the system call.
const LEASE_NUMERATOR: u32 = 3;
const LEASE_DENOMINATOR: u32 = 4;
/// Silence that is borne from a backup that is loading its snapshot: its host is at its busiest then, and it
/// cannot take over before it follows.
const LOADING_TIMEOUT: Duration = Duration::from_secs(10);

/// The pair's times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Silence after which the other side counts as lost.
    pub timeout: Duration,
    /// Age of an answered question up to which output may leave. Less than the timeout.
    pub lease: Duration,
    /// The timeout of a backup that is loading the guest.
    pub loading_timeout: Duration,
    /// How far the execution of a backup that answers may be behind before it counts as lost.
    pub lag_limit: Duration,
}

impl Timing {
    /// What belongs to `--timeout-ms` and `--lag-limit-ms`.
    pub fn new(timeout: Duration, lag_limit: Duration) -> Self {
        let lease = timeout * LEASE_NUMERATOR / LEASE_DENOMINATOR;
        Self { timeout, lease, loading_timeout: timeout.max(LOADING_TIMEOUT), lag_limit }
    }
}

/// How long a silent peer is waited for. Of two that do not hear each other only one may go on, and it had better be the one
/// that others hear: a host that hears nobody at all waits twice as long. Longer is always safe.
fn patience(timeout: Duration, cut_off: bool) -> Duration {
    if cut_off { 2 * timeout } else { timeout }
}

/// One life of one monitor, as records name it.
pub type Life = u128;

/// A view that a monitor claims for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ask {
    /// Its number.
    pub view: u64,
    /// Who is the backup in it.
    pub backup: Option<Life>,
}

/// What the arbiter says to a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The view is the claimant's, with the backup that it asked for, or without one if it asked for none.
    Won,
    /// The view is the claimant's with another backup: it has asked before, and not heard the answer.
    Otherwise,
    /// The view is another's.
    Lost,
    /// Nobody can say: the claim may have been made, may still be, or never. Asking again tells.
    Unknown,
}
