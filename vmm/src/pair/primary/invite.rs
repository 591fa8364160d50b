//! A guest without a backup looks for one among the hosts of its configuration.
//!
//! Owns: whom to invite, and when. Must never: decide who joins (the greeting does), or send anything while there is
//! a backup.
//!
//! ```text
//!   Alone: an invitation to each host that is due, every 250 ms ── one connects ──> greeting ──> transfer ──> Paired
//!     ^        └ a host that was refused, or broke off, waits and lets others go first (`hosts.rs`)             │
//!     └───────────────────────────────────────── backup lost ──────────────────────────────────────────────────┘
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ft_log::{Invitation, Key, SealKey, guest_name_hash};

use crate::host::spawn;
use crate::pair::liveness::heartbeat::Heartbeats;
use crate::pair::liveness::hosts::Memory;
use crate::pair::primary::state::PrimaryState;
use crate::pair::protocol::Phase;

/// Time between two invitations.
const INVITE_EVERY: Duration = Duration::from_millis(250);
/// How long nobody may come before that is said.
const SAY_AFTER: Duration = Duration::from_secs(10);

/// What seals the invitations of hosts that have `key`.
pub fn invitation_key(key: Option<&Key>) -> SealKey {
    sealing("invitation", key)
}

/// What seals the questions of hosts that have `key` whether the others are there.
pub fn probe_key(key: Option<&Key>) -> SealKey {
    sealing("probe", key)
}

fn sealing(purpose: &str, key: Option<&Key>) -> SealKey {
    key.map_or_else(|| SealKey::without_secret(purpose, &[]), |key| key.seal_key(purpose, &[]))
}

/// The search of one live guest. Without hosts it only remembers who was refused.
pub struct Search {
    hosts: Vec<SocketAddr>,
    guest: u64,
    key: SealKey,
    memory: Mutex<Memory>,
}

impl Search {
    /// A search for a backup of `guest` among `hosts`, of which this one is none. All hosts have `key`.
    pub fn new(hosts: Vec<SocketAddr>, guest: &str, key: Option<&Key>) -> Self {
        Self { hosts, guest: guest_name_hash(guest), key: invitation_key(key), memory: Mutex::default() }
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The backup at `host` was refused, or was lost, for `cause`: others come first for a while. True: this cause is
    /// news.
    pub fn failed(&self, host: IpAddr, cause: &str) -> bool {
        self.memory().failed(host, cause, Instant::now())
    }

    /// Invites until the process ends. Backups are awaited on `port`.
    pub fn run(&self, port: u16, state: &PrimaryState, heartbeats: &Heartbeats) {
        let mut alone_since: Option<(Instant, bool)> = None;
        loop {
            if state.phase() == Phase::Alone {
                let now = Instant::now();
                let (since, said) = alone_since.get_or_insert_with(|| {
                    tracing::info!(hosts = %self.names(), "this guest has no backup: looking for one");
                    (now, false)
                });
                if now - *since >= SAY_AFTER && !std::mem::replace(said, true) {
                    tracing::warn!(hosts = %self.names(), "no host has become the backup in {} s; still looking",
                        SAY_AFTER.as_secs());
                }
                let invitation = Invitation { view: state.view(), guest: self.guest, port };
                self.due(now).for_each(|host| heartbeats.invite(&invitation, &self.key, host));
            } else {
                alone_since = None;
            }
            std::thread::sleep(INVITE_EVERY);
        }
    }

    fn due(&self, now: Instant) -> impl Iterator<Item = SocketAddr> {
        self.hosts.iter().copied().filter(move |host| self.memory().is_due(host.ip(), now))
    }

    fn names(&self) -> String {
        let names: Vec<String> = self.hosts.iter().map(ToString::to_string).collect();
        names.join(",")
    }
}

/// Starts the search of a live guest, if there are hosts to search.
pub fn start(
    search: &Arc<Search>,
    port: u16,
    state: &Arc<PrimaryState>,
    heartbeats: &Arc<Heartbeats>,
) -> std::io::Result<()> {
    if search.hosts.is_empty() {
        return Ok(());
    }
    let (search, state, heartbeats) = (Arc::clone(search), Arc::clone(state), Arc::clone(heartbeats));
    spawn("search", move || search.run(port, &state, &heartbeats))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pair::primary::state::testing::{alone, join};

    #[test]
    fn a_host_that_failed_is_passed_over_until_it_is_due() {
        let hosts = ["192.0.2.1:7700", "192.0.2.2:7700"].map(|text| text.parse().unwrap());
        let search = Search::new(hosts.to_vec(), "web-1", None);
        let now = Instant::now();
        assert_eq!(search.due(now).collect::<Vec<_>>(), hosts);
        assert!(search.failed(hosts[0].ip(), "it was lost"));
        assert_eq!(search.due(now).collect::<Vec<_>>(), hosts[1..]);
        assert_eq!(search.due(now + Duration::from_secs(2)).collect::<Vec<_>>(), hosts);
    }

    #[test]
    fn a_guest_that_is_alone_invites_and_one_with_a_backup_does_not() {
        let standby =
            Heartbeats::start("127.0.0.1:0".parse().unwrap(), "web-1", ft_log::Role::Backup, INVITE_EVERY)
                .unwrap();
        let primary =
            Heartbeats::start("127.0.0.1:0".parse().unwrap(), "web-1", ft_log::Role::Primary, INVITE_EVERY)
                .unwrap();
        let (calls, called) = crossbeam_channel::bounded(16);
        let key = Key::new([7; 32]);
        standby.await_invitations(calls, invitation_key(Some(&key)));
        let search = Arc::new(Search::new(vec![standby.local_address()], "web-1", Some(&key)));
        let state = alone();
        start(&search, 7_701, &state, &Arc::new(primary)).unwrap();
        let limit = Duration::from_secs(10);
        let call = called.recv_timeout(limit).unwrap();
        let expected = Invitation { view: 1, guest: guest_name_hash("web-1"), port: 7_701 };
        assert_eq!(call.invitation, Ok(expected));
        assert!(call.from.ip().is_loopback());
        called.recv_timeout(limit).unwrap();
        join(&state, 0);
        // At most one was under way.
        std::thread::sleep(INVITE_EVERY);
        while called.try_recv().is_ok() {}
        assert!(called.recv_timeout(3 * INVITE_EVERY).is_err(), "a guest with a backup invites nobody");
    }
}
