//! The log on its way in: received, acknowledged, and handed to the vCPU's thread.
//!
//! Owns: the bounded queue of what is not executed yet, the acknowledgements, and the lock around the backup's protocol
//! machine, which says whether anything may be acknowledged (`protocol/backup.rs`). Must never: acknowledge anything when that
//! says no: the primary may let out what was acknowledged.
//!
//! ```text
//!   Open ─┬─ the connection ends ──────────────────────────> Ended ─┐
//!         └─ given up here ──> GivenUp ── its thread sees it ──^    ├── the guest is another's ──> Abandoned
//!                                                                   └── the guest is right ──> executed to the end
//! ```
//! Threads: `log-receiver` pushes, the vCPU's pops, `watchdog` and `record` may give the primary up.

use std::collections::VecDeque;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::select;
use ft_log::{Ack, BatchReceiver, ByeReason, Cursor, FrameWriter, GuestTime, LogPart, Message, StreamError};

use crate::control::protocol::{Figures, LogFigures};
use crate::control::state::FiguresOf;
use crate::pair::protocol::{Backup, LinkLoss};
use crate::pair::wire::channel::{Channel, Receiving, Sending};
use crate::pair::wire::connect::Connection;
use crate::report::Kept;
use crate::run::{PartSource, RunError, StopKind, StopSignal};
use crate::with_causes;

/// Bytes of batches that may wait for execution; beyond that the primary waits for acknowledgements.
const QUEUE_LIMIT_BYTES: usize = 16 << 20;

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

/// Whether more is to come, or to be executed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Flow {
    /// It is.
    #[default]
    Open,
    /// The primary is given up here; the receiver ends with what it has.
    GivenUp,
    /// What is queued is the last of it.
    Ended,
    /// Nobody needs this copy of the guest any more, wherever it is.
    Abandoned,
}

#[derive(Default)]
struct Queue {
    parts: VecDeque<LogPart>,
    bytes: usize,
    flow: Flow,
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
    protocol: Mutex<Backup>,
    retired: StopSignal,
    /// The anchor at which the snapshot ends, and the log must start.
    start: u64,
    stream: TcpStream,
}

impl Inflow {
    /// Splits `connection`, with the snapshot read, into the receiver's end and the shared inflow. The log starts at `start`;
    /// the primary may be silent for `timeout`.
    pub fn start(
        connection: Connection,
        start: Cursor,
        timeout: Duration,
    ) -> Result<(Arc<Self>, Receiving), StreamError> {
        let view = connection.welcome.view;
        let mut channel = connection.into_channel();
        channel.unhurried()?;
        let Channel { frames, out, stream, .. } = channel;
        let inflow = Self {
            queue: Mutex::default(),
            changed: Condvar::new(),
            acks: Mutex::new(FrameWriter::new(out)),
            received: AtomicU64::new(0),
            executed: AtomicU64::new(start.anchor),
            executed_time: AtomicU64::new(start.time.0),
            bytes: AtomicU64::new(0),
            protocol: Mutex::new(Backup::new(view, timeout)),
            retired: StopSignal::default(),
            start: start.anchor,
            stream,
        };
        inflow.acknowledge()?;
        Ok((Arc::new(inflow), frames))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks or tells the protocol's machine. Must not wait.
    pub fn protocol<T>(&self, ask: impl FnOnce(&mut Backup) -> T) -> T {
        ask(&mut self.protocol.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Gives the primary up: the receiver ends with what it has.
    pub fn give_up(&self) {
        let mut queue = self.lock();
        if queue.flow == Flow::Open {
            queue.flow = Flow::GivenUp;
        }
        drop(queue);
        self.changed.notify_all();
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Is nothing more to come?
    pub fn has_ended(&self) -> bool {
        matches!(self.lock().flow, Flow::Ended | Flow::Abandoned)
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
        if !self.protocol(|backup| backup.acknowledges()) {
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
        let mut order = BatchReceiver::new(self.protocol(|backup| backup.view()), self.start);
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
        let given_up = self.lock().flow == Flow::GivenUp;
        let end = if given_up { LinkEnd::unsure("it was given up here".into()) } else { end };
        // Nothing is acknowledged any more from here on.
        self.protocol(|backup| backup.link_ended(end.loss()));
        let _ = self.stream.shutdown(Shutdown::Both);
        self.lock().flow = Flow::Ended;
        self.changed.notify_all();
        end
    }

    fn push(&self, part: LogPart) {
        let mut queue = self.lock();
        // Nobody may be there to make room any more.
        while queue.bytes >= QUEUE_LIMIT_BYTES && queue.flow == Flow::Open {
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
            if queue.flow == Flow::Abandoned {
                return None;
            }
            if let Some(part) = queue.parts.pop_front() {
                queue.bytes -= len_bytes(&part);
                self.changed.notify_all();
                return Some(part);
            }
            if queue.flow == Flow::Ended {
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

    /// This backup's guest cannot be used: says so, and ends the connection. From now on it must not claim anything.
    pub fn retire(&self, reason: ByeReason, text: &str) {
        self.protocol(Backup::retire);
        self.retired.set(StopKind::Leave);
        self.bye(reason, text);
        self.give_up();
    }

    /// Waits for `time`, or until `stop` is set or this backup retires.
    pub fn wait(&self, stop: &StopSignal, time: Duration) {
        select! {
            recv(stop.channel()) -> _ => {}
            recv(self.retired.channel()) -> _ => {}
            default(time) => {}
        }
    }

    /// The guest is another monitor's: nobody needs this copy any more, wherever it is.
    pub fn abandon(&self) {
        self.lock().flow = Flow::Abandoned;
        self.changed.notify_all();
    }

    fn is_abandoned(&self) -> bool {
        self.lock().flow == Flow::Abandoned
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
    stop: Arc<StopSignal>,
    base: Option<(Instant, GuestTime)>,
    told: u64,
    kept: Option<Kept>,
}

impl FromPrimary {
    /// Follows `inflow` until `stop` is set. What comes is added to `kept`.
    pub fn new(inflow: Arc<Inflow>, stop: Arc<StopSignal>, kept: Option<Kept>) -> Self {
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
        self.stop.is_set() || self.inflow.is_abandoned()
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
