//! Whether a kernel has ext4 as a module.
//!
//! Owns: [`Ext4`]. Must never: decide what is in guest memory; it is for a warning.
//!
//! `ext4_mb_generate_buddy` reads the TSC twice. In a kernel with ext4 built in the monitor rewrites that, in a module it
//! does not.

use std::io::Read;
use std::path::Path;

use super::image::KernelImage;

/// Every configuration that a kernel carries is smaller.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

/// How a kernel has ext4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ext4 {
    /// Built in.
    BuiltIn,
    /// As a module, says its configuration.
    Module,
    /// Not built in. There is no configuration that says whether as a module.
    NotBuiltIn,
    /// Not at all, says its configuration.
    None,
}

impl Ext4 {
    /// By what the kernel in the file `path` has embedded (`CONFIG_IKCONFIG`), else by the `config-RELEASE` beside that
    /// file or, as Debian has both from 7.2 on, the `config` in a directory RELEASE, else by whether ext4's messages are in the image.
    ///
    /// The last agrees with the configuration of those of Debian's kernels of which the archive has it (5.10 to 6.18, 7.2,
    /// 7.3): "EXT4-fs (" is in exactly those that have ext4 built in.
    pub(super) fn of(kernel: &KernelImage, path: &Path) -> Self {
        let config = embedded_config(kernel).or_else(|| packaged_config(kernel, path));
        match config {
            Some(config) => Self::in_config(&config),
            None if kernel.contains("EXT4-fs (") => Self::BuiltIn,
            None => Self::NotBuiltIn,
        }
    }

    fn in_config(config: &str) -> Self {
        match config.lines().find_map(|line| line.strip_prefix("CONFIG_EXT4_FS=")) {
            Some("y") => Self::BuiltIn,
            Some("m") => Self::Module,
            _ => Self::None,
        }
    }

    /// What the user should know.
    pub(super) fn warning(self) -> Option<&'static str> {
        match self {
            Self::BuiltIn | Self::None => None,
            Self::Module => Some(
                "ext4 is a module of this kernel (CONFIG_EXT4_FS=m), and it reads the TSC. The monitor does not rewrite \
                 modules: a replay or a backup diverges once the guest has loaded it. Use a kernel with ext4 built in, \
                 such as Debian's cloud kernel, or another file system (XFS, Btrfs)",
            ),
            Self::NotBuiltIn => Some(
                "ext4 is not built into this kernel. If the guest loads it as a module, a replay or a backup diverges: \
                 it reads the TSC, and the monitor does not rewrite modules. Use a kernel with ext4 built in, such as \
                 Debian's cloud kernel, or another file system (XFS, Btrfs)",
            ),
        }
    }
}

/// What `CONFIG_IKCONFIG=y` puts into the image (Linux `kernel/configs.c`): a gzip file behind a magic word.
fn embedded_config(kernel: &KernelImage) -> Option<String> {
    const MAGIC: &[u8] = b"IKCFG_ST";
    let packed = &kernel.find(MAGIC)?[MAGIC.len()..];
    let mut config = String::new();
    flate2::read::GzDecoder::new(packed).take(CONFIG_BYTES_MAX).read_to_string(&mut config).ok()?;
    Some(config)
}

fn packaged_config(kernel: &KernelImage, path: &Path) -> Option<String> {
    let release = kernel.version().filter(|release| !release.contains('/'))?;
    let beside = path.with_file_name(format!("config-{release}"));
    let directory = path.canonicalize().ok()?.parent()?.to_owned();
    let of_release = directory.file_name().is_some_and(|name| name == release.as_str());
    let file = if of_release { directory.join("config") } else { beside };
    let mut config = String::new();
    // Opening a FIFO would wait for its other end.
    let file = file.is_file().then(|| std::fs::File::open(file).ok())??;
    file.take(CONFIG_BYTES_MAX).read_to_string(&mut config).ok()?;
    config.contains("CONFIG_").then_some(config)
}
