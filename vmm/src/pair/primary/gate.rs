//! Where outputs wait: nothing that the guest does is seen outside before the backup could do it as well.
//!
//! Owns: the outputs that wait, in order, each with the batch of the log that has to be acknowledged first.
//! Must never: let an output overtake another, lose one (except when closed), or let anything out once closed.
//! What may leave is the rule's to say (`protocol/rule.rs`):
//!
//! - `Protected`: an output leaves once its batch is acknowledged *and* the lease holds. The lease is asked at
//!   each output: a host that was frozen must see by the clock that it may have been replaced meanwhile.
//! - `Unprotected`: there is no backup; everything leaves at once. No lease is asked, since nobody could take over.
//! - `Closed`: another monitor has the view. Everything is dropped.
//!
//! Any thread may push, acknowledge or change the mode. One at a time performs, without the lock held, so a
//! slow performer does not hold up the others.
//!
//! The gate is full at a count or a number of bytes. It still takes what it is given (one exit of the guest
//! cannot be taken back half way) and says so: the caller lets the guest wait until there is room.
//!
//! Not covered: a host that is frozen between the lease's answer and the system call. A frame sent late does
//! no harm; the disk asks its own guard again.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use devices::{DiskRequest, Effect};
use ft_log::MAX_CONSOLE_BYTES;

use crate::host::backends::Performer;
use crate::pair::protocol::{Leave, Mode, OutputRule};

/// An effect that is seen outside.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Output {
    Frame(Vec<u8>),
    Disk(DiskRequest),
    Console(Vec<u8>),
}

impl Output {
    fn from_effect(effect: Effect) -> Option<Self> {
        match effect {
            Effect::Frame(data) => Some(Self::Frame(data)),
            Effect::Disk(request) => Some(Self::Disk(request)),
            Effect::Console(byte) => Some(Self::Console(vec![byte])),
            Effect::Entropy { .. } | Effect::Reset | Effect::PowerOff => None,
        }
    }

    fn len_bytes(&self) -> usize {
        match self {
            Self::Frame(data) | Self::Console(data) => data.len(),
            Self::Disk(DiskRequest { op: devices::DiskOp::Write { data, .. }, .. }) => data.len(),
            Self::Disk(_) => 0,
        }
    }
}

/// Whether a primary may still let something out. Must not call the gate.
pub type Lease = Box<dyn Fn() -> bool + Send + Sync>;

/// When the gate is full: at either of them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Outputs.
    pub count: usize,
    /// Bytes of frames, written sectors and console output.
    pub bytes: usize,
}

/// Whether the guest may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the guest has to wait while the gate is full"]
pub enum Room {
    /// It may.
    Available,
    /// It has to wait ([`OutputGate::wait_for_room`]).
    Full,
}

/// What has passed and what waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateStats {
    /// Outputs let out.
    pub released: u64,
    /// Sum of the times from push to release of these.
    pub delay_sum_us: u64,
    /// Longest of them.
    pub delay_max_us: u64,
    /// Times that an acknowledged output was held back since the lease did not hold.
    pub lease_refusals: u64,
    /// Outputs dropped since the gate was closed.
    pub dropped: u64,
    /// Outputs that wait.
    pub held: usize,
    /// Their bytes.
    pub held_bytes: usize,
}

struct Held {
    seq: u64,
    output: Output,
    since: Instant,
}

/// What waits, and the rule: no locks, no clock, nothing performed.
struct Queue {
    rule: OutputRule,
    limits: Limits,
    held: VecDeque<Held>,
    /// The batch of the output that is on its way out.
    performing: Option<u64>,
    stats: GateStats,
}

impl Queue {
    fn new(mode: Mode, limits: Limits) -> Self {
        Self {
            rule: OutputRule::new(mode),
            limits,
            held: VecDeque::new(),
            performing: None,
            stats: GateStats::default(),
        }
    }

    fn push(&mut self, seq: u64, output: Output, now: Instant) {
        if self.rule.mode() == Mode::Closed {
            self.stats.dropped += 1;
            return;
        }
        self.stats.held_bytes += output.len_bytes();
        // Consoles come byte by byte; what waits together is written together.
        if let (Output::Console(bytes), Some(Held { seq: last, output: Output::Console(waiting), .. })) =
            (&output, self.held.back_mut())
            && *last == seq
            && waiting.len() + bytes.len() <= MAX_CONSOLE_BYTES
        {
            waiting.extend(bytes);
            return;
        }
        self.held.push_back(Held { seq, output, since: now });
    }

    fn room(&self) -> Room {
        let full = self.held.len() >= self.limits.count || self.stats.held_bytes >= self.limits.bytes;
        if full { Room::Full } else { Room::Available }
    }

    /// Takes the next output that may leave.
    fn next(&mut self, now: Instant, lease: &dyn Fn() -> bool) -> Option<Output> {
        let first = self.held.front()?;
        let leave = self.rule.may_leave(first.seq, lease);
        self.stats.lease_refusals += u64::from(leave == Leave::NoLease);
        if leave != Leave::Yes {
            return None;
        }
        let held = self.take_first()?;
        let delay_us = now.saturating_duration_since(held.since).as_micros() as u64;
        self.stats.released += 1;
        self.stats.delay_sum_us += delay_us;
        self.stats.delay_max_us = self.stats.delay_max_us.max(delay_us);
        self.performing = Some(held.seq);
        Some(held.output)
    }

    fn take_first(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.stats.held_bytes -= held.output.len_bytes();
        Some(held)
    }

    fn protect(&mut self) {
        if self.rule.mode() == Mode::Unprotected {
            // These were free to go before the backup came, whatever they had waited for until then.
            self.held.iter_mut().for_each(|held| held.seq = 0);
        }
        self.rule.protect();
    }

    fn released_seq(&self) -> u64 {
        // The one that is being performed comes before those that wait.
        let next = self.performing.or_else(|| self.held.front().map(|held| held.seq));
        let acknowledged = self.rule.acknowledged();
        next.map_or(acknowledged, |seq| acknowledged.min(seq.saturating_sub(1)))
    }

    fn set_mode(&mut self, mode: Mode) {
        self.rule.set(mode);
        if self.rule.mode() == Mode::Closed {
            self.stats.dropped += self.held.len() as u64;
            self.held.clear();
            self.stats.held_bytes = 0;
        }
    }

    fn stats(&self) -> GateStats {
        GateStats { held: self.held.len(), ..self.stats }
    }
}

/// Where the guest's outputs wait to be let out.
pub struct OutputGate<P> {
    queue: Mutex<Queue>,
    /// Signalled when outputs have left, the mode has changed or performing has stopped.
    changed: Condvar,
    performer: P,
    lease: Lease,
}

impl<P: Performer> OutputGate<P> {
    /// A gate in `mode` that performs with `performer` while `lease` says so.
    pub fn new(mode: Mode, limits: Limits, performer: P, lease: Lease) -> Self {
        let queue = Mutex::new(Queue::new(mode, limits));
        Self { queue, changed: Condvar::new(), performer, lease }
    }

    /// Takes an effect that may leave once batch `seq_needed` is acknowledged. It is taken even when full.
    /// Effects that are not seen outside are none of the gate's business and are ignored.
    pub fn push(&self, seq_needed: u64, effect: Effect) -> Room {
        let mut queue = self.lock();
        let Some(output) = Output::from_effect(effect) else { return queue.room() };
        queue.push(seq_needed, output, Instant::now());
        self.perform(queue).room()
    }

    /// The backup has acknowledged all batches up to `seq`: lets out what waited for them.
    pub fn acknowledged(&self, seq: u64) {
        let mut queue = self.lock();
        queue.rule.acknowledge(seq);
        drop(self.perform(queue));
    }

    /// Lets out what may leave. Needed after the lease has been won back; all else does it by itself.
    pub fn retry(&self) {
        drop(self.perform(self.lock()));
    }

    /// Waits until there is room, at most for `timeout`.
    pub fn wait_for_room(&self, timeout: Duration) -> Room {
        let full = |queue: &mut Queue| queue.room() == Room::Full;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, full);
        waited.unwrap_or_else(PoisonError::into_inner).0.room()
    }

    /// A backup follows from here on. Its batches are counted from 1; none is acknowledged yet.
    pub fn protect(&self) {
        self.lock().protect();
    }

    /// The highest acknowledged batch up to which all outputs have left: what a follower is told.
    pub fn released_seq(&self) -> u64 {
        self.lock().released_seq()
    }

    /// There is no backup, and the view is ours for certain: lets out everything.
    pub fn unprotect(&self) {
        let mut queue = self.lock();
        queue.set_mode(Mode::Unprotected);
        drop(self.perform(queue));
    }

    /// The view is lost: drops everything, now and later. When this returns, nothing is being performed.
    pub fn close(&self) {
        let mut queue = self.lock();
        queue.set_mode(Mode::Closed);
        self.changed.notify_all();
        let performing = |queue: &mut Queue| queue.performing.is_some();
        drop(self.changed.wait_while(queue, performing).unwrap_or_else(PoisonError::into_inner));
    }

    /// Where outputs go.
    pub fn performer(&self) -> &P {
        &self.performer
    }

    /// With the lease refused: waits until nothing is being performed. False: something still was after
    /// `timeout`.
    pub fn quiesce(&self, timeout: Duration) -> bool {
        let performing = |queue: &mut Queue| queue.performing.is_some();
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, performing);
        waited.unwrap_or_else(PoisonError::into_inner).0.performing.is_none()
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.lock().rule.mode()
    }

    /// Numbers so far.
    pub fn stats(&self) -> GateStats {
        self.lock().stats()
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Performs what may leave, unless a thread is at it already: that one then sees what has changed.
    fn perform<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        if queue.performing.is_some() {
            return queue;
        }
        while let Some(output) = queue.next(Instant::now(), &*self.lease) {
            drop(queue);
            let close_on_panic = CloseOnPanic(self);
            match output {
                Output::Frame(frame) => self.performer.frame(&frame),
                Output::Disk(request) => self.performer.disk(request),
                Output::Console(bytes) => self.performer.console(&bytes),
            }
            drop(close_on_panic);
            queue = self.lock();
            queue.performing = None;
            self.changed.notify_all();
        }
        queue
    }
}

/// Whether the output at which a performer panicked went out is not known, so nothing may follow it.
struct CloseOnPanic<'a, P: Performer>(&'a OutputGate<P>);

impl<P: Performer> Drop for CloseOnPanic<'_, P> {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut queue = self.0.lock();
            queue.set_mode(Mode::Closed);
            queue.performing = None;
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
    use devices::DiskOp;

    use super::*;

    const LIMITS: Limits = Limits { count: 100, bytes: 100_000 };

    struct Recorder(Sender<Output>);

    impl Performer for Recorder {
        fn frame(&self, frame: &[u8]) {
            self.0.send(Output::Frame(frame.to_vec())).unwrap();
        }
        fn disk(&self, request: DiskRequest) {
            self.0.send(Output::Disk(request)).unwrap();
        }
        fn console(&self, bytes: &[u8]) {
            self.0.send(Output::Console(bytes.to_vec())).unwrap();
        }
    }

    fn gate(mode: Mode, limits: Limits, lease: Lease) -> (OutputGate<Recorder>, Receiver<Output>) {
        let (sender, performed) = unbounded();
        (OutputGate::new(mode, limits, Recorder(sender), lease), performed)
    }

    fn protected() -> (OutputGate<Recorder>, Receiver<Output>) {
        gate(Mode::Protected, LIMITS, Box::new(|| true))
    }

    fn frame(number: u8) -> Output {
        Output::Frame(vec![number; 60])
    }

    fn flush(id: u64) -> Output {
        Output::Disk(DiskRequest { id, op: DiskOp::Flush })
    }

    fn push_for_room<P: Performer>(gate: &OutputGate<P>, seq: u64, output: Output) -> Room {
        match output {
            Output::Frame(data) => gate.push(seq, Effect::Frame(data)),
            Output::Disk(request) => gate.push(seq, Effect::Disk(request)),
            Output::Console(bytes) => {
                bytes.into_iter().fold(Room::Available, |_, byte| gate.push(seq, Effect::Console(byte)))
            }
        }
    }

    fn push<P: Performer>(gate: &OutputGate<P>, seq: u64, output: Output) {
        assert_eq!(push_for_room(gate, seq, output), Room::Available);
    }

    fn taken(performed: &Receiver<Output>) -> Vec<Output> {
        performed.try_iter().collect()
    }

    #[test]
    fn outputs_leave_in_order_once_acknowledged() {
        let (gate, performed) = protected();
        push(&gate, 1, frame(1));
        push(&gate, 2, flush(1));
        push(&gate, 2, Output::Console(b"a".to_vec()));
        push(&gate, 3, frame(3));
        assert_eq!(taken(&performed), []);
        gate.acknowledged(2);
        assert_eq!(taken(&performed), [frame(1), flush(1), Output::Console(b"a".to_vec())]);
        gate.acknowledged(1);
        assert_eq!(taken(&performed), []);
        gate.acknowledged(3);
        assert_eq!(taken(&performed), [frame(3)]);
        push(&gate, 3, frame(4));
        assert_eq!(taken(&performed), [frame(4)], "acknowledged before it was pushed");
    }

    #[test]
    fn without_a_backup_everything_passes_and_no_lease_is_asked() {
        let (gate, performed) = gate(Mode::Protected, LIMITS, Box::new(|| false));
        push(&gate, 5, frame(1));
        gate.unprotect();
        push(&gate, 6, frame(2));
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
        gate.protect();
        push(&gate, 1, frame(3));
        assert_eq!(taken(&performed), []);
        assert_eq!(gate.stats().lease_refusals, 0);
    }

    #[test]
    fn a_new_backup_is_not_credited_with_what_the_last_one_acknowledged() {
        let (gate, performed) = protected();
        gate.acknowledged(1_000);
        gate.unprotect();
        gate.protect();
        push(&gate, 1, frame(1));
        assert_eq!(taken(&performed), []);
        gate.acknowledged(1);
        assert_eq!(taken(&performed), [frame(1)]);
    }

    #[test]
    fn what_was_free_to_go_before_a_backup_came_does_not_wait_for_it() {
        let now = Instant::now();
        let mut queue = Queue::new(Mode::Protected, LIMITS);
        for (seq, output) in [(u64::MAX, frame(1)), (u64::MAX, frame(2))] {
            queue.push(seq, output, now);
        }
        queue.set_mode(Mode::Unprotected);
        assert_eq!(queue.next(now, &|| true), Some(frame(1)));
        queue.protect();
        queue.push(1, frame(3), now);
        assert_eq!(queue.next(now, &|| true), Some(frame(2)));
        assert_eq!(queue.next(now, &|| true), None);
    }

    #[test]
    fn a_batch_counts_as_released_once_its_last_output_has_left() {
        let now = Instant::now();
        let mut queue = Queue::new(Mode::Protected, LIMITS);
        for (seq, output) in [(2, frame(1)), (2, frame(2)), (5, frame(3))] {
            queue.push(seq, output, now);
        }
        assert_eq!(queue.released_seq(), 0);
        queue.rule.acknowledge(6);
        assert_eq!(queue.released_seq(), 1);
        assert_eq!(queue.next(now, &|| true), Some(frame(1)));
        assert_eq!(queue.released_seq(), 1);
        assert_eq!(queue.next(now, &|| true), Some(frame(2)));
        assert_eq!(queue.released_seq(), 1, "the second one is on its way");
        queue.performing = None;
        assert_eq!(queue.released_seq(), 4);
        assert_eq!(queue.next(now, &|| true), Some(frame(3)));
        queue.performing = None;
        assert_eq!(queue.released_seq(), 6);
    }

    #[test]
    fn without_the_lease_acknowledged_outputs_stay() {
        let lease = Arc::new(AtomicBool::new(false));
        let asked = Arc::clone(&lease);
        let (gate, performed) = gate(Mode::Protected, LIMITS, Box::new(move || asked.load(Ordering::SeqCst)));
        push(&gate, 1, frame(1));
        push(&gate, 1, frame(2));
        gate.acknowledged(1);
        assert_eq!(taken(&performed), []);
        assert_eq!(gate.stats().lease_refusals, 1);
        lease.store(true, Ordering::SeqCst);
        gate.retry();
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
    }

    #[test]
    fn the_lease_is_asked_for_each_output() {
        let answers = AtomicU64::new(2);
        let first_two = move || answers.fetch_sub(1, Ordering::SeqCst) > 0;
        let (gate, performed) = gate(Mode::Protected, LIMITS, Box::new(first_two));
        for number in 1..=3 {
            push(&gate, 1, frame(number));
        }
        gate.acknowledged(1);
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
    }

    #[test]
    fn a_closed_gate_drops_everything_for_ever() {
        let (gate, performed) = protected();
        push(&gate, 1, frame(1));
        gate.close();
        gate.acknowledged(1);
        push(&gate, 2, frame(2));
        gate.unprotect();
        gate.protect();
        gate.retry();
        assert_eq!(gate.mode(), Mode::Closed);
        assert_eq!(taken(&performed), []);
        assert_eq!(gate.stats(), GateStats { dropped: 2, ..GateStats::default() });
    }

    #[test]
    fn a_full_gate_makes_the_guest_wait_and_loses_nothing() {
        let few = Limits { count: 2, bytes: 100_000 };
        let small = Limits { count: 100, bytes: 120 };
        for limits in [few, small] {
            let (gate, performed) = gate(Mode::Protected, limits, Box::new(|| true));
            assert_eq!(push_for_room(&gate, 1, frame(1)), Room::Available);
            assert_eq!(push_for_room(&gate, 2, frame(2)), Room::Full);
            assert_eq!(push_for_room(&gate, 3, frame(3)), Room::Full);
            assert_eq!(gate.wait_for_room(Duration::ZERO), Room::Full);
            gate.acknowledged(2);
            assert_eq!(gate.wait_for_room(Duration::ZERO), Room::Available);
            gate.acknowledged(3);
            assert_eq!(taken(&performed), [frame(1), frame(2), frame(3)]);
        }
    }

    #[test]
    fn a_guest_that_waits_is_woken_by_an_acknowledgement_and_by_closing() {
        for closing in [false, true] {
            let limits = Limits { count: 1, bytes: 100_000 };
            let (gate, _performed) = gate(Mode::Protected, limits, Box::new(|| true));
            assert_eq!(push_for_room(&gate, 1, frame(1)), Room::Full);
            thread::scope(|scope| {
                let guest = scope.spawn(|| gate.wait_for_room(Duration::from_secs(60)));
                if closing {
                    gate.close()
                } else {
                    gate.acknowledged(1)
                }
                assert_eq!(guest.join().unwrap(), Room::Available);
            });
        }
    }

    #[test]
    fn console_bytes_of_one_batch_are_written_together() {
        let (gate, performed) = protected();
        push(&gate, 1, Output::Console(b"hello".to_vec()));
        push(&gate, 2, Output::Console(b"!".to_vec()));
        assert_eq!((gate.stats().held, gate.stats().held_bytes), (2, 6));
        gate.acknowledged(1);
        assert_eq!(taken(&performed), [Output::Console(b"hello".to_vec())]);
        assert_eq!((gate.stats().held, gate.stats().held_bytes), (1, 1));
    }

    #[test]
    fn effects_that_are_not_seen_outside_are_ignored() {
        let (gate, performed) = gate(Mode::Unprotected, LIMITS, Box::new(|| true));
        for effect in [Effect::Reset, Effect::PowerOff, Effect::Entropy { len_bytes: 8 }] {
            assert_eq!(gate.push(1, effect), Room::Available);
        }
        assert_eq!(taken(&performed), []);
        assert_eq!(gate.stats(), GateStats::default());
    }

    #[test]
    fn delays_are_measured_from_push_to_release() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut queue = Queue::new(Mode::Protected, LIMITS);
        queue.push(1, frame(1), at(0));
        queue.push(1, frame(2), at(100));
        queue.rule.acknowledge(1);
        assert_eq!(queue.next(at(150), &|| true), Some(frame(1)));
        assert_eq!(queue.next(at(170), &|| true), Some(frame(2)));
        assert_eq!(queue.next(at(200), &|| true), None);
        let stats = GateStats { released: 2, delay_sum_us: 220, delay_max_us: 150, ..GateStats::default() };
        assert_eq!(queue.stats(), stats);
    }

    /// Checks of each frame, which carries its batch, that the batch was acknowledged.
    struct Checker {
        acknowledged: Arc<AtomicU64>,
        frames: Sender<u64>,
    }

    impl Performer for Checker {
        fn frame(&self, frame: &[u8]) {
            let number = u64::from_le_bytes(frame.try_into().unwrap());
            assert!(number <= self.acknowledged.load(Ordering::SeqCst), "frame {number} left too early");
            self.frames.send(number).unwrap();
        }
        fn disk(&self, _: DiskRequest) {}
        fn console(&self, _: &[u8]) {}
    }

    #[test]
    fn order_and_rule_hold_across_threads() {
        const COUNT: u64 = 20_000;
        let (frames, performed) = unbounded();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let checker = Checker { acknowledged: Arc::clone(&acknowledged), frames };
        let limits = Limits { count: 16, bytes: 100_000 };
        let gate = OutputGate::new(Mode::Protected, limits, checker, Box::new(|| true));
        let (log, backup) = bounded(4);
        thread::scope(|scope| {
            let gate = &gate;
            scope.spawn(move || {
                for seq in 1..=COUNT {
                    log.send(seq).unwrap();
                    if gate.push(seq, Effect::Frame(seq.to_le_bytes().to_vec())) == Room::Full {
                        assert_eq!(gate.wait_for_room(Duration::from_secs(60)), Room::Available);
                    }
                }
            });
            for seq in backup {
                acknowledged.store(seq, Ordering::SeqCst);
                gate.acknowledged(seq);
            }
        });
        assert!(performed.try_iter().eq(1..=COUNT));
    }

    struct Broken;

    impl Performer for Broken {
        fn frame(&self, _: &[u8]) {
            panic!("this panic is part of a test");
        }
        fn disk(&self, _: DiskRequest) {}
        fn console(&self, _: &[u8]) {}
    }

    #[test]
    fn a_performer_that_panics_closes_the_gate() {
        let gate = OutputGate::new(Mode::Protected, LIMITS, Broken, Box::new(|| true));
        push(&gate, 1, frame(1));
        let panicked = thread::scope(|scope| scope.spawn(|| gate.acknowledged(1)).join());
        assert!(panicked.is_err());
        gate.close();
        assert_eq!(gate.mode(), Mode::Closed);
    }

    /// Stays in `frame` until it is allowed to return.
    struct Slow {
        entered: Sender<()>,
        leave: Receiver<()>,
    }

    impl Performer for Slow {
        fn frame(&self, _: &[u8]) {
            self.entered.send(()).unwrap();
            self.leave.recv().unwrap();
        }
        fn disk(&self, _: DiskRequest) {}
        fn console(&self, _: &[u8]) {}
    }

    #[test]
    fn closing_waits_for_the_output_that_is_on_its_way_and_stops_the_next() {
        let ((entered_tx, entered), (leave, leave_rx)) = (bounded(1), bounded(1));
        let slow = Slow { entered: entered_tx, leave: leave_rx };
        let gate = OutputGate::new(Mode::Protected, LIMITS, slow, Box::new(|| true));
        push(&gate, 1, frame(1));
        push(&gate, 1, frame(2));
        let (closed_tx, closed) = bounded(1);
        thread::scope(|scope| {
            scope.spawn(|| gate.acknowledged(1));
            entered.recv().unwrap();
            push(&gate, 1, frame(3));
            scope.spawn(|| {
                gate.close();
                closed_tx.send(()).unwrap();
            });
            while gate.mode() != Mode::Closed {
                thread::yield_now();
            }
            assert!(closed.try_recv().is_err(), "closed while the performer was at work");
            leave.send(()).unwrap();
            closed.recv().unwrap();
        });
        assert!(entered.try_recv().is_err(), "a second output left");
        assert_eq!(gate.stats().dropped, 2);
    }
}
