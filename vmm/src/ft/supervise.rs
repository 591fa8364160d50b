//! Watches over a running guest's backup, and over the right to run the guest.
//!
//! Owns: the decision that the backup is lost, and the claim that follows. Must never: let output go between
//! the two; the gate stays shut until the claim is won.
//!
//! ```text
//!   Alone ── Paired ──> watching ── Down or silence ──> orphaned ── claim won ──> Alone (view + 1)
//!                                                           │ unknown: ask again
//!                                                           └── claim lost ──> gate closed for good, stop
//! ```
//!
//! A backup that is too far behind still answers, and claims nothing while it hears of this side. So there the claim comes
//! first and the end of the connection behind it; else a backup that cannot keep up would be the first to claim.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use ft_log::{Role, SealKey};

use super::claim::{Claims, Outcome, Owner};
use super::heartbeat::Heartbeats;
use super::link::{Link, Phase};
use super::output_gate::OutputGate;
use super::search::Search;
use crate::change;
use crate::control::{Monitor, Standing, protocol as control};
use crate::host::deferral::Deferral;
use crate::outlet::Outlet;
use crate::with_causes;

/// How long the connection stays open for the output that is under way when the backup is given up.
pub(super) const QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between two reports of numbers, at debug level.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Silence that is borne from a backup that is loading its snapshot: its host is at its busiest then, and it
/// cannot take over before it follows.
const LOADING_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before an unanswered claim is made again.
const CLAIM_AGAIN: Duration = Duration::from_millis(50);
/// How long a claim may hang before it is said.
const CLAIM_SAID_AFTER: Duration = Duration::from_secs(2);
/// How long the guest's thread may take to stop after a lost claim before the process ends regardless.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What the link's threads report.
pub enum LinkEvent {
    /// A backup has been given the snapshot.
    Paired {
        /// The connection, to be closed when the backup counts as lost.
        stream: TcpStream,
        /// Where the backup is.
        address: SocketAddr,
        /// Seals the heartbeats that go with the connection.
        heartbeat_key: SealKey,
    },
    /// The backup has loaded the snapshot: the guest would survive now.
    Protected,
    /// The link is broken, and why.
    Down(String),
    /// The operator lets the backup go.
    Dismiss,
    /// The log was ended for the backup to take over. Wants to know whether it did.
    HandedOver(Sender<bool>),
}

/// A backup that counts as lost.
struct Loss {
    /// How that was noticed.
    why: String,
    /// It answers all the same: it does not claim before it hears no more of this side.
    answers: bool,
}

/// The supervisor of a guest that runs here.
pub struct Supervisor {
    /// The link to the backup.
    pub link: Arc<Link>,
    /// Where output waits.
    pub gate: Arc<OutputGate<Outlet>>,
    /// Where the right to run the guest is claimed.
    pub claims: Claims,
    /// Who claims.
    pub owner: Owner,
    /// The present view.
    pub view: Arc<AtomicU64>,
    /// Silence after which the backup is lost.
    pub timeout: Duration,
    /// How far the backup's execution may be behind before it is lost.
    pub lag_limit: Duration,
    /// Heartbeats to and from the backup.
    pub heartbeats: Arc<Heartbeats>,
    /// How long events may wait.
    pub deferral: Arc<Deferral>,
    /// Who could be the next backup.
    pub search: Arc<Search>,
    /// Set when the claim was lost.
    pub lost: Arc<AtomicBool>,
    /// Stops the guest.
    pub stop_guest: Box<dyn Fn() + Send>,
    /// What an operator sees.
    pub monitor: Arc<Monitor>,
}

impl Supervisor {
    /// Runs until the claim is lost or every sender of `events` is gone.
    pub fn run(self, events: &Receiver<LinkEvent>) {
        let mut connection: Option<(TcpStream, SocketAddr)> = None;
        let mut report_at = Instant::now();
        let mut limit = self.timeout;
        let tick = self.timeout / 10;
        loop {
            let loss = match events.recv_timeout(tick) {
                Ok(LinkEvent::Paired { stream, address, heartbeat_key }) => {
                    self.heartbeats.set_peer(Some((address, heartbeat_key)));
                    connection = Some((stream, address));
                    limit = self.timeout.max(LOADING_TIMEOUT);
                    continue;
                }
                Ok(LinkEvent::Protected) => {
                    let backup =
                        self.monitor.peer().map_or_else(|| "the backup".into(), |peer| peer.to_string());
                    let standing = self.standing(true, format!("{backup} has loaded the guest"));
                    change!(info, self.monitor, standing, "protected: the backup follows");
                    limit = self.timeout;
                    continue;
                }
                Ok(LinkEvent::Down(why)) => Loss { why, answers: false },
                Ok(LinkEvent::Dismiss) => {
                    if !self.dismiss_backup() {
                        return;
                    }
                    continue;
                }
                Ok(LinkEvent::HandedOver(outcome)) => {
                    self.hand_over(&outcome);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => match self.look(limit) {
                    Some(loss) => loss,
                    None => {
                        // What was acknowledged while the lease had run out may go now.
                        self.gate.retry();
                        self.link.released(self.gate.released_seq());
                        if self.link.phase() == Phase::Paired && report_at.elapsed() >= REPORT_EVERY {
                            self.report();
                            report_at = Instant::now();
                        }
                        continue;
                    }
                },
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if !self.link.detach() {
                continue;
            }
            let standing = self.standing(false, loss.why.clone());
            change!(warn, self.monitor, standing, "backup lost: output waits for the claim of the next view");
            self.report();
            if !self.go_on_without(loss, connection.take()) {
                return;
            }
        }
    }

    /// Is the backup lost, as far as can be seen from here? It may be silent for `limit`.
    fn look(&self, limit: Duration) -> Option<Loss> {
        if self.link.phase() != Phase::Paired {
            return None;
        }
        let silent = self.link.silent_for().min(self.heartbeats.unanswered_for());
        if silent > limit {
            let why = format!("the backup has been silent for {} ms", silent.as_millis());
            return Some(Loss { why, answers: false });
        }
        let lag_ms = self.link.overdue(self.lag_limit)?.as_millis();
        let limit_ms = self.lag_limit.as_millis();
        let why =
            format!("it answers, but its guest is {lag_ms} ms behind, and --lag-limit-ms is {limit_ms}");
        Some(Loss { why, answers: true })
    }

    /// Claims the next view and ends the connection, in the order that is safe. False: another monitor owns the guest.
    fn go_on_without(&self, loss: Loss, connection: Option<(TcpStream, SocketAddr)>) -> bool {
        let close = |(stream, _): (TcpStream, SocketAddr)| drop(stream.shutdown(Shutdown::Both));
        if let Some((_, address)) = &connection {
            self.search.failed(address.ip(), &loss.why);
        }
        if loss.answers {
            let won = self.claim_next_view(loss.why);
            self.heartbeats.set_peer(None);
            connection.into_iter().for_each(close);
            return won;
        }
        self.heartbeats.set_peer(None);
        // A backup that sees the connection close may claim at once, so nothing may be under way then.
        // If something is stuck, the backup has to find out by the silence.
        let quiet = self.gate.quiesce(QUIESCE_TIMEOUT) && self.gate.performer().quiesce(QUIESCE_TIMEOUT);
        connection.into_iter().filter(|_| quiet).for_each(close);
        self.claim_next_view(loss.why)
    }

    pub(super) fn standing(&self, protected: bool, cause: String) -> Standing {
        Standing { role: control::Role::Primary, view: self.view.load(Ordering::SeqCst), protected, cause }
    }

    fn report(&self) {
        let link = self.link.figures();
        let gate = self.gate.stats();
        tracing::debug!(
            log_bytes = link.log_bytes,
            batches = link.batches,
            lag_p50_us = link.lag_p50_us,
            lag_p99_us = link.lag_p99_us,
            paced_ms = link.paced.as_millis() as u64,
            checkpoints = link.checkpoints,
            checkpoint_pages = link.checkpoint_pages,
            pause_p50_us = link.pause_p50_us,
            pause_p99_us = link.pause_p99_us,
            defer_ms = self.deferral.budget().as_millis() as u64,
            silence_max_ms = self.heartbeats.silence_max().as_millis() as u64,
            outputs = gate.released,
            delay_mean_us = gate.delay_sum_us.checked_div(gate.released).unwrap_or(0),
            delay_max_us = gate.delay_max_us,
            lease_refusals = gate.lease_refusals,
            "pair so far"
        );
    }

    /// The claim of view `next` is won.
    pub(super) fn go_on_alone(&self, next: u64, why: String) {
        self.view.store(next, Ordering::SeqCst);
        self.heartbeats.set_view(next, Role::Primary);
        // A backup that is let go learns it now.
        self.link.close();
        self.link.alone();
        self.gate.unprotect();
        let standing = self.standing(false, why);
        change!(warn, self.monitor, standing, "unprotected: the guest goes on without a backup");
        self.monitor.set_peer(None);
    }

    /// Claims, because of `why`, until there is an answer. False: another monitor owns the guest.
    pub(super) fn claim_next_view(&self, why: String) -> bool {
        let next = self.view.load(Ordering::SeqCst) + 1;
        match claim_until_known(&self.claims, next, &self.owner) {
            None => {
                self.go_on_alone(next, why);
                true
            }
            Some(holder) => {
                // The lease and the disk's guard look at this.
                self.lost.store(true, Ordering::SeqCst);
                let cause = format!("{} (process {}) has claimed the view", holder.host, holder.pid);
                let standing = Standing { role: control::Role::None, view: next, protected: false, cause };
                change!(error, self.monitor, standing, "the backup has taken over; this monitor stops");
                (self.stop_guest)();
                std::thread::sleep(STOP_TIMEOUT);
                // The guest's thread is stuck in a system call; nothing here may act any more.
                crate::commands::leave_after_lost_claim()
            }
        }
    }
}

/// Claims `view` until the answer is known. `None`: won. While the arbiter does not answer, nobody goes on: neither
/// side can know that the other has not.
pub fn claim_until_known(claims: &Claims, view: u64, owner: &Owner) -> Option<Owner> {
    let mut said = false;
    let mut say = |why: &str| {
        if !std::mem::replace(&mut said, true) {
            tracing::warn!(view, "the claim is undecided, asking again until there is an answer: {why}");
        }
    };
    loop {
        let why = match claim_on_a_thread(claims, view, owner, &mut say) {
            Ok(Outcome::Won) => return None,
            Ok(Outcome::Lost { holder }) => return Some(holder),
            Ok(Outcome::Unknown { why }) => why,
            Err(why) => why,
        };
        say(&why);
        std::thread::sleep(CLAIM_AGAIN);
    }
}

/// One attempt. It may hang in the kernel, as on a file server that does not answer; that is said meanwhile.
fn claim_on_a_thread(
    claims: &Claims,
    view: u64,
    owner: &Owner,
    say: &mut impl FnMut(&str),
) -> Result<Outcome, String> {
    let (answer, answered) = bounded(1);
    let (asked, owner) = (claims.clone(), owner.clone());
    std::thread::Builder::new()
        .name("claim".into())
        .spawn(move || {
            // This function waits for exactly this.
            let _ = answer.send(asked.claim(view, &owner).map_err(|error| with_causes(&error)));
        })
        .map_err(|error| format!("no thread for it: {error}"))?;
    loop {
        match answered.recv_timeout(CLAIM_SAID_AFTER) {
            Ok(outcome) => return outcome,
            Err(RecvTimeoutError::Timeout) => {
                say(&format!("{} has not answered for {} s", claims.arbiter(), CLAIM_SAID_AFTER.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("its thread has ended".into()),
        }
    }
}
