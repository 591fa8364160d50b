//! The log of a guest that has, or may get, a backup.
//!
//! Owns: the encoder, and the threads of one backup's connection. Must never: let an effect past the output
//! gate, or wait for the backup except to slow the guest down.
//!
//! A backup joins at a boundary: the guest stands still while its snapshot is sent, and the log goes on from
//! exactly that position, so that every event is either before or after the snapshot.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use devices::Effect;
use ft_log::{
    ByeReason, CheckpointEncoder, Encoder, Entry, FrameReader, FrameWriter, Message, Position, StreamError,
    Welcome,
};

use super::link::{Counted, Link, Mood, Outgoing, Phase};
use super::output_gate::{OutputGate, Room};
use super::supervise::LinkEvent;
use crate::guest::GuestConfig;
use crate::machine::Machine;
use crate::outlet::Outlet;
use crate::run::{LogSink, RunError};
use crate::{snapshot, with_causes};

/// Anchors between two register digests in a log that carries no output.
const CHECK_EVERY_ANCHORS: u64 = 1_024;
/// The backup's lag from which the guest is slowed, and the one at which it runs at a fifth of its speed.
const PACE_FROM: Duration = Duration::from_millis(60);
const PACE_FULL: Duration = Duration::from_millis(120);
/// Shortest and longest pause at one boundary. A host may take long to wake a thread that sleeps for less than
/// the one; more than the other would not be smooth.
const PACE_PAUSE_MIN: Duration = Duration::from_millis(1);
const PACE_PAUSE_MAX: Duration = Duration::from_millis(5);
/// A backup that takes no bytes for this long while it is being fed is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one wait for room in the gate takes before it is repeated.
const GATE_WAIT: Duration = Duration::from_millis(100);
/// How long an ending primary waits for its backup to have everything.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A backup whose greeting was accepted, waiting for its snapshot.
pub struct Join {
    /// The connection, with the handshake up to Hello done.
    pub stream: TcpStream,
    /// Who it is, for messages.
    pub host: String,
    /// Where it connected from.
    pub address: SocketAddr,
}

/// A log whose other end is a backup, when there is one.
pub struct PairLog {
    config: GuestConfig,
    host: String,
    link: Arc<Link>,
    gate: Arc<OutputGate<Outlet>>,
    joins: Receiver<Join>,
    waiting_join: Option<Join>,
    events: Sender<LinkEvent>,
    view: Arc<AtomicU64>,
    encoder: Option<Encoder>,
    checked: u64,
    paced_at: Instant,
    pause_due: Duration,
    sender: Option<JoinHandle<()>>,
    had_backup: bool,
}

/// What [`PairLog::new`] needs.
pub struct PairParts {
    /// The guest.
    pub config: GuestConfig,
    /// This host's name.
    pub host: String,
    /// The link that the supervisor watches too.
    pub link: Arc<Link>,
    /// Where effects go.
    pub gate: Arc<OutputGate<Outlet>>,
    /// Backups that want to join.
    pub joins: Receiver<Join>,
    /// The supervisor's inbox.
    pub events: Sender<LinkEvent>,
    /// The present view.
    pub view: Arc<AtomicU64>,
}

impl PairLog {
    /// A log without a backup yet.
    pub fn new(parts: PairParts) -> Self {
        let PairParts { config, host, link, gate, joins, events, view } = parts;
        Self {
            config,
            host,
            link,
            gate,
            joins,
            waiting_join: None,
            events,
            view,
            encoder: None,
            checked: 0,
            paced_at: Instant::now(),
            pause_due: Duration::ZERO,
            sender: None,
            had_backup: false,
        }
    }

    /// Did a backup follow when the log was finished? Then it takes over, unless the guest has ended.
    pub fn had_backup(&self) -> bool {
        self.had_backup
    }

    /// Sends the guest to the backup and starts the log behind it. The machine has been settled.
    fn pair_with(&mut self, machine: &mut Machine, join: Join) -> Result<(), RunError> {
        let started = Instant::now();
        let cursor = snapshot::cursor(machine);
        let stream = &join.stream;
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(StreamError::Io)?;
        // From here on heartbeats tell whether the backup lives, however long it takes to load.
        stream.set_read_timeout(None).map_err(StreamError::Io)?;
        let mut frames = FrameWriter::new(stream);
        frames.send(&Message::Welcome(Welcome {
            view: self.view.load(Ordering::SeqCst),
            guest_name: self.config.name.clone(),
            memory_bytes: self.config.memory_bytes,
            config_digest: self.config.digest(),
            cpuid_digest: self.config.cpuid_digest(),
            host_name: self.host.clone(),
            start: cursor,
        }))?;
        let mut percent = 0;
        let sink = snapshot::save(machine, &self.config, frames.snapshot(), |done, total| {
            let now = done * 100 / total.max(1);
            if now / 25 > percent / 25 {
                tracing::info!(percent = now, "sending the guest to {}", join.host);
            }
            percent = now;
        })?;
        sink.finish()?;
        machine.start_checkpoints()?;
        self.link.attach(machine.anchors());
        self.gate.protect();
        self.encoder = Some(Encoder::new(cursor));
        self.checked = machine.anchors();
        self.start_threads(&join)?;
        let _ = self.events.send(LinkEvent::Paired {
            stream: join.stream.try_clone().map_err(StreamError::Io)?,
            address: join.address,
        });
        tracing::info!(
            backup = %join.host,
            anchor = machine.anchors(),
            pause_ms = started.elapsed().as_millis() as u64,
            "the backup has the guest's snapshot; output now waits for its acknowledgement"
        );
        Ok(())
    }

    fn start_threads(&mut self, join: &Join) -> Result<(), RunError> {
        let clone = || join.stream.try_clone().map_err(StreamError::Io);
        let (out, input) = (clone()?, clone()?);
        let (link, events) = (Arc::clone(&self.link), self.events.clone());
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.into()).spawn(body).map_err(StreamError::Io)
        };
        self.sender = Some(spawn("log-sender", Box::new(move || send_batches(&link, out, &events)))?);
        let (link, gate, events) = (Arc::clone(&self.link), Arc::clone(&self.gate), self.events.clone());
        spawn("log-acks", Box::new(move || receive_acks(&link, &gate, input, &events)))?;
        Ok(())
    }

    /// Slows the guest while the backup's execution lags, the more the further it is behind.
    fn pace(&mut self) {
        let lag = self.link.lag();
        if lag > PACE_FROM {
            let over = (lag - PACE_FROM).as_secs_f64() / (PACE_FULL - PACE_FROM).as_secs_f64();
            self.pause_due += self.paced_at.elapsed().mul_f64(4.0 * over.min(1.0));
        } else {
            self.pause_due = Duration::ZERO;
        }
        if self.pause_due >= PACE_PAUSE_MIN {
            let started = Instant::now();
            std::thread::sleep(self.pause_due.min(PACE_PAUSE_MAX));
            let paused = started.elapsed();
            self.pause_due = self.pause_due.saturating_sub(paused);
            self.link.paced(paused);
        }
        self.paced_at = Instant::now();
    }

    /// The log to the backup, if it still has one.
    fn publish_to_backup(&mut self, machine: &Machine, effects: &[Effect]) -> Result<Option<u64>, RunError> {
        let Some(encoder) = &mut self.encoder else { return Ok(None) };
        let visible = effects.iter().any(|effect| matches!(effect, Effect::Frame(_) | Effect::Disk(_)));
        let anchor = machine.anchors();
        if anchor > self.checked && (visible || anchor - self.checked >= CHECK_EVERY_ANCHORS) {
            self.checked = anchor;
            encoder.push(&Entry::Check { anchor, digest: machine.registers_digest() as u32 })?;
        }
        let entries = if encoder.is_empty() { Vec::new() } else { encoder.take() };
        let mood = match (visible, machine.waiting()) {
            (true, _) => Mood::Urgent,
            (false, true) => Mood::Idle,
            (false, false) => Mood::Busy,
        };
        let seq = self.link.publish(&entries, anchor, mood);
        if seq.is_none() && self.link.phase() == Phase::Alone {
            self.encoder = None;
            return Ok(None);
        }
        // Without a number the backup is lost and the claim open: such effects wait for the claim.
        Ok(Some(seq.unwrap_or(u64::MAX)))
    }
}

impl LogSink for PairLog {
    fn record(&mut self, entry: &Entry) -> Result<(), RunError> {
        match &mut self.encoder {
            Some(encoder) => Ok(encoder.push(entry)?),
            None => Ok(()),
        }
    }

    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        let seq = self.publish_to_backup(machine, effects)?;
        for effect in effects.drain(..) {
            let mut room = self.gate.push(seq.unwrap_or(0), effect);
            // The guest waits with its outputs. A gate that closes or opens makes room.
            while room == Room::Full {
                room = self.gate.wait_for_room(GATE_WAIT);
            }
        }
        if seq.is_some() {
            self.pace();
        }
        Ok(())
    }

    fn may_checkpoint(&self) -> bool {
        self.encoder.is_none() || self.link.takes_checkpoint()
    }

    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<u64, RunError> {
        let Some(encoder) = &mut self.encoder else { return Ok(0) };
        let mut pages = 0;
        if position == Position::Checkpoint {
            let started = Instant::now();
            let checkpoint = machine.checkpoint()?;
            pages = checkpoint.pages.len() as u64;
            self.link.checkpoint(checkpoint, started.elapsed());
        }
        encoder.push(&Entry::Stop { anchor: machine.anchors(), position })?;
        Ok(pages)
    }

    fn at_boundary(&mut self, machine: &mut Machine) -> Result<bool, RunError> {
        if self.encoder.is_some() {
            machine.renew_base()?;
        } else {
            machine.end_checkpoints()?;
        }
        if self.waiting_join.is_none() && self.joins.is_empty() {
            return Ok(false);
        }
        let Some(join) = self.waiting_join.take().or_else(|| self.joins.try_recv().ok()) else {
            return Ok(false);
        };
        if self.link.phase() != Phase::Alone {
            tracing::warn!(backup = %join.host, "a backup came while there was one; it is turned away");
            // It may be gone already.
            let _ = FrameWriter::new(&join.stream)
                .send(&Message::Refuse { reason: "this guest has a backup already".into() });
            return Ok(false);
        }
        self.encoder = None;
        if !machine.settle()? {
            self.waiting_join = Some(join);
            return Ok(false);
        }
        let host = join.host.clone();
        if let Err(error) = self.pair_with(machine, join) {
            tracing::warn!(backup = %host, error = %with_causes(&error), "the backup could not be given the guest; it goes on without");
            return Ok(false);
        }
        Ok(true)
    }

    fn finish(&mut self, machine: &Machine) -> Result<(), RunError> {
        let ended = machine.end().is_some();
        self.had_backup = self.link.phase() != Phase::Alone;
        if let Some(mut encoder) = self.encoder.take() {
            if ended {
                encoder.push(&Entry::End { anchor: machine.anchors(), digest: machine.state_digest() })?;
            }
            self.link.publish(&encoder.take(), machine.anchors(), Mood::Urgent);
            self.link.drain(DRAIN_TIMEOUT);
            // From here on the lease and the disk's guard say no; then nothing is under way any more.
            self.link.end(ended.then_some(ByeReason::GuestEnded));
            self.gate.quiesce(DRAIN_TIMEOUT);
            self.gate.performer().quiesce(DRAIN_TIMEOUT);
            self.link.close();
        }
        if let Some(sender) = self.sender.take()
            && sender.join().is_err()
        {
            tracing::error!("the log's sender thread panicked");
        }
        Ok(())
    }

    fn may_break_off(&self) -> bool {
        true
    }
}

fn send_batches(link: &Link, stream: TcpStream, events: &Sender<LinkEvent>) {
    let mut frames = FrameWriter::new(Counted { out: stream, link });
    let mut checkpoints = CheckpointEncoder::default();
    while let Some(Outgoing { checkpoint, batch }) = link.next_batch() {
        let sent = checkpoint.map_or(Ok(()), |checkpoint| {
            let send = |piece| frames.send(&Message::Checkpoint(piece));
            checkpoints.encode(&checkpoint, send).map(|()| link.checkpoint_sent())
        });
        if let Err(error) = sent.and_then(|()| frames.send(&Message::Batch(batch))) {
            let _ = events.send(LinkEvent::Down(format!("the log cannot be sent: {}", with_causes(&error))));
            return;
        }
    }
    let Some(bye) = link.last_word() else { return };
    if let Some(reason) = bye {
        // The backup learns the same from the closed connection, only less exactly.
        let _ = frames.send(&Message::Bye { reason, text: String::new() });
    }
    let _ = frames.get_ref().out.shutdown(Shutdown::Both);
}

fn receive_acks(link: &Link, gate: &OutputGate<Outlet>, stream: TcpStream, events: &Sender<LinkEvent>) {
    let mut frames = FrameReader::new(stream);
    let mut protected = false;
    let why = loop {
        match frames.receive() {
            Ok(Some(Message::Ack(ack))) => match link.acknowledged(&ack) {
                Ok(seq) => {
                    if !std::mem::replace(&mut protected, true) {
                        let _ = events.send(LinkEvent::Protected);
                    }
                    gate.acknowledged(seq);
                    link.released(gate.released_seq());
                }
                Err(error) => break format!("the backup acknowledges nonsense: {error}"),
            },
            Ok(Some(Message::Bye { text, reason })) => break format!("the backup left: {reason:?} {text}"),
            Ok(Some(other)) => break format!("the backup sent a {} message", other.kind().name()),
            Ok(None) => break "the backup closed the connection".into(),
            Err(error) => break format!("the connection to the backup failed: {}", with_causes(&error)),
        }
    };
    let _ = events.send(LinkEvent::Down(why));
}
