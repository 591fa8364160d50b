//! The log on its way to one backup: what is not sent yet, and what is not acknowledged.
//!
//! Owns: the unsent log of one epoch, its numbering, and how it ends. Must never: do I/O; the sender and the receiver of
//! acknowledgements do (`connection.rs`); or outlive its epoch: the next backup has an outbox of its own.
//!
//! ```text
//!   Open ─┬─ the log is over, or the backup is let go ──> Ended ── nothing is under way ──> Closing ── the last word
//!         └─ the backup is lost ──> Abandoned
//! ```
//! Threads: the vCPU's publishes, `log-sender` takes, `log-acks` acknowledges, the supervisor ends. Locks: one, under which
//! the primary's state may be asked.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ft_log::{
    Ack, Batch, BatchSender, ByeReason, Checkpoint, FIRST_BATCH, MAX_BATCH_ENTRIES_BYTES, SequenceError,
};
use hdrhistogram::Histogram;

use super::state::PrimaryState;
use crate::pair::liveness::heartbeat::boot_time;
use crate::pair::protocol::{Epoch, JoinError};

/// Unsent bytes beyond which the vCPU thread waits for the sender: what one batch can hold.
const PENDING_LIMIT_BYTES: usize = MAX_BATCH_ENTRIES_BYTES;
/// Unsent bytes that are sent at once.
const EAGER_BYTES: usize = 8 << 10;
/// Time between batches of a guest that is busy: the backup can execute only what it has been sent, and then
/// needs as long as the primary did.
const BUSY_INTERVAL: Duration = Duration::from_millis(20);
/// Longest that an entry waits to be sent. A guest that wakes up briefly now and then costs as many batches.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);
/// Longest lag that figures tell apart.
const TIME_MAX_US: u64 = 60_000_000;

/// How soon the backup should have what is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// At once: output waits for it.
    Urgent,
    /// Soon: the guest is working, and so should the backup.
    Busy,
    /// At leisure: the guest waits for something to happen.
    Idle,
}

/// Numbers since the backup was given the guest.
#[derive(Clone, Copy, Debug, Default)]
pub struct OutboxFigures {
    /// Bytes written after the snapshot, as the link carries them: framing and sealing included.
    pub log_bytes: u64,
    /// Batches sent.
    pub batches: u64,
    /// Median of the times from a batch's sending to the news that it is executed.
    pub lag_p50_us: u64,
    /// 99th percentile of the same.
    pub lag_p99_us: u64,
    /// For how long the guest was held up because of the lag.
    pub paced: Duration,
    /// Checkpoints taken.
    pub checkpoints: u64,
    /// Pages in them.
    pub checkpoint_pages: u64,
    /// Median of the times for which the guest stood still for one.
    pub pause_p50_us: u64,
    /// 99th percentile of the same.
    pub pause_p99_us: u64,
}

/// How the log to this backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// It goes on.
    Open,
    /// It is over, but something may be under way.
    Ended { bye: Option<ByeReason> },
    /// The connection may be closed, with this as the last word.
    Closing { bye: Option<ByeReason> },
    /// There is nobody any more to send it to.
    Abandoned,
}

struct State {
    flow: Flow,
    pending: Vec<u8>,
    /// The log is complete up to here.
    complete_through: u64,
    sent_through: u64,
    checkpoint: Checkpoints,
    urgent: bool,
    busy_since: Option<Instant>,
    sender: BatchSender,
    released: u64,
    batch_at: Instant,
    lags_us: Histogram<u32>,
    paced: Duration,
    /// How its guest differed, by its own account.
    divergence: Option<String>,
}

/// The checkpoint that is on its way, and figures of all of them.
struct Checkpoints {
    waiting: Option<Checkpoint>,
    sending: bool,
    pages: u64,
    pauses_us: Histogram<u32>,
}

/// A histogram of microseconds.
fn times_us() -> Histogram<u32> {
    Histogram::new_with_max(TIME_MAX_US, 2).expect("two digits of a number of microseconds fit")
}

/// What the sender sends next: a checkpoint's pieces before the batch that holds its stop.
pub struct Outgoing {
    /// To be encoded and sent first; then [`Outbox::checkpoint_sent`].
    pub checkpoint: Option<Checkpoint>,
    /// The batch.
    pub batch: Batch,
}

/// The log's way to one backup.
pub struct Outbox {
    primary: Arc<PrimaryState>,
    epoch: Epoch,
    view: u64,
    /// Where the log starts.
    start: u64,
    state: Mutex<State>,
    to_send: Condvar,
    has_room: Condvar,
    all_acked: Condvar,
    bytes_sent: AtomicU64,
}

impl State {
    fn is_open(&self) -> bool {
        self.flow == Flow::Open
    }

    fn end(&mut self, flow: Flow) {
        self.flow = flow;
        // Nobody takes it any more.
        self.pending = Vec::new();
        self.checkpoint.waiting = None;
    }
}

impl Outbox {
    /// The backup that is recorded in the present view has been given everything up to `anchor`: an epoch begins.
    ///
    /// # Errors
    /// The protocol does not allow it.
    pub fn attach(primary: &Arc<PrimaryState>, anchor: u64) -> Result<Arc<Self>, JoinError> {
        let (epoch, view) = primary.protocol(|primary| Ok((primary.attach(boot_time())?, primary.view())))?;
        let state = State {
            flow: Flow::Open,
            pending: Vec::new(),
            complete_through: anchor,
            sent_through: anchor,
            checkpoint: Checkpoints { waiting: None, sending: false, pages: 0, pauses_us: times_us() },
            urgent: false,
            busy_since: None,
            sender: BatchSender::default(),
            released: 0,
            batch_at: Instant::now(),
            lags_us: times_us(),
            paced: Duration::ZERO,
            divergence: None,
        };
        Ok(Arc::new(Self {
            primary: Arc::clone(primary),
            epoch,
            view,
            start: anchor,
            state: Mutex::new(state),
            to_send: Condvar::new(),
            has_room: Condvar::new(),
            all_acked: Condvar::new(),
            bytes_sent: AtomicU64::new(0),
        }))
    }

    /// Whose log it is: which connection of this primary.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: every method changes it in one go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_all(&self) {
        self.to_send.notify_all();
        self.has_room.notify_all();
        self.all_acked.notify_all();
    }

    fn set(&self, change: impl FnOnce(Flow) -> Option<Flow>) {
        let mut state = self.lock();
        if let Some(flow) = change(state.flow) {
            state.end(flow);
        }
        drop(state);
        self.wake_all();
    }

    /// The backup is lost: nothing of this is sent any more.
    pub fn abandon(&self) {
        self.set(|flow| (flow == Flow::Open).then_some(Flow::Abandoned));
    }

    /// The log is over, with `bye` as the last word if there is one; then [`Self::close`]. Whoever calls this has told the
    /// protocol before, so that nothing is let out any more.
    pub fn end(&self, bye: Option<ByeReason>) {
        self.set(|flow| (flow == Flow::Open).then_some(Flow::Ended { bye }));
    }

    /// After [`Self::end`], when nothing is under way any more: the connection may be closed.
    pub fn close(&self) {
        self.set(|flow| match flow {
            Flow::Ended { bye } => Some(Flow::Closing { bye }),
            _ => None,
        });
    }

    /// As [`Self::close`], and the backup is told that nothing of this monitor is under way, so that it need not make
    /// sure of that.
    pub fn close_at_rest(&self) {
        self.set(|flow| match flow {
            Flow::Ended { bye } => Some(Flow::Closing { bye: bye.or(Some(ByeReason::Shutdown)) }),
            _ => None,
        });
    }

    /// The sender's, after the last batch: waits until the connection may be closed, and gives its last
    /// word. `None`: this is no orderly end, and the supervisor closes the connection.
    pub fn last_word(&self) -> Option<Option<ByeReason>> {
        let ended = |state: &mut State| matches!(state.flow, Flow::Ended { .. });
        let state = self.to_send.wait_while(self.lock(), ended).unwrap_or_else(PoisonError::into_inner);
        match state.flow {
            Flow::Closing { bye } => Some(bye),
            _ => None,
        }
    }

    /// Hands over entries; the log is then complete through `anchor`. Waits while the sender is far behind.
    /// Answers the number of the batch that they will be in, or `None` without a backup.
    pub fn publish(&self, entries: &[u8], anchor: u64, urgency: Urgency) -> Option<u64> {
        let mut state = self.lock();
        while state.is_open()
            && !state.pending.is_empty()
            && state.pending.len() + entries.len() > PENDING_LIMIT_BYTES
        {
            state = self.has_room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.is_open() {
            return None;
        }
        state.pending.extend_from_slice(entries);
        state.complete_through = anchor;
        match urgency {
            Urgency::Idle => state.busy_since = None,
            Urgency::Busy | Urgency::Urgent => self.note_busy(&mut state),
        }
        if (urgency == Urgency::Urgent || state.pending.len() >= EAGER_BYTES) && !state.urgent {
            state.urgent = true;
            self.to_send.notify_one();
        }
        Some(state.sender.sent() + 1)
    }

    /// Hands over a checkpoint for which the guest stood still for `pause`. Publish its stop next. There is none under way ([`Self::takes_checkpoint`]).
    pub fn checkpoint(&self, checkpoint: Checkpoint, pause: Duration) {
        let mut state = self.lock();
        state.checkpoint.pauses_us.saturating_record(pause.as_micros() as u64);
        state.checkpoint.pages += checkpoint.pages.len() as u64;
        state.checkpoint.waiting = state.is_open().then_some(checkpoint);
    }

    /// May a checkpoint be taken? One at a time is under way, so that what waits to be sent is bounded. Without a
    /// backup nothing waits: the one that a lost backup did not get must not keep the guest from its events.
    pub fn takes_checkpoint(&self) -> bool {
        let state = self.lock();
        !state.is_open() || (state.checkpoint.waiting.is_none() && !state.checkpoint.sending)
    }

    /// The sender's: the checkpoint that it was given is sent.
    pub fn checkpoint_sent(&self) {
        self.lock().checkpoint.sending = false;
    }

    fn note_busy(&self, state: &mut State) {
        if state.busy_since.is_none() {
            state.busy_since = Some(Instant::now());
            // The sender sleeps for the longer interval.
            self.to_send.notify_one();
        }
    }

    /// The next batch to send: at once if output waits for it, else when the interval is over. `None`: there
    /// is no backup any more.
    pub fn next_batch(&self) -> Option<Outgoing> {
        let mut state = self.lock();
        while state.is_open() {
            let due = match state.busy_since {
                Some(since) => since.max(state.batch_at) + BUSY_INTERVAL,
                None => state.batch_at + IDLE_INTERVAL,
            };
            let left = due.saturating_duration_since(Instant::now());
            let news = !state.pending.is_empty() || state.complete_through != state.sent_through;
            if state.urgent || (news && left.is_zero()) {
                return Some(self.take_batch(&mut state));
            }
            let wait = if left.is_zero() { IDLE_INTERVAL } else { left };
            state = self.to_send.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    fn take_batch(&self, state: &mut State) -> Outgoing {
        let seq = state.sender.next_seq();
        let now = Instant::now();
        let through = state.complete_through;
        self.primary.protocol(|primary| primary.sent(self.epoch, seq, through, boot_time()));
        state.batch_at = now;
        state.urgent = false;
        state.sent_through = through;
        let entries = std::mem::take(&mut state.pending);
        self.has_room.notify_all();
        let checkpoint = state.checkpoint.waiting.take();
        state.checkpoint.sending = checkpoint.is_some();
        let batch = Batch {
            view: self.view,
            seq,
            start: (seq == FIRST_BATCH).then_some(self.start),
            reached: through,
            released: state.released.min(seq),
            entries,
        };
        Outgoing { checkpoint, batch }
    }

    /// Takes note of an acknowledgement. What may leave since then the protocol says.
    ///
    /// # Errors
    /// It acknowledges what was not sent.
    pub fn acknowledged(&self, ack: &Ack) -> Result<(), SequenceError> {
        let mut state = self.lock();
        state.sender.accept(ack)?;
        let lags_us = &mut state.lags_us;
        let note = |lag: Duration| lags_us.saturating_record(lag.as_micros() as u64);
        let Ack { received, executed, .. } = *ack;
        self.primary.protocol(|primary| {
            primary.acknowledged(self.epoch, received, executed, boot_time(), note);
        });
        if received == state.sender.sent() && state.pending.is_empty() {
            self.all_acked.notify_all();
        }
        Ok(())
    }

    /// Output up to batch `seq` has gone.
    pub fn released(&self, seq: u64) {
        let mut state = self.lock();
        state.released = state.released.max(seq);
    }

    /// The backup says that its guest differs, and how.
    pub fn diverged(&self, how: String) {
        self.lock().divergence = Some(how);
    }

    /// What [`Self::diverged`] was told, once.
    pub fn take_divergence(&self) -> Option<String> {
        self.lock().divergence.take()
    }

    /// The guest was held up for `pause`, because of the lag.
    pub fn paced(&self, pause: Duration) {
        self.lock().paced += pause;
    }

    /// What has passed between here and this backup.
    pub fn figures(&self) -> OutboxFigures {
        let state = self.lock();
        OutboxFigures {
            log_bytes: self.bytes_sent.load(Ordering::Relaxed),
            batches: state.sender.sent(),
            lag_p50_us: state.lags_us.value_at_quantile(0.5),
            lag_p99_us: state.lags_us.value_at_quantile(0.99),
            paced: state.paced,
            checkpoints: state.checkpoint.pauses_us.len(),
            checkpoint_pages: state.checkpoint.pages,
            pause_p50_us: state.checkpoint.pauses_us.value_at_quantile(0.5),
            pause_p99_us: state.checkpoint.pauses_us.value_at_quantile(0.99),
        }
    }

    /// Sends what there is and waits until the backup has all of it, it is lost, or `timeout` is over. True: it has.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        state.urgent = true;
        self.to_send.notify_one();
        while state.is_open()
            && (state.urgent
                || !state.pending.is_empty()
                || state.sender.acked().received < state.sender.sent())
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.all_acked.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.is_open()
    }
}

/// Counts what is written to the backup.
pub struct Counted<'a, W> {
    /// Where it goes.
    pub out: W,
    /// Whose count it is.
    pub outbox: &'a Outbox,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.outbox.bytes_sent.fetch_add(written as u64, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::testing::{alone, join};
    use super::*;
    use crate::pair::protocol::{Answer, Ask, Leave, Loss, Needed, Phase};

    /// In view 2, with a backup that has everything up to `anchor`.
    fn joined(anchor: u64) -> Arc<Outbox> {
        let state = alone();
        assert!(matches!(Outbox::attach(&state, anchor), Err(JoinError::NotRecorded)));
        join(&state, anchor)
    }

    /// The backup is lost, as the supervisor sees it.
    fn lose(outbox: &Outbox, loss: Loss) -> bool {
        let news = outbox.primary.protocol(|primary| primary.backup_lost(outbox.epoch, loss));
        outbox.abandon();
        news
    }

    fn ack(received: u64, executed: u64) -> Ack {
        Ack { received, executed, ..Ack::default() }
    }

    #[test]
    fn entries_are_in_the_batch_that_publish_named() {
        let outbox = joined(10);
        assert_eq!(outbox.publish(b"a", 11, Urgency::Idle), Some(1));
        assert_eq!(outbox.publish(b"b", 12, Urgency::Urgent), Some(1));
        let batch = outbox.next_batch().unwrap().batch;
        assert_eq!((batch.seq, batch.reached, batch.entries.as_slice()), (1, 12, b"ab".as_slice()));
        assert_eq!((batch.view, batch.start), (2, Some(10)), "the log says whose it is and where it starts");
        assert_eq!(outbox.publish(b"c", 13, Urgency::Urgent), Some(2));
        let batch = outbox.next_batch().unwrap().batch;
        assert_eq!((batch.view, batch.start, batch.entries.as_slice()), (2, None, b"c".as_slice()));
    }

    #[test]
    fn progress_without_entries_is_sent() {
        let outbox = joined(10);
        outbox.publish(&[], 11, Urgency::Idle);
        assert_eq!(outbox.next_batch().unwrap().batch.reached, 11);
    }

    #[test]
    fn one_checkpoint_at_a_time_goes_before_the_batch_with_its_stop() {
        let outbox = joined(10);
        assert!(outbox.takes_checkpoint());
        outbox.checkpoint(Checkpoint::default(), Duration::ZERO);
        assert!(!outbox.takes_checkpoint());
        outbox.publish(b"stop", 11, Urgency::Busy);
        let outgoing = outbox.next_batch().unwrap();
        assert!(outgoing.checkpoint.is_some());
        assert_eq!(outgoing.batch.entries, b"stop");
        assert!(!outbox.takes_checkpoint());
        outbox.checkpoint_sent();
        assert!(outbox.takes_checkpoint());
    }

    #[test]
    fn what_a_lost_backup_did_not_get_keeps_no_checkpoint_from_being_taken() {
        let dismiss = |outbox: &Outbox| outbox.end(Some(ByeReason::Dismissed));
        for (lose, is_taken) in [Outbox::abandon as fn(&Outbox), dismiss]
            .into_iter()
            .flat_map(|lose| [(lose, false), (lose, true)])
        {
            let outbox = joined(10);
            outbox.checkpoint(Checkpoint::default(), Duration::ZERO);
            outbox.publish(b"stop", 11, Urgency::Urgent);
            // The sender may have got hold of it, and never says that it is sent.
            let sending = is_taken.then(|| outbox.next_batch().unwrap());
            assert!(!outbox.takes_checkpoint());
            lose(&outbox);
            drop(sending);
            assert!(outbox.takes_checkpoint());
            outbox.checkpoint(Checkpoint::default(), Duration::ZERO);
            assert!(outbox.takes_checkpoint(), "while the claim is open, too");
        }
    }

    #[test]
    fn who_closes_at_rest_says_so_unless_the_last_word_is_another() {
        for (bye, last_word) in
            [(None, ByeReason::Shutdown), (Some(ByeReason::GuestEnded), ByeReason::GuestEnded)]
        {
            let outbox = joined(10);
            outbox.end(bye);
            outbox.close_at_rest();
            assert_eq!(outbox.last_word(), Some(Some(last_word)));
        }
        let outbox = joined(10);
        outbox.end(None);
        outbox.close();
        assert_eq!(outbox.last_word(), Some(None), "something may be under way");
    }

    #[test]
    fn an_acknowledgement_of_what_was_not_sent_is_refused() {
        let outbox = joined(0);
        outbox.publish(b"a", 1, Urgency::Urgent);
        outbox.next_batch();
        assert!(outbox.acknowledged(&ack(2, 0)).is_err());
        assert_eq!(outbox.acknowledged(&ack(1, 0)), Ok(()));
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_batch_that_was_not_executed() {
        let outbox = joined(0);
        outbox.publish(b"a", 5, Urgency::Urgent);
        outbox.next_batch();
        outbox.acknowledged(&ack(1, 3)).unwrap();
        assert!(outbox.primary.lag() > Duration::ZERO);
        outbox.acknowledged(&ack(1, 5)).unwrap();
        assert_eq!(outbox.primary.lag(), Duration::ZERO);
    }

    /// What the guest's thread publishes in the tests of a full buffer: three times what the buffer holds, in pieces.
    const PIECE: usize = 1 << 20;
    const PIECES: u64 = 3 * PENDING_LIMIT_BYTES as u64 / PIECE as u64;

    fn publish_all(outbox: &Outbox) -> Option<u64> {
        (1..=PIECES).map(|piece| outbox.publish(&vec![piece as u8; PIECE], piece, Urgency::Busy)).last()?
    }

    #[test]
    fn a_full_buffer_makes_the_guest_wait_and_loses_nothing() {
        let outbox = joined(0);
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| publish_all(&outbox));
            let mut expected = (1..=PIECES).flat_map(|piece| std::iter::repeat_n(piece as u8, PIECE));
            let mut reached = 0;
            let mut waited = false;
            while reached < PIECES {
                // Longer than the guest needs to fill it.
                std::thread::sleep(Duration::from_millis(20));
                waited |= !guest.is_finished();
                let batch = outbox.next_batch().unwrap().batch;
                assert!(batch.entries.len() <= MAX_BATCH_ENTRIES_BYTES);
                assert!(batch.entries.iter().all(|byte| expected.next() == Some(*byte)));
                reached = batch.reached;
            }
            assert!(waited, "the guest never had to wait");
            assert_eq!(expected.next(), None, "entries are missing");
            assert!(guest.join().unwrap().is_some());
        });
    }

    #[test]
    fn a_guest_that_waits_for_a_stuck_backup_goes_on_when_that_is_given_up() {
        let outbox = joined(0);
        outbox.acknowledged(&ack(0, 0)).unwrap();
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| publish_all(&outbox));
            // The sender takes a batch and never gets it out.
            outbox.next_batch().unwrap();
            let loss = loop {
                match outbox.primary.protocol(|primary| primary.look(None, false, boot_time())) {
                    Some(loss) => break loss,
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            };
            assert!(matches!(loss, Loss::Behind(_)) && !guest.is_finished());
            assert!(lose(&outbox, loss));
            assert_eq!(guest.join().unwrap(), None);
        });
    }

    #[test]
    fn an_orphan_accepts_nothing_until_it_is_alone() {
        let outbox = joined(0);
        assert!(lose(&outbox, Loss::Link));
        assert!(!lose(&outbox, Loss::Link));
        assert_eq!(outbox.primary.phase(), Phase::Orphaned);
        assert_eq!(outbox.publish(b"a", 1, Urgency::Urgent), None);
        assert!(outbox.next_batch().is_none() && outbox.last_word().is_none());
    }

    /// The thread of a lost connection is slow: it delivers what it has read when another backup follows.
    #[test]
    fn a_late_acknowledgement_of_a_lost_backup_opens_nothing_for_the_next_one() {
        let state = alone();
        let old = join(&state, 0);
        old.publish(b"a", 1, Urgency::Urgent);
        old.next_batch().unwrap();
        assert!(lose(&old, Loss::Link));
        state.protocol(|primary| {
            primary.closed();
            primary.claim_says(Ask { view: 3, backup: None }, Answer::Won);
        });
        let new = join(&state, 1);
        let batch = new.publish(b"b", 2, Urgency::Urgent);
        new.next_batch().unwrap();
        let needed = Needed { epoch: new.epoch(), batch };
        let leaves = || state.protocol(|primary| primary.may_leave(needed, None, boot_time()));
        old.acknowledged(&ack(1, 1)).unwrap();
        assert_eq!(leaves(), Leave::NotYet);
        assert!(!lose(&old, Loss::Link) && old.publish(b"c", 3, Urgency::Urgent).is_none());
        assert_eq!(state.phase(), Phase::Paired);
        new.acknowledged(&ack(1, 1)).unwrap();
        assert_eq!(leaves(), Leave::Yes);
    }
}
