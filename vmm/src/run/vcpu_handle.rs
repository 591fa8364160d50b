//! The ways to a guest's vCPU thread: a kick, a wake-up, a stop, and its mailbox.
//!
//! Owns: what other threads may ask of the vCPU's thread, and the one way to each of these. Must never: wait for that thread,
//! or change anything of the guest.
//!
//! ```text
//!   operator ── Control ──> mailbox ─┐
//!   signals, supervisor ── stop ─────┼── kick (in the guest), wake (halted) ──> looks at a boundary
//!   deferral, transfer ── kick ──────┘
//! ```
//! Threads: any may hold a [`VcpuHandle`]; the vCPU's thread alone holds the [`Mailbox`]. There are no locks but that of
//! [`StopSignal`], which is held for an assignment.

use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};

use crate::kvm::{KvmError, install_kick_handler, kick};

/// Orders that may wait. An operator gives one at a time, and is refused when there are more.
const CONTROLS: usize = 16;

/// What the vCPU's thread is to do at its next boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    /// To stay at a boundary.
    Pause,
    /// To continue.
    Resume,
    /// To hand the guest to the log's other end.
    HandOver,
}

/// How the guest's run is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopKind {
    /// The monitor ends; the guest may continue elsewhere.
    Leave,
    /// The guest ends, as if its plug were pulled.
    PowerOff,
}

/// Wakes threads that wait when the monitor is to stop.
#[derive(Debug)]
pub struct StopSignal {
    kind: AtomicU8,
    /// Dropped when it is to stop.
    open: Mutex<Option<Sender<Infallible>>>,
    closed: Receiver<Infallible>,
}

const LEAVE: u8 = 1;
const POWER_OFF: u8 = 2;

impl Default for StopSignal {
    fn default() -> Self {
        let (open, closed) = bounded(0);
        Self { kind: AtomicU8::new(0), open: Mutex::new(Some(open)), closed }
    }
}

impl StopSignal {
    /// Sets it. A guest that is to lose its power does so, whatever comes after.
    pub fn set(&self, kind: StopKind) {
        let code = match kind {
            StopKind::Leave => LEAVE,
            StopKind::PowerOff => POWER_OFF,
        };
        self.kind.fetch_max(code, Ordering::SeqCst);
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How the run is to end, if it is.
    pub fn get(&self) -> Option<StopKind> {
        match self.kind.load(Ordering::SeqCst) {
            0 => None,
            LEAVE => Some(StopKind::Leave),
            _ => Some(StopKind::PowerOff),
        }
    }

    /// Is it set?
    pub fn is_set(&self) -> bool {
        self.get().is_some()
    }

    /// Becomes ready, with an error, when it is set. For waiting on several things.
    pub fn channel(&self) -> &Receiver<Infallible> {
        &self.closed
    }

    /// Waits for `time`, or until it is set. True: it is.
    pub fn wait(&self, time: std::time::Duration) -> bool {
        // Nothing is ever sent: it times out, or is closed.
        let _ = self.closed.recv_timeout(time);
        self.is_set()
    }
}

#[derive(Debug)]
struct Shared {
    thread: libc::pthread_t,
    stop: Arc<StopSignal>,
    wake: Sender<()>,
    controls: Sender<Control>,
    stands: AtomicBool,
}

/// A way to the vCPU's thread.
#[derive(Clone, Debug)]
pub struct VcpuHandle(Arc<Shared>);

/// The vCPU thread's end.
#[derive(Debug)]
pub struct Mailbox {
    /// Orders, in the order in which they were given.
    pub controls: Receiver<Control>,
    /// Has a message when there may be something to look at.
    pub woken: Receiver<()>,
    handle: VcpuHandle,
}

impl VcpuHandle {
    /// For the thread that calls this, which runs the guest from now on.
    ///
    /// # Errors
    /// The host takes no signal handler.
    pub fn new() -> Result<(Self, Mailbox), KvmError> {
        install_kick_handler()?;
        let (wake, woken) = bounded(1);
        let (controls, received) = bounded(CONTROLS);
        // SAFETY: pthread_self has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        let (stop, stands) = (Arc::default(), AtomicBool::new(false));
        let handle = Self(Arc::new(Shared { thread, stop, wake, controls, stands }));
        Ok((handle.clone(), Mailbox { controls: received, woken, handle }))
    }

    /// Takes the vCPU out of the guest, for its thread to look what is due.
    pub fn kick(&self) {
        kick(self.0.thread);
    }

    /// Makes the thread of a halted guest look around.
    pub fn wake(&self) {
        // A message that is still there says the same.
        let _ = self.0.wake.try_send(());
    }

    /// Gets the thread to a boundary, wherever the guest is.
    pub fn ask_for_boundary(&self) {
        self.wake();
        self.kick();
    }

    /// Puts an order into the mailbox. False: too many wait.
    pub fn order(&self, control: Control) -> bool {
        let taken = match self.0.controls.try_send(control) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        };
        self.ask_for_boundary();
        taken
    }

    /// Ends the run at the guest's next boundary, or at once where its state need not be named.
    pub fn stop(&self, kind: StopKind) {
        self.0.stop.set(kind);
        self.ask_for_boundary();
    }

    /// Whether the run is to end.
    pub fn stop_signal(&self) -> &Arc<StopSignal> {
        &self.0.stop
    }

    /// Does the guest stand at a boundary because it was paused?
    pub fn stands(&self) -> bool {
        self.0.stands.load(Ordering::SeqCst)
    }
}

impl Mailbox {
    /// Whether the run is to end.
    pub fn stop_signal(&self) -> &StopSignal {
        &self.handle.0.stop
    }

    /// The guest stands because it was paused, or continues.
    pub fn set_stands(&self, stands: bool) {
        self.handle.0.stands.store(stands, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_stop_wakes_whoever_waits_and_stays() {
        let signal = Arc::new(StopSignal::default());
        assert!(!signal.wait(Duration::ZERO));
        let waiting = {
            let signal = Arc::clone(&signal);
            thread::spawn(move || (signal.wait(Duration::from_secs(600)), signal.get()))
        };
        signal.set(StopKind::Leave);
        assert_eq!(waiting.join().unwrap(), (true, Some(StopKind::Leave)));
        assert!(signal.wait(Duration::from_secs(600)));
    }

    #[test]
    fn a_guest_that_is_to_lose_its_power_does() {
        for kinds in [[StopKind::Leave, StopKind::PowerOff], [StopKind::PowerOff, StopKind::Leave]] {
            let signal = StopSignal::default();
            kinds.into_iter().for_each(|kind| signal.set(kind));
            assert_eq!(signal.get(), Some(StopKind::PowerOff));
        }
    }

    #[test]
    fn orders_wait_in_order_up_to_a_number() {
        let (handle, mailbox) = VcpuHandle::new().unwrap();
        let given = [Control::Pause, Control::Resume, Control::HandOver];
        assert!(given.into_iter().all(|control| handle.order(control)));
        assert!(mailbox.woken.try_recv().is_ok() && mailbox.woken.try_recv().is_err());
        assert_eq!(mailbox.controls.try_iter().collect::<Vec<_>>(), given);
        assert!((0..CONTROLS).all(|_| handle.order(Control::Pause)));
        assert!(!handle.order(Control::Resume));
        let started = Instant::now();
        handle.stop(StopKind::Leave);
        assert!(mailbox.stop_signal().is_set(), "a full mailbox keeps nobody from stopping it");
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
