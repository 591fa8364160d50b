//! `vmft replay FILE`.
//!
//! Owns: reading a recording from start to end. Must never: let an effect out, except console text that was
//! asked for.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use devices::Effect;
use ft_log::{GuestTime, LogPart, PositionSource, RecordingReader};

use super::{CommandError, say};
use crate::boot;
use crate::guest::GuestError;
use crate::kvm::Kvm;
use crate::launch::Ending;
use crate::position::{self, BranchCounter, PositionError, Wanted};
use crate::run::{self, Follow, PartSource, RunError, Stopped};
use crate::snapshot;

struct FromFile {
    reader: RecordingReader<File>,
}

impl PartSource for FromFile {
    fn next(&mut self) -> Result<Option<LogPart>, RunError> {
        Ok(self.reader.next_part()?)
    }

    fn executed(&mut self, _: u64, _: GuestTime) {}
}

/// `vmft replay FILE`.
pub fn replay(file: &Path, console: bool) -> Result<Ending, CommandError> {
    replay_with(file, console, |source| position::choose(Wanted::Source(source)))
}

/// As [`replay`], with a counter of the caller's for the recording's position source.
pub fn replay_with(
    file: &Path,
    console: bool,
    counter: impl FnOnce(PositionSource) -> Result<Option<Box<dyn BranchCounter>>, PositionError>,
) -> Result<Ending, CommandError> {
    let kvm = Kvm::open()?;
    let mut reader = RecordingReader::open(file)?;
    let (config, mut machine) = snapshot::load(&kvm, reader.snapshot(), |_| {})
        .map_err(|source| CommandError::RecordingStart { path: file.into(), source })?;
    let (_, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?).map_err(GuestError::from)?;
    if cpu != config.cpu {
        return Err(CommandError::Unfit(format!(
            "the recording {} was made on a CPU {}, this host has {cpu}: their instructions may differ",
            file.display(),
            config.cpu
        )));
    }
    reader.snapshot_is_at(machine.anchors());
    // As the recording was made, or not at all.
    machine.count_branches(counter(config.positions)?);
    tracing::info!(guest = %config.name, positions = %config.positions, anchor = machine.anchors(), "replaying");
    let started = Instant::now();
    let cursor = snapshot::cursor(&machine);
    let end_page = config.end_page();
    let mut door = Follow::new(FromFile { reader }, cursor, config.board, end_page);
    if console {
        door.watch_effects(Box::new(|effect| {
            if let Effect::Console(byte) = effect {
                // A reader that is gone does not disturb the replay.
                let _ = std::io::stdout().write_all(&[*byte]);
            }
        }));
    }
    let stopped = run::run(&mut machine, &mut door)?;
    if let Some(how) = door.source_mut().reader.divergence().filter(|_| stopped == Stopped::LogEnded) {
        say(format_args!(
            "replay equal up to anchor {}, in {:.2} s: all that a backup was sent until its guest diverged {how}; so the \
             log is sound, and the backup's host erred",
            machine.anchors(),
            started.elapsed().as_secs_f64(),
        ))?;
        return Ok(Ending::Orderly);
    }
    if stopped == Stopped::LogEnded || !door.was_equal() {
        return Err(RunError::Truncated { anchor: machine.anchors() }.into());
    }
    let digest = machine.state_digest();
    say(format_args!(
        "replay equal: {} anchors in {:.2} s; registers {:016x} memory {:016x} devices {:016x}",
        machine.anchors(),
        started.elapsed().as_secs_f64(),
        digest.registers,
        digest.memory,
        digest.devices
    ))?;
    Ok(Ending::Orderly)
}
