//! The HPET's main counter: a clock that a guest reads in memory, without an exit.
//!
//! Owns: the configuration register and where the counter counts from. Must never: interrupt; its timers have no line
//! to do so with, since a guest has the 8254 for that. Reads do not come here: whoever runs the guest shows it
//! [`Hpet::registers`] as memory, before each entry, so between two entries the counter stands still.
//!
//! Follows the IA-PC HPET specification 1.0a, section 2.3. The counter has 64 bits and four ticks for each of
//! [`GuestTime`]: 14.318180 MHz, as real ones have.
//!
//! ```text
//! 0x00 capabilities   0x10 configuration (bit 0: the counter counts)   0xf0 main counter
//! ```

use crate::DeviceError;
use crate::schema::{Decoder, Device, Encoder};
use ft_log::GuestTime;

const CAPABILITIES: u64 = 0x00;
const CONFIGURATION: u64 = 0x10;
const COUNTER: u64 = 0xf0;
const COMPARATORS: [u64; 3] = [0x108, 0x128, 0x148];

/// Counter ticks in a tick of [`GuestTime`].
const TICKS: u64 = 4;
const FEMTOSECONDS: u64 = 1_000_000_000_000_000;
const PERIOD_FS: u64 = FEMTOSECONDS / (GuestTime::HZ * TICKS);
/// What a table for operating systems says of it, too (ACPI `HPET`, event timer block ID): revision 1, three timers (the
/// least that there may be), a 64-bit counter, no legacy interrupts.
pub const HPET_IDENTITY: u32 = 0x8086 << 16 | 1 << 13 | 2 << 8 | 1;
const ENABLE: u64 = 1;

/// The registers that can change.
pub(crate) struct Hpet {
    counts: bool,
    /// The counter at guest time `since`; while it does not count, the counter.
    value: u64,
    since: GuestTime,
}

impl Hpet {
    pub(crate) fn new() -> Self {
        Self { counts: false, value: 0, since: GuestTime(0) }
    }

    fn counter(&self, now: GuestTime) -> u64 {
        let passed = if self.counts { now.0.saturating_sub(self.since.0) } else { 0 };
        self.value.wrapping_add(passed.wrapping_mul(TICKS))
    }

    /// All registers that are not 0: offset and value, 8 bytes each.
    pub(crate) fn registers(&self, now: GuestTime) -> [(u64, u64); 6] {
        let [first, second, third] = COMPARATORS.map(|offset| (offset, u64::MAX));
        [
            (CAPABILITIES, PERIOD_FS << 32 | u64::from(HPET_IDENTITY)),
            (CONFIGURATION, u64::from(self.counts) * ENABLE),
            (COUNTER, self.counter(now)),
            first,
            second,
            third,
        ]
    }

    /// A write of 4 or 8 bytes at a multiple of that. Others, and those to registers that cannot be changed, do nothing.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8], now: GuestTime) {
        let register = offset & !7;
        let old = match register {
            CONFIGURATION => u64::from(self.counts) * ENABLE,
            COUNTER => self.counter(now),
            _ => return,
        };
        let (written, mask) = match (data, offset & 7) {
            (&[a, b, c, d], 0) => (u64::from(u32::from_le_bytes([a, b, c, d])), u64::from(u32::MAX)),
            (&[a, b, c, d], 4) => (u64::from(u32::from_le_bytes([a, b, c, d])) << 32, u64::MAX << 32),
            (&[a, b, c, d, e, f, g, h], 0) => (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u64::MAX),
            _ => return,
        };
        let new = old & !mask | written;
        self.value = if register == COUNTER { new } else { self.counter(now) };
        self.since = now;
        if register == CONFIGURATION {
            self.counts = new & ENABLE != 0;
        }
    }
}

impl Device for Hpet {
    fn kind(&self) -> &'static str {
        "hpet"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.bool(self.counts);
        out.u64(self.value);
        out.u64(self.since.0);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.counts = input.bool("counts")?;
        self.value = input.u64("value")?;
        self.since = GuestTime(input.u64("since")?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(hpet: &Hpet, offset: u64, now: u64) -> u64 {
        let registers = hpet.registers(GuestTime(now));
        registers.iter().find(|(at, _)| *at == offset).map_or(0, |(_, value)| *value)
    }

    #[test]
    fn its_period_is_that_of_14_318_180_hz() {
        let capabilities = read(&Hpet::new(), CAPABILITIES, 0);
        assert_eq!(FEMTOSECONDS / (capabilities >> 32), 14_318_180);
        assert!(capabilities >> 32 <= 100_000_000, "the longest that the specification allows");
        assert_eq!(capabilities & 0xff, 1, "revision");
        assert_eq!(capabilities >> 8 & 0x1f, 2, "number of the last timer");
        assert_eq!(capabilities >> 13 & 7, 1, "64 bits, no legacy interrupts");
    }

    #[test]
    fn it_counts_while_it_is_enabled() {
        let mut hpet = Hpet::new();
        assert_eq!(read(&hpet, COUNTER, 1_000), 0);
        hpet.write(CONFIGURATION, &1u32.to_le_bytes(), GuestTime(1_000));
        assert_eq!((read(&hpet, CONFIGURATION, 1_000), read(&hpet, COUNTER, 1_000)), (1, 0));
        assert_eq!(read(&hpet, COUNTER, 1_100), 400);
        hpet.write(CONFIGURATION, &0u64.to_le_bytes(), GuestTime(1_100));
        assert_eq!(read(&hpet, COUNTER, 9_000), 400);
    }

    #[test]
    fn the_counter_takes_halves_and_wraps() {
        let mut hpet = Hpet::new();
        hpet.write(COUNTER, &7u32.to_le_bytes(), GuestTime(0));
        hpet.write(COUNTER + 4, &u32::MAX.to_le_bytes(), GuestTime(0));
        assert_eq!(read(&hpet, COUNTER, 0), u64::from(u32::MAX) << 32 | 7);
        hpet.write(CONFIGURATION, &[1, 0, 0, 0, 0, 0, 0, 0], GuestTime(10));
        assert_eq!(read(&hpet, COUNTER, 10 + (1 << 30)), 7);
        hpet.write(COUNTER, &u64::MAX.to_le_bytes(), GuestTime(20));
        assert_eq!(read(&hpet, COUNTER, 21), 3);
    }

    #[test]
    fn what_cannot_be_written_stays() {
        let mut hpet = Hpet::new();
        hpet.write(CONFIGURATION, &u64::MAX.to_le_bytes(), GuestTime(0));
        assert_eq!(read(&hpet, CONFIGURATION, 0), ENABLE, "no legacy routing");
        let before = hpet.registers(GuestTime(50));
        for offset in [CAPABILITIES, 0x20, 0x100, 0x108, 0x3f8, COUNTER + 1] {
            hpet.write(offset, &[0xa5; 2], GuestTime(50));
            hpet.write(offset, &[0xa5; 16], GuestTime(50));
        }
        hpet.write(COUNTER + 1, &[0xa5; 4], GuestTime(50));
        hpet.write(COUNTER + 4, &[0xa5; 8], GuestTime(50));
        hpet.write(CAPABILITIES, &[0; 8], GuestTime(50));
        assert_eq!(hpet.registers(GuestTime(50)), before);
    }
}
