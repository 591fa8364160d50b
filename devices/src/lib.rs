//! The guest's devices as pure state machines.

mod effects;

pub use effects::{DiskOp, DiskRequest, Effect};
