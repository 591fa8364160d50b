//! A guest that runs here with the right to, and its backup.
//!
//! Owns: the log on its way out, the outputs that wait for it, and what happens when a backup comes, goes or is lost. Must
//! never: let an output go that `pair/protocol` does not allow.
//!
//! ```text
//!   vCPU thread ── LogWriter ──> Outbox ── log-sender ──> backup
//!        │ effects                  └────── log-acks <── acknowledgements
//!        └──────> gate <── may_leave? ── PrimaryState (protocol::Primary behind one lock)
//!   supervisor ── looks, claims, closes ──> PrimaryState        accept, greeting ──> Joiner ──> vCPU thread
//! ```
//! Threads: `accept`, `greeting` (four at most), `search`, `supervisor`; of each connection `log-sender` and `log-acks`, which
//! carry its epoch; `report`, briefly. Locks, in the order in which they may be taken: gate, primary's state, outbox.

pub mod accept;
mod connection;
pub mod gate;
pub mod invite;
mod joiner;
mod log_writer;
mod orders;
mod outbox;
mod planned;
pub mod session;
mod state;
mod supervisor;
