//! The 8254 programmable interval timer and the system control port 0x61.
//!
//! Owns: three counters and the gate and speaker bits of port 0x61. Must never: read a clock; time comes
//! in as ticks of its own clock, which is [`GuestTime`] / 3, so 1,193,181.67 Hz.
//!
//! Follows the Intel 8254 datasheet (231164), modes 0 to 5. A count written at tick `t` is loaded at
//! `t + 1`, as the datasheet draws it. The gates of counters 0 and 1 are wired high, that of counter 2 is
//! bit 0 of port 0x61. Three simplifications: BCD counts as binary; a new count in mode 3 is taken at the
//! end of the period, not of the half period; a count of 1 in modes 2 and 3, which the datasheet forbids,
//! acts as 2.

use crate::DeviceError;
use crate::schema::{Decoder, Device, Encoder};
use ft_log::GuestTime;

/// Ticks between two toggles of the refresh bit in port 0x61: the 15.1 µs of a PC's DRAM refresh.
const REFRESH_TICKS: u64 = 18;

/// Gate of counter 2 and speaker enable: the bits of port 0x61 that are kept.
const CONTROL_GATE: u8 = 1;
const CONTROL_MASK: u8 = 0x0f;

/// Which bytes of a count are transferred (bits 5:4 of the control word).
const ACCESS_LOW: u8 = 1;
const ACCESS_HIGH: u8 = 2;
const ACCESS_BOTH: u8 = 3;

/// Ticks of the 8254's clock at `now`.
fn ticks(now: GuestTime) -> u64 {
    now.0 / 3
}

#[derive(Clone)]
struct Counter {
    mode: u8,
    access: u8,
    bcd: bool,
    gate: bool,
    /// Last count written, 1 to 65,536.
    reload: u32,
    /// Count of the present cycle.
    count: u32,
    /// A count was loaded (and, in modes 1 and 5, the gate rose).
    counting: bool,
    /// Tick at which `count` was loaded.
    start: u64,
    /// Ticks counted so far while the gate holds the counter.
    held: Option<i64>,
    /// `reload` was not taken into the counter yet.
    null_count: bool,
    /// Modes 2 and 3: the end of the period, at which a new `reload` is taken.
    swap_at: u64,
    /// First byte of a two-byte write.
    write_low: Option<u8>,
    /// The next read of a two-byte count gives its high byte.
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Counter {
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            access: ACCESS_BOTH,
            bcd: false,
            gate,
            reload: 0x1_0000,
            count: 0x1_0000,
            counting: false,
            start: 0,
            held: None,
            null_count: true,
            swap_at: 0,
            write_low: None,
            read_high: false,
            latched_count: None,
            latched_status: None,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn is_triggered_by_gate(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Ticks since the count was loaded; -1 before the load tick.
    fn elapsed(&self, now: u64) -> i64 {
        self.held.unwrap_or(now as i64 - self.start as i64)
    }

    /// Takes a new count at the end of a period, if that has passed.
    fn settle(&mut self, now: u64) {
        if self.counting
            && self.null_count
            && self.is_periodic()
            && self.held.is_none()
            && now >= self.swap_at
        {
            self.load(self.swap_at);
        }
    }

    fn load(&mut self, start: u64) {
        self.count = self.reload;
        self.start = start;
        self.counting = true;
        self.null_count = false;
        self.held = (!self.gate && !self.is_triggered_by_gate()).then_some(0);
    }

    fn output(&self, now: u64) -> bool {
        if !self.counting {
            return self.mode != 0;
        }
        let elapsed = self.elapsed(now);
        let count = i64::from(self.count);
        match self.mode {
            0 => elapsed >= count,
            1 => !(0..count).contains(&elapsed),
            2 | 3 if elapsed < 0 || self.held.is_some() => true,
            2 => elapsed % count != count - 1,
            3 => elapsed % count < (count + 1) / 2,
            _ => elapsed != count,
        }
    }

    /// The tick of the next rising edge of the output after `now`, for a counter whose gate is high.
    fn rising_edge_after(&self, now: u64) -> Option<u64> {
        if !self.counting || self.held.is_some() {
            return None;
        }
        let count = u64::from(self.count);
        let edge = match self.mode {
            0 | 1 => self.start + count,
            2 | 3 if now < self.start => self.start + count,
            2 | 3 => self.start + ((now - self.start) / count + 1) * count,
            _ => self.start + count + 1,
        };
        (edge > now).then_some(edge)
    }

    fn value(&self, now: u64) -> u16 {
        let elapsed = self.elapsed(now);
        let count = i64::from(self.count);
        if !self.counting || elapsed < 0 {
            return count as u16;
        }
        let left = match self.mode {
            2 => count - elapsed % count,
            3 => {
                let half = (count + 1) / 2;
                let position = elapsed % count;
                (count & !1) - 2 * if position < half { position } else { position - half }
            }
            _ => count - elapsed,
        };
        left as u16
    }

    fn status(&self, now: u64) -> u8 {
        u8::from(self.output(now)) << 7
            | u8::from(self.null_count) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn write_control(&mut self, value: u8) {
        let mode = (value >> 1) & 7;
        self.mode = if mode > 5 { mode & 3 } else { mode };
        self.access = (value >> 4) & 3;
        self.bcd = value & 1 != 0;
        self.counting = false;
        self.held = None;
        self.null_count = true;
        self.write_low = None;
        self.read_high = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.value(now));
            self.read_high = false;
        }
    }

    fn write(&mut self, value: u8, now: u64) {
        let count = match (self.access, self.write_low) {
            (ACCESS_LOW, _) => u16::from(value),
            (ACCESS_HIGH, _) => u16::from(value) << 8,
            (_, Some(low)) => u16::from_le_bytes([low, value]),
            (_, None) => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    // The first byte stops the counter and sets the output low.
                    self.counting = false;
                }
                return;
            }
        };
        self.write_low = None;
        self.reload = if count == 0 { 0x1_0000 } else { u32::from(count) };
        if self.is_periodic() {
            self.reload = self.reload.max(2);
        }
        self.null_count = true;
        if self.is_triggered_by_gate() {
            return;
        }
        if !(self.is_periodic() && self.counting) {
            self.load(now + 1);
        } else {
            let count = u64::from(self.count);
            self.swap_at = self.start + (now.saturating_sub(self.start) / count + 1) * count;
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.value(now)).to_le_bytes();
        if self.access == ACCESS_BOTH {
            self.read_high = !self.read_high;
            if self.read_high {
                return low;
            }
        }
        self.latched_count = None;
        if self.access == ACCESS_LOW { low } else { high }
    }

    fn set_gate(&mut self, level: bool, now: u64) {
        if level == std::mem::replace(&mut self.gate, level) {
            return;
        }
        match (self.mode, level) {
            (1 | 5, true) => self.load(now + 1),
            (1 | 5, false) => {}
            (2 | 3, true) if self.counting => self.load(now + 1),
            (_, true) => {
                if let Some(elapsed) = self.held.take() {
                    self.start = now.saturating_add_signed(-elapsed);
                }
            }
            (_, false) => self.held = self.counting.then(|| self.elapsed(now).max(0)),
        }
    }

    fn save(&self, out: &mut Encoder) {
        out.u8(self.mode);
        out.u8(self.access);
        out.bool(self.bcd);
        out.bool(self.gate);
        out.u32(self.reload);
        out.u32(self.count);
        out.bool(self.counting);
        out.u64(self.start);
        out.option(self.held, Encoder::i64);
        out.bool(self.null_count);
        out.u64(self.swap_at);
        out.option(self.write_low, Encoder::u8);
        out.bool(self.read_high);
        out.option(self.latched_count, Encoder::u16);
        out.option(self.latched_status, Encoder::u8);
    }

    fn load_state(input: &mut Decoder<'_>) -> Result<Self, DeviceError> {
        // Bounds that keep the arithmetic above from overflowing.
        let tick = |input: &mut Decoder<'_>, field| {
            let value = input.u64(field)?;
            input.check(field, value, value <= ticks(GuestTime(u64::MAX)) + 1)?;
            Ok(value)
        };
        let count = |input: &mut Decoder<'_>, field| {
            let value = input.u32(field)?;
            input.check(field, value.into(), (1..=0x1_0000).contains(&value))?;
            Ok(value)
        };
        let counter = Self {
            mode: input.u8("mode")?,
            access: input.u8("access")?,
            bcd: input.bool("bcd")?,
            gate: input.bool("gate")?,
            reload: count(input, "reload")?,
            count: count(input, "count")?,
            counting: input.bool("counting")?,
            start: tick(input, "start")?,
            held: input.option("held", Decoder::i64)?,
            null_count: input.bool("null_count")?,
            swap_at: tick(input, "swap_at")?,
            write_low: input.option("write_low", Decoder::u8)?,
            read_high: input.bool("read_high")?,
            latched_count: input.option("latched_count", Decoder::u16)?,
            latched_status: input.option("latched_status", Decoder::u8)?,
        };
        input.check("mode", counter.mode.into(), counter.mode <= 5)?;
        input.check("access", counter.access.into(), (1..=3).contains(&counter.access))?;
        let held = counter.held.unwrap_or(0);
        input.check("held", held as u64, (0..=i64::MAX / 2).contains(&held))?;
        Ok(counter)
    }
}

/// The timer.
pub(crate) struct Pit {
    counters: [Counter; 3],
    /// Port 0x61, the bits that are kept.
    control: u8,
}

impl Pit {
    /// Nothing counts yet; the gate of counter 2 is low.
    pub(crate) fn new() -> Self {
        Self { counters: [Counter::new(true), Counter::new(true), Counter::new(false)], control: 0 }
    }

    /// Moves from `before` to `now`; whether the output of counter 0 rose in between. Several periods give
    /// one edge, as the latch of an edge-triggered interrupt line would, and stay in phase.
    pub(crate) fn advance(&mut self, before: GuestTime, now: GuestTime) -> bool {
        let edge = self.counters[0].rising_edge_after(ticks(before));
        for counter in &mut self.counters {
            counter.settle(ticks(now));
        }
        edge.is_some_and(|edge| edge <= ticks(now))
    }

    /// Level of the output of counter 0.
    pub(crate) fn output(&self, now: GuestTime) -> bool {
        self.counters[0].output(ticks(now))
    }

    /// When the output of counter 0 rises next.
    pub(crate) fn next_edge(&self, now: GuestTime) -> Option<GuestTime> {
        self.counters[0].rising_edge_after(ticks(now)).map(|tick| GuestTime(tick.saturating_mul(3)))
    }

    /// Reads one of 0x40 to 0x43 and 0x61.
    pub(crate) fn read(&mut self, port: u16, now: GuestTime) -> u8 {
        let now = ticks(now);
        match port {
            0x40..=0x42 => self.counters[usize::from(port - 0x40)].read(now),
            0x61 => {
                let refresh = ((now / REFRESH_TICKS) & 1) as u8;
                self.control | refresh << 4 | u8::from(self.counters[2].output(now)) << 5
            }
            _ => 0xff, // 0x43 is write-only
        }
    }

    /// Writes one of 0x40 to 0x43 and 0x61.
    pub(crate) fn write(&mut self, port: u16, value: u8, now: GuestTime) {
        let now = ticks(now);
        match port {
            0x40..=0x42 => self.counters[usize::from(port - 0x40)].write(value, now),
            0x61 => {
                self.control = value & CONTROL_MASK;
                self.counters[2].set_gate(value & CONTROL_GATE != 0, now);
            }
            _ => self.write_control(value, now),
        }
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let selected = value >> 6;
        if selected < 3 {
            let counter = &mut self.counters[usize::from(selected)];
            if (value >> 4) & 3 == 0 {
                counter.latch_count(now);
            } else {
                counter.write_control(value);
            }
            return;
        }
        // Read-back command: bits 5 and 4 are active low, bits 1 to 3 select counters 0 to 2.
        for (index, counter) in self.counters.iter_mut().enumerate() {
            if value & (2 << index) == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch_count(now);
            }
            if value & 0x10 == 0 && counter.latched_status.is_none() {
                counter.latched_status = Some(counter.status(now));
            }
        }
    }
}

impl Device for Pit {
    fn kind(&self) -> &'static str {
        "pit-8254"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        for counter in &self.counters {
            counter.save(out);
        }
        out.u8(self.control);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        for counter in &mut self.counters {
            *counter = Counter::load_state(input)?;
        }
        self.control = input.u8("control")?;
        input.check("control", self.control.into(), self.control & !CONTROL_MASK == 0)
    }
}
