//! Says whether a kernel can be loaded, without KVM and without a guest.
//!
//! Owns: [`check`] and its [`KernelReport`]. Must never: decide otherwise than [`super::load`]: both prepare the kernel in
//! one way.

use std::fmt;
use std::path::Path;

use super::{BootError, Prepared, prepare, read_file};

/// What was found out about a kernel that can be loaded.
#[derive(Clone, Debug)]
pub struct KernelReport {
    /// The release in its banner.
    pub version: Option<String>,
    /// How it was packed; `None` for a vmlinux.
    pub packing: Option<&'static str>,
    /// Guest-physical address of its first instruction.
    pub entry: u64,
    /// First guest-physical address behind it in memory.
    pub end: u64,
    /// The linked address of each RDTSC and RDTSCP that becomes a port read.
    pub rewritten: Vec<u64>,
    /// What the user should know before a guest runs it.
    pub warnings: Vec<&'static str>,
    /// The kernel as an ELF file, rewritten.
    pub image: Vec<u8>,
}

/// Does with the kernel in the file `path` all that precedes its placement in memory.
///
/// # Errors
/// A [`BootError`] about the kernel.
pub fn check(path: &Path) -> Result<KernelReport, BootError> {
    check_bytes(read_file("kernel", path)?, path)
}

/// The same with `bytes` as the content of the file, which need not exist.
///
/// # Errors
/// A [`BootError`] about the kernel.
pub fn check_bytes(bytes: Vec<u8>, path: &Path) -> Result<KernelReport, BootError> {
    let Prepared { image, packing, rewritten, warnings } = prepare(bytes, path)?;
    Ok(KernelReport {
        version: image.version(),
        packing: packing.map(|packing| packing.name()),
        entry: image.entry,
        end: image.end(),
        rewritten,
        warnings,
        image: image.bytes,
    })
}

/// One line for each fact, `name: value`.
impl fmt::Display for KernelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "version: {}", self.version.as_deref().unwrap_or("unknown"))?;
        writeln!(f, "packing: {}", self.packing.unwrap_or("none (vmlinux)"))?;
        writeln!(f, "entry: {:#x}", self.entry)?;
        writeln!(f, "end: {:#x}", self.end)?;
        writeln!(f, "rewritten: {}", self.rewritten.len())?;
        self.warnings.iter().try_for_each(|warning| writeln!(f, "warning: {warning}"))
    }
}
