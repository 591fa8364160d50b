//! A kernel as a checked ELF file in memory.
//!
//! Owns: [`KernelImage`], the bytes of a `vmlinux` with its segments, its code and its read-only data found.
//! Must never: touch guest memory or trust an offset in the file. Every range in a `KernelImage` was checked
//! against the file's length when it was parsed, so later passes may slice without asking again.
//!
//! The passes change bytes in the file, which are then loaded. So that each change hits one instruction and nothing
//! else, these hold of a `KernelImage`, and a file for which one does not is refused:
//!
//! - Code is what the section table calls executable and not writable. From Linux 6.16 on `.data` is both, for one
//!   function of kexec, and a pointer there may hold the bytes of an RDTSC. A file without section table does not
//!   say what is code.
//! - The kernel is entered in code. From 6.18 on that code (`.init.text`) is in a segment without the flag for it.
//! - Every loaded byte belongs to a section, or is padding.
//! - Code is loaded from where its section is in the file to where its section is linked.
//! - No byte of code belongs to another section, and no byte of the file or of memory to two segments.

use std::ops::Range;
use std::path::Path;

use super::BootError;
use super::elf::{
    EHDR_BYTES, Fault, ProgramHeader, Programs, SectionHeader, range_in, read_programs, read_sections,
};

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const SHT_NULL: u32 = 0;
const SHT_NOBITS: u32 = 8;
const SHF_WRITE: u64 = 1;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;
const SHF_COMPRESSED: u64 = 0x800;

/// One `PT_LOAD` segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest-physical address of its first byte.
    pub paddr: u64,
    /// Address it is linked to run at.
    pub vaddr: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
    /// Its length in memory, no less than in the file; what the file does not hold is zero.
    pub memory_bytes: u64,
}

/// A run of instructions (or of constant data) in the file, with the address it is linked to run at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// Address of the first byte.
    pub vaddr: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
}

/// A `vmlinux` whose headers have been checked.
#[derive(Debug)]
pub(super) struct KernelImage {
    /// The whole file. The rewriting passes change it in place.
    pub bytes: Vec<u8>,
    /// Guest-physical address of `startup_64`.
    pub entry: u64,
    /// Address that it is linked to.
    pub entry_vaddr: u64,
    /// What to copy into memory.
    pub segments: Vec<Segment>,
    /// Everything that may be executed in ring 0.
    pub code: Vec<Span>,
    /// Loaded data that is not code, in file order.
    pub data: Vec<Span>,
}

impl Span {
    fn contains(&self, vaddr: u64) -> bool {
        vaddr >= self.vaddr && vaddr - self.vaddr < self.file.len() as u64
    }
}

impl KernelImage {
    /// Checks the headers of an ELF file; `path` only names it in errors.
    ///
    /// # Errors
    /// [`BootError::NotAKernel`], [`BootError::No64BitEntry`], [`BootError::KernelTruncated`],
    /// [`BootError::KernelMalformed`], [`BootError::NoSections`].
    pub fn parse(bytes: Vec<u8>, path: &Path) -> Result<Self, BootError> {
        Self::check(bytes).map_err(|fault| {
            let path = path.into();
            match fault {
                Fault::Foreign(found) => BootError::NotAKernel { path, found },
                Fault::Truncated(part) => BootError::KernelTruncated { path, part },
                Fault::Malformed(detail) => BootError::KernelMalformed { path, detail },
                Fault::NoSections => BootError::NoSections { path },
                Fault::NoEntry(detail) => BootError::No64BitEntry { path, detail },
            }
        })
    }

    fn check(bytes: Vec<u8>) -> Result<Self, Fault> {
        // The segments first: what is wrong with them is said also of a file without sections.
        let Programs { entry, headers, table } = read_programs(&bytes)?;
        let segments = check_segments(&headers, bytes.len())?;
        let sections = read_sections(&bytes)?;
        let (code, data) = check_sections(&sections, &segments, bytes.len())?;
        let known = code.iter().chain(&data).map(|span| span.file.clone()).chain([0..EHDR_BYTES, table]);
        check_padding(&bytes, &segments, known.collect())?;
        let entry_vaddr = find_entry(entry, &sections, &segments, &code)?;
        Ok(Self { bytes, entry, entry_vaddr, segments, code, data })
    }

    /// First guest-physical address after the kernel in memory.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.paddr + s.memory_bytes).max().unwrap_or(0)
    }

    /// Lowest guest-physical address of the kernel.
    pub fn start(&self) -> u64 {
        self.segments.iter().map(|s| s.paddr).min().unwrap_or(0)
    }

    /// Where the code from `vaddr` to the end of its span is in the file.
    pub fn code_from(&self, vaddr: u64) -> Option<Range<usize>> {
        let span = self.code.iter().find(|span| span.contains(vaddr))?;
        Some(span.file.start + (vaddr - span.vaddr) as usize..span.file.end)
    }

    /// Where whatever is linked to `vaddr` is in the file.
    pub fn data_offset(&self, vaddr: u64) -> Option<usize> {
        self.segments
            .iter()
            .find(|s| vaddr >= s.vaddr && vaddr - s.vaddr < s.file.len() as u64)
            .map(|s| s.file.start + (vaddr - s.vaddr) as usize)
    }

    /// Whether the kernel's data holds `text`.
    pub fn contains(&self, text: &str) -> bool {
        self.find(text.as_bytes()).is_some()
    }

    /// Everything in the data from the first occurrence of `needle` to the end of its span.
    pub fn find(&self, needle: &[u8]) -> Option<&[u8]> {
        let finder = memchr::memmem::Finder::new(needle);
        self.data.iter().find_map(|span| {
            let bytes = &self.bytes[span.file.clone()];
            finder.find(bytes).map(|at| &bytes[at..])
        })
    }

    /// The release in the kernel's banner, such as `6.1.0-18-cloud-amd64`.
    pub fn version(&self) -> Option<String> {
        let banner = self.find(b"Linux version ")?;
        let release = banner["Linux version ".len()..].split(|b| !b.is_ascii_graphic()).next()?;
        let release = std::str::from_utf8(release).ok()?;
        (release.starts_with(|c: char| c.is_ascii_digit()) && release.len() <= 128)
            .then(|| release.to_owned())
    }
}

/// The segments to load. None overlaps another, in memory, in linked addresses or in the file.
fn check_segments(programs: &[ProgramHeader], file_bytes: usize) -> Result<Vec<Segment>, Fault> {
    let mut segments = Vec::new();
    for (number, header) in programs.iter().enumerate() {
        match header.kind {
            PT_INTERP | PT_DYNAMIC => {
                return Err(Fault::Foreign(
                    "an ordinary program (a dynamically linked ELF executable)".into(),
                ));
            }
            PT_LOAD if header.memory_bytes > 0 || header.file_bytes > 0 => {
                segments.push(segment(number, header, file_bytes)?);
            }
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(Fault::Malformed("it has no loadable segment".into()));
    }
    let overlaps = [
        ("in memory", overlap(segments.iter().map(|s| (s.paddr, s.memory_bytes)))),
        ("in linked addresses", overlap(segments.iter().map(|s| (s.vaddr, s.memory_bytes)))),
        ("in the file", overlap(segments.iter().map(|s| (s.file.start as u64, s.file.len() as u64)))),
    ];
    match overlaps.into_iter().find_map(|(space, at)| Some((space, at?))) {
        Some((space, at)) => {
            Err(Fault::Malformed(format!("two of its segments overlap {space}, at {at:#x}")))
        }
        None => Ok(segments),
    }
}

fn segment(number: usize, header: &ProgramHeader, file_bytes: usize) -> Result<Segment, Fault> {
    let ProgramHeader { vaddr, paddr, memory_bytes, .. } = *header;
    if header.file_bytes > memory_bytes {
        return Err(Fault::Malformed(format!(
            "its segment {number} has {} bytes in the file, more than its {memory_bytes} in memory",
            header.file_bytes
        )));
    }
    if paddr.checked_add(memory_bytes).is_none() || vaddr.checked_add(memory_bytes).is_none() {
        return Err(Fault::Malformed(format!(
            "its segment {number} of {memory_bytes:#x} bytes at {paddr:#x}, linked to {vaddr:#x}, ends past the last \
             address"
        )));
    }
    let file = range_in(header.file_offset, header.file_bytes, file_bytes)
        .ok_or(Fault::Truncated("loadable segment"))?;
    Ok(Segment { paddr, vaddr, file, memory_bytes })
}

/// Where a range of (start, length) begins inside another, if one does. Empty ones do not count.
fn overlap(ranges: impl Iterator<Item = (u64, u64)>) -> Option<u64> {
    let mut ranges: Vec<_> = ranges.filter(|(_, len)| *len > 0).collect();
    ranges.sort_unstable();
    ranges.windows(2).find(|pair| pair[1].0 - pair[0].0 < pair[0].1).map(|pair| pair[1].0)
}

/// Code and other data of the loaded sections.
fn check_sections(
    sections: &[SectionHeader],
    segments: &[Segment],
    file_bytes: usize,
) -> Result<(Vec<Span>, Vec<Span>), Fault> {
    let (mut code, mut data) = (Vec::new(), Vec::new());
    for section in sections.iter().filter(|s| is_loaded(s)) {
        let file = range_in(section.file_offset, section.len_bytes, file_bytes)
            .ok_or(Fault::Truncated("loaded section"))?;
        let span = Span { vaddr: section.vaddr, file };
        if !is_code(section) {
            data.push(span);
        } else if section.flags & SHF_COMPRESSED != 0 {
            return Err(Fault::Malformed(format!("its code in section {} is compressed", section.name)));
        } else if !segments.iter().any(|segment| loads(segment, &span)) {
            return Err(Fault::Malformed(format!(
                "its section {} of code is not loaded from there to where it is linked ({:#x}) by any segment",
                section.name, section.vaddr
            )));
        } else {
            code.push(span);
        }
    }
    let in_file = code.iter().chain(&data).map(|span| (span.file.start as u64, span.file.len() as u64));
    match overlap(in_file) {
        Some(at) => Err(Fault::Malformed(format!("two of its sections overlap in the file, at {at:#x}"))),
        None => Ok((code, data)),
    }
}

/// What is loaded but belongs to no section is padding: else nobody knows whether it is code.
fn check_padding(bytes: &[u8], segments: &[Segment], mut known: Vec<Range<usize>>) -> Result<(), Fault> {
    // Zero, int3 and NOP, with which linkers fill up.
    const PADDING: [u8; 3] = [0, 0xcc, 0x90];
    known.sort_unstable_by_key(|range| range.start);
    for segment in segments {
        let mut at = segment.file.start;
        let end = segment.file.end;
        for range in known.iter().chain([&(end..end)]) {
            let gap = at..range.start.clamp(at, end);
            if let Some(first) = bytes[gap.clone()].iter().position(|b| !PADDING.contains(b)) {
                return Err(Fault::Malformed(format!(
                    "what it loads from {:#x} of the file on belongs to no section, so that code and data there cannot \
                     be told apart",
                    gap.start + first
                )));
            }
            at = at.max(range.end.min(end));
        }
    }
    Ok(())
}

/// Whether a section has bytes in the file that go into memory.
fn is_loaded(section: &SectionHeader) -> bool {
    section.flags & SHF_ALLOC != 0 && !matches!(section.kind, SHT_NULL | SHT_NOBITS) && section.len_bytes > 0
}

fn is_code(section: &SectionHeader) -> bool {
    section.flags & (SHF_EXECINSTR | SHF_WRITE) == SHF_EXECINSTR
}

/// Whether a segment loads these bytes to where they are linked.
fn loads(segment: &Segment, span: &Span) -> bool {
    let (whole, part) = (&segment.file, &span.file);
    part.start >= whole.start
        && part.end <= whole.end
        && segment.vaddr + (part.start - whole.start) as u64 == span.vaddr
}

/// The linked address of the entry point, which the header gives as a physical one.
fn find_entry(
    entry: u64,
    sections: &[SectionHeader],
    segments: &[Segment],
    code: &[Span],
) -> Result<u64, Fault> {
    let segment = segments.iter().find(|s| entry >= s.paddr && entry - s.paddr < s.file.len() as u64);
    let vaddr = segment.map(|s| s.vaddr + (entry - s.paddr));
    match vaddr {
        Some(vaddr) if code.iter().any(|span| span.contains(vaddr)) => return Ok(vaddr),
        None if code.iter().any(|span| span.contains(entry)) => {
            let detail = "is a linked address; that of a kernel is physical";
            return Err(Fault::NoEntry(format!("its entry point {entry:#x} {detail}")));
        }
        _ => {}
    }
    let around = vaddr.and_then(|vaddr| {
        sections.iter().find(|s| is_loaded(s) && vaddr >= s.vaddr && vaddr - s.vaddr < s.len_bytes)
    });
    Err(Fault::NoEntry(match around {
        Some(section) if section.flags & SHF_EXECINSTR != 0 => format!(
            "its entry point {entry:#x} is in the section {}, which is writable, so that code and data in it cannot be \
             told apart",
            section.name
        ),
        _ => format!("its entry point {entry:#x} is in no executable section"),
    }))
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
