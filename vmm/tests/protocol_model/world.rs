//! The world around the protocol's state machines: hosts, links, the arbiter, and whoever sees the guest's outputs.
//!
//! Owns: what the monitor's threads do with the machines, without threads; and every fault. Must never: decide anything
//! that the protocol decides; a world that does has a [`Flaw`], which a test puts there to see it found.
//!
//! Time is ticks. A monitor looks at its clock at every tick, unless its host is frozen. A guest is the list of the entries
//! that it has executed; each has one output. Batches hold one entry.

use std::collections::VecDeque;
use std::time::Duration;

use ft_log::{Batch, BatchReceiver, FIRST_BATCH};
use vmft::pair::protocol::{
    Answer, Ask, Backup, Duty, Epoch, Hearing, Leave, Life, LinkLoss, Loss, Needed, Next, Phase, Primary,
    Questions, Timing,
};

use super::steps::{Left, Step};

/// One tick.
pub const TICK: Duration = Duration::from_secs(1);
/// Heartbeats of one sender that are on their way at a time; of more, the oldest is lost.
const BEATS_MAX: usize = 2;

/// A rule that is not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A batch counts as acknowledged when it is sent.
    ReleaseBeforeAck,
    /// Output leaves without a look at the lease.
    NoLease,
    /// The lease counts from the receipt of an answer.
    LeaseFromReceipt,
    /// The arbiter gives a view to everybody who asks.
    NoTestAndSet,
    /// Who has lost a claim is given the view behind.
    ClaimsAnother,
    /// A claim without an answer counts as won.
    SilenceIsAWin,
    /// A primary that has lost its backup goes on without a claim.
    NoClaim,
    /// A primary closes the connection before its outputs wait.
    ClosesTooEarly,
    /// A backup answers heartbeats after it has given its primary up.
    AnswersWhileClaiming,
    /// A backup takes every end of the connection for the primary's.
    ClaimsAtOnce,
    /// Nobody remembers that a backup's guest is of no use.
    RetiredClaims,
    /// A backup goes live before it has executed all that it has.
    GoesLiveTooEarly,
    /// A backup gets the guest without a record that names it.
    PairsUnrecorded,
    /// The record of a pair's view names no backup.
    NamesNobody,
    /// A join that failed is forgotten, and a view that is the primary's counts as won whoever is named in it.
    AnyBackupIsNamed,
    /// A backup gets the guest as it was before its view was claimed.
    EarlySnapshot,
    /// The log goes to everybody who ever was the primary's backup.
    SendsToAll,
    /// The same, and nobody looks which view's it is.
    TakesAnyView,
    /// An acknowledgement counts for the present backup, whoever sent it.
    AnyEpoch,
}

/// How the machines are put together. The default is what the monitor does.
#[derive(Clone, Copy, Debug)]
pub struct Wiring {
    pub timing: Timing,
    pub flaw: Option<Flaw>,
}

impl Wiring {
    pub(super) fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

impl Default for Wiring {
    fn default() -> Self {
        let timing = Timing { loading_timeout: 3 * TICK, ..Timing::new(2 * TICK, 100 * TICK) };
        Self { timing, flaw: None }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Running {
    pub life: Life,
    pub machine: Primary,
    pub(super) questions: Questions,
    /// The backup that is being recorded as one, and has not got the guest.
    pub(super) joining: Option<Life>,
    /// The backup that heartbeats go to.
    pub(super) peer: Option<Life>,
    pub guest: Vec<u8>,
    /// Outputs that wait: what for, and place in `guest`.
    pub(super) held: VecDeque<(Needed, usize)>,
    pub(super) batches: u64,
    /// Entries that the backup was given with the guest.
    pub(super) start: usize,
    pub(super) asking: bool,
    /// The log has ended for the backup to take over, and this monitor waits to see that.
    pub(super) handed_over: bool,
    /// When the last answer came: what a wrong lease counts from.
    pub(super) answered_at: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Following {
    pub life: Life,
    /// The view in which it is the backup.
    pub view: u64,
    pub machine: Backup,
    /// What of the log it may take next, once it has the guest.
    pub(super) order: BatchReceiver,
    pub(super) hearing: Hearing,
    pub guest: Vec<u8>,
    pub loaded: bool,
    /// Its guest is of no use, whether or not anybody remembers.
    pub useless: bool,
    pub next: Next,
    pub(super) asking: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Monitor {
    Off,
    Primary(Box<Running>),
    Backup(Box<Following>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub frozen: bool,
    pub(super) lag: u8,
    /// It hears nobody but the peer, so it waits for longer.
    pub(super) deaf: bool,
    pub monitor: Monitor,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Down {
    Snapshot(Vec<u8>),
    /// Of a view; number; where the log starts, where it is now; the entry.
    Batch(u64, u64, Option<u64>, u64, u8),
}

/// A connection between the monitors of two lives. Each backup has one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Connection {
    pub(super) primary: Life,
    pub(super) backup: Life,
    pub(super) down: VecDeque<Down>,
    pub(super) up: VecDeque<u64>,
    /// Of the primary's, once the backup has got the guest on it.
    pub(super) epoch: Epoch,
    pub(super) closed_by_primary: bool,
    pub(super) closed_by_backup: bool,
    pub(super) cut: bool,
    /// The primary's last word will be that it lets the backup go.
    pub(super) dismissed: bool,
}

/// A heartbeat, sealed with the key of the connection with `backup`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Beat {
    pub(super) backup: Life,
    pub(super) counter: u64,
    pub(super) answer: bool,
}

/// A claim on its way to the arbiter, or the answer on the way back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pending {
    pub(super) life: Life,
    pub(super) ask: Ask,
    pub(super) answer: Option<Answer>,
    /// The monitor was told that there is no answer.
    pub(super) given_up: bool,
}

/// A view as the arbiter has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    pub view: u64,
    pub primary: Life,
    pub backup: Option<Life>,
    /// The record of the view before names the claimant.
    pub by_member: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct World {
    pub tick: u8,
    pub left: Left,
    pub hosts: Vec<Host>,
    pub(super) connections: Vec<Connection>,
    pub(super) beats: Vec<Beat>,
    pub(super) pending: Vec<Pending>,
    /// In the order in which they were made.
    pub records: Vec<Record>,
    /// Outputs that were seen outside, each once.
    pub released: Vec<u8>,
    /// An output was seen that does not follow from those before.
    pub contradiction: bool,
    /// An output was let out while another monitor could let out its own.
    pub overlap: bool,
    /// A guest of no use went live.
    pub useless_lives: bool,
    /// A backup took an entry of another view's log.
    pub foreign: bool,
    /// A backup was sent what it refused.
    pub refused: bool,
    pub(super) lives: Life,
    pub(super) entries: u8,
}

impl World {
    pub fn new(hosts: usize, left: Left, wiring: &Wiring) -> Self {
        let off = Host { frozen: false, lag: 0, deaf: false, monitor: Monitor::Off };
        let mut world = Self {
            tick: 1,
            left,
            hosts: vec![off; hosts],
            connections: Vec::new(),
            beats: Vec::new(),
            pending: Vec::new(),
            records: vec![Record { view: 1, primary: 1, backup: None, by_member: true }],
            released: Vec::new(),
            contradiction: false,
            overlap: false,
            useless_lives: false,
            foreign: false,
            refused: false,
            lives: 1,
            entries: 0,
        };
        world.hosts[0].monitor = Monitor::Primary(Box::new(running(1, 1, Vec::new(), wiring)));
        world
    }

    pub(super) fn now(&self, host: usize) -> Duration {
        TICK * u32::from(self.tick - self.hosts[host].lag)
    }

    /// The highest record.
    pub fn latest(&self) -> Record {
        *self.records.iter().max_by_key(|record| record.view).expect("view 1 is recorded from the start")
    }

    pub(super) fn place_of(&self, life: Life) -> Option<usize> {
        self.hosts.iter().position(|host| match &host.monitor {
            Monitor::Off => false,
            Monitor::Primary(running) => running.life == life,
            Monitor::Backup(following) => following.life == life,
        })
    }

    /// The place of a monitor that can act.
    pub(super) fn awake(&self, life: Life) -> Option<usize> {
        self.place_of(life).filter(|place| !self.hosts[*place].frozen)
    }

    /// May this claim come to nothing? Its claimant was told that there is no answer, or cannot go on.
    pub fn is_idle(&self, pending: &Pending) -> bool {
        pending.given_up
            || self.awake(pending.life).is_none_or(
                |place| matches!(&self.hosts[place].monitor, Monitor::Backup(following) if following.useless),
            )
    }

    /// What this host's primary may do now, or may do at once when it is no longer frozen.
    pub fn may_act(&self, host: usize, wiring: &Wiring) -> bool {
        match &self.hosts[host].monitor {
            Monitor::Primary(running) => running.may_act(self.now(host), wiring),
            _ => false,
        }
    }

    /// Does `step`.
    pub fn take(&mut self, step: Step, wiring: &Wiring) {
        match step {
            Step::Tick { slow } => self.pass_time(slow, wiring),
            Step::Execute(host) => self.execute(host, wiring),
            Step::Join { primary, backup } => self.join(primary, backup, wiring),
            Step::Name(host) => self.name(host),
            Step::Attach(host) => self.attach(host, wiring),
            Step::GiveUpJoin(host) => self.give_up_join(host, wiring),
            Step::ToBackup(connection) => self.deliver_down(connection, wiring),
            Step::ToPrimary(connection) => self.deliver_up(connection, wiring),
            Step::CloseSeenByBackup(connection) => {
                let backup = self.connections[connection].backup;
                self.link_lost(backup, LinkLoss::ByPeer, wiring);
            }
            Step::DismissalHeard(connection) => {
                let backup = self.connections[connection].backup;
                self.link_lost(backup, LinkLoss::Dismissed, wiring);
            }
            Step::CloseSeenByPrimary(connection) => {
                let primary = self.connections[connection].primary;
                self.backup_lost(primary, Loss::Link);
            }
            Step::BreakSeenByBackup(connection) => {
                self.left.breaks -= 1;
                let backup = self.connections[connection].backup;
                self.link_lost(backup, LinkLoss::Unsure, wiring);
            }
            Step::BreakSeenByPrimary(connection) => {
                self.left.breaks -= 1;
                let primary = self.connections[connection].primary;
                if wiring.has(Flaw::ClosesTooEarly) {
                    self.connections[connection].closed_by_primary = true;
                } else {
                    self.backup_lost(primary, Loss::Link);
                }
            }
            Step::Beat { beat, again } => self.beat(beat, again, wiring),
            Step::Duty(host) => self.duty(host, wiring),
            Step::Ask(host) => self.ask(host),
            Step::Arbitrate(pending) => self.arbitrate(pending, wiring),
            Step::Reply(pending) => {
                let Pending { life, ask, answer, given_up } = self.pending.remove(pending);
                if let Some(answer) = answer.filter(|_| !given_up) {
                    self.answer(life, ask, answer, wiring);
                }
            }
            Step::Doubt(pending) => {
                self.left.doubts -= 1;
                self.pending[pending].given_up = true;
                let silence = if wiring.has(Flaw::SilenceIsAWin) { Answer::Won } else { Answer::Unknown };
                let Pending { life, ask, .. } = self.pending[pending];
                self.answer(life, ask, silence, wiring);
            }
            fault => self.fail(fault, wiring),
        }
        self.forget();
    }

    /// Faults of hosts and links, and orders of the operator.
    fn fail(&mut self, fault: Step, wiring: &Wiring) {
        match fault {
            Step::Kill(host) => {
                self.left.crashes -= 1;
                self.end(host, true);
            }
            Step::PowerLoss(host) => {
                self.left.crashes -= 1;
                self.end(host, false);
            }
            Step::Freeze(host) => {
                self.left.freezes -= 1;
                self.hosts[host].frozen = true;
            }
            Step::Thaw(host) => self.hosts[host].frozen = false,
            Step::Cut(connection) => {
                self.left.cuts -= 1;
                self.connections[connection].cut = true;
            }
            Step::Stop(host) => self.stop(host),
            Step::HandOver(host) => self.hand_over(host),
            Step::TakeBack(host) => {
                let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
                running.handed_over = false;
                running.machine.take_back();
            }
            Step::Dismiss(host) => {
                self.left.stops -= 1;
                let Monitor::Primary(running) = &self.hosts[host].monitor else { return };
                let life = running.life;
                if let Some(connection) = connection_of(&mut self.connections, life) {
                    connection.dismissed = true;
                }
                self.backup_lost(life, Loss::Dismissed);
            }
            Step::TooSlow(host) => {
                self.left.lags -= 1;
                let Monitor::Primary(running) = &self.hosts[host].monitor else { return };
                self.backup_lost(running.life, Loss::Behind(TICK));
            }
            Step::Useless(host) => self.useless(host, wiring),
            Step::TurnDeaf(host) => {
                self.left.turns_deaf -= 1;
                self.hosts[host].deaf = !self.hosts[host].deaf;
            }
            other => unreachable!("{other:?} is no fault"),
        }
    }

    /// What can have no effect any more makes no difference.
    fn forget(&mut self) {
        let lives = |world: &Self, life| world.place_of(life).is_some();
        let kept = |world: &Self, connection: &Connection| {
            // What its thread has read it may still deliver.
            (lives(world, connection.primary) && (!connection.closed_by_primary || !connection.up.is_empty()))
                || (lives(world, connection.backup) && !connection.closed_by_backup)
        };
        let connections = std::mem::take(&mut self.connections);
        self.connections = connections.into_iter().filter(|connection| kept(self, connection)).collect();
        let mut pending = std::mem::take(&mut self.pending);
        // A claim may be made behind its claimant's back; nobody waits for the answer then.
        pending
            .retain(|pending| pending.answer.is_none() || (!pending.given_up && lives(self, pending.life)));
        self.pending = pending;
        let mut beats = std::mem::take(&mut self.beats);
        beats.retain(|beat| {
            self.hosts.iter().any(|host| match &host.monitor {
                Monitor::Off => false,
                Monitor::Primary(running) => {
                    let is_news = || running.questions.clone().answer(beat.counter);
                    beat.answer && running.peer == Some(beat.backup) && is_news()
                }
                Monitor::Backup(following) => {
                    let is_news = beat.counter > following.hearing.counter();
                    !beat.answer && following.life == beat.backup && is_news
                }
            })
        });
        self.beats = beats;
    }

    pub(super) fn pass_time(&mut self, slow: Option<usize>, wiring: &Wiring) {
        self.tick += 1;
        self.left.ticks -= 1;
        if let Some(host) = slow {
            self.left.drift -= 1;
            self.hosts[host].lag += 1;
        }
        for place in 0..self.hosts.len() {
            if self.hosts[place].frozen {
                continue;
            }
            let (now, deaf) = (self.now(place), self.hosts[place].deaf);
            match &mut self.hosts[place].monitor {
                Monitor::Off => {}
                Monitor::Primary(running) => {
                    let (life, loss) =
                        (running.life, running.machine.look(running.questions.answered_sent_at(), deaf, now));
                    if let Some(backup) = running.peer {
                        let counter = running.questions.ask(now);
                        self.send_beat(Beat { backup, counter, answer: false });
                    }
                    if let Some(loss) = loss {
                        self.backup_lost(life, loss);
                    }
                    self.flush(place, wiring);
                }
                Monitor::Backup(following) => {
                    let (life, silent) = (following.life, following.hearing.silent_for(now));
                    if following.machine.acknowledges() && following.machine.gives_up(silent, deaf) {
                        self.link_lost(life, LinkLoss::Unsure, wiring);
                    } else {
                        self.look(place, wiring);
                    }
                }
            }
        }
    }

    fn send_beat(&mut self, beat: Beat) {
        let of_sender = |other: &Beat| other.backup == beat.backup && other.answer == beat.answer;
        if self.beats.iter().filter(|other| of_sender(other)).count() == BEATS_MAX {
            let oldest = self.beats.iter().position(of_sender);
            oldest.map(|oldest| self.beats.remove(oldest));
        }
        self.beats.push(beat);
    }

    pub(super) fn execute(&mut self, host: usize, wiring: &Wiring) {
        self.left.entries -= 1;
        self.entries += 1;
        let (entry, now) = (self.entries, self.now(host));
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        running.guest.push(entry);
        let epoch = running.machine.epoch();
        let batch = match running.machine.phase() {
            Phase::Alone | Phase::Orphaned => None,
            Phase::Paired => {
                running.batches += 1;
                let seq = running.batches;
                running.machine.sent(epoch, seq, seq, now);
                if wiring.has(Flaw::ReleaseBeforeAck) {
                    running.machine.acknowledged(epoch, seq, 0, now, drop);
                }
                let (start, reached) = (running.start as u64, running.guest.len() as u64);
                let start = (seq == FIRST_BATCH).then_some(start);
                let batch = Down::Batch(running.machine.view(), seq, start, reached, entry);
                let to_all = wiring.has(Flaw::SendsToAll) || wiring.has(Flaw::TakesAnyView);
                if to_all {
                    let mine = |connection: &&mut Connection| connection.primary == running.life;
                    let all = self.connections.iter_mut().filter(mine);
                    all.for_each(|connection| connection.down.push_back(batch.clone()));
                } else if let Some(connection) = connection_of(&mut self.connections, running.life) {
                    connection.down.push_back(batch);
                }
                Some(seq)
            }
        };
        running.held.push_back((Needed { epoch, batch }, running.guest.len() - 1));
        self.flush(host, wiring);
    }

    /// Lets out what may leave.
    pub(super) fn flush(&mut self, host: usize, wiring: &Wiring) {
        let now = self.now(host);
        let others = (0..self.hosts.len()).any(|other| other != host && self.may_act(other, wiring));
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        while let Some(&(needed, place)) = running.held.front() {
            match running.machine.may_leave(needed, running.heard(wiring), now) {
                Leave::Yes => {}
                Leave::NoLease if wiring.has(Flaw::NoLease) => {}
                _ => break,
            }
            running.held.pop_front();
            self.overlap |= others;
            match self.released.get(place) {
                Some(seen) => self.contradiction |= *seen != running.guest[place],
                None if place == self.released.len() => self.released.push(running.guest[place]),
                None => self.contradiction = true,
            }
        }
    }

    fn deliver_down(&mut self, place: usize, wiring: &Wiring) {
        let Some(host) = self.place_of(self.connections[place].backup) else { return };
        let now = self.now(host);
        let connection = &mut self.connections[place];
        let Monitor::Backup(following) = &mut self.hosts[host].monitor else { return };
        let Some(message) = connection.down.pop_front() else { return };
        following.hearing.note(now);
        let seq = match message {
            Down::Snapshot(guest) => {
                following.order = BatchReceiver::new(following.view, guest.len() as u64);
                (following.guest, following.loaded) = (guest, true);
                0
            }
            Down::Batch(view, seq, start, reached, entry) => {
                let batch = Batch { view, seq, start, reached, ..Batch::default() };
                if !wiring.has(Flaw::TakesAnyView) && following.order.accept(&batch).is_err() {
                    self.refused = true;
                    let life = following.life;
                    return self.link_lost(life, LinkLoss::Unsure, wiring);
                }
                self.foreign |= view != following.view;
                following.guest.push(entry);
                seq
            }
        };
        connection.up.extend(Some(seq).filter(|_| following.machine.acknowledges()));
    }

    fn deliver_up(&mut self, place: usize, wiring: &Wiring) {
        let Some(host) = self.place_of(self.connections[place].primary) else { return };
        let now = self.now(host);
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        let Connection { epoch, up, .. } = &mut self.connections[place];
        let Some(seq) = up.pop_front() else { return };
        let epoch = if wiring.has(Flaw::AnyEpoch) { running.machine.epoch() } else { *epoch };
        running.machine.acknowledged(epoch, seq, seq, now, drop);
        self.flush(host, wiring);
    }

    fn beat(&mut self, place: usize, again: bool, wiring: &Wiring) {
        let beat = self.beats[place].clone();
        if again {
            self.left.repeats -= 1;
        } else {
            self.beats.remove(place);
        }
        let is_cut = |connection: &Connection| connection.cut && connection.backup == beat.backup;
        if self.connections.iter().any(is_cut) {
            return;
        }
        for place in 0..self.hosts.len() {
            let now = self.now(place);
            match &mut self.hosts[place].monitor {
                Monitor::Primary(running) if beat.answer && running.peer == Some(beat.backup) => {
                    if running.questions.answer(beat.counter) {
                        running.answered_at = Some(now).filter(|_| wiring.has(Flaw::LeaseFromReceipt));
                    }
                    self.flush(place, wiring);
                }
                Monitor::Backup(following) if !beat.answer && following.life == beat.backup => {
                    let answers = following.machine.acknowledges() || wiring.has(Flaw::AnswersWhileClaiming);
                    if following.hearing.hear(beat.counter, now) && answers {
                        self.send_beat(Beat { answer: true, ..beat.clone() });
                    }
                }
                _ => {}
            }
        }
    }

    fn duty(&mut self, host: usize, wiring: &Wiring) {
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        match running.machine.duty() {
            Duty::Nothing => {}
            Duty::Close { .. } => {
                running.peer = None;
                running.questions.forget();
                running.machine.closed();
                if let Some(connection) = connection_of(&mut self.connections, running.life) {
                    connection.closed_by_primary = true;
                }
            }
            Duty::Claim { view } if wiring.has(Flaw::NoClaim) => {
                running.machine.claim_says(Ask { view, backup: None }, Answer::Won);
            }
            Duty::Claim { view } => {
                running.asking = true;
                let ask = Ask { view, backup: None };
                self.pending.push(Pending { life: running.life, ask, answer: None, given_up: false });
            }
            Duty::Stop => return self.end(host, true),
        }
        self.flush(host, wiring);
    }

    fn backup_lost(&mut self, life: Life, loss: Loss) {
        let Some(place) = self.place_of(life) else { return };
        let Monitor::Primary(running) = &mut self.hosts[place].monitor else { return };
        let epoch = running.machine.epoch();
        running.machine.backup_lost(epoch, loss);
    }

    fn link_lost(&mut self, life: Life, loss: LinkLoss, wiring: &Wiring) {
        let Some(place) = self.place_of(life) else { return };
        let Monitor::Backup(following) = &mut self.hosts[place].monitor else { return };
        if !following.loaded {
            return self.end(place, true);
        }
        let loss = if wiring.has(Flaw::ClaimsAtOnce) { LinkLoss::ByPeer } else { loss };
        following.machine.link_ended(loss);
        self.close_as_backup(life);
        self.look(place, wiring);
    }

    fn close_as_backup(&mut self, life: Life) {
        for connection in self.connections.iter_mut().filter(|connection| connection.backup == life) {
            connection.closed_by_backup = true;
        }
    }

    /// What the backup's machine says must be done.
    pub(super) fn look(&mut self, place: usize, wiring: &Wiring) {
        let (now, deaf) = (self.now(place), self.hosts[place].deaf);
        let Monitor::Backup(following) = &mut self.hosts[place].monitor else { return };
        following.next = following.machine.next(following.hearing.silent_for(now), deaf, false);
        if let Some(view) = following.machine.goes_live() {
            self.useless_lives |= following.useless;
            let mut guest = std::mem::take(&mut following.guest);
            if wiring.has(Flaw::GoesLiveTooEarly) {
                guest.pop();
            }
            let live = running(following.life, view, guest, wiring);
            self.hosts[place].monitor = Monitor::Primary(Box::new(live));
            self.flush(place, wiring);
        } else if let Next::Done(_) = following.next {
            self.end(place, true);
        }
    }

    /// The operator stops a monitor: a primary hands over to its backup, a backup leaves.
    fn stop(&mut self, host: usize) {
        self.left.stops -= 1;
        match &mut self.hosts[host].monitor {
            Monitor::Off => return,
            Monitor::Primary(running) => {
                running.machine.end();
            }
            Monitor::Backup(following) => {
                following.machine.link_ended(LinkLoss::Unsure);
                if !matches!(following.machine.next(Duration::ZERO, false, true), Next::Done(_)) {
                    // The claim may be made already.
                    return;
                }
            }
        }
        self.end(host, true);
    }

    /// The operator switches the roles: the log ends, and the backup is to take the guest.
    fn hand_over(&mut self, host: usize) {
        self.left.stops -= 1;
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        running.handed_over = running.machine.end();
        if let Some(connection) = connection_of(&mut self.connections, running.life) {
            connection.closed_by_primary = true;
        }
    }

    /// A backup's guest is found to be of no use.
    fn useless(&mut self, host: usize, wiring: &Wiring) {
        self.left.useless -= 1;
        let Monitor::Backup(following) = &mut self.hosts[host].monitor else { return };
        following.useless = true;
        if !wiring.has(Flaw::RetiredClaims) {
            following.machine.retire();
        }
        following.machine.link_ended(LinkLoss::Unsure);
        let life = following.life;
        self.close_as_backup(life);
        self.look(host, wiring);
    }

    /// The monitor is gone. `closes`: its kernel closes its connections.
    fn end(&mut self, place: usize, closes: bool) {
        let life = match std::mem::replace(&mut self.hosts[place].monitor, Monitor::Off) {
            Monitor::Off => return,
            Monitor::Primary(running) => running.life,
            Monitor::Backup(following) => following.life,
        };
        self.hosts[place].frozen = false;
        for connection in self.connections.iter_mut().filter(|_| closes) {
            connection.closed_by_primary |= connection.primary == life;
            connection.closed_by_backup |= connection.backup == life;
        }
    }
}

impl Running {
    /// What the lease counts from, as far as heartbeats go.
    fn heard(&self, wiring: &Wiring) -> Option<Duration> {
        let sent_at = self.questions.answered_sent_at();
        if wiring.has(Flaw::LeaseFromReceipt) { sent_at.max(self.answered_at) } else { sent_at }
    }

    fn may_act(&self, now: Duration, wiring: &Wiring) -> bool {
        self.machine.may_act(self.heard(wiring), now)
    }
}

pub(super) fn takes_backup(host: &Host) -> bool {
    matches!(&host.monitor, Monitor::Primary(running) if running.machine.takes_backup())
}

pub(super) fn connection_of(connections: &mut [Connection], primary: Life) -> Option<&mut Connection> {
    // The newest: those before are closed.
    connections.iter_mut().rev().find(|connection| connection.primary == primary)
}

/// A monitor that goes live: all outputs of its guest's past may have to be seen again.
fn running(life: Life, view: u64, guest: Vec<u8>, wiring: &Wiring) -> Running {
    Running {
        life,
        machine: Primary::new(view, wiring.timing),
        questions: Questions::default(),
        joining: None,
        peer: None,
        held: (0..guest.len())
            .map(|place| (Needed { epoch: Epoch::default(), batch: None }, place))
            .collect(),
        guest,
        batches: 0,
        start: 0,
        asking: false,
        handed_over: false,
        answered_at: None,
    }
}
