//! A guest on its way to its first instruction, with what the host lends it; and how it ended.
//!
//! Owns: the order in which the host's resources are opened, the guest's terminal, the operator's signals. Must never: leave
//! the terminal, a tap, a lock or a file behind, whatever fails; or know who runs the guest, alone or as one of a pair.
//! Threads: `signals`, and those of the resources that it starts. Locks: none.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::BoardConfig;
use nix::sys::signal::{SigSet, Signal};
use thiserror::Error;

use crate::guest::{BootFiles, GuestConfig, GuestError};
use crate::host;
use crate::host::LogEvent;
use crate::host::backends::Resources;
use crate::host::console::{ConsoleReader, RawTerminal};
use crate::host::deferral::{Deferral, Watch};
use crate::host::disk::{Caching, Disk, DiskError};
use crate::host::inbox::Inbox;
use crate::host::tap::{Tap, TapError};
use crate::kvm::{Kvm, KvmError};
use crate::machine::{GuestEnd, Machine};
use crate::position::{self, BranchCounter};
use crate::run::{Mailbox, StopKind, Stopped, VcpuHandle};

/// Set by the operator's signals alone.
static ASKED: AtomicBool = AtomicBool::new(false);

/// What a guest is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSettings {
    /// Its name. Both monitors of a pair use the same.
    pub name: String,
    /// An x86-64 vmlinux or bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Added to the kernel command line.
    pub cmdline: Option<String>,
    /// Its memory.
    pub memory_mib: u64,
    /// The raw disk image.
    pub disk: Option<PathBuf>,
    /// It may not write its disk.
    pub disk_read_only: bool,
    /// The tap interface of its network card.
    pub tap: Option<String>,
    /// The network card's address; `None`: made from the guest's name.
    pub mac: Option<[u8; 6]>,
    /// How long an event may wait for the guest's next exit.
    pub defer: Duration,
}

impl GuestSettings {
    /// The network card's address: as given, or made from the guest's name, so that it is the same at
    /// every start. Locally administered, unicast.
    pub fn mac(&self) -> [u8; 6] {
        self.mac.unwrap_or_else(|| {
            let hash = xxhash_rust::xxh3::xxh3_64(self.name.as_bytes()).to_le_bytes();
            [0x52, 0x54, hash[0], hash[1], hash[2], hash[3]]
        })
    }
}

/// How the monitor ended; each has its own exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest ended in an orderly way, or was stopped on request. Status 0.
    Orderly,
    /// The guest crashed. Status 5.
    GuestCrashed,
    /// Another monitor owns the guest now. Status 3.
    LostClaim,
    /// A standby could not follow its primary, and starts over. No status.
    StartsOver,
    /// The backup runs the guest now, as the operator wanted, and takes backups at this address. No status: this
    /// monitor continues as its backup.
    HandedOver(SocketAddr),
}

impl Ending {
    /// The process's exit status. 1 is an error, 2 a wrong command line, 4 a divergence.
    pub fn status(self) -> u8 {
        match self {
            Self::Orderly | Self::StartsOver | Self::HandedOver(_) => 0,
            Self::LostClaim => 3,
            Self::GuestCrashed => 5,
        }
    }

    /// Of a guest whose run ended after `anchors` exits. Says how, if it ended itself.
    pub fn of_run(stopped: Stopped, anchors: u64) -> Self {
        let Stopped::GuestEnded(end) = stopped else { return Self::Orderly };
        let (how, sentence) = match end {
            GuestEnd::PowerOff => ("power-off", "the guest powered itself off"),
            GuestEnd::Reset => ("reset", "the guest asked for a reset"),
            GuestEnd::TripleFault => ("triple-fault", "the guest crashed with a triple fault"),
            GuestEnd::HaltedForever => {
                ("halted", "the guest halted with interrupts off: nothing can wake it")
            }
        };
        tracing::info!(event = %LogEvent::GuestEnded, how, anchors, "{sentence}");
        if end.is_crash() { Self::GuestCrashed } else { Self::Orderly }
    }
}

/// Why a guest cannot be started.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum LaunchError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    /// Something that the host should always be able to give.
    #[error("this host cannot {what}: {source}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl LaunchError {
    /// The host could not do `what`.
    pub fn host(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// A guest that has not run yet, with the host's resources for it opened and checked.
pub struct Prepared {
    /// What both sides of a pair must agree on.
    pub config: GuestConfig,
    /// The guest.
    pub machine: Machine,
    /// Its disk and tap, at rest.
    pub resources: Resources,
}

/// `counter` supplies the positions of forced stops.
///
/// # Errors
/// The host is unfit, or does not have what `settings` name.
pub fn prepare(
    settings: &GuestSettings,
    caching: Caching,
    counter: Option<Box<dyn BranchCounter>>,
) -> Result<Prepared, LaunchError> {
    let memory_bytes = GuestConfig::memory_bytes(settings.memory_mib)?;
    let kvm = Kvm::open()?;
    let GuestSettings { disk, disk_read_only, tap, .. } = settings;
    let resources = open_resources(disk.as_deref(), *disk_read_only, tap.as_deref(), caching)?;
    let board = BoardConfig {
        epoch_s: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        ram_bytes: memory_bytes,
        net_mac: tap.is_some().then(|| settings.mac()),
        disk_bytes: resources.disk.as_ref().map(Disk::capacity_bytes),
        disk_read_only: *disk_read_only,
        disk_write_through: caching == Caching::WriteThrough,
    };
    let mut config = GuestConfig::new(&kvm, &settings.name, memory_bytes, board)?;
    config.positions = position::source_of(counter.as_deref());
    let files = BootFiles {
        kernel: settings.kernel.clone(),
        initrd: settings.initrd.clone(),
        cmdline: settings.cmdline.clone(),
    };
    let mut seed = [0; 32];
    host::random_bytes(&mut seed).map_err(LaunchError::host("give random bytes"))?;
    let mut machine = config.boot(&kvm, &files, seed)?;
    machine.count_branches(counter);
    Ok(Prepared { config, machine, resources })
}

fn open_resources(
    disk: Option<&Path>,
    read_only: bool,
    tap: Option<&str>,
    caching: Caching,
) -> Result<Resources, LaunchError> {
    Ok(Resources {
        disk: disk.map(|path| Disk::open(path, read_only, caching)).transpose()?,
        tap: tap.map(Tap::open).transpose()?,
    })
}

/// This terminal as the guest's console, until dropped.
pub struct Terminal {
    /// Its reader.
    pub reader: ConsoleReader,
    _raw: Option<RawTerminal>,
}

impl Terminal {
    /// What is typed goes to `inbox`.
    ///
    /// # Errors
    /// The terminal cannot be made raw, or the host has no thread.
    pub fn start(inbox: &Inbox) -> Result<Self, LaunchError> {
        let raw = RawTerminal::enter(std::io::stdin().as_fd())
            .map_err(LaunchError::host("set the terminal to raw mode"))?;
        let reader = ConsoleReader::start(std::io::stdin(), inbox.clone())
            .map_err(LaunchError::host("start the console's thread"))?;
        Ok(Self { reader, _raw: raw })
    }
}

/// Starts a thread that nobody waits for.
///
/// # Errors
/// The host has none.
pub fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), LaunchError> {
    host::spawn(name, body).map(drop).map_err(LaunchError::host("start a thread"))
}

/// Lets nothing wait for the guest for longer than `deferral` says.
///
/// # Errors
/// The host has no thread.
pub fn watch(deferral: &Arc<Deferral>, vcpu: &VcpuHandle) -> Result<Watch, LaunchError> {
    let vcpu = vcpu.clone();
    deferral.watch(move || vcpu.kick()).map_err(LaunchError::host("start the deferral thread"))
}

/// For the thread that will run the guest: SIGINT and SIGTERM now stop that. Call before any other thread exists that takes
/// signals, because these are blocked in all of them.
///
/// # Errors
/// The host takes no signal handler, or has no thread.
pub fn take_signals() -> Result<(VcpuHandle, Mailbox), LaunchError> {
    let (vcpu, mailbox) = VcpuHandle::new()?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().map_err(|error| LaunchError::host("block signals")(error.into()))?;
    let stopped = vcpu.clone();
    start_thread("signals", move || {
        while signals.wait().is_ok() {
            ASKED.store(true, Ordering::Relaxed);
            stopped.stop(StopKind::Leave);
        }
    })?;
    Ok((vcpu, mailbox))
}

/// Did the operator ask this process to end, by a signal?
pub fn asked_to_end() -> bool {
    ASKED.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_network_card_is_given_or_made_from_the_name() {
        let settings = |name: &str, mac| GuestSettings {
            name: name.into(),
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: None,
            memory_mib: 1,
            disk: None,
            disk_read_only: false,
            tap: None,
            mac,
            defer: Duration::ZERO,
        };
        let given = [2, 0, 0, 0, 0, 1];
        assert_eq!(settings("web", Some(given)).mac(), given);
        let made = settings("web", None).mac();
        assert_eq!((made, made[0] & 3), (settings("web", None).mac(), 2));
        assert_ne!(made, settings("db", None).mac());
    }
}
