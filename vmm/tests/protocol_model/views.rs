//! How a world gets from one view to the next: joins, claims, and what the arbiter makes of them.
//!
//! Owns: records, and the way of a claim there and back. Must never: know better than a record who was a member of a view.

use std::collections::VecDeque;

use ft_log::BatchReceiver;
use vmft::pair::protocol::{Answer, Ask, Backup, Epoch, Hearing, Life, Next, Primary};

use super::world::{
    Connection, Down, Flaw, Following, Monitor, Pending, Record, Wiring, World, connection_of,
};

impl World {
    /// A backup has nearly all of the guest: the primary has it recorded as one.
    pub(super) fn join(&mut self, primary: usize, backup: usize, wiring: &Wiring) {
        self.left.joins -= 1;
        self.lives += 1;
        let (life, here) = (self.lives, self.now(backup));
        let Monitor::Primary(running) = &mut self.hosts[primary].monitor else { return };
        let view = running.machine.view() + 1;
        let ask = running.machine.name(life, view).expect("it is alone");
        running.joining = Some(life);
        running.start = running.guest.len();
        self.connections.push(Connection {
            primary: running.life,
            backup: life,
            down: VecDeque::new(),
            up: VecDeque::new(),
            epoch: Epoch::default(),
            closed_by_primary: false,
            closed_by_backup: false,
            cut: false,
            dismissed: false,
        });
        if wiring.has(Flaw::PairsUnrecorded) {
            running.machine.claim_says(ask, Answer::Won);
        } else {
            running.asking = true;
            self.pending.push(Pending { life: running.life, ask, answer: None, given_up: false });
        }
        self.hosts[backup].monitor = Monitor::Backup(Box::new(Following {
            life,
            view,
            machine: Backup::new(view, wiring.timing.timeout),
            order: BatchReceiver::default(),
            hearing: Hearing::new(here),
            guest: Vec::new(),
            loaded: false,
            useless: false,
            next: Next::Wait,
            asking: false,
        }));
    }

    /// The arbiter has not said whether it has recorded the backup: asks again.
    pub(super) fn name(&mut self, host: usize) {
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        running.asking = true;
        let ask = Ask { view: running.machine.view() + 1, backup: running.joining };
        self.pending.push(Pending { life: running.life, ask, answer: None, given_up: false });
    }

    /// The backup gets the rest of the guest.
    pub(super) fn attach(&mut self, host: usize, wiring: &Wiring) {
        let now = self.now(host);
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        let epoch = running.machine.attach(now).expect("it is named");
        running.batches = 0;
        running.questions.forget();
        running.peer = running.joining.take();
        let mut guest = running.guest.clone();
        if wiring.has(Flaw::EarlySnapshot) {
            guest.truncate(running.start);
        }
        running.start = running.guest.len();
        if let Some(connection) = connection_of(&mut self.connections, running.life) {
            connection.epoch = epoch;
            connection.down.push_back(Down::Snapshot(guest));
        }
    }

    /// The backup that was joining does not come, or the arbiter takes too long.
    pub(super) fn give_up_join(&mut self, host: usize, wiring: &Wiring) {
        let Monitor::Primary(running) = &mut self.hosts[host].monitor else { return };
        let backup = running.joining.take();
        if wiring.has(Flaw::AnyBackupIsNamed) {
            running.machine = Primary::new(running.machine.view(), wiring.timing);
        } else if let Some(backup) = backup {
            running.machine.join_failed(backup);
        }
        if let Some(connection) = connection_of(&mut self.connections, running.life) {
            connection.closed_by_primary = true;
        }
    }

    pub(super) fn ask(&mut self, host: usize) {
        let Monitor::Backup(following) = &mut self.hosts[host].monitor else { return };
        let Next::Claim { view } = following.next else { return };
        following.asking = true;
        let ask = Ask { view, backup: None };
        self.pending.push(Pending { life: following.life, ask, answer: None, given_up: false });
    }

    pub(super) fn arbitrate(&mut self, place: usize, wiring: &Wiring) {
        let Pending { life, mut ask, .. } = self.pending[place];
        let latest = self.latest();
        if wiring.has(Flaw::ClaimsAnother) && latest.view >= ask.view && latest.primary != life {
            ask.view = latest.view + 1;
        }
        let holder = self.records.iter().find(|record| record.view == ask.view);
        let answer = match holder.filter(|_| !wiring.has(Flaw::NoTestAndSet)) {
            Some(holder) if holder.primary != life => Answer::Lost,
            Some(holder) if holder.backup == ask.backup || wiring.has(Flaw::AnyBackupIsNamed) => Answer::Won,
            Some(_) => Answer::Otherwise,
            None => {
                let before = self.records.iter().rev().find(|record| record.view + 1 == ask.view);
                let by_member =
                    before.is_some_and(|before| before.primary == life || before.backup == Some(life));
                let backup = ask.backup.filter(|_| !wiring.has(Flaw::NamesNobody));
                self.records.push(Record { view: ask.view, primary: life, backup, by_member });
                Answer::Won
            }
        };
        self.pending[place].answer = Some(answer);
    }

    pub(super) fn answer(&mut self, life: Life, ask: Ask, answer: Answer, wiring: &Wiring) {
        let Some(place) = self.place_of(life) else { return };
        match &mut self.hosts[place].monitor {
            Monitor::Off => {}
            Monitor::Primary(running) => {
                running.asking = false;
                running.machine.claim_says(ask, answer);
                self.flush(place, wiring);
            }
            Monitor::Backup(following) => {
                following.asking = false;
                following.machine.claim_says(answer);
                self.look(place, wiring);
            }
        }
    }
}
