//! A monitor that runs the guest: its view, its backup, and its right to let output go.
//!
//! Owns: when a backup becomes one, when it is lost, and what has to be done then, in which order. Must never: let output
//! go that a backup may have to answer for and does not have, or after another monitor may have taken the guest.
//!
//! ```text
//!   Alone ── a backup is about to have all ──> Naming ── v + 1 is claimed, with it ──> Named ── attach ──> Paired
//!   view v                                       └──────────── it is gone ───────────────┴──> Unnaming     view v + 1
//!     ^                                                                                           │
//!     └──────────────────────── the next view is claimed, without a backup ───────────────────────┘
//!
//!                          it is silent, gone, or its guest is of no use        closed                 won
//!   Paired ─┬─────────────────────────────────────────────────────────> Closing ──────────> Claiming ─────────> Alone
//!   view v  │                                                                                  │ lost         view v + 1
//!           ├─ it answers, but is too far behind,
//!           │  or is to go ──> ClaimFirst ── won ──> CloseLast ── closed ──────────────────────────────────────────^
//!           │                      └ lost ──> Lost, for ever
//!           └─ the log is over, the backup may take the guest ──> Ended ── take_back ──> Claiming
//! ```
//!
//! A backup is one from the moment at which a record says so, and it gets the last of the guest after that: who has the
//! guest is always a member of the latest view. Until it gets it, nobody else can go on with the guest, so that output goes
//! at once, whatever the arbiter says, or does not say. If it is gone before, no record may keep a backup that does not
//! come, and none that is still on its way to the arbiter may count: the view behind is claimed without one.
//!
//! Each time that a backup gets the guest an *epoch* begins: the life of one connection. What is said of another epoch than
//! the present one, by a thread that was slow to end, changes nothing.
//!
//! Between Paired and Alone nothing is let out: the former backup may have taken over. One that is gone or silent may claim
//! by itself, so the connection may as well tell it. One that answers claims nothing while it hears of this side, so
//! there the claim comes first; else a backup that cannot keep up, or is not wanted, would be the first to claim.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Answer, Ask, Life, Timing, patience};

/// Most batches that are remembered until the backup has executed them; the last one stands for all beyond that, with the
/// age of the first of them.
const BATCHES_REMEMBERED: usize = 4_096;

/// Why a backup cannot join while another one does.
pub const ANOTHER_IS_JOINING: &str = "another backup is joining at this moment";

/// Whether there is a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// No backup; output goes at once.
    Alone,
    /// A backup follows; output waits for it.
    Paired,
    /// The backup is lost and the claim not decided, or the log has ended: no output goes.
    Orphaned,
}

/// Why a backup counts as lost, as far as its primary sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Loss {
    /// It was silent for so long.
    Silent(Duration),
    /// It answers, but its execution is so far behind.
    Behind(Duration),
    /// The connection is closed or broken, or nonsense came.
    Link,
    /// The operator lets it go.
    Dismissed,
}

/// What a primary that has lost its backup has to do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Duty {
    /// Nothing.
    Nothing,
    /// To send no more heartbeats and to end the connection; then [`Primary::closed`].
    Close {
        /// The next view is claimed. Otherwise nothing may be under way when the connection ends: the backup may claim as
        /// soon as it sees that, and has to find out by the silence if something is.
        claimed: bool,
    },
    /// To claim a view, without a backup; then [`Primary::claim_says`].
    Claim {
        /// Its number.
        view: u64,
    },
    /// To stop the guest: it is another monitor's.
    Stop,
}

/// Why a backup cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// There is a backup, or one is joining, or the view of one that did not come is not decided.
    #[error("a backup may join only a primary that runs alone")]
    NotAlone,
    /// It was told another view than the next one.
    #[error("the backup was welcomed for view {told}, and the next one is {next}")]
    OtherView {
        /// What it was told.
        told: u64,
        /// What comes.
        next: u64,
    },
    /// No record names it.
    #[error("a backup gets the guest only when a record of the arbiter names it")]
    NotRecorded,
}

/// The number of a connection on which a backup has got the guest, counted by its primary. 0: there was none so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(u64);

/// What an output waits for, if there is a backup when it is to leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Needed {
    /// The epoch in which the guest made it.
    pub epoch: Epoch,
    /// The batch that has to be acknowledged in it; `None`: no backup was to get one.
    pub batch: Option<u64>,
}

/// Whether an output may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leave {
    /// Yes.
    Yes,
    /// Its batch is not acknowledged, or a claim is not decided.
    NotYet,
    /// It is acknowledged, but the lease is over.
    NoLease,
    /// Another monitor has the guest.
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Alone,
    Naming(Life),
    Named(Life),
    Unnaming,
    Paired {
        /// When the backup had loaded the guest.
        follows_since: Option<Duration>,
    },
    Closing,
    Claiming,
    ClaimFirst,
    CloseLast,
    Ended,
    Lost,
}

/// A batch that the backup has not executed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Sent {
    seq: u64,
    reached: u64,
    at: Duration,
}

/// The primary's machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Primary {
    view: u64,
    timing: Timing,
    state: State,
    epoch: Epoch,
    /// The newest batch of this epoch that the backup has.
    acknowledged: u64,
    sent: VecDeque<Sent>,
    /// When the newest batch was sent that the backup has acknowledged.
    answered_sent_at: Duration,
}

impl Primary {
    /// Runs the guest alone in `view`, which it has claimed.
    pub fn new(view: u64, timing: Timing) -> Self {
        let (state, answered_sent_at) = (State::Alone, Duration::ZERO);
        let (epoch, acknowledged, sent) = (Epoch::default(), 0, VecDeque::new());
        Self { view, timing, state, epoch, acknowledged, sent, answered_sent_at }
    }

    /// The present view: the last one that was claimed here.
    pub fn view(&self) -> u64 {
        self.view
    }

    /// The present epoch, or the last one.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Whether there is a backup.
    pub fn phase(&self) -> Phase {
        match self.state {
            State::Alone | State::Naming(_) | State::Named(_) | State::Unnaming => Phase::Alone,
            State::Paired { .. } => Phase::Paired,
            _ => Phase::Orphaned,
        }
    }

    /// Has another monitor got the guest?
    pub fn is_lost(&self) -> bool {
        self.state == State::Lost
    }

    /// May a backup begin to join?
    pub fn takes_backup(&self) -> bool {
        self.refusal().is_none()
    }

    /// Why no backup may begin to join, if none may.
    pub fn refusal(&self) -> Option<&'static str> {
        match self.state {
            State::Alone => None,
            State::Naming(_) | State::Named(_) => Some(ANOTHER_IS_JOINING),
            State::Unnaming => Some(
                "a backup that was joining did not come, and the arbiter has not answered yet to the claim of the next view",
            ),
            State::Paired { .. } => Some("this guest has a backup already"),
            State::Closing | State::Claiming | State::ClaimFirst => Some(
                "the last backup is lost, and the arbiter has not answered yet to the claim of the next view",
            ),
            State::CloseLast => Some("the last backup is being let go at this moment"),
            State::Ended => Some("the log has ended, and the backup may take the guest over"),
            State::Lost => Some("another monitor has taken the guest over"),
        }
    }

    /// `backup`, which was told that it would be one in `view`, is about to get the last of the guest. Answers the claim
    /// that has to be won before; then [`Primary::claim_says`].
    pub fn name(&mut self, backup: Life, view: u64) -> Result<Ask, JoinError> {
        let next = self.view + 1;
        match self.state {
            State::Alone if view == next => {
                self.state = State::Naming(backup);
                Ok(Ask { view, backup: Some(backup) })
            }
            State::Alone => Err(JoinError::OtherView { told: view, next }),
            _ => Err(JoinError::NotAlone),
        }
    }

    /// Is the latest view recorded with a backup that has not got the guest yet?
    pub fn has_named(&self) -> bool {
        matches!(self.state, State::Named(_))
    }

    /// `backup`, which was joining, does not come. Without effect on one that has got the guest, and on another.
    pub fn join_failed(&mut self, backup: Life) {
        if self.state == State::Naming(backup) || self.state == State::Named(backup) {
            self.state = State::Unnaming;
        }
    }

    /// A backup gets, with what is under way to it, all of the guest up to now: every event before this is in the transfer,
    /// every later one in the log, whose batches count from 1. The record of the view names it. An epoch begins.
    pub fn attach(&mut self, now: Duration) -> Result<Epoch, JoinError> {
        if !self.has_named() {
            return Err(JoinError::NotRecorded);
        }
        self.state = State::Paired { follows_since: None };
        self.epoch.0 += 1;
        self.acknowledged = 0;
        self.sent.clear();
        self.answered_sent_at = now;
        Ok(self.epoch)
    }

    /// Batch `seq` of `epoch` is sent now; the log is then complete up to `reached`.
    pub fn sent(&mut self, epoch: Epoch, seq: u64, reached: u64, now: Duration) {
        if epoch != self.epoch {
            return;
        }
        if self.sent.len() < BATCHES_REMEMBERED {
            self.sent.push_back(Sent { seq, reached, at: now });
        } else if let Some(last) = self.sent.back_mut() {
            (last.seq, last.reached) = (seq, reached);
        }
    }

    /// The backup of `epoch` has the batches up to `received`, and its guest is at `executed`. The first acknowledgement says
    /// that it has loaded the guest. `lag` is told how long each batch took that it has executed since.
    pub fn acknowledged(
        &mut self,
        epoch: Epoch,
        received: u64,
        executed: u64,
        now: Duration,
        mut lag: impl FnMut(Duration),
    ) {
        if epoch != self.epoch {
            return;
        }
        self.acknowledged = self.acknowledged.max(received);
        if let State::Paired { follows_since } = &mut self.state {
            follows_since.get_or_insert(now);
        }
        let known = self.sent.partition_point(|sent| sent.seq <= received);
        if let Some(newest) = known.checked_sub(1).and_then(|index| self.sent.get(index)) {
            self.answered_sent_at = newest.at.max(self.answered_sent_at);
        }
        let is_done = |sent: &mut Sent| sent.seq <= received && sent.reached <= executed;
        while let Some(done) = self.sent.pop_front_if(is_done) {
            lag(now.saturating_sub(done.at));
        }
    }

    /// How long the backup's execution is behind: the age of the oldest batch that it is not known to have executed.
    pub fn lag(&self, now: Duration) -> Duration {
        match self.sent.front() {
            Some(oldest) if self.phase() == Phase::Paired => now.saturating_sub(oldest.at),
            _ => Duration::ZERO,
        }
    }

    /// Time since the newest batch or heartbeat that the backup has answered was *sent*: for so long, at most, it has heard
    /// nothing. `heartbeat_sent_at` is that of the newest answered heartbeat. Answers that lay in a buffer while this host
    /// was frozen do not count as fresh.
    fn silent_for(&self, heartbeat_sent_at: Option<Duration>, now: Duration) -> Duration {
        now.saturating_sub(heartbeat_sent_at.unwrap_or_default().max(self.answered_sent_at))
    }

    /// May this monitor let output go and touch the disk? Alone: yes. With a backup: while that has answered something
    /// recent, because until then it has not claimed the guest.
    pub fn may_act(&self, heartbeat_sent_at: Option<Duration>, now: Duration) -> bool {
        match self.state {
            State::Alone | State::Naming(_) | State::Named(_) | State::Unnaming => true,
            State::Paired { .. } => self.silent_for(heartbeat_sent_at, now) < self.timing.lease,
            _ => false,
        }
    }

    /// May an output leave that needs `needed`? Without a backup: yes. With one: once it is acknowledged, and while the lease
    /// holds, which is looked at for each: a host that was frozen must see by the clock that it may have been replaced. What
    /// was made in an earlier epoch was free to go before this backup came, whatever it had waited for until then.
    pub fn may_leave(&self, needed: Needed, heartbeat_sent_at: Option<Duration>, now: Duration) -> Leave {
        match self.state {
            State::Alone | State::Naming(_) | State::Named(_) | State::Unnaming => Leave::Yes,
            State::Paired { .. } if !self.is_acknowledged(needed) => Leave::NotYet,
            State::Paired { .. } if self.may_act(heartbeat_sent_at, now) => Leave::Yes,
            State::Paired { .. } => Leave::NoLease,
            State::Lost => Leave::Never,
            State::Closing | State::Claiming | State::ClaimFirst | State::CloseLast | State::Ended => {
                Leave::NotYet
            }
        }
    }

    fn is_acknowledged(&self, needed: Needed) -> bool {
        needed.epoch < self.epoch || needed.batch.is_some_and(|batch| batch <= self.acknowledged)
    }

    /// The newest batch of this epoch up to which all outputs have left: what the backup is told. `waiting` is the first
    /// output that has not.
    pub fn released(&self, waiting: Option<Needed>) -> u64 {
        match waiting {
            None => self.acknowledged,
            Some(Needed { epoch, .. }) if epoch < self.epoch => 0,
            Some(Needed { batch, .. }) => batch.unwrap_or_default().saturating_sub(1).min(self.acknowledged),
        }
    }

    /// Is the backup to be given up? What is sent to one that does not follow yet has to wait for that, and counts as
    /// sent then. `cut_off`: since the backup was heard nobody else was, either; then it may go first.
    pub fn look(&self, heartbeat_sent_at: Option<Duration>, cut_off: bool, now: Duration) -> Option<Loss> {
        let State::Paired { follows_since } = self.state else { return None };
        let patience = match follows_since {
            Some(_) => patience(self.timing.timeout, cut_off),
            None => self.timing.loading_timeout,
        };
        let silent = self.silent_for(heartbeat_sent_at, now);
        if silent > patience {
            return Some(Loss::Silent(silent));
        }
        let behind = now.saturating_sub(self.sent.front()?.at.max(follows_since?));
        (behind > self.timing.lag_limit).then_some(Loss::Behind(behind))
    }

    /// The backup of `epoch` is lost. False: there is none, or that was known.
    pub fn backup_lost(&mut self, epoch: Epoch, loss: Loss) -> bool {
        if self.phase() != Phase::Paired || epoch != self.epoch {
            return false;
        }
        self.state = match loss {
            Loss::Silent(_) | Loss::Link => State::Closing,
            Loss::Behind(_) | Loss::Dismissed => State::ClaimFirst,
        };
        true
    }

    /// The log is over, and the backup may take the guest: nothing may be let out any more. False: there is no backup,
    /// and nothing changes.
    pub fn end(&mut self) -> bool {
        let paired = self.phase() == Phase::Paired;
        if paired {
            self.state = State::Ended;
        }
        paired
    }

    /// The backup does not take the guest that was left to it: this monitor wants it back. Answers whether that can be.
    pub fn take_back(&mut self) -> bool {
        let ended = self.state == State::Ended;
        if ended {
            self.state = State::Claiming;
        }
        ended
    }

    /// What is to be done now.
    pub fn duty(&self) -> Duty {
        match self.state {
            State::Closing => Duty::Close { claimed: false },
            State::CloseLast => Duty::Close { claimed: true },
            State::Claiming | State::ClaimFirst | State::Unnaming => Duty::Claim { view: self.view + 1 },
            State::Lost => Duty::Stop,
            State::Alone | State::Naming(_) | State::Named(_) | State::Paired { .. } | State::Ended => {
                Duty::Nothing
            }
        }
    }

    /// The connection is closed, or was left to itself since something may still be under way.
    pub fn closed(&mut self) {
        self.state = match self.state {
            State::Closing => State::Claiming,
            State::CloseLast => State::Alone,
            other => other,
        };
    }

    /// The claim that is wanted.
    fn asks(&self) -> Option<Ask> {
        let view = self.view + 1;
        match self.state {
            State::Naming(backup) => Some(Ask { view, backup: Some(backup) }),
            State::Claiming | State::ClaimFirst | State::Unnaming => Some(Ask { view, backup: None }),
            _ => None,
        }
    }

    /// The arbiter's answer to `ask`, if that is still wanted. While it says nothing about a backup that is lost, nobody goes
    /// on: neither side can know that the other has not.
    pub fn claim_says(&mut self, ask: Ask, answer: Answer) {
        if self.asks() != Some(ask) {
            return;
        }
        if matches!(answer, Answer::Won | Answer::Otherwise) {
            self.view = ask.view;
        }
        self.state = match (self.state, answer) {
            (_, Answer::Lost) => State::Lost,
            (State::Naming(backup), Answer::Won) => State::Named(backup),
            // The one that is joining was told this view, and another one is named in it.
            (State::Naming(_), Answer::Otherwise) => State::Unnaming,
            (State::Claiming | State::Unnaming, Answer::Won) => State::Alone,
            (State::ClaimFirst, Answer::Won) => State::CloseLast,
            (other, _) => other,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKUP: Life = 7;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn timing() -> Timing {
        Timing { timeout: at(4), lease: at(3), loading_timeout: at(10), lag_limit: at(20) }
    }

    /// In view 1, with a backup since the start that has loaded the guest.
    fn paired() -> Primary {
        let mut primary = joined();
        primary.acknowledged(primary.epoch, 0, 0, at(0), drop);
        primary
    }

    /// The same with a backup that loads the guest.
    fn joined() -> Primary {
        let mut primary = Primary::new(0, timing());
        join(&mut primary, at(0));
        primary
    }

    fn join(primary: &mut Primary, now: Duration) {
        let ask = primary.name(BACKUP, primary.view() + 1).unwrap();
        primary.claim_says(ask, Answer::Won);
        primary.attach(now).unwrap();
    }

    /// The arbiter's answer to the claim of `view` without a backup.
    fn alone_in(primary: &mut Primary, view: u64, answer: Answer) {
        primary.claim_says(Ask { view, backup: None }, answer);
    }

    #[test]
    fn a_lease_counts_from_the_sending_of_what_was_answered() {
        let mut primary = paired();
        assert!(primary.may_act(None, at(2)) && !primary.may_act(None, at(3)));
        primary.sent(primary.epoch, 1, 5, at(2));
        assert!(!primary.may_act(None, at(3)), "nobody has answered it");
        primary.acknowledged(primary.epoch, 1, 0, at(4), drop);
        assert!(primary.may_act(None, at(4)) && !primary.may_act(None, at(5)));
        assert!(primary.may_act(Some(at(3)), at(5)) && !primary.may_act(Some(at(3)), at(6)));
    }

    #[test]
    fn a_backup_that_loads_is_given_more_time() {
        let mut primary = joined();
        assert_eq!(primary.attach(at(0)), Err(JoinError::NotRecorded));
        assert_eq!(primary.look(None, false, at(10)), None);
        assert_eq!(primary.look(None, false, at(11)), Some(Loss::Silent(at(11))));
        primary.acknowledged(primary.epoch, 0, 0, at(9), drop);
        assert_eq!(primary.look(Some(at(6)), false, at(10)), None);
        assert_eq!(primary.look(Some(at(6)), false, at(11)), Some(Loss::Silent(at(5))));
        assert_eq!(primary.look(Some(at(6)), true, at(14)), None, "nobody else is heard");
        assert_eq!(primary.look(Some(at(6)), true, at(15)), Some(Loss::Silent(at(9))));
    }

    #[test]
    fn a_silent_backup_is_closed_out_before_the_claim_and_a_slow_one_after_it() {
        let mut primary = paired();
        assert_eq!(primary.duty(), Duty::Nothing);
        assert!(
            primary.backup_lost(primary.epoch, Loss::Silent(at(5)))
                && !primary.backup_lost(primary.epoch, Loss::Link)
        );
        assert_eq!(primary.duty(), Duty::Close { claimed: false });
        alone_in(&mut primary, 2, Answer::Won);
        assert_eq!(
            (primary.duty(), primary.view()),
            (Duty::Close { claimed: false }, 1),
            "nothing was claimed"
        );
        primary.closed();
        assert_eq!(primary.duty(), Duty::Claim { view: 2 });
        alone_in(&mut primary, 2, Answer::Unknown);
        assert_eq!((primary.duty(), primary.phase()), (Duty::Claim { view: 2 }, Phase::Orphaned));
        alone_in(&mut primary, 2, Answer::Won);
        assert_eq!((primary.view(), primary.phase(), primary.may_act(None, at(99))), (2, Phase::Alone, true));
        join(&mut primary, at(99));
        assert!(primary.backup_lost(primary.epoch, Loss::Behind(at(21))));
        assert_eq!(primary.duty(), Duty::Claim { view: 4 });
        alone_in(&mut primary, 4, Answer::Won);
        assert_eq!((primary.duty(), primary.may_act(None, at(99))), (Duty::Close { claimed: true }, false));
        primary.closed();
        assert_eq!((primary.view(), primary.phase()), (4, Phase::Alone));
    }

    #[test]
    fn a_backup_gets_the_guest_in_a_view_whose_record_names_it() {
        let mut primary = Primary::new(4, timing());
        assert_eq!(primary.attach(at(0)), Err(JoinError::NotRecorded));
        assert_eq!(primary.name(BACKUP, 6), Err(JoinError::OtherView { told: 6, next: 5 }));
        let ask = primary.name(BACKUP, 5).unwrap();
        assert_eq!(ask, Ask { view: 5, backup: Some(BACKUP) });
        assert_eq!(primary.name(8, 5), Err(JoinError::NotAlone));
        primary.claim_says(ask, Answer::Unknown);
        // The backup has nothing to go on with, whatever the arbiter has.
        assert!(primary.may_act(None, at(99)) && primary.phase() == Phase::Alone && !primary.has_named());
        assert_eq!((primary.attach(at(0)), primary.duty()), (Err(JoinError::NotRecorded), Duty::Nothing));
        primary.claim_says(Ask { backup: Some(8), ..ask }, Answer::Won);
        assert!(!primary.has_named(), "the answer was to another claim");
        primary.claim_says(ask, Answer::Won);
        assert_eq!((primary.has_named(), primary.view(), primary.phase()), (true, 5, Phase::Alone));
        assert!(
            primary.may_act(None, at(99))
                && !primary.backup_lost(primary.epoch, Loss::Dismissed)
                && primary.has_named()
        );
        primary.attach(at(9)).unwrap();
        assert_eq!(
            (primary.view(), primary.phase(), primary.may_act(None, at(99))),
            (5, Phase::Paired, false)
        );
        primary.join_failed(BACKUP);
        assert_eq!((primary.phase(), primary.duty()), (Phase::Paired, Duty::Nothing), "it has come");
    }

    #[test]
    fn of_a_backup_that_does_not_come_no_record_is_left_behind() {
        // Whatever became of the claim that named it: not made, made and not told, made.
        for (answer, first, views) in [
            (Answer::Unknown, Answer::Won, 5),
            (Answer::Unknown, Answer::Otherwise, 6),
            (Answer::Won, Answer::Won, 6),
        ] {
            let mut primary = Primary::new(4, timing());
            let ask = primary.name(BACKUP, 5).unwrap();
            primary.claim_says(ask, answer);
            primary.join_failed(BACKUP);
            primary.claim_says(ask, Answer::Won);
            assert!(!primary.takes_backup() && !primary.has_named(), "nobody waits for that answer any more");
            assert_eq!((primary.attach(at(0)), primary.phase()), (Err(JoinError::NotRecorded), Phase::Alone));
            alone_in(&mut primary, ask.view + u64::from(answer == Answer::Won), first);
            if first == Answer::Otherwise {
                assert!(!primary.takes_backup() && primary.may_act(None, at(99)));
                alone_in(&mut primary, 6, Answer::Won);
            }
            assert_eq!(
                (primary.takes_backup(), primary.view(), primary.duty()),
                (true, views, Duty::Nothing)
            );
        }
    }

    #[test]
    fn a_view_in_which_another_backup_is_named_is_left_at_once() {
        let mut primary = Primary::new(4, timing());
        let ask = primary.name(BACKUP, 5).unwrap();
        primary.claim_says(ask, Answer::Otherwise);
        assert_eq!((primary.has_named(), primary.duty()), (false, Duty::Claim { view: 6 }));
        alone_in(&mut primary, 6, Answer::Won);
        assert_eq!((primary.view(), primary.takes_backup()), (6, true));
        let ask = primary.name(BACKUP, 7).unwrap();
        primary.claim_says(ask, Answer::Lost);
        assert!(primary.is_lost() && !primary.may_act(None, at(0)) && primary.duty() == Duty::Stop);
    }

    #[test]
    fn a_lost_claim_is_for_ever() {
        let mut primary = paired();
        primary.backup_lost(primary.epoch, Loss::Link);
        primary.closed();
        alone_in(&mut primary, 2, Answer::Lost);
        alone_in(&mut primary, 2, Answer::Won);
        primary.closed();
        assert_eq!((primary.duty(), primary.is_lost(), primary.view()), (Duty::Stop, true, 1));
        assert!(!primary.may_act(Some(at(0)), at(0)) && !primary.end());
        assert_eq!((primary.takes_backup(), primary.name(BACKUP, 2)), (false, Err(JoinError::NotAlone)));
    }

    #[test]
    fn an_ended_log_lets_nothing_out_until_it_is_taken_back() {
        let mut primary = paired();
        assert!(primary.may_act(None, at(0)) && primary.end());
        assert_eq!((primary.phase(), primary.duty()), (Phase::Orphaned, Duty::Nothing));
        assert!(!primary.may_act(None, at(0)) && !primary.backup_lost(primary.epoch, Loss::Link));
        assert!(primary.take_back() && !primary.take_back() && !primary.may_act(None, at(0)));
        assert_eq!(primary.duty(), Duty::Claim { view: 2 });
        alone_in(&mut primary, 2, Answer::Won);
        assert_eq!((primary.phase(), primary.view()), (Phase::Alone, 2));
        let mut alone = Primary::new(1, timing());
        assert!(!alone.end() && alone.may_act(None, at(0)));
    }

    #[test]
    fn a_backup_is_overdue_when_it_follows_and_stays_behind() {
        let mut primary = joined();
        primary.sent(primary.epoch, 1, 5, at(0));
        let look = |primary: &Primary, now| primary.look(Some(at(now)), false, at(now));
        assert_eq!(look(&primary, 30), None, "it has not loaded the guest yet");
        primary.acknowledged(primary.epoch, 0, 0, at(30), drop);
        assert_eq!(look(&primary, 50), None, "what was sent before is no older than that");
        primary.acknowledged(primary.epoch, 1, 3, at(50), drop);
        assert_eq!(look(&primary, 51), Some(Loss::Behind(at(21))), "it has received all and executed less");
        assert_eq!(primary.lag(at(51)), at(51));
        let mut lags = Vec::new();
        primary.acknowledged(primary.epoch, 1, 5, at(52), |lag| lags.push(lag));
        assert_eq!((look(&primary, 99), primary.lag(at(99)), lags), (None, at(0), vec![at(52)]));
    }

    #[test]
    fn the_age_of_the_oldest_batch_is_known_however_many_there_are() {
        let mut primary = paired();
        let last = BATCHES_REMEMBERED as u64 + 10;
        for batch in 1..=last {
            primary.sent(primary.epoch, batch, batch, at(batch));
        }
        assert_eq!((primary.sent.len(), primary.lag(at(last))), (BATCHES_REMEMBERED, at(last - 1)));
        primary.acknowledged(primary.epoch, last, last - 1, at(last), drop);
        assert!(primary.lag(at(last)) > at(0), "the last one is not executed");
        primary.acknowledged(primary.epoch, last, last, at(last), drop);
        assert_eq!(primary.lag(at(last)), at(0));
    }

    #[test]
    fn an_output_leaves_once_it_is_acknowledged_and_while_the_lease_holds() {
        let mut primary = paired();
        let needs = |primary: &Primary, batch| Needed { epoch: primary.epoch, batch };
        let leaves = |primary: &Primary, needed, now| primary.may_leave(needed, None, now);
        primary.sent(primary.epoch, 1, 5, at(2));
        assert_eq!(leaves(&primary, needs(&primary, Some(1)), at(2)), Leave::NotYet);
        primary.acknowledged(primary.epoch, 1, 0, at(2), drop);
        assert_eq!(leaves(&primary, needs(&primary, Some(1)), at(2)), Leave::Yes);
        assert_eq!(leaves(&primary, needs(&primary, Some(2)), at(2)), Leave::NotYet);
        assert_eq!(leaves(&primary, needs(&primary, Some(1)), at(5)), Leave::NoLease);
        let waits = needs(&primary, None);
        primary.backup_lost(primary.epoch, Loss::Link);
        assert_eq!(leaves(&primary, waits, at(2)), Leave::NotYet, "the claim is not decided");
        primary.closed();
        assert_eq!(leaves(&primary, needs(&primary, Some(1)), at(2)), Leave::NotYet);
        alone_in(&mut primary, 2, Answer::Won);
        assert_eq!(leaves(&primary, waits, at(99)), Leave::Yes);
        join(&mut primary, at(99));
        assert_eq!(leaves(&primary, waits, at(99)), Leave::Yes, "it was free to go before");
        assert_eq!(leaves(&primary, waits, at(199)), Leave::NoLease);
        primary.backup_lost(primary.epoch, Loss::Link);
        primary.closed();
        alone_in(&mut primary, 4, Answer::Lost);
        assert_eq!(leaves(&primary, waits, at(99)), Leave::Never);
    }

    #[test]
    fn nothing_of_an_earlier_connection_acts_on_the_next_one() {
        let mut primary = paired();
        let old = primary.epoch;
        primary.sent(old, 1, 5, at(1));
        primary.backup_lost(old, Loss::Link);
        primary.closed();
        alone_in(&mut primary, 2, Answer::Won);
        join(&mut primary, at(9));
        primary.sent(primary.epoch, 1, 6, at(9));
        let before = primary.clone();
        // Its acknowledgement, its loss, its batch, its join, each of them late.
        primary.acknowledged(old, 1, 6, at(9), drop);
        assert!(!primary.backup_lost(old, Loss::Link));
        primary.sent(old, 2, 9, at(9));
        primary.join_failed(BACKUP);
        assert_eq!(primary, before);
        let first = Needed { epoch: primary.epoch, batch: Some(1) };
        assert_eq!(primary.may_leave(first, Some(at(9)), at(9)), Leave::NotYet);
        assert_eq!(primary.released(Some(first)), 0);
        primary.acknowledged(primary.epoch, 1, 0, at(9), drop);
        assert_eq!(primary.may_leave(first, Some(at(9)), at(9)), Leave::Yes);
    }

    #[test]
    fn a_failed_join_of_another_is_none_of_this_one() {
        let mut primary = Primary::new(4, timing());
        primary.name(BACKUP, 5).unwrap();
        primary.join_failed(8);
        assert_eq!((primary.duty(), primary.refusal()), (Duty::Nothing, Some(ANOTHER_IS_JOINING)));
        primary.join_failed(BACKUP);
        assert_eq!(primary.duty(), Duty::Claim { view: 5 });
    }

    #[test]
    fn the_backup_is_told_up_to_where_all_has_left() {
        let mut primary = paired();
        let epoch = primary.epoch;
        primary.acknowledged(epoch, 5, 0, at(0), drop);
        assert_eq!(primary.released(None), 5);
        assert_eq!(primary.released(Some(Needed { epoch, batch: Some(3) })), 2);
        assert_eq!(primary.released(Some(Needed { epoch, batch: Some(9) })), 5);
        assert_eq!(primary.released(Some(Needed { epoch: Epoch(0), batch: None })), 0);
    }
}
