//! What heartbeats tell: to a primary, when its backup last heard it; to a backup, how long its primary is silent.
//!
//! Owns: numbers and times of questions and answers. Must never: decide that the other side is lost.
//!
//! A primary's lease counts from when an answered question was *sent*: the backup heard it no earlier, and counts its
//! patience from then.

use std::collections::VecDeque;
use std::time::Duration;

/// Questions whose answers are still waited for; older ones would say nothing new.
const MAX_UNANSWERED: usize = 1_024;

/// A primary's heartbeats and their answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Questions {
    counter: u64,
    /// Number and time of sending.
    unanswered: VecDeque<(u64, Duration)>,
    answered_sent_at: Option<Duration>,
}

impl Questions {
    /// A question is sent now. Answers its number; numbers never come again.
    pub fn ask(&mut self, now: Duration) -> u64 {
        self.counter += 1;
        self.unanswered.push_back((self.counter, now));
        if self.unanswered.len() > MAX_UNANSWERED {
            self.unanswered.pop_front();
        }
        self.counter
    }

    /// Takes an answer. False: it tells nothing new.
    pub fn answer(&mut self, counter: u64) -> bool {
        let Ok(answered) = self.unanswered.binary_search_by_key(&counter, |(sent, _)| *sent) else {
            return false;
        };
        self.answered_sent_at = Some(self.unanswered[answered].1);
        self.unanswered.drain(..=answered);
        true
    }

    /// What was answered so far was by another peer.
    pub fn forget(&mut self) {
        self.unanswered.clear();
        self.answered_sent_at = None;
    }

    /// When the newest question that has an answer was sent.
    pub fn answered_sent_at(&self) -> Option<Duration> {
        self.answered_sent_at
    }
}

/// What a backup has heard.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hearing {
    /// Of the newest question.
    counter: u64,
    heard_at: Duration,
}

impl Hearing {
    /// Nothing yet; patience begins now.
    pub fn new(now: Duration) -> Self {
        Self { counter: 0, heard_at: now }
    }

    /// Takes a question. False: it tells nothing new.
    pub fn hear(&mut self, counter: u64, now: Duration) -> bool {
        if counter <= self.counter {
            return false;
        }
        self.counter = counter;
        self.heard_at = now;
        true
    }

    /// Something else came that shows the other side alive.
    pub fn note(&mut self, now: Duration) {
        self.heard_at = now;
    }

    /// The next question is another primary's.
    pub fn forget(&mut self) {
        self.counter = 0;
    }

    /// The newest question, for an answer.
    pub fn counter(&self) -> u64 {
        self.counter
    }

    /// When something was heard last.
    pub fn heard_at(&self) -> Duration {
        self.heard_at
    }

    /// For how long nothing was heard.
    pub fn silent_for(&self, now: Duration) -> Duration {
        now.saturating_sub(self.heard_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_of_a_silent_peer_is_bounded() {
        let mut questions = Questions::default();
        for second in 0..2 * MAX_UNANSWERED as u64 {
            questions.ask(Duration::from_secs(second));
        }
        assert_eq!(questions.unanswered.len(), MAX_UNANSWERED);
    }
}
