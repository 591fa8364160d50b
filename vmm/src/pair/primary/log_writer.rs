//! The log of a guest that has, or may get, a backup.
//!
//! Owns: the encoder, and the threads of one backup's connection. Must never: let an effect past the output
//! gate, or wait for the backup except to slow the guest down.
//!
//! A backup joins while the guest runs (`transfer.rs`): when little is left to be sent, the guest stops at a boundary for
//! that, and the log goes on from exactly this position, so that every event is either before or after the snapshot. Before
//! the guest stops, the arbiter records that the view behind has this backup; whoever has the guest is a member of a view.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use devices::Effect;
use ft_log::{
    ByeReason, CheckpointEncoder, Encoder, Entry, FrameWriter, Message, Position, Refusal, SealKey,
    StreamError, Welcome,
};

use crate::control::Monitor;
use crate::control::protocol::Peer;
use crate::guest::GuestConfig;
use crate::host::LogEvent;
use crate::host::backends::Outlet;
use crate::host::spawn;
use crate::machine::{GuestEnd, Machine};
use crate::pair::claims::claim::{Claims, Member, Owner};
use crate::pair::claims::claimant::Claimant;
use crate::pair::primary::accept::refuse;
use crate::pair::primary::gate::{OutputGate, Room};
use crate::pair::primary::invite::Search;
use crate::pair::primary::link::{Counted, Link, Mood, Outgoing};
use crate::pair::primary::supervisor::LinkEvent;
use crate::pair::protocol::{ANOTHER_IS_JOINING, Answer, Ask, Life, Phase};
use crate::pair::wire::channel::{Channel, Receiving, Sending};
use crate::pair::wire::transfer::{self, Copied, Transfer, TransferError};
use crate::report::Reports;
use crate::run::{LogSink, Recent, RunError, StopKind, VcpuHandle};
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
/// Longest pause at one boundary of a guest that writes as fast as it can be sent.
const TRANSFER_PAUSE_MAX: Duration = Duration::from_millis(50);
/// A backup that takes no bytes for this long while it is being fed is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one wait for room in the gate takes before it is repeated.
const GATE_WAIT: Duration = Duration::from_millis(100);
/// Entries that are remembered for the report of a backup that differed; it is behind by some.
const ENTRIES_REMEMBERED: usize = 4_096;
/// How long an ending primary waits for its backup to have everything.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A backup whose greeting was accepted, waiting for its snapshot.
pub struct Join {
    /// The connection, with the greeting up to Hello done.
    pub channel: Channel,
    /// Who it is.
    pub member: Member,
    /// Where it connected from.
    pub address: SocketAddr,
    /// Where it would take a backup of its own.
    pub listen: Option<SocketAddr>,
}

/// A log whose other end is a backup, when there is one.
pub struct LogWriter {
    config: GuestConfig,
    claims: Claims,
    owner: Owner,
    link: Arc<Link>,
    gate: Arc<OutputGate<Outlet>>,
    joins: Receiver<Join>,
    joining: Option<Joining>,
    vcpu: VcpuHandle,
    events: Sender<LinkEvent>,
    search: Arc<Search>,
    monitor: Arc<Monitor>,
    encoder: Option<Encoder>,
    recent: Recent,
    reports: Option<Reports>,
    checked: u64,
    paced_at: Instant,
    pause_due: Duration,
    sender: Option<JoinHandle<()>>,
    had_backup: bool,
    /// Where the present backup would take a backup.
    listen: Option<SocketAddr>,
    successor: Option<SocketAddr>,
}

/// A backup that is being given the guest.
struct Joining {
    frames: Receiving,
    heartbeat_key: SealKey,
    stream: TcpStream,
    host: String,
    address: SocketAddr,
    listen: Option<SocketAddr>,
    transfer: Transfer,
    started: Instant,
    /// How long the guest stood still at the start.
    first_pause: Duration,
}

/// Has a backup that is joining recorded as one.
struct Naming {
    link: Arc<Link>,
    monitor: Arc<Monitor>,
    claimant: Claimant,
    member: Member,
    view: u64,
    asked: Option<Ask>,
}

impl Naming {
    /// As the backup of `view`.
    fn new(log: &LogWriter, member: Member, view: u64) -> Self {
        let claimant = Claimant::new(log.claims.clone(), log.owner.clone());
        let (link, monitor) = (Arc::clone(&log.link), Arc::clone(&log.monitor));
        Self { link, monitor, claimant, member, view, asked: None }
    }

    /// It does not come after all. What was asked of the arbiter may have been done.
    fn give_up(&self) {
        if self.asked.is_some() {
            self.link.join_failed();
        }
    }

    /// Asks the arbiter once: whether it is recorded.
    fn attempt(&mut self) -> Result<bool, TransferError> {
        let ask = match self.asked {
            Some(ask) => ask,
            None => self.link.name(Life::from_be_bytes(self.member.uuid), self.view)?,
        };
        self.asked = Some(ask);
        let answer = self.claimant.ask(ask.view, Some(&self.member));
        let named = self.link.named(ask, answer);
        match answer {
            Answer::Won if named => {
                self.monitor.note_view(ask.view);
                tracing::info!(
                    event = %LogEvent::BackupRecorded,
                    view = ask.view,
                    backup = %self.member.host,
                    "the arbiter has recorded the backup"
                );
            }
            Answer::Unknown => {}
            Answer::Lost => {
                let why = self.claimant.why_lost();
                return Err(TransferError::NotNamed { view: ask.view, why });
            }
            Answer::Won | Answer::Otherwise => {
                let why = "an earlier attempt has recorded another one".to_owned();
                return Err(TransferError::NotNamed { view: ask.view, why });
            }
        }
        Ok(named)
    }
}

/// What [`LogWriter::new`] needs.
pub struct LogWriterParts {
    /// The guest.
    pub config: GuestConfig,
    /// Where a backup is recorded as such.
    pub claims: Claims,
    /// This monitor.
    pub owner: Owner,
    /// The link that the supervisor watches too.
    pub link: Arc<Link>,
    /// Where effects go.
    pub gate: Arc<OutputGate<Outlet>>,
    /// Backups that want to join.
    pub joins: Receiver<Join>,
    /// The supervisor's inbox.
    pub events: Sender<LinkEvent>,
    /// Who could be the backup.
    pub search: Arc<Search>,
    /// The guest's thread.
    pub vcpu: VcpuHandle,
    /// Where the report of a backup that differed goes.
    pub reports: Option<Reports>,
    /// What an operator sees.
    pub monitor: Arc<Monitor>,
}

impl LogWriter {
    /// A log without a backup yet.
    pub fn new(parts: LogWriterParts) -> Self {
        let LogWriterParts { config, claims, owner, link, gate, joins, events, search, vcpu, .. } = parts;
        let LogWriterParts { reports, monitor, .. } = parts;
        Self {
            config,
            claims,
            owner,
            link,
            gate,
            joins,
            joining: None,
            vcpu,
            events,
            search,
            monitor,
            encoder: None,
            recent: Recent::keeping(ENTRIES_REMEMBERED),
            reports,
            checked: 0,
            paced_at: Instant::now(),
            pause_due: Duration::ZERO,
            sender: None,
            had_backup: false,
            listen: None,
            successor: None,
        }
    }

    /// Where the monitor takes backups that the guest was handed to.
    pub fn successor(&self) -> Option<SocketAddr> {
        self.successor
    }

    /// Did a backup follow when the log was finished? Then it takes over, unless the guest has ended.
    pub fn had_backup(&self) -> bool {
        self.had_backup
    }

    /// Starts to send the guest to a backup.
    fn begin_transfer(&mut self, machine: &mut Machine, mut join: Join) -> Result<(), RunError> {
        let started = Instant::now();
        let log = machine.start_transfer()?;
        let (transfer, copying) = transfer::begin(log.clone());
        let welcome = Welcome {
            // Nothing changes the view of a guest that is alone until this backup is named.
            view: self.link.view() + 1,
            guest_name: self.config.name.clone(),
            memory_bytes: self.config.memory_bytes,
            config_digest: self.config.digest(),
            cpuid_digest: self.config.cpuid_digest(),
            host_name: self.owner.host.clone(),
        };
        // From here on heartbeats tell whether the backup lives, however long it takes to load.
        join.channel.unhurried()?;
        let Join { channel, member, address, listen } = join;
        let Channel { frames, mut out, heartbeat_key, stream } = channel;
        let host = member.host.clone();
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(StreamError::Io)?;
        let to_close = stream.try_clone().map_err(StreamError::Io)?;
        let (config, vcpu, link) = (self.config.to_payload(), self.vcpu.clone(), Arc::clone(&self.link));
        let ask = move || vcpu.ask_for_boundary();
        let (events, backup) = (self.events.clone(), host.clone());
        let (search, failing) = (Arc::clone(&self.search), address.ip());
        let mut naming = Naming::new(self, member, welcome.view);
        let send = move || {
            let mut name = || naming.attempt();
            let (ram, written) = (log.ram(), &|| log.take());
            let copied =
                Copied { welcome, backup: &backup, config, ram, written, ask: &ask, name: &mut name };
            if let Err(error) = copying.run(copied, &mut out) {
                naming.give_up();
                let why = format!("it could not be given the guest: {}", with_causes(&error));
                search.failed(failing, &why);
                tracing::warn!(event = %LogEvent::TransferFailed, %backup, "{why}");
                let _ = to_close.shutdown(Shutdown::Both);
                // Of interest if the arbiter was asked to record it, or the guest's log follows already.
                let _ = events.send(LinkEvent::Down(why));
                return;
            }
            send_batches(&link, out, &to_close, &events);
        };
        self.sender = Some(spawn("log-sender", send).map_err(StreamError::Io)?);
        self.monitor.set_transfer(Some(transfer.watch(&host)));
        let first_pause = started.elapsed();
        self.joining = Some(Joining {
            frames,
            heartbeat_key,
            stream,
            host,
            address,
            listen,
            transfer,
            started,
            first_pause,
        });
        Ok(())
    }

    /// Hands over what is left of the guest, and starts the log behind it. The machine has been settled.
    fn finish_transfer(&mut self, machine: &mut Machine, joining: Joining) -> Result<(), RunError> {
        let Joining { frames, heartbeat_key, stream, host, address, listen, transfer, started, first_pause } =
            joining;
        let stopped = Instant::now();
        let last = machine.last_part(&transfer.log)?;
        if let Err(error) = self.link.attach(machine.anchors()) {
            tracing::error!(backup = %host, "not given the guest: {error}");
            let _ = stream.shutdown(Shutdown::Both);
            return Ok(());
        }
        let (rounds, pages) = transfer.figures();
        let last_pages = last.1.len();
        self.gate.protect();
        self.encoder = Some(Encoder::new(snapshot::cursor(machine)));
        self.recent = Recent::keeping(ENTRIES_REMEMBERED);
        self.checked = machine.anchors();
        let (link, gate, events) = (Arc::clone(&self.link), Arc::clone(&self.gate), self.events.clone());
        spawn("log-acks", move || receive_acks(&link, &gate, frames, &events)).map_err(StreamError::Io)?;
        self.monitor.set_transfer(None);
        self.listen = listen;
        self.monitor.set_peer(Some(Peer {
            host: Some(host.clone()),
            address: address.to_string(),
            listen: listen.map(|listen| listen.to_string()),
        }));
        let _ = self.events.send(LinkEvent::Paired { stream, address, heartbeat_key, stopped });
        transfer.finish(last);
        tracing::info!(
            event = %LogEvent::TransferFinal,
            backup = %host,
            view = self.link.view(),
            anchor = machine.anchors(),
            took_ms = started.elapsed().as_millis() as u64,
            rounds,
            pages_again = pages,
            last_pages,
            first_pause_ms = first_pause.as_millis() as u64,
            pause_ms = stopped.elapsed().as_millis() as u64,
            "the backup gets the rest of the guest; output now waits for its acknowledgement"
        );
        Ok(())
    }

    /// Tells a backup that it cannot join.
    fn turn_away(mut join: Join, reason: &str) {
        tracing::debug!(backup = %join.member.host, "a backup is turned away: {reason}");
        // It may be gone already.
        let _ = refuse(&mut join.channel.out, Refusal::Busy, reason.into());
    }

    /// Slows the guest while the backup's execution lags, the more the further it is behind; or while it writes as fast
    /// as it can be sent.
    fn pace(&mut self) {
        let (pause_per_run, longest) = match &self.joining {
            Some(joining) => {
                let percent = f64::from(joining.transfer.slower_percent());
                (percent / (100.0 - percent), TRANSFER_PAUSE_MAX)
            }
            None => {
                let over = self.link.lag().saturating_sub(PACE_FROM).as_secs_f64()
                    / (PACE_FULL - PACE_FROM).as_secs_f64();
                (4.0 * over.min(1.0), PACE_PAUSE_MAX)
            }
        };
        if pause_per_run > 0.0 {
            self.pause_due += self.paced_at.elapsed().mul_f64(pause_per_run);
        } else {
            self.pause_due = Duration::ZERO;
        }
        if self.pause_due >= PACE_PAUSE_MIN {
            let started = Instant::now();
            std::thread::sleep(self.pause_due.min(longest));
            let paused = started.elapsed();
            self.pause_due = self.pause_due.saturating_sub(paused);
            self.link.paced(paused);
        }
        self.paced_at = Instant::now();
    }

    /// A backup that was lost because its guest differed: what this side has to say of it.
    fn report_divergence(&mut self, machine: &Machine) {
        let Some(how) = self.link.take_divergence() else { return };
        let text = format!(
            "the backup's guest diverged from this primary's log {how}\n  this guest has gone on to anchor {}: digest \
             {:016x}\n  registers at its last exit: {:x?}\n  last entries of the log, oldest first:\n{}",
            machine.anchors(),
            machine.registers_digest(),
            machine.last_registers(),
            self.recent.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n"),
        );
        tracing::error!(
            event = %LogEvent::Diverged,
            anchor = machine.anchors(),
            digest = format_args!("{:016x}", machine.registers_digest()),
            "the backup's guest diverged {how}"
        );
        let Some(reports) = self.reports.clone() else { return };
        // The guest does not wait for the report's file system.
        let write = move || match reports.write(&text, &how, None) {
            Ok(files) => {
                tracing::warn!(event = %LogEvent::ReportWritten, "report written: {}", crate::report::listed(&files))
            }
            Err(error) => tracing::warn!("{}", with_causes(&error)),
        };
        if let Err(error) = spawn("report", write) {
            tracing::warn!("the report cannot be written: {error}");
        }
    }

    /// The log to the backup, if it still has one.
    fn publish_to_backup(&mut self, machine: &Machine, effects: &[Effect]) -> Result<Option<u64>, RunError> {
        let Some(encoder) = &mut self.encoder else { return Ok(None) };
        let visible = effects.iter().any(|effect| matches!(effect, Effect::Frame(_) | Effect::Disk(_)));
        let anchor = machine.anchors();
        let due = anchor > self.checked && (visible || anchor - self.checked >= CHECK_EVERY_ANCHORS);
        if due && !has_crashed(machine) {
            self.checked = anchor;
            note(encoder, &mut self.recent, &check(machine, anchor))?;
        }
        let entries = if encoder.is_empty() { Vec::new() } else { encoder.take() };
        let mood = match (visible, machine.waiting()) {
            (true, _) => Mood::Urgent,
            (false, true) => Mood::Idle,
            (false, false) => Mood::Busy,
        };
        let seq = self.link.publish(&entries, anchor, mood);
        if seq.is_none() {
            self.report_divergence(machine);
        }
        if seq.is_none() && self.link.phase() == Phase::Alone {
            self.encoder = None;
            return Ok(None);
        }
        // Without a number the backup is lost and the claim open: such effects wait for the claim.
        Ok(Some(seq.unwrap_or(u64::MAX)))
    }

    /// Ends the connection behind the log's end, once nothing is under way.
    fn close(&self) {
        let released = self.gate.quiesce(DRAIN_TIMEOUT);
        if self.gate.performer().quiesce(DRAIN_TIMEOUT) && released {
            self.link.close_at_rest();
        } else {
            self.link.close();
        }
    }
}

/// Writes an entry down, and remembers it.
fn note(encoder: &mut Encoder, recent: &mut Recent, entry: &Entry) -> Result<(), RunError> {
    encoder.push(entry)?;
    recent.note(entry);
    Ok(())
}

fn has_crashed(machine: &Machine) -> bool {
    machine.end().is_some_and(GuestEnd::is_crash)
}

fn check(machine: &Machine, anchor: u64) -> Entry {
    Entry::Check { anchor, digest: machine.registers_digest() as u32 }
}

impl LogSink for LogWriter {
    fn record(&mut self, entry: &Entry) -> Result<(), RunError> {
        match &mut self.encoder {
            Some(encoder) => note(encoder, &mut self.recent, entry),
            None => Ok(()),
        }
    }

    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        self.link.note_position(machine.anchors());
        let seq = self.publish_to_backup(machine, effects)?;
        for effect in effects.drain(..) {
            let mut room = self.gate.push(seq.unwrap_or(0), effect);
            // The guest waits with its outputs. A gate that closes or opens makes room.
            while room == Room::Full {
                room = self.gate.wait_for_room(GATE_WAIT);
            }
        }
        if seq.is_some() || self.joining.is_some() {
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
            // What the backup had before counts for nothing any more, so it is compared now. A stop changes no digest.
            let before = machine.anchors().saturating_sub(1);
            if before > self.checked {
                self.checked = before;
                note(encoder, &mut self.recent, &check(machine, before))?;
            }
            let started = Instant::now();
            let checkpoint = machine.checkpoint()?;
            pages = checkpoint.pages.len() as u64;
            self.link.checkpoint(checkpoint, started.elapsed());
        }
        note(encoder, &mut self.recent, &Entry::Stop { anchor: machine.anchors(), position })?;
        Ok(pages)
    }

    fn wants_boundary(&self) -> bool {
        self.joining.as_ref().is_some_and(|joining| joining.transfer.is_ready())
    }

    fn at_boundary(&mut self, machine: &mut Machine) -> Result<bool, RunError> {
        if self.encoder.is_some() {
            machine.renew_base()?;
        } else if self.joining.as_ref().is_none_or(|joining| joining.transfer.has_failed()) {
            if self.joining.take().is_some() {
                self.monitor.set_transfer(None);
            }
            machine.end_checkpoints()?;
        }
        if let Ok(join) = self.joins.try_recv() {
            let joining = self.joining.as_ref().map(|_| ANOTHER_IS_JOINING);
            if let Some(reason) = self.link.refusal().or(joining) {
                Self::turn_away(join, reason);
            } else if let Err(error) = self.begin_transfer(machine, join) {
                tracing::warn!(error = %with_causes(&error), "a backup cannot be given the guest; it goes on without");
            } else {
                // What an earlier backup left.
                self.report_divergence(machine);
                self.encoder = None;
            }
        }
        if self.wants_boundary() && machine.settle()? {
            let Some(joining) = self.joining.take() else { return Ok(false) };
            self.finish_transfer(machine, joining)?;
            return Ok(true);
        }
        Ok(false)
    }

    fn hand_over(&mut self, machine: &Machine) -> Result<bool, RunError> {
        let (Some(encoder), Some(listen)) = (&mut self.encoder, self.listen) else { return Ok(false) };
        self.link.publish(&encoder.take(), machine.anchors(), Mood::Urgent);
        if !self.link.drain(DRAIN_TIMEOUT) {
            tracing::warn!("the roles are not switched: the backup does not acknowledge the log");
            return Ok(false);
        }
        // From here on the lease and the disk's guard say no; then nothing is under way any more.
        self.link.end(None);
        self.close();
        let (outcome, taken) = bounded(1);
        // A supervisor that is gone has lost the claim.
        let _ = self.events.send(LinkEvent::HandedOver(outcome));
        let taken = taken.recv().unwrap_or(true);
        self.successor = taken.then_some(listen);
        Ok(taken)
    }

    fn finish(&mut self, machine: &Machine) -> Result<(), RunError> {
        // Whether a crash is the guest's or this host's, the backup finds out: the log does not say how the guest ended, and
        // leaves it to whoever survives.
        let ended = machine.end().is_some() && !has_crashed(machine);
        let over = ended || self.vcpu.stop_signal().get() == Some(StopKind::PowerOff);
        if let Some(joining) = self.joining.take() {
            let _ = joining.stream.shutdown(Shutdown::Both);
        }
        self.had_backup = self.link.phase() != Phase::Alone;
        if let Some(mut encoder) = self.encoder.take() {
            if ended {
                encoder.push(&Entry::End { anchor: machine.anchors(), digest: machine.state_digest() })?;
            }
            self.link.publish(&encoder.take(), machine.anchors(), Mood::Urgent);
            self.link.drain(DRAIN_TIMEOUT);
            // From here on the lease and the disk's guard say no; then nothing is under way any more.
            self.link.end(over.then_some(ByeReason::GuestEnded));
            self.close();
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

fn send_batches(link: &Link, out: Sending, stream: &TcpStream, events: &Sender<LinkEvent>) {
    // What is counted is what the link carries.
    let mut frames = FrameWriter::new(out.map(|out| Counted { out, link }));
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
    let _ = stream.shutdown(Shutdown::Both);
}

fn receive_acks(link: &Link, gate: &OutputGate<Outlet>, mut frames: Receiving, events: &Sender<LinkEvent>) {
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
            Ok(Some(Message::Bye { text, reason })) => {
                if reason == ByeReason::Diverged {
                    link.diverged(text.clone());
                }
                break format!("the backup left: {reason:?} {text}");
            }
            Ok(Some(other)) => break format!("the backup sent a {} message", other.kind().name()),
            Ok(None) => break "the backup closed the connection".into(),
            Err(error) => break format!("the connection to the backup failed: {}", with_causes(&error)),
        }
    };
    let _ = events.send(LinkEvent::Down(why));
}
