//! A guest on its way to a backup while it runs.
//!
//! Owns: the thread that copies it, and when the rest is small enough to stop for. Must never: touch the guest; the
//! vCPU's thread hands over what has to be of one moment.
//!
//! ```text
//!   all memory ── what was written meanwhile ── again ── little is left ── recorded as the backup ── again ──> ready
//!       │                    └── not getting less: the guest is slowed ──┘       the vCPU's thread, at a boundary: │
//!       │                                                                                         Transfer::finish v
//!       └─ the connection breaks, or it is not recorded: failed,              log sender <── sent ── the rest, state
//!          nothing else happens
//! ```

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use devices::{GuestRam, Payload};
use ft_log::{FrameWriter, Message, Pages, SnapshotWriter, StreamError, Welcome};
use thiserror::Error;

use crate::control::protocol::{self as control, Direction};
use crate::control::state::TransferOf;
use crate::host::LogEvent;
use crate::kvm::{DirtyLog, KvmError, page_count};
use crate::pair::protocol::JoinError;
use crate::snapshot::{self, SnapshotError};

/// Written pages for which the guest may stop: 1 MiB.
const LAST_PAGES: u64 = 256;
/// Rounds after which the guest stops for whatever is left.
const ROUNDS_MAX: u32 = 30;
/// The same for what is written while the arbiter records the backup.
const ROUNDS_BEHIND_NAMING_MAX: u32 = 5;
/// A round that leaves more than this part of what the one before left does not get anywhere.
const PROGRESS_NUMERATOR: u64 = 3;
const PROGRESS_DENOMINATOR: u64 = 4;
/// How much of its time the guest is kept from running, in percent, one step after the other.
const SLOWER_PERCENT: [u32; 3] = [50, 75, 90];
/// Pause between two attempts to get the vCPU's thread to a boundary.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// How long the arbiter may take to record the backup. Less than the backup waits for a byte.
const NAMING_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a guest did not get to a backup.
#[derive(Debug, Error)]
pub enum TransferError {
    /// The connection.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Reading the guest, or writing it.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Finding out what it has written.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The vCPU's thread is gone.
    #[error("the guest has ended")]
    Ended,
    /// The primary's state does not allow it.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// No record says that it is the backup.
    #[error("the arbiter has not recorded it as the backup of view {view}: {why}")]
    NotNamed {
        /// The view.
        view: u64,
        /// What the arbiter says.
        why: String,
    },
}

/// What has to be of one moment: state, and the pages that are not sent yet.
pub type LastPart = (Vec<Payload>, Pages);

/// Where a transfer is. Shared by its thread and the vCPU's.
#[derive(Debug, Default)]
struct Progress {
    ready: AtomicBool,
    failed: AtomicBool,
    slower_percent: AtomicU32,
    percent: AtomicU32,
    rounds: AtomicU32,
    pages: AtomicU64,
}

/// The vCPU thread's end of a transfer.
pub struct Transfer {
    progress: Arc<Progress>,
    last_part: Sender<LastPart>,
    /// What is written to the guest.
    pub log: DirtyLog,
}

/// The copying thread's end.
pub struct Copying {
    progress: Arc<Progress>,
    last_part: Receiver<LastPart>,
}

/// Both ends of a transfer. The copying thread gets a clone of `log`.
pub fn begin(log: DirtyLog) -> (Transfer, Copying) {
    let progress = Arc::new(Progress::default());
    let (sender, last_part) = bounded(1);
    let copying = Copying { progress: Arc::clone(&progress), last_part };
    (Transfer { progress, last_part: sender, log }, copying)
}

impl Transfer {
    /// Is so little left that the guest should stop for it?
    pub fn is_ready(&self) -> bool {
        self.progress.ready.load(Ordering::SeqCst) && !self.has_failed()
    }

    /// Did it break?
    pub fn has_failed(&self) -> bool {
        self.progress.failed.load(Ordering::SeqCst)
    }

    /// How much of its time the guest must not run, in percent.
    pub fn slower_percent(&self) -> u32 {
        self.progress.slower_percent.load(Ordering::Relaxed)
    }

    /// What an operator is shown of it, on its way to `host`.
    pub fn watch(&self, host: &str) -> TransferOf {
        let (progress, host) = (Arc::clone(&self.progress), host.to_owned());
        Box::new(move || control::Transfer {
            direction: Direction::Sending,
            host: host.clone(),
            percent: progress.percent.load(Ordering::Relaxed),
            rounds: Some(progress.rounds.load(Ordering::Relaxed)),
            pages_again: Some(progress.pages.load(Ordering::Relaxed)),
        })
    }

    /// Rounds of copying so far, and pages in all.
    pub fn figures(&self) -> (u32, u64) {
        (self.progress.rounds.load(Ordering::Relaxed), self.progress.pages.load(Ordering::Relaxed))
    }

    /// Hands over what is left. From here on the guest's log has to follow.
    pub fn finish(self, last: LastPart) {
        // A thread that has failed since says so to the supervisor.
        let _ = self.last_part.send(last);
    }
}

/// What the copying thread needs.
pub struct Copied<'a> {
    /// What the backup is told first.
    pub welcome: Welcome,
    /// The backup's host.
    pub backup: &'a str,
    /// The guest's configuration.
    pub config: Payload,
    /// The guest's memory.
    pub ram: &'a GuestRam,
    /// The pages that were written since the last call, as [`DirtyLog::take`] gives them.
    pub written: &'a dyn Fn() -> Result<Vec<(u64, Vec<u64>)>, KvmError>,
    /// Gets the vCPU's thread to a boundary.
    pub ask: &'a dyn Fn(),
    /// Asks the arbiter once to record this as the backup: whether it is.
    pub name: &'a mut dyn FnMut() -> Result<bool, TransferError>,
}

impl Copying {
    /// Sends the guest to `out`. Returns when all of it was sent, with the vCPU's thread on its way behind it.
    pub fn run(&self, mut copied: Copied<'_>, out: &mut impl Write) -> Result<(), TransferError> {
        let result = self.copy(&mut copied, out);
        if result.is_err() {
            self.progress.failed.store(true, Ordering::SeqCst);
            (copied.ask)();
        }
        result
    }

    fn copy(&self, copied: &mut Copied<'_>, out: &mut impl Write) -> Result<(), TransferError> {
        let mut frames = FrameWriter::new(out);
        frames.send(&Message::Welcome(copied.welcome.clone()))?;
        let container = |error: ft_log::SnapshotError| TransferError::from(SnapshotError::from(error));
        let mut writer = SnapshotWriter::new(frames.snapshot()).map_err(container)?;
        let config = &copied.config;
        writer.payload(&config.kind, config.version, &config.bytes).map_err(container)?;
        let mut percent = 0;
        snapshot::memory(copied.ram, &mut writer, |done, total| {
            let now = done * 100 / total.max(1);
            if now / 25 > percent / 25 {
                tracing::info!(
                    event = %LogEvent::Sending,
                    percent = now,
                    backup = copied.backup,
                    "sending the guest"
                );
            }
            percent = now;
            self.progress.percent.store(now as u32, Ordering::Relaxed);
        })?;
        self.rounds(copied, &mut writer, ROUNDS_MAX)?;
        // Before the guest stops, so that it does not stand still for as long as the arbiter takes.
        self.name(copied)?;
        self.rounds(copied, &mut writer, ROUNDS_BEHIND_NAMING_MAX)?;
        let (state, pages) = self.wait_for_last_part(copied.ask)?;
        for payload in state {
            writer.payload(&payload.kind, payload.version, &payload.bytes).map_err(container)?;
        }
        snapshot::copies_again(&pages, &mut writer)?;
        Ok(writer.finish().map_err(container)?.finish()?)
    }

    /// Has the backup recorded as one. It waits for bytes meanwhile, and not for ever.
    fn name(&self, copied: &mut Copied<'_>) -> Result<(), TransferError> {
        let deadline = Instant::now() + NAMING_TIMEOUT;
        loop {
            let named = (copied.name)()?;
            if Instant::now() > deadline {
                let why = format!("no answer came within {} s", NAMING_TIMEOUT.as_secs());
                return Err(TransferError::NotNamed { view: copied.welcome.view, why });
            }
            if named {
                return Ok(());
            }
            if self.last_part.try_recv() == Err(TryRecvError::Disconnected) {
                return Err(TransferError::Ended);
            }
        }
    }

    /// Sends what was written meanwhile until little is left.
    fn rounds<W: Write>(
        &self,
        copied: &Copied<'_>,
        writer: &mut SnapshotWriter<W>,
        rounds_max: u32,
    ) -> Result<(), TransferError> {
        let mut before = u64::MAX;
        for _ in 0..rounds_max {
            let started = Instant::now();
            let written = (copied.written)()?;
            let pages = page_count(&written);
            snapshot::pages_again(copied.ram, &written, writer)?;
            let round = self.progress.rounds.fetch_add(1, Ordering::Relaxed) + 1;
            self.progress.pages.fetch_add(pages, Ordering::Relaxed);
            tracing::debug!(round, pages, took_ms = started.elapsed().as_millis() as u64, "sent again");
            if pages <= LAST_PAGES {
                return Ok(());
            }
            before = match gets_less(pages, before) {
                true => pages,
                // What was written meanwhile was written at the speed before: the next round says nothing of this one.
                false if self.slow_down() => u64::MAX,
                false => break,
            };
        }
        tracing::warn!("the guest still writes much: it stops for what is left");
        Ok(())
    }

    /// Lets the guest run for less of its time than so far, unless it runs for the least.
    fn slow_down(&self) -> bool {
        let present = self.progress.slower_percent.load(Ordering::Relaxed);
        let Some(percent) = SLOWER_PERCENT.into_iter().find(|percent| *percent > present) else {
            return false;
        };
        self.progress.slower_percent.store(percent, Ordering::Relaxed);
        tracing::warn!(
            event = %LogEvent::Throttled,
            percent,
            "the guest writes as fast as it can be sent: it is kept from running for a part of its time"
        );
        true
    }

    fn wait_for_last_part(&self, ask: &dyn Fn()) -> Result<LastPart, TransferError> {
        self.progress.ready.store(true, Ordering::SeqCst);
        loop {
            ask();
            match self.last_part.recv_timeout(ASK_EVERY) {
                Ok(last) => return Ok(last),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(TransferError::Ended),
            }
        }
    }
}

/// Was less written during a round than during the one before?
fn gets_less(pages: u64, before: u64) -> bool {
    pages <= before / PROGRESS_DENOMINATOR * PROGRESS_NUMERATOR
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::*;

    const PAGES: u64 = 2_048;

    /// Runs the rounds of a guest that writes `pages(round, slower_percent)` pages during each. How many rounds there were,
    /// and how much it is slowed behind them, in percent.
    fn rounds(pages: impl Fn(u32, u32) -> u64) -> (u32, u32) {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (PAGES * 4_096) as usize)]).unwrap();
        let progress = Arc::new(Progress::default());
        let copying = Copying { progress: Arc::clone(&progress), last_part: bounded(1).1 };
        let (round, slower) = (Cell::new(0), Cell::new(0));
        let written = || {
            round.set(round.get() + 1);
            // The round that begins now shows in the next one.
            let count = pages(round.get(), slower.replace(progress.slower_percent.load(Ordering::Relaxed)));
            let bit = |page: u64| u64::from(page < count);
            let word = |word: u64| (0..64).fold(0, |bits, at| bits | bit(word * 64 + at) << at);
            Ok(vec![(0, (0..PAGES / 64).map(word).collect())])
        };
        let welcome = Welcome {
            view: 2,
            guest_name: String::new(),
            memory_bytes: 0,
            config_digest: 0,
            cpuid_digest: 0,
            host_name: String::new(),
        };
        let config = Payload { kind: String::new(), version: 0, bytes: Vec::new() };
        let (ask, name) = (|| {}, &mut || Ok(true));
        let copied = Copied { welcome, backup: "b", config, ram: &ram, written: &written, ask: &ask, name };
        let mut writer = SnapshotWriter::new(std::io::sink()).unwrap();
        copying.rounds(&copied, &mut writer, ROUNDS_MAX).unwrap();
        (round.get(), progress.slower_percent.load(Ordering::Relaxed))
    }

    #[test]
    fn a_guest_that_writes_less_in_each_round_is_not_slowed() {
        assert_eq!(rounds(|_, _| LAST_PAGES), (1, 0));
        assert_eq!(rounds(|round, _| 2_048 >> round), (3, 0));
    }

    /// What a round shows was written at the speed before it.
    #[test]
    fn a_guest_is_slowed_until_its_rounds_get_shorter() {
        let at_half = rounds(|_, slower| if slower < 50 { 1_000 } else { 100 });
        assert_eq!(at_half, (4, 50));
        let at_most = rounds(|_, slower| if slower < 90 { 1_000 } else { 100 });
        assert_eq!(at_most, (8, 90));
    }

    #[test]
    fn a_guest_that_slowing_does_not_help_stops_for_what_is_left() {
        assert_eq!(rounds(|_, _| 1_000), (8, 90));
        assert_eq!(rounds(|round, _| 2_048 - u64::from(round)), (8, 90));
    }
}
