//! The primary's door for backups: listens, greets, checks, and hands over to the vCPU thread.
//!
//! Owns: the listening socket. Must never: disturb the guest. Whoever connects has a bounded time and a
//! bounded number of bytes to say who it is; random bytes, silence and wrong peers end here.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError};
use ft_log::{
    ChannelError, Expected, FrameWriter, Key, MAX_TEXT_BYTES, Message, Refusal, StreamError, check_hello,
};
use thiserror::Error;

use crate::host::LogEvent;
use crate::host::spawn;
use crate::pair::claims::claim::{Member, check_host};
use crate::pair::claims::image_identity::{Demand, shortened};
use crate::pair::primary::invite::Search;
use crate::pair::primary::joiner::Join;
use crate::pair::primary::state::PrimaryState;
use crate::pair::protocol::ANOTHER_IS_JOINING;
use crate::pair::wire::channel::{Channel, Sending};
use crate::with_causes;

/// Longest that a greeting may take in all.
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);
/// Greetings at the same time; whoever comes beyond that is closed at once.
const GREETINGS_MAX: usize = 4;

/// Why nobody can connect.
#[derive(Debug, Error)]
pub enum AcceptError {
    /// The address cannot be listened on.
    #[error(
        "backups cannot be awaited on {address} (TCP): {source}. Choose an address of this host and a free port with --listen"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has no thread left.
    #[error("the listening thread cannot be started: {0}")]
    Thread(#[source] io::Error),
}

/// A socket on which backups can connect.
pub struct Listener {
    socket: TcpListener,
    port: u16,
}

/// What the greeting needs.
pub struct Reception {
    /// What a backup must be.
    pub expected: Expected,
    /// What its disk must be.
    pub disk: Demand,
    /// What it must know, or `None` if the two talk in the open.
    pub key: Option<Key>,
    /// Whether there is one already.
    pub state: Arc<PrimaryState>,
    /// Who was refused before, and why.
    pub search: Arc<Search>,
    /// Where accepted backups go.
    pub joins: Sender<Join>,
    /// Makes a halted guest's thread look at `joins`.
    pub wake: Box<dyn Fn() + Send + Sync>,
}

impl Listener {
    /// Binds `address`.
    pub fn bind(address: SocketAddr) -> Result<Self, AcceptError> {
        let bind = |source| AcceptError::Bind { address, source };
        let socket = TcpListener::bind(address).map_err(bind)?;
        let port = socket.local_addr().map_err(bind)?.port();
        Ok(Self { socket, port })
    }

    /// The port on which backups can connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Greets whoever connects, until the process ends.
    pub fn serve(self, reception: Reception) -> Result<(), AcceptError> {
        let reception = Arc::new(reception);
        let greetings = Arc::new(AtomicUsize::new(0));
        let accept = move || {
            loop {
                match self.socket.accept() {
                    Ok((stream, address)) => greet_aside(stream, address, &reception, &greetings),
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of descriptors, most likely: give others the time to close some.
                        std::thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        };
        spawn("accept", accept).map_err(AcceptError::Thread)?;
        Ok(())
    }
}

fn greet_aside(
    stream: TcpStream,
    address: SocketAddr,
    reception: &Arc<Reception>,
    greetings: &Arc<AtomicUsize>,
) {
    let Some(place) = Place::take(greetings) else { return };
    let reception = Arc::clone(reception);
    let spawned = spawn("greeting", move || {
        if let Err(error) = greet(stream, address, &reception, place) {
            let error = with_causes(&error);
            if reception.search.failed(address.ip(), &error) {
                tracing::warn!(%address, %error, "a connection on the log port came to nothing");
            }
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%address, %error, "no thread for a connection on the log port");
    }
}

/// One of the [`GREETINGS_MAX`] places; free again when dropped.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(taken: &Arc<AtomicUsize>) -> Option<Self> {
        let place = Self(Arc::clone(taken));
        (taken.fetch_add(1, Ordering::SeqCst) < GREETINGS_MAX).then_some(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// `_place` comes last, so it is free before the connection closes: who sees that can come again at once.
fn greet(
    stream: TcpStream,
    address: SocketAddr,
    reception: &Reception,
    _place: Place,
) -> Result<(), ChannelError> {
    let Reception { expected, key, .. } = reception;
    let mut channel = Channel::accept(stream, key.as_ref(), &expected.guest_name, GREETING_TIMEOUT)?;
    let refused = |channel: &mut Channel, refusal, reason| Ok(refuse(&mut channel.out, refusal, reason)?);
    let hello = match channel.frames.receive()? {
        Some(Message::Hello(hello)) => hello,
        Some(other) => {
            let reason = format!("expected hello, got {}", other.kind().name());
            return refused(&mut channel, Refusal::Unfit, reason);
        }
        None => return Ok(()),
    };
    let unfit = match check_hello(&hello, expected) {
        Ok(()) => check_host(&hello.host_name)
            .err()
            .map(|error| error.to_string())
            .or_else(|| reception.disk.refusal(&hello)),
        Err(mismatch) => Some(mismatch.to_string()),
    };
    if let Some(cause) = unfit {
        if reception.search.failed(address.ip(), &cause) {
            tracing::warn!(event = %LogEvent::BackupRefused, %address, "a backup was refused: {cause}");
        }
        return refused(&mut channel, Refusal::Unfit, cause);
    }
    if let Some(reason) = reception.state.protocol(|primary| primary.refusal()) {
        return refused(&mut channel, Refusal::Busy, reason.into());
    }
    let listen = (hello.listen_port != 0).then(|| SocketAddr::new(address.ip(), hello.listen_port));
    let member = Member { host: hello.host_name, uuid: hello.life };
    let join = Join { channel, member, address, listen };
    match reception.joins.try_send(join) {
        Ok(()) => (reception.wake)(),
        Err(TrySendError::Full(mut join) | TrySendError::Disconnected(mut join)) => {
            return refused(&mut join.channel, Refusal::Busy, ANOTHER_IS_JOINING.into());
        }
    }
    Ok(())
}

/// Tells a backup why it cannot join.
pub(super) fn refuse(out: &mut Sending, refusal: Refusal, reason: String) -> Result<(), StreamError> {
    FrameWriter::new(out).send(&Message::Refuse { refusal, reason: shortened(reason, MAX_TEXT_BYTES) })
}
