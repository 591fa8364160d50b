//! From a kernel file to a guest that is about to execute its first instruction.
//!
//! Owns: what is in guest memory and in the registers at anchor 0, and the guest's CPUID table. Must never: let
//! anything but the files named in [`BootConfig`], the seed and the configuration decide what is in memory: with the
//! same, two hosts get the same memory, byte for byte.
//!
//! ```text
//! kernel file ─> bzimage (unpack) ─> elf, image (check) ─> tsd, cr4_shadow, rdtsc ┐
//! initrd ───────────────────────────────────────────────────────────────────────┼─> guest RAM
//! windows ──> acpi tables, cmdline ──> start (zero page, page tables, GDT) ─────┘   registers
//! ```
//!
//! Guest RAM must be zero before [`load`]: what the kernel's file leaves out (its .bss) is not written.

mod acpi;
mod bzimage;
mod check;
mod cmdline;
mod cpuid;
mod cr4_shadow;
mod elf;
mod error;
mod ext4;
mod image;
mod rdtsc;
mod refusal;
mod start;
mod sweep;
#[cfg(test)]
mod testing;
mod tsd;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use devices::{GuestRam, VirtioWindow};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

pub use check::{KernelReport, check, check_bytes};
pub use cpuid::cpuid_table;
pub use error::BootError;
pub use ext4::Ext4;
pub use rdtsc::{GP_PORT, RDTSC_PORT, RDTSCP_PORT};

use crate::file_kind::FileKind;
use crate::kvm::PAGE_BYTES;
use bzimage::Packing;
use image::KernelImage;
use start::InitrdPlace;

const MIB: u64 = 1 << 20;

/// What to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootConfig<'a> {
    /// A vmlinux or a bzImage, x86-64.
    pub kernel: &'a Path,
    /// The initial RAM disk.
    pub initrd: Option<&'a Path>,
    /// Appended to the monitor's own command line.
    pub cmdline: Option<&'a str>,
    /// All guest RAM; [`ram_regions`] says where it is.
    pub memory_bytes: u64,
    /// Given to the guest's random number generator, once.
    pub random_seed: [u8; 32],
    /// The virtio devices that the guest is told of.
    pub windows: &'a [VirtioWindow],
}

/// How a loaded guest starts.
#[derive(Clone, Debug)]
pub struct BootState {
    /// General registers.
    pub regs: kvm_regs,
    /// The release in the kernel's banner.
    pub kernel_version: Option<String>,
    /// RDTSC and RDTSCP instructions that became port reads.
    pub rdtsc_rewritten: usize,
    /// The whole kernel command line.
    pub cmdline: String,
}

impl BootState {
    /// Turns the special registers of a fresh vCPU into those the kernel starts with: 64-bit mode, identity
    /// paging, CR4.TSD set.
    pub fn apply_sregs(&self, sregs: &mut kvm_sregs) {
        start::set_start_sregs(sregs);
    }
}

/// Where a guest's RAM is: from 0 up to 3 GiB, the rest from 4 GiB. Between them are the devices.
pub fn ram_regions(memory_bytes: u64) -> Vec<(GuestAddress, usize)> {
    let low = memory_bytes.min(start::LOW_RAM_END);
    let mut regions = vec![(GuestAddress(0), low as usize)];
    if memory_bytes > low {
        regions.push((GuestAddress(start::HIGH_RAM_START), (memory_bytes - low) as usize));
    }
    regions
}

/// Puts a guest into `ram`, which must be zero and laid out as [`ram_regions`] says.
///
/// # Errors
/// Any [`BootError`] but those about CPUID.
pub fn load(ram: &GuestRam, config: &BootConfig<'_>) -> Result<BootState, BootError> {
    let Prepared { image: kernel, rewritten, warnings, .. } =
        prepare(read_file("kernel", config.kernel)?, config.kernel)?;
    for warning in warnings {
        tracing::warn!(kernel = %config.kernel.display(), "{warning}");
    }
    let cmdline = cmdline::command_line(config.cmdline, cmdline::Discovery::of(&kernel), config.windows);
    check_cmdline(&cmdline)?;
    place_kernel(ram, &kernel, config)?;
    let initrd = config.initrd.map_or(Ok(InitrdPlace::default()), |path| {
        place_initrd(ram, path, kernel.end(), config.memory_bytes)
    })?;
    acpi::write_tables(ram, config.windows)?;
    start::write_boot_data(ram, &cmdline, initrd, &config.random_seed, config.memory_bytes)?;
    Ok(BootState {
        regs: start::start_regs(kernel.entry),
        kernel_version: kernel.version(),
        rdtsc_rewritten: rewritten.len(),
        cmdline,
    })
}

fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    let unreadable = |source| BootError::Unreadable { what, path: path.into(), source };
    let kind = std::fs::metadata(path).map_err(unreadable)?.file_type();
    // A character device may have no end.
    if !kind.is_file() && !kind.is_fifo() {
        return Err(BootError::NotAFile { what, path: path.into() });
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(unreadable)?;
    Ok(bytes)
}

/// A kernel that is ready to be placed in memory.
struct Prepared {
    image: KernelImage,
    packing: Option<Packing>,
    /// The linked address of each RDTSC and RDTSCP that is a port read now.
    rewritten: Vec<u64>,
    warnings: Vec<&'static str>,
}

/// Unpacks and checks a kernel and makes every read of the TSC in it exit to the monitor; `path` names it in errors and
/// says where its configuration may be.
fn prepare(bytes: Vec<u8>, path: &Path) -> Result<Prepared, BootError> {
    let (mut image, packing) = parse_kernel(bytes, path)?;
    check_place(&image, path)?;
    let (rewritten, toggles_found) = rewrite_code(&mut image, path)?;
    let no_toggles = "where this kernel toggles CR4.TSD was not found: a guest process that calls prctl(PR_SET_TSC) may \
                      end the trapping of user-mode RDTSC";
    let warnings = (!toggles_found).then_some(no_toggles).into_iter();
    let warnings = warnings.chain(Ext4::of(&image, path).warning()).collect();
    Ok(Prepared { image, packing, rewritten, warnings })
}

fn parse_kernel(bytes: Vec<u8>, path: &Path) -> Result<(KernelImage, Option<Packing>), BootError> {
    let (elf, packing) = match FileKind::of(&bytes) {
        FileKind::Elf => (bytes, None),
        FileKind::BzImage => {
            let (elf, packing) = bzimage::unpack(&bytes, path)?;
            let found = FileKind::of(&elf);
            if found != FileKind::Elf {
                let detail = format!("it holds {found} in the place of an ELF file");
                return Err(BootError::Unpack { path: path.into(), detail });
            }
            (elf, Some(packing))
        }
        _ => {
            let found = refusal::in_place_of_kernel(&bytes, path);
            return Err(BootError::NotAKernel { path: path.into(), found });
        }
    };
    Ok((KernelImage::parse(elf, path)?, packing))
}

/// Gives the addresses of the instructions replaced, and whether the kernel's toggles of CR4.TSD were found.
fn rewrite_code(kernel: &mut KernelImage, path: &Path) -> Result<(Vec<u64>, bool), BootError> {
    let of_linux = kernel.version().is_some();
    let untrapped = |detail| match of_linux {
        true => BootError::UserRdtscUntrapped { path: path.into(), detail },
        false => BootError::NotAKernel {
            path: path.into(),
            found: "an ELF executable without Linux's banner, so another program. Give a Linux kernel".into(),
        },
    };
    let startup_constants = tsd::patch_startup(kernel).map_err(untrapped)?;
    let (mut rdtsc, mut shadow) = (rdtsc::RdtscSites::default(), cr4_shadow::Cr4Shadow::default());
    sweep::sweep(kernel, |site| {
        rdtsc.visit(site);
        shadow.visit(site);
    });
    let shadow = shadow.keep_tsd(kernel).map_err(untrapped)?;
    let addresses = rdtsc.addresses();
    let rewritten = rdtsc.rewrite(&mut kernel.bytes);
    tracing::debug!(?rewritten, startup_constants, ?shadow, "kernel rewritten");
    Ok((addresses, shadow.toggles > 0))
}

fn check_cmdline(cmdline: &str) -> Result<(), BootError> {
    let max_bytes = start::CMDLINE_BYTES_MAX;
    if cmdline.len() > max_bytes {
        return Err(BootError::CmdlineTooLong { len_bytes: cmdline.len(), max_bytes });
    }
    if cmdline.contains('\0') { Err(BootError::CmdlineZeroByte) } else { Ok(()) }
}

/// Whether the kernel wants to be where a guest may have memory.
fn check_place(kernel: &KernelImage, path: &Path) -> Result<(), BootError> {
    let (start, end, limit) = (kernel.start(), kernel.end(), start::LOW_RAM_END);
    if start < start::KERNEL_START_MIN {
        return Err(BootError::KernelTooLow { path: path.into(), start });
    }
    if end > limit {
        return Err(BootError::KernelTooHigh { path: path.into(), end, limit });
    }
    Ok(())
}

fn place_kernel(ram: &GuestRam, kernel: &KernelImage, config: &BootConfig<'_>) -> Result<(), BootError> {
    if kernel.end() > config.memory_bytes {
        return Err(BootError::DoesNotFit {
            what: "the kernel",
            path: config.kernel.into(),
            have_mib: config.memory_bytes / MIB,
            need_mib: kernel.end().div_ceil(MIB),
        });
    }
    for segment in &kernel.segments {
        let bytes = &kernel.bytes[segment.file.clone()];
        ram.write_slice(bytes, GuestAddress(segment.paddr)).map_err(|e| BootError::Memory {
            what: "kernel",
            address: segment.paddr,
            detail: e.to_string(),
        })?;
    }
    Ok(())
}

/// As high as the kernel can reach it, so that it is out of the way.
fn place_initrd(
    ram: &GuestRam,
    path: &Path,
    kernel_end: u64,
    memory_bytes: u64,
) -> Result<InitrdPlace, BootError> {
    let bytes = read_file("initrd", path)?;
    if let Some(found) = refusal::in_place_of_initrd(&bytes) {
        return Err(BootError::NotAnInitrd { path: path.into(), found });
    }
    let len_bytes = bytes.len() as u64;
    let first_free = kernel_end.next_multiple_of(PAGE_BYTES);
    let least_end = first_free + len_bytes.next_multiple_of(PAGE_BYTES);
    if least_end > start::INITRD_END_MAX {
        return Err(BootError::InitrdTooLarge { path: path.into(), len_mib: len_bytes.div_ceil(MIB) });
    }
    let end = memory_bytes.min(start::INITRD_END_MAX);
    if least_end > end {
        return Err(BootError::DoesNotFit {
            what: "the initrd",
            path: path.into(),
            have_mib: memory_bytes / MIB,
            need_mib: least_end.div_ceil(MIB),
        });
    }
    let start = (end - len_bytes) & !(PAGE_BYTES - 1);
    ram.write_slice(&bytes, GuestAddress(start)).map_err(|e| BootError::Memory {
        what: "initrd",
        address: start,
        detail: e.to_string(),
    })?;
    Ok(InitrdPlace { start, len_bytes })
}

#[cfg(test)]
mod tests {
    use super::testing::{BODY_OFFSET, CODE_PADDR, Handmade, debian_kernels, elf_at, elf_of, ram};
    use super::*;
    use devices::VirtioKind;
    use std::path::PathBuf;
    use xxhash_rust::xxh3::xxh3_64;

    /// mov ecx, PGE|PAE; mov cr4, rcx; mov rax, cr4; mov gs:[0x100], rax; mov rdi, gs:[0x100]; and rdi, ~15;
    /// rdtsc; ret
    const CODE: [u8; 36] = [
        0xb9, 0xa0, 0, 0, 0, 0x0f, 0x22, 0xe1, 0x0f, 0x20, 0xe0, 0x65, 0x48, 0x89, 0x04, 0x25, 0, 1, 0, 0,
        0x65, 0x48, 0x8b, 0x3c, 0x25, 0, 1, 0, 0, 0x48, 0x83, 0xe7, 0xf0, 0x0f, 0x31, 0xc3,
    ];

    fn config(kernel: &Path, memory_mib: u64) -> BootConfig<'_> {
        BootConfig {
            kernel,
            initrd: None,
            cmdline: None,
            memory_bytes: memory_mib << 20,
            random_seed: [7; 32],
            windows: &[],
        }
    }

    /// A file with this content, in a directory that lives as long as the first value.
    fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, content).unwrap();
        (dir, path)
    }

    fn read<const N: usize>(ram: &GuestRam, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn load_file(content: &[u8], memory_mib: u64) -> Result<BootState, BootError> {
        let (_dir, path) = file(content);
        load(&ram(memory_mib), &config(&path, memory_mib))
    }

    fn load_initrd(content: &[u8], memory_mib: u64) -> (GuestRam, Result<BootState, BootError>) {
        let (_kernel_dir, kernel) = file(&elf_of(&CODE));
        let (_initrd_dir, initrd) = file(content);
        let ram = ram(memory_mib);
        let state = load(&ram, &BootConfig { initrd: Some(&initrd), ..config(&kernel, memory_mib) });
        (ram, state)
    }

    #[test]
    fn ram_has_a_hole_between_3_and_4_gib() {
        assert_eq!(ram_regions(64 << 20), [(GuestAddress(0), 64 << 20)]);
        assert_eq!(ram_regions(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(ram_regions(5 << 30), [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 2 << 30)]);
    }

    #[test]
    fn a_vmlinux_is_patched_and_everything_is_where_the_kernel_looks() {
        let (_dir, path) = file(&elf_of(&CODE));
        let ram = ram(32);
        let windows = [VirtioKind::Net.window()];
        let wanted = BootConfig { cmdline: Some("rw"), windows: &windows, ..config(&path, 32) };
        let state = load(&ram, &wanted).unwrap();
        assert_eq!((state.regs.rip, state.rdtsc_rewritten), (CODE_PADDR, 1));
        let mut patched = CODE;
        (patched[1], patched[32]) = (0xa4, 0xf4);
        patched[33..35].copy_from_slice(&[0xe5, 0xf1]);
        assert_eq!(read::<36>(&ram, CODE_PADDR), patched);

        let zero_page = state.regs.rsi;
        let cmdline = u32::from_le_bytes(read(&ram, zero_page + 0x228));
        let mut text = vec![0; state.cmdline.len() + 1];
        ram.read_slice(&mut text, GuestAddress(cmdline.into())).unwrap();
        assert_eq!(text, [state.cmdline.as_bytes(), b"\0"].concat());
        let seed = u64::from_le_bytes(read(&ram, zero_page + 0x250));
        assert_eq!(read::<32>(&ram, seed + 16), [7; 32]);
        let rsdp = u64::from_le_bytes(read(&ram, zero_page + 0x70));
        assert_eq!(&read::<8>(&ram, rsdp), b"RSD PTR ");
        assert_eq!(read::<4>(&ram, zero_page + 0x218), [0; 4], "no initrd");
    }

    #[test]
    fn the_initrd_ends_at_the_top_of_memory() {
        let content = [5; 5000];
        let (ram, state) = load_initrd(&content, 32);
        let zero_page = state.unwrap().regs.rsi;
        let start = u32::from_le_bytes(read(&ram, zero_page + 0x218));
        assert_eq!(u32::from_le_bytes(read(&ram, zero_page + 0x21c)), 5000);
        assert_eq!(start, (32 << 20) - 8192);
        assert_eq!(read::<5000>(&ram, start.into()), content);
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let missing = load(&ram(32), &config(Path::new("/nowhere/vmlinux"), 32)).unwrap_err();
        assert!(missing.to_string().starts_with("the kernel /nowhere/vmlinux cannot be read: "), "{missing}");
        for no_file in ["/", "/dev/zero"] {
            let error = load(&ram(32), &config(Path::new(no_file), 32)).unwrap_err();
            assert!(matches!(error, BootError::NotAFile { .. }), "{error}");
        }
        let mut astray = elf_of(&CODE);
        astray[24] = 0xff; // entry point
        assert!(matches!(load_file(&astray, 32), Err(BootError::No64BitEntry { .. })));
        let low = load_file(&elf_at(&CODE, 0x8000), 32).unwrap_err();
        assert!(matches!(low, BootError::KernelTooLow { start: 0x8000, .. }), "{low}");
        let high = load_file(&elf_at(&CODE, 0xffff_ffff_8100_0000), 32).unwrap_err();
        assert!(matches!(high, BootError::KernelTooHigh { limit: 0xc000_0000, .. }), "{high}");
    }

    #[test]
    fn what_is_no_kernel_is_called_by_its_name() {
        let with_kind = |kind: u8| {
            let mut elf = elf_of(&CODE);
            elf[16] = kind;
            elf
        };
        let mut of_32_bits = elf_of(&CODE);
        (of_32_bits[4], of_32_bits[18]) = (1, 3);
        let mut arm64 = elf_of(&CODE);
        arm64[18] = 183;
        let mut mz = vec![0; 0x400];
        mz[..2].copy_from_slice(b"MZ");
        mz[0x3c] = 0x40;
        mz[0x40..0x46].copy_from_slice(b"PE\0\0\x64\x86");
        let program = elf_of(&[0xc3]);
        for (bytes, says) in [
            (&b"\x1f\x8b\x08"[..], &["compressed with gzip", "gzip -dc"][..]),
            (b"\xfd7zXZ\0", &["compressed with xz", "xz -dc"]),
            (b"\x28\xb5\x2f\xfd", &["compressed with zstd"]),
            (b"BZh9", &["compressed with bzip2"]),
            (&mz, &["a PE file", "x86-64", "vmlinuz"]),
            (&mz[..0x205], &["only the beginning of a kernel", "Copy it again"]),
            (b"QFI\xfb", &["qcow2", "--disk", "qemu-img convert"]),
            (b"070701", &["initramfs", "--initrd"]),
            (b"#!/bin/sh\n", &["a script", "vmlinuz"]),
            (b"", &["an empty file"]),
            (&[7; 100], &["a file of an unknown kind"]),
            (&of_32_bits, &["32-bit x86"]),
            (&arm64, &["arm64"]),
            (&with_kind(1), &["kernel module"]),
            (&with_kind(3), &["position-independent", "bzImage"]),
            (&program, &["without Linux's banner"]),
        ] {
            let error = load_file(bytes, 32).unwrap_err();
            assert!(matches!(error, BootError::NotAKernel { .. }), "{error}");
            assert!(says.iter().all(|part| error.to_string().contains(part)), "{error}");
        }
    }

    #[test]
    fn what_no_linux_unpacks_is_no_initrd() {
        for (bytes, says) in [
            (&b""[..], "an empty file"),
            (b"QFI\xfb", "qcow2"),
            (b"#!/bin/sh", "a script"),
            (b"!<arch>\ndebian-binary", "a Debian package"),
            (&elf_of(&CODE), "an ELF file"),
        ] {
            let error = load_initrd(bytes, 32).1.unwrap_err();
            assert!(matches!(error, BootError::NotAnInitrd { .. }), "{error}");
            assert!(error.to_string().contains(says), "{error}");
        }
    }

    #[test]
    fn a_linux_kernel_that_cannot_be_rewritten_is_no_other_program() {
        let data = b"Linux version 6.1.0-handmade (you)\0";
        let elf = Handmade::of(&[0xc3]).with_section(".rodata", 2, data).bytes();
        assert!(matches!(load_file(&elf, 32), Err(BootError::UserRdtscUntrapped { .. })));
    }

    #[test]
    fn what_does_not_fit_says_how_much_is_needed() {
        let kernel = load_file(&elf_of(&CODE), 16).unwrap_err();
        assert!(kernel.to_string().contains("16 MiB of guest memory: 17 MiB are needed"), "{kernel}");
        let initrd = load_initrd(&vec![1; 20 << 20], 32).1.unwrap_err();
        assert!(initrd.to_string().contains("32 MiB of guest memory: 37 MiB are needed"), "{initrd}");
        assert!(load_initrd(&vec![1; 20 << 20], 37).1.is_ok());
    }

    #[test]
    fn a_command_line_that_linux_would_cut_is_refused() {
        let (_dir, path) = file(&elf_of(&CODE));
        let with =
            |cmdline: &str| load(&ram(32), &BootConfig { cmdline: Some(cmdline), ..config(&path, 32) });
        let own = with("").unwrap().cmdline.len();
        let room = start::CMDLINE_BYTES_MAX - own - 1;
        assert_eq!(with(&"a".repeat(room)).unwrap().cmdline.len(), start::CMDLINE_BYTES_MAX);
        let error = with(&"a".repeat(room + 3)).unwrap_err().to_string();
        assert!(error.ends_with("by 3 bytes"), "{error}");
        assert!(matches!(with("a\0b"), Err(BootError::CmdlineZeroByte)));
    }

    #[test]
    fn every_truncation_of_a_vmlinux_is_an_error() {
        let elf = elf_of(&CODE);
        for len in 0..elf.len() {
            assert!(parse_kernel(elf[..len].to_vec(), Path::new("vmlinux")).is_err(), "{len}");
        }
    }

    #[test]
    fn no_flipped_bit_in_the_headers_panics() {
        let elf = elf_of(&CODE);
        let body = BODY_OFFSET as usize..BODY_OFFSET as usize + CODE.len();
        for bit in (0..elf.len() * 8).filter(|bit| !body.contains(&(bit / 8))) {
            let mut elf = elf.clone();
            elf[bit / 8] ^= 1 << (bit % 8);
            // Whether it still loads depends on the bit; what matters is that it ends.
            if let Ok(Prepared { image, .. }) = prepare(elf, Path::new("vmlinux")) {
                let _ = place_kernel(&ram(32), &image, &config(Path::new("vmlinux"), 32));
            }
        }
    }

    /// A hash of the first 64 MiB of memory with this kernel loaded.
    fn hash_loaded(path: &Path) -> (BootState, u64) {
        let ram = ram(256);
        let state = load(&ram, &config(path, 256)).unwrap();
        let mut memory = vec![0; 64 << 20];
        ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
        (state, xxh3_64(&memory))
    }

    #[test]
    fn debians_cloud_kernels_load_packed_and_unpacked() {
        for kernel in debian_kernels("debians_cloud_kernels_load_packed_and_unpacked", "cloud-") {
            let (state, hash) = hash_loaded(&kernel.path);
            let name = kernel.release;
            assert_eq!(state.kernel_version.as_deref(), Some(name.as_str()));

            let (image, _) = parse_kernel(std::fs::read(&kernel.path).unwrap(), &kernel.path).unwrap();
            let (_dir, unpacked) = file(&image.bytes);
            assert_eq!(hash_loaded(&unpacked).1, hash, "{name}");
        }
    }

    #[test]
    fn nothing_but_code_of_debians_kernels_changes() {
        for flavour in ["cloud-", "", "rt-"] {
            for kernel in debian_kernels("nothing_but_code_of_debians_kernels_changes", flavour) {
                let packed = std::fs::read(&kernel.path).unwrap();
                let (image, _) = parse_kernel(packed.clone(), &kernel.path).unwrap();
                let after = prepare(packed, &kernel.path).unwrap();
                let name = kernel.path.display();
                for address in &after.rewritten {
                    let at = image.code_from(*address).unwrap();
                    let (before, after) = (&image.bytes[at.clone()], &after.image.bytes[at]);
                    let end = before.windows(2).position(|b| b == [0x0f, 0x31] || b == [0x0f, 0x01]).unwrap();
                    assert!(end <= 2 && after[end] == 0xe5, "{name}: {address:#x}");
                }
                // Linux has a hundred and more of them, and a handful of constants for CR4.
                assert!((60..250).contains(&after.rewritten.len()), "{name}: {}", after.rewritten.len());
                let changed = (0..image.bytes.len()).filter(|i| image.bytes[*i] != after.image.bytes[*i]);
                let changed: Vec<_> = changed.collect();
                let in_code = |at: &usize| image.code.iter().any(|span| span.file.contains(at));
                assert!(changed.iter().all(in_code), "{name}");
                let constants = changed.len() - rewritten_bytes(&image, &after.rewritten);
                assert!((3..12).contains(&constants), "{name}: {constants}");
            }
        }
    }

    /// How many bytes of an image the rewriting of the instructions at these addresses changes.
    fn rewritten_bytes(image: &KernelImage, addresses: &[u64]) -> usize {
        // The opcode (0f 31, 0f 01 f9) and any prefix before it, none of which is a NOP.
        let bytes = |address| {
            let code = &image.bytes[image.code_from(address).unwrap()];
            let prefixes = code.iter().position(|b| *b == 0x0f).unwrap();
            prefixes + if code[prefixes + 1] == 0x31 { 2 } else { 3 }
        };
        addresses.iter().map(|address| bytes(*address)).sum()
    }

    #[test]
    fn debians_kernels_have_ext4_as_their_configuration_says() {
        for flavour in ["cloud-", "", "rt-"] {
            for kernel in debian_kernels("debians_kernels_have_ext4_as_their_configuration_says", flavour) {
                let (image, _) = parse_kernel(std::fs::read(&kernel.path).unwrap(), &kernel.path).unwrap();
                let expected = if flavour == "cloud-" { Ext4::BuiltIn } else { Ext4::NotBuiltIn };
                assert_eq!(
                    Ext4::of(&image, Path::new("elsewhere/vmlinuz")),
                    expected,
                    "{}",
                    kernel.path.display()
                );
                // From 6.18 on Debian has the configuration in another package.
                let release = image.version().unwrap();
                if kernel.path.with_file_name(format!("config-{release}")).exists() {
                    let said = if flavour == "cloud-" { Ext4::BuiltIn } else { Ext4::Module };
                    assert_eq!(Ext4::of(&image, &kernel.path), said, "{}", kernel.path.display());
                }
            }
        }
    }

    #[test]
    fn truncations_of_debians_cloud_kernels_are_errors() {
        for kernel in debian_kernels("truncations_of_debians_cloud_kernels_are_errors", "cloud-") {
            let packed = std::fs::read(&kernel.path).unwrap();
            let parse = |bytes: &[u8]| parse_kernel(bytes.to_vec(), &kernel.path);
            let field = |at: usize| u32::from_le_bytes(packed[at..at + 4].try_into().unwrap()) as usize;
            // What follows the packed kernel (the decompressor) is not needed, so only shorter files are errors.
            let end = (usize::from(packed[0x1f1]) + 1) * 512 + field(0x248) + field(0x24c);
            for len in (0..0x600).chain((0..64).map(|i| i * end / 64)).chain([end - 1]) {
                assert!(parse(&packed[..len]).is_err(), "{len}");
            }
            let (elf, _) = parse(&packed).unwrap();
            let sections = u64::from_le_bytes(elf.bytes[40..48].try_into().unwrap()) as usize;
            for len in (0..0x200).chain((0..64).map(|i| i * sections / 64)) {
                assert!(parse(&elf.bytes[..len]).is_err(), "{len}");
            }
        }
    }
}
