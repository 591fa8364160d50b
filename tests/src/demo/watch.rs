//! A guest that is not the demo's: when it is ready, and what shows that it survived.
//!
//! Owns: the connections to its port. Must never: judge what it saw (`report` does), or speak a protocol: any service is
//! looked at in the same way, by what it does when a client ends its side of a connection.

use std::io::{self, ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::DemoError;
use super::options::{Options, Ready};
use super::pair::Pair;
use super::site::Site;

/// Limit for one try to connect while the guest boots.
const TRY_TIMEOUT: Duration = Duration::from_secs(1);
/// How often the guest is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Limit for a new connection after the takeover, for a service's answer, and for the guest to move.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// What a connection showed once its client had ended its own side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Seen {
    /// The service ended its side, too: it had read the end.
    Answered,
    /// Nothing came, not even a reset.
    Silent,
    /// It was refused, reset or closed before.
    Broken(String),
}

/// What was seen of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connections {
    /// A connection before the kill; not [`Seen::Broken`], for then nothing is killed.
    pub(super) before: Seen,
    /// One that was opened before the kill, after the takeover.
    pub(super) kept: Seen,
    /// One that was opened after the takeover.
    pub(super) fresh: Seen,
}

/// Waits until the guest is ready; returns how long that took.
pub(super) fn wait_ready(
    site: &Site,
    pair: &Pair<'_>,
    options: &Options,
    ready: &Ready,
) -> Result<Duration, DemoError> {
    let started = Instant::now();
    let limit = Duration::from_secs(options.boot_limit_s.into());
    let mut seen = 0;
    loop {
        // Asked for first: what the guest printed before its end counts.
        let over = pair.primary_ended();
        let is_ready = match ready {
            Ready::Port(port) => site.connect((options.guest_ip.0, port.get()).into(), TRY_TIMEOUT).is_ok(),
            Ready::Text(text) => pair.console_says(&mut seen, text),
        };
        if is_ready {
            return Ok(started.elapsed());
        }
        if let Some(ended) = over {
            return Err(ended);
        }
        if started.elapsed() > limit {
            let (what, last) = (ready.to_string(), pair.last_console_line());
            return Err(DemoError::NotReady { what, limit_s: options.boot_limit_s, last });
        }
        thread::sleep(LOOK_INTERVAL);
    }
}

/// The connections to a port, from before the kill.
pub(super) struct Before {
    address: SocketAddr,
    before: Seen,
    kept: TcpStream,
}

impl Before {
    /// Looks at the port, and opens the connection that has to outlive the kill.
    pub(super) fn open(site: &Site, address: SocketAddr) -> Result<Before, DemoError> {
        let service = |source| DemoError::Service { address, source };
        let before = end(site.connect(address, ANSWER_LIMIT).map_err(service)?, ANSWER_LIMIT);
        // Later nobody could tell such an end from a lost connection.
        if let Seen::Broken(why) = before {
            return Err(service(io::Error::other(why)));
        }
        let kept = site.connect(address, ANSWER_LIMIT).map_err(service)?;
        Ok(Before { address, before, kept })
    }

    /// Looks again, after the takeover.
    pub(super) fn look_again(self, site: &Site) -> Connections {
        let fresh = match site.connect(self.address, ANSWER_LIMIT) {
            Ok(stream) => end(stream, ANSWER_LIMIT),
            Err(error) => Seen::Broken(error.to_string()),
        };
        Connections { before: self.before, kept: end(self.kept, ANSWER_LIMIT), fresh }
    }
}

/// Ends this side of a connection that must still be open, and looks for `limit` at what the other does.
fn end(stream: TcpStream, limit: Duration) -> Seen {
    end_and_read(stream, limit).unwrap_or_else(|error| Seen::Broken(error.to_string()))
}

fn end_and_read(mut stream: TcpStream, limit: Duration) -> io::Result<Seen> {
    if !is_open(&mut stream)? {
        return Err(io::Error::other("the guest had closed it"));
    }
    stream.shutdown(Shutdown::Write)?;
    let deadline = Instant::now() + limit;
    let mut bytes = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Seen::Silent);
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(Seen::Answered),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

/// False if the other side has ended the connection. Takes what it has said, as far as it has room here.
fn is_open(stream: &mut TcpStream) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    let read = stream.read(&mut vec![0; 1 << 20]);
    let open = match read {
        Ok(0) => false,
        // The end may come right after the last words.
        Ok(_) => !matches!(stream.peek(&mut [0]), Ok(0)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => true,
        Err(error) => return Err(error),
    };
    stream.set_nonblocking(false)?;
    Ok(open)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;

    use nix::libc;
    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    /// Both ends of a connection: the client's, the service's.
    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn service_that_ends_its_side_has_answered() {
        let (client, mut service) = connection();
        // As sshd does: it speaks first, and says why it goes.
        service.write_all(b"SSH-2.0-x\r\n").unwrap();
        let thread = thread::spawn(move || {
            io::copy(&mut service, &mut io::sink()).unwrap();
            service.write_all(b"bye").unwrap();
        });
        assert_eq!(end(client, ANSWER_LIMIT), Seen::Answered);
        thread.join().unwrap();
    }

    #[test]
    fn connection_that_was_closed_before_is_broken() {
        let (client, mut service) = connection();
        service.write_all(b"going down").unwrap();
        drop(service);
        // Its words and its end have arrived.
        (&client).read_exact(&mut [0; 10]).unwrap();
        assert_eq!(client.peek(&mut [0]).unwrap(), 0);
        assert!(matches!(end(client, ANSWER_LIMIT), Seen::Broken(why) if why.contains("had closed")));
    }

    #[test]
    fn connection_that_is_reset_is_broken() {
        // As a guest does that knows nothing of it.
        let (client, service) = connection();
        setsockopt(&service, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
        drop(service);
        assert!(matches!(end(client, ANSWER_LIMIT), Seen::Broken(_)));
    }

    #[test]
    fn service_that_keeps_its_side_open_is_silent() {
        let (client, mut service) = connection();
        service.write_all(b"welcome").unwrap();
        assert_eq!(end(client, Duration::from_millis(20)), Seen::Silent);
        drop(service);
    }
}
