//! The books of a client: which requests were sent, what their replies must be, and what came.
//!
//! No I/O and no clock: times come in. Request `n` is entry `n - 1` of the list.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Report, Sample};

/// What the reply to a request must say.
#[derive(Debug)]
pub(super) enum Expected {
    /// That this write is on the disk.
    Written { key: String, value: String },
    /// This value.
    Value(String),
}

#[derive(Debug)]
struct Entry {
    expected: Expected,
    sent: Duration,
    replied: Option<Duration>,
    acknowledged: bool,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Replies {
    entries: Vec<Entry>,
    answered: usize,
    /// Number of the latest request that was answered.
    latest: u64,
    repeated: Vec<u64>,
    out_of_order: Vec<u64>,
    wrong: Vec<String>,
    sole_writer: bool,
    /// The service's total number of writes, from its last reply to a PUT.
    total_writes: Option<u64>,
}

impl Replies {
    pub(super) fn new(sole_writer: bool) -> Replies {
        Replies {
            entries: Vec::new(),
            answered: 0,
            latest: 0,
            repeated: Vec::new(),
            out_of_order: Vec::new(),
            wrong: Vec::new(),
            sole_writer,
            total_writes: None,
        }
    }

    /// Number of requests that have been answered.
    pub(super) fn answered(&self) -> usize {
        self.answered
    }

    /// Number of requests that have not.
    pub(super) fn outstanding(&self) -> usize {
        self.entries.len() - self.answered
    }

    /// When the first of the unanswered requests was sent.
    pub(super) fn oldest_unanswered(&self) -> Option<Duration> {
        // They are at the end, but for replies out of order.
        let outstanding = self.outstanding();
        let recent = self.entries.iter().rev().filter(|entry| entry.replied.is_none());
        recent.take(outstanding).last().map(|entry| entry.sent)
    }

    /// The next request goes out.
    pub(super) fn sent(&mut self, expected: Expected, now: Duration) {
        self.entries.push(Entry { expected, sent: now, replied: None, acknowledged: false });
    }

    /// A reply came in.
    pub(super) fn received(&mut self, line: &str, now: Duration) {
        let mut words = line.splitn(3, ' ');
        let (name, number, rest) = (words.next(), words.next(), words.next().unwrap_or_default());
        let number: u64 = number.and_then(|word| word.parse().ok()).unwrap_or_default();
        let index = usize::try_from(number).unwrap_or_default().checked_sub(1);
        let Some(entry) = index.and_then(|index| self.entries.get_mut(index)) else {
            return self.wrong.push(format!("a reply to no request: {line}"));
        };
        if entry.replied.is_some() {
            return self.repeated.push(number);
        }
        entry.replied = Some(now);
        self.answered += 1;
        if number < self.latest {
            self.out_of_order.push(number);
        }
        self.latest = self.latest.max(number);

        let right = match &entry.expected {
            Expected::Value(value) => name == Some("VAL") && rest == value,
            Expected::Written { .. } => match rest.parse::<u64>() {
                Ok(total) if name == Some("OK") => {
                    entry.acknowledged = true;
                    let before = self.total_writes.replace(total);
                    !self.sole_writer || before.is_none_or(|before| total == before + 1)
                }
                _ => false,
            },
        };
        if !right {
            self.wrong.push(format!("{line} (expected: {:?})", entry.expected));
        }
    }

    /// The result; `broken` says why the connection broke, if it did.
    pub(super) fn report(&self, broken: Option<String>) -> Report {
        let mut replied: Vec<Duration> = self.entries.iter().filter_map(|entry| entry.replied).collect();
        replied.sort_unstable();
        let mut latencies: Vec<Duration> =
            self.entries.iter().filter_map(|entry| Some(entry.replied?.saturating_sub(entry.sent))).collect();
        latencies.sort_unstable();
        let blackout = replied.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default();
        let busy = match (self.entries.first(), replied.last()) {
            (Some(first), Some(last)) => (*last - first.sent).as_secs_f64(),
            _ => 0.0,
        };
        let mut report = Report {
            samples: Vec::with_capacity(self.entries.len()),
            lost: Vec::new(),
            repeated: self.repeated.clone(),
            out_of_order: self.out_of_order.clone(),
            wrong: self.wrong.clone(),
            broken,
            blackout_ms: milliseconds(blackout),
            p50_ms: milliseconds(percentile(&latencies, 50)),
            p99_ms: milliseconds(percentile(&latencies, 99)),
            replies_per_s: if busy > 0.0 { replied.len() as f64 / busy } else { 0.0 },
            acknowledged: BTreeMap::new(),
            unacknowledged: BTreeMap::new(),
        };
        for (number, entry) in (1..).zip(&self.entries) {
            report.samples.push(Sample { number, sent: entry.sent, replied: entry.replied });
            if entry.replied.is_none() {
                report.lost.push(number);
            }
            if let Expected::Written { key, value } = &entry.expected {
                if entry.acknowledged {
                    report.acknowledged.insert(key.clone(), value.clone());
                    report.unacknowledged.remove(key);
                } else {
                    report.unacknowledged.insert(key.clone(), value.clone());
                }
            }
        }
        report
    }
}

/// Nearest rank; zero for no values.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or_default()
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// After the last request.
    const LATER: Duration = Duration::from_millis(100);

    /// Five PUTs sent at 0, 10, 20, 30, 40 ms.
    fn five_puts() -> Replies {
        let mut replies = Replies::new(true);
        for n in 1..=5 {
            let expected = Expected::Written { key: format!("k{}", n % 2), value: format!("v{n}") };
            replies.sent(expected, 10 * (n - 1) * MS);
        }
        replies
    }

    #[test]
    fn clean_run_is_clean() {
        let mut replies = five_puts();
        for n in 1..=5 {
            let late = if n == 5 { 100 } else { 0 };
            replies.received(&format!("OK {n} {}", n + 7), (10 * n + late) * MS);
        }
        let report = replies.report(None);
        assert!(report.is_clean(), "{}", report.summary());
        assert_eq!(report.blackout_ms, 110.0);
        assert_eq!((report.p50_ms, report.p99_ms), (10.0, 110.0));
        assert_eq!(report.replies_per_s.round(), 33.0);
        assert_eq!(report.acknowledged["k1"], "v5");
    }

    #[test]
    fn lost_repeated_and_late_replies_are_found() {
        let mut replies = five_puts();
        replies.received("OK 1 1", LATER);
        replies.received("OK 1 1", LATER);
        replies.received("OK 3 2", LATER);
        replies.received("OK 2 3", LATER);
        replies.received("OK 5 4", LATER);
        replies.received("OK 6 5", LATER);
        let report = replies.report(None);
        assert_eq!(report.repeated, [1]);
        assert_eq!(report.out_of_order, [2]);
        assert_eq!(report.lost, [4]);
        assert_eq!(report.wrong.len(), 1, "{:?}", report.wrong);
        assert!(!report.is_clean());
    }

    #[test]
    fn write_done_twice_shows_in_the_total() {
        let mut replies = five_puts();
        replies.received("OK 1 1", LATER);
        replies.received("OK 2 3", LATER);
        assert_eq!(replies.report(None).wrong.len(), 1);
    }

    #[test]
    fn error_and_old_value_are_wrong() {
        let mut replies = five_puts();
        replies.sent(Expected::Value("v5".into()), 50 * MS);
        replies.received("ERR 1 disk full", LATER);
        replies.received("VAL 6 v3", LATER);
        assert_eq!(replies.report(None).wrong.len(), 2);
    }

    #[test]
    fn only_acknowledged_writes_must_be_stored() {
        let mut replies = five_puts();
        for n in 1..=3 {
            replies.received(&format!("OK {n} {n}"), LATER);
        }
        let report = replies.report(Some("cut".into()));
        let stored = |pairs: [(&str, &str); 2]| pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        assert!(report.missing_from(&stored([("k0", "v2"), ("k1", "v3")])).is_empty());
        assert!(
            report.missing_from(&stored([("k0", "v4"), ("k1", "v5")])).is_empty(),
            "done, not acknowledged"
        );
        assert_eq!(
            report.missing_from(&stored([("k0", "v2"), ("k1", "v1")])).len(),
            1,
            "v3 was acknowledged"
        );
    }
}
