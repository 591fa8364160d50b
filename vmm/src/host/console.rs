//! The terminal as the guest's serial console.
//!
//! Owns: the mode of the terminal, the thread that reads what is typed, and the writing of what the guest
//! prints. Must never: leave the terminal in raw mode behind.
//! States of the terminal: as found -> raw ([`RawTerminal`]) -> as found, on drop and on any thread's panic.
//!
//! Typing Ctrl-A x ends the monitor; Ctrl-A Ctrl-A gives the guest one Ctrl-A.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, Once, PoisonError};
use std::{mem, panic};

use crossbeam_channel::{Receiver, Sender, bounded};
use ft_log::{Event, MAX_CONSOLE_BYTES};
use nix::errno::Errno;
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::inbox::Inbox;
use super::{StopToken, Wait, Worker};

/// What starts a command to the monitor: Ctrl-A.
const ESCAPE: u8 = 0x01;

/// The terminal to be put right and how it was. One process has one console.
static AS_FOUND: Mutex<Option<(RawFd, Termios)>> = Mutex::new(None);

/// While this lives, the terminal passes every key on and does not echo.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes `terminal` raw; nothing (and nothing to undo) when it is not a terminal.
    /// It must stay open as long as the guard lives.
    pub fn enter(terminal: BorrowedFd<'_>) -> io::Result<Option<Self>> {
        static RESTORE_ON_PANIC: Once = Once::new();
        let as_found = match tcgetattr(terminal) {
            Ok(mode) => mode,
            Err(Errno::ENOTTY | Errno::EINVAL | Errno::EBADF) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut raw = as_found.clone();
        cfmakeraw(&mut raw);
        // The monitor's own lines end in a plain line feed.
        raw.output_flags |= as_found.output_flags & (OutputFlags::OPOST | OutputFlags::ONLCR);
        RESTORE_ON_PANIC.call_once(|| {
            let before = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore();
                before(info);
            }));
        });
        *AS_FOUND.lock().unwrap_or_else(PoisonError::into_inner) = Some((terminal.as_raw_fd(), as_found));
        let guard = Self(());
        tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // Taken out, so that a drop after a panic does nothing.
    let as_found = AS_FOUND.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some((fd, mode)) = as_found else { return };
    // SAFETY: `RawTerminal::enter` requires that the terminal stays open until this has run.
    let terminal = unsafe { BorrowedFd::borrow_raw(fd) };
    // Nothing can be done about a terminal that is gone.
    let _ = tcsetattr(terminal, SetArg::TCSANOW, &mode);
}

/// The thread that turns what is typed into [`Event::Console`].
pub struct ConsoleReader {
    _worker: Worker,
    quit: Receiver<()>,
}

impl ConsoleReader {
    /// Reads `input` (normally standard input) until its end. What is typed is never lost: the thread waits
    /// while `inbox` is full.
    pub fn start(input: impl AsFd + Read + Send + 'static, inbox: impl Into<Inbox>) -> io::Result<Self> {
        let inbox = inbox.into();
        let (quit_sender, quit) = bounded(1);
        let worker = Worker::spawn("console", move |stop| {
            if let Err(error) = read_input(stop, input, &inbox, &quit_sender) {
                tracing::warn!(%error, "The console cannot be read any more.");
            }
        })?;
        Ok(Self { _worker: worker, quit })
    }

    /// Gets a message when Ctrl-A x is typed, and is disconnected when there is no more input.
    pub fn quit(&self) -> &Receiver<()> {
        &self.quit
    }
}

fn read_input(
    stop: &StopToken,
    mut input: impl AsFd + Read,
    inbox: &Inbox,
    quit: &Sender<()>,
) -> io::Result<()> {
    let mut escape = EscapeFilter::default();
    let mut buffer = [0; MAX_CONSOLE_BYTES];
    while stop.wait_readable(input.as_fd(), None)? != Wait::Stopped {
        // One byte of room: an escape from the last read may come out in front of these.
        let len = match input.read(&mut buffer[1..]) {
            Ok(0) => return Ok(()),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let (data, asked_to_quit) = escape.filter(&buffer[1..=len]);
        if !data.is_empty() && !stop.send(inbox, Event::Console { data }) {
            return Ok(());
        }
        if asked_to_quit {
            // A message that nobody has taken yet says the same.
            let _ = quit.try_send(());
        }
    }
    Ok(())
}

/// Takes the monitor's commands out of what is typed.
#[derive(Default)]
struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// What is for the guest, and whether the monitor is to end. A command may be spread over calls.
    fn filter(&mut self, typed: &[u8]) -> (Vec<u8>, bool) {
        let mut data = Vec::with_capacity(typed.len() + 1);
        let mut quit = false;
        for &byte in typed {
            match (mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (false, _) => data.push(byte),
                (true, ESCAPE) => data.push(ESCAPE),
                (true, b'x') => quit = true,
                (true, _) => data.extend([ESCAPE, byte]),
            }
        }
        (data, quit)
    }
}

/// Where the guest's console output goes. A reader that is gone or fails does not disturb the guest.
pub struct ConsoleWriter<W> {
    output: Mutex<Option<W>>,
}

impl<W: Write> ConsoleWriter<W> {
    /// Writes to `output`, normally standard output.
    pub fn new(output: W) -> Self {
        Self { output: Mutex::new(Some(output)) }
    }

    /// Writes all of `bytes` before it returns; waits for a slow reader.
    pub fn write(&self, bytes: &[u8]) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(writer) = output.as_mut() else { return };
        if let Err(error) = writer.write_all(bytes).and_then(|()| writer.flush()) {
            if error.kind() != io::ErrorKind::BrokenPipe {
                tracing::warn!(%error, "Console output cannot be written; it is lost from here on.");
            }
            *output = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use nix::pty::openpty;
    use nix::sys::termios::LocalFlags;

    use super::*;

    #[test]
    fn escape_sequences_are_taken_out() {
        let filter = |typed: &[u8]| EscapeFilter::default().filter(typed);
        assert_eq!(filter(b"ls\r"), (b"ls\r".to_vec(), false));
        assert_eq!(filter(b"a\x01xb"), (b"ab".to_vec(), true));
        assert_eq!(filter(b"\x01\x01x"), (b"\x01x".to_vec(), false));
        assert_eq!(filter(b"\x01\x01\x01x"), (b"\x01".to_vec(), true));
        assert_eq!(filter(b"\x01c"), (b"\x01c".to_vec(), false));
    }

    #[test]
    fn an_escape_sequence_may_be_spread_over_reads() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.filter(b"a\x01"), (b"a".to_vec(), false));
        assert_eq!(filter.filter(b"x"), (Vec::new(), true));
        assert_eq!(filter.filter(b"x"), (b"x".to_vec(), false));
    }

    #[test]
    fn typed_bytes_become_events_of_bounded_size() {
        let (input, mut typist) = io::pipe().unwrap();
        let (events, typed) = bounded(1);
        let console = ConsoleReader::start(input, events).unwrap();
        let text: Vec<u8> = (0..MAX_CONSOLE_BYTES * 3).map(|i| b'a' + (i % 26) as u8).collect();
        typist.write_all(&text).unwrap();
        typist.write_all(b"\x01x").unwrap();
        drop(typist);
        let mut received = Vec::new();
        for event in typed {
            let Event::Console { data } = event else { panic!("not console input: {event:?}") };
            assert!(data.len() <= MAX_CONSOLE_BYTES);
            received.extend(data);
        }
        assert!(received == text, "what was typed must arrive whole and in order");
        assert_eq!(console.quit().recv(), Ok(()));
        assert!(console.quit().recv().is_err(), "no more input, no more quitting");
    }

    // One test, since the guard is one per process.
    #[test]
    fn a_terminal_is_raw_while_guarded_and_restored_on_drop_and_on_panic() {
        let pty = openpty(None, None).unwrap();
        let echoes = || tcgetattr(&pty.slave).unwrap().local_flags.contains(LocalFlags::ECHO);
        assert!(echoes());

        let guard = RawTerminal::enter(pty.slave.as_fd()).unwrap();
        assert!(guard.is_some());
        assert!(!echoes());
        drop(guard);
        assert!(echoes());

        let guard = RawTerminal::enter(pty.slave.as_fd()).unwrap();
        let panicked = std::thread::spawn(|| panic!("this panic is part of a test")).join();
        assert!(panicked.is_err());
        assert!(echoes(), "a panic anywhere gives the terminal back");
        drop(guard);
        assert!(echoes());

        let file = File::open("/dev/null").unwrap();
        assert!(RawTerminal::enter(file.as_fd()).unwrap().is_none());
    }

    #[test]
    fn output_is_flushed_per_call() {
        let console = ConsoleWriter::new(io::BufWriter::new(Vec::new()));
        console.write(b"hello");
        let output = console.output.lock().unwrap();
        assert_eq!(output.as_ref().unwrap().get_ref(), b"hello");
    }

    #[test]
    fn a_reader_that_is_gone_is_tolerated() {
        let (reader, writer) = io::pipe().unwrap();
        let console = ConsoleWriter::new(writer);
        drop(reader);
        console.write(b"lost");
        console.write(b"lost too");
        assert!(console.output.lock().unwrap().is_none());
    }
}
