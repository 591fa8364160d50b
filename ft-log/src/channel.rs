//! A connection that nobody else can read, change or take part in: opening, handshake, records.
//!
//! Owns: what goes before the first message, and what is around the messages' bytes. Must never: open a socket, wait
//! on a clock, go on without a key when one side has one, or hand out a byte that was not authenticated.
//!
//! ```text
//! initiator (backup)                        responder (primary)
//!   opening                       <->         opening                 "VMFTLINK" | version u32 | security u8 | 0 u8 x 3
//!     security 1 on both sides: messages follow as they are
//!     security 2 on both sides:
//!   48 bytes: psk, e               ->
//!                                 <-          answer u8: 1 and 48 bytes: e, ee;  or 2: another key, and the end
//!   record, record ..             <->         record, record ..       len u16 (17 to 65,535) | ciphertext and tag
//! ```
//!
//! The handshake is `Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s` (noiseprotocol.org): both sides show that they hold the
//! secret, agree on keys of this connection only, and give both openings as its prologue, so that a changed one is
//! noticed. What was recorded cannot be read later by somebody who gets the secret then. A replayed first message gets
//! an answer of which its sender can make nothing.
//!
//! Each direction has its own key, and its records are numbered (the number is the nonce, and is not sent): a record
//! that was changed, left out, repeated or moved does not open, and nothing behind it is read. The number has 64 bits
//! and the cipher is good for all of them, so keys are not renewed while a connection lasts.
//!
//! Not covered: that the connection ends. Whoever can forge TCP's packets can end it, at any byte; see
//! `docs/protocol.md`. How much is sent when can be seen too.

use std::io::{self, Read, Write};
use std::sync::Arc;

use snow::{Builder, HandshakeState, StatelessTransportState};
use thiserror::Error;

use crate::key::{Key, SealKey};
use crate::stream::{PREAMBLE_BYTES, StreamError, check_preamble, preamble};

/// Bytes that each side sends first.
pub const OPENING_BYTES: usize = PREAMBLE_BYTES + 4;
/// Longest record, without its length.
const MAX_RECORD_BYTES: usize = 65_535;
const TAG_BYTES: usize = 16;
/// Most bytes of messages in one record.
const MAX_CONTENT_BYTES: usize = MAX_RECORD_BYTES - TAG_BYTES;
const LEN_BYTES: usize = 2;
/// Both messages of the handshake: a public key and the tag of nothing.
const HANDSHAKE_BYTES: usize = 48;
/// What one read takes in at most.
const READ_BYTES: usize = 2 * (LEN_BYTES + MAX_RECORD_BYTES);

const NOISE: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const PSK_LOCATION: u8 = 0;

const SECURITY_NONE: u8 = 1;
const SECURITY_KEY: u8 = 2;
const ANSWER_SAME_KEY: u8 = 1;
const ANSWER_OTHER_KEY: u8 = 2;

/// What [`Key::derive`] is asked for, and [`Key::seal_key`].
const LOG: &str = "log";
const HEARTBEAT: &str = "heartbeat";

const WHAT_TO_DO: &str = "start both monitors with --key-file and copies of one file";

/// Why there is no connection that both sides trust.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The socket, or a peer of another kind or version.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// An opening that this version does not know.
    #[error("The peer's opening is not valid: its last bytes are {found:02x?}")]
    Opening {
        /// What follows the version.
        found: Vec<u8>,
    },
    /// A key on this side only.
    #[error("This monitor has a key and the peer has none: {WHAT_TO_DO}")]
    OnlyHere,
    /// A key on the other side only.
    #[error("The peer has a key and this monitor has none: {WHAT_TO_DO}")]
    OnlyThere,
    /// Two keys, or somebody who has none and says otherwise.
    #[error("The peer does not have the key that this monitor has: {WHAT_TO_DO}")]
    OtherKey,
    /// An answer that this version does not know.
    #[error("The peer answers the handshake with {found}, which means nothing")]
    Answer {
        /// The byte found.
        found: u8,
    },
    /// The host has no random bytes, or the like.
    #[error("The handshake cannot be made: {reason}")]
    Handshake {
        /// What the library says.
        reason: String,
    },
}

fn io_error(error: io::Error) -> ChannelError {
    StreamError::Io(error).into()
}

fn failed(error: &snow::Error) -> ChannelError {
    ChannelError::Handshake { reason: format!("{error:?}") }
}

/// What a greeted connection has: [`Session::reader`] and [`Session::writer`] once each, and a seal for datagrams.
#[derive(Debug)]
pub struct Session {
    keys: Option<Arc<StatelessTransportState>>,
    heartbeats: SealKey,
}

impl Session {
    /// The backup's part: greets the primary at the other end. `key` is the secret, or `None` to talk in the open.
    ///
    /// # Errors
    /// A peer of another version, without a key, with another one; or the stream's error.
    pub fn initiate(
        input: &mut impl Read,
        out: &mut impl Write,
        key: Option<&Key>,
        guest: &str,
    ) -> Result<Self, ChannelError> {
        let openings = exchange_openings(input, out, key.is_some())?;
        let Some(key) = key else { return Ok(Self::open(guest)) };
        let mut noise = handshake(key, &openings.initiator_first(true), |noise| noise.build_initiator())?;
        let mut message = [0; HANDSHAKE_BYTES];
        noise.write_message(&[], &mut message).map_err(|error| failed(&error))?;
        out.write_all(&message).map_err(io_error)?;
        let mut answer = [0];
        input.read_exact(&mut answer).map_err(io_error)?;
        match answer {
            [ANSWER_SAME_KEY] => {}
            [ANSWER_OTHER_KEY] => return Err(ChannelError::OtherKey),
            [found] => return Err(ChannelError::Answer { found }),
        }
        input.read_exact(&mut message).map_err(io_error)?;
        noise.read_message(&message, &mut []).map_err(|_| ChannelError::OtherKey)?;
        Self::sealed(noise, key, guest)
    }

    /// The primary's part: greets whoever has connected. Nobody without the key is believed anything.
    ///
    /// # Errors
    /// As [`Session::initiate`]. A peer with another key has been told.
    pub fn respond(
        input: &mut impl Read,
        out: &mut impl Write,
        key: Option<&Key>,
        guest: &str,
    ) -> Result<Self, ChannelError> {
        let openings = exchange_openings(input, out, key.is_some())?;
        let Some(key) = key else { return Ok(Self::open(guest)) };
        let mut noise = handshake(key, &openings.initiator_first(false), |noise| noise.build_responder())?;
        let mut message = [0; HANDSHAKE_BYTES];
        input.read_exact(&mut message).map_err(io_error)?;
        if noise.read_message(&message, &mut []).is_err() {
            out.write_all(&[ANSWER_OTHER_KEY]).map_err(io_error)?;
            return Err(ChannelError::OtherKey);
        }
        let mut answer = [ANSWER_SAME_KEY; 1 + HANDSHAKE_BYTES];
        noise.write_message(&[], &mut answer[1..]).map_err(|error| failed(&error))?;
        out.write_all(&answer).map_err(io_error)?;
        Self::sealed(noise, key, guest)
    }

    fn open(guest: &str) -> Self {
        Self { keys: None, heartbeats: SealKey::without_secret(HEARTBEAT, &[guest.as_bytes()]) }
    }

    fn sealed(noise: HandshakeState, key: &Key, guest: &str) -> Result<Self, ChannelError> {
        // The hash is of this connection alone: both sides have put random bytes into it.
        let heartbeats = key.seal_key(HEARTBEAT, &[noise.get_handshake_hash(), guest.as_bytes()]);
        let keys = noise.into_stateless_transport_mode().map_err(|error| failed(&error))?;
        Ok(Self { keys: Some(Arc::new(keys)), heartbeats })
    }

    /// Seals the datagrams that belong to this connection: those of an earlier one do not open.
    pub fn heartbeat_key(&self) -> &SealKey {
        &self.heartbeats
    }

    /// Both directions, each for a thread of its own.
    pub fn split<R, W>(self, input: R, out: W) -> (ChannelReader<R>, ChannelWriter<W>) {
        let opening = self.keys.clone().map(Opening::new);
        let sealing = self.keys.map(Sealing::new);
        (ChannelReader { input, opening }, ChannelWriter { out, sealing })
    }
}

/// What both sides have sent first.
struct Openings {
    own: [u8; OPENING_BYTES],
    peer: [u8; OPENING_BYTES],
}

impl Openings {
    fn initiator_first(&self, own_is_initiator: bool) -> [u8; 2 * OPENING_BYTES] {
        let (first, second) = if own_is_initiator { (self.own, self.peer) } else { (self.peer, self.own) };
        let mut both = [0; 2 * OPENING_BYTES];
        both[..OPENING_BYTES].copy_from_slice(&first);
        both[OPENING_BYTES..].copy_from_slice(&second);
        both
    }
}

/// Sends an opening, reads the peer's, and goes on only if either both have a key or none has.
fn exchange_openings(
    input: &mut impl Read,
    out: &mut impl Write,
    has_key: bool,
) -> Result<Openings, ChannelError> {
    let security = if has_key { SECURITY_KEY } else { SECURITY_NONE };
    let mut own = [0; OPENING_BYTES];
    own[..PREAMBLE_BYTES].copy_from_slice(&preamble());
    own[PREAMBLE_BYTES] = security;
    out.write_all(&own).map_err(io_error)?;
    let mut peer = [0; OPENING_BYTES];
    let (start, rest) = peer.split_at_mut(PREAMBLE_BYTES);
    input.read_exact(start).map_err(io_error)?;
    check_preamble(start)?;
    // Only now: another version may have nothing there.
    input.read_exact(rest).map_err(io_error)?;
    match (&*rest, has_key) {
        ([SECURITY_NONE, 0, 0, 0], false) | ([SECURITY_KEY, 0, 0, 0], true) => Ok(Openings { own, peer }),
        ([SECURITY_NONE, 0, 0, 0], true) => Err(ChannelError::OnlyHere),
        ([SECURITY_KEY, 0, 0, 0], false) => Err(ChannelError::OnlyThere),
        (found, _) => Err(ChannelError::Opening { found: found.to_vec() }),
    }
}

fn handshake(
    key: &Key,
    prologue: &[u8],
    build: impl FnOnce(Builder<'_>) -> Result<HandshakeState, snow::Error>,
) -> Result<HandshakeState, ChannelError> {
    let psk = key.derive(LOG, &[]);
    NOISE
        .parse()
        .and_then(|parameters| Builder::new(parameters).prologue(prologue)?.psk(PSK_LOCATION, &psk))
        .and_then(build)
        .map_err(|error| failed(&error))
}

/// Puts bytes into records. Without keys, passes them on.
#[derive(Debug)]
pub struct ChannelWriter<W> {
    out: W,
    sealing: Option<Sealing>,
}

#[derive(Debug)]
struct Sealing {
    keys: Arc<StatelessTransportState>,
    next: u64,
    record: Box<[u8]>,
}

impl Sealing {
    fn new(keys: Arc<StatelessTransportState>) -> Self {
        Self { keys, next: 0, record: vec![0; LEN_BYTES + MAX_RECORD_BYTES].into_boxed_slice() }
    }

    /// The next record; it holds `content`, at most [`MAX_CONTENT_BYTES`].
    fn seal(&mut self, content: &[u8]) -> io::Result<&[u8]> {
        let (len, body) = self.record.split_at_mut(LEN_BYTES);
        let len_bytes = self
            .keys
            .write_message(self.next, content, body)
            .map_err(|error| io::Error::other(format!("a record cannot be sealed: {error:?}")))?;
        // Whether it gets there or not: no number is used for two contents.
        self.next += 1;
        len.copy_from_slice(&(len_bytes as u16).to_le_bytes());
        Ok(&self.record[..LEN_BYTES + len_bytes])
    }
}

impl<W> ChannelWriter<W> {
    /// The same direction over `wrap`'s stream.
    pub fn map<V>(self, wrap: impl FnOnce(W) -> V) -> ChannelWriter<V> {
        ChannelWriter { out: wrap(self.out), sealing: self.sealing }
    }
}

impl<W: Write> Write for ChannelWriter<W> {
    /// Behind an error the stream is of no use, even if it was a timeout: a part of a record may have been sent.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(sealing) = &mut self.sealing else { return self.out.write(bytes) };
        if bytes.is_empty() {
            return Ok(0);
        }
        let content = &bytes[..bytes.len().min(MAX_CONTENT_BYTES)];
        self.out.write_all(sealing.seal(content)?)?;
        Ok(content.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Takes bytes out of records. Without keys, passes them on.
#[derive(Debug)]
pub struct ChannelReader<R> {
    input: R,
    opening: Option<Opening>,
}

#[derive(Debug)]
struct Opening {
    keys: Arc<StatelessTransportState>,
    next: u64,
    /// What was read and is not opened yet is `raw[start..end]`.
    raw: Box<[u8]>,
    start: usize,
    end: usize,
    /// What was opened and is not handed out yet is `content[taken..len]`.
    content: Box<[u8]>,
    taken: usize,
    len: usize,
}

impl Opening {
    fn new(keys: Arc<StatelessTransportState>) -> Self {
        let raw = vec![0; READ_BYTES].into_boxed_slice();
        let content = vec![0; MAX_CONTENT_BYTES].into_boxed_slice();
        Self { keys, next: 0, raw, start: 0, end: 0, content, taken: 0, len: 0 }
    }

    fn hand_out(&mut self, bytes: &mut [u8]) -> usize {
        let len = bytes.len().min(self.len - self.taken);
        bytes[..len].copy_from_slice(&self.content[self.taken..self.taken + len]);
        self.taken += len;
        len
    }

    /// Opens the first record, if it is there as a whole.
    fn open(&mut self) -> io::Result<bool> {
        let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let read = &self.raw[self.start..self.end];
        let Some((len, rest)) = read.split_first_chunk::<LEN_BYTES>() else { return Ok(false) };
        let len_bytes = usize::from(u16::from_le_bytes(*len));
        if len_bytes <= TAG_BYTES {
            return Err(invalid(format!("record {} is not valid: it has {len_bytes} bytes", self.next)));
        }
        let Some(record) = rest.get(..len_bytes) else { return Ok(false) };
        self.len = self.keys.read_message(self.next, record, &mut self.content).map_err(|_| {
            invalid(format!("record {} was changed on its way, or is not the next", self.next))
        })?;
        self.next += 1;
        self.taken = 0;
        self.start += LEN_BYTES + len_bytes;
        Ok(true)
    }

    /// Reads more. False: the stream has ended, between two records.
    fn read(&mut self, input: &mut impl Read) -> io::Result<bool> {
        self.raw.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // There is room: a record that is there as a whole has been opened before.
        let len = input.read(&mut self.raw[self.end..])?;
        self.end += len;
        if len == 0 && self.end > 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ends inside a record"));
        }
        Ok(len > 0)
    }
}

impl<R> ChannelReader<R> {
    /// The stream.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }
}

impl<R: Read> Read for ChannelReader<R> {
    /// A record that does not open stays the next one, so that the error is given again.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(opening) = &mut self.opening else { return self.input.read(bytes) };
        while opening.taken == opening.len {
            if !opening.open()? && !opening.read(&mut self.input)? {
                return Ok(0);
            }
        }
        Ok(opening.hand_out(bytes))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

    use super::*;

    /// What is sent in a connection whose ephemeral keys are not random, and then a record of each side.
    fn sent(key: &Key) -> [Vec<u8>; 4] {
        let prologue = [7; 2 * OPENING_BYTES];
        let (backup, primary) = ([1; 32], [2; 32]);
        let mut initiator = handshake(key, &prologue, |noise| {
            noise.fixed_ephemeral_key_for_testing_only(&backup).build_initiator()
        })
        .unwrap();
        let mut responder = handshake(key, &prologue, |noise| {
            noise.fixed_ephemeral_key_for_testing_only(&primary).build_responder()
        })
        .unwrap();
        let (mut question, mut answer) = ([0; HANDSHAKE_BYTES], [0; HANDSHAKE_BYTES]);
        initiator.write_message(&[], &mut question).unwrap();
        responder.read_message(&question, &mut []).unwrap();
        responder.write_message(&[], &mut answer).unwrap();
        initiator.read_message(&answer, &mut []).unwrap();
        let record = |noise, content: &[u8]| {
            let (_, mut writer) = Session::sealed(noise, key, "web").unwrap().split(&b""[..], Vec::new());
            writer.write_all(content).unwrap();
            writer.out
        };
        [
            question.to_vec(),
            answer.to_vec(),
            record(initiator, b"from backup"),
            record(responder, b"from primary"),
        ]
    }

    /// A failure here means that the format changed: then its version, `docs/log-format.md` and the change log change
    /// too, and only then these bytes.
    #[test]
    fn handshake_and_records_have_their_committed_bytes() {
        let key = Key::new(std::array::from_fn(|index| index as u8));
        let digits = |bytes: &Vec<u8>| crate::hex::to_hex(bytes);
        assert_eq!(sent(&key).each_ref().map(digits), GOLDEN);
    }

    const GOLDEN: [&str; 4] = [
        "a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a20995a9f588377ffa512569c835631aacdb",
        "ce8d3ad1ccb633ec7b70c17814a5c76ecd029685050d344745ba05870e587d599b2d6925178727ca8ba5df669f20290c",
        "1b00b7b4bd23e5dcd06e40b7632dcf7a3eba3313e5b7c16f1e7a5dba17",
        "1c0041ccfca663b01d185d9f62d14adea1ceccdc80880b9234be150b5785",
    ];
}
