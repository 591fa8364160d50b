//! Whether a host whose peer is silent hears any other host of its configuration.
//!
//! Owns: the questions to them, and what an answer says. Must never: do I/O, look at a clock, or decide anything.
//!
//! Two sides that do not hear each other cannot both go on, and either may win the claim. A side that hears nobody at all is
//! most likely the one that is cut off, so it lets the other go first (`protocol/mod.rs`, `patience`). An answer that is
//! forged or old costs nothing but that advantage.
//!
//! ```text
//!   peer heard ── silent for a few heartbeats ──> asking ─┬─ answered ──> not cut off
//!        ^                                                └─ not ───────> cut off
//!        └───────────────── heard again ─────────────────────┘
//! ```

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ft_log::{Probe, ProbeKind, SealKey};

use crate::pair::protocol::Questions;

/// The other hosts of the configuration.
#[derive(Debug)]
pub(super) struct Others {
    hosts: Vec<SocketAddr>,
    key: SealKey,
    /// Of this life, so that answers to an earlier one do not count.
    base: u64,
    asked: Questions,
}

/// What a probe leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Probed {
    /// It is another guest's, or nobody with the key has made it.
    Foreign,
    /// It answers a question.
    Noted,
    /// It asks one; this goes back.
    Answer(Vec<u8>),
}

impl Others {
    /// The configuration has `hosts`, this one not among them, which have `key`. `base` is another one in each life.
    pub(super) fn new(hosts: Vec<SocketAddr>, key: SealKey, base: u64) -> Self {
        Self { hosts, key, base, asked: Questions::default() }
    }

    /// All but the peer, if one is expected at all.
    fn third(&self, peer: Option<IpAddr>) -> impl Iterator<Item = SocketAddr> {
        self.hosts.iter().copied().filter(move |host| peer.is_some_and(|peer| peer != host.ip()))
    }

    /// The next question about `guest`, and whom it is for, while `peer` is silent.
    pub(super) fn ask(
        &mut self,
        guest: u64,
        peer: Option<IpAddr>,
        now: Duration,
    ) -> Option<(Vec<u8>, Vec<SocketAddr>)> {
        let hosts: Vec<SocketAddr> = self.third(peer).collect();
        if hosts.is_empty() {
            return None;
        }
        let number = self.base.wrapping_add(self.asked.ask(now));
        Some((Probe { guest, number, kind: ProbeKind::Question }.encode(&self.key), hosts))
    }

    /// Takes in a probe.
    pub(super) fn take(&mut self, datagram: &[u8], guest: u64) -> Probed {
        match Probe::decode(datagram, &self.key).filter(|probe| probe.guest == guest) {
            None => Probed::Foreign,
            Some(Probe { number, kind: ProbeKind::Answer, .. }) => {
                // Of several hosts the first to answer a question says enough.
                self.asked.answer(number.wrapping_sub(self.base));
                Probed::Noted
            }
            Some(question) => Probed::Answer(Probe { kind: ProbeKind::Answer, ..question }.encode(&self.key)),
        }
    }

    /// Has nobody answered a question that was asked since `peer` was heard at `heard_at`, although there is somebody?
    pub(super) fn are_silent(&self, peer: Option<IpAddr>, heard_at: Duration) -> bool {
        let answered = self.asked.answered_sent_at().is_some_and(|sent_at| sent_at >= heard_at);
        !answered && self.third(peer).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: u64 = 7;

    fn key() -> SealKey {
        ft_log::Key::new([7; 32]).seal_key("probe", &[])
    }

    fn hosts(numbers: &[u8]) -> Vec<SocketAddr> {
        numbers.iter().map(|number| SocketAddr::from(([192, 0, 2, *number], 7_700))).collect()
    }

    fn others(numbers: &[u8]) -> Others {
        Others::new(hosts(numbers), key(), u64::MAX)
    }

    fn peer(number: u8) -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, number]))
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn answer_to(question: &[u8]) -> Vec<u8> {
        match others(&[1]).take(question, GUEST) {
            Probed::Answer(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_host_is_cut_off_until_somebody_but_the_peer_answers() {
        let mut asking = others(&[2, 3]);
        assert!(asking.are_silent(peer(2), at(10)));
        let (question, asked) = asking.ask(GUEST, peer(2), at(11)).unwrap();
        assert_eq!(asked, hosts(&[3]), "the peer is silent anyway");
        assert!(asking.are_silent(peer(2), at(10)));
        let answer = answer_to(&question);
        assert_eq!(asking.take(&answer, GUEST), Probed::Noted);
        assert!(!asking.are_silent(peer(2), at(10)));
        assert!(asking.are_silent(peer(2), at(12)), "the peer was heard since, and is silent again");
        assert_eq!(asking.take(&answer, GUEST), Probed::Noted);
        assert!(asking.are_silent(peer(2), at(12)), "an old answer");
    }

    #[test]
    fn without_a_third_host_nobody_is_cut_off() {
        for (known, peer) in [(&[2][..], peer(2)), (&[], peer(2)), (&[2, 3], None)] {
            let mut others = others(known);
            assert!(!others.are_silent(peer, at(10)));
            assert_eq!(others.ask(GUEST, peer, at(11)), None);
        }
    }

    #[test]
    fn what_is_foreign_or_of_another_life_counts_for_nothing() {
        let mut earlier = Others::new(hosts(&[2, 3]), key(), 1);
        let (old, _) = earlier.ask(GUEST, peer(2), at(1)).unwrap();
        let mut asking = others(&[2, 3]);
        let (question, _) = asking.ask(GUEST, peer(2), at(11)).unwrap();
        asking.take(&answer_to(&old), GUEST);
        assert!(asking.are_silent(peer(2), at(10)));
        assert_eq!(asking.take(&question, GUEST + 1), Probed::Foreign);
        let mut changed = question;
        changed[20] ^= 1;
        assert_eq!(asking.take(&changed, GUEST), Probed::Foreign);
        let mut elsewhere = Others::new(hosts(&[1]), SealKey::without_secret("probe", &[]), 0);
        let (open, _) = elsewhere.ask(GUEST, peer(9), at(1)).unwrap();
        assert_eq!(asking.take(&open, GUEST), Probed::Foreign);
    }
}
