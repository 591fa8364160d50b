//! The demo behind `run-ft.sh`: a guest on two hosts outlives the loss of one.
//!
//! Owns: the order of events, below. Must never: call anything a success that it did not see.
//!
//! ```text
//!   hosts up -> pair protected -> client at work -> SIGKILL for the primary -> takeover -> client goes on
//!            -> client done, all it was promised is there -> report
//! ```
//! Without the demo service in the guest there is no client; then the console must answer a key after the takeover.

mod disk;
mod host;
mod options;
mod pair;
mod report;
mod site;
mod ssh;

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::client::{self, Client, Gaps};
use crate::hosts::{Ending, HostError};
use crate::pair::{SERVICE, SERVICE_READY};

pub use options::{Options, USAGE};
pub use report::Report;

use options::Initrd;
use pair::{Pair, Takeover};
use report::{DiskVerdict, Evidence, Traffic};
use site::Site;

/// Limit for the default guest to boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// The same for another guest, which may have no service.
const OTHER_BOOT_TIMEOUT: Duration = Duration::from_secs(60);
/// Limit for one exchange with the service.
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the client works on after the takeover.
const AFTER_TAKEOVER: Duration = Duration::from_secs(5);

/// Why the demo could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Neither namespaces nor taps can be made.
    #[error("The demo needs root: it makes network namespaces, bridges and taps.")]
    NotRoot,
    /// The user insists on this machine's KVM.
    #[error("--backend netns needs a fit KVM, but {why}.")]
    UnfitMachine {
        /// What `vmft doctor` said.
        why: String,
    },
    /// A test host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A file of this machine.
    #[error("{path} cannot be used: {source}.")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The user's disk image.
    #[error("{from} cannot be copied to {to}.")]
    Copy {
        /// The image.
        from: PathBuf,
        /// Where to.
        to: PathBuf,
    },
    /// A command on a host.
    #[error("'{command}' on {host}: {ending}: {said}")]
    Command {
        /// The command.
        command: String,
        /// The host.
        host: String,
        /// How it ended.
        ending: String,
        /// What it printed.
        said: String,
    },
    /// The client's connection.
    #[error("The client cannot use its connection: {source}.")]
    Client {
        /// Why.
        source: io::Error,
    },
    /// The pair was not formed.
    #[error("The pair was not formed. The primary's last line: {primary}. The backup's: {backup}.")]
    NotProtected {
        /// The primary's last line.
        primary: String,
        /// The backup's last line.
        backup: String,
    },
    /// The guest powered off or crashed, or its monitor failed.
    #[error("The primary {ending} before it could be killed. Its last line: {last}")]
    EndedEarly {
        /// How.
        ending: Ending,
        /// The primary's last line.
        last: String,
    },
    /// The disk image after the run.
    #[error("the disk image cannot be read: {why}.")]
    Disk {
        /// Why.
        why: String,
    },
}

impl DemoError {
    /// For `map_err`: names the file.
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> DemoError {
        let path = path.into();
        move |source| DemoError::File { path, source }
    }
}

/// Tells the user what happens, on standard error, with the time since the first call.
fn say(what: &str) {
    static START: OnceLock<Instant> = OnceLock::new();
    let seconds = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    eprintln!("[{seconds:6.1} s] {what}");
}

/// Runs the demo.
///
/// # Errors
/// What kept it from getting to a result. A guest that did not survive is a result.
pub fn run(options: &Options) -> Result<Report, DemoError> {
    let site = Site::set_up(options)?;
    say("hosts up; starting the pair");
    let pair = Pair::start(&site, options)?;
    let kernel = pair.wait_protected()?;
    say("protected; waiting for the guest's service");
    let address = SocketAddr::from((options.guest_ip.0, SERVICE.1));
    let outcome = match find_service(&site, &pair, options, address) {
        Ok(stream) => with_client(&site, &pair, stream, options, address)?,
        Err(why) => without_client(&pair, why, options)?,
    };
    pair.stop()?;
    let [killed, successor] = site.hosts.each_ref().map(|host| host.name());
    let hosts = site.description.clone();
    let closed = site.shut_down();
    let initrd = match &options.initrd {
        Initrd::Ours => "the demo's initramfs",
        Initrd::None => "no initramfs",
        Initrd::File(_) => "its own initramfs",
    };
    let evidence = match outcome.evidence {
        Evidence::Traffic(mut traffic) => {
            let image = closed.disk.filter(|_| options.initrd == Initrd::Ours);
            traffic.disk = image.map(|image| {
                let log = disk::read_log(&image).map_err(|error| error.to_string())?;
                let missing = traffic.client.missing_from(&log.pairs);
                Ok(DiskVerdict { writes: log.writes, missing })
            });
            Evidence::Traffic(traffic)
        }
        console @ Evidence::Console { .. } => console,
    };
    Ok(Report {
        hosts,
        guest: format!("Linux {kernel}, {initrd}, {} MiB", options.memory_mib),
        killed,
        successor: outcome.takeover.as_ref().map(|_| successor),
        takeover_ms: outcome.takeover.and_then(|takeover| takeover.took_ms),
        evidence,
    })
}

struct Outcome {
    takeover: Option<Takeover>,
    evidence: Evidence,
}

/// A connection to the guest's service, or why there is none.
fn find_service(
    site: &Site,
    pair: &Pair<'_>,
    options: &Options,
    address: SocketAddr,
) -> Result<TcpStream, String> {
    let timeout = if options.is_default_guest() { BOOT_TIMEOUT } else { OTHER_BOOT_TIMEOUT };
    let said = pair.guest_prints(SERVICE_READY, timeout);
    let ping = || -> io::Result<TcpStream> {
        let stream = site.connect(address, REPLY_TIMEOUT)?;
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        (&stream).write_all(b"PING 1\n")?;
        let mut reply = String::new();
        BufReader::new(&stream).read_line(&mut reply)?;
        if reply == "PONG 1\n" {
            Ok(stream)
        } else {
            Err(io::Error::other(format!("it says '{}'", reply.trim())))
        }
    };
    ping().map_err(|error| {
        let ready = if said {
            "the guest says that its service is ready, but"
        } else {
            "no service was announced and"
        };
        format!("{ready} nothing right answers at {address}: {error}")
    })
}

fn with_client(
    site: &Site,
    pair: &Pair<'_>,
    stream: TcpStream,
    options: &Options,
    address: SocketAddr,
) -> Result<Outcome, DemoError> {
    say(&format!("a client sends requests to {address}"));
    let interval = match options.requests_per_s {
        0 => Duration::ZERO,
        rate => Duration::from_secs(1) / rate,
    };
    let started = Instant::now();
    let config = client::Config { interval, ..client::Config::default() };
    let client = Client::start(stream, config).map_err(|source| DemoError::Client { source })?;
    let log_bytes_per_s = pair.log_bytes_per_s();
    let (answered_before, killed) = (client.answered(), started.elapsed());
    pair.kill_primary()?;
    let takeover = pair.wait_takeover();
    if takeover.is_some() {
        say("taken over; the client goes on");
        std::thread::sleep(AFTER_TAKEOVER);
    }
    let report = client.stop(REPLY_TIMEOUT);
    let stored = site.connect(address, REPLY_TIMEOUT).and_then(|stream| client::dump(stream, REPLY_TIMEOUT));
    let missing = |stored: BTreeMap<String, String>| report.missing_from(&stored);
    let traffic = Traffic {
        answered_before,
        gaps: Gaps::of(&report.samples, killed),
        log_bytes_per_s,
        missing: stored.map(missing).map_err(|error| format!("it cannot be asked: {error}.")),
        disk: None,
        client: report,
    };
    Ok(Outcome { takeover, evidence: Evidence::Traffic(Box::new(traffic)) })
}

fn without_client(pair: &Pair<'_>, why: String, options: &Options) -> Result<Outcome, DemoError> {
    say(&format!("no client: {why}"));
    let before = pair.console_lines();
    pair.kill_primary()?;
    let takeover = pair.wait_takeover();
    let after = match &takeover {
        Some(takeover) => pair.console_answers(takeover)?,
        None => 0,
    };
    let service_expected = options.is_default_guest();
    let evidence = Evidence::Console { why, service_expected, lines: (before, after) };
    Ok(Outcome { takeover, evidence })
}
