//! Follows a primary: joins, receives the guest, executes its log, and goes live if a takeover was won.
//!
//! Owns: the following guest. Must never: let it go live when its own copy is not known to be right.
//!
//! ```text
//!   connect ── snapshot ──> following ─┬─ link lost ── takeover won ──> session (a primary)
//!      ^                               ├─ diverged, or missed a forced stop: desynchronised (rejoin.rs) ─┐
//!      └───────────────────────────────┼─────────────────────────────────────────────────────────────────┘
//!                                      ├─ the view's record does not name it, claim lost ──> status 3, or a standby
//!                                      └─ guest ended, stopped ──> end
//! ```
//! Threads: the caller's is the vCPU's; starts `log-receiver`, `watchdog` and `record`. Locks: those of [`Inflow`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use ft_log::{ByeReason, CpuIdentity, GuestTime, Hello, HelloDisk, Key, PositionSource, Role, StreamError};
use kvm_bindings::CpuId;

use super::inflow::{FromPrimary, Inflow};
use super::rejoin::{self, Attempts, Desynchronised, ResyncError};
use super::takeover::{Barred, Ended, Preparation, Takeover};
use crate::boot;
use crate::change;
use crate::control::protocol::{self as control, Direction, Peer, Transfer};
use crate::control::server::Server;
use crate::control::state::TransferOf;
use crate::control::{Monitor, Standing};
use crate::guest::GuestConfig;
use crate::host::LogEvent;
use crate::host::backends::Resources;
use crate::host::disk::{Caching, Disk, DiskError};
use crate::host::owner::Ownership;
use crate::host::tap::Tap;
use crate::kvm::Kvm;
use crate::launch::{Ending, start_thread, take_signals};
use crate::machine::Machine;
use crate::pair::claims::claim::{ClaimRole, Claims, Owner};
use crate::pair::claims::claimant::Claimant;
use crate::pair::claims::fence::Occasion;
use crate::pair::claims::image_owner::SharedImage;
use crate::pair::liveness::heartbeat::Heartbeats;
use crate::pair::primary::accept::Listener;
use crate::pair::primary::invite::probe_key;
use crate::pair::primary::session::LiveSide;
use crate::pair::wire::connect::{ConnectError, Connection, dial};
use crate::pair::{Leave, PairError, Settings, Side, other_hosts};
use crate::position::{self, BranchCounter};
use crate::report::{Kept, Reports};
use crate::run::{
    self, CorruptAt, Faults, Follow, Mailbox, RunError, Slowness, StopSignal, Stopped, VcpuHandle,
};
use crate::snapshot::{self, SnapshotError};

/// Pause between two attempts to join a primary that has not yet noticed that its backup is gone.
const JOIN_AGAIN: Duration = Duration::from_millis(50);

/// What a backup is told, whether it knows its primary or waits for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupSettings {
    /// What every monitor of a pair is told.
    pub pair: Settings,
    /// The guest's disk image as this host sees it.
    pub disk: Option<PathBuf>,
    /// The tap interface of its network card here.
    pub tap: Option<String>,
    /// How long to keep trying to reach the primary.
    pub connect_timeout: Duration,
    /// Faults for tests.
    pub faults: InjectedFaults,
}

/// Faults for tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InjectedFaults {
    /// The forced stop of this number that is a checkpoint counts as missed.
    pub missed_stop: Option<u64>,
    /// The guest is corrupted.
    pub corruption: Option<CorruptAt>,
    /// Each time that this backup is given the guest.
    pub corrupt_again: bool,
    /// The guest is slow for a while.
    pub slowness: Option<Slowness>,
}

impl InjectedFaults {
    /// What is to go wrong the first time.
    fn first(&self) -> Faults {
        let Self { missed_stop, corruption, slowness, .. } = self.clone();
        Faults { missed_stop, corruption, slowness }
    }

    /// What is to go wrong when this backup is given the guest anew.
    fn again(&self) -> Faults {
        let corruption = self.corruption.clone().filter(|_| self.corrupt_again);
        Faults { corruption, ..Faults::default() }
    }
}

/// What a backup has besides a guest.
struct Ready<'a> {
    follower: Follower<'a>,
    resources: Resources,
    heartbeats: Arc<Heartbeats>,
    faults: Faults,
}

/// `vmft backup`: follows the primary at `primary`.
///
/// # Errors
/// The host is unfit, something that `settings` name cannot be used, or the primary does not want this backup.
pub fn backup(settings: &BackupSettings, primary: SocketAddr, leave: Leave) -> Result<Ending, PairError> {
    let mut follower = Follower::new(settings, Some(primary), leave)?;
    let standing = Standing {
        role: control::Role::Backup,
        cause: "vmft backup was started".into(),
        ..Standing::default()
    };
    change!(info, follower.monitor(), Joining, standing, %primary, "looking for the primary");
    follower.monitor().set_peer(Some(Peer { address: primary.to_string(), ..Peer::default() }));
    let resources = follower.open_resources()?;
    let (mut connection, image) = follower.join(primary, &resources, follower.connect_timeout())?;
    let any_port = SocketAddr::new(connection.local_address()?.ip(), 0);
    let listen = settings.pair.listen.unwrap_or(any_port);
    let heartbeats = follower.start_heartbeats(listen)?;
    let guest = follower.receive(&mut connection, image, &heartbeats)?;
    follower.follow(guest, resources, connection, heartbeats)
}

/// A host that has been found fit to follow a primary.
pub(super) struct Follower<'a> {
    settings: &'a BackupSettings,
    side: Side,
    kvm: Kvm,
    table: CpuId,
    cpu: CpuIdentity,
    counter: Option<Box<dyn BranchCounter>>,
    positions: PositionSource,
    listener: Option<Listener>,
    hosts: Vec<SocketAddr>,
    listen_port: u16,
    server: Server,
    vcpu: VcpuHandle,
    mailbox: Mailbox,
}

impl<'a> Follower<'a> {
    /// Checks the host and the options.
    pub(super) fn new(
        settings: &'a BackupSettings,
        connect: Option<SocketAddr>,
        leave: Leave,
    ) -> Result<Self, PairError> {
        let (vcpu, mailbox) = take_signals()?;
        let Settings { listen, hosts, positions, .. } = &settings.pair;
        let listen = *listen;
        let counter = position::choose(*positions)?;
        let addresses: Vec<_> = connect
            .map(|address| ("--connect", address))
            .into_iter()
            .chain(listen.map(|address| ("--listen", address)))
            .collect();
        let side = Side::new(&settings.pair, &addresses, ClaimRole::Backup, leave)?;
        let server = side.serve(&settings.pair)?;
        let kvm = Kvm::open()?;
        let hosts = other_hosts(hosts.as_ref(), listen)?;
        let listener = listen.map(Listener::bind).transpose()?;
        let (table, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?)?;
        let positions = position::source_of(counter.as_deref());
        let listen_port = listen.map_or(0, |listen| listen.port());
        Ok(Self {
            settings,
            side,
            kvm,
            table,
            cpu,
            counter,
            positions,
            listener,
            hosts,
            listen_port,
            server,
            vcpu,
            mailbox,
        })
    }

    /// The guest's disk and network on this host.
    pub(super) fn open_resources(&self) -> Result<Resources, PairError> {
        Ok(Resources {
            disk: match &self.settings.disk {
                // Without the lock, which the primary's monitor holds; the claim decides who may write.
                Some(path) => Some(Disk::open_unlocked(path, false, Caching::WriteThrough)?),
                None => None,
            },
            tap: self.settings.tap.as_deref().map(Tap::open).transpose()?,
        })
    }

    /// Joins the primary at `address`: the connection, and the image with which this backup was accepted.
    pub(super) fn join(
        &self,
        address: SocketAddr,
        resources: &Resources,
        timeout: Duration,
    ) -> Result<(Connection, Option<SharedImage>), PairError> {
        let dialled = dial(address, self.key(), &self.settings.pair.name, timeout)?;
        // Only now: a primary that has just taken over owns the image before it takes backups.
        let found = resources.disk.as_ref().map(SharedImage::find).transpose()?.flatten();
        let (image, introduction, mark) = match found {
            Some((image, introduction, mark)) => (Some(image), Some(introduction), mark),
            None => (None, None, None),
        };
        let disk = resources
            .disk
            .as_ref()
            .map(|disk| HelloDisk { len_bytes: disk.capacity_bytes(), image: introduction });
        let connection = dialled.introduce(self.hello(resources, disk));
        drop(mark);
        Ok((connection?, image))
    }

    /// What it says of itself.
    fn hello(&self, resources: &Resources, disk: Option<HelloDisk>) -> Hello {
        Hello {
            monitor_version: self.side.version.clone(),
            cpu: self.cpu,
            guest_name: self.settings.pair.name.clone(),
            disk,
            claims_id: self.side.claims.arbiter_id(),
            life: self.side.owner.uuid,
            host_name: self.side.owner.host.clone(),
            timeout_ms: self.side.timing.timeout.as_millis() as u32,
            has_network: resources.tap.is_some(),
            positions: self.positions,
            listen_port: self.listen_port,
        }
    }

    /// What an operator sees.
    pub(super) fn monitor(&self) -> &Monitor {
        &self.side.monitor
    }

    /// The guest that it is for.
    pub(super) fn guest_name(&self) -> &str {
        &self.settings.pair.name
    }

    /// What all hosts know; `None` if they talk in the open.
    pub(super) fn key(&self) -> Option<&Key> {
        self.side.key.as_ref()
    }

    /// The other hosts of the configuration.
    pub(super) fn hosts(&self) -> &[SocketAddr] {
        &self.hosts
    }

    /// Heartbeats on `listen`. This host knows the others, and answers them.
    pub(super) fn start_heartbeats(&self, listen: SocketAddr) -> Result<Arc<Heartbeats>, PairError> {
        let name = &self.settings.pair.name;
        let heartbeats = Heartbeats::start(listen, name, Role::Backup, self.side.heartbeat)?;
        heartbeats.know_others(self.hosts.clone(), probe_key(self.key()));
        Ok(Arc::new(heartbeats))
    }

    /// Has the operator stopped it?
    pub(super) fn is_stopped(&self) -> bool {
        self.stop_signal().is_set()
    }

    /// Set when the operator stops it.
    pub(super) fn stop_signal(&self) -> &Arc<StopSignal> {
        self.vcpu.stop_signal()
    }

    fn connect_timeout(&self) -> Duration {
        self.settings.connect_timeout
    }

    /// Takes the guest in from a primary that welcomes this backup.
    pub(super) fn receive(
        &mut self,
        connection: &mut Connection,
        image: Option<SharedImage>,
        heartbeats: &Heartbeats,
    ) -> Result<Received, PairError> {
        heartbeats.set_view(connection.welcome.view, Role::Backup);
        heartbeats.set_peer(Some((connection.address, connection.heartbeat_key().clone())));
        if GuestConfig::digest_of(&self.table) != connection.welcome.cpuid_digest {
            return Err(PairError::WelcomeMismatch { what: "CPUID table" });
        }
        let mut kept = self.side.reports.as_ref().map(Reports::keep);
        let (config, mut machine) = receive_guest(&self.kvm, connection, kept.as_mut(), &self.side.monitor)?;
        machine.count_branches(self.counter.take());
        Ok(Received { config, machine, kept, image })
    }

    /// Follows with the guest that was received, to the end.
    pub(super) fn follow(
        self,
        mut guest: Received,
        resources: Resources,
        mut connection: Connection,
        heartbeats: Arc<Heartbeats>,
    ) -> Result<Ending, PairError> {
        let (address, inject) = (connection.address, &self.settings.faults);
        let mut ready = Ready { faults: inject.first(), follower: self, resources, heartbeats };
        let mut attempts = Attempts::default();
        loop {
            let again = match follow(ready, guest, connection)? {
                Followed::Ended(ending) => return Ok(ending),
                Followed::Desynchronised(again) => *again,
            };
            attempts.count(&again.why, Instant::now())?;
            ready = Ready { faults: inject.again(), ..again.ready };
            ready.follower.counter = again.machine.into_counter();
            let anew = ready.get_anew(address);
            (connection, guest) =
                anew.map_err(|error| ResyncError::nobody_else(&again.why, address, error))?;
        }
    }
}

/// A guest that a backup was given.
pub(super) struct Received {
    config: GuestConfig,
    machine: Machine,
    /// What was sent, for a report.
    kept: Option<Kept>,
    /// Where its disk is, if that is a file.
    image: Option<SharedImage>,
}

impl Ready<'_> {
    /// Joins the primary at `address` again.
    fn get_anew(&mut self, address: SocketAddr) -> Result<(Connection, Received), PairError> {
        let follower = &mut self.follower;
        let (mut connection, image) = join_again(follower, address, &self.resources)?;
        let guest = follower.receive(&mut connection, image, &self.heartbeats)?;
        Ok((connection, guest))
    }
}

/// Joins a primary that may still be about to give this backup up.
fn join_again(
    follower: &Follower<'_>,
    address: SocketAddr,
    resources: &Resources,
) -> Result<(Connection, Option<SharedImage>), PairError> {
    let timeout = follower.connect_timeout();
    let deadline = Instant::now() + timeout;
    loop {
        match follower.join(address, resources, timeout) {
            Err(PairError::Connect(ConnectError::Refused { .. })) if Instant::now() < deadline => {
                std::thread::sleep(JOIN_AGAIN);
            }
            other => return other,
        }
    }
}

fn receive_guest(
    kvm: &Kvm,
    connection: &mut Connection,
    kept: Option<&mut Kept>,
    monitor: &Monitor,
) -> Result<(GuestConfig, Machine), PairError> {
    let started = Instant::now();
    let total_mib = connection.welcome.memory_bytes >> 20;
    tracing::info!(
        event = %LogEvent::Receiving,
        primary = %connection.welcome.host_name,
        memory_mib = total_mib,
        "receiving the guest"
    );
    let mut quarter = 0;
    let total_bytes = connection.welcome.memory_bytes.max(1);
    let address = connection.address;
    let host = connection.welcome.host_name.clone();
    monitor.set_peer(Some(Peer { host: Some(host.clone()), address: address.to_string(), listen: None }));
    let percent = Arc::new(AtomicU32::new(0));
    monitor.set_transfer(Some(watch_transfer(host, Arc::clone(&percent))));
    let progress = |gpa: u64| {
        percent.store((gpa.min(total_bytes) * 100 / total_bytes) as u32, Ordering::Relaxed);
        let now = gpa.min(total_bytes) * 4 / total_bytes;
        if now > quarter {
            quarter = now;
            tracing::info!(event = %LogEvent::Receiving, percent = now * 25, "receiving the guest");
        }
    };
    let input = connection.frames().snapshot();
    let loaded = match kept {
        Some(kept) => kept.snapshot(input, |input| snapshot::load(kvm, input, progress)),
        None => snapshot::load(kvm, input, progress),
    };
    let (config, machine) = loaded.map_err(|source| match source {
        SnapshotError::Container(source) => PairError::Transfer { address, source },
        other => PairError::from(other),
    })?;
    let welcome = &connection.welcome;
    for (what, equal) in [
        ("configuration", welcome.config_digest == config.digest()),
        ("CPUID table", welcome.cpuid_digest == config.cpuid_digest()),
    ] {
        if !equal {
            return Err(PairError::WelcomeMismatch { what });
        }
    }
    monitor.set_transfer(None);
    let cause = format!("the guest of {} is loaded", welcome.host_name);
    let standing = Standing { role: control::Role::Backup, view: welcome.view, protected: true, cause };
    let took_ms = started.elapsed().as_millis() as u64;
    change!(info, monitor, Following, standing, anchor = machine.anchors(), took_ms, "following");
    Ok((config, machine))
}

fn watch_transfer(host: String, percent: Arc<AtomicU32>) -> TransferOf {
    Box::new(move || Transfer {
        direction: Direction::Receiving,
        host: host.clone(),
        percent: percent.load(Ordering::Relaxed),
        ..Transfer::default()
    })
}

/// How following ended.
enum Followed<'a> {
    /// For good.
    Ended(Ending),
    /// This guest cannot be used, and the primary may give another one.
    Desynchronised(Box<Again<'a>>),
}

/// What a backup is left with whose guest is desynchronised.
struct Again<'a> {
    ready: Ready<'a>,
    machine: Machine,
    why: Desynchronised,
}

/// What is known of a guest whose run has ended.
enum Executed {
    /// It is the one that the log describes, up to the log's end.
    Right,
    /// It crashed, as the log says.
    Crashed(Ending),
    /// It is not.
    Desynchronised(Desynchronised),
}

/// Follows to the log's end; then, with the takeover won, goes live.
fn follow(
    ready: Ready<'_>,
    Received { config, mut machine, kept, image }: Received,
    connection: Connection,
) -> Result<Followed<'_>, PairError> {
    let view = connection.welcome.view;
    let cursor = snapshot::cursor(&machine);
    let preparation = preparation(&ready, &connection, &config, image);
    let side = &ready.follower.side;
    let timeout = side.timing.timeout;
    let (inflow, frames) = Inflow::start(connection, cursor, timeout)
        .map_err(|source: StreamError| PairError::NotFormed(source.to_string()))?;
    side.monitor.set_figures(inflow.watch());
    // The primary was busy with the snapshot, and this host with loading it.
    ready.heartbeats.note_heard();
    let takeover = Takeover {
        inflow: Arc::clone(&inflow),
        heartbeats: Arc::clone(&ready.heartbeats),
        claimant: Claimant::new(side.claims.clone(), side.owner.clone()),
        preparation,
        monitor: Arc::clone(&side.monitor),
        vcpu: ready.follower.vcpu.clone(),
    };
    let (ended_in, ended) = bounded(1);
    start_thread("log-receiver", move || {
        let end = takeover.inflow.receive(frames, || takeover.heartbeats.note_heard());
        // The vCPU's thread waits for exactly this.
        let _ = ended_in.send(takeover.run(&end));
    })?;
    let stop = Arc::clone(ready.follower.stop_signal());
    let watchdog = watchdog(Arc::clone(&inflow), Arc::clone(&ready.heartbeats), Arc::clone(&stop));
    start_thread("watchdog", watchdog)?;
    let unfit = check_record(&ready, &inflow, view)?;
    let source = FromPrimary::new(Arc::clone(&inflow), stop, kept);
    let mut door = Follow::new(source, cursor, config.board.clone(), config.end_page());
    door.inject(ready.faults.clone());
    let executed = match run::run(&mut machine, &mut door) {
        Ok(stopped @ Stopped::GuestEnded(end)) => {
            let ending = Ending::of_run(stopped, machine.anchors());
            if !end.is_crash() {
                return Ok(Followed::Ended(ending));
            }
            Executed::Crashed(ending)
        }
        Ok(Stopped::Requested | Stopped::LogEnded | Stopped::ReplayEqual) => Executed::Right,
        Err(RunError::Missed(missed)) => Executed::Desynchronised(Desynchronised::Missed(missed)),
        Err(other) => Executed::Desynchronised(Desynchronised::Differs(door.differs(&machine, other)?)),
    };
    if let Executed::Desynchronised(why) = &executed {
        let (reason, text) = why.bye();
        inflow.retire(reason, &text);
        rejoin::report(why, side, &machine, view, door.source_mut().take_kept());
    }
    // Here both ends meet: what is known of the guest, and whose it is.
    let ended = ended.recv().map_err(|_| PairError::NotFormed("the receiver's thread is gone".into()))?;
    let (executed, ended) = match (executed, ended) {
        (Executed::Desynchronised(why), ended) => return desynchronised(ready, machine, why, &ended),
        (_, Ended::Barred(why)) => return Err(PairError::OtherImage { why }),
        both => both,
    };
    let won = inflow.protocol(|backup| backup.goes_live());
    if let Executed::Crashed(ending) = executed {
        // As on the primary, which left it to this monitor to say so.
        if let Some(view) = won {
            let owned = if let Ended::Won { owned, .. } = &ended { owned.as_ref() } else { None };
            side.end_life(view, owned)?;
        }
        return Ok(Followed::Ended(ending));
    }
    match (won, ended) {
        (Some(_), Ended::Won { view, owned, noticed }) => {
            go_live(ready, config, machine, door, (view, noticed, owned)).map(Followed::Ended)
        }
        (Some(_), Ended::NotLive { view, why: Barred::Stopped(what) }) => {
            Err(PairError::NotLive { view, what })
        }
        (Some(_), Ended::NotLive { view, why: Barred::Image(why) }) => {
            Err(PairError::OtherImageClaimed { view, why })
        }
        (_, ended) => {
            // What the operator wants is no failure.
            let unfit = unfit.get().filter(|_| !ready.follower.is_stopped());
            Ok(Followed::Ended(left(&side.monitor, view, ended, unfit)))
        }
    }
}

/// A guest that cannot be used, and what became of its backup.
fn desynchronised<'a>(
    ready: Ready<'a>,
    machine: Machine,
    why: Desynchronised,
    ended: &Ended,
) -> Result<Followed<'a>, PairError> {
    match ended {
        // The primary had been lost, and the claim been made, before this was known.
        Ended::Won { view, .. } | Ended::NotLive { view, .. } => Err(ResyncError::lost(&why, *view).into()),
        Ended::LifeOver => Err(ResyncError::ended(&why).into()),
        // Its threads have ended with the connection; the primary continues alone.
        Ended::Stopped | Ended::Lost(_) | Ended::Barred(_) => {
            Ok(Followed::Desynchronised(Box::new(Again { ready, machine, why })))
        }
    }
}

/// How a backup of `view` ends that does not go live. `unfit`: why it left by itself.
fn left(monitor: &Monitor, view: u64, ended: Ended, unfit: Option<&String>) -> Ending {
    let no_role = |view, cause| Standing { role: control::Role::None, view, protected: false, cause };
    match (ended, unfit) {
        (Ended::Lost(why), _) => {
            let standing = no_role(view + 1, why);
            change!(error, monitor, ClaimLost, standing, "the primary continues alone; this backup stops");
            Ending::LostClaim
        }
        (Ended::Stopped | Ended::Won { .. } | Ended::NotLive { .. }, Some(why)) => {
            let standing = no_role(view, why.clone());
            change!(
                error,
                monitor,
                NotRecorded,
                standing,
                "this backup is none by the arbiter's records; it stops"
            );
            Ending::LostClaim
        }
        _ => Ending::Orderly,
    }
}

/// Reads the record of `view`, and leaves if there is reason to. Then the answer says why, before the connection ends.
fn check_record(
    ready: &Ready<'_>,
    inflow: &Arc<Inflow>,
    view: u64,
) -> Result<Arc<OnceLock<String>>, PairError> {
    let (claims, owner) = (ready.follower.side.claims.clone(), ready.follower.side.owner.clone());
    let inflow = Arc::clone(inflow);
    let unfit = Arc::new(OnceLock::new());
    let found = Arc::clone(&unfit);
    start_thread("record", move || {
        if let Some(why) = not_recorded(&claims, view, &owner) {
            let why = found.get_or_init(|| why);
            inflow.retire(ByeReason::Protocol, why);
        }
    })?;
    Ok(unfit)
}

/// Why this monitor is not the backup of `view`, or its primary not the primary, as far as the arbiter answers now. A
/// takeover asks again, and needs an answer; this one makes that quicker.
fn not_recorded(claims: &Claims, view: u64, owner: &Owner) -> Option<String> {
    let record = match claims.read(view) {
        Ok(Some(record)) => record,
        // A shared directory may show it late, and without it nobody takes the guest over.
        Ok(None) => {
            tracing::warn!(view, "the view's record is not there: without it this backup cannot take over");
            return None;
        }
        Err(error) => {
            tracing::warn!(view, "the view's record cannot be read now, only at a takeover: {error}");
            return None;
        }
    };
    let what_to_do =
        "Find out which monitor runs the guest (`vmft status` on each host), then start this one again";
    if record.backup.as_ref().is_none_or(|backup| backup.uuid != owner.uuid) {
        let named = record
            .backup
            .map_or_else(|| "no backup".to_owned(), |backup| format!("another backup, of {}'s", backup.host));
        return Some(format!(
            "the record of view {view} names {named}: this one could not take the guest over, and leaves. {what_to_do}"
        ));
    }
    let breach = claims.breach_of(&record).ok().flatten()?;
    Some(format!("{breach}; so its backup leaves. {what_to_do}"))
}

/// What is to be done before the guest goes live here.
fn preparation(
    ready: &Ready<'_>,
    connection: &Connection,
    config: &GuestConfig,
    image: Option<SharedImage>,
) -> Preparation {
    let (welcome, side) = (&connection.welcome, &ready.follower.side);
    let occasion = Occasion {
        guest: ready.follower.guest_name().to_owned(),
        view: welcome.view + 1,
        peer_host: welcome.host_name.clone(),
        peer_address: connection.address.ip(),
        reason: String::new(),
    };
    Preparation {
        fence: side.fence.clone(),
        record: side.claims.record(occasion.view, &side.owner),
        occasion,
        image: image.filter(|_| !config.board.disk_read_only),
        look_timeout: side.timing.timeout / 2,
        stop: Arc::clone(ready.follower.stop_signal()),
    }
}

/// Runs the guest in the view that was won, which was noticed to be necessary at `noticed`, with the image that is
/// `owned`.
fn go_live(
    ready: Ready<'_>,
    config: GuestConfig,
    machine: Machine,
    mut door: Follow<FromPrimary>,
    (view, noticed, owned): (u64, Instant, Option<Ownership>),
) -> Result<Ending, PairError> {
    let Ready { follower, mut resources, heartbeats, .. } = ready;
    let Follower { side, listener, hosts, vcpu, mailbox, server: _server, .. } = follower;
    if let Some(disk) = &mut resources.disk {
        match disk.lock() {
            // A file server may hold the lock of a host that died; the claim is what counts.
            Ok(()) | Err(DiskError::InUse { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        owned.into_iter().for_each(|owned| disk.own(owned));
    }
    let time = door.source_mut().primary_time();
    let again = door.into_unreleased();
    heartbeats.set_view(view, Role::Primary);
    heartbeats.set_peer(None);
    let cause = side.monitor.status().cause;
    let standing = Standing { role: control::Role::Primary, view, protected: false, cause };
    side.monitor.set_peer(None);
    change!(
        warn,
        side.monitor,
        Takeover,
        standing,
        anchor = machine.anchors(),
        outputs_again = again.len(),
        disk_again = machine.board().outstanding_disk_requests().len(),
        took_ms = noticed.elapsed().as_millis() as u64,
        "takeover: this host now runs the guest"
    );
    let live = LiveSide { side, config, machine, resources, heartbeats, listener, hosts, view };
    live.run(again, Some(time.unwrap_or(GuestTime(0))), (vcpu, mailbox))
}

/// Gives the primary up when nothing has been heard of it for too long, or the operator stops this backup.
fn watchdog(
    inflow: Arc<Inflow>,
    heartbeats: Arc<Heartbeats>,
    stop: Arc<StopSignal>,
) -> impl FnOnce() + Send + 'static {
    move || {
        while !inflow.has_ended() {
            let (silent, cut_off) = (heartbeats.silent_for(), heartbeats.is_cut_off());
            let (gives_up, time) = inflow.protocol(|backup| {
                (backup.gives_up(silent, cut_off), backup.look_again_after(silent, cut_off))
            });
            if gives_up {
                tracing::warn!(silent_ms = silent.as_millis() as u64, "the primary is silent");
                inflow.give_up();
                return;
            }
            if stop.wait(time) {
                inflow.bye(ByeReason::Shutdown, "the operator stopped this backup");
                inflow.give_up();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::control::Identity;
    use crate::pair::claims::arbiter::{ArbiterSpec, EtcdFiles};
    use crate::pair::claims::claim::{Member, Outcome};

    fn owner(number: u8, role: ClaimRole) -> Owner {
        Owner { host: format!("host-{number}"), pid: 1, uuid: [number; 16], role }
    }

    #[test]
    fn a_backup_whom_the_record_does_not_name_learns_who_is() {
        let directory = TempDir::new().unwrap();
        let spec = ArbiterSpec::Directory(directory.path().to_owned());
        let claims = || Claims::open(&spec, &EtcdFiles::default(), "web").unwrap();
        let (primary, made) = (owner(1, ClaimRole::Primary), claims());
        let backup = |number: u8| Member { host: format!("host-{number}"), uuid: [number; 16] };
        assert_eq!(made.claim(1, &primary, None).unwrap(), Outcome::Won);
        assert_eq!(made.claim(2, &primary, Some(&backup(2))).unwrap(), Outcome::Won);
        assert_eq!(made.claim(3, &primary, None).unwrap(), Outcome::Won);
        let says = |view, number| not_recorded(&claims(), view, &owner(number, ClaimRole::Backup));
        assert_eq!(says(2, 2), None);
        assert_eq!(says(4, 2), None, "what is not there yet may come");
        let what_to_do =
            "Find out which monitor runs the guest (`vmft status` on each host), then start this one again";
        for (view, number, named) in [(2, 3, "another backup, of host-2's"), (3, 2, "no backup")] {
            let expected = format!(
                "the record of view {view} names {named}: this one could not take the guest over, and leaves. {what_to_do}"
            );
            assert_eq!(says(view, number), Some(expected));
        }
        let intruder = made.record(4, &owner(9, ClaimRole::Primary));
        let named = intruder.replace("backup none", &format!("backup {} host-2", "02".repeat(16)));
        std::fs::write(directory.path().join("web.view-4"), named).unwrap();
        let breach = says(4, 2).unwrap();
        assert!(
            breach.contains("view 4 was not host-9's to claim") && breach.ends_with(what_to_do),
            "{breach}"
        );
    }

    #[test]
    fn a_backup_that_leaves_because_of_the_record_ends_as_one_that_lost_its_claim() {
        let monitor = Monitor::new(Identity::default());
        let why = "the record names another".to_owned();
        let won = || Ended::Won { view: 3, owned: None, noticed: Instant::now() };
        for ended in [Ended::Stopped, won()] {
            assert_eq!(left(&monitor, 2, ended, Some(&why)), Ending::LostClaim);
            assert_eq!((monitor.status().view, monitor.status().cause), (2, why.clone()));
        }
        // The operator's stop, a dismissal; the guest's end, by which there is nothing left to be a backup of.
        assert_eq!(left(&monitor, 2, Ended::Stopped, None), Ending::Orderly);
        assert_eq!(left(&monitor, 2, Ended::LifeOver, Some(&why)), Ending::Orderly);
        assert_eq!(left(&monitor, 2, Ended::Lost("the primary has it".into()), None), Ending::LostClaim);
        assert_eq!((monitor.status().view, monitor.status().cause), (3, "the primary has it".to_owned()));
    }
}
