//! Test hosts and a client of the demo service: what the end-to-end tests of vmft stand on.
//!
//! - [`hosts`]: machines to run monitors on, their network, and the faults that befall them.
//! - [`client`]: a client of the demo service that checks each reply and measures the gaps between them.
//! - [`demo`]: what `run-ft.sh` shows.
//! - [`harness`]: runs end-to-end tests, and says which a machine cannot run.
//! - [`pair`]: monitors on test hosts, one or two at a time, and what a test needs around them.
//! - [`recordings`]: a guest recorded on one test host and replayed on another.
//!
//! Nothing here is part of the product, and the product depends on nothing here.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod campaign;
pub mod client;
pub mod demo;
pub mod events;
pub mod harness;
pub mod hosts;
pub mod pair;
pub mod recordings;

/// Takes a lock whose holder may have panicked: that fails its test by itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
