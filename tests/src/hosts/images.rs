//! The images that hosts and guests boot: made by `guest-images/build.sh`, kept in its cache.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use super::{HostError, tool};
use crate::lock;

/// Programs are built as this one was: for tests in the development profile, for demonstrations and benchmarks in release
/// mode.
const PROFILE: &str = if cfg!(debug_assertions) { "dev" } else { "release" };
/// For tests, with all else that they need: a part of it would have its dependencies compiled with other features, once more.
const WHAT: &[&str] = if cfg!(debug_assertions) {
    &["--workspace", "--bins", "--examples"]
} else {
    &["-p", "vmft", "--bin", "vmft"]
};

/// The files made by `guest-images/build.sh images`.
#[derive(Debug, Clone)]
pub struct Images {
    dir: PathBuf,
}

impl Images {
    /// Builds what is missing or out of date, once per process. Takes the directory named by the environment
    /// variable `VMFT_IMAGES` as it is, if that is set.
    pub fn ensure() -> Result<Images, HostError> {
        static BUILT: Made = Made::new(None);
        let dir = match std::env::var_os("VMFT_IMAGES") {
            Some(dir) => dir.into(),
            None => once(&BUILT, || Ok(tool::output(build_script().arg("images"))?.into()))?,
        };
        Ok(Images { dir })
    }

    /// The directory that holds them all.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Debian's kernel: for the hosts and for guests.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// Initramfs of a test host.
    pub fn host_initrd(&self) -> PathBuf {
        self.dir.join("host.cpio.gz")
    }

    /// The agent, for hosts that are not machines.
    pub fn agent(&self) -> PathBuf {
        self.dir.join("vmft-agent")
    }

    /// The demo service of the default guest, to run it elsewhere.
    pub fn demo(&self) -> PathBuf {
        self.dir.join("vmft-demo")
    }

    /// Initramfs of the default guest.
    pub fn guest_initrd(&self) -> PathBuf {
        self.dir.join("guest.cpio.gz")
    }
}

/// Builds the monitor if it is out of date, once per process, and returns its path. Takes the program named by the
/// environment variable `VMFT_PROGRAM` as it is, if that is set.
pub fn build_vmft() -> Result<PathBuf, HostError> {
    if let Some(program) = std::env::var_os("VMFT_PROGRAM") {
        return Ok(program.into());
    }
    static BUILT: Made = Made::new(None);
    once(&BUILT, || build("vmft"))
}

/// Builds the example `small_guests` of the monitor's package, once per process, and returns its path.
pub fn build_small_guests() -> Result<PathBuf, HostError> {
    static BUILT: Made = Made::new(None);
    once(&BUILT, || build("small_guests"))
}

/// What is made once per process. Whoever comes meanwhile waits.
type Made = Mutex<Option<PathBuf>>;

fn once(made: &Made, make: impl FnOnce() -> Result<PathBuf, HostError>) -> Result<PathBuf, HostError> {
    let mut made = lock(made);
    if let Some(path) = &*made {
        return Ok(path.clone());
    }
    Ok(made.insert(make()?).clone())
}

fn build(name: &str) -> Result<PathBuf, HostError> {
    let mut cargo = outside_cargo("cargo");
    cargo.args(["build", "-q", "--profile", PROFILE, "--message-format", "json"]).args(WHAT);
    let messages = tool::output(cargo.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message.pointer("/target/name").is_some_and(|target| target == name))
        .find_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
        .ok_or_else(|| HostError::ToolFailed {
            program: tool::describe(&cargo),
            status: "success".into(),
            stderr: format!("cargo named no executable '{name}'"),
        })
}

/// Makes `file` the key of a pair, with the monitor `program`.
pub fn make_key(program: &Path, file: &Path) -> Result<(), HostError> {
    tool::output(Command::new(program).arg("keygen").arg(file)).map(drop)
}

/// Makes `file` a raw disk of `size_mib` MiB with a fresh ext4 file system.
pub fn make_disk(file: &Path, size_mib: u32) -> Result<(), HostError> {
    tool::output(build_script().arg("disk").arg(file).arg(size_mib.to_string()))?;
    Ok(())
}

/// An initramfs that holds nothing but `/init`: a cpio archive in the format that the kernel's
/// Documentation/driver-api/early-userspace/buffer-format.rst calls newc.
pub fn archive_with_init(program: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, data) in [("init", 0o100_755, program), ("TRAILER!!!", 0, &[][..])] {
        let name_len = name.len() + 1;
        // Magic, then inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, check.
        let fields = [1, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name_len, 0];
        archive.extend_from_slice(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

/// A root disk with a distribution, and what boots it.
#[derive(Debug, Clone)]
pub struct RootDisk {
    /// The distribution's kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// The disk image.
    pub disk: PathBuf,
}

/// Makes `file` a root disk with Debian's `suite`: systemd, networkd at 10.77.0.2/24, sshd, redis.
pub fn make_debian_disk(suite: &str, file: &Path) -> Result<RootDisk, HostError> {
    let mut build = build_script();
    let paths = tool::output(build.arg("debian").arg(suite).arg(file))?;
    let paths: Vec<PathBuf> = paths.lines().map(PathBuf::from).collect();
    let [kernel, initrd, disk] = paths.try_into().map_err(|paths| HostError::ToolFailed {
        program: tool::describe(&build),
        status: "success".into(),
        stderr: format!("it printed no three paths: {paths:?}"),
    })?;
    Ok(RootDisk { kernel, initrd, disk })
}

/// Debian's newest kernel, of whatever suite, as `guest-images/build.sh guest newest cloud` makes it: a directory with
/// `vmlinuz` and `guest.cpio.gz`. Made once per process.
pub fn newest_kernel() -> Result<PathBuf, HostError> {
    static MADE: Made = Made::new(None);
    once(&MADE, || Ok(tool::output(build_script().args(["guest", "newest", "cloud"]))?.trim().into()))
}

/// Why [`newest_kernel`] cannot be had: the archive is out of reach, and nothing of it was fetched before.
pub fn archive_missing() -> Option<String> {
    const OUT_OF_REACH: i32 = 3;
    let output = build_script().args(["guest", "newest", "cloud"]).output().ok()?;
    (output.status.code() == Some(OUT_OF_REACH))
        .then(|| String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or_default().to_owned())
}

/// A command without what `cargo test` says of this package. Build scripts of dependencies depend on such variables, so
/// that what this command builds and what a shell builds would make each other out of date.
fn outside_cargo(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            command.env_remove(name);
        }
    }
    command
}

fn build_script() -> Command {
    let mut script = outside_cargo(Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-images/build.sh"));
    script.env("VMFT_PROFILE", PROFILE);
    script
}
