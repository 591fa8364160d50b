//! Standard error and standard output that cannot be written, or are not read: neither ends a process, holds it up, or
//! changes what it does. No KVM is needed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::File;
use std::io::{self, PipeReader, Write};
use std::net::IpAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{LIMIT, end_and_stderr, end_of, vmft};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmft::control::protocol::{self, Answer, Figures, PrimaryFigures};
use vmft::control::socket::ControlSocket;
use vmft::control::{Identity, Monitor, Server};
use vmft::host::log;
use vmft::pair::claims::fence::{Fence, Occasion};
use vmft::run::StopSignal;

/// Names the role of this program's processes that are not the test.
const ROLE: &str = "VMFT_TEST_OUTPUT_ROLE";

/// Something to write to.
#[derive(Clone, Copy, Debug)]
enum Sink {
    /// A full disk.
    Full,
    /// A pipe whose reader is gone.
    Gone,
    /// A full pipe whose reader does not read.
    Unread,
    /// The same, whose writes fail and do not wait.
    UnreadAndNonBlocking,
}

const SINKS: [Sink; 4] = [Sink::Full, Sink::Gone, Sink::Unread, Sink::UnreadAndNonBlocking];

impl Sink {
    /// The reader must live as long as the process that writes.
    fn open(self) -> (Stdio, Option<PipeReader>) {
        if let Self::Full = self {
            return (File::options().write(true).open("/dev/full").unwrap().into(), None);
        }
        let (reader, mut writer) = io::pipe().unwrap();
        if let Self::Gone = self {
            return (writer.into(), None);
        }
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        while writer.write(&[0; 4096]).is_ok() {}
        if let Self::Unread = self {
            fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        }
        (writer.into(), Some(reader))
    }
}

#[test]
fn a_log_that_cannot_be_written_changes_no_status() {
    let directory = tempfile::tempdir().unwrap();
    let key = |name: &str| format!("keygen {}", directory.path().join(name).display());
    assert_eq!(end_of(vmft(&key("there")).stderr(Stdio::null())).code(), Some(0));
    for (line, code) in [
        ("status --name none", 1),
        ("resume --control /none", 1),
        ("replay /dev/null", 1),
        ("run --kernel /none", 1),
        ("keygen /none/key", 1),
        (key("there").as_str(), 1),
        ("walk", 2),
        ("run --frobnicate", 2),
        ("--version", 0),
        ("backup --help", 0),
    ] {
        for sink in SINKS {
            let (stderr, _reader) = sink.open();
            let status = end_of(vmft(line).stderr(stderr));
            assert_eq!(status.code(), Some(code), "{line}, {sink:?}: {status}");
        }
    }
    for (number, sink) in SINKS.into_iter().enumerate() {
        let (stderr, _reader) = sink.open();
        let name = number.to_string();
        assert_eq!(end_of(vmft(&key(&name)).stderr(stderr)).code(), Some(0), "{sink:?}");
        assert!(directory.path().join(name).exists());
    }
}

/// Fails unless `stderr` is one sentence with `says` in it.
fn assert_sentence(stderr: &str, says: &str) {
    assert!(stderr.starts_with("vmft: ") && stderr.lines().count() == 1 && stderr.contains(says), "{stderr}");
}

#[test]
fn an_answer_that_cannot_be_written_is_an_error_in_a_sentence() {
    for line in ["doctor", "doctor --json", "--help", "help backup", "--version"] {
        for sink in [Sink::Full, Sink::Gone] {
            let (stdout, _) = sink.open();
            let (status, stderr) = end_and_stderr(vmft(line).stdout(stdout));
            assert_eq!(status.code(), Some(1), "{line}, {sink:?}: {status}: {stderr}");
            assert_sentence(&stderr, "standard output cannot be written: ");
        }
        let ((stdout, _), (stderr, _)) = (Sink::Full.open(), Sink::Full.open());
        assert_eq!(end_of(vmft(line).stdout(stdout).stderr(stderr)).code(), Some(1), "{line}");
    }
}

/// A monitor that has its orders carried out at once, and what it was ordered.
struct Ordered {
    orders: Arc<Mutex<Vec<protocol::Command>>>,
    server: Arc<Mutex<Option<Server>>>,
}

impl Ordered {
    fn start(socket: &Path) -> Self {
        let monitor = Monitor::new(Identity { name: "web".into(), ..Identity::default() });
        let orders = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&orders);
        monitor.set_order_handler(Box::new(move |command, monitor| {
            noted.lock().unwrap().push(command);
            if command == protocol::Command::DropBackup {
                monitor.note_view(9);
            }
            Answer::Done(format!("{command:?} is done"))
        }));
        monitor.set_figures(Box::new(|| Figures {
            primary: Some(PrimaryFigures { paused: true, ..PrimaryFigures::default() }),
            ..Figures::default()
        }));
        let server = Server::start(ControlSocket::open(socket).unwrap(), None, monitor).unwrap();
        Self { orders, server: Arc::new(Mutex::new(Some(server))) }
    }

    /// Ends it after it has been ordered something.
    fn end_when_ordered(&self) -> thread::JoinHandle<()> {
        let (orders, server) = (Arc::clone(&self.orders), Arc::clone(&self.server));
        thread::spawn(move || {
            while orders.lock().unwrap().is_empty() {
                thread::sleep(Duration::from_millis(5));
            }
            drop(server.lock().unwrap().take());
        })
    }
}

#[test]
fn an_order_is_carried_out_whether_or_not_its_answer_can_be_written() {
    use protocol::Command::{DropBackup, Pause, PowerOff, Resume, Shutdown};
    for (line, order, answer) in [
        ("pause", Pause, "the guest stands"),
        ("resume", Resume, "Resume is done"),
        ("shutdown", Shutdown, "Shutdown is done"),
        ("shutdown --force", PowerOff, "PowerOff is done"),
        ("drop-backup", DropBackup, "DropBackup is done"),
    ] {
        for sink in [Sink::Full, Sink::Gone] {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("control");
            let monitor = Ordered::start(&socket);
            let end = (order == PowerOff).then(|| monitor.end_when_ordered());
            let (stdout, _) = sink.open();
            let line = format!("{line} --control {}", socket.display());
            let (status, stderr) = end_and_stderr(vmft(&line).stdout(stdout));
            assert_eq!(status.code(), Some(1), "{line}, {sink:?}: {status}: {stderr}");
            assert_sentence(&stderr, &format!("{answer}; but standard output cannot be written: "));
            assert_eq!(*monitor.orders.lock().unwrap(), [order], "once");
            // `shutdown --force` returns when the monitor has ended.
            assert!(order != PowerOff || monitor.server.lock().unwrap().is_none());
            end.into_iter().for_each(|end| end.join().unwrap());
        }
    }
}

#[test]
fn a_limit_on_the_size_of_files_ends_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (log, answer) = (directory.path().join("log"), directory.path().join("answer"));
    for (line, code) in [("status --name none", 1), ("--version", 1), ("walk", 2)] {
        let script = format!("ulimit -f 0; exec \"$0\" \"$@\" >>{} 2>>{}", answer.display(), log.display());
        let mut command = Command::new("sh");
        command.args(["-c", &script, env!("CARGO_BIN_EXE_vmft")]).args(line.split(' '));
        let status = end_of(&mut command);
        assert_eq!(status.code(), Some(code), "{line}: {status} (signal {:?})", status.signal());
    }
}

/// This program in another role, as a process of its own.
fn in_role(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", role, "--nocapture"]).env(ROLE, role).stdout(Stdio::null());
    command
}

fn is_role(role: &str) -> bool {
    std::env::var_os(ROLE).is_some_and(|given| given == role)
}

/// Not a test: a process one of whose threads panics.
#[test]
fn role_of_one_that_panics() {
    if is_role("role_of_one_that_panics") {
        log::start().unwrap();
        log::end_on_panic();
        let helper = thread::Builder::new().name("helper".into());
        let ended = helper.spawn(|| panic!("this panic is part of a test")).unwrap().join();
        panic!("the process goes on without a thread: {ended:?}");
    }
}

#[test]
fn a_panic_of_any_thread_ends_the_process_with_its_own_status() {
    let (status, stderr) = end_and_stderr(&mut in_role("role_of_one_that_panics"));
    assert_eq!(status.code(), Some(101), "{status}: {stderr}");
    assert!(stderr.starts_with("vmft: thread 'helper' panicked at "), "{stderr}");
    assert!(stderr.contains("this panic is part of a test") && !stderr.contains("goes on"), "{stderr}");
    for sink in SINKS {
        let (stderr, _reader) = sink.open();
        let status = end_of(in_role("role_of_one_that_panics").stderr(stderr));
        assert_eq!(status.code(), Some(101), "{sink:?}: {status}");
    }
}

/// Not a test: a process that fences another host by a command that says much.
#[test]
fn role_of_one_that_fences() {
    if is_role("role_of_one_that_fences") {
        let command =
            "/bin/sh -c 'set -e; head -c 300000 /dev/zero; echo done; head -c 300000 /dev/zero >&2'";
        let occasion = Occasion {
            guest: "web".into(),
            view: 7,
            peer_host: "alpha".into(),
            peer_address: IpAddr::from([192, 0, 2, 1]),
            reason: "a test".into(),
        };
        assert!(
            Fence::new(&command.parse().unwrap(), LIMIT)
                .unwrap()
                .until_done(&occasion, &StopSignal::default())
        );
    }
}

#[test]
fn a_fence_command_does_not_wait_for_whoever_reads_the_log() {
    for sink in SINKS {
        let (stderr, _reader) = sink.open();
        let status = end_of(in_role("role_of_one_that_fences").stderr(stderr));
        assert!(status.success(), "{sink:?}: {status}");
    }
}
