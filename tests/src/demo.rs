//! The demo behind `run-ft.sh`: a guest on two hosts outlives the loss of one.
//!
//! Owns: the order of events, below. Must never: call anything a success that it did not see, or kill a primary whose
//! guest is not protected.
//!
//! ```text
//!   hosts up -> guest ready -> backup joins: protected -> client at work -> SIGKILL for the primary -> takeover
//!            -> client goes on -> client done, all it was promised is there -> report
//! ```
//! Without the demo service in the guest there is no client; then `watch` looks at what the user named as a sign of life.

mod disk;
mod host;
mod options;
mod pair;
mod protect;
mod report;
mod site;
mod ssh;
mod watch;

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

use options::{Initrd, Ready};
use pair::{Pair, Takeover};
use report::{After, DiskVerdict, Evidence, LookedFor, Traffic, Watched};
use site::Site;

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
    /// The guest's port, before the kill.
    #[error("NOT TESTED, nothing was killed: no connection to {address} stays open: {source}.")]
    Service {
        /// The guest's.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The guest did not get as far as it was told.
    #[error(
        "NOT TESTED, nothing was killed: the guest was not ready within {limit_s} s (--boot-limit-s): {what} was \
         looked for. The console's last line: {last}"
    )]
    NotReady {
        /// What was looked for.
        what: String,
        /// The limit in seconds.
        limit_s: u32,
        /// The console's last line.
        last: String,
    },
    /// The backup did not follow when the primary was to be killed.
    #[error(
        "NOT TESTED, nothing was killed: the guest was not protected within {limit_s} s (--boot-limit-s), with \
         {backups} backups one after the other. The primary's last line: {primary}. The backup's: {backup}. A busy \
         machine needs a longer --timeout-ms."
    )]
    Unprotected {
        /// The limit in seconds.
        limit_s: u64,
        /// How many backups were started.
        backups: usize,
        /// The primary's last line.
        primary: String,
        /// The last backup's last line.
        backup: String,
    },
    /// The backup was lost between the last look at it and the kill.
    #[error("NOT TESTED: the guest lost its backup in the moment in which its primary was killed: {line}")]
    LostInThatMoment {
        /// The primary's line about it.
        line: String,
    },
    /// The guest powered off or crashed, or its monitor failed.
    #[error("NOT TESTED, nothing was killed: the primary {ending} before. Its last line: {last}")]
    EndedEarly {
        /// How.
        ending: Ending,
        /// The primary's last line.
        last: String,
    },
    /// The backup took over from a primary that nobody had killed.
    #[error(
        "NOT TESTED, nothing was killed: the backup had taken over before, from a primary that it did not hear. The \
         primary's last line: {last}. A busy machine needs a longer --timeout-ms."
    )]
    TakenOverEarly {
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
    say("hosts up; starting the guest");
    let mut pair = Pair::start(&site, options)?;
    let found = find(&site, &pair, options)?;
    say("the backup joins");
    pair.protect()?;
    say("protected");
    let kernel = pair.kernel();
    let address = SocketAddr::from((options.guest_ip.0, SERVICE.1));
    let outcome = match found {
        Found::Service(stream) => with_client(&site, &mut pair, stream, options, address)?,
        Found::Other(looked_for) => without_client(&site, &mut pair, looked_for, options)?,
    };
    let backups = pair.backups();
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
        watched @ Evidence::Watched(_) => watched,
    };
    Ok(Report {
        hosts,
        guest: format!("Linux {kernel}, {initrd}, {} MiB", options.memory_mib),
        killed,
        backups,
        successor: outcome.takeover.as_ref().map(|_| successor),
        takeover_ms: outcome.takeover.and_then(|takeover| takeover.took_ms),
        evidence,
    })
}

struct Outcome {
    takeover: Option<Takeover>,
    evidence: Evidence,
}

/// What the guest is judged by.
enum Found {
    /// A connection to the demo's service.
    Service(TcpStream),
    /// Anything else.
    Other(LookedFor),
}

/// Waits until the guest is ready.
fn find(site: &Site, pair: &Pair<'_>, options: &Options) -> Result<Found, DemoError> {
    if let Some(ready) = &options.ready {
        say(&format!("waiting for {ready}, {} s at most", options.boot_limit_s));
        let after = watch::wait_ready(site, pair, options, ready)?;
        return Ok(Found::Other(LookedFor::Ready(ready.clone(), after)));
    }
    say(&format!(
        "waiting for the demo's service, {} s at most (--ready: for something else)",
        options.boot_limit_s
    ));
    let address = SocketAddr::from((options.guest_ip.0, SERVICE.1));
    Ok(match find_service(site, pair, options, address) {
        Ok(stream) => Found::Service(stream),
        Err(why) => Found::Other(LookedFor::Nothing { why, service_expected: options.expects_service() }),
    })
}

/// A connection to the demo's service, or why there is none.
fn find_service(
    site: &Site,
    pair: &Pair<'_>,
    options: &Options,
    address: SocketAddr,
) -> Result<TcpStream, String> {
    let said = pair.guest_prints(SERVICE_READY, Duration::from_secs(options.boot_limit_s.into()));
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
    pair: &mut Pair<'_>,
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

fn without_client(
    site: &Site,
    pair: &mut Pair<'_>,
    looked_for: LookedFor,
    options: &Options,
) -> Result<Outcome, DemoError> {
    say(&format!("no client: {looked_for}"));
    let before = match &looked_for {
        LookedFor::Ready(Ready::Port(port), _) => {
            Some(watch::Before::open(site, (options.guest_ip.0, port.get()).into())?)
        }
        LookedFor::Ready(Ready::Text(_), _) | LookedFor::Nothing { .. } => None,
    };
    pair.kill_primary()?;
    let takeover = pair.wait_takeover();
    let after = takeover
        .as_ref()
        .map(|_| After { moved: pair.moves_on(), connections: before.map(|before| before.look_again(site)) });
    Ok(Outcome { takeover, evidence: Evidence::Watched(Watched { looked_for, after }) })
}
