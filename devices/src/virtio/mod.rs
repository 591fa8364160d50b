//! The virtio devices: one transport, three devices behind it.
//!
//! Owns: the virtio 1.2 device models. Must never: touch guest memory except while handling a guest's
//! access or an event, when the vCPU stands still.

pub(crate) mod blk;
pub(crate) mod mmio;
pub(crate) mod net;
pub(crate) mod queue;
pub(crate) mod rng;
