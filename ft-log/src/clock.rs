//! The clock that both sides predict, so that few clock reads need an entry.
//!
//! Owns: [`ClockModel`]. Must never: depend on anything but the log and the number of clock reads; both sides
//! then predict the same.
//!
//! A guest reads its clocks in bursts, and each read costs about as much time as the last. The model says
//! what a read shows if nothing is logged: the previous time plus a step. The primary logs a read only where
//! its own clock is further from the prediction than [`CLOCK_TOLERANCE`], with the number of reads before it
//! that were not logged. The step follows what is logged.
//!
//! ```text
//! read ── prediction near enough ──> shown, not logged          (accept)
//!      └─ else ──> Entry::Clock, the primary's time is shown    (correct)
//! tick ──> Event::Tick moves the time                           (tick)
//! ```

use crate::event::GuestTime;

/// How far a clock read may be from the primary's own clock, in ticks: a quarter of a millisecond.
pub const CLOCK_TOLERANCE: u64 = GuestTime::HZ / 4_000;

/// First step, in ticks, before anything is known of the guest: 4.5 µs.
const FIRST_STEP: u64 = 16;
/// Longest time between two reads that counts for the step: beyond it the guest did something else.
const LONGEST_STEP: u64 = 2_000;

/// What clock reads show when the log does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockModel {
    time: u64,
    logged: u64,
    step: u64,
    unlogged: u64,
}

impl ClockModel {
    /// A model for a log that starts at `time`.
    pub fn starting_at(time: GuestTime) -> Self {
        Self { time: time.0, logged: time.0, step: FIRST_STEP, unlogged: 0 }
    }

    /// What the next read shows if it is not logged.
    pub fn prediction(&self) -> GuestTime {
        GuestTime(self.time.saturating_add(self.step))
    }

    /// The least that a logged read may show.
    pub fn earliest(&self) -> GuestTime {
        GuestTime(self.time.saturating_add(1))
    }

    /// Reads since the last [`crate::Entry::Clock`] that were not logged.
    pub fn unlogged(&self) -> u64 {
        self.unlogged
    }

    /// The read shows the prediction, which is answered.
    pub fn accept(&mut self) -> GuestTime {
        self.time = self.prediction().0;
        self.unlogged += 1;
        GuestTime(self.time)
    }

    /// The read shows `now`, as logged. Steps are taken a little shorter than they are: a prediction that is
    /// late is mended by one entry, one that is early has to be waited for.
    pub fn correct(&mut self, now: GuestTime) {
        let step = (now.0.saturating_sub(self.logged) / (self.unlogged + 1)).min(LONGEST_STEP);
        self.step = ((self.step * 7 + step * 7 / 8) / 8).max(1);
        self.time = now.0;
        self.logged = now.0;
        self.unlogged = 0;
    }

    /// A tick moved the time to `now`.
    pub fn tick(&mut self, now: GuestTime) {
        self.time = self.time.max(now.0);
        self.logged = self.time;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_at_equal_distances_are_soon_predicted() {
        let mut model = ClockModel::starting_at(GuestTime(0));
        let mut logged = 0;
        for read in 1..=1_000u64 {
            let now = GuestTime(read * 300);
            if model.prediction().0.abs_diff(now.0) <= CLOCK_TOLERANCE {
                model.accept();
            } else {
                model.correct(now);
                logged += 1;
            }
        }
        assert!(logged < 100, "{logged}");
    }

    #[test]
    fn time_only_rises() {
        let mut model = ClockModel::starting_at(GuestTime(10));
        let first = model.accept();
        assert!(model.earliest() > first && model.prediction() > first);
        model.tick(GuestTime(5));
        assert!(model.accept() > first);
    }

    #[test]
    fn a_long_pause_does_not_stretch_the_step() {
        let mut model = ClockModel::starting_at(GuestTime(0));
        model.correct(GuestTime(1 << 40));
        assert!(model.prediction().0 - (1 << 40) <= LONGEST_STEP);
    }
}
