//! The pair: log link, output rule, heartbeats, claims, takeover.
//!
//! Owns: who may run the guest, and when its output may go. Must never: touch guest state; the vCPU thread
//! does, through its door.
//!
//! ```text
//! primary                                             backup
//!   vCPU thread ─ PairLog ─ Link ── sender ──TCP──> receiver ── Batch queue ── Follow ─ vCPU thread
//!        │                    └──── acks  <──TCP── (received, executed) ┘
//!        └─ effects ─ OutputGate ── released when acknowledged and the lease holds
//!   Heartbeats <───────────────── UDP heartbeats ─────────────────> Heartbeats
//!   Supervisor ── silence or a closed link ── claim(view + 1) ── won: alone / live; lost: stop
//! ```

pub mod accept;
pub mod arbiter;
pub mod backup;
pub mod channel;
pub mod claim;
pub mod fence;
pub mod heartbeat;
pub mod hosts;
pub mod image;
pub mod key_file;
pub mod link;
mod others;
pub mod output_gate;
pub mod planned;
pub mod primary;
pub mod protocol;
pub mod search;
pub mod supervise;
pub mod transfer;
