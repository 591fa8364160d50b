//! The two monitors of the demo, and what can be read from their lines.
//!
//! Owns: their command lines. Must never: judge what they do; `report` does.
//!
//! States: started -> protected -> primary killed -> taken over.

use std::sync::Arc;
use std::time::Duration;

use super::host::{Follower, Monitor};
use super::options::Options;
use super::site::Site;
use super::{DemoError, say};
use crate::pair::{PAIR_FIGURES, PROTECTED, TAKEOVER};

/// Limit for the guest's snapshot to reach the backup.
const PROTECTED_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the backup tries to reach the primary, which opens its files and loads the kernel first.
const CONNECT_TIMEOUT_MS: &str = "60000";
/// Limit for the takeover; it takes far less than a second.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long log is counted, and limit for the primary's next line about it.
const FIGURES_TIME: Duration = Duration::from_secs(5);
const FIGURES_TIMEOUT: Duration = Duration::from_secs(15);
/// Limit for the console's answer to a key.
const CONSOLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Hosts that are network namespaces share the directory where the monitors' sockets would be by default.
const PRIMARY_CONTROL: &str = "/run/vmft/demo-primary.sock";
const BACKUP_CONTROL: &str = "/run/vmft/demo-backup.sock";
/// The primary's lines about what it sent come with this.
const PRIMARY_LOG: &str = "RUST_LOG=info,vmft::ft::supervise=debug";

/// The monitors at work.
pub(super) struct Pair<'a> {
    site: &'a Site,
    primary: Arc<dyn Monitor>,
    backup: Arc<dyn Monitor>,
    /// Fifo on the backup's host: the backup's standard input.
    keys: String,
    // Dropped first of those that hold the monitors, so that the last lines are shown.
    _followers: [Follower; 2],
}

/// The takeover as the backup tells it.
pub(super) struct Takeover {
    /// From noticing to running the guest.
    pub(super) took_ms: Option<u64>,
    /// Lines of the backup up to its announcement.
    seen: usize,
}

impl<'a> Pair<'a> {
    /// Starts both.
    pub(super) fn start(site: &'a Site, options: &Options) -> Result<Pair<'a>, DemoError> {
        let [first, second] = &site.hosts;
        let primary = start_primary(site, options)?;
        let keys = format!("{}/keys", site.files.shared);
        let backup = second.start(&backup_line(site, &keys))?;
        let followers = [(first, &primary), (second, &backup)]
            .map(|(host, monitor)| Follower::start(host.name(), Arc::clone(monitor)));
        Ok(Pair { site, primary, backup, keys, _followers: followers })
    }

    /// Waits until the guest would survive, and returns what the primary says of the kernel.
    pub(super) fn wait_protected(&self) -> Result<String, DemoError> {
        let protected = |line: &str| line.contains(PROTECTED);
        if self.primary.wait_for(0, PROTECTED_TIMEOUT, &protected).is_none() {
            let said = |monitor: &Arc<dyn Monitor>| monitor.lines_from(0).pop().unwrap_or_default();
            return Err(DemoError::NotProtected { primary: said(&self.primary), backup: said(&self.backup) });
        }
        let kernel = self.primary.lines_from(0).into_iter().find_map(|line| {
            let (_, version) = line.split_once("kernel loaded ")?.1.split_once("version=\"")?;
            Some(version.split('"').next()?.to_owned())
        });
        Ok(kernel.unwrap_or_else(|| "of unknown version".into()))
    }

    /// True if the guest prints this in time.
    pub(super) fn guest_prints(&self, text: &str, timeout: Duration) -> bool {
        self.primary.wait_for(0, timeout, &|line| line.contains(text)).is_some()
    }

    /// Bytes of log per second, between the next two of the primary's lines about it.
    pub(super) fn log_bytes_per_s(&self) -> Option<f64> {
        let mut seen = self.primary.lines_from(0).len();
        let mut next = || {
            let (line, end) =
                self.primary.wait_for(seen, FIGURES_TIMEOUT, &|line| figures(line).is_some())?;
            seen = end;
            figures(&line)
        };
        let (from_s, from_bytes) = next()?;
        let (to_s, to_bytes) = loop {
            let (to_s, to_bytes) = next()?;
            if (to_s - from_s).rem_euclid(86_400.0) >= FIGURES_TIME.as_secs_f64() {
                break (to_s, to_bytes);
            }
        };
        // Times are of the day, which may have ended between.
        let seconds = (to_s - from_s).rem_euclid(86_400.0);
        Some(to_bytes.checked_sub(from_bytes)? as f64 / seconds)
    }

    /// Number of lines that the guest has printed on the primary's host.
    pub(super) fn console_lines(&self) -> usize {
        console_lines(&self.primary.lines_from(0))
    }

    /// SIGKILL for the primary. An error if it has ended by itself: then there is nothing to take over.
    pub(super) fn kill_primary(&self) -> Result<(), DemoError> {
        if let Some(ending) = self.primary.ending() {
            let last = self.primary.lines_from(0).pop().unwrap_or_default();
            return Err(DemoError::EndedEarly { ending, last });
        }
        say(&format!("killing the monitor on {}", self.site.hosts[0].name()));
        self.primary.kill()
    }

    /// Waits until the backup says that it runs the guest. `None`: it does not.
    pub(super) fn wait_takeover(&self) -> Option<Takeover> {
        let announced = |line: &str| line.contains(TAKEOVER);
        let (line, seen) = self.backup.wait_for(0, TAKEOVER_TIMEOUT, &announced)?;
        Some(Takeover { took_ms: field(&line, "took_ms"), seen })
    }

    /// Types Enter on the guest's console after the takeover; returns the number of lines that it then printed.
    pub(super) fn console_answers(&self, takeover: &Takeover) -> Result<usize, DemoError> {
        self.site.hosts[1].shell(&format!("echo >{}", super::ssh::quoted(&self.keys)))?;
        let printed = |line: &str| !is_monitors(line);
        // None: no line came, which the count below shows.
        let _ = self.backup.wait_for(takeover.seen, CONSOLE_TIMEOUT, &printed);
        Ok(console_lines(&self.backup.lines_from(takeover.seen)))
    }

    /// Ends what still runs.
    pub(super) fn stop(self) -> Result<(), DemoError> {
        for monitor in [&self.primary, &self.backup] {
            if monitor.ending().is_none() {
                monitor.kill()?;
            }
        }
        Ok(())
    }
}

fn start_primary(site: &Site, options: &Options) -> Result<Arc<dyn Monitor>, DemoError> {
    let files = &site.files;
    let (address, prefix_len) = options.guest_ip;
    let cmdline = format!("vmft.ip={address}/{prefix_len} {}", options.cmdline);
    let memory_mib = options.memory_mib.to_string();
    let mut line = vec!["env", PRIMARY_LOG, &files.monitor, "primary", "--kernel", &files.kernel];
    if let Some(initrd) = &files.initrd {
        line.extend(["--initrd", initrd]);
    }
    line.extend(["--memory-mib", &memory_mib, "--disk", &files.disk, "--tap", &site.tap]);
    line.extend(["--cmdline", cmdline.trim_end(), "--arbiter", &files.arbiter, "--listen", &site.listen]);
    line.extend(["--key-file", &files.key]);
    line.extend(["--control", PRIMARY_CONTROL]);
    site.hosts[0].start(&line)
}

fn backup_line<'a>(site: &'a Site, keys: &'a str) -> Vec<&'a str> {
    let files = &site.files;
    // Open for both directions, the fifo neither blocks its opening nor ends when a writer does.
    let with_keys = r#"mkfifo "$0" && exec "$@" <>"$0""#;
    let mut line = vec!["sh", "-c", with_keys, keys, &files.monitor, "backup", "--connect", &site.listen];
    line.extend(["--connect-timeout-ms", CONNECT_TIMEOUT_MS, "--disk", &files.disk, "--tap", &site.tap]);
    line.extend(["--arbiter", &files.arbiter, "--key-file", &files.key, "--control", BACKUP_CONTROL]);
    line
}

/// Seconds of the day and bytes sent so far, from a primary's line about what it sent.
fn figures(line: &str) -> Option<(f64, u64)> {
    let bytes = field(line.split_once(PAIR_FIGURES)?.1, "log_bytes")?;
    let (_, time) = line.split_once('T')?;
    let mut parts = time.split_once('Z')?.0.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (h, m, s) = (parts.next()??, parts.next()??, parts.next()??);
    Some((h * 3600.0 + m * 60.0 + s, bytes))
}

/// The number behind `name=` in a monitor's line.
fn field(line: &str, name: &str) -> Option<u64> {
    line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// The monitor's own lines start with a date and time.
fn is_monitors(line: &str) -> bool {
    let pattern = b"0000-00-00T00:00:00";
    line.len() > pattern.len()
        && line.bytes().zip(pattern).all(|(byte, form)| match form {
            b'0' => byte.is_ascii_digit(),
            other => byte == *other,
        })
}

fn console_lines(lines: &[String]) -> usize {
    lines.iter().filter(|line| !is_monitors(line)).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_primarys_line() {
        let line = "2026-01-02T10:20:30.500000Z DEBUG pair so far log_bytes=4711 batches=12 outputs=9";
        assert_eq!(figures(line), Some((37_230.5, 4711)));
        for other in ["2026-01-02T10:20:30.5Z  INFO protected: log_bytes=1", "pair so far log_bytes=1", ""] {
            assert_eq!(figures(other), None, "{other}");
        }
    }

    #[test]
    fn console_is_told_from_the_monitor() {
        assert!(is_monitors(
            "2026-01-02T10:20:30.500000Z  WARN takeover: this host now runs the guest view=2"
        ));
        for line in ["", "/ # ", "[    0.452000] Linux version", "2026-01-02 10:20:30", "2026-01-02T10:20:30"]
        {
            assert!(!is_monitors(line), "{line}");
        }
        assert_eq!(field("a took_ms=107", "took_ms"), Some(107));
        assert_eq!(field("a took_msx=107 took_ms=x", "took_ms"), None);
    }
}
