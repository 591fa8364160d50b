//! The backup's way to a primary: connects, and is greeted.
//!
//! Owns: a connection until the log follows on it. Must never: wait for longer than it was told, or take anything but a
//! welcome for one.
//! Threads: the caller's. Locks: none.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use ft_log::{ChannelError, FrameWriter, Hello, Key, Message, Refusal, SealKey, StreamError, Welcome};
use thiserror::Error;

use super::channel::{Channel, Receiving};

/// Pause between two attempts to reach the primary.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);
/// Longest that one read of the greeting or the snapshot may take. The primary begins with the rest of the snapshot
/// when its guest can be stopped with no disk request under way.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a backup cannot follow.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// Nobody answers.
    #[error(
        "no primary answers at {address}: {source}. Is `vmft primary` running, with this --listen address?"
    )]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What the last attempt said.
        #[source]
        source: io::Error,
    },
    /// The primary does not want this backup.
    #[error("the primary at {address} refuses this backup: {reason}")]
    Refused {
        /// Its address.
        address: SocketAddr,
        /// Whether it may want this backup later.
        refusal: Refusal,
        /// Its sentence.
        reason: String,
    },
    /// What answers is no primary, or it broke off.
    #[error("the primary at {address} was lost before the pair was formed: {source}")]
    Stream {
        /// The address.
        address: SocketAddr,
        /// What went wrong.
        #[source]
        source: StreamError,
    },
    /// The two do not trust each other.
    #[error("the primary at {address} cannot be followed: {source}")]
    Channel {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: ChannelError,
    },
    /// Something else than the greeting came.
    #[error("the primary at {address} sent {found} where its welcome belongs")]
    Unexpected {
        /// The address.
        address: SocketAddr,
        /// What came.
        found: String,
    },
}

/// A connection to a primary that has accepted this backup.
pub struct Connection {
    /// The primary's address.
    pub address: SocketAddr,
    /// What the primary said.
    pub welcome: Welcome,
    channel: Channel,
}

/// A connection to a primary that takes backups now, and does not know who this is.
pub struct Dialled {
    address: SocketAddr,
    channel: Channel,
}

/// Connects to the primary at `address`. `key` is the pair's, or `None` to talk in the open.
pub fn dial(
    address: SocketAddr,
    key: Option<&Key>,
    guest_name: &str,
    timeout: Duration,
) -> Result<Dialled, ConnectError> {
    let deadline = Instant::now() + timeout;
    let stream = loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => break stream,
            Err(source) if Instant::now() >= deadline => {
                return Err(ConnectError::Unreachable { address, source });
            }
            Err(_) => std::thread::sleep(CONNECT_AGAIN),
        }
    };
    let broken = |source| ConnectError::Stream { address, source };
    // A primary that is still starting has bound its port and takes nothing from it yet.
    let patience = deadline.saturating_duration_since(Instant::now()).max(READ_TIMEOUT);
    let channel = Channel::connect(stream, key, guest_name, patience).map_err(|error| match error {
        ChannelError::Stream(source) => broken(source),
        source => ConnectError::Channel { address, source },
    })?;
    Ok(Dialled { address, channel })
}

impl Dialled {
    /// Introduces this backup, and hears whether it is wanted. The primary waits no longer than for a greeting.
    pub fn introduce(self, hello: Hello) -> Result<Connection, ConnectError> {
        let Self { address, mut channel } = self;
        let broken = |source| ConnectError::Stream { address, source };
        FrameWriter::new(&mut channel.out).send(&Message::Hello(hello)).map_err(broken)?;
        match channel.frames.receive().map_err(broken)? {
            Some(Message::Welcome(welcome)) => {
                let limited = channel.stream.set_read_timeout(Some(READ_TIMEOUT));
                limited.map_err(StreamError::Io).map_err(broken)?;
                Ok(Connection { address, welcome, channel })
            }
            Some(Message::Refuse { refusal, reason }) => {
                Err(ConnectError::Refused { address, refusal, reason })
            }
            Some(other) => {
                Err(ConnectError::Unexpected { address, found: format!("a {} message", other.kind().name()) })
            }
            None => Err(ConnectError::Unexpected { address, found: "nothing".into() }),
        }
    }
}

impl Connection {
    /// Reads the snapshot, then batches.
    pub fn frames(&mut self) -> &mut Receiving {
        &mut self.channel.frames
    }

    /// Seals the heartbeats that go with this connection.
    pub fn heartbeat_key(&self) -> &SealKey {
        &self.channel.heartbeat_key
    }

    /// This host's address on the way to the primary.
    pub fn local_address(&self) -> Result<SocketAddr, ConnectError> {
        self.channel
            .stream
            .local_addr()
            .map_err(|error| ConnectError::Stream { address: self.address, source: StreamError::Io(error) })
    }

    /// The greeted channel, for the log.
    pub fn into_channel(self) -> Channel {
        self.channel
    }
}
