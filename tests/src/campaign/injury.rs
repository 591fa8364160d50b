//! One fault as it is injected and undone.
//!
//! States: begun -> undone. A host that has lost power gets it back when the guest is protected again, all else is
//! undone after the time that the schedule says. Dropping it undoes nothing but a slowed host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::schedule::{Fault, Kind, Role};
use super::services::Services;
use super::witness::{Disks, Resumes};
use crate::hosts::{HostError, Link, SmallDir, TestHost};
use crate::pair::Site;

/// A slowed host stands still for the first part of each period.
const STILL: Duration = Duration::from_millis(180);
const AWAKE: Duration = Duration::from_millis(20);

/// What an injury needs besides the site.
#[derive(Debug)]
pub struct Tools {
    /// The claims directory.
    pub claims: SmallDir,
    /// When hosts that stood still went on.
    pub resumes: Resumes,
    /// Which file server is whose.
    pub disks: Disks,
    /// The campaign's start.
    pub epoch: Instant,
}

/// See the module's description.
#[derive(Debug)]
pub struct Injury {
    /// What.
    pub fault: Fault,
    /// To which host; `None` if to none in particular.
    pub host: Option<u8>,
    /// When, since the campaign's start.
    pub at: Duration,
    slowing: Option<Slowing>,
    booting: bool,
    undone: bool,
}

impl Injury {
    /// Injects `fault` into a pair that is protected.
    pub fn begin(fault: Fault, site: &Site, services: &Services, tools: &Tools) -> Result<Injury, HostError> {
        let standing = services.standing();
        let host = match fault.role {
            None => None,
            Some(Role::Primary) => standing.latest().map(|latest| latest.host),
            Some(Role::Backup) => standing.backup(),
        };
        let mut injury =
            Injury { fault, host, at: tools.epoch.elapsed(), slowing: None, booting: false, undone: false };
        if matches!(fault.kind, Kind::FillClaims | Kind::FillClaimsAndKill) {
            tools.claims.fill()?;
        }
        let Some(number) = host else { return Ok(injury) };
        let host = site.host(number);
        match fault.kind {
            Kind::FillClaims => {}
            Kind::KillMonitor | Kind::FillClaimsAndKill => {
                if let Some(monitor) = services.monitor_on(number) {
                    monitor.kill(Signal::SIGKILL)?;
                }
            }
            Kind::LoseHost => host.kill(),
            Kind::HangHost => host.stop(),
            Kind::CutLog => host.cut(Link::Log)?,
            Kind::CutGuest => host.cut(Link::Guest)?,
            Kind::CutBoth => {
                host.cut(Link::Log)?;
                host.cut(Link::Guest)?;
            }
            Kind::SlowHost => {
                injury.slowing = Some(Slowing::start(site.shared_host(number), number, tools));
            }
        }
        Ok(injury)
    }

    /// Undoes it when it is time for that; true once it is undone.
    pub fn tend(&mut self, site: &mut Site, protected: bool, tools: &Tools) -> Result<bool, HostError> {
        if self.undone {
            return Ok(true);
        }
        if tools.epoch.elapsed() < self.at + self.fault.lasts {
            return Ok(false);
        }
        if let (Kind::LoseHost, Some(number)) = (self.fault.kind, self.host) {
            if !self.booting && protected {
                self.booting = true;
                site.power_on(number)?;
            }
            if !self.booting || !site.host(number).is_ready() {
                return Ok(false);
            }
            site.greet(number)?;
            tools.disks.note(site.host(number));
        }
        self.undo(site, tools)?;
        self.undone = true;
        Ok(true)
    }

    /// The host on which nothing can be started now because of this.
    pub fn out_of_reach(&self) -> Option<u8> {
        let kinds = [Kind::LoseHost, Kind::HangHost, Kind::SlowHost];
        self.host.filter(|_| !self.undone && kinds.contains(&self.fault.kind))
    }

    fn undo(&mut self, site: &Site, tools: &Tools) -> Result<(), HostError> {
        if matches!(self.fault.kind, Kind::FillClaims | Kind::FillClaimsAndKill) {
            tools.claims.empty()?;
        }
        let Some(number) = self.host else { return Ok(()) };
        let host = site.host(number);
        match self.fault.kind {
            Kind::HangHost => {
                tools.resumes.note(number, tools.epoch.elapsed());
                host.cont();
            }
            Kind::CutLog => host.restore(Link::Log)?,
            Kind::CutGuest => host.restore(Link::Guest)?,
            Kind::CutBoth => {
                host.restore(Link::Log)?;
                host.restore(Link::Guest)?;
            }
            Kind::SlowHost => self.slowing = None,
            Kind::KillMonitor | Kind::FillClaimsAndKill | Kind::LoseHost | Kind::FillClaims => {}
        }
        Ok(())
    }
}

/// Lets a host stand still again and again, until it is dropped.
#[derive(Debug)]
struct Slowing {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slowing {
    fn start(host: Arc<TestHost>, number: u8, tools: &Tools) -> Slowing {
        let over = Arc::new(AtomicBool::new(false));
        let (until, resumes, epoch) = (Arc::clone(&over), tools.resumes.clone(), tools.epoch);
        let thread = thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                host.stop();
                thread::sleep(STILL);
                resumes.note(number, epoch.elapsed());
                host.cont();
                thread::sleep(AWAKE);
            }
        });
        Slowing { over, thread: Some(thread) }
    }
}

impl Drop for Slowing {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It panics at nothing; a host that is dead cannot be stopped, which is no error.
            let _ = thread.join();
        }
    }
}
