//! What a test and the agent in a test host say to each other over TCP.
//!
//! Each connection carries one request. Messages are JSON, one per line, each at most [`MAX_LINE`] bytes;
//! the bytes of a file follow its message raw.
//!
//! ```text
//! test                               agent
//! Spawn{argv,env,cwd}        ->
//!                            <-      Started{pid}
//! Signal(n) (any number)     ->
//!                            <-      Line(stream, text) | Unfinished(stream, text) (any number)
//!                            <-      Exited(code) | Killed(signal), then the agent closes
//! Push{path,mode,len} + len bytes -> <- Done
//! Pull{path}                 ->      <- Data{len} + len bytes
//! ```
//! In place of any answer the agent sends `Failed(reason)` and closes. A test that closes the connection of a
//! running process kills the process and its group.

use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// TCP port of the agent on a host's control address.
pub const AGENT_PORT: u16 = 7000;

/// Longest message in bytes. Longer lines of a process's output are split before that.
pub const MAX_LINE: u64 = 1 << 20;

/// What a test asks for: the first message of a connection, or a signal to its process.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// Start a process, in a process group of its own.
    Spawn {
        /// Program and its arguments; the program is looked up in PATH.
        argv: Vec<String>,
        /// Variables added to the agent's environment.
        env: Vec<(String, String)>,
        /// Working directory; the agent's own if absent.
        cwd: Option<PathBuf>,
    },
    /// Send this signal number to the process group.
    Signal(i32),
    /// Write a file; it appears under its name when it is complete.
    Push {
        /// Where to.
        path: PathBuf,
        /// Permission bits, e.g. 0o755.
        mode: u32,
        /// Number of bytes that follow.
        len: u64,
    },
    /// Read a file.
    Pull {
        /// Which file.
        path: PathBuf,
    },
}

/// A stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Its standard output.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// What the agent answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Event {
    /// The process runs.
    Started {
        /// Its number in the host.
        pid: u32,
    },
    /// A line of its output, without the line end; bytes that are not UTF-8 are replaced.
    Line(Stream, String),
    /// The start of a line that it has not ended yet. The next event of this stream has it again.
    Unfinished(Stream, String),
    /// It ended with this status.
    Exited(i32),
    /// It was ended by this signal.
    Killed(i32),
    /// The file is written.
    Done,
    /// This many bytes follow.
    Data {
        /// Number of bytes.
        len: u64,
    },
    /// The request failed for this reason.
    Failed(String),
}

/// Sends one message.
pub fn send(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Receives one message; `None` if the peer has closed the connection between messages.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> io::Result<Option<T>> {
    let mut line = Vec::new();
    from.by_ref().take(MAX_LINE).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "a message is cut off or too long")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let mut wire = Vec::new();
        send(&mut wire, &Event::Line(Stream::Stdout, "a \"line\"\twith \u{fffd}".into())).unwrap();
        send(&mut wire, &Event::Exited(3)).unwrap();
        let mut from = wire.as_slice();
        assert!(
            matches!(receive(&mut from).unwrap(), Some(Event::Line(Stream::Stdout, l)) if l == "a \"line\"\twith \u{fffd}")
        );
        assert!(matches!(receive(&mut from).unwrap(), Some(Event::Exited(3))));
        assert!(receive::<Event>(&mut from).unwrap().is_none());
    }

    #[test]
    fn cut_off_message_is_an_error() {
        assert!(receive::<Event>(&mut b"\"Done".as_slice()).is_err());
        assert!(receive::<Event>(&mut b"{\"Nonsense\":1}\n".as_slice()).is_err());
    }
}
