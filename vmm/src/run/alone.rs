//! Logs of a guest without a backup: none, or a file.
//!
//! Owns: the recording that is being written. Must never: hold effects back; nobody else has to
//! acknowledge anything.

use devices::Effect;
use ft_log::{Batch, CheckpointEncoder, Encoder, Entry, FIRST_BATCH, Position, RecordingWriter};

use super::{LogSink, RunError};
use crate::host::backends::Outlet;
use crate::machine::Machine;

/// Bytes of entries that make a batch of a recording.
const BATCH_BYTES: usize = 64 << 10;
/// Pages of checkpoints that make one, too: 16 MiB. Who replays holds all checkpoints before a batch in memory.
const BATCH_PAGES: u64 = 4_096;

/// No log at all.
pub struct NoLog {
    outlet: Outlet,
}

impl NoLog {
    /// Effects go to `outlet` at once.
    pub fn new(outlet: Outlet) -> Self {
        Self { outlet }
    }
}

impl LogSink for NoLog {
    fn record(&mut self, _: &Entry) -> Result<(), RunError> {
        Ok(())
    }

    fn publish(&mut self, _: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        effects.drain(..).for_each(|effect| self.outlet.perform(effect));
        Ok(())
    }

    fn at_boundary(&mut self, _: &mut Machine) -> Result<bool, RunError> {
        Ok(false)
    }

    fn stopped(&mut self, _: &mut Machine, _: Position) -> Result<u64, RunError> {
        Ok(0)
    }

    fn finish(&mut self, _: &Machine) -> Result<(), RunError> {
        Ok(())
    }

    fn may_break_off(&self) -> bool {
        true
    }
}

/// A log into a file, with a register digest for every anchor.
pub struct FileLog {
    outlet: Outlet,
    writer: Option<RecordingWriter>,
    encoder: Encoder,
    checkpoints: CheckpointEncoder,
    stops: u64,
    checkpointed: u64,
    pages: u64,
    /// Those of them that no batch follows yet.
    pages_waiting: u64,
    seq: u64,
    start: u64,
    checked: u64,
}

impl FileLog {
    /// Goes on behind the snapshot that `writer` already holds; `encoder` stands at its position.
    pub fn new(outlet: Outlet, writer: RecordingWriter, encoder: Encoder) -> Self {
        let start = encoder.cursor().anchor;
        Self {
            outlet,
            writer: Some(writer),
            encoder,
            checkpoints: CheckpointEncoder::default(),
            stops: 0,
            checkpointed: 0,
            pages: 0,
            pages_waiting: 0,
            seq: 0,
            start,
            checked: start,
        }
    }

    fn write_batch(&mut self, machine: &Machine) -> Result<(), RunError> {
        self.seq += 1;
        self.pages_waiting = 0;
        let batch = Batch {
            view: 0,
            seq: self.seq,
            start: (self.seq == FIRST_BATCH).then_some(self.start),
            reached: machine.anchors(),
            released: self.seq,
            entries: self.encoder.take(),
        };
        if let Some(writer) = &mut self.writer {
            writer.batch(batch)?;
        }
        Ok(())
    }
}

impl LogSink for FileLog {
    fn record(&mut self, entry: &Entry) -> Result<(), RunError> {
        Ok(self.encoder.push(entry)?)
    }

    fn publish(&mut self, machine: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        effects.drain(..).for_each(|effect| self.outlet.perform(effect));
        let anchor = machine.anchors();
        if anchor > self.checked {
            self.checked = anchor;
            self.encoder.push(&Entry::Check { anchor, digest: machine.registers_digest() as u32 })?;
        }
        if self.encoder.len_bytes() >= BATCH_BYTES || self.pages_waiting >= BATCH_PAGES {
            self.write_batch(machine)?;
        }
        Ok(())
    }

    fn at_boundary(&mut self, machine: &mut Machine) -> Result<bool, RunError> {
        machine.renew_base()?;
        Ok(false)
    }

    fn stopped(&mut self, machine: &mut Machine, position: Position) -> Result<u64, RunError> {
        let mut pages = 0;
        if position == Position::Checkpoint {
            let checkpoint = machine.checkpoint()?;
            if let Some(writer) = &mut self.writer {
                self.checkpoints.encode(&checkpoint, |piece| writer.checkpoint(piece))?;
            }
            pages = checkpoint.pages.len() as u64;
            self.checkpointed += 1;
        }
        self.encoder.push(&Entry::Stop { anchor: machine.anchors(), position })?;
        self.stops += 1;
        self.pages += pages;
        self.pages_waiting += pages;
        Ok(pages)
    }

    fn finish(&mut self, machine: &Machine) -> Result<(), RunError> {
        self.encoder.push(&Entry::End { anchor: machine.anchors(), digest: machine.state_digest() })?;
        self.write_batch(machine)?;
        match self.writer.take() {
            Some(writer) => {
                writer.finish()?;
                tracing::info!(
                    anchors = machine.anchors(),
                    forced_stops = self.stops,
                    checkpoints = self.checkpointed,
                    checkpoint_pages = self.pages,
                    "the recording is whole"
                );
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn may_break_off(&self) -> bool {
        false
    }
}
