//! What a primary tells a backup, and what a recording holds.
//!
//! No KVM, no threads, no clock: sockets and files come in as `Read` and `Write`.
//!
//! ```text
//! Event ─ record ─ codec ─────┐                      ┌─ channel ─ TCP connection (session: who, in which order)
//! guest at a stop ─ checkpoint ├─ message ─ stream ───┤
//! machine ─── snapshot ────────┘                      └─ segment: recording file
//! heartbeat, invitation: UDP, on their own         key: the secret for channel and datagrams
//! ```
//!
//! Every stream, file and datagram starts with a magic and a version that can be read alone. A monitor
//! reads and writes its own version only and names the other one when it refuses. Tags are explicit, 0 is
//! never valid, numbers are little-endian. The layouts are in `docs/log-format.md`; a change to one changes
//! its version, that document and the change log together.

mod channel;
mod checkpoint;
mod clock;
mod codec;
mod datagram;
mod digest;
mod error;
mod event;
mod fields;
mod heartbeat;
mod hex;
mod invitation;
mod key;
mod message;
mod position;
mod private_file;
mod probe;
mod record;
mod segment;
mod session;
mod snapshot;
mod stream;

pub use channel::{ChannelError, ChannelReader, ChannelWriter, OPENING_BYTES, Session};
pub use checkpoint::{
    Checkpoint, CheckpointDecoder, CheckpointEncoder, CheckpointError, MAX_STATE_BYTES, Pages,
    REMEMBERED_PAGES,
};
pub use clock::{CLOCK_TOLERANCE, ClockModel};
pub use codec::{Decoder, Encoder, MAX_ENTRY_BYTES};
pub use datagram::DatagramError;
pub use digest::StateDigest;
pub use error::LogError;
pub use event::{
    DiskStatus, Event, GuestTime, MAX_CONSOLE_BYTES, MAX_DISK_BYTES, MAX_ENTROPY_BYTES, MAX_FRAME_BYTES,
};
pub use heartbeat::{HEARTBEAT_BYTES, HEARTBEAT_VERSION, Heartbeat, Role, guest_name_hash};
pub use hex::{from_hex, to_hex};
pub use invitation::{INVITATION_BYTES, INVITATION_VERSION, Invitation};
pub use key::{KEY_BYTES, Key, KeyError, MAX_KEY_FILE_BYTES, SealKey, TAG_BYTES};
pub use message::{
    Ack, Batch, ByeReason, FIRST_BATCH, LogPart, MAX_BATCH_ENTRIES_BYTES, MAX_MESSAGE_BYTES, MAX_NAME_BYTES,
    MAX_OWNER_BYTES, MAX_PATH_BYTES, MAX_TEXT_BYTES, Message, MessageKind, Refusal,
};
pub use position::{Counted, Position, PositionSource, REGISTERS, Registers};
pub use private_file::create_private;
pub use probe::{PROBE_BYTES, PROBE_VERSION, Probe, ProbeKind};
pub use record::{Cursor, Entry};
pub use segment::{RECORDING_MAGIC, RECORDING_VERSION, RecordingError, RecordingReader, RecordingWriter};
pub use session::{
    BatchReceiver, BatchSender, CpuIdentity, Expected, Hello, HelloDisk, HelloImage, Mismatch, SequenceError,
    Welcome, check_hello,
};
pub use snapshot::{
    MAX_KIND_BYTES, MAX_PAYLOAD_BYTES, MAX_RUN_PAGES, PAGE_BYTES, SNAPSHOT_MAGIC, SNAPSHOT_VERSION,
    SnapshotError, SnapshotPart, SnapshotReader, SnapshotWriter,
};
pub use stream::{
    FRAME_HEADER_BYTES, FrameDecoder, FrameReader, FrameWriter, LINK_MAGIC, PROTOCOL_VERSION, SnapshotSink,
    SnapshotSource, StreamError,
};
