//! What can go wrong before a guest's first instruction.
//!
//! Owns: [`BootError`] and its sentences.

use std::path::PathBuf;

use thiserror::Error;

use crate::file_kind::FileKind;

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
    /// A device, or a directory.
    #[error("the {what} {path} is neither a file nor a pipe", path = path.display())]
    NotAFile {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
    },
    /// Something other than a Linux kernel for x86-64.
    #[error("{path} is not a kernel that can be loaded: it is {found}", path = path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it is, and what to do.
        found: String,
    },
    /// An ELF file that contradicts itself, or whose code could not be rewritten without damage to something else.
    #[error("the kernel {path} cannot be loaded: {detail}. Use the file that the kernel's build or package made, unchanged", path = path.display())]
    KernelMalformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A vmlinux without section table.
    #[error("the kernel {path} has no section table, so its code cannot be told from its data, and RDTSCs in it cannot be \
             rewritten. Use a vmlinux that was not stripped of its sections, or the bzImage (vmlinuz)", path = path.display())]
    NoSections {
        /// The file.
        path: PathBuf,
    },
    /// The file ends before something that its headers promise.
    #[error("the kernel {path} is incomplete: the file ends before its {part}. Copy it again", path = path.display())]
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
    /// A segment of the kernel lies where no guest has memory.
    #[error("the kernel {path} wants to be loaded up to {end:#x}, but guests' devices are from {limit:#x} on. Its program headers should give physical addresses", path = path.display())]
    KernelTooHigh {
        /// The file.
        path: PathBuf,
        /// The end of its highest segment.
        end: u64,
        /// Where it may end.
        limit: u64,
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
    /// The initial RAM disk is a file that Linux cannot unpack.
    #[error("the initrd {path} is {found}. Give a cpio archive, compressed or not", path = path.display())]
    NotAnInitrd {
        /// Its path.
        path: PathBuf,
        /// What it is.
        found: FileKind,
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
