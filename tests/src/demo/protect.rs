//! When the primary may be killed: only while its backup would take over.
//!
//! Owns: that decision, as a function of what was seen. Must never: do I/O, or look at a clock.
//!
//! ```text
//!   nothing follows -> start a backup -> wait -> protected: may be killed
//!         ^                               |
//!         └── the backup has ended ───────┘   too many backups, or time is up: give up, and nothing is killed
//! ```

use crate::hosts::Ending;

/// How many backups are started for one guest: one that ends again and again does so for a reason.
pub(super) const BACKUPS_MAX: usize = 3;

/// What was seen of a pair.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// How the primary ended, if it has.
    pub(super) primary: Option<Ending>,
    /// Whether the primary says, in its lines and when asked, that the guest is protected.
    pub(super) protected: bool,
    /// Whether a backup runs.
    pub(super) backup_runs: bool,
    /// Number of backups started so far.
    pub(super) backups: usize,
    /// Whether there is time left to wait.
    pub(super) time_left: bool,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// The guest is protected at this moment.
    Protected,
    /// Start a backup.
    StartBackup,
    /// Look again a little later.
    Wait,
    /// There is no primary any more.
    PrimaryEnded(Ending),
    /// The guest does not become protected.
    GiveUp,
}

/// Decides on the next step.
pub(super) fn next(look: &Look) -> Step {
    match look {
        Look { primary: Some(ending), .. } => Step::PrimaryEnded(ending.clone()),
        // The primary may not have noticed yet that its backup is gone.
        Look { protected: true, backup_runs: true, .. } => Step::Protected,
        Look { time_left: false, .. } => Step::GiveUp,
        Look { backup_runs: true, .. } => Step::Wait,
        Look { backups, .. } if *backups < BACKUPS_MAX => Step::StartBackup,
        _ => Step::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOWED: Look =
        Look { primary: None, protected: true, backup_runs: true, backups: 1, time_left: true };

    /// All that can be seen.
    fn looks() -> impl Iterator<Item = Look> {
        let both = [false, true];
        let endings = [None, Some(Ending::Exited(0)), Some(Ending::Killed(9))];
        endings.into_iter().flat_map(move |primary| {
            let primary = &primary;
            let all: Vec<Look> = (0..=BACKUPS_MAX)
                .flat_map(|backups| both.map(|protected| (backups, protected)))
                .flat_map(|(backups, protected)| both.map(|backup_runs| (backups, protected, backup_runs)))
                .flat_map(|(backups, protected, backup_runs)| {
                    both.map(|time_left| {
                        let primary = primary.clone();
                        Look { primary, protected, backup_runs, backups, time_left }
                    })
                })
                .collect();
            all
        })
    }

    #[test]
    fn only_a_followed_primary_may_be_killed() {
        for look in looks() {
            let followed = look.primary.is_none() && look.protected && look.backup_runs;
            assert_eq!(next(&look) == Step::Protected, followed, "{look:?}");
        }
    }

    #[test]
    fn primary_that_has_ended_is_no_more_waited_for() {
        for look in looks() {
            let ended = matches!(next(&look), Step::PrimaryEnded(_));
            assert_eq!(ended, look.primary.is_some(), "{look:?}");
        }
    }

    #[test]
    fn lost_backup_is_replaced_and_then_waited_for() {
        let lost = Look { protected: false, backup_runs: false, ..FOLLOWED };
        assert_eq!(next(&Look { backups: 0, ..lost.clone() }), Step::StartBackup);
        assert_eq!(next(&lost), Step::StartBackup);
        // The primary still believes in it.
        assert_eq!(next(&Look { backup_runs: false, ..FOLLOWED }), Step::StartBackup);
        let joining = Look { protected: false, backups: 2, ..FOLLOWED };
        assert_eq!(next(&joining), Step::Wait);
        assert_eq!(next(&Look { protected: true, ..joining }), Step::Protected);
    }

    #[test]
    fn it_ends() {
        let lost = Look { protected: false, backup_runs: false, ..FOLLOWED };
        assert_eq!(next(&Look { backups: BACKUPS_MAX, ..lost.clone() }), Step::GiveUp);
        assert_eq!(next(&Look { time_left: false, ..lost }), Step::GiveUp);
        assert_eq!(next(&Look { protected: false, time_left: false, ..FOLLOWED }), Step::GiveUp);
    }
}
