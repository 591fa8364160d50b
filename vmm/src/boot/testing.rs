//! Handmade kernels for the tests of this module.

use std::path::{Path, PathBuf};

use devices::GuestRam;

use super::image::{KernelImage, Span};
use super::ram_regions;

/// Where the handmade kernels' code is linked and loaded.
pub(super) const CODE_VADDR: u64 = 0xffff_ffff_8100_0000;
/// Guest-physical address of the same.
pub(super) const CODE_PADDR: u64 = 0x100_0000;

/// Zeroed guest memory.
pub(super) fn ram(mib: u64) -> GuestRam {
    GuestRam::from_ranges(&ram_regions(mib << 20)).unwrap()
}

/// A parsed image that is nothing but `code`.
pub(super) fn image_of(code: &[u8]) -> KernelImage {
    let mut image = KernelImage::parse(elf_of(code), Path::new("handmade")).unwrap();
    image.bytes = code.to_vec();
    image.segments[0].file = 0..code.len();
    image.code = vec![Span { vaddr: CODE_VADDR, file: 0..code.len() }];
    image
}

/// An ELF file with one segment and one section of `code`.
pub(super) fn elf_of(code: &[u8]) -> Vec<u8> {
    Handmade::of(code).bytes()
}

/// The same, loaded at `paddr`.
pub(super) fn elf_at(code: &[u8], paddr: u64) -> Vec<u8> {
    let mut elf = Handmade::of(code);
    (elf.entry, elf.segments[0].paddr) = (paddr, paddr);
    elf.bytes()
}

/// Where the body of a handmade ELF file is.
pub(super) const BODY_OFFSET: u64 = 0x400;

/// A segment of a handmade ELF file.
#[derive(Clone, Copy, Debug)]
pub(super) struct TestSegment {
    pub kind: u32,
    pub flags: u32,
    pub offset: u64,
    pub vaddr: u64,
    pub paddr: u64,
    pub file_bytes: u64,
    pub memory_bytes: u64,
}

/// A section of a handmade ELF file.
#[derive(Clone, Copy, Debug)]
pub(super) struct TestSection {
    pub name: &'static str,
    pub kind: u32,
    pub flags: u64,
    pub vaddr: u64,
    pub offset: u64,
    pub len_bytes: u64,
}

/// An ELF file of which each field can be made wrong. After the ELF header come the program headers, the body, the
/// names of the sections and, last, their headers.
#[derive(Clone, Debug)]
pub(super) struct Handmade {
    pub entry: u64,
    pub segments: Vec<TestSegment>,
    /// Without section 0 and that of the names, which are added if there is any.
    pub sections: Vec<TestSection>,
    pub body: Vec<u8>,
    /// Numbers of segments, of sections and of the section of names stand in section 0.
    pub extended_numbering: bool,
}

impl Handmade {
    /// `code` as `.text`, and nothing else.
    pub fn of(code: &[u8]) -> Self {
        let len = code.len() as u64;
        let segment = TestSegment {
            kind: 1,
            flags: 5,
            offset: BODY_OFFSET,
            vaddr: CODE_VADDR,
            paddr: CODE_PADDR,
            file_bytes: len,
            memory_bytes: len,
        };
        let text = TestSection {
            name: ".text",
            kind: 1,
            flags: 6, // ALLOC, EXECINSTR
            vaddr: CODE_VADDR,
            offset: BODY_OFFSET,
            len_bytes: len,
        };
        Self {
            entry: CODE_PADDR,
            segments: vec![segment],
            sections: vec![text],
            body: code.to_vec(),
            extended_numbering: false,
        }
    }

    /// Appends `bytes` to the body, loaded and linked right after what is there, as a section of these flags.
    pub fn with_section(mut self, name: &'static str, flags: u64, bytes: &[u8]) -> Self {
        let (at, len) = (self.body.len() as u64, bytes.len() as u64);
        self.body.extend(bytes);
        self.segments[0].file_bytes += len;
        self.segments[0].memory_bytes += len;
        let (vaddr, offset) = (CODE_VADDR + at, BODY_OFFSET + at);
        self.sections.push(TestSection { name, kind: 1, flags, vaddr, offset, len_bytes: len });
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, x86-64, version 1
        elf.extend(self.entry.to_le_bytes());
        elf.extend(64u64.to_le_bytes()); // program headers
        elf.resize(64, 0);
        for s in &self.segments {
            elf.extend([s.kind, s.flags].iter().flat_map(|field| field.to_le_bytes()));
            let fields = [s.offset, s.vaddr, s.paddr, s.file_bytes, s.memory_bytes, 0x1000];
            elf.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        }
        assert!(elf.len() as u64 <= BODY_OFFSET);
        elf.resize(BODY_OFFSET as usize, 0);
        elf.extend(&self.body);
        let (phnum, mut shnum, mut shstrndx) = (self.segments.len() as u16, 0, 0);
        if !self.sections.is_empty() {
            shnum = self.sections.len() as u16 + 2;
            shstrndx = shnum - 1;
            self.add_sections(&mut elf, shnum, phnum);
        }
        let extended = self.extended_numbering;
        let (phnum, shnum) = if extended { (0xffff, 0) } else { (phnum, shnum) };
        let shstrndx = if extended { 0xffff } else { shstrndx };
        let fields = [64, 56, phnum, 64, shnum, shstrndx];
        elf[52..64].copy_from_slice(&fields.map(u16::to_le_bytes).concat());
        elf
    }

    fn add_sections(&self, elf: &mut Vec<u8>, shnum: u16, phnum: u16) {
        let names_at = elf.len() as u64;
        let mut names = vec![0];
        let mut headers = section_header(0, [0, 0, 0, 0], (0, 0));
        if self.extended_numbering {
            headers = section_header(0, [0, 0, 0, 0], (u64::from(shnum), phnum.into()));
            headers[40..44].copy_from_slice(&u32::from(shnum - 1).to_le_bytes());
        }
        for s in &self.sections {
            let fields = [u64::from(s.kind), s.flags, s.vaddr, s.offset];
            headers.extend(section_header(names.len() as u32, fields, (s.len_bytes, 0)));
            names.extend(s.name.as_bytes());
            names.push(0);
        }
        headers.extend(section_header(0, [3, 0, 0, names_at], (names.len() as u64, 0)));
        elf.extend(names);
        let at = elf.len() as u64;
        elf[40..48].copy_from_slice(&at.to_le_bytes());
        elf.extend(headers);
    }
}

/// `[kind, flags, vaddr, offset]` and `(len_bytes, info)`.
fn section_header(
    name: u32,
    [kind, flags, vaddr, offset]: [u64; 4],
    (len_bytes, info): (u64, u32),
) -> Vec<u8> {
    let mut header = name.to_le_bytes().to_vec();
    header.extend((kind as u32).to_le_bytes());
    header.extend([flags, vaddr, offset, len_bytes].iter().flat_map(|field| field.to_le_bytes()));
    header.extend([0, info].iter().flat_map(|field: &u32| field.to_le_bytes()));
    header.resize(64, 0);
    header
}

/// A kernel that Debian made, unpacked from a package in the cache.
pub(super) struct DebianKernel {
    /// Holds `vmlinuz` and the configuration.
    _dir: tempfile::TempDir,
    pub path: PathBuf,
    /// As its package is named.
    pub release: String,
}

/// The oldest and the newest kernel of which a package is in the cache, of this flavour (`cloud-`, `rt-` or none); says so
/// loudly if there is none. All of Debian's kernels are tried by scripts/kernels.sh.
pub(super) fn debian_kernels(test: &str, flavour: &str) -> Vec<DebianKernel> {
    let cache = std::env::var_os("VMFT_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/vmft")));
    let files = cache.and_then(|cache| std::fs::read_dir(cache.join("debs")).ok());
    let mut packages: Vec<(Vec<u64>, PathBuf)> = files
        .into_iter()
        .flatten()
        .map(|file| file.unwrap().path())
        .filter_map(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            is_package_of(&name, flavour).then(|| (numbers(&name), path))
        })
        .collect();
    packages.sort();
    if packages.is_empty() {
        eprintln!("SKIPPED: {test}: no package of a kernel in the cache (VMFT_CACHE or ~/.cache/vmft)");
    }
    let newest = packages.len().saturating_sub(1);
    let ends = packages.iter().enumerate().filter(|(i, _)| *i == 0 || *i == newest);
    ends.map(|(_, (_, package))| unpack(package)).collect()
}

fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// Whether a package of this name holds a kernel: `linux-image-*`, or from 6.19 on `linux-binary-*`.
fn is_package_of(name: &str, flavour: &str) -> bool {
    let release = name.strip_prefix("linux-image-").or_else(|| name.strip_prefix("linux-binary-"));
    let release = release.and_then(|rest| rest.split('_').next()).filter(|_| name.ends_with(".deb"));
    let version = release.and_then(|release| release.strip_suffix(&format!("-{flavour}amd64")));
    version.is_some_and(|v| {
        v.starts_with(|c: char| c.is_ascii_digit()) && !v.contains("-cloud") && !v.contains("-rt")
    })
}

/// Takes kernel and configuration out of a package. From 7.2 on they are not in /boot.
fn unpack(package: &Path) -> DebianKernel {
    let dir = tempfile::tempdir().unwrap();
    let command = "dpkg-deb --fsys-tarfile \"$1\" | tar -x -C \"$2\" --wildcards './boot/*' './usr/lib/modules/*/vmlinuz'";
    let arguments =
        ["-c".as_ref(), command.as_ref(), "sh".as_ref(), package.as_os_str(), dir.path().as_os_str()];
    // tar fails because each package has its kernel in one of the two places only.
    std::process::Command::new("sh").args(arguments).stderr(std::process::Stdio::null()).status().unwrap();
    let name = package.file_name().unwrap().to_string_lossy().into_owned();
    let release = name.split('_').next().unwrap().splitn(3, '-').nth(2).unwrap().to_owned();
    let places = [format!("boot/vmlinuz-{release}"), format!("usr/lib/modules/{release}/vmlinuz")];
    let path = places.iter().map(|place| dir.path().join(place)).find(|path| path.exists());
    let path = path.unwrap_or_else(|| panic!("{} holds no kernel", package.display()));
    DebianKernel { _dir: dir, path, release }
}
