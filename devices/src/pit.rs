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
            mode: 0,
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
            input.check(field, value, value <= ticks(GuestTime(u64::MAX)) + 0x1_0001)?;
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
    /// As firmware leaves it: counter 0 is a square wave of the longest period, the others do not count yet
    /// and their outputs are low. A kernel that lays itself out at random polls counter 0 until it counts.
    pub(crate) fn new() -> Self {
        let mut pit =
            Self { counters: [Counter::new(true), Counter::new(true), Counter::new(false)], control: 0 };
        for (port, value) in [(0x43, 0x36), (0x40, 0), (0x40, 0)] {
            pit.write(port, value, GuestTime(0));
        }
        pit
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

#[cfg(test)]
mod tests {
    use super::*;

    const T0: u64 = 1_000;

    fn at(tick: u64) -> GuestTime {
        GuestTime(tick * 3)
    }

    fn program(pit: &mut Pit, counter: u16, mode: u8, count: u16, tick: u64) {
        pit.write(0x43, (counter as u8) << 6 | 0x30 | mode << 1, at(tick));
        for byte in count.to_le_bytes() {
            pit.write(0x40 + counter, byte, at(tick));
        }
    }

    fn counter(mode: u8, count: u16) -> Pit {
        let mut pit = Pit::new();
        program(&mut pit, 0, mode, count, T0);
        pit
    }

    /// The count, latched and read as two bytes.
    fn latched(pit: &mut Pit, counter: u16, tick: u64) -> u16 {
        pit.write(0x43, (counter as u8) << 6, at(tick));
        u16::from_le_bytes([pit.read(0x40 + counter, at(tick)), pit.read(0x40 + counter, at(tick))])
    }

    fn outputs(pit: &Pit, ticks: std::ops::Range<u64>) -> String {
        ticks.map(|tick| if pit.output(at(T0 + tick)) { '1' } else { '0' }).collect()
    }

    // The drawings of the datasheet start with the tick at which the count is written; the count is loaded
    // one tick later.

    #[test]
    fn mode_0_rises_at_the_end_of_the_count_and_stays() {
        let mut pit = counter(0, 4);
        assert_eq!(outputs(&pit, 0..9), "000001111");
        assert_eq!(latched(&mut pit, 0, T0 + 3), 2);
        assert_eq!(latched(&mut pit, 0, T0 + 6), 0xffff, "it counts on below 0");
    }

    #[test]
    fn mode_0_is_stopped_by_the_first_byte_of_a_new_count() {
        let mut pit = counter(0, 4);
        assert!(pit.output(at(T0 + 10)));
        pit.write(0x40, 3, at(T0 + 10));
        assert!(!pit.output(at(T0 + 20)));
        pit.write(0x40, 0, at(T0 + 20));
        assert_eq!(outputs(&pit, 20..26), "000011");
    }

    #[test]
    fn mode_2_is_low_for_the_last_tick_of_each_period() {
        let mut pit = counter(2, 4);
        assert_eq!(outputs(&pit, 0..13), "1111011101110");
        assert_eq!([1, 2, 4, 5].map(|tick| latched(&mut pit, 0, T0 + tick)), [4, 3, 1, 4]);
    }

    #[test]
    fn mode_3_is_a_square_wave_and_counts_by_two() {
        let mut even = counter(3, 4);
        assert_eq!(outputs(&even, 0..10), "1110011001");
        assert_eq!([1, 2, 3, 4].map(|tick| latched(&mut even, 0, T0 + tick)), [4, 2, 4, 2]);
        let mut odd = counter(3, 5);
        assert_eq!(outputs(&odd, 0..12), "111100111001");
        assert_eq!([1, 2, 3, 4, 5].map(|tick| latched(&mut odd, 0, T0 + tick)), [4, 2, 0, 4, 2]);
    }

    #[test]
    fn mode_4_strobes_once() {
        assert_eq!(outputs(&counter(4, 3), 0..9), "111101111");
    }

    #[test]
    fn modes_1_and_5_wait_for_the_gate() {
        for (mode, expected) in [(1, "100011"), (5, "111101")] {
            let mut pit = Pit::new();
            program(&mut pit, 2, mode, 3, T0);
            let output = |pit: &mut Pit, tick| pit.read(0x61, at(T0 + tick)) & 0x20 != 0;
            assert!(output(&mut pit, 50), "mode {mode} before the gate");
            pit.write(0x61, 1, at(T0 + 100));
            let seen: String =
                (100..106).map(|tick| if output(&mut pit, tick) { '1' } else { '0' }).collect();
            assert_eq!(seen, expected, "mode {mode}");
        }
    }

    #[test]
    fn gate_of_counter_2_holds_the_count() {
        let mut pit = Pit::new();
        pit.write(0x61, 1, at(0));
        program(&mut pit, 2, 0, 10, T0);
        pit.write(0x61, 0, at(T0 + 5));
        assert_eq!(latched(&mut pit, 2, T0 + 500), 6);
        assert_eq!(pit.read(0x61, at(T0 + 500)) & 0x20, 0);
        pit.write(0x61, 1, at(T0 + 500));
        assert_eq!(pit.read(0x61, at(T0 + 505)) & 0x20, 0);
        assert_eq!(pit.read(0x61, at(T0 + 506)) & 0x20, 0x20);
    }

    #[test]
    fn low_gate_raises_a_periodic_output_and_its_rise_starts_the_period_anew() {
        let mut pit = Pit::new();
        pit.write(0x61, 1, at(0));
        program(&mut pit, 2, 3, 10, T0);
        assert_eq!(pit.read(0x61, at(T0 + 7)) & 0x20, 0);
        pit.write(0x61, 0, at(T0 + 7));
        assert_eq!(pit.read(0x61, at(T0 + 7)) & 0x20, 0x20);
        pit.write(0x61, 1, at(T0 + 100));
        assert_eq!(latched(&mut pit, 2, T0 + 101), 10);
    }

    #[test]
    fn count_of_zero_is_65536() {
        let mut pit = counter(2, 0);
        assert_eq!(pit.next_edge(at(T0)), Some(at(T0 + 1 + 65_536)));
        assert_eq!(latched(&mut pit, 0, T0 + 2), 0xffff);
    }

    #[test]
    fn forbidden_count_of_one_acts_as_two() {
        assert_eq!(counter(2, 1).next_edge(at(T0)), Some(at(T0 + 3)));
    }

    #[test]
    fn several_periods_give_one_edge_and_stay_in_phase() {
        let mut pit = counter(2, 100);
        assert!(!pit.advance(at(T0), at(T0 + 100)));
        assert!(pit.advance(at(T0 + 100), at(T0 + 1_000)));
        assert_eq!(pit.next_edge(at(T0 + 1_000)), Some(at(T0 + 1_001)));
        assert!(pit.advance(at(T0 + 1_000), at(T0 + 1_001)));
    }

    #[test]
    fn new_count_of_a_periodic_counter_waits_for_the_period() {
        let mut pit = counter(2, 100);
        pit.write(0x40, 10, at(T0 + 50));
        pit.write(0x40, 0, at(T0 + 50));
        assert_eq!(pit.next_edge(at(T0 + 50)), Some(at(T0 + 101)));
        assert!(pit.advance(at(T0 + 50), at(T0 + 105)));
        assert_eq!(pit.next_edge(at(T0 + 105)), Some(at(T0 + 111)));
    }

    #[test]
    fn one_shot_edges_come_once() {
        for (mode, edge) in [(0, 21), (4, 22)] {
            let pit = counter(mode, 20);
            assert_eq!(pit.next_edge(at(T0)), Some(at(T0 + edge)), "mode {mode}");
            assert_eq!(pit.next_edge(at(T0 + edge)), None, "mode {mode}");
        }
    }

    #[test]
    fn latch_holds_until_both_bytes_are_read() {
        let mut pit = counter(2, 0x1234);
        pit.write(0x43, 0x00, at(T0 + 1));
        pit.write(0x43, 0x00, at(T0 + 100));
        assert_eq!([pit.read(0x40, at(T0 + 200)), pit.read(0x40, at(T0 + 300))], [0x34, 0x12]);
        assert_eq!(pit.read(0x40, at(T0 + 0x35)), 0x00, "not latched any more");
    }

    #[test]
    fn one_byte_access_reads_and_writes_that_byte() {
        let mut pit = Pit::new();
        pit.write(0x43, 0x14, at(T0)); // low byte, mode 2
        pit.write(0x40, 0x80, at(T0));
        assert_eq!([pit.read(0x40, at(T0 + 1)), pit.read(0x40, at(T0 + 2))], [0x80, 0x7f]);
        pit.write(0x43, 0x24, at(T0)); // high byte, mode 2
        pit.write(0x40, 0x80, at(T0));
        assert_eq!([pit.read(0x40, at(T0 + 1)), pit.read(0x40, at(T0 + 2))], [0x80, 0x7f]);
    }

    #[test]
    fn read_back_latches_status_before_count_of_the_selected_counters() {
        let mut pit = counter(2, 0x1234);
        program(&mut pit, 1, 3, 8, T0);
        pit.write(0x43, 0xc2, at(T0 + 1)); // count and status of counter 0
        assert_eq!(pit.read(0x40, at(T0 + 9)), 0b1011_0100);
        assert_eq!([pit.read(0x40, at(T0 + 9)), pit.read(0x40, at(T0 + 9))], [0x34, 0x12]);
        pit.write(0x43, 0x56, at(T0 + 9)); // counter 1: low byte, mode 3, no count yet
        pit.write(0x43, 0xe4, at(T0 + 9)); // status of counter 1 only
        assert_eq!(pit.read(0x41, at(T0 + 9)), 0b1101_0110);
    }

    #[test]
    fn counter_0_counts_from_the_start() {
        let mut pit = Pit::new();
        pit.write(0x43, 0xc2, at(T0)); // how Linux reads it for randomness: status and count
        assert_eq!(pit.read(0x40, at(T0)), 0b1011_0110, "square wave, not waiting for a count");
        let count = u16::from_le_bytes([pit.read(0x40, at(T0)), pit.read(0x40, at(T0))]);
        assert_eq!(count, (0x1_0000 - 2 * (T0 - 1)) as u16);
    }

    #[test]
    fn modes_6_and_7_are_2_and_3() {
        for (written, kept) in [(6, 2), (7, 3)] {
            let mut pit = counter(written, 8);
            pit.write(0x43, 0xe2, at(T0));
            assert_eq!(pit.read(0x40, at(T0)) >> 1 & 7, kept);
        }
    }

    #[test]
    fn control_port_keeps_four_bits_and_shows_the_refresh_toggle() {
        let mut pit = Pit::new();
        for value in [0xff, 0x00, 0xa5, 0x5a] {
            pit.write(0x61, value, at(0));
            assert_eq!(pit.read(0x61, at(0)) & 0xcf, value & 0x0f);
        }
        assert_eq!([17, 18, 36].map(|tick| pit.read(0x61, at(tick)) & 0x10), [0, 0x10, 0]);
    }
}
