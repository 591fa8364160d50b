//! Whether the peer is alive: heartbeats, their answers, and how long it has been silent.
//!
//! Owns: the UDP socket, its thread, and the times at which the peer was last heard and last answered. Must
//! never: decide that the peer is dead; that takes a claim (see `claim.rs`).
//! States: the peer's address unknown (listening only) -> known (sending too) -> dropped (thread ended).
//!
//! ```text
//!   primary                             backup
//!      | <- 0 ------------------------- |     each interval: the newest counter heard; tells the port
//!      | -- 1 ------------------------> |     each interval: counters rise
//!      | <- 1 ------------------------- |     answered at once
//! ```
//! When the backup answers counter n, it heard the primary no earlier than n was *sent*, so it will not think
//! the primary dead before that time plus its timeout. This is what a lease can be built on; that the backup
//! is heard is not enough, since it may not hear the primary.
//!
//! Only heartbeats of this guest, this view and the other role count, and only if they are sealed with the key of the
//! present log connection: what was recorded of an earlier one is worth nothing, and what was recorded of this one has an
//! old counter. Everything else is counted and ignored. A backup's come from a port that its log connection does not tell,
//! so a primary learns the port, of the peer's own IP address only.
//!
//! Not covered: somebody in the path who holds heartbeats back and lets them through later. They count when they come,
//! as those that a slow network brings do; so he can delay a takeover, and cause none.
//!
//! Invitations come and go by the same socket: a host that waits as a standby hears those of a primary without a
//! backup. What follows from one is not decided here.
//!
//! While the peer is silent, the other hosts of the configuration are asked whether they are there. A host that hears none of
//! them either is most likely the one that is cut off.
//!
//! Time is `CLOCK_BOOTTIME`, which goes on while the host is suspended. It does not go on while a host that
//! is itself a virtual machine is paused.

use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::Sender;
use ft_log::{
    DatagramError, HEARTBEAT_BYTES, Heartbeat, INVITATION_BYTES, Invitation, PROBE_BYTES, Probe, Role,
    SealKey, guest_name_hash,
};

use crate::host::{StopToken, Wait, Worker};
use crate::pair::liveness::probes::{Others, Probed};
use crate::pair::protocol::{Hearing, Questions};

/// Heartbeats that a peer may miss before others are asked.
const MISSED_BEFORE_ASKING: u32 = 2;

/// Why heartbeats cannot be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum HeartbeatError {
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

/// Datagrams since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeartbeatStats {
    /// Heartbeats sent.
    pub sent: u64,
    /// Heartbeats that the host refused to send.
    pub send_failed: u64,
    /// Heartbeats of the peer that counted.
    pub heard: u64,
    /// Datagrams that were not heartbeats, or not sealed with this connection's key.
    pub damaged: u64,
    /// Heartbeats of another guest, view or role, or that tell nothing new; and whatever came while there was no
    /// connection.
    pub ignored: u64,
}

/// A primary without a backup has called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What it said.
    pub invitation: Result<Invitation, DatagramError>,
    /// Where it said that from.
    pub from: SocketAddr,
}

/// What a datagram leads to.
#[derive(Debug, PartialEq, Eq)]
enum Response {
    /// Nothing.
    None,
    /// The peer is answered.
    Heartbeat,
    /// This goes back.
    Answer(Vec<u8>),
}

/// Everything but socket and clock. `now` is the time of [`boot_time`].
#[derive(Debug)]
struct Exchange {
    guest: u64,
    view: u64,
    role: Role,
    peer: Option<SocketAddr>,
    /// Who is waited for, also while it is not answered.
    expected: Option<IpAddr>,
    others: Option<Others>,
    /// That of the connection with the peer.
    key: Option<SealKey>,
    /// What a primary sends.
    questions: Questions,
    /// What a backup hears; of a primary only when it heard last.
    hearing: Hearing,
    /// Longest time from the sending of an answered heartbeat to the next answer.
    silence_max: Duration,
    /// Where invitations go, and what seals them; nobody waits for them otherwise.
    calls: Option<(Sender<Call>, SealKey)>,
    stats: HeartbeatStats,
}

impl Exchange {
    fn new(guest: &str, role: Role, now: Duration) -> Self {
        Self {
            guest: guest_name_hash(guest),
            view: 1,
            role,
            peer: None,
            expected: None,
            others: None,
            key: None,
            questions: Questions::default(),
            hearing: Hearing::new(now),
            silence_max: Duration::ZERO,
            calls: None,
            stats: HeartbeatStats::default(),
        }
    }

    fn set_peer(&mut self, peer: Option<(SocketAddr, SealKey)>, now: Duration) {
        (self.peer, self.key) = peer.unzip();
        self.expected = self.peer.map(|peer| peer.ip());
        self.hearing = Hearing::new(now);
        self.silence_max = Duration::ZERO;
        self.questions.forget();
    }

    fn set_view(&mut self, view: u64, role: Role) {
        self.view = view;
        self.role = role;
        self.hearing.forget();
        self.questions.forget();
    }

    /// The next heartbeat, sealed, and where it goes.
    fn next_heartbeat(&mut self, now: Duration) -> Option<(Vec<u8>, SocketAddr)> {
        let (peer, key) = self.peer.zip(self.key.clone())?;
        let (view, guest, role) = (self.view, self.guest, self.role);
        let counter = match role {
            Role::Primary => self.questions.ask(now),
            Role::Backup => self.hearing.counter(),
        };
        Some((Heartbeat { view, counter, guest, role }.encode(&key), peer))
    }

    /// Takes in a datagram.
    fn received(&mut self, datagram: &[u8], from: SocketAddr, now: Duration) -> Response {
        if Invitation::is_meant(datagram) {
            self.called(datagram, from);
            return Response::None;
        }
        if Probe::is_meant(datagram) {
            return self.probed(datagram);
        }
        let Some(key) = &self.key else {
            self.stats.ignored += 1;
            return Response::None;
        };
        let Ok(heartbeat) = Heartbeat::decode(datagram, key) else {
            self.stats.damaged += 1;
            return Response::None;
        };
        // Our own heartbeats would come back if the peer's address were ours by mistake.
        let counts =
            (heartbeat.guest, heartbeat.view) == (self.guest, self.view) && heartbeat.role != self.role;
        let news = counts
            && match self.role {
                Role::Primary => self.take_answer(heartbeat.counter, from, now),
                Role::Backup => self.hearing.hear(heartbeat.counter, now),
            };
        if !news {
            self.stats.ignored += 1;
            return Response::None;
        }
        self.stats.heard += 1;
        if self.role == Role::Backup { Response::Heartbeat } else { Response::None }
    }

    /// Takes in a probe, which may have an answer.
    fn probed(&mut self, datagram: &[u8]) -> Response {
        let guest = self.guest;
        match self.others.as_mut().map(|others| others.take(datagram, guest)) {
            Some(Probed::Answer(answer)) => return Response::Answer(answer),
            Some(Probed::Noted) => {}
            Some(Probed::Foreign) => self.stats.damaged += 1,
            None => self.stats.ignored += 1,
        }
        Response::None
    }

    /// What is to be asked of other hosts now, if the peer has been silent for `patience`.
    fn question_to_others(
        &mut self,
        patience: Duration,
        now: Duration,
    ) -> Option<(Vec<u8>, Vec<SocketAddr>)> {
        if self.hearing.silent_for(now) < patience {
            return None;
        }
        self.others.as_mut()?.ask(self.guest, self.expected, now)
    }

    fn is_cut_off(&self) -> bool {
        let heard_at = self.hearing.heard_at();
        self.others.as_ref().is_some_and(|others| others.are_silent(self.expected, heard_at))
    }

    /// Passes an invitation on to whoever waits for one.
    fn called(&mut self, datagram: &[u8], from: SocketAddr) {
        let taken = self.calls.as_ref().is_some_and(|(calls, key)| {
            // Another one follows soon if there is no room for this one.
            calls.try_send(Call { invitation: Invitation::decode(datagram, key), from }).is_ok()
        });
        if !taken {
            self.stats.ignored += 1;
        }
    }

    /// Whether `counter` answers a heartbeat that had no answer yet.
    fn take_answer(&mut self, counter: u64, from: SocketAddr, now: Duration) -> bool {
        if let Some(peer) = self.peer.as_mut().filter(|peer| peer.ip() == from.ip()) {
            peer.set_port(from.port());
        }
        let before = self.questions.answered_sent_at();
        let news = self.questions.answer(counter);
        if news {
            self.hearing.note(now);
            let silence = before.map_or(Duration::ZERO, |sent_at| now.saturating_sub(sent_at));
            self.silence_max = self.silence_max.max(silence);
        }
        news
    }
}

/// The exchange of heartbeats with one peer: a socket and a thread, both ended on drop. All methods may be
/// called from any thread.
pub struct Heartbeats {
    _worker: Worker,
    exchange: Arc<Mutex<Exchange>>,
    socket: Arc<UdpSocket>,
    local_address: SocketAddr,
}

impl Heartbeats {
    /// Starts to listen on `listen`, in view 1, for the guest called `guest`. Heartbeats are sent from there
    /// every `interval` (at least 1 ms) once there is a peer.
    pub fn start(
        listen: SocketAddr,
        guest: &str,
        role: Role,
        interval: Duration,
    ) -> Result<Self, HeartbeatError> {
        let bind = |source| HeartbeatError::Bind { address: listen, source };
        let socket = UdpSocket::bind(listen).map_err(bind)?;
        let local_address = socket.local_addr().map_err(bind)?;
        socket.set_nonblocking(true).map_err(bind)?;
        let exchange = Exchange::new(guest, role, boot_time());
        let exchange = Arc::new(Mutex::new(exchange));
        let socket = Arc::new(socket);
        let (shared, interval) = (Arc::clone(&exchange), interval.max(Duration::from_millis(1)));
        let beating = Arc::clone(&socket);
        let worker = Worker::spawn("heartbeat", move |stop| {
            if let Err(error) = run(stop, &beating, &shared, interval) {
                tracing::error!(%error, "Heartbeats are neither sent nor received any more.");
            }
        })
        .map_err(|source| HeartbeatError::Start { source })?;
        Ok(Self { _worker: worker, exchange, socket, local_address })
    }

    /// Where heartbeats are received.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// How long nothing that tells something new has been heard of the peer; at first, since the start or
    /// the last [`Heartbeats::set_peer`].
    pub fn silent_for(&self) -> Duration {
        let exchange = lock(&self.exchange);
        exchange.hearing.silent_for(boot_time())
    }

    /// A primary's: when the newest heartbeat was sent that the backup has answered.
    pub fn answered_sent_at(&self) -> Option<Duration> {
        lock(&self.exchange).questions.answered_sent_at()
    }

    /// A primary's: the longest time from the sending of an answered heartbeat to the next answer of this peer.
    pub fn silence_max(&self) -> Duration {
        lock(&self.exchange).silence_max
    }

    /// Something else than a heartbeat came from the peer: log traffic shows it alive just as well.
    pub fn note_heard(&self) {
        lock(&self.exchange).hearing.note(boot_time());
    }

    /// Sends heartbeats to `peer` from now on, sealed with its connection's key, or to nobody. A primary needs no more
    /// than the right IP address. Whoever is there now has the full time to be heard, and has answered nothing yet.
    pub fn set_peer(&self, peer: Option<(SocketAddr, SealKey)>) {
        lock(&self.exchange).set_peer(peer, boot_time());
    }

    /// Answers nothing any more until the next [`Heartbeats::set_peer`]; what is heard still counts.
    pub fn fall_silent(&self) {
        lock(&self.exchange).peer = None;
    }

    /// This side is in `view` now, as `role`.
    pub fn set_view(&self, view: u64, role: Role) {
        lock(&self.exchange).set_view(view, role);
    }

    /// Invitations go to `calls` from now on, those that `key` has not sealed too, as such.
    pub fn await_invitations(&self, calls: Sender<Call>, key: SealKey) {
        lock(&self.exchange).calls = Some((calls, key));
    }

    /// The other hosts of the configuration, which answer questions that `key` has sealed, as this one does from now on.
    pub fn know_others(&self, hosts: Vec<SocketAddr>, key: SealKey) {
        let base = boot_time().as_nanos() as u64;
        lock(&self.exchange).others = Some(Others::new(hosts, key, base));
    }

    /// While the peer is silent: is every other host of the configuration silent, too? Then this one is most likely cut off.
    /// Without other hosts nobody can tell.
    pub fn is_cut_off(&self) -> bool {
        lock(&self.exchange).is_cut_off()
    }

    /// Invites whoever waits at `host` to become the backup; `key` seals the invitation.
    pub fn invite(&self, invitation: &Invitation, key: &SealKey, host: SocketAddr) {
        if let Err(error) = self.socket.send_to(&invitation.encode(key), host) {
            tracing::debug!(%host, %error, "an invitation cannot be sent");
        }
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
    // One byte more than any datagram, so that a longer one is seen as such.
    const { assert!(INVITATION_BYTES < HEARTBEAT_BYTES && PROBE_BYTES < HEARTBEAT_BYTES) };
    let mut buffer = [0; HEARTBEAT_BYTES + 1];
    let mut next = boot_time();
    loop {
        let now = boot_time();
        if now >= next {
            send(socket, exchange);
            ask_others(socket, exchange, interval * MISSED_BEFORE_ASKING);
            // From now, not from when it was due: no burst after the host was frozen.
            next = now + interval;
        }
        match stop.wait_readable(socket.as_fd(), Some(next - now))? {
            Wait::Stopped => return Ok(()),
            Wait::TimedOut => {}
            // An error is a datagram that was damaged or, reported late, one of ours that nobody wanted.
            Wait::Ready => {
                let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
                let response = lock(exchange).received(&buffer[..len], from, boot_time());
                match response {
                    Response::None => {}
                    Response::Heartbeat => send(socket, exchange),
                    Response::Answer(answer) => send_probe(socket, &answer, from),
                }
            }
        }
    }
}

fn send(socket: &UdpSocket, exchange: &Mutex<Exchange>) {
    let Some((heartbeat, peer)) = lock(exchange).next_heartbeat(boot_time()) else { return };
    let sent = socket.send_to(&heartbeat, peer);
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

fn ask_others(socket: &UdpSocket, exchange: &Mutex<Exchange>, patience: Duration) {
    let asked = lock(exchange).question_to_others(patience, boot_time());
    if let Some((question, hosts)) = asked {
        hosts.into_iter().for_each(|host| send_probe(socket, &question, host));
    }
}

fn send_probe(socket: &UdpSocket, probe: &[u8], host: SocketAddr) {
    if let Err(error) = socket.send_to(probe, host) {
        tracing::debug!(%host, %error, "a probe cannot be sent");
    }
}

/// Time since the host was started, suspended time included.
pub(in crate::pair) fn boot_time() -> Duration {
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

    /// Of the present connection, or of another one.
    fn key(connection: &str) -> SealKey {
        ft_log::Key::new([7; 32]).seal_key("heartbeat", &[connection.as_bytes(), GUEST.as_bytes()])
    }

    fn now_key() -> SealKey {
        key("now")
    }

    impl Exchange {
        /// Takes in a datagram; is the peer answered?
        fn heard(&mut self, datagram: &[u8], from: SocketAddr, now: Duration) -> bool {
            self.received(datagram, from, now) == Response::Heartbeat
        }
    }

    fn exchange(role: Role) -> Exchange {
        Exchange::new(GUEST, role, Duration::ZERO)
    }

    fn heartbeat(role: Role, counter: u64) -> Heartbeat {
        Heartbeat { view: 1, counter, guest: guest_name_hash(GUEST), role }
    }

    /// What is sent of it in the present connection.
    fn sealed(heartbeat: Heartbeat) -> Vec<u8> {
        heartbeat.encode(&now_key())
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn peer() -> SocketAddr {
        address("192.0.2.1:7000")
    }

    fn connected() -> Option<(SocketAddr, SealKey)> {
        Some((peer(), now_key()))
    }

    #[test]
    fn a_backup_counts_and_answers_newer_heartbeats_of_its_primary_only() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        assert!(backup.heard(&sealed(heartbeat(Role::Primary, 5)), peer(), at(1)));
        assert_eq!((backup.hearing.heard_at(), backup.stats.heard), (at(1), 1));
        assert_eq!(backup.next_heartbeat(at(1)), Some((sealed(heartbeat(Role::Backup, 5)), peer())));
        let newer = heartbeat(Role::Primary, 6);
        let refused = [
            heartbeat(Role::Primary, 5),
            heartbeat(Role::Primary, 4),
            heartbeat(Role::Backup, 6),
            Heartbeat { view: 0, ..newer },
            Heartbeat { view: 2, ..newer },
            Heartbeat { guest: 1, ..newer },
        ];
        for (count, other) in refused.iter().enumerate() {
            assert!(!backup.heard(&sealed(*other), peer(), at(2)), "{other:?}");
            assert_eq!(
                (backup.hearing.heard_at(), backup.stats.ignored),
                (at(1), count as u64 + 1),
                "{other:?}"
            );
        }
        assert!(backup.heard(&sealed(newer), peer(), at(3)));
        assert_eq!(backup.hearing.heard_at(), at(3));
    }

    #[test]
    fn an_answer_counts_from_when_the_question_was_sent() {
        let mut primary = exchange(Role::Primary);
        primary.set_peer(connected(), at(0));
        for (counter, seconds) in [(1, 10), (2, 20), (3, 30)] {
            let sent = primary.next_heartbeat(at(seconds));
            assert_eq!(sent, Some((sealed(heartbeat(Role::Primary, counter)), peer())));
        }
        let mut answer = |counter| {
            primary.heard(&sealed(heartbeat(Role::Backup, counter)), peer(), at(100));
            (primary.questions.answered_sent_at(), primary.stats.heard)
        };
        assert_eq!(answer(0), (None, 0), "nothing heard yet");
        assert_eq!(answer(2), (Some(at(20)), 1));
        assert_eq!(answer(2), (Some(at(20)), 1), "repeated");
        assert_eq!(answer(1), (Some(at(20)), 1), "late");
        assert_eq!(answer(4), (Some(at(20)), 1), "never asked");
        assert_eq!(answer(3), (Some(at(30)), 2));
    }

    #[test]
    fn answers_of_another_peer_or_view_do_not_count() {
        let mut primary = exchange(Role::Primary);
        primary.set_peer(connected(), at(0));
        let view_2 = |counter| Heartbeat { view: 2, ..heartbeat(Role::Backup, counter) };
        primary.next_heartbeat(at(1));
        primary.set_peer(connected(), at(2));
        primary.heard(&sealed(heartbeat(Role::Backup, 1)), peer(), at(3));
        primary.next_heartbeat(at(4));
        primary.set_view(2, Role::Primary);
        primary.heard(&sealed(view_2(2)), peer(), at(5));
        assert_eq!((primary.questions.answered_sent_at(), primary.stats.heard), (None, 0));
        primary.next_heartbeat(at(6));
        primary.heard(&sealed(view_2(3)), peer(), at(7));
        assert_eq!(primary.questions.answered_sent_at(), Some(at(6)));
    }

    #[test]
    fn a_primary_learns_the_port_of_its_peers_address_only() {
        let mut primary = exchange(Role::Primary);
        let greeting = sealed(heartbeat(Role::Backup, 0));
        primary.set_peer(connected(), at(0));
        primary.heard(&greeting, address("192.0.2.9:1"), at(1));
        assert_eq!(primary.peer, Some(peer()));
        primary.heard(&greeting, address("192.0.2.1:4242"), at(1));
        assert_eq!(primary.peer, Some(address("192.0.2.1:4242")));
        primary.set_peer(None, at(2));
        primary.heard(&greeting, peer(), at(3));
        assert_eq!(primary.peer, None);
    }

    #[test]
    fn a_backup_follows_a_new_primary_from_its_start() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        assert!(backup.heard(&sealed(heartbeat(Role::Primary, 1_000)), peer(), at(1)));
        backup.set_peer(connected(), at(50));
        assert_eq!(backup.hearing.heard_at(), at(50));
        assert!(backup.heard(&sealed(heartbeat(Role::Primary, 1)), peer(), at(51)));
    }

    #[test]
    fn damaged_datagrams_are_counted_and_ignored() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        let mut flipped = sealed(heartbeat(Role::Primary, 1));
        flipped[20] ^= 1;
        let longer = [&sealed(heartbeat(Role::Primary, 1))[..], &[0]].concat();
        for datagram in [&b""[..], b"hello", &flipped, &longer] {
            assert!(!backup.heard(datagram, peer(), at(1)));
        }
        let stats = HeartbeatStats { damaged: 4, ..HeartbeatStats::default() };
        assert_eq!((backup.stats, backup.hearing.heard_at()), (stats, Duration::ZERO));
    }

    #[test]
    fn what_another_key_has_sealed_is_not_heard() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        let forged = [
            ft_log::Key::new([8; 32]).seal_key("heartbeat", &[b"now", GUEST.as_bytes()]),
            ft_log::Key::new([7; 32]).seal_key("invitation", &[b"now", GUEST.as_bytes()]),
            SealKey::without_secret("heartbeat", &[GUEST.as_bytes()]),
        ];
        for key in &forged {
            assert!(!backup.heard(&heartbeat(Role::Primary, 1).encode(key), peer(), at(1)));
        }
        assert_eq!((backup.stats.damaged, backup.hearing.heard_at()), (3, at(0)));
        let mut primary = exchange(Role::Primary);
        primary.set_peer(connected(), at(0));
        primary.next_heartbeat(at(1));
        for key in &forged {
            primary.heard(&heartbeat(Role::Backup, 1).encode(key), address("192.0.2.1:66"), at(2));
        }
        assert_eq!(
            (primary.questions.answered_sent_at(), primary.peer),
            (None, Some(peer())),
            "nor is its port learnt"
        );
    }

    /// The view is the same, and the counters that were recorded are higher than any in this connection.
    #[test]
    fn what_was_recorded_of_an_earlier_connection_is_worth_nothing() {
        let (mut old_primary, mut old_backup) = (exchange(Role::Primary), exchange(Role::Backup));
        old_primary.set_peer(Some((peer(), key("earlier"))), at(0));
        old_backup.set_peer(Some((peer(), key("earlier"))), at(0));
        let mut recorded = Vec::new();
        for second in 1..=100 {
            let (question, _) = old_primary.next_heartbeat(at(second)).unwrap();
            assert!(old_backup.heard(&question, peer(), at(second)));
            let (answer, _) = old_backup.next_heartbeat(at(second)).unwrap();
            recorded.push((question, answer));
        }
        // Both join anew, and both monitors may have been started anew.
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(200));
        let mut primary = exchange(Role::Primary);
        primary.set_peer(connected(), at(200));
        for _ in 0..100 {
            primary.next_heartbeat(at(200));
        }
        for (question, answer) in &recorded {
            assert!(!backup.heard(question, peer(), at(300)));
            primary.heard(answer, peer(), at(300));
        }
        assert_eq!((backup.hearing.heard_at(), backup.hearing.counter()), (at(200), 0));
        assert_eq!((primary.hearing.heard_at(), primary.questions.answered_sent_at()), (at(200), None));
        assert_eq!((backup.stats.damaged, primary.stats.damaged), (100, 100));
    }

    #[test]
    fn what_was_recorded_of_this_connection_is_heard_once() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        let questions: Vec<_> = (1..=3).map(|counter| sealed(heartbeat(Role::Primary, counter))).collect();
        assert!(questions.iter().all(|question| backup.heard(question, peer(), at(1))));
        assert!(!questions.iter().any(|question| backup.heard(question, peer(), at(2))));
        assert_eq!((backup.hearing.heard_at(), backup.stats.ignored), (at(1), 3));
    }

    #[test]
    fn nothing_is_heard_without_a_connection() {
        let mut backup = exchange(Role::Backup);
        assert!(!backup.heard(&sealed(heartbeat(Role::Primary, 1)), peer(), at(1)));
        backup.set_peer(connected(), at(2));
        backup.set_peer(None, at(3));
        assert!(!backup.heard(&sealed(heartbeat(Role::Primary, 1)), peer(), at(4)));
        assert_eq!((backup.stats.ignored, backup.hearing.heard_at()), (2, at(3)));
    }

    #[test]
    fn whoever_falls_silent_still_hears() {
        let mut backup = exchange(Role::Backup);
        backup.set_peer(connected(), at(0));
        backup.peer = None;
        assert!(backup.heard(&sealed(heartbeat(Role::Primary, 1)), peer(), at(1)));
        assert_eq!((backup.hearing.heard_at(), backup.next_heartbeat(at(1))), (at(1), None));
    }

    fn start(role: Role) -> Heartbeats {
        Heartbeats::start(address("127.0.0.1:0"), GUEST, role, Duration::from_millis(1)).unwrap()
    }

    #[test]
    fn two_sides_hear_each_other_until_one_ends() {
        let (primary, backup) = (start(Role::Primary), start(Role::Backup));
        assert_eq!(primary.answered_sent_at(), None);
        backup.set_peer(Some((primary.local_address(), now_key())));
        // The port is wrong, as a log connection's is; the address is right.
        primary.set_peer(Some((address("127.0.0.1:9"), now_key())));
        while primary.stats().heard < 3 || backup.stats().heard < 3 {
            thread::yield_now();
        }
        assert!(primary.answered_sent_at().is_some());
        drop(backup);
        // What the backup had sent before it ended is taken in; then nothing more comes.
        let silence = Duration::from_millis(50);
        while primary.silent_for() < silence {
            thread::yield_now();
        }
        let answered = primary.answered_sent_at();
        assert!(answered.is_some_and(|sent_at| boot_time() - sent_at >= silence));
        primary.note_heard();
        assert_eq!(primary.answered_sent_at(), answered, "being heard is not being answered");
    }

    #[test]
    fn an_address_in_use_is_refused_by_name() {
        let first = start(Role::Primary);
        let address = first.local_address();
        let error = Heartbeats::start(address, GUEST, Role::Backup, Duration::from_secs(1)).err().unwrap();
        assert!(error.to_string().contains(&address.to_string()));
    }
}
