//! A guest at a forced stop, between two of its own exits, given to a follower that did not run there.
//!
//! Owns: which pages a checkpoint holds. Must never: leave one out that the follower may not have.
//!
//! Known to be equal on both sides is the guest at each boundary. A checkpoint must hold what the guest has written since
//! the last one; it holds all pages that count as written. A page stops to count when it is marked clean, and then costs
//! the guest a fault at its next write. So pages that the guest writes again and again should keep counting, and others
//! should not be copied for ever. Which are which shows when a part of them is marked clean with each checkpoint: the more
//! come back, the smaller the part.
//!
//! ```text
//!   tracking off ── start ──> all clean ── checkpoint ──> a part clean (1/1 to 1/32 of them)
//!                                 └─ many written, no checkpoint ── renew_base ──> all clean
//! ```

use std::time::{Duration, Instant};

use devices::{BoardConfig, Payload};
use ft_log::{Checkpoint, PAGE_BYTES, Pages, SnapshotPart, SnapshotReader, SnapshotWriter};
use vm_memory::{Bytes, GuestAddress};

use super::{Machine, MachineError};
use crate::kvm::{DirtyLog, page_count, page_numbers};

/// Written pages from which the base is renewed, 16 MiB.
const RENEW_PAGES: u64 = 4_096;
/// Least time between two renewals: each costs the guest a fault for every page that it goes on writing.
const RENEW_EVERY: Duration = Duration::from_secs(2);
/// Least part of the pages that is marked clean with a checkpoint: one in so many.
const LEAST_PART: u64 = 32;
/// Boundaries between two looks at the clock.
const LOOK_EVERY_ANCHORS: u64 = 256;

/// Checkpoints after which is forgotten which pages were marked clean and came back.
const EPOCH: u64 = 64;

/// What is known of the pages that a guest writes.
#[derive(Debug)]
pub(super) struct Written {
    base_at: Instant,
    /// One in so many pages is marked clean; which, changes from checkpoint to checkpoint.
    one_in: u64,
    turn: u64,
    /// The pages that were marked clean, as bits for each piece of memory.
    cleaned: Vec<Vec<u64>>,
    /// Those of them that were written again.
    returned: Vec<Vec<u64>>,
}

impl Written {
    fn new() -> Self {
        Self { base_at: Instant::now(), one_in: 1, turn: 0, cleaned: Vec::new(), returned: Vec::new() }
    }

    /// Learns from the pages that count as written now, and gives those of them that are marked clean next.
    fn next_part(&mut self, bitmaps: &[(u64, Vec<u64>)]) -> Vec<Vec<u64>> {
        if self.turn.is_multiple_of(EPOCH) {
            self.cleaned = bitmaps.iter().map(|(_, bits)| vec![0; bits.len()]).collect();
            self.returned = self.cleaned.clone();
        }
        let words = self.returned.iter_mut().flatten().zip(self.cleaned.iter().flatten());
        for ((returned, cleaned), now) in words.zip(bitmaps.iter().flat_map(|(_, bits)| bits)) {
            *returned |= cleaned & now;
        }
        let count = |bits: &[Vec<u64>]| bits.iter().flatten().map(|word| ones(*word)).sum::<u64>();
        let (cleaned, returned) = (count(&self.cleaned), count(&self.returned));
        if returned * 2 > cleaned {
            self.one_in = (self.one_in * 2).min(LEAST_PART);
        } else if cleaned > 0 {
            self.one_in = (self.one_in / 2).max(1);
        }
        self.turn += 1;
        // Both are powers of two, so every word has the same mask.
        let mask = (0..u64::from(u64::BITS))
            .filter(|bit| bit % self.one_in == self.turn % self.one_in)
            .fold(0, |mask, bit| mask | 1 << bit);
        let part: Vec<Vec<u64>> =
            bitmaps.iter().map(|(_, bits)| bits.iter().map(|word| word & mask).collect()).collect();
        for (cleaned, part) in self.cleaned.iter_mut().flatten().zip(part.iter().flatten()) {
            *cleaned |= part;
        }
        part
    }
}

impl Machine {
    /// From now on checkpoints can be taken of this guest for a follower that has it as it is here.
    pub fn start_checkpoints(&mut self) -> Result<(), MachineError> {
        self.vm.track_writes(true)?;
        self.mark_all_clean()
    }

    /// What is written from now on, for a thread that copies the guest while it runs.
    pub fn start_transfer(&mut self) -> Result<DirtyLog, MachineError> {
        self.vm.track_writes(true)?;
        let log = self.vm.dirty_log();
        log.take()?;
        Ok(log)
    }

    /// Nobody needs checkpoints or a transfer any more.
    pub fn end_checkpoints(&mut self) -> Result<(), MachineError> {
        self.written = None;
        Ok(self.vm.track_writes(false)?)
    }

    fn mark_all_clean(&mut self) -> Result<(), MachineError> {
        self.vm.mark_all_clean()?;
        self.written = Some(Written::new());
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
        Ok(page_count(&self.vm.written_pages()?))
    }

    /// The guest as it is. It stands at a forced stop; [`Self::start_checkpoints`] was called.
    pub fn checkpoint(&mut self) -> Result<Checkpoint, MachineError> {
        let state = state_bytes(&self.save()?).map_err(bad_state)?;
        let bitmaps = self.vm.written_pages()?;
        let pages = self.copy(&bitmaps)?;
        let Some(written) = &mut self.written else {
            return Err(MachineError::BadState("nobody has asked for checkpoints of it".into()));
        };
        for (index, mut bits) in written.next_part(&bitmaps).into_iter().enumerate() {
            self.vm.mark_clean(index, &mut bits)?;
        }
        written.base_at = Instant::now();
        Ok(Checkpoint { state, pages })
    }

    /// The rest of a guest of which everything but what is new in `log` was copied while it ran. It has been settled.
    /// From here on checkpoints can be taken for whoever has all of that.
    pub fn last_part(&mut self, log: &DirtyLog) -> Result<(Vec<Payload>, Pages), MachineError> {
        let state = self.save()?;
        let pages = self.copy(&log.take()?)?;
        self.written = Some(Written::new());
        Ok((state, pages))
    }

    fn copy(&self, bitmaps: &[(u64, Vec<u64>)]) -> Result<Pages, MachineError> {
        let mut pages = Pages::default();
        let mut page = [0; PAGE_BYTES];
        for number in page_numbers(bitmaps) {
            self.ram
                .read_slice(&mut page, GuestAddress(number * PAGE_BYTES as u64))
                .map_err(|error| MachineError::BadState(format!("page {number:#x}: {error}")))?;
            pages.push(number, &page);
        }
        Ok(pages)
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

fn ones(word: u64) -> u64 {
    u64::from(word.count_ones())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn part_of(written: &mut Written, bits: &[u64]) -> u64 {
        written.next_part(&[(0, bits.to_vec())]).iter().flatten().map(|word| ones(*word)).sum()
    }

    #[test]
    fn pages_that_come_back_are_marked_clean_less_and_less_often() {
        let mut written = Written::new();
        let parts: Vec<u64> = (0..8).map(|_| part_of(&mut written, &[u64::MAX; 4])).collect();
        assert_eq!(parts[0], 256);
        assert_eq!(parts[7], 256 / LEAST_PART);
    }

    #[test]
    fn pages_that_come_back_one_after_the_other_are_found_too() {
        let mut written = Written::new();
        for step in 0..24 {
            let mut bits = [0; 8];
            bits[step % 8] = u64::MAX;
            part_of(&mut written, &bits);
        }
        assert_eq!(written.one_in, LEAST_PART);
    }

    #[test]
    fn a_burst_is_marked_clean_at_once() {
        let mut written = Written::new();
        assert_eq!(part_of(&mut written, &[u64::MAX; 4]), 256);
        assert_eq!(part_of(&mut written, &[0, 0, 0, 1]), 1);
    }

    #[test]
    fn pages_that_stay_away_are_all_marked_clean_in_the_end() {
        let mut written = Written::new();
        (0..8).for_each(|_| {
            part_of(&mut written, &[u64::MAX; 4]);
        });
        // A burst elsewhere: what was cleaned last is not among the written.
        let mut left = vec![0, 0, 0, 0, u64::MAX, u64::MAX];
        for _ in 0..LEAST_PART {
            let clean = written.next_part(&[(0, left.clone())]);
            left.iter_mut().zip(&clean[0]).for_each(|(word, clean)| *word &= !clean);
        }
        assert_eq!(left, [0; 6]);
    }

    #[test]
    fn every_page_gets_its_turn() {
        let mut written = Written::new();
        let mut seen = 0;
        for _ in 0..64 {
            seen |= written.next_part(&[(0, vec![u64::MAX])])[0][0];
        }
        assert_eq!(seen, u64::MAX);
    }
}
