//! What an operator has asked of a guest that runs here, on its way to the threads that do it.
//!
//! Owns: the flags. Must never: do anything itself; the vCPU's thread looks at them at each boundary.
//!
//! ```text
//!   runs ── pause ──> asked to stand ── at a boundary ──> stands ── resume ──> runs
//! ```

use std::sync::atomic::{AtomicBool, Ordering};

/// Set by the control thread, looked at by the vCPU's.
#[derive(Debug, Default)]
pub struct Orders {
    pause: AtomicBool,
    stands: AtomicBool,
    switch: AtomicBool,
    pull_plug: AtomicBool,
}

impl Orders {
    /// The guest is to stand at a boundary, or to go on.
    pub fn set_pause(&self, pause: bool) {
        self.pause.store(pause, Ordering::SeqCst);
    }

    /// Is the guest to stand?
    pub fn pause(&self) -> bool {
        self.pause.load(Ordering::SeqCst)
    }

    /// The vCPU's thread: the guest stands, or goes on.
    pub fn set_stands(&self, stands: bool) {
        self.stands.store(stands, Ordering::SeqCst);
    }

    /// Does the guest stand?
    pub fn stands(&self) -> bool {
        self.stands.load(Ordering::SeqCst)
    }

    /// The backup is to take the guest over.
    pub fn ask_for_switch(&self) {
        self.switch.store(true, Ordering::SeqCst);
    }

    /// The vCPU's thread: takes the order to hand the guest over, if there is one.
    pub fn take_switch(&self) -> bool {
        self.switch.swap(false, Ordering::SeqCst)
    }

    /// Is there something to be done at a boundary?
    pub fn want_boundary(&self) -> bool {
        self.switch.load(Ordering::SeqCst) || self.pause()
    }

    /// The guest's end is ordered, whether it agrees or not; the vCPU's thread is asked to stop next.
    pub fn pull_plug(&self) {
        self.pull_plug.store(true, Ordering::SeqCst);
    }

    /// Was the guest's end ordered?
    pub fn plug_is_pulled(&self) -> bool {
        self.pull_plug.load(Ordering::SeqCst)
    }
}
