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
    let start = image.segments[0].file.start;
    image.bytes.drain(..start);
    image.segments[0].file = 0..code.len();
    image.code = vec![Span { vaddr: CODE_VADDR, file: 0..code.len() }];
    image
}

/// An ELF file with one executable segment of `code` and no section table.
pub(super) fn elf_of(code: &[u8]) -> Vec<u8> {
    elf_at(code, CODE_PADDR)
}

/// The same, loaded at `paddr`.
pub(super) fn elf_at(code: &[u8], paddr: u64) -> Vec<u8> {
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // ET_EXEC, x86-64, version 1
    elf.extend(paddr.to_le_bytes()); // entry
    elf.extend(64u64.to_le_bytes()); // program headers
    elf.extend(0u64.to_le_bytes()); // no section headers
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, R+X
    let len = (code.len() as u64).to_le_bytes();
    elf.extend(120u64.to_le_bytes());
    elf.extend(CODE_VADDR.to_le_bytes());
    elf.extend(paddr.to_le_bytes());
    elf.extend(len);
    elf.extend(len);
    elf.extend(0x1000u64.to_le_bytes());
    elf.extend(code);
    elf
}

/// The package of the kernel whose instructions the tests count.
const DEBIAN_PACKAGE: &str = "linux-image-6.1.0-56-cloud-amd64_";

/// Debian's cloud kernel, where a package of it lies in the cache; says so loudly where not.
pub(super) fn debian_kernel(test: &str) -> Option<(tempfile::TempDir, PathBuf)> {
    let cache = std::env::var_os("VMFT_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/vmft")));
    let package = cache.and_then(|cache| {
        let files = std::fs::read_dir(cache.join("debs")).ok()?;
        files.filter_map(|f| Some(f.ok()?.path())).find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with(DEBIAN_PACKAGE) && name.ends_with(".deb")
        })
    });
    let Some(package) = package else {
        eprintln!("SKIPPED: {test}: no {DEBIAN_PACKAGE} in the cache (VMFT_CACHE or ~/.cache/vmft)");
        return None;
    };
    let dir = tempfile::tempdir().unwrap();
    let status = std::process::Command::new("dpkg").arg("-x").arg(&package).arg(dir.path()).status().unwrap();
    assert!(status.success(), "dpkg -x {} failed", package.display());
    let kernel = std::fs::read_dir(dir.path().join("boot"))
        .unwrap()
        .map(|f| f.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("vmlinuz-"))
        .unwrap();
    Some((dir, kernel))
}
