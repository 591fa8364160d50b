//! What passes between two monitors: the greeted connection, and the guest's transfer on it.
//!
//! Owns: bytes on their way. Must never: decide who is wanted, or who runs the guest.
//! Threads: the callers'. Locks: none.

pub mod channel;
pub mod connect;
pub mod key_file;
pub mod transfer;
