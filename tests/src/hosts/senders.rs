//! Which hosts send frames from one address onto the guests' network, in order.
//!
//! One socket sees all ports of the bridge, so that the order of frames from different hosts is the kernel's, and a
//! filter in the kernel passes only frames from that address, so that none is lost for want of room. Ports come and go
//! with their hosts.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::{self, PACKET_OUTGOING};
use nix::net::if_::if_indextoname;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

use super::{HostError, Link, Net};

/// Room for frames that nobody has looked at yet.
const BUFFER_BYTES: usize = 16 << 20;
/// The link layer's header is all that is looked at.
const HEADER_BYTES: usize = 14;

/// Sees the frames. Must be used on a thread inside the network's namespace, see [`Net::enter`].
#[derive(Debug)]
pub struct Senders {
    socket: OwnedFd,
    namespace: String,
    /// Numbers of the ports that have been seen, with their hosts: a dead host's port has no name any more.
    ports: HashMap<usize, u8>,
}

impl Senders {
    /// Of frames from `mac`, from now on.
    pub fn watch(net: &Net, mac: [u8; 6]) -> Result<Senders, HostError> {
        let namespace = net.namespace().to_owned();
        let open = || -> nix::Result<OwnedFd> {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            pass_only_from(&socket, mac)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
            Ok(socket)
        };
        let socket = open().map_err(|error| HostError::Namespace {
            namespace: namespace.clone(),
            reason: format!("frames cannot be captured: {error}"),
        })?;
        Ok(Senders { socket, namespace, ports: HashMap::new() })
    }

    /// Waits for a frame, for `timeout` at most. Returns the hosts that have sent one since the last call, a host for
    /// each frame.
    pub fn hosts(&mut self, timeout: Duration) -> Result<Vec<u8>, HostError> {
        let namespace = self.namespace.clone();
        let failed = |error: Errno| HostError::Namespace {
            namespace: namespace.clone(),
            reason: format!("frames cannot be read: {error}"),
        };
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(failed(error)),
        }
        let (mut hosts, mut header) = (Vec::new(), [0; HEADER_BYTES]);
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut header) {
                // The bridge hands a frame on to its other ports.
                Ok((_, Some(from))) if from.pkttype() != PACKET_OUTGOING => {
                    hosts.extend(self.host_of(from.ifindex()));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(hosts),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// The host whose port this is; none for the bridge itself.
    fn host_of(&mut self, port: usize) -> Option<u8> {
        if let Some(host) = self.ports.get(&port) {
            return Some(*host);
        }
        let name = if_indextoname(port as u32).ok()?;
        let host = (1..=99).find(|host| name.to_str() == Ok(&Link::Guest.interface(*host)))?;
        self.ports.insert(port, host);
        Some(host)
    }
}

/// Lets the kernel drop what is not from `mac`.
fn pass_only_from(socket: &OwnedFd, mac: [u8; 6]) -> nix::Result<()> {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const LOAD_HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let [a, b, c, d, e, f] = mac;
    // A frame is its destination (6 bytes), its source (6), its type and its data.
    let mut program = [
        op(LOAD_WORD, 0, 0, 6),
        op(JUMP_IF_EQUAL, 0, 3, u32::from_be_bytes([a, b, c, d])),
        op(LOAD_HALF, 0, 0, 10),
        op(JUMP_IF_EQUAL, 0, 1, u32::from(u16::from_be_bytes([e, f]))),
        op(RETURN, 0, 0, HEADER_BYTES as u32),
        op(RETURN, 0, 0, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program and what it points to live until the call returns; the kernel copies and checks both.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop)
}
