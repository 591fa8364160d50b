//! What becomes of a world in which nothing fails any more.
//!
//! Owns: one fair order of what is left to happen. Must never: let a fault happen.

use super::steps::{Left, Step};
use super::world::{Monitor, Wiring, World};

impl World {
    /// Everything that is under way arrives, without any further fault, until nothing moves.
    fn settle(&mut self, wiring: &Wiring) {
        let mut steps = Vec::new();
        loop {
            steps.clear();
            self.left = Left { ticks: self.left.ticks, entries: self.left.entries, ..Left::default() };
            self.steps_of_messages(&mut steps);
            for place in 0..self.hosts.len() {
                self.steps_of_host(place, &mut steps);
            }
            // A claim whose claimant has failed meanwhile comes to nothing; if it does not, that one is the only member left.
            let moves = |step: &Step| match step {
                Step::Thaw(_) | Step::Execute(_) => false,
                Step::Arbitrate(pending) => !self.is_idle(&self.pending[*pending]),
                _ => true,
            };
            let Some(step) = steps.iter().copied().find(moves) else { return };
            self.take(step, wiring);
        }
    }

    /// With no further fault, and time: does an entry that is executed from now on get out?
    pub fn serves_again(&self, wiring: &Wiring) -> bool {
        let mut world = self.clone();
        let seen = world.released.len();
        world.left = Left { ticks: 12, entries: 60, ..Left::default() };
        loop {
            world.settle(wiring);
            for place in 0..world.hosts.len() {
                if matches!(world.hosts[place].monitor, Monitor::Primary(_)) && !world.hosts[place].frozen {
                    world.execute(place, wiring);
                }
            }
            world.settle(wiring);
            // All that was held before may get out too: what is new must.
            if world.released.iter().skip(seen).any(|entry| *entry > self.entries) {
                return true;
            }
            if world.left.ticks == 0 {
                return false;
            }
            world.pass_time(None, wiring);
        }
    }
}
