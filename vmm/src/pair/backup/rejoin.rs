//! A backup whose guest is desynchronised: its report, and when it is time to stop asking for another copy.
//!
//! Owns: what counts as such, and how often it may happen. Must never: let such a guest go on.
//!
//! ```text
//!   following ── differs, or missed a forced stop ──> retired ── report ──> the guest anew, by live transfer
//!                                                        │                    └─ the primary is gone: the guest is lost
//!                                                        ├─ ATTEMPTS_MAX within ATTEMPTS_WITHIN: the end
//!                                                        └─ the claim is won already: the guest is lost
//! ```
//! Threads: the vCPU's. Locks: none.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use ft_log::ByeReason;
use thiserror::Error;

use crate::change;
use crate::control::Standing;
use crate::control::protocol::Role;
use crate::host::LogEvent;
use crate::machine::{Machine, Missed};
use crate::pair::{PairError, Side};
use crate::report::{Kept, listed};
use crate::run::Divergence;
use crate::with_causes;

/// So often within so long: then this backup gives up.
const ATTEMPTS_MAX: usize = 3;
const ATTEMPTS_WITHIN: Duration = Duration::from_secs(600);

/// Why a backup's guest cannot be used.
#[derive(Debug)]
pub(super) enum Desynchronised {
    /// It is not the one that the log describes.
    Differs(Box<Divergence>),
    /// It did not come to a forced stop, and nothing else is wrong with it.
    Missed(Box<Missed>),
}

impl Desynchronised {
    /// What the primary is told.
    pub(super) fn bye(&self) -> (ByeReason, String) {
        match self {
            Self::Differs(divergence) => (ByeReason::Diverged, divergence.brief()),
            Self::Missed(_) => {
                (ByeReason::Missed, "this backup missed a forced stop; see its own report".to_owned())
            }
        }
    }

    fn status(&self) -> u8 {
        match self {
            Self::Differs(_) => 4,
            Self::Missed(_) => 1,
        }
    }

    fn brief(&self) -> String {
        match self {
            Self::Differs(divergence) => format!("diverged {}", divergence.brief()),
            Self::Missed(_) => "missed a forced stop".to_owned(),
        }
    }
}

/// Why a backup does not go on.
#[derive(Debug, Error)]
pub enum ResyncError {
    /// Again and again.
    #[error(
        "this backup's guest was desynchronised {ATTEMPTS_MAX} times within {} minutes; the last time it {brief}. Host or guest \
         is not deterministic: see the reports, docs/determinism.md, and check the memory of both hosts",
        ATTEMPTS_WITHIN.as_secs() / 60
    )]
    Again {
        /// How the last time.
        brief: String,
        /// 4 if it was a divergence.
        status: u8,
    },
    /// There is nobody who has the guest.
    #[error(
        "this backup's guest {brief}, so it does not take over, and the primary at {address} cannot give it the guest anew: {source}"
    )]
    NobodyElse {
        /// How.
        brief: String,
        /// The primary's address.
        address: SocketAddr,
        /// What happened there.
        #[source]
        source: Box<PairError>,
        /// 4 if it was a divergence.
        status: u8,
    },
    /// The guest's life is over.
    #[error("this backup's guest {brief}; on the primary it has ended")]
    Ended {
        /// How.
        brief: String,
        /// 4 if it was a divergence.
        status: u8,
    },
    /// The primary was lost before the difference was found.
    #[error(
        "the primary is lost and this backup has claimed view {view}, but its guest {brief}: it does not go live, and the \
         guest is lost. Start it anew as after a loss of both hosts"
    )]
    Lost {
        /// How.
        brief: String,
        /// The view that nobody runs the guest in.
        view: u64,
        /// 4 if it was a divergence.
        status: u8,
    },
}

impl ResyncError {
    /// The process's exit status.
    pub(in crate::pair) fn status(&self) -> u8 {
        match self {
            Self::Again { status, .. }
            | Self::NobodyElse { status, .. }
            | Self::Ended { status, .. }
            | Self::Lost { status, .. } => *status,
        }
    }

    /// The guest cannot be had from the primary at `address`.
    pub(super) fn nobody_else(why: &Desynchronised, address: SocketAddr, source: PairError) -> Self {
        Self::NobodyElse { brief: why.brief(), address, source: Box::new(source), status: why.status() }
    }

    /// The guest's life has ended on the primary.
    pub(super) fn ended(why: &Desynchronised) -> Self {
        Self::Ended { brief: why.brief(), status: why.status() }
    }

    /// The claim for `view` was won with a desynchronised guest.
    pub(super) fn lost(why: &Desynchronised, view: u64) -> Self {
        Self::Lost { brief: why.brief(), view, status: why.status() }
    }
}

/// How often this backup's guest was desynchronised.
#[derive(Default)]
pub(super) struct Attempts(VecDeque<Instant>);

impl Attempts {
    /// Counts one more.
    ///
    /// # Errors
    /// It is one too many.
    pub(super) fn count(&mut self, why: &Desynchronised, now: Instant) -> Result<(), ResyncError> {
        self.0.push_back(now);
        while self.0.front().is_some_and(|first| now.duration_since(*first) > ATTEMPTS_WITHIN) {
            self.0.pop_front();
        }
        if self.0.len() < ATTEMPTS_MAX {
            return Ok(());
        }
        Err(ResyncError::Again { brief: why.brief(), status: why.status() })
    }
}

/// Says what is wrong with a guest, and writes it down.
pub(super) fn report(why: &Desynchronised, side: &Side, machine: &Machine, view: u64, kept: Option<Kept>) {
    let cause = match why {
        Desynchronised::Missed(missed) => missed.to_string(),
        Desynchronised::Differs(_) => why.brief(),
    };
    let standing = Standing { role: Role::Backup, view, protected: false, cause };
    change!(
        error,
        side.monitor,
        Desynchronised,
        standing,
        "this backup is desynchronised; it asks for the guest anew"
    );
    let Desynchronised::Differs(divergence) = why else { return };
    tracing::error!(event = %LogEvent::Diverged, "{}", divergence.brief());
    tracing::error!("{divergence}");
    let Some(reports) = &side.reports else { return };
    let state = match machine.special_registers() {
        Ok(special) => format!("{special:x?}"),
        Err(error) => with_causes(&error),
    };
    let digest = machine.state_digest();
    let text = format!(
        "monitor {}, backup on host {} in view {view}\n{divergence}\n  other registers: {state}\n  digests: registers and \
         outputs {:016x}, memory {:016x}, devices {:016x}",
        side.version, side.owner.host, digest.registers, digest.memory, digest.devices
    );
    match reports.write(&text, &divergence.brief(), kept) {
        Ok(files) => tracing::warn!(event = %LogEvent::ReportWritten, "report written: {}", listed(&files)),
        Err(error) => tracing::warn!("{}", with_causes(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desynchronised() -> Desynchronised {
        let recent = crate::run::Recent::keeping(1);
        Desynchronised::Differs(recent.report(7, "a".into(), "b".into(), String::new()))
    }

    #[test]
    fn the_third_time_within_ten_minutes_is_one_too_many() {
        let mut attempts = Attempts::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for seconds in [0, 500, 1_001] {
            attempts.count(&desynchronised(), at(seconds)).unwrap();
        }
        let error = attempts.count(&desynchronised(), at(1_002)).unwrap_err();
        assert_eq!(error.status(), 4);
        assert!(error.to_string().contains("diverged at anchor 7: expected a, found b"), "{error}");
    }
}
