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
