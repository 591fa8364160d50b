//! Who runs the guest and whether it is protected, from what the monitors say.
//!
//! Times are those at which a line reached this machine, since the campaign's start. A view belongs to one monitor: what
//! a monitor of a lower view says, such as one that was frozen, counts for nothing.

use std::time::Duration;

use crate::events::{PROTECTED, TAKEOVER, TRANSFER_FINAL, UNPROTECTED};
use crate::pair::{field, text_field};

/// A change that a monitor has stated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It started the guest.
    Started,
    /// It has taken the guest over.
    TookOver,
    /// It has lost its backup.
    Alone,
    /// It has a backup, on this host.
    Protected(u8),
}

/// One statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statement {
    /// When it was heard.
    pub at: Duration,
    /// Whose.
    pub host: u8,
    /// Of which view.
    pub view: u64,
    /// What.
    pub change: Change,
}

impl Statement {
    /// What a line of the monitor on `host` states, if anything. `backup` is the host that the lines before have named
    /// as its backup's.
    pub fn of_line(line: &str, host: u8, at: Duration, backup: &mut Option<u8>) -> Option<Statement> {
        if line.contains(TRANSFER_FINAL) {
            *backup = text_field(line, "backup").and_then(|name| name.strip_prefix("host")?.parse().ok());
        }
        let signs = [
            (UNPROTECTED, Change::Alone),
            (PROTECTED, Change::Protected(backup.unwrap_or_default())),
            (TAKEOVER, Change::TookOver),
        ];
        let (_, change) = signs.into_iter().find(|(sign, _)| line.contains(sign))?;
        Some(Statement { at, host, view: field(line, "view")?, change })
    }
}

/// All statements, by view and then by time.
#[derive(Debug, Clone)]
pub struct Standing {
    statements: Vec<Statement>,
}

impl Standing {
    /// From the statements of all monitors. There must be one: that of the start.
    pub fn new(mut statements: Vec<Statement>) -> Standing {
        statements.sort_by_key(|statement| (statement.view, statement.at));
        Standing { statements }
    }

    /// The statement that holds now.
    pub fn latest(&self) -> Option<&Statement> {
        self.statements.last()
    }

    /// The host of the backup, if the guest has one.
    pub fn backup(&self) -> Option<u8> {
        self.latest().and_then(|latest| match latest.change {
            Change::Protected(backup) => Some(backup),
            _ => None,
        })
    }

    /// How long after `moment` the guest was protected for good; `None` if it was so all the time.
    pub fn protected_after(&self, moment: Duration) -> Option<Duration> {
        let later = || self.statements.iter().filter(|statement| statement.at > moment);
        later().find(|statement| !matches!(statement.change, Change::Protected(_)))?;
        let protected = later().rfind(|statement| matches!(statement.change, Change::Protected(_)))?;
        Some(protected.at - moment)
    }

    /// Which host has run the guest, one after the other, and when that was heard.
    pub fn tenures(&self) -> Vec<(u8, Duration)> {
        let begins = |change| matches!(change, Change::Started | Change::TookOver);
        self.statements
            .iter()
            .filter(|statement| begins(statement.change))
            .map(|statement| (statement.host, statement.at))
            .collect()
    }

    /// Views in which more than one host says that it runs the guest, as sentences.
    pub fn contradictions(&self) -> Vec<String> {
        self.statements
            .windows(2)
            .filter(|pair| pair[0].view == pair[1].view && pair[0].host != pair[1].host)
            .map(|pair| {
                format!(
                    "hosts {} and {} both ran the guest in view {}",
                    pair[0].host, pair[1].host, pair[0].view
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(at_s: u64, host: u8, view: u64, change: Change) -> Statement {
        Statement { at: Duration::from_secs(at_s), host, view, change }
    }

    #[test]
    fn lines_are_understood() {
        let at = Duration::from_secs(3);
        let mut backup = None;
        let mut of = |line: &str| Statement::of_line(line, 2, at, &mut backup);
        assert_eq!(of(&format!("WARN {UNPROTECTED} view=4")), Some(said(3, 2, 4, Change::Alone)));
        assert_eq!(of(&format!("INFO {TRANSFER_FINAL} backup=host3 bytes=7")), None);
        assert_eq!(of(&format!("INFO {PROTECTED} view=5")), Some(said(3, 2, 5, Change::Protected(3))));
        assert_eq!(of(&format!("WARN {TAKEOVER} view=6 anchor=7")), Some(said(3, 2, 6, Change::TookOver)));
        assert_eq!(of("DEBUG pair so far view=6"), None);
    }

    #[test]
    fn the_highest_view_counts_whenever_it_was_heard() {
        let standing = Standing::new(vec![
            said(0, 1, 1, Change::Started),
            said(9, 1, 1, Change::Protected(2)),
            said(5, 2, 2, Change::TookOver),
        ]);
        assert_eq!(standing.latest(), Some(&said(5, 2, 2, Change::TookOver)));
        assert_eq!(standing.backup(), None);
        assert_eq!(standing.tenures(), [(1, Duration::ZERO), (2, Duration::from_secs(5))]);
    }

    #[test]
    fn time_without_protection_is_from_the_fault_to_the_last_backup() {
        let mut statements = vec![said(0, 1, 1, Change::Started), said(1, 1, 1, Change::Protected(2))];
        let after = |statements: &[Statement], s| {
            Standing::new(statements.to_vec()).protected_after(Duration::from_secs(s))
        };
        assert_eq!(after(&statements, 2), None, "nothing was lost");
        statements.push(said(4, 2, 2, Change::TookOver));
        assert_eq!(after(&statements, 2), None, "and here it is not back yet");
        statements.push(said(7, 2, 2, Change::Protected(1)));
        assert_eq!(after(&statements, 2), Some(Duration::from_secs(5)));
        statements.extend([said(8, 2, 3, Change::Alone), said(10, 2, 3, Change::Protected(1))]);
        assert_eq!(after(&statements, 2), Some(Duration::from_secs(8)), "lost twice");
    }

    #[test]
    fn two_hosts_in_one_view_are_a_contradiction() {
        let mut statements = vec![said(0, 1, 1, Change::Started), said(4, 2, 2, Change::TookOver)];
        assert_eq!(Standing::new(statements.clone()).contradictions(), [""; 0]);
        statements.push(said(5, 1, 2, Change::Alone));
        assert_eq!(Standing::new(statements).contradictions().len(), 1);
    }
}
