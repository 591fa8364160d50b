//! Starting over: the process executes its own program again, as a standby.
//!
//! Owns: the command line of the new life, made from that of the old one. Must never: let anything of the old life go
//! on. Executing a program ends all other threads, closes the disk, the tap and the sockets, and gives the guest's
//! memory back; the process keeps its number and its standard streams.
//!
//! ```text
//!   claim lost ─┬─ started with --hosts, not stopped by the operator ──> `vmft standby` in the same process
//!               └─ otherwise ──> status 3
//! ```

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::{ArgAction, CommandFactory};

use super::{CommandError, Ending, stop};
use crate::config::Cli;

/// The subcommand of the new life.
const STANDBY: &str = "standby";

/// What becomes of a process that has lost its claim. Returns if it ends.
///
/// # Errors
/// The host does not execute the program.
pub(super) fn after_lost_claim() -> Result<Ending, CommandError> {
    match standby_words(std::env::args_os()) {
        Some(words) if !stop::asked() => {
            tracing::warn!("this monitor starts over as a standby");
            Err(execute(&words))
        }
        _ => Ok(Ending::LostClaim),
    }
}

/// As [`after_lost_claim`], for a thread that cannot return: ends the process in any case.
pub fn leave_after_lost_claim() -> ! {
    let status = match after_lost_claim() {
        Ok(ending) => ending.status(),
        Err(error) => {
            tracing::error!("{}", crate::with_causes(&error));
            error.status()
        }
    };
    std::process::exit(i32::from(status))
}

/// Starts over as a standby, whatever it was. Returns if that is not possible.
pub(super) fn as_standby() -> CommandError {
    match standby_words(std::env::args_os()) {
        Some(words) => execute(&words),
        None => CommandError::Unfit("this monitor was started without --hosts".into()),
    }
}

fn execute(words: &[OsString]) -> CommandError {
    // The program that runs, even if another one has its name by now.
    let error = Command::new("/proc/self/exe").args(words).exec();
    CommandError::host("execute the monitor's program again")(error)
}

/// The words behind the program's name with which a process that was started with `words` becomes a standby: each of
/// its options that `standby` has, as it was given. `None`: it was started without --hosts.
fn standby_words(words: impl IntoIterator<Item = OsString>) -> Option<Vec<OsString>> {
    let mut command = Cli::command();
    // Options that all commands share reach the subcommands now.
    command.build();
    let matches = command.clone().try_get_matches_from(words).ok()?;
    let (_, given) = matches.subcommand()?;
    let mut standby = vec![OsString::from(STANDBY)];
    let mut has_hosts = false;
    for option in command.find_subcommand(STANDBY)?.get_arguments() {
        let (id, Some(name)) = (option.get_id().as_str(), option.get_long()) else { continue };
        if !matches!(given.try_contains_id(id), Ok(true))
            || given.value_source(id) != Some(clap::parser::ValueSource::CommandLine)
        {
            continue;
        }
        has_hosts |= id == "hosts";
        match option.get_action() {
            ArgAction::Count => {
                standby.extend((0..given.get_count(id)).map(|_| OsString::from(format!("--{name}"))));
            }
            ArgAction::SetTrue => standby.push(format!("--{name}").into()),
            _ => {
                for value in given.get_raw(id)? {
                    let mut word = OsString::from(format!("--{name}="));
                    word.push(value);
                    standby.push(word);
                }
            }
        }
    }
    has_hosts.then_some(standby)
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
                    --mac 52:54:00:12:34:56 --name web --shared /s --listen 192.0.2.1:7700 --timeout-ms 800 \
                    --hosts 192.0.2.1,192.0.2.2";
        let words = standby(line).unwrap();
        let (command, mut options) =
            words.split_once(' ').map(|(a, b)| (a, b.split(' ').collect::<Vec<_>>())).unwrap();
        options.sort_unstable();
        assert_eq!(command, "standby");
        let kept = [
            "--disk=/d.img",
            "--hosts=192.0.2.1,192.0.2.2",
            "--listen=192.0.2.1:7700",
            "--name=web",
            "--shared=/s",
            "--tap=tap0",
            "--timeout-ms=800",
            "--verbose",
        ];
        assert_eq!(options, kept);
    }

    #[test]
    fn a_backup_keeps_all_but_its_primary_and_a_standby_stays_as_it_is() {
        let follow = "--shared=/s --disk=/d --listen=192.0.2.1:7700 --hosts=192.0.2.2 --position=step";
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
    fn a_monitor_without_hosts_does_not_start_over() {
        assert_eq!(standby("vmft backup --connect 192.0.2.2:7700 --shared /s --listen 192.0.2.1:7700"), None);
        assert_eq!(standby("vmft run --kernel k"), None);
    }
}
