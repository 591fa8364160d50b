//! The log connection: a TCP stream on which both sides have shown who they are, in two halves.
//!
//! Owns: the time limits of the greeting, and how much of what is written may wait in the kernel. Must never: read or
//! write a message; whoever has a half does. What is on the wire is `ft-log/src/channel.rs`; above this nobody can tell
//! whether there is a key.
//!
//! ```text
//!   accept(deadline for all) ┐
//!   connect(limit per read)  ┴─> greeted ── unhurried ──> frames: one thread   out: another thread   stream: shut down
//! ```

use std::io::{self, Read};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use ft_log::{ChannelError, ChannelReader, ChannelWriter, FrameReader, Key, SealKey, Session, StreamError};

/// Linux would buffer megabytes. A transfer that is "sent" would then still take seconds on a slow link, with the guest's
/// output waiting for them, and its rounds would seem to be short however much the guest writes.
const UNSENT_MAX_BYTES: libc::c_uint = 128 << 10;

/// Messages of the peer.
pub type Receiving = FrameReader<ChannelReader<Hurried>>;
/// Bytes for the peer.
pub type Sending = ChannelWriter<TcpStream>;

/// A greeted connection.
pub struct Channel {
    /// What comes from the peer.
    pub frames: Receiving,
    /// What goes to it.
    pub out: Sending,
    /// Seals the datagrams that belong to this connection.
    pub heartbeat_key: SealKey,
    /// The connection itself: to be shut down, and for its addresses.
    pub stream: TcpStream,
}

/// Reads until a deadline, however little comes at a time.
#[derive(Debug)]
pub struct Hurried {
    stream: TcpStream,
    deadline: Option<Instant>,
}

impl Read for Hurried {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the greeting took too long"));
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buffer)
    }
}

impl Channel {
    /// Greets whoever has connected: it has `limit` in all, until [`Channel::unhurried`].
    pub fn accept(
        stream: TcpStream,
        key: Option<&Key>,
        guest: &str,
        limit: Duration,
    ) -> Result<Self, ChannelError> {
        stream.set_write_timeout(Some(limit)).map_err(StreamError::Io)?;
        Self::greet(stream, Some(Instant::now() + limit), |input, out| {
            Session::respond(input, out, key, guest)
        })
    }

    /// Greets the primary at the other end of `stream`; each read and write has `limit`.
    pub fn connect(
        stream: TcpStream,
        key: Option<&Key>,
        guest: &str,
        limit: Duration,
    ) -> Result<Self, ChannelError> {
        stream.set_read_timeout(Some(limit)).map_err(StreamError::Io)?;
        stream.set_write_timeout(Some(limit)).map_err(StreamError::Io)?;
        Self::greet(stream, None, |input, out| Session::initiate(input, out, key, guest))
    }

    fn greet(
        stream: TcpStream,
        deadline: Option<Instant>,
        greeting: impl FnOnce(&mut Hurried, &mut TcpStream) -> Result<Session, ChannelError>,
    ) -> Result<Self, ChannelError> {
        stream.set_nodelay(true).and_then(|()| keep_few_unsent(&stream)).map_err(StreamError::Io)?;
        let clone = || stream.try_clone().map_err(StreamError::Io);
        let (mut input, mut out) = (Hurried { stream: clone()?, deadline }, clone()?);
        let session = greeting(&mut input, &mut out)?;
        let heartbeat_key = session.heartbeat_key().clone();
        let (reader, out) = session.split(input, out);
        Ok(Self { frames: FrameReader::new(reader), out, heartbeat_key, stream })
    }

    /// From here on reads wait as long as it takes.
    pub fn unhurried(&mut self) -> Result<(), StreamError> {
        self.frames.get_mut().get_mut().deadline = None;
        self.stream.set_read_timeout(None).map_err(StreamError::Io)
    }
}

/// A writer waits while more than [`UNSENT_MAX_BYTES`] of what it wrote are not on their way yet.
fn keep_few_unsent(stream: &TcpStream) -> io::Result<()> {
    let level = UNSENT_MAX_BYTES;
    // SAFETY: the option takes an integer of this size; the descriptor is the stream's.
    let result = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const level).cast(),
            size_of_val(&level) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread;

    use ft_log::{FrameWriter, Message};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(300);

    fn key() -> Key {
        Key::new([7; 32])
    }

    /// Both ends: who connects, and who listens.
    fn streams() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let first = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (first, listener.accept().unwrap().0)
    }

    /// Time limits of the greeting are over behind it; shutting the connection down ends a read in another thread.
    #[test]
    fn a_greeted_connection_has_no_limit_but_an_end() {
        let (backup, primary) = streams();
        let connecting = thread::spawn(move || Channel::connect(backup, Some(&key()), "web", LIMIT));
        let mut primary = Channel::accept(primary, Some(&key()), "web", LIMIT).unwrap();
        let mut backup = connecting.join().unwrap().unwrap();
        assert_eq!(backup.heartbeat_key, primary.heartbeat_key);
        primary.unhurried().unwrap();
        backup.unhurried().unwrap();
        let reading = thread::spawn(move || (primary.frames.receive().unwrap(), primary.frames.receive()));
        thread::sleep(2 * LIMIT);
        let bye = Message::SnapshotEnd;
        FrameWriter::new(&mut backup.out).send(&bye).unwrap();
        backup.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let (first, end) = reading.join().unwrap();
        assert_eq!((first, end.unwrap()), (Some(bye), None));
    }

    #[test]
    fn whoever_talks_slowly_has_the_limit_in_all() {
        for key in [None, Some(key())] {
            let (mut stranger, primary) = streams();
            let talking = thread::spawn(move || {
                // The other side ends it.
                while stranger.write_all(b"V").is_ok() {
                    thread::sleep(LIMIT / 10);
                }
            });
            let started = Instant::now();
            // Eight letters are judged; fewer come in time.
            let limit = LIMIT / 2;
            let refused = Channel::accept(primary, key.as_ref(), "web", limit).err().unwrap();
            let said = crate::with_causes(&refused);
            assert!(started.elapsed() >= limit && started.elapsed() < 10 * limit, "{said}");
            let ChannelError::Stream(error) = &refused else { panic!("{said}") };
            assert!(error.is_timeout(), "{said}");
            talking.join().unwrap();
        }
    }

    #[test]
    fn a_primary_that_is_killed_leaves_an_end() {
        let (backup, primary) = streams();
        let connecting = thread::spawn(move || Channel::connect(backup, Some(&key()), "web", LIMIT));
        let mut primary = Channel::accept(primary, Some(&key()), "web", LIMIT).unwrap();
        let mut backup = connecting.join().unwrap().unwrap();
        primary.out.write_all(&[4, 1, 0, 0, 9]).unwrap();
        drop(primary);
        let error = backup.frames.receive().unwrap_err();
        assert!(matches!(error, StreamError::Truncated { len_bytes: 5 }), "{error}");
    }
}
