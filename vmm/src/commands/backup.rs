//! `vmft backup`: follows a primary, and takes over when it fails.
//!
//! Owns: the following guest. Must never: claim the guest when its own copy is not known to be right.
//!
//! ```text
//!   connect ── snapshot ──> following ─┬─ link lost ── claim won ──> LiveSide (a primary)
//!      ^                               ├─ a forced stop missed ── out of the running ─┐
//!      └───────────────────────────────┼──────────────────────────────────────────────┘
//!                                      └─ guest ended, stopped, claim lost, diverged ──> end
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use ft_log::{ByeReason, GuestTime, Hello, Key, Role, StreamError};

use super::pair::{LiveSide, PairError, Side, spawn};
use super::stop::Stop;
use super::{CommandError, Ending, ending};
use crate::boot;
use crate::config::BackupArgs;
use crate::ft::accept::Listener;
use crate::ft::backup::{BackupError, Connection, FromPrimary, Inflow, LinkEnd, connect};
use crate::ft::channel::Receiving;
use crate::ft::claim::{ClaimRole, Claims, Owner};
use crate::ft::heartbeat::Heartbeats;
use crate::ft::supervise::claim_until_known;
use crate::guest::{GuestConfig, GuestError};
use crate::host::disk::{Caching, Disk, DiskError};
use crate::host::tap::Tap;
use crate::kvm::Kvm;
use crate::machine::Machine;
use crate::outlet::Resources;
use crate::position;
use crate::run::{self, Follow, RunError, Stopped};
use crate::snapshot::{self, SnapshotError};

/// Pause between two looks at how long the primary has been silent.
const SILENCE_POLL: Duration = Duration::from_millis(5);
/// Pause between two attempts to join a primary that has not yet noticed that its backup is gone.
const JOIN_AGAIN: Duration = Duration::from_millis(50);

/// What a backup has besides a guest.
struct Ready {
    side: Side,
    resources: Resources,
    heartbeats: Arc<Heartbeats>,
    listener: Option<Listener>,
    stop: (Stop, Receiver<()>),
    missed_stop: Option<u64>,
}

/// `vmft backup`.
pub fn backup(args: &BackupArgs) -> Result<Ending, CommandError> {
    let stop = Stop::install()?;
    let mut counter = position::choose(args.position.position)?;
    let addresses: Vec<_> = [("--connect", args.connect)]
        .into_iter()
        .chain(args.listen.map(|listen| ("--listen", listen)))
        .collect();
    let side = Side::new(&args.pair, &addresses, args.delivery, &args.name, ClaimRole::Backup)?;
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
        positions: position::source_of(counter.as_deref()),
    };
    let timeout = Duration::from_millis(args.connect_timeout_ms);
    let key = side.key.clone();
    let mut connection =
        connect(args.connect, key.as_ref(), hello.clone(), timeout).map_err(PairError::from)?;
    let any_port = SocketAddr::new(connection.local_address().map_err(PairError::from)?.ip(), 0);
    let heartbeats = Arc::new(
        Heartbeats::start(args.listen.unwrap_or(any_port), &args.name, Role::Backup, side.heartbeat)
            .map_err(PairError::from)?,
    );
    let missed_stop = args.inject_missed_stop;
    let mut ready = Ready { side, resources, heartbeats, listener, stop, missed_stop };
    loop {
        ready.heartbeats.set_view(connection.welcome.view, Role::Backup);
        ready.heartbeats.set_peer(Some((args.connect, connection.heartbeat_key().clone())));
        if GuestConfig::digest_of(&table) != connection.welcome.cpuid_digest {
            return Err(PairError::WelcomeMismatch { what: "CPUID table" }.into());
        }
        let (config, mut machine) = receive_guest(&kvm, &mut connection)?;
        machine.count_branches(counter);
        match follow(ready, config, machine, connection)? {
            Followed::Ended(ending) => return Ok(ending),
            Followed::Missed(again, machine) => {
                ready = *again;
                counter = machine.into_counter();
            }
        }
        connection = join_again(args.connect, key.as_ref(), &hello, timeout)?;
    }
}

/// Joins a primary that may still be about to give this backup up.
fn join_again(
    address: SocketAddr,
    key: Option<&Key>,
    hello: &Hello,
    timeout: Duration,
) -> Result<Connection, PairError> {
    let deadline = Instant::now() + timeout;
    loop {
        match connect(address, key, hello.clone(), timeout) {
            Err(BackupError::Refused { .. }) if Instant::now() < deadline => std::thread::sleep(JOIN_AGAIN),
            other => return Ok(other?),
        }
    }
}

fn receive_guest(kvm: &Kvm, connection: &mut Connection) -> Result<(GuestConfig, Machine), CommandError> {
    let started = Instant::now();
    let total_mib = connection.welcome.memory_bytes >> 20;
    tracing::info!(primary = %connection.welcome.host_name, memory_mib = total_mib, "receiving the guest");
    let mut quarter = 0;
    let total_bytes = connection.welcome.memory_bytes.max(1);
    let address = connection.address;
    let (config, machine) = snapshot::load(kvm, connection.frames().snapshot(), |gpa| {
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
    ] {
        if !equal {
            return Err(PairError::WelcomeMismatch { what }.into());
        }
    }
    tracing::info!(anchor = machine.anchors(), took_ms = started.elapsed().as_millis() as u64, "following");
    Ok((config, machine))
}

/// How following ended.
enum Followed {
    /// For good.
    Ended(Ending),
    /// This guest cannot go on from where it is, and nothing else is wrong.
    Missed(Box<Ready>, Box<Machine>),
}

/// Follows to the log's end; then, with a claim won, takes over.
fn follow(
    ready: Ready,
    config: GuestConfig,
    mut machine: Machine,
    connection: Connection,
) -> Result<Followed, CommandError> {
    let view = connection.welcome.view;
    let cursor = snapshot::cursor(&machine);
    let (inflow, frames) =
        connection.follow(cursor).map_err(|source: StreamError| PairError::NotFormed(source.to_string()))?;
    // The primary was busy with the snapshot, and this host with loading it.
    ready.heartbeats.note_heard();
    let (verdict_in, verdict) = bounded(1);
    spawn("log-receiver", {
        let receive = receiver(&ready, &inflow, view);
        // The main thread waits for exactly this.
        move || drop(verdict_in.send(receive(frames)))
    })?;
    let (heartbeats, timeout) = (Arc::clone(&ready.heartbeats), ready.side.timeout);
    spawn("watchdog", watchdog(Arc::clone(&inflow), heartbeats, timeout, ready.stop.0.flag()))?;
    let source = FromPrimary::new(Arc::clone(&inflow), ready.stop.0.flag());
    let mut door = Follow::new(source, cursor, config.board.clone(), config.end_page());
    door.miss_stop(ready.missed_stop);
    let stopped = match run::run(&mut machine, &mut door) {
        Ok(stopped) => stopped,
        Err(RunError::Missed(missed)) => {
            tracing::error!("{missed}; this backup asks for the guest anew");
            inflow.retire(ByeReason::Missed, "this backup missed a forced stop; see its own report");
            // Its threads end with the connection.
            let _ = verdict.recv();
            let again = Ready { missed_stop: None, ..ready };
            return Ok(Followed::Missed(Box::new(again), Box::new(machine)));
        }
        Err(error) => {
            if let RunError::Diverged(_) = error {
                inflow.retire(ByeReason::Diverged, "this backup's guest differs; see its own report");
            }
            return Err(error.into());
        }
    };
    if let Stopped::GuestEnded(_) = stopped {
        return Ok(Followed::Ended(ending(stopped, machine.anchors())));
    }
    let Ok((verdict, noticed)) = verdict.recv() else {
        return Err(PairError::NotFormed("the receiver's thread is gone".into()).into());
    };
    match verdict {
        Verdict::Won => {}
        Verdict::GuestEnded | Verdict::Stopped => return Ok(Followed::Ended(Ending::Orderly)),
        Verdict::Lost(holder) => {
            tracing::error!(view = view + 1, host = %holder.host, pid = holder.pid,
                "the primary goes on alone; this backup stops");
            return Ok(Followed::Ended(Ending::LostClaim));
        }
    }
    go_live(ready, config, machine, door, (view + 1, noticed)).map(Followed::Ended)
}

/// Takes the log in until the connection ends, and says what follows from that, and when it was noticed.
fn receiver(
    ready: &Ready,
    inflow: &Arc<Inflow>,
    view: u64,
) -> impl FnOnce(Receiving) -> (Verdict, Instant) + Send + 'static {
    let (inflow, heartbeats, stop) = (Arc::clone(inflow), Arc::clone(&ready.heartbeats), ready.stop.0.flag());
    let (claims, owner, timeout) = (ready.side.claims.clone(), ready.side.owner.clone(), ready.side.timeout);
    move |frames| {
        let end = inflow.receive(frames, || heartbeats.note_heard());
        let noticed = Instant::now();
        // An answer from here would let the primary act on; whoever claims is silent first.
        heartbeats.fall_silent();
        let may_claim = || !stop.load(Ordering::Relaxed) && !inflow.is_retired();
        let silent = || heartbeats.silent_for() > timeout;
        (judge(&end, &claims, view + 1, &owner, silent, may_claim), noticed)
    }
}

/// Runs the guest in the view that was won, which was noticed to be necessary at `noticed`.
fn go_live(
    ready: Ready,
    config: GuestConfig,
    machine: Machine,
    mut door: Follow<FromPrimary>,
    (view, noticed): (u64, Instant),
) -> Result<Ending, CommandError> {
    let Ready { side, mut resources, heartbeats, listener, stop, .. } = ready;
    if let Some(disk) = &mut resources.disk {
        match disk.lock() {
            // A file server may hold the lock of a host that died; the claim is what counts.
            Ok(()) | Err(DiskError::InUse { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let time = door.source_mut().primary_time();
    let again = door.into_unreleased();
    heartbeats.set_view(view, Role::Primary);
    heartbeats.set_peer(None);
    tracing::warn!(
        view,
        anchor = machine.anchors(),
        outputs_again = again.len(),
        disk_again = machine.board().outstanding_disk_requests().len(),
        took_ms = noticed.elapsed().as_millis() as u64,
        "takeover: this host now runs the guest"
    );
    let live = LiveSide { side, config, machine, resources, heartbeats, listener, view };
    live.run(again, Some(time.unwrap_or(GuestTime(0))), stop)
}

/// What becomes of a backup whose link has ended.
enum Verdict {
    /// The guest's life is over.
    GuestEnded,
    /// The operator stopped this monitor, or it is out of the running. It claims nothing: the primary goes on.
    Stopped,
    /// The guest is ours.
    Won,
    /// The guest is the holder's.
    Lost(Owner),
}

/// Decides, by a claim, who goes on. A primary that closed the connection, or whose kernel did, lets nothing
/// out any more. One that merely cannot be reached may, until it has not heard from here for the timeout.
fn judge(
    end: &LinkEnd,
    claims: &Claims,
    view: u64,
    owner: &Owner,
    silent: impl Fn() -> bool,
    may_claim: impl Fn() -> bool,
) -> Verdict {
    if !may_claim() {
        return Verdict::Stopped;
    }
    let LinkEnd::Lost { why, by_peer } = end else { return Verdict::GuestEnded };
    tracing::warn!("primary lost: {why}");
    while !by_peer && !silent() {
        std::thread::sleep(SILENCE_POLL);
    }
    if !may_claim() {
        return Verdict::Stopped;
    }
    claim_until_known(claims, view, owner).map_or(Verdict::Won, Verdict::Lost)
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
