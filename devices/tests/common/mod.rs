//! A guest for tests: a board, its memory, and the driver's side of virtio.
//!
//! Owns: set-up of virtio devices as a driver does it, and rings as a driver fills them. Must never: look
//! into the board; it sees what a guest sees.
#![allow(dead_code, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

use devices::{Board, BoardConfig, DeviceError, Effect, GuestRam, VirtioKind};
use ft_log::Event;
use vm_memory::{Bytes, GuestAddress};

pub const RAM_BYTES: u64 = 1 << 20;
pub const DISK_BYTES: u64 = 1 << 20;
pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

pub const F_VERSION_1: u64 = 1 << 32;
pub const F_EVENT_IDX: u64 = 1 << 29;

pub const WRITE: u16 = 2;
const NEXT: u16 = 1;

/// Driver status bits, as a driver sets them one after the other.
pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;

pub fn config() -> BoardConfig {
    BoardConfig {
        epoch_s: 1_700_000_000,
        ram_bytes: RAM_BYTES,
        net_mac: Some(MAC),
        disk_bytes: Some(DISK_BYTES),
        disk_read_only: false,
        disk_write_through: false,
    }
}

pub fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES as usize)]).unwrap()
}

pub struct Guest {
    pub config: BoardConfig,
    pub board: Board,
    pub ram: GuestRam,
    pub effects: Vec<Effect>,
}

impl Guest {
    pub fn new(config: BoardConfig) -> Self {
        Self { board: Board::new(&config), config, ram: ram(), effects: Vec::new() }
    }

    pub fn take_effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    pub fn apply(&mut self, event: Event) -> Result<(), DeviceError> {
        self.board.apply(&self.ram, &event, &mut self.effects)
    }

    /// Saves the board and goes on with the one loaded from that.
    pub fn reload(&mut self) {
        self.board = Board::load(&self.config, &self.board.save()).unwrap();
    }

    pub fn inb(&mut self, port: u16) -> u8 {
        let mut data = [0];
        self.board.pio_read(port, &mut data, &mut self.effects);
        data[0]
    }

    pub fn inl(&mut self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.board.pio_read(port, &mut data, &mut self.effects);
        u32::from_le_bytes(data)
    }

    pub fn outb(&mut self, port: u16, value: u8) {
        self.board.pio_write(port, &[value], &mut self.effects);
    }

    pub fn outw(&mut self, port: u16, value: u16) {
        self.board.pio_write(port, &value.to_le_bytes(), &mut self.effects);
    }

    pub fn outl(&mut self, port: u16, value: u32) {
        self.board.pio_write(port, &value.to_le_bytes(), &mut self.effects);
    }

    pub fn read32(&mut self, kind: VirtioKind, register: u64) -> u32 {
        let mut data = [0; 4];
        self.board.mmio_read(kind.window().gpa + register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write32(&mut self, kind: VirtioKind, register: u64, value: u32) {
        let gpa = kind.window().gpa + register;
        self.board.mmio_write(&self.ram, gpa, &value.to_le_bytes(), &mut self.effects);
    }

    pub fn status(&mut self, kind: VirtioKind) -> u32 {
        self.read32(kind, 0x70)
    }

    pub fn poke(&self, gpa: u64, data: &[u8]) {
        self.ram.write_slice(data, GuestAddress(gpa)).unwrap();
    }

    pub fn peek(&self, gpa: u64, len_bytes: usize) -> Vec<u8> {
        let mut data = vec![0; len_bytes];
        self.ram.read_slice(&mut data, GuestAddress(gpa)).unwrap();
        data
    }

    /// Initialises the controllers as Linux does, with vectors from 0x30 on and every line unmasked.
    pub fn init_pic(&mut self) {
        for (command, base, wiring) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            self.outb(command, 0x11);
            for value in [base, wiring, 1, 0] {
                self.outb(command + 1, value);
            }
        }
    }

    /// Ends the service of `irq`, as a handler does.
    pub fn end_of_interrupt(&mut self, irq: u8) {
        if irq >= 8 {
            self.outb(0xa0, 0x60 | (irq & 7));
            self.outb(0x20, 0x62);
        } else {
            self.outb(0x20, 0x60 | irq);
        }
    }

    /// The driver's handshake up to and including the choice of features.
    pub fn negotiate(&mut self, kind: VirtioKind, features: u64) {
        self.write32(kind, 0x70, 0);
        self.write32(kind, 0x70, ACKNOWLEDGE);
        self.write32(kind, 0x70, ACKNOWLEDGE | DRIVER);
        for (sel, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write32(kind, 0x24, sel);
            self.write32(kind, 0x20, half);
        }
        self.write32(kind, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    /// Brings a device up with all its queues.
    pub fn start(&mut self, kind: VirtioKind, features: u64) -> Vec<Queue> {
        self.negotiate(kind, features);
        let count = if kind == VirtioKind::Net { 2 } else { 1 };
        let queues: Vec<Queue> = (0..count).map(|index| Queue::new(kind, index)).collect();
        for queue in &queues {
            queue.enable(self);
        }
        self.write32(kind, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        queues
    }
}

/// Address, length in bytes and flags of a descriptor.
pub type Buffer = (u64, u32, u16);

/// The driver's side of a virtqueue: 16 descriptors in a page of its own.
pub struct Queue {
    pub kind: VirtioKind,
    pub index: u32,
    pub base: u64,
    pub size: u16,
    next_descriptor: u16,
    avail_idx: u16,
    used_seen: u16,
}

impl Queue {
    pub fn new(kind: VirtioKind, index: u32) -> Self {
        let slot = match kind {
            VirtioKind::Net => u64::from(index),
            VirtioKind::Blk => 2,
            VirtioKind::Rng => 3,
        };
        Self {
            kind,
            index,
            base: 0x1000 * (slot + 1),
            size: 16,
            next_descriptor: 0,
            avail_idx: 0,
            used_seen: 0,
        }
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x400
    }

    pub fn used_ring(&self) -> u64 {
        self.base + 0x800
    }

    /// Writes the queue registers.
    pub fn enable(&self, guest: &mut Guest) {
        guest.poke(self.base, &[0; 0x1000]);
        let kind = self.kind;
        guest.write32(kind, 0x30, self.index);
        guest.write32(kind, 0x38, self.size.into());
        for (register, gpa) in [(0x80, self.base), (0x90, self.avail()), (0xa0, self.used_ring())] {
            guest.write32(kind, register, gpa as u32);
            guest.write32(kind, register + 4, (gpa >> 32) as u32);
        }
        guest.write32(kind, 0x44, 1);
    }

    pub fn put_descriptor(&self, guest: &Guest, at: u16, gpa: u64, len_bytes: u32, flags: u16, next: u16) {
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend(len_bytes.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        guest.poke(self.base + 16 * u64::from(at), &bytes);
    }

    /// Puts a chain head into the available ring.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = self.avail_idx % self.size;
        guest.poke(self.avail() + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.avail_idx = self.avail_idx.wrapping_add(1);
        guest.poke(self.avail() + 2, &self.avail_idx.to_le_bytes());
    }

    /// Makes a chain of buffers available; its head.
    pub fn add(&mut self, guest: &Guest, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (position, (gpa, len_bytes, flags)) in buffers.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let flags = if position + 1 == buffers.len() { *flags } else { flags | NEXT };
            self.put_descriptor(guest, at, *gpa, *len_bytes, flags, self.next_descriptor);
        }
        self.offer(guest, head);
        head
    }

    pub fn notify(&self, guest: &mut Guest) {
        guest.write32(self.kind, 0x50, self.index);
    }

    /// Chains given back since the last call: head and number of bytes written.
    pub fn take_used(&mut self, guest: &Guest) -> Vec<(u16, u32)> {
        let idx = u16::from_le_bytes(guest.peek(self.used_ring() + 2, 2).try_into().unwrap());
        let mut used = Vec::new();
        while self.used_seen != idx {
            let slot = u64::from(self.used_seen % self.size);
            let element = guest.peek(self.used_ring() + 4 + 8 * slot, 8);
            let (id, len) = element.split_at(4);
            used.push((
                u32::from_le_bytes(id.try_into().unwrap()) as u16,
                u32::from_le_bytes(len.try_into().unwrap()),
            ));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        used
    }

    /// The `used_event` field: interrupt me when you use this one.
    pub fn set_used_event(&self, guest: &Guest, idx: u16) {
        guest.poke(self.avail() + 4 + 2 * u64::from(self.size), &idx.to_le_bytes());
    }

    /// The `avail_event` field: notify me when you add this one.
    pub fn avail_event(&self, guest: &Guest) -> u16 {
        let gpa = self.used_ring() + 4 + 8 * u64::from(self.size);
        u16::from_le_bytes(guest.peek(gpa, 2).try_into().unwrap())
    }
}
