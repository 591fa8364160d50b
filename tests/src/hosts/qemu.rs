//! A host that is a QEMU TCG machine with emulated SVM, inside the test's network namespace.
//!
//! States: running -> stopped (SIGSTOP) -> running ...; dead (SIGKILL: a loss of power) from either.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{HostConfig, HostError, Images, Link, Net, tool};

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// The processes of one machine.
#[derive(Debug)]
pub(super) struct QemuMachine {
    qemu: Child,
    file_servers: Vec<Child>,
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
        let mut file_servers = Vec::new();
        let mut command = in_namespace(net);
        command.arg("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-cpu", "max,+svm,+npt", "-smp", &config.vcpus.to_string()]);
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
            command.arg("-netdev").arg(format!("tap,id={tap},ifname={tap},script=no,downscript=no"));
            command
                .arg("-device")
                .arg(format!("virtio-net-pci,netdev={tap},mac={}", mac(link, config.index)));
        }
        for (tag, directory) in shares {
            let socket = dir.join(format!("{tag}.sock"));
            file_servers.push(start_file_server(net, directory, &socket, &dir.join(format!("{tag}.log")))?);
            command.arg("-chardev").arg(format!("socket,id={tag},path={}", socket.display()));
            command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag}"));
        }
        command.args(["-device", "virtio-rng-pci"]);
        wait_for_sockets(shares, dir, deadline);

        let log = dir.join("qemu.log");
        let log_file = File::create(&log).map_err(HostError::file(&log))?;
        let program = tool::describe(&command);
        let qemu = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file)
            .spawn()
            .map_err(|source| HostError::Tool { program, source })?;
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
        let complaints = fs::read(self.console.with_file_name("qemu.log")).unwrap_or_default();
        let console = fs::read(&self.console).unwrap_or_default();
        String::from_utf8_lossy(&[console, complaints].concat()).into_owned()
    }

    /// True until the machine is killed, powers off or QEMU fails.
    pub(super) fn is_running(&mut self) -> bool {
        matches!(self.qemu.try_wait(), Ok(None))
    }

    /// Power loss. Returns when the machine is gone.
    pub(super) fn kill(&mut self) {
        for child in std::iter::once(&mut self.qemu).chain(&mut self.file_servers) {
            // Errors mean that it has already ended.
            let _ = child.kill();
            let _ = child.wait();
        }
        // A machine with the same number can be started after this one.
        for tap in self.taps.drain(..) {
            if let Err(error) = tool::run(&format!("ip -n {} link del {tap}", self.namespace)) {
                eprintln!("{error}");
            }
        }
    }

    /// Freezes the whole machine (SIGSTOP) or lets it go on (SIGCONT).
    pub(super) fn freeze(&mut self, stop: bool) {
        if self.is_running() {
            let signal = if stop { Signal::SIGSTOP } else { Signal::SIGCONT };
            // It runs and has not been waited for, so the number is its own.
            let _ = kill(Pid::from_raw(self.qemu.id() as i32), signal);
        }
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
    let steady = "no_timer_check tsc=reliable";
    format!(
        "console=ttyS0 panic=-1 quiet mitigations=off {steady} vmft.lan={lan} vmft.log={log} vmft.ctl={ctl}"
    )
}

/// A locally administered address that is different for each NIC of each host.
fn mac(link: Link, index: u8) -> String {
    let [_, net, _, last] = Ipv4Addr::octets(&link.host_address(index));
    format!("52:56:46:54:{net:02x}:{last:02x}")
}

fn start_file_server(net: &Net, directory: &Path, socket: &Path, log: &Path) -> Result<Child, HostError> {
    let mut command = in_namespace(net);
    command.arg(VIRTIOFSD);
    command.arg(format!("--socket-path={}", socket.display()));
    // Two hosts share the directory: neither may cache what the other changes.
    command
        .arg("-o")
        .arg(format!("source={},cache=none,sandbox=chroot,announce_submounts", directory.display()));
    let program = tool::describe(&command);
    let log_file = File::create(log).map_err(HostError::file(log))?;
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log_file)
        .spawn()
        .map_err(|source| HostError::Tool { program, source })
}

/// QEMU does not wait for the sockets of the file servers. If one does not appear, QEMU says so in its log.
fn wait_for_sockets(shares: &[(&str, &Path)], dir: &Path, deadline: Instant) {
    for (tag, _) in shares {
        let socket = dir.join(format!("{tag}.sock"));
        while !socket.exists() && Instant::now() < deadline {
            thread::sleep(super::host::POLL_INTERVAL);
        }
    }
}
