//! `vmft standby`: waits on a host, and becomes the backup when a primary needs one.
//!
//! Owns: the answer to invitations. Must never: hold a guest's memory, its disk or its tap while it waits, or follow
//! anybody but a monitor of the configuration.
//!
//! ```text
//!   waiting ── invitation ──> greeting ── welcome ──> receiving ──> following (backup.rs)
//!      ^                         │ refused, nobody there │ broken off
//!      └──── waits (hosts.rs) <──┴───────────────────────┘
//! ```
//!
//! At the start the disk and the tap are opened once, to see that they can be, and closed again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, select};
use ft_log::{DatagramError, Invitation, Refusal, guest_name_hash};

use super::follower::{BackupSettings, Follower, Received};
use super::rejoin::ResyncError;
use crate::change;
use crate::control::{Standing, protocol as control};
use crate::host::LogEvent;
use crate::host::backends::Resources;
use crate::launch::{Ending, asked_to_end};
use crate::pair::liveness::heartbeat::{Call, Heartbeats};
use crate::pair::liveness::hosts::Memory;
use crate::pair::primary::invite::invitation_key;
use crate::pair::wire::connect::{ConnectError, Connection};
use crate::pair::{Leave, PairError};
use crate::with_causes;

/// Invitations that may wait; a primary repeats its own.
const CALLS: usize = 16;
/// How long an invitation is followed. Another primary may invite meanwhile.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// `vmft standby`: waits on `listen`, which `settings` name too.
///
/// # Errors
/// The host is unfit, or something that `settings` name cannot be used.
pub fn standby(settings: &BackupSettings, listen: SocketAddr, leave: Leave) -> Result<Ending, PairError> {
    let follower = Follower::new(settings, None, leave)?;
    drop(follower.open_resources()?);
    let standing = Standing {
        role: control::Role::Standby,
        cause: "vmft standby was started".into(),
        ..Standing::default()
    };
    let heartbeats = follower.start_heartbeats(listen)?;
    let (calls, called) = bounded(CALLS);
    heartbeats.await_invitations(calls, invitation_key(follower.key()));
    let mut standby =
        Standby { follower, heartbeats, called, memory: Memory::default(), strangers: Memory::default() };
    let names: Vec<String> = standby.follower.hosts().iter().map(ToString::to_string).collect();
    change!(
        info,
        standby.follower.monitor(),
        Standby,
        standing,
        %listen,
        hosts = %names.join(","),
        "standby: waiting for a primary without a backup"
    );
    loop {
        let Some(primary) = standby.wait() else {
            tracing::info!("the operator stopped this standby");
            return Ok(Ending::Orderly);
        };
        match standby.join(primary) {
            Ok(joined) => return standby.follow(joined),
            Err(error) => standby.note(primary, &error),
        }
    }
}

struct Standby<'a> {
    follower: Follower<'a>,
    heartbeats: Arc<Heartbeats>,
    called: Receiver<Call>,
    memory: Memory,
    /// What is said of datagrams that may come from anybody: it must not keep a primary waiting.
    strangers: Memory,
}

impl Standby<'_> {
    /// Waits for a primary that is worth a connection. `None`: the operator wants no more.
    fn wait(&mut self) -> Option<SocketAddr> {
        // Of what was said while this host was busy, whoever still means it says it again.
        while self.called.try_recv().is_ok() {}
        loop {
            if self.follower.is_stopped() {
                return None;
            }
            let call = select! {
                recv(self.called) -> call => call.ok(),
                recv(self.follower.stop_signal().channel()) -> _ => None,
            };
            if let Some(primary) = call.and_then(|call| self.judge(&call)) {
                return Some(primary);
            }
        }
    }

    fn judge(&mut self, call: &Call) -> Option<SocketAddr> {
        let (host, now) = (call.from.ip(), Instant::now());
        let Invitation { view, guest, port } = match &call.invitation {
            Ok(invitation) => *invitation,
            // The greeting makes both sides name the cause: an invitation comes from where backups are awaited.
            Err(DatagramError::Seal)
                if self.follower.hosts().contains(&call.from) && self.memory.is_due(host, now) =>
            {
                return Some(call.from);
            }
            Err(DatagramError::Seal) => return None,
            Err(error) => {
                if self.strangers.failed(host, &error.to_string(), now) {
                    tracing::warn!(%host, "an invitation cannot be followed: {error}");
                }
                return None;
            }
        };
        // Pairs of other guests may use the same hosts.
        if guest != guest_name_hash(self.follower.guest_name()) {
            return None;
        }
        let primary = SocketAddr::new(host, port);
        if !self.follower.hosts().contains(&primary) {
            let cause = format!("{primary} is not among --hosts");
            if self.strangers.failed(host, &cause, now) {
                tracing::warn!("an invitation is not followed: {cause}");
            }
            return None;
        }
        if !self.memory.is_due(host, now) {
            return None;
        }
        tracing::debug!(%primary, view, "invited");
        Some(primary)
    }

    /// Gets the guest of `primary`.
    fn join(&mut self, primary: SocketAddr) -> Result<Joined, PairError> {
        let resources = self.follower.open_resources()?;
        let follower = &mut self.follower;
        let (mut connection, image) = follower.join(primary, &resources, CONNECT_TIMEOUT)?;
        let received = follower.receive(&mut connection, image, &self.heartbeats);
        if received.is_err() {
            self.heartbeats.set_peer(None);
            self.follower.monitor().set_peer(None);
            self.follower.monitor().set_transfer(None);
        }
        Ok((received?, resources, connection))
    }

    /// Follows to the end. What went wrong before there was a pair is no reason to end.
    fn follow(self, (guest, resources, connection): Joined) -> Result<Ending, PairError> {
        let Self { follower, heartbeats, .. } = self;
        match follower.follow(guest, resources, connection, heartbeats) {
            Err(
                error @ (PairError::Connect(_)
                | PairError::NotFormed(_)
                | PairError::Transfer { .. }
                // Another standby may have been quicker.
                | PairError::Resync(ResyncError::NobodyElse { .. })),
            ) => {
                let why = with_causes(&error);
                if asked_to_end() {
                    tracing::info!("{why}; the operator stopped this standby");
                    return Ok(Ending::Orderly);
                }
                tracing::warn!(event = %LogEvent::Restart, role = "standby", "{why}; this monitor starts over as a standby");
                Ok(Ending::StartsOver)
            }
            other => other,
        }
    }

    /// Says why nothing came of an invitation, if that is news.
    fn note(&mut self, primary: SocketAddr, error: &PairError) {
        let now = Instant::now();
        if let PairError::Connect(ConnectError::Refused { refusal: Refusal::Busy, reason, .. }) = error {
            tracing::debug!(%primary, "not needed: {reason}");
            self.memory.busy(primary.ip(), now);
            return;
        }
        let cause = with_causes(error);
        if self.memory.failed(primary.ip(), &cause, now) {
            tracing::warn!("{cause}; this standby goes on waiting");
        }
    }
}

/// A guest that has been received, the host's resources for it, and the way to its primary.
type Joined = (Received, Resources, Connection);
