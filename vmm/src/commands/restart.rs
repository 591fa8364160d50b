//! Starting over: the process executes its own program again, as a standby or as the backup of another.
//!
//! Owns: the command line of the new life, made from that of the old one. Must never: let anything of the old life go
//! on. Executing a program ends all other threads, closes the disk, the tap and the sockets, and gives the guest's
//! memory back; the process keeps its number and its standard streams.
//!
//! ```text
//!   claim lost ─┬─ started with --hosts, not stopped by the operator ──> `vmft standby` in the same process
//!               └─ otherwise ──> status 3
//!   handed over (`vmft switch`) ──> `vmft backup --connect`, to the monitor that has the guest now
//! ```

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::{ArgAction, CommandFactory};

use super::CommandError;
use crate::config::Cli;
use crate::host::LogEvent;
use crate::host::log;
use crate::launch::{Ending, LaunchError, asked_to_end};

/// The subcommand of the new life.
const STANDBY: &str = "standby";
const BACKUP: &str = "backup";
/// Options of a backup that are not those of its old life: whom it follows, and faults for tests.
const NOT_KEPT: [&str; 6] = [
    "connect",
    "connect_timeout_ms",
    "inject_missed_stop",
    "inject_corruption",
    "inject_again",
    "inject_slowness",
];
/// How long it tries to reach the monitor that has the guest now.
const SUCCESSOR_TIMEOUT_MS: u64 = 30_000;

/// What becomes of a process that has lost its claim. Returns if it ends.
///
/// # Errors
/// The host does not execute the program.
pub(super) fn after_lost_claim() -> Result<Ending, CommandError> {
    match standby_words(std::env::args_os()) {
        Some(words) if !asked_to_end() => {
            tracing::warn!(event = %LogEvent::Restart, role = "standby", "this monitor starts over as a standby");
            Err(execute(&words))
        }
        _ => Ok(Ending::LostClaim),
    }
}

/// As [`after_lost_claim`], for a thread that cannot return: ends the process in any case.
pub(super) fn leave_after_lost_claim() -> ! {
    let status = match after_lost_claim() {
        Ok(ending) => ending.status(),
        Err(error) => {
            tracing::error!("{}", crate::with_causes(&error));
            error.status()
        }
    };
    log::flush();
    std::process::exit(i32::from(status))
}

/// Starts over as a standby, whatever it was. Returns if that is not possible.
pub(super) fn as_standby() -> CommandError {
    match standby_words(std::env::args_os()) {
        Some(words) => execute(&words),
        None => CommandError::Unfit("this monitor was started without --hosts".into()),
    }
}

/// Starts over as the backup of the monitor that takes backups at `successor`. Returns if that is not possible.
pub(super) fn as_backup_of(successor: SocketAddr) -> CommandError {
    match backup_words(std::env::args_os(), successor) {
        Some(words) => execute(&words),
        None => CommandError::Unfit("this monitor's command line cannot be read again".into()),
    }
}

fn execute(words: &[OsString]) -> CommandError {
    // It ends the thread that writes the log.
    log::flush();
    // The program that runs, even if another one has its name by now.
    let error = Command::new("/proc/self/exe").args(words).exec();
    LaunchError::host("execute the monitor's program again")(error).into()
}

/// The words behind the program's name with which a process that was started with `words` becomes a standby: each of
/// its options that `standby` has, as it was given. `None`: it was started without --hosts.
fn standby_words(words: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let (words, has_hosts) = words_for(STANDBY, &[], words)?;
    has_hosts.then_some(words)
}

/// The same for the backup of the monitor at `successor`.
fn backup_words(words: impl IntoIterator<Item = OsString>, successor: SocketAddr) -> Option<Vec<OsString>> {
    let (mut words, _) = words_for(BACKUP, &NOT_KEPT, words)?;
    words.push(format!("--connect={successor}").into());
    words.push(format!("--connect-timeout-ms={SUCCESSOR_TIMEOUT_MS}").into());
    Some(words)
}

/// The subcommand `name` with each option that a process which was started with `words` was given and the subcommand
/// has, but for `not_kept`. And whether --hosts is one of them.
fn words_for(
    name: &str,
    not_kept: &[&str],
    words: impl IntoIterator<Item = OsString>,
) -> Option<(Vec<OsString>, bool)> {
    let mut command = Cli::command();
    // Options that all commands share reach the subcommands now.
    command.build();
    let matches = command.clone().try_get_matches_from(words).ok()?;
    let (_, given) = matches.subcommand()?;
    let mut again = vec![OsString::from(name)];
    let mut has_hosts = false;
    for option in command.find_subcommand(name)?.get_arguments() {
        let (id, Some(name)) = (option.get_id().as_str(), option.get_long()) else { continue };
        if not_kept.contains(&id)
            || !matches!(given.try_contains_id(id), Ok(true))
            || given.value_source(id) != Some(clap::parser::ValueSource::CommandLine)
        {
            continue;
        }
        has_hosts |= id == "hosts";
        match option.get_action() {
            ArgAction::Count => {
                again.extend((0..given.get_count(id)).map(|_| OsString::from(format!("--{name}"))));
            }
            ArgAction::SetTrue => again.push(format!("--{name}").into()),
            _ => {
                for value in given.get_raw(id)? {
                    let mut word = OsString::from(format!("--{name}="));
                    word.push(value);
                    again.push(word);
                }
            }
        }
    }
    Some((again, has_hosts))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn standby(line: &str) -> Option<String> {
        let words = standby_words(line.split(' ').map(OsString::from))?;
        let words: Vec<String> = words.into_iter().map(|word| word.into_string().unwrap()).collect();
        Cli::try_parse_from([&["vmft".to_owned()][..], &words].concat()).unwrap();
        Some(words.join(" "))
    }

    #[test]
    fn a_primary_keeps_what_a_standby_needs() {
        let line = "vmft -v primary --kernel k --initrd i --memory-mib 128 --disk /d.img --tap tap0 \
                    --mac 52:54:00:12:34:56 --name web --arbiter dir:/s --listen 192.0.2.1:7700 --timeout-ms 800 \
                    --hosts 192.0.2.1,192.0.2.2";
        let words = standby(line).unwrap();
        let (command, mut options) =
            words.split_once(' ').map(|(a, b)| (a, b.split(' ').collect::<Vec<_>>())).unwrap();
        options.sort_unstable();
        assert_eq!(command, "standby");
        let kept = [
            "--arbiter=dir:/s",
            "--disk=/d.img",
            "--hosts=192.0.2.1,192.0.2.2",
            "--listen=192.0.2.1:7700",
            "--name=web",
            "--tap=tap0",
            "--timeout-ms=800",
            "--verbose",
        ];
        assert_eq!(options, kept);
    }

    #[test]
    fn a_backup_keeps_all_but_its_primary_and_a_standby_stays_as_it_is() {
        let follow = "--arbiter=dir:/s --disk=/d --listen=192.0.2.1:7700 --hosts=192.0.2.2 --position=step";
        let sorted = |line: String| {
            let mut words: Vec<String> = line.split(' ').map(String::from).collect();
            words.sort_unstable();
            words
        };
        let expected = sorted(format!("standby {follow}"));
        let backup = standby(&format!("vmft backup --connect 192.0.2.2:7700 {follow}")).unwrap();
        assert_eq!(sorted(backup), expected);
        assert_eq!(sorted(standby(&format!("vmft standby {follow}")).unwrap()), expected);
    }

    #[test]
    fn who_hands_the_guest_over_follows_with_what_it_was_given() {
        let successor = "192.0.2.2:7701".parse().unwrap();
        let backup = |line: &str| {
            let words = backup_words(line.split_whitespace().map(OsString::from), successor)?;
            let words: Vec<String> = words.into_iter().map(|word| word.into_string().unwrap()).collect();
            Cli::try_parse_from([&["vmft".to_owned()][..], &words].concat()).unwrap();
            let mut words = words.join(" ").split(' ').map(String::from).collect::<Vec<_>>();
            words[1..].sort_unstable();
            Some(words.join(" "))
        };
        let kept = "--arbiter=dir:/s --connect-timeout-ms=30000 --connect=192.0.2.2:7701 --control=/c --defer-ms=7 \
                    --key-file=/k --listen=192.0.2.1:7700 --metrics=127.0.0.1:9 --name=web --tap=t0";
        let given = "--control /c --defer-ms 7 --key-file /k --listen 192.0.2.1:7700 --metrics 127.0.0.1:9 --name web \
                     --arbiter dir:/s --tap t0";
        let expected = Some(format!("backup {kept}"));
        assert_eq!(backup(&format!("vmft primary --kernel k --memory-mib 64 {given}")), expected);
        let old =
            "--connect 192.0.2.9:1 --connect-timeout-ms 9 --inject-missed-stop 3 --inject-slowness 1:2:3";
        assert_eq!(backup(&format!("vmft backup {old} {given}")), expected);
        assert_eq!(
            backup(&format!("vmft standby --hosts 192.0.2.2 {given}")).unwrap().matches("--hosts").count(),
            1
        );
        assert_eq!(backup("vmft run --kernel k --no-such-option"), None);
    }

    #[test]
    fn a_monitor_without_hosts_does_not_start_over() {
        assert_eq!(
            standby("vmft backup --connect 192.0.2.2:7700 --arbiter dir:/s --listen 192.0.2.1:7700"),
            None
        );
        assert_eq!(standby("vmft run --kernel k"), None);
    }
}
