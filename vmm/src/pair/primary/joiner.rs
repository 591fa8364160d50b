//! A backup on its way to the guest: the transfer while the guest runs, its record at the arbiter, the last part.
//!
//! Owns: one join from the accepted greeting to the start of the log. Must never: stop the guest for as long as the arbiter
//! takes, or let the log begin for a backup that no record names.
//!
//! ```text
//!   begin ──> copying ── recorded ── little is left ──> ready ── at a boundary ──> finish: an epoch begins
//!                └── broken off, not recorded ──> failed; nothing else happens
//! ```
//! Every event of the guest is either before or after the last part: the guest stands while that is taken.
//! Threads: `begin` and `finish` run on the vCPU's; `log-sender` copies, and sends the log afterwards. Locks: none of its own.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use devices::Payload;
use ft_log::{Refusal, SealKey, StreamError, Welcome};

use super::accept::refuse;
use super::connection::{Acks, send_log};
use super::gate::OutputGate;
use super::invite::Search;
use super::outbox::Outbox;
use super::state::PrimaryState;
use super::supervisor::LinkEvent;
use crate::control::Monitor;
use crate::control::protocol::Peer;
use crate::guest::GuestConfig;
use crate::host::backends::Outlet;
use crate::host::{LogEvent, spawn};
use crate::kvm::DirtyLog;
use crate::machine::Machine;
use crate::pair::claims::claim::{Claims, Member, Owner};
use crate::pair::claims::claimant::Claimant;
use crate::pair::protocol::{Answer, Ask, Life};
use crate::pair::wire::channel::{Channel, Receiving, Sending};
use crate::pair::wire::transfer::{self, Copied, Copying, Transfer, TransferError};
use crate::run::{RunError, VcpuHandle};
use crate::with_causes;

/// A backup that takes no bytes for this long while it is being fed is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// A backup whose greeting was accepted, waiting for its snapshot.
pub struct Join {
    /// The connection, with the greeting up to Hello done.
    pub channel: Channel,
    /// Who it is.
    pub member: Member,
    /// Where it connected from.
    pub address: SocketAddr,
    /// Where it would take a backup of its own.
    pub listen: Option<SocketAddr>,
}

/// What every join needs.
pub struct Joiner {
    /// The guest.
    pub config: GuestConfig,
    /// Where a backup is recorded as such.
    pub claims: Claims,
    /// This monitor.
    pub owner: Owner,
    /// The protocol's machine.
    pub state: Arc<PrimaryState>,
    /// Where outputs wait.
    pub gate: Arc<OutputGate<Outlet>>,
    /// The supervisor's inbox.
    pub events: Sender<LinkEvent>,
    /// Who could be the backup.
    pub search: Arc<Search>,
    /// What an operator sees.
    pub monitor: Arc<Monitor>,
    /// The guest's thread.
    pub vcpu: VcpuHandle,
}

/// A backup that is being given the guest.
pub(super) struct Joining {
    frames: Receiving,
    heartbeat_key: SealKey,
    stream: TcpStream,
    host: String,
    address: SocketAddr,
    listen: Option<SocketAddr>,
    /// Where it stands.
    pub(super) transfer: Transfer,
    /// Hands the sender the log's outbox, once there is one.
    outbox: Sender<Arc<Outbox>>,
    sender: JoinHandle<()>,
    started: Instant,
    /// How long the guest stood still at the start.
    first_pause: Duration,
}

/// A backup that has been given the guest.
pub(super) struct Joined {
    /// Where the log to it goes.
    pub(super) outbox: Arc<Outbox>,
    /// Where it would take a backup.
    pub(super) listen: Option<SocketAddr>,
    /// The thread that sends the log.
    pub(super) sender: JoinHandle<()>,
}

/// Has a backup that is joining recorded as one.
struct Naming {
    state: Arc<PrimaryState>,
    monitor: Arc<Monitor>,
    claimant: Claimant,
    member: Member,
    view: u64,
    asked: Option<Ask>,
}

impl Naming {
    fn life(&self) -> Life {
        Life::from_be_bytes(self.member.uuid)
    }

    /// It does not come after all. What was asked of the arbiter may have been done.
    fn give_up(&self) {
        if self.asked.is_some() {
            self.state.protocol(|primary| primary.join_failed(self.life()));
        }
    }

    /// Asks the arbiter once: whether it is recorded.
    fn attempt(&mut self) -> Result<bool, TransferError> {
        let ask = match self.asked {
            Some(ask) => ask,
            None => self.state.protocol(|primary| primary.name(self.life(), self.view))?,
        };
        self.asked = Some(ask);
        let answer = self.claimant.ask(ask.view, Some(&self.member));
        let named = self.state.protocol(|primary| {
            primary.claim_says(ask, answer);
            primary.has_named()
        });
        match answer {
            Answer::Won if named => {
                self.monitor.note_view(ask.view);
                tracing::info!(
                    event = %LogEvent::BackupRecorded,
                    view = ask.view,
                    backup = %self.member.host,
                    "the arbiter has recorded the backup"
                );
            }
            Answer::Unknown => {}
            Answer::Lost => {
                let why = self.claimant.why_lost();
                return Err(TransferError::NotNamed { view: ask.view, why });
            }
            Answer::Won | Answer::Otherwise => {
                let why = "an earlier attempt has recorded another one".to_owned();
                return Err(TransferError::NotNamed { view: ask.view, why });
            }
        }
        Ok(named)
    }
}

/// What the copying thread needs.
struct SendTask {
    naming: Naming,
    copying: Copying,
    config: Payload,
    welcome: Welcome,
    log: DirtyLog,
    host: String,
    address: SocketAddr,
    stream: TcpStream,
    search: Arc<Search>,
    events: Sender<LinkEvent>,
    vcpu: VcpuHandle,
    outbox: Receiver<Arc<Outbox>>,
}

impl SendTask {
    /// Sends the guest, then its log.
    fn run(mut self, mut out: Sending) {
        let vcpu = self.vcpu.clone();
        let ask = move || vcpu.ask_for_boundary();
        let (log, naming) = (&self.log, &mut self.naming);
        let mut name = || naming.attempt();
        let copied = Copied {
            welcome: self.welcome,
            backup: &self.host,
            config: self.config,
            ram: log.ram(),
            written: &|| log.take(),
            ask: &ask,
            name: &mut name,
        };
        if let Err(error) = self.copying.run(copied, &mut out) {
            self.naming.give_up();
            let why = format!("it could not be given the guest: {}", with_causes(&error));
            self.search.failed(self.address.ip(), &why);
            tracing::warn!(event = %LogEvent::TransferFailed, backup = %self.host, "{why}");
            let _ = self.stream.shutdown(Shutdown::Both);
            let lost = match self.outbox.try_recv() {
                // The guest's log follows already.
                Ok(outbox) => LinkEvent::Down { epoch: outbox.epoch(), why },
                // Of interest if the arbiter was asked to record it.
                Err(_) => LinkEvent::JoinFailed { why },
            };
            let _ = self.events.send(lost);
            return;
        }
        // The last part came with it.
        if let Ok(outbox) = self.outbox.recv() {
            send_log(&outbox, out, &self.stream, &self.events);
        }
    }
}

impl Joiner {
    /// Starts to send the guest to a backup.
    pub(super) fn begin(&self, machine: &mut Machine, mut join: Join) -> Result<Joining, RunError> {
        let started = Instant::now();
        let log = machine.start_transfer()?;
        let (transfer, copying) = transfer::begin(log.clone());
        let welcome = Welcome {
            // Nothing changes the view of a guest that is alone until this backup is named.
            view: self.state.view() + 1,
            guest_name: self.config.name.clone(),
            memory_bytes: self.config.memory_bytes,
            config_digest: self.config.digest(),
            cpuid_digest: self.config.cpuid_digest(),
            host_name: self.owner.host.clone(),
        };
        // From here on heartbeats tell whether the backup lives, however long it takes to load.
        join.channel.unhurried()?;
        let Join { channel, member, address, listen } = join;
        let Channel { frames, out, heartbeat_key, stream } = channel;
        let host = member.host.clone();
        stream.set_write_timeout(Some(WRITE_TIMEOUT)).map_err(StreamError::Io)?;
        let naming = Naming {
            state: Arc::clone(&self.state),
            monitor: Arc::clone(&self.monitor),
            claimant: Claimant::new(self.claims.clone(), self.owner.clone()),
            member,
            view: welcome.view,
            asked: None,
        };
        let (outbox, outbox_of) = bounded(1);
        let task = SendTask {
            naming,
            copying,
            config: self.config.to_payload(),
            welcome,
            log,
            host: host.clone(),
            address,
            stream: stream.try_clone().map_err(StreamError::Io)?,
            search: Arc::clone(&self.search),
            events: self.events.clone(),
            vcpu: self.vcpu.clone(),
            outbox: outbox_of,
        };
        let sender = spawn("log-sender", move || task.run(out)).map_err(StreamError::Io)?;
        self.monitor.set_transfer(Some(transfer.watch(&host)));
        let first_pause = started.elapsed();
        Ok(Joining {
            frames,
            heartbeat_key,
            stream,
            host,
            address,
            listen,
            transfer,
            outbox,
            sender,
            started,
            first_pause,
        })
    }

    /// Hands over what is left of the guest; its log begins. The machine has been settled. `None`: the protocol does not allow
    /// it any more.
    pub(super) fn finish(&self, machine: &mut Machine, joining: Joining) -> Result<Option<Joined>, RunError> {
        let stopped = Instant::now();
        let last = machine.last_part(&joining.transfer.log)?;
        let Joining { frames, heartbeat_key, stream, host, address, listen, transfer, .. } = joining;
        let outbox = match Outbox::attach(&self.state, machine.anchors()) {
            Ok(outbox) => outbox,
            Err(error) => {
                tracing::error!(backup = %host, "not given the guest: {error}");
                let _ = stream.shutdown(Shutdown::Both);
                return Ok(None);
            }
        };
        self.state.set_outbox(Arc::clone(&outbox));
        let (rounds, pages) = transfer.figures();
        let last_pages = last.1.len();
        self.monitor.set_transfer(None);
        self.monitor.set_peer(Some(Peer {
            host: Some(host.clone()),
            address: address.to_string(),
            listen: listen.map(|listen| listen.to_string()),
        }));
        // Before any other event of this epoch.
        let paired =
            LinkEvent::Paired { outbox: Arc::clone(&outbox), stream, address, heartbeat_key, stopped };
        let _ = self.events.send(paired);
        let acks = Acks {
            outbox: Arc::clone(&outbox),
            state: Arc::clone(&self.state),
            gate: Arc::clone(&self.gate),
            events: self.events.clone(),
        };
        spawn("log-acks", move || acks.receive(frames)).map_err(StreamError::Io)?;
        let _ = joining.outbox.send(Arc::clone(&outbox));
        transfer.finish(last);
        tracing::info!(
            event = %LogEvent::TransferFinal,
            backup = %host,
            view = self.state.view(),
            anchor = machine.anchors(),
            took_ms = joining.started.elapsed().as_millis() as u64,
            rounds,
            pages_again = pages,
            last_pages,
            first_pause_ms = joining.first_pause.as_millis() as u64,
            pause_ms = stopped.elapsed().as_millis() as u64,
            "the backup gets the rest of the guest; output now waits for its acknowledgement"
        );
        Ok(Some(Joined { outbox, listen, sender: joining.sender }))
    }
}

impl Joining {
    /// The guest does not run here any more: the backup does not come.
    pub(super) fn break_off(self) -> JoinHandle<()> {
        let _ = self.stream.shutdown(Shutdown::Both);
        self.sender
    }
}

/// Tells a backup that it cannot join.
pub(super) fn turn_away(mut join: Join, reason: &str) {
    tracing::debug!(backup = %join.member.host, "a backup is turned away: {reason}");
    // It may be gone already.
    let _ = refuse(&mut join.channel.out, Refusal::Busy, reason.into());
}
