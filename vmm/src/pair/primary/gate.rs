//! Where outputs wait: nothing that the guest does is seen outside before the backup could do it as well.
//!
//! Owns: the outputs that wait, in order, each with what it needs. Must never: let an output overtake another, lose one
//! (except when the guest is another's), or let one go that the permit refuses. Whether an output may leave the primary's
//! protocol machine says (`Primary::may_leave`), at each output; the gate has no mode of its own.
//!
//! Any thread may push, or ask again ([`OutputGate::retry`]) when what is permitted may have changed. One at a time performs,
//! without the lock held, so a slow performer does not hold up the others.
//!
//! The gate is full at a count or a number of bytes. It still takes what it is given (one exit of the guest
//! cannot be taken back half way) and says so: the caller lets the guest wait until there is room.
//!
//! Threads: the vCPU's, `log-acks` and the supervisor. Locks: one; the permit is asked while it is held.
//!
//! Not covered: a host that is frozen between the permit's answer and the system call. A frame sent late does
//! no harm; the disk asks its own guard again.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use devices::{DiskRequest, Effect};
use ft_log::MAX_CONSOLE_BYTES;

use crate::host::backends::Performer;
use crate::pair::protocol::{Leave, Needed};

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

/// Whether an output may leave that needs this. Must not call the gate.
pub type Permit = Box<dyn Fn(Needed) -> Leave + Send + Sync>;

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
    needed: Needed,
    output: Output,
    since: Instant,
}

/// What waits: no locks, no clock, nothing performed.
struct Queue {
    limits: Limits,
    held: VecDeque<Held>,
    /// What the output needed that is on its way out.
    performing: Option<Needed>,
    /// A performer has panicked: whether its output went out is not known, so nothing may follow.
    broken: bool,
    stats: GateStats,
}

impl Queue {
    fn new(limits: Limits) -> Self {
        Self { limits, held: VecDeque::new(), performing: None, broken: false, stats: GateStats::default() }
    }

    fn push(&mut self, needed: Needed, output: Output, now: Instant) {
        if self.broken {
            self.stats.dropped += 1;
            return;
        }
        self.stats.held_bytes += output.len_bytes();
        // Consoles come byte by byte; what waits together is written together.
        if let (Output::Console(bytes), Some(Held { needed: last, output: Output::Console(waiting), .. })) =
            (&output, self.held.back_mut())
            && *last == needed
            && waiting.len() + bytes.len() <= MAX_CONSOLE_BYTES
        {
            waiting.extend(bytes);
            return;
        }
        self.held.push_back(Held { needed, output, since: now });
    }

    fn room(&self) -> Room {
        let full = self.held.len() >= self.limits.count || self.stats.held_bytes >= self.limits.bytes;
        if full { Room::Full } else { Room::Available }
    }

    /// Takes the next output that may leave.
    fn next(&mut self, now: Instant, permit: &Permit) -> Option<Output> {
        let first = self.held.front()?;
        match permit(first.needed) {
            Leave::Yes => {}
            Leave::NotYet => return None,
            Leave::NoLease => {
                self.stats.lease_refusals += 1;
                return None;
            }
            Leave::Never => {
                self.drop_all();
                return None;
            }
        }
        let held = self.take_first()?;
        let delay_us = now.saturating_duration_since(held.since).as_micros() as u64;
        self.stats.released += 1;
        self.stats.delay_sum_us += delay_us;
        self.stats.delay_max_us = self.stats.delay_max_us.max(delay_us);
        self.performing = Some(held.needed);
        Some(held.output)
    }

    fn take_first(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.stats.held_bytes -= held.output.len_bytes();
        Some(held)
    }

    /// Of the one that is being performed, which comes before those that wait.
    fn first_waiting(&self) -> Option<Needed> {
        self.performing.or_else(|| self.held.front().map(|held| held.needed))
    }

    fn drop_all(&mut self) {
        self.stats.dropped += self.held.len() as u64;
        self.held.clear();
        self.stats.held_bytes = 0;
    }

    fn stats(&self) -> GateStats {
        GateStats { held: self.held.len(), ..self.stats }
    }
}

/// Where the guest's outputs wait to be let out.
pub struct OutputGate<P> {
    queue: Mutex<Queue>,
    /// Signalled when outputs have left or performing has stopped.
    changed: Condvar,
    performer: P,
    permit: Permit,
}

impl<P: Performer> OutputGate<P> {
    /// A gate that performs with `performer` what `permit` says may leave.
    pub fn new(limits: Limits, performer: P, permit: Permit) -> Self {
        Self { queue: Mutex::new(Queue::new(limits)), changed: Condvar::new(), performer, permit }
    }

    /// Takes an effect that may leave once it has what it needs. It is taken even when full.
    /// Effects that are not seen outside are none of the gate's business and are ignored.
    pub fn push(&self, needed: Needed, effect: Effect) -> Room {
        let mut queue = self.lock();
        let Some(output) = Output::from_effect(effect) else { return queue.room() };
        queue.push(needed, output, Instant::now());
        self.perform(queue).room()
    }

    /// Lets out what may leave: after an acknowledgement, a won claim, a lease that was won back.
    pub fn retry(&self) {
        drop(self.perform(self.lock()));
    }

    /// Waits until there is room, at most for `timeout`.
    pub fn wait_for_room(&self, timeout: Duration) -> Room {
        let full = |queue: &mut Queue| queue.room() == Room::Full;
        let waited = self.changed.wait_timeout_while(self.lock(), timeout, full);
        waited.unwrap_or_else(PoisonError::into_inner).0.room()
    }

    /// Answers what `ask` makes of what the first output needs that has not left: what a follower is told. No output comes or
    /// leaves meanwhile, so that what is acknowledged since does not count for one that has just come.
    pub fn with_first_waiting<T>(&self, ask: impl FnOnce(Option<Needed>) -> T) -> T {
        let queue = self.lock();
        ask(queue.first_waiting())
    }

    /// The guest is another's, as the permit says by now: drops what waits. When this returns, nothing is being performed.
    pub fn close(&self) {
        let queue = self.perform(self.lock());
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
        while let Some(output) = queue.next(Instant::now(), &self.permit) {
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
            queue.drop_all();
            queue.broken = true;
            queue.performing = None;
            self.0.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
    use devices::DiskOp;

    use super::*;
    use crate::pair::protocol::{Answer, Ask, Epoch, Loss, Primary, Timing};

    const LIMITS: Limits = Limits { count: 100, bytes: 100_000 };
    const LEASE: Duration = Duration::from_secs(45);

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

    /// The machine that permits, at a time that the test sets. It has a backup, which has answered nothing since 0.
    struct Rule {
        primary: Mutex<Primary>,
        now: Mutex<Duration>,
    }

    impl Rule {
        fn paired() -> Arc<Self> {
            let timing = Timing::new(Duration::from_secs(60), Duration::from_secs(60));
            let rule = Self { primary: Mutex::new(Primary::new(1, timing)), now: Mutex::new(Duration::ZERO) };
            rule.join();
            Arc::new(rule)
        }

        fn primary<T>(&self, ask: impl FnOnce(&mut Primary) -> T) -> T {
            ask(&mut self.primary.lock().unwrap())
        }

        /// The next view is claimed, with a backup that gets the guest.
        fn join(&self) {
            self.primary(|primary| {
                let ask = primary.name(9, primary.view() + 1).unwrap();
                primary.claim_says(ask, Answer::Won);
                primary.attach(Duration::ZERO).unwrap();
            });
        }

        /// The backup is lost; the arbiter answers to the claim.
        fn lose(&self, answer: Answer) {
            self.primary(|primary| {
                assert!(primary.backup_lost(primary.epoch(), Loss::Link));
                primary.closed();
                primary.claim_says(Ask { view: primary.view() + 1, backup: None }, answer);
            });
        }

        fn permit(self: &Arc<Self>) -> Permit {
            let rule = Arc::clone(self);
            Box::new(move |needed| {
                let now = *rule.now.lock().unwrap();
                rule.primary(|primary| primary.may_leave(needed, None, now))
            })
        }

        fn acknowledge(&self, batch: u64) {
            self.primary(|primary| {
                primary.acknowledged(primary.epoch(), batch, batch, Duration::ZERO, drop);
            });
        }

        fn needs(&self, batch: u64) -> Needed {
            Needed { epoch: self.primary(|primary| primary.epoch()), batch: Some(batch) }
        }
    }

    /// A gate of a guest with a backup.
    struct Case<P> {
        gate: OutputGate<P>,
        rule: Arc<Rule>,
    }

    impl<P: Performer> Case<P> {
        fn new(limits: Limits, performer: P) -> Self {
            let rule = Rule::paired();
            Self { gate: OutputGate::new(limits, performer, rule.permit()), rule }
        }

        fn acknowledged(&self, batch: u64) {
            self.rule.acknowledge(batch);
            self.gate.retry();
        }

        fn push_for_room(&self, batch: u64, output: Output) -> Room {
            let needed = self.rule.needs(batch);
            match output {
                Output::Frame(data) => self.gate.push(needed, Effect::Frame(data)),
                Output::Disk(request) => self.gate.push(needed, Effect::Disk(request)),
                Output::Console(bytes) => bytes
                    .into_iter()
                    .fold(Room::Available, |_, byte| self.gate.push(needed, Effect::Console(byte))),
            }
        }

        fn push(&self, batch: u64, output: Output) {
            assert_eq!(self.push_for_room(batch, output), Room::Available);
        }
    }

    fn protected() -> (Case<Recorder>, Receiver<Output>) {
        with_limits(LIMITS)
    }

    fn with_limits(limits: Limits) -> (Case<Recorder>, Receiver<Output>) {
        let (sender, performed) = unbounded();
        (Case::new(limits, Recorder(sender)), performed)
    }

    fn frame(number: u8) -> Output {
        Output::Frame(vec![number; 60])
    }

    fn flush(id: u64) -> Output {
        Output::Disk(DiskRequest { id, op: DiskOp::Flush })
    }

    fn taken(performed: &Receiver<Output>) -> Vec<Output> {
        performed.try_iter().collect()
    }

    #[test]
    fn outputs_leave_in_order_once_acknowledged() {
        let (case, performed) = protected();
        case.push(1, frame(1));
        case.push(2, flush(1));
        case.push(2, Output::Console(b"a".to_vec()));
        case.push(3, frame(3));
        assert_eq!(taken(&performed), []);
        case.acknowledged(2);
        assert_eq!(taken(&performed), [frame(1), flush(1), Output::Console(b"a".to_vec())]);
        case.acknowledged(1);
        assert_eq!(taken(&performed), []);
        case.acknowledged(3);
        assert_eq!(taken(&performed), [frame(3)]);
        case.push(3, frame(4));
        assert_eq!(taken(&performed), [frame(4)], "acknowledged before it was pushed");
    }

    #[test]
    fn without_a_backup_everything_passes_and_with_the_next_one_nothing_more() {
        let (case, performed) = protected();
        case.push(5, frame(1));
        case.rule.lose(Answer::Won);
        case.gate.retry();
        case.push(6, frame(2));
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
        case.rule.join();
        case.push(1, frame(3));
        assert_eq!(taken(&performed), []);
        case.acknowledged(1);
        assert_eq!(taken(&performed), [frame(3)]);
        assert_eq!(case.gate.stats().lease_refusals, 0);
    }

    #[test]
    fn what_was_free_to_go_before_a_backup_came_does_not_wait_for_it() {
        let (case, performed) = protected();
        case.push(7, frame(1));
        let waits = Needed { batch: None, ..case.rule.needs(0) };
        assert_eq!(case.gate.push(waits, Effect::Frame(vec![2; 60])), Room::Available);
        case.rule.lose(Answer::Won);
        case.rule.join();
        case.push(1, frame(3));
        case.gate.retry();
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
    }

    #[test]
    fn the_first_that_waits_is_the_one_on_its_way_as_long_as_it_is() {
        let now = Instant::now();
        let yes: Permit = Box::new(|_| Leave::Yes);
        let mut queue = Queue::new(LIMITS);
        let needs = |batch| Needed { epoch: Epoch::default(), batch: Some(batch) };
        for (batch, output) in [(2, frame(1)), (2, frame(2)), (5, frame(3))] {
            queue.push(needs(batch), output, now);
        }
        assert_eq!(queue.first_waiting(), Some(needs(2)));
        assert_eq!(queue.next(now, &yes), Some(frame(1)));
        assert_eq!(queue.next(now, &yes), Some(frame(2)));
        assert_eq!(queue.first_waiting(), Some(needs(2)), "the second one is on its way");
        queue.performing = None;
        assert_eq!(queue.first_waiting(), Some(needs(5)));
        assert_eq!(queue.next(now, &yes), Some(frame(3)));
        queue.performing = None;
        assert_eq!(queue.first_waiting(), None);
    }

    #[test]
    fn no_output_comes_while_the_first_that_waits_is_judged() {
        let (case, _performed) = protected();
        case.gate.with_first_waiting(|waiting| {
            assert_eq!(waiting, None);
            assert!(case.gate.queue.try_lock().is_err());
        });
        case.push(1, frame(1));
        assert_eq!(case.gate.with_first_waiting(|waiting| waiting), Some(case.rule.needs(1)));
    }

    #[test]
    fn without_the_lease_acknowledged_outputs_stay() {
        let (case, performed) = protected();
        case.push(1, frame(1));
        case.push(1, frame(2));
        *case.rule.now.lock().unwrap() = LEASE;
        case.acknowledged(1);
        assert_eq!(taken(&performed), []);
        assert_eq!(case.gate.stats().lease_refusals, 1);
        *case.rule.now.lock().unwrap() = LEASE / 2;
        case.gate.retry();
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
    }

    #[test]
    fn the_permit_is_asked_for_each_output() {
        let answers = Mutex::new(vec![Leave::NoLease, Leave::Yes, Leave::Yes]);
        let (sender, performed) = unbounded();
        let permit = move |_| answers.lock().unwrap().pop().unwrap_or(Leave::NotYet);
        let gate = OutputGate::new(LIMITS, Recorder(sender), Box::new(permit));
        let needed = Needed { epoch: Epoch::default(), batch: Some(1) };
        for number in 1..=3 {
            let _ = gate.push(needed, Effect::Frame(vec![number; 60]));
        }
        gate.retry();
        assert_eq!(taken(&performed), [frame(1), frame(2)]);
    }

    #[test]
    fn a_guest_that_is_anothers_lets_nothing_out_for_ever() {
        let (case, performed) = protected();
        case.push(1, frame(1));
        case.rule.lose(Answer::Lost);
        case.gate.close();
        case.acknowledged(1);
        case.push(2, frame(2));
        case.gate.retry();
        assert_eq!(taken(&performed), []);
        assert_eq!(case.gate.stats(), GateStats { dropped: 2, ..GateStats::default() });
    }

    #[test]
    fn a_full_gate_makes_the_guest_wait_and_loses_nothing() {
        let few = Limits { count: 2, bytes: 100_000 };
        let small = Limits { count: 100, bytes: 120 };
        for limits in [few, small] {
            let (case, performed) = with_limits(limits);
            assert_eq!(case.push_for_room(1, frame(1)), Room::Available);
            assert_eq!(case.push_for_room(2, frame(2)), Room::Full);
            assert_eq!(case.push_for_room(3, frame(3)), Room::Full);
            assert_eq!(case.gate.wait_for_room(Duration::ZERO), Room::Full);
            case.acknowledged(2);
            assert_eq!(case.gate.wait_for_room(Duration::ZERO), Room::Available);
            case.acknowledged(3);
            assert_eq!(taken(&performed), [frame(1), frame(2), frame(3)]);
        }
    }

    #[test]
    fn a_guest_that_waits_is_woken_by_an_acknowledgement_and_by_closing() {
        for closing in [false, true] {
            let (case, _performed) = with_limits(Limits { count: 1, bytes: 100_000 });
            assert_eq!(case.push_for_room(1, frame(1)), Room::Full);
            thread::scope(|scope| {
                let guest = scope.spawn(|| case.gate.wait_for_room(Duration::from_secs(60)));
                if closing {
                    case.rule.lose(Answer::Lost);
                    case.gate.close();
                } else {
                    case.acknowledged(1);
                }
                assert_eq!(guest.join().unwrap(), Room::Available);
            });
        }
    }

    #[test]
    fn console_bytes_of_one_batch_are_written_together() {
        let (case, performed) = protected();
        case.push(1, Output::Console(b"hello".to_vec()));
        case.push(2, Output::Console(b"!".to_vec()));
        assert_eq!((case.gate.stats().held, case.gate.stats().held_bytes), (2, 6));
        case.acknowledged(1);
        assert_eq!(taken(&performed), [Output::Console(b"hello".to_vec())]);
        assert_eq!((case.gate.stats().held, case.gate.stats().held_bytes), (1, 1));
    }

    #[test]
    fn effects_that_are_not_seen_outside_are_ignored() {
        let (case, performed) = protected();
        case.acknowledged(1);
        for effect in [Effect::Reset, Effect::PowerOff, Effect::Entropy { len_bytes: 8 }] {
            assert_eq!(case.gate.push(case.rule.needs(1), effect), Room::Available);
        }
        assert_eq!(taken(&performed), []);
        assert_eq!(case.gate.stats(), GateStats::default());
    }

    #[test]
    fn delays_are_measured_from_push_to_release() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let needed = Needed { epoch: Epoch::default(), batch: Some(1) };
        let yes: Permit = Box::new(|_| Leave::Yes);
        let mut queue = Queue::new(LIMITS);
        queue.push(needed, frame(1), at(0));
        queue.push(needed, frame(2), at(100));
        assert_eq!(queue.next(at(150), &yes), Some(frame(1)));
        assert_eq!(queue.next(at(170), &yes), Some(frame(2)));
        assert_eq!(queue.next(at(200), &yes), None);
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
        let case = Case::new(Limits { count: 16, bytes: 100_000 }, checker);
        let (log, backup) = bounded(4);
        thread::scope(|scope| {
            let case = &case;
            scope.spawn(move || {
                for batch in 1..=COUNT {
                    log.send(batch).unwrap();
                    let effect = Effect::Frame(batch.to_le_bytes().to_vec());
                    if case.gate.push(case.rule.needs(batch), effect) == Room::Full {
                        assert_eq!(case.gate.wait_for_room(Duration::from_secs(60)), Room::Available);
                    }
                }
            });
            for batch in backup {
                acknowledged.store(batch, Ordering::SeqCst);
                case.acknowledged(batch);
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
    fn after_a_performer_that_panics_nothing_leaves() {
        let case = Case::new(LIMITS, Broken);
        case.push(1, frame(1));
        case.push(1, frame(2));
        let panicked = thread::scope(|scope| scope.spawn(|| case.acknowledged(1)).join());
        assert!(panicked.is_err());
        case.push(1, frame(3));
        case.gate.close();
        assert_eq!(case.gate.stats().dropped, 2);
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
        let case = Case::new(LIMITS, Slow { entered: entered_tx, leave: leave_rx });
        case.push(1, frame(1));
        case.push(1, frame(2));
        let (closed_tx, closed) = bounded(1);
        thread::scope(|scope| {
            scope.spawn(|| case.acknowledged(1));
            entered.recv().unwrap();
            case.push(1, frame(3));
            case.rule.lose(Answer::Lost);
            scope.spawn(|| {
                case.gate.close();
                closed_tx.send(()).unwrap();
            });
            assert!(closed.recv_timeout(Duration::from_millis(20)).is_err(), "the performer was at work");
            leave.send(()).unwrap();
            closed.recv().unwrap();
        });
        assert!(entered.try_recv().is_err(), "a second output left");
        assert_eq!(case.gate.stats().dropped, 2);
    }
}
