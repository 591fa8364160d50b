//! The door of a guest that runs now: events and clock reads come from the host.
//!
//! Owns: the guest's clock and the choice of the boundary at which an event applies. Must never: change
//! guest state other than through an entry that its [`LogSink`] has been given.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, select};
use devices::Effect;
use ft_log::{CLOCK_TOLERANCE, ClockModel, Entry, Event, GuestTime, Position};

use super::code_watch::CodeWatch;
use super::vcpu_handle::{Control, Mailbox};
use super::{Door, Next, RunError, Stopped};
use crate::host::deferral::Deferral;
use crate::machine::{Clock, GuestEnd, Kicked, Machine};

/// Most events that are applied at one boundary, so that a flood of frames cannot keep the guest from running.
const EVENTS_PER_BOUNDARY: usize = 64;

/// Bytes of events after which the rest waits for the next boundary: with one more event of the largest kind
/// they still fit into one batch of the log.
const BYTES_PER_BOUNDARY: usize = 1 << 20;

/// Events that wait for the guest's next boundary; beyond that frames are dropped, as a network card does,
/// and everything else waits.
pub const INBOX_EVENTS: usize = 1_024;

/// What happens to the entries and effects of a live guest.
pub trait LogSink {
    /// Writes an entry down.
    fn record(&mut self, entry: &Entry) -> Result<(), RunError>;
    /// The log is complete up to the machine's boundary; `effects` may go once that is safe.
    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError>;
    /// May the guest be stopped with a checkpoint now? If not, it is asked again later.
    fn may_checkpoint(&self) -> bool {
        true
    }
    /// The guest stands at a forced stop, which a follower has to find. Answers how many pages that took.
    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<u64, RunError>;
    /// Is [`Self::at_boundary`] to be called soon, even if the guest makes no exits? It has no follower then.
    fn wants_boundary(&self) -> bool {
        false
    }
    /// A chance to look after the log's other end. The machine stands at a boundary. True: a snapshot was
    /// taken here and the log starts anew.
    fn at_boundary(&mut self, machine: &mut Machine) -> Result<bool, RunError>;
    /// An operator wants the log's other end to take the guest over; the machine stands at a boundary. True: it did, and
    /// the guest must not run here any more.
    fn hand_over(&mut self, _: &Machine) -> Result<bool, RunError> {
        Ok(false)
    }
    /// No entries will follow.
    fn finish(&mut self, machine: &Machine) -> Result<(), RunError>;
    /// May the guest be broken off between anchors? Not where its state then must be named.
    fn may_break_off(&self) -> bool;
}

/// The guest's clock: guest time at an instant of the host's monotonic clock.
#[derive(Clone, Copy, Debug)]
pub struct HostTime {
    base: Instant,
    offset_ns: u64,
}

impl HostTime {
    /// A clock that shows `time` now.
    pub fn starting_at(time: GuestTime) -> Self {
        Self { base: Instant::now(), offset_ns: time.to_ns() }
    }

    /// What it shows now.
    pub fn now(&self) -> GuestTime {
        GuestTime::from_ns(self.offset_ns + self.base.elapsed().as_nanos() as u64)
    }

    /// When it shows `time`; now, if that was before it started.
    pub fn instant_of(&self, time: GuestTime) -> Instant {
        self.base + Duration::from_nanos(time.to_ns().saturating_sub(self.offset_ns))
    }
}

/// The door of a live guest.
pub struct Live<L> {
    time: HostTime,
    model: ClockModel,
    inbox: Receiver<Event>,
    // With a sender here the channel never closes, so waiting on it always waits.
    _keep_open: Sender<Event>,
    mailbox: Mailbox,
    paused: bool,
    own: VecDeque<Event>,
    /// Time has passed since the guest's last exit: it waited, or was stopped while it computed.
    stale: bool,
    deferral: Arc<Deferral>,
    code_watch: CodeWatch,
    log: L,
}

/// What a door needs of the host besides the log.
pub struct HostSide {
    /// The guest's clock.
    pub time: HostTime,
    /// Events for the guest.
    pub inbox: (Sender<Event>, Receiver<Event>),
    /// How long they may wait.
    pub deferral: Arc<Deferral>,
    /// What other threads want of this one.
    pub mailbox: Mailbox,
}

impl<L: LogSink> Live<L> {
    /// A door between `host` and the guest.
    pub fn new(machine: &Machine, host: HostSide, log: L) -> Self {
        let HostSide { time, inbox: (_keep_open, inbox), deferral, mailbox } = host;
        let model = ClockModel::starting_at(machine.now());
        let own = VecDeque::new();
        let code_watch = CodeWatch::default();
        Self {
            time,
            model,
            inbox,
            _keep_open,
            mailbox,
            paused: false,
            own,
            stale: false,
            deferral,
            code_watch,
            log,
        }
    }

    /// The log, for what comes after the loop.
    pub fn log_mut(&mut self) -> &mut L {
        &mut self.log
    }

    /// Asks for random bytes on behalf of a guest that was asking when this door took over.
    pub fn supply_entropy(&mut self, len_bytes: usize) -> Result<(), RunError> {
        let mut data = vec![0; len_bytes];
        crate::host::random_bytes(&mut data).map_err(RunError::Random)?;
        self.own.push_back(Event::Entropy { data });
        Ok(())
    }

    fn apply(
        &mut self,
        machine: &mut Machine,
        event: Event,
        effects: &mut Vec<Effect>,
    ) -> Result<(), RunError> {
        let entry = Entry::Event { anchor: machine.anchors(), event };
        self.log.record(&entry)?;
        if let Entry::Event { event, .. } = &entry {
            machine.apply(event, effects)?;
        }
        Ok(())
    }

    /// Applies what is due at this boundary.
    fn apply_due(&mut self, machine: &mut Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        self.deferral.emptying();
        self.tick(machine, effects)?;
        let mut bytes = 0;
        for _ in 0..EVENTS_PER_BOUNDARY {
            if bytes >= BYTES_PER_BOUNDARY {
                break;
            }
            let Some(event) = self.own.pop_front().or_else(|| self.inbox.try_recv().ok()) else { break };
            if let Event::DiskDone { data, .. } | Event::Frame { data } = &event {
                bytes += data.len();
            }
            self.apply(machine, event, effects)?;
        }
        if !self.inbox.is_empty() || !self.own.is_empty() {
            self.deferral.arrived();
        }
        Ok(())
    }

    /// Lets timers that are due expire. A guest that has made no exit for a while does not see other events at the time
    /// of its last one.
    fn tick(&mut self, machine: &mut Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        // Never earlier than what the guest has been shown.
        let now = self.time.now().max(machine.now());
        self.code_watch.look_if_due(machine, now);
        if self.stale || machine.deadline().is_some_and(|deadline| deadline <= now) {
            self.stale = false;
            self.apply(machine, Event::Tick { now }, effects)?;
            self.model.tick(now);
        }
        Ok(())
    }

    /// No entries will follow.
    fn finish(&mut self, machine: &Machine) -> Result<(), RunError> {
        self.log.finish(machine)?;
        self.code_watch.look(machine);
        Ok(())
    }

    /// Does an operator want something of a boundary?
    fn has_orders(&self) -> bool {
        self.paused || !self.mailbox.controls.is_empty()
    }

    /// Takes the orders that wait. True: the guest is to be handed over.
    fn take_orders(&mut self) -> bool {
        let mut hand_over = false;
        for control in self.mailbox.controls.try_iter() {
            match control {
                Control::Pause => self.paused = true,
                Control::Resume => self.paused = false,
                Control::HandOver => hand_over = true,
            }
        }
        hand_over
    }

    /// Waits until there may be something to apply.
    fn wait(&mut self, machine: &Machine) {
        self.stale = true;
        let timer = machine
            .deadline()
            .map_or_else(crossbeam_channel::never, |deadline| at(self.time.instant_of(deadline)));
        select! {
            recv(self.inbox) -> event => self.own.extend(event),
            recv(self.mailbox.woken) -> _ => {}
            recv(timer) -> _ => {}
        }
    }
}

impl<L: LogSink> Clock for Live<L> {
    type Error = RunError;

    fn read(&mut self) -> Result<GuestTime, RunError> {
        let now = self.time.now();
        if self.model.prediction().0.abs_diff(now.0) <= CLOCK_TOLERANCE {
            return Ok(self.model.accept());
        }
        let now = now.max(self.model.earliest());
        self.log.record(&Entry::Clock { unlogged: self.model.unlogged(), now })?;
        self.model.correct(now);
        Ok(now)
    }

    fn kicked(&mut self, machine: &Machine) -> Result<Kicked, RunError> {
        if self.mailbox.stop_signal().is_set() && self.log.may_break_off() {
            return Err(RunError::StopRequested);
        }
        if self.log.wants_boundary() || (self.has_orders() && self.log.may_checkpoint()) {
            return Ok(Kicked::Stop);
        }
        if !self.deferral.is_due() {
            return Ok(Kicked::GoOn);
        }
        let may_checkpoint = self.log.may_checkpoint();
        if !may_checkpoint {
            self.deferral.hold();
        }
        if may_checkpoint && self.deferral.is_worth(machine.written_pages()?) {
            return Ok(Kicked::Stop);
        }
        Ok(if machine.counts_branches() { Kicked::StopIfCounted } else { Kicked::GoOn })
    }
}

impl<L: LogSink> Door for Live<L> {
    fn boundary(&mut self, machine: &mut Machine, effects: &mut Vec<Effect>) -> Result<Next, RunError> {
        self.deferral.left();
        loop {
            if self.log.at_boundary(machine)? {
                self.model = ClockModel::starting_at(machine.now());
            }
            if self.mailbox.stop_signal().is_set() {
                self.finish(machine)?;
                return Ok(Next::Stop(Stopped::Requested));
            }
            if self.take_orders() && self.log.hand_over(machine)? {
                return Ok(Next::Stop(Stopped::Requested));
            }
            // What arrives meanwhile waits in the inbox; frames that find no room there are dropped.
            self.mailbox.set_stands(self.paused);
            if !self.paused {
                self.apply_due(machine, effects)?;
                if !machine.waiting() {
                    return Ok(Next::Enter);
                }
            }
            self.publish(machine, effects)?;
            if self.paused {
                self.stale = true;
                // Its other end is in the handle that the mailbox holds.
                let _ = self.mailbox.woken.recv();
            } else if self.own.is_empty() {
                self.wait(machine);
            }
        }
    }

    fn entering(&mut self, machine: &Machine) {
        // An interrupt that the guest cannot take yet keeps others out as well.
        if machine.board().interrupt_pending() {
            self.deferral.entering_closed();
        } else {
            self.deferral.entering(machine.deadline().map(|deadline| self.time.instant_of(deadline)));
        }
    }

    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<(), RunError> {
        self.stale = true;
        let since = Instant::now();
        let pages = self.log.stopped(machine, position)?;
        self.deferral.paused(since.elapsed(), pages);
        Ok(())
    }

    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        let mut wanted = Vec::new();
        effects.retain(|effect| match effect {
            Effect::Entropy { len_bytes } => {
                wanted.push(*len_bytes);
                false
            }
            _ => true,
        });
        for len_bytes in wanted {
            self.supply_entropy(len_bytes)?;
        }
        self.log.publish(machine, effects)
    }

    fn broken_off(&mut self, machine: &mut Machine) -> Result<(), RunError> {
        self.finish(machine)
    }

    fn ended(&mut self, machine: &mut Machine, _: GuestEnd) -> Result<(), RunError> {
        self.finish(machine)
    }
}
