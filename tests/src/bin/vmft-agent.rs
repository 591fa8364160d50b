//! The agent of a test host: starts processes and moves files for tests, over TCP.
//!
//! Usage: `vmft-agent ADDRESS:PORT`. The protocol is in `hosts::protocol`. One thread per connection; the agent
//! keeps nothing between connections. It must never end because of a bad request, and no process may outlive
//! the connection that started it.

use std::fs;
use std::io::{self, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use vmft_tests::hosts::protocol::{self, Event, Request, Stream};

/// Output lines are sent in pieces of at most this many bytes: escaped as JSON they stay below `MAX_LINE`.
const MAX_OUTPUT_LINE: usize = 64 << 10;
/// The start of a line is sent once its rest does not come for so long: a prompt waits for an answer, not for a line end.
const PROMPT_MS: u16 = 100;

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: vmft-agent ADDRESS:PORT");
        return ExitCode::from(2);
    };
    let listener = match TcpListener::bind(&address) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("vmft-agent: cannot listen on {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("vmft-agent: listening on {address}");
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                thread::spawn(move || {
                    if let Err(error) = serve(stream) {
                        eprintln!("vmft-agent: {error}");
                    }
                });
            }
            Err(error) => eprintln!("vmft-agent: cannot accept: {error}"),
        }
    }
}

/// Answers the one request of a connection.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut requests = BufReader::new(stream.try_clone()?);
    let answer = match protocol::receive(&mut requests)? {
        None => return Ok(()),
        Some(Request::Spawn { argv, env, cwd }) => match spawn(&argv, &env, cwd.as_deref()) {
            Ok(child) => return attend(child, requests, stream),
            Err(error) => Event::Failed(format!("cannot start {argv:?}: {error}")),
        },
        Some(Request::Push { path, mode, len }) => match write_file(&path, mode, requests.take(len), len) {
            Ok(()) => Event::Done,
            Err(error) => Event::Failed(format!("cannot write {}: {error}", path.display())),
        },
        Some(Request::Pull { path }) => match fs::read(&path) {
            Ok(bytes) => {
                protocol::send(&mut stream, &Event::Data { len: bytes.len() as u64 })?;
                return stream.write_all(&bytes);
            }
            Err(error) => Event::Failed(format!("cannot read {}: {error}", path.display())),
        },
        Some(Request::Signal(_)) => Event::Failed("no process was started on this connection".into()),
    };
    protocol::send(&mut stream, &answer)
}

fn spawn(argv: &[String], env: &[(String, String)], cwd: Option<&Path>) -> io::Result<Child> {
    let (program, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).envs(env.iter().map(|(name, value)| (name, value)));
    if let Some(cwd) = cwd {
        command.current_dir(cwd);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0).spawn()
}

/// Forwards the output of `child` and the signals for it until it has ended.
fn attend(mut child: Child, mut requests: BufReader<TcpStream>, stream: TcpStream) -> io::Result<()> {
    let leader = Pid::from_raw(child.id() as i32);
    let group = Arc::new(Mutex::new(Group(Some(leader))));
    let events = Arc::new(Mutex::new(stream));
    tell(&events, &Event::Started { pid: child.id() })?;

    let forwarders = [
        child.stdout.take().map(|pipe| forward(pipe, Stream::Stdout, &events)),
        child.stderr.take().map(|pipe| forward(pipe, Stream::Stderr, &events)),
    ];
    let signalled = Arc::clone(&group);
    thread::spawn(move || {
        while let Ok(Some(Request::Signal(number))) = protocol::receive(&mut requests) {
            lock(&signalled).signal(number);
        }
        // The test is gone, or the child has ended and the connection is closed below.
        lock(&signalled).signal(Signal::SIGKILL as i32);
    });

    // The leader is waited for but not yet reaped, so that its number still names this group only.
    waitid(Id::Pid(leader), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT)?;
    lock(&group).close();
    let status = child.wait()?;
    for forwarder in forwarders.into_iter().flatten() {
        if forwarder.join().is_err() {
            eprintln!("vmft-agent: a thread that forwards output panicked");
        }
    }
    let ending = match status.signal() {
        Some(signal) => Event::Killed(signal),
        None => Event::Exited(status.code().unwrap_or(-1)),
    };
    tell(&events, &ending)?;
    lock(&events).shutdown(Shutdown::Both)
}

/// The process group of a child, for as long as its number is its own.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, number: i32) {
        let Some(group) = self.0 else { return };
        match Signal::try_from(number).and_then(|signal| killpg(group, signal)) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => eprintln!("vmft-agent: cannot send signal {number} to group {group}: {error}"),
        }
    }

    /// Ends what the leader left behind, else it would hold the pipes open.
    fn close(&mut self) {
        self.signal(Signal::SIGKILL as i32);
        self.0 = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends each line that comes out of `pipe`, until its end or until the test is gone, and the start of one that waits.
fn forward(
    mut pipe: impl Read + AsFd + Send + 'static,
    stream: Stream,
    events: &Arc<Mutex<TcpStream>>,
) -> thread::JoinHandle<()> {
    let events = Arc::clone(events);
    // The pipe is read to its end even if nobody listens: the process must not block on it.
    let send = move |event: fn(Stream, String) -> Event, text: &[u8]| {
        let _ = tell(&events, &event(stream, String::from_utf8_lossy(text).into_owned()));
    };
    thread::spawn(move || {
        let mut pending = Vec::new();
        let mut bytes = [0; 4096];
        loop {
            if !pending.is_empty() && is_idle(&pipe) {
                send(Event::Unfinished, &pending);
            }
            let len = match pipe.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Ok(0) | Err(_) => break,
                Ok(len) => len,
            };
            pending.extend_from_slice(&bytes[..len]);
            while let Some((line, taken)) = first_line(&pending) {
                send(Event::Line, line);
                pending.drain(..taken);
            }
        }
        if !pending.is_empty() {
            send(Event::Line, &pending);
        }
    })
}

/// The first line, without its end, or a piece of one that is too long; and how many bytes it takes. `None`: more must
/// come.
fn first_line(bytes: &[u8]) -> Option<(&[u8], usize)> {
    let whole = bytes.iter().take(MAX_OUTPUT_LINE).position(|&byte| byte == b'\n');
    match whole {
        Some(len) => Some((&bytes[..len], len + 1)),
        None if bytes.len() >= MAX_OUTPUT_LINE => Some((&bytes[..MAX_OUTPUT_LINE], MAX_OUTPUT_LINE)),
        None => None,
    }
}

/// True if nothing comes out of a pipe for [`PROMPT_MS`].
fn is_idle(pipe: &impl AsFd) -> bool {
    let mut look = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
    poll(&mut look, PROMPT_MS) == Ok(0)
}

fn tell(events: &Mutex<TcpStream>, event: &Event) -> io::Result<()> {
    protocol::send(&mut *lock(events), event)
}

fn write_file(path: &Path, mode: u32, mut bytes: impl Read, len: u64) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let mut file = fs::File::create(&partial)?;
    if io::copy(&mut bytes, &mut file)? != len {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_line_feeds_and_are_not_too_long() {
        assert_eq!(first_line(b"one\ntwo"), Some((b"one".as_slice(), 4)));
        assert_eq!(first_line(b"\n"), Some((b"".as_slice(), 1)));
        for unfinished in [b"".as_slice(), b"login: "] {
            assert_eq!(first_line(unfinished), None);
        }
        let long = [b'x'; MAX_OUTPUT_LINE + 1];
        assert_eq!(first_line(&long), Some((&long[..MAX_OUTPUT_LINE], MAX_OUTPUT_LINE)));
    }

    /// What a child that never ends its line has printed comes out while it still runs.
    #[test]
    fn prompt_is_sent_without_its_line_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        thread::spawn(move || serve(server));
        let argv = ["sh", "-c", "printf 'first\\nlogin: '; exec sleep 600"].map(str::to_owned).to_vec();
        protocol::send(&mut &client, &Request::Spawn { argv, env: Vec::new(), cwd: None }).unwrap();
        let mut events = BufReader::new(&client);
        let mut next = || protocol::receive::<Event>(&mut events).unwrap().unwrap();
        assert!(matches!(next(), Event::Started { .. }));
        assert!(matches!(next(), Event::Line(Stream::Stdout, text) if text == "first"));
        assert!(matches!(next(), Event::Unfinished(Stream::Stdout, text) if text == "login: "));
        // The agent kills the child with the connection.
        client.shutdown(Shutdown::Both).unwrap();
    }
}
