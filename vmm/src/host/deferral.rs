//! The deferral budget: how long something that is due may wait for the guest's next exit.
//!
//! Owns: the thread that takes the vCPU out of a guest that makes no exits. Must never: decide that the guest stops; the
//! vCPU's thread does, which asks [`Deferral::is_due`] once it was kicked.
//! States of the vCPU's thread: in the guest, where something may come due, or not.
//!
//! What is due: events in the inbox, counted from the arrival of the oldest, the next timer of the devices, and the clock,
//! which stands still in a guest that makes no exits, after [`CLOCK_STANDS_MAX`].
//! The budget is what was asked for, or longer where a stop would take long because the guest has written many pages: so
//! long that stops take a ninth of the guest's time at most, up to a second. A guest that computes makes its timers due all
//! the time; where no event has arrived for a while nobody waits for its answers, and stops take a 33rd at most.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::spawn;

const NEVER: u64 = u64::MAX;
/// Longest time that a guest's clock stands still. A guest that waits for a time, without an exit and with interrupts off,
/// would wait for ever.
const CLOCK_STANDS_MAX: Duration = Duration::from_millis(100);
/// Least time that something waits, as a multiple of the pause that its stop takes.
const STRETCH: u64 = 8;
/// The same for a timer where no event has arrived for [`QUIET`]. With events the guest's scheduler has to share the CPU
/// out between those who answer them and those who compute, and does so at its timers.
const QUIET_STRETCH: u64 = 32;
const QUIET: Duration = Duration::from_millis(250);
/// What a stop takes besides its pages, as a number of pages.
const STOP_PAGES: u64 = 32;
/// No budget is stretched beyond this.
const LONGEST_NS: u64 = 1_000_000_000;
/// What a page is taken to cost before that was measured.
const FIRST_PAGE_NS: u64 = 5_000;
/// One over the part that a new pause has in the average of them all.
const PAUSE_WEIGHT: u64 = 8;

/// What waits for the guest, and since when. Times are nanoseconds since `base`.
#[derive(Debug)]
pub struct Deferral {
    base: Instant,
    asked_ns: u64,
    budget_ns: AtomicU64,
    page_ns: AtomicU64,
    in_guest: AtomicBool,
    arrived_ns: AtomicU64,
    /// When an event arrived last; 0 before the first.
    last_ns: AtomicU64,
    timer_ns: AtomicU64,
    /// Before these nothing is due: at all, or an event, or a timer.
    hold_ns: AtomicU64,
    event_hold_ns: AtomicU64,
    timer_hold_ns: AtomicU64,
    alarm_ns: AtomicU64,
    watcher: std::sync::OnceLock<thread::Thread>,
    ended: AtomicBool,
}

impl Deferral {
    /// Nothing waits yet, and may wait for `budget` then.
    pub fn new(budget: Duration) -> Arc<Self> {
        let asked_ns = budget.as_nanos() as u64;
        Arc::new(Self {
            base: Instant::now(),
            asked_ns,
            budget_ns: AtomicU64::new(asked_ns),
            page_ns: AtomicU64::new(FIRST_PAGE_NS),
            in_guest: AtomicBool::new(false),
            arrived_ns: AtomicU64::new(NEVER),
            last_ns: AtomicU64::new(0),
            timer_ns: AtomicU64::new(NEVER),
            hold_ns: AtomicU64::new(0),
            event_hold_ns: AtomicU64::new(0),
            timer_hold_ns: AtomicU64::new(0),
            alarm_ns: AtomicU64::new(NEVER),
            watcher: std::sync::OnceLock::new(),
            ended: AtomicBool::new(false),
        })
    }

    /// Starts the thread. It calls `kick` when something has waited for too long.
    pub fn watch(self: &Arc<Self>, kick: impl Fn() + Send + 'static) -> io::Result<Watch> {
        let deferral = Arc::clone(self);
        let thread = spawn("deferral", move || deferral.run(&kick))?;
        // Only the first of several would be woken; there is one for each guest.
        let _ = self.watcher.set(thread.thread().clone());
        Ok(Watch { deferral: Arc::clone(self), thread: Some(thread) })
    }

    fn run(&self, kick: &impl Fn()) {
        while !self.ended.load(Ordering::SeqCst) {
            let due = self.due_ns();
            let now = self.ns(Instant::now());
            let alarm = if due > now {
                due
            } else {
                kick();
                // The vCPU's thread gets the time to come out; what then is due comes up again.
                now.saturating_add(self.asked_ns)
            };
            self.alarm_ns.store(alarm, Ordering::SeqCst);
            // Set between the question and the alarm? Whoever did that saw no alarm to be late.
            if due > now && self.due_ns() < alarm {
                continue;
            }
            match alarm {
                NEVER => thread::park(),
                alarm => thread::park_timeout(Duration::from_nanos(alarm.saturating_sub(now))),
            }
        }
    }

    fn ns(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.base).as_nanos() as u64
    }

    fn due_ns(&self) -> u64 {
        if !self.in_guest.load(Ordering::SeqCst) {
            return NEVER;
        }
        let due = |since: &AtomicU64, hold: &AtomicU64| match since.load(Ordering::SeqCst) {
            NEVER => NEVER,
            since => since.saturating_add(self.asked_ns).max(hold.load(Ordering::Relaxed)),
        };
        let event = due(&self.arrived_ns, &self.event_hold_ns);
        let timer = due(&self.timer_ns, &self.timer_hold_ns);
        event.min(timer).max(self.hold_ns.load(Ordering::Relaxed))
    }

    fn wake_if_late(&self) {
        if self.due_ns() < self.alarm_ns.load(Ordering::SeqCst)
            && let Some(watcher) = self.watcher.get()
        {
            watcher.unpark();
        }
    }

    /// Something is in the inbox.
    pub fn arrived(&self) {
        let now = self.ns(Instant::now());
        self.last_ns.store(now, Ordering::Relaxed);
        if self.arrived_ns.compare_exchange(NEVER, now, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.wake_if_late();
        }
    }

    /// The inbox is about to be emptied.
    pub fn emptying(&self) {
        self.arrived_ns.store(NEVER, Ordering::SeqCst);
    }

    /// The vCPU's thread goes into the guest; the devices' next timer is due at `timer`.
    pub fn entering(&self, timer: Option<Instant>) {
        self.enter(timer, Duration::ZERO);
    }

    /// As [`Self::entering`], but nothing could reach the guest if it were stopped. So only its clock counts.
    pub fn entering_closed(&self) {
        self.enter(None, CLOCK_STANDS_MAX);
    }

    fn enter(&self, timer: Option<Instant>, hold: Duration) {
        let now = Instant::now();
        let latest = now + CLOCK_STANDS_MAX;
        let timer = timer.map_or(latest, |timer| timer.min(latest));
        self.hold_ns.store(self.ns(now + hold), Ordering::Relaxed);
        self.event_hold_ns.store(0, Ordering::Relaxed);
        self.timer_hold_ns.store(0, Ordering::Relaxed);
        self.timer_ns.store(self.ns(timer), Ordering::SeqCst);
        self.in_guest.store(true, Ordering::SeqCst);
        self.wake_if_late();
    }

    /// The vCPU's thread is out of the guest.
    pub fn left(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// Has something waited for longer than was asked for?
    pub fn is_due(&self) -> bool {
        self.due_ns() <= self.ns(Instant::now())
    }

    /// Has it waited long enough for a stop with `pages` pages? If not, that is asked again later.
    pub fn is_worth(&self, pages: u64) -> bool {
        let pause_ns = self.page_ns.load(Ordering::Relaxed) * (pages + STOP_PAGES);
        let stretched = |by: u64| self.asked_ns.max((pause_ns * by).min(LONGEST_NS));
        let hold = |hold: &AtomicU64, since: &AtomicU64, budget_ns: u64| {
            let since = since.load(Ordering::SeqCst);
            hold.store(if since == NEVER { 0 } else { since.saturating_add(budget_ns) }, Ordering::Relaxed);
        };
        let quiet_from = self.last_ns.load(Ordering::Relaxed) + QUIET.as_nanos() as u64;
        let quiet = quiet_from <= self.ns(Instant::now());
        let timer_budget_ns = stretched(if quiet { QUIET_STRETCH } else { STRETCH });
        hold(&self.event_hold_ns, &self.arrived_ns, stretched(STRETCH));
        hold(&self.timer_hold_ns, &self.timer_ns, timer_budget_ns);
        self.budget_ns.store(timer_budget_ns, Ordering::Relaxed);
        self.is_due()
    }

    /// The guest cannot be stopped just now: it is asked again later.
    pub fn hold(&self) {
        self.hold_ns.store(self.ns(Instant::now()) + self.asked_ns, Ordering::Relaxed);
    }

    /// A forced stop with `pages` pages held the guest up for `pause`.
    pub fn paused(&self, pause: Duration, pages: u64) {
        let new = pause.as_nanos() as u64 / (pages + STOP_PAGES);
        let before = self.page_ns.load(Ordering::Relaxed);
        self.page_ns.store((before * (PAUSE_WEIGHT - 1) + new) / PAUSE_WEIGHT, Ordering::Relaxed);
    }

    /// The budget as it was last: the longest that anything waits.
    pub fn budget(&self) -> Duration {
        Duration::from_nanos(self.budget_ns.load(Ordering::Relaxed))
    }
}

/// The thread that watches. It ends on drop.
#[derive(Debug)]
pub struct Watch {
    deferral: Arc<Deferral>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.deferral.ended.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("The deferral thread panicked.");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;

    const BUDGET: Duration = Duration::from_millis(2);
    const LONG: Duration = Duration::from_secs(10);
    /// Longer than the budget, so that what should not come could have.
    const SOON: Duration = Duration::from_millis(50);

    fn watched(budget: Duration) -> (Arc<Deferral>, Watch, crossbeam_channel::Receiver<()>) {
        let deferral = Deferral::new(budget);
        let (kicked, kicks) = bounded(1);
        let watch = deferral
            .watch(move || {
                let _ = kicked.try_send(());
            })
            .unwrap();
        (deferral, watch, kicks)
    }

    #[test]
    fn an_event_that_arrives_while_the_guest_computes_gets_it_kicked() {
        let (deferral, _watch, kicks) = watched(BUDGET);
        deferral.entering(None);
        assert!(!deferral.is_due());
        deferral.arrived();
        kicks.recv_timeout(LONG).unwrap();
        assert!(deferral.is_due());
        deferral.emptying();
        assert!(!deferral.is_due());
    }

    #[test]
    fn a_timer_that_is_due_gets_the_guest_kicked() {
        let (deferral, _watch, kicks) = watched(BUDGET);
        deferral.entering(Some(Instant::now()));
        kicks.recv_timeout(LONG).unwrap();
        assert!(deferral.is_due());
    }

    #[test]
    fn a_clock_that_stands_still_gets_the_guest_kicked() {
        let (deferral, _watch, kicks) = watched(BUDGET);
        deferral.entering(None);
        kicks.recv_timeout(LONG).unwrap();
        assert!(deferral.is_due());
    }

    #[test]
    fn what_cannot_reach_the_guest_is_not_due_before_the_clock() {
        let (deferral, _watch, kicks) = watched(BUDGET);
        deferral.arrived();
        let entered = Instant::now();
        deferral.entering_closed();
        assert!(deferral.due_ns() >= deferral.ns(entered + CLOCK_STANDS_MAX));
        kicks.recv_timeout(LONG).unwrap();
    }

    #[test]
    fn nobody_is_kicked_outside_of_the_guest() {
        let (deferral, _watch, kicks) = watched(BUDGET);
        deferral.entering(Some(Instant::now() + LONG));
        deferral.left();
        deferral.arrived();
        assert!(kicks.recv_timeout(SOON).is_err());
        assert!(!deferral.is_due());
    }

    /// A page costs a microsecond, and no event has arrived since `since`.
    fn measured(since: Instant) -> Arc<Deferral> {
        let mut deferral = Deferral::new(BUDGET);
        Arc::get_mut(&mut deferral).unwrap().base = since;
        for _ in 0..1_000 {
            deferral.paused(Duration::from_millis(1), 1_000 - STOP_PAGES);
        }
        deferral
    }

    #[test]
    fn the_budget_is_never_shorter_than_asked_and_stretches_with_the_pages() {
        let deferral = measured(Instant::now());
        deferral.entering(Some(deferral.base));
        deferral.arrived();
        deferral.is_worth(10);
        assert_eq!(deferral.budget(), BUDGET);
        assert!(!deferral.is_worth(1 << 20));
        assert_eq!(deferral.budget(), Duration::from_secs(1));
        assert!(!deferral.is_worth(50_000 - STOP_PAGES));
        let budget = deferral.budget();
        assert!(
            budget >= Duration::from_micros(50_000 * STRETCH) && budget < Duration::from_millis(500),
            "{budget:?}"
        );
        assert!(!deferral.is_due(), "it is asked again later");
    }

    #[test]
    fn a_timer_waits_longer_where_no_event_has_arrived_for_a_while() {
        let timer = Instant::now();
        let deferral = measured(timer - QUIET);
        deferral.entering(Some(timer));
        assert!(!deferral.is_worth(20_000 - STOP_PAGES));
        let timer_due = deferral.due_ns();
        assert!(timer_due >= deferral.ns(timer) + 20_000_000 * QUIET_STRETCH);
        deferral.arrived();
        assert!(deferral.due_ns() < timer_due, "an event waits for its own time");
        assert!(!deferral.is_worth(20_000 - STOP_PAGES));
        let due = deferral.due_ns();
        assert!(due >= deferral.ns(timer) + 20_000_000 * STRETCH && due < timer_due);
        deferral.emptying();
        assert!(deferral.due_ns() < timer_due, "behind an event timers wait no longer than that did");
    }

    #[test]
    fn a_guest_that_cannot_stop_is_asked_again_later() {
        let deferral = Deferral::new(SOON);
        deferral.entering(Some(deferral.base));
        while !deferral.is_due() {
            thread::yield_now();
        }
        deferral.hold();
        assert!(!deferral.is_due());
    }
}
