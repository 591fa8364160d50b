//! Names for what a test creates on this machine, and the removal of what killed tests left behind.
//!
//! A name is `vmft-PID-STARTTIME-N`: network namespaces and run directories carry it, and its owner is alive as
//! long as there is a process with this number that started at this time (field 22 of /proc/PID/stat).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{HostError, tool};

const PREFIX: &str = "vmft-";

/// A name that no other test uses.
pub(super) fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    let pid = std::process::id();
    let start = start_time(pid).unwrap_or_default();
    format!("{PREFIX}{pid}-{start}-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The directory for the files of the test with this name.
pub(super) fn run_dir(name: &str) -> PathBuf {
    runs().join(name)
}

/// Removes the namespaces, processes and directories of tests that are no longer alive.
pub(super) fn remove_orphans() -> Result<(), HostError> {
    for line in tool::run("ip netns list")?.lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        // Another test may be at the same; whoever comes second fails, and its orphan is gone.
        if is_orphan(name)
            && let Err(error) = remove_namespace(name)
        {
            eprintln!("{error}");
        }
    }
    let runs = runs();
    fs::create_dir_all(&runs).map_err(HostError::file(&runs))?;
    for entry in fs::read_dir(&runs).map_err(HostError::file(&runs))?.flatten() {
        if is_orphan(&entry.file_name().to_string_lossy()) {
            unmount_below(&entry.path());
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Kills what runs in a network namespace and removes it with all its interfaces.
pub(super) fn remove_namespace(name: &str) -> Result<(), HostError> {
    signal_namespace(name, Signal::SIGKILL)?;
    tool::run(&format!("ip netns del {name}"))?;
    Ok(())
}

/// Sends a signal to each process in a network namespace.
pub(super) fn signal_namespace(name: &str, signal: Signal) -> Result<(), HostError> {
    for pid in
        tool::run(&format!("ip netns pids {name}"))?.lines().filter_map(|line| line.trim().parse().ok())
    {
        // A process that has just ended is as good as signalled.
        let _ = kill(Pid::from_raw(pid), signal);
    }
    Ok(())
}

/// Takes away the file systems that a test has mounted inside its directory.
pub(super) fn unmount_below(dir: &Path) {
    // A mount of this machine's own cannot be told from a directory without this file; then removal says what is left.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mounted in mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new) {
        if mounted.starts_with(dir)
            && let Err(error) = umount2(mounted, MntFlags::MNT_DETACH)
        {
            eprintln!("{} cannot be unmounted: {error}", mounted.display());
        }
    }
}

fn runs() -> PathBuf {
    std::env::temp_dir().join("vmft-runs")
}

fn is_orphan(name: &str) -> bool {
    let mut parts = name.strip_prefix(PREFIX).unwrap_or_default().split('-').map(str::parse::<u64>);
    match (parts.next(), parts.next()) {
        (Some(Ok(pid)), Some(Ok(start))) => u32::try_from(pid).ok().and_then(start_time) != Some(start),
        _ => false,
    }
}

fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name, in parentheses, may contain anything; the fields behind it start with number 3.
    stat.rsplit_once(')')?.1.split_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_owners_are_orphans() {
        let own = unique_name();
        assert!(!is_orphan(&own));
        let pid = std::process::id();
        assert!(is_orphan(&format!("vmft-{pid}-1-1")), "another process had this number");
        assert!(is_orphan("vmft-4194999-1-1-h1"), "no process has this number");
        assert!(!is_orphan("vmft-x"));
        assert!(!is_orphan("someone-elses"));
    }
}
