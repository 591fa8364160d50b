//! The two cascaded 8259A interrupt controllers and their ELCR.
//!
//! Owns: request, service and mask state of the 16 lines, and which interrupt comes next. Must never:
//! know which device drives a line.
//!
//! Follows the Intel 8259A datasheet (231468) and, for the edge/level control registers at 0x4d0 and
//! 0x4d1, the 82371SB (290550). The wiring of a PC is fixed: the second chip drives input 2 of the first,
//! so the content of ICW3 is not looked at. LTIM of ICW1 is replaced by the ELCR, and MCS-80 mode is
//! absent. An edge stays latched when its line falls before the acknowledge; only level-triggered lines
//! and the cascade can vanish and give the spurious interrupts 7 and 15.
//!
//! ```text
//! ICW1 -> Icw2 -> (Icw3 unless single) -> (Icw4 if announced) -> Ready
//! ```

use crate::DeviceError;
use crate::schema::{Decoder, Device, Encoder};

const CASCADE_IRQ: u8 = 2;
/// Lines 0, 1 and 2 of the first chip are always edge-triggered.
const ELCR_MASK_FIRST: u8 = 0xf8;
/// Lines 8 and 13 of the second chip are always edge-triggered.
const ELCR_MASK_SECOND: u8 = 0xde;

/// Bits of the command port that tell ICW1 (bit 4), OCW3 (bit 3) and OCW2 apart.
const ICW1: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;

/// What the next write to the data port is.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Expect {
    Ready = 0,
    Icw2 = 1,
    Icw3 = 2,
    Icw4 = 3,
}

#[derive(Clone)]
struct Chip {
    /// Levels of the inputs.
    lines: u8,
    /// Edges that were not acknowledged yet, of edge-triggered inputs.
    latched: u8,
    mask: u8,
    in_service: u8,
    /// Level-triggered inputs.
    elcr: u8,
    vector_base: u8,
    /// Input of lowest priority; the next one has the highest.
    lowest: u8,
    expect: Expect,
    single: bool,
    has_icw4: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    poll: bool,
    read_in_service: bool,
}

impl Chip {
    /// As firmware leaves it: initialised, all inputs masked.
    fn new(vector_base: u8, elcr: u8) -> Self {
        Self {
            lines: 0,
            latched: 0,
            mask: 0xff,
            in_service: 0,
            elcr,
            vector_base,
            lowest: 7,
            expect: Expect::Ready,
            single: false,
            has_icw4: false,
            auto_eoi: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            special_fully_nested: false,
            poll: false,
            read_in_service: false,
        }
    }

    fn requests(&self) -> u8 {
        self.latched | (self.lines & self.elcr)
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if !level {
            self.lines &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            self.latched |= bit & !self.elcr;
        }
    }

    /// How many inputs come before the first set one in the order of priority; 8 if none is set.
    fn rank(&self, bits: u8) -> u32 {
        bits.rotate_right(u32::from(self.lowest) + 1).trailing_zeros()
    }

    fn input_of_rank(&self, rank: u32) -> u8 {
        (self.lowest + 1 + rank as u8) & 7
    }

    /// The input that the chip requests service for.
    fn pending(&self) -> Option<u8> {
        let requested = self.rank(self.requests() & !self.mask);
        if requested == 8 {
            return None;
        }
        let blocking = if self.special_mask { self.in_service & !self.mask } else { self.in_service };
        let blocked_from = self.rank(blocking);
        let input = self.input_of_rank(requested);
        // A special fully nested first chip lets the second one interrupt its own service.
        let nested = self.special_fully_nested && input == CASCADE_IRQ && requested == blocked_from;
        (requested < blocked_from || nested).then_some(input)
    }

    fn acknowledge(&mut self, input: u8) {
        self.latched &= !(1 << input);
        if !self.auto_eoi {
            self.in_service |= 1 << input;
        } else if self.rotate_on_auto_eoi {
            self.lowest = input;
        }
    }

    /// Ends the service of highest priority; in special mask mode a masked one is left alone.
    fn end_highest(&mut self) -> Option<u8> {
        let candidates = if self.special_mask { self.in_service & !self.mask } else { self.in_service };
        let rank = self.rank(candidates);
        if rank == 8 {
            return None;
        }
        let input = self.input_of_rank(rank);
        self.in_service &= !(1 << input);
        Some(input)
    }

    fn write_icw1(&mut self, value: u8) {
        // The edge sense circuit is reset: inputs must rise anew.
        self.latched = 0;
        self.mask = 0;
        self.in_service = 0;
        self.lowest = 7;
        self.auto_eoi = false;
        self.rotate_on_auto_eoi = false;
        self.special_mask = false;
        self.special_fully_nested = false;
        self.poll = false;
        self.read_in_service = false;
        self.has_icw4 = value & 1 != 0;
        self.single = value & 2 != 0;
        self.expect = Expect::Icw2;
    }

    fn write_ocw2(&mut self, value: u8) {
        let input = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 => {
                self.end_highest();
            }
            0b101 => {
                if let Some(ended) = self.end_highest() {
                    self.lowest = ended;
                }
            }
            0b011 => self.in_service &= !(1 << input),
            0b111 => {
                self.in_service &= !(1 << input);
                self.lowest = input;
            }
            0b110 => self.lowest = input,
            _ => {} // 0b010: no operation
        }
    }

    fn write_ocw3(&mut self, value: u8) {
        match value & 0b11 {
            0b10 => self.read_in_service = false,
            0b11 => self.read_in_service = true,
            _ => {}
        }
        self.poll = value & 4 != 0;
        match (value >> 5) & 0b11 {
            0b10 => self.special_mask = false,
            0b11 => self.special_mask = true,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.expect {
            Expect::Ready => self.mask = value,
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                self.expect = match (self.single, self.has_icw4) {
                    (false, _) => Expect::Icw3,
                    (true, true) => Expect::Icw4,
                    (true, false) => Expect::Ready,
                };
            }
            Expect::Icw3 => self.expect = if self.has_icw4 { Expect::Icw4 } else { Expect::Ready },
            Expect::Icw4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expect = Expect::Ready;
            }
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(input) => {
                    self.acknowledge(input);
                    0x80 | input
                }
                None => 7,
            };
        }
        match (data_port, self.read_in_service) {
            (true, _) => self.mask,
            (false, true) => self.in_service,
            (false, false) => self.requests(),
        }
    }

    fn save(&self, out: &mut Encoder) {
        let registers = [self.lines, self.latched, self.mask, self.in_service, self.elcr, self.vector_base];
        out.array(&registers);
        out.u8(self.lowest);
        out.u8(self.expect as u8);
        out.bool(self.single);
        out.bool(self.has_icw4);
        out.bool(self.auto_eoi);
        out.bool(self.rotate_on_auto_eoi);
        out.bool(self.special_mask);
        out.bool(self.special_fully_nested);
        out.bool(self.poll);
        out.bool(self.read_in_service);
    }

    fn load(input: &mut Decoder<'_>) -> Result<Self, DeviceError> {
        let [lines, latched, mask, in_service, elcr, vector_base] = input.array("registers")?;
        let lowest = input.u8("lowest")?;
        input.check("lowest", lowest.into(), lowest <= 7)?;
        let expect = match input.u8("expect")? {
            0 => Expect::Ready,
            1 => Expect::Icw2,
            2 => Expect::Icw3,
            3 => Expect::Icw4,
            other => return input.check("expect", other.into(), false).map(|()| Self::new(0, 0)),
        };
        Ok(Self {
            lines,
            latched,
            mask,
            in_service,
            elcr,
            vector_base,
            lowest,
            expect,
            single: input.bool("single")?,
            has_icw4: input.bool("has_icw4")?,
            auto_eoi: input.bool("auto_eoi")?,
            rotate_on_auto_eoi: input.bool("rotate_on_auto_eoi")?,
            special_mask: input.bool("special_mask")?,
            special_fully_nested: input.bool("special_fully_nested")?,
            poll: input.bool("poll")?,
            read_in_service: input.bool("read_in_service")?,
        })
    }
}

/// Both chips. Lines 0 to 7 are the first chip's, 8 to 15 the second's.
pub(crate) struct Pic {
    first: Chip,
    second: Chip,
}

impl Pic {
    /// Initialised with vectors 0x08 and 0x70, all lines masked; the lines in `level_triggered` (bit 9 for
    /// line 9) are level-triggered, as firmware sets them up.
    pub(crate) fn new(level_triggered: u16) -> Self {
        let [first, second] = level_triggered.to_le_bytes();
        Self {
            first: Chip::new(0x08, first & ELCR_MASK_FIRST),
            second: Chip::new(0x70, second & ELCR_MASK_SECOND),
        }
    }

    /// Sets the level of line `irq` (0 to 15, not 2).
    pub(crate) fn set_line(&mut self, irq: u8, level: bool) {
        if irq < 8 {
            self.first.set_line(irq, level);
        } else {
            self.second.set_line(irq & 7, level);
            self.drive_cascade();
        }
    }

    /// Whether line `irq` (0 to 7) has a request, so that another edge would change nothing.
    pub(crate) fn is_requested(&self, irq: u8) -> bool {
        self.first.requests() & (1 << irq) != 0
    }

    fn drive_cascade(&mut self) {
        self.first.set_line(CASCADE_IRQ, self.second.pending().is_some());
    }

    /// The INTR output.
    pub(crate) fn interrupt_pending(&self) -> bool {
        self.first.pending().is_some()
    }

    /// The two INTA cycles: takes the interrupt of highest priority into service and gives its vector. With
    /// none pending that is vector 7 of the chip, and nothing is taken into service there.
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.first.pending() else { return self.first.vector_base | 7 };
        self.first.acknowledge(input);
        if input != CASCADE_IRQ {
            return self.first.vector_base | input;
        }
        let pending = self.second.pending();
        if let Some(input) = pending {
            self.second.acknowledge(input);
        }
        // The second chip drops its output at INTA and raises it anew for what is left.
        self.first.set_line(CASCADE_IRQ, false);
        self.drive_cascade();
        self.second.vector_base | pending.unwrap_or(7)
    }

    /// Reads one of 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1.
    pub(crate) fn read(&mut self, port: u16) -> u8 {
        match port {
            0x20 | 0x21 => self.first.read(port & 1 != 0),
            0x4d0 => self.first.elcr,
            0x4d1 => self.second.elcr,
            _ => {
                let value = self.second.read(port & 1 != 0);
                self.drive_cascade();
                value
            }
        }
    }

    /// Writes one of 0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1.
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        let chip = match port {
            0x20 | 0x21 => &mut self.first,
            0xa0 | 0xa1 => &mut self.second,
            _ => return self.write_elcr(port, value),
        };
        if port & 1 != 0 {
            chip.write_data(value);
        } else if value & ICW1 != 0 {
            chip.write_icw1(value);
            if port == 0x20 {
                // The second chip may be waiting: its request must not be lost with the edge.
                self.first.set_line(CASCADE_IRQ, false);
            }
        } else if value & OCW3 != 0 {
            chip.write_ocw3(value);
        } else {
            chip.write_ocw2(value);
        }
        self.drive_cascade();
    }

    fn write_elcr(&mut self, port: u16, value: u8) {
        let (chip, mask) = match port {
            0x4d0 => (&mut self.first, ELCR_MASK_FIRST),
            _ => (&mut self.second, ELCR_MASK_SECOND),
        };
        chip.elcr = value & mask;
        chip.latched &= !chip.elcr;
        self.drive_cascade();
    }
}

impl Device for Pic {
    fn kind(&self) -> &'static str {
        "pic-8259"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        self.first.save(out);
        self.second.save(out);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.first = Chip::load(input)?;
        self.second = Chip::load(input)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as Linux does it: vectors 0x30 and 0x38, nothing masked.
    fn initialised() -> Pic {
        let mut pic = Pic::new(0);
        for (command, base, wiring) in [(0x20, 0x30, 0x04), (0xa0, 0x38, 0x02)] {
            pic.write(command, 0x11);
            pic.write(command + 1, base);
            pic.write(command + 1, wiring);
            pic.write(command + 1, 0x01);
        }
        pic
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_line(irq, true);
        pic.set_line(irq, false);
    }

    fn in_service(pic: &mut Pic, command: u16) -> u8 {
        pic.write(command, 0x0b);
        pic.read(command)
    }

    fn requests(pic: &mut Pic, command: u16) -> u8 {
        pic.write(command, 0x0a);
        pic.read(command)
    }

    #[test]
    fn mask_registers_take_every_bit_and_elcrs_only_their_mask() {
        let mut pic = initialised();
        for (port, writable) in [(0x21, 0xff), (0xa1, 0xff), (0x4d0, 0xf8), (0x4d1, 0xde)] {
            for value in [0xff, 0x00, 0xa5, 0x5a] {
                pic.write(port, value);
                assert_eq!(pic.read(port), value & writable, "port {port:#x}");
            }
        }
    }

    #[test]
    fn new_controllers_have_every_line_masked_and_the_given_lines_level_triggered() {
        let mut pic = Pic::new(1 << 5 | 1 << 9 | 1 << 13);
        assert_eq!([0x21, 0xa1, 0x4d0, 0x4d1].map(|port| pic.read(port)), [0xff, 0xff, 0x20, 0x02]);
    }

    #[test]
    fn lower_line_numbers_come_first_and_block_the_rest_until_their_end() {
        let mut pic = initialised();
        pulse(&mut pic, 4);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        assert!(!pic.interrupt_pending(), "line 4 waits for line 1");
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x30, "line 0 interrupts the service of line 1");
        pic.write(0x20, 0x20);
        assert_eq!(in_service(&mut pic, 0x20), 1 << 1, "a non-specific end is for line 0");
        pic.write(0x20, 0x61);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn second_chip_interrupts_through_input_2() {
        let mut pic = initialised();
        pulse(&mut pic, 12);
        assert!(pic.interrupt_pending());
        assert_eq!(requests(&mut pic, 0x20), 1 << 2);
        assert_eq!(pic.acknowledge(), 0x3c);
        assert_eq!((in_service(&mut pic, 0x20), in_service(&mut pic, 0xa0)), (1 << 2, 1 << 4));
        pulse(&mut pic, 14);
        pic.write(0xa0, 0x64);
        pic.write(0x20, 0x62);
        assert_eq!(pic.acknowledge(), 0x3e, "line 14 was not lost behind line 12");
    }

    #[test]
    fn edge_is_latched_once_and_a_level_for_as_long_as_it_lasts() {
        let mut pic = initialised();
        pic.set_line(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0x20, 0x20);
        assert!(!pic.interrupt_pending(), "a high edge-triggered line asks once");

        pic.write(0x4d0, 1 << 6);
        pic.set_line(6, true);
        assert_eq!(pic.acknowledge(), 0x36);
        pic.write(0x20, 0x20);
        assert!(pic.interrupt_pending(), "a high level-triggered line asks again");
        pic.set_line(6, false);
        assert!(!pic.interrupt_pending());
    }

    #[test]
    fn edge_is_forgotten_when_its_line_becomes_level_triggered() {
        let mut pic = initialised();
        pulse(&mut pic, 5);
        pic.write(0x4d0, 1 << 5);
        assert!(!pic.interrupt_pending());
        pic.write(0x4d0, 0);
        assert!(!pic.interrupt_pending());
    }

    #[test]
    fn vanished_request_gives_spurious_7_and_15_without_service() {
        let mut pic = initialised();
        assert_eq!(pic.acknowledge(), 0x37);
        assert_eq!(in_service(&mut pic, 0x20), 0);

        pulse(&mut pic, 10);
        pic.write(0xa1, 0xff);
        assert_eq!(pic.acknowledge(), 0x3f);
        assert_eq!((in_service(&mut pic, 0x20), in_service(&mut pic, 0xa0)), (1 << 2, 0));
    }

    #[test]
    fn initialisation_forgets_edges_and_masks_but_not_levels() {
        let mut pic = initialised();
        pulse(&mut pic, 3);
        pic.write(0x4d0, 1 << 5);
        pic.set_line(5, true);
        pic.write(0x21, 0xff);
        pic.write(0x20, 0x11);
        assert_eq!(pic.read(0x21), 0);
        assert_eq!(requests(&mut pic, 0x20), 1 << 5);
    }

    #[test]
    fn single_chip_without_icw4_needs_two_words() {
        let mut pic = initialised();
        pic.write(0x20, 0x12);
        pic.write(0x21, 0x40);
        pic.write(0x21, 0xfe);
        assert_eq!(pic.read(0x21), 0xfe, "the third word is the mask");
    }

    #[test]
    fn first_chip_does_not_lose_the_second_when_it_is_initialised() {
        let mut pic = initialised();
        pulse(&mut pic, 8);
        for (port, value) in [(0x20, 0x11), (0x21, 0x50), (0x21, 4), (0x21, 1)] {
            pic.write(port, value);
        }
        assert_eq!(pic.acknowledge(), 0x38);
    }

    #[test]
    fn rotation_makes_the_served_line_the_lowest() {
        let mut pic = initialised();
        pulse(&mut pic, 3);
        pic.acknowledge();
        pic.write(0x20, 0xa0); // rotate on non-specific end
        pulse(&mut pic, 3);
        pulse(&mut pic, 7);
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0x20, 0xe7); // rotate on specific end of 7
        pic.write(0x20, 0xc2); // 2 is the lowest, so 3 the highest
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn automatic_end_leaves_nothing_in_service_and_rotates_if_told() {
        let mut pic = initialised();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x20, 0x80)] {
            pic.write(port, value);
        }
        pulse(&mut pic, 1);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x31);
        assert_eq!(in_service(&mut pic, 0x20), 0);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x34, "line 1 went to the end");
        pic.write(0x20, 0x00);
        assert_eq!(pic.acknowledge(), 0x31);
        pulse(&mut pic, 4);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31, "without rotation line 4 is still the lowest");
    }

    #[test]
    fn special_mask_lets_lower_lines_in_and_shields_the_masked_service() {
        let mut pic = initialised();
        pulse(&mut pic, 1);
        pic.acknowledge();
        pic.write(0x21, 1 << 1);
        pulse(&mut pic, 6);
        assert!(!pic.interrupt_pending());
        pic.write(0x20, 0x68);
        assert_eq!(pic.acknowledge(), 0x36);
        pic.write(0x20, 0x20);
        assert_eq!(in_service(&mut pic, 0x20), 1 << 1, "the end was for line 6");
        pic.write(0x20, 0x48);
        pulse(&mut pic, 6);
        assert!(!pic.interrupt_pending());
    }

    #[test]
    fn special_fully_nested_first_chip_takes_a_higher_line_of_the_second() {
        let mut pic = initialised();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 0x11)] {
            pic.write(port, value);
        }
        pulse(&mut pic, 12);
        assert_eq!(pic.acknowledge(), 0x3c);
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x39);
        pulse(&mut pic, 5);
        assert!(!pic.interrupt_pending(), "lines below the cascade still wait");
    }

    #[test]
    fn poll_acknowledges_once_and_says_when_there_is_nothing() {
        let mut pic = initialised();
        pulse(&mut pic, 5);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20), 0x85);
        assert_eq!(in_service(&mut pic, 0x20), 1 << 5);
        pic.write(0x20, 0x0c);
        assert_eq!(pic.read(0x20) & 0x80, 0);
        pulse(&mut pic, 9);
        pic.write(0xa0, 0x0c);
        assert_eq!(pic.read(0xa0), 0x81);
    }
}
