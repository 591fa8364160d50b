//! How entries are stored: [`Encoder`] and [`Decoder`] together, so that neither changes alone.
//!
//! Owns: the byte form of [`Entry`]. Must never: do I/O, or accept a second form of the same entry.
//!
//! ```text
//! head varint   bit 0 = 0: Clock; bits 1..=3 = unlogged reads before it, bits 4.. = ticks since the
//!                          previous time; if bits 1..=3 are all set: varint unlogged reads - 7 follows
//!               bit 0 = 1: bits 1..=4 = tag, bits 5.. = anchors since the previous anchor; then by tag
//!                 1 Tick         varint ticks since the previous time
//!                 2 Frame        varint length, bytes
//!                 3 DiskDone     varint id, u8 status, varint length, bytes
//!                 4 Console      varint length, bytes
//!                 5 Entropy      varint length, bytes
//!                 6 PowerButton
//!                 7 Check        u32 digest
//!                 8 End          u64 registers, u64 memory, u64 devices
//!                 9 Stop         position, see `position.rs`
//! ```
//!
//! States of both: open (any entry) until an `End`, then ended (no entry). An entry that is refused leaves
//! the state, the output and the input as they were.
//!
//! A clock read within 0.28 ms of the previous one takes 2 bytes, within 36 ms 3 bytes.

use crate::digest::StateDigest;
use crate::error::LogError;
use crate::event::{
    DiskStatus, Event, GuestTime, MAX_CONSOLE_BYTES, MAX_DISK_BYTES, MAX_ENTROPY_BYTES, MAX_FRAME_BYTES,
};
use crate::fields::{check_len, get_bytes, get_u8, get_u32, get_u64, get_varint, put_bytes, put_varint};
use crate::position::{REGISTERS, Registers, get_position, put_position};
use crate::record::{Cursor, Entry};

const TAG_TICK: u8 = 1;
const TAG_FRAME: u8 = 2;
const TAG_DISK_DONE: u8 = 3;
const TAG_CONSOLE: u8 = 4;
const TAG_ENTROPY: u8 = 5;
const TAG_POWER_BUTTON: u8 = 6;
const TAG_CHECK: u8 = 7;
const TAG_END: u8 = 8;
const TAG_STOP: u8 = 9;

const TAG_BITS: u32 = 4;
const ANCHOR_SHIFT: u32 = 1 + TAG_BITS;

/// Unlogged reads that do not fit into a Clock's head are one number of their own.
const UNLOGGED_MANY: u64 = 7;
const CLOCK_SHIFT: u32 = 4;

const FRAME: &str = "Ethernet frame";
const DISK: &str = "disk data";
const CONSOLE: &str = "console input";
const ENTROPY: &str = "entropy";

/// Most bytes that one entry takes: a disk read of [`MAX_DISK_BYTES`] with the longest head (10), id (10),
/// status (1) and length (4).
pub const MAX_ENTRY_BYTES: usize = MAX_DISK_BYTES + 25;

/// Turns entries into bytes, in order.
#[derive(Debug)]
pub struct Encoder {
    cursor: Cursor,
    registers: Registers,
    ended: bool,
    out: Vec<u8>,
}

impl Encoder {
    /// An encoder whose first entry is relative to `start`.
    pub fn new(start: Cursor) -> Self {
        Self { cursor: start, registers: [0; REGISTERS.len()], ended: false, out: Vec::new() }
    }

    /// Appends `entry`. On an error nothing is appended and the encoder can go on.
    ///
    /// # Errors
    /// A time or anchor that goes back or leaps too far, data over its limit, an entry behind the end.
    #[inline]
    pub fn push(&mut self, entry: &Entry) -> Result<(), LogError> {
        if self.ended {
            return Err(LogError::AfterEnd { anchor: self.cursor.anchor });
        }
        match entry {
            Entry::Clock { unlogged, now } => {
                let delta = self.ticks_to(*now)?;
                if delta > u64::MAX >> CLOCK_SHIFT {
                    return Err(LogError::Overflow { what: "clock delta" });
                }
                put_varint(&mut self.out, delta << CLOCK_SHIFT | (*unlogged).min(UNLOGGED_MANY) << 1);
                if let Some(more) = unlogged.checked_sub(UNLOGGED_MANY) {
                    put_varint(&mut self.out, more);
                }
                self.cursor.time = *now;
            }
            Entry::Event { anchor, event } => self.push_event(*anchor, event)?,
            Entry::Check { anchor, digest } => {
                self.put_head(TAG_CHECK, *anchor)?;
                self.out.extend_from_slice(&digest.to_le_bytes());
            }
            Entry::Stop { anchor, position } => {
                self.put_head(TAG_STOP, *anchor)?;
                put_position(&mut self.out, &mut self.registers, position);
            }
            Entry::End { anchor, digest } => {
                self.put_head(TAG_END, *anchor)?;
                for part in [digest.registers, digest.memory, digest.devices] {
                    self.out.extend_from_slice(&part.to_le_bytes());
                }
                self.ended = true;
            }
        }
        Ok(())
    }

    fn push_event(&mut self, anchor: u64, event: &Event) -> Result<(), LogError> {
        match event {
            Event::Tick { now } => {
                let delta = self.ticks_to(*now)?;
                self.put_head(TAG_TICK, anchor)?;
                put_varint(&mut self.out, delta);
                self.cursor.time = *now;
                Ok(())
            }
            Event::Frame { data } => self.put_data(TAG_FRAME, anchor, FRAME, data, MAX_FRAME_BYTES),
            Event::DiskDone { id, status, data } => {
                check_len(DISK, data.len() as u64, MAX_DISK_BYTES)?;
                self.put_head(TAG_DISK_DONE, anchor)?;
                put_varint(&mut self.out, *id);
                self.out.push(*status as u8);
                put_bytes(&mut self.out, DISK, data, MAX_DISK_BYTES)
            }
            Event::Console { data } => self.put_data(TAG_CONSOLE, anchor, CONSOLE, data, MAX_CONSOLE_BYTES),
            Event::Entropy { data } => self.put_data(TAG_ENTROPY, anchor, ENTROPY, data, MAX_ENTROPY_BYTES),
            Event::PowerButton => self.put_head(TAG_POWER_BUTTON, anchor),
        }
    }

    fn put_data(
        &mut self,
        tag: u8,
        anchor: u64,
        what: &'static str,
        data: &[u8],
        limit_bytes: usize,
    ) -> Result<(), LogError> {
        check_len(what, data.len() as u64, limit_bytes)?;
        self.put_head(tag, anchor)?;
        put_bytes(&mut self.out, what, data, limit_bytes)
    }

    /// The last thing that may fail for an entry, so that a refused entry leaves no bytes behind.
    fn put_head(&mut self, tag: u8, anchor: u64) -> Result<(), LogError> {
        let previous = self.cursor.anchor;
        let delta =
            anchor.checked_sub(previous).ok_or(LogError::AnchorWentBack { previous, next: anchor })?;
        if delta > u64::MAX >> ANCHOR_SHIFT {
            return Err(LogError::Overflow { what: "anchor delta" });
        }
        put_varint(&mut self.out, delta << ANCHOR_SHIFT | u64::from(tag) << 1 | 1);
        self.cursor.anchor = anchor;
        Ok(())
    }

    fn ticks_to(&self, now: GuestTime) -> Result<u64, LogError> {
        let previous = self.cursor.time.0;
        now.0.checked_sub(previous).ok_or(LogError::TimeWentBack { previous, next: now.0 })
    }

    /// Bytes appended since the last [`Encoder::take`].
    pub fn len_bytes(&self) -> usize {
        self.out.len()
    }

    /// True if nothing was appended since the last [`Encoder::take`].
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// True if one more entry might make the bytes too long for one batch: take them first.
    pub fn is_full(&self) -> bool {
        self.out.len() + MAX_ENTRY_BYTES > crate::message::MAX_BATCH_ENTRIES_BYTES
    }

    /// Hands out the bytes since the last call. The next entry continues behind them.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// What the next entry is relative to.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }
}

/// Turns bytes back into entries, in order.
#[derive(Debug)]
pub struct Decoder {
    cursor: Cursor,
    registers: Registers,
    ended: bool,
}

impl Decoder {
    /// A decoder whose first entry is relative to `start`.
    pub fn new(start: Cursor) -> Self {
        Self { cursor: start, registers: [0; REGISTERS.len()], ended: false }
    }

    /// Takes the next entry off `input`, which holds whole entries. `None` if `input` is empty.
    ///
    /// # Errors
    /// Bytes that no [`Encoder`] in the same state would have written.
    pub fn next(&mut self, input: &mut &[u8]) -> Result<Option<Entry>, LogError> {
        if input.is_empty() {
            return Ok(None);
        }
        if self.ended {
            return Err(LogError::AfterEnd { anchor: self.cursor.anchor });
        }
        let mut rest = *input;
        let (mut cursor, mut registers) = (self.cursor, self.registers);
        let head = get_varint(&mut rest, "entry head")?;
        let entry = if head & 1 == 0 {
            cursor.time = later(cursor.time, head >> CLOCK_SHIFT)?;
            let mut unlogged = head >> 1 & UNLOGGED_MANY;
            if unlogged == UNLOGGED_MANY {
                let more = get_varint(&mut rest, "unlogged clock reads")?;
                unlogged =
                    more.checked_add(unlogged).ok_or(LogError::Overflow { what: "unlogged clock reads" })?;
            }
            Entry::Clock { unlogged, now: cursor.time }
        } else {
            cursor.anchor = cursor
                .anchor
                .checked_add(head >> ANCHOR_SHIFT)
                .ok_or(LogError::Overflow { what: "anchor" })?;
            let tag = (head >> 1) as u8 & ((1 << TAG_BITS) - 1);
            get_tagged(tag, &mut cursor, &mut registers, &mut rest)?
        };
        (self.cursor, self.registers) = (cursor, registers);
        self.ended = matches!(entry, Entry::End { .. });
        *input = rest;
        Ok(Some(entry))
    }

    /// What the next entry is relative to. A backup that takes over encodes from here.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }
}

fn get_tagged(
    tag: u8,
    cursor: &mut Cursor,
    registers: &mut Registers,
    input: &mut &[u8],
) -> Result<Entry, LogError> {
    let anchor = cursor.anchor;
    let event = match tag {
        TAG_TICK => {
            let delta = get_varint(input, "tick delta")?;
            cursor.time = later(cursor.time, delta)?;
            Event::Tick { now: cursor.time }
        }
        TAG_FRAME => Event::Frame { data: get_bytes(input, FRAME, MAX_FRAME_BYTES)?.to_vec() },
        TAG_DISK_DONE => Event::DiskDone {
            id: get_varint(input, "disk request id")?,
            status: get_status(input)?,
            data: get_bytes(input, DISK, MAX_DISK_BYTES)?.to_vec(),
        },
        TAG_CONSOLE => Event::Console { data: get_bytes(input, CONSOLE, MAX_CONSOLE_BYTES)?.to_vec() },
        TAG_ENTROPY => Event::Entropy { data: get_bytes(input, ENTROPY, MAX_ENTROPY_BYTES)?.to_vec() },
        TAG_POWER_BUTTON => Event::PowerButton,
        TAG_CHECK => return Ok(Entry::Check { anchor, digest: get_u32(input, "register digest")? }),
        TAG_STOP => return Ok(Entry::Stop { anchor, position: get_position(input, registers)? }),
        TAG_END => {
            let digest = StateDigest {
                registers: get_u64(input, "digest of registers")?,
                memory: get_u64(input, "digest of memory")?,
                devices: get_u64(input, "digest of devices")?,
            };
            return Ok(Entry::End { anchor, digest });
        }
        tag => return Err(LogError::UnknownTag { what: "entry tag", tag }),
    };
    Ok(Entry::Event { anchor, event })
}

fn get_status(input: &mut &[u8]) -> Result<DiskStatus, LogError> {
    match get_u8(input, "disk status")? {
        tag if tag == DiskStatus::Ok as u8 => Ok(DiskStatus::Ok),
        tag if tag == DiskStatus::IoError as u8 => Ok(DiskStatus::IoError),
        tag => Err(LogError::UnknownTag { what: "disk status", tag }),
    }
}

fn later(time: GuestTime, delta: u64) -> Result<GuestTime, LogError> {
    time.0.checked_add(delta).map(GuestTime).ok_or(LogError::Overflow { what: "guest time" })
}
