//! Whether the peer is alive: heartbeats out, heartbeats in, and how long it has been silent.
//!
//! Owns: the UDP socket, its thread, and the time at which the peer was last heard. Must never: decide that
//! the peer is dead; that takes a claim (see `claim.rs`).
//! States: the peer's address unknown (listening only) -> known (sending too) -> dropped (thread ended).
//!
//! A heartbeat counts when it is of this guest, this view and the other role, and newer than the last.
//! Its sender's address does not matter: a host may answer from another of its addresses. Everything else is
//! counted and ignored. A heartbeat proves nothing about who sent it; a forged one can only delay a takeover.
//!
//! Time is `CLOCK_BOOTTIME`, which goes on while the host is suspended. It does not go on while a host that
//! is itself a virtual machine is paused.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ft_log::{HEARTBEAT_BYTES, Heartbeat, Role, guest_name_hash};

use crate::host::{StopToken, Wait, Worker};

/// Why heartbeats cannot be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatsError {
    /// The address cannot be listened on.
    #[error(
        "Heartbeats cannot be received on {address} (UDP); choose an address of this host and a free port"
    )]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the host said.
        source: io::Error,
    },
    /// The host has no thread or descriptor left.
    #[error("The heartbeat thread cannot be started")]
    Start {
        /// What the host said.
        source: io::Error,
    },
}

/// What a [`Heartbeats`] needs to know.
#[derive(Clone, Debug)]
pub struct HeartbeatConfig {
    /// Where heartbeats are received, and sent from.
    pub listen: SocketAddr,
    /// Where they are sent, if that is known already.
    pub peer: Option<SocketAddr>,
    /// The guest's name.
    pub guest: String,
    /// The view that this side is in.
    pub view: u64,
    /// What this side is.
    pub role: Role,
    /// Time between heartbeats, at least 1.
    pub interval_ms: u64,
}

/// Datagrams since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeartbeatStats {
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats that the host refused to send.
    pub send_failed: u64,
    /// Heartbeats of the peer that counted.
    pub heard: u64,
    /// Datagrams that were not heartbeats.
    pub damaged: u64,
    /// Heartbeats of another guest, view or role, or not newer than the last.
    pub ignored: u64,
}

/// Everything but socket and clock. `now` is the time of [`boot_time`].
#[derive(Debug)]
struct Exchange {
    guest: u64,
    view: u64,
    role: Role,
    peer: Option<SocketAddr>,
    sent_counter: u64,
    heard_counter: Option<u64>,
    heard_at: Duration,
    newer_view: Option<u64>,
    stats: HeartbeatStats,
}

impl Exchange {
    fn set_peer(&mut self, peer: Option<SocketAddr>, now: Duration) {
        self.peer = peer;
        // Another monitor counts from its own start.
        self.heard_counter = None;
        self.heard_at = now;
    }

    /// The next heartbeat and where it goes.
    fn next_heartbeat(&mut self) -> Option<(Heartbeat, SocketAddr)> {
        let peer = self.peer?;
        self.sent_counter += 1;
        let (view, guest, role) = (self.view, self.guest, self.role);
        Some((Heartbeat { view, counter: self.sent_counter, guest, role }, peer))
    }

    fn received(&mut self, datagram: &[u8], now: Duration) {
        let Ok(heartbeat) = Heartbeat::decode(datagram) else {
            self.stats.damaged += 1;
            return;
        };
        let ours = heartbeat.guest == self.guest;
        if ours && heartbeat.view > self.view {
            self.newer_view = self.newer_view.max(Some(heartbeat.view));
        }
        let newer = self.heard_counter.is_none_or(|last| heartbeat.counter > last);
        // Our own heartbeats would come back if the peer's address were ours by mistake.
        if !ours || heartbeat.view != self.view || heartbeat.role == self.role || !newer {
            self.stats.ignored += 1;
            return;
        }
        self.stats.heard += 1;
        self.heard_counter = Some(heartbeat.counter);
        self.heard_at = now;
    }
}

/// The exchange of heartbeats with one peer: a socket and a thread, both ended on drop. All methods may be
/// called from any thread.
pub struct Heartbeats {
    _worker: Worker,
    exchange: Arc<Mutex<Exchange>>,
    local_address: SocketAddr,
}

impl Heartbeats {
    /// Starts to listen, and to send if the peer is known.
    pub fn start(config: &HeartbeatConfig) -> Result<Self, HeartbeatsError> {
        let bind = |source| HeartbeatsError::Bind { address: config.listen, source };
        let socket = UdpSocket::bind(config.listen).map_err(bind)?;
        let local_address = socket.local_addr().map_err(bind)?;
        socket.set_nonblocking(true).map_err(bind)?;
        let exchange = Exchange {
            guest: guest_name_hash(&config.guest),
            view: config.view,
            role: config.role,
            peer: config.peer,
            sent_counter: 0,
            heard_counter: None,
            heard_at: boot_time(),
            newer_view: None,
            stats: HeartbeatStats::default(),
        };
        let exchange = Arc::new(Mutex::new(exchange));
        let (shared, interval) = (Arc::clone(&exchange), Duration::from_millis(config.interval_ms.max(1)));
        let worker = Worker::spawn("heartbeat", move |stop| {
            if let Err(error) = run(stop, &socket, &shared, interval) {
                tracing::error!(%error, "Heartbeats are neither sent nor received any more.");
            }
        })
        .map_err(|source| HeartbeatsError::Start { source })?;
        Ok(Self { _worker: worker, exchange, local_address })
    }

    /// Where heartbeats are received: what the other side has to be told.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// How long nothing has been heard of the peer; at first, since the start or the last
    /// [`Heartbeats::set_peer`].
    pub fn silent_for(&self) -> Duration {
        let heard_at = lock(&self.exchange).heard_at;
        boot_time().saturating_sub(heard_at)
    }

    /// Something else than a heartbeat came from the peer: log traffic shows it alive just as well.
    pub fn note_heard(&self) {
        lock(&self.exchange).heard_at = boot_time();
    }

    /// Sends heartbeats to `peer` from now on, or to nobody. Whoever is there now has the full time to be
    /// heard, and may count from where it likes.
    pub fn set_peer(&self, peer: Option<SocketAddr>) {
        lock(&self.exchange).set_peer(peer, boot_time());
    }

    /// This side is in `view` now, as `role`.
    pub fn set_view(&self, view: u64, role: Role) {
        let mut exchange = lock(&self.exchange);
        exchange.view = view;
        exchange.role = role;
    }

    /// The highest view beyond ours in which a heartbeat of this guest was seen: a hint, not a proof, that
    /// another monitor runs it by now.
    pub fn newer_view(&self) -> Option<u64> {
        let exchange = lock(&self.exchange);
        exchange.newer_view.filter(|view| *view > exchange.view)
    }

    /// Datagrams so far.
    pub fn stats(&self) -> HeartbeatStats {
        lock(&self.exchange).stats
    }
}

fn lock(exchange: &Mutex<Exchange>) -> MutexGuard<'_, Exchange> {
    exchange.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(
    stop: &StopToken,
    socket: &UdpSocket,
    exchange: &Mutex<Exchange>,
    interval: Duration,
) -> io::Result<()> {
    // One byte more than a heartbeat, so that a longer datagram is seen as such.
    let mut buffer = [0; HEARTBEAT_BYTES + 1];
    let mut next = boot_time();
    loop {
        let now = boot_time();
        if now >= next {
            send(socket, exchange);
            // From now, not from when it was due: no burst after the host was frozen.
            next = now + interval;
        }
        match stop.wait_readable(socket.as_fd(), Some(next - now))? {
            Wait::Stopped => return Ok(()),
            Wait::TimedOut => {}
            // An error is a datagram that was damaged or, reported late, one of ours that nobody wanted.
            Wait::Ready => {
                if let Ok((len, _)) = socket.recv_from(&mut buffer) {
                    lock(exchange).received(&buffer[..len], boot_time());
                }
            }
        }
    }
}

fn send(socket: &UdpSocket, exchange: &Mutex<Exchange>) {
    let Some((heartbeat, peer)) = lock(exchange).next_heartbeat() else { return };
    let sent = socket.send_to(&heartbeat.encode(), peer);
    let stats = &mut lock(exchange).stats;
    match sent {
        Ok(_) => stats.sent += 1,
        Err(error) => {
            stats.send_failed += 1;
            if stats.send_failed == 1 {
                tracing::warn!(%peer, %error, "A heartbeat cannot be sent; further failures are only counted.");
            }
        }
    }
}

/// Time since the host was started, suspended time included.
fn boot_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one timespec into `time`.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    // The only failures are a bad pointer and an unknown clock; this one is as old as Linux 2.6.39.
    assert_eq!(result, 0, "CLOCK_BOOTTIME cannot be read");
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const GUEST: &str = "web-1";

    fn exchange(role: Role) -> Exchange {
        Exchange {
            guest: guest_name_hash(GUEST),
            view: 3,
            role,
            peer: None,
            sent_counter: 0,
            heard_counter: None,
            heard_at: Duration::ZERO,
            newer_view: None,
            stats: HeartbeatStats::default(),
        }
    }

    fn heartbeat(counter: u64) -> Heartbeat {
        Heartbeat { view: 3, counter, guest: guest_name_hash(GUEST), role: Role::Backup }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn only_newer_heartbeats_of_the_peer_count() {
        let mut exchange = exchange(Role::Primary);
        exchange.received(&heartbeat(5).encode(), at(1));
        assert_eq!((exchange.heard_at, exchange.stats.heard), (at(1), 1));
        let refused = [
            heartbeat(5),
            heartbeat(4),
            Heartbeat { view: 2, ..heartbeat(6) },
            Heartbeat { view: 4, ..heartbeat(6) },
            Heartbeat { guest: 1, ..heartbeat(6) },
            Heartbeat { role: Role::Primary, ..heartbeat(6) },
        ];
        for (count, other) in refused.iter().enumerate() {
            exchange.received(&other.encode(), at(2));
            assert_eq!((exchange.heard_at, exchange.stats.ignored), (at(1), count as u64 + 1), "{other:?}");
        }
        exchange.received(&heartbeat(9).encode(), at(3));
        assert_eq!(exchange.heard_at, at(3));
    }

    #[test]
    fn damaged_datagrams_are_counted_and_ignored() {
        let mut exchange = exchange(Role::Primary);
        let mut flipped = heartbeat(1).encode();
        flipped[20] ^= 1;
        let longer = [&heartbeat(1).encode()[..], &[0]].concat();
        for datagram in [&b""[..], b"hello", &flipped, &longer] {
            exchange.received(datagram, at(1));
        }
        let stats = HeartbeatStats { damaged: 4, ..HeartbeatStats::default() };
        assert_eq!((exchange.stats, exchange.heard_at), (stats, Duration::ZERO));
    }

    #[test]
    fn a_newer_view_of_this_guest_is_remembered() {
        let primary = start(Role::Primary, None);
        let see = |heartbeat: Heartbeat| lock(&primary.exchange).received(&heartbeat.encode(), at(1));
        see(Heartbeat { view: 9, guest: 1, ..heartbeat(1) });
        see(Heartbeat { view: 2, ..heartbeat(1) });
        assert_eq!(primary.newer_view(), None);
        see(Heartbeat { view: 5, role: Role::Primary, ..heartbeat(1) });
        see(Heartbeat { view: 4, ..heartbeat(1) });
        assert_eq!(primary.newer_view(), Some(5));
        primary.set_view(5, Role::Backup);
        assert_eq!(primary.newer_view(), None);
    }

    #[test]
    fn a_new_peer_counts_from_its_own_start_and_has_the_full_time() {
        let mut exchange = exchange(Role::Primary);
        exchange.received(&heartbeat(1_000).encode(), at(1));
        exchange.set_peer(None, at(50));
        assert_eq!(exchange.heard_at, at(50));
        exchange.received(&heartbeat(1).encode(), at(51));
        assert_eq!((exchange.heard_at, exchange.stats.heard), (at(51), 2));
    }

    #[test]
    fn nothing_is_sent_while_the_peer_is_unknown() {
        let mut exchange = exchange(Role::Backup);
        assert_eq!(exchange.next_heartbeat(), None);
        let peer = "127.0.0.1:9".parse().unwrap();
        exchange.set_peer(Some(peer), at(1));
        assert_eq!(exchange.next_heartbeat(), Some((heartbeat(1), peer)));
        assert_eq!(exchange.next_heartbeat(), Some((heartbeat(2), peer)));
    }

    fn start(role: Role, peer: Option<SocketAddr>) -> Heartbeats {
        let listen = "127.0.0.1:0".parse().unwrap();
        let guest = GUEST.to_owned();
        Heartbeats::start(&HeartbeatConfig { listen, peer, guest, view: 3, role, interval_ms: 1 }).unwrap()
    }

    #[test]
    fn two_sides_hear_each_other_once_both_know_the_address() {
        let primary = start(Role::Primary, None);
        let backup = start(Role::Backup, Some(primary.local_address()));
        while primary.stats().heard < 3 {
            thread::yield_now();
        }
        assert_eq!(backup.stats().heard, 0);
        primary.set_peer(Some(backup.local_address()));
        while backup.stats().heard < 3 {
            thread::yield_now();
        }
        drop(backup);
        let heard = primary.stats().heard;
        let before = primary.silent_for();
        while primary.silent_for() < before + Duration::from_millis(20) {
            thread::yield_now();
        }
        // At most what was in the socket when the other side ended.
        assert!(primary.stats().heard <= heard + 100);
        primary.note_heard();
        assert!(primary.silent_for() < before + Duration::from_millis(20));
    }

    #[test]
    fn an_address_in_use_is_refused_by_name() {
        let first = start(Role::Primary, None);
        let config = HeartbeatConfig {
            listen: first.local_address(),
            peer: None,
            guest: GUEST.to_owned(),
            view: 3,
            role: Role::Backup,
            interval_ms: 1,
        };
        let error = Heartbeats::start(&config).err().unwrap();
        assert!(error.to_string().contains(&first.local_address().to_string()));
    }
}
