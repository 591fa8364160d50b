//! The right to run the guest, and the disk image that goes with it.
//!
//! Owns: claims of views at an arbiter, the fence before a takeover, the ownership of the image. Must never: run a guest, or
//! take silence for an answer.
//! Threads: `claim`, one for each attempt, and `fence-output`; all else runs on its callers' threads. Locks: none.

pub mod arbiter;
pub mod claim;
pub mod claimant;
pub mod fence;
pub mod image_identity;
pub mod image_owner;
