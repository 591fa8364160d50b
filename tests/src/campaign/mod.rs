//! A campaign: three hosts, a guest under load, and faults one after the other, chosen by a seed.
//!
//! ```text
//!   schedule(seed) ──> [`run`]: quiet ──> injury ──> undone ──> protected again, clients served, quiet ──> ...
//!                        │ services: on each host, starts what has ended again, as a standby
//!                        │ clients: their books           ──> history: linearizable?   ┐
//!                        │ witness: frames, disk writes   ──> one host at a time?      ├──> report
//!                        └ monitors' lines                ──> standing: who, since when┘
//! ```
//!
//! One fault at a time, and only while the guest is protected: what two at a time may do is in the failure model, not
//! here. Must never: take a run for good of which something could not be checked.

pub mod clients;
pub mod history;
mod injury;
mod report;
mod run;
pub mod schedule;
mod services;
mod standing;
mod witness;

pub use report::Report;
pub use run::run;
