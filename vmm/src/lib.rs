//! The monitor: KVM, machine, record and replay, primary and backup.
//!
//! ```text
//! commands ─> guest, boot ─> machine (kvm + devices) ─> run (Live | Follow) ─> pair ─> host
//! ```
//! The flow of data and the code map are in docs/architecture.md.
// `println!` and `eprintln!` panic where nobody reads; `commands::say` and `host::log` do not.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))]

pub mod boot;
pub mod commands;
pub mod config;
pub mod control;
pub mod doctor;
pub mod file_kind;
pub mod guest;
pub mod host;
pub mod kvm;
pub mod launch;
pub mod machine;
pub mod pair;
pub mod pmu;
pub mod position;
pub mod report;
pub mod run;
pub mod snapshot;

/// An error's sentence, with the causes that it does not name itself.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
