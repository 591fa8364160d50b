//! One test host: boots it, runs commands on it through its agent, and makes it fail.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::netns::NetnsMachine;
use super::protocol::{self, AGENT_PORT, Event, Request};
use super::qemu::QemuMachine;
use super::{HostError, HostProcess, Link, Net, Output};
use crate::lock;

/// How often something outside of our control is looked at: a console, a socket's appearance.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Limit for a request to the agent that involves no waiting for a process.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// What a host is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKind {
    /// A QEMU TCG machine with emulated SVM: works anywhere, slow.
    Qemu,
    /// A network namespace on this machine and its own /dev/kvm, which must be a good one.
    Netns,
}

/// How to make a host. [`HostConfig::new`] has the usual values.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// What it is made of.
    pub kind: HostKind,
    /// Number of the host in its network, from 1 to 99.
    pub index: u8,
    /// Memory in MiB (QEMU only).
    pub memory_mib: u32,
    /// Number of processors (QEMU only). Each is a busy thread of this machine.
    pub vcpus: u32,
    /// Which stepping its processor is said to be (QEMU only).
    pub stepping: u8,
    /// Directory of this machine that all hosts share; [`TestHost::shared_dir`] on the host.
    pub shared: PathBuf,
    /// Directory of this machine with what the host is to run; [`TestHost::images_dir`] on the host, read-only.
    pub images: PathBuf,
    /// Limit for the boot.
    pub boot_timeout: Duration,
}

impl HostConfig {
    /// A QEMU host with 1 GiB and one processor.
    pub fn new(index: u8, shared: &Path, images: &Path) -> HostConfig {
        HostConfig {
            kind: HostKind::Qemu,
            index,
            memory_mib: 1024,
            vcpus: 1,
            stepping: 1,
            shared: shared.to_owned(),
            images: images.to_owned(),
            boot_timeout: Duration::from_secs(60),
        }
    }
}

#[derive(Debug)]
enum Machine {
    Qemu(QemuMachine),
    Netns(NetnsMachine),
}

/// A host of a test. It goes away on drop.
#[derive(Debug)]
pub struct TestHost {
    // Dropped before the network that it is in.
    machine: Mutex<Machine>,
    net: Arc<Net>,
    config: HostConfig,
    boot_deadline: Instant,
    /// Connections of the processes that were started here.
    processes: Mutex<Vec<Weak<TcpStream>>>,
}

impl TestHost {
    /// Starts a host and waits until it takes commands.
    pub fn boot(net: &Arc<Net>, config: HostConfig) -> Result<TestHost, HostError> {
        let host = TestHost::start(net, config)?;
        host.wait_ready()?;
        Ok(host)
    }

    /// Starts hosts 1 to `count` together, all like `config`, and waits until all take commands.
    pub fn boot_all(net: &Arc<Net>, count: u8, config: &HostConfig) -> Result<Vec<TestHost>, HostError> {
        let hosts = (1..=count)
            .map(|index| TestHost::start(net, HostConfig { index, ..config.clone() }))
            .collect::<Result<Vec<_>, _>>()?;
        hosts.iter().try_for_each(TestHost::wait_ready)?;
        Ok(hosts)
    }

    /// Starts a host and returns at once; it takes commands after [`TestHost::wait_ready`].
    pub fn start(net: &Arc<Net>, config: HostConfig) -> Result<TestHost, HostError> {
        let boot_deadline = Instant::now() + config.boot_timeout;
        let dir = net.run_dir().join(format!("host{}", config.index));
        fs::create_dir_all(&dir).map_err(HostError::file(&dir))?;
        let machine = match config.kind {
            HostKind::Qemu => {
                let shares = [("shared", config.shared.as_path()), ("images", config.images.as_path())];
                Machine::Qemu(QemuMachine::start(net, &config, &dir, &shares, boot_deadline)?)
            }
            HostKind::Netns => Machine::Netns(NetnsMachine::start(net, config.index, &dir)?),
        };
        Ok(TestHost {
            machine: Mutex::new(machine),
            net: Arc::clone(net),
            config,
            boot_deadline,
            processes: Mutex::default(),
        })
    }

    /// True once the agent of the host listens.
    pub fn is_ready(&self) -> bool {
        self.console().contains("vmft-agent: listening")
    }

    /// Waits until the agent of the host listens.
    pub fn wait_ready(&self) -> Result<(), HostError> {
        let failed = |reason: &str| HostError::Boot {
            host: self.name(),
            timeout: self.config.boot_timeout,
            reason: reason.into(),
            console: tail(&self.console()),
        };
        loop {
            if self.is_ready() {
                return Ok(());
            }
            if !self.is_running() {
                return Err(failed("the machine has ended"));
            }
            if Instant::now() > self.boot_deadline {
                return Err(failed("its agent does not listen"));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Name for messages.
    pub fn name(&self) -> String {
        format!("host{}", self.config.index)
    }

    /// Number of the host in its network.
    pub fn index(&self) -> u8 {
        self.config.index
    }

    /// Address of the host on a network.
    pub fn address(&self, link: Link) -> std::net::Ipv4Addr {
        link.host_address(self.config.index)
    }

    /// Path, on the host, of the directory that all hosts share.
    pub fn shared_dir(&self) -> &Path {
        match self.config.kind {
            HostKind::Qemu => Path::new("/shared"),
            HostKind::Netns => &self.config.shared,
        }
    }

    /// Path, on the host, of the directory with what it is to run.
    pub fn images_dir(&self) -> &Path {
        match self.config.kind {
            HostKind::Qemu => Path::new("/images"),
            HostKind::Netns => &self.config.images,
        }
    }

    /// Starts a process on the host.
    pub fn spawn(&self, argv: &[&str]) -> Result<HostProcess, HostError> {
        self.spawn_with(argv, &[], None)
    }

    /// Starts a process on the host with additional environment variables and a working directory.
    pub fn spawn_with(
        &self,
        argv: &[&str],
        env: &[(&str, &str)],
        cwd: Option<&Path>,
    ) -> Result<HostProcess, HostError> {
        let request = Request::Spawn {
            argv: argv.iter().map(ToString::to_string).collect(),
            env: env.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
            cwd: cwd.map(Path::to_owned),
        };
        let (stream, answers) = self.request(&request, &[])?;
        let stream = Arc::new(stream);
        let mut processes = lock(&self.processes);
        processes.retain(|process| process.strong_count() > 0);
        processes.push(Arc::downgrade(&stream));
        drop(processes);
        HostProcess::attach(self.name(), argv.join(" "), stream, answers)
    }

    /// Runs a process on the host to its end, which must come within `timeout`.
    pub fn run(&self, argv: &[&str], timeout: Duration) -> Result<Output, HostError> {
        self.spawn(argv)?.wait(timeout)
    }

    /// Writes a file on the host with these permission bits.
    pub fn push(&self, path: &Path, mode: u32, bytes: &[u8]) -> Result<(), HostError> {
        let request = Request::Push { path: path.to_owned(), mode, len: bytes.len() as u64 };
        self.request(&request, bytes).map(drop)
    }

    /// Reads a file of the host.
    pub fn pull(&self, path: &Path) -> Result<Vec<u8>, HostError> {
        let (_stream, mut answers) = self.request(&Request::Pull { path: path.to_owned() }, &[])?;
        let mut bytes = Vec::new();
        answers.reader.read_to_end(&mut bytes).map_err(|error| self.unreachable(error))?;
        match answers.first {
            Event::Data { len } if len == bytes.len() as u64 => Ok(bytes),
            _ => Err(self.unreachable(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// Loss of power: the host and all on it are gone at once. Its processes then are [`super::Ending::Lost`].
    pub fn kill(&self) {
        match &mut *lock(&self.machine) {
            Machine::Qemu(machine) => machine.kill(),
            Machine::Netns(machine) => machine.kill(),
        }
        for process in lock(&self.processes).drain(..).filter_map(|process| process.upgrade()) {
            // The dead host cannot close the connection. An error means that it is closed already.
            let _ = process.shutdown(Shutdown::Both);
        }
    }

    /// Freezes the host with all on it; its peers see silence.
    pub fn stop(&self) {
        self.freeze(true);
    }

    /// Lets a frozen host go on as if nothing had been.
    pub fn cont(&self) {
        self.freeze(false);
    }

    /// Lets the server of the host's shared directory hang: what the host asks of it waits.
    pub fn hang_storage(&self) {
        if let Machine::Qemu(machine) = &mut *lock(&self.machine) {
            machine.hang_storage(true);
        }
    }

    /// Undoes [`TestHost::hang_storage`].
    pub fn resume_storage(&self) {
        if let Machine::Qemu(machine) = &mut *lock(&self.machine) {
            machine.hang_storage(false);
        }
    }

    /// Number of the process of this machine that writes what the host writes to the shared directory; `None` where the
    /// host's own processes do.
    pub fn storage_pid(&self) -> Option<u32> {
        match &*lock(&self.machine) {
            Machine::Qemu(machine) => machine.storage_pid(),
            Machine::Netns(_) => None,
        }
    }

    /// Takes the host off a network, silently.
    pub fn cut(&self, link: Link) -> Result<(), HostError> {
        self.net.cut(self.config.index, link)
    }

    /// Undoes [`TestHost::cut`].
    pub fn restore(&self, link: Link) -> Result<(), HostError> {
        self.net.restore(self.config.index, link)
    }

    /// True while the host has power, frozen or not.
    pub fn is_running(&self) -> bool {
        match &mut *lock(&self.machine) {
            Machine::Qemu(machine) => machine.is_running(),
            Machine::Netns(machine) => machine.is_running(),
        }
    }

    /// Everything that the host has written to its console.
    pub fn console(&self) -> String {
        match &*lock(&self.machine) {
            Machine::Qemu(machine) => machine.console(),
            Machine::Netns(machine) => machine.console(),
        }
    }

    fn freeze(&self, stop: bool) {
        match &mut *lock(&self.machine) {
            Machine::Qemu(machine) => machine.freeze(stop),
            Machine::Netns(machine) => machine.freeze(stop),
        }
    }

    /// Sends a request with the bytes that belong to it; returns the connection and the first answer.
    fn request(&self, request: &Request, bytes: &[u8]) -> Result<(TcpStream, Answers), HostError> {
        if !self.is_running() {
            return Err(self.unreachable(io::Error::other("it has no power")));
        }
        let address = SocketAddr::from((self.address(Link::Ctl), AGENT_PORT));
        let exchange = |mut stream: TcpStream| -> io::Result<_> {
            stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
            stream.set_write_timeout(Some(REQUEST_TIMEOUT))?;
            protocol::send(&mut stream, request)?;
            stream.write_all(bytes)?;
            let mut reader = BufReader::new(stream.try_clone()?);
            let first = protocol::receive(&mut reader)?.ok_or(io::ErrorKind::UnexpectedEof)?;
            stream.set_read_timeout(None)?;
            Ok((stream, Answers { first, reader }))
        };
        let stream = self.net.connect(address, REQUEST_TIMEOUT)?;
        match stream.and_then(exchange).map_err(|error| self.unreachable(error))? {
            (_, Answers { first: Event::Failed(reason), .. }) => {
                Err(HostError::Refused { host: self.name(), reason })
            }
            answered => Ok(answered),
        }
    }

    fn unreachable(&self, source: io::Error) -> HostError {
        HostError::Unreachable { host: self.name(), source, console: tail(&self.console()) }
    }
}

/// The first answer to a request, and where more come from.
pub(super) struct Answers {
    pub(super) first: Event,
    pub(super) reader: BufReader<TcpStream>,
}

/// The last lines of a long text, for error messages.
pub(super) fn tail(text: &str) -> String {
    const LINES: usize = 30;
    let lines: Vec<&str> = text.lines().collect();
    let mut end = String::new();
    for line in &lines[lines.len().saturating_sub(LINES)..] {
        let _ = writeln!(end, "  | {}", line.trim_end());
    }
    end
}
