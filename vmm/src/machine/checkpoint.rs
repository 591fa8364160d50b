//! A guest at a forced stop, between two of its own exits, given to a follower that did not run there.
//!
//! Owns: which pages a checkpoint holds. Must never: leave one out that the follower may not have.
//!
//! Known to be equal on both sides is the guest at each boundary. A checkpoint must hold what the guest has written since
//! the last one; it holds what it has written since an earlier one, the *base*. A page that has
//! been the same in many checkpoints leaves the set: one that the guest writes again and again never costs it a fault.
//! If there are many, all leave it.
//!
//! ```text
//!   tracking off ── track ──> base = here ── checkpoint ──> set = pages that change from one to the next
//!                                  └─ many written, no checkpoint ── renew_base ──> base = here
//! ```

use std::time::{Duration, Instant};

use devices::{BoardConfig, Payload};
use ft_log::{Checkpoint, PAGE_BYTES, Pages, REMEMBERED_PAGES, SnapshotPart, SnapshotReader, SnapshotWriter};
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, MachineError};

/// Written pages from which the base is renewed, 16 MiB.
const RENEW_PAGES: u64 = 4_096;
/// Least time between two renewals: each costs the guest a fault for every page that it goes on writing.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// Pages from which all of a checkpoint leave the set: more than this are seldom written again and again.
const MANY_PAGES: u64 = REMEMBERED_PAGES as u64 / 2;
/// Boundaries between two looks at the clock.
const LOOK_EVERY_ANCHORS: u64 = 256;

/// What checkpoints of a guest are made from: what it has written since the base.
#[derive(Debug)]
pub(super) struct Written {
    base_at: Instant,
}

impl Machine {
    /// From now on checkpoints can be taken of this guest for a follower that has it as it is here.
    pub fn start_checkpoints(&mut self) -> Result<(), MachineError> {
        self.vm.track_writes(true)?;
        self.mark_all_clean()?;
        Ok(())
    }

    /// Nobody needs checkpoints any more.
    pub fn end_checkpoints(&mut self) -> Result<(), MachineError> {
        self.written = None;
        Ok(self.vm.track_writes(false)?)
    }

    fn mark_all_clean(&mut self) -> Result<(), MachineError> {
        for (index, (_, mut bits)) in self.vm.written_pages()?.into_iter().enumerate() {
            self.vm.mark_clean(index, &mut bits)?;
        }
        self.written = Some(Written { base_at: Instant::now() });
        Ok(())
    }

    /// Keeps the next checkpoint small in a guest that writes much and makes exits. The machine stands at a boundary.
    pub fn renew_base(&mut self) -> Result<(), MachineError> {
        let Some(written) = &mut self.written else { return Ok(()) };
        if !self.anchors.is_multiple_of(LOOK_EVERY_ANCHORS) || written.base_at.elapsed() < RENEW_EVERY {
            return Ok(());
        }
        written.base_at = Instant::now();
        if self.written_pages()? >= RENEW_PAGES {
            self.mark_all_clean()?;
        }
        Ok(())
    }

    /// How many pages the next checkpoint will hold; none if nobody has asked for checkpoints.
    pub fn written_pages(&self) -> Result<u64, MachineError> {
        if self.written.is_none() {
            return Ok(0);
        }
        Ok(count(&self.vm.written_pages()?))
    }

    /// The guest as it is. It stands at a forced stop; [`Self::start_checkpoints`] was called. Pages in `unchanged`,
    /// rising, are not in later ones unless they are written again.
    pub fn checkpoint(&mut self, unchanged: &[u64]) -> Result<Checkpoint, MachineError> {
        let state = state_bytes(&self.save()?).map_err(bad_state)?;
        let mut pages = Pages::default();
        let mut page = [0; PAGE_BYTES];
        let bitmaps = self.vm.written_pages()?;
        let many = count(&bitmaps) > MANY_PAGES;
        let Some(written) = &mut self.written else {
            return Err(MachineError::BadState("nobody has asked for checkpoints of it".into()));
        };
        for (index, (first, mut bits)) in bitmaps.into_iter().enumerate() {
            let mut clean = false;
            for (word_index, word) in bits.iter_mut().enumerate() {
                let mut left = std::mem::take(word);
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let number = first + word_index as u64 * u64::from(u64::BITS) + u64::from(bit);
                    self.ram
                        .read_slice(&mut page, GuestAddress(number * PAGE_BYTES as u64))
                        .map_err(|error| MachineError::BadState(format!("page {number:#x}: {error}")))?;
                    pages.push(number, &page);
                    if many || unchanged.binary_search(&number).is_ok() {
                        *word |= 1 << bit;
                        clean = true;
                    }
                }
            }
            if clean {
                self.vm.mark_clean(index, &mut bits)?;
            }
        }
        written.base_at = Instant::now();
        Ok(Checkpoint { state, pages })
    }

    /// Makes this guest the one of `checkpoint`. It stands at the boundary before the stop.
    pub fn load_checkpoint(
        &mut self,
        config: &BoardConfig,
        checkpoint: &Checkpoint,
    ) -> Result<(), MachineError> {
        if !self.settle()? {
            return Err(MachineError::BadState("it is at an exit that the checkpoint does not know".into()));
        }
        for (number, page) in checkpoint.pages.iter() {
            self.ram
                .write_slice(page, GuestAddress(number.saturating_mul(PAGE_BYTES as u64)))
                .map_err(|error| MachineError::BadState(format!("page {number:#x}: {error}")))?;
        }
        let payloads = state_payloads(&checkpoint.state).map_err(bad_state)?;
        self.restore(config, &payloads)?;
        self.vm.track_writes(true)?;
        Ok(self.vm.flush_translations()?)
    }
}

fn count(bitmaps: &[(u64, Vec<u64>)]) -> u64 {
    bitmaps.iter().flat_map(|(_, bits)| bits).map(|word| u64::from(word.count_ones())).sum()
}

fn bad_state(error: ft_log::SnapshotError) -> MachineError {
    MachineError::BadState(error.to_string())
}

/// A snapshot's container without memory.
fn state_bytes(payloads: &[Payload]) -> Result<Vec<u8>, ft_log::SnapshotError> {
    let mut writer = SnapshotWriter::new(Vec::new())?;
    for payload in payloads {
        writer.payload(&payload.kind, payload.version, &payload.bytes)?;
    }
    writer.finish()
}

fn state_payloads(state: &[u8]) -> Result<Vec<Payload>, ft_log::SnapshotError> {
    let mut reader = SnapshotReader::new(state)?;
    let mut payloads = Vec::new();
    while let Some(part) = reader.next_part()? {
        match part {
            SnapshotPart::Payload { kind, version, bytes } => payloads.push(Payload { kind, version, bytes }),
            SnapshotPart::Pages { gpa, bytes } => {
                return Err(ft_log::SnapshotError::Range { gpa, len_bytes: bytes.len() });
            }
        }
    }
    Ok(payloads)
}
