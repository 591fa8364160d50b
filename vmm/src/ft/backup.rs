//! The backup's end of the log: connects, receives and acknowledges.
//!
//! Owns: the connection, the batches that wait to be executed, and the lock around the backup's state machine, which says
//! whether anything may be acknowledged and what follows from the link's end (`protocol/backup.rs`). Must never:
//! acknowledge anything when that says no: the primary may let out what was acknowledged.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ft_log::{
    Ack, BatchReceiver, ByeReason, ChannelError, FrameWriter, GuestTime, Hello, Key, LogPart, Message,
    Refusal, SealKey, StreamError, Welcome,
};
use thiserror::Error;

use super::channel::{Channel, Receiving, Sending};
use super::protocol::{Backup, LinkLoss};
use crate::control::protocol::{Figures, LogFigures};
use crate::control::state::FiguresOf;
use crate::report::Kept;
use crate::run::{PartSource, RunError};
use crate::with_causes;

/// Bytes of batches that may wait for execution; beyond that the primary waits for acknowledgements.
const QUEUE_LIMIT_BYTES: usize = 16 << 20;
/// Pause between two attempts to reach the primary.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);
/// Longest that one read of the greeting or the snapshot may take. The primary begins with the rest of the snapshot
/// when its guest can be stopped with no disk request under way.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a backup cannot follow.
#[derive(Debug, Error)]
pub enum BackupError {
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
) -> Result<Dialled, BackupError> {
    let deadline = Instant::now() + timeout;
    let stream = loop {
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => break stream,
            Err(source) if Instant::now() >= deadline => {
                return Err(BackupError::Unreachable { address, source });
            }
            Err(_) => std::thread::sleep(CONNECT_AGAIN),
        }
    };
    let broken = |source| BackupError::Stream { address, source };
    // A primary that is still starting has bound its port and takes nothing from it yet.
    let patience = deadline.saturating_duration_since(Instant::now()).max(READ_TIMEOUT);
    let channel = Channel::connect(stream, key, guest_name, patience).map_err(|error| match error {
        ChannelError::Stream(source) => broken(source),
        source => BackupError::Channel { address, source },
    })?;
    Ok(Dialled { address, channel })
}

impl Dialled {
    /// Introduces this backup, and hears whether it is wanted. The primary waits no longer than for a greeting.
    pub fn introduce(self, hello: Hello) -> Result<Connection, BackupError> {
        let Self { address, mut channel } = self;
        let broken = |source| BackupError::Stream { address, source };
        FrameWriter::new(&mut channel.out).send(&Message::Hello(hello)).map_err(broken)?;
        match channel.frames.receive().map_err(broken)? {
            Some(Message::Welcome(welcome)) => {
                let limited = channel.stream.set_read_timeout(Some(READ_TIMEOUT));
                limited.map_err(StreamError::Io).map_err(broken)?;
                Ok(Connection { address, welcome, channel })
            }
            Some(Message::Refuse { refusal, reason }) => {
                Err(BackupError::Refused { address, refusal, reason })
            }
            Some(other) => {
                Err(BackupError::Unexpected { address, found: format!("a {} message", other.kind().name()) })
            }
            None => Err(BackupError::Unexpected { address, found: "nothing".into() }),
        }
    }
}

/// Why there will be no more batches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    /// The guest's life ended in an orderly way.
    GuestEnded,
    /// The primary has let this backup go: the guest runs on there.
    Dismissed,
    /// The primary is gone or silent.
    Lost {
        /// How it was noticed.
        why: String,
        /// What that says of the primary.
        primary: Left,
    },
}

/// How sure it is that a primary lets nothing out any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It may still believe that this backup follows.
    Unsure,
    /// Its end closed the connection: the monitor has ended, or has given this backup up, and lets nothing out in this
    /// view. What it let out before may still be on its way.
    Closed,
    /// It has said that it ends, and that nothing of it is under way.
    AtRest,
}

impl LinkEnd {
    fn unsure(why: String) -> Self {
        Self::Lost { why, primary: Left::Unsure }
    }

    fn broken(what: &str, error: &StreamError) -> Self {
        let by_peer = match error {
            StreamError::Truncated { .. } => true,
            StreamError::Io(error) => {
                // The second is what a monitor that is killed leaves of a record.
                matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
                )
            }
            _ => false,
        };
        let primary = if by_peer { Left::Closed } else { Left::Unsure };
        Self::Lost { why: format!("{what}: {}", with_causes(error)), primary }
    }

    fn loss(&self) -> LinkLoss {
        match self {
            Self::GuestEnded => LinkLoss::GuestEnded,
            Self::Dismissed => LinkLoss::Dismissed,
            Self::Lost { primary: Left::Closed | Left::AtRest, .. } => LinkLoss::ByPeer,
            Self::Lost { primary: Left::Unsure, .. } => LinkLoss::Unsure,
        }
    }
}

#[derive(Default)]
struct Queue {
    parts: VecDeque<LogPart>,
    bytes: usize,
    end: Option<LinkEnd>,
}

/// The log on its way from the receiver to the vCPU thread, and the acknowledgements of them.
pub struct Inflow {
    queue: Mutex<Queue>,
    changed: Condvar,
    acks: Mutex<FrameWriter<Sending>>,
    received: AtomicU64,
    executed: AtomicU64,
    executed_time: AtomicU64,
    bytes: AtomicU64,
    gave_up: AtomicBool,
    abandoned: AtomicBool,
    machine: Mutex<Backup>,
    /// The anchor at which the snapshot ends, and the log must start.
    start: u64,
    stream: TcpStream,
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
    pub fn local_address(&self) -> Result<SocketAddr, BackupError> {
        self.channel
            .stream
            .local_addr()
            .map_err(|error| BackupError::Stream { address: self.address, source: StreamError::Io(error) })
    }

    /// Splits the connection, with the snapshot read, into the receiver's end and the shared inflow. The primary may be
    /// silent for `timeout`.
    pub fn follow(
        mut self,
        start: ft_log::Cursor,
        timeout: Duration,
    ) -> Result<(Arc<Inflow>, Receiving), StreamError> {
        self.channel.unhurried()?;
        let Channel { frames, out, stream, .. } = self.channel;
        let inflow = Inflow {
            queue: Mutex::default(),
            changed: Condvar::new(),
            acks: Mutex::new(FrameWriter::new(out)),
            received: AtomicU64::new(0),
            executed: AtomicU64::new(start.anchor),
            executed_time: AtomicU64::new(start.time.0),
            bytes: AtomicU64::new(0),
            gave_up: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
            machine: Mutex::new(Backup::new(self.welcome.view, timeout)),
            start: start.anchor,
            stream,
        };
        inflow.acknowledge()?;
        Ok((Arc::new(inflow), frames))
    }
}

impl Inflow {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks or tells the state machine. Must not wait.
    pub fn machine<T>(&self, ask: impl FnOnce(&mut Backup) -> T) -> T {
        ask(&mut self.machine.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives the primary up: the receiver ends with what it has.
    pub fn give_up(&self) {
        let queue = self.lock();
        self.gave_up.store(true, Ordering::SeqCst);
        drop(queue);
        self.changed.notify_all();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// How the link ended, if it has.
    pub fn end(&self) -> Option<LinkEnd> {
        self.lock().end.clone()
    }

    /// The figures of the guest that follows here.
    pub fn watch(self: &Arc<Self>) -> FiguresOf {
        let inflow = Arc::clone(self);
        Box::new(move || Figures {
            anchors: inflow.executed.load(Ordering::SeqCst),
            log: LogFigures {
                bytes: inflow.bytes.load(Ordering::Relaxed),
                batches: inflow.received.load(Ordering::SeqCst),
                queued_bytes: Some(inflow.lock().bytes as u64),
                ..LogFigures::default()
            },
            primary: None,
        })
    }

    fn acknowledge(&self) -> Result<(), StreamError> {
        if !self.machine(|machine| machine.acknowledges()) {
            return Ok(());
        }
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        let ack = Ack {
            received: self.received.load(Ordering::SeqCst),
            executed: self.executed.load(Ordering::SeqCst),
            executed_time: GuestTime(self.executed_time.load(Ordering::SeqCst)),
        };
        acks.send(&Message::Ack(ack))
    }

    /// Receives until the link ends. `heard` is called for every message.
    pub fn receive(&self, mut frames: Receiving, heard: impl Fn()) -> LinkEnd {
        let mut order = BatchReceiver::new(self.machine(|machine| machine.view()), self.start);
        let end = loop {
            match frames.receive() {
                Ok(Some(Message::Batch(batch))) => {
                    heard();
                    if let Err(error) = order.accept(&batch) {
                        break LinkEnd::unsure(format!("the primary's log cannot be followed: {error}"));
                    }
                    let seq = batch.seq;
                    self.push(LogPart::Batch(batch));
                    self.received.store(seq, Ordering::SeqCst);
                    if let Err(error) = self.acknowledge() {
                        break LinkEnd::broken("acknowledgements cannot be sent", &error);
                    }
                }
                Ok(Some(Message::Checkpoint(piece))) => {
                    heard();
                    self.push(LogPart::Checkpoint(piece));
                }
                Ok(Some(Message::Bye { reason: ByeReason::GuestEnded, .. })) => break LinkEnd::GuestEnded,
                Ok(Some(Message::Bye { reason: ByeReason::Dismissed, .. })) => break LinkEnd::Dismissed,
                Ok(Some(Message::Bye { reason: ByeReason::Shutdown, .. })) => {
                    break LinkEnd::Lost {
                        why: "the primary hands the guest over".into(),
                        primary: Left::AtRest,
                    };
                }
                Ok(Some(Message::Bye { reason, text })) => {
                    let why = format!("the primary left: {reason:?} {text}");
                    break LinkEnd::Lost { why, primary: Left::Closed };
                }
                Ok(Some(other)) => {
                    break LinkEnd::unsure(format!("the primary sent a {} message", other.kind().name()));
                }
                Ok(None) => {
                    break LinkEnd::Lost {
                        why: "the primary closed the connection".into(),
                        primary: Left::Closed,
                    };
                }
                Err(error) => break LinkEnd::broken("the connection to the primary failed", &error),
            }
        };
        let end = if self.gave_up.load(Ordering::SeqCst) {
            LinkEnd::unsure("it was given up here".into())
        } else {
            end
        };
        // Nothing is acknowledged any more from here on.
        self.machine(|machine| machine.link_ended(end.loss()));
        let _ = self.stream.shutdown(Shutdown::Both);
        self.lock().end = Some(end.clone());
        self.changed.notify_all();
        end
    }

    fn push(&self, part: LogPart) {
        let mut queue = self.lock();
        // Nobody may be there to make room any more.
        while queue.bytes >= QUEUE_LIMIT_BYTES && !self.gave_up.load(Ordering::SeqCst) {
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.bytes += len_bytes(&part);
        self.bytes.fetch_add(len_bytes(&part) as u64, Ordering::Relaxed);
        queue.parts.push_back(part);
        self.changed.notify_all();
    }

    fn pop(&self) -> Option<LogPart> {
        let mut queue = self.lock();
        loop {
            if let Some(part) = queue.parts.pop_front() {
                queue.bytes -= len_bytes(&part);
                self.changed.notify_all();
                return Some(part);
            }
            if queue.end.is_some() {
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells the primary why this backup leaves. It may be gone itself.
    pub fn bye(&self, reason: ByeReason, text: &str) {
        let mut acks = self.acks.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = acks.send(&Message::Bye { reason, text: text.to_owned() });
    }

    /// This backup's guest is of no use: says so, and ends the connection. From now on it must not claim anything.
    pub fn retire(&self, reason: ByeReason, text: &str) {
        self.machine(Backup::retire);
        self.bye(reason, text);
        self.give_up();
    }

    /// The guest is another monitor's: nobody needs this copy any more, wherever it is.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }

    fn is_empty(&self) -> bool {
        self.lock().parts.is_empty()
    }
}

fn len_bytes(part: &LogPart) -> usize {
    match part {
        LogPart::Batch(batch) => batch.entries.len(),
        LogPart::Checkpoint(piece) => piece.len(),
    }
}

/// The vCPU thread's view of the inflow.
pub struct FromPrimary {
    inflow: Arc<Inflow>,
    stop: Arc<AtomicBool>,
    base: Option<(Instant, GuestTime)>,
    told: u64,
    kept: Option<Kept>,
}

impl FromPrimary {
    /// Follows `inflow` until `stop` is set. What comes is added to `kept`.
    pub fn new(inflow: Arc<Inflow>, stop: Arc<AtomicBool>, kept: Option<Kept>) -> Self {
        Self { inflow, stop, base: None, told: 0, kept }
    }

    /// What this backup was sent, for a report.
    pub fn take_kept(&mut self) -> Option<Kept> {
        self.kept.take()
    }

    /// The guest time that the primary's clock would show now: the best guess from all the times executed.
    pub fn primary_time(&self) -> Option<GuestTime> {
        let (at, time) = self.base?;
        Some(GuestTime::from_ns(time.to_ns().saturating_add(at.elapsed().as_nanos() as u64)))
    }
}

impl PartSource for FromPrimary {
    fn next(&mut self) -> Result<Option<LogPart>, RunError> {
        let executed = self.inflow.executed.load(Ordering::SeqCst);
        if self.inflow.is_empty() && executed > self.told {
            self.told = executed;
            // So that the primary does not take an idle backup for a slow one. A broken link ends the inflow.
            let _ = self.inflow.acknowledge();
        }
        let part = self.inflow.pop();
        if let (Some(kept), Some(part)) = (&mut self.kept, &part) {
            kept.part(part);
        }
        Ok(part)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.inflow.abandoned.load(Ordering::SeqCst)
    }

    fn executed(&mut self, anchor: u64, time: GuestTime) {
        self.inflow.executed.store(anchor, Ordering::SeqCst);
        self.inflow.executed_time.store(time.0, Ordering::SeqCst);
        // The smallest lag ever seen comes closest to the primary's clock.
        let now = Instant::now();
        if self.primary_time().is_none_or(|guess| time > guess) {
            self.base = Some((now, time));
        }
    }
}
