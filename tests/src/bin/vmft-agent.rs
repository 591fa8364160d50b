//! The agent of a test host: starts processes and moves files for tests, over TCP.
//!
//! Usage: `vmft-agent ADDRESS:PORT`. The protocol is in `hosts::protocol`. One thread per connection; the agent
//! keeps nothing between connections. It must never end because of a bad request, and no process may outlive
//! the connection that started it.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use vmft_tests::hosts::protocol::{self, Event, Request};

/// Output lines are sent in pieces of at most this many bytes: escaped as JSON they stay below `MAX_LINE`.
const MAX_OUTPUT_LINE: u64 = 64 << 10;

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
        child.stdout.take().map(|pipe| forward(pipe, Event::Stdout, &events)),
        child.stderr.take().map(|pipe| forward(pipe, Event::Stderr, &events)),
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

/// Sends each line that comes out of `pipe`, until its end or until the test is gone.
fn forward(
    pipe: impl Read + Send + 'static,
    event: fn(String) -> Event,
    events: &Arc<Mutex<TcpStream>>,
) -> thread::JoinHandle<()> {
    let events = Arc::clone(events);
    thread::spawn(move || {
        let mut pipe = BufReader::new(pipe);
        let mut line = Vec::new();
        // The pipe is read to its end even if nobody listens: the process must not block on it.
        while matches!(pipe.by_ref().take(MAX_OUTPUT_LINE).read_until(b'\n', &mut line), Ok(n) if n > 0) {
            if line.last() == Some(&b'\n') {
                line.pop();
            }
            let _ = tell(&events, &event(String::from_utf8_lossy(&line).into_owned()));
            line.clear();
        }
    })
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
