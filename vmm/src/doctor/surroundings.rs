//! What a pair needs around a host: taps, and the way to the peer.
//!
//! Owns: these measurements. Must never: say more to the peer than that somebody connects.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use super::Finding;
use crate::host::tap::TapError;
use crate::with_causes;

const TUN: &str = "/dev/net/tun";
const CONNECTS: usize = 7;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// More than this holds each output of the guest back noticeably.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(10);

/// Can there be taps?
pub fn tun() -> Finding {
    match OpenOptions::new().read(true).write(true).open(TUN) {
        Ok(_) => Finding::ok(format!("{TUN} can be opened")),
        Err(source) => {
            let error = TapError::NoDriver { source };
            Finding::degraded(
                with_causes(&error),
                "guests with a network card (--tap) are refused until then",
            )
        }
    }
}

/// How long does a round trip to the peer take?
pub fn peer(address: SocketAddr) -> Finding {
    let mut times = Vec::new();
    for _ in 0..CONNECTS {
        let started = Instant::now();
        if let Err(error) = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            let error = match error.kind() {
                ErrorKind::TimedOut => format!("nothing within {} s", CONNECT_TIMEOUT.as_secs()),
                _ => error.to_string(),
            };
            return Finding::failed(
                format!("{address} does not answer: {error}"),
                "start a primary there (--peer takes its --listen address); check link, routes, firewalls",
            );
        }
        times.push(started.elapsed());
    }
    let round_trip = median(times);
    let seen = format!("{address} answers within {}", milliseconds(round_trip));
    if round_trip > ROUND_TRIP_MAX {
        return Finding::degraded(seen, "each output of the guest waits for that: use a faster link");
    }
    Finding::ok(seen)
}

pub(super) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

pub(super) fn milliseconds(time: Duration) -> String {
    format!("{:.3} ms (median)", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::super::Verdict;
    use super::*;

    #[test]
    fn a_peer_that_listens_is_measured_and_one_that_does_not_fails() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let finding = peer(address);
        assert_ne!(finding.verdict, Verdict::Failed, "{}", finding.seen);
        assert!(finding.seen.contains("answers within"), "{}", finding.seen);
        drop(listener);
        let finding = peer(address);
        assert_eq!(finding.verdict, Verdict::Failed);
        assert!(finding.seen.contains("does not answer: Connection refused"), "{}", finding.seen);
    }

    #[test]
    fn the_median_is_that_of_the_sorted_times() {
        let ms = Duration::from_millis;
        assert_eq!(median(vec![ms(9), ms(1), ms(5)]), ms(5));
        assert_eq!(median(Vec::new()), Duration::ZERO);
    }
}
