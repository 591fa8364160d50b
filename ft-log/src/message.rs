//! The messages of a connection and of a recording, and their payload bytes.
//!
//! Owns: [`Message`] and its payload layout. Must never: do I/O, or frame anything (`stream.rs`).
//!
//! Text is a varint length and UTF-8. Numbers are fixed little-endian in the handshake, varints in the
//! messages that flow all the time (`Batch`, `Ack`). A payload with bytes left over is refused.

use crate::error::LogError;
use crate::event::GuestTime;
use crate::fields::{
    check_len, get_array, get_bytes, get_text, get_u8, get_u16, get_u32, get_u64, get_varint, put_bytes,
    put_varint,
};
use crate::position::PositionSource;
use crate::session::{CpuIdentity, Hello, HelloDisk, HelloImage, Welcome};

/// Longest payload of one message.
pub const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Most entry bytes in one batch: the payload less five varints.
pub const MAX_BATCH_ENTRIES_BYTES: usize = MAX_MESSAGE_BYTES - 50;
/// The number of the first batch behind a snapshot.
pub const FIRST_BATCH: u64 = 1;
/// Longest name of a guest, a host or a monitor version.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest path of a disk image.
pub const MAX_PATH_BYTES: usize = 4_096;
/// Longest record of a disk image's owner.
pub const MAX_OWNER_BYTES: usize = 4_096;
/// Longest text of a [`Message::Refuse`] or a [`Message::Bye`], and longest cause of a mark that is missing.
pub const MAX_TEXT_BYTES: usize = 4_096;

/// One message. Who sends what, and when, is in `session.rs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A backup asks to follow.
    Hello(Hello),
    /// The primary accepts; a snapshot follows.
    Welcome(Welcome),
    /// The primary does not accept, and closes.
    Refuse {
        /// Why, for the program.
        refusal: Refusal,
        /// Why, as a sentence for the operator.
        reason: String,
    },
    /// The next bytes of the snapshot container.
    Snapshot(Vec<u8>),
    /// The snapshot container is complete.
    SnapshotEnd,
    /// A piece of a checkpoint; the batch with its `Stop` follows.
    Checkpoint(Vec<u8>),
    /// Entries of the log.
    Batch(Batch),
    /// How far the backup is.
    Ack(Ack),
    /// The last message of either side.
    Bye {
        /// Why, for the program.
        reason: ByeReason,
        /// Why, for the operator.
        text: String,
    },
}

/// A piece of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The view whose log this is a piece of. A recording has none: 0.
    pub view: u64,
    /// Rises by one; the first batch after a snapshot is 1.
    pub seq: u64,
    /// Where the log starts: the anchor of the snapshot. Batch 1 says it, and no other.
    pub start: Option<u64>,
    /// The last anchor whose exit is completely logged. A follower may handle exit k only when `reached >= k`.
    pub reached: u64,
    /// Outputs up to this batch were let out; 0 if none were. At most `seq`.
    pub released: u64,
    /// Encoded entries, at most [`MAX_BATCH_ENTRIES_BYTES`]; may be empty.
    pub entries: Vec<u8>,
}

/// What a follower reads behind the snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogPart {
    /// A piece of a checkpoint, for a [`crate::CheckpointDecoder`].
    Checkpoint(Vec<u8>),
    /// Entries.
    Batch(Batch),
}

/// How far a backup is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ack {
    /// Every batch up to this one is in the backup's hands; 0 if none is.
    pub received: u64,
    /// The anchor that the backup's guest is at.
    pub executed: u64,
    /// The guest time that the backup's guest is at.
    pub executed_time: GuestTime,
}

/// Why a backup may not join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Refusal {
    /// It does not fit this primary, and somebody has to change that.
    Unfit = 1,
    /// There is a backup, or another one is joining. It may come again.
    Busy = 2,
}

impl Refusal {
    const ALL: [Self; 2] = [Self::Unfit, Self::Busy];
}

/// Why a log ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ByeReason {
    /// The guest powered itself off or asked for a reset.
    GuestEnded = 1,
    /// The copies differ; the backup must not take over.
    Diverged = 2,
    /// The operator stopped the monitor.
    Shutdown = 3,
    /// The other side owns the guest now.
    LostClaim = 4,
    /// The peer sent something that the protocol does not allow.
    Protocol = 5,
    /// The host failed the monitor: a disk error, no memory.
    HostFailure = 6,
    /// A recording is complete. Only in files.
    RecordingEnd = 7,
    /// The backup did not come to a forced stop; it needs the guest anew.
    Missed = 8,
    /// The primary lets the backup go; it claims nothing.
    Dismissed = 9,
}

impl ByeReason {
    const ALL: [Self; 9] = [
        Self::GuestEnded,
        Self::Diverged,
        Self::Shutdown,
        Self::LostClaim,
        Self::Protocol,
        Self::HostFailure,
        Self::RecordingEnd,
        Self::Missed,
        Self::Dismissed,
    ];
}

/// The kind of a message, as its frame names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum MessageKind {
    /// [`Message::Hello`]
    Hello = 1,
    /// [`Message::Welcome`]
    Welcome = 2,
    /// [`Message::Refuse`]
    Refuse = 3,
    /// [`Message::Snapshot`]
    Snapshot = 4,
    /// [`Message::SnapshotEnd`]
    SnapshotEnd = 5,
    /// [`Message::Batch`]
    Batch = 6,
    /// [`Message::Ack`]
    Ack = 7,
    /// [`Message::Bye`]
    Bye = 8,
    /// [`Message::Checkpoint`]
    Checkpoint = 9,
}

impl MessageKind {
    const ALL: [Self; 9] = [
        Self::Hello,
        Self::Welcome,
        Self::Refuse,
        Self::Snapshot,
        Self::SnapshotEnd,
        Self::Batch,
        Self::Ack,
        Self::Bye,
        Self::Checkpoint,
    ];

    pub(crate) fn from_tag(tag: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == tag)
    }

    /// The name of the kind, for messages to an operator.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "Hello",
            Self::Welcome => "Welcome",
            Self::Refuse => "Refuse",
            Self::Snapshot => "Snapshot",
            Self::SnapshotEnd => "SnapshotEnd",
            Self::Batch => "Batch",
            Self::Ack => "Ack",
            Self::Bye => "Bye",
            Self::Checkpoint => "Checkpoint",
        }
    }
}

impl Message {
    /// The kind of this message.
    pub fn kind(&self) -> MessageKind {
        match self {
            Self::Hello(_) => MessageKind::Hello,
            Self::Welcome(_) => MessageKind::Welcome,
            Self::Refuse { .. } => MessageKind::Refuse,
            Self::Snapshot(_) => MessageKind::Snapshot,
            Self::SnapshotEnd => MessageKind::SnapshotEnd,
            Self::Batch(_) => MessageKind::Batch,
            Self::Ack(_) => MessageKind::Ack,
            Self::Bye { .. } => MessageKind::Bye,
            Self::Checkpoint(_) => MessageKind::Checkpoint,
        }
    }

    /// Appends the payload to `out`.
    pub(crate) fn put_payload(&self, out: &mut Vec<u8>) -> Result<(), LogError> {
        match self {
            Self::Hello(hello) => put_hello(out, hello),
            Self::Welcome(welcome) => put_welcome(out, welcome),
            Self::Refuse { refusal, reason } => {
                out.push(*refusal as u8);
                put_bytes(out, "reason", reason.as_bytes(), MAX_TEXT_BYTES)
            }
            Self::Snapshot(chunk) | Self::Checkpoint(chunk) => {
                out.extend_from_slice(chunk);
                Ok(())
            }
            Self::SnapshotEnd => Ok(()),
            Self::Batch(batch) => put_batch(out, batch),
            Self::Ack(ack) => {
                put_varint(out, ack.received);
                put_varint(out, ack.executed);
                put_varint(out, ack.executed_time.0);
                Ok(())
            }
            Self::Bye { reason, text } => {
                out.push(*reason as u8);
                put_bytes(out, "text", text.as_bytes(), MAX_TEXT_BYTES)
            }
        }
    }

    /// The message of `kind` whose payload is exactly `payload`.
    pub(crate) fn from_payload(kind: MessageKind, payload: &[u8]) -> Result<Self, LogError> {
        let input = &mut &*payload;
        let message = match kind {
            MessageKind::Hello => Self::Hello(get_hello(input)?),
            MessageKind::Welcome => Self::Welcome(get_welcome(input)?),
            MessageKind::Refuse => {
                let tag = get_u8(input, "refusal")?;
                let refusal = Refusal::ALL
                    .into_iter()
                    .find(|refusal| *refusal as u8 == tag)
                    .ok_or(LogError::UnknownTag { what: "refusal", tag })?;
                Self::Refuse { refusal, reason: get_text(input, "reason", MAX_TEXT_BYTES)? }
            }
            MessageKind::Snapshot => Self::Snapshot(std::mem::take(input).to_vec()),
            MessageKind::Checkpoint => Self::Checkpoint(std::mem::take(input).to_vec()),
            MessageKind::SnapshotEnd => Self::SnapshotEnd,
            MessageKind::Batch => Self::Batch(get_batch(input)?),
            MessageKind::Ack => Self::Ack(Ack {
                received: get_varint(input, "received batch")?,
                executed: get_varint(input, "executed anchor")?,
                executed_time: GuestTime(get_varint(input, "executed time")?),
            }),
            MessageKind::Bye => {
                let tag = get_u8(input, "reason")?;
                let reason = ByeReason::ALL
                    .into_iter()
                    .find(|reason| *reason as u8 == tag)
                    .ok_or(LogError::UnknownTag { what: "reason", tag })?;
                Self::Bye { reason, text: get_text(input, "text", MAX_TEXT_BYTES)? }
            }
        };
        if !input.is_empty() {
            return Err(LogError::Trailing { what: kind.name(), len_bytes: input.len() });
        }
        Ok(message)
    }
}

fn put_hello(out: &mut Vec<u8>, hello: &Hello) -> Result<(), LogError> {
    put_bytes(out, "monitor version", hello.monitor_version.as_bytes(), MAX_NAME_BYTES)?;
    out.extend_from_slice(&hello.cpu.vendor);
    out.extend_from_slice(&hello.cpu.family.to_le_bytes());
    out.extend_from_slice(&[hello.cpu.model, hello.cpu.stepping]);
    put_bytes(out, "guest name", hello.guest_name.as_bytes(), MAX_NAME_BYTES)?;
    put_disk(out, hello.disk.as_ref())?;
    out.extend_from_slice(&hello.claims_id);
    out.extend_from_slice(&hello.life);
    put_bytes(out, "host name", hello.host_name.as_bytes(), MAX_NAME_BYTES)?;
    out.extend_from_slice(&hello.timeout_ms.to_le_bytes());
    out.push(if hello.has_network { HAS_NETWORK } else { NO_NETWORK });
    out.push(hello.positions as u8);
    out.extend_from_slice(&hello.listen_port.to_le_bytes());
    Ok(())
}

fn get_hello(input: &mut &[u8]) -> Result<Hello, LogError> {
    Ok(Hello {
        monitor_version: get_text(input, "monitor version", MAX_NAME_BYTES)?,
        cpu: CpuIdentity {
            vendor: get_array(input, "CPU vendor")?,
            family: get_u16(input, "CPU family")?,
            model: get_u8(input, "CPU model")?,
            stepping: get_u8(input, "CPU stepping")?,
        },
        guest_name: get_text(input, "guest name", MAX_NAME_BYTES)?,
        disk: get_disk(input)?,
        claims_id: get_array(input, "arbiter id")?,
        life: get_array(input, "life")?,
        host_name: get_text(input, "host name", MAX_NAME_BYTES)?,
        timeout_ms: get_u32(input, "timeout")?,
        has_network: match get_u8(input, "network tag")? {
            NO_NETWORK => false,
            HAS_NETWORK => true,
            tag => return Err(LogError::UnknownTag { what: "network tag", tag }),
        },
        positions: PositionSource::from_tag(get_u8(input, "position source")?)?,
        listen_port: get_u16(input, "listening port")?,
    })
}

fn put_disk(out: &mut Vec<u8>, disk: Option<&HelloDisk>) -> Result<(), LogError> {
    let Some(HelloDisk { len_bytes, image }) = disk else {
        out.push(NO_DISK);
        return Ok(());
    };
    out.push(if image.is_some() { HAS_IMAGE } else { HAS_DEVICE });
    out.extend_from_slice(&len_bytes.to_le_bytes());
    let Some(HelloImage { path, owner, mark }) = image else { return Ok(()) };
    put_bytes(out, "path of the image", path.as_bytes(), MAX_PATH_BYTES)?;
    put_bytes(out, "owner of the image", owner, MAX_OWNER_BYTES)?;
    match mark {
        Ok(id) => {
            out.push(HAS_MARK);
            out.extend_from_slice(id);
            Ok(())
        }
        Err(why) => {
            out.push(NO_MARK);
            put_bytes(out, "cause of a missing mark", why.as_bytes(), MAX_TEXT_BYTES)
        }
    }
}

fn get_disk(input: &mut &[u8]) -> Result<Option<HelloDisk>, LogError> {
    let tag = get_u8(input, "disk tag")?;
    let has_image = match tag {
        NO_DISK => return Ok(None),
        HAS_DEVICE => false,
        HAS_IMAGE => true,
        tag => return Err(LogError::UnknownTag { what: "disk tag", tag }),
    };
    let len_bytes = get_u64(input, "disk size")?;
    let image = if has_image { Some(get_image(input)?) } else { None };
    Ok(Some(HelloDisk { len_bytes, image }))
}

fn get_image(input: &mut &[u8]) -> Result<HelloImage, LogError> {
    Ok(HelloImage {
        path: get_text(input, "path of the image", MAX_PATH_BYTES)?,
        owner: get_bytes(input, "owner of the image", MAX_OWNER_BYTES)?.to_vec(),
        mark: match get_u8(input, "mark tag")? {
            NO_MARK => Err(get_text(input, "cause of a missing mark", MAX_TEXT_BYTES)?),
            HAS_MARK => Ok(get_array(input, "mark")?),
            tag => return Err(LogError::UnknownTag { what: "mark tag", tag }),
        },
    })
}

const NO_NETWORK: u8 = 1;
const HAS_NETWORK: u8 = 2;
const NO_DISK: u8 = 1;
const HAS_DEVICE: u8 = 2;
const HAS_IMAGE: u8 = 3;
const NO_MARK: u8 = 1;
const HAS_MARK: u8 = 2;

fn put_welcome(out: &mut Vec<u8>, welcome: &Welcome) -> Result<(), LogError> {
    out.extend_from_slice(&welcome.view.to_le_bytes());
    put_bytes(out, "guest name", welcome.guest_name.as_bytes(), MAX_NAME_BYTES)?;
    out.extend_from_slice(&welcome.memory_bytes.to_le_bytes());
    out.extend_from_slice(&welcome.config_digest.to_le_bytes());
    out.extend_from_slice(&welcome.cpuid_digest.to_le_bytes());
    put_bytes(out, "host name", welcome.host_name.as_bytes(), MAX_NAME_BYTES)?;
    Ok(())
}

fn get_welcome(input: &mut &[u8]) -> Result<Welcome, LogError> {
    Ok(Welcome {
        view: get_u64(input, "view")?,
        guest_name: get_text(input, "guest name", MAX_NAME_BYTES)?,
        memory_bytes: get_u64(input, "memory size")?,
        config_digest: get_u64(input, "configuration digest")?,
        cpuid_digest: get_u64(input, "CPUID digest")?,
        host_name: get_text(input, "host name", MAX_NAME_BYTES)?,
    })
}

/// `released` follows `seq` closely, so the distance is stored: one byte instead of four.
fn put_batch(out: &mut Vec<u8>, batch: &Batch) -> Result<(), LogError> {
    let unreleased =
        batch.seq.checked_sub(batch.released).ok_or(LogError::Overflow { what: "released batch" })?;
    if batch.start.is_some() != (batch.seq == FIRST_BATCH) {
        return Err(LogError::StartOfLog { seq: batch.seq });
    }
    put_varint(out, batch.view);
    put_varint(out, batch.seq);
    if let Some(start) = batch.start {
        put_varint(out, start);
    }
    put_varint(out, batch.reached);
    put_varint(out, unreleased);
    check_len("entries", batch.entries.len() as u64, MAX_BATCH_ENTRIES_BYTES)?;
    out.extend_from_slice(&batch.entries);
    Ok(())
}

fn get_batch(input: &mut &[u8]) -> Result<Batch, LogError> {
    let view = get_varint(input, "view")?;
    let seq = get_varint(input, "batch number")?;
    let start = if seq == FIRST_BATCH { Some(get_varint(input, "start of the log")?) } else { None };
    let reached = get_varint(input, "reached anchor")?;
    let unreleased = get_varint(input, "unreleased batches")?;
    let released = seq.checked_sub(unreleased).ok_or(LogError::Overflow { what: "unreleased batches" })?;
    check_len("entries", input.len() as u64, MAX_BATCH_ENTRIES_BYTES)?;
    Ok(Batch { view, seq, start, reached, released, entries: std::mem::take(input).to_vec() })
}
