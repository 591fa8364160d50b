//! The serial port: a 16550A on COM1.
//!
//! Owns: its registers and the bytes that were typed and not read yet. Must never: hold written bytes back;
//! each one is an [`Effect::Console`] at once, so the transmitter is always empty.
//!
//! Follows the National Semiconductor PC16550D datasheet. Typed bytes wait in a queue of
//! [`INPUT_MAX_BYTES`]; the first 16 (or, with the FIFO off, the first one) are what the guest sees as the
//! receiver. When the queue is full, the newest bytes are dropped and the overrun bit is set. The line
//! settings are kept but have no effect, received bytes have no errors, and the time-out of the receive
//! FIFO elapses at once. OUT2 does not gate the interrupt.

use crate::schema::{Decoder, Device, Encoder};
use crate::{DeviceError, Effect};
use std::collections::VecDeque;

/// Most typed bytes that wait for the guest.
pub(crate) const INPUT_MAX_BYTES: usize = 4096;
const FIFO_BYTES: usize = 16;

/// Interrupt enable register.
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
const IER_MASK: u8 = 0x0f;

/// Interrupt identification register.
const IIR_NONE: u8 = 0x01;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_RECEIVED: u8 = 0x04;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_FIFO_ENABLED: u8 = 0xc0;

/// FIFO control register; bits 1 and 2 clear themselves.
const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_MASK: u8 = 0xc9;

const LCR_DIVISOR_LATCH: u8 = 1 << 7;

/// Modem control register.
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

/// Line status register.
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// Modem status register.
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// The delta of the ring indicator (bit 2) tells its falling edge only.
const MSR_RI_DELTA: u8 = 1 << 2;

/// The serial port.
pub(crate) struct Uart {
    interrupt_enable: u8,
    fifo_control: u8,
    line_control: u8,
    modem_control: u8,
    modem_delta: u8,
    scratch: u8,
    divisor: [u8; 2],
    overrun: bool,
    /// The transmitter became empty and the guest was not told yet.
    transmitter_event: bool,
    input: VecDeque<u8>,
}

impl Uart {
    pub(crate) fn new() -> Self {
        Self {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            modem_control: 0,
            modem_delta: 0,
            scratch: 0,
            divisor: [12, 0], // 9,600 baud
            overrun: false,
            transmitter_event: false,
            input: VecDeque::new(),
        }
    }

    /// Bytes that were typed on the console.
    pub(crate) fn receive(&mut self, data: &[u8]) {
        let room = INPUT_MAX_BYTES - self.input.len();
        self.input.extend(&data[..data.len().min(room)]);
        self.overrun |= data.len() > room;
    }

    fn fifo_enabled(&self) -> bool {
        self.fifo_control & FCR_ENABLE != 0
    }

    fn receive_trigger(&self) -> usize {
        if !self.fifo_enabled() {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fifo_control >> 6)]
    }

    /// The interrupt of highest priority, as the low bits of the IIR.
    fn interrupt_id(&self) -> u8 {
        let enabled = |bit| self.interrupt_enable & bit != 0;
        if enabled(IER_LINE_STATUS) && self.overrun {
            IIR_LINE_STATUS
        } else if enabled(IER_RECEIVED) && self.input.len() >= self.receive_trigger() {
            IIR_RECEIVED
        } else if enabled(IER_RECEIVED) && !self.input.is_empty() {
            IIR_TIMEOUT
        } else if enabled(IER_TRANSMITTER_EMPTY) && self.transmitter_event {
            IIR_TRANSMITTER_EMPTY
        } else if enabled(IER_MODEM_STATUS) && self.modem_delta != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// Level of the interrupt line.
    pub(crate) fn interrupt(&self) -> bool {
        self.interrupt_id() != IIR_NONE
    }

    fn modem_lines(&self) -> u8 {
        if self.modem_control & MCR_LOOPBACK == 0 {
            return MSR_CTS | MSR_DSR | MSR_DCD;
        }
        [(MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(output, _)| self.modem_control & output != 0)
            .fold(0, |lines, (_, input)| lines | input)
    }

    /// Reads register `offset` (0 to 7).
    pub(crate) fn read(&mut self, offset: u16) -> u8 {
        let divisor_latch = self.line_control & LCR_DIVISOR_LATCH != 0;
        match offset {
            0 | 1 if divisor_latch => self.divisor[usize::from(offset)],
            0 => self.input.pop_front().unwrap_or(0),
            1 => self.interrupt_enable,
            2 => {
                let id = self.interrupt_id();
                if id == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_event = false;
                }
                id | if self.fifo_enabled() { IIR_FIFO_ENABLED } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let ready = if self.input.is_empty() { 0 } else { LSR_DATA_READY };
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                LSR_TRANSMITTER_EMPTY | ready | overrun
            }
            6 => self.modem_lines() | std::mem::take(&mut self.modem_delta),
            _ => self.scratch,
        }
    }

    /// Writes register `offset` (0 to 7). True if the interrupt line fell and rose again meanwhile, which an
    /// edge-triggered controller must see.
    pub(crate) fn write(&mut self, offset: u16, value: u8, effects: &mut Vec<Effect>) -> bool {
        let divisor_latch = self.line_control & LCR_DIVISOR_LATCH != 0;
        match offset {
            0 | 1 if divisor_latch => self.divisor[usize::from(offset)] = value,
            0 => return self.transmit(value, effects),
            1 => {
                // Enabling the interrupt while the transmitter is empty raises it.
                let rising = value & !self.interrupt_enable & IER_TRANSMITTER_EMPTY != 0;
                self.transmitter_event |= rising;
                self.interrupt_enable = value & IER_MASK;
            }
            2 => self.write_fifo_control(value),
            3 => self.line_control = value,
            4 => {
                let before = self.modem_lines();
                self.modem_control = value & MCR_MASK;
                let after = self.modem_lines();
                let changed = (before ^ after) >> 4 & !MSR_RI_DELTA;
                self.modem_delta |= changed | (before & !after) >> 4 & MSR_RI_DELTA;
            }
            7 => self.scratch = value,
            _ => {} // line and modem status are read-only
        }
        false
    }

    /// The byte leaves at once: the transmitter is full and empty again.
    fn transmit(&mut self, value: u8, effects: &mut Vec<Effect>) -> bool {
        self.transmitter_event = false;
        let fell = !self.interrupt();
        if self.modem_control & MCR_LOOPBACK != 0 {
            self.receive(&[value]);
        } else {
            effects.push(Effect::Console(value));
        }
        self.transmitter_event = true;
        fell && self.interrupt()
    }

    fn write_fifo_control(&mut self, value: u8) {
        let switched = (value ^ self.fifo_control) & FCR_ENABLE != 0;
        if switched || (value & FCR_ENABLE != 0 && value & FCR_CLEAR_RECEIVER != 0) {
            let depth = if self.fifo_enabled() { FIFO_BYTES } else { 1 };
            self.input.drain(..depth.min(self.input.len()));
        }
        // The other bits take effect only together with the enable bit.
        self.fifo_control = if value & FCR_ENABLE != 0 { value & FCR_MASK } else { 0 };
    }
}

impl Device for Uart {
    fn kind(&self) -> &'static str {
        "uart-16550"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.u8(self.interrupt_enable);
        out.u8(self.fifo_control);
        out.u8(self.line_control);
        out.u8(self.modem_control);
        out.u8(self.modem_delta);
        out.u8(self.scratch);
        out.array(&self.divisor);
        out.bool(self.overrun);
        out.bool(self.transmitter_event);
        let (front, back) = self.input.as_slices();
        out.count(self.input.len());
        out.array(front);
        out.array(back);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.interrupt_enable = input.u8("interrupt_enable")?;
        input.check(
            "interrupt_enable",
            self.interrupt_enable.into(),
            self.interrupt_enable & !IER_MASK == 0,
        )?;
        self.fifo_control = input.u8("fifo_control")?;
        self.line_control = input.u8("line_control")?;
        self.modem_control = input.u8("modem_control")?;
        self.modem_delta = input.u8("modem_delta")?;
        input.check("modem_delta", self.modem_delta.into(), self.modem_delta <= 0x0f)?;
        self.scratch = input.u8("scratch")?;
        self.divisor = input.array("divisor")?;
        self.overrun = input.bool("overrun")?;
        self.transmitter_event = input.bool("transmitter_event")?;
        self.input = input.bytes("input", INPUT_MAX_BYTES)?.iter().copied().collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(uart: &mut Uart, offset: u16, value: u8) -> Vec<Effect> {
        let mut effects = Vec::new();
        uart.write(offset, value, &mut effects);
        effects
    }

    fn uart_with(registers: &[(u16, u8)]) -> Uart {
        let mut uart = Uart::new();
        for (offset, value) in registers {
            write(&mut uart, *offset, *value);
        }
        uart
    }

    #[test]
    fn registers_keep_their_masks() {
        let mut uart = Uart::new();
        for (offset, writable) in [(1, 0x0f), (4, 0x1f), (7, 0xff)] {
            for value in [0xff, 0x00, 0xa5, 0x5a] {
                write(&mut uart, offset, value);
                assert_eq!(uart.read(offset), value & writable, "register {offset}");
            }
        }
        for value in [0xff, 0x00, 0xa5, 0x5a] {
            write(&mut uart, 3, value);
            assert_eq!(uart.read(3), value);
        }
        write(&mut uart, 4, 0);
        for offset in [5, 6] {
            uart.read(6);
            let before = uart.read(offset);
            write(&mut uart, offset, !before);
            assert_eq!(uart.read(offset), before, "register {offset} is read-only");
        }
    }

    #[test]
    fn divisor_hides_data_and_interrupt_enable() {
        let mut uart = uart_with(&[(1, 0x05), (3, 0x80)]);
        for value in [0xff, 0x01] {
            assert_eq!(write(&mut uart, 0, value), []);
            assert_eq!(write(&mut uart, 1, !value), []);
            assert_eq!([uart.read(0), uart.read(1)], [value, !value]);
        }
        write(&mut uart, 3, 0x03);
        assert_eq!(uart.read(1), 0x05);
        assert_eq!(write(&mut uart, 0, b'x'), [Effect::Console(b'x')]);
    }

    #[test]
    fn fifo_is_identified_as_16550a() {
        let mut uart = Uart::new();
        assert_eq!(uart.read(2), 0x01);
        write(&mut uart, 2, 0x01);
        assert_eq!(uart.read(2), 0xc1);
        write(&mut uart, 2, 0xa1);
        assert_eq!(uart.read(2), 0xc1, "bit 5 would be a 16750");
        write(&mut uart, 2, 0x00);
        assert_eq!(uart.read(2), 0x01);
    }

    #[test]
    fn enabling_the_transmitter_interrupt_raises_it_every_time() {
        let mut uart = Uart::new();
        for _ in 0..2 {
            write(&mut uart, 1, 0x02);
            assert!(uart.interrupt());
            assert_eq!(uart.read(2), 0x02);
            assert_eq!(uart.read(2), 0x01, "reading the identification clears it");
            assert!(!uart.interrupt());
            write(&mut uart, 1, 0x00);
        }
    }

    #[test]
    fn sent_byte_pulses_the_line() {
        let mut uart = uart_with(&[(1, 0x02)]);
        let mut effects = Vec::new();
        assert!(uart.write(0, b'a', &mut effects), "the line was high, fell and rose");
        uart.read(2);
        assert!(!uart.interrupt());
        uart.write(0, b'b', &mut effects);
        assert!(uart.interrupt());
        assert_eq!(effects, [Effect::Console(b'a'), Effect::Console(b'b')]);
        uart.receive(b"x");
        write(&mut uart, 1, 0x03);
        assert!(!uart.write(0, b'c', &mut effects), "the received byte holds the line");
    }

    #[test]
    fn received_bytes_interrupt_at_the_trigger_or_by_time_out() {
        let mut uart = uart_with(&[(2, 0x81), (1, 0x01)]);
        uart.receive(b"1234567");
        assert_eq!(uart.read(2), 0xcc, "fewer than the trigger of 8");
        uart.receive(b"8");
        assert_eq!(uart.read(2), 0xc4);
        assert_eq!((0..8).map(|_| uart.read(0)).collect::<Vec<_>>(), b"12345678");
        assert_eq!((uart.read(2), uart.read(0), uart.read(5)), (0xc1, 0, 0x60));
    }

    #[test]
    fn full_input_queue_drops_the_newest_and_tells_once() {
        let mut uart = uart_with(&[(1, 0x04)]);
        uart.receive(&[7; INPUT_MAX_BYTES]);
        assert!(!uart.interrupt());
        uart.receive(b"late");
        assert_eq!(uart.read(2), 0x06);
        assert_eq!([uart.read(5), uart.read(5)], [0x63, 0x61]);
        assert_eq!(
            (0..INPUT_MAX_BYTES).map(|_| uart.read(0)).filter(|byte| *byte == 7).count(),
            INPUT_MAX_BYTES
        );
        assert_eq!(uart.read(5), 0x60);
    }

    #[test]
    fn clearing_the_receiver_drops_what_the_fifo_holds() {
        let mut uart = uart_with(&[(2, 0x01)]);
        uart.receive(&[1; FIFO_BYTES]);
        uart.receive(b"next");
        write(&mut uart, 2, 0x03);
        assert_eq!(uart.read(0), b'n');
    }

    #[test]
    fn loopback_connects_outputs_to_inputs() {
        let mut uart = Uart::new();
        assert_eq!(uart.read(6), 0xb0);
        write(&mut uart, 4, 0x1a); // loopback, OUT2, RTS: how Linux looks for a port
        assert_eq!(uart.read(6) & 0xf0, 0x90);
        for (output, input) in [(0x11, 0x20), (0x12, 0x10), (0x14, 0x40), (0x18, 0x80)] {
            write(&mut uart, 4, output);
            assert_eq!(uart.read(6) & 0xf0, input);
        }
        assert_eq!(write(&mut uart, 0, 0x42), []);
        assert_eq!(uart.read(0), 0x42);
    }

    #[test]
    fn modem_changes_are_told_once() {
        let mut uart = uart_with(&[(1, 0x08), (4, 0x10)]);
        assert_eq!(uart.read(2), 0x00);
        assert_eq!([uart.read(6), uart.read(6)], [0x0b, 0x00], "CTS, DSR and DCD fell");
        assert!(!uart.interrupt());
        write(&mut uart, 4, 0x14);
        assert_eq!(uart.read(6), 0x40, "a rising ring indicator is no event");
        write(&mut uart, 4, 0x10);
        assert_eq!(uart.read(6), 0x04);
    }
}
