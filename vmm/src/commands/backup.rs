//! `vmft backup`: follows a primary, and takes over when it fails.
//!
//! Owns: the following guest. Must never: claim the guest when its own copy is not known to be right.
//!
//! ```text
//!   connect ── snapshot ──> following ─┬─ link lost ── claim won ──> LiveSide (a primary)
//!      ^                               ├─ diverged, or missed a forced stop: out of the running (heal.rs) ─┐
//!      └───────────────────────────────┼───────────────────────────────────────────────────────────────────┘
//!                                      ├─ the view's record does not name it, claim lost ──> status 3, or a standby
//!                                      └─ guest ended, stopped ──> end
//! ```

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use ft_log::{ByeReason, CpuIdentity, GuestTime, Hello, HelloDisk, Key, PositionSource, Role, StreamError};
use kvm_bindings::CpuId;

use super::heal::{self, Attempts, HealError, Useless};
use super::pair::{LiveSide, PairError, Side, other_hosts};
use super::stop::Stop;
use super::takeover::{Barred, SharedImage, Takeover};
use super::{CommandError, Ending, ending, start_thread};
use crate::boot;
use crate::change;
use crate::config::{BackupArgs, FollowArgs};
use crate::control::protocol::{self as control, Direction, Peer, Transfer};
use crate::control::state::TransferOf;
use crate::control::{LogEvent, Monitor, Server, Standing};
use crate::ft::accept::Listener;
use crate::ft::backup::{BackupError, Connection, FromPrimary, Inflow, LinkEnd, dial};
use crate::ft::channel::Receiving;
use crate::ft::claim::{ClaimRole, Claims, Owner};
use crate::ft::fence::Occasion;
use crate::ft::heartbeat::Heartbeats;
use crate::ft::hosts::HostList;
use crate::ft::protocol::{Backup, Next, Verdict};
use crate::ft::search::probe_key;
use crate::ft::supervise::Claimant;
use crate::guest::{GuestConfig, GuestError};
use crate::host::disk::{Caching, Disk, DiskError};
use crate::host::owner::Ownership;
use crate::host::tap::Tap;
use crate::kvm::Kvm;
use crate::machine::Machine;
use crate::outlet::Resources;
use crate::position::{self, BranchCounter};
use crate::report::{Kept, Reports};
use crate::run::{self, Faults, Follow, RunError, Stopped};
use crate::snapshot::{self, SnapshotError};

/// Pause between two looks at how long the primary has been silent.
const SILENCE_POLL: Duration = Duration::from_millis(5);
/// Pause between two attempts to join a primary that has not yet noticed that its backup is gone.
const JOIN_AGAIN: Duration = Duration::from_millis(50);

/// What a backup has besides a guest.
struct Ready<'a> {
    follower: Follower<'a>,
    resources: Resources,
    heartbeats: Arc<Heartbeats>,
    faults: Faults,
}

/// `vmft backup`.
pub fn backup(args: &BackupArgs) -> Result<Ending, CommandError> {
    let mut follower = Follower::new(&args.follow, Some(args.connect), args.listen, args.hosts.as_ref())?;
    let standing = Standing {
        role: control::Role::Backup,
        cause: "vmft backup was started".into(),
        ..Standing::default()
    };
    change!(info, follower.monitor(), Joining, standing, primary = %args.connect, "looking for the primary");
    follower.monitor().set_peer(Some(Peer { address: args.connect.to_string(), ..Peer::default() }));
    let resources = follower.open_resources()?;
    let (mut connection, image) = follower.join(args.connect, &resources, follower.connect_timeout())?;
    let any_port = SocketAddr::new(connection.local_address().map_err(PairError::from)?.ip(), 0);
    let listen = args.listen.unwrap_or(any_port);
    let heartbeats = Arc::new(
        Heartbeats::start(listen, &args.follow.name, Role::Backup, follower.heartbeat())
            .map_err(PairError::from)?,
    );
    follower.introduce(&heartbeats);
    let guest = follower.receive(&mut connection, image, &heartbeats)?;
    follower.follow(guest, resources, connection, heartbeats)
}

/// A host that has been found fit to follow a primary.
pub(super) struct Follower<'a> {
    args: &'a FollowArgs,
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
    stop: (Stop, Receiver<()>),
}

impl<'a> Follower<'a> {
    /// Checks the host and the options.
    pub(super) fn new(
        args: &'a FollowArgs,
        connect: Option<SocketAddr>,
        listen: Option<SocketAddr>,
        hosts: Option<&HostList>,
    ) -> Result<Self, CommandError> {
        let stop = Stop::install()?;
        let counter = position::choose(args.position.position)?;
        let addresses: Vec<_> = connect
            .map(|address| ("--connect", address))
            .into_iter()
            .chain(listen.map(|address| ("--listen", address)))
            .collect();
        let side = Side::new(&args.pair, &addresses, args.delivery, &args.name, ClaimRole::Backup)?;
        let server = side.serve(&args.pair.operator, &args.name)?;
        let kvm = Kvm::open()?;
        let hosts = other_hosts(hosts, listen)?;
        let listener = listen.map(Listener::bind).transpose().map_err(PairError::from)?;
        let (table, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?).map_err(GuestError::from)?;
        let positions = position::source_of(counter.as_deref());
        let listen_port = listen.map_or(0, |listen| listen.port());
        Ok(Self {
            args,
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
            stop,
        })
    }

    /// The guest's disk and network on this host.
    pub(super) fn open_resources(&self) -> Result<Resources, CommandError> {
        Ok(Resources {
            disk: match &self.args.disk {
                // Without the lock, which the primary's monitor holds; the claim decides who may write.
                Some(path) => Some(Disk::open_unlocked(path, false, Caching::WriteThrough)?),
                None => None,
            },
            tap: self.args.tap.as_deref().map(Tap::open).transpose()?,
        })
    }

    /// Joins the primary at `address`: the connection, and the image with which this backup was accepted.
    pub(super) fn join(
        &self,
        address: SocketAddr,
        resources: &Resources,
        timeout: Duration,
    ) -> Result<(Connection, Option<SharedImage>), PairError> {
        let dialled = dial(address, self.key(), &self.args.name, timeout)?;
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
            guest_name: self.args.name.clone(),
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
        &self.args.name
    }

    /// What all hosts know; `None` if they talk in the open.
    pub(super) fn key(&self) -> Option<&Key> {
        self.side.key.as_ref()
    }

    /// The other hosts of the configuration.
    pub(super) fn hosts(&self) -> &[SocketAddr] {
        &self.hosts
    }

    /// Lets this host know the others, and answer them.
    pub(super) fn introduce(&self, heartbeats: &Heartbeats) {
        heartbeats.know_others(self.hosts.clone(), probe_key(self.key()));
    }

    /// Time between two heartbeats.
    pub(super) fn heartbeat(&self) -> Duration {
        self.side.heartbeat
    }

    /// Has the operator stopped it?
    pub(super) fn is_stopped(&self) -> bool {
        self.stop.0.flag().load(Ordering::Relaxed)
    }

    /// Becomes ready when there is reason to look at [`Self::is_stopped`].
    pub(super) fn woken(&self) -> &Receiver<()> {
        &self.stop.1
    }

    fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.args.connect_timeout_ms)
    }

    /// Takes the guest in from a primary that welcomes this backup.
    pub(super) fn receive(
        &mut self,
        connection: &mut Connection,
        image: Option<SharedImage>,
        heartbeats: &Heartbeats,
    ) -> Result<Received, CommandError> {
        heartbeats.set_view(connection.welcome.view, Role::Backup);
        heartbeats.set_peer(Some((connection.address, connection.heartbeat_key().clone())));
        if GuestConfig::digest_of(&self.table) != connection.welcome.cpuid_digest {
            return Err(PairError::WelcomeMismatch { what: "CPUID table" }.into());
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
    ) -> Result<Ending, CommandError> {
        let (address, inject) = (connection.address, &self.args.inject);
        let mut ready = Ready { faults: inject.faults(), follower: self, resources, heartbeats };
        let mut attempts = Attempts::default();
        loop {
            let again = match follow(ready, guest, connection)? {
                Followed::Ended(ending) => return Ok(ending),
                Followed::Useless(again) => *again,
            };
            attempts.count(&again.why, Instant::now())?;
            ready = Ready { faults: inject.faults_again(), ..again.ready };
            ready.follower.counter = again.machine.into_counter();
            let anew = ready.get_anew(address);
            (connection, guest) = anew.map_err(|error| HealError::nobody_else(&again.why, address, error))?;
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
    fn get_anew(&mut self, address: SocketAddr) -> Result<(Connection, Received), CommandError> {
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
            Err(PairError::Backup(BackupError::Refused { .. })) if Instant::now() < deadline => {
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
) -> Result<(GuestConfig, Machine), CommandError> {
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
        SnapshotError::Container(source) => PairError::Transfer { address, source }.into(),
        other => CommandError::from(other),
    })?;
    let welcome = &connection.welcome;
    for (what, equal) in [
        ("configuration", welcome.config_digest == config.digest()),
        ("CPUID table", welcome.cpuid_digest == config.cpuid_digest()),
    ] {
        if !equal {
            return Err(PairError::WelcomeMismatch { what }.into());
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
    /// This guest is out of the running, and the primary may give another one.
    Useless(Box<Again<'a>>),
}

/// What a backup is left with whose guest is of no use.
struct Again<'a> {
    ready: Ready<'a>,
    machine: Machine,
    why: Useless,
}

/// Follows to the log's end; then, with a claim won, takes over.
fn follow(
    ready: Ready<'_>,
    Received { config, mut machine, kept, image }: Received,
    connection: Connection,
) -> Result<Followed<'_>, CommandError> {
    let view = connection.welcome.view;
    let cursor = snapshot::cursor(&machine);
    let takeover = takeover(&ready, &connection, &config, image);
    let timeout = ready.follower.side.timing.timeout;
    let (inflow, frames) = connection
        .follow(cursor, timeout)
        .map_err(|source: StreamError| PairError::NotFormed(source.to_string()))?;
    ready.follower.side.monitor.set_figures(inflow.watch());
    // The primary was busy with the snapshot, and this host with loading it.
    ready.heartbeats.note_heard();
    let (verdict_in, verdict) = bounded(1);
    let receive = receiver(&ready, &inflow, takeover);
    // The main thread waits for exactly this.
    start_thread("log-receiver", move || drop(verdict_in.send(receive(frames))))?;
    let heartbeats = Arc::clone(&ready.heartbeats);
    let stop = ready.follower.stop.0.flag();
    start_thread("watchdog", watchdog(Arc::clone(&inflow), heartbeats, timeout, Arc::clone(&stop)))?;
    let unfit = check_record(&ready, &inflow, view)?;
    let source = FromPrimary::new(Arc::clone(&inflow), stop, kept);
    let mut door = Follow::new(source, cursor, config.board.clone(), config.end_page());
    door.inject(ready.faults.clone());
    let stopped = match run::run(&mut machine, &mut door) {
        Ok(stopped) => stopped,
        Err(error) => {
            let why = match error {
                RunError::Missed(missed) => Useless::Missed(missed),
                other => Useless::Differs(door.differs(&machine, other)?),
            };
            let (reason, text) = why.bye();
            inflow.retire(reason, &text);
            heal::report(&why, &ready.follower.side, &machine, view, door.source_mut().take_kept());
            return match verdict.recv().map(|ended| ended.verdict) {
                // The primary had been lost, and the claim been made, before this was known.
                Ok(Verdict::Won) => Err(HealError::lost(&why, view + 1).into()),
                // The guest's life has ended where the log says so, or there is nobody left to ask.
                Ok(Verdict::GuestEnded) => Err(HealError::ended(&why).into()),
                // Its threads have ended with the connection; the primary goes on alone.
                Ok(Verdict::Stopped | Verdict::Lost) | Err(_) => {
                    Ok(Followed::Useless(Box::new(Again { ready, machine, why })))
                }
            };
        }
    };
    let crashed = matches!(stopped, Stopped::GuestEnded(end) if end.is_crash());
    if matches!(stopped, Stopped::GuestEnded(_)) && !crashed {
        return Ok(Followed::Ended(ending(stopped, machine.anchors())));
    }
    let Ok(LinkEnded { verdict, lost, image, objection, noticed }) = verdict.recv() else {
        return Err(PairError::NotFormed("the receiver's thread is gone".into()).into());
    };
    if let Some(why) = objection {
        return Err(PairError::OtherImage { why }.into());
    }
    let won = inflow.machine(|machine| machine.goes_live());
    if crashed {
        // As on the primary, which left it to this monitor to say so.
        won.map_or(Ok(()), |view| ready.follower.side.end_life(view, image.ok().flatten().as_ref()))?;
        return Ok(Followed::Ended(ending(stopped, machine.anchors())));
    }
    if let Some(view) = won {
        let owned = image.map_err(|barred| match barred {
            Barred::Stopped(what) => PairError::NotLive { view, what },
            Barred::Image(why) => PairError::OtherImageClaimed { view, why },
        })?;
        return go_live(ready, config, machine, door, (view, noticed, owned)).map(Followed::Ended);
    }
    // What the operator wants is no failure.
    let unfit = unfit.get().filter(|_| !ready.follower.is_stopped());
    Ok(Followed::Ended(left(&ready.follower.side.monitor, view, verdict, lost, unfit)))
}

/// How a backup of `view` ends that does not go live. `lost`: why the claim was, if it was. `unfit`: why it left by itself.
fn left(monitor: &Monitor, view: u64, verdict: Verdict, lost: String, unfit: Option<&String>) -> Ending {
    let no_role = |view, cause| Standing { role: control::Role::None, view, protected: false, cause };
    match (verdict, unfit) {
        (Verdict::Lost, _) => {
            let standing = no_role(view + 1, lost);
            change!(error, monitor, ClaimLost, standing, "the primary goes on alone; this backup stops");
            Ending::LostClaim
        }
        (Verdict::Stopped | Verdict::Won, Some(why)) => {
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
) -> Result<Arc<OnceLock<String>>, CommandError> {
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
fn takeover(
    ready: &Ready<'_>,
    connection: &Connection,
    config: &GuestConfig,
    image: Option<SharedImage>,
) -> Takeover {
    let welcome = &connection.welcome;
    let occasion = Occasion {
        guest: ready.follower.guest_name().to_owned(),
        view: welcome.view + 1,
        peer_host: welcome.host_name.clone(),
        peer_address: connection.address.ip(),
        reason: String::new(),
    };
    let image = image.filter(|_| !config.board.disk_read_only);
    Takeover::new(&ready.follower.side, occasion, image, ready.follower.stop.0.flag())
}

/// What followed from the end of the link.
struct LinkEnded {
    verdict: Verdict,
    /// Why, if the claim was lost.
    lost: String,
    /// If it was won: the disk image; or why the guest does not go live.
    image: Result<Option<Ownership>, Barred>,
    /// Why nothing was claimed, if the disk image is not the primary's any more.
    objection: Option<String>,
    /// When the end was noticed.
    noticed: Instant,
}

/// Takes the log in until the connection ends, and says what follows from that.
fn receiver(
    ready: &Ready<'_>,
    inflow: &Arc<Inflow>,
    takeover: Takeover,
) -> impl FnOnce(Receiving) -> LinkEnded + Send + 'static {
    let (inflow, heartbeats) = (Arc::clone(inflow), Arc::clone(&ready.heartbeats));
    let (side, main) = (&ready.follower.side, ready.follower.stop.0.clone());
    let stop = main.flag();
    let mut claimant = Claimant::new(side.claims.clone(), side.owner.clone());
    let (monitor, view) = (Arc::clone(&side.monitor), inflow.machine(|machine| machine.view()));
    move |frames| {
        let end = inflow.receive(frames, || heartbeats.note_heard());
        let noticed = Instant::now();
        // An answer from here would let the primary act on; whoever claims is silent first.
        heartbeats.fall_silent();
        let next = || {
            let (silent_for, cut_off) = (heartbeats.silent_for(), heartbeats.is_cut_off());
            let stopped = stop.load(Ordering::Relaxed);
            inflow.machine(|machine| machine.next(silent_for, cut_off, stopped))
        };
        if let (LinkEnd::Lost { why, .. }, Next::Wait | Next::Claim { .. }) = (&end, next()) {
            change!(warn, monitor, PrimaryLost, unprotected(view, why.clone()), "primary lost");
        }
        if end == LinkEnd::Dismissed {
            let cause = "the operator of the primary wants it".into();
            let standing = Standing { role: control::Role::None, view, protected: false, cause };
            change!(info, monitor, Dismissed, standing, "dismissed: the primary goes on without this backup");
        }
        let (mut looked, mut objection) = (false, None);
        let verdict = loop {
            match next() {
                Next::Wait => std::thread::sleep(SILENCE_POLL),
                // Only before the first attempt: one that is made takes the guest from a primary that may still live.
                Next::Claim { .. } if !std::mem::replace(&mut looked, true) => {
                    objection = takeover.objection();
                    objection.iter().for_each(|_| inflow.machine(Backup::retire));
                }
                Next::Claim { view } => {
                    let answer = claimant.ask(view, None);
                    inflow.machine(|machine| machine.claim_says(answer));
                }
                Next::Done(verdict) => break verdict,
            }
        };
        let image = match (verdict, &end) {
            (Verdict::Won, LinkEnd::Lost { why, primary }) => takeover.prepare(why, *primary),
            _ => Ok(None),
        };
        if verdict == Verdict::Lost || image.is_err() || objection.is_some() {
            // The guest may be far behind, or nowhere that leads back.
            inflow.abandon();
            main.kick();
        }
        LinkEnded { verdict, lost: claimant.why_lost(), image, objection, noticed }
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
) -> Result<Ending, CommandError> {
    let Ready { follower, mut resources, heartbeats, .. } = ready;
    let Follower { side, listener, hosts, stop, server: _server, .. } = follower;
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
    live.run(again, Some(time.unwrap_or(GuestTime(0))), stop)
}

/// A backup that could not take over at this moment, because of `cause`.
fn unprotected(view: u64, cause: String) -> Standing {
    Standing { role: control::Role::Backup, view, protected: false, cause }
}

/// Gives the primary up when nothing has been heard of it for too long; looks as often as that makes sense with `timeout`.
fn watchdog(
    inflow: Arc<Inflow>,
    heartbeats: Arc<Heartbeats>,
    timeout: Duration,
    stop: Arc<AtomicBool>,
) -> impl FnOnce() + Send + 'static {
    move || {
        while inflow.end().is_none() {
            let (silent, cut_off) = (heartbeats.silent_for(), heartbeats.is_cut_off());
            if inflow.machine(|machine| machine.gives_up(silent, cut_off)) {
                tracing::warn!(silent_ms = silent.as_millis() as u64, "the primary is silent");
                inflow.give_up();
                return;
            }
            if stop.load(Ordering::Relaxed) {
                inflow.bye(ByeReason::Shutdown, "the operator stopped this backup");
                inflow.give_up();
                return;
            }
            // A little behind the moment at which it counts, if that comes soon.
            std::thread::sleep(timeout.saturating_sub(silent).clamp(timeout / 100, timeout / 10));
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::config::EtcdArgs;
    use crate::control::Identity;
    use crate::ft::arbiter::ArbiterSpec;
    use crate::ft::claim::{Member, Outcome};

    fn owner(number: u8, role: ClaimRole) -> Owner {
        Owner { host: format!("host-{number}"), pid: 1, uuid: [number; 16], role }
    }

    #[test]
    fn a_backup_whom_the_record_does_not_name_learns_who_is() {
        let directory = TempDir::new().unwrap();
        let spec = ArbiterSpec::Directory(directory.path().to_owned());
        let claims = || Claims::open(&spec, &EtcdArgs::default(), "web").unwrap();
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
        for verdict in [Verdict::Stopped, Verdict::Won] {
            assert_eq!(left(&monitor, 2, verdict, "-".into(), Some(&why)), Ending::LostClaim);
            assert_eq!((monitor.status().view, monitor.status().cause), (2, why.clone()));
        }
        // The operator's stop, a dismissal; the guest's end, by which there is nothing left to be a backup of.
        assert_eq!(left(&monitor, 2, Verdict::Stopped, "-".into(), None), Ending::Orderly);
        assert_eq!(left(&monitor, 2, Verdict::GuestEnded, "-".into(), Some(&why)), Ending::Orderly);
        assert_eq!(left(&monitor, 2, Verdict::Lost, "the primary has it".into(), None), Ending::LostClaim);
        assert_eq!((monitor.status().view, monitor.status().cause), (3, "the primary has it".to_owned()));
    }
}
