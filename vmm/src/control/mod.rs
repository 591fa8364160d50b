//! What an operator sees of a monitor, and what an operator can ask of it.
//!
//! Owns: the control socket, its protocol, and the state that it shows. Must never: change a guest, or keep one waiting.
//!
//! ```text
//!   vmft status ── Unix socket ──┐
//!                                ├── `control` thread ── Monitor <── change! (vCPU, supervisor, receiver)
//!   vmft switch ...───────────── │                          └─ orders ──> vCPU's mailbox, inbox, supervisor
//!   Prometheus ─── HTTP ─────────┘                          └─ figures <── link, gate, inflow
//! ```

pub mod client;
pub mod metrics;
pub mod protocol;
pub mod server;
pub mod socket;
pub mod state;

pub use server::Server;
pub use state::{Identity, Monitor, Standing};
