//! A kernel as a checked ELF file in memory.
//!
//! Owns: [`KernelImage`], the bytes of a `vmlinux` with its segments, its code and its read-only data found.
//! Must never: touch guest memory or trust an offset in the file. Every range in a `KernelImage` was checked
//! against the file's length when it was parsed, so later passes may slice without asking again.
//! Follows: System V ABI, ELF-64 object file format.

use std::ops::Range;
use std::path::Path;

use super::BootError;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const SHDR_BYTES: usize = 64;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PF_X: u32 = 1;
const SHT_NOBITS: u32 = 8;
const SHF_ALLOC: u64 = 2;
const SHF_EXECINSTR: u64 = 4;

/// One `PT_LOAD` segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Guest-physical address of its first byte.
    pub paddr: u64,
    /// Address it is linked to run at.
    pub vaddr: u64,
    /// Its bytes in the file.
    pub file: Range<usize>,
    /// Its length in memory; what the file does not hold is zero.
    pub memory_bytes: u64,
    executable: bool,
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
    /// What to copy into memory.
    pub segments: Vec<Segment>,
    /// Everything that may be executed in ring 0.
    pub code: Vec<Span>,
    /// Loaded data that is not code, in file order.
    pub data: Vec<Span>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// `start .. start + len` if that lies inside a file of `file_bytes`.
fn range_in(start: u64, len: u64, file_bytes: usize) -> Option<Range<usize>> {
    let end = start.checked_add(len)?;
    (end <= file_bytes as u64).then_some(start as usize..end as usize)
}

impl KernelImage {
    /// Checks the headers of an ELF file; `path` only names it in errors.
    ///
    /// # Errors
    /// [`BootError::NotAKernel`], [`BootError::No64BitEntry`], [`BootError::KernelTruncated`].
    pub fn parse(bytes: Vec<u8>, path: &Path) -> Result<Self, BootError> {
        check_header(&bytes, path)?;
        let segments = parse_segments(&bytes, path)?;
        let (code, data) = parse_sections(&bytes, path, &segments)?;
        let entry = u64_at(&bytes, 24);
        let inside = |s: &Segment| s.executable && entry >= s.paddr && entry - s.paddr < s.file.len() as u64;
        if !segments.iter().any(inside) {
            return Err(BootError::No64BitEntry {
                path: path.into(),
                detail: format!("its entry point {entry:#x} is in no executable segment"),
            });
        }
        Ok(Self { bytes, entry, segments, code, data })
    }

    /// First guest-physical address behind the kernel in memory.
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.paddr.saturating_add(s.memory_bytes)).max().unwrap_or(0)
    }

    /// Lowest guest-physical address of the kernel.
    pub fn start(&self) -> u64 {
        self.segments.iter().map(|s| s.paddr).min().unwrap_or(0)
    }

    /// Where the code linked to `vaddr` is in the file.
    pub fn file_offset(&self, vaddr: u64) -> Option<usize> {
        self.code
            .iter()
            .find(|c| vaddr >= c.vaddr && vaddr - c.vaddr < c.file.len() as u64)
            .map(|c| c.file.start + (vaddr - c.vaddr) as usize)
    }

    /// Where whatever is linked to `vaddr` is in the file.
    pub fn data_offset(&self, vaddr: u64) -> Option<usize> {
        self.segments
            .iter()
            .find(|s| vaddr >= s.vaddr && vaddr - s.vaddr < s.file.len() as u64)
            .map(|s| s.file.start + (vaddr - s.vaddr) as usize)
    }

    /// Linked address of the entry point, which the header gives as a physical address.
    pub fn entry_vaddr(&self) -> Option<u64> {
        let segment = self
            .segments
            .iter()
            .find(|s| self.entry >= s.paddr && self.entry - s.paddr < s.file.len() as u64)?;
        Some(segment.vaddr + (self.entry - segment.paddr))
    }

    /// Whether the kernel's data holds `text`.
    pub fn contains(&self, text: &str) -> bool {
        self.find(text.as_bytes()).is_some()
    }

    /// Everything in the data from the first occurrence of `needle` to the end of its span.
    fn find(&self, needle: &[u8]) -> Option<&[u8]> {
        self.data.iter().find_map(|span| {
            let bytes = &self.bytes[span.file.clone()];
            let first = *needle.first()?;
            let mut from = 0;
            while let Some(skip) = bytes[from..].iter().position(|b| *b == first) {
                from += skip;
                if bytes[from..].starts_with(needle) {
                    return Some(&bytes[from..]);
                }
                from += 1;
            }
            None
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

/// Refuses everything that is not a complete header of an x86-64 ELF executable.
fn check_header(bytes: &[u8], path: &Path) -> Result<(), BootError> {
    if !bytes.starts_with(b"\x7fELF") {
        return Err(BootError::NotAKernel { path: path.into() });
    }
    if bytes.len() < EHDR_BYTES {
        return Err(BootError::KernelTruncated { path: path.into(), part: "ELF header" });
    }
    let (kind, machine) = (u16_at(bytes, 16), u16_at(bytes, 18));
    if bytes[4] != ELFCLASS64 || bytes[5] != ELFDATA2LSB || machine != EM_X86_64 {
        return Err(BootError::No64BitEntry {
            path: path.into(),
            detail: format!("it is an ELF file of class {} for machine {machine}, not for x86-64", bytes[4]),
        });
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(BootError::NotAKernel { path: path.into() });
    }
    Ok(())
}

fn parse_segments(bytes: &[u8], path: &Path) -> Result<Vec<Segment>, BootError> {
    let truncated = |part| BootError::KernelTruncated { path: path.into(), part };
    let (at, entry_bytes, count) = (u64_at(bytes, 32), u16_at(bytes, 54), u16_at(bytes, 56));
    if count == 0 || usize::from(entry_bytes) < PHDR_BYTES {
        return Err(BootError::NotAKernel { path: path.into() });
    }
    let table = range_in(at, u64::from(entry_bytes) * u64::from(count), bytes.len())
        .ok_or_else(|| truncated("program header table"))?;
    let mut segments = Vec::new();
    for header in bytes[table].chunks_exact(usize::from(entry_bytes)) {
        let (file_bytes, memory_bytes) = (u64_at(header, 32), u64_at(header, 40));
        if u32_at(header, 0) != PT_LOAD || memory_bytes == 0 {
            continue;
        }
        let file = range_in(u64_at(header, 8), file_bytes, bytes.len())
            .ok_or_else(|| truncated("loadable segment"))?;
        segments.push(Segment {
            vaddr: u64_at(header, 16),
            paddr: u64_at(header, 24),
            file,
            memory_bytes: memory_bytes.max(file_bytes),
            executable: u32_at(header, 4) & PF_X != 0,
        });
    }
    if segments.is_empty() {
        return Err(BootError::NotAKernel { path: path.into() });
    }
    Ok(segments)
}

/// Code and data, by section; without a section table, by segment.
fn parse_sections(
    bytes: &[u8],
    path: &Path,
    segments: &[Segment],
) -> Result<(Vec<Span>, Vec<Span>), BootError> {
    let truncated = |part| BootError::KernelTruncated { path: path.into(), part };
    let (at, entry_bytes, count) = (u64_at(bytes, 40), u16_at(bytes, 58), u16_at(bytes, 60));
    let (mut code, mut data) = (Vec::new(), Vec::new());
    if at == 0 || count == 0 || usize::from(entry_bytes) < SHDR_BYTES {
        for s in segments {
            let span = Span { vaddr: s.vaddr, file: s.file.clone() };
            if s.executable {
                code.push(span.clone());
            }
            data.push(span);
        }
        return Ok((code, data));
    }
    let table = range_in(at, u64::from(entry_bytes) * u64::from(count), bytes.len())
        .ok_or_else(|| truncated("section header table"))?;
    for header in bytes[table].chunks_exact(usize::from(entry_bytes)) {
        let (kind, flags) = (u32_at(header, 4), u64_at(header, 8));
        if kind == 0 || kind == SHT_NOBITS || flags & SHF_ALLOC == 0 {
            continue;
        }
        let file = range_in(u64_at(header, 24), u64_at(header, 32), bytes.len())
            .ok_or_else(|| truncated("loaded section"))?;
        let span = Span { vaddr: u64_at(header, 16), file };
        if flags & SHF_EXECINSTR != 0 { code.push(span) } else { data.push(span) }
    }
    Ok((code, data))
}
