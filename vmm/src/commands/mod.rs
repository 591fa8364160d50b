//! The monitor's commands: arguments become settings, and one call.
//!
//! Owns: the exit status of each error, what is printed, and how a process starts over in another role. Must never: run a guest
//! or a pair itself.

mod alone;
mod check_kernel;
mod doctor;
mod keygen;
mod operate;
pub mod replay;
mod restart;

use std::fmt::Display;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use thiserror::Error;

use crate::config::{Cli, Command};
use crate::control::socket::SocketError;
use crate::guest::GuestError;
use crate::host::backends::OutletError;
use crate::kvm::KvmError;
use crate::launch::{Ending, LaunchError};
use crate::pair::wire::key_file::KeyFileError;
use crate::pair::{Leave, PairError, backup, primary};
use crate::position::PositionError;
use crate::run::RunError;
use crate::snapshot::SnapshotError;

/// What can go wrong with a command.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CommandError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
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
    Pair(#[from] PairError),
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    #[error(transparent)]
    Control(#[from] SocketError),
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
}

impl CommandError {
    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Run(RunError::Diverged(_)) => 4,
            Self::Pair(error) => error.status(),
            _ => 1,
        }
    }
}

/// Prints what a command has to say. It may fail at any time: whoever reads it may be gone.
fn say(text: impl Display) -> Result<(), CommandError> {
    let mut output = std::io::stdout().lock();
    writeln!(output, "{text}").and_then(|()| output.flush()).map_err(|source| CommandError::Output { source })
}

/// Does what the command line says.
pub fn execute(cli: Cli) -> Result<Ending, CommandError> {
    let leave: Leave = Arc::new(|| restart::leave_after_lost_claim());
    let ending = match cli.command {
        Command::Run(guest) => alone::run(&guest.settings()),
        Command::Record { file, guest, position } => {
            alone::record(&file, &guest.settings(), position.position)
        }
        Command::Replay { file, console } => replay::replay(&file, console),
        Command::Primary(args) => {
            let (pair, guest) = args.settings();
            Ok(primary::session::primary(&pair, &guest, args.listen, leave)?)
        }
        Command::Backup(args) => Ok(backup::backup(&args.settings(), args.connect, leave)?),
        Command::Standby(args) => Ok(backup::standby(&args.settings(), args.listen, leave)?),
        Command::Keygen { file } => keygen::keygen(&file),
        Command::CheckKernel { file, addresses } => check_kernel::check_kernel(&file, addresses),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Status(args) => operate::status(&args),
        Command::Switch(target) => operate::switch(&target),
        Command::Pause(target) => operate::pause(&target),
        Command::Resume(target) => operate::resume(&target),
        Command::Shutdown(args) => operate::shutdown(&args),
        Command::DropBackup(target) => operate::drop_backup(&target),
    }?;
    match ending {
        Ending::LostClaim => restart::after_lost_claim(),
        Ending::StartsOver => Err(restart::as_standby()),
        Ending::HandedOver(successor) => Err(restart::as_backup_of(successor)),
        ending => Ok(ending),
    }
}
