//! Where the guest finds its devices.
//!
//! Owns: port numbers, interrupt lines and memory windows, so that the board, ACPI tables and the kernel
//! command line say the same. Must never: hold state.

use crate::BoardConfig;

/// Interrupt line of the 8254's channel 0.
pub const TIMER_IRQ: u8 = 0;
/// Interrupt line of the keyboard controller.
pub const KEYBOARD_IRQ: u8 = 1;
/// Interrupt line of the serial port.
pub const UART_IRQ: u8 = 4;
/// Interrupt line of the ACPI fixed events (SCI), level-triggered.
pub const SCI_IRQ: u8 = 9;

/// First port of the serial port (COM1), 8 ports.
pub const UART_PORT: u16 = 0x3f8;
/// First port of the ACPI PM1a event block: status (2 bytes), enable (2 bytes).
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// First port of the ACPI PM1a control block, 2 bytes.
pub const PM1A_CONTROL_PORT: u16 = 0x604;
/// First port of the ACPI PM timer, 4 bytes of which 24 bits count.
pub const PM_TIMER_PORT: u16 = 0x608;
/// The reset control register, 1 byte; [`RESET_VALUE`] resets the guest.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write to [`RESET_PORT`] (ACPI FADT `RESET_VALUE`).
pub const RESET_VALUE: u8 = 0x06;
/// `SLP_TYPa` of the soft-off state S5 (ACPI `\_S5`).
pub const SLEEP_TYPE_S5: u8 = 5;

/// Address of the HPET.
pub const HPET_BASE: u64 = 0xfed0_0000;
/// Size of the HPET's registers in bytes: a page, of which the first quarter is used.
pub const HPET_BYTES: u64 = 0x1000;

/// First address of the virtio-mmio windows.
pub const VIRTIO_BASE: u64 = 0xd000_0000;
/// Distance and size of the virtio-mmio windows in bytes.
pub const VIRTIO_WINDOW_BYTES: u64 = 0x1000;

/// Which virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VirtioKind {
    /// Network card.
    Net,
    /// Disk.
    Blk,
    /// Entropy source.
    Rng,
}

/// Where a virtio-mmio device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Which device.
    pub kind: VirtioKind,
    /// Guest physical address of the window, [`VIRTIO_WINDOW_BYTES`] long.
    pub gpa: u64,
    /// Interrupt line, level-triggered and active high.
    pub irq: u8,
}

impl VirtioKind {
    /// The window of a device of this kind. It is the same whichever other devices there are.
    pub const fn window(self) -> VirtioWindow {
        let (slot, irq) = match self {
            VirtioKind::Net => (0, 5),
            VirtioKind::Blk => (1, 10),
            VirtioKind::Rng => (2, 11),
        };
        VirtioWindow { kind: self, gpa: VIRTIO_BASE + slot * VIRTIO_WINDOW_BYTES, irq }
    }

    /// The kind whose window `gpa` is in.
    pub(crate) fn at(gpa: u64) -> Option<Self> {
        match gpa.checked_sub(VIRTIO_BASE)? / VIRTIO_WINDOW_BYTES {
            0 => Some(VirtioKind::Net),
            1 => Some(VirtioKind::Blk),
            2 => Some(VirtioKind::Rng),
            _ => None,
        }
    }
}

/// The virtio devices of a board with this configuration, in the order of their addresses.
pub fn virtio_windows(config: &BoardConfig) -> Vec<VirtioWindow> {
    let net = config.net_mac.map(|_| VirtioKind::Net.window());
    let blk = config.disk_bytes.map(|_| VirtioKind::Blk.window());
    net.into_iter().chain(blk).chain([VirtioKind::Rng.window()]).collect()
}
