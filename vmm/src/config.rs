//! The command line.
//!
//! Owns: every option, its default and its unit. Must never: open or check anything; the commands do.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::launch::GuestSettings;
use crate::pair::Settings;
use crate::pair::backup::{BackupSettings, InjectedFaults};
use crate::pair::claims::arbiter::ArbiterSpec;
use crate::pair::claims::arbiter::EtcdFiles;
use crate::pair::claims::fence::FenceCommand;
use crate::pair::liveness::hosts::HostList;
use crate::position::Wanted;
use crate::run::{CorruptAt, Slowness};

/// Fault-tolerant hypervisor: a Linux guest that outlives its host.
#[derive(Debug, Parser)]
#[command(name = "vmft", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// More about what the monitor does (-v: debug, -vv: trace). RUST_LOG works too.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What the monitor can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a guest without fault tolerance, with this terminal as its console (Ctrl-A x quits).
    Run(GuestArgs),
    /// Run a guest and record it, whole, into a file.
    Record {
        /// The recording. Must not exist.
        file: PathBuf,
        /// The guest.
        #[command(flatten)]
        guest: GuestArgs,
        /// How stops of it are found again.
        #[command(flatten)]
        position: PositionArgs,
    },
    /// Replay a recording and compare every anchor, all memory and every device.
    Replay {
        /// The recording.
        file: PathBuf,
        /// Print what the guest wrote to its console.
        #[arg(long)]
        console: bool,
    },
    /// Run a guest as the primary of a pair.
    Primary(Box<PrimaryArgs>),
    /// Follow a primary and take over when it fails.
    Backup(BackupArgs),
    /// Wait on this host, and become the backup when a primary needs one.
    Standby(StandbyArgs),
    /// Make a key for a pair: both hosts need a copy.
    Keygen {
        /// The key file. Must not exist.
        file: PathBuf,
    },
    /// Say whether a kernel can be loaded, and what is rewritten in it. Needs no KVM.
    CheckKernel {
        /// A vmlinux or a bzImage (vmlinuz).
        file: PathBuf,
        /// Also print the address of each instruction that is rewritten.
        #[arg(long)]
        addresses: bool,
    },
    /// Measure whether this host can run guests, and how well.
    Doctor(DoctorArgs),
    /// Show how a primary or backup on this host stands.
    Status(StatusArgs),
    /// Hand the guest to the backup; this host's monitor becomes its backup.
    Switch(TargetArgs),
    /// Let the guest stand still, until `resume`.
    Pause(TargetArgs),
    /// Let a paused guest go on.
    Resume(TargetArgs),
    /// Press the guest's power button.
    Shutdown(ShutdownArgs),
    /// Let the backup go, so that another can join.
    DropBackup(TargetArgs),
}

/// Which monitor of this host is meant.
#[derive(Clone, Debug, Args)]
pub struct TargetArgs {
    /// The guest's name.
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// The monitor's control socket; default: made from the name.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// `vmft status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Which monitor.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Write the status as JSON.
    #[arg(long)]
    pub json: bool,
}

/// `vmft shutdown`.
#[derive(Clone, Debug, Args)]
pub struct ShutdownArgs {
    /// Which monitor.
    #[command(flatten)]
    pub target: TargetArgs,
    /// Do not ask the guest: end it, and both monitors, as if its plug were pulled.
    #[arg(long)]
    pub force: bool,
}

/// What an operator gets to see of a monitor.
#[derive(Clone, Debug, Args)]
pub struct OperatorArgs {
    /// The control socket; default: /run/vmft/NAME.sock, or $XDG_RUNTIME_DIR/vmft/NAME.sock if not root.
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Where Prometheus may fetch figures, by HTTP. Anyone who can connect can read them.
    #[arg(long, value_name = "ADDR:PORT")]
    pub metrics: Option<SocketAddr>,
}

/// `vmft doctor`.
#[derive(Clone, Debug, Args)]
pub struct DoctorArgs {
    /// Write the report as JSON.
    #[arg(long)]
    pub json: bool,
    /// Also try the arbiter that both hosts will ask.
    #[arg(long, value_name = "SPEC")]
    pub arbiter: Option<ArbiterSpec>,
    /// How an etcd is asked.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// Also measure the round trip to the peer: a primary's --listen address.
    #[arg(long, value_name = "ADDR:PORT")]
    pub peer: Option<SocketAddr>,
}

/// What a guest is made of.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// Kernel: an x86-64 vmlinux or bzImage.
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM file system.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Added to the kernel command line.
    #[arg(long, value_name = "STRING")]
    pub cmdline: Option<String>,
    /// Guest memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    pub memory_mib: u64,
    /// Raw disk image, shown to the guest as /dev/vda.
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// The guest may not write its disk.
    #[arg(long, requires = "disk")]
    pub disk_read_only: bool,
    /// Existing tap interface for the guest's network card.
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// The network card's address; default: made from the guest's name.
    #[arg(long, value_name = "MAC", requires = "tap", value_parser = parse_mac)]
    pub mac: Option<[u8; 6]>,
    /// The guest's name. Both monitors of a pair must use the same.
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// How events reach the guest.
    #[command(flatten)]
    pub delivery: DeliveryArgs,
}

/// How events reach a live guest.
#[derive(Clone, Copy, Debug, Args)]
pub struct DeliveryArgs {
    /// How long a timer tick, frame or disk completion may wait for the guest's next exit before the guest is
    /// stopped for it.
    #[arg(long, value_name = "MS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    pub defer_ms: u64,
}

impl DeliveryArgs {
    /// How long an event may wait.
    fn budget(self) -> Duration {
        Duration::from_millis(self.defer_ms)
    }
}

/// How a follower finds where a guest was stopped between two of its exits.
#[derive(Clone, Copy, Debug, Args)]
pub struct PositionArgs {
    /// What tells where a guest was stopped that makes no exits: the CPU's counter of branches (pmu), a checkpoint in
    /// the log, or stepping through the whole guest (step: for tests, very slow). auto: pmu if it is exact here, else
    /// checkpoint. Both monitors of a pair must come to the same.
    #[arg(long, value_name = "SOURCE", default_value = "auto", value_parser = parse_position)]
    pub position: Wanted,
}

/// How an etcd is asked.
#[derive(Clone, Debug, Default, Args)]
pub struct EtcdArgs {
    /// Ask the etcd by TLS; these certificates (PEM) vouch for its own.
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// The certificate (PEM) that this host shows to it.
    #[arg(long, value_name = "FILE", requires_all = ["etcd_ca", "etcd_cert_key"])]
    pub etcd_cert: Option<PathBuf>,
    /// The private key (PEM) of that certificate.
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_cert_key: Option<PathBuf>,
    /// Who asks: a file with the line NAME:PASSWORD of a user of the etcd.
    #[arg(long, value_name = "FILE", requires = "etcd_ca")]
    pub etcd_user: Option<PathBuf>,
}

/// What both sides of a pair need.
#[derive(Clone, Debug, Args)]
pub struct PairArgs {
    /// Who decides which side goes on: dir:PATH, a directory on storage that both hosts share, or
    /// etcd:HOST:PORT[,HOST:PORT...], an etcd.
    #[arg(long, value_name = "SPEC")]
    pub arbiter: ArbiterSpec,
    /// How an etcd is asked.
    #[command(flatten)]
    pub etcd: EtcdArgs,
    /// A command that makes sure of the primary's host, with a power switch or at the storage. It runs when a backup has
    /// won the claim; the guest goes on there only once it has ended with exit status 0. It gets VMFT_GUEST, VMFT_VIEW,
    /// VMFT_PEER_HOST, VMFT_PEER_ADDRESS and VMFT_REASON in its environment. A primary keeps it for when it is a backup.
    #[arg(long, value_name = "'PROGRAM ARGS'")]
    pub fence_cmd: Option<FenceCommand>,
    /// How long one run of that command may take before it is killed and run again.
    #[arg(long, value_name = "MS", default_value_t = 10_000, requires = "fence_cmd", value_parser = clap::value_parser!(u64).range(100..=600_000))]
    pub fence_timeout_ms: u64,
    /// Silence after which the other side counts as failed.
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(20..=60_000))]
    pub timeout_ms: u64,
    /// Time between two heartbeats; at most a third of the timeout.
    #[arg(long, value_name = "MS", default_value_t = 25, value_parser = clap::value_parser!(u64).range(1..=20_000))]
    pub heartbeat_ms: u64,
    /// The key that both hosts have a copy of (`vmft keygen`): log, transfer and heartbeats are encrypted and
    /// authenticated with it. Needed unless all addresses are loopback.
    #[arg(long, value_name = "FILE", conflicts_with = "insecure")]
    pub key_file: Option<PathBuf>,
    /// Do without a key although others may reach the log link, and could read and change the guest.
    #[arg(long)]
    pub insecure: bool,
    /// How far the backup's execution may be behind before the primary goes on without it; default: ten times
    /// --timeout-ms.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(100..=600_000))]
    pub lag_limit_ms: Option<u64>,
    /// Directory for reports of guests that differed, best on a local disk; without it they go to stderr only. A backup
    /// keeps a copy of all that it is sent there.
    #[arg(long, value_name = "DIR")]
    pub report_dir: Option<PathBuf>,
    /// Most that a backup keeps for a report.
    #[arg(long, value_name = "MIB", default_value_t = 2_048, requires = "report_dir")]
    pub report_mib: u32,
    /// What an operator gets to see.
    #[command(flatten)]
    pub operator: OperatorArgs,
}

impl PairArgs {
    /// How far the backup's execution may be behind.
    pub fn lag_limit(&self) -> Duration {
        Duration::from_millis(self.lag_limit_ms.unwrap_or(10 * self.timeout_ms))
    }
}

/// `vmft primary`.
#[derive(Clone, Debug, Args)]
pub struct PrimaryArgs {
    /// The guest.
    #[command(flatten)]
    pub guest: GuestArgs,
    /// What both sides need.
    #[command(flatten)]
    pub pair: PairArgs,
    /// How stops of the guest are found again.
    #[command(flatten)]
    pub position: PositionArgs,
    /// Where a backup may connect: log by TCP, heartbeats by UDP on the same port.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// The --listen addresses of all hosts, this one's own among them or not, separated by commas (port 7700 where
    /// none is given). Without a backup the primary looks for one there, where `vmft standby` waits. A monitor with
    /// this option that loses its claim starts over as a standby.
    #[arg(long, value_name = "ADDR[:PORT],...")]
    pub hosts: Option<HostList>,
}

/// `vmft backup`.
#[derive(Clone, Debug, Args)]
pub struct BackupArgs {
    /// The primary's --listen address.
    #[arg(long, value_name = "ADDR:PORT")]
    pub connect: SocketAddr,
    /// What a backup is made of.
    #[command(flatten)]
    pub follow: FollowArgs,
    /// After a takeover, where a new backup may connect.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
    /// The --listen addresses of all hosts, as `vmft primary` takes them: after a takeover this host looks for a
    /// backup there.
    #[arg(long, value_name = "ADDR[:PORT],...", requires = "listen")]
    pub hosts: Option<HostList>,
}

/// `vmft standby`.
#[derive(Clone, Debug, Args)]
pub struct StandbyArgs {
    /// What a backup is made of.
    #[command(flatten)]
    pub follow: FollowArgs,
    /// Where a primary's invitation is awaited, and after a takeover a backup.
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: SocketAddr,
    /// The --listen addresses of all hosts, this one's own among them or not, separated by commas (port 7700 where
    /// none is given). Only their invitations are followed.
    #[arg(long, value_name = "ADDR[:PORT],...")]
    pub hosts: HostList,
}

/// What a backup is made of, whether it was told its primary or waits for one.
#[derive(Clone, Debug, Args)]
pub struct FollowArgs {
    /// What both sides need.
    #[command(flatten)]
    pub pair: PairArgs,
    /// The guest's name.
    #[arg(long, default_value = "guest")]
    pub name: String,
    /// The guest's disk image as this host sees it: the same file on shared storage.
    #[arg(long, value_name = "FILE")]
    pub disk: Option<PathBuf>,
    /// Existing tap interface that the guest's network card will use here.
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,
    /// How events reach the guest after a takeover.
    #[command(flatten)]
    pub delivery: DeliveryArgs,
    /// How stops of the guest are found.
    #[command(flatten)]
    pub position: PositionArgs,
    /// How long to keep trying to reach the primary.
    #[arg(long, value_name = "MS", default_value_t = 5_000)]
    pub connect_timeout_ms: u64,
    /// Faults for tests.
    #[command(flatten)]
    pub inject: InjectArgs,
}

/// Faults for tests; `docs/testing.md` has them.
#[derive(Clone, Debug, Args)]
pub struct InjectArgs {
    /// The N-th forced stop that is a checkpoint counts as missed.
    #[arg(long, value_name = "N", hide = true)]
    pub inject_missed_stop: Option<u64>,
    /// The guest is corrupted so many boundaries from where following began.
    #[arg(long, value_name = "N:register|N:memory=TEXT", hide = true)]
    pub inject_corruption: Option<CorruptAt>,
    /// The corruption happens each time that this backup is given the guest.
    #[arg(long, requires = "inject_corruption", hide = true)]
    pub inject_again: bool,
    /// The guest takes so long at each of COUNT boundaries, from the one with the number FROM on.
    #[arg(long, value_name = "MS:FROM:COUNT", hide = true)]
    pub inject_slowness: Option<Slowness>,
}

fn parse_position(text: &str) -> Result<Wanted, String> {
    text.parse().map_err(|why| format!("{why}: choose auto, pmu, checkpoint or step"))
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()
        .map_err(|_| format!("'{text}' is not a MAC address such as 52:54:00:12:34:56"))?;
    let mac: [u8; 6] = bytes.try_into().map_err(|_| format!("'{text}' is not a MAC address of six bytes"))?;
    if mac[0] & 1 == 1 {
        return Err(format!("'{text}' is a multicast address; the first byte must be even"));
    }
    Ok(mac)
}

impl GuestArgs {
    /// What the guest is made of.
    pub fn settings(&self) -> GuestSettings {
        GuestSettings {
            name: self.name.clone(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            memory_mib: self.memory_mib,
            disk: self.disk.clone(),
            disk_read_only: self.disk_read_only,
            tap: self.tap.clone(),
            mac: self.mac,
            defer: self.delivery.budget(),
        }
    }
}

impl EtcdArgs {
    /// The files that they name.
    pub fn files(&self) -> EtcdFiles {
        let Self { etcd_ca, etcd_cert, etcd_cert_key, etcd_user } = self.clone();
        EtcdFiles { ca: etcd_ca, cert: etcd_cert, cert_key: etcd_cert_key, user: etcd_user }
    }
}

impl PairArgs {
    fn settings(&self, name: &str, delivery: DeliveryArgs, position: PositionArgs) -> Settings {
        let ms = Duration::from_millis;
        Settings {
            name: name.to_owned(),
            arbiter: self.arbiter.clone(),
            etcd: self.etcd.files(),
            fence: self.fence_cmd.clone(),
            fence_timeout: ms(self.fence_timeout_ms),
            timeout: ms(self.timeout_ms),
            heartbeat: ms(self.heartbeat_ms),
            lag_limit: self.lag_limit(),
            key_file: self.key_file.clone(),
            insecure: self.insecure,
            report_dir: self.report_dir.clone(),
            report_mib: self.report_mib,
            control: self.operator.control.clone(),
            metrics: self.operator.metrics,
            listen: None,
            hosts: None,
            defer: delivery.budget(),
            positions: position.position,
        }
    }
}

impl FollowArgs {
    fn settings(&self, listen: Option<SocketAddr>, hosts: Option<HostList>) -> BackupSettings {
        let pair = self.pair.settings(&self.name, self.delivery, self.position);
        BackupSettings {
            pair: Settings { listen, hosts, ..pair },
            disk: self.disk.clone(),
            tap: self.tap.clone(),
            connect_timeout: Duration::from_millis(self.connect_timeout_ms),
            faults: InjectedFaults {
                missed_stop: self.inject.inject_missed_stop,
                corruption: self.inject.inject_corruption.clone(),
                corrupt_again: self.inject.inject_again,
                slowness: self.inject.inject_slowness.clone(),
            },
        }
    }
}

impl PrimaryArgs {
    /// What the pair and the guest are made of.
    pub fn settings(&self) -> (Settings, GuestSettings) {
        let pair = self.pair.settings(&self.guest.name, self.guest.delivery, self.position);
        (Settings { listen: Some(self.listen), hosts: self.hosts.clone(), ..pair }, self.guest.settings())
    }
}

impl BackupArgs {
    /// What the backup is told.
    pub fn settings(&self) -> BackupSettings {
        self.follow.settings(self.listen, self.hosts.clone())
    }
}

impl StandbyArgs {
    /// What the standby is told.
    pub fn settings(&self) -> BackupSettings {
        self.follow.settings(Some(self.listen), Some(self.hosts.clone()))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn mac_addresses_are_parsed_or_refused() {
        assert_eq!(parse_mac("52:54:00:12:34:56"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:zz", "53:54:00:12:34:56", "52:54:00:12:34:56:78"] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
