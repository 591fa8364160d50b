//! What two copies of a guest compare to know that they are the same.
//!
//! Owns: [`StateDigest`], the type that the log carries. Must never: compute one; that needs the machine.

/// Digests of a whole stopped guest. Two guests with equal digests are taken to be equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateDigest {
    /// All vCPU registers, in the snapshot's order.
    pub registers: u64,
    /// All of guest memory, by guest physical address.
    pub memory: u64,
    /// The saved state of every device.
    pub devices: u64,
}
