//! One x86_64 board: all devices, their ports, windows and interrupt lines.
//!
//! Owns: the guest's time as devices see it, dispatch of accesses and events, saving and loading. Must
//! never: decide what time it is or whether an effect is performed.
//!
//! The caller runs one access or event at a time, while the vCPU stands still:
//!
//! ```text
//! exit:          log a clock read; advance
//! port access:   pio_read / pio_write
//! memory access: mmio_read / mmio_write
//! event:         apply
//! before entry:  show hpet_registers; if interrupt_pending and the vCPU takes it: acknowledge_interrupt
//! ```

use crate::acpi_pm::AcpiPm;
use crate::cmos::Cmos;
use crate::hpet::Hpet;
use crate::i8042::I8042;
use crate::layout::{
    HPET_BASE, HPET_BYTES, KEYBOARD_IRQ, PM_TIMER_PORT, PM1A_EVENT_PORT, RESET_PORT, SCI_IRQ, TIMER_IRQ,
    UART_IRQ, UART_PORT, VIRTIO_WINDOW_BYTES, VirtioKind, virtio_windows,
};
use crate::pic::Pic;
use crate::pit::Pit;
use crate::schema::{self, Decoder, Device, Encoder, Payload};
use crate::uart::Uart;
use crate::virtio::blk::Blk;
use crate::virtio::mmio::{Backend, Transport};
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::{DeviceError, DiskRequest, Effect, GuestRam};
use ft_log::{DiskStatus, Event, GuestTime, MAX_FRAME_BYTES};
use xxhash_rust::xxh3::Xxh3;

const UART_LAST_PORT: u16 = UART_PORT + 7;
/// Event, control and timer registers follow each other.
const PM_LAST_PORT: u16 = PM_TIMER_PORT + 3;
const PCI_ADDRESS_PORT: u16 = 0xcf8;
const VIRTIO_OFFSET_MASK: u64 = VIRTIO_WINDOW_BYTES - 1;

/// Whether an access is to the PCI configuration address: wider than a byte, at a port whose second byte
/// alone is the reset control register. There is no PCI.
fn is_pci_address(port: u16, len_bytes: usize) -> bool {
    len_bytes > 1 && (PCI_ADDRESS_PORT..=RESET_PORT).contains(&port)
}

/// What a board is made of. Primary and backup must use the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BoardConfig {
    /// UNIX time in seconds at guest time 0, for the CMOS clock.
    pub epoch_s: u64,
    /// Guest memory in bytes, for the CMOS memory-size registers.
    pub ram_bytes: u64,
    /// The network card's address; `None` for no card.
    pub net_mac: Option<[u8; 6]>,
    /// The disk's size in bytes, rounded down to whole 512-byte sectors; `None` for no disk.
    pub disk_bytes: Option<u64>,
    /// The guest may only read the disk.
    pub disk_read_only: bool,
    /// What the disk has answered as written needs no flush; the guest is told so.
    pub disk_write_through: bool,
}

/// Guest time, and what was derived from it.
struct Clock {
    now: GuestTime,
    last_tsc: u64,
}

impl Device for Clock {
    fn kind(&self) -> &'static str {
        "clock"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.u64(self.now.0);
        out.u64(self.last_tsc);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.now = GuestTime(input.u64("now")?);
        self.last_tsc = input.u64("last_tsc")?;
        Ok(())
    }
}

/// All devices of one guest.
pub struct Board {
    clock: Clock,
    pic: Pic,
    pit: Pit,
    acpi_pm: AcpiPm,
    cmos: Cmos,
    uart: Uart,
    i8042: I8042,
    hpet: Hpet,
    net: Option<Transport<Net>>,
    blk: Option<Transport<Blk>>,
    rng: Transport<Rng>,
}

impl Board {
    /// A board as the guest finds it when it starts, at guest time 0.
    pub fn new(config: &BoardConfig) -> Self {
        let windows = virtio_windows(config);
        let level_triggered = windows.iter().fold(1 << SCI_IRQ, |lines, window| lines | 1 << window.irq);
        Self {
            clock: Clock { now: GuestTime(0), last_tsc: 0 },
            pic: Pic::new(level_triggered),
            pit: Pit::new(),
            acpi_pm: AcpiPm::new(),
            cmos: Cmos::new(config.epoch_s, config.ram_bytes),
            uart: Uart::new(),
            i8042: I8042::new(),
            hpet: Hpet::new(),
            net: config.net_mac.map(|mac| Transport::new(Net::new(mac))),
            blk: config.disk_bytes.map(|bytes| Transport::new(Blk::new(bytes, config))),
            rng: Transport::new(Rng::new()),
        }
    }

    /// The time that the devices see.
    pub fn now(&self) -> GuestTime {
        self.clock.now
    }

    /// Moves time forward to `now`; timers that became due raise their lines. Time never goes back: an
    /// earlier `now` changes nothing.
    pub fn advance(&mut self, now: GuestTime) {
        let before = self.clock.now;
        if now <= before {
            return;
        }
        self.clock.now = now;
        if self.pit.advance(before, now) {
            // A pulse, whatever the levels before and after are.
            self.pic.set_line(TIMER_IRQ, false);
            self.pic.set_line(TIMER_IRQ, true);
        }
        self.pic.set_line(TIMER_IRQ, self.pit.output(now));
        self.acpi_pm.advance(before, now);
        self.pic.set_line(SCI_IRQ, self.acpi_pm.interrupt());
    }

    /// The earliest time at which [`Board::advance`] would change something that the guest can see without
    /// asking for the time; `None` if nothing is due.
    pub fn deadline(&self) -> Option<GuestTime> {
        // An edge on a line that already has a request would be lost in it.
        let timer = if self.pic.is_requested(TIMER_IRQ) { None } else { self.pit.next_edge(self.clock.now) };
        let sci = self.acpi_pm.next_event(self.clock.now);
        [timer, sci].into_iter().flatten().min()
    }

    /// What the guest sees, as read-only memory, at [`HPET_BASE`]: offset in the page and value, 8 bytes each; the rest
    /// of the page is 0.
    pub fn hpet_registers(&self) -> [(u64, u64); 6] {
        self.hpet.registers(self.clock.now)
    }

    /// The value of the time stamp counter for a trapped RDTSC: nanoseconds of guest time, and more than the
    /// last value.
    pub fn tsc(&mut self) -> u64 {
        let next = self.clock.last_tsc.saturating_add(1);
        self.clock.last_tsc = self.clock.now.to_ns().max(next);
        self.clock.last_tsc
    }

    /// Level of the interrupt controller's output.
    #[inline]
    pub fn interrupt_pending(&self) -> bool {
        self.pic.interrupt_pending()
    }

    /// The CPU's interrupt acknowledge: gives the vector to deliver, which is a spurious one if no interrupt
    /// is pending.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        self.pic.acknowledge()
    }

    /// A read of `data.len()` (1, 2 or 4) bytes from `port`. A wider access to byte registers reads that
    /// many in a row. What no device claims reads as ones.
    #[inline]
    pub fn pio_read(&mut self, port: u16, data: &mut [u8], _effects: &mut Vec<Effect>) {
        if is_pci_address(port, data.len()) {
            return data.fill(0xff);
        }
        for (offset, byte) in (0..).zip(data.iter_mut()) {
            *byte = self.read_port(port.wrapping_add(offset));
        }
    }

    fn read_port(&mut self, port: u16) -> u8 {
        let now = self.clock.now;
        match port {
            UART_PORT..=UART_LAST_PORT => {
                let value = self.uart.read(port - UART_PORT);
                self.pic.set_line(UART_IRQ, self.uart.interrupt());
                value
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.read(port),
            0x40..=0x43 | 0x61 => self.pit.read(port, now),
            PM1A_EVENT_PORT..=PM_LAST_PORT | RESET_PORT => self.acpi_pm.read(port, now),
            0x60 | 0x64 => {
                let value = self.i8042.read(port);
                self.pic.set_line(KEYBOARD_IRQ, self.i8042.interrupt());
                value
            }
            0x70 | 0x71 => self.cmos.read(port, now),
            // Among the rest: 0x80 and 0xed (delays), 0xcf8 and 0xcfc (there is no PCI).
            _ => 0xff,
        }
    }

    /// A write of `data` (1, 2 or 4 bytes) to `port`. A wider access to byte registers writes that many in a
    /// row.
    #[inline]
    pub fn pio_write(&mut self, port: u16, data: &[u8], effects: &mut Vec<Effect>) {
        if is_pci_address(port, data.len()) {
            return;
        }
        for (offset, byte) in (0..).zip(data) {
            self.write_port(port.wrapping_add(offset), *byte, effects);
        }
    }

    fn write_port(&mut self, port: u16, value: u8, effects: &mut Vec<Effect>) {
        let now = self.clock.now;
        match port {
            UART_PORT..=UART_LAST_PORT => {
                if self.uart.write(port - UART_PORT, value, effects) {
                    self.pic.set_line(UART_IRQ, false);
                }
                self.pic.set_line(UART_IRQ, self.uart.interrupt());
            }
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => self.pic.write(port, value),
            0x40..=0x43 | 0x61 => {
                self.pit.write(port, value, now);
                self.pic.set_line(TIMER_IRQ, self.pit.output(now));
            }
            PM1A_EVENT_PORT..=PM_LAST_PORT | RESET_PORT => {
                self.acpi_pm.write(port, value, effects);
                self.pic.set_line(SCI_IRQ, self.acpi_pm.interrupt());
            }
            0x60 | 0x64 => {
                self.i8042.write(port, value, effects);
                self.pic.set_line(KEYBOARD_IRQ, self.i8042.interrupt());
            }
            0x70 | 0x71 => self.cmos.write(port, value, now),
            _ => {}
        }
    }

    /// A read from guest physical address `gpa`. What no device claims reads as ones. The HPET is memory for reads.
    pub fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        let offset = gpa & VIRTIO_OFFSET_MASK;
        match VirtioKind::at(gpa) {
            Some(VirtioKind::Net) if let Some(net) = &self.net => net.read(offset, data),
            Some(VirtioKind::Blk) if let Some(blk) = &self.blk => blk.read(offset, data),
            Some(VirtioKind::Rng) => self.rng.read(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// A write to guest physical address `gpa`.
    pub fn mmio_write(&mut self, ram: &GuestRam, gpa: u64, data: &[u8], effects: &mut Vec<Effect>) {
        if let Some(offset) = gpa.checked_sub(HPET_BASE).filter(|offset| *offset < HPET_BYTES) {
            return self.hpet.write(offset, data, self.clock.now);
        }
        let offset = gpa & VIRTIO_OFFSET_MASK;
        let Some(kind) = VirtioKind::at(gpa) else { return };
        match kind {
            VirtioKind::Net => {
                if let Some(net) = &mut self.net {
                    net.write(ram, offset, data, effects);
                }
            }
            VirtioKind::Blk => {
                if let Some(blk) = &mut self.blk {
                    blk.write(ram, offset, data, effects);
                }
            }
            VirtioKind::Rng => self.rng.write(ram, offset, data, effects),
        }
        self.drive_virtio_line(kind);
    }

    fn drive_virtio_line(&mut self, kind: VirtioKind) {
        let level = match kind {
            VirtioKind::Net => self.net.as_ref().is_some_and(Transport::interrupt),
            VirtioKind::Blk => self.blk.as_ref().is_some_and(Transport::interrupt),
            VirtioKind::Rng => self.rng.interrupt(),
        };
        self.pic.set_line(kind.window().irq, level);
    }

    /// Takes in what happened outside.
    ///
    /// # Errors
    /// The event does not belong to what the guest asked for; the board is then unchanged.
    pub fn apply(
        &mut self,
        ram: &GuestRam,
        event: &Event,
        effects: &mut Vec<Effect>,
    ) -> Result<(), DeviceError> {
        match event {
            Event::Tick { now } => self.advance(*now),
            Event::Frame { data } => self.receive_frame(ram, data)?,
            Event::DiskDone { id, status, data } => {
                self.complete_disk_request(ram, (*id, *status, data), effects)?;
            }
            Event::Console { data } => {
                self.uart.receive(data);
                self.pic.set_line(UART_IRQ, self.uart.interrupt());
            }
            Event::Entropy { data } => self.deliver_entropy(ram, data, effects)?,
            Event::PowerButton => {
                self.acpi_pm.press_power_button();
                self.pic.set_line(SCI_IRQ, self.acpi_pm.interrupt());
            }
        }
        Ok(())
    }

    fn receive_frame(&mut self, ram: &GuestRam, frame: &[u8]) -> Result<(), DeviceError> {
        let net = self.net.as_mut().ok_or(DeviceError::NoSuchDevice { kind: Net::KIND })?;
        if frame.len() > MAX_FRAME_BYTES {
            return Err(DeviceError::FrameTooLong { found: frame.len() });
        }
        net.handle(|net, queues| net.receive(queues, ram, frame));
        self.drive_virtio_line(VirtioKind::Net);
        Ok(())
    }

    fn complete_disk_request(
        &mut self,
        ram: &GuestRam,
        completion: (u64, DiskStatus, &[u8]),
        effects: &mut Vec<Effect>,
    ) -> Result<(), DeviceError> {
        let blk = self.blk.as_mut().ok_or(DeviceError::NoSuchDevice { kind: Blk::KIND })?;
        let (id, status, data) = completion;
        blk.backend().check_completion(id, status, data)?;
        blk.handle(|blk, queues| blk.complete(queues, ram, completion, effects));
        self.drive_virtio_line(VirtioKind::Blk);
        Ok(())
    }

    fn deliver_entropy(
        &mut self,
        ram: &GuestRam,
        data: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<(), DeviceError> {
        let expected = self.rng.backend().outstanding_bytes().unwrap_or(0);
        if expected == 0 || data.len() != expected {
            return Err(DeviceError::EntropyLength { expected, found: data.len() });
        }
        self.rng.handle(|rng, queues| rng.deliver(queues, ram, data, effects));
        self.drive_virtio_line(VirtioKind::Rng);
        Ok(())
    }

    /// Disk requests handed out and not answered, in the order of their ids: what a backup that takes over
    /// has to do (again).
    pub fn outstanding_disk_requests(&self) -> Vec<DiskRequest> {
        self.blk.as_ref().map(|blk| blk.backend().outstanding()).unwrap_or_default()
    }

    /// How many random bytes the guest asked for and did not get; `None` if it waits for none.
    pub fn outstanding_entropy(&self) -> Option<usize> {
        self.rng.backend().outstanding_bytes()
    }

    fn devices(&self) -> impl Iterator<Item = &dyn Device> {
        let fixed: [&dyn Device; 9] = [
            &self.clock,
            &self.pic,
            &self.pit,
            &self.acpi_pm,
            &self.cmos,
            &self.uart,
            &self.i8042,
            &self.hpet,
            &self.rng,
        ];
        let net = self.net.as_ref().map(|net| net as &dyn Device);
        let blk = self.blk.as_ref().map(|blk| blk as &dyn Device);
        fixed.into_iter().chain(net).chain(blk)
    }

    fn devices_mut(&mut self) -> impl Iterator<Item = &mut dyn Device> {
        let fixed: [&mut dyn Device; 9] = [
            &mut self.clock,
            &mut self.pic,
            &mut self.pit,
            &mut self.acpi_pm,
            &mut self.cmos,
            &mut self.uart,
            &mut self.i8042,
            &mut self.hpet,
            &mut self.rng,
        ];
        let net = self.net.as_mut().map(|net| net as &mut dyn Device);
        let blk = self.blk.as_mut().map(|blk| blk as &mut dyn Device);
        fixed.into_iter().chain(net).chain(blk)
    }

    /// The whole state, one payload per device.
    pub fn save(&self) -> Vec<Payload> {
        self.devices().map(schema::save).collect()
    }

    /// A board in the state that `payloads` describe. Nothing happens by loading: no interrupt, no effect.
    ///
    /// # Errors
    /// A payload is unknown, missing, of another version, cut short, too long, or holds a value that the
    /// device can never hold.
    pub fn load(config: &BoardConfig, payloads: &[Payload]) -> Result<Self, DeviceError> {
        let mut board = Self::new(config);
        let mut left: Vec<&Payload> = payloads.iter().collect();
        for device in board.devices_mut() {
            let kind = device.kind();
            let found = left.iter().position(|payload| payload.kind == kind);
            let found = found.ok_or(DeviceError::MissingPayload { kind })?;
            schema::load(device, left.remove(found))?;
        }
        match left.first() {
            None => Ok(board),
            Some(payload) => Err(DeviceError::UnknownPayload { kind: payload.kind.clone() }),
        }
    }

    /// XXH3 (64-bit) over all payloads of [`Board::save`]: equal states have equal digests.
    pub fn digest(&self) -> u64 {
        let mut hasher = Xxh3::new();
        for payload in self.save() {
            for part in [payload.kind.as_bytes(), &payload.version.to_le_bytes(), &payload.bytes] {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
        }
        hasher.digest()
    }
}
