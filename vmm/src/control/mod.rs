//! What an operator sees of a monitor, and what an operator can ask of it.
//!
//! Owns: the control socket, its protocol, and the state that it shows. Must never: change a guest, or keep one waiting.
//!
//! ```text
//!   vmft status ── Unix socket ──┐
//!                                ├── `control` thread ── Monitor <── change! (vCPU, supervisor, receiver)
//!   vmft switch ...───────────── │                          └─ desk ──> Orders, inbox, supervisor
//!   Prometheus ─── HTTP ─────────┘                          └─ figures <── link, gate, inflow
//! ```

pub mod client;
mod log_event;
pub mod metrics;
pub mod orders;
pub mod protocol;
pub mod server;
pub mod socket;
pub mod state;

pub use log_event::LogEvent;
pub use server::Server;
pub use state::{Identity, Monitor, Standing};
