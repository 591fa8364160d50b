//! The other hosts of a configuration: their addresses, and what is remembered of each.
//!
//! Owns: how `--hosts` is read, and the waiting times of hosts that failed. Must never: do I/O, or look at a clock.
//!
//! ```text
//!   due ── failed or unfit ──> waits 1 s, then 2 s, then 4 s at most ──> due
//!    └──── busy ─────────────> waits 500 ms ─────────────────────────────> due
//! ```
//!
//! Hosts are told apart by their IP addresses. A host that has failed is passed over while it waits, so that others
//! come first; it is never given up.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::{Duration, Instant};

/// The port of an entry that names none.
pub const DEFAULT_PORT: u16 = 7700;
/// Most entries of a list.
const HOSTS_MAX: usize = 32;
/// Most hosts that are remembered: those of the list, and others that come by themselves.
const REMEMBERED_MAX: usize = 2 * HOSTS_MAX;
/// How long a host waits after one failure; twice that after the next, and so on, up to the other.
const WAIT_FIRST: Duration = Duration::from_secs(1);
const WAIT_LONGEST: Duration = Duration::from_secs(4);
/// Failures further apart than this are not counted together.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// How long a host waits that found the place taken.
const WAIT_BUSY: Duration = Duration::from_millis(500);

/// Why a list of hosts cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostsError {
    /// Nothing, or nothing between two commas.
    #[error("an entry is empty: name each host as ADDR:PORT, separated by commas")]
    Empty,
    /// Not an address. Names are not looked up: the network's name service would be needed at a failure.
    #[error(
        "'{entry}' is not an IP address: use ADDR:PORT, ADDR (port {DEFAULT_PORT}) or [ADDR6]:PORT, no names"
    )]
    NotAnAddress {
        /// As given.
        entry: String,
    },
    /// An address at which no single host can be.
    #[error("'{entry}' is not the address and port of one host")]
    NotAHost {
        /// As given.
        entry: String,
    },
    /// The same host again.
    #[error("{address} is named twice")]
    Twice {
        /// The address.
        address: SocketAddr,
    },
    /// Too long.
    #[error("{count} hosts are too many: {HOSTS_MAX} at most")]
    TooMany {
        /// The number of entries.
        count: usize,
    },
    /// A socket reaches one family only.
    #[error(
        "--hosts names {host}, which cannot be reached from --listen {listen}: both must be IPv4, or both IPv6"
    )]
    Family {
        /// The host.
        host: SocketAddr,
        /// This host's own address.
        listen: SocketAddr,
    },
    /// There is no other.
    #[error("--hosts names this host alone (--listen {listen}): name the others, too")]
    OnlyThis {
        /// This host's own address.
        listen: SocketAddr,
    },
}

/// The hosts of a configuration as `--hosts` names them; this host may be among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostList(Vec<SocketAddr>);

impl FromStr for HostList {
    type Err = HostsError;

    fn from_str(text: &str) -> Result<Self, HostsError> {
        let mut hosts = Vec::new();
        for entry in text.split(',').map(str::trim) {
            let address = parse_host(entry)?;
            if hosts.contains(&address) {
                return Err(HostsError::Twice { address });
            }
            hosts.push(address);
        }
        if hosts.len() > HOSTS_MAX {
            return Err(HostsError::TooMany { count: hosts.len() });
        }
        Ok(Self(hosts))
    }
}

impl fmt::Display for HostList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&names.join(","))
    }
}

fn parse_host(entry: &str) -> Result<SocketAddr, HostsError> {
    if entry.is_empty() {
        return Err(HostsError::Empty);
    }
    let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(entry);
    let address = match (entry.parse::<SocketAddr>(), bare.parse::<IpAddr>()) {
        (Ok(address), _) => address,
        (_, Ok(ip)) => SocketAddr::new(ip, DEFAULT_PORT),
        _ => return Err(HostsError::NotAnAddress { entry: entry.into() }),
    };
    let broadcast = matches!(address.ip(), IpAddr::V4(ip) if ip.is_broadcast());
    if address.port() == 0 || address.ip().is_unspecified() || address.ip().is_multicast() || broadcast {
        return Err(HostsError::NotAHost { entry: entry.into() });
    }
    Ok(address)
}

impl HostList {
    /// All but the monitor that listens on `listen`, which `is_local` tells for an address that is not the same.
    ///
    /// # Errors
    /// Nobody is left, or somebody is of another address family.
    pub fn others(
        &self,
        listen: SocketAddr,
        is_local: impl Fn(IpAddr) -> bool,
    ) -> Result<Vec<SocketAddr>, HostsError> {
        let itself = |host: &SocketAddr| {
            host.port() == listen.port()
                && (host.ip() == listen.ip() || (listen.ip().is_unspecified() && is_local(host.ip())))
        };
        if let Some(&host) = self.0.iter().find(|host| host.is_ipv4() != listen.is_ipv4()) {
            return Err(HostsError::Family { host, listen });
        }
        let others: Vec<SocketAddr> = self.0.iter().filter(|host| !itself(host)).copied().collect();
        if others.is_empty() { Err(HostsError::OnlyThis { listen }) } else { Ok(others) }
    }
}

/// What is remembered of hosts that were not of use.
#[derive(Debug, Default)]
pub struct Memory {
    hosts: Vec<Remembered>,
}

#[derive(Debug)]
struct Remembered {
    host: IpAddr,
    failures: u32,
    failed_at: Instant,
    due_at: Instant,
    said: String,
}

impl Memory {
    /// `host` failed or was refused for `cause`; it waits. True: the cause is news, and to be said.
    pub fn failed(&mut self, host: IpAddr, cause: &str, now: Instant) -> bool {
        let entry = self.entry(host, now);
        if now.saturating_duration_since(entry.failed_at) > FORGET_AFTER {
            entry.failures = 0;
        }
        let wait = WAIT_FIRST * 2u32.saturating_pow(entry.failures);
        entry.failures = entry.failures.saturating_add(1);
        entry.failed_at = now;
        entry.due_at = now + wait.min(WAIT_LONGEST);
        let news = entry.said != cause;
        cause.clone_into(&mut entry.said);
        news
    }

    /// `host` found the place taken, or has it. What was said of it may be said again.
    pub fn busy(&mut self, host: IpAddr, now: Instant) {
        let entry = self.entry(host, now);
        entry.due_at = now + WAIT_BUSY;
        entry.said.clear();
    }

    /// Is `host` through with waiting?
    pub fn is_due(&self, host: IpAddr, now: Instant) -> bool {
        self.hosts.iter().find(|entry| entry.host == host).is_none_or(|entry| now >= entry.due_at)
    }

    fn entry(&mut self, host: IpAddr, now: Instant) -> &mut Remembered {
        let found = self.hosts.iter().position(|entry| entry.host == host);
        let index = found.unwrap_or_else(|| {
            if self.hosts.len() == REMEMBERED_MAX {
                self.hosts.remove(0);
            }
            self.hosts.push(Remembered {
                host,
                failures: 0,
                failed_at: now,
                due_at: now,
                said: String::new(),
            });
            self.hosts.len() - 1
        });
        &mut self.hosts[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> Result<Vec<String>, String> {
        let hosts = text.parse::<HostList>().map_err(|error| error.to_string())?;
        Ok(hosts.0.iter().map(ToString::to_string).collect())
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn hosts_have_addresses_and_may_have_ports() {
        assert_eq!(list("192.0.2.1:7000"), Ok(vec!["192.0.2.1:7000".into()]));
        assert_eq!(list("192.0.2.1, 192.0.2.2:9"), Ok(vec!["192.0.2.1:7700".into(), "192.0.2.2:9".into()]));
        let v6 = ["[2001:db8::1]:7000", "[2001:db8::2]:7700", "[2001:db8::3]:7700"];
        assert_eq!(list("[2001:db8::1]:7000,2001:db8::2,[2001:db8::3]"), Ok(v6.map(String::from).into()));
        let shown = "192.0.2.1,192.0.2.2:9".parse::<HostList>().unwrap().to_string();
        assert_eq!(shown, "192.0.2.1:7700,192.0.2.2:9");
        assert_eq!(shown.parse::<HostList>().unwrap().to_string(), shown);
    }

    #[test]
    fn lists_that_name_no_hosts_are_refused_by_name() {
        for (text, says) in [
            ("", "empty"),
            ("192.0.2.1:1,", "empty"),
            (",", "empty"),
            ("host-b:7700", "'host-b:7700' is not an IP address"),
            ("192.0.2.1:77000", "'192.0.2.1:77000' is not an IP address"),
            ("192.0.2.1:", "'192.0.2.1:' is not an IP address"),
            ("[2001:db8::1:7000", "'[2001:db8::1:7000' is not"),
            ("0.0.0.0:7700", "not the address and port of one host"),
            ("[::]:7700", "not the address"),
            ("192.0.2.1:0", "not the address"),
            ("239.1.1.1", "not the address"),
            ("255.255.255.255:7700", "not the address"),
            ("192.0.2.1,192.0.2.1:7700", "192.0.2.1:7700 is named twice"),
        ] {
            let refused = list(text).unwrap_err();
            assert!(refused.contains(says), "{text}: {refused}");
        }
        let many: Vec<String> = (0..=HOSTS_MAX).map(|number| format!("192.0.2.{}", number + 1)).collect();
        assert_eq!(list(&many.join(",")), Err("33 hosts are too many: 32 at most".into()));
    }

    #[test]
    fn a_monitor_is_never_among_its_others() {
        let hosts: HostList = "192.0.2.1:7700,192.0.2.2:7700,192.0.2.1:7701".parse().unwrap();
        let nobody = |_| false;
        let others = hosts.others(address("192.0.2.1:7700"), nobody).unwrap();
        assert_eq!(others, [address("192.0.2.2:7700"), address("192.0.2.1:7701")]);
        let others = hosts.others(address("0.0.0.0:7700"), |ip| ip == address("192.0.2.2:1").ip()).unwrap();
        assert_eq!(others, [address("192.0.2.1:7700"), address("192.0.2.1:7701")]);
        // An address of this host that the monitor does not listen on is another monitor's.
        assert_eq!(hosts.others(address("192.0.2.9:7700"), |_| true).unwrap().len(), 3);
    }

    #[test]
    fn lists_without_another_host_in_reach_are_refused() {
        let only: HostList = "192.0.2.1:7700".parse().unwrap();
        let listen = address("192.0.2.1:7700");
        assert_eq!(only.others(listen, |_| false), Err(HostsError::OnlyThis { listen }));
        let listen = address("[2001:db8::1]:7700");
        let host = address("192.0.2.1:7700");
        assert_eq!(only.others(listen, |_| false), Err(HostsError::Family { host, listen }));
    }

    #[test]
    fn a_host_that_fails_waits_longer_each_time_up_to_a_limit() {
        let (mut memory, host, mut now) = (Memory::default(), address("192.0.2.1:1").ip(), Instant::now());
        assert!(memory.is_due(host, now));
        for wait_s in [1, 2, 4, 4, 4] {
            memory.failed(host, "broken", now);
            let wait = Duration::from_secs(wait_s);
            assert!(!memory.is_due(host, now + wait - Duration::from_millis(1)), "{wait_s}");
            now += wait;
            assert!(memory.is_due(host, now), "{wait_s}");
            assert!(memory.is_due(address("192.0.2.2:1").ip(), now), "others come first meanwhile");
        }
        now += FORGET_AFTER + WAIT_FIRST;
        memory.failed(host, "broken", now);
        assert!(memory.is_due(host, now + WAIT_FIRST), "what was long ago does not count");
    }

    #[test]
    fn a_cause_is_said_once() {
        let (mut memory, host, now) = (Memory::default(), address("192.0.2.1:1").ip(), Instant::now());
        assert!(memory.failed(host, "version", now));
        assert!(!memory.failed(host, "version", now));
        assert!(memory.failed(host, "disk", now));
        assert!(memory.failed(address("192.0.2.2:1").ip(), "disk", now));
        memory.busy(host, now);
        assert!(!memory.is_due(host, now) && memory.is_due(host, now + WAIT_BUSY));
        assert!(memory.failed(host, "disk", now), "it was of use in between");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut memory, now) = (Memory::default(), Instant::now());
        for number in 0..1_000u32 {
            memory.failed(IpAddr::V4(number.into()), "stranger", now);
        }
        assert_eq!(memory.hosts.len(), REMEMBERED_MAX);
    }
}
