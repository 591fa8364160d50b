//! `vmft primary` and `vmft backup`.
//!
//! Owns: putting the two sides together, and the takeover. Must never: run a guest live without a claim for
//! its view.
//!
//! ```text
//!   primary: claim(1) ──> live, alone <──> live, paired ──> guest ended | lost claim
//!   backup:  join ──> follow ──> claim(view + 1) won ──> live, alone ──> as a primary
//! ```

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use devices::Effect;
use ft_log::{ByeReason, Expected, GuestTime, Hello, Role, StreamError};
use thiserror::Error;

use super::stop::Stop;
use super::{CommandError, Ending, Prepared, Terminal, ending, prepare, watch};
use crate::boot;
use crate::config::{BackupArgs, DeliveryArgs, PairArgs, PrimaryArgs};
use crate::ft::accept::{AcceptError, Listener, Reception};
use crate::ft::backup::{BackupError, Connection, FromPrimary, Inflow, LinkEnd, connect};
use crate::ft::claim::{ClaimError, ClaimRole, Claims, Outcome, Owner, random_id};
use crate::ft::heartbeat::{HeartbeatError, Heartbeats};
use crate::ft::link::{Link, Phase};
use crate::ft::output_gate::{Limits, Mode, OutputGate};
use crate::ft::primary::{Join, PairLog, PairParts};
use crate::ft::supervise::{Supervisor, claim_until_known};
use crate::guest::{GuestConfig, GuestError};
use crate::host::deferral::{Deferral, Inbox};
use crate::host::disk::{Caching, Disk, DiskError, Guard};
use crate::host::tap::Tap;
use crate::kvm::Kvm;
use crate::machine::Machine;
use crate::outlet::{Outlet, Resources};
use crate::run::{self, Follow, HostSide, HostTime, INBOX_EVENTS, Live, RunError, Stopped};
use crate::snapshot::{self, SnapshotError};

/// Outputs that may wait for acknowledgements before the guest waits too.
const GATE_LIMITS: Limits = Limits { count: 16_384, bytes: 16 << 20 };
/// Part of the timeout for which an answer of the backup lets output go. The rest covers clocks that run
/// at different speeds and the time from the question to the system call.
const LEASE_NUMERATOR: u32 = 3;
const LEASE_DENOMINATOR: u32 = 4;

/// Pause between two looks at how long the primary has been silent.
const SILENCE_POLL: Duration = Duration::from_millis(5);

/// Why a pair cannot be formed or kept.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum PairError {
    #[error(transparent)]
    Accept(#[from] AcceptError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    /// The guest's name is taken.
    #[error(
        "guest '{name}' is already run by {} (process {}): it holds view {view} in {directory}. \
         If that monitor is certainly gone, remove {name}.view-* there and start again",
        holder.host, holder.pid
    )]
    Claimed { name: String, view: u64, directory: String, holder: Box<Owner> },
    #[error(
        "--heartbeat-ms {heartbeat_ms} is too long for --timeout-ms {timeout_ms}; it may be a third of it at most"
    )]
    Heartbeats { heartbeat_ms: u64, timeout_ms: u64 },
    #[error(
        "the primary's {what} is not the one here; both hosts must have the same CPU, kernel and monitor"
    )]
    WelcomeMismatch { what: &'static str },
    #[error("the primary was lost before the pair was formed: {0}")]
    NotFormed(String),
    #[error("the primary at {address} was lost before the pair was formed: {source}")]
    Transfer {
        address: SocketAddr,
        #[source]
        source: ft_log::SnapshotError,
    },
}

/// What both sides have before there is a guest.
struct Side {
    claims: Claims,
    owner: Owner,
    timeout: Duration,
    heartbeat: Duration,
    defer: Duration,
    version: String,
}

impl Side {
    fn new(
        args: &PairArgs,
        delivery: DeliveryArgs,
        name: &str,
        role: ClaimRole,
    ) -> Result<Self, CommandError> {
        if args.heartbeat_ms * 3 > args.timeout_ms {
            let PairArgs { heartbeat_ms, timeout_ms, .. } = *args;
            return Err(PairError::Heartbeats { heartbeat_ms, timeout_ms }.into());
        }
        let uuid = random_id().map_err(CommandError::host("give random bytes"))?;
        Ok(Self {
            claims: Claims::open(&args.shared, name).map_err(PairError::from)?,
            owner: Owner { host: host_name(), pid: std::process::id(), uuid, role },
            version: build_version()?,
            timeout: Duration::from_millis(args.timeout_ms),
            heartbeat: Duration::from_millis(args.heartbeat_ms),
            defer: delivery.budget(),
        })
    }

    fn lease(&self) -> Duration {
        self.timeout * LEASE_NUMERATOR / LEASE_DENOMINATOR
    }
}

/// The monitor's version, exact to the byte: primary and backup must emulate the same machine.
fn build_version() -> Result<String, CommandError> {
    let program =
        std::fs::read("/proc/self/exe").map_err(CommandError::host("read the monitor's program"))?;
    Ok(format!("{}+{:016x}", env!("CARGO_PKG_VERSION"), xxhash_rust::xxh3::xxh3_64(&program)))
}

fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// `vmft primary`.
pub fn primary(args: &PrimaryArgs) -> Result<Ending, CommandError> {
    let stop = Stop::install()?;
    let side = Side::new(&args.pair, args.guest.delivery, &args.guest.name, ClaimRole::Primary)?;
    let view = first_view(&side.claims, &args.guest.name, &args.pair.shared)?;
    let listener = Listener::bind(args.listen).map_err(PairError::from)?;
    let heartbeats = Arc::new(
        Heartbeats::start(args.listen, &args.guest.name, Role::Primary, side.heartbeat)
            .map_err(PairError::from)?,
    );
    let prepared = prepare(&args.guest, Caching::WriteThrough)?;
    match side.claims.claim(view, &side.owner).map_err(PairError::from)? {
        Outcome::Won => {}
        Outcome::Lost { holder } => {
            return Err(claimed(&args.guest.name, &args.pair.shared, view, holder).into());
        }
        Outcome::Unknown { why } => {
            return Err(CommandError::Unfit(format!(
                "the shared directory {} does not say whether the guest may be started: {why}",
                args.pair.shared.display()
            )));
        }
    }
    heartbeats.set_view(view, Role::Primary);
    let Prepared { config, machine, resources } = prepared;
    let live = LiveSide { side, config, machine, resources, heartbeats, listener: Some(listener), view };
    live.run(Vec::new(), None, stop)
}

/// The view in which a guest may be started: the first, or the one behind its last orderly end.
fn first_view(claims: &Claims, name: &str, directory: &Path) -> Result<u64, PairError> {
    match claims.latest()? {
        None => Ok(1),
        Some((view, Owner { role: ClaimRole::Ended, .. })) => Ok(view + 1),
        Some((view, holder)) => Err(claimed(name, directory, view, holder)),
    }
}

fn claimed(name: &str, directory: &Path, view: u64, holder: Owner) -> PairError {
    PairError::Claimed {
        name: name.to_owned(),
        view,
        directory: directory.display().to_string(),
        holder: Box::new(holder),
    }
}

/// A guest that runs here with the right to, and may get a backup.
struct LiveSide {
    side: Side,
    config: GuestConfig,
    machine: Machine,
    resources: Resources,
    heartbeats: Arc<Heartbeats>,
    listener: Option<Listener>,
    view: u64,
}

/// What the threads of a live guest share.
struct Shared {
    link: Arc<Link>,
    gate: Arc<OutputGate<Outlet>>,
    view: Arc<AtomicU64>,
    lost: Arc<AtomicBool>,
}

impl LiveSide {
    /// Runs the guest. `again` are effects of its past that may not have been seen outside; `time` is what
    /// its clock should show if it was taken over.
    fn run(
        self,
        again: Vec<Effect>,
        time: Option<GuestTime>,
        stop: (Stop, Receiver<()>),
    ) -> Result<Ending, CommandError> {
        let Self { side, config, mut machine, resources, heartbeats, listener, view } = self;
        let (stop, wake) = stop;
        let (sender, receiver) = bounded(INBOX_EVENTS);
        let deferral = Deferral::new(side.defer);
        let inbox = Inbox::new(sender.clone(), Arc::clone(&deferral));
        let shared = open_gate(&side, &heartbeats, resources, &inbox, view, |outlet| {
            if let Some(mac) = config.board.net_mac.filter(|_| time.is_some()) {
                outlet.announce(mac);
            }
        })?;
        let requests = machine.board().outstanding_disk_requests();
        for effect in again.into_iter().chain(requests.into_iter().map(Effect::Disk)) {
            // The gate is open and the performers wait for room themselves.
            let _ = shared.gate.push(0, effect);
        }
        let (joins_in, joins) = bounded(1);
        if let Some(listener) = listener {
            listener
                .serve(reception(&side, &config, &shared.link, joins_in, &stop)?)
                .map_err(PairError::from)?;
        }
        let (events, event_queue) = bounded(64);
        let _terminal = Terminal::start(&inbox)?;
        let log = PairLog::new(PairParts {
            config,
            host: side.owner.host.clone(),
            link: Arc::clone(&shared.link),
            gate: Arc::clone(&shared.gate),
            joins,
            events,
            view: Arc::clone(&shared.view),
        });
        let supervisor = supervisor(&side, &shared, heartbeats, Arc::clone(&deferral), &stop);
        spawn("supervisor", move || supervisor.run(&event_queue))?;
        let start = time.unwrap_or(GuestTime(0)).max(machine.now());
        let _watch = watch(&deferral, &stop)?;
        let time = HostTime::starting_at(start);
        let host = HostSide { time, inbox: (sender, receiver), deferral, wake, stop: stop.flag() };
        let mut door = Live::new(&machine, host, log);
        if let Some(len_bytes) = machine.board().outstanding_entropy() {
            door.supply_entropy(len_bytes)?;
        }
        let outcome = run::run(&mut machine, &mut door);
        if shared.lost.load(Ordering::SeqCst) {
            return Ok(Ending::LostClaim);
        }
        let ended = matches!(outcome, Ok(Stopped::GuestEnded(_)));
        let goes_on = shared.link.phase() != Phase::Alone || door.log_mut().had_backup();
        if ended || !goes_on {
            // Nobody runs the guest any more, and nobody in this pair will.
            side.claims.end(shared.view.load(Ordering::SeqCst), &side.owner).map_err(PairError::from)?;
        }
        Ok(ending(outcome?, machine.anchors()))
    }
}

/// Puts the host's resources to work behind a gate that is open: there is no backup yet.
fn open_gate(
    side: &Side,
    heartbeats: &Arc<Heartbeats>,
    resources: Resources,
    inbox: &Inbox,
    view: u64,
    first: impl FnOnce(&Outlet),
) -> Result<Shared, CommandError> {
    let link = Arc::new(Link::default());
    let lost = Arc::new(AtomicBool::new(false));
    let may_act = lease_check(side.lease(), &link, &lost, heartbeats);
    let outlet = resources.start(inbox, Arc::clone(&may_act))?;
    first(&outlet);
    let lease = Box::new(move || may_act());
    let gate = Arc::new(OutputGate::new(Mode::Unprotected, GATE_LIMITS, outlet, lease));
    Ok(Shared { link, gate, view: Arc::new(AtomicU64::new(view)), lost })
}

/// May this monitor let output go and touch the disk? Alone: unless the claim was lost. With a backup: while
/// the backup has answered something recent, because until then it has not claimed the guest.
fn lease_check(
    lease: Duration,
    link: &Arc<Link>,
    lost: &Arc<AtomicBool>,
    heartbeats: &Arc<Heartbeats>,
) -> Guard {
    let (link, lost, heartbeats) = (Arc::clone(link), Arc::clone(lost), Arc::clone(heartbeats));
    Arc::new(move || {
        !lost.load(Ordering::SeqCst)
            && match link.phase() {
                Phase::Alone => true,
                Phase::Orphaned => false,
                Phase::Paired => link.silent_for().min(heartbeats.unanswered_for()) < lease,
            }
    })
}

fn reception(
    side: &Side,
    config: &GuestConfig,
    link: &Arc<Link>,
    joins: Sender<Join>,
    stop: &Stop,
) -> Result<Reception, CommandError> {
    let expected = Expected {
        monitor_version: side.version.clone(),
        cpu: config.cpu,
        guest_name: config.name.clone(),
        disk_bytes: config.board.disk_bytes,
        claims_id: side.claims.directory_id().map_err(PairError::from)?,
        timeout_ms: side.timeout.as_millis() as u32,
        has_network: config.board.net_mac.is_some(),
    };
    let stop = stop.clone();
    Ok(Reception { expected, link: Arc::clone(link), joins, wake: Box::new(move || stop.wake()) })
}

fn supervisor(
    side: &Side,
    shared: &Shared,
    heartbeats: Arc<Heartbeats>,
    deferral: Arc<Deferral>,
    stop: &Stop,
) -> Supervisor {
    let stop = stop.clone();
    Supervisor {
        link: Arc::clone(&shared.link),
        gate: Arc::clone(&shared.gate),
        claims: side.claims.clone(),
        owner: side.owner.clone(),
        view: Arc::clone(&shared.view),
        timeout: side.timeout,
        heartbeats,
        deferral,
        lost: Arc::clone(&shared.lost),
        stop_guest: Box::new(move || stop.request()),
    }
}

/// `vmft backup`.
pub fn backup(args: &BackupArgs) -> Result<Ending, CommandError> {
    let stop = Stop::install()?;
    let side = Side::new(&args.pair, args.delivery, &args.name, ClaimRole::Backup)?;
    let kvm = Kvm::open()?;
    let listener = args.listen.map(Listener::bind).transpose().map_err(PairError::from)?;
    let (table, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?).map_err(GuestError::from)?;
    let resources = Resources {
        disk: match &args.disk {
            // Without the lock, which the primary's monitor holds; the claim decides who may write.
            Some(path) => Some(Disk::open_unlocked(path, false, Caching::WriteThrough)?),
            None => None,
        },
        tap: args.tap.as_deref().map(Tap::open).transpose()?,
    };
    let hello = Hello {
        monitor_version: side.version.clone(),
        cpu,
        guest_name: args.name.clone(),
        disk_bytes: resources.disk.as_ref().map(Disk::capacity_bytes),
        claims_id: side.claims.directory_id().map_err(PairError::from)?,
        host_name: side.owner.host.clone(),
        timeout_ms: side.timeout.as_millis() as u32,
        has_network: resources.tap.is_some(),
    };
    let timeout = Duration::from_millis(args.connect_timeout_ms);
    let mut connection = connect(args.connect, hello, timeout).map_err(PairError::from)?;
    let any_port = SocketAddr::new(connection.local_address().map_err(PairError::from)?.ip(), 0);
    let heartbeats = Arc::new(
        Heartbeats::start(args.listen.unwrap_or(any_port), &args.name, Role::Backup, side.heartbeat)
            .map_err(PairError::from)?,
    );
    heartbeats.set_view(connection.welcome.view, Role::Backup);
    heartbeats.set_peer(Some(args.connect));
    if GuestConfig::digest_of(&table) != connection.welcome.cpuid_digest {
        return Err(PairError::WelcomeMismatch { what: "CPUID table" }.into());
    }
    let (config, machine) = receive_guest(&kvm, &mut connection)?;
    follow(Following { side, config, machine, resources, heartbeats, listener, connection }, stop)
}

fn receive_guest(kvm: &Kvm, connection: &mut Connection) -> Result<(GuestConfig, Machine), CommandError> {
    let started = Instant::now();
    let total_mib = connection.welcome.memory_bytes >> 20;
    tracing::info!(primary = %connection.welcome.host_name, memory_mib = total_mib, "receiving the guest");
    let mut quarter = 0;
    let total_bytes = connection.welcome.memory_bytes.max(1);
    let address = connection.address;
    let (config, machine) = snapshot::load(kvm, connection.frames.snapshot(), |gpa| {
        let now = gpa.min(total_bytes) * 4 / total_bytes;
        if now > quarter {
            quarter = now;
            tracing::info!(percent = now * 25, "receiving the guest");
        }
    })
    .map_err(|source| match source {
        SnapshotError::Container(source) => PairError::Transfer { address, source }.into(),
        other => CommandError::from(other),
    })?;
    let welcome = &connection.welcome;
    for (what, equal) in [
        ("configuration", welcome.config_digest == config.digest()),
        ("CPUID table", welcome.cpuid_digest == config.cpuid_digest()),
        ("position", welcome.start == snapshot::cursor(&machine)),
    ] {
        if !equal {
            return Err(PairError::WelcomeMismatch { what }.into());
        }
    }
    tracing::info!(anchor = machine.anchors(), took_ms = started.elapsed().as_millis() as u64, "following");
    Ok((config, machine))
}

struct Following {
    side: Side,
    config: GuestConfig,
    machine: Machine,
    resources: Resources,
    heartbeats: Arc<Heartbeats>,
    listener: Option<Listener>,
    connection: Connection,
}

/// Follows to the log's end; then, with a claim won, takes over.
fn follow(parts: Following, stop: (Stop, Receiver<()>)) -> Result<Ending, CommandError> {
    let Following { side, config, mut machine, mut resources, heartbeats, listener, connection } = parts;
    let view = connection.welcome.view;
    let cursor = snapshot::cursor(&machine);
    let (inflow, frames) =
        connection.follow(cursor).map_err(|source: StreamError| PairError::NotFormed(source.to_string()))?;
    // The primary was busy with the snapshot, and this host with loading it.
    heartbeats.note_heard();
    let (verdict_in, verdict) = bounded(1);
    let receiver = {
        let (inflow, heartbeats, stop) = (Arc::clone(&inflow), Arc::clone(&heartbeats), stop.0.flag());
        let (claims, owner, timeout) = (side.claims.clone(), side.owner.clone(), side.timeout);
        move || {
            let end = inflow.receive(frames, || heartbeats.note_heard());
            let noticed = Instant::now();
            // An answer from here would let the primary act on; whoever claims is silent first.
            heartbeats.fall_silent();
            let verdict = if stop.load(Ordering::Relaxed) {
                Verdict::Stopped
            } else {
                judge(&end, &claims, view + 1, &owner, || heartbeats.silent_for() > timeout)
            };
            // The main thread waits for exactly this.
            let _ = verdict_in.send((verdict, noticed));
        }
    };
    spawn("log-receiver", receiver)?;
    spawn("watchdog", watchdog(Arc::clone(&inflow), Arc::clone(&heartbeats), side.timeout, stop.0.flag()))?;
    let source = FromPrimary::new(Arc::clone(&inflow), stop.0.flag());
    let mut door = Follow::new(source, cursor, config.board.clone(), config.end_page());
    let stopped = run::run(&mut machine, &mut door).inspect_err(|error| {
        if let RunError::Diverged(_) = error {
            inflow.bye(ByeReason::Diverged, "this backup's guest differs; see its own report");
        }
    })?;
    if let Stopped::GuestEnded(_) = stopped {
        return Ok(ending(stopped, machine.anchors()));
    }
    let Ok((verdict, noticed)) = verdict.recv() else {
        return Err(PairError::NotFormed("the receiver's thread is gone".into()).into());
    };
    match verdict {
        Verdict::Won => {}
        Verdict::GuestEnded | Verdict::Stopped => return Ok(Ending::Orderly),
        Verdict::Lost(holder) => {
            tracing::error!(view = view + 1, host = %holder.host, pid = holder.pid,
                "the primary goes on alone; this backup stops");
            return Ok(Ending::LostClaim);
        }
    }
    if let Some(disk) = &mut resources.disk {
        match disk.lock() {
            // A file server may hold the lock of a host that died; the claim is what counts.
            Ok(()) | Err(DiskError::InUse { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let time = door.source_mut().primary_time();
    let again = door.into_unreleased();
    heartbeats.set_view(view + 1, Role::Primary);
    heartbeats.set_peer(None);
    tracing::warn!(
        view = view + 1,
        anchor = machine.anchors(),
        outputs_again = again.len(),
        disk_again = machine.board().outstanding_disk_requests().len(),
        took_ms = noticed.elapsed().as_millis() as u64,
        "takeover: this host now runs the guest"
    );
    let live = LiveSide { side, config, machine, resources, heartbeats, listener, view: view + 1 };
    live.run(again, Some(time.unwrap_or(GuestTime(0))), stop)
}

/// What becomes of a backup whose link has ended.
enum Verdict {
    /// The guest's life is over.
    GuestEnded,
    /// The operator stopped this monitor. It claims nothing: the primary goes on.
    Stopped,
    /// The guest is ours.
    Won,
    /// The guest is the holder's.
    Lost(Owner),
}

/// Decides, by a claim, who goes on. A primary that closed the connection, or whose kernel did, lets nothing
/// out any more. One that merely cannot be reached may, until it has not heard from here for the timeout.
fn judge(end: &LinkEnd, claims: &Claims, view: u64, owner: &Owner, silent: impl Fn() -> bool) -> Verdict {
    let LinkEnd::Lost { why, by_peer } = end else { return Verdict::GuestEnded };
    tracing::warn!("primary lost: {why}");
    while !by_peer && !silent() {
        std::thread::sleep(SILENCE_POLL);
    }
    claim_until_known(claims, view, owner).map_or(Verdict::Won, Verdict::Lost)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), CommandError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(CommandError::host("start a thread"))?;
    Ok(())
}

/// Gives the primary up when nothing has been heard of it for `timeout`.
fn watchdog(
    inflow: Arc<Inflow>,
    heartbeats: Arc<Heartbeats>,
    timeout: Duration,
    stop: Arc<AtomicBool>,
) -> impl FnOnce() + Send + 'static {
    move || {
        while inflow.end().is_none() {
            let silent = heartbeats.silent_for();
            if silent > timeout {
                tracing::warn!(silent_ms = silent.as_millis() as u64, "the primary is silent");
                inflow.give_up();
                return;
            }
            if stop.load(Ordering::Relaxed) {
                inflow.bye(ByeReason::Shutdown, "the operator stopped this backup");
                inflow.give_up();
                return;
            }
            std::thread::sleep((timeout - silent).min(timeout / 10));
        }
    }
}
