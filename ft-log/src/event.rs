//! The closed set of non-deterministic inputs of a guest.
//!
//! Owns: [`Event`] (asynchronous, tied to a position) and [`GuestTime`] (the one unit of time).
//! Must never: hold anything that is a pure function of guest state, or anything of the host.
//!
//! Synchronous values (a clock read) are not events: the guest's own exit asks for them, so the
//! log holds them in order and needs no position for them. See `record.rs` for how both are stored.

/// Guest time: ticks of the ACPI PM timer (3,579,545 Hz, 279.365 ns each) since the guest's start.
///
/// One unit serves every clock of the guest: the PM timer counts it, the 8254 counts a third of it,
/// the CMOS clock and the TSC are derived from it. It never goes backwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestTime(pub u64);

impl GuestTime {
    /// Ticks per second (ACPI specification 4.8.2.1, power management timer).
    pub const HZ: u64 = 3_579_545;

    /// The guest time `ns` nanoseconds after the guest's start, rounded down.
    pub fn from_ns(ns: u64) -> Self {
        Self((u128::from(ns) * u128::from(Self::HZ) / 1_000_000_000) as u64)
    }

    /// Nanoseconds since the guest's start, rounded up, so that `from_ns(t.to_ns()) == t`.
    pub fn to_ns(self) -> u64 {
        (u128::from(self.0) * 1_000_000_000).div_ceil(u128::from(Self::HZ)) as u64
    }
}

/// How a disk request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DiskStatus {
    /// All bytes were read or are durable as asked.
    Ok = 1,
    /// The host could not do it; the guest sees `VIRTIO_BLK_S_IOERR`.
    IoError = 2,
}

/// Something that reaches the guest from outside at a position that the log names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Time has reached `now`: timers that are due fire.
    Tick {
        /// The time that the guest's devices now see.
        now: GuestTime,
    },
    /// An Ethernet frame arrived (no virtio header, no FCS).
    Frame {
        /// The frame, at most [`MAX_FRAME_BYTES`] bytes.
        data: Vec<u8>,
    },
    /// A disk request that the guest submitted is done.
    DiskDone {
        /// The id that the block device gave the request.
        id: u64,
        /// How it ended.
        status: DiskStatus,
        /// Bytes read; empty for writes, flushes and errors.
        data: Vec<u8>,
    },
    /// Bytes typed on the serial console.
    Console {
        /// The bytes, in order.
        data: Vec<u8>,
    },
    /// Random bytes that the guest asked of its entropy device.
    Entropy {
        /// The bytes, as many as were asked for.
        data: Vec<u8>,
    },
    /// The power button was pressed (ACPI fixed event).
    PowerButton,
}

/// Longest Ethernet frame that is carried: a 9,000-byte MTU with header and VLAN tag.
pub const MAX_FRAME_BYTES: usize = 9_018;
/// Longest single disk request.
pub const MAX_DISK_BYTES: usize = 4 << 20;
/// Most console bytes in one event.
pub const MAX_CONSOLE_BYTES: usize = 4_096;
/// Most random bytes in one event.
pub const MAX_ENTROPY_BYTES: usize = 4_096;
