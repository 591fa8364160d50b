//! Whether the other side lives, and who else is there.
//!
//! Owns: heartbeats, the questions to other hosts, and the memory of whom to leave alone for a while. Must never: decide that
//! anybody is dead; `pair/protocol` does.
//! Threads: `heartbeat`. Locks: one around the exchange, never held over I/O that waits.

pub mod heartbeat;
pub mod hosts;
mod probes;
