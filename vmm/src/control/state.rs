//! What an operator may know of this monitor: role, view, protection, and where the figures come from.
//!
//! Owns: the present [`Standing`], and that each change of it is one line in the log ([`change`](crate::change)). Must never: decide
//! anything, or make a thread wait for longer than a copy takes.
//!
//! ```text
//!   none ── primary, unprotected <──> primary, protected ──> none
//!     └─── backup, unprotected ──> backup, protected ──> primary, unprotected | none
//! ```

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::protocol::{Answer, Command, Figures, Peer, Reason, Refusal, Role, Status, Transfer};

/// Shortest time over which a rate is taken.
const RATE_TIME: Duration = Duration::from_secs(2);

/// Who this monitor is.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    /// The guest's name.
    pub name: String,
    /// The host's name.
    pub host: String,
    /// The monitor's version.
    pub version: String,
}

/// Role and protection, and why they are so.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// What this monitor is.
    pub role: Role,
    /// In which view.
    pub view: u64,
    /// Would the guest survive the loss of its host?
    pub protected: bool,
    /// Why.
    pub cause: String,
}

/// Gives figures when asked. Called by the control thread.
pub type FiguresOf = Box<dyn Fn() -> Figures + Send>;
/// The same for a transfer.
pub type TransferOf = Box<dyn Fn() -> Transfer + Send>;

/// Has an order carried out, without waiting for that. Called by the control thread.
pub type OrderHandler = Box<dyn Fn(Command, &Monitor) -> Answer + Send>;

struct Known {
    standing: Standing,
    since: (SystemTime, Instant),
    peer: Option<Peer>,
    figures: Option<FiguresOf>,
    transfer: Option<TransferOf>,
    rate: Rate,
}

/// Bytes a second between two looks.
struct Rate {
    at: Instant,
    bytes: u64,
    per_s: u64,
}

impl Rate {
    fn look(&mut self, bytes: u64, now: Instant) -> u64 {
        let time = now.saturating_duration_since(self.at);
        // Counting starts anew with each backup.
        let begun_anew = bytes < self.bytes;
        if time >= RATE_TIME || begun_anew {
            let more = if begun_anew { 0 } else { bytes - self.bytes };
            self.per_s = (more as f64 / time.as_secs_f64().max(f64::EPSILON)) as u64;
            (self.at, self.bytes) = (now, bytes);
        }
        self.per_s
    }
}

/// Shared by all threads that change or show how things stand.
pub struct Monitor {
    identity: Identity,
    started: Instant,
    known: Mutex<Known>,
    orders: Mutex<Option<OrderHandler>>,
}

impl Monitor {
    /// A monitor that is nothing yet.
    pub fn new(identity: Identity) -> Arc<Self> {
        let now = Instant::now();
        let known = Known {
            standing: Standing { cause: "the monitor was started".into(), ..Standing::default() },
            since: (SystemTime::now(), now),
            peer: None,
            figures: None,
            transfer: None,
            rate: Rate { at: now, bytes: 0, per_s: 0 },
        };
        Arc::new(Self { identity, started: now, known: Mutex::new(known), orders: Mutex::default() })
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of a change; say it with [`change`].
    pub fn set_standing(&self, standing: Standing) {
        let mut known = self.lock();
        known.standing = standing;
        known.since = (SystemTime::now(), Instant::now());
    }

    /// The view has changed, and role and protection have not.
    pub fn note_view(&self, view: u64) {
        self.lock().standing.view = view;
    }

    /// Who the other monitor is.
    pub fn set_peer(&self, peer: Option<Peer>) {
        self.lock().peer = peer;
    }

    /// The other monitor.
    pub fn peer(&self) -> Option<Peer> {
        self.lock().peer.clone()
    }

    /// Where figures come from.
    pub fn set_figures(&self, figures: FiguresOf) {
        self.lock().figures = Some(figures);
    }

    /// Where a transfer's progress comes from.
    pub fn set_transfer(&self, transfer: Option<TransferOf>) {
        self.lock().transfer = transfer;
    }

    /// Who carries orders out: whoever runs the guest here.
    pub fn set_order_handler(&self, handler: OrderHandler) {
        *self.orders.lock().unwrap_or_else(PoisonError::into_inner) = Some(handler);
    }

    /// Answers an operator.
    pub fn answer(&self, command: Command) -> Answer {
        if command == Command::Status {
            return Answer::Status(Box::new(self.status()));
        }
        match &*self.orders.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(handler) => handler(command, self),
            None => Answer::Refused(self.not_primary()),
        }
    }

    fn not_primary(&self) -> Refusal {
        let known = self.lock();
        let primary = known.peer.clone().filter(|_| known.standing.role == Role::Backup);
        let text = match &primary {
            Some(primary) => format!("this monitor is a backup; the primary is {primary}"),
            None => format!("this monitor runs no guest; its role is {}", known.standing.role.name()),
        };
        Refusal { reason: Reason::NotPrimary, text, primary }
    }

    /// How things stand.
    pub fn status(&self) -> Status {
        let mut known = self.lock();
        let mut figures = known.figures.as_ref().map(|figures| figures());
        if let Some(figures) = &mut figures {
            figures.log.bytes_per_s = known.rate.look(figures.log.bytes, Instant::now());
        }
        let (at, instant) = known.since;
        let Standing { role, view, protected, cause } = known.standing.clone();
        Status {
            name: self.identity.name.clone(),
            host: self.identity.host.clone(),
            pid: std::process::id(),
            version: self.identity.version.clone(),
            uptime_s: self.started.elapsed().as_secs(),
            role,
            view,
            protected,
            since_unix_s: at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
            since_s: instant.elapsed().as_secs(),
            cause,
            peer: known.peer.clone(),
            transfer: known.transfer.as_ref().map(|transfer| transfer()),
            figures,
        }
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Monitor").field("identity", &self.identity).finish_non_exhaustive()
    }
}

/// A change of role, view or protection: one line in the log under a [`LogEvent`](crate::host::LogEvent), and the new standing. Further fields and
/// the line's text follow the standing, as in the macros of `tracing`.
#[macro_export]
macro_rules! change {
    ($level:ident, $monitor:expr, $event:ident, $standing:expr, $($rest:tt)*) => {{
        let standing: $crate::control::Standing = $standing;
        // First: who reads the line may ask at once.
        $monitor.set_standing(standing.clone());
        tracing::$level!(
            event = %$crate::host::LogEvent::$event,
            view = standing.view,
            role = standing.role.name(),
            protected = standing.protected,
            cause = %standing.cause,
            $($rest)*
        );
    }};
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;
    use crate::control::protocol::LogFigures;

    #[test]
    fn the_last_change_is_shown_with_its_cause() {
        let monitor = Monitor::new(Identity { name: "web".into(), ..Identity::default() });
        assert_eq!((monitor.status().role, monitor.status().view), (Role::None, 0));
        let standing = Standing { role: Role::Primary, view: 2, protected: true, cause: "a test".into() };
        change!(info, monitor, Protected, standing, "a line");
        let status = monitor.status();
        assert_eq!((status.role, status.view, status.protected), (Role::Primary, 2, true));
        assert_eq!((status.cause.as_str(), status.since_s, status.pid), ("a test", 0, std::process::id()));
    }

    #[test]
    fn orders_are_refused_with_the_primarys_name_until_there_is_a_guest() {
        let monitor = Monitor::new(Identity::default());
        let refusal = |monitor: &Monitor| match monitor.answer(Command::Switch) {
            Answer::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        };
        assert_eq!((refusal(&monitor).reason, refusal(&monitor).primary), (Reason::NotPrimary, None));
        let peer = Peer { host: Some("alpha".into()), address: "192.0.2.1:7700".into(), listen: None };
        monitor.set_peer(Some(peer.clone()));
        monitor.set_standing(Standing { role: Role::Backup, ..Standing::default() });
        assert_eq!(refusal(&monitor).primary, Some(peer));
        assert_eq!(refusal(&monitor).text, "this monitor is a backup; the primary is alpha (192.0.2.1:7700)");
        monitor.set_order_handler(Box::new(|command, _| Answer::Done(format!("{command:?}"))));
        assert_eq!(monitor.answer(Command::Switch), Answer::Done("Switch".into()));
        assert!(matches!(monitor.answer(Command::Status), Answer::Status(_)));
    }

    #[test]
    fn figures_are_asked_for_each_time() {
        let monitor = Monitor::new(Identity::default());
        assert_eq!(monitor.status().figures, None);
        let bytes = Arc::new(AtomicU64::new(7));
        let source = Arc::clone(&bytes);
        monitor.set_figures(Box::new(move || Figures {
            log: LogFigures { bytes: source.load(Ordering::Relaxed), ..LogFigures::default() },
            ..Figures::default()
        }));
        let shown = |monitor: &Monitor| monitor.status().figures.unwrap().log.bytes;
        assert_eq!(shown(&monitor), 7);
        bytes.store(8, Ordering::Relaxed);
        assert_eq!(shown(&monitor), 8);
    }

    #[test]
    fn rates_are_taken_over_some_time_and_begin_anew_with_the_count() {
        let start = Instant::now();
        let mut rate = Rate { at: start, bytes: 0, per_s: 0 };
        assert_eq!(rate.look(4_000, start + RATE_TIME / 2), 0);
        assert_eq!(rate.look(4_000, start + RATE_TIME), 2_000);
        assert_eq!(rate.look(9_000, start + RATE_TIME + Duration::from_millis(1)), 2_000);
        assert_eq!(rate.look(100, start + RATE_TIME * 2), 0, "another backup");
        assert_eq!(rate.look(2_100, start + RATE_TIME * 3), 1_000);
    }
}
