//! Watches over a running guest's backup, and over the right to run the guest.
//!
//! Owns: the looks at the backup, and what is done when it is lost: what that is, and in which order, the primary's state
//! machine says (`protocol/primary.rs`). Must never: let output go between loss and claim; the gate stays shut until the
//! claim is won.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use ft_log::{Role, SealKey};

use crate::change;
use crate::control::{Monitor, Standing, protocol as control};
use crate::host::LogEvent;
use crate::host::backends::Outlet;
use crate::host::deferral::Deferral;
use crate::pair::Leave;
use crate::pair::claims::claim::{Claims, Owner};
use crate::pair::claims::claimant::Claimant;
use crate::pair::liveness::heartbeat::{Heartbeats, boot_time};
use crate::pair::primary::connection::tell_released;
use crate::pair::primary::gate::OutputGate;
use crate::pair::primary::invite::Search;
use crate::pair::primary::outbox::Outbox;
use crate::pair::primary::state::PrimaryState;
use crate::pair::protocol::{Answer, Ask, Duty, Epoch, Loss, Phase, Timing};
use crate::run::{StopKind, VcpuHandle};

/// How long the connection stays open for the output that is under way when the backup is given up.
pub(super) const QUIESCE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between two reports of numbers, at debug level.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// How long the guest's thread may take to stop after a lost claim before the process ends regardless.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// What the link's threads report.
pub enum LinkEvent {
    /// A backup has been given the snapshot: an epoch begins. What comes of an earlier one counts for nothing.
    Paired {
        /// The log's way to it.
        outbox: Arc<Outbox>,
        /// The connection, to be closed when the backup counts as lost.
        stream: TcpStream,
        /// Where the backup is.
        address: SocketAddr,
        /// Seals the heartbeats that go with the connection.
        heartbeat_key: SealKey,
        /// When the guest stopped for the rest of it: its output waits since then.
        stopped: Instant,
    },
    /// The backup has loaded the snapshot: the guest would survive now.
    Protected {
        /// Whose.
        epoch: Epoch,
    },
    /// The link is broken.
    Down {
        /// Which.
        epoch: Epoch,
        /// Why.
        why: String,
    },
    /// A backup that was joining does not come.
    JoinFailed {
        /// Why.
        why: String,
    },
    /// The operator lets the backup go.
    Dismiss,
    /// The log was ended for the backup to take over. Wants to know whether it did.
    HandedOver(Sender<bool>),
}

/// The connection to a backup that was given the guest.
pub(super) struct Given {
    outbox: Arc<Outbox>,
    stream: TcpStream,
    address: SocketAddr,
    /// When the guest stopped for the rest of it.
    stopped: Instant,
}

/// The supervisor of a guest that runs here.
pub struct Supervisor {
    /// The protocol's machine, and the way to the backup.
    pub state: Arc<PrimaryState>,
    /// Where output waits.
    pub gate: Arc<OutputGate<Outlet>>,
    /// Where the right to run the guest is claimed.
    pub claims: Claims,
    /// Who claims.
    pub owner: Owner,
    /// The pair's times.
    pub timing: Timing,
    /// Heartbeats to and from the backup.
    pub heartbeats: Arc<Heartbeats>,
    /// How long events may wait.
    pub deferral: Arc<Deferral>,
    /// Who could be the next backup.
    pub search: Arc<Search>,
    /// The guest's thread.
    pub vcpu: VcpuHandle,
    /// Ends the process, or starts it over.
    pub leave: Leave,
    /// What an operator sees.
    pub monitor: Arc<Monitor>,
}

impl Supervisor {
    /// Runs until the claim is lost or every sender of `events` is gone.
    pub fn run(self, events: &Receiver<LinkEvent>) {
        let mut given: Option<Given> = None;
        let mut report_at = Instant::now();
        let look_every = self.timing.timeout / 10;
        loop {
            match events.recv_timeout(look_every) {
                Ok(LinkEvent::Paired { outbox, stream, address, heartbeat_key, stopped }) => {
                    self.heartbeats.set_view(self.state.view(), Role::Primary);
                    self.heartbeats.set_peer(Some((address, heartbeat_key)));
                    given = Some(Given { outbox, stream, address, stopped });
                }
                Ok(LinkEvent::Protected { epoch }) => self.protected(epoch, given.as_ref()),
                Ok(LinkEvent::Down { epoch, why }) => self.lost(epoch, Loss::Link, why, &mut given),
                Ok(LinkEvent::JoinFailed { why }) => {
                    if self.state.protocol(|primary| primary.duty()) != Duty::Nothing {
                        // A backup that has not got the guest does not come; output need not wait for what follows.
                        self.go_on_without(None, why);
                    }
                }
                Ok(LinkEvent::Dismiss) => self.dismiss_backup(),
                Ok(LinkEvent::HandedOver(outcome)) => self.hand_over(&outcome),
                Err(RecvTimeoutError::Timeout) => {
                    self.look(&mut given);
                    if self.state.phase() == Phase::Paired && report_at.elapsed() >= REPORT_EVERY {
                        self.report();
                        report_at = Instant::now();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn protected(&self, epoch: Epoch, given: Option<&Given>) {
        let Some(given) = given.filter(|given| given.outbox.epoch() == epoch) else { return };
        let backup = self.monitor.peer().map_or_else(|| "the backup".into(), |peer| peer.to_string());
        let standing = self.standing(true, format!("{backup} has loaded the guest"));
        let loaded_after_ms = given.stopped.elapsed().as_millis() as u64;
        change!(info, self.monitor, Protected, standing, loaded_after_ms, "protected: the backup follows");
    }

    /// Is the backup silent, or too far behind?
    fn look(&self, given: &mut Option<Given>) {
        let (heard, cut_off) = (self.heartbeats.answered_sent_at(), self.heartbeats.is_cut_off());
        let (epoch, loss) =
            self.state.protocol(|primary| (primary.epoch(), primary.look(heard, cut_off, boot_time())));
        if let Some(loss) = loss {
            return self.lost(epoch, loss, self.in_words(loss), given);
        }
        // What was acknowledged while the lease had run out may go now.
        self.gate.retry();
        if let Some(outbox) = self.state.outbox() {
            tell_released(&outbox, &self.state, &self.gate);
        }
    }

    /// The backup of `epoch` is lost, unless that is known or another one follows by now.
    fn lost(&self, epoch: Epoch, loss: Loss, why: String, given: &mut Option<Given>) {
        if !self.state.protocol(|primary| primary.backup_lost(epoch, loss)) {
            return;
        }
        let given = given.take();
        if let Some(Given { outbox, address, .. }) = &given {
            outbox.abandon();
            self.search.failed(address.ip(), &why);
        }
        let standing = self.standing(false, why.clone());
        change!(
            warn,
            self.monitor,
            BackupLost,
            standing,
            "backup lost: output waits for the claim of the next view"
        );
        self.report();
        self.go_on_without(given, why);
    }

    pub(super) fn in_words(&self, loss: Loss) -> String {
        match loss {
            Loss::Silent(silent) => format!("the backup has been silent for {} ms", silent.as_millis()),
            Loss::Behind(lag) => format!(
                "it answers, but its guest is {} ms behind, and --lag-limit-ms is {}",
                lag.as_millis(),
                self.timing.lag_limit.as_millis()
            ),
            Loss::Link => "the link is broken".to_owned(),
            Loss::Dismissed => "the operator lets the backup go".to_owned(),
        }
    }

    /// Does what follows from the loss of the backup, because of `why`. Returns when the guest goes on alone.
    pub(super) fn go_on_without(&self, mut connection: Option<Given>, why: String) {
        let mut claimant = Claimant::new(self.claims.clone(), self.owner.clone());
        loop {
            match self.state.protocol(|primary| primary.duty()) {
                Duty::Nothing => {
                    // The claim has decided. What a lost backup still says must not be taken for the next one's.
                    close(connection);
                    return self.go_on_alone(why);
                }
                Duty::Close { claimed } => {
                    self.heartbeats.set_peer(None);
                    let quiet = claimed
                        || self.gate.quiesce(QUIESCE_TIMEOUT)
                            && self.gate.performer().quiesce(QUIESCE_TIMEOUT);
                    if quiet {
                        close(connection.take());
                    }
                    // A backup that is let go learns it now.
                    if let Some(outbox) = self.state.outbox() {
                        outbox.close();
                    }
                    self.state.protocol(|primary| primary.closed());
                }
                Duty::Claim { .. } => self.claim(&mut claimant),
                Duty::Stop => return self.stop(&claimant),
            }
        }
    }

    /// Claims until there is an answer. While there is none nobody goes on: neither side can know that the other has not.
    pub(super) fn claim(&self, claimant: &mut Claimant) {
        while let Duty::Claim { view } = self.state.protocol(|primary| primary.duty()) {
            let answer = claimant.ask(view, None);
            if matches!(answer, Answer::Won | Answer::Otherwise) {
                self.heartbeats.set_view(view, Role::Primary);
            }
            self.state.protocol(|primary| primary.claim_says(Ask { view, backup: None }, answer));
        }
    }

    /// Another monitor has the guest.
    fn stop(&self, claimant: &Claimant) {
        // Without a backup output would go on until the guest has stopped.
        self.gate.close();
        let cause = claimant.why_lost();
        let view = self.state.view() + 1;
        let standing = Standing { role: control::Role::None, view, protected: false, cause };
        change!(error, self.monitor, Superseded, standing, "the backup has taken over; this monitor stops");
        self.vcpu.stop(StopKind::Leave);
        std::thread::sleep(STOP_TIMEOUT);
        // The guest's thread is stuck in a system call; nothing here may act any more.
        (self.leave)();
    }

    /// The machine says that the guest is this monitor's, without a backup.
    pub(super) fn go_on_alone(&self, why: String) {
        self.gate.retry();
        change!(
            warn,
            self.monitor,
            Unprotected,
            self.standing(false, why),
            "unprotected: the guest continues without a backup"
        );
        self.monitor.set_peer(None);
    }

    pub(super) fn standing(&self, protected: bool, cause: String) -> Standing {
        Standing { role: control::Role::Primary, view: self.state.view(), protected, cause }
    }

    fn report(&self) {
        let link = self.state.outbox().map(|outbox| outbox.figures()).unwrap_or_default();
        let gate = self.gate.stats();
        tracing::debug!(
            event = %LogEvent::Figures,
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
}

fn close(connection: Option<Given>) {
    if let Some(Given { stream, .. }) = connection {
        // It may be gone already.
        let _ = stream.shutdown(Shutdown::Both);
    }
}
