//! A guest that runs live, and the threads around it: `vmft primary`, and what a backup becomes by a takeover.
//!
//! Owns: the start of a guest with its first claim, a live guest's run, and what is left to do when that ends. Must never: run
//! a guest without a claim for its view.
//!
//! ```text
//!   primary: claim(1) ──> live, alone ── claim(view + 1), with its backup ──> live, paired ──> guest ended | lost claim
//!                            ^──────────── claim(view + 1), without ───────────────┘
//!   backup, standby:  join ──> follow ──> claim(view + 1) won ──> live, alone ──> as a primary
//! ```
//! Threads: the caller's is the vCPU's; it starts all others of a live guest. Locks: none of its own.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crossbeam_channel::{Sender, bounded};
use devices::Effect;
use ft_log::{Expected, GuestTime, Role};

use super::accept::{Listener, Reception};
use super::gate::{Limits, OutputGate, Permit};
use super::invite::{self, Search, probe_key};
use super::joiner::{Join, Joiner};
use super::log_writer::LogWriter;
use super::orders::OrderHandler;
use super::state::PrimaryState;
use super::supervisor::{LinkEvent, Supervisor};
use crate::change;
use crate::control::Standing;
use crate::control::protocol::{self as control, Figures, LogFigures, PrimaryFigures};
use crate::control::state::{self, FiguresOf};
use crate::guest::GuestConfig;
use crate::host::backends::{Outlet, Resources};
use crate::host::deferral::Deferral;
use crate::host::disk::{Caching, Disk, Guard};
use crate::host::inbox::Inbox;
use crate::host::owner::Ownership;
use crate::launch::{
    Ending, GuestSettings, LaunchError, Prepared, Terminal, prepare, start_thread, take_signals, watch,
};
use crate::machine::Machine;
use crate::pair::claims::claim::{ClaimRole, Claims, Outcome, Owner};
use crate::pair::claims::image_identity::Demand;
use crate::pair::claims::image_owner;
use crate::pair::liveness::heartbeat::{Heartbeats, boot_time};
use crate::pair::protocol::{Needed, Phase};
use crate::pair::{Leave, PairError, Settings, Side, other_hosts};
use crate::position;
use crate::run::{
    self, HostSide, HostTime, INBOX_EVENTS, Live, Mailbox, RunError, StopKind, Stopped, VcpuHandle,
};

/// Outputs that may wait for acknowledgements before the guest waits too.
const GATE_LIMITS: Limits = Limits { count: 16_384, bytes: 16 << 20 };

/// `vmft primary`: starts the guest, which backups can join at `listen`.
///
/// # Errors
/// The host is unfit, something that `settings` or `guest` name cannot be used, or another monitor runs the guest.
pub fn primary(
    settings: &Settings,
    guest: &GuestSettings,
    listen: SocketAddr,
    leave: Leave,
) -> Result<Ending, PairError> {
    let vcpu = take_signals()?;
    let counter = position::choose(settings.positions)?;
    let name = &settings.name;
    let side = Side::new(settings, &[("--listen", listen)], ClaimRole::Primary, leave)?;
    // Who runs the guest says more than whose control socket is here.
    let view = first_view(&side.claims, name)?;
    let image = guest.disk.as_deref().filter(|_| !guest.disk_read_only);
    let former = image.map(|image| image_owner::check_image(image, &side.claims, name, view));
    let former = former.transpose()?.flatten();
    let _server = side.serve(settings)?;
    let hosts = other_hosts(settings.hosts.as_ref(), Some(listen))?;
    let listener = Listener::bind(listen)?;
    let heartbeats = Arc::new(Heartbeats::start(listen, name, Role::Primary, side.heartbeat)?);
    heartbeats.know_others(hosts.clone(), probe_key(side.key.as_ref()));
    let prepared = prepare(guest, Caching::WriteThrough, counter)?;
    let image = image_owner::image_to_write(prepared.resources.disk.as_ref())?;
    match side.claims.claim(view, &side.owner, None)? {
        Outcome::Won | Outcome::Otherwise => {}
        Outcome::Lost { holder, .. } => return Err(claimed(&side.claims, name, view, holder)),
        Outcome::Unknown { why } => {
            return Err(PairError::Undecided { arbiter: settings.arbiter.to_string(), why });
        }
    }
    heartbeats.set_view(view, Role::Primary);
    let Prepared { config, machine, mut resources } = prepared;
    image_owner::take_disk((&side.claims, &side.owner), view, image, former.as_deref(), &mut resources)?;
    let cause = "vmft primary was started".into();
    let standing = Standing { role: control::Role::Primary, view, protected: false, cause };
    change!(info, side.monitor, Started, standing, "the guest runs here, without a backup so far");
    let listener = Some(listener);
    let live = LiveSide { side, config, machine, resources, heartbeats, listener, hosts, view };
    live.run(Vec::new(), None, vcpu)
}

/// The view in which a guest may be started: the first, or the one after its last orderly end.
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
pub(in crate::pair) struct LiveSide {
    pub(in crate::pair) side: Side,
    pub(in crate::pair) config: GuestConfig,
    pub(in crate::pair) machine: Machine,
    pub(in crate::pair) resources: Resources,
    pub(in crate::pair) heartbeats: Arc<Heartbeats>,
    pub(in crate::pair) listener: Option<Listener>,
    /// Where to look for a backup.
    pub(in crate::pair) hosts: Vec<SocketAddr>,
    pub(in crate::pair) view: u64,
}

/// What the threads of a live guest share.
struct Shared {
    state: Arc<PrimaryState>,
    gate: Arc<OutputGate<Outlet>>,
    search: Arc<Search>,
    /// The disk image, to be given back at the guest's end.
    owned: Option<Arc<Ownership>>,
}

impl LiveSide {
    /// Runs the guest. `again` are effects of its past that may not have been seen outside; `time` is what
    /// its clock should show if it was taken over.
    pub(in crate::pair) fn run(
        self,
        again: Vec<Effect>,
        time: Option<GuestTime>,
        (vcpu, mailbox): (VcpuHandle, Mailbox),
    ) -> Result<Ending, PairError> {
        let Self { side, config, mut machine, resources, heartbeats, listener, hosts, view } = self;
        let search = Search::new(hosts, &config.name, side.key.as_ref());
        let (sender, receiver) = bounded(INBOX_EVENTS);
        let deferral = Deferral::new(side.defer);
        let inbox = Inbox::new(sender.clone(), Arc::clone(&deferral));
        let shared = open_gate(&side, &heartbeats, resources, &inbox, (view, search), |outlet| {
            if let Some(mac) = config.board.net_mac.filter(|_| time.is_some()) {
                outlet.announce(mac);
            }
        })?;
        let free = Needed { epoch: shared.state.protocol(|primary| primary.epoch()), batch: None };
        let requests = machine.board().outstanding_disk_requests();
        for effect in again.into_iter().chain(requests.into_iter().map(Effect::Disk)) {
            // The gate is open and the performers wait for room themselves.
            let _ = shared.gate.push(free, effect);
        }
        let (joins_in, joins) = bounded(1);
        if let Some(listener) = listener {
            let port = listener.port();
            listener.serve(reception(&side, &config, &shared, joins_in, &vcpu))?;
            invite::start(&shared.search, port, &shared.state, &heartbeats)
                .map_err(LaunchError::host("start a thread"))?;
        }
        let (events, event_queue) = bounded(64);
        side.monitor.set_order_handler(order_handler(&shared, &inbox, &events, &vcpu));
        let _terminal = Terminal::start(&inbox)?;
        let joiner = Joiner {
            config,
            claims: side.claims.clone(),
            owner: side.owner.clone(),
            state: Arc::clone(&shared.state),
            gate: Arc::clone(&shared.gate),
            events,
            search: Arc::clone(&shared.search),
            monitor: Arc::clone(&side.monitor),
            vcpu: vcpu.clone(),
        };
        let log = LogWriter::new(joiner, joins, side.reports.clone());
        side.monitor.set_figures(figures(&shared, &heartbeats, &deferral, &vcpu));
        let supervisor = supervisor(&side, &shared, heartbeats, Arc::clone(&deferral), &vcpu);
        start_thread("supervisor", move || supervisor.run(&event_queue))?;
        let time = HostTime::starting_at(time.unwrap_or(GuestTime(0)).max(machine.now()));
        let _watch = watch(&deferral, &vcpu)?;
        let host = HostSide { time, inbox: (sender, receiver), deferral, mailbox };
        let mut door = Live::new(&machine, host, log);
        if let Some(len_bytes) = machine.board().outstanding_entropy() {
            door.supply_entropy(len_bytes)?;
        }
        let outcome = run::run(&mut machine, &mut door);
        shared.conclude(&side, outcome, door.log_mut(), machine.anchors(), &vcpu)
    }
}

impl Shared {
    /// What is left to do when the guest does not run here any more.
    fn conclude(
        &self,
        side: &Side,
        outcome: Result<Stopped, RunError>,
        log: &LogWriter,
        anchors: u64,
        vcpu: &VcpuHandle,
    ) -> Result<Ending, PairError> {
        if self.state.protocol(|primary| primary.is_lost()) && log.successor().is_none() {
            return Ok(Ending::LostClaim);
        }
        if let Some(successor) = log.successor() {
            return Ok(Ending::HandedOver(successor));
        }
        // A crash may be this host's: the backup goes on, or ends the guest's life, depending on what its own guest does.
        let ended = matches!(outcome, Ok(Stopped::GuestEnded(end)) if !end.is_crash())
            || vcpu.stop_signal().get() == Some(StopKind::PowerOff);
        let goes_on = self.state.phase() != Phase::Alone || log.had_backup();
        if ended || !goes_on {
            // Nobody runs the guest any more, and nobody in this pair will.
            side.end_life(self.state.view(), self.owned.as_deref())?;
        }
        Ok(Ending::of_run(outcome?, anchors))
    }
}

/// Passes an operator's orders on to those who carry them out.
fn order_handler(
    shared: &Shared,
    inbox: &Inbox,
    events: &Sender<LinkEvent>,
    vcpu: &VcpuHandle,
) -> state::OrderHandler {
    let handler = OrderHandler {
        paused: AtomicBool::new(false),
        inbox: inbox.clone(),
        state: Arc::clone(&shared.state),
        events: events.clone(),
        vcpu: vcpu.clone(),
    };
    Box::new(move |command, monitor| handler.take(command, monitor))
}

/// Puts the host's resources to work, with a gate that lets all out: there is no backup yet.
fn open_gate(
    side: &Side,
    heartbeats: &Arc<Heartbeats>,
    resources: Resources,
    inbox: &Inbox,
    (view, search): (u64, Search),
    first: impl FnOnce(&Outlet),
) -> Result<Shared, PairError> {
    let state = PrimaryState::new(view, side.timing);
    let may_act = lease_check(&state, heartbeats);
    let owned = resources.disk.as_ref().and_then(Disk::owned);
    let outlet = resources.start(inbox, may_act)?;
    first(&outlet);
    let gate = Arc::new(OutputGate::new(GATE_LIMITS, outlet, permit(&state, heartbeats)));
    Ok(Shared { state, gate, search: Arc::new(search), owned })
}

/// May this monitor touch the disk?
fn lease_check(state: &Arc<PrimaryState>, heartbeats: &Arc<Heartbeats>) -> Guard {
    let (state, heartbeats) = (Arc::clone(state), Arc::clone(heartbeats));
    Arc::new(move || {
        let heard = heartbeats.answered_sent_at();
        state.protocol(|primary| primary.may_act(heard, boot_time()))
    })
}

/// May this output leave?
fn permit(state: &Arc<PrimaryState>, heartbeats: &Arc<Heartbeats>) -> Permit {
    let (state, heartbeats) = (Arc::clone(state), Arc::clone(heartbeats));
    Box::new(move |needed| {
        let heard = heartbeats.answered_sent_at();
        state.protocol(|primary| primary.may_leave(needed, heard, boot_time()))
    })
}

fn reception(
    side: &Side,
    config: &GuestConfig,
    shared: &Shared,
    joins: Sender<Join>,
    vcpu: &VcpuHandle,
) -> Reception {
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
    let vcpu = vcpu.clone();
    let (state, search) = (Arc::clone(&shared.state), Arc::clone(&shared.search));
    let key = side.key.clone();
    let disk = match &shared.owned {
        Some(owned) => Demand::Image(Arc::clone(owned)),
        None if config.board.disk_bytes.is_none() || config.board.disk_read_only => Demand::Size,
        None => Demand::Device,
    };
    Reception { expected, disk, key, state, search, joins, wake: Box::new(move || vcpu.wake()) }
}

fn supervisor(
    side: &Side,
    shared: &Shared,
    heartbeats: Arc<Heartbeats>,
    deferral: Arc<Deferral>,
    vcpu: &VcpuHandle,
) -> Supervisor {
    Supervisor {
        state: Arc::clone(&shared.state),
        gate: Arc::clone(&shared.gate),
        claims: side.claims.clone(),
        owner: side.owner.clone(),
        timing: side.timing,
        heartbeats,
        deferral,
        search: Arc::clone(&shared.search),
        vcpu: vcpu.clone(),
        leave: Arc::clone(&side.leave),
        monitor: Arc::clone(&side.monitor),
    }
}

/// The figures of a guest that runs here.
fn figures(
    shared: &Shared,
    heartbeats: &Arc<Heartbeats>,
    deferral: &Arc<Deferral>,
    vcpu: &VcpuHandle,
) -> FiguresOf {
    let (state, gate, vcpu) = (Arc::clone(&shared.state), Arc::clone(&shared.gate), vcpu.clone());
    let (heartbeats, deferral) = (Arc::clone(heartbeats), Arc::clone(deferral));
    Box::new(move || {
        let outputs = gate.stats();
        let sent = state.outbox().map(|outbox| outbox.figures()).unwrap_or_default();
        Figures {
            anchors: state.position(),
            log: LogFigures { bytes: sent.log_bytes, batches: sent.batches, ..LogFigures::default() },
            primary: Some(PrimaryFigures {
                paused: vcpu.stands(),
                lag_ms: state.lag().as_millis() as u64,
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
