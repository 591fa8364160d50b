//! Runs a command on fresh test hosts, for people at work on vmft.
//!
//! It boots the hosts, runs the command on each with its output passed on, and exits with the worst status.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use vmft_tests::hosts::{
    Ending, HostConfig, HostError, HostKind, HostProcess, Images, Net, TestHost, make_disk,
};

const USAGE: &str = "usage: vmft-host run [OPTION]... -- COMMAND...
Boots test hosts and runs COMMAND on them. On a host:
  /images   read-only: vmlinuz, guest.cpio.gz and the files given by --add
  /shared   read-write, the same on all hosts; disk.img in it is a fresh ext4 disk of 64 MiB
  br0       bridge to the guests' LAN; tap0 is a tap that is joined to it
  eth1      logging link; host N has 10.78.0.(100+N) there
Options:
  --count N      boot N hosts (default 1); COMMAND runs on each, with HOST=1, 2, ... in its environment
  --add FILE     put FILE into /images; may be repeated
  --images DIR   mount DIR at /images in place of all that
  --share DIR    mount DIR at /shared (default: a new directory); no disk.img is made there
  --memory MIB   memory of a host (default 1024)
  --vcpus N      processors of a host (default 1)
  --timeout S    give up after S seconds (default 300)
  --netns        the hosts are network namespaces and use this machine's own /dev/kvm
  --console      print the consoles of the hosts at the end";

const DISK_MIB: u32 = 64;

/// How often the output of the command is passed on.
const OUTPUT_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("{0}\n{USAGE}")]
    Usage(String),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("Cannot use {path}: {source}")]
    File { path: PathBuf, source: io::Error },
}

struct Options {
    kind: HostKind,
    count: u8,
    add: Vec<PathBuf>,
    images: Option<PathBuf>,
    share: Option<PathBuf>,
    memory_mib: u32,
    vcpus: u32,
    timeout: Duration,
    console: bool,
    command: Vec<String>,
}

fn main() -> ExitCode {
    match parse(env::args().skip(1)).and_then(|options| run(&options)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("vmft-host: {error}");
            ExitCode::from(125)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, RunError> {
    let usage = |message: &str| RunError::Usage(message.to_owned());
    let mut options = Options {
        kind: HostKind::Qemu,
        count: 1,
        add: Vec::new(),
        images: None,
        share: None,
        memory_mib: 1024,
        vcpus: 1,
        timeout: Duration::from_secs(300),
        console: false,
        command: Vec::new(),
    };
    if arguments.next().as_deref() != Some("run") {
        return Err(usage("The first argument must be 'run'."));
    }
    while let Some(option) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| usage(&format!("{option} needs a value.")));
        match option.as_str() {
            "--count" => options.count = number(&option, &value()?)?,
            "--add" => options.add.push(value()?.into()),
            "--images" => options.images = Some(value()?.into()),
            "--share" => options.share = Some(value()?.into()),
            "--memory" => options.memory_mib = number(&option, &value()?)?,
            "--vcpus" => options.vcpus = number(&option, &value()?)?,
            "--timeout" => options.timeout = Duration::from_secs(number(&option, &value()?)?),
            "--netns" => options.kind = HostKind::Netns,
            "--console" => options.console = true,
            "--" => options.command = arguments.by_ref().collect(),
            _ => return Err(usage(&format!("Unknown option {option}."))),
        }
    }
    if options.command.is_empty() || !(1..=99).contains(&options.count) {
        return Err(usage("There must be a command behind '--', and 1 to 99 hosts."));
    }
    Ok(options)
}

fn number<T: std::str::FromStr>(option: &str, value: &str) -> Result<T, RunError> {
    value.parse().map_err(|_| RunError::Usage(format!("{option} cannot be '{value}'.")))
}

fn run(options: &Options) -> Result<u8, RunError> {
    let net = Arc::new(Net::new()?);
    let images = match &options.images {
        Some(dir) => absolute(dir)?,
        None => net.stage_images(&Images::ensure()?, &options.add)?,
    };
    let share = match &options.share {
        Some(dir) => absolute(dir)?,
        None => {
            let dir = net.run_dir().join("shared");
            fs::create_dir_all(&dir).map_err(|source| RunError::File { path: dir.clone(), source })?;
            make_disk(&dir.join("disk.img"), DISK_MIB)?;
            dir
        }
    };
    let config = HostConfig {
        kind: options.kind,
        memory_mib: options.memory_mib,
        vcpus: options.vcpus,
        ..HostConfig::new(1, &share, &images)
    };
    let started = Instant::now();
    let hosts = TestHost::boot_all(&net, options.count, &config)?;
    eprintln!("vmft-host: {} host(s) up after {} ms", hosts.len(), started.elapsed().as_millis());

    let command: Vec<&str> = options.command.iter().map(String::as_str).collect();
    let processes = hosts
        .iter()
        .map(|host| host.spawn_with(&command, &[("HOST", &host.index().to_string())], None))
        .collect::<Result<Vec<_>, _>>()?;
    let status = follow(&processes, options.timeout);
    if options.console {
        for host in &hosts {
            eprintln!("vmft-host: console of {}:\n{}", host.name(), host.console());
        }
    }
    Ok(status)
}

fn absolute(dir: &Path) -> Result<PathBuf, RunError> {
    dir.canonicalize().map_err(|source| RunError::File { path: dir.to_owned(), source })
}

/// Passes the output of the processes on until all have ended or time is up; returns the highest status.
fn follow(processes: &[HostProcess], timeout: Duration) -> u8 {
    let deadline = Instant::now() + timeout;
    let mut seen = vec![0; processes.len()];
    loop {
        let endings: Vec<Option<Ending>> = processes.iter().map(HostProcess::ending).collect();
        for (index, process) in processes.iter().enumerate() {
            let lines = process.output_from(seen[index]);
            seen[index] += lines.len();
            for line in lines {
                match processes.len() {
                    1 => println!("{line}"),
                    _ => println!("[{}] {line}", index + 1),
                }
            }
        }
        if let Some(endings) = endings.into_iter().collect::<Option<Vec<_>>>() {
            for ending in endings.iter().filter(|ending| **ending != Ending::Exited(0)) {
                eprintln!("vmft-host: the command {ending}");
            }
            return endings.iter().map(status_of).max().unwrap_or_default();
        }
        if Instant::now() > deadline {
            eprintln!("vmft-host: the command did not end within {timeout:?}");
            return 124;
        }
        thread::sleep(OUTPUT_INTERVAL);
    }
}

/// As a shell reports it.
fn status_of(ending: &Ending) -> u8 {
    match ending {
        Ending::Exited(status) => u8::try_from(*status).unwrap_or(255),
        Ending::Killed(signal) => u8::try_from(128 + signal).unwrap_or(255),
        Ending::Lost(_) => 125,
    }
}
