//! ACPI fixed hardware: PM1 event and control registers, the PM timer, and the reset control register.
//!
//! Owns: power button and timer status, their enables, the system control interrupt (SCI), sleep requests.
//! Must never: count time itself; the 24-bit PM timer is [`GuestTime`] modulo 2^24.
//!
//! Follows ACPI 6.5 section 4.8.2 (timer) and 4.8.3 (PM1 registers). There is no legacy mode: `SCI_EN` is
//! always set. Of the sleep states only S5 (`SLP_TYP` 5) does something.
//!
//! ```text
//! 0x600 PM1_STS (write 1 to clear)   0x604 PM1_CNT           0x608 PM_TMR
//! 0x602 PM1_EN                       0x606 reads 0           0xcf9 reset control
//! ```

use crate::layout::{PM_TIMER_PORT, PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_PORT, SLEEP_TYPE_S5};
use crate::schema::{Decoder, Device, Encoder};
use crate::{DeviceError, Effect};
use ft_log::GuestTime;

const TIMER_STATUS: u16 = 1 << 0;
const POWER_BUTTON_STATUS: u16 = 1 << 8;
const STATUS_MASK: u16 = TIMER_STATUS | POWER_BUTTON_STATUS;
/// Timer, global, power button, sleep button and RTC enables can be kept; only two of them have a source.
const ENABLE_MASK: u16 = 0x0721;
const SCI_ENABLED: u16 = 1;
/// `SLP_TYP` (bits 10 to 12) and `BM_RLD` (bit 1); `SLP_EN` and `GBL_RLS` read as 0.
const CONTROL_MASK: u16 = 0x1c02;
const SLEEP_ENABLE: u16 = 1 << 13;

const TIMER_MASK: u64 = (1 << 24) - 1;
/// The timer status bit is set whenever the counter's most significant bit changes.
const TIMER_CARRY_BIT: u32 = 23;

/// Bits of the reset control register: the CPU is reset by bit 2, bit 1 says how and is kept.
const RESET_CPU: u8 = 1 << 2;
const RESET_SYSTEM: u8 = 1 << 1;

/// Replaces byte `index` of `register`.
fn with_byte(register: u16, index: u16, value: u8) -> u16 {
    let shift = 8 * u32::from(index);
    register & !(0xff << shift) | u16::from(value) << shift
}

/// The registers.
pub(crate) struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    reset_control: u8,
}

impl AcpiPm {
    pub(crate) fn new() -> Self {
        Self { status: 0, enable: 0, control: 0, reset_control: 0 }
    }

    /// Sets the timer status bit if the counter's top bit changed between `before` and `now`.
    pub(crate) fn advance(&mut self, before: GuestTime, now: GuestTime) {
        if before.0 >> TIMER_CARRY_BIT != now.0 >> TIMER_CARRY_BIT {
            self.status |= TIMER_STATUS;
        }
    }

    /// When the timer raises the SCI next.
    pub(crate) fn next_event(&self, now: GuestTime) -> Option<GuestTime> {
        let armed = self.enable & TIMER_STATUS != 0 && self.status & TIMER_STATUS == 0;
        let carry = ((now.0 >> TIMER_CARRY_BIT) + 1).checked_mul(1 << TIMER_CARRY_BIT)?;
        armed.then_some(GuestTime(carry))
    }

    pub(crate) fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON_STATUS;
    }

    /// Level of the SCI line.
    pub(crate) fn interrupt(&self) -> bool {
        self.status & self.enable != 0
    }

    /// Reads one of 0x600 to 0x60b and 0xcf9.
    pub(crate) fn read(&self, port: u16, now: GuestTime) -> u8 {
        if port == RESET_PORT {
            return self.reset_control;
        }
        let offset = usize::from(port - PM1A_EVENT_PORT);
        let [s0, s1] = self.status.to_le_bytes();
        let [e0, e1] = self.enable.to_le_bytes();
        let [c0, c1] = (self.control | SCI_ENABLED).to_le_bytes();
        let [t0, t1, t2, t3] = ((now.0 & TIMER_MASK) as u32).to_le_bytes();
        [s0, s1, e0, e1, c0, c1, 0, 0, t0, t1, t2, t3].get(offset).copied().unwrap_or(0xff)
    }

    /// Writes one of 0x600 to 0x60b and 0xcf9.
    pub(crate) fn write(&mut self, port: u16, value: u8, effects: &mut Vec<Effect>) {
        const ENABLE_PORT: u16 = PM1A_EVENT_PORT + 2;
        match port {
            RESET_PORT => {
                self.reset_control = value & RESET_SYSTEM;
                if value & RESET_CPU != 0 {
                    effects.push(Effect::Reset);
                }
            }
            PM_TIMER_PORT.. => {} // the timer is read-only
            PM1A_CONTROL_PORT.. => self.write_control(port - PM1A_CONTROL_PORT, value, effects),
            ENABLE_PORT.. => self.enable = with_byte(self.enable, port - ENABLE_PORT, value) & ENABLE_MASK,
            _ => self.status &= !with_byte(0, port - PM1A_EVENT_PORT, value),
        }
    }

    fn write_control(&mut self, index: u16, value: u8, effects: &mut Vec<Effect>) {
        if index > 1 {
            return;
        }
        let written = with_byte(self.control, index, value);
        self.control = written & CONTROL_MASK;
        let sleep_type = (written >> 10) as u8 & 7;
        if written & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 {
            effects.push(Effect::PowerOff);
        }
    }
}

impl Device for AcpiPm {
    fn kind(&self) -> &'static str {
        "acpi-pm"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.u16(self.status);
        out.u16(self.enable);
        out.u16(self.control);
        out.u8(self.reset_control);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.status = input.u16("status")?;
        input.check("status", self.status.into(), self.status & !STATUS_MASK == 0)?;
        self.enable = input.u16("enable")?;
        input.check("enable", self.enable.into(), self.enable & !ENABLE_MASK == 0)?;
        self.control = input.u16("control")?;
        input.check("control", self.control.into(), self.control & !CONTROL_MASK == 0)?;
        self.reset_control = input.u8("reset_control")?;
        input.check("reset_control", self.reset_control.into(), self.reset_control & !RESET_SYSTEM == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: GuestTime = GuestTime(0x0123_4567);

    fn write16(pm: &mut AcpiPm, port: u16, value: u16) -> Vec<Effect> {
        let mut effects = Vec::new();
        for (offset, byte) in (0..).zip(value.to_le_bytes()) {
            pm.write(port + offset, byte, &mut effects);
        }
        effects
    }

    fn read16(pm: &AcpiPm, port: u16) -> u16 {
        u16::from_le_bytes([pm.read(port, T), pm.read(port + 1, T)])
    }

    #[test]
    fn registers_keep_their_masks() {
        let mut pm = AcpiPm::new();
        for (port, writable, fixed) in [(0x602, 0x0721, 0), (0x604, 0x1c02, 1), (0x606, 0, 0)] {
            for value in [0xdfff, 0x0000, 0x85a5, 0x5a5a] {
                assert_eq!(write16(&mut pm, port, value), []);
                assert_eq!(read16(&pm, port), value & writable | fixed, "port {port:#x}");
            }
        }
        write16(&mut pm, 0x600, 0xffff);
        assert_eq!(read16(&pm, 0x600), 0, "status bits cannot be set by writing");
    }

    #[test]
    fn timer_is_guest_time_modulo_24_bits_and_read_only() {
        let mut pm = AcpiPm::new();
        write16(&mut pm, 0x608, 0xffff);
        let value = [0x608, 0x609, 0x60a, 0x60b].map(|port| pm.read(port, T));
        assert_eq!(u32::from_le_bytes(value), 0x0023_4567);
    }

    #[test]
    fn power_button_interrupts_while_enabled_and_is_cleared_by_writing_one() {
        let mut pm = AcpiPm::new();
        pm.press_power_button();
        assert!(!pm.interrupt());
        write16(&mut pm, 0x602, 0x0100);
        assert!(pm.interrupt());
        write16(&mut pm, 0x600, 0x0001);
        assert_eq!(read16(&pm, 0x600), 0x0100, "writing another bit clears nothing");
        write16(&mut pm, 0x600, 0x0100);
        assert!(!pm.interrupt());
        assert_eq!(read16(&pm, 0x600), 0);
    }

    #[test]
    fn timer_status_is_set_when_the_top_bit_changes() {
        let mut pm = AcpiPm::new();
        write16(&mut pm, 0x602, 0x0001);
        assert_eq!(pm.next_event(GuestTime(5)), Some(GuestTime(1 << 23)));
        pm.advance(GuestTime(5), GuestTime((1 << 23) - 1));
        assert!(!pm.interrupt());
        pm.advance(GuestTime((1 << 23) - 1), GuestTime(1 << 23));
        assert!(pm.interrupt());
        assert_eq!(pm.next_event(GuestTime(1 << 23)), None, "it is pending already");
        write16(&mut pm, 0x600, 0x0001);
        assert_eq!(pm.next_event(GuestTime(1 << 23)), Some(GuestTime(1 << 24)));
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let mut pm = AcpiPm::new();
        assert_eq!(write16(&mut pm, 0x604, 5 << 10), []);
        assert_eq!(write16(&mut pm, 0x604, 3 << 10 | 1 << 13), []);
        assert_eq!(write16(&mut pm, 0x604, 5 << 10 | 1 << 13), [Effect::PowerOff]);
        assert_eq!(read16(&pm, 0x604) >> 13, 0, "sleep enable is write-only");
    }

    #[test]
    fn reset_register_resets_on_bit_2_and_keeps_bit_1() {
        let mut pm = AcpiPm::new();
        for (value, kept, effects) in
            [(0xfb, 0x02, vec![]), (0x00, 0, vec![]), (0x06, 0x02, vec![Effect::Reset])]
        {
            let mut seen = Vec::new();
            pm.write(RESET_PORT, value, &mut seen);
            assert_eq!((pm.read(RESET_PORT, T), seen), (kept, effects));
        }
    }
}
