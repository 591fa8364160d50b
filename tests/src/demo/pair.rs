//! The two monitors of the demo, and what can be read from their lines and their answers.
//!
//! Owns: their command lines, and the kill. Must never: judge what they do (`report` does), or kill a primary that
//! `protect` does not allow to be killed.
//!
//! States: primary started -> backup started (again, if it is lost) -> protected -> primary killed -> taken over.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::host::{Follower, Monitor};
use super::options::Options;
use super::protect::{self, Look, Step};
use super::site::Site;
use super::ssh::quoted;
use super::watch::ANSWER_LIMIT;
use super::{DemoError, say};
use crate::events::{FIGURES, PROTECTED, TAKEOVER, UNPROTECTED};
use crate::hosts::Ending;

/// How long the backup tries to reach the primary.
const CONNECT_TIMEOUT_MS: &str = "60000";
/// Limit for the takeover, besides the time-outs of the monitors; it takes far less than a second.
const TAKEOVER_TIMEOUT: Duration = Duration::from_secs(30);
/// A backup that hears nobody waits for twice the time-out; the same again for a slow machine.
const TAKEOVER_TIMEOUTS: u32 = 4;
/// How long log is counted, and limit for the primary's next line about it.
const FIGURES_TIME: Duration = Duration::from_secs(5);
const FIGURES_TIMEOUT: Duration = Duration::from_secs(15);
/// How often a pair is looked at that is not protected, and a guest that has not moved.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Hosts that are network namespaces share the directory where the monitors' sockets would be by default.
const PRIMARY_CONTROL: &str = "/run/vmft/demo-primary.sock";
const BACKUP_CONTROL: &str = "/run/vmft/demo-backup.sock";
/// A monitor's status when another one owns the guest.
const CLAIM_LOST: i32 = 3;
/// The primary's lines about what it sent come with this.
const PRIMARY_LOG: &str = "RUST_LOG=info,vmft::pair::primary::supervisor=debug";

/// The monitors at work.
pub(super) struct Pair<'a> {
    site: &'a Site,
    timeout_ms: Option<String>,
    /// How long the guest may take to be protected.
    limit: Duration,
    primary: Arc<dyn Monitor>,
    /// Those that were started; the last one counts.
    backups: Vec<Arc<dyn Monitor>>,
    // Dropped last, so that the last lines are shown.
    followers: Vec<Follower>,
}

/// The takeover as the backup tells it.
pub(super) struct Takeover {
    /// From noticing to running the guest.
    pub(super) took_ms: Option<u64>,
}

impl<'a> Pair<'a> {
    /// Starts the primary. Its backup joins once the guest is up: a guest boots several times as fast without one.
    pub(super) fn start(site: &'a Site, options: &Options) -> Result<Pair<'a>, DemoError> {
        let timeout_ms = options.timeout_ms.or(site.timeout_ms).map(|ms| ms.to_string());
        let primary = start_primary(site, options, timeout_ms.as_deref())?;
        let followers = vec![Follower::start(site.hosts[0].name(), Arc::clone(&primary))];
        let limit = Duration::from_secs(options.boot_limit_s.into());
        Ok(Pair { site, timeout_ms, limit, primary, backups: Vec::new(), followers })
    }

    /// Waits until the guest would survive. Starts a backup where there is none.
    pub(super) fn protect(&mut self) -> Result<(), DemoError> {
        let deadline = Instant::now() + self.limit;
        loop {
            match protect::next(&self.look(deadline)) {
                Step::Protected => return Ok(()),
                Step::StartBackup => self.start_backup()?,
                Step::Wait => thread::sleep(LOOK_INTERVAL),
                Step::PrimaryEnded(_) => {
                    return Err(self.primary_ended().unwrap_or_else(|| self.unprotected()));
                }
                Step::GiveUp => return Err(self.unprotected()),
            }
        }
    }

    fn look(&self, deadline: Instant) -> Look {
        let primary = self.primary.ending();
        // Asked first and read last: the lines are what is known at the latest moment.
        let protected = is_protected(&self.primary.lines_from(0))
            && self.status(0).is_some_and(|status| status["protected"] == true)
            && is_protected(&self.primary.lines_from(0));
        Look {
            primary,
            protected,
            backup_runs: self.backups.last().is_some_and(|backup| backup.ending().is_none()),
            backups: self.backups.len(),
            time_left: Instant::now() < deadline,
        }
    }

    fn start_backup(&mut self) -> Result<(), DemoError> {
        if let Some(lost) = self.backups.last() {
            let ending = lost.ending().map_or_else(String::new, |ending| format!(": it {ending}"));
            say(&format!("the guest has lost its backup{ending}; starting another"));
        }
        let host = &self.site.hosts[1];
        let backup = host.start(&backup_line(self.site, self.timeout_ms.as_deref()))?;
        self.followers.push(Follower::start(host.name(), Arc::clone(&backup)));
        self.backups.push(backup);
        Ok(())
    }

    /// What a monitor answers on its control socket: the primary (0) or the backup (1). `None`: nothing useful.
    fn status(&self, host: usize) -> Option<serde_json::Value> {
        let control = [PRIMARY_CONTROL, BACKUP_CONTROL][host];
        let ask = format!("{} status --control {control} --json", quoted(&self.site.files.monitor));
        serde_json::from_str(&self.site.hosts[host].shell(&ask).ok()?).ok()
    }

    fn unprotected(&self) -> DemoError {
        let last = |monitor: &Arc<dyn Monitor>| monitors_last(&monitor.lines_from(0));
        DemoError::Unprotected {
            limit_s: self.limit.as_secs(),
            backups: self.backups.len(),
            primary: last(&self.primary),
            backup: self.backups.last().map_or_else(String::new, last),
        }
    }

    /// How often the guest got a backup.
    pub(super) fn backups(&self) -> usize {
        self.backups.len()
    }

    /// What the primary says of the kernel.
    pub(super) fn kernel(&self) -> String {
        let kernel = self.primary.lines_from(0).into_iter().find_map(|line| {
            let (_, version) = line.split_once("kernel loaded ")?.1.split_once("version=\"")?;
            Some(version.split('"').next()?.to_owned())
        });
        kernel.unwrap_or_else(|| "of unknown version".into())
    }

    /// True if the guest prints this in time.
    pub(super) fn guest_prints(&self, text: &str, timeout: Duration) -> bool {
        self.primary.wait_for(0, timeout, &|line| line.contains(text)).is_some()
    }

    /// True if a line of the guest's console after the first `seen` lines, finished or not, has this text. Counts on.
    pub(super) fn console_says(&self, seen: &mut usize, text: &str) -> bool {
        // Looked at first: it may be finished meanwhile, and then it is among the lines.
        let unfinished = self.primary.unfinished_line();
        let lines = self.primary.lines_from(*seen);
        *seen += lines.len();
        lines.iter().any(|line| !is_monitors(line) && line.contains(text)) || unfinished.contains(text)
    }

    /// The last line of the guest's console that says something.
    pub(super) fn last_console_line(&self) -> String {
        let lines = self.primary.lines_from(0);
        let last = lines.into_iter().rev().find(|line| !is_monitors(line) && !line.trim().is_empty());
        last.unwrap_or_default()
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

    /// An error if the primary has ended by itself: then there is nothing to take over.
    pub(super) fn primary_ended(&self) -> Option<DemoError> {
        let ending = self.primary.ending()?;
        let last = self.primary.lines_from(0).pop().unwrap_or_default();
        Some(match ending {
            Ending::Exited(CLAIM_LOST) => DemoError::TakenOverEarly { last },
            _ => DemoError::EndedEarly { ending, last },
        })
    }

    /// SIGKILL for the primary, at a moment at which the guest is protected.
    pub(super) fn kill_primary(&mut self) -> Result<(), DemoError> {
        self.protect()?;
        let seen = self.primary.lines_from(0).len();
        self.primary.kill()?;
        say(&format!("killed the monitor on {}", self.site.hosts[0].name()));
        // Protection may be lost between the look and the signal: then the kill has shown nothing.
        let lost = self.primary.lines_from(seen).into_iter().find(|line| is_about(line, UNPROTECTED));
        lost.map_or(Ok(()), |line| Err(DemoError::LostInThatMoment { line }))
    }

    /// Waits until the backup says that it runs the guest. `None`: it does not.
    pub(super) fn wait_takeover(&self) -> Option<Takeover> {
        let announced = |line: &str| line.contains(TAKEOVER);
        let timeout_ms = self.timeout_ms.as_deref().and_then(|ms| ms.parse().ok()).unwrap_or(0);
        let limit = TAKEOVER_TIMEOUT + TAKEOVER_TIMEOUTS * Duration::from_millis(timeout_ms);
        let (line, _) = self.backups.last()?.wait_for(0, limit, &announced)?;
        Some(Takeover { took_ms: field(&line, "took_ms") })
    }

    /// The guest's positions on its new host, an earlier and a later one, or why there is no later one.
    pub(super) fn moves_on(&self) -> Result<(u64, u64), String> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut first = None;
        loop {
            let over = Instant::now() > deadline;
            if let Some(ending) = self.backups.last().and_then(|backup| backup.ending()) {
                return Err(format!("the monitor on {} {ending}", self.site.hosts[1].name()));
            }
            let status = self.status(1).filter(|status| status["role"] == "primary");
            let position = status.and_then(|status| status["figures"]["anchors"].as_u64());
            match (first, position) {
                (Some(from), Some(to)) if to > from => return Ok((from, to)),
                (None, Some(_)) => first = position,
                _ if over => {
                    let at = first.map_or_else(|| "unknown".to_owned(), |at| at.to_string());
                    return Err(format!("its position was {at} for {} s", ANSWER_LIMIT.as_secs()));
                }
                _ => thread::sleep(LOOK_INTERVAL),
            }
        }
    }

    /// Ends what still runs.
    pub(super) fn stop(self) -> Result<(), DemoError> {
        for monitor in self.backups.iter().chain([&self.primary]) {
            if monitor.ending().is_none() {
                monitor.kill()?;
            }
        }
        Ok(())
    }
}

fn start_primary(
    site: &Site,
    options: &Options,
    timeout_ms: Option<&str>,
) -> Result<Arc<dyn Monitor>, DemoError> {
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
    line.extend(["--key-file", &files.key, "--control", PRIMARY_CONTROL]);
    line.extend(timeout_ms.into_iter().flat_map(|ms| ["--timeout-ms", ms]));
    site.hosts[0].start(&line)
}

fn backup_line<'a>(site: &'a Site, timeout_ms: Option<&'a str>) -> Vec<&'a str> {
    let files = &site.files;
    let mut line = vec![&*files.monitor, "backup", "--connect", &site.listen];
    line.extend(["--connect-timeout-ms", CONNECT_TIMEOUT_MS, "--disk", &files.disk, "--tap", &site.tap]);
    line.extend(["--arbiter", &files.arbiter, "--key-file", &files.key, "--control", BACKUP_CONTROL]);
    line.extend(timeout_ms.into_iter().flat_map(|ms| ["--timeout-ms", ms]));
    line
}

/// Whether a primary's last word on it is that the guest is protected.
fn is_protected(lines: &[String]) -> bool {
    let last = lines.iter().rev().find(|line| is_about(line, PROTECTED) || is_about(line, UNPROTECTED));
    last.is_some_and(|line| is_about(line, PROTECTED))
}

/// Whether this is a monitor's own line with this text; a guest may print what it likes.
fn is_about(line: &str, text: &str) -> bool {
    is_monitors(line) && line.contains(text)
}

/// The last line that is a monitor's own.
fn monitors_last(lines: &[String]) -> String {
    let own = |line: &&String| is_monitors(line) || line.starts_with("vmft: ");
    lines.iter().rev().find(own).cloned().unwrap_or_default()
}

/// Seconds of the day and bytes sent so far, from a primary's line about what it sent.
fn figures(line: &str) -> Option<(f64, u64)> {
    let bytes = field(line.split_once(FIGURES)?.1, "log_bytes")?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_primarys_line() {
        let line =
            "2026-01-02T10:20:30.500000Z DEBUG pair so far event=figures log_bytes=4711 batches=12 outputs=9";
        assert_eq!(figures(line), Some((37_230.5, 4711)));
        for other in [
            "2026-01-02T10:20:30.5Z  INFO protected event=protected log_bytes=1",
            "event=figures log_bytes=1",
            "",
        ] {
            assert_eq!(figures(other), None, "{other}");
        }
    }

    #[test]
    fn last_word_of_the_primary_counts() {
        let time = "2026-01-02T10:20:30.500000Z  WARN";
        let protected = format!("{time} {PROTECTED} view=1");
        let unprotected = format!("{time} {UNPROTECTED} view=2");
        let other = format!("{time} something else");
        let lines = |lines: &[&String]| lines.iter().map(|line| (*line).clone()).collect::<Vec<_>>();
        assert!(!is_protected(&[]));
        assert!(is_protected(&lines(&[&protected, &other])));
        assert!(!is_protected(&lines(&[&protected, &unprotected, &other])));
        assert!(is_protected(&lines(&[&protected, &unprotected, &protected])));
        // The guest's own words do not count.
        assert!(!is_protected(&lines(&[&unprotected, &PROTECTED.to_owned()])));
        assert!(is_protected(&lines(&[&protected, &UNPROTECTED.to_owned()])));
        assert_eq!(monitors_last(&lines(&[&protected, &"login:".to_owned()])), protected);
        assert_eq!(monitors_last(&lines(&[&protected, &"vmft: no".to_owned()])), "vmft: no");
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
