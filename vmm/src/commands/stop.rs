//! Asking the monitor to stop: signals, Ctrl-A x, or another thread's failure.
//!
//! Owns: the stop flag of the process. Must never: wait for anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::sys::signal::{SigSet, Signal};

use super::{CommandError, start_thread};
use crate::kvm::{install_kick_handler, kick};

/// Set by the operator's signals alone.
static ASKED: AtomicBool = AtomicBool::new(false);

/// Did the operator ask this process to end?
pub fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// The process's way to stop the guest's thread.
#[derive(Clone)]
pub struct Stop {
    flag: Arc<AtomicBool>,
    wake: Sender<()>,
    thread: libc::pthread_t,
}

impl Stop {
    /// For the vCPU thread that calls this: SIGINT and SIGTERM now stop its guest. Call before any other
    /// thread exists that takes signals, because these are blocked in all of them.
    pub fn install() -> Result<(Self, Receiver<()>), CommandError> {
        install_kick_handler()?;
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block().map_err(|error| CommandError::host("block signals")(error.into()))?;
        let (wake, woken) = bounded(1);
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        let stop = Self { flag: Arc::new(AtomicBool::new(false)), wake, thread };
        let requested = stop.clone();
        let wait = move || {
            while signals.wait().is_ok() {
                ASKED.store(true, Ordering::Relaxed);
                requested.request();
            }
        };
        start_thread("signals", wait)?;
        Ok((stop, woken))
    }

    /// Stops the guest at its next boundary, or at once where its state need not be named.
    pub fn request(&self) {
        self.flag.store(true, Ordering::Relaxed);
        self.wake();
        self.kick();
    }

    /// Takes the vCPU out of the guest, for its thread to look what is due.
    pub fn kick(&self) {
        kick(self.thread);
    }

    /// Makes a halted guest's thread look around.
    pub fn wake(&self) {
        // A message that is still there says the same.
        let _ = self.wake.try_send(());
    }

    /// Was a stop requested?
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.flag)
    }
}
