//! A copy of the guest that follows its primary, and what becomes of it.
//!
//! Owns: joining, following, and the takeover. Must never: let the copy go live unless its view was claimed and the copy is
//! known to be right.
//!
//! ```text
//!   standby ── invited ──> follower ── joins, receives ──> following ── link ended ──> takeover ── won ──> primary/session
//!      ^                       ^─────── rejoin: the copy cannot be used ──┘                └── lost, stopped ──> the end
//!      └──────────── the process starts over ──────────────────────────────────────────────┘
//! ```
//! Threads: `log-receiver`, which also runs the takeover; `watchdog`; `record` and `image`, briefly. Locks: one around the
//! queue of the log's parts, one around the protocol's machine, one around the acknowledgements; none is taken while another
//! is held.

mod follower;
mod inflow;
pub mod rejoin;
mod standby;
mod takeover;

pub use follower::{BackupSettings, InjectedFaults, backup};
pub use inflow::FromPrimary;
pub use standby::standby;
