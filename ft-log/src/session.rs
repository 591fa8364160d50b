//! The rules of a connection, without the connection.
//!
//! Owns: who may follow whom ([`check_hello`]) and the order of batches and acknowledgements. Must never:
//! do I/O, or repair what the peer got wrong; an error here ends the connection.
//!
//! ```text
//! backup                                primary
//!   preamble                  <->         preamble
//!   Hello                      ->         check_hello
//!                             <-          Refuse, close        (a field differs)
//!                             <-          Welcome, Snapshot.., SnapshotEnd
//!   BatchReceiver::accept     <-          Batch 1, 2, ..       BatchSender::next_seq
//!   Ack                        ->         BatchSender::accept
//!   Bye                       <->         Bye                  (either side, at any time)
//! ```

use thiserror::Error;

use crate::hex::to_hex;
use crate::message::{Ack, Batch};
use crate::position::PositionSource;

/// The CPU that a host's guest runs on (CPUID leaves 0 and 1, family and model with their extensions).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuIdentity {
    /// `GenuineIntel`, `AuthenticAMD`.
    pub vendor: [u8; 12],
    /// Display family.
    pub family: u16,
    /// Display model.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
}

impl std::fmt::Display for CpuIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { vendor, family, model, stepping } = self;
        write!(f, "{} family {family} model {model} stepping {stepping}", vendor.escape_ascii())
    }
}

/// What a backup says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The version of its monitor.
    pub monitor_version: String,
    /// The CPU of its host.
    pub cpu: CpuIdentity,
    /// The guest that it wants to follow.
    pub guest_name: String,
    /// The disk that it has for the guest, if it has one.
    pub disk: Option<HelloDisk>,
    /// The id of the arbiter that it asks: both hosts must ask the same one.
    pub claims_id: [u8; 16],
    /// This life of its monitor, by which a view's record names its backup.
    pub life: [u8; 16],
    /// The name of its host.
    pub host_name: String,
    /// Silence in milliseconds after which it takes the primary for failed.
    pub timeout_ms: u32,
    /// Whether it has a network for the guest.
    pub has_network: bool,
    /// Who supplies its positions of forced stops.
    pub positions: PositionSource,
    /// Where it would take a backup of its own, at the address it connects from; 0: nowhere.
    pub listen_port: u16,
}

/// A backup's disk for the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HelloDisk {
    /// Its size in bytes.
    pub len_bytes: u64,
    /// The image in which it is; `None` for a block device.
    pub image: Option<HelloImage>,
}

/// What lets a primary tell whether a backup's disk image is the primary's own file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HelloImage {
    /// Its path on the backup's host, for sentences.
    pub path: String,
    /// The record of its owner, as the backup reads it; empty if there is none.
    pub owner: Vec<u8>,
    /// The id of the mark that the backup has just left beside it, or why it left none.
    pub mark: Result<[u8; 16], String>,
}

/// What a primary answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// The view in which the backup will be one, once the primary has that recorded: the one behind the present view.
    pub view: u64,
    /// The guest.
    pub guest_name: String,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Digest of the guest's whole configuration.
    pub config_digest: u64,
    /// Digest of the CPUID table that the guest sees.
    pub cpuid_digest: u64,
    /// The name of the primary's host.
    pub host_name: String,
}

/// What a primary demands of a backup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// The version of the primary's monitor; another version may emulate another machine.
    pub monitor_version: String,
    /// The CPU of the primary's host.
    pub cpu: CpuIdentity,
    /// The guest that the primary runs.
    pub guest_name: String,
    /// Size of the guest's disk, if it has one.
    pub disk_bytes: Option<u64>,
    /// The id of the arbiter that the primary asks.
    pub claims_id: [u8; 16],
    /// The primary's own timeout: what it lets out on an answer of the backup relies on the backup's.
    pub timeout_ms: u32,
    /// Whether the guest has a network card.
    pub has_network: bool,
    /// Who supplies the primary's positions of forced stops.
    pub positions: PositionSource,
}

/// Why a backup may not follow, as a sentence for both operators.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Mismatch {
    /// Monitors of different versions.
    #[error("Backup host {host} runs monitor version {backup}, the primary runs {primary}")]
    MonitorVersion {
        /// The backup's host.
        host: String,
        /// The backup's version.
        backup: String,
        /// The primary's version.
        primary: String,
    },
    /// The backup follows another guest.
    #[error("Backup host {host} wants to follow guest {backup:?}, the primary runs guest {primary:?}")]
    GuestName {
        /// The backup's host.
        host: String,
        /// The backup's guest.
        backup: String,
        /// The primary's guest.
        primary: String,
    },
    /// CPUs that may compute differently.
    #[error("Backup host {host} has the CPU {backup}, the primary has {primary}")]
    Cpu {
        /// The backup's host.
        host: String,
        /// The backup's CPU.
        backup: CpuIdentity,
        /// The primary's CPU.
        primary: CpuIdentity,
    },
    /// Disks that cannot be the same one.
    #[error("Backup host {host} has {}, the primary has {}", disk(*backup), disk(*primary))]
    Disk {
        /// The backup's host.
        host: String,
        /// The backup's disk.
        backup: Option<u64>,
        /// The primary's disk.
        primary: Option<u64>,
    },
    /// A network on one side only.
    #[error(
        "The guest has {}, but backup host {host} was started {} --tap",
        if *.primary { "a network card" } else { "no network card" },
        if *.primary { "without" } else { "with" }
    )]
    Network {
        /// The backup's host.
        host: String,
        /// Whether the guest has a network card.
        primary: bool,
    },
    /// Positions that the other side cannot find.
    #[error(
        "Backup host {host} finds forced stops by {backup}, the primary by {primary}: start both with --position \
         checkpoint, or both with another source that both hosts have"
    )]
    Positions {
        /// The backup's host.
        host: String,
        /// The backup's source.
        backup: PositionSource,
        /// The primary's source.
        primary: PositionSource,
    },
    /// Timeouts that differ: one side could act on an answer that the other has forgotten.
    #[error(
        "Backup host {host} was started with --timeout-ms {backup}, the primary with {primary}: both must be equal"
    )]
    Timeout {
        /// The backup's host.
        host: String,
        /// The backup's timeout.
        backup: u32,
        /// The primary's timeout.
        primary: u32,
    },
    /// Arbiters that are not the same: both sides could win the guest.
    #[error(
        "Backup host {host} asks the arbiter {}, the primary asks {}: both must name the same one with --arbiter",
        to_hex(backup),
        to_hex(primary)
    )]
    Claims {
        /// The backup's host.
        host: String,
        /// The backup's directory.
        backup: [u8; 16],
        /// The primary's directory.
        primary: [u8; 16],
    },
}

fn disk(disk_bytes: Option<u64>) -> String {
    disk_bytes.map_or_else(|| "no disk".into(), |bytes| format!("a disk of {bytes} bytes"))
}

/// Whether the backup that said `hello` may follow. The first field that differs is named.
///
/// # Errors
/// The field, with both values.
pub fn check_hello(hello: &Hello, expected: &Expected) -> Result<(), Mismatch> {
    let host = || hello.host_name.clone();
    if hello.monitor_version != expected.monitor_version {
        return Err(Mismatch::MonitorVersion {
            host: host(),
            backup: hello.monitor_version.clone(),
            primary: expected.monitor_version.clone(),
        });
    }
    if hello.guest_name != expected.guest_name {
        return Err(Mismatch::GuestName {
            host: host(),
            backup: hello.guest_name.clone(),
            primary: expected.guest_name.clone(),
        });
    }
    if hello.cpu != expected.cpu {
        return Err(Mismatch::Cpu { host: host(), backup: hello.cpu, primary: expected.cpu });
    }
    if hello.has_network != expected.has_network {
        return Err(Mismatch::Network { host: host(), primary: expected.has_network });
    }
    if hello.positions != expected.positions {
        let (backup, primary) = (hello.positions, expected.positions);
        return Err(Mismatch::Positions { host: host(), backup, primary });
    }
    if hello.timeout_ms != expected.timeout_ms {
        return Err(Mismatch::Timeout {
            host: host(),
            backup: hello.timeout_ms,
            primary: expected.timeout_ms,
        });
    }
    let backup = hello.disk.as_ref().map(|disk| disk.len_bytes);
    if backup != expected.disk_bytes {
        return Err(Mismatch::Disk { host: host(), backup, primary: expected.disk_bytes });
    }
    if hello.claims_id != expected.claims_id {
        return Err(Mismatch::Claims { host: host(), backup: hello.claims_id, primary: expected.claims_id });
    }
    Ok(())
}

/// A batch or acknowledgement out of order.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SequenceError {
    /// Batches are missing.
    #[error("Expected batch {expected}, found batch {found}: batches between them are missing")]
    Gap {
        /// The batch that may come.
        expected: u64,
        /// The batch that came.
        found: u64,
    },
    /// A batch came again.
    #[error("Expected batch {expected}, found batch {found}, which came before")]
    Repeated {
        /// The batch that may come.
        expected: u64,
        /// The batch that came.
        found: u64,
    },
    /// A piece of another view's log.
    #[error("Batch {seq} is of view {found}, and what is followed here is the log of view {expected}")]
    OtherView {
        /// The batch's number.
        seq: u64,
        /// The view that is followed.
        expected: u64,
        /// The view of the batch.
        found: u64,
    },
    /// A log that does not start where the snapshot ends: events would be in both, or in neither.
    #[error("The log starts at anchor {found}, and the snapshot before it ends at anchor {expected}")]
    Start {
        /// The anchor of the snapshot.
        expected: u64,
        /// Where the log starts.
        found: u64,
    },
    /// A number that never falls fell.
    #[error("The {what} goes back from {previous} to {found}")]
    WentBack {
        /// The number.
        what: &'static str,
        /// Its last value.
        previous: u64,
        /// Its value now.
        found: u64,
    },
    /// Something is said of a batch that does not exist yet.
    #[error("The {what} is batch {found}, but the last batch sent is {sent}")]
    Ahead {
        /// The number.
        what: &'static str,
        /// Its value.
        found: u64,
        /// The last batch that was sent.
        sent: u64,
    },
}

fn forward(what: &'static str, previous: u64, found: u64) -> Result<(), SequenceError> {
    if found < previous {
        return Err(SequenceError::WentBack { what, previous, found });
    }
    Ok(())
}

/// The receiving side of batches: they come without a gap, from 1, all of one view, and the first from where the
/// snapshot ends. A batch that is refused changes nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct BatchReceiver {
    received: u64,
    /// `None`: the first batch tells, since nobody else does.
    view: Option<u64>,
    /// The last anchor that is completely logged. `None`: as for the view.
    reached: Option<u64>,
    released: u64,
}

impl BatchReceiver {
    /// For the log of `view` behind a snapshot at anchor `start`. What is written to a recording tells both by itself
    /// (`default`).
    pub fn new(view: u64, start: u64) -> Self {
        Self { view: Some(view), ..Self::of_recording(start) }
    }

    /// For the log of a recording, which tells its view by itself, behind a snapshot at anchor `start`.
    pub fn of_recording(start: u64) -> Self {
        Self { reached: Some(start), ..Self::default() }
    }

    /// Takes note of `batch`.
    ///
    /// # Errors
    /// Another view, a gap, a repetition, a start elsewhere, or a `reached` or `released` that goes back or is ahead.
    pub fn accept(&mut self, batch: &Batch) -> Result<(), SequenceError> {
        let seq = batch.seq;
        let view = self.view.unwrap_or(batch.view);
        let reached = self.reached.or(batch.start).unwrap_or_default();
        if batch.view != view {
            return Err(SequenceError::OtherView { seq, expected: view, found: batch.view });
        }
        let (expected, found) = (self.received.saturating_add(1), seq);
        if found > expected {
            return Err(SequenceError::Gap { expected, found });
        }
        if found < expected {
            return Err(SequenceError::Repeated { expected, found });
        }
        if let Some(found) = batch.start.filter(|start| *start != reached) {
            return Err(SequenceError::Start { expected: reached, found });
        }
        forward("reached anchor", reached, batch.reached)?;
        forward("released batch", self.released, batch.released)?;
        if batch.released > batch.seq {
            let (found, sent) = (batch.released, batch.seq);
            return Err(SequenceError::Ahead { what: "released batch", found, sent });
        }
        let (view, reached) = (Some(view), Some(batch.reached));
        *self = Self { received: seq, view, reached, released: batch.released };
        Ok(())
    }

    /// The last batch received, for [`Ack::received`]; 0 before the first.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The last anchor that is completely logged.
    pub fn reached(&self) -> u64 {
        self.reached.unwrap_or_default()
    }

    /// Outputs up to this batch were let out.
    pub fn released(&self) -> u64 {
        self.released
    }
}

/// The sending side of batches: numbers them, and knows which ones the backup has.
#[derive(Clone, Debug, Default)]
pub struct BatchSender {
    sent: u64,
    acked: Ack,
}

impl BatchSender {
    /// The number of the batch that is sent now; the first is 1.
    pub fn next_seq(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }

    /// Takes note of an acknowledgement.
    ///
    /// # Errors
    /// An acknowledgement of a batch that was not sent, or any number that goes back. It changes nothing.
    pub fn accept(&mut self, ack: &Ack) -> Result<(), SequenceError> {
        if ack.received > self.sent {
            let (found, sent) = (ack.received, self.sent);
            return Err(SequenceError::Ahead { what: "acknowledged batch", found, sent });
        }
        forward("acknowledged batch", self.acked.received, ack.received)?;
        forward("executed anchor", self.acked.executed, ack.executed)?;
        forward("executed time", self.acked.executed_time.0, ack.executed_time.0)?;
        self.acked = *ack;
        Ok(())
    }

    /// The last batch sent; 0 before the first.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The last acknowledgement. Outputs up to batch `acked().received` may be let out.
    pub fn acked(&self) -> Ack {
        self.acked
    }
}
