//! The MC146818 real-time clock and its CMOS memory.
//!
//! Owns: date and time as the guest sees and sets them, the status registers and 128 bytes of memory. Must
//! never: read the host's clock; the time is `epoch_s` of the board plus the guest time.
//!
//! Follows the Motorola MC146818A datasheet; register 0x32 (century) as ACPI's `CENTURY` names it. Time is
//! BCD and 24-hour, which the guest cannot change. Alarm, periodic and update interrupts never fire; their
//! registers and enables are kept.
//!
//! A guest reads the fields one by one, and every read comes at another time. Reading the seconds therefore
//! copies the whole time, and the other fields are read from that copy while it is less than a second old:
//! no guest sees 10:59:59 become 10:00:00 or 11:59:59. So the update-in-progress bit need never be set.
//! Setting the time keeps the moment at which seconds change.

use crate::DeviceError;
use crate::schema::{Decoder, Device, Encoder};
use ft_log::GuestTime;

const SECONDS: u8 = 0x00;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;

/// Registers of the time, in the order of [`Cmos::copy`]: second, minute, hour, day of the week, day, month,
/// year, century.
const TIME_REGISTERS: [u8; 8] = [SECONDS, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];
const COPY_SECOND: usize = 0;
const COPY_MINUTE: usize = 1;
const COPY_HOUR: usize = 2;
const COPY_DAY: usize = 4;
const COPY_MONTH: usize = 5;
const COPY_YEAR: usize = 6;
const COPY_CENTURY: usize = 7;

/// Divider and rate; the update-in-progress bit is read-only.
const STATUS_A_MASK: u8 = 0x7f;
/// `SET` and the interrupt and square wave enables; BCD, 24-hour and no daylight saving are fixed.
const STATUS_B_MASK: u8 = 0xf8;
const STATUS_B_FIXED: u8 = 0x02;
const STATUS_B_SET: u8 = 0x80;
/// The battery is good.
const STATUS_D_VALID: u8 = 0x80;

/// The last second of the year 9999, the last that four BCD digits can tell.
const LAST_SECOND: i64 = 253_402_300_799;

fn to_bcd(value: i64) -> u8 {
    (((value / 10 % 10) << 4) | (value % 10)) as u8
}

fn from_bcd(value: u8) -> i64 {
    i64::from(value >> 4) * 10 + i64::from(value & 0x0f)
}

/// Days since 1970-01-01 to year, month (1 to 12) and day (1 to 31) of the Gregorian calendar. Years are
/// counted from March, so that the leap day is the last of its year, in eras of 400 years (146,097 days).
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // from 0000-03-01
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

/// The inverse of [`date_of`]. Months and days out of range count on into what follows.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let months = year * 12 + month - 1 - 2; // from March
    let (year, month_from_march) = (months.div_euclid(12), months.rem_euclid(12));
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// The clock and its memory.
pub(crate) struct Cmos {
    epoch_s: i64,
    index: u8,
    memory: [u8; 128],
    /// What the guest added to the time by setting it.
    offset_s: i64,
    /// The time registers as last read or set.
    copy: [u8; 8],
    /// When `copy` was made.
    copied_at: Option<GuestTime>,
}

impl Cmos {
    /// A clock that shows the UNIX time `epoch_s` at guest time 0, and memory that tells `ram_bytes`.
    pub(crate) fn new(epoch_s: u64, ram_bytes: u64) -> Self {
        let mut memory = [0; 128];
        let mut put = |at: usize, value: u64, max: u64| {
            let [low, high, ..] = value.min(max).to_le_bytes();
            memory[at] = low;
            memory[at + 1] = high;
        };
        let above = |start: u64| ram_bytes.saturating_sub(start);
        put(0x15, 640, 640); // base memory in KiB
        put(0x17, above(1 << 20) >> 10, 0xffff); // KiB above 1 MiB
        put(0x30, above(1 << 20) >> 10, 0xffff);
        put(0x34, above(16 << 20) >> 16, 0xffff); // units of 64 KiB above 16 MiB
        memory[usize::from(STATUS_A)] = 0x26; // 32,768 Hz divider, 1,024 Hz rate
        let epoch_s = i64::try_from(epoch_s).unwrap_or(LAST_SECOND).min(LAST_SECOND);
        Self { epoch_s, index: 0, memory, offset_s: 0, copy: [0; 8], copied_at: None }
    }

    fn is_setting(&self) -> bool {
        self.memory[usize::from(STATUS_B)] & STATUS_B_SET != 0
    }

    fn refresh(&mut self, now: GuestTime) {
        let guest_s = now.0 / GuestTime::HZ;
        let now_s = self.epoch_s.saturating_add_unsigned(guest_s).saturating_add(self.offset_s);
        let now_s = now_s.clamp(0, LAST_SECOND);
        let (days, second) = (now_s / 86_400, now_s % 86_400);
        let (year, month, day) = date_of(days);
        let weekday = (days + 4) % 7 + 1; // 1970-01-01 was a Thursday, Sunday is 1
        let fields = [second % 60, second / 60 % 60, second / 3_600, weekday, day, month, year, year / 100];
        self.copy = fields.map(to_bcd);
        self.copied_at = Some(now);
    }

    /// Makes the clock go on from `copy`.
    fn set(&mut self, now: GuestTime) {
        let field = |at: usize| from_bcd(self.copy[at]);
        let year = field(COPY_CENTURY) * 100 + field(COPY_YEAR);
        let days = days_of(year, field(COPY_MONTH), field(COPY_DAY));
        let second = field(COPY_HOUR) * 3_600 + field(COPY_MINUTE) * 60 + field(COPY_SECOND);
        let running_s = self.epoch_s.saturating_add_unsigned(now.0 / GuestTime::HZ);
        self.offset_s = (days * 86_400 + second).saturating_sub(running_s);
    }

    fn read_data(&mut self, now: GuestTime) -> u8 {
        match self.index {
            STATUS_C => return 0, // no interrupt is ever pending
            STATUS_D => return STATUS_D_VALID,
            STATUS_B => return self.memory[usize::from(STATUS_B)] | STATUS_B_FIXED,
            _ => {}
        }
        let Some(field) = TIME_REGISTERS.iter().position(|register| *register == self.index) else {
            return self.memory[usize::from(self.index)];
        };
        let fresh = self.copied_at.is_some_and(|at| now.0.saturating_sub(at.0) < GuestTime::HZ);
        if (self.index == SECONDS || !fresh) && !self.is_setting() {
            self.refresh(now);
        }
        self.copy[field]
    }

    fn write_data(&mut self, value: u8, now: GuestTime) {
        if let Some(field) = TIME_REGISTERS.iter().position(|register| *register == self.index) {
            if !self.is_setting() {
                self.refresh(now);
            }
            self.copy[field] = value;
            if !self.is_setting() {
                self.set(now);
            }
            return;
        }
        match self.index {
            STATUS_A => self.memory[usize::from(STATUS_A)] = value & STATUS_A_MASK,
            STATUS_B => self.write_status_b(value, now),
            STATUS_C | STATUS_D => {}
            index => self.memory[usize::from(index)] = value,
        }
    }

    /// While `SET` is 1 the time registers stand still; when it becomes 0 the clock goes on from them.
    fn write_status_b(&mut self, value: u8, now: GuestTime) {
        let was_setting = self.is_setting();
        self.memory[usize::from(STATUS_B)] = value & STATUS_B_MASK;
        match (was_setting, self.is_setting()) {
            (false, true) => self.refresh(now),
            (true, false) => self.set(now),
            _ => {}
        }
    }

    /// Reads port 0x70 or 0x71.
    pub(crate) fn read(&mut self, port: u16, now: GuestTime) -> u8 {
        // The index port is write-only.
        if port == 0x70 { 0xff } else { self.read_data(now) }
    }

    /// Writes port 0x70 or 0x71.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: GuestTime) {
        if port == 0x70 {
            self.index = value & 0x7f; // bit 7 masks the NMI, which this board does not have
        } else {
            self.write_data(value, now);
        }
    }
}

impl Device for Cmos {
    fn kind(&self) -> &'static str {
        "cmos-mc146818"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.u8(self.index);
        out.array(&self.memory);
        out.i64(self.offset_s);
        out.array(&self.copy);
        out.option(self.copied_at, |out, at| out.u64(at.0));
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.index = input.u8("index")?;
        input.check("index", self.index.into(), self.index < 128)?;
        self.memory = input.array("memory")?;
        self.offset_s = input.i64("offset_s")?;
        self.copy = input.array("copy")?;
        self.copied_at = input.option("copied_at", Decoder::u64)?.map(GuestTime);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Friday 2024-03-01 10:59:59 UTC, the day after a leap day.
    const EPOCH_S: u64 = 1_709_290_799;

    fn at_ms(ms: u64) -> GuestTime {
        GuestTime(ms * GuestTime::HZ / 1_000 + 1)
    }

    fn read(cmos: &mut Cmos, index: u8, now: GuestTime) -> u8 {
        cmos.write(0x70, index, now);
        cmos.read(0x71, now)
    }

    fn write(cmos: &mut Cmos, index: u8, value: u8, now: GuestTime) {
        cmos.write(0x70, index, now);
        cmos.write(0x71, value, now);
    }

    /// Seconds, minutes, hours, weekday, day, month, year, century.
    fn time(cmos: &mut Cmos, now: GuestTime) -> [u8; 8] {
        TIME_REGISTERS.map(|register| read(cmos, register, now))
    }

    #[test]
    fn time_is_epoch_plus_guest_time_in_bcd() {
        let mut cmos = Cmos::new(EPOCH_S, 0);
        assert_eq!(time(&mut cmos, at_ms(0)), [0x59, 0x59, 0x10, 0x06, 0x01, 0x03, 0x24, 0x20]);
        assert_eq!(time(&mut cmos, at_ms(1_000)), [0x00, 0x00, 0x11, 0x06, 0x01, 0x03, 0x24, 0x20]);
        assert_eq!(time(&mut Cmos::new(0, 0), at_ms(0)), [0, 0, 0, 0x05, 0x01, 0x01, 0x70, 0x19]);
    }

    #[test]
    fn dates_round_trip_over_leap_years() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (19_782, (2024, 2, 29)),
            (19_783, (2024, 3, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
            (2_932_896, (9999, 12, 31)),
        ] {
            assert_eq!(date_of(days), date);
            assert_eq!(days_of(date.0, date.1, date.2), days);
        }
    }

    #[test]
    fn fields_read_after_the_seconds_belong_to_the_same_moment() {
        let mut cmos = Cmos::new(EPOCH_S, 0);
        assert_eq!(read(&mut cmos, 0x00, at_ms(900)), 0x59);
        assert_eq!(read(&mut cmos, 0x02, at_ms(1_100)), 0x59, "10:59:59, not 10:00:59");
        assert_eq!(read(&mut cmos, 0x04, at_ms(1_100)), 0x10);
        assert_eq!(read(&mut cmos, 0x02, at_ms(1_950)), 0x00, "the copy is too old");
        assert_eq!(read(&mut cmos, 0x0a, at_ms(1_999)) & 0x80, 0, "never updating");
    }

    #[test]
    fn setting_the_time_freezes_it_and_goes_on_from_there() {
        let mut cmos = Cmos::new(EPOCH_S, 0);
        write(&mut cmos, STATUS_B, 0x82, at_ms(0));
        let new_year = [0x58, 0x59, 0x23, 0x03, 0x31, 0x12, 0x30, 0x20];
        for (register, value) in TIME_REGISTERS.into_iter().zip(new_year) {
            write(&mut cmos, register, value, at_ms(2_500));
        }
        assert_eq!(time(&mut cmos, at_ms(9_000)), new_year);
        write(&mut cmos, STATUS_B, 0x02, at_ms(9_000));
        assert_eq!(time(&mut cmos, at_ms(11_000)), [0, 0, 0, 0x04, 0x01, 0x01, 0x31, 0x20]);
    }

    #[test]
    fn field_written_while_running_changes_only_that_field() {
        let mut cmos = Cmos::new(EPOCH_S, 0);
        write(&mut cmos, 0x04, 0x07, at_ms(0));
        assert_eq!(time(&mut cmos, at_ms(0)), [0x59, 0x59, 0x07, 0x06, 0x01, 0x03, 0x24, 0x20]);
    }

    #[test]
    fn nonsense_in_the_time_registers_is_survived() {
        let mut cmos = Cmos::new(u64::MAX, u64::MAX);
        for value in [0xff, 0x00] {
            for register in TIME_REGISTERS {
                write(&mut cmos, register, value, GuestTime(u64::MAX));
            }
            assert!(time(&mut cmos, GuestTime(u64::MAX))[0] <= 0x59);
        }
    }

    #[test]
    fn registers_keep_their_masks() {
        let mut cmos = Cmos::new(EPOCH_S, 0);
        let now = at_ms(0);
        for (index, writable, fixed) in [
            (0x0a, 0x7f, 0),
            (0x0b, 0xf8, 0x02),
            (0x0c, 0, 0),
            (0x0d, 0, 0x80),
            (0x01, 0xff, 0),
            (0x03, 0xff, 0),
            (0x05, 0xff, 0),
            (0x0f, 0xff, 0),
            (0x7f, 0xff, 0),
        ] {
            for value in [0xff, 0x00, 0xa5, 0x5a] {
                write(&mut cmos, index, value, now);
                assert_eq!(read(&mut cmos, index, now), value & writable | fixed, "register {index:#x}");
            }
        }
        assert_eq!(cmos.read(0x70, now), 0xff, "the index is write-only");
    }

    #[test]
    fn memory_size_is_told_in_kilobytes_and_in_64_kilobyte_units() {
        let mut cmos = Cmos::new(0, 256 << 20);
        let mut word =
            |at| u16::from_le_bytes([read(&mut cmos, at, at_ms(0)), read(&mut cmos, at + 1, at_ms(0))]);
        assert_eq!([word(0x15), word(0x17), word(0x30), word(0x34)], [640, 0xffff, 0xffff, 240 * 16]);
    }
}
