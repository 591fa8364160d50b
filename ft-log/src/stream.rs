//! Framing of messages over any byte stream, writer and reader together.
//!
//! Owns: a connection's magic and version, the frame header, and snapshot bytes as a run of messages. Must never:
//! open a socket or a file, wait on a clock, or hand out a message whose checksum does not hold.
//!
//! ```text
//! connection:  see channel.rs, then frames                 recording: see segment.rs
//! it starts:   magic "VMFTLINK" | version u32              (readable alone, whatever the version)
//! frame:       kind u8 | version u8 | reserved u16 = 0 | payload length u32 | crc32 u32 | payload
//!              crc32 (IEEE) covers the first 8 header bytes and the payload
//! ```
//!
//! After any error but a timeout the stream is of no use and must be closed.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::error::LogError;
use crate::message::{ByeReason, MAX_MESSAGE_BYTES, Message, MessageKind};

/// Version of the connection protocol: of the messages, the entries and the snapshot that it carries.
pub const PROTOCOL_VERSION: u32 = 12;
/// First bytes of a connection, from each side.
pub const LINK_MAGIC: [u8; 8] = *b"VMFTLINK";
/// Bytes of magic and version.
pub(crate) const PREAMBLE_BYTES: usize = 12;
/// Bytes of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 12;

const FRAME_VERSION: u8 = 1;
/// The part of the header that the checksum covers.
const CHECKED_HEADER_BYTES: usize = 8;
const READ_CHUNK_BYTES: usize = 64 << 10;
const SNAPSHOT_CHUNK_BYTES: usize = 1 << 20;

/// What can go wrong on a stream of messages.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The socket or file failed.
    #[error("Reading or writing messages failed")]
    Io(#[source] io::Error),
    /// The peer is something else altogether.
    #[error("The peer does not speak this protocol: it starts with {}", found.escape_ascii())]
    Magic {
        /// Its first bytes.
        found: [u8; 8],
    },
    /// The peer is of another version.
    #[error("The peer speaks protocol version {peer}, this monitor speaks {own}")]
    Version {
        /// The peer's version.
        peer: u32,
        /// [`PROTOCOL_VERSION`]
        own: u32,
    },
    /// The stream ends inside a frame.
    #[error("The stream ends inside a frame, after {len_bytes} of its bytes")]
    Truncated {
        /// The bytes of the frame that are there.
        len_bytes: usize,
    },
    /// A frame has a kind that does not exist.
    #[error("The frame kind {kind} is not known")]
    UnknownKind {
        /// The kind found.
        kind: u8,
    },
    /// A frame has another layout.
    #[error("The frame has version {found}, this monitor knows {FRAME_VERSION}")]
    FrameVersion {
        /// The version found.
        found: u8,
    },
    /// A reserved field is in use.
    #[error("The reserved field of a frame is {found:#06x}, it must be 0")]
    Reserved {
        /// The value found.
        found: u16,
    },
    /// A payload is over [`MAX_MESSAGE_BYTES`].
    #[error("A {} message has {len_bytes} bytes, the limit is {MAX_MESSAGE_BYTES}", kind.name())]
    TooLong {
        /// The message.
        kind: MessageKind,
        /// Its length.
        len_bytes: usize,
    },
    /// A frame was changed on its way.
    #[error("A {} message is damaged: its checksum is {computed:#010x}, its frame says {stored:#010x}", kind.name())]
    Checksum {
        /// The message.
        kind: MessageKind,
        /// What the bytes give.
        computed: u32,
        /// What the header says.
        stored: u32,
    },
    /// A whole frame does not hold a valid message, or a message has no valid form.
    #[error("A {} message is not valid", kind.name())]
    Payload {
        /// The message.
        kind: MessageKind,
        /// What is wrong with it.
        #[source]
        source: LogError,
    },
    /// A valid message at the wrong moment.
    #[error("Expected {expected}, found {found}")]
    Unexpected {
        /// What may come.
        expected: &'static str,
        /// What came.
        found: &'static str,
    },
}

impl StreamError {
    /// True if the stream only had nothing to read yet (a read timeout, a non-blocking socket).
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Io(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
    }
}

/// Magic and version of a connection; what follows them is in `channel.rs`.
pub(crate) fn preamble() -> [u8; PREAMBLE_BYTES] {
    header(LINK_MAGIC, PROTOCOL_VERSION)
}

/// Checks that the peer speaks this version.
pub(crate) fn check_preamble(mut bytes: &[u8]) -> Result<(), StreamError> {
    let (magic, version) = read_header(&mut bytes).map_err(StreamError::Io)?;
    if magic != LINK_MAGIC {
        return Err(StreamError::Magic { found: magic });
    }
    if version != PROTOCOL_VERSION {
        return Err(StreamError::Version { peer: version, own: PROTOCOL_VERSION });
    }
    Ok(())
}

/// Magic and version, as every stream and file starts.
pub(crate) fn header(magic: [u8; 8], version: u32) -> [u8; PREAMBLE_BYTES] {
    let mut bytes = [0; PREAMBLE_BYTES];
    bytes[..8].copy_from_slice(&magic);
    bytes[8..].copy_from_slice(&version.to_le_bytes());
    bytes
}

pub(crate) fn read_header(input: &mut impl Read) -> io::Result<([u8; 8], u32)> {
    let mut magic = [0; 8];
    let mut version = [0; 4];
    input.read_exact(&mut magic)?;
    input.read_exact(&mut version)?;
    Ok((magic, u32::from_le_bytes(version)))
}

/// Writes messages, each with one call of `write` unless the stream takes less at a time.
#[derive(Debug)]
pub struct FrameWriter<W> {
    out: W,
    frame: Vec<u8>,
    snapshot_open: bool,
}

impl<W: Write> FrameWriter<W> {
    /// A writer behind whatever `out` already holds.
    pub fn new(out: W) -> Self {
        Self { out, frame: Vec::new(), snapshot_open: false }
    }

    /// Writes `message`.
    ///
    /// # Errors
    /// A message over a limit (nothing is written), or the stream's error (the stream is then broken).
    pub fn send(&mut self, message: &Message) -> Result<(), StreamError> {
        let kind = message.kind();
        let is_behind_snapshot = |message: &Message| {
            matches!(message, Message::Batch(_) | Message::Bye { reason: ByeReason::RecordingEnd, .. })
        };
        if self.snapshot_open && is_behind_snapshot(message) {
            return Err(StreamError::Unexpected { expected: "the end of the snapshot", found: kind.name() });
        }
        self.begin(kind);
        message.put_payload(&mut self.frame).map_err(|source| StreamError::Payload { kind, source })?;
        self.finish(kind)
    }

    /// Starts a snapshot; no batch can be sent until it is finished.
    pub fn snapshot(&mut self) -> SnapshotSink<'_, W> {
        self.snapshot_open = true;
        SnapshotSink { chunk: Vec::with_capacity(SNAPSHOT_CHUNK_BYTES), frames: self }
    }

    /// A stream that must hold a snapshot before anything that belongs behind one.
    pub(crate) fn with_snapshot_due(out: W) -> Self {
        Self { snapshot_open: true, ..Self::new(out) }
    }

    /// The stream.
    pub fn get_ref(&self) -> &W {
        &self.out
    }

    fn send_chunk(&mut self, chunk: &[u8]) -> Result<(), StreamError> {
        self.begin(MessageKind::Snapshot);
        self.frame.extend_from_slice(chunk);
        self.finish(MessageKind::Snapshot)
    }

    fn begin(&mut self, kind: MessageKind) {
        self.frame.clear();
        self.frame.extend_from_slice(&[kind as u8, FRAME_VERSION, 0, 0]);
        self.frame.resize(FRAME_HEADER_BYTES, 0);
    }

    fn finish(&mut self, kind: MessageKind) -> Result<(), StreamError> {
        let len_bytes = self.frame.len() - FRAME_HEADER_BYTES;
        if len_bytes > MAX_MESSAGE_BYTES {
            return Err(StreamError::TooLong { kind, len_bytes });
        }
        self.frame[4..8].copy_from_slice(&(len_bytes as u32).to_le_bytes());
        let crc = frame_crc(&self.frame);
        self.frame[8..12].copy_from_slice(&crc.to_le_bytes());
        self.out.write_all(&self.frame).map_err(StreamError::Io)
    }
}

fn frame_crc(frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame[..CHECKED_HEADER_BYTES]);
    crc.update(&frame[FRAME_HEADER_BYTES..]);
    crc.finalize()
}

/// Finds messages in bytes that come in pieces of any size. Does no I/O.
///
/// A message that is refused stays at the front, so that the error is given again.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    bytes: Vec<u8>,
    /// Where the first frame that was not handed out starts.
    start: usize,
}

impl FrameDecoder {
    /// Adds the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next message, or `None` until more bytes are fed.
    ///
    /// # Errors
    /// Bytes that are not a frame with a valid message. The header is judged before the payload is there.
    pub fn next_message(&mut self) -> Result<Option<Message>, StreamError> {
        let rest = &self.bytes[self.start..];
        let Some(header) = rest.first_chunk::<FRAME_HEADER_BYTES>() else { return Ok(None) };
        let (kind, len_bytes, stored) = check_header(header)?;
        let Some(frame) = rest.get(..FRAME_HEADER_BYTES + len_bytes) else { return Ok(None) };
        let computed = frame_crc(frame);
        if computed != stored {
            return Err(StreamError::Checksum { kind, computed, stored });
        }
        let message = Message::from_payload(kind, &frame[FRAME_HEADER_BYTES..])
            .map_err(|source| StreamError::Payload { kind, source })?;
        self.start += frame.len();
        Ok(Some(message))
    }

    /// Bytes that were fed and are not yet part of a message.
    pub fn pending_bytes(&self) -> usize {
        self.bytes.len() - self.start
    }
}

/// Kind, payload length and checksum of a frame.
fn check_header(header: &[u8; FRAME_HEADER_BYTES]) -> Result<(MessageKind, usize, u32), StreamError> {
    let [kind, version, r0, r1, l0, l1, l2, l3, c0, c1, c2, c3] = *header;
    let kind = MessageKind::from_tag(kind).ok_or(StreamError::UnknownKind { kind })?;
    if version != FRAME_VERSION {
        return Err(StreamError::FrameVersion { found: version });
    }
    let reserved = u16::from_le_bytes([r0, r1]);
    if reserved != 0 {
        return Err(StreamError::Reserved { found: reserved });
    }
    let len_bytes = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if len_bytes > MAX_MESSAGE_BYTES {
        return Err(StreamError::TooLong { kind, len_bytes });
    }
    Ok((kind, len_bytes, u32::from_le_bytes([c0, c1, c2, c3])))
}

/// Reads messages.
#[derive(Debug)]
pub struct FrameReader<R> {
    input: R,
    decoder: FrameDecoder,
    chunk: Box<[u8]>,
}

impl<R: Read> FrameReader<R> {
    /// A reader of the messages that start at `input`'s next byte. It may read ahead.
    pub fn new(input: R) -> Self {
        let chunk = vec![0; READ_CHUNK_BYTES].into_boxed_slice();
        Self { input, decoder: FrameDecoder::default(), chunk }
    }

    /// The next message, or `None` if the stream ends between two frames.
    ///
    /// # Errors
    /// [`StreamError::Truncated`] if the stream ends inside a frame. If [`StreamError::is_timeout`], what
    /// came so far is kept and the call can be repeated.
    pub fn receive(&mut self) -> Result<Option<Message>, StreamError> {
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(Some(message));
            }
            match self.input.read(&mut self.chunk) {
                Ok(0) if self.decoder.pending_bytes() == 0 => return Ok(None),
                Ok(0) => return Err(StreamError::Truncated { len_bytes: self.decoder.pending_bytes() }),
                Ok(len_bytes) => self.decoder.feed(&self.chunk[..len_bytes]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StreamError::Io(error)),
            }
        }
    }

    /// Expects a snapshot: its bytes come out of the returned reader.
    pub fn snapshot(&mut self) -> SnapshotSource<'_, R> {
        SnapshotSource { frames: self, chunk: Vec::new(), taken: 0, ended: false }
    }

    /// The stream.
    pub fn get_ref(&self) -> &R {
        &self.input
    }

    /// The stream.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }
}

/// Sends the bytes written to it as [`Message::Snapshot`] messages of 1 MiB.
///
/// States: open until [`SnapshotSink::finish`]. Dropped before that, the snapshot stays open and the
/// [`FrameWriter`] refuses to send a batch behind it.
#[derive(Debug)]
pub struct SnapshotSink<'a, W> {
    frames: &'a mut FrameWriter<W>,
    chunk: Vec<u8>,
}

impl<W: Write> SnapshotSink<'_, W> {
    /// Sends what is left, then [`Message::SnapshotEnd`].
    ///
    /// # Errors
    /// The stream's error.
    pub fn finish(mut self) -> Result<(), StreamError> {
        self.send_chunk()?;
        self.frames.send(&Message::SnapshotEnd)?;
        self.frames.snapshot_open = false;
        Ok(())
    }

    fn send_chunk(&mut self) -> Result<(), StreamError> {
        if !self.chunk.is_empty() {
            self.frames.send_chunk(&self.chunk)?;
            self.chunk.clear();
        }
        Ok(())
    }
}

impl<W: Write> Write for SnapshotSink<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.len() == SNAPSHOT_CHUNK_BYTES {
            self.send_chunk().map_err(into_io)?;
        }
        let len = bytes.len().min(SNAPSHOT_CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_chunk().map_err(into_io)
    }
}

/// Reads the bytes of [`Message::Snapshot`] messages; ends at [`Message::SnapshotEnd`].
///
/// A read timeout of the stream comes out as an `io::Error` of its kind. [`crate::SnapshotReader`] cannot go on
/// behind one, so a timeout here should be long enough to mean that the peer is gone.
#[derive(Debug)]
pub struct SnapshotSource<'a, R> {
    frames: &'a mut FrameReader<R>,
    chunk: Vec<u8>,
    taken: usize,
    ended: bool,
}

impl<R: Read> SnapshotSource<'_, R> {
    /// Gets a chunk that is not empty, unless the snapshot has ended.
    fn refill(&mut self) -> Result<(), StreamError> {
        const EXPECTED: &str = "a piece of the snapshot";
        while self.taken == self.chunk.len() && !self.ended {
            match self.frames.receive()? {
                Some(Message::Snapshot(chunk)) => (self.chunk, self.taken) = (chunk, 0),
                Some(Message::SnapshotEnd) => self.ended = true,
                Some(Message::Bye { text, .. }) => {
                    return Err(StreamError::Io(io::Error::other(format!(
                        "the peer broke the snapshot off: {text}"
                    ))));
                }
                Some(other) => {
                    return Err(StreamError::Unexpected { expected: EXPECTED, found: other.kind().name() });
                }
                None => {
                    return Err(StreamError::Unexpected {
                        expected: EXPECTED,
                        found: "the end of the stream",
                    });
                }
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for SnapshotSource<'_, R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.refill().map_err(into_io)?;
        let rest = &self.chunk[self.taken..];
        let len = bytes.len().min(rest.len());
        bytes[..len].copy_from_slice(&rest[..len]);
        self.taken += len;
        Ok(len)
    }
}

/// `Read` and `Write` can give only an `io::Error`; the kind of the stream's own error is kept.
fn into_io(error: StreamError) -> io::Error {
    match error {
        StreamError::Io(error) => error,
        other => io::Error::other(other),
    }
}
