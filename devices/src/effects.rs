//! What devices want done in the outside world, as plain values.
//!
//! Owns: [`Effect`] and [`DiskRequest`]. Must never: perform anything. The caller decides whether an
//! effect is performed (primary, once the backup has acknowledged the log up to it) or dropped (backup, replay).

/// A disk request as the guest made it. `id` rises by one for every request of a guest's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// Names the request in its completion event.
    pub id: u64,
    /// What to do.
    pub op: DiskOp,
}

/// The operation of a [`DiskRequest`]. Offsets and lengths are in bytes, multiples of 512, inside the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Read `len_bytes` at `offset_bytes`.
    Read {
        /// Where the first byte is.
        offset_bytes: u64,
        /// How many bytes.
        len_bytes: u32,
    },
    /// Write `data` at `offset_bytes`. The bytes were copied out of guest memory when the request was made.
    Write {
        /// Where the first byte goes.
        offset_bytes: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Make every completed write durable.
    Flush,
}

/// Something for the outside world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send this Ethernet frame (no virtio header).
    Frame(Vec<u8>),
    /// Do this disk request and answer it with [`ft_log::Event::DiskDone`].
    Disk(DiskRequest),
    /// The guest wrote this byte to its serial console.
    Console(u8),
    /// The guest wants this many random bytes; answer with [`ft_log::Event::Entropy`].
    Entropy {
        /// How many, at most [`ft_log::MAX_ENTROPY_BYTES`].
        len_bytes: usize,
    },
    /// The guest asked to be reset (port 0x64, port 0xcf9, ACPI reset register).
    Reset,
    /// The guest powered itself off (ACPI S5).
    PowerOff,
}
