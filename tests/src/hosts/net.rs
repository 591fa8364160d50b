//! The network of a test: a namespace of its own with three bridges, and the links of the hosts to them.
//!
//! Nothing in it reaches the machine's other networks. The test itself is on each bridge with address `.1`;
//! to use a socket there, make it inside [`Net::enter`] (a socket stays in the namespace that it was made in).

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{setsockopt, sockopt};

use super::{HostError, Images, leftovers, tool};

/// One of the three networks that each host is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// The LAN of guests and their clients, 10.77.0.0/24.
    Guest,
    /// Logging link between the monitors, 10.78.0.0/24.
    Log,
    /// Control of the hosts by the test, 10.79.0.0/24.
    Ctl,
}

impl Link {
    /// All three, in the order of a host's NICs.
    pub const ALL: [Link; 3] = [Link::Guest, Link::Log, Link::Ctl];

    /// Name of its bridge.
    pub fn bridge(self) -> &'static str {
        match self {
            Link::Guest => "guest",
            Link::Log => "log",
            Link::Ctl => "ctl",
        }
    }

    /// Address of the test itself on it.
    pub fn own_address(self) -> Ipv4Addr {
        self.address(1)
    }

    /// Hardware address of the test itself on it.
    fn own_mac(self) -> String {
        format!("52:54:00:79:{:02x}:01", self as u8)
    }

    /// Address of host `index` (1 or 2, up to 99) on it: .101, .102, ...
    pub fn host_address(self, index: u8) -> Ipv4Addr {
        self.address(100 + index)
    }

    fn address(self, last: u8) -> Ipv4Addr {
        let net = match self {
            Link::Guest => 77,
            Link::Log => 78,
            Link::Ctl => 79,
        };
        Ipv4Addr::new(10, net, 0, last)
    }

    /// Name of the interface that joins host `index` to this link's bridge.
    pub(super) fn interface(self, index: u8) -> String {
        format!("h{index}-{}", self.bridge())
    }
}

/// A network namespace with the three bridges. It and all that runs in it goes away on drop.
#[derive(Debug)]
pub struct Net {
    namespace: String,
    run_dir: PathBuf,
}

impl Net {
    /// Creates the namespace and its bridges. Needs root.
    pub fn new() -> Result<Net, HostError> {
        leftovers::remove_orphans()?;
        let namespace = leftovers::unique_name();
        let run_dir = leftovers::run_dir(&namespace);
        std::fs::create_dir_all(&run_dir).map_err(HostError::file(&run_dir))?;
        tool::run(&format!("ip netns add {namespace}"))?;
        let net = Net { namespace, run_dir };
        net.ip("link set lo up")?;
        for link in Link::ALL {
            let bridge = link.bridge();
            // An address of its own: else a bridge has that of one of its ports, and another one once that host has lost
            // its power, and all others send to the old one until they ask again.
            let mac = link.own_mac();
            net.ip(&format!("link add {bridge} address {mac} type bridge mcast_snooping 0"))?;
            net.ip(&format!("addr add {}/24 dev {bridge}", link.own_address()))?;
            net.ip(&format!("link set {bridge} up"))?;
        }
        Ok(net)
    }

    /// Name of the namespace, for `ip netns exec`.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// A directory for the files of this test; it goes away with the network.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// Makes a directory of what hosts are to run: the guest's images, and `files` under their own names.
    pub fn stage_images(&self, images: &Images, files: &[PathBuf]) -> Result<PathBuf, HostError> {
        let dir = self.run_dir.join("images");
        std::fs::create_dir_all(&dir).map_err(HostError::file(&dir))?;
        let guest = [images.kernel(), images.guest_initrd()];
        for file in guest.iter().chain(files) {
            let staged = dir.join(file.file_name().unwrap_or_default());
            // A link where that is possible: the files are big. A later build replaces them, it does not write
            // into them.
            if std::fs::hard_link(file, &staged).is_err() {
                std::fs::copy(file, &staged).map_err(HostError::file(file))?;
            }
        }
        Ok(dir)
    }

    /// Takes host `index` off a network, both ways, without telling the host: its NIC still has a carrier.
    pub fn cut(&self, index: u8, link: Link) -> Result<(), HostError> {
        self.ip(&format!("link set {} down", link.interface(index)))
    }

    /// Undoes [`Net::cut`].
    pub fn restore(&self, index: u8, link: Link) -> Result<(), HostError> {
        self.ip(&format!("link set {} up", link.interface(index)))
    }

    /// Lets no more than this through to host `index` on a network; what has to wait for more than a fifth of a second is
    /// lost.
    pub fn narrow(&self, index: u8, link: Link, mbit_per_s: u32) -> Result<(), HostError> {
        let limit = format!("root tbf rate {mbit_per_s}mbit burst 32kb latency 200ms");
        self.tc(&format!("qdisc replace dev {} {limit}", link.interface(index)))
    }

    /// Undoes [`Net::narrow`].
    pub fn widen(&self, index: u8, link: Link) -> Result<(), HostError> {
        self.tc(&format!("qdisc del dev {} root", link.interface(index)))
    }

    /// Forgets at which hosts the bridges and the test have seen which addresses.
    pub fn forget_neighbours(&self) -> Result<(), HostError> {
        self.ip("neigh flush all")?;
        Link::ALL
            .into_iter()
            .try_for_each(|link| self.ip(&format!("link set {} type bridge fdb_flush", link.bridge())))
    }

    /// Runs `work` on a thread inside the namespace and returns its result.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, HostError> {
        let failed = |reason: String| HostError::Namespace { namespace: self.namespace.clone(), reason };
        let path = format!("/run/netns/{}", self.namespace);
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    let namespace = File::open(&path)?;
                    setns(&namespace, CloneFlags::CLONE_NEWNET)?;
                    Ok(work())
                })
                .join()
                .map_err(|_| failed("the thread in it panicked".into()))?
                .map_err(|error: io::Error| failed(error.to_string()))
        })
    }

    /// Connects to an address inside the namespace; the stream can be used on any thread. It does not delay what is
    /// written, and closing it resets it.
    pub fn connect(
        &self,
        address: SocketAddr,
        timeout: Duration,
    ) -> Result<io::Result<TcpStream>, HostError> {
        self.enter(|| {
            let stream = TcpStream::connect_timeout(&address, timeout)?;
            stream.set_nodelay(true)?;
            // It ends when it is closed. Else, with its guest gone, the kernel would look for the guest's address
            // long after, and find that nobody has it at the moment at which the next guest is called.
            setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
            Ok(stream)
        })
    }

    /// Runs `ip` with these arguments in the namespace.
    pub(super) fn ip(&self, arguments: &str) -> Result<(), HostError> {
        tool::run(&format!("ip -n {} {arguments}", self.namespace)).map(drop)
    }

    fn tc(&self, arguments: &str) -> Result<(), HostError> {
        tool::run(&format!("tc -n {} {arguments}", self.namespace)).map(drop)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if let Err(error) = leftovers::remove_namespace(&self.namespace) {
            eprintln!("{error}");
        }
        leftovers::unmount_below(&self.run_dir);
        if let Err(error) = std::fs::remove_dir_all(&self.run_dir) {
            eprintln!("Cannot remove {}: {error}", self.run_dir.display());
        }
    }
}
