//! `vmft primary`, and what both sides of a pair have.
//!
//! Owns: a guest that runs live. Must never: run one without a claim for its view.
//!
//! ```text
//!   primary: claim(1) ──> live, alone ── claim(view + 1), with its backup ──> live, paired ──> guest ended | lost claim
//!                            ^──────────── claim(view + 1), without ───────────────┘
//!   backup, standby:  join ──> follow ──> claim(view + 1) won ──> live, alone ──> as a primary
//! ```

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use devices::Effect;
use ft_log::{Expected, GuestTime, Key, Role};
use thiserror::Error;

use super::orders::Desk;
use super::stop::Stop;
use super::takeover;
use super::{CommandError, Ending, Prepared, Terminal, ending, prepare, start_thread, watch};
use crate::change;
use crate::config::{DeliveryArgs, OperatorArgs, PairArgs, PrimaryArgs};
use crate::control::metrics::MetricsSocket;
use crate::control::orders::Orders;
use crate::control::protocol::{self as control, Figures, LogFigures, PrimaryFigures};
use crate::control::socket::{self, ControlSocket};
use crate::control::state::{self, FiguresOf};
use crate::control::{Identity, Monitor, Server, Standing};
use crate::ft::accept::{AcceptError, Listener, Reception};
use crate::ft::arbiter::random_id;
use crate::ft::backup::BackupError;
use crate::ft::claim::{ClaimError, ClaimRole, Claims, Outcome, Owner};
use crate::ft::fence::{Fence, FenceError};
use crate::ft::heartbeat::{HeartbeatError, Heartbeats};
use crate::ft::hosts::{HostList, HostsError};
use crate::ft::image::Demand;
use crate::ft::key_file::{self, KeyFileError};
use crate::ft::link::Link;
use crate::ft::output_gate::{Limits, OutputGate};
use crate::ft::primary::{Join, PairLog, PairParts};
use crate::ft::protocol::{Mode, Phase, Timing};
use crate::ft::search::{self, Search, probe_key};
use crate::ft::supervise::{LinkEvent, Supervisor};
use crate::guest::GuestConfig;
use crate::host::deferral::{Deferral, Inbox};
use crate::host::disk::{Caching, Disk, Guard};
use crate::host::image::ImageError;
use crate::host::owner::{Ownership, TakeError};
use crate::machine::Machine;
use crate::outlet::{Outlet, Resources};
use crate::position;
use crate::report::{ReportError, Reports};
use crate::run::{self, HostSide, HostTime, INBOX_EVENTS, Live, RunError, Stopped};

/// Outputs that may wait for acknowledgements before the guest waits too.
const GATE_LIMITS: Limits = Limits { count: 16_384, bytes: 16 << 20 };

const START_AGAIN: &str =
    "find out which image is the guest's, then remove its claims and start it again (README)";

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
    Fence(#[from] FenceError),
    #[error(transparent)]
    Heartbeat(#[from] HeartbeatError),
    #[error(transparent)]
    Hosts(#[from] HostsError),
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    KeyFile(#[from] KeyFileError),
    /// The guest's name is taken.
    #[error(
        "guest '{name}' is already run by {} (process {}): it holds view {view} at {arbiter}. \
         If that monitor is certainly gone, {removal} and start again",
        holder.host, holder.pid
    )]
    Claimed { name: String, view: u64, arbiter: String, removal: String, holder: Box<Owner> },
    #[error(
        "--heartbeat-ms {heartbeat_ms} is too long for --timeout-ms {timeout_ms}; it may be a third of it at most"
    )]
    Heartbeats { heartbeat_ms: u64, timeout_ms: u64 },
    #[error(
        "the primary's {what} is not the one here; both hosts must have the same CPU, kernel and monitor"
    )]
    WelcomeMismatch { what: &'static str },
    #[error(
        "this backup was stopped while it held view {view} and waited for {what}: nobody runs the guest. \
         Make sure of the other host by hand, then remove the guest's claims and start it again"
    )]
    NotLive { view: u64, what: &'static str },
    #[error(
        "disk image '{}' belongs to guest '{guest}', which {} (process {}) runs in view {view}. If that monitor is \
         certainly gone, remove {} and start again",
        image.display(), holder.host, holder.pid, record.display()
    )]
    ImageOwned { image: PathBuf, record: PathBuf, guest: String, view: u64, holder: Box<Owner> },
    #[error(
        "the record of the disk image's owner, {}, is damaged ({why}); find out which monitor writes to the image \
         before it is removed by hand",
        record.display()
    )]
    ImageOwnerDamaged { record: PathBuf, why: String },
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Take(TakeError),
    #[error("the guest is not started: {0}")]
    NotTaken(String),
    #[error(
        "this backup does not take the guest over: {why}. It has claimed nothing: a primary that still lives goes on alone. \
         If none does, nobody runs the guest; {START_AGAIN}"
    )]
    OtherImage { why: String },
    #[error("this backup holds view {view} and does not run the guest: {why}. Nobody runs it; {START_AGAIN}")]
    OtherImageClaimed { view: u64, why: String },
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
pub(super) struct Side {
    pub(super) claims: Claims,
    pub(super) fence: Option<Fence>,
    pub(super) owner: Owner,
    pub(super) timing: Timing,
    pub(super) heartbeat: Duration,
    pub(super) defer: Duration,
    pub(super) reports: Option<Reports>,
    pub(super) version: String,
    /// What both hosts know; `None` if they talk in the open.
    pub(super) key: Option<Key>,
    pub(super) monitor: Arc<Monitor>,
}

impl Side {
    /// `addresses` are those of the log link, each with its option.
    pub(super) fn new(
        args: &PairArgs,
        addresses: &[(&'static str, SocketAddr)],
        delivery: DeliveryArgs,
        name: &str,
        role: ClaimRole,
    ) -> Result<Self, CommandError> {
        if args.heartbeat_ms * 3 > args.timeout_ms {
            let PairArgs { heartbeat_ms, timeout_ms, .. } = *args;
            return Err(PairError::Heartbeats { heartbeat_ms, timeout_ms }.into());
        }
        let key = key_file::for_pair(args.key_file.as_deref(), args.insecure, addresses)
            .map_err(PairError::from)?;
        let limit = Duration::from_millis(args.fence_timeout_ms);
        let fence = args.fence_cmd.as_ref().map(|command| Fence::new(command, limit)).transpose();
        let uuid = random_id().map_err(CommandError::host("give random bytes"))?;
        let (host, version) = (host_name(), build_version()?);
        let limit_bytes = u64::from(args.report_mib) << 20;
        let open = |directory| Reports::open(directory, name, &host, limit_bytes);
        let reports = args.report_dir.as_deref().map(open).transpose().map_err(PairError::from)?;
        Ok(Self {
            fence: fence.map_err(PairError::from)?,
            claims: Claims::open(&args.arbiter, &args.etcd, name).map_err(PairError::from)?,
            monitor: Monitor::new(Identity {
                name: name.to_owned(),
                host: host.clone(),
                version: version.clone(),
            }),
            owner: Owner { host, pid: std::process::id(), uuid, role },
            version,
            timing: Timing::new(Duration::from_millis(args.timeout_ms), args.lag_limit()),
            heartbeat: Duration::from_millis(args.heartbeat_ms),
            defer: delivery.budget(),
            reports,
            key,
        })
    }

    /// Lets operators ask this monitor, until dropped.
    pub(super) fn serve(&self, args: &OperatorArgs, name: &str) -> Result<Server, CommandError> {
        let path = match &args.control {
            Some(path) => path.clone(),
            None => socket::default_path(name)?,
        };
        let metrics = args.metrics.map(MetricsSocket::bind).transpose()?;
        Server::start(ControlSocket::open(&path)?, metrics, Arc::clone(&self.monitor))
            .map_err(CommandError::host("start the control thread"))
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
    let counter = position::choose(args.position.position)?;
    let addresses = [("--listen", args.listen)];
    let side = Side::new(&args.pair, &addresses, args.guest.delivery, &args.guest.name, ClaimRole::Primary)?;
    // Who runs the guest says more than whose control socket is here.
    let view = first_view(&side.claims, &args.guest.name)?;
    let image = args.guest.disk.as_deref().filter(|_| !args.guest.disk_read_only);
    let former = image.map(|image| takeover::check_image(image, &side.claims, &args.guest.name, view));
    let former = former.transpose()?.flatten();
    let _server = side.serve(&args.pair.operator, &args.guest.name)?;
    let hosts = other_hosts(args.hosts.as_ref(), Some(args.listen))?;
    let listener = Listener::bind(args.listen).map_err(PairError::from)?;
    let heartbeats = Arc::new(
        Heartbeats::start(args.listen, &args.guest.name, Role::Primary, side.heartbeat)
            .map_err(PairError::from)?,
    );
    heartbeats.know_others(hosts.clone(), probe_key(side.key.as_ref()));
    let prepared = prepare(&args.guest, Caching::WriteThrough, counter)?;
    let image = takeover::image_to_write(prepared.resources.disk.as_ref())?;
    match side.claims.claim(view, &side.owner, None).map_err(PairError::from)? {
        Outcome::Won | Outcome::Otherwise => {}
        Outcome::Lost { holder, .. } => {
            return Err(claimed(&side.claims, &args.guest.name, view, holder).into());
        }
        Outcome::Unknown { why } => {
            return Err(CommandError::Unfit(format!(
                "the arbiter {} does not say whether the guest may be started: {why}",
                args.pair.arbiter
            )));
        }
    }
    heartbeats.set_view(view, Role::Primary);
    let Prepared { config, machine, mut resources } = prepared;
    takeover::take_disk(&side, view, image, former.as_deref(), &mut resources)?;
    let cause = "vmft primary was started".into();
    let standing = Standing { role: control::Role::Primary, view, protected: false, cause };
    change!(info, side.monitor, Started, standing, "the guest runs here, without a backup so far");
    let listener = Some(listener);
    let live = LiveSide { side, config, machine, resources, heartbeats, listener, hosts, view };
    live.run(Vec::new(), None, stop)
}

/// The hosts of the configuration without this one, which listens on `listen`.
pub(super) fn other_hosts(
    list: Option<&HostList>,
    listen: Option<SocketAddr>,
) -> Result<Vec<SocketAddr>, CommandError> {
    let Some((list, listen)) = list.zip(listen) else { return Ok(Vec::new()) };
    let own: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
        .map_err(|error| CommandError::host("tell its addresses")(error.into()))?
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect();
    Ok(list.others(listen, |ip| own.contains(&ip)).map_err(PairError::from)?)
}

/// The view in which a guest may be started: the first, or the one behind its last orderly end.
fn first_view(claims: &Claims, name: &str) -> Result<u64, PairError> {
    match claims.latest()? {
        None => Ok(1),
        Some(last) if last.owner.role == ClaimRole::Ended => Ok(last.view + 1),
        Some(last) => Err(claimed(claims, name, last.view, last.owner)),
    }
}

fn claimed(claims: &Claims, name: &str, view: u64, holder: Owner) -> PairError {
    PairError::Claimed {
        name: name.to_owned(),
        view,
        arbiter: claims.arbiter().to_string(),
        removal: claims.removal(),
        holder: Box::new(holder),
    }
}

/// A guest that runs here with the right to, and may get a backup.
pub(super) struct LiveSide {
    pub(super) side: Side,
    pub(super) config: GuestConfig,
    pub(super) machine: Machine,
    pub(super) resources: Resources,
    pub(super) heartbeats: Arc<Heartbeats>,
    pub(super) listener: Option<Listener>,
    /// Where to look for a backup.
    pub(super) hosts: Vec<SocketAddr>,
    pub(super) view: u64,
}

/// What the threads of a live guest share.
struct Shared {
    link: Arc<Link>,
    gate: Arc<OutputGate<Outlet>>,
    search: Arc<Search>,
    /// The disk image, to be given back at the guest's end.
    owned: Option<Arc<Ownership>>,
    orders: Arc<Orders>,
}

impl LiveSide {
    /// Runs the guest. `again` are effects of its past that may not have been seen outside; `time` is what
    /// its clock should show if it was taken over.
    pub(super) fn run(
        self,
        again: Vec<Effect>,
        time: Option<GuestTime>,
        stop: (Stop, Receiver<()>),
    ) -> Result<Ending, CommandError> {
        let Self { side, config, mut machine, resources, heartbeats, listener, hosts, view } = self;
        let search = Search::new(hosts, &config.name, side.key.as_ref());
        let (stop, wake) = stop;
        let (sender, receiver) = bounded(INBOX_EVENTS);
        let deferral = Deferral::new(side.defer);
        let inbox = Inbox::new(sender.clone(), Arc::clone(&deferral));
        let shared = open_gate(&side, &heartbeats, resources, &inbox, (view, search), |outlet| {
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
            let port = listener.port();
            listener.serve(reception(&side, &config, &shared, joins_in, &stop)?).map_err(PairError::from)?;
            search::start(&shared.search, port, &shared.link, &heartbeats)
                .map_err(CommandError::host("start a thread"))?;
        }
        let (events, event_queue) = bounded(64);
        side.monitor.set_desk(desk(&shared, &inbox, &events, &stop));
        let _terminal = Terminal::start(&inbox)?;
        let log = PairLog::new(PairParts {
            config,
            claims: side.claims.clone(),
            owner: side.owner.clone(),
            link: Arc::clone(&shared.link),
            gate: Arc::clone(&shared.gate),
            joins,
            events,
            reports: side.reports.clone(),
            search: Arc::clone(&shared.search),
            monitor: Arc::clone(&side.monitor),
            orders: Arc::clone(&shared.orders),
            ask: ask(&stop),
        });
        side.monitor.set_figures(figures(&shared, &heartbeats, &deferral));
        let supervisor = supervisor(&side, &shared, heartbeats, Arc::clone(&deferral), &stop);
        start_thread("supervisor", move || supervisor.run(&event_queue))?;
        let time = HostTime::starting_at(time.unwrap_or(GuestTime(0)).max(machine.now()));
        let _watch = watch(&deferral, &stop)?;
        let (inbox, orders) = ((sender, receiver), Arc::clone(&shared.orders));
        let host = HostSide { time, inbox, deferral, wake, stop: stop.flag(), orders };
        let mut door = Live::new(&machine, host, log);
        if let Some(len_bytes) = machine.board().outstanding_entropy() {
            door.supply_entropy(len_bytes)?;
        }
        let outcome = run::run(&mut machine, &mut door);
        shared.conclude(&side, outcome, door.log_mut(), machine.anchors())
    }
}

impl Shared {
    /// What is left to do when the guest does not run here any more.
    fn conclude(
        &self,
        side: &Side,
        outcome: Result<Stopped, RunError>,
        log: &PairLog,
        anchors: u64,
    ) -> Result<Ending, CommandError> {
        if self.link.is_lost() && log.successor().is_none() {
            return Ok(Ending::LostClaim);
        }
        if let Some(successor) = log.successor() {
            return Ok(Ending::HandedOver(successor));
        }
        // A crash may be this host's: the backup goes on, or ends the guest's life, depending on what its own guest does.
        let ended = matches!(outcome, Ok(Stopped::GuestEnded(end)) if !end.is_crash())
            || self.orders.plug_is_pulled();
        let goes_on = self.link.phase() != Phase::Alone || log.had_backup();
        if ended || !goes_on {
            // Nobody runs the guest any more, and nobody in this pair will.
            side.end_life(self.link.view(), self.owned.as_deref())?;
        }
        Ok(ending(outcome?, anchors))
    }
}

impl Side {
    /// The guest's life is over in `view`, which is this monitor's: so says the next one, and the image is given back.
    pub(super) fn end_life(&self, view: u64, owned: Option<&Ownership>) -> Result<(), CommandError> {
        self.claims.end(view, &self.owner).map_err(PairError::from)?;
        if let Some(Err(error)) = owned.map(Ownership::release) {
            tracing::warn!("the record of the disk image's owner stays: {error}");
        }
        Ok(())
    }
}

/// Passes an operator's orders on to those who carry them out.
fn desk(shared: &Shared, inbox: &Inbox, events: &Sender<LinkEvent>, stop: &Stop) -> state::Desk {
    let desk = Desk {
        orders: Arc::clone(&shared.orders),
        inbox: inbox.clone(),
        link: Arc::clone(&shared.link),
        events: events.clone(),
        stop: stop.clone(),
    };
    Box::new(move |command, monitor| desk.take(command, monitor))
}

/// Gets the vCPU's thread to a boundary.
fn ask(stop: &Stop) -> Arc<dyn Fn() + Send + Sync> {
    let stop = stop.clone();
    Arc::new(move || {
        stop.wake();
        stop.kick();
    })
}

/// Puts the host's resources to work behind a gate that is open: there is no backup yet.
fn open_gate(
    side: &Side,
    heartbeats: &Arc<Heartbeats>,
    resources: Resources,
    inbox: &Inbox,
    (view, search): (u64, Search),
    first: impl FnOnce(&Outlet),
) -> Result<Shared, CommandError> {
    let link = Arc::new(Link::new(view, side.timing));
    let may_act = lease_check(&link, heartbeats);
    let owned = resources.disk.as_ref().and_then(Disk::owned);
    let outlet = resources.start(inbox, Arc::clone(&may_act))?;
    first(&outlet);
    let lease = Box::new(move || may_act());
    let gate = Arc::new(OutputGate::new(Mode::Unprotected, GATE_LIMITS, outlet, lease));
    Ok(Shared { link, gate, search: Arc::new(search), owned, orders: Arc::default() })
}

/// May this monitor let output go and touch the disk?
fn lease_check(link: &Arc<Link>, heartbeats: &Arc<Heartbeats>) -> Guard {
    let (link, heartbeats) = (Arc::clone(link), Arc::clone(heartbeats));
    Arc::new(move || link.may_act(heartbeats.answered_sent_at()))
}

fn reception(
    side: &Side,
    config: &GuestConfig,
    shared: &Shared,
    joins: Sender<Join>,
    stop: &Stop,
) -> Result<Reception, CommandError> {
    let expected = Expected {
        monitor_version: side.version.clone(),
        cpu: config.cpu,
        guest_name: config.name.clone(),
        disk_bytes: config.board.disk_bytes,
        claims_id: side.claims.arbiter_id(),
        timeout_ms: side.timing.timeout.as_millis() as u32,
        has_network: config.board.net_mac.is_some(),
        positions: config.positions,
    };
    let stop = stop.clone();
    let (link, search) = (Arc::clone(&shared.link), Arc::clone(&shared.search));
    let key = side.key.clone();
    let disk = match &shared.owned {
        Some(owned) => Demand::Image(Arc::clone(owned)),
        None if config.board.disk_bytes.is_none() || config.board.disk_read_only => Demand::Size,
        None => Demand::Device,
    };
    Ok(Reception { expected, disk, key, link, search, joins, wake: Box::new(move || stop.wake()) })
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
        timing: side.timing,
        heartbeats,
        deferral,
        search: Arc::clone(&shared.search),
        stop_guest: Box::new(move || stop.request()),
        monitor: Arc::clone(&side.monitor),
    }
}

/// The figures of a guest that runs here.
fn figures(shared: &Shared, heartbeats: &Arc<Heartbeats>, deferral: &Arc<Deferral>) -> FiguresOf {
    let (link, gate, orders) =
        (Arc::clone(&shared.link), Arc::clone(&shared.gate), Arc::clone(&shared.orders));
    let (heartbeats, deferral) = (Arc::clone(heartbeats), Arc::clone(deferral));
    Box::new(move || {
        let (sent, outputs) = (link.figures(), gate.stats());
        Figures {
            anchors: link.position(),
            log: LogFigures { bytes: sent.log_bytes, batches: sent.batches, ..LogFigures::default() },
            primary: Some(PrimaryFigures {
                paused: orders.stands(),
                lag_ms: link.lag().as_millis() as u64,
                lag_p50_us: sent.lag_p50_us,
                lag_p99_us: sent.lag_p99_us,
                paced_ms: sent.paced.as_millis() as u64,
                outputs: outputs.released,
                outputs_held: outputs.held as u64,
                output_delay_sum_us: outputs.delay_sum_us,
                output_delay_max_us: outputs.delay_max_us,
                lease_refusals: outputs.lease_refusals,
                checkpoints: sent.checkpoints,
                checkpoint_pages: sent.checkpoint_pages,
                checkpoint_pause_p50_us: sent.pause_p50_us,
                checkpoint_pause_p99_us: sent.pause_p99_us,
                defer_ms: deferral.budget().as_millis() as u64,
                silence_max_ms: heartbeats.silence_max().as_millis() as u64,
            }),
        }
    })
}
