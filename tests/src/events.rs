//! What the monitors' log lines are about: the field `event`, as docs/control.md defines it. The view, if a line has one,
//! comes right after it.

/// A standby waits for a primary without a backup.
pub const STANDBY: &str = "event=standby";
/// A backup receives the guest.
pub const RECEIVING: &str = "event=receiving";
/// A primary runs a guest that was started there.
pub const STARTED: &str = "event=started";
/// A backup was refused.
pub const BACKUP_REFUSED: &str = "event=backup-refused";
/// A backup that was joining did not get the guest.
pub const TRANSFER_FAILED: &str = "event=transfer-failed";
/// A guest that writes faster than the link carries is slowed.
pub const THROTTLED: &str = "event=throttled";
/// The backup gets the last of the guest.
pub const TRANSFER_FINAL: &str = "event=transfer-final";
/// A primary's backup follows.
pub const PROTECTED: &str = "event=protected";
/// A primary continues without a backup.
pub const UNPROTECTED: &str = "event=unprotected";
/// A claim has no answer yet.
pub const CLAIM_UNDECIDED: &str = "event=claim-undecided";
/// A fence command failed.
pub const NOT_FENCED: &str = "event=not-fenced";
/// A former backup runs the guest.
pub const TAKEOVER: &str = "event=takeover";
/// A backup was let go.
pub const DISMISSED: &str = "event=dismissed";
/// A backup's guest cannot be used.
pub const DESYNCHRONISED: &str = "event=desynchronised";
/// A guest differs from the log.
pub const DIVERGED: &str = "event=diverged";
/// A report is written.
pub const REPORT_WRITTEN: &str = "event=report-written";
/// A process starts over in another role.
pub const RESTART: &str = "event=restart";
/// The guest has ended; `how` follows.
pub const GUEST_ENDED: &str = "event=guest-ended";
/// A primary sends its guest; `percent` follows.
pub const SENDING: &str = "event=sending";
/// A primary has lost its backup.
pub const BACKUP_LOST: &str = "event=backup-lost";
/// The disk image is another monitor's.
pub const IMAGE_LOST: &str = "event=image-lost";
/// Figures of a pair, every second with `-v`.
pub const FIGURES: &str = "event=figures";
