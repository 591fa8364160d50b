//! `vmft run` and `vmft record`: a guest without a backup.
//!
//! Owns: nothing beyond the call. Must never: differ between the two in what the guest sees.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::bounded;
use ft_log::{Encoder, RecordingWriter};

use super::CommandError;
use crate::host::backends::{Outlet, always};
use crate::host::deferral::Deferral;
use crate::host::disk::Caching;
use crate::host::inbox::Inbox;
use crate::launch::{
    Ending, GuestSettings, LaunchError, Prepared, Terminal, prepare, start_thread, take_signals, watch,
};
use crate::position::{self, Wanted};
use crate::run::{
    self, FileLog, HostSide, HostTime, INBOX_EVENTS, Live, LogSink, Mailbox, NoLog, StopKind, VcpuHandle,
};
use crate::snapshot;

/// `vmft run`.
pub fn run(guest: &GuestSettings) -> Result<Ending, CommandError> {
    let vcpu = take_signals()?;
    play(prepare(guest, Caching::Host, None)?, vcpu, guest.defer, NoLog::new)
}

/// `vmft record FILE`.
pub fn record(file: &Path, guest: &GuestSettings, positions: Wanted) -> Result<Ending, CommandError> {
    let vcpu = take_signals()?;
    let counter = position::choose(positions)?;
    let mut prepared = prepare(guest, Caching::Host, counter)?;
    let mut writer = RecordingWriter::create(file)?;
    prepared.machine.start_checkpoints().map_err(run::RunError::from)?;
    prepared.machine.settle().map_err(run::RunError::from)?;
    let sink = BufWriter::with_capacity(1 << 20, writer.snapshot());
    let sink = snapshot::save(&prepared.machine, &prepared.config, sink)?;
    finish_snapshot(sink)?;
    let encoder = Encoder::new(snapshot::cursor(&prepared.machine));
    play(prepared, vcpu, guest.defer, |outlet| FileLog::new(outlet, writer, encoder))
}

fn finish_snapshot<W: Write>(sink: BufWriter<ft_log::SnapshotSink<'_, W>>) -> Result<(), CommandError> {
    let sink =
        sink.into_inner().map_err(|error| LaunchError::host("write the snapshot")(error.into_error()))?;
    sink.finish().map_err(|error| CommandError::Run(error.into()))
}

fn play<L: LogSink>(
    prepared: Prepared,
    (vcpu, mailbox): (VcpuHandle, Mailbox),
    defer: Duration,
    log: impl FnOnce(Outlet) -> L,
) -> Result<Ending, CommandError> {
    let Prepared { mut machine, resources, .. } = prepared;
    let (sender, receiver) = bounded(INBOX_EVENTS);
    let deferral = Deferral::new(defer);
    let inbox = Inbox::new(sender.clone(), Arc::clone(&deferral));
    let outlet = resources.start(&inbox, always())?;
    let terminal = Terminal::start(&inbox)?;
    let _watch = watch(&deferral, &vcpu)?;
    let quit = terminal.reader.quit().clone();
    start_thread("quit", move || {
        if quit.recv().is_ok() {
            vcpu.stop(StopKind::Leave);
        }
    })?;
    let time = HostTime::starting_at(machine.now());
    let host = HostSide { time, inbox: (sender, receiver), deferral, mailbox };
    let mut door = Live::new(&machine, host, log(outlet));
    let stopped = run::run(&mut machine, &mut door)?;
    Ok(Ending::of_run(stopped, machine.anchors()))
}
