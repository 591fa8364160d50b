//! The primary's end of the log connection, as shared state.
//!
//! Owns: what of the log is not sent yet, and the lock around the primary's state machine, which says whether there is a
//! backup and whether output may go (`protocol/primary.rs`). Must never: do I/O; the sender and the ack receiver do
//! (`primary.rs`); or decide anything by itself.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::pair::liveness::heartbeat::boot_time;
use crate::pair::protocol::{Answer, Ask, Duty, JoinError, Life, Loss, Phase, Primary, Timing};
use ft_log::{
    Ack, Batch, BatchSender, ByeReason, Checkpoint, FIRST_BATCH, MAX_BATCH_ENTRIES_BYTES, SequenceError,
};

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
pub enum Mood {
    /// At once: output waits for it.
    Urgent,
    /// Soon: the guest is working, and so should the backup.
    Busy,
    /// At leisure: the guest waits for something to happen.
    Idle,
}

/// Numbers since the backup was given the guest.
#[derive(Clone, Copy, Debug)]
pub struct LinkFigures {
    /// Bytes written behind the snapshot, as the link carries them: framing and sealing included.
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

struct State {
    primary: Primary,
    pending: Vec<u8>,
    /// Where the log starts.
    start: u64,
    reached: u64,
    sent_reached: u64,
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
    end: Option<End>,
}

/// The checkpoint that is on its way, and what there was of them.
struct Checkpoints {
    waiting: Option<Checkpoint>,
    sending: bool,
    pages: u64,
    pauses_us: Histogram<u32>,
}

impl Default for Checkpoints {
    fn default() -> Self {
        Self { waiting: None, sending: false, pages: 0, pauses_us: times_us() }
    }
}

/// A histogram of microseconds.
fn times_us() -> Histogram<u32> {
    Histogram::new_with_max(TIME_MAX_US, 2).expect("two digits of a number of microseconds fit")
}

/// What the sender sends next: a checkpoint's pieces before the batch that holds its stop.
pub struct Outgoing {
    /// To be encoded and sent first; then [`Link::checkpoint_sent`].
    pub checkpoint: Option<Checkpoint>,
    /// The batch.
    pub batch: Batch,
}

/// An orderly end of the log.
struct End {
    bye: Option<ByeReason>,
    closing: bool,
}

impl State {
    fn new(primary: Primary, anchor: u64) -> Self {
        Self {
            primary,
            pending: Vec::new(),
            start: anchor,
            reached: anchor,
            sent_reached: anchor,
            checkpoint: Checkpoints::default(),
            urgent: false,
            busy_since: None,
            sender: BatchSender::default(),
            released: 0,
            batch_at: Instant::now(),
            lags_us: times_us(),
            paced: Duration::ZERO,
            divergence: None,
            end: None,
        }
    }
}

/// The link. Shared by the vCPU thread, the sender, the ack receiver and the supervisor.
pub struct Link {
    state: Mutex<State>,
    to_send: Condvar,
    has_room: Condvar,
    all_acked: Condvar,
    bytes_sent: AtomicU64,
    position: AtomicU64,
}

impl State {
    fn is_paired(&self) -> bool {
        self.primary.phase() == Phase::Paired
    }

    /// There is nobody any more to send it to.
    fn drop_unsent(&mut self) {
        self.pending = Vec::new();
        self.checkpoint.waiting = None;
    }
}

impl Link {
    /// A guest that runs alone in `view`, which this monitor has claimed.
    pub fn new(view: u64, timing: Timing) -> Self {
        Self {
            state: Mutex::new(State::new(Primary::new(view, timing), 0)),
            to_send: Condvar::new(),
            has_room: Condvar::new(),
            all_acked: Condvar::new(),
            bytes_sent: AtomicU64::new(0),
            position: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves the state whole: every method changes it in one go.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The present phase.
    pub fn phase(&self) -> Phase {
        self.lock().primary.phase()
    }

    /// The present view.
    pub fn view(&self) -> u64 {
        self.lock().primary.view()
    }

    /// Has another monitor got the guest?
    pub fn is_lost(&self) -> bool {
        self.lock().primary.is_lost()
    }

    /// The guest is at `anchor`, for those who want to know.
    pub fn note_position(&self, anchor: u64) {
        self.position.store(anchor, Ordering::Relaxed);
    }

    /// Where the guest was when that was noted last.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Why no backup may begin to join, if none may.
    pub fn refusal(&self) -> Option<&'static str> {
        self.lock().primary.refusal()
    }

    /// `backup`, which was welcomed for `view`, is about to get the last of the guest. Answers what has to be claimed
    /// before; then [`Self::named`].
    pub fn name(&self, backup: Life, view: u64) -> Result<Ask, JoinError> {
        self.lock().primary.name(backup, view)
    }

    /// What the arbiter says to the claim that [`Self::name`] wants. True: the backup may have the rest of the guest.
    pub fn named(&self, ask: Ask, answer: Answer) -> bool {
        let mut state = self.lock();
        state.primary.claim_says(ask, answer);
        state.primary.has_named()
    }

    /// The backup that is joining does not come. What follows is a duty.
    pub fn join_failed(&self) {
        self.lock().primary.join_failed();
    }

    /// The backup that was named has been given everything up to `anchor`; numbering starts anew.
    pub fn attach(&self, anchor: u64) -> Result<(), JoinError> {
        let mut state = self.lock();
        state.primary.attach(boot_time())?;
        *state = State::new(state.primary.clone(), anchor);
        self.bytes_sent.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// May output go and the disk be touched? `heartbeat_sent_at` is when the newest answered heartbeat was sent.
    pub fn may_act(&self, heartbeat_sent_at: Option<Duration>) -> bool {
        self.lock().primary.may_act(heartbeat_sent_at, boot_time())
    }

    /// Is the backup to be given up? `cut_off`: nobody else is heard, either.
    pub fn look(&self, heartbeat_sent_at: Option<Duration>, cut_off: bool) -> Option<Loss> {
        self.lock().primary.look(heartbeat_sent_at, cut_off, boot_time())
    }

    /// The backup is lost. False: that was known.
    pub fn detach(&self, loss: Loss) -> bool {
        let mut state = self.lock();
        let news = state.primary.backup_lost(loss);
        if news {
            state.drop_unsent();
        }
        drop(state);
        self.wake_all();
        news
    }

    /// The operator lets the backup go. Its last word is sent when the connection is closed. False: there is none.
    pub fn dismiss(&self) -> bool {
        let mut state = self.lock();
        let news = state.primary.backup_lost(Loss::Dismissed);
        if news {
            state.drop_unsent();
            state.end = Some(End { bye: Some(ByeReason::Dismissed), closing: false });
        }
        drop(state);
        self.wake_all();
        news
    }

    /// After [`Self::end`]: the backup does not take the guest.
    pub fn take_back(&self) {
        self.lock().primary.take_back();
    }

    /// What follows from the loss of the backup, one step after the other.
    pub fn duty(&self) -> Duty {
        self.lock().primary.duty()
    }

    /// The connection to the lost backup is closed, or left to itself.
    pub fn closed(&self) {
        self.lock().primary.closed();
        self.wake_all();
    }

    /// What the arbiter says to the claim of `view` that [`Self::duty`] wants.
    pub fn claim_says(&self, view: u64, answer: Answer) {
        self.lock().primary.claim_says(Ask { view, backup: None }, answer);
        self.wake_all();
    }

    /// The log is over: the sender closes the connection, with `bye` as its last word if there is one. The
    /// backup may take over from here on, so that nothing may be let out any more.
    pub fn end(&self, bye: Option<ByeReason>) {
        let mut state = self.lock();
        if state.primary.end() {
            state.end = Some(End { bye, closing: false });
        }
        drop(state);
        self.wake_all();
    }

    /// After [`Link::end`], when nothing is under way any more: the connection may be closed.
    pub fn close(&self) {
        if let Some(end) = &mut self.lock().end {
            end.closing = true;
        }
        self.wake_all();
    }

    /// As [`Link::close`], and the backup is told that nothing of this monitor is under way, so that it need not make
    /// sure of that.
    pub fn close_at_rest(&self) {
        if let Some(end) = &mut self.lock().end {
            end.bye.get_or_insert(ByeReason::Shutdown);
        }
        self.close();
    }

    /// The sender's, behind the last batch: waits until the connection may be closed, and gives its last
    /// word. `None`: this is no orderly end, and the supervisor closes the connection.
    pub fn last_word(&self) -> Option<Option<ByeReason>> {
        let open = |state: &mut State| state.end.as_ref().is_some_and(|end| !end.closing);
        let state = self.to_send.wait_while(self.lock(), open).unwrap_or_else(PoisonError::into_inner);
        state.end.as_ref().map(|end| end.bye)
    }

    fn wake_all(&self) {
        self.to_send.notify_all();
        self.has_room.notify_all();
        self.all_acked.notify_all();
    }

    /// Hands over entries; the log is then complete up to `reached`. Waits while the sender is far behind.
    /// Answers the number of the batch that they will be in, or `None` without a backup.
    pub fn publish(&self, entries: &[u8], reached: u64, mood: Mood) -> Option<u64> {
        let mut state = self.lock();
        while state.is_paired()
            && !state.pending.is_empty()
            && state.pending.len() + entries.len() > PENDING_LIMIT_BYTES
        {
            state = self.has_room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.is_paired() {
            return None;
        }
        state.pending.extend_from_slice(entries);
        state.reached = reached;
        match mood {
            Mood::Idle => state.busy_since = None,
            Mood::Busy | Mood::Urgent => self.note_busy(&mut state),
        }
        if (mood == Mood::Urgent || state.pending.len() >= EAGER_BYTES) && !state.urgent {
            state.urgent = true;
            self.to_send.notify_one();
        }
        Some(state.sender.sent() + 1)
    }

    /// Hands over a checkpoint for which the guest stood still for `pause`. Publish its stop next. There is none under way ([`Link::takes_checkpoint`]).
    pub fn checkpoint(&self, checkpoint: Checkpoint, pause: Duration) {
        let mut state = self.lock();
        state.checkpoint.pauses_us.saturating_record(pause.as_micros() as u64);
        state.checkpoint.pages += checkpoint.pages.len() as u64;
        state.checkpoint.waiting = state.is_paired().then_some(checkpoint);
    }

    /// May a checkpoint be taken? One at a time is under way, so that what waits to be sent is bounded. Without a
    /// backup nothing waits: the one that a lost backup did not get must not keep the guest from its events.
    pub fn takes_checkpoint(&self) -> bool {
        let state = self.lock();
        !state.is_paired() || (state.checkpoint.waiting.is_none() && !state.checkpoint.sending)
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
        while state.is_paired() {
            let due = match state.busy_since {
                Some(since) => since.max(state.batch_at) + BUSY_INTERVAL,
                None => state.batch_at + IDLE_INTERVAL,
            };
            let left = due.saturating_duration_since(Instant::now());
            let news = !state.pending.is_empty() || state.reached != state.sent_reached;
            if state.urgent || (news && left.is_zero()) {
                return Some(Self::take_batch(&mut state, &self.has_room));
            }
            let wait = if left.is_zero() { IDLE_INTERVAL } else { left };
            state = self.to_send.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        None
    }

    fn take_batch(state: &mut State, has_room: &Condvar) -> Outgoing {
        let seq = state.sender.next_seq();
        let now = Instant::now();
        state.primary.sent(seq, state.reached, boot_time());
        state.batch_at = now;
        state.urgent = false;
        state.sent_reached = state.reached;
        let entries = std::mem::take(&mut state.pending);
        has_room.notify_all();
        let checkpoint = state.checkpoint.waiting.take();
        state.checkpoint.sending = checkpoint.is_some();
        let batch = Batch {
            view: state.primary.view(),
            seq,
            start: (seq == FIRST_BATCH).then_some(state.start),
            reached: state.reached,
            released: state.released.min(seq),
            entries,
        };
        Outgoing { checkpoint, batch }
    }

    /// Takes note of an acknowledgement. Answers the batch up to which output may go.
    pub fn acknowledged(&self, ack: &Ack) -> Result<u64, SequenceError> {
        let mut state = self.lock();
        state.sender.accept(ack)?;
        let State { primary, lags_us, .. } = &mut *state;
        let note = |lag: Duration| lags_us.saturating_record(lag.as_micros() as u64);
        primary.acknowledged(ack.received, ack.executed, boot_time(), note);
        if ack.received == state.sender.sent() && state.pending.is_empty() {
            self.all_acked.notify_all();
        }
        Ok(ack.received)
    }

    /// Output up to batch `seq` has gone.
    pub fn released(&self, seq: u64) {
        let mut state = self.lock();
        state.released = state.released.max(seq);
    }

    /// How long the backup's execution is behind: the age of the oldest batch that it is not known to have
    /// executed.
    pub fn lag(&self) -> Duration {
        self.lock().primary.lag(boot_time())
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

    /// What has passed between here and the present backup.
    pub fn figures(&self) -> LinkFigures {
        let state = self.lock();
        LinkFigures {
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
        while state.is_paired()
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
        state.is_paired()
    }
}

/// Counts what is written to the backup.
pub struct Counted<'a, W> {
    /// Where it goes.
    pub out: W,
    /// Whose count it is.
    pub link: &'a Link,
}

impl<W: Write> Write for Counted<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.link.bytes_sent.fetch_add(written as u64, Ordering::Relaxed);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link() -> Link {
        Link::new(1, Timing::new(Duration::from_secs(60), Duration::from_millis(50)))
    }

    /// In view 2, with a backup that has everything up to `anchor`.
    fn joined(anchor: u64) -> Link {
        let link = link();
        let ask = link.name(9, 2).unwrap();
        assert_eq!(link.attach(anchor), Err(JoinError::NotRecorded));
        assert!(link.named(ask, Answer::Won));
        link.attach(anchor).unwrap();
        link
    }

    fn ack(received: u64, executed: u64) -> Ack {
        Ack { received, executed, ..Ack::default() }
    }

    #[test]
    fn a_newcomer_is_told_what_it_would_have_to_wait_for() {
        let says = |link: &Link, part: Option<&str>| {
            let refusal = link.refusal();
            assert_eq!(refusal.is_some(), part.is_some(), "{refusal:?}");
            assert!(refusal.unwrap_or_default().contains(part.unwrap_or_default()), "{refusal:?}");
        };
        let link = link();
        says(&link, None);
        // A join of which nobody knows whether it was recorded, first while it lasts, then when it is given up.
        let ask = link.name(9, 2).unwrap();
        assert!(!link.named(ask, Answer::Unknown));
        says(&link, Some("another backup is joining"));
        link.join_failed();
        says(&link, Some("a backup that was joining did not come, and the arbiter has not answered yet"));
        link.claim_says(2, Answer::Unknown);
        says(&link, Some("a backup that was joining did not come, and the arbiter has not answered yet"));
        link.claim_says(2, Answer::Won);
        says(&link, None);

        let link = joined(10);
        says(&link, Some("this guest has a backup already"));
        assert!(link.detach(Loss::Link));
        link.closed();
        says(&link, Some("the last backup is lost, and the arbiter has not answered yet"));
        link.claim_says(3, Answer::Lost);
        says(&link, Some("another monitor has taken the guest over"));

        let link = joined(10);
        link.end(None);
        says(&link, Some("the backup may take the guest over"));
        link.take_back();
        link.claim_says(3, Answer::Won);
        says(&link, None);

        let link = joined(10);
        assert!(link.detach(Loss::Behind(Duration::ZERO)));
        says(&link, Some("the last backup is lost, and the arbiter has not answered yet"));
        link.claim_says(3, Answer::Won);
        says(&link, Some("the last backup is being let go"));
        link.closed();
        says(&link, None);
    }

    #[test]
    fn without_a_backup_nothing_is_kept() {
        let link = link();
        assert_eq!(link.publish(b"entries", 1, Mood::Urgent), None);
        assert!(link.next_batch().is_none());
    }

    #[test]
    fn entries_are_in_the_batch_that_publish_named() {
        let link = joined(10);
        assert_eq!(link.publish(b"a", 11, Mood::Idle), Some(1));
        assert_eq!(link.publish(b"b", 12, Mood::Urgent), Some(1));
        let batch = link.next_batch().unwrap().batch;
        assert_eq!((batch.seq, batch.reached, batch.entries.as_slice()), (1, 12, b"ab".as_slice()));
        assert_eq!((batch.view, batch.start), (2, Some(10)), "the log says whose it is and where it starts");
        assert_eq!(link.publish(b"c", 13, Mood::Urgent), Some(2));
        let batch = link.next_batch().unwrap().batch;
        assert_eq!((batch.view, batch.start, batch.entries.as_slice()), (2, None, b"c".as_slice()));
    }

    #[test]
    fn progress_without_entries_is_sent() {
        let link = joined(10);
        link.publish(&[], 11, Mood::Idle);
        assert_eq!(link.next_batch().unwrap().batch.reached, 11);
    }

    #[test]
    fn one_checkpoint_at_a_time_goes_before_the_batch_with_its_stop() {
        let link = joined(10);
        assert!(link.takes_checkpoint());
        link.checkpoint(Checkpoint::default(), Duration::ZERO);
        assert!(!link.takes_checkpoint());
        link.publish(b"stop", 11, Mood::Busy);
        let outgoing = link.next_batch().unwrap();
        assert!(outgoing.checkpoint.is_some());
        assert_eq!(outgoing.batch.entries, b"stop");
        assert!(!link.takes_checkpoint());
        link.checkpoint_sent();
        assert!(link.takes_checkpoint());
    }

    #[test]
    fn what_a_lost_backup_did_not_get_keeps_no_checkpoint_from_being_taken() {
        let lost = [|link: &Link| link.detach(Loss::Link), Link::dismiss];
        for (lose, is_taken) in lost.into_iter().flat_map(|lose| [(lose, false), (lose, true)]) {
            let link = joined(10);
            link.checkpoint(Checkpoint::default(), Duration::ZERO);
            link.publish(b"stop", 11, Mood::Urgent);
            // The sender may have got hold of it, and never says that it is sent.
            let sending = is_taken.then(|| link.next_batch().unwrap());
            assert!(!link.takes_checkpoint());
            assert!(lose(&link));
            drop(sending);
            assert!(link.takes_checkpoint());
            link.checkpoint(Checkpoint::default(), Duration::ZERO);
            assert!(link.takes_checkpoint(), "while the claim is open, too");
        }
    }

    #[test]
    fn who_closes_at_rest_says_so_unless_the_last_word_is_another() {
        for (bye, last_word) in
            [(None, ByeReason::Shutdown), (Some(ByeReason::GuestEnded), ByeReason::GuestEnded)]
        {
            let link = joined(10);
            link.end(bye);
            link.close_at_rest();
            assert_eq!(link.last_word(), Some(Some(last_word)));
        }
        let link = joined(10);
        link.end(None);
        link.close();
        assert_eq!(link.last_word(), Some(None), "something may be under way");
    }

    #[test]
    fn an_acknowledgement_of_what_was_not_sent_is_refused() {
        let link = joined(0);
        link.publish(b"a", 1, Mood::Urgent);
        link.next_batch();
        assert!(link.acknowledged(&ack(2, 0)).is_err());
        assert_eq!(link.acknowledged(&ack(1, 0)), Ok(1));
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_batch_that_was_not_executed() {
        let link = joined(0);
        link.publish(b"a", 5, Mood::Urgent);
        link.next_batch();
        link.acknowledged(&ack(1, 3)).unwrap();
        assert!(link.lag() > Duration::ZERO);
        link.acknowledged(&ack(1, 5)).unwrap();
        assert_eq!(link.lag(), Duration::ZERO);
    }

    /// What the guest's thread publishes in the tests of a full buffer: three times what the buffer holds, in pieces.
    const PIECE: usize = 1 << 20;
    const PIECES: u64 = 3 * PENDING_LIMIT_BYTES as u64 / PIECE as u64;

    fn publish_all(link: &Link) -> Option<u64> {
        (1..=PIECES).map(|piece| link.publish(&vec![piece as u8; PIECE], piece, Mood::Busy)).last()?
    }

    #[test]
    fn a_full_buffer_makes_the_guest_wait_and_loses_nothing() {
        let link = joined(0);
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| publish_all(&link));
            let mut expected = (1..=PIECES).flat_map(|piece| std::iter::repeat_n(piece as u8, PIECE));
            let mut reached = 0;
            let mut waited = false;
            while reached < PIECES {
                // Longer than the guest needs to fill it.
                std::thread::sleep(Duration::from_millis(20));
                waited |= !guest.is_finished();
                let batch = link.next_batch().unwrap().batch;
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
        let link = joined(0);
        link.acknowledged(&ack(0, 0)).unwrap();
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| publish_all(&link));
            // The sender takes a batch and never gets it out.
            link.next_batch().unwrap();
            let loss = loop {
                match link.look(None, false) {
                    Some(loss) => break loss,
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            };
            assert!(matches!(loss, Loss::Behind(_)) && !guest.is_finished());
            assert!(link.detach(loss));
            assert_eq!(guest.join().unwrap(), None);
        });
    }

    #[test]
    fn an_orphan_accepts_nothing_until_it_is_alone() {
        let link = joined(0);
        assert!(link.detach(Loss::Link));
        assert!(!link.detach(Loss::Link));
        assert_eq!(link.phase(), Phase::Orphaned);
        assert_eq!(link.publish(b"a", 1, Mood::Urgent), None);
        assert_eq!(link.name(9, 3), Err(JoinError::NotAlone));
        link.closed();
        link.claim_says(3, Answer::Won);
        assert_eq!((link.phase(), link.view()), (Phase::Alone, 3));
    }
}
