//! The monitor's log: lines on standard error, written by one thread.
//!
//! Owns: standard error, the queue in front of it, and what a panic does. Must never: let a thread wait for the reader of
//! the log, except for [`FLUSH_WAIT`] at the end of a process; or end the process because a line cannot be written.
//!
//! ```text
//!   any thread ── line ──> queue, QUEUE_BYTES ── thread "log" ──> standard error
//!                   └ no room: counted              └ failed: counted
//!                        └── said before the next line that can be written
//! ```
//! Not covered: a line that the process has queued when it is killed.
//!
//! `tracing-appender` has such a writer, which does not satisfy: where its queue is full it prints to standard output at the
//! end, and panics if that is closed; it forgets the lines of failed writes; its queue has no limit in bytes; its thread
//! takes the signals that the monitor waits for.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::collections::VecDeque;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{mem, panic, thread};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use tracing_subscriber::fmt::MakeWriter;

/// Most that waits to be written, with [`LINE_BYTES`] for each line. Lines beyond that are lost.
pub const QUEUE_BYTES: usize = 1 << 20;
/// What a line in the queue costs besides its text.
const LINE_BYTES: usize = mem::size_of::<Line>();
/// How long the end of a process waits for the lines that are queued.
pub const FLUSH_WAIT: Duration = Duration::from_millis(500);
/// The exit status of a process in which a thread has panicked.
const PANICKED: i32 = 101;

/// A process has one standard error.
static LOG: Log = Log::new();

/// Starts the thread that writes. It takes no signals, and may start before those that wait for them.
///
/// # Errors
/// There is no thread; what is logged is then lost.
pub fn start() -> io::Result<()> {
    // A thread starts with the mask of its creator. No signal may interrupt this one: SIGTERM is another thread's,
    // SIGXFSZ and SIGTTOU answer a write that fails.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    LOG.lock().served = true;
    let started = super::spawn("log", || LOG.serve(io::stderr()));
    before.thread_set_mask()?;
    started.map(drop).inspect_err(|_| LOG.lock().served = false)
}

/// Queues a text of one or more lines as it is.
pub fn line(text: impl Display) {
    LOG.push(format!("{text}\n").into_bytes());
}

/// Waits until everything that was logged is written, for [`FLUSH_WAIT`] at most.
pub fn flush() {
    LOG.flush(FLUSH_WAIT);
}

/// Lets a panic of any thread end the process with status 101, after a line in the log: a monitor that has lost a thread
/// must not look alive to its peer.
pub fn end_on_panic() {
    panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        let mut text = format!("vmft: thread '{}' {info}", thread.name().unwrap_or("unnamed"));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            text = format!("{text}\n{backtrace}");
        }
        line(text);
        flush();
        // SAFETY: it ends the process, and runs nothing of it: neither destructors nor what `exit` would call.
        unsafe { libc::_exit(PANICKED) }
    }));
}

/// Where `tracing` writes. Each write is an event, and queued as a whole.
#[derive(Clone, Copy, Debug)]
pub struct LogWriter;

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.push(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

struct Line {
    text: Vec<u8>,
    /// Lines that were lost just before this one.
    lost_before: u64,
}

struct State {
    queue: VecDeque<Line>,
    queued_bytes: usize,
    /// Lines that were lost after the last one in the queue.
    lost: u64,
    /// Does the thread write at this moment?
    writing: bool,
    /// Is there a thread that writes?
    served: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.lost == 0
    }
}

struct Log {
    state: Mutex<State>,
    changed: Condvar,
}

impl Log {
    const fn new() -> Self {
        let state = State { queue: VecDeque::new(), queued_bytes: 0, lost: 0, writing: false, served: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Held for the length of a few instructions only.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, text: Vec<u8>) {
        let mut state = self.lock();
        let with_this = state.queued_bytes + LINE_BYTES + text.len();
        if with_this > QUEUE_BYTES {
            state.lost += 1;
        } else {
            state.queued_bytes = with_this;
            let lost_before = mem::take(&mut state.lost);
            state.queue.push_back(Line { text, lost_before });
        }
        drop(state);
        self.changed.notify_all();
    }

    fn flush(&self, limit: Duration) {
        let busy = |state: &mut State| state.served && (state.writing || !state.is_idle());
        // Both answers mean that it is time to go on.
        drop(self.changed.wait_timeout_while(self.lock(), limit, busy));
    }

    /// The next text to be written, if there is one, and how many lines were lost before it. Waits for either.
    fn take(&self) -> (u64, Option<Vec<u8>>) {
        let waiting = self.changed.wait_while(self.lock(), |state| state.is_idle());
        let mut state = waiting.unwrap_or_else(PoisonError::into_inner);
        state.writing = true;
        match state.queue.pop_front() {
            Some(Line { text, lost_before }) => {
                state.queued_bytes -= LINE_BYTES + text.len();
                (lost_before, Some(text))
            }
            None => (mem::take(&mut state.lost), None),
        }
    }

    /// Writes what is queued to `output`, for ever.
    fn serve(&self, output: impl Write + AsFd) {
        let mut output = Output { inner: output, is_torn: false };
        let mut lost = 0;
        loop {
            let (lost_before, text) = self.take();
            lost += lost_before;
            let said = lost == 0 || output.write_line(notice(lost).as_bytes());
            if said {
                lost = 0;
            }
            if let Some(text) = text
                && !(said && output.write_line(&text))
            {
                lost += 1;
            }
            self.lock().writing = false;
            self.changed.notify_all();
        }
    }
}

fn notice(lost: u64) -> String {
    format!("vmft: lines of this log that are lost here, not read or not written in time: {lost}\n")
}

struct Output<W> {
    inner: W,
    /// Does what was written end within a line?
    is_torn: bool,
}

impl<W: Write + AsFd> Output<W> {
    /// Writes a whole line, for as long as that takes. False: it failed.
    fn write_line(&mut self, line: &[u8]) -> bool {
        (!self.is_torn || self.write(b"\n")) && self.write(line)
    }

    fn write(&mut self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match self.inner.write(bytes) {
                Ok(0) => return false,
                Ok(len) => {
                    self.is_torn = bytes[len - 1] != b'\n';
                    bytes = &bytes[len..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Another process has made it non-blocking, as it may with what it shares.
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut room = [PollFd::new(self.inner.as_fd(), PollFlags::POLLOUT)];
                    if poll(&mut room, PollTimeout::NONE).is_err() {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read};
    use std::sync::Arc;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    use super::*;

    fn served(output: impl Write + AsFd + Send + 'static) -> Arc<Log> {
        let log = Arc::new(Log::new());
        log.lock().served = true;
        let server = Arc::clone(&log);
        thread::spawn(move || server.serve(output));
        log
    }

    fn say(log: &Log, text: &str) {
        log.push(format!("{text}\n").into_bytes());
    }

    /// A pipe, full; its writes fail or wait.
    fn full_pipe(flags: OFlag) -> (BufReader<PipeReader>, PipeWriter, usize) {
        let (reader, mut writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut len = 0;
        while let Ok(more) = writer.write(&[b'.'; 4096]) {
            len += more;
        }
        fcntl(&writer, FcntlArg::F_SETFL(flags)).unwrap();
        (BufReader::new(reader), writer, len)
    }

    fn next_line(reader: &mut impl BufRead) -> String {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        line
    }

    #[test]
    fn lines_are_written_in_order() {
        let (reader, writer) = io::pipe().unwrap();
        let log = served(writer);
        (0..1000).for_each(|number| say(&log, &number.to_string()));
        let lines: Vec<String> = BufReader::new(reader).lines().take(1000).map(Result::unwrap).collect();
        assert_eq!(lines, (0..1000).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[test]
    fn a_reader_that_hangs_holds_nobody_up_and_is_told_where_lines_are_missing() {
        for flags in [OFlag::empty(), OFlag::O_NONBLOCK] {
            let (mut reader, writer, filled) = full_pipe(flags);
            let log = served(writer);
            say(&log, "first");
            // This ends: no writer waits, and the queue takes no more than it may.
            let text = "x".repeat(1000);
            let fit = QUEUE_BYTES / (LINE_BYTES + 1001);
            for _ in 0..fit + 100 {
                say(&log, &text);
            }
            assert!(log.lock().queued_bytes <= QUEUE_BYTES);
            log.flush(Duration::from_millis(10));
            io::copy(&mut reader.by_ref().take(filled as u64), &mut io::sink()).unwrap();
            assert_eq!(next_line(&mut reader), "first\n");
            let mut whole = 0;
            let told = loop {
                match next_line(&mut reader) {
                    line if line.trim_end() == text => whole += 1,
                    line => break line,
                }
            };
            // The thread may have taken the first line out of the queue before the others came, or not.
            let lost = fit as u64 + 100 - whole;
            assert_eq!(told, notice(lost));
            assert!((100..=101).contains(&lost), "{lost}");
            say(&log, "after");
            assert_eq!(next_line(&mut reader), "after\n");
        }
    }

    #[test]
    fn failed_writes_are_counted_and_the_next_line_is_tried() {
        /// Fails while `broken`, after the first half of each line.
        struct Failing {
            inner: PipeWriter,
            broken: Arc<Mutex<bool>>,
        }
        impl Write for Failing {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                if !*self.broken.lock().unwrap() {
                    return self.inner.write(bytes);
                }
                if bytes.starts_with(b"torn") {
                    self.inner.write(&bytes[..4])
                } else {
                    Err(ErrorKind::StorageFull.into())
                }
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        impl AsFd for Failing {
            fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
                self.inner.as_fd()
            }
        }
        let (reader, inner) = io::pipe().unwrap();
        let broken = Arc::new(Mutex::new(true));
        let log = served(Failing { inner, broken: Arc::clone(&broken) });
        ["torn line", "none", "none"].into_iter().for_each(|text| say(&log, text));
        log.flush(Duration::from_secs(60));
        *broken.lock().unwrap() = false;
        say(&log, "whole");
        let lines: Vec<String> = BufReader::new(reader).lines().take(3).map(Result::unwrap).collect();
        assert_eq!(lines, ["torn", notice(3).trim_end(), "whole"]);
    }

    #[test]
    fn a_log_that_nobody_serves_is_not_waited_for() {
        let log = Log::new();
        say(&log, "line");
        log.flush(Duration::MAX);
    }
}
