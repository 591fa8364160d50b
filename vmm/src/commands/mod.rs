//! The monitor's commands.
//!
//! Owns: the order in which a command checks what it was given, builds a guest, runs it and cleans up.
//! Must never: leave the terminal, a tap, a lock or a file behind, whatever fails.

mod again;
mod alone;
mod backup;
mod check_kernel;
mod doctor;
mod heal;
mod keygen;
mod operate;
mod orders;
mod pair;
pub mod replay;
mod standby;
mod stop;
mod takeover;

use std::fmt::Display;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub use again::leave_after_lost_claim;
use devices::BoardConfig;
use stop::Stop;
use thiserror::Error;

use crate::config::{Cli, Command, GuestArgs};
use crate::control::LogEvent;
use crate::control::metrics::MetricsError;
use crate::control::socket::SocketError;
use crate::guest::{BootFiles, GuestConfig, GuestError};
use crate::host;
use crate::host::console::{ConsoleReader, RawTerminal};
use crate::host::deferral::{Deferral, Inbox, Watch};
use crate::host::disk::{Caching, Disk, DiskError};
use crate::host::tap::{Tap, TapError};
use crate::kvm::{Kvm, KvmError};
use crate::machine::{GuestEnd, Machine};
use crate::outlet::{OutletError, Resources};
use crate::position::{self, BranchCounter, PositionError};
use crate::run::{RunError, Stopped};
use crate::snapshot::SnapshotError;

/// How the monitor ended; each has its own exit status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest ended in an orderly way, or was stopped on request. Status 0.
    Orderly,
    /// The guest crashed. Status 5.
    GuestCrashed,
    /// Another monitor owns the guest now. Status 3.
    LostClaim,
    /// The backup runs the guest now, as the operator wanted, and takes backups at this address. No status: this
    /// monitor goes on as its backup.
    HandedOver(SocketAddr),
}

impl Ending {
    /// The process's exit status. 1 is an error, 2 a wrong command line, 4 a divergence.
    pub fn status(self) -> u8 {
        match self {
            Self::Orderly | Self::HandedOver(_) => 0,
            Self::LostClaim => 3,
            Self::GuestCrashed => 5,
        }
    }
}

/// What can go wrong with a command.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CommandError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Tap(#[from] TapError),
    #[error(transparent)]
    Outlet(#[from] OutletError),
    #[error(transparent)]
    Recording(#[from] ft_log::RecordingError),
    #[error(transparent)]
    Position(#[from] PositionError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Pair(#[from] pair::PairError),
    #[error(transparent)]
    Heal(#[from] heal::HealError),
    #[error(transparent)]
    Control(#[from] SocketError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(transparent)]
    Operate(#[from] operate::OperateError),
    /// The guest at the start of a recording.
    #[error("the recording {path} cannot be replayed from its start: {source}", path = path.display())]
    RecordingStart {
        path: PathBuf,
        #[source]
        source: SnapshotError,
    },
    #[error("{0}")]
    Unfit(String),
    /// What the command was to print.
    #[error("standard output cannot be written: {source}")]
    Output {
        #[source]
        source: std::io::Error,
    },
    /// Something that the host should always be able to give.
    #[error("this host cannot {what}: {source}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

impl CommandError {
    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Run(RunError::Diverged(_)) => 4,
            Self::Heal(error) => error.status(),
            _ => 1,
        }
    }

    fn host(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Host { what, source }
    }
}

/// Prints what a command has to say. It may fail at any time: whoever reads it may be gone.
fn say(text: impl Display) -> Result<(), CommandError> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{text}").and_then(|()| output.flush()).map_err(|source| CommandError::Output { source })
}

/// Does what the command line says.
pub fn execute(cli: Cli) -> Result<Ending, CommandError> {
    let ending = match cli.command {
        Command::Run(guest) => alone::run(&guest),
        Command::Record { file, guest, position } => alone::record(&file, &guest, position.position),
        Command::Replay { file, console } => replay::replay(&file, console),
        Command::Primary(args) => pair::primary(&args),
        Command::Backup(args) => backup::backup(&args),
        Command::Keygen { file } => keygen::keygen(&file),
        Command::CheckKernel { file, addresses } => check_kernel::check_kernel(&file, addresses),
        Command::Standby(args) => standby::standby(&args),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Status(args) => operate::status(&args),
        Command::Switch(target) => operate::switch(&target),
        Command::Pause(target) => operate::pause(&target),
        Command::Resume(target) => operate::resume(&target),
        Command::Shutdown(args) => operate::shutdown(&args),
        Command::DropBackup(target) => operate::drop_backup(&target),
    }?;
    match ending {
        Ending::LostClaim => again::after_lost_claim(),
        Ending::HandedOver(successor) => Err(again::as_backup_of(successor)),
        ending => Ok(ending),
    }
}

/// A guest that has not run yet, with the host's resources for it opened and checked.
struct Prepared {
    config: GuestConfig,
    machine: Machine,
    resources: Resources,
}

/// `counter` supplies the positions of forced stops.
fn prepare(
    args: &GuestArgs,
    caching: Caching,
    counter: Option<Box<dyn BranchCounter>>,
) -> Result<Prepared, CommandError> {
    let memory_bytes = GuestConfig::memory_bytes(args.memory_mib)?;
    let kvm = Kvm::open()?;
    let resources = open_resources(args.disk.as_deref(), args.disk_read_only, args.tap.as_deref(), caching)?;
    let board = BoardConfig {
        epoch_s: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
        ram_bytes: memory_bytes,
        net_mac: args.tap.is_some().then(|| args.mac()),
        disk_bytes: resources.disk.as_ref().map(Disk::capacity_bytes),
        disk_read_only: args.disk_read_only,
        disk_write_through: caching == Caching::WriteThrough,
    };
    let mut config = GuestConfig::new(&kvm, &args.name, memory_bytes, board)?;
    config.positions = position::source_of(counter.as_deref());
    let files =
        BootFiles { kernel: args.kernel.clone(), initrd: args.initrd.clone(), cmdline: args.cmdline.clone() };
    let mut seed = [0; 32];
    crate::host::random_bytes(&mut seed).map_err(CommandError::host("give random bytes"))?;
    let mut machine = config.boot(&kvm, &files, seed)?;
    machine.count_branches(counter);
    Ok(Prepared { config, machine, resources })
}

fn open_resources(
    disk: Option<&Path>,
    read_only: bool,
    tap: Option<&str>,
    caching: Caching,
) -> Result<Resources, CommandError> {
    Ok(Resources {
        disk: disk.map(|path| Disk::open(path, read_only, caching)).transpose()?,
        tap: tap.map(Tap::open).transpose()?,
    })
}

/// This terminal as the guest's console, until dropped.
struct Terminal {
    reader: ConsoleReader,
    _raw: Option<RawTerminal>,
}

impl Terminal {
    fn start(inbox: &Inbox) -> Result<Self, CommandError> {
        use std::os::fd::AsFd;
        let raw = RawTerminal::enter(std::io::stdin().as_fd())
            .map_err(CommandError::host("set the terminal to raw mode"))?;
        let reader = ConsoleReader::start(std::io::stdin(), inbox.clone())
            .map_err(CommandError::host("start the console's thread"))?;
        Ok(Self { reader, _raw: raw })
    }
}

/// Starts a thread that nobody waits for.
fn start_thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    host::spawn(name, body).map(drop).map_err(CommandError::host("start a thread"))
}

/// Lets nothing wait for the guest for longer than `deferral` says.
fn watch(deferral: &Arc<Deferral>, stop: &Stop) -> Result<Watch, CommandError> {
    let stop = stop.clone();
    deferral.watch(move || stop.kick()).map_err(CommandError::host("start the deferral thread"))
}

/// Says how a guest ended.
fn ending(stopped: Stopped, anchors: u64) -> Ending {
    match stopped {
        Stopped::GuestEnded(end) => {
            let (how, sentence) = match end {
                GuestEnd::PowerOff => ("power-off", "the guest powered itself off"),
                GuestEnd::Reset => ("reset", "the guest asked for a reset"),
                GuestEnd::TripleFault => ("triple-fault", "the guest crashed with a triple fault"),
                GuestEnd::HaltedForever => {
                    ("halted", "the guest halted with interrupts off: nothing can wake it")
                }
            };
            tracing::info!(event = %LogEvent::GuestEnded, how, anchors, "{sentence}");
            if end.is_crash() { Ending::GuestCrashed } else { Ending::Orderly }
        }
        Stopped::Requested | Stopped::LogEnded | Stopped::ReplayEqual => Ending::Orderly,
    }
}
