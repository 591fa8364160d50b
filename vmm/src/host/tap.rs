//! The guest's network port: an existing tap interface of the host.
//!
//! Owns: the tap's descriptor and the thread that reads it. Must never: create an interface, or let a frame
//! through in either direction before [`Tap::start`].
//! States: opened (a backup stays here: faults of the configuration show early, and the bridge port is
//! already forwarding when it is needed) -> started (frames flow) -> dropped (thread ended, tap closed).
//!
//! Frames are whole Ethernet frames without FCS, without packet information and without virtio header.
//! A network may lose frames, so a full queue drops them, counted, as a network card does.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::TrySendError;
use ft_log::{Event, MAX_FRAME_BYTES};
use nix::errno::Errno;

use super::inbox::Inbox;
use super::{StopToken, Wait, Worker};

/// `linux/if_tun.h`: reported by `TUNGETIFF` for an interface that outlives its descriptor.
const IFF_PERSIST: libc::c_short = 0x0800;
/// Shortest Ethernet frame without FCS (IEEE 802.3, 64 bytes with it).
const MIN_FRAME_BYTES: usize = 60;

/// The requests of `linux/if_tun.h` that are used here.
mod tun {
    nix::ioctl_write_ptr_bad!(
        /// Attaches to the interface that the request names.
        set_iff,
        libc::TUNSETIFF,
        libc::ifreq
    );
    nix::ioctl_read_bad!(
        /// Reads the name and the flags of the interface.
        get_iff,
        libc::TUNGETIFF,
        libc::ifreq
    );
    nix::ioctl_write_int_bad!(
        /// Chooses the offloads that a reader of frames can handle.
        set_offload,
        libc::TUNSETOFFLOAD
    );
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name can never be an interface's.
    #[error(
        "'{name}' is not an interface name: it must have 1 to 15 characters, without '/', '%' and blanks"
    )]
    BadName {
        /// As given.
        name: String,
    },
    /// There is no such interface.
    #[error(
        "Tap '{name}' does not exist; create it with `ip tuntap add {name} mode tap` and `ip link set {name} up`"
    )]
    Missing {
        /// The interface.
        name: String,
    },
    /// `/dev/net/tun` cannot be opened.
    #[error(
        "/dev/net/tun cannot be opened; load the driver with `modprobe tun` and give this user access to it"
    )]
    NoDriver {
        /// What the host said.
        source: io::Error,
    },
    /// The interface belongs to someone else.
    #[error(
        "No permission to use tap '{name}'; create it for this user with \
         `ip tuntap add {name} mode tap user <user>`, or grant CAP_NET_ADMIN"
    )]
    NoPermission {
        /// The interface.
        name: String,
    },
    /// Another process has it open.
    #[error("Tap '{name}' is in use by another process; give each guest its own tap")]
    Busy {
        /// The interface.
        name: String,
    },
    /// The interface is of another kind.
    #[error("'{name}' is not a single-queue tap (mode tap, without multi_queue)")]
    NotATap {
        /// The interface.
        name: String,
    },
    /// Anything else that the host refuses.
    #[error("Tap '{name}' cannot be used")]
    Io {
        /// The interface.
        name: String,
        /// What the host said.
        source: io::Error,
    },
    /// [`Tap::start`] was called twice.
    #[error("Tap '{name}' is already started")]
    Started {
        /// The interface.
        name: String,
    },
}

/// What has passed and what was lost, in frames, since the tap was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapStats {
    /// Given to the guest's queue of events.
    pub received: u64,
    /// Lost because that queue was full, or because the frame was longer than [`MAX_FRAME_BYTES`].
    pub receive_dropped: u64,
    /// Handed to the host's network.
    pub sent: u64,
    /// Lost because the tap was not started, is down or had no room.
    pub send_dropped: u64,
}

#[derive(Default)]
struct Counters {
    received: AtomicU64,
    receive_dropped: AtomicU64,
    sent: AtomicU64,
    send_dropped: AtomicU64,
}

/// An open tap. Sending is possible from any thread.
pub struct Tap {
    // First, so that the thread is gone before the descriptor is closed.
    reader: Mutex<Option<Worker>>,
    name: String,
    file: Arc<File>,
    live: AtomicBool,
    counters: Arc<Counters>,
}

impl Tap {
    /// Opens the existing tap `name`. No frame passes until [`Tap::start`].
    pub fn open(name: &str) -> Result<Self, TapError> {
        let owned = name.to_owned();
        if !is_interface_name(name) {
            return Err(TapError::BadName { name: owned });
        }
        // TUNSETIFF creates what does not exist, so that has to be asked first.
        match nix::net::if_::if_nametoindex(name) {
            Ok(_) => {}
            Err(Errno::ENODEV) => return Err(TapError::Missing { name: owned }),
            Err(error) => return Err(TapError::Io { name: owned, source: error.into() }),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| TapError::NoDriver { source })?;
        attach(&file, name).map_err(|error| match error {
            Errno::EPERM | Errno::EACCES => TapError::NoPermission { name: owned.clone() },
            Errno::EBUSY => TapError::Busy { name: owned.clone() },
            Errno::EINVAL => TapError::NotATap { name: owned.clone() },
            Errno::ENODEV => TapError::Missing { name: owned.clone() },
            error => TapError::Io { name: owned.clone(), source: error.into() },
        })?;
        Ok(Self {
            reader: Mutex::new(None),
            name: owned,
            file: Arc::new(file),
            live: AtomicBool::new(false),
            counters: Arc::new(Counters::default()),
        })
    }

    /// Lets frames flow: those that arrive become [`Event::Frame`] on `events`, and [`Tap::send`] sends.
    /// Frames that arrived earlier were not for this guest at this time and are discarded.
    pub fn start(&self, inbox: impl Into<Inbox>) -> Result<(), TapError> {
        let inbox = inbox.into();
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if reader.is_some() {
            return Err(TapError::Started { name: self.name.clone() });
        }
        let io_error = |source| TapError::Io { name: self.name.clone(), source };
        let mut buffer = [0u8; MAX_FRAME_BYTES + 1];
        while read_frame(&self.file, &mut buffer).map_err(io_error)?.is_some() {}
        let (file, counters, name) = (Arc::clone(&self.file), Arc::clone(&self.counters), self.name.clone());
        let worker = Worker::spawn("tap", move |stop| {
            if let Err(error) = read_frames(stop, &file, &inbox, &counters) {
                tracing::error!(tap = %name, %error, "The tap cannot be read any more; the guest hears nothing.");
            }
        });
        *reader = Some(worker.map_err(io_error)?);
        self.live.store(true, Ordering::Release);
        Ok(())
    }

    /// Sends one frame. Does nothing but count it as dropped before [`Tap::start`], or when the host has no
    /// room for it or refuses it.
    pub fn send(&self, frame: &[u8]) {
        if !self.live.load(Ordering::Acquire) {
            self.counters.send_dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // One write is one frame, whole or not at all.
        match nix::unistd::write(&*self.file, frame) {
            Ok(_) => {
                self.counters.sent.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let before = self.counters.send_dropped.fetch_add(1, Ordering::Relaxed);
                // Once: a tap that is down refuses every frame.
                if before == 0 && error != Errno::EAGAIN {
                    tracing::warn!(tap = %self.name, %error, "A frame was refused; is the tap up?");
                }
            }
        }
    }

    /// Tells the switches of the network that `mac` is now behind this tap.
    pub fn announce(&self, mac: [u8; 6]) {
        self.send(&rarp_frame(mac));
    }

    /// What has passed and what was lost so far.
    pub fn stats(&self) -> TapStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TapStats {
            received: read(&self.counters.received),
            receive_dropped: read(&self.counters.receive_dropped),
            sent: read(&self.counters.sent),
            send_dropped: read(&self.counters.send_dropped),
        }
    }
}

fn is_interface_name(name: &str) -> bool {
    // The kernel replaces "%d" by a number of its choice.
    let allowed = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b'%';
    (1..libc::IFNAMSIZ).contains(&name.len()) && name.bytes().all(allowed) && name != "." && name != ".."
}

/// Makes `file` (an open `/dev/net/tun`) the other end of the tap `name`.
fn attach(file: &File, name: &str) -> Result<(), Errno> {
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags },
    };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: `request` is a whole ifreq with a NUL-terminated name and lives over the call.
    unsafe { tun::set_iff(file.as_raw_fd(), &request) }?;
    // SAFETY: the kernel writes one ifreq into `request`.
    unsafe { tun::get_iff(file.as_raw_fd(), &mut request) }?;
    // SAFETY: TUNGETIFF fills in the name and this member of the union.
    let attached = unsafe { request.ifr_ifru.ifru_flags };
    if attached & IFF_PERSIST == 0 {
        // It vanished after it was looked up and this call has made a new one, which closing `file` removes.
        return Err(Errno::ENODEV);
    }
    // An earlier user may have left segmentation offload on; its frames would be longer than the MTU.
    // SAFETY: the request takes an integer and no memory.
    unsafe { tun::set_offload(file.as_raw_fd(), 0) }?;
    Ok(())
}

/// Reads one frame, cut off behind the buffer's end; nothing when none is waiting.
fn read_frame(mut file: &File, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match file.read(buffer) {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_frames(stop: &StopToken, file: &File, inbox: &Inbox, counters: &Counters) -> io::Result<()> {
    let mut buffer = [0u8; MAX_FRAME_BYTES + 1];
    while stop.wait_readable(file.as_fd(), None)? != Wait::Stopped {
        let Some(len) = read_frame(file, &mut buffer)? else { continue };
        if len > MAX_FRAME_BYTES {
            counters.receive_dropped.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        match inbox.try_send(Event::Frame { data: buffer[..len].to_vec() }) {
            Ok(()) => counters.received.fetch_add(1, Ordering::Relaxed),
            Err(TrySendError::Full(_)) => counters.receive_dropped.fetch_add(1, Ordering::Relaxed),
            Err(TrySendError::Disconnected(_)) => return Ok(()),
        };
    }
    Ok(())
}

/// A broadcast "request reverse" of RFC 903 in which `mac` asks for its own address. No host has to answer;
/// every switch on the way learns the port. Unlike a gratuitous ARP it needs no IP address.
fn rarp_frame(mac: [u8; 6]) -> [u8; MIN_FRAME_BYTES] {
    let mut frame = [0; MIN_FRAME_BYTES];
    frame[0..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&0x8035u16.to_be_bytes()); // EtherType RARP
    frame[14..16].copy_from_slice(&1u16.to_be_bytes()); // hardware: Ethernet
    frame[16..18].copy_from_slice(&0x0800u16.to_be_bytes()); // protocol: IPv4
    frame[18..20].copy_from_slice(&[6, 4]); // address lengths
    frame[20..22].copy_from_slice(&3u16.to_be_bytes()); // request reverse
    frame[22..28].copy_from_slice(&mac); // sender; its IPv4 address stays zero
    frame[32..38].copy_from_slice(&mac); // target; likewise
    frame
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use crossbeam_channel::bounded;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// EtherType for local experiments (IEEE 802).
    const TEST_ETHERTYPE: [u8; 2] = [0x88, 0xb5];

    fn ip(arguments: &str) -> bool {
        Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|status| status.success())
    }

    /// Runs `body` in a network of its own that holds the tap `t0`, if this host allows that.
    fn with_tap(test: &str, body: impl FnOnce() + Send + 'static) {
        let run = move || {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("tuntap add t0 mode tap") {
                return false;
            }
            assert!(ip("link set t0 up"));
            body();
            true
        };
        let ran = thread::spawn(run).join().unwrap();
        if !ran {
            eprintln!("SKIPPED: {test}: needs root, /dev/net/tun and the `ip` program");
        }
    }

    fn test_frame(fill: u8) -> Vec<u8> {
        let mut frame = vec![fill; 80];
        frame[0..12].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1]);
        frame[12..14].copy_from_slice(&TEST_ETHERTYPE);
        frame
    }

    /// A packet socket on `t0`: the network's side of the tap.
    fn network_side() -> std::os::fd::OwnedFd {
        use std::os::fd::FromRawFd;
        let protocol = u16::from_be_bytes(TEST_ETHERTYPE).to_be();
        // SAFETY: no memory is passed.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(protocol)) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: `fd` is new and belongs to nobody else.
        let socket = unsafe { std::os::fd::OwnedFd::from_raw_fd(fd) };
        // SAFETY: all-zero is a valid address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = nix::net::if_::if_nametoindex("t0").unwrap() as i32;
        let len = size_of_val(&address) as u32;
        // SAFETY: `address` is a whole sockaddr_ll of `len` bytes.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        socket
    }

    #[test]
    fn rarp_frame_is_as_rfc_903_lays_it_out() {
        let mut golden = vec![0xff; 6];
        golden.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        golden.extend([0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0, 0, 0, 0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        golden.resize(60, 0);
        assert_eq!(rarp_frame([0x52, 0x54, 0, 0x12, 0x34, 0x56])[..], golden[..]);
    }

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", "tap%d", "a/b", "a b", "sixteen-letters-", ".", ".."] {
            assert!(matches!(Tap::open(name), Err(TapError::BadName { .. })), "{name:?}");
        }
    }

    #[test]
    fn a_missing_tap_is_reported_and_not_created() {
        let error = Tap::open("vmft-missing").err().unwrap();
        assert!(matches!(error, TapError::Missing { .. }));
        assert!(error.to_string().contains("ip tuntap add vmft-missing mode tap"));
        assert_eq!(nix::net::if_::if_nametoindex("vmft-missing"), Err(Errno::ENODEV));
    }

    #[test]
    fn a_tap_serves_one_user_and_other_interfaces_are_refused() {
        with_tap("a_tap_serves_one_user_and_other_interfaces_are_refused", || {
            let first = Tap::open("t0").unwrap();
            assert!(matches!(Tap::open("t0"), Err(TapError::Busy { .. })));
            drop(first);
            Tap::open("t0").unwrap();
            assert!(matches!(Tap::open("lo"), Err(TapError::NotATap { .. })));
        });
    }

    #[test]
    fn frames_flow_only_after_start() {
        with_tap("frames_flow_only_after_start", || {
            let tap = Tap::open("t0").unwrap();
            let network = network_side();
            nix::unistd::write(&network, &test_frame(1)).unwrap();
            tap.send(&test_frame(2));
            assert_eq!(tap.stats().send_dropped, 1);

            let (events, received) = bounded(64);
            tap.start(events.clone()).unwrap();
            assert!(matches!(tap.start(events), Err(TapError::Started { .. })));
            nix::unistd::write(&network, &test_frame(3)).unwrap();
            tap.send(&test_frame(4));

            // The host's own chatter (IPv6 neighbour discovery) may come in between.
            let ours = received.iter().find_map(|event| match event {
                Event::Frame { data } if data[12..14] == TEST_ETHERTYPE => Some(data),
                _ => None,
            });
            assert_eq!(ours, Some(test_frame(3)), "the frame that came before the start must be gone");
            let mut sent = [0; 2048];
            let len = nix::unistd::read(&network, &mut sent).unwrap();
            assert_eq!(
                sent[..len],
                test_frame(4)[..],
                "the frame that was sent before the start must be gone"
            );
            assert_eq!(tap.stats().sent, 1);
            drop(tap);
            assert_eq!(received.iter().filter(|e| *e == Event::Frame { data: test_frame(3) }).count(), 0);
        });
    }

    #[test]
    fn a_full_queue_drops_frames_and_counts_them() {
        with_tap("a_full_queue_drops_frames_and_counts_them", || {
            let tap = Tap::open("t0").unwrap();
            let network = network_side();
            let (events, received) = bounded(0);
            tap.start(events).unwrap();
            nix::unistd::write(&network, &test_frame(1)).unwrap();
            while tap.stats().receive_dropped == 0 {
                thread::yield_now();
            }
            assert_eq!(tap.stats().received, 0);
            assert!(received.try_recv().is_err());
        });
    }
}
