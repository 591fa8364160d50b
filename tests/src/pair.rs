//! Monitors on test hosts: a site with hosts, fresh shared storage for each test, and pairs of monitors on them.
//!
//! Owns: the command lines of monitors in tests, and the clean-up between tests that share hosts. Must never: wait
//! for a time where there is a condition to wait for, or hide what a monitor said: when a test fails, everything
//! that its monitors have written is printed.
//!
//! ```text
//!   SharedSites::run ──> Site::reset (links whole, hosts running) ──> the test ──> every process killed and gone
//!                                                                      └ failed: logs printed, hosts thrown away
//! ```

use std::any::Any;
use std::fmt::Write as _;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::client::{Client, Config, Report, dump};
use crate::events::{PROTECTED, TAKEOVER, TRANSFER_FINAL, UNPROTECTED};
use crate::harness::TestResult;
use crate::hosts::{
    Ending, HostConfig, HostError, HostKind, HostProcess, Images, Link, Net, TestHost, build_vmft, make_disk,
    make_key,
};
use crate::lock;

/// Limit for what takes milliseconds when nothing is wrong.
pub const SHORT: Duration = Duration::from_secs(20);
/// Limit for a guest's boot, a snapshot's transfer and the like.
pub const LONG: Duration = Duration::from_secs(90);
/// What the guest writes to its console once its service listens.
pub const SERVICE_READY: &str = "vmft-demo: ready";
/// The guest's address and its demo service.
pub const SERVICE: ([u8; 4], u16) = ([10, 77, 0, 2], 7777);
/// Port of the primaries' log and heartbeats.
pub const LOG_PORT: u16 = 7000;
/// The address of the guest's network card in all tests.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0x00, 0x77, 0x00, 0x02];

const DISK_MIB: u32 = 64;
const KEY_FILE: &str = "pair.key";
/// How often what a monitor has written is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// Test hosts with the monitor and the guest's images on them.
#[derive(Debug)]
pub struct Site {
    // The hosts go before the network that they are in.
    hosts: Vec<Arc<TestHost>>,
    started: Vec<Started>,
    net: Arc<Net>,
    config: HostConfig,
    monitor: PathBuf,
    kernel: String,
    volumes: u32,
}

#[derive(Debug)]
struct Started {
    what: String,
    process: Arc<HostProcess>,
}

/// A monitor on a test host.
#[derive(Debug, Clone)]
pub struct Monitor {
    /// Number of its host.
    pub host: u8,
    process: Arc<HostProcess>,
}

impl Deref for Monitor {
    type Target = HostProcess;

    fn deref(&self) -> &HostProcess {
        &self.process
    }
}

/// A fresh directory on the storage that all hosts share, with a fresh disk for the guest and a fresh key for its pair.
#[derive(Debug, Clone)]
pub struct Volume {
    /// As this machine sees it.
    pub local: PathBuf,
    /// As the hosts see it.
    pub path: String,
    /// The pair's key file as the hosts see it. `None`: its monitors talk in the open.
    pub key: Option<String>,
    disk: String,
    /// The arbiter that the monitors use: this directory, unless a test has another.
    pub arbiter: String,
    /// What else they are told of it.
    pub arbiter_options: Vec<String>,
}

impl Volume {
    /// The guest's disk image as the hosts see it.
    pub fn disk(&self) -> String {
        self.disk.clone()
    }

    /// The option for [`Volume::key`].
    pub fn security(&self) -> Vec<&str> {
        self.key.as_deref().map_or_else(|| vec!["--insecure"], |key| vec!["--key-file", key])
    }

    /// The names of all files in it but the disk, the key, the directory's id and what `vmft` never looks at again.
    pub fn claims(&self) -> Result<Vec<String>, HostError> {
        let failed = |source| HostError::File { path: self.local.clone(), source };
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.local).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            if name.contains(".view-") {
                names.push(name);
            }
        }
        // By the view's number, which has no leading zeros.
        names.sort_by(|a, b| (a.len(), a).cmp(&(b.len(), b)));
        Ok(names)
    }

    /// Fails unless the last claim says that nobody runs the guest any more.
    pub fn assert_ended(&self) -> TestResult {
        let claims = self.claims()?;
        let last = claims.last().ok_or("there is no claim at all")?;
        let claim = fs::read_to_string(self.local.join(last))?;
        if claim.contains("\nrole ended\n") { Ok(()) } else { Err(format!("{last} says: {claim}").into()) }
    }
}

/// A load of synced writes and reads.
pub fn load() -> Config {
    Config { window: 4, value_len: 200, ..Config::default() }
}

/// Waits until `client` has had `count` more replies.
pub fn more_replies(client: &Client, count: usize) -> TestResult {
    if client.wait_for_replies(client.answered() + count, LONG) {
        Ok(())
    } else {
        Err(format!("no {count} more replies within {LONG:?}").into())
    }
}

/// What a guest is made of, and how its pair is set up.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// What it does besides serving (`vmft.work`).
    pub work: &'static str,
    /// Silence after which the other side counts as failed.
    pub timeout_ms: u32,
    /// Its initramfs as the hosts see it; else the one with the demo service.
    pub initrd: Option<String>,
}

impl Default for Guest {
    /// A small guest that only serves. The time-out is long because test hosts are emulated, on a machine that may
    /// have fewer processors than they have: a heartbeat may be late without any fault.
    fn default() -> Guest {
        Guest { memory_mib: 128, work: "none", timeout_ms: 2_000, initrd: None }
    }
}

impl Site {
    /// Boots `count` hosts. The guests' kernel is the file that the environment variable `VMFT_GUEST_KERNEL` names,
    /// or else Debian's.
    pub fn boot(count: u8) -> Result<Site, HostError> {
        Site::boot_with(count, |_, _| Ok(()))
    }

    /// As [`Site::boot`]; `prepare` gets the network and the directory that the hosts are going to share.
    pub fn boot_with(
        count: u8,
        prepare: impl FnOnce(&Net, &Path) -> Result<(), HostError>,
    ) -> Result<Site, HostError> {
        let net = Arc::new(Net::new()?);
        let shared = net.run_dir().join("shared");
        fs::create_dir(&shared).map_err(|source| HostError::File { path: shared.clone(), source })?;
        prepare(&net, &shared)?;
        let images = Images::ensure()?;
        let kernel = std::env::var_os("VMFT_GUEST_KERNEL").map_or_else(|| images.kernel(), PathBuf::from);
        let name = kernel.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let monitor = build_vmft()?;
        let mut files = vec![monitor.clone()];
        if name != "vmlinuz" {
            files.push(kernel);
        }
        let staged = net.stage_images(&images, &files)?;
        let config = HostConfig { kind: HostKind::Qemu, ..HostConfig::new(1, &shared, &staged) };
        let hosts = TestHost::boot_all(&net, count, &config)?;
        hosts.iter().try_for_each(give_name)?;
        let hosts = hosts.into_iter().map(Arc::new).collect();
        Ok(Site { hosts, started: Vec::new(), net, config, monitor, kernel: name, volumes: 0 })
    }

    /// The network that the hosts are in.
    pub fn net(&self) -> &Arc<Net> {
        &self.net
    }

    /// Host `number`, from 1.
    pub fn host(&self, number: u8) -> &TestHost {
        &self.hosts[usize::from(number) - 1]
    }

    /// Host `number`, for a thread of its own.
    pub fn shared_host(&self, number: u8) -> Arc<TestHost> {
        Arc::clone(&self.hosts[usize::from(number) - 1])
    }

    /// Boots host `number` again after a loss of power.
    pub fn reboot(&mut self, number: u8) -> Result<(), HostError> {
        self.reboot_as(number, self.config.stepping)
    }

    /// Boots host `number` with a processor of this stepping.
    pub fn reboot_as(&mut self, number: u8, stepping: u8) -> Result<(), HostError> {
        self.power_on_as(number, stepping)?;
        self.host(number).wait_ready()?;
        self.greet(number)
    }

    /// Gives host `number` power after a loss of it. It boots meanwhile; once [`TestHost::is_ready`],
    /// [`Site::greet`] makes it one of the site.
    pub fn power_on(&mut self, number: u8) -> Result<(), HostError> {
        self.power_on_as(number, self.config.stepping)
    }

    fn power_on_as(&mut self, number: u8, stepping: u8) -> Result<(), HostError> {
        let index = usize::from(number) - 1;
        self.hosts[index].kill();
        let config = HostConfig { index: number, stepping, ..self.config.clone() };
        self.hosts[index] = Arc::new(TestHost::start(&self.net, config)?);
        Ok(())
    }

    /// Gives a host that has just booted its name.
    pub fn greet(&self, number: u8) -> Result<(), HostError> {
        give_name(self.host(number))
    }

    /// Undoes what a test did to the hosts and their links.
    fn reset(&mut self) -> Result<(), HostError> {
        for number in 1..=self.hosts.len() as u8 {
            let host = self.host(number);
            if !host.is_running() {
                self.reboot(number)?;
                continue;
            }
            host.resume_storage();
            host.cont();
            Link::ALL.into_iter().try_for_each(|link| host.restore(link))?;
        }
        // The guest of the next test may be on another host than the last one's.
        self.net.forget_neighbours()
    }

    /// Kills the monitors that still run and waits until they are gone: the next ones need their taps and ports.
    /// A test that starts several pairs one after the other calls it between them.
    pub fn end_processes(&mut self) -> Result<(), HostError> {
        for started in self.started.drain(..) {
            if started.process.ending().is_none() {
                // It may end or lose its host at this moment; the wait tells.
                let _ = started.process.kill(Signal::SIGKILL);
            }
            started.process.wait_ending(SHORT)?;
        }
        Ok(())
    }

    /// Everything that the processes of the present test have written.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for Started { what, process } in &self.started {
            let ending =
                process.ending().map_or_else(|| "still runs".to_owned(), |ending| ending.to_string());
            let _ = writeln!(text, "--- {what}: {ending}");
            for line in process.output() {
                let _ = writeln!(text, "  | {line}");
            }
        }
        text
    }

    /// What each process of the present test has written, with the seconds since `epoch` before each line, and a name
    /// for its file.
    pub fn timed_logs(&self, epoch: Instant) -> Vec<(String, String)> {
        let one = |(number, Started { what, process }): (usize, &Started)| {
            let ending =
                process.ending().map_or_else(|| "still runs".to_owned(), |ending| ending.to_string());
            let mut text = format!("{what}: {ending}\n");
            for (at, line) in process.timed_output() {
                let at_s = at.saturating_duration_since(epoch).as_secs_f64();
                let _ = writeln!(text, "{at_s:9.3} {line}");
            }
            let host = what.split(':').next().unwrap_or_default().replace(' ', "");
            (format!("{number:03}-{host}.log"), text)
        };
        self.started.iter().enumerate().map(one).collect()
    }

    /// Path on this machine of a file that the hosts share.
    pub fn local_path(&self, shared: &str) -> PathBuf {
        let within = Path::new(shared).strip_prefix(self.host(1).shared_dir());
        self.config.shared.join(within.unwrap_or(Path::new(shared)))
    }

    /// A fresh disk, with claims in `name`, a directory inside the one that the hosts share.
    pub fn volume_with_claims_in(&mut self, name: &str) -> Result<Volume, HostError> {
        let volume = self.volume()?;
        let path = self.host(1).shared_dir().join(name).display().to_string();
        let arbiter = format!("dir:{path}");
        Ok(Volume { local: self.config.shared.join(name), path, arbiter, ..volume })
    }

    /// A fresh directory, disk and key.
    pub fn volume(&mut self) -> Result<Volume, HostError> {
        self.volumes += 1;
        let name = format!("volume{}", self.volumes);
        let local = self.config.shared.join(&name);
        fs::create_dir(&local).map_err(|source| HostError::File { path: local.clone(), source })?;
        make_disk(&local.join("disk.img"), DISK_MIB)?;
        make_key(&self.monitor, &local.join(KEY_FILE))?;
        let path = self.host(1).shared_dir().join(&name).display().to_string();
        let (key, disk) = (Some(format!("{path}/{KEY_FILE}")), format!("{path}/disk.img"));
        let arbiter = format!("dir:{path}");
        Ok(Volume { local, path, key, arbiter, arbiter_options: Vec::new(), disk })
    }

    /// Path on the hosts of a file among their images.
    pub fn image(&self, name: &str) -> String {
        self.host(1).images_dir().join(name).display().to_string()
    }

    /// The guest's kernel as the hosts see it.
    pub fn kernel(&self) -> String {
        self.image(&self.kernel)
    }

    /// The options that describe the guest.
    pub fn guest_options(&self, guest: &Guest, volume: &Volume) -> Vec<String> {
        let memory = guest.memory_mib.to_string();
        let address = SERVICE.0.map(|byte| byte.to_string()).join(".");
        let cmdline = format!("vmft.ip={address}/24 vmft.work={}", guest.work);
        let initrd = guest.initrd.clone().unwrap_or_else(|| self.image("guest.cpio.gz"));
        let mac = GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let pairs: [(&str, &str); 7] = [
            ("--kernel", &self.kernel()),
            ("--initrd", &initrd),
            ("--memory-mib", &memory),
            ("--disk", &volume.disk()),
            ("--tap", "tap0"),
            ("--mac", &mac),
            ("--cmdline", &cmdline),
        ];
        pairs.iter().flat_map(|(name, value)| [(*name).to_owned(), (*value).to_owned()]).collect()
    }

    /// Starts `vmft` with these arguments on host `number`.
    pub fn start(&mut self, number: u8, arguments: &[String]) -> Result<Monitor, HostError> {
        self.start_program(number, &self.image("vmft"), arguments)
    }

    /// Starts the monitor that is at `program` on host `number`.
    pub fn start_program(
        &mut self,
        number: u8,
        program: &str,
        arguments: &[String],
    ) -> Result<Monitor, HostError> {
        let mut argv = vec![program];
        argv.extend(arguments.iter().map(String::as_str));
        let process = Arc::new(self.host(number).spawn(&argv)?);
        let what = format!("host {number}: {program} {}", arguments.join(" "));
        self.started.push(Started { what, process: Arc::clone(&process) });
        Ok(Monitor { host: number, process })
    }

    /// Where a monitor on host `number` takes backups.
    pub fn log_address(&self, number: u8) -> String {
        format!("{}:{LOG_PORT}", self.host(number).address(Link::Log))
    }

    fn pair_options(&self, number: u8, guest: &Guest, volume: &Volume) -> Vec<String> {
        let listen = self.log_address(number);
        let timeout = guest.timeout_ms.to_string();
        // The details are for the log of a failed test.
        ["-v", "--arbiter", &volume.arbiter, "--listen", &listen, "--timeout-ms", &timeout]
            .into_iter()
            .chain(volume.security())
            .chain(volume.arbiter_options.iter().map(String::as_str))
            .map(String::from)
            .collect()
    }

    /// Starts a primary on host `number`.
    pub fn start_primary(
        &mut self,
        number: u8,
        guest: &Guest,
        volume: &Volume,
    ) -> Result<Monitor, HostError> {
        self.start_primary_with(number, guest, volume, &[])
    }

    /// As [`Self::start_primary`], with more options.
    pub fn start_primary_with(
        &mut self,
        number: u8,
        guest: &Guest,
        volume: &Volume,
        more: &[String],
    ) -> Result<Monitor, HostError> {
        let mut arguments = self.primary_arguments(number, guest, volume);
        arguments.extend_from_slice(more);
        self.start(number, &arguments)
    }

    /// The command line of a primary on host `number`.
    pub fn primary_arguments(&self, number: u8, guest: &Guest, volume: &Volume) -> Vec<String> {
        let mut arguments = vec!["primary".to_owned()];
        arguments.extend(self.guest_options(guest, volume));
        arguments.extend(self.pair_options(number, guest, volume));
        arguments
    }

    /// The option that names all hosts of the site.
    pub fn hosts_option(&self) -> [String; 2] {
        let addresses: Vec<String> =
            (1..=self.hosts.len() as u8).map(|number| self.log_address(number)).collect();
        ["--hosts".to_owned(), addresses.join(",")]
    }

    /// The command line of a standby on host `number`, with its disk image at `disk`.
    pub fn standby_arguments(&self, number: u8, guest: &Guest, volume: &Volume, disk: &str) -> Vec<String> {
        let mut arguments = ["standby", "--disk", disk, "--tap", "tap0"].map(String::from).to_vec();
        arguments.extend(self.pair_options(number, guest, volume));
        arguments.extend(self.hosts_option());
        arguments
    }

    /// Starts a standby on host `number`.
    pub fn start_standby(
        &mut self,
        number: u8,
        guest: &Guest,
        volume: &Volume,
    ) -> Result<Monitor, HostError> {
        self.start(number, &self.standby_arguments(number, guest, volume, &volume.disk()))
    }

    /// Starts a backup on host `number` for the monitor on host `primary`.
    pub fn start_backup(
        &mut self,
        number: u8,
        primary: u8,
        guest: &Guest,
        volume: &Volume,
    ) -> Result<Monitor, HostError> {
        self.start_backup_with(number, primary, guest, volume, &[])
    }

    /// As [`Self::start_backup`], with more options.
    pub fn start_backup_with(
        &mut self,
        number: u8,
        primary: u8,
        guest: &Guest,
        volume: &Volume,
        more: &[&str],
    ) -> Result<Monitor, HostError> {
        let mut arguments = self.backup_arguments(number, primary, guest, volume);
        arguments.extend(more.iter().map(|word| (*word).to_owned()));
        self.start(number, &arguments)
    }

    /// The command line of a backup on host `number` for the monitor on host `primary`.
    pub fn backup_arguments(&self, number: u8, primary: u8, guest: &Guest, volume: &Volume) -> Vec<String> {
        let connect = self.log_address(primary);
        let mut arguments = ["backup", "--connect", &connect, "--disk", &volume.disk(), "--tap", "tap0"]
            .map(String::from)
            .to_vec();
        arguments.extend(self.pair_options(number, guest, volume));
        arguments
    }

    /// Starts a primary on host 1 and, once its service listens, a backup on host 2; returns when it follows.
    pub fn start_pair(&mut self, guest: &Guest, volume: &Volume) -> Result<(Monitor, Monitor), HostError> {
        let primary = self.start_primary(1, guest, volume)?;
        primary.wait_for_line(SERVICE_READY, LONG)?;
        let backup = self.start_backup(2, 1, guest, volume)?;
        primary.wait_for_line(PROTECTED, LONG)?;
        Ok((primary, backup))
    }

    /// A connection to the guest's service.
    pub fn connect(&self) -> Result<TcpStream, Box<dyn std::error::Error>> {
        Ok(self.net.connect(SocketAddr::from(SERVICE), SHORT)??)
    }

    /// A client of the guest's service.
    pub fn client(&self, config: Config) -> Result<Client, Box<dyn std::error::Error>> {
        Ok(Client::start(self.connect()?, config)?)
    }

    /// Fails unless the client saw nothing but a pause and the guest has each write that it acknowledged.
    pub fn check(&self, report: &Report) -> TestResult {
        if !report.is_clean() {
            return Err(format!("the client saw: {}; wrong: {:?}", report.summary(), report.wrong).into());
        }
        let missing = report.missing_from(&dump(self.connect()?, SHORT)?);
        if !missing.is_empty() {
            return Err(format!("acknowledged writes are lost: {missing:?}").into());
        }
        Ok(())
    }
}

/// Lets the host call itself what this machine calls it.
fn give_name(host: &TestHost) -> Result<(), HostError> {
    host.run(&["hostname", &host.name()], SHORT).map(drop)
}

/// Sites that the tests of one program use: each test has one to itself. [`SharedSites::close`] must be called before the
/// program ends.
#[derive(Debug)]
pub struct SharedSites {
    hosts: u8,
    idle: Mutex<Vec<Site>>,
}

impl SharedSites {
    /// Sites of so many hosts. One is booted when a test finds none idle.
    pub const fn new(hosts: u8) -> SharedSites {
        SharedSites { hosts, idle: Mutex::new(Vec::new()) }
    }

    /// Runs one test on a site. If it fails, what its monitors wrote goes to standard error, and nobody gets these hosts
    /// again.
    pub fn run(&self, test: impl FnOnce(&mut Site) -> TestResult) -> TestResult {
        let idle = lock(&self.idle).pop();
        let mut site = match idle {
            Some(mut site) => {
                site.reset()?;
                site
            }
            None => Site::boot(self.hosts)?,
        };
        let outcome = catch_unwind(AssertUnwindSafe(|| test(&mut site)))
            .unwrap_or_else(|panic| Err(panic_text(panic.as_ref()).into()));
        match outcome {
            Ok(()) => {
                site.end_processes()?;
                lock(&self.idle).push(site);
                Ok(())
            }
            Err(error) => {
                eprintln!("{}", site.logs());
                Err(error)
            }
        }
    }

    /// Takes the hosts and their networks away.
    pub fn close(&self) {
        lock(&self.idle).clear();
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the test panicked").to_owned()
}

/// Random numbers for tests, equal for equal seeds: SplitMix64.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The numbers of this seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// Numbers from the seed in the environment variable `VMFT_SEED`, else from one made of the time. Prints it.
    pub fn from_environment() -> Random {
        let given = std::env::var("VMFT_SEED").ok().and_then(|text| text.parse().ok());
        let made = || {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.unwrap_or_default().as_millis() as u64
        };
        let seed = given.unwrap_or_else(made);
        println!("VMFT_SEED={seed}");
        Random(seed)
    }

    /// A number from `from` to `to`, both included.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        from + (mixed ^ (mixed >> 31)) % (to - from + 1)
    }
}

/// The number in an environment variable, else `default`.
pub fn count_from_environment(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// The numeric value behind `field=` in a line of a monitor's log.
pub fn field(line: &str, field: &str) -> Option<u64> {
    text_field(line, field)?.parse().ok()
}

/// The word behind `field=` in a line of a monitor's log.
pub fn text_field<'a>(line: &'a str, field: &str) -> Option<&'a str> {
    let (_, rest) = line.split_once(&format!(" {field}="))?;
    rest.split(' ').next()
}

/// Of a pair whose link is cut, exactly one continues: that one, and the one that stops.
pub fn exactly_one<'a>(
    primary: &'a Monitor,
    backup: &'a Monitor,
) -> Result<(&'a Monitor, &'a Monitor), Box<dyn std::error::Error>> {
    let deadline = Instant::now() + SHORT;
    while primary.ending().is_none() && backup.ending().is_none() && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
    let (goes_on, stops, sign) = match (primary.ending(), backup.ending()) {
        (None, Some(_)) => (primary, backup, UNPROTECTED),
        (Some(_), None) => (backup, primary, TAKEOVER),
        both => return Err(format!("one must end and one go on: {both:?}").into()),
    };
    assert_eq!(stops.ending(), Some(Ending::Exited(3)));
    println!("host {} goes on: {}", goes_on.host, goes_on.wait_for_line(sign, SHORT)?);
    Ok((goes_on, stops))
}

impl Monitor {
    /// How many lines with `text` it has written.
    pub fn count(&self, text: &str) -> usize {
        self.output().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until it has written a line about `event` that has `words` in it: the line.
    pub fn wait_for_event(
        &self,
        event: &str,
        words: &str,
        timeout: Duration,
    ) -> Result<String, Box<dyn std::error::Error>> {
        let is_it = |line: &String| line.contains(event) && line.contains(words);
        self.wait_until(&format!("{event} with '{words}'"), timeout, || self.output().into_iter().find(is_it))
    }

    /// Waits until it has written `count` lines with `text`, for `timeout` at most.
    pub fn wait_for_lines(&self, text: &str, count: usize, timeout: Duration) -> TestResult {
        let said = || (self.count(text) >= count).then_some(());
        self.wait_until(&format!("'{text}' {count} times"), timeout, said)
    }

    /// Waits until `said` finds something in what it has written, for `timeout` at most, and no longer than it runs.
    fn wait_until<T>(
        &self,
        what: &str,
        timeout: Duration,
        said: impl Fn() -> Option<T>,
    ) -> Result<T, Box<dyn std::error::Error>> {
        let deadline = Instant::now() + timeout;
        loop {
            // Before what it has said is looked at: nothing more comes after it has ended.
            let ending = self.ending();
            if let Some(found) = said() {
                return Ok(found);
            }
            if ending.is_some() || Instant::now() > deadline {
                return Err(format!("host {} did not say {what}; it ended: {ending:?}", self.host).into());
            }
            thread::sleep(LOOK);
        }
    }

    /// Waits until the guest that runs here is protected in `view`: the number of the backup's host, and when that was.
    pub fn wait_until_protected(&self, view: u64) -> Result<(u8, Instant), Box<dyn std::error::Error>> {
        let protected = format!("{PROTECTED} view={view}");
        self.wait_for_line(&protected, LONG)?;
        let mut backup = None;
        for (at, line) in self.timed_output() {
            if line.contains(TRANSFER_FINAL) {
                let name = text_field(&line, "backup").ok_or("the backup has no name")?;
                backup = Some(name.trim_start_matches("host").parse()?);
            } else if line.contains(&protected) {
                return Ok((backup.ok_or("a backup that was given nothing")?, at));
            }
        }
        Err("the line is gone".into())
    }
}

/// A file of this machine that changes when the guest's disk does.
pub fn file_hash(path: &Path) -> std::io::Result<u64> {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(&fs::read(path)?);
    Ok(hasher.finish())
}
