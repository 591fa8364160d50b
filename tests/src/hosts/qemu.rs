//! A host that is a QEMU TCG machine with emulated SVM, inside the test's network namespace.
//!
//! States: running -> stopped (SIGSTOP) -> running ...; dead (SIGKILL: a loss of power) from either.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;
use std::{fs, io};

use nix::sys::signal::Signal;

use super::host::POLL_INTERVAL;
use super::tool::{self, Background};
use super::{HostConfig, HostError, Images, Link, Net};

/// TCG does `rep movsb` and `rep stosb` a byte at a time, so kernels had better not think that they are fast; and it takes
/// AVX2 apart piece by piece, so that the cipher of a connection is half as fast with it as with SSE2.
const CPU: &str = "max,+svm,+npt,-erms,-fsrm,-avx2";

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// The processes of one machine.
#[derive(Debug)]
pub(super) struct QemuMachine {
    qemu: Background,
    file_servers: Vec<Background>,
    console: PathBuf,
    /// The test's namespace, and this machine's taps in it.
    namespace: String,
    taps: Vec<String>,
}

impl QemuMachine {
    /// Starts the machine of host `config.index`; it boots in the background.
    /// `dir` takes its console log and sockets; `shares` are (tag, directory).
    pub(super) fn start(
        net: &Net,
        config: &HostConfig,
        dir: &Path,
        shares: &[(&str, &Path)],
        deadline: Instant,
    ) -> Result<QemuMachine, HostError> {
        let images = Images::ensure()?;
        let console = dir.join("console.log");
        // What an earlier machine with this number wrote is no sign of this one's life.
        remove_old(&console)?;
        let mut file_servers = Vec::new();
        let mut command = in_namespace(net);
        command.arg("qemu-system-x86_64");
        let cpu = format!("{CPU},stepping={}", config.stepping);
        command.args(["-accel", "tcg", "-cpu", &cpu, "-smp", &config.vcpus.to_string()]);
        command.args(["-m", &config.memory_mib.to_string(), "-no-reboot", "-nodefaults", "-display", "none"]);
        command.args(["-M", "q35,memory-backend=ram"]);
        command
            .arg("-object")
            .arg(format!("memory-backend-memfd,id=ram,share=on,size={}M", config.memory_mib));
        command.arg("-kernel").arg(images.kernel());
        command.arg("-initrd").arg(images.host_initrd());
        command.arg("-append").arg(kernel_command_line(config.index));
        command.arg("-serial").arg(format!("file:{}", console.display()));
        let taps = Link::ALL.map(|link| link.interface(config.index));
        for (link, tap) in Link::ALL.into_iter().zip(&taps) {
            net.ip(&format!("tuntap add mode tap name {tap}"))?;
            net.ip(&format!("link set {tap} master {} up", link.bridge()))?;
            if link == Link::Ctl {
                // A question after a dead host's address would go unanswered until the host is back, and then be
                // given up.
                net.ip(&format!(
                    "neigh replace {} lladdr {} dev {} nud permanent",
                    link.host_address(config.index),
                    mac(link, config.index),
                    link.bridge()
                ))?;
            }
            command.arg("-netdev").arg(format!("tap,id={tap},ifname={tap},script=no,downscript=no"));
            command
                .arg("-device")
                .arg(format!("virtio-net-pci,netdev={tap},mac={}", mac(link, config.index)));
        }
        for (tag, directory) in shares {
            let socket = dir.join(format!("{tag}.sock"));
            file_servers.push(start_file_server(net, directory, &socket, deadline)?);
            command.arg("-chardev").arg(format!("socket,id={tag},path={}", socket.display()));
            command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag}"));
        }
        command.args(["-device", "virtio-rng-pci"]);
        let qemu = Background::start(&mut command, dir.join("qemu.log"))?;
        Ok(QemuMachine {
            qemu,
            file_servers,
            console,
            namespace: net.namespace().to_owned(),
            taps: taps.into(),
        })
    }

    /// Everything on the console so far, and what QEMU itself complained about.
    pub(super) fn console(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&console).into_owned() + &self.qemu.log()
    }

    /// True until the machine is killed, powers off or QEMU fails.
    pub(super) fn is_running(&mut self) -> bool {
        self.qemu.is_running()
    }

    /// Power loss. Returns when the machine is gone.
    pub(super) fn kill(&mut self) {
        self.qemu.kill();
        self.file_servers.clear();
        // A machine with the same number can be started after this one.
        for tap in self.taps.drain(..) {
            if let Err(error) = tool::run(&format!("ip -n {} link del {tap}", self.namespace)) {
                eprintln!("{error}");
            }
        }
    }

    /// Number of the process that writes what the host writes to the first share.
    pub(super) fn storage_pid(&self) -> Option<u32> {
        self.file_servers.first().map(Background::pid)
    }

    /// Stops the server of the first share, or lets it go on.
    pub(super) fn hang_storage(&mut self, hang: bool) {
        if let Some(server) = self.file_servers.first_mut() {
            server.signal(if hang { Signal::SIGSTOP } else { Signal::SIGCONT });
        }
    }

    /// Freezes the whole machine (SIGSTOP) or lets it go on (SIGCONT).
    pub(super) fn freeze(&mut self, stop: bool) {
        self.qemu.signal(if stop { Signal::SIGSTOP } else { Signal::SIGCONT });
    }
}

impl Drop for QemuMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn in_namespace(net: &Net) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", net.namespace()]);
    command
}

fn kernel_command_line(index: u8) -> String {
    let [lan, log, ctl] = Link::ALL.map(|link| format!("{}/24", link.host_address(index)));
    // On a busy machine QEMU's timers come late: without these the kernel may take its timer for broken.
    // Pages are cleared when they are used, not a second time when they are handed out: slow, and a huge page is
    // cleared in one go, for which no heartbeat leaves the host.
    let steady = "no_timer_check tsc=reliable init_on_alloc=0";
    format!(
        "console=ttyS0 panic=-1 quiet mitigations=off {steady} vmft.lan={lan} vmft.log={log} vmft.ctl={ctl}"
    )
}

/// A locally administered address that is different for each NIC of each host.
fn mac(link: Link, index: u8) -> String {
    let [_, net, _, last] = Ipv4Addr::octets(&link.host_address(index));
    format!("52:56:46:54:{net:02x}:{last:02x}")
}

/// Starts a file server and waits for its socket: QEMU itself does not wait for it.
fn start_file_server(
    net: &Net,
    directory: &Path,
    socket: &Path,
    deadline: Instant,
) -> Result<Background, HostError> {
    let mut command = in_namespace(net);
    command.arg(VIRTIOFSD);
    command.arg(format!("--socket-path={}", socket.display()));
    // Two hosts share the directory: neither may cache what the other changes.
    command
        .arg("-o")
        .arg(format!("source={},cache=none,sandbox=chroot,announce_submounts", directory.display()));
    remove_old(socket)?;
    let mut server = Background::start(&mut command, socket.with_extension("log"))?;
    while !socket.exists() && Instant::now() < deadline {
        server.check()?;
        thread::sleep(POLL_INTERVAL);
    }
    Ok(server)
}

fn remove_old(file: &Path) -> Result<(), HostError> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HostError::file(file)(error)),
        _ => Ok(()),
    }
}
