//! Takes guests that do not stop by themselves out of KVM.
//!
//! Owns: its thread. Must never: decide that a guest has run too long, since whoever runs it looks at each
//! kick; or kick while no guest runs, since that would interrupt whatever else the thread does. States:
//! started, idle <-> watching -> dropped (the thread is gone).

use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::host::spawn;
use crate::kvm::kick;

/// How long a guest runs until the first kick, and between two. Guests that keep their word need
/// microseconds.
const INTERVAL: Duration = Duration::from_millis(100);

/// Kicks the thread that started it while that watches a guest, until dropped.
#[derive(Debug)]
pub struct Watchdog {
    watch: Watch,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Says when a guest runs.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    since: Arc<Mutex<Option<Instant>>>,
}

/// A guest runs, until this is dropped.
#[derive(Debug)]
pub struct Watching<'a>(&'a Watch);

impl Watchdog {
    /// A watchdog for the calling thread. The handler for kicks is installed.
    pub fn start() -> io::Result<Self> {
        let (stop, stopped) = channel::<()>();
        let watch = Watch::default();
        let watched = watch.clone();
        // SAFETY: pthread_self has no preconditions.
        let kicked = unsafe { libc::pthread_self() };
        let watcher = move || {
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                // Held until the kick is out: who has ended its watch is not kicked any more.
                let since = watched.lock();
                if since.is_some_and(|since| since.elapsed() >= INTERVAL) {
                    kick(kicked);
                }
            }
        };
        let thread = spawn("watchdog", watcher)?;
        Ok(Self { watch, stop: Some(stop), thread: Some(thread) })
    }

    /// For a guest.
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.take();
        // The kicked thread waits here: it outlives the one that kicks it. A panic there has been reported.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Watch {
    /// The guest runs from now on.
    pub fn begin(&self) -> Watching<'_> {
        *self.lock() = Some(Instant::now());
        Watching(self)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.since.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}
