//! The host side of the guest's devices: file descriptors become events, effects become system calls.
//!
//! Owns: the tap, the disk image, the console, and the threads that serve them. A thread only turns what
//! a descriptor yields into an [`Event`] on the bounded channel that the vCPU thread drains, or carries out
//! an effect that it was given.
//! Must never: touch guest memory or device state, or decide when an event takes effect.
//! States of a thread: running, told to stop (its [`Worker`] is being dropped), gone.

pub mod backends;
pub mod console;
pub mod deferral;
pub mod disk;
pub mod image;
pub mod inbox;
pub mod log;
mod log_event;
pub mod owner;
mod secret;
pub mod tap;

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, select};
use ft_log::Event;
use inbox::Inbox;
pub use log_event::LogEvent;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
pub use secret::{SecretError, read_secret};

/// How long dropping a [`Worker`] waits for its thread. Only a system call that hangs (a dead file server)
/// takes longer; the thread then ends by itself when the call returns.
const STOP_WAIT: Duration = Duration::from_secs(5);

/// Makes what has been created, renamed or removed in `directory` outlive a crash of its storage.
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    match File::open(directory)?.sync_all() {
        // Some network file systems have no fsync for directories; their server is then durable by itself.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

/// Starts `body` on a thread called `name` (at most 15 bytes are shown by the host), which nobody stops.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(body)
}

/// Fills `bytes` with random bytes of the host's kernel.
pub fn random_bytes(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        let rest = &mut bytes[filled..];
        // SAFETY: the kernel writes at most `rest.len()` bytes to `rest`.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => filled += got,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Why [`StopToken::wait_readable`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// The descriptor has something to read, or an error or end of file that a read will report.
    Ready,
    /// Nothing happened in the time given.
    TimedOut,
    /// The owner wants the thread to end.
    Stopped,
}

/// A thread's end of the stop signal: a pipe for `poll`, a channel for `select!`. Both close on stop.
pub(crate) struct StopToken {
    pipe: PipeReader,
    channel: Receiver<Infallible>,
}

impl StopToken {
    /// Waits until `fd` is readable, `timeout` has passed (none: for ever) or the thread is to stop.
    pub(crate) fn wait_readable(&self, fd: BorrowedFd<'_>, timeout: Option<Duration>) -> io::Result<Wait> {
        // Rounded up: a wait that is cut short by a fraction of a millisecond would spin.
        let timeout = timeout.map_or(PollTimeout::NONE, |t| {
            PollTimeout::try_from(t + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        loop {
            let mut fds =
                [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN), PollFd::new(fd, PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(0) => return Ok(Wait::TimedOut),
                Ok(_) if fds[0].any() != Some(false) => return Ok(Wait::Stopped),
                Ok(_) => return Ok(Wait::Ready),
            }
        }
    }

    /// Sends `event`, waiting while the queue is full. False: the thread is to end.
    pub(crate) fn send(&self, inbox: &Inbox, event: Event) -> bool {
        let sent = select! {
            send(inbox.channel(), event) -> sent => sent.is_ok(),
            recv(self.channel) -> _ => false,
        };
        if sent {
            inbox.note();
        }
        sent
    }

    /// Becomes readable when the thread is to end.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Whether the thread is to end.
    pub(crate) fn stopped(&self) -> bool {
        self.channel.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// Becomes ready (disconnected) when the thread is to end.
    pub(crate) fn channel(&self) -> &Receiver<Infallible> {
        &self.channel
    }
}

/// A named thread that is told to stop, and waited for, when this is dropped.
pub(crate) struct Worker {
    name: String,
    // The channel closes first: what wakes from `poll` then also sees `stopped`.
    stop: Option<(Sender<Infallible>, PipeWriter)>,
    ended: Receiver<Infallible>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// As [`spawn`], with a thread that can be stopped.
    pub(crate) fn spawn(name: &str, body: impl FnOnce(&StopToken) + Send + 'static) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        let (stop_tx, stop_rx) = bounded(0);
        let (ended_tx, ended_rx) = bounded(0);
        let token = StopToken { pipe: reader, channel: stop_rx };
        let thread = spawn(name, move || {
            let _ended: Sender<Infallible> = ended_tx;
            body(&token);
        })?;
        let stop = Some((stop_tx, writer));
        Ok(Self { name: name.to_owned(), stop, ended: ended_rx, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.ended.recv_timeout(STOP_WAIT) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(thread = %self.name, "A thread is stuck in a system call and was left to end by itself.");
            return;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(thread = %self.name, "A thread panicked.");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn dropping_a_worker_ends_a_thread_that_waits_for_input() {
        let (input, _keep_open) = io::pipe().unwrap();
        let stopped = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stopped);
        let worker = Worker::spawn("test", move |stop| {
            let wait = stop.wait_readable(input.as_fd(), None).unwrap();
            seen.store(wait == Wait::Stopped && stop.stopped(), Ordering::SeqCst);
        })
        .unwrap();
        drop(worker);
        assert!(stopped.load(Ordering::SeqCst));
    }

    #[test]
    fn dropping_a_worker_ends_a_thread_that_waits_for_room_in_the_queue() {
        let (events, keep_full) = bounded(0);
        let worker = Worker::spawn("test", move |stop| {
            assert!(!stop.send(&events.into(), Event::PowerButton));
        })
        .unwrap();
        drop(worker);
        assert_eq!(keep_full.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn random_bytes_fill_more_than_one_call_gives() {
        // The kernel gives at most 32 MiB - 1 at once.
        let mut bytes = vec![0; 33 << 20];
        random_bytes(&mut bytes).unwrap();
        assert!(bytes.chunks(64).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
    }

    #[test]
    fn waiting_tells_input_from_timeout() {
        let (input, output) = io::pipe().unwrap();
        let (verdicts, results) = bounded(2);
        let _worker = Worker::spawn("test", move |stop| {
            verdicts.send(stop.wait_readable(input.as_fd(), Some(Duration::ZERO)).unwrap()).unwrap();
            drop(output);
            verdicts.send(stop.wait_readable(input.as_fd(), None).unwrap()).unwrap();
        })
        .unwrap();
        assert_eq!(results.recv(), Ok(Wait::TimedOut));
        assert_eq!(results.recv(), Ok(Wait::Ready));
    }
}
