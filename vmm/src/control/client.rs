//! An operator's end of the control socket.
//!
//! Owns: one question and its answer. Must never: wait for a monitor for longer than [`ANSWER_TIME`].

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::protocol::{Answer, CONTROL_VERSION, Command, MAX_REPLY_BYTES, Request, read_reply};

/// How long a monitor may take to answer.
pub const ANSWER_TIME: Duration = Duration::from_secs(5);

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error(
        "no monitor answers at {path}: {source}. Is it running on this host? Its socket's path comes from --name or --control",
        path = path.display()
    )]
    NoMonitor {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It broke off.
    #[error("the monitor at {path} did not answer: {source}", path = path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// It says something else.
    #[error("the monitor at {path} answered something that this vmft does not understand: {why}", path = path.display())]
    Strange {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Asks the monitor whose control socket is at `path`.
pub fn ask(path: &Path, command: Command) -> Result<Answer, ClientError> {
    let absent = |source| ClientError::NoMonitor { path: path.into(), source };
    let silent = |source| ClientError::NoAnswer { path: path.into(), source };
    let mut stream = UnixStream::connect(path).map_err(absent)?;
    stream.set_read_timeout(Some(ANSWER_TIME)).map_err(silent)?;
    stream.set_write_timeout(Some(ANSWER_TIME)).map_err(silent)?;
    let request = Request { vmft: CONTROL_VERSION, command };
    let mut line = serde_json::to_vec(&request).map_err(|error| silent(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(silent)?;
    let mut reply = Vec::new();
    while !reply.ends_with(b"\n") && reply.len() < MAX_REPLY_BYTES {
        let mut bytes = [0; 4 << 10];
        match stream.read(&mut bytes).map_err(silent)? {
            0 => return Err(silent(io::ErrorKind::UnexpectedEof.into())),
            len => reply.extend_from_slice(&bytes[..len]),
        }
    }
    let strange = |why: String| ClientError::Strange { path: path.into(), why };
    read_reply(&reply).map_err(strange)
}
