//! Clients with keys in common: each writes and reads registers in a closed loop and keeps the books for the checker.
//!
//! A client uses one TCP connection and never a second. A reply that is an error, to something else, or does not come
//! in time ends the client and is named; what it had asked for then has no known outcome. One thread for each.
//!
//! What they do is drawn from the seed; how the operations of several clients interleave is not.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::history::{History, OPERATIONS_PER_KEY, Op, Outcome, key_name};
use crate::lock;
use crate::pair::Random;

/// How long a reply may take: longer than any fault.
pub const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// Clients at work.
#[derive(Debug)]
pub struct Registers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    history: Mutex<History>,
    errors: Mutex<Vec<String>>,
    /// Number of the next operation; it says which key the clients are at.
    next: AtomicU64,
    stopping: AtomicBool,
    started: Instant,
}

impl Registers {
    /// Starts a client on each connection. Times in the books are since `started`.
    pub fn start(streams: Vec<TcpStream>, seed: u64, started: Instant) -> io::Result<Registers> {
        let shared = Arc::new(Shared {
            history: Mutex::default(),
            errors: Mutex::default(),
            next: AtomicU64::new(0),
            stopping: AtomicBool::new(false),
            started,
        });
        let mut threads = Vec::new();
        for (client, stream) in (1..).zip(streams) {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
            let shared = Arc::clone(&shared);
            let random = Random::new(seed.wrapping_add(u64::from(client) << 32));
            threads.push(thread::spawn(move || {
                if let Err(error) = work(client, stream, random, &shared) {
                    lock(&shared.errors).push(format!("client {client}: {error}"));
                }
            }));
        }
        Ok(Registers { shared, threads })
    }

    /// Number of operations that have been answered so far.
    pub fn answered(&self) -> usize {
        lock(&self.shared.history).answered()
    }

    /// What went wrong so far.
    pub fn errors(&self) -> Vec<String> {
        lock(&self.shared.errors).clone()
    }

    /// Lets each client end with the reply that it waits for. Returns the books and what went wrong.
    pub fn stop(mut self) -> (History, Vec<String>) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                lock(&self.shared.errors).push("a client's thread panicked".into());
            }
        }
        (lock(&self.shared.history).clone(), self.errors())
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
    }
}

fn work(client: u32, mut stream: TcpStream, mut random: Random, shared: &Shared) -> io::Result<()> {
    let mut replies = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while !shared.stopping.load(Ordering::Relaxed) {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        let key = number / OPERATIONS_PER_KEY;
        let (request, op) = if random.between(0, 1) == 0 {
            // A value is never written twice, so that a read says which write it saw.
            let value = format!("v{number}");
            (format!("PUT {number} {} {value}\n", key_name(key)), Op::Write(value))
        } else {
            (format!("GET {number} {}\n", key_name(key)), Op::Read)
        };
        let operation = lock(&shared.history).invoked(client, key, op.clone(), shared.started.elapsed());
        stream.write_all(request.as_bytes())?;
        line.clear();
        if replies.read_line(&mut line)? == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the service closed the connection"));
        }
        let at = shared.started.elapsed();
        let outcome = understand(line.trim_end_matches('\n'), number, &op).map_err(io::Error::other)?;
        lock(&shared.history).returned(operation, outcome, at);
    }
    Ok(())
}

/// What a reply says, if it is one to this request.
fn understand(line: &str, number: u64, op: &Op) -> Result<Outcome, String> {
    let unexpected = || format!("request {number} ({op:?}) was answered with '{line}'");
    let mut words = line.splitn(3, ' ');
    let (name, of) = (words.next(), words.next().and_then(|word| word.parse().ok()));
    if of != Some(number) {
        return Err(unexpected());
    }
    match (op, name, words.next()) {
        (Op::Write(_), Some("OK"), Some(_)) => Ok(Outcome::Written),
        (Op::Read, Some("VAL"), Some(value)) => Ok(Outcome::Value(Some(value.to_owned()))),
        (Op::Read, Some("NIL"), None) => Ok(Outcome::Value(None)),
        _ => Err(unexpected()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::TcpListener;

    use super::*;
    use crate::campaign::history::Verdict;

    /// More than any machine needs.
    const LONG: Duration = Duration::from_secs(60);

    /// Clients of a service that keeps its pairs in memory and passes each reply through `bend`.
    fn clients(bend: impl Fn(u64, String) -> String + Send + Sync + 'static) -> Registers {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let store = Arc::new(Mutex::new(BTreeMap::new()));
        let bend = Arc::new(bend);
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
            let (peer, _) = listener.accept().unwrap();
            let (store, bend) = (Arc::clone(&store), Arc::clone(&bend));
            thread::spawn(move || {
                let mut replies = peer.try_clone().unwrap();
                for line in BufReader::new(peer).lines() {
                    let Ok(line) = line else { return };
                    let words: Vec<&str> = line.split(' ').collect();
                    let mut store = lock(&store);
                    let reply = match words[..] {
                        ["PUT", number, key, value] => {
                            store.insert(key.to_owned(), value.to_owned());
                            format!("OK {number} 1")
                        }
                        ["GET", number, key] => match store.get(key) {
                            Some(value) => format!("VAL {number} {value}"),
                            None => format!("NIL {number}"),
                        },
                        _ => panic!("{line}"),
                    };
                    drop(store);
                    if writeln!(replies, "{}", bend(words[1].parse().unwrap(), reply)).is_err() {
                        return;
                    }
                }
            });
        }
        Registers::start(streams, 1, Instant::now()).unwrap()
    }

    fn wait_for(registers: &Registers, done: impl Fn(&Registers) -> bool) {
        let deadline = Instant::now() + LONG;
        while !done(registers) {
            assert!(Instant::now() < deadline, "{:?}", registers.errors());
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn an_honest_service_gives_a_linearizable_history() {
        let registers = clients(|_, reply| reply);
        wait_for(&registers, |registers| registers.answered() >= 1_000);
        let (history, errors) = registers.stop();
        assert_eq!(errors, [""; 0]);
        assert_eq!(history.check(), Verdict::Linearizable);
        assert!(history.operations().iter().all(|operation| operation.returned.is_some()));
    }

    #[test]
    fn a_service_that_shows_an_old_value_is_found_out() {
        let registers = clients(|number, reply| match reply.starts_with("VAL") {
            true if number > 500 => format!("NIL {number}"),
            _ => reply,
        });
        wait_for(&registers, |registers| registers.answered() >= 1_000);
        let (history, errors) = registers.stop();
        assert_eq!(errors, [""; 0]);
        assert!(matches!(history.check(), Verdict::Violated { .. }));
    }

    #[test]
    fn wrong_replies_end_a_client_and_are_named() {
        let registers = clients(|number, reply| match number {
            100 => "ERR 100 disk full".into(),
            _ => reply,
        });
        wait_for(&registers, |registers| !registers.errors().is_empty());
        let (history, errors) = registers.stop();
        assert!(errors.len() == 1 && errors[0].contains("disk full"), "{errors:?}");
        assert_eq!(history.operations().iter().filter(|operation| operation.returned.is_none()).count(), 1);
        assert_eq!(history.check(), Verdict::Linearizable, "its last operation may or may not have happened");
    }

    #[test]
    fn replies_must_be_to_the_request() {
        let write = Op::Write("x".into());
        assert_eq!(understand("OK 7 3", 7, &write), Ok(Outcome::Written));
        assert_eq!(understand("NIL 7", 7, &Op::Read), Ok(Outcome::Value(None)));
        for (line, op) in [("OK 8 3", &write), ("OK 7", &write), ("VAL 7 x", &write), ("OK 7 3", &Op::Read)] {
            assert!(understand(line, 7, op).is_err(), "{line}");
        }
    }
}
