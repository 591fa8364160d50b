//! What a service manager on each host does: starts a monitor that has ended again, as a standby.
//!
//! Nothing here looks at who runs the guest or needs a backup. That primaries find their backups, that standbys join,
//! and that a monitor which lost its claim stands by is the monitors' own doing.

use std::time::{Duration, Instant};

use super::standing::{Change, Standing, Statement};
use crate::events::DESYNCHRONISED;
use crate::hosts::HostError;
use crate::pair::{Guest, LONG, Monitor, SERVICE_READY, Site, Volume};

/// From an end to the next start, as in `packaging/vmft-standby@.service`.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// See the module's description.
#[derive(Debug)]
pub struct Services {
    guest: Guest,
    volume: Volume,
    epoch: Instant,
    /// In the order in which they were started. The first is the first primary.
    monitors: Vec<Monitor>,
    /// For each host, when its last monitor was seen to have ended.
    ended: Vec<Option<Instant>>,
}

impl Services {
    /// Starts the guest on host 1, waits until its service listens, and starts a standby on each other host. Times are
    /// since `epoch`.
    pub fn start(
        site: &mut Site,
        hosts: u8,
        guest: Guest,
        volume: Volume,
        epoch: Instant,
    ) -> Result<Services, HostError> {
        let primary = site.start_primary_with(1, &guest, &volume, &site.hosts_option())?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let mut monitors = vec![primary];
        for host in 2..=hosts {
            monitors.push(site.start_standby(host, &guest, &volume)?);
        }
        Ok(Services { guest, volume, epoch, monitors, ended: vec![None; hosts.into()] })
    }

    /// Who runs the guest and whether it is protected.
    pub fn standing(&self) -> Standing {
        let first = self.monitors.first().map(|primary| Statement {
            at: Duration::ZERO,
            host: primary.host,
            view: 1,
            change: Change::Started,
        });
        let lines = self.monitors.iter().flat_map(|monitor| {
            let mut statements = Vec::new();
            let mut backup = None;
            for (at, line) in monitor.timed_output() {
                let at = at.saturating_duration_since(self.epoch);
                statements.extend(Statement::of_line(&line, monitor.host, at, &mut backup));
            }
            statements
        });
        Standing::new(first.into_iter().chain(lines).collect())
    }

    /// What backups said whose guests were not their primaries' any more. No fault of a campaign may lead to that.
    pub fn useless_backups(&self) -> Vec<String> {
        let of = |monitor: &Monitor| {
            let said = monitor.output().into_iter().filter(|line| line.contains(DESYNCHRONISED));
            said.map(|line| format!("host {}: {line}", monitor.host)).collect::<Vec<_>>()
        };
        self.monitors.iter().flat_map(of).collect()
    }

    /// The monitor that was started last on a host.
    pub fn monitor_on(&self, host: u8) -> Option<&Monitor> {
        self.monitors.iter().rev().find(|monitor| monitor.host == host)
    }

    /// Starts what has ended, but nothing on the host `out_of_reach`.
    pub fn tend(&mut self, site: &mut Site, out_of_reach: Option<u8>) -> Result<(), HostError> {
        for (host, index) in (1..).zip(0..self.ended.len()) {
            if Some(host) == out_of_reach || !site.host(host).is_running() {
                continue;
            }
            if self.monitor_on(host).is_none_or(|monitor| monitor.ending().is_none()) {
                continue;
            }
            let ended = *self.ended[index].get_or_insert_with(Instant::now);
            if ended.elapsed() >= RESTART_DELAY {
                self.ended[index] = None;
                self.monitors.push(site.start_standby(host, &self.guest, &self.volume)?);
            }
        }
        Ok(())
    }
}
