//! Where the demo runs: two hosts, the directory that they share, and a way to the guest.
//!
//! Owns: the choice of the hosts, the files on them, the guest's disk. Must never: start a monitor.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::host::Host;
use super::options::{Backend, Initrd, Options, Remote};
use super::ssh::{SshDir, SshHost, quoted};
use super::{DemoError, say};
use crate::hosts::{HostConfig, HostKind, Images, Link, Net, TestHost, build_vmft, make_disk, make_key};
use crate::pair::LOG_PORT;

/// Size of the fresh disk.
const DISK_MIB: u32 = 64;
/// The pair's key, in the shared directory, where the disk is too: who may read that can read the guest anyway.
const KEY_FILE: &str = "pair.key";
/// What an emulated host needs besides the guest.
const HOST_OWN_MIB: u32 = 768;

/// The monitors' time-out on emulated hosts, which may have more processors than this machine: a heartbeat may be late
/// without any fault.
const EMULATED_TIMEOUT_MS: u32 = 2_000;

/// See the module's description. Fields are dropped in this order: hosts before their network.
pub(super) struct Site {
    /// The two hosts; the primary starts on the first.
    pub(super) hosts: [Box<dyn Host>; 2],
    /// What they run.
    pub(super) files: Files,
    /// Where the primary listens.
    pub(super) listen: String,
    /// The tap on each.
    pub(super) tap: String,
    /// The monitors' time-out unless the user names one; `None` for their own default.
    pub(super) timeout_ms: Option<u32>,
    /// What the hosts are, and why these.
    pub(super) description: String,
    /// The disk image as this machine sees it, if it does.
    pub(super) disk_here: Option<PathBuf>,
    ground: Ground,
}

/// What the hosts stand on; it goes away with all files on it.
enum Ground {
    Here(Arc<Net>),
    Elsewhere(#[expect(dead_code, reason = "its end removes it")] SshDir),
}

/// Paths on the hosts.
pub(super) struct Files {
    pub(super) monitor: String,
    pub(super) kernel: String,
    pub(super) initrd: Option<String>,
    pub(super) disk: String,
    pub(super) key: String,
    pub(super) arbiter: String,
}

impl Site {
    /// Builds what is missing, boots or reaches the hosts, and makes the guest's disk.
    pub(super) fn set_up(options: &Options) -> Result<Site, DemoError> {
        say("building the monitor and the images, if they are out of date");
        let (monitor, images) = (build_vmft()?, Images::ensure()?);
        match &options.remote {
            Some(remote) => Site::remote(options, remote, &monitor, &images),
            None if !nix::unistd::geteuid().is_root() => Err(DemoError::NotRoot),
            None => {
                let (kind, description) = choose(options.backend, &monitor)?;
                say(&format!("hosts: {description}"));
                Site::here(options, kind, description, &monitor, &images)
            }
        }
    }

    fn here(
        options: &Options,
        kind: HostKind,
        description: String,
        monitor: &Path,
        images: &Images,
    ) -> Result<Site, DemoError> {
        let net = Arc::new(Net::new()?);
        let shared = net.run_dir().join("shared");
        fs::create_dir(&shared).map_err(DemoError::file(&shared))?;
        let disk = shared.join("disk.img");
        provide_disk(options, &disk)?;
        make_key(monitor, &shared.join(KEY_FILE))?;
        let staged = net.stage_images(images, &[monitor.to_owned()])?;
        let mut config = HostConfig { kind, ..HostConfig::new(1, &shared, &staged) };
        config.memory_mib = config.memory_mib.max(options.memory_mib.saturating_add(HOST_OWN_MIB));

        // Names of their own: a file of the user may be called as one of ours.
        let stage = |file: &Path, name: &str| {
            fs::copy(file, staged.join(name)).map_err(DemoError::file(file)).map(|_| name.to_owned())
        };
        let kernel = match &options.kernel {
            Some(file) => stage(file, "own-kernel")?,
            None => file_name(&images.kernel()),
        };
        let initrd = match &options.initrd {
            Initrd::File(file) => Some(stage(file, "own-initrd")?),
            Initrd::Ours => Some(file_name(&images.guest_initrd())),
            Initrd::None => None,
        };
        let start = |index| TestHost::start(&net, HostConfig { index, ..config.clone() });
        let (first, second) = (start(1)?, start(2)?);
        first.wait_ready()?;
        second.wait_ready()?;
        let on_host = |name: &str| first.images_dir().join(name).display().to_string();
        let shared = first.shared_dir().display().to_string();
        let files = Files {
            monitor: on_host(&file_name(monitor)),
            kernel: on_host(&kernel),
            initrd: initrd.map(|name| on_host(&name)),
            disk: format!("{shared}/disk.img"),
            key: format!("{shared}/{KEY_FILE}"),
            arbiter: format!("dir:{shared}"),
        };
        let listen = SocketAddr::from((first.address(Link::Log), LOG_PORT)).to_string();
        Ok(Site {
            hosts: [Box::new(first), Box::new(second)],
            files,
            listen,
            tap: "tap0".into(),
            timeout_ms: (kind == HostKind::Qemu).then_some(EMULATED_TIMEOUT_MS),
            description,
            disk_here: Some(disk),
            ground: Ground::Here(net),
        })
    }

    fn remote(
        options: &Options,
        remote: &Remote,
        monitor: &Path,
        images: &Images,
    ) -> Result<Site, DemoError> {
        let hosts = remote.hosts.each_ref().map(|name| SshHost::new(name));
        let path = format!("{}/vmft-demo-{}", remote.shared, std::process::id());
        say(&format!("hosts: copying what they need to {path} on {}", remote.hosts[0]));
        let dir = SshDir::create(&hosts[0], path.clone())?;
        let put = |file: &Path, name: &str, mode: &str| {
            let path = format!("{path}/{name}");
            hosts[0].copy(file, &path, mode).map(|()| path)
        };
        let fresh = std::env::temp_dir().join(format!("vmft-demo-{}.img", std::process::id()));
        provide_disk(options, &fresh)?;
        let disk = put(&fresh, "disk.img", "600");
        // The copy counts; this one is in the way of nobody.
        let _ = fs::remove_file(&fresh);
        let files = Files {
            monitor: put(monitor, "vmft", "755")?,
            kernel: put(&options.kernel.clone().unwrap_or_else(|| images.kernel()), "kernel", "644")?,
            initrd: match &options.initrd {
                Initrd::File(file) => Some(put(file, "initrd", "644")?),
                Initrd::Ours => Some(put(&images.guest_initrd(), "initrd", "644")?),
                Initrd::None => None,
            },
            disk: disk?,
            arbiter: format!("dir:{path}"),
            key: format!("{path}/{KEY_FILE}"),
        };
        // Made where it is used: it does not travel.
        hosts[0].shell(&format!("{} keygen {}", quoted(&files.monitor), quoted(&files.key)))?;
        let listen = match &remote.listen {
            Some(listen) => listen.clone(),
            None => SocketAddr::new(hosts[0].address()?, LOG_PORT).to_string(),
        };
        for host in &hosts {
            host.shell(&format!("{} doctor", quoted(&files.monitor)))?;
        }
        Ok(Site {
            hosts: hosts.map(|host| Box::new(host) as Box<dyn Host>),
            files,
            listen,
            tap: remote.tap.clone(),
            timeout_ms: None,
            description: "two machines reached by ssh, as --hosts says".into(),
            disk_here: None,
            ground: Ground::Elsewhere(dir),
        })
    }

    /// Connects to the guest's network.
    pub(super) fn connect(&self, address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        match &self.ground {
            Ground::Here(net) => net.connect(address, timeout).map_err(io::Error::other)?,
            Ground::Elsewhere(_) => TcpStream::connect_timeout(&address, timeout),
        }
    }

    /// Takes the hosts' power; nobody uses the disk image any more.
    pub(super) fn shut_down(self) -> ClosedSite {
        drop(self.hosts);
        ClosedSite { disk: self.disk_here, _ground: self.ground }
    }
}

/// What is left of a site without its hosts.
pub(super) struct ClosedSite {
    /// The disk image as this machine sees it, if it does.
    pub(super) disk: Option<PathBuf>,
    /// Its directory holds the image.
    _ground: Ground,
}

fn choose(backend: Backend, monitor: &Path) -> Result<(HostKind, String), DemoError> {
    let verdict = match backend {
        Backend::Qemu => {
            return Ok((HostKind::Qemu, "two emulated machines (QEMU TCG), as --backend says".into()));
        }
        Backend::Auto | Backend::Netns => unfit(monitor),
    };
    match (verdict, backend) {
        (None, Backend::Netns) => {
            Ok((HostKind::Netns, "two network namespaces and this machine's KVM, as --backend says".into()))
        }
        (None, _) => {
            let why = "because 'vmft doctor' says that it is fit";
            Ok((HostKind::Netns, format!("two network namespaces and this machine's KVM, {why}")))
        }
        (Some(why), Backend::Netns) => Err(DemoError::UnfitMachine { why }),
        (Some(why), _) => Ok((HostKind::Qemu, format!("two emulated machines (QEMU TCG), because {why}"))),
    }
}

/// Why this machine's own KVM cannot be used, if it cannot.
fn unfit(monitor: &Path) -> Option<String> {
    if !Path::new("/dev/net/tun").exists() {
        return Some("there is no /dev/net/tun".into());
    }
    match Command::new(monitor).arg("doctor").output() {
        Err(error) => Some(format!("'vmft doctor' cannot be run: {error}")),
        Ok(output) if output.status.success() => None,
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            let reason = said.lines().last().unwrap_or("nothing").trim_start_matches("vmft: ");
            Some(format!("'vmft doctor' says: {reason}"))
        }
    }
}

fn provide_disk(options: &Options, image: &Path) -> Result<(), DemoError> {
    let Some(original) = &options.disk else {
        return Ok(make_disk(image, DISK_MIB)?);
    };
    say(&format!("copying {}: the guest gets the copy", original.display()));
    let mut copy = Command::new("cp");
    copy.args(["--reflink=auto", "--sparse=always", "--"]).arg(original).arg(image);
    let status = copy.status().map_err(DemoError::file(original))?;
    if !status.success() {
        return Err(DemoError::Copy { from: original.clone(), to: image.to_owned() });
    }
    Ok(())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
