//! A client of the demo service that watches for lost, repeated and misplaced replies and measures the gaps.
//!
//! It uses one TCP connection and never connects again: to a client a takeover is a pause, so a connection that
//! breaks is a failure, which the [`Report`] names. Two threads: one sends requests, one reads replies.
//!
//! Requests carry numbers 1, 2, 3, ... and the service answers a connection's requests in order, so each reply is
//! known beforehand, but for the total number of writes in replies to PUT: with no other writer
//! ([`Config::sole_writer`]) that number must grow by one each time, else a write was done twice or forgotten.

mod replies;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use replies::{Expected, Replies};

/// What to send, and how fast.
#[derive(Debug, Clone)]
pub struct Config {
    /// Requests that may be unanswered at a time; 1 makes a closed loop.
    pub window: usize,
    /// Time from one request to the next, if the window allows; zero for as fast as possible.
    pub interval: Duration,
    /// Every so many requests are a GET of the key written last; 0 for none. The others are PUTs.
    pub get_every: u64,
    /// Number of different keys.
    pub keys: u64,
    /// Bytes in a value.
    pub value_len: usize,
    /// Put before each key, so that clients do not share keys.
    pub key_prefix: String,
    /// Nobody else writes: the total number of writes must grow by one with each PUT.
    pub sole_writer: bool,
    /// How long a reply may take before the connection counts as broken; noticed after at most twice that time.
    pub reply_timeout: Duration,
}

impl Default for Config {
    /// A closed loop of PUTs and, every fourth, a GET.
    fn default() -> Config {
        Config {
            window: 1,
            interval: Duration::ZERO,
            get_every: 4,
            keys: 16,
            value_len: 32,
            key_prefix: "key".into(),
            sole_writer: true,
            reply_timeout: Duration::from_secs(60),
        }
    }
}

/// One request and when it was answered. Times are since the client's start.
#[derive(Debug, Clone)]
pub struct Sample {
    /// Number of the request.
    pub number: u64,
    /// When it was sent.
    pub sent: Duration,
    /// When its reply was read; `None` if that never came.
    pub replied: Option<Duration>,
}

/// What a client saw.
#[derive(Debug, Clone)]
pub struct Report {
    /// All requests, in order.
    pub samples: Vec<Sample>,
    /// Requests that were not answered.
    pub lost: Vec<u64>,
    /// Requests that were answered more than once, once for each reply too many.
    pub repeated: Vec<u64>,
    /// Requests whose reply came after the reply to a later one.
    pub out_of_order: Vec<u64>,
    /// Replies that say something else than they must.
    pub wrong: Vec<String>,
    /// Why the connection broke, if it did.
    pub broken: Option<String>,
    /// Longest time from one reply to the next, in milliseconds.
    pub blackout_ms: f64,
    /// Median time from a request to its reply, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile of the same.
    pub p99_ms: f64,
    /// Replies per second, from the first request to the last reply.
    pub replies_per_s: f64,
    /// The last acknowledged value of each key.
    pub acknowledged: BTreeMap<String, String>,
    /// Keys whose last write was not acknowledged, with its value: the store may have it or not.
    pub unacknowledged: BTreeMap<String, String>,
}

impl Report {
    /// True if each request was answered once, in order and correctly, on a connection that did not break.
    pub fn is_clean(&self) -> bool {
        self.lost.is_empty()
            && self.repeated.is_empty()
            && self.out_of_order.is_empty()
            && self.wrong.is_empty()
            && self.broken.is_none()
    }

    /// One line for people.
    pub fn summary(&self) -> String {
        format!(
            "{} requests, {} lost, {} repeated, {} out of order, {} wrong, connection {}; blackout {:.1} ms, \
             p50 {:.2} ms, p99 {:.2} ms, {:.0} replies/s",
            self.samples.len(),
            self.lost.len(),
            self.repeated.len(),
            self.out_of_order.len(),
            self.wrong.len(),
            self.broken.as_deref().unwrap_or("whole"),
            self.blackout_ms,
            self.p50_ms,
            self.p99_ms,
            self.replies_per_s
        )
    }

    /// Acknowledged writes that `stored` (see [`dump`]) does not have, as sentences.
    pub fn missing_from(&self, stored: &BTreeMap<String, String>) -> Vec<String> {
        let is_there = |key: &String, value: &String| {
            let found = stored.get(key);
            found == Some(value) || (found.is_some() && found == self.unacknowledged.get(key))
        };
        self.acknowledged
            .iter()
            .filter(|(key, value)| !is_there(key, value))
            .map(|(key, value)| format!("{key} must be {value}, it is {:?}", stored.get(key)))
            .collect()
    }
}

/// Times without a reply, before and after a moment at which something failed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gaps {
    /// The longest that ended after the moment, in milliseconds.
    pub after_ms: f64,
    /// The longest that ended before it, in milliseconds.
    pub before_ms: f64,
}

impl Gaps {
    /// From the client's samples; `failed` is since the client's start.
    pub fn of(samples: &[Sample], failed: Duration) -> Gaps {
        let mut replied: Vec<Duration> = samples.iter().filter_map(|sample| sample.replied).collect();
        replied.sort_unstable();
        let mut gaps = Gaps { after_ms: 0.0, before_ms: 0.0 };
        for pair in replied.windows(2) {
            let gap_ms = (pair[1] - pair[0]).as_secs_f64() * 1000.0;
            let longest = if pair[1] > failed { &mut gaps.after_ms } else { &mut gaps.before_ms };
            *longest = longest.max(gap_ms);
        }
        gaps
    }
}

/// A client at work. Dropping it without [`Client::stop`] breaks its connection.
#[derive(Debug)]
pub struct Client {
    stream: TcpStream,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    started: Instant,
}

#[derive(Debug)]
struct State {
    replies: Replies,
    stopping: bool,
    broken: Option<String>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done` or the deadline; false at the deadline.
    fn wait<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
        done: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'a, State>, bool) {
        while !done(&state) {
            state = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return (state, false),
                Some(left) => {
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        (state, true)
    }

    fn fail(&self, reason: String) {
        let mut state = self.state();
        state.broken.get_or_insert(reason);
        state.stopping = true;
        self.changed.notify_all();
    }
}

impl Client {
    /// Starts to send requests on a connection to the demo service.
    pub fn start(stream: TcpStream, config: Config) -> io::Result<Client> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(config.reply_timeout))?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                replies: Replies::new(config.sole_writer),
                stopping: false,
                broken: None,
            }),
            changed: Condvar::new(),
            started: Instant::now(),
        });
        let (requests, replies) = (stream.try_clone()?, BufReader::new(stream.try_clone()?));
        let (sender, receiver) = (Arc::clone(&shared), Arc::clone(&shared));
        let reply_timeout = config.reply_timeout;
        let threads = vec![
            thread::spawn(move || send_requests(requests, &config, &sender)),
            thread::spawn(move || read_replies(replies, reply_timeout, &receiver)),
        ];
        Ok(Client { stream, shared, threads })
    }

    /// Waits until `count` requests have been answered since the start; false if that takes longer than `timeout`
    /// or cannot happen any more.
    pub fn wait_for_replies(&self, count: usize, timeout: Duration) -> bool {
        let deadline = Some(Instant::now() + timeout);
        let state = self.shared.state();
        let (state, _) = self
            .shared
            .wait(state, deadline, |state| state.replies.answered() >= count || state.broken.is_some());
        state.replies.answered() >= count
    }

    /// Number of requests answered so far.
    pub fn answered(&self) -> usize {
        self.shared.state().replies.answered()
    }

    /// Stops sending, waits up to `timeout` for the replies that are still to come, and closes the connection.
    pub fn stop(mut self, timeout: Duration) -> Report {
        let deadline = Some(Instant::now() + timeout);
        let mut state = self.shared.state();
        state.stopping = true;
        self.shared.changed.notify_all();
        let done = |state: &State| state.replies.outstanding() == 0 || state.broken.is_some();
        let (mut state, all_answered) = self.shared.wait(state, deadline, done);
        if !all_answered {
            state.broken.get_or_insert(format!("no reply within {timeout:?} after the last request"));
        }
        drop(state);
        // An error means that it is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                self.shared.fail("a thread of the client panicked".into());
            }
        }
        let state = self.shared.state();
        state.replies.report(state.broken.clone())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shared.fail("the client was dropped".into());
        // An error means that it is closed already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn send_requests(mut stream: TcpStream, config: &Config, shared: &Shared) {
    let mut next = Instant::now();
    let mut last_put = None;
    for number in 1.. {
        let (state, _) = shared.wait(shared.state(), Some(next), |state| state.stopping);
        let may_send = |state: &State| state.stopping || state.replies.outstanding() < config.window;
        let (mut state, _) = shared.wait(state, None, may_send);
        if state.stopping {
            return;
        }
        let is_get = config.get_every > 0 && number % config.get_every == 0;
        let (line, expected) = match &last_put {
            Some((key, value)) if is_get => {
                (format!("GET {number} {key}\n"), Expected::Value(String::clone(value)))
            }
            _ => {
                let key = format!("{}{}", config.key_prefix, number % config.keys.max(1));
                let value = format!("{number:0width$}", width = config.value_len);
                last_put = Some((key.clone(), value.clone()));
                (format!("PUT {number} {key} {value}\n"), Expected::Written { key, value })
            }
        };
        state.replies.sent(expected, shared.started.elapsed());
        drop(state);
        if let Err(error) = stream.write_all(line.as_bytes()) {
            return shared.fail(format!("cannot send request {number}: {error}"));
        }
        // Requests that the window held back are not made up for.
        next = (next + config.interval).max(Instant::now());
    }
}

fn read_replies(mut replies: BufReader<TcpStream>, reply_timeout: Duration, shared: &Shared) {
    let mut line = String::new();
    loop {
        let outcome = replies.read_line(&mut line);
        let now = shared.started.elapsed();
        let mut state = shared.state();
        let in_time = state.replies.oldest_unanswered().is_none_or(|sent| now < sent + reply_timeout);
        let quiet = state.stopping && state.replies.outstanding() == 0;
        let failure = match outcome {
            Ok(_) if line.ends_with('\n') => {
                state.replies.received(line.trim_end_matches('\n'), now);
                line.clear();
                None
            }
            // The end that `stop` asked for.
            _ if quiet => return,
            Ok(_) => Some("the service closed the connection".to_owned()),
            // The read timed out; what has come of a line is kept.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && in_time => None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Some(format!("no reply within {reply_timeout:?}"))
            }
            Err(error) => Some(format!("cannot read replies: {error}")),
        };
        drop(state);
        if let Some(failure) = failure {
            return shared.fail(failure);
        }
        shared.changed.notify_all();
    }
}

/// Asks the service for all its pairs, on a fresh connection.
pub fn dump(stream: TcpStream, timeout: Duration) -> io::Result<BTreeMap<String, String>> {
    stream.set_read_timeout(Some(timeout))?;
    (&stream).write_all(b"DUMP 1\n")?;
    let mut pairs = BTreeMap::new();
    for line in BufReader::new(stream).lines() {
        let line = line?;
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("KEY"), Some("1"), Some(key), Some(value)) => {
                pairs.insert(key.to_owned(), value.to_owned());
            }
            (Some("END"), Some("1"), Some(count), None) if count.parse() == Ok(pairs.len()) => {
                return Ok(pairs);
            }
            _ => return Err(io::Error::other(format!("the service answered DUMP with '{line}'"))),
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const SHORT: Duration = Duration::from_secs(10);

    /// A client of a service that `serve` plays.
    fn client(config: Config, serve: impl FnOnce(BufReader<TcpStream>) + Send + 'static) -> Client {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (peer, _) = listener.accept().unwrap();
        thread::spawn(move || serve(BufReader::new(peer)));
        Client::start(stream, config).unwrap()
    }

    /// Answers requests with `OK n n` until the client is gone.
    fn answer_puts(mut requests: BufReader<TcpStream>) {
        let mut line = String::new();
        while requests.read_line(&mut line).is_ok_and(|len| len > 0) {
            let number = line.split(' ').nth(1).unwrap().to_owned();
            if writeln!(requests.get_mut(), "OK {number} {number}").is_err() {
                return;
            }
            line.clear();
        }
    }

    #[test]
    fn honest_service_gives_a_clean_report() {
        let client = client(Config { get_every: 0, window: 8, ..Config::default() }, answer_puts);
        assert!(client.wait_for_replies(1000, SHORT));
        let report = client.stop(SHORT);
        assert!(report.is_clean(), "{}: {:?}", report.summary(), report.wrong);
        assert!(report.samples.len() >= 1000);
    }

    #[test]
    fn interval_is_kept_and_idle_time_is_no_failure() {
        let config = Config {
            get_every: 0,
            interval: Duration::from_millis(700),
            reply_timeout: Duration::from_millis(500),
            ..Config::default()
        };
        let client = client(config, answer_puts);
        assert!(client.wait_for_replies(3, SHORT));
        let report = client.stop(SHORT);
        assert!(report.is_clean(), "{}", report.summary());
        for sample in &report.samples {
            let earliest = Duration::from_millis(700 * (sample.number - 1));
            assert!(sample.sent >= earliest, "request {} was sent after {:?}", sample.number, sample.sent);
        }
    }

    #[test]
    fn silence_breaks_the_connection() {
        let config = Config { reply_timeout: Duration::from_millis(50), ..Config::default() };
        let client = client(config, |mut requests| {
            // Reads until the client hangs up.
            let _ = io::copy(&mut requests, &mut io::sink());
        });
        assert!(!client.wait_for_replies(1, SHORT));
        let report = client.stop(SHORT);
        assert!(report.broken.as_deref().is_some_and(|why| why.contains("no reply")), "{:?}", report.broken);
        assert_eq!(report.lost, [1]);
    }

    #[test]
    fn closed_connection_is_reported() {
        let client = client(Config::default(), |mut requests| {
            requests.read_line(&mut String::new()).unwrap();
        });
        assert!(!client.wait_for_replies(1, SHORT));
        assert!(client.stop(SHORT).broken.is_some());
    }
}
