//! The thread that answers operators.
//!
//! Owns: the connections of clients. Must never: wait for a client, for the guest or for another thread, take more of a
//! client than a request, or serve more than [`CLIENTS_MAX`] of them.
//!
//! ```text
//!   accepted ── bytes ── a whole request ──> answered ── all written ──┬─> the next request
//!      │ CLIENT_TIME over, too long, closed                            └─> closed (a service that says so)
//!      └──> closed
//! ```

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::metrics::{self, MetricsSocket};
use super::protocol::{self, Answer, MAX_REQUEST_BYTES, Reason, Refusal};
use super::socket::ControlSocket;
use super::state::Monitor;
use crate::host::{StopToken, Worker};

/// Clients at the same time; whoever comes beyond that is closed at once.
pub const CLIENTS_MAX: usize = 16;
/// How long a client may take for a request, or to read the answer.
pub const CLIENT_TIME: Duration = Duration::from_secs(5);
/// Longest wait without a look at the clients' times.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The control thread; ended, with its socket's file removed, on drop.
pub struct Server {
    _worker: Worker,
}

impl Server {
    /// Answers at `socket`, and to Prometheus at `metrics`, what is asked about `monitor`.
    pub fn start(
        socket: ControlSocket,
        metrics: Option<MetricsSocket>,
        monitor: Arc<Monitor>,
    ) -> io::Result<Self> {
        let worker = Worker::spawn("control", move |stop| {
            if let Err(error) = (Loop { socket, metrics, monitor, clients: Vec::new() }).run(stop) {
                tracing::error!(%error, "operators are not answered any more");
            }
        })?;
        Ok(Self { _worker: worker })
    }
}

/// A connection of any kind.
trait Connection: Read + Write + AsFd + Send {}
impl Connection for UnixStream {}
impl Connection for TcpStream {}

/// What a client is answered with.
type Service = fn(&[u8], &Monitor) -> Reaction;

/// What to do about what a client has sent so far.
pub(super) enum Reaction {
    /// More of the request has to come.
    Wait,
    /// The request is so many bytes long, and this is the answer.
    Answer(usize, Vec<u8>),
    /// This is the answer, and the connection ends behind it.
    Last(Vec<u8>),
}

struct Client {
    connection: Box<dyn Connection>,
    service: Service,
    input: Vec<u8>,
    output: Vec<u8>,
    since: Instant,
    ends: bool,
}

/// Is a client still there?
#[derive(Clone, Copy, PartialEq, Eq)]
enum Still {
    Here,
    Gone,
}

impl Client {
    fn new(connection: Box<dyn Connection>, service: Service) -> Self {
        let (input, output) = (Vec::new(), Vec::new());
        Self { connection, service, input, output, since: Instant::now(), ends: false }
    }

    fn wants(&self) -> PollFlags {
        if self.output.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLOUT }
    }

    /// Reads and writes what can be without waiting.
    fn serve(&mut self, monitor: &Monitor) -> Still {
        if self.output.is_empty() {
            let mut bytes = [0; MAX_REQUEST_BYTES];
            match self.connection.read(&mut bytes) {
                Ok(0) => return Still::Gone,
                Ok(len) => self.input.extend_from_slice(&bytes[..len]),
                Err(error) if is_for_later(&error) => return Still::Here,
                Err(_) => return Still::Gone,
            }
        }
        loop {
            if self.output.is_empty() {
                match (self.service)(&self.input, monitor) {
                    Reaction::Wait => return Still::Here,
                    Reaction::Answer(len_bytes, output) => {
                        self.input.drain(..len_bytes);
                        self.output = output;
                    }
                    Reaction::Last(output) => (self.output, self.ends) = (output, true),
                }
            }
            match self.connection.write(&self.output) {
                Ok(len) => drop(self.output.drain(..len)),
                Err(error) if is_for_later(&error) => return Still::Here,
                Err(_) => return Still::Gone,
            }
            if self.output.is_empty() {
                if self.ends {
                    return Still::Gone;
                }
                self.since = Instant::now();
            }
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Answers the first request in `input`.
fn react(input: &[u8], monitor: &Monitor) -> Reaction {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
        if input.len() < MAX_REQUEST_BYTES {
            return Reaction::Wait;
        }
        let text = format!("a request is a line of at most {MAX_REQUEST_BYTES} bytes");
        let refusal = Refusal { reason: Reason::BadRequest, text, primary: None };
        return Reaction::Last(protocol::write_reply(Answer::Refused(refusal)));
    };
    match protocol::read_request(&input[..end]) {
        Ok(command) => Reaction::Answer(end + 1, protocol::write_reply(monitor.answer(command))),
        Err(refusal) => Reaction::Last(protocol::write_reply(Answer::Refused(refusal))),
    }
}

struct Loop {
    socket: ControlSocket,
    metrics: Option<MetricsSocket>,
    monitor: Arc<Monitor>,
    clients: Vec<Client>,
}

impl Loop {
    fn run(&mut self, stop: &StopToken) -> io::Result<()> {
        loop {
            let now = Instant::now();
            self.clients.retain(|client| now < client.since + CLIENT_TIME);
            let Some(ready) = self.wait(stop.fd())? else { return Ok(()) };
            let mut index = 0;
            self.clients.retain_mut(|client| {
                index += 1;
                !ready.clients[index - 1] || client.serve(&self.monitor) == Still::Here
            });
            if ready.control {
                let accepted = self.socket.listener.accept().and_then(|(stream, _)| {
                    stream.set_nonblocking(true)?;
                    Ok(Client::new(Box::new(stream), react))
                });
                self.take_in(accepted);
            }
            if let Some(metrics) = self.metrics.as_ref().filter(|_| ready.metrics) {
                let accepted = metrics.listener.accept().and_then(|(stream, _)| {
                    stream.set_nonblocking(true)?;
                    Ok(Client::new(Box::new(stream), metrics::react))
                });
                self.take_in(accepted);
            }
        }
    }

    /// `None`: the thread is to end.
    fn wait(&self, stop: BorrowedFd<'_>) -> io::Result<Option<Ready>> {
        let mut fds = vec![
            PollFd::new(stop, PollFlags::POLLIN),
            PollFd::new(self.socket.listener.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.clients.iter().map(|client| PollFd::new(client.connection.as_fd(), client.wants())));
        fds.extend(
            self.metrics.iter().map(|metrics| PollFd::new(metrics.listener.as_fd(), PollFlags::POLLIN)),
        );
        let timeout = PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) if fds[0].any() != Some(false) => return Ok(None),
            Ok(_) => {}
        }
        let mut ready = fds[1..].iter().map(|fd| fd.any() != Some(false));
        let control = ready.next().unwrap_or(false);
        let clients = ready.by_ref().take(self.clients.len()).collect();
        Ok(Some(Ready { control, clients, metrics: ready.next().unwrap_or(false) }))
    }

    /// Whoever finds no place sees the connection close.
    fn take_in(&mut self, accepted: io::Result<Client>) {
        match accepted {
            Ok(client) if self.clients.len() < CLIENTS_MAX => self.clients.push(client),
            Ok(_) => {}
            Err(error) if is_for_later(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "an operator's client could not be accepted");
                // Out of descriptors, most likely: give others the time to close some.
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// What may be read or written without waiting.
struct Ready {
    control: bool,
    clients: Vec<bool>,
    metrics: bool,
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::control::client;
    use crate::control::protocol::{Command, Reply};
    use crate::control::state::Identity;

    fn server() -> (TempDir, PathBuf, Server) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.sock");
        let monitor = Monitor::new(Identity { name: "web".into(), ..Identity::default() });
        let server = Server::start(ControlSocket::open(&path).unwrap(), None, monitor).unwrap();
        (directory, path, server)
    }

    /// What comes back until the connection ends or `lines` were read.
    fn exchange(stream: &mut UnixStream, request: &[u8], lines: usize) -> Vec<Answer> {
        stream.write_all(request).unwrap();
        let answers = BufReader::new(stream).lines().take(lines);
        answers.map(|line| serde_json::from_str::<Reply>(&line.unwrap()).unwrap().answer).collect()
    }

    fn refused(answers: &[Answer]) -> Option<Reason> {
        match answers {
            [Answer::Refused(refusal)] => Some(refusal.reason),
            _ => None,
        }
    }

    #[test]
    fn several_requests_on_one_connection_are_answered_in_order() {
        let (_directory, path, _server) = server();
        let mut stream = UnixStream::connect(&path).unwrap();
        let request = b"{\"vmft\":1,\"command\":\"status\"}\n";
        let answers = exchange(&mut stream, &request.repeat(3), 3);
        assert!(
            answers.iter().all(|answer| matches!(answer, Answer::Status(status) if status.name == "web"))
        );
        let (first, second) = request.split_at(9);
        stream.write_all(first).unwrap();
        assert!(matches!(exchange(&mut stream, second, 1)[..], [Answer::Status(_)]));
    }

    #[test]
    fn a_bad_request_is_answered_and_ends_the_connection() {
        let (_directory, path, _server) = server();
        for (request, reason) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], Reason::BadRequest),
            (b"{\"vmft\":9}\n", Reason::Version),
            (&[b'x'; MAX_REQUEST_BYTES], Reason::BadRequest),
        ] {
            let mut stream = UnixStream::connect(&path).unwrap();
            assert_eq!(refused(&exchange(&mut stream, request, usize::MAX)), Some(reason));
        }
        assert!(matches!(client::ask(&path, Command::Status), Ok(Answer::Status(_))));
    }

    #[test]
    fn clients_beyond_the_limit_are_closed_and_idle_ones_make_room() {
        let (_directory, path, _server) = server();
        let idle: Vec<UnixStream> = (0..CLIENTS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut beyond = UnixStream::connect(&path).unwrap();
        assert_eq!(beyond.read(&mut [0]).unwrap(), 0);
        let started = Instant::now();
        for mut stream in idle {
            stream.set_read_timeout(Some(CLIENT_TIME * 2)).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap(), 0, "it takes too long");
        }
        assert!(started.elapsed() >= CLIENT_TIME - LOOK_EVERY, "closed too soon");
        assert!(matches!(client::ask(&path, Command::Status), Ok(Answer::Status(_))));
    }

    #[test]
    fn the_socket_goes_away_with_the_server() {
        let (_directory, path, server) = server();
        drop(server);
        assert!(!path.exists());
        let error = client::ask(&path, Command::Status).unwrap_err().to_string();
        assert!(error.contains(&path.display().to_string()), "{error}");
    }
}
