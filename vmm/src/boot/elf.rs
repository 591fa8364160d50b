//! The tables of an ELF file.
//!
//! Owns: [`read_programs`] and [`read_sections`], what an x86-64 ELF executable says of itself. Must never: judge what
//! it says beyond its form ([`super::image`] does). What an entry points to may lie outside of the file.
//! Follows: System V ABI, ELF-64 object file format, extended numbering included.

use std::ops::Range;

/// Bytes of the ELF header.
pub(super) const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;
const SHDR_BYTES: usize = 64;
const ELFCLASS32: u8 = 1;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const ET_CORE: u16 = 4;
/// In `e_phnum`: the number is in `sh_info` of section 0.
const PN_XNUM: u16 = 0xffff;
/// In `e_shstrndx`: the number is in `sh_link` of section 0.
const SHN_XINDEX: u16 = 0xffff;

/// Why a file is not taken, without its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is an ELF file of another sort. What it is, with what to do.
    Foreign(String),
    /// It ends before this part of it.
    Truncated(&'static str),
    /// It contradicts itself, or does what no kernel does.
    Malformed(String),
    /// It has no section table.
    NoSections,
    /// It cannot be entered. Why.
    NoEntry(String),
}

/// An entry of the program header table.
#[derive(Clone, Debug)]
pub(super) struct ProgramHeader {
    pub kind: u32,
    pub file_offset: u64,
    pub vaddr: u64,
    pub paddr: u64,
    pub file_bytes: u64,
    pub memory_bytes: u64,
}

/// An entry of the section header table.
#[derive(Clone, Debug)]
pub(super) struct SectionHeader {
    /// Its name, or its number where the file does not tell a name.
    pub name: String,
    pub kind: u32,
    pub flags: u64,
    pub vaddr: u64,
    pub file_offset: u64,
    pub len_bytes: u64,
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
pub(super) fn range_in(start: u64, len: u64, file_bytes: usize) -> Option<Range<usize>> {
    let end = start.checked_add(len)?;
    (end <= file_bytes as u64).then_some(start as usize..end as usize)
}

/// What the ELF header and the program header table say.
#[derive(Clone, Debug)]
pub(super) struct Programs {
    /// In a kernel a physical address.
    pub entry: u64,
    pub headers: Vec<ProgramHeader>,
    /// Where the table is in the file.
    pub table: Range<usize>,
}

/// Reads the headers of a file that begins with ELF's magic number.
///
/// # Errors
/// [`Fault::Foreign`], [`Fault::Truncated`], [`Fault::Malformed`].
pub(super) fn read_programs(bytes: &[u8]) -> Result<Programs, Fault> {
    check_header(bytes)?;
    let (at, entry_bytes) = (u64_at(bytes, 32), u16_at(bytes, 54));
    let count = match (u16_at(bytes, 56), first_section(bytes)) {
        (PN_XNUM, Some(section)) => u32_at(section, 44),
        (PN_XNUM, None) => {
            let detail = "it says that the number of its segments is in its section table, but has none";
            return Err(Fault::Malformed(detail.into()));
        }
        (count, _) => u32::from(count),
    };
    if count == 0 {
        return Err(Fault::Malformed("it has no program headers, so nothing says where it is loaded".into()));
    }
    if usize::from(entry_bytes) != PHDR_BYTES {
        return Err(Fault::Malformed(format!(
            "each of its program headers has {entry_bytes} bytes instead of {PHDR_BYTES}"
        )));
    }
    let table = range_in(at, u64::from(count) * PHDR_BYTES as u64, bytes.len())
        .ok_or(Fault::Truncated("program header table"))?;
    let header = |h: &[u8]| ProgramHeader {
        kind: u32_at(h, 0),
        file_offset: u64_at(h, 8),
        vaddr: u64_at(h, 16),
        paddr: u64_at(h, 24),
        file_bytes: u64_at(h, 32),
        memory_bytes: u64_at(h, 40),
    };
    let headers = bytes[table.clone()].chunks_exact(PHDR_BYTES).map(header).collect();
    Ok(Programs { entry: u64_at(bytes, 24), headers, table })
}

/// The section headers of a file whose program headers were read.
///
/// # Errors
/// [`Fault::NoSections`], [`Fault::Truncated`], [`Fault::Malformed`].
pub(super) fn read_sections(bytes: &[u8]) -> Result<Vec<SectionHeader>, Fault> {
    let at = u64_at(bytes, 40);
    if at == 0 {
        return Err(Fault::NoSections);
    }
    let first = first_section(bytes).ok_or(Fault::Truncated("section header table"))?;
    let count = match u16_at(bytes, 60) {
        0 => u64_at(first, 32),
        count => u64::from(count),
    };
    if count == 0 {
        return Err(Fault::NoSections);
    }
    let entry_bytes = u16_at(bytes, 58);
    if usize::from(entry_bytes) != SHDR_BYTES {
        return Err(Fault::Malformed(format!(
            "each of its section headers has {entry_bytes} bytes instead of {SHDR_BYTES}"
        )));
    }
    let table = count
        .checked_mul(SHDR_BYTES as u64)
        .and_then(|len| range_in(at, len, bytes.len()))
        .ok_or(Fault::Truncated("section header table"))?;
    let table = &bytes[table];
    let names_in = match u16_at(bytes, 62) {
        SHN_XINDEX => u32_at(first, 40) as usize,
        index => usize::from(index),
    };
    let names = table
        .chunks_exact(SHDR_BYTES)
        .nth(names_in)
        .and_then(|h| range_in(u64_at(h, 24), u64_at(h, 32), bytes.len()))
        .map_or(&[][..], |range| &bytes[range]);
    let header = |(number, h): (usize, &[u8])| SectionHeader {
        name: name_at(names, u32_at(h, 0) as usize).unwrap_or_else(|| format!("number {number}")),
        kind: u32_at(h, 4),
        flags: u64_at(h, 8),
        vaddr: u64_at(h, 16),
        file_offset: u64_at(h, 24),
        len_bytes: u64_at(h, 32),
    };
    Ok(table.chunks_exact(SHDR_BYTES).enumerate().map(header).collect())
}

/// Section 0, which holds what a number of 16 bits cannot.
fn first_section(bytes: &[u8]) -> Option<&[u8]> {
    let at = u64_at(bytes, 40);
    let range = range_in(at, SHDR_BYTES as u64, bytes.len()).filter(|_| at != 0)?;
    Some(&bytes[range])
}

/// Refuses everything that is not a complete header of an x86-64 ELF executable.
fn check_header(bytes: &[u8]) -> Result<(), Fault> {
    if bytes.len() < EHDR_BYTES {
        return Err(Fault::Truncated("ELF header"));
    }
    let (class, order) = (bytes[4], bytes[5]);
    let raw = [bytes[18], bytes[19]];
    let machine = if order == ELFDATA2LSB { u16::from_le_bytes(raw) } else { u16::from_be_bytes(raw) };
    if class == ELFCLASS32 && machine == EM_386 {
        let what = "a 32-bit x86 kernel or program (ELF). Only 64-bit kernels run here";
        return Err(Fault::Foreign(what.into()));
    }
    if class != ELFCLASS64 || order != ELFDATA2LSB || machine != EM_X86_64 {
        return Err(Fault::Foreign(format!("an ELF file for {}, not for x86-64", machine_name(machine))));
    }
    let what = match u16_at(bytes, 16) {
        ET_EXEC => return Ok(()),
        ET_REL => "an ELF object file or a kernel module. Give the linked vmlinux, or the bzImage (vmlinuz)",
        ET_DYN => {
            "a position-independent ELF file: an ordinary program, a library, or the unpacking program of a bzImage \
             (arch/x86/boot/compressed/vmlinux). Give the vmlinux at the top of the build tree, or the bzImage (vmlinuz)"
        }
        ET_CORE => "a core dump",
        _ => "an ELF file, but no executable",
    };
    Err(Fault::Foreign(what.into()))
}

fn machine_name(machine: u16) -> String {
    let name = match machine {
        2 | 43 => "SPARC",
        8 => "MIPS",
        20 | 21 => "PowerPC",
        22 => "IBM Z",
        40 => "32-bit ARM",
        62 => "x32",
        183 => "arm64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => return format!("machine {machine}"),
    };
    name.into()
}

/// Names only go into messages, so one that is too long or not printable counts as none.
fn name_at(names: &[u8], at: usize) -> Option<String> {
    const NAME_BYTES_MAX: usize = 64;
    let name = names.get(at..)?;
    let len = name.iter().take(NAME_BYTES_MAX).position(|b| *b == 0)?;
    let name = std::str::from_utf8(&name[..len]).ok()?;
    (!name.is_empty() && name.chars().all(|c| c.is_ascii_graphic())).then(|| name.to_owned())
}
