//! What clients with keys in common did and saw, and whether that history is linearizable.
//!
//! The checker is stateright's `LinearizabilityTester`, with a register for each key: registers are independent, so a
//! history is linearizable if it is so for each key. Its cost grows exponentially with the operations that run at the
//! same time, so a key takes part in few operations ([`OPERATIONS_PER_KEY`]) before clients go on to the next.
//!
//! An operation whose reply never came may have happened, or not, or may happen later. It ends its client's history.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc::channel;
use std::time::Duration;

use stateright::semantics::register::{Register, RegisterOp, RegisterRet};
use stateright::semantics::{ConsistencyTester, LinearizabilityTester};

/// Operations of all clients on a key.
pub const OPERATIONS_PER_KEY: u64 = 24;

/// The client of the reads that [`History::add_final_state`] adds.
const LAST_READER: u32 = u32::MAX;
/// How long one key may take.
const KEY_TIMEOUT: Duration = Duration::from_secs(60);

/// What a client asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Set the key to this value.
    Write(String),
    /// Tell the value.
    Read,
}

/// What a client was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The write is done.
    Written,
    /// The value, if the key has one.
    Value(Option<String>),
}

/// One operation. Times are since the campaign's start, all by one clock.
#[derive(Debug, Clone)]
pub struct Operation {
    /// Who.
    pub client: u32,
    /// On which key.
    pub key: u64,
    /// What.
    pub op: Op,
    /// When it was sent.
    pub invoked: Duration,
    /// When its reply was there, and what it said; `None` if it never came.
    pub returned: Option<(Duration, Outcome)>,
}

/// What the checker says of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// There is an order of all operations that explains all replies.
    Linearizable,
    /// There is none for this key.
    Violated {
        /// Its number.
        key: u64,
        /// Its operations, for people.
        operations: Vec<String>,
    },
    /// The checker did not come to an end with this key.
    Undecided {
        /// Its number.
        key: u64,
    },
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Linearizable => write!(f, "yes"),
            Verdict::Violated { key, operations } => {
                write!(f, "NO, key {}:", key_name(*key))?;
                operations.iter().try_for_each(|operation| write!(f, "\n  {operation}"))
            }
            Verdict::Undecided { key } => {
                write!(f, "UNDECIDED for key {} within {KEY_TIMEOUT:?}", key_name(*key))
            }
        }
    }
}

/// Name of a key in the service.
pub fn key_name(key: u64) -> String {
    format!("register{key}")
}

/// All operations of all clients.
#[derive(Debug, Clone, Default)]
pub struct History {
    operations: Vec<Operation>,
    answered: usize,
}

impl History {
    /// An operation begins. Returns its number, for [`History::returned`].
    pub fn invoked(&mut self, client: u32, key: u64, op: Op, at: Duration) -> usize {
        self.operations.push(Operation { client, key, op, invoked: at, returned: None });
        self.operations.len() - 1
    }

    /// Its reply has come.
    pub fn returned(&mut self, operation: usize, outcome: Outcome, at: Duration) {
        self.operations[operation].returned = Some((at, outcome));
        self.answered += 1;
    }

    /// How many replies have come.
    pub fn answered(&self) -> usize {
        self.answered
    }

    /// All of them, in the order in which they began.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// What the service had stored in the end, asked between these times, is one more read of each key. So a write
    /// that was acknowledged and then lost is found though nobody read it again.
    pub fn add_final_state(&mut self, stored: &BTreeMap<String, String>, asked: Duration, told: Duration) {
        let mut keys: Vec<u64> = self.operations.iter().map(|operation| operation.key).collect();
        keys.sort_unstable();
        keys.dedup();
        for key in keys {
            let read = self.invoked(LAST_READER, key, Op::Read, asked);
            self.returned(read, Outcome::Value(stored.get(&key_name(key)).cloned()), told);
        }
    }

    /// Checks each key; the first that is not in order is the verdict.
    pub fn check(&self) -> Verdict {
        let mut by_key: BTreeMap<u64, Vec<&Operation>> = BTreeMap::new();
        for operation in &self.operations {
            by_key.entry(operation.key).or_default().push(operation);
        }
        for (key, operations) in by_key {
            match is_linearizable(&operations) {
                Some(true) => {}
                Some(false) => {
                    let operations = operations.iter().map(|operation| describe(operation)).collect();
                    return Verdict::Violated { key, operations };
                }
                None => return Verdict::Undecided { key },
            }
        }
        Verdict::Linearizable
    }
}

/// `None`: the checker takes too long.
fn is_linearizable(operations: &[&Operation]) -> Option<bool> {
    let tester = feed(operations);
    let (answer_in, answer) = channel();
    // One that takes too long goes on until the process ends; its verdict ends the campaign.
    std::thread::spawn(move || {
        let _ = answer_in.send(tester.is_consistent());
    });
    // A checker that panicked has not said that all is well.
    answer.recv_timeout(KEY_TIMEOUT).ok()
}

type Tester = LinearizabilityTester<u32, Register<Option<String>>>;

/// Gives the checker what happened in the order of time. Of events at the same time, beginnings come first: then the
/// operations count as simultaneous, which allows more orders and never fewer.
fn feed(operations: &[&Operation]) -> Tester {
    let begins = operations.iter().map(|operation| (operation.invoked, false, *operation));
    let ends =
        operations.iter().filter_map(|operation| Some((operation.returned.as_ref()?.0, true, *operation)));
    let mut events: Vec<(Duration, bool, &Operation)> = begins.chain(ends).collect();
    events.sort_by_key(|(at, is_end, _)| (*at, *is_end));
    let mut tester = Tester::new(Register(None));
    for (_, is_end, operation) in events {
        let told = if is_end {
            let outcome = operation.returned.as_ref().map(|(_, outcome)| outcome.clone());
            tester.on_return(
                operation.client,
                match outcome {
                    Some(Outcome::Value(value)) => RegisterRet::ReadOk(value),
                    Some(Outcome::Written) | None => RegisterRet::WriteOk,
                },
            )
        } else {
            tester.on_invoke(
                operation.client,
                match &operation.op {
                    Op::Write(value) => RegisterOp::Write(Some(value.clone())),
                    Op::Read => RegisterOp::Read,
                },
            )
        };
        if told.is_err() {
            // A client that did two things at once: the checker takes the history as one that never holds.
            return tester;
        }
    }
    tester
}

fn describe(operation: &Operation) -> String {
    let what = match &operation.op {
        Op::Write(value) => format!("write {value}"),
        Op::Read => "read".to_owned(),
    };
    let (until, outcome) = match &operation.returned {
        None => ("never".to_owned(), "unknown".to_owned()),
        Some((at, Outcome::Written)) => (format!("{:.6}", at.as_secs_f64()), "done".to_owned()),
        Some((at, Outcome::Value(value))) => {
            (format!("{:.6}", at.as_secs_f64()), value.as_deref().unwrap_or("nothing").to_owned())
        }
    };
    format!(
        "{:.6} to {until} s, client {}: {what}: {outcome}",
        operation.invoked.as_secs_f64(),
        operation.client
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::Random;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn write(history: &mut History, client: u32, value: &str, from: u64, to: Option<u64>) {
        let operation = history.invoked(client, 0, Op::Write(value.into()), ms(from));
        if let Some(to) = to {
            history.returned(operation, Outcome::Written, ms(to));
        }
    }

    fn read(history: &mut History, client: u32, value: Option<&str>, from: u64, to: u64) {
        let operation = history.invoked(client, 0, Op::Read, ms(from));
        history.returned(operation, Outcome::Value(value.map(Into::into)), ms(to));
    }

    #[test]
    fn a_history_in_order_is_accepted() {
        let mut history = History::default();
        read(&mut history, 1, None, 0, 1);
        write(&mut history, 1, "a", 2, Some(10));
        // While it is written, both values may be seen.
        read(&mut history, 2, None, 3, 4);
        read(&mut history, 3, Some("a"), 5, 6);
        write(&mut history, 2, "b", 11, Some(12));
        read(&mut history, 3, Some("b"), 13, 14);
        assert_eq!(history.check(), Verdict::Linearizable);
    }

    #[test]
    fn a_stale_read_is_refused() {
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(1));
        write(&mut history, 1, "b", 2, Some(3));
        read(&mut history, 2, Some("a"), 4, 5);
        assert!(matches!(history.check(), Verdict::Violated { key: 0, .. }));
    }

    #[test]
    fn a_value_that_goes_back_is_refused() {
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(10));
        read(&mut history, 2, Some("a"), 1, 2);
        read(&mut history, 3, None, 3, 4);
        assert!(matches!(history.check(), Verdict::Violated { .. }));
    }

    #[test]
    fn a_lost_write_is_refused_by_what_is_stored_in_the_end() {
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(1));
        write(&mut history, 1, "b", 2, Some(3));
        let stored = |value: &str| BTreeMap::from([(key_name(0), value.to_owned())]);
        let with = |stored: &BTreeMap<String, String>| {
            let mut history = history.clone();
            history.add_final_state(stored, ms(5), ms(6));
            history.check()
        };
        assert_eq!(with(&stored("b")), Verdict::Linearizable);
        assert!(matches!(with(&stored("a")), Verdict::Violated { .. }));
        assert!(matches!(with(&BTreeMap::new()), Verdict::Violated { .. }));
    }

    #[test]
    fn a_write_without_a_reply_may_or_may_not_have_happened() {
        for value in [Some("a"), Some("b")] {
            let mut history = History::default();
            write(&mut history, 1, "a", 0, Some(1));
            write(&mut history, 2, "b", 2, None);
            read(&mut history, 1, value, 3, 4);
            assert_eq!(history.check(), Verdict::Linearizable, "{value:?}");
        }
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(1));
        write(&mut history, 2, "b", 2, None);
        read(&mut history, 1, Some("b"), 3, 4);
        read(&mut history, 1, Some("a"), 5, 6);
        assert!(matches!(history.check(), Verdict::Violated { .. }), "once it is seen, it has happened");
    }

    #[test]
    fn keys_are_checked_each_for_itself() {
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(1));
        let other = history.invoked(2, 1, Op::Read, ms(2));
        history.returned(other, Outcome::Value(Some("a".into())), ms(3));
        assert!(matches!(history.check(), Verdict::Violated { key: 1, .. }), "that key has no such value");
    }

    /// A client cannot do two things at once: if the books say so, they are wrong, and nothing is proved.
    #[test]
    fn impossible_books_are_refused() {
        let mut history = History::default();
        write(&mut history, 1, "a", 0, Some(10));
        write(&mut history, 1, "b", 5, Some(15));
        assert!(matches!(history.check(), Verdict::Violated { .. }));
    }

    /// The worst that a key can be: all clients at work all the time, and one read wrong at the very end.
    #[test]
    fn a_full_key_is_decided_in_time() {
        let mut random = Random::new(1);
        let mut history = History::default();
        let (mut value, mut free_at) = (None, [0; 3]);
        for number in 0..OPERATIONS_PER_KEY {
            // Operation `number` takes effect at 10 * number, some time between its begin and its end.
            let client = (number % 3) as usize;
            let (begin, end) = (free_at[client], 10 * number + random.between(1, 25));
            free_at[client] = end + 1;
            let begin = begin.max((10 * number).saturating_sub(25));
            if random.between(0, 1) == 0 {
                value = Some(format!("v{number}"));
                write(&mut history, client as u32, &format!("v{number}"), begin, Some(end));
            } else {
                read(&mut history, client as u32, value.as_deref(), begin, end);
            }
        }
        let end = 10 * OPERATIONS_PER_KEY + 100;
        let mut good = history.clone();
        read(&mut good, LAST_READER, value.as_deref(), end, end + 1);
        assert_eq!(good.check(), Verdict::Linearizable);
        read(&mut history, LAST_READER, Some("v0"), end, end + 1);
        assert!(matches!(history.check(), Verdict::Violated { .. }));
    }
}
