//! The fixed names of what happens to a pair: the field `event` of the log, an interface for programs.
//!
//! Owns: the names, which never change their meaning; [`change`](crate::change) states changes under them. Must never: have a sentence as a name; sentences may be improved. docs/control.md explains
//! each.

use std::fmt;

macro_rules! log_events {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// What a line of the log is about.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum LogEvent {
            $($(#[$doc])* $variant,)*
        }

        impl LogEvent {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

log_events! {
    /// A standby waits for a primary without a backup.
    Standby = "standby",
    /// A backup looks for its primary.
    Joining = "joining",
    /// A backup begins to receive the guest.
    Receiving = "receiving",
    /// A backup has loaded the guest and follows its log.
    Following = "following",
    /// A primary runs a guest that was started here.
    Started = "started",
    /// A primary sends its guest to a backup.
    Sending = "sending",
    /// A primary refuses a backup.
    BackupRefused = "backup-refused",
    /// A backup that was joining did not get the guest.
    TransferFailed = "transfer-failed",
    /// A guest writes faster than the link carries, and is slowed down.
    Throttled = "throttled",
    /// The arbiter has recorded the backup; the view is the pair's.
    BackupRecorded = "backup-recorded",
    /// The backup gets the last of the guest; output waits from here on.
    TransferFinal = "transfer-final",
    /// A primary's backup follows.
    Protected = "protected",
    /// A primary has lost its backup; output waits for the claim.
    BackupLost = "backup-lost",
    /// A primary lets its backup go; output waits for the claim.
    BackupDismissed = "backup-dismissed",
    /// A primary continues without a backup.
    Unprotected = "unprotected",
    /// A claim has no answer yet.
    ClaimUndecided = "claim-undecided",
    /// Another monitor has the guest; this primary stops.
    Superseded = "superseded",
    /// The backup has the guest, as the operator wanted.
    HandedOver = "handed-over",
    /// A backup has lost its primary.
    PrimaryLost = "primary-lost",
    /// A fence command did not succeed; the guest waits.
    NotFenced = "not-fenced",
    /// A backup runs the guest now.
    Takeover = "takeover",
    /// The disk image is another monitor's; this one writes to it no more.
    ImageLost = "image-lost",
    /// A backup's primary has let it go.
    Dismissed = "dismissed",
    /// A backup has lost the claim and stops.
    ClaimLost = "claim-lost",
    /// The arbiter's record does not name this backup; it stops.
    NotRecorded = "not-recorded",
    /// A guest differs from the log.
    Diverged = "diverged",
    /// A backup's guest cannot be used; the backup asks for another copy.
    Desynchronised = "desynchronised",
    /// A report of a divergence is written.
    ReportWritten = "report-written",
    /// This process starts over in another role.
    Restart = "restart",
    /// The guest has ended.
    GuestEnded = "guest-ended",
    /// Figures of the pair, every second with `-v`.
    Figures = "figures",
}

impl fmt::Display for LogEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_each_is_documented() {
        let document = include_str!("../../../docs/control.md");
        for (index, event) in LogEvent::ALL.iter().enumerate() {
            assert!(
                document.contains(&format!("| `{event}` | ")),
                "docs/control.md does not explain {event}"
            );
            assert!(LogEvent::ALL[..index].iter().all(|other| other.name() != event.name()), "{event}");
            assert!(event.name().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{event}");
        }
    }
}
