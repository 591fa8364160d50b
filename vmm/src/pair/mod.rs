//! The pair: log link, output rule, heartbeats, claims, takeover.
//!
//! Owns: who may run the guest, and when its output may go; what both sides of a pair are made of. Must never: touch guest
//! state; the vCPU's thread does, through its door.
//!
//! ```text
//! primary                                             backup
//!   vCPU thread ─ LogWriter ─ Outbox ── sender ──TCP──> receiver ── Inflow ── Follow ─ vCPU thread
//!        │                      └────── acks  <──TCP── (received, executed) ┘
//!        └─ effects ─ gate ── released when acknowledged and the lease holds
//!   Heartbeats <───────────────── UDP heartbeats ─────────────────> Heartbeats
//!   Supervisor ── silence or a closed link ── claim(view + 1) ── won: alone / live; lost: stop
//! ```
//! Rooms: `protocol` decides, without I/O; `claims`, `liveness` and `wire` do what it needs; `primary` and `backup` are the two
//! roles. Each names its threads and locks.

pub mod backup;
pub mod claims;
pub mod liveness;
pub mod primary;
pub mod protocol;
pub mod wire;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ft_log::Key;
use thiserror::Error;

use crate::boot::BootError;
use crate::control::metrics::{MetricsError, MetricsSocket};
use crate::control::server::Server;
use crate::control::socket::{self, ControlSocket, SocketError};
use crate::control::{Identity, Monitor};
use crate::guest::GuestError;
use crate::host::backends::OutletError;
use crate::host::image::ImageError;
use crate::host::owner::{Ownership, TakeError};
use crate::kvm::KvmError;
use crate::launch::LaunchError;
use crate::position::{PositionError, Wanted};
use crate::report::{ReportError, Reports};
use crate::run::RunError;
use crate::snapshot::SnapshotError;
use backup::rejoin::ResyncError;
use claims::arbiter::{ArbiterSpec, EtcdFiles, random_id};
use claims::claim::{ClaimError, ClaimRole, Claims, Owner};
use claims::fence::{Fence, FenceCommand, FenceError};
use liveness::heartbeat::HeartbeatError;
use liveness::hosts::{HostList, HostsError};
use primary::accept::AcceptError;
use protocol::Timing;
use wire::connect::ConnectError;
use wire::key_file::{self, KeyFileError};

const START_AGAIN: &str =
    "find out which image is the guest's, then remove its claims and start it again (docs/quickstart.md)";

/// What every monitor of a pair is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The guest's name.
    pub name: String,
    /// Who decides which side continues.
    pub arbiter: ArbiterSpec,
    /// How an etcd is asked.
    pub etcd: EtcdFiles,
    /// What makes sure of the primary's host before a takeover.
    pub fence: Option<FenceCommand>,
    /// How long one run of that may take.
    pub fence_timeout: Duration,
    /// Silence after which the other side counts as failed.
    pub timeout: Duration,
    /// Time between two heartbeats.
    pub heartbeat: Duration,
    /// How far the backup's execution may be behind.
    pub lag_limit: Duration,
    /// The key that both hosts have.
    pub key_file: Option<PathBuf>,
    /// They do without one.
    pub insecure: bool,
    /// Where reports of divergences go.
    pub report_dir: Option<PathBuf>,
    /// Most that a backup keeps for one.
    pub report_mib: u32,
    /// The control socket; `None`: made from the name.
    pub control: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// Where backups, invitations and heartbeats are awaited.
    pub listen: Option<SocketAddr>,
    /// The addresses of all hosts.
    pub hosts: Option<HostList>,
    /// How long an event may wait for the guest's next exit.
    pub defer: Duration,
    /// How forced stops are found again.
    pub positions: Wanted,
}

/// Ends the process after a lost claim, or starts it over, from a thread that cannot return. It does not return.
pub type Leave = Arc<dyn Fn() + Send + Sync>;

/// Why a pair cannot be formed or kept.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum PairError {
    #[error(transparent)]
    Accept(#[from] AcceptError),
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Outlet(#[from] OutletError),
    #[error(transparent)]
    Position(#[from] PositionError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Resync(#[from] ResyncError),
    #[error(transparent)]
    Control(#[from] SocketError),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// The guest's name is taken.
    #[error(
        "guest '{name}' is already run by {} (process {}): it holds view {view} at {arbiter}. \
         If that monitor is certainly gone, {removal} and start again",
        holder.host, holder.pid
    )]
    Claimed { name: String, view: u64, arbiter: String, removal: String, holder: Box<Owner> },
    #[error("the arbiter {arbiter} does not say whether the guest may be started: {why}")]
    Undecided { arbiter: String, why: String },
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
        "this backup does not take the guest over: {why}. It has claimed nothing: a primary that still lives continues \
         alone. If none does, nobody runs the guest; {START_AGAIN}"
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

impl PairError {
    /// The process's exit status.
    pub fn status(&self) -> u8 {
        match self {
            Self::Run(RunError::Diverged(_)) => 4,
            Self::Resync(error) => error.status(),
            _ => 1,
        }
    }
}

/// What is launched for others can fail here as well.
macro_rules! launch_errors {
    ($($error:ty),*) => {
        $(impl From<$error> for PairError {
            fn from(error: $error) -> Self {
                Self::Launch(LaunchError::from(error))
            }
        })*
    };
}
launch_errors!(KvmError, GuestError, crate::host::disk::DiskError, crate::host::tap::TapError);

impl From<BootError> for PairError {
    fn from(error: BootError) -> Self {
        Self::from(GuestError::from(error))
    }
}

/// What both sides have before there is a guest.
pub struct Side {
    claims: Claims,
    fence: Option<Fence>,
    owner: Owner,
    timing: Timing,
    heartbeat: Duration,
    defer: Duration,
    reports: Option<Reports>,
    version: String,
    /// What both hosts know; `None` if they talk in the open.
    key: Option<Key>,
    monitor: Arc<Monitor>,
    leave: Leave,
}

impl Side {
    /// `addresses` are those of the log link, each with its option.
    fn new(
        settings: &Settings,
        addresses: &[(&'static str, SocketAddr)],
        role: ClaimRole,
        leave: Leave,
    ) -> Result<Self, PairError> {
        let Settings { name, timeout, heartbeat, .. } = settings;
        if *heartbeat * 3 > *timeout {
            let ms = |time: &Duration| time.as_millis() as u64;
            return Err(PairError::Heartbeats { heartbeat_ms: ms(heartbeat), timeout_ms: ms(timeout) });
        }
        let key = key_file::for_pair(settings.key_file.as_deref(), settings.insecure, addresses)?;
        let fence = settings.fence.as_ref();
        let fence = fence.map(|command| Fence::new(command, settings.fence_timeout)).transpose()?;
        let uuid = random_id().map_err(LaunchError::host("give random bytes"))?;
        let (host, version) = (host_name(), build_version()?);
        let limit_bytes = u64::from(settings.report_mib) << 20;
        let open = |directory| Reports::open(directory, name, &host, limit_bytes);
        let reports = settings.report_dir.as_deref().map(open).transpose()?;
        Ok(Self {
            fence,
            claims: Claims::open(&settings.arbiter, &settings.etcd, name)?,
            monitor: Monitor::new(Identity {
                name: name.to_owned(),
                host: host.clone(),
                version: version.clone(),
            }),
            owner: Owner { host, pid: std::process::id(), uuid, role },
            version,
            timing: Timing::new(*timeout, settings.lag_limit),
            heartbeat: *heartbeat,
            defer: settings.defer,
            reports,
            key,
            leave,
        })
    }

    /// Lets operators ask this monitor, until dropped.
    fn serve(&self, settings: &Settings) -> Result<Server, PairError> {
        let path = match &settings.control {
            Some(path) => path.clone(),
            None => socket::default_path(&settings.name)?,
        };
        let metrics = settings.metrics.map(MetricsSocket::bind).transpose()?;
        let server = Server::start(ControlSocket::open(&path)?, metrics, Arc::clone(&self.monitor));
        Ok(server.map_err(LaunchError::host("start the control thread"))?)
    }

    /// The guest's life is over in `view`, which is this monitor's: so says the next one, and the image is given back.
    fn end_life(&self, view: u64, owned: Option<&Ownership>) -> Result<(), PairError> {
        self.claims.end(view, &self.owner)?;
        if let Some(Err(error)) = owned.map(Ownership::release) {
            tracing::warn!("the record of the disk image's owner stays: {error}");
        }
        Ok(())
    }
}

/// The monitor's version, exact to the byte: primary and backup must emulate the same machine.
fn build_version() -> Result<String, LaunchError> {
    let program = std::fs::read("/proc/self/exe").map_err(LaunchError::host("read the monitor's program"))?;
    Ok(format!("{}+{:016x}", env!("CARGO_PKG_VERSION"), xxhash_rust::xxh3::xxh3_64(&program)))
}

fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// The hosts of the configuration without this one, which listens on `listen`.
fn other_hosts(list: Option<&HostList>, listen: Option<SocketAddr>) -> Result<Vec<SocketAddr>, PairError> {
    let Some((list, listen)) = list.zip(listen) else { return Ok(Vec::new()) };
    let own: Vec<IpAddr> = nix::ifaddrs::getifaddrs()
        .map_err(|error| LaunchError::host("tell its addresses")(error.into()))?
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect();
    Ok(list.others(listen, |ip| own.contains(&ip))?)
}
