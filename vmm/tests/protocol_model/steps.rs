//! What can happen next in a world.
//!
//! Owns: which steps there are, and the budgets of faults. Must never: change anything.

use vmft::pair::protocol::{Duty, Life, Next, Phase};

use super::world::{Beat, Connection, Host, Monitor, Running, World, takes_backup};

/// What may still happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Left {
    /// Ticks of time.
    pub ticks: u8,
    /// Entries that guests execute.
    pub entries: u8,
    /// Backups that start.
    pub joins: u8,
    /// Monitors killed, their kernel closing the connections; or hosts that lose power, with nothing closed.
    pub crashes: u8,
    /// Hosts frozen; they may go on later.
    pub freezes: u8,
    /// Connections cut, in both directions, heartbeats included.
    pub cuts: u8,
    /// Connections that break for one side, which cannot know why; heartbeats go on.
    pub breaks: u8,
    /// Heartbeats that come twice.
    pub repeats: u8,
    /// Claims whose answer is lost (the claim may be made before that, later, or never).
    pub doubts: u8,
    /// Ticks by which a host's clock falls behind.
    pub drift: u8,
    /// Hosts that stop hearing any other but the peer's, or hear one again.
    pub turns_deaf: u8,
    /// Monitors stopped by the operator.
    pub stops: u8,
    /// Backups that stay too far behind.
    pub lags: u8,
    /// Backups whose guest is found to be of no use.
    pub useless: u8,
}

impl Left {
    /// The same faults in another time.
    pub fn with_ticks(self, ticks: u8) -> Self {
        Self { ticks, ..self }
    }
}

/// What can happen next. Numbers are places in the lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    Tick { slow: Option<usize> },
    Execute(usize),
    Join { primary: usize, backup: usize },
    Name(usize),
    Attach(usize),
    GiveUpJoin(usize),
    ToBackup(usize),
    ToPrimary(usize),
    CloseSeenByBackup(usize),
    DismissalHeard(usize),
    CloseSeenByPrimary(usize),
    BreakSeenByBackup(usize),
    BreakSeenByPrimary(usize),
    Beat { beat: usize, again: bool },
    Duty(usize),
    Ask(usize),
    Arbitrate(usize),
    Reply(usize),
    Doubt(usize),
    Kill(usize),
    PowerLoss(usize),
    Freeze(usize),
    Thaw(usize),
    Cut(usize),
    Stop(usize),
    HandOver(usize),
    TakeBack(usize),
    Dismiss(usize),
    TooSlow(usize),
    Useless(usize),
    TurnDeaf(usize),
}

impl World {
    /// Everything that can happen, faults included.
    pub fn steps(&self, steps: &mut Vec<Step>) {
        self.steps_of_messages(steps);
        for place in 0..self.hosts.len() {
            self.steps_of_host(place, steps);
        }
        if self.left.ticks > 0 {
            steps.push(Step::Tick { slow: None });
            if self.left.drift > 0 {
                steps.extend((0..self.hosts.len()).map(|host| Step::Tick { slow: Some(host) }));
            }
        }
    }

    pub(super) fn steps_of_host(&self, place: usize, steps: &mut Vec<Step>) {
        let (host, left) = (&self.hosts[place], self.left);
        if host.frozen {
            steps.push(Step::Thaw(place));
            return;
        }
        match &host.monitor {
            Monitor::Off => {
                let primary = self.hosts.iter().position(|host| !host.frozen && takes_backup(host));
                let primary = primary.filter(|_| left.joins > 0);
                steps.extend(primary.map(|primary| Step::Join { primary, backup: place }));
                return;
            }
            Monitor::Primary(running) => {
                if left.entries > 0 {
                    steps.push(Step::Execute(place));
                }
                if !running.asking && running.machine.duty() != Duty::Nothing {
                    steps.push(Step::Duty(place));
                }
                self.steps_of_join(place, running, steps);
                if running.handed_over {
                    steps.push(Step::TakeBack(place));
                }
                let follows = self.connections.iter().any(|connection| {
                    connection.primary == running.life && self.has_loaded(connection.backup)
                });
                if running.machine.phase() == Phase::Paired && follows {
                    if left.stops > 0 {
                        steps.extend([Step::Stop(place), Step::HandOver(place), Step::Dismiss(place)]);
                    }
                    steps.extend((left.lags > 0).then_some(Step::TooSlow(place)));
                }
            }
            Monitor::Backup(following) => {
                if !following.asking && matches!(following.next, Next::Claim { .. }) {
                    steps.push(Step::Ask(place));
                }
                if following.loaded {
                    steps.extend((left.stops > 0).then_some(Step::Stop(place)));
                    steps.extend((left.useless > 0 && !following.useless).then_some(Step::Useless(place)));
                }
            }
        }
        if left.turns_deaf > 0 {
            steps.push(Step::TurnDeaf(place));
        }
        if left.crashes > 0 {
            steps.extend([Step::Kill(place), Step::PowerLoss(place)]);
        }
        if left.freezes > 0 {
            steps.push(Step::Freeze(place));
        }
    }

    /// What may come of a backup that is being recorded.
    fn steps_of_join(&self, place: usize, running: &Running, steps: &mut Vec<Step>) {
        let Some(backup) = running.joining.filter(|_| !running.asking) else { return };
        if running.machine.has_named() {
            steps.push(Step::Attach(place));
        } else if running.machine.takes_backup() || running.machine.duty() != Duty::Nothing {
            // The join has come to nothing by the arbiter's answer.
            steps.push(Step::GiveUpJoin(place));
            return;
        } else {
            // There was no answer.
            steps.extend([Step::Name(place), Step::GiveUpJoin(place)]);
            return;
        }
        let is_gone = |connection: &Connection| {
            connection.backup == backup && (connection.closed_by_backup || connection.cut)
        };
        if self.place_of(backup).is_none() || self.connections.iter().any(is_gone) {
            steps.push(Step::GiveUpJoin(place));
        }
    }

    fn is_paired(&self, primary: Life) -> bool {
        let place = self.place_of(primary);
        place.is_some_and(|place| match &self.hosts[place].monitor {
            Monitor::Primary(running) => running.machine.phase() == Phase::Paired,
            _ => false,
        })
    }

    fn has_loaded(&self, backup: Life) -> bool {
        let place = self.place_of(backup);
        place.is_some_and(|place| match &self.hosts[place].monitor {
            Monitor::Backup(following) => following.loaded,
            _ => false,
        })
    }

    pub(super) fn steps_of_messages(&self, steps: &mut Vec<Step>) {
        for (place, connection) in self.connections.iter().enumerate() {
            if connection.cut {
                continue;
            }
            steps.extend((self.left.cuts > 0).then_some(Step::Cut(place)));
            if self.awake(connection.backup).is_some() && !connection.closed_by_backup {
                steps.extend((!connection.down.is_empty()).then_some(Step::ToBackup(place)));
                if connection.closed_by_primary {
                    steps.push(Step::CloseSeenByBackup(place));
                    steps.extend(connection.dismissed.then_some(Step::DismissalHeard(place)));
                }
                steps.extend((self.left.breaks > 0).then_some(Step::BreakSeenByBackup(place)));
            }
            // A thread may be slow to deliver what it has read of a connection that is closed since.
            if self.awake(connection.primary).is_some() && !connection.up.is_empty() {
                steps.push(Step::ToPrimary(place));
            }
            if self.awake(connection.primary).is_some()
                && !connection.closed_by_primary
                && self.is_paired(connection.primary)
            {
                steps.extend(connection.closed_by_backup.then_some(Step::CloseSeenByPrimary(place)));
                steps.extend((self.left.breaks > 0).then_some(Step::BreakSeenByPrimary(place)));
            }
        }
        for (beat, Beat { backup, answer, .. }) in self.beats.iter().enumerate() {
            // What comes to a frozen host waits there.
            let is_peer = |host: &Host| matches!(&host.monitor, Monitor::Primary(running) if running.peer == Some(*backup));
            let receiver = if *answer { self.hosts.iter().position(is_peer) } else { self.place_of(*backup) };
            if receiver.is_none_or(|receiver| self.hosts[receiver].frozen) {
                continue;
            }
            steps.push(Step::Beat { beat, again: false });
            if self.left.repeats > 0 {
                steps.push(Step::Beat { beat, again: true });
            }
        }
        for (place, pending) in self.pending.iter().enumerate() {
            let awake = self.awake(pending.life).is_some();
            match pending.answer {
                None => steps.push(Step::Arbitrate(place)),
                Some(_) if awake => steps.push(Step::Reply(place)),
                Some(_) => {}
            }
            if self.left.doubts > 0 && !pending.given_up && awake {
                steps.push(Step::Doubt(place));
            }
        }
    }
}
