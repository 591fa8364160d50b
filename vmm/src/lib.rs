//! The monitor: KVM, machine, record and replay, primary and backup.
//!
//! ```text
//! commands ─> guest, boot ─> machine (kvm + devices) ─> run (Live | Follow) ─> ft (pair) ─> outlet, host
//! ```
//! The flow of data and the code map are in docs/architecture.md.

pub mod boot;
pub mod commands;
pub mod config;
pub mod ft;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod outlet;
pub mod run;
pub mod snapshot;
