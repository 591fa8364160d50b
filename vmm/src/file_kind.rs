//! Names a file by its first bytes, so that a refusal can say what was given in the place of a kernel, an initrd or a
//! disk.
//!
//! Owns: [`FileKind`]. Must never: open a file, or declare one good; those who take the file check that.

use std::fmt;

/// How many bytes [`FileKind::of`] looks at. Fewer give a less exact answer.
pub const LOOKED_AT_BYTES: usize = 36 << 10;
/// From here on a bzImage says that it is one.
const HEADERS_BYTES: usize = 0x206;

/// What a file is, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// It has no content.
    Empty,
    /// A compressed file. The program unpacks it with `-dc`.
    Compressed {
        /// The program that makes and unpacks such files.
        program: &'static str,
    },
    /// An ELF file of any sort and machine.
    Elf,
    /// A Linux kernel in the x86 boot format (`vmlinuz`).
    BzImage,
    /// A kernel in a form that this monitor cannot read.
    OtherKernel(&'static str),
    /// A Windows or EFI program; with a kernel inside it is a unified kernel image.
    Pe {
        /// The machine that it runs on.
        machine: &'static str,
        /// It has a section `.linux`.
        unified: bool,
    },
    /// The beginning of an EFI program or a bzImage that ends before its headers say which.
    CutOff,
    /// A virtual disk in a format of its own.
    VirtualDisk(&'static str),
    /// The contents of a disk: partitions or a file system.
    RawDisk(&'static str),
    /// A cpio archive: an initramfs.
    Cpio,
    /// Another archive or a package.
    Archive(&'static str),
    /// Begins with `#!`.
    Script,
    /// Nothing but text.
    Text,
    /// None of these.
    Unknown,
}

/// Offset, magic number and kind. The first that fits counts.
const MAGICS: &[(usize, &[u8], FileKind)] = &[
    (0, b"\x7fELF", FileKind::Elf),
    (0, &[0x1f, 0x8b], FileKind::Compressed { program: "gzip" }),
    (0, b"\xfd7zXZ\0", FileKind::Compressed { program: "xz" }),
    (0, &[0x28, 0xb5, 0x2f, 0xfd], FileKind::Compressed { program: "zstd" }),
    (0, &[0x02, 0x21, 0x4c, 0x18], FileKind::Compressed { program: "lz4" }),
    (0, &[0x04, 0x22, 0x4d, 0x18], FileKind::Compressed { program: "lz4" }),
    (0, b"BZh", FileKind::Compressed { program: "bzip2" }),
    (0, b"\x89LZO\0", FileKind::Compressed { program: "lzop" }),
    (0, &[0x5d, 0, 0], FileKind::Compressed { program: "lzma" }),
    (0, b"LZIP", FileKind::Compressed { program: "lzip" }),
    (0, b"QFI\xfb", FileKind::VirtualDisk("qcow2")),
    (0, b"KDMV", FileKind::VirtualDisk("VMDK")),
    (0, b"# Disk DescriptorFile", FileKind::VirtualDisk("VMDK")),
    (0x40, &[0x7f, 0x10, 0xda, 0xbe], FileKind::VirtualDisk("VDI")),
    (0, b"vhdxfile", FileKind::VirtualDisk("VHDX")),
    (0, b"conectix", FileKind::VirtualDisk("VHD")),
    (0, b"QED\0", FileKind::VirtualDisk("QED")),
    (0, b"WithoutFreeSpace", FileKind::VirtualDisk("Parallels")),
    (0, b"WithouFreSpacExt", FileKind::VirtualDisk("Parallels")),
    (0, b"070701", FileKind::Cpio),
    (0, b"070702", FileKind::Cpio),
    (0, b"070707", FileKind::Cpio),
    (0, &[0xc7, 0x71], FileKind::Cpio),
    (0, b"!<arch>\ndebian-binary", FileKind::Archive("a Debian package")),
    (0, b"!<arch>\n", FileKind::Archive("an archive of object files")),
    (0, &[0xed, 0xab, 0xee, 0xdb], FileKind::Archive("an RPM package")),
    (0, b"PK\x03\x04", FileKind::Archive("a zip archive")),
    (257, b"ustar", FileKind::Archive("a tar archive")),
    (0x38, b"ARMd", FileKind::OtherKernel("a kernel for arm64 (Image)")),
    (0x38, b"RSC\x05", FileKind::OtherKernel("a kernel for RISC-V (Image)")),
    (4, b"zimg", FileKind::OtherKernel("a kernel for another machine in a compressed EFI image")),
    (0x24, &[0x18, 0x28, 0x6f, 0x01], FileKind::OtherKernel("a kernel for 32-bit ARM (zImage)")),
    (0, &[0x27, 0x05, 0x19, 0x56], FileKind::OtherKernel("an image for the boot loader U-Boot")),
    (
        0,
        &[0xd0, 0x0d, 0xfe, 0xed],
        FileKind::OtherKernel("a device tree or an image for the boot loader U-Boot"),
    ),
    (0, b"ANDROID!", FileKind::OtherKernel("an Android boot image")),
    (0x8001, b"CD001", FileKind::RawDisk("an image of a CD (ISO 9660)")),
    (0x200, b"EFI PART", FileKind::RawDisk("a disk with partitions (GPT)")),
    (0x438, &[0x53, 0xef], FileKind::RawDisk("an ext2, ext3 or ext4 file system")),
    (0, b"XFSB", FileKind::RawDisk("an XFS file system")),
    (0, b"hsqs", FileKind::RawDisk("a squashfs file system")),
    (0x1fe, &[0x55, 0xaa], FileKind::RawDisk("a disk with a boot sector")),
    (0, b"#!", FileKind::Script),
];

impl FileKind {
    /// What a file that begins with `bytes` is.
    pub fn of(bytes: &[u8]) -> Self {
        if bytes.is_empty() {
            return Self::Empty;
        }
        // Before the magic numbers: it is a PE file and has a boot sector, too.
        if is_bzimage(bytes) {
            return Self::BzImage;
        }
        if bytes.starts_with(b"MZ") && bytes.len() < HEADERS_BYTES {
            return Self::CutOff;
        }
        let has = |at: usize, magic: &[u8]| bytes.get(at..).is_some_and(|rest| rest.starts_with(magic));
        let other = || if is_text(bytes) { Self::Text } else { Self::Unknown };
        let by_magic = || MAGICS.iter().find(|(at, magic, _)| has(*at, magic)).map(|(_, _, kind)| *kind);
        match by_magic() {
            Some(kernel @ Self::OtherKernel(_)) => kernel,
            by_magic => pe(bytes).or(by_magic).unwrap_or_else(other),
        }
    }

    /// How the contents are got out of a compressed file; `None` for any other kind.
    pub fn unpack_command(self) -> Option<String> {
        match self {
            // xz knows the older format, and nobody has the older program.
            Self::Compressed { program: "lzma" } => Some("xz --format=lzma -dc".into()),
            Self::Compressed { program } => Some(format!("{program} -dc")),
            _ => None,
        }
    }
}

/// What it is, with its article.
impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("an empty file"),
            Self::Compressed { program } => write!(f, "a file compressed with {program}"),
            Self::Elf => f.write_str("an ELF file"),
            Self::BzImage => f.write_str("a Linux kernel (bzImage)"),
            Self::OtherKernel(what) | Self::RawDisk(what) | Self::Archive(what) => f.write_str(what),
            Self::Pe { machine, unified: true } => write!(f, "a unified kernel image (UKI) for {machine}"),
            Self::Pe { machine, unified: false } => {
                write!(f, "a PE file (an EFI or Windows program) for {machine}")
            }
            Self::CutOff => f.write_str("only the beginning of a kernel or an EFI program"),
            Self::VirtualDisk(format) => write!(f, "a virtual disk in the format {format}"),
            Self::Cpio => f.write_str("a cpio archive (an initramfs)"),
            Self::Script => f.write_str("a script"),
            Self::Text => f.write_str("a text file"),
            Self::Unknown => f.write_str("a file of an unknown kind"),
        }
    }
}

/// Whether `bytes` begin like a bzImage. Follows: Linux `Documentation/arch/x86/boot.rst`.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && bytes.get(0x202..HEADERS_BYTES) == Some(b"HdrS")
}

/// Follows: Microsoft's PE format, sections "MS-DOS stub", "COFF file header" and "section table".
fn pe(bytes: &[u8]) -> Option<FileKind> {
    let field = |at: usize| -> Option<usize> {
        let raw = bytes.get(at..at.checked_add(2)?)?;
        Some(usize::from(raw[0]) | usize::from(raw[1]) << 8)
    };
    let header = bytes.starts_with(b"MZ").then(|| field(0x3c))??;
    if bytes.get(header..header + 4) != Some(b"PE\0\0") {
        return None;
    }
    let machine = match field(header + 4)? {
        0x8664 => "x86-64",
        0x014c => "32-bit x86",
        0xaa64 => "arm64",
        0x01c0 | 0x01c2 | 0x01c4 => "32-bit ARM",
        0x5064 => "RISC-V",
        0x6264 => "LoongArch",
        _ => "an unknown machine",
    };
    let sections = header + 24 + field(header + 20).unwrap_or(0);
    let names = (0..field(header + 6).unwrap_or(0)).map_while(|i| bytes.get(sections + i * 40..)?.get(..8));
    let unified = names.into_iter().any(|name| name == b".linux\0\0");
    Some(FileKind::Pe { machine, unified })
}

fn is_text(bytes: &[u8]) -> bool {
    bytes.iter().take(512).all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `magic` at `at`, in a file of `len` bytes.
    fn file(len: usize, at: usize, magic: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; len];
        bytes[at..at + magic.len()].copy_from_slice(magic);
        bytes
    }

    #[test]
    fn each_magic_number_is_found_at_its_place_only() {
        for (at, magic, kind) in MAGICS {
            assert_eq!(FileKind::of(&file(LOOKED_AT_BYTES, *at, magic)), *kind, "{magic:02x?}");
            assert_eq!(
                FileKind::of(&file(LOOKED_AT_BYTES, at + 1, magic)),
                FileKind::Unknown,
                "{magic:02x?}"
            );
        }
        assert_eq!(FileKind::of(b""), FileKind::Empty);
        assert_eq!(FileKind::of(b"CONFIG_X86=y\n"), FileKind::Text);
    }

    fn pe_of(machine: u16, section: &[u8]) -> Vec<u8> {
        let mut bytes = file(0x400, 0, b"MZ");
        bytes[0x3c] = 0x40;
        bytes[0x40..0x44].copy_from_slice(b"PE\0\0");
        bytes[0x44..0x46].copy_from_slice(&machine.to_le_bytes());
        bytes[0x46] = 2; // sections
        bytes[0x54] = 0xf0; // bytes of the optional header
        let second = 0x40 + 24 + 0xf0 + 40;
        bytes[second..second + section.len()].copy_from_slice(section);
        bytes
    }

    #[test]
    fn efi_programs_and_unified_images_are_told_apart() {
        let kind = |machine, section: &[u8]| FileKind::of(&pe_of(machine, section));
        assert_eq!(kind(0x8664, b".text"), FileKind::Pe { machine: "x86-64", unified: false });
        assert_eq!(kind(0x8664, b".linux"), FileKind::Pe { machine: "x86-64", unified: true });
        assert_eq!(kind(0xaa64, b".linuxes"), FileKind::Pe { machine: "arm64", unified: false });
        let mut arm64 = pe_of(0xaa64, b".text");
        arm64[0x38..0x3c].copy_from_slice(b"ARMd");
        assert_eq!(FileKind::of(&arm64), FileKind::OtherKernel("a kernel for arm64 (Image)"));
    }

    #[test]
    fn a_bzimage_is_no_efi_program_though_it_is_a_pe_file() {
        let mut bytes = pe_of(0x8664, b".text");
        bytes[0x1fe..0x206].copy_from_slice(b"\x55\xaa\xeb\x6aHdrS");
        assert_eq!(FileKind::of(&bytes), FileKind::BzImage);
    }

    #[test]
    fn no_cut_and_no_flipped_bit_panics() {
        let bytes = pe_of(0x8664, b".linux");
        for len in 0..bytes.len() {
            FileKind::of(&bytes[..len]);
        }
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            FileKind::of(&bytes);
        }
    }
}
