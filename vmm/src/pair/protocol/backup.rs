//! A monitor that follows: what it acknowledges, when its primary is lost, and whether it may take the guest.
//!
//! Owns: the way from a lost link to a verdict. Must never: acknowledge anything once the link has ended (the primary may
//! let out what was acknowledged), or go live with a guest that is of no use.
//!
//! ```text
//!   Following ── link ended ──> Waiting ─┬─ closed by the primary, or silent for the timeout ──> Claiming ──> Won, Lost
//!                                        ├─ guest ended ──> GuestEnded
//!                                        └─ stopped, dismissed, or retired ──> Stopped (retired: from Claiming too)
//! ```
//!
//! `retire` may come at any time, since the guest may be found to be of no use long after the link has ended.

use std::time::Duration;

use super::{Answer, patience};

/// How a link was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkLoss {
    /// The guest's life is over.
    GuestEnded,
    /// The primary has let this backup go, with the next view claimed.
    Dismissed,
    /// The primary's end closed the connection: the monitor has ended, or has given this backup up, and lets nothing out
    /// in this view any more.
    ByPeer,
    /// Anything else: the primary may still believe that this backup follows.
    Unsure,
}

/// What becomes of a backup whose link has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The guest's life is over.
    GuestEnded,
    /// The operator stopped this monitor or had it let go, or it is out of the running. It claims nothing: the primary goes on.
    Stopped,
    /// The claim is won.
    Won,
    /// The guest is another's.
    Lost,
}

/// What to do next, once the link has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Next {
    /// Look again after [`Backup::look_again_after`].
    Wait,
    /// Claim a view; then [`Backup::claim_says`].
    Claim {
        /// Its number.
        view: u64,
    },
    /// This is what becomes of it.
    Done(Verdict),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Following,
    Waiting(LinkLoss),
    Claiming,
    Done(Verdict),
}

/// The backup's machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Backup {
    /// The one in which a record names it as the backup.
    view: u64,
    timeout: Duration,
    retired: bool,
    state: State,
}

impl Backup {
    /// Follows the primary of `view`, as the backup of that view; the primary is given up when it is silent for longer than `timeout`.
    pub fn new(view: u64, timeout: Duration) -> Self {
        Self { view, timeout, retired: false, state: State::Following }
    }

    /// The view in which it is the backup.
    pub fn view(&self) -> u64 {
        self.view
    }

    /// May batches be acknowledged and heartbeats answered? Whoever claims is silent first: an answer would let the primary
    /// act on.
    pub fn acknowledges(&self) -> bool {
        self.state == State::Following
    }

    /// This backup's guest cannot be used. From now on it claims nothing, and does not go live with what it has claimed.
    pub fn retire(&mut self) {
        self.retired = true;
    }

    /// Is the primary to be given up, which has been silent for so long? A host that is cut off from all others lets the
    /// primary go first: it waits twice as long.
    pub fn gives_up(&self, silent_for: Duration, cut_off: bool) -> bool {
        silent_for > patience(self.timeout, cut_off)
    }

    /// When to look again at a primary that has been silent for so long: a little after the moment at which that counts, but
    /// soon in any case, because whether others are heard may change meanwhile.
    pub fn look_again_after(&self, silent_for: Duration, cut_off: bool) -> Duration {
        let left = patience(self.timeout, cut_off).saturating_sub(silent_for);
        left.clamp(self.timeout / 100, self.timeout / 10)
    }

    /// There will be no more batches, and no more acknowledgements.
    pub fn link_ended(&mut self, loss: LinkLoss) {
        if self.state == State::Following {
            self.state = State::Waiting(loss);
        }
    }

    /// What is to be done now. `silent_for`: since the primary was last heard; `cut_off`: nobody else was heard since, either.
    /// `stopped`: the operator wants this monitor to end.
    pub fn next(&mut self, silent_for: Duration, cut_off: bool, stopped: bool) -> Next {
        if let State::Waiting(loss) = self.state {
            self.state = match loss {
                _ if stopped || self.retired => State::Done(Verdict::Stopped),
                LinkLoss::GuestEnded => State::Done(Verdict::GuestEnded),
                LinkLoss::Dismissed => State::Done(Verdict::Stopped),
                // A primary that cannot be reached may let output go until it has not heard from here for the timeout.
                LinkLoss::Unsure if !self.gives_up(silent_for, cut_off) => State::Waiting(loss),
                LinkLoss::Unsure | LinkLoss::ByPeer => State::Claiming,
            };
        }
        if self.state == State::Claiming && self.retired {
            // An attempt went unanswered. Another one would take the guest from a primary that may still live.
            self.state = State::Done(Verdict::Stopped);
        }
        match self.state {
            State::Following | State::Waiting(_) => Next::Wait,
            State::Claiming => Next::Claim { view: self.view + 1 },
            State::Done(verdict) => Next::Done(verdict),
        }
    }

    /// The arbiter's answer to the claim. While it says nothing, nobody goes on: neither side can know that the other has
    /// not.
    pub fn claim_says(&mut self, answer: Answer) {
        self.state = match (self.state, answer) {
            (State::Claiming, Answer::Won) => State::Done(Verdict::Won),
            (State::Claiming, Answer::Lost) => State::Done(Verdict::Lost),
            (state, _) => state,
        };
    }

    /// The view in which this monitor runs the guest live, once it has executed all that it has.
    pub fn goes_live(&self) -> Option<u64> {
        (self.state == State::Done(Verdict::Won) && !self.retired).then_some(self.view + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(4);
    const HEARD_NOW: Duration = Duration::ZERO;
    const TOO_LONG: Duration = Duration::from_secs(5);

    fn lost(loss: LinkLoss) -> Backup {
        let mut backup = Backup::new(7, TIMEOUT);
        assert!(backup.acknowledges());
        assert_eq!(backup.next(TOO_LONG, false, true), Next::Wait, "the link has not ended");
        backup.link_ended(loss);
        assert!(!backup.acknowledges());
        backup
    }

    #[test]
    fn a_primary_that_closed_is_replaced_at_once_and_one_that_is_out_of_reach_when_it_is_silent() {
        assert_eq!(lost(LinkLoss::ByPeer).next(HEARD_NOW, false, false), Next::Claim { view: 8 });
        let mut unsure = lost(LinkLoss::Unsure);
        assert_eq!(unsure.next(TIMEOUT, false, false), Next::Wait);
        unsure.link_ended(LinkLoss::ByPeer);
        assert_eq!(unsure.next(TIMEOUT, false, false), Next::Wait, "the first end counts");
        assert_eq!(unsure.next(TOO_LONG, false, false), Next::Claim { view: 8 });
        assert_eq!(unsure.next(HEARD_NOW, false, true), Next::Claim { view: 8 }, "it may be made already");
        unsure.claim_says(Answer::Unknown);
        assert_eq!(unsure.next(HEARD_NOW, false, false), Next::Claim { view: 8 });
        unsure.claim_says(Answer::Won);
        assert_eq!(
            (unsure.next(HEARD_NOW, false, false), unsure.goes_live()),
            (Next::Done(Verdict::Won), Some(8))
        );
        unsure.claim_says(Answer::Lost);
        assert_eq!(unsure.goes_live(), Some(8));
    }

    #[test]
    fn who_hears_nobody_at_all_lets_the_primary_go_first() {
        let mut backup = lost(LinkLoss::Unsure);
        assert!(backup.gives_up(TOO_LONG, false) && !backup.gives_up(TOO_LONG, true));
        assert_eq!(backup.look_again_after(TOO_LONG, false), TIMEOUT / 100);
        assert_eq!(
            backup.look_again_after(TOO_LONG, true),
            TIMEOUT / 10,
            "somebody else may be heard before"
        );
        let nearly = TIMEOUT - TIMEOUT / 20;
        assert_eq!(backup.look_again_after(nearly, false), TIMEOUT / 20);
        assert_eq!(backup.next(TOO_LONG, true, false), Next::Wait);
        assert_eq!(backup.next(2 * TIMEOUT, true, false), Next::Wait);
        assert_eq!(backup.next(2 * TOO_LONG, true, false), Next::Claim { view: 8 });
        assert_eq!(lost(LinkLoss::ByPeer).next(HEARD_NOW, true, false), Next::Claim { view: 8 });
    }

    #[test]
    fn who_is_stopped_or_of_no_use_claims_nothing() {
        for loss in [LinkLoss::ByPeer, LinkLoss::Unsure, LinkLoss::GuestEnded, LinkLoss::Dismissed] {
            assert_eq!(lost(loss).next(TOO_LONG, false, true), Next::Done(Verdict::Stopped));
            let mut retired = Backup::new(7, TIMEOUT);
            retired.retire();
            retired.link_ended(loss);
            assert_eq!(retired.next(TOO_LONG, false, false), Next::Done(Verdict::Stopped));
        }
        assert_eq!(lost(LinkLoss::Dismissed).next(TOO_LONG, false, false), Next::Done(Verdict::Stopped));
        let mut ended = lost(LinkLoss::GuestEnded);
        assert_eq!(ended.next(HEARD_NOW, false, false), Next::Done(Verdict::GuestEnded));
        ended.claim_says(Answer::Won);
        assert_eq!(ended.goes_live(), None);
    }

    #[test]
    fn who_is_retired_while_the_arbiter_is_silent_asks_no_more() {
        let mut backup = lost(LinkLoss::ByPeer);
        assert_eq!(backup.next(HEARD_NOW, false, false), Next::Claim { view: 8 });
        backup.retire();
        backup.claim_says(Answer::Unknown);
        assert_eq!(backup.next(HEARD_NOW, false, false), Next::Done(Verdict::Stopped));
    }

    #[test]
    fn a_guest_that_is_found_to_be_of_no_use_after_the_claim_does_not_go_live() {
        let mut backup = lost(LinkLoss::ByPeer);
        assert_eq!(backup.next(HEARD_NOW, false, false), Next::Claim { view: 8 });
        backup.claim_says(Answer::Won);
        backup.retire();
        assert_eq!(
            (backup.next(HEARD_NOW, false, false), backup.goes_live()),
            (Next::Done(Verdict::Won), None)
        );
    }
}
