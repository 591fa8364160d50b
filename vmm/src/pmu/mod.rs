//! Counting a guest's retired conditional branches with the host's performance counters.
//!
//! Owns: which event that is on which CPU, and the counter. Must never: say what a count is good for.

pub mod counter;
pub mod events;
pub mod host;
