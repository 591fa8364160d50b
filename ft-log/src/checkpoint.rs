//! What a guest is at a forced stop, as bytes: its state and the pages that a follower may not have.
//!
//! Owns: the byte form of a [`Checkpoint`], encoder and decoder together, and what both remember of earlier ones.
//! Must never: know what the state means, or touch guest memory.
//!
//! A checkpoint is the payload of one or more `Checkpoint` messages; each holds whole parts.
//!
//! ```text
//! 1 State  tag u8 | length varint | packed length varint | LZ4 block of: state XOR the last state
//! 2 Page   tag u8 | page numbers since the last page of this checkpoint (at first: since -1) varint | packing u8 | ...
//!            packing 1 raw     4096 bytes
//!                    2 same    nothing: the page is the remembered one
//!                    3 zero    nothing
//!                    4 packed  length varint, LZ4 block of the page
//!                    5 change  runs varint, at least 1; for each run: words as remembered before it varint, words in it
//!                              varint, at least 1, and these words. A word has 8 bytes
//! 3 End    tag u8; nothing follows in the message
//! ```
//!
//! Remembered are the last [`REMEMBERED_PAGES`] different pages of checkpoints with their newest content; a new one
//! takes the place of the one that has been there longest. The last state is at first empty; where one of the two
//! states is shorter, it is taken as followed by zeros.
//!
//! States: between checkpoints -> State -> Pages, rising -> End -> between checkpoints.

use std::collections::HashMap;

use thiserror::Error;

use crate::error::LogError;
use crate::fields::{get_bytes, get_u8, get_varint, put_varint};
use crate::snapshot::{PAGE_BYTES, is_zero};

/// Pages whose content both sides remember.
pub const REMEMBERED_PAGES: usize = 2_048;
/// Longest state.
pub const MAX_STATE_BYTES: usize = 64 << 20;
/// Bytes of one message after which the next one begins.
const MESSAGE_BYTES: usize = 1 << 20;

const TAG_STATE: u8 = 1;
const TAG_PAGE: u8 = 2;
const TAG_END: u8 = 3;

const PACKING_RAW: u8 = 1;
const PACKING_SAME: u8 = 2;
const PACKING_ZERO: u8 = 3;
const PACKING_LZ4: u8 = 4;
const PACKING_CHANGE: u8 = 5;

type Page = [u8; PAGE_BYTES];

/// What can be wrong with the bytes of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CheckpointError {
    /// A field.
    #[error(transparent)]
    Field(#[from] LogError),
    /// Compressed bytes do not give what they should.
    #[error("The checkpoint's {what} is damaged: its compressed bytes do not give what they should")]
    Compression {
        /// Which part.
        what: &'static str,
    },
    /// A part stands where it must not.
    #[error("A checkpoint's {what} stands where none may")]
    OutOfPlace {
        /// Which part.
        what: &'static str,
    },
    /// A page that the guest does not have.
    #[error("The checkpoint holds page {number:#x}, the guest's memory ends before page {end:#x}")]
    PageBeyondMemory {
        /// Its number.
        number: u64,
        /// The first number that is too large.
        end: u64,
    },
    /// A change of a page that nobody remembers.
    #[error("The checkpoint holds a change of page {number:#x}, which was in none of the last ones")]
    NotRemembered {
        /// Its number.
        number: u64,
    },
}

/// Whole pages by their number (guest physical address / 4096), rising.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    numbers: Vec<u64>,
    bytes: Vec<u8>,
}

impl Pages {
    /// Adds a page behind the others.
    ///
    /// # Panics
    /// If `number` does not rise.
    pub fn push(&mut self, number: u64, page: &Page) {
        assert!(self.numbers.last().is_none_or(|last| *last < number), "pages are added in rising order");
        self.numbers.push(number);
        self.bytes.extend_from_slice(page);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Are there none?
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Number and content of each.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        let (pages, _) = self.bytes.as_chunks::<PAGE_BYTES>();
        self.numbers.iter().copied().zip(pages)
    }
}

/// A guest at a forced stop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checkpoint {
    /// Everything but memory, as its maker wrote it.
    pub state: Vec<u8>,
    /// At least the pages that differ from what the follower has.
    pub pages: Pages,
}

/// The newest content of pages of past checkpoints, the same on both sides.
#[derive(Debug, Default)]
struct Remembered {
    slot_of: HashMap<u64, usize>,
    slots: Vec<(u64, Box<Page>)>,
    oldest: usize,
}

impl Remembered {
    fn get(&self, number: u64) -> Option<&Page> {
        self.slot_of.get(&number).map(|slot| &*self.slots[*slot].1)
    }

    fn put(&mut self, number: u64, page: &Page) {
        if let Some(slot) = self.slot_of.get(&number) {
            *self.slots[*slot].1 = *page;
        } else if self.slots.len() < REMEMBERED_PAGES {
            self.slot_of.insert(number, self.slots.len());
            self.slots.push((number, Box::new(*page)));
        } else {
            let (was, content) = &mut self.slots[self.oldest];
            self.slot_of.remove(was);
            *was = number;
            **content = *page;
            self.slot_of.insert(number, self.oldest);
            self.oldest = (self.oldest + 1) % REMEMBERED_PAGES;
        }
    }
}

const WORD_BYTES: usize = 8;
/// Longest form of a change; a longer one is no better than the page.
const MAX_CHANGE_BYTES: usize = PAGE_BYTES / 4;

/// Appends how `to` differs from `from`. False, with nothing appended: in too much.
fn put_change(from: &Page, to: &Page, out: &mut Vec<u8>) -> bool {
    let (from, to_words) = (from.as_chunks::<WORD_BYTES>().0, to.as_chunks::<WORD_BYTES>().0);
    let next = |at: usize, differs: bool| {
        let mut words = from[at..].iter().zip(&to_words[at..]);
        words.position(|(from, to)| (from != to) == differs).map(|distance| at + distance)
    };
    let (mut at, mut runs) = (0, 0u64);
    let mut body = Vec::new();
    while let Some(first) = next(at, true) {
        let end = next(first, false).unwrap_or(to_words.len());
        put_varint(&mut body, (first - at) as u64);
        put_varint(&mut body, (end - first) as u64);
        body.extend_from_slice(&to[first * WORD_BYTES..end * WORD_BYTES]);
        if body.len() > MAX_CHANGE_BYTES {
            return false;
        }
        runs += 1;
        at = end;
    }
    put_varint(out, runs);
    out.extend_from_slice(&body);
    true
}

fn get_change(page: &mut Page, input: &mut &[u8]) -> Result<(), CheckpointError> {
    let runs = get_varint(input, "changes of a page")?;
    let mut at = 0u64;
    for _ in 0..runs {
        let first = at.saturating_add(get_varint(input, "unchanged words")?);
        let end = first.saturating_add(get_varint(input, "changed words")?);
        let words = PAGE_BYTES / WORD_BYTES;
        if end <= first || end > words as u64 {
            return Err(CheckpointError::OutOfPlace { what: "change of a page" });
        }
        let place = &mut page[first as usize * WORD_BYTES..end as usize * WORD_BYTES];
        let (bytes, rest) =
            input.split_at_checked(place.len()).ok_or(LogError::Truncated { what: "changed words" })?;
        place.copy_from_slice(bytes);
        *input = rest;
        at = end;
    }
    Ok(())
}

/// Turns checkpoints into messages' payloads.
#[derive(Debug)]
pub struct CheckpointEncoder {
    remembered: Remembered,
    state: Vec<u8>,
    packed: Vec<u8>,
}

impl Default for CheckpointEncoder {
    fn default() -> Self {
        let packed = vec![0; lz4_flex::block::get_maximum_output_size(PAGE_BYTES)];
        Self { remembered: Remembered::default(), state: Vec::new(), packed }
    }
}

impl CheckpointEncoder {
    /// Encodes `checkpoint` and hands each message's payload to `send`. After an error of `send` the follower can
    /// understand nothing more.
    pub fn encode<E>(
        &mut self,
        checkpoint: &Checkpoint,
        mut send: impl FnMut(Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut out = Vec::new();
        self.put_state(&checkpoint.state, &mut out);
        let mut next = 0;
        for (number, page) in checkpoint.pages.iter() {
            out.push(TAG_PAGE);
            put_varint(&mut out, number + 1 - next);
            next = number + 1;
            self.put_page(number, page, &mut out);
            if out.len() >= MESSAGE_BYTES {
                send(std::mem::take(&mut out))?;
            }
        }
        out.push(TAG_END);
        send(out)
    }

    fn put_state(&mut self, state: &[u8], out: &mut Vec<u8>) {
        let packed = lz4_flex::block::compress(&xor(state, &self.state));
        out.push(TAG_STATE);
        put_varint(out, state.len() as u64);
        put_varint(out, packed.len() as u64);
        out.extend_from_slice(&packed);
        self.state = state.to_vec();
    }

    fn put_page(&mut self, number: u64, page: &Page, out: &mut Vec<u8>) {
        let before = self.remembered.get(number);
        if before.is_some_and(|before| before == page) {
            out.push(PACKING_SAME);
            return;
        }
        let packing_at = out.len();
        out.push(PACKING_CHANGE);
        if !before.is_some_and(|before| put_change(before, page, out)) {
            out[packing_at] = if is_zero(page) { PACKING_ZERO } else { self.put_whole(page, out) };
        }
        self.remembered.put(number, page);
    }

    fn put_whole(&mut self, page: &Page, out: &mut Vec<u8>) -> u8 {
        let len = lz4_flex::block::compress_into(page, &mut self.packed).unwrap_or(usize::MAX);
        if len >= PAGE_BYTES {
            out.extend_from_slice(page);
            return PACKING_RAW;
        }
        put_varint(out, len as u64);
        out.extend_from_slice(&self.packed[..len]);
        PACKING_LZ4
    }
}

/// `to` changed by `from`, as long as `to`.
fn xor(to: &[u8], from: &[u8]) -> Vec<u8> {
    let mut changed = to.to_vec();
    changed.iter_mut().zip(from).for_each(|(to, from)| *to ^= from);
    changed
}

/// Turns messages' payloads back into checkpoints.
#[derive(Debug)]
pub struct CheckpointDecoder {
    remembered: Remembered,
    state: Vec<u8>,
    end_page: u64,
    /// The checkpoint that is coming in, with the least number that its next page may have.
    coming: Option<(Checkpoint, u64)>,
}

impl CheckpointDecoder {
    /// For a guest whose pages all have numbers below `end_page`; this bounds what a checkpoint takes.
    pub fn new(end_page: u64) -> Self {
        Self { remembered: Remembered::default(), state: Vec::new(), end_page, coming: None }
    }

    /// Takes one message's payload. A whole checkpoint comes out behind its last one.
    ///
    /// # Errors
    /// Bytes that no [`CheckpointEncoder`] writes. The decoder is of no use afterwards.
    pub fn accept(&mut self, payload: &[u8]) -> Result<Option<Checkpoint>, CheckpointError> {
        let input = &mut &*payload;
        while !input.is_empty() {
            match get_u8(input, "checkpoint tag")? {
                TAG_STATE if self.coming.is_none() => {
                    let state = self.get_state(input)?;
                    self.coming = Some((Checkpoint { state, pages: Pages::default() }, 0));
                }
                TAG_STATE => return Err(CheckpointError::OutOfPlace { what: "state" }),
                TAG_PAGE => self.get_page(input)?,
                TAG_END => {
                    let (checkpoint, _) =
                        self.coming.take().ok_or(CheckpointError::OutOfPlace { what: "end" })?;
                    if !input.is_empty() {
                        let len_bytes = input.len();
                        return Err(LogError::Trailing { what: "checkpoint", len_bytes }.into());
                    }
                    return Ok(Some(checkpoint));
                }
                tag => return Err(LogError::UnknownTag { what: "checkpoint tag", tag }.into()),
            }
        }
        Ok(None)
    }

    fn get_state(&mut self, input: &mut &[u8]) -> Result<Vec<u8>, CheckpointError> {
        let len_bytes = get_varint(input, "state length")?;
        if len_bytes > MAX_STATE_BYTES as u64 {
            return Err(LogError::TooLong { what: "state", len_bytes, limit_bytes: MAX_STATE_BYTES }.into());
        }
        let packed = get_bytes(input, "packed state", MAX_STATE_BYTES)?;
        // LZ4 makes no more than 255 bytes of one: what is only claimed gets no memory.
        if len_bytes > packed.len() as u64 * 255 {
            return Err(CheckpointError::Compression { what: "state" });
        }
        let plain = lz4_flex::block::decompress(packed, len_bytes as usize).unwrap_or_default();
        if plain.len() as u64 != len_bytes {
            return Err(CheckpointError::Compression { what: "state" });
        }
        self.state = xor(&plain, &self.state);
        Ok(self.state.clone())
    }

    fn get_page(&mut self, input: &mut &[u8]) -> Result<(), CheckpointError> {
        let (checkpoint, next) = self.coming.as_mut().ok_or(CheckpointError::OutOfPlace { what: "page" })?;
        let step = get_varint(input, "page number")?;
        if step == 0 {
            return Err(CheckpointError::OutOfPlace { what: "page" });
        }
        let number = next.saturating_add(step - 1);
        if number >= self.end_page {
            return Err(CheckpointError::PageBeyondMemory { number, end: self.end_page });
        }
        let remembered = self.remembered.get(number).ok_or(CheckpointError::NotRemembered { number });
        let page = match get_u8(input, "page packing")? {
            PACKING_RAW => {
                let (page, rest) =
                    input.split_first_chunk::<PAGE_BYTES>().ok_or(LogError::Truncated { what: "page" })?;
                *input = rest;
                *page
            }
            PACKING_SAME => *remembered?,
            PACKING_ZERO => [0; PAGE_BYTES],
            PACKING_LZ4 => unpack(input)?,
            PACKING_CHANGE => {
                let mut page = *remembered?;
                get_change(&mut page, input)?;
                page
            }
            tag => return Err(LogError::UnknownTag { what: "page packing", tag }.into()),
        };
        *next = number + 1;
        checkpoint.pages.push(number, &page);
        self.remembered.put(number, &page);
        Ok(())
    }
}

fn unpack(input: &mut &[u8]) -> Result<Page, CheckpointError> {
    let packed = get_bytes(input, "packed page", PAGE_BYTES)?;
    let mut page = [0; PAGE_BYTES];
    match lz4_flex::block::decompress_into(packed, &mut page) {
        Ok(PAGE_BYTES) => Ok(page),
        _ => Err(CheckpointError::Compression { what: "page" }),
    }
}
