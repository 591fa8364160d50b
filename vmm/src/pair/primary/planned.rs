//! Planned changes of a pair: the backup is let go, or the guest handed over to it.
//!
//! Owns: their order of steps. Must never: let output go between the end of the log and the claim that follows.
//!
//! ```text
//!   dismissed:   log ended ── next view claimed here ──> told by Bye; the guest goes on alone
//!   handed over: log ended, closed ──┬─ the backup claims the next view ──> this monitor has no guest any more
//!                                    └─ it does not ── claimed here ──> the guest goes on alone
//! ```

use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use ft_log::ByeReason;

use crate::change;
use crate::control::Standing;
use crate::control::protocol::Role;
use crate::pair::claims::claimant::Claimant;
use crate::pair::primary::supervisor::{QUIESCE_TIMEOUT, Supervisor};
use crate::pair::protocol::Loss;

/// How long a backup that was handed the guest has to claim it. It does so at once, so it is lost after that.
const CLAIM_TIME: Duration = Duration::from_secs(5);
/// Pause between two looks at the claims.
const LOOK_EVERY: Duration = Duration::from_millis(10);

impl Supervisor {
    /// Lets the backup go.
    pub(super) fn dismiss_backup(&self) {
        let Some(outbox) = self.state.outbox() else { return };
        if !self.state.protocol(|primary| primary.backup_lost(outbox.epoch(), Loss::Dismissed)) {
            return;
        }
        // The sender waits with the last word until the claim is won.
        outbox.end(Some(ByeReason::Dismissed));
        let why = self.in_words(Loss::Dismissed);
        let standing = self.standing(false, why.clone());
        change!(
            info,
            self.monitor,
            BackupDismissed,
            standing,
            "backup dismissed: output waits for the claim of the next view"
        );
        self.gate.quiesce(QUIESCE_TIMEOUT);
        self.gate.performer().quiesce(QUIESCE_TIMEOUT);
        self.go_on_without(None, why);
    }

    /// The log was ended and closed for the backup to take over: waits until it has. Tells `outcome` whether it did; if
    /// not, the guest is this monitor's as before, without a backup.
    pub(super) fn hand_over(&self, outcome: &Sender<bool>) {
        let next = self.state.view() + 1;
        let deadline = Instant::now() + CLAIM_TIME;
        let mut taken = false;
        while !taken && Instant::now() < deadline {
            // An arbiter that does not answer now may do so later; the claim below asks until it does.
            match self.claims.read(next) {
                Ok(Some(record)) if record.owner.uuid != self.owner.uuid => {
                    taken = true;
                    if let Ok(Some(breach)) = self.claims.breach_of(&record) {
                        tracing::error!("{breach}");
                    }
                }
                _ => std::thread::sleep(LOOK_EVERY),
            }
        }
        self.heartbeats.set_peer(None);
        if !taken {
            self.state.protocol(|primary| primary.take_back());
            self.claim(&mut Claimant::new(self.claims.clone(), self.owner.clone()));
        }
        if taken || self.state.protocol(|primary| primary.is_lost()) {
            let cause = "the operator has switched the roles".to_owned();
            let standing = Standing { role: Role::None, view: next, protected: false, cause };
            change!(
                info,
                self.monitor,
                HandedOver,
                standing,
                "handed over: the former backup runs the guest"
            );
            // The vCPU's thread waits for exactly this.
            let _ = outcome.send(true);
            return;
        }
        self.go_on_alone("the backup did not take the guest over".to_owned());
        let _ = outcome.send(false);
    }
}
