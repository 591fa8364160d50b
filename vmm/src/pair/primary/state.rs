//! The state of a guest that runs here, as its threads share it: the protocol's machine, and the connection to the backup.
//!
//! Owns: the lock around the primary's protocol machine (`protocol/primary.rs`), and which outbox is the present one. Must
//! never: decide anything by itself, or call anybody while the lock is held.
//! Threads: all of a live guest's. Locks: two, never both at once; others may be held while these are taken.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::outbox::Outbox;
use crate::pair::liveness::heartbeat::boot_time;
use crate::pair::protocol::{Phase, Primary, Timing};

/// Shared by all threads of a live guest.
pub struct PrimaryState {
    protocol: Mutex<Primary>,
    outbox: Mutex<Option<Arc<Outbox>>>,
    position: AtomicU64,
}

impl PrimaryState {
    /// Of a guest that runs alone in `view`, which this monitor has claimed.
    pub fn new(view: u64, timing: Timing) -> Arc<Self> {
        Arc::new(Self {
            protocol: Mutex::new(Primary::new(view, timing)),
            outbox: Mutex::default(),
            position: AtomicU64::new(0),
        })
    }

    /// Asks or tells the protocol's machine. Must not wait.
    pub fn protocol<T>(&self, ask: impl FnOnce(&mut Primary) -> T) -> T {
        // A panic elsewhere leaves the machine whole: each of its methods changes it in one go.
        ask(&mut self.protocol.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether there is a backup.
    pub fn phase(&self) -> Phase {
        self.protocol(|primary| primary.phase())
    }

    /// The present view.
    pub fn view(&self) -> u64 {
        self.protocol(|primary| primary.view())
    }

    /// How long the backup's execution is behind.
    pub fn lag(&self) -> Duration {
        self.protocol(|primary| primary.lag(boot_time()))
    }

    /// The log's way to the present backup, or to the last one.
    pub fn outbox(&self) -> Option<Arc<Outbox>> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A backup has got the guest.
    pub fn set_outbox(&self, outbox: Arc<Outbox>) {
        *self.outbox.lock().unwrap_or_else(PoisonError::into_inner) = Some(outbox);
    }

    /// The guest is at `anchor`, for those who want to know.
    pub fn note_position(&self, anchor: u64) {
        self.position.store(anchor, Ordering::Relaxed);
    }

    /// Where the guest was when that was noted last.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
pub(super) mod testing {
    use super::*;
    use crate::pair::protocol::Answer;

    /// Alone in view 1.
    pub fn alone() -> Arc<PrimaryState> {
        PrimaryState::new(1, Timing::new(Duration::from_secs(60), Duration::from_millis(50)))
    }

    /// The next view's backup has everything up to `anchor`.
    pub fn join(state: &Arc<PrimaryState>, anchor: u64) -> Arc<Outbox> {
        let ask = state.protocol(|primary| primary.name(9, primary.view() + 1)).unwrap();
        state.protocol(|primary| primary.claim_says(ask, Answer::Won));
        let outbox = Outbox::attach(state, anchor).unwrap();
        state.set_outbox(Arc::clone(&outbox));
        outbox
    }
}
