//! The container of a whole machine: device, vCPU and configuration state, and memory.
//!
//! Owns: the container's bytes, writer and reader together. Must never: know what a payload means, or
//! touch guest memory itself.
//!
//! ```text
//! magic "VMFTSNAP" | version u32 | parts
//! 1 Payload  tag u8 | kind length u8 | kind | version u16 | length u32 | bytes
//! 2 Pages    tag u8 | packing u8 (1 raw, 2 LZ4 block) | pages u8 (1..=64) | reserved u8 = 0 | gpa u64 | length u32 | bytes
//! 3 End      tag u8 | crc32 u32 of all bytes before the crc32; nothing follows
//! ```
//!
//! A page that no part holds is all zero; of one that several hold, the last counts. States: parts in any order, until
//! `End`.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::stream::header;

/// Version of the container.
pub const SNAPSHOT_VERSION: u32 = 1;
/// First bytes of the container.
pub const SNAPSHOT_MAGIC: [u8; 8] = *b"VMFTSNAP";
/// The unit of memory.
pub const PAGE_BYTES: usize = 4_096;
/// Most pages in one part.
pub const MAX_RUN_PAGES: usize = 64;
/// Longest payload: room for the data of many disk requests in flight.
pub const MAX_PAYLOAD_BYTES: usize = 256 << 20;
/// Longest name of a kind of payload.
pub const MAX_KIND_BYTES: usize = 255;

const TAG_PAYLOAD: u8 = 1;
const TAG_PAGES: u8 = 2;
const TAG_END: u8 = 3;
const PACKING_RAW: u8 = 1;
const PACKING_LZ4: u8 = 2;

/// What can be wrong with a snapshot.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The stream failed.
    #[error("Reading or writing the snapshot failed")]
    Io(#[source] io::Error),
    /// The snapshot ends early.
    #[error("The snapshot ends inside its {what}")]
    Truncated {
        /// Where.
        what: &'static str,
    },
    /// Something else.
    #[error("This is not a snapshot: it starts with {}", found.escape_ascii())]
    Magic {
        /// The first bytes found.
        found: [u8; 8],
    },
    /// Another version.
    #[error("The snapshot has version {found}, this monitor knows {SNAPSHOT_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// A tag without a meaning.
    #[error("The {what} {tag} is not known")]
    UnknownTag {
        /// The field.
        what: &'static str,
        /// The value found.
        tag: u8,
    },
    /// A size over its limit, or zero where there must be something.
    #[error("The {what} is {found}, it must be {limits}")]
    Size {
        /// The field.
        what: &'static str,
        /// Its value.
        found: usize,
        /// What is allowed.
        limits: String,
    },
    /// A payload kind is not UTF-8.
    #[error("A payload's kind is not UTF-8 text")]
    KindNotText,
    /// Memory that is not whole pages of the address space.
    #[error("Memory of {len_bytes} bytes at {gpa:#x} is not whole pages inside the 64-bit address space")]
    Range {
        /// Guest physical address.
        gpa: u64,
        /// Length.
        len_bytes: usize,
    },
    /// Compressed pages do not give what they should.
    #[error("The compressed pages at {gpa:#x} are damaged")]
    Compression {
        /// Guest physical address.
        gpa: u64,
    },
    /// The container was changed.
    #[error("The snapshot is damaged: its checksum is {computed:#010x}, it says {stored:#010x}")]
    Checksum {
        /// What the bytes give.
        computed: u32,
        /// What the end says.
        stored: u32,
    },
    /// Bytes follow the end.
    #[error("Bytes follow the end of the snapshot")]
    Trailing,
}

/// Writes a container. Writes are small: give it a buffered stream.
#[derive(Debug)]
pub struct SnapshotWriter<W> {
    out: W,
    crc: crc32fast::Hasher,
    packed: Vec<u8>,
}

impl<W: Write> SnapshotWriter<W> {
    /// Starts a container.
    ///
    /// # Errors
    /// The stream's error, as for every other method.
    pub fn new(out: W) -> Result<Self, SnapshotError> {
        let mut writer = Self { out, crc: crc32fast::Hasher::new(), packed: Vec::new() };
        writer.put(&header(SNAPSHOT_MAGIC, SNAPSHOT_VERSION))?;
        Ok(writer)
    }

    /// Adds the state of one thing; `kind` and `version` say how to read `bytes`.
    ///
    /// # Errors
    /// A kind or payload over its limit.
    pub fn payload(&mut self, kind: &str, version: u16, bytes: &[u8]) -> Result<(), SnapshotError> {
        let kind_len =
            u8::try_from(kind.len()).map_err(|_| size("kind's length", kind.len(), 0, MAX_KIND_BYTES))?;
        if bytes.len() > MAX_PAYLOAD_BYTES {
            return Err(size("payload's length", bytes.len(), 0, MAX_PAYLOAD_BYTES));
        }
        self.put(&[TAG_PAYLOAD, kind_len])?;
        self.put(kind.as_bytes())?;
        self.put(&version.to_le_bytes())?;
        self.put(&(bytes.len() as u32).to_le_bytes())?;
        self.put(bytes)
    }

    /// Adds the memory at guest physical address `gpa`, whole pages. Pages of zeros take no room.
    ///
    /// # Errors
    /// [`SnapshotError::Range`].
    pub fn memory(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        check_range(gpa, bytes.len())?;
        let mut run = 0..0;
        for (index, page) in bytes.as_chunks::<PAGE_BYTES>().0.iter().enumerate() {
            let start = index * PAGE_BYTES;
            let zero = is_zero(page);
            if !run.is_empty() && (zero || run.len() == MAX_RUN_PAGES * PAGE_BYTES) {
                self.pages(gpa + run.start as u64, &bytes[run.clone()])?;
                run = start..start;
            }
            if !zero {
                run = if run.is_empty() { start } else { run.start }..start + PAGE_BYTES;
            }
        }
        if !run.is_empty() {
            self.pages(gpa + run.start as u64, &bytes[run])?;
        }
        Ok(())
    }

    /// Adds memory that may be in the container already, whole pages, those of zeros too: the last content counts.
    ///
    /// # Errors
    /// [`SnapshotError::Range`].
    pub fn memory_again(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        check_range(gpa, bytes.len())?;
        let mut at = gpa;
        for run in bytes.chunks(MAX_RUN_PAGES * PAGE_BYTES) {
            self.pages(at, run)?;
            at += run.len() as u64;
        }
        Ok(())
    }

    fn pages(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut packed = std::mem::take(&mut self.packed);
        packed.resize(lz4_flex::block::get_maximum_output_size(MAX_RUN_PAGES * PAGE_BYTES), 0);
        // The buffer has the largest size that compression can ask for; if it failed, raw is as good.
        let packed_len = lz4_flex::block::compress_into(bytes, &mut packed).unwrap_or(usize::MAX);
        let (packing, stored) = match packed.get(..packed_len) {
            Some(stored) if packed_len < bytes.len() => (PACKING_LZ4, stored),
            _ => (PACKING_RAW, bytes),
        };
        let pages = (bytes.len() / PAGE_BYTES) as u8;
        let result = self
            .put(&[TAG_PAGES, packing, pages, 0])
            .and_then(|()| self.put(&gpa.to_le_bytes()))
            .and_then(|()| self.put(&(stored.len() as u32).to_le_bytes()))
            .and_then(|()| self.put(stored));
        self.packed = packed;
        result
    }

    /// Ends the container and gives the stream back, flushed.
    ///
    /// # Errors
    /// The stream's error.
    pub fn finish(mut self) -> Result<W, SnapshotError> {
        self.put(&[TAG_END])?;
        let crc = self.crc.clone().finalize();
        self.put(&crc.to_le_bytes())?;
        self.out.flush().map_err(SnapshotError::Io)?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.crc.update(bytes);
        self.out.write_all(bytes).map_err(SnapshotError::Io)
    }
}

fn size(what: &'static str, found: usize, min: usize, max: usize) -> SnapshotError {
    SnapshotError::Size { what, found, limits: format!("from {min} to {max}") }
}

fn check_range(gpa: u64, len_bytes: usize) -> Result<(), SnapshotError> {
    let whole = gpa.is_multiple_of(PAGE_BYTES as u64) && len_bytes.is_multiple_of(PAGE_BYTES);
    if !whole || gpa.checked_add(len_bytes as u64).is_none() {
        return Err(SnapshotError::Range { gpa, len_bytes });
    }
    Ok(())
}

/// Whole lines at a time, which the compiler turns into vector instructions.
pub(crate) fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    page.as_chunks::<128>().0.iter().all(|line| {
        line.as_chunks::<16>().0.iter().fold(0, |all, word| all | u128::from_ne_bytes(*word)) == 0
    })
}

/// A part of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotPart {
    /// The state of one thing.
    Payload {
        /// What it is the state of.
        kind: String,
        /// How `bytes` is laid out.
        version: u16,
        /// The state.
        bytes: Vec<u8>,
    },
    /// Memory that is not all zero.
    Pages {
        /// Guest physical address, a multiple of [`PAGE_BYTES`].
        gpa: u64,
        /// Whole pages, at most [`MAX_RUN_PAGES`].
        bytes: Vec<u8>,
    },
}

/// Reads a container.
#[derive(Debug)]
pub struct SnapshotReader<R> {
    input: R,
    crc: crc32fast::Hasher,
    ended: bool,
}

impl<R: Read> SnapshotReader<R> {
    /// Reads magic and version.
    ///
    /// # Errors
    /// Something else than a container of this version.
    pub fn new(input: R) -> Result<Self, SnapshotError> {
        let mut reader = Self { input, crc: crc32fast::Hasher::new(), ended: false };
        let magic = reader.get("magic")?;
        if magic != SNAPSHOT_MAGIC {
            return Err(SnapshotError::Magic { found: magic });
        }
        let version = u32::from_le_bytes(reader.get("version")?);
        if version != SNAPSHOT_VERSION {
            return Err(SnapshotError::Version { found: version });
        }
        Ok(reader)
    }

    /// The next part, or `None` at the end, when the checksum holds and the stream has ended too.
    ///
    /// Until then nothing that was read is to be trusted: load it, run nothing.
    ///
    /// # Errors
    /// Anything that a [`SnapshotWriter`] would not have written.
    pub fn next_part(&mut self) -> Result<Option<SnapshotPart>, SnapshotError> {
        if self.ended {
            return Ok(None);
        }
        match self.get("part tag")? {
            [TAG_PAYLOAD] => self.get_payload().map(Some),
            [TAG_PAGES] => self.get_pages().map(Some),
            [TAG_END] => self.get_end().map(|()| None),
            [tag] => Err(SnapshotError::UnknownTag { what: "part tag", tag }),
        }
    }

    fn get_payload(&mut self) -> Result<SnapshotPart, SnapshotError> {
        let [kind_len] = self.get("payload kind")?;
        let kind = self.get_vec(usize::from(kind_len), "payload kind")?;
        let kind = String::from_utf8(kind).map_err(|_| SnapshotError::KindNotText)?;
        let version = u16::from_le_bytes(self.get("payload version")?);
        let len = u32::from_le_bytes(self.get("payload length")?) as usize;
        if len > MAX_PAYLOAD_BYTES {
            return Err(size("payload's length", len, 0, MAX_PAYLOAD_BYTES));
        }
        Ok(SnapshotPart::Payload { kind, version, bytes: self.get_vec(len, "payload")? })
    }

    fn get_pages(&mut self) -> Result<SnapshotPart, SnapshotError> {
        let [packing, pages, reserved] = self.get("pages header")?;
        let gpa = u64::from_le_bytes(self.get("pages address")?);
        let stored_len = u32::from_le_bytes(self.get("pages length")?) as usize;
        if reserved != 0 {
            return Err(size("reserved byte of pages", reserved.into(), 0, 0));
        }
        let pages = usize::from(pages);
        if !(1..=MAX_RUN_PAGES).contains(&pages) {
            return Err(size("number of pages", pages, 1, MAX_RUN_PAGES));
        }
        let len = pages * PAGE_BYTES;
        check_range(gpa, len)?;
        // A writer stores pages compressed only if that is shorter, so there is one form for each run.
        let (min, max) = match packing {
            PACKING_RAW => (len, len),
            PACKING_LZ4 => (1, len - 1),
            tag => return Err(SnapshotError::UnknownTag { what: "packing", tag }),
        };
        if !(min..=max).contains(&stored_len) {
            return Err(size("length of stored pages", stored_len, min, max));
        }
        let stored = self.get_vec(stored_len, "pages")?;
        if packing == PACKING_RAW {
            return Ok(SnapshotPart::Pages { gpa, bytes: stored });
        }
        let mut bytes = vec![0; len];
        match lz4_flex::block::decompress_into(&stored, &mut bytes) {
            Ok(unpacked_len) if unpacked_len == len => Ok(SnapshotPart::Pages { gpa, bytes }),
            _ => Err(SnapshotError::Compression { gpa }),
        }
    }

    fn get_end(&mut self) -> Result<(), SnapshotError> {
        let computed = self.crc.clone().finalize();
        let stored = u32::from_le_bytes(self.get("checksum")?);
        if computed != stored {
            return Err(SnapshotError::Checksum { computed, stored });
        }
        // A stream of messages has its own end, which is taken off here.
        let behind = self.input.by_ref().take(1).read_to_end(&mut Vec::new()).map_err(SnapshotError::Io)?;
        if behind != 0 {
            return Err(SnapshotError::Trailing);
        }
        self.ended = true;
        Ok(())
    }

    fn get<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], SnapshotError> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => SnapshotError::Truncated { what },
            _ => SnapshotError::Io(error),
        })?;
        self.crc.update(&bytes);
        Ok(bytes)
    }

    /// Grows with what is really there, not with what the length claims.
    fn get_vec(&mut self, len: usize, what: &'static str) -> Result<Vec<u8>, SnapshotError> {
        let mut bytes = Vec::new();
        self.input.by_ref().take(len as u64).read_to_end(&mut bytes).map_err(SnapshotError::Io)?;
        if bytes.len() < len {
            return Err(SnapshotError::Truncated { what });
        }
        self.crc.update(&bytes);
        Ok(bytes)
    }
}
