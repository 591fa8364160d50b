//! From a kernel file to a guest that is about to execute its first instruction.
//!
//! Owns: what is in guest memory and in the registers at anchor 0, and the guest's CPUID table. Must never: read
//! anything but the files named in [`BootConfig`]; with the same files, seed and configuration two hosts get the
//! same memory, byte for byte.
//!
//! ```text
//! kernel file ─> bzimage (unpack) ─> image (check) ─> tsd, cr4_shadow, rdtsc ────┐
//! initrd ───────────────────────────────────────────────────────────────────────┼─> guest RAM
//! windows ──> acpi tables, cmdline ──> start (zero page, page tables, GDT) ─────┘   registers
//! ```
//!
//! Guest RAM must be zero before [`load`]: what the kernel's file leaves out (its .bss) is not written.

mod acpi;
mod bzimage;
mod cmdline;
mod cpuid;
mod cr4_shadow;
mod image;
mod rdtsc;
mod start;
mod sweep;
#[cfg(test)]
mod testing;
mod tsd;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use devices::{GuestRam, VirtioWindow};
use kvm_bindings::{kvm_regs, kvm_sregs};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

pub use cpuid::cpuid_table;
pub use rdtsc::{GP_PORT, RDTSC_PORT, RDTSCP_PORT};

use crate::kvm::PAGE_BYTES;
use image::KernelImage;
use start::InitrdPlace;

const MIB: u64 = 1 << 20;

/// What can go wrong before a guest's first instruction.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("the {what} {path} cannot be read: {source}", path = path.display())]
    Unreadable {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a vmlinux nor a bzImage.
    #[error("{path} is not a Linux kernel: it is neither an x86-64 ELF executable (vmlinux) nor a bzImage", path = path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
    },
    /// The file ends before something that its headers promise.
    #[error("the kernel {path} is incomplete: its {part} lies behind the end of the file. Copy it again", path = path.display())]
    KernelTruncated {
        /// The file.
        path: PathBuf,
        /// What is missing.
        part: &'static str,
    },
    /// A kernel that cannot be entered in 64-bit mode.
    #[error("the kernel {path} has no 64-bit entry point: {detail}", path = path.display())]
    No64BitEntry {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// A bzImage packed in a way that is not supported.
    #[error("the kernel {path} is packed with {packing}; supported are gzip, xz, lzma, lz4, zstd and no packing. Unpack it to a vmlinux first", path = path.display())]
    PackingUnknown {
        /// The file.
        path: PathBuf,
        /// How it is packed.
        packing: &'static str,
    },
    /// The packed kernel in a bzImage is damaged.
    #[error("the kernel {path} cannot be unpacked: {detail}", path = path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// What the unpacker said.
        detail: String,
    },
    /// A segment of the kernel lies below 1 MiB, where the boot data are.
    #[error("the kernel {path} wants to be loaded at {start:#x}, below 1 MiB", path = path.display())]
    KernelTooLow {
        /// The file.
        path: PathBuf,
        /// Its lowest address.
        start: u64,
    },
    /// Not enough memory for kernel and initial RAM disk.
    #[error("{what} {path} does not fit in {have_mib} MiB of guest memory: {need_mib} MiB are needed. Give the guest more with --memory-mib", path = path.display())]
    DoesNotFit {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// The guest's memory.
        have_mib: u64,
        /// The least that the files would fit in.
        need_mib: u64,
    },
    /// The initial RAM disk is larger than any guest can take.
    #[error("the initrd {path} of {len_mib} MiB is too large: kernel and initrd must end below 2 GiB", path = path.display())]
    InitrdTooLarge {
        /// Its path.
        path: PathBuf,
        /// Its size.
        len_mib: u64,
    },
    /// The initial RAM disk has no content.
    #[error("the initrd {path} is empty", path = path.display())]
    InitrdEmpty {
        /// Its path.
        path: PathBuf,
    },
    /// The command line is longer than Linux reads.
    #[error("the kernel command line has {len_bytes} bytes, Linux reads {max_bytes}: shorten what you add to it by {} bytes", len_bytes - max_bytes)]
    CmdlineTooLong {
        /// With the monitor's own part.
        len_bytes: usize,
        /// The limit.
        max_bytes: usize,
    },
    /// The command line holds a byte that would end it early.
    #[error("the kernel command line holds a zero byte")]
    CmdlineZeroByte,
    /// Guest memory refused a write.
    #[error("the {what} cannot be written to guest memory at {address:#x}: {detail}")]
    Memory {
        /// What was being written.
        what: &'static str,
        /// Where.
        address: u64,
        /// What the memory said.
        detail: String,
    },
    /// More devices than the tables can describe.
    #[error("{count} virtio devices are more than the {max} that a guest can have")]
    TooManyDevices {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// A device window that ACPI's 32-bit resource cannot express.
    #[error("the virtio device at {address:#x} lies above 4 GiB")]
    DeviceAddress {
        /// Where it is.
        address: u64,
    },
    /// CR4.TSD would be lost in the kernel's startup code.
    #[error("user-mode RDTSC cannot be trapped in the kernel {path}: {detail}. Use a kernel that is known to work, such as Debian's", path = path.display())]
    UserRdtscUntrapped {
        /// The file.
        path: PathBuf,
        /// What was not found.
        detail: String,
    },
    /// The host's CPU lacks a feature that every guest has.
    #[error(
        "this host's CPU (or its KVM) lacks {feature} (CPUID leaf {leaf:#x}), which every guest is given"
    )]
    CpuFeatureMissing {
        /// The feature.
        feature: &'static str,
        /// Where CPUID would say so.
        leaf: u32,
    },
    /// KVM's table lacks a leaf that every 64-bit CPU has.
    #[error("this host's KVM reports no CPUID leaf {leaf:#x}")]
    CpuLeafMissing {
        /// The leaf.
        leaf: u32,
    },
    /// The finished table was refused.
    #[error("the guest's CPUID table cannot be built: {detail}")]
    CpuTable {
        /// Why.
        detail: String,
    },
}

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
    let mut kernel = read_kernel(config.kernel)?;
    let cmdline = cmdline::command_line(config.cmdline, cmdline::Discovery::of(&kernel), config.windows);
    check_cmdline(&cmdline)?;
    let rdtsc_rewritten = rewrite_code(&mut kernel, config.kernel)?;
    place_kernel(ram, &kernel, config)?;
    let initrd = config.initrd.map_or(Ok(InitrdPlace::default()), |path| {
        place_initrd(ram, path, kernel.end(), config.memory_bytes)
    })?;
    acpi::write_tables(ram, config.windows)?;
    start::write_boot_data(ram, &cmdline, initrd, &config.random_seed, config.memory_bytes)?;
    Ok(BootState {
        regs: start::start_regs(kernel.entry),
        kernel_version: kernel.version(),
        rdtsc_rewritten,
        cmdline,
    })
}

fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(|source| BootError::Unreadable { what, path: path.into(), source })?;
    Ok(bytes)
}

fn read_kernel(path: &Path) -> Result<KernelImage, BootError> {
    parse_kernel(read_file("kernel", path)?, path)
}

fn parse_kernel(bytes: Vec<u8>, path: &Path) -> Result<KernelImage, BootError> {
    let elf = if bzimage::is_bzimage(&bytes) { bzimage::unpack(&bytes, path)? } else { bytes };
    KernelImage::parse(elf, path)
}

/// Makes every read of the TSC exit to the monitor. Gives the number of instructions replaced.
fn rewrite_code(kernel: &mut KernelImage, path: &Path) -> Result<usize, BootError> {
    let untrapped = |detail| BootError::UserRdtscUntrapped { path: path.into(), detail };
    let startup_constants = tsd::patch_startup(kernel).map_err(untrapped)?;
    let (mut rdtsc, mut shadow) = (rdtsc::RdtscSites::default(), cr4_shadow::Cr4Shadow::default());
    sweep::sweep(kernel, |site| {
        rdtsc.visit(site);
        shadow.visit(site);
    });
    let shadow = shadow.keep_tsd(kernel).map_err(untrapped)?;
    if shadow.toggles == 0 {
        tracing::warn!(
            kernel = %path.display(),
            "where this kernel toggles CR4.TSD was not found: a guest process that calls prctl(PR_SET_TSC) may \
             end the trapping of user-mode RDTSC"
        );
    }
    let rewritten = rdtsc.rewrite(&mut kernel.bytes);
    tracing::debug!(?rewritten, startup_constants, ?shadow, "kernel rewritten");
    Ok(rewritten.rdtsc + rewritten.rdtscp)
}

fn check_cmdline(cmdline: &str) -> Result<(), BootError> {
    let max_bytes = start::CMDLINE_BYTES_MAX;
    if cmdline.len() > max_bytes {
        return Err(BootError::CmdlineTooLong { len_bytes: cmdline.len(), max_bytes });
    }
    if cmdline.contains('\0') { Err(BootError::CmdlineZeroByte) } else { Ok(()) }
}

fn place_kernel(ram: &GuestRam, kernel: &KernelImage, config: &BootConfig<'_>) -> Result<(), BootError> {
    if kernel.start() < start::KERNEL_START_MIN {
        return Err(BootError::KernelTooLow { path: config.kernel.into(), start: kernel.start() });
    }
    if kernel.end() > config.memory_bytes.min(start::LOW_RAM_END) {
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
    let len_bytes = bytes.len() as u64;
    if len_bytes == 0 {
        return Err(BootError::InitrdEmpty { path: path.into() });
    }
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
    use super::testing::{CODE_PADDR, debian_kernel, elf_at, elf_of, ram};
    use super::*;
    use devices::VirtioKind;
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
        assert!(matches!(load_file(b"#!/bin/sh\n", 32), Err(BootError::NotAKernel { .. })));
        assert!(matches!(load_file(b"", 32), Err(BootError::NotAKernel { .. })));
        let mut of_32_bits = elf_of(&CODE);
        of_32_bits[4] = 1;
        assert!(matches!(load_file(&of_32_bits, 32), Err(BootError::No64BitEntry { .. })));
        let mut astray = elf_of(&CODE);
        astray[24] = 0xff; // entry point
        assert!(matches!(load_file(&astray, 32), Err(BootError::No64BitEntry { .. })));
        assert!(matches!(load_file(&elf_of(&[0xc3]), 32), Err(BootError::UserRdtscUntrapped { .. })));
        let low = load_file(&elf_at(&CODE, 0x8000), 32).unwrap_err();
        assert!(matches!(low, BootError::KernelTooLow { start: 0x8000, .. }), "{low}");
        assert!(matches!(load_initrd(b"", 32).1, Err(BootError::InitrdEmpty { .. })));
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
        for bit in 0..120 * 8 {
            let mut elf = elf.clone();
            elf[bit / 8] ^= 1 << (bit % 8);
            if let Ok(mut kernel) = parse_kernel(elf, Path::new("vmlinux")) {
                let ram = ram(32);
                // Whether it still loads depends on the bit; what matters is that it ends.
                let _ = rewrite_code(&mut kernel, Path::new("vmlinux"));
                let _ = place_kernel(&ram, &kernel, &config(Path::new("vmlinux"), 32));
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
    fn debians_cloud_kernel_loads_packed_and_unpacked() {
        let Some((dir, path)) = debian_kernel("debians_cloud_kernel_loads_packed_and_unpacked") else {
            return;
        };
        let (state, hash) = hash_loaded(&path);
        assert_eq!(state.rdtsc_rewritten, 124);
        assert_eq!(state.regs.rip, 0x100_0000);
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        assert_eq!(state.kernel_version.as_deref(), name.strip_prefix("vmlinuz-"));

        let unpacked = dir.path().join("vmlinux");
        std::fs::write(&unpacked, read_kernel(&path).unwrap().bytes).unwrap();
        assert_eq!(hash_loaded(&unpacked).1, hash);
    }

    #[test]
    fn truncations_of_debians_cloud_kernel_are_errors() {
        let Some((_dir, path)) = debian_kernel("truncations_of_debians_cloud_kernel_are_errors") else {
            return;
        };
        let packed = std::fs::read(&path).unwrap();
        // What lies behind the packed kernel (the decompressor) is not needed, so only shorter files are errors.
        for len in (0..0x600).chain((0..64).map(|i| i * (packed.len() - 200_000) / 64)) {
            assert!(parse_kernel(packed[..len].to_vec(), &path).is_err(), "{len}");
        }
        let elf = read_kernel(&path).unwrap().bytes;
        let sections = u64::from_le_bytes(elf[40..48].try_into().unwrap()) as usize;
        for len in (0..0x200).chain((0..64).map(|i| i * sections / 64)) {
            assert!(parse_kernel(elf[..len].to_vec(), &path).is_err(), "{len}");
        }
    }
}
