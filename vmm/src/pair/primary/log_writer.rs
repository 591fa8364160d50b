//! The log of a guest that has, or may get, a backup: the vCPU thread's side of it.
//!
//! Owns: the encoder of the present epoch, and the pace at which the guest may run ahead. Must never: let an effect past the
//! output gate, or wait for the backup except to slow the guest down.
//!
//! ```text
//!   Alone ── a backup asks ──> Joining ── its last part is taken ──> Following ──┬─ lost, and the claim won ──> Alone
//!     ^           └ broken off ──^                                                └─ over ──> finished
//! ```
//! Threads: the vCPU's alone. Locks: none of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use devices::Effect;
use ft_log::{ByeReason, Encoder, Entry, Position};

use super::gate::Room;
use super::joiner::{Join, Joined, Joiner, Joining, turn_away};
use super::outbox::{Outbox, Urgency};
use super::supervisor::LinkEvent;
use crate::host::{LogEvent, spawn};
use crate::machine::{GuestEnd, Machine};
use crate::pair::protocol::{ANOTHER_IS_JOINING, Needed, Phase};
use crate::report::Reports;
use crate::run::{LogSink, Recent, RunError, StopKind};
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
/// How long one wait for room in the gate takes before it is repeated.
const GATE_WAIT: Duration = Duration::from_millis(100);
/// Entries that are remembered for the report of a backup that differed; it is behind by some.
const ENTRIES_REMEMBERED: usize = 4_096;
/// How long an ending primary waits for its backup to have everything.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// What the log is written for.
enum Mode {
    /// Nobody.
    Alone,
    /// Nobody yet: a backup is being given the guest.
    Joining(Box<Joining>),
    /// A backup, until that is lost and the claim won.
    Following(Box<Following>),
}

/// The log to a backup that has the guest.
struct Following {
    outbox: Arc<Outbox>,
    encoder: Encoder,
    /// Where it would take a backup.
    listen: Option<SocketAddr>,
}

/// Slows the guest down.
struct Pace {
    /// When it was looked at last.
    at: Instant,
    /// What the guest is to stand still.
    due: Duration,
}

/// A log whose other end is a backup, when there is one.
pub struct LogWriter {
    joiner: Joiner,
    joins: Receiver<Join>,
    mode: Mode,
    recent: Recent,
    reports: Option<Reports>,
    checked: u64,
    pace: Pace,
    /// The thread of the last connection.
    sender: Option<JoinHandle<()>>,
    had_backup: bool,
    successor: Option<SocketAddr>,
}

impl LogWriter {
    /// A log without a backup yet. Backups that want to join come by `joins`; reports of those that differed go to `reports`.
    pub fn new(joiner: Joiner, joins: Receiver<Join>, reports: Option<Reports>) -> Self {
        Self {
            joiner,
            joins,
            mode: Mode::Alone,
            recent: Recent::keeping(ENTRIES_REMEMBERED),
            reports,
            checked: 0,
            pace: Pace { at: Instant::now(), due: Duration::ZERO },
            sender: None,
            had_backup: false,
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

    /// Slows the guest while the backup's execution lags, the more the further it is behind; or while it writes as fast
    /// as it can be sent.
    fn slow_down(&mut self) {
        let (pause_per_run, longest) = match &self.mode {
            Mode::Alone => return,
            Mode::Joining(joining) => {
                let percent = f64::from(joining.transfer.slower_percent());
                (percent / (100.0 - percent), TRANSFER_PAUSE_MAX)
            }
            Mode::Following(_) => {
                let over = self.joiner.state.lag().saturating_sub(PACE_FROM).as_secs_f64()
                    / (PACE_FULL - PACE_FROM).as_secs_f64();
                (4.0 * over.min(1.0), PACE_PAUSE_MAX)
            }
        };
        if let Some(paused) = self.pace.pause(pause_per_run, longest)
            && let Some(outbox) = self.joiner.state.outbox()
        {
            outbox.paced(paused);
        }
    }

    /// A backup that was lost because its guest differed: what this side has to say of it.
    fn report_divergence(&mut self, machine: &Machine) {
        let Some(how) = self.joiner.state.outbox().and_then(|outbox| outbox.take_divergence()) else {
            return;
        };
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
                tracing::warn!(event = %LogEvent::ReportWritten, "report written: {}", crate::report::listed(&files));
            }
            Err(error) => tracing::warn!("{}", with_causes(&error)),
        };
        if let Err(error) = spawn("report", write) {
            tracing::warn!("the report cannot be written: {error}");
        }
    }

    /// The log to the backup, if it still has one: the batch that will hold it.
    fn publish_to_backup(&mut self, machine: &Machine, effects: &[Effect]) -> Result<Option<u64>, RunError> {
        let Mode::Following(following) = &mut self.mode else { return Ok(None) };
        let Following { outbox, encoder, .. } = &mut **following;
        let visible = effects.iter().any(|effect| matches!(effect, Effect::Frame(_) | Effect::Disk(_)));
        let anchor = machine.anchors();
        let due = anchor > self.checked && (visible || anchor - self.checked >= CHECK_EVERY_ANCHORS);
        if due && !has_crashed(machine) {
            self.checked = anchor;
            note(encoder, &mut self.recent, &check(machine, anchor))?;
        }
        let entries = if encoder.is_empty() { Vec::new() } else { encoder.take() };
        let urgency = match (visible, machine.waiting()) {
            (true, _) => Urgency::Urgent,
            (false, true) => Urgency::Idle,
            (false, false) => Urgency::Busy,
        };
        let batch = outbox.publish(&entries, anchor, urgency);
        if batch.is_none() {
            self.report_divergence(machine);
            if self.joiner.state.phase() == Phase::Alone {
                self.mode = Mode::Alone;
            }
        }
        Ok(batch)
    }

    /// Takes a backup that wants to join, or turns it away.
    fn take_join(&mut self, machine: &mut Machine, join: Join) {
        let joining = matches!(self.mode, Mode::Joining(_)).then_some(ANOTHER_IS_JOINING);
        if let Some(reason) = self.joiner.state.protocol(|primary| primary.refusal()).or(joining) {
            return turn_away(join, reason);
        }
        match self.joiner.begin(machine, join) {
            Ok(joining) => {
                // What an earlier backup left.
                self.report_divergence(machine);
                self.mode = Mode::Joining(Box::new(joining));
            }
            Err(error) => {
                tracing::warn!(error = %with_causes(&error), "a backup cannot be given the guest; it continues without");
            }
        }
    }

    /// The guest stands: its last part goes to the backup, and the log begins.
    fn finish_join(&mut self, machine: &mut Machine) -> Result<bool, RunError> {
        let joining = match std::mem::replace(&mut self.mode, Mode::Alone) {
            Mode::Joining(joining) => joining,
            other => {
                self.mode = other;
                return Ok(false);
            }
        };
        if let Some(Joined { outbox, listen, sender }) = self.joiner.finish(machine, *joining)? {
            let encoder = Encoder::new(snapshot::cursor(machine));
            self.mode = Mode::Following(Box::new(Following { outbox, encoder, listen }));
            self.recent = Recent::keeping(ENTRIES_REMEMBERED);
            self.checked = machine.anchors();
            self.sender = Some(sender);
        }
        Ok(true)
    }

    /// The log is over: from here on the lease and the disk's guard say no. The connection ends with `bye` once nothing is
    /// under way.
    fn end(&self, outbox: &Outbox, bye: Option<ByeReason>) {
        if self.joiner.state.protocol(|primary| primary.end()) {
            outbox.end(bye);
        }
        let gate = &self.joiner.gate;
        let released = gate.quiesce(DRAIN_TIMEOUT);
        if gate.performer().quiesce(DRAIN_TIMEOUT) && released {
            outbox.close_at_rest();
        } else {
            outbox.close();
        }
    }
}

impl Pace {
    /// Lets the guest stand still for `per_run` of the time that it ran, for `longest` at a time. For how long, if it did.
    fn pause(&mut self, per_run: f64, longest: Duration) -> Option<Duration> {
        if per_run > 0.0 {
            self.due += self.at.elapsed().mul_f64(per_run);
        } else {
            self.due = Duration::ZERO;
        }
        let paused = (self.due >= PACE_PAUSE_MIN).then(|| {
            let started = Instant::now();
            std::thread::sleep(self.due.min(longest));
            started.elapsed()
        });
        self.due = self.due.saturating_sub(paused.unwrap_or_default());
        self.at = Instant::now();
        paused
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
        match &mut self.mode {
            Mode::Following(following) => note(&mut following.encoder, &mut self.recent, entry),
            Mode::Alone | Mode::Joining(_) => Ok(()),
        }
    }

    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        self.joiner.state.note_position(machine.anchors());
        let batch = self.publish_to_backup(machine, effects)?;
        if !effects.is_empty() {
            // Without a batch the backup is lost and the claim open, or there is none: the protocol knows.
            let epoch = self.joiner.state.protocol(|primary| primary.epoch());
            let needed = Needed { epoch, batch };
            for effect in effects.drain(..) {
                let mut room = self.joiner.gate.push(needed, effect);
                // The guest waits with its outputs. A gate that closes or opens makes room.
                while room == Room::Full {
                    room = self.joiner.gate.wait_for_room(GATE_WAIT);
                }
            }
        }
        self.slow_down();
        Ok(())
    }

    fn may_checkpoint(&self) -> bool {
        match &self.mode {
            Mode::Following(following) => following.outbox.takes_checkpoint(),
            Mode::Alone | Mode::Joining(_) => true,
        }
    }

    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<u64, RunError> {
        let Mode::Following(following) = &mut self.mode else { return Ok(0) };
        let Following { outbox, encoder, .. } = &mut **following;
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
            outbox.checkpoint(checkpoint, started.elapsed());
        }
        note(encoder, &mut self.recent, &Entry::Stop { anchor: machine.anchors(), position })?;
        Ok(pages)
    }

    fn wants_boundary(&self) -> bool {
        matches!(&self.mode, Mode::Joining(joining) if joining.transfer.is_ready())
    }

    fn at_boundary(&mut self, machine: &mut Machine) -> Result<bool, RunError> {
        match &self.mode {
            Mode::Following(_) => machine.renew_base()?,
            Mode::Joining(joining) if !joining.transfer.has_failed() => {}
            Mode::Joining(_) => {
                self.mode = Mode::Alone;
                self.joiner.monitor.set_transfer(None);
                machine.end_checkpoints()?;
            }
            Mode::Alone => machine.end_checkpoints()?,
        }
        if let Ok(join) = self.joins.try_recv() {
            self.take_join(machine, join);
        }
        if self.wants_boundary() && machine.settle()? { self.finish_join(machine) } else { Ok(false) }
    }

    fn hand_over(&mut self, machine: &Machine) -> Result<bool, RunError> {
        let Mode::Following(following) = &mut self.mode else { return Ok(false) };
        let Following { outbox, encoder, listen: Some(listen) } = &mut **following else { return Ok(false) };
        let (outbox, listen) = (Arc::clone(outbox), *listen);
        outbox.publish(&encoder.take(), machine.anchors(), Urgency::Urgent);
        if !outbox.drain(DRAIN_TIMEOUT) {
            tracing::warn!("the roles are not switched: the backup does not acknowledge the log");
            return Ok(false);
        }
        self.end(&outbox, None);
        let (outcome, taken) = bounded(1);
        // A supervisor that is gone has lost the claim.
        let _ = self.joiner.events.send(LinkEvent::HandedOver(outcome));
        let taken = taken.recv().unwrap_or(true);
        self.successor = taken.then_some(listen);
        Ok(taken)
    }

    fn finish(&mut self, machine: &Machine) -> Result<(), RunError> {
        // Whether a crash is the guest's or this host's, the backup finds out: the log does not say how the guest ended, and
        // leaves it to whoever survives.
        let ended = machine.end().is_some() && !has_crashed(machine);
        let over = ended || self.joiner.vcpu.stop_signal().get() == Some(StopKind::PowerOff);
        self.had_backup = self.joiner.state.phase() != Phase::Alone;
        match std::mem::replace(&mut self.mode, Mode::Alone) {
            Mode::Alone => {}
            Mode::Joining(joining) => self.sender = Some(joining.break_off()),
            Mode::Following(following) => {
                let Following { outbox, mut encoder, .. } = *following;
                if ended {
                    encoder
                        .push(&Entry::End { anchor: machine.anchors(), digest: machine.state_digest() })?;
                }
                outbox.publish(&encoder.take(), machine.anchors(), Urgency::Urgent);
                outbox.drain(DRAIN_TIMEOUT);
                self.end(&outbox, over.then_some(ByeReason::GuestEnded));
            }
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
