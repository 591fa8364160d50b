//! What hosts send onto a network, frame by frame.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc::PACKET_OUTGOING;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

use super::{HostError, Link, Net};

/// Room for frames that nobody has looked at yet.
const BUFFER_BYTES: usize = 16 << 20;
const HEADER_BYTES: usize = 14;

/// Takes in every frame that one host sends onto one network, from its creation on.
#[derive(Debug)]
pub struct Capture {
    socket: OwnedFd,
    interface: usize,
    namespace: String,
}

impl Capture {
    /// For host `index` on `link`.
    pub fn start(net: &Net, index: u8, link: Link) -> Result<Capture, HostError> {
        let name = link.interface(index);
        let open = || -> nix::Result<(OwnedFd, usize)> {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES)?;
            Ok((socket, if_nametoindex(name.as_str())? as usize))
        };
        let namespace = net.namespace().to_owned();
        let (socket, interface) = net.enter(open)?.map_err(|error| HostError::Namespace {
            namespace: namespace.clone(),
            reason: format!("frames on {name} cannot be captured: {error}"),
        })?;
        Ok(Capture { socket, interface, namespace })
    }

    /// The frames that have come since the last call, at most the first `max_bytes` of each.
    pub fn frames(&self, max_bytes: usize) -> Result<Vec<Vec<u8>>, HostError> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; max_bytes.max(HEADER_BYTES)];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((len, Some(from)))
                    if from.ifindex() == self.interface && from.pkttype() != PACKET_OUTGOING =>
                {
                    frames.push(buffer[..len].to_vec());
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(frames),
                Err(error) => {
                    let reason = format!("frames cannot be read: {error}");
                    return Err(HostError::Namespace { namespace: self.namespace.clone(), reason });
                }
            }
        }
    }

    /// How many frames from the address `mac` have come since the last call of this or [`Capture::frames`].
    pub fn count_from(&self, mac: [u8; 6]) -> Result<usize, HostError> {
        // A frame is its destination, its source, its type and its data.
        Ok(self.frames(HEADER_BYTES)?.iter().filter(|frame| frame[6..12] == mac).count())
    }
}
