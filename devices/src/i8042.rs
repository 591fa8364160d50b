//! The keyboard controller, with nothing plugged in.
//!
//! Owns: command byte, output port and the one-byte output buffer of an 8042. Must never: leave a command
//! without its answer: a driver that polls for one spends thousands of exits.
//!
//! Follows the IBM PS/2 technical reference (keyboard and auxiliary device controller). There is no
//! keyboard, so a byte sent to it is answered with 0xfe (resend) and the time-out bit, as a real controller
//! does; the auxiliary interface fails its test, so that drivers see no mouse. Pulsing bit 0 of the output
//! port (command 0xfe) resets the guest.

use crate::schema::{Decoder, Device, Encoder};
use crate::{DeviceError, Effect};

/// Status register.
const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX: u8 = 1 << 5;
const STATUS_TIMEOUT: u8 = 1 << 6;

/// Command byte: its defined bits (6 and 5 are translation and the two clocks' disables).
const COMMAND_BYTE_MASK: u8 = 0x7f;
const COMMAND_BYTE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const COMMAND_BYTE_SYSTEM: u8 = 1 << 2;
const COMMAND_BYTE_KEYBOARD_OFF: u8 = 1 << 4;
const COMMAND_BYTE_AUX_OFF: u8 = 1 << 5;
const COMMAND_BYTE_TRANSLATE: u8 = 1 << 6;

/// Output port: bit 0 low holds the CPU in reset, bit 1 is the A20 gate.
const OUTPUT_PORT_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;

/// What a device that is not there answers, with the time-out bit set.
const RESEND: u8 = 0xfe;

/// The next byte written to port 0x60.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Parameter {
    /// Goes to the keyboard.
    None = 0,
    CommandByte = 1,
    OutputPort = 2,
    KeyboardBuffer = 3,
    AuxBuffer = 4,
    AuxDevice = 5,
}

/// The controller.
pub(crate) struct I8042 {
    command_byte: u8,
    output_port: u8,
    /// The last write went to port 0x64.
    last_was_command: bool,
    parameter: Parameter,
    /// The output buffer, with the status bits that belong to it.
    output: Option<(u8, u8)>,
}

impl I8042 {
    /// As firmware leaves it: self-test passed, keyboard off.
    pub(crate) fn new() -> Self {
        Self {
            command_byte: COMMAND_BYTE_SYSTEM | COMMAND_BYTE_KEYBOARD_OFF | COMMAND_BYTE_AUX_OFF,
            output_port: OUTPUT_PORT_RESET | OUTPUT_PORT_A20,
            last_was_command: false,
            parameter: Parameter::None,
            output: None,
        }
    }

    /// Level of the keyboard interrupt line.
    pub(crate) fn interrupt(&self) -> bool {
        let from_keyboard = self.output.is_some_and(|(_, status)| status & STATUS_AUX == 0);
        from_keyboard && self.command_byte & COMMAND_BYTE_KEYBOARD_INTERRUPT != 0
    }

    /// Reads port 0x60 or 0x64.
    pub(crate) fn read(&mut self, port: u16) -> u8 {
        if port == 0x60 {
            return self.output.take().map_or(0, |(value, _)| value);
        }
        let output = self.output.map_or(0, |(_, status)| status | STATUS_OUTPUT_FULL);
        let system = if self.command_byte & COMMAND_BYTE_SYSTEM != 0 { STATUS_SYSTEM } else { 0 };
        let command = if self.last_was_command { STATUS_COMMAND } else { 0 };
        STATUS_UNLOCKED | output | system | command
    }

    /// Writes port 0x60 or 0x64.
    pub(crate) fn write(&mut self, port: u16, value: u8, effects: &mut Vec<Effect>) {
        self.last_was_command = port == 0x64;
        if self.last_was_command {
            self.parameter = Parameter::None;
            return self.command(value, effects);
        }
        match std::mem::replace(&mut self.parameter, Parameter::None) {
            Parameter::None => self.output = Some((RESEND, STATUS_TIMEOUT)),
            Parameter::CommandByte => self.command_byte = value & COMMAND_BYTE_MASK,
            Parameter::OutputPort => {
                self.output_port = value | OUTPUT_PORT_RESET;
                if value & OUTPUT_PORT_RESET == 0 {
                    effects.push(Effect::Reset);
                }
            }
            Parameter::KeyboardBuffer => self.answer(value),
            // Without the auxiliary status bit: that is how a driver sees that there is no such interface.
            Parameter::AuxBuffer => self.answer(value),
            Parameter::AuxDevice => self.output = Some((RESEND, STATUS_TIMEOUT | STATUS_AUX)),
        }
    }

    fn answer(&mut self, value: u8) {
        self.output = Some((value, 0));
    }

    fn command(&mut self, command: u8, effects: &mut Vec<Effect>) {
        match command {
            0x20 => self.answer(self.command_byte),
            0x60 => self.parameter = Parameter::CommandByte,
            0xa7 => self.command_byte |= COMMAND_BYTE_AUX_OFF,
            0xa8 => self.command_byte &= !COMMAND_BYTE_AUX_OFF,
            0xa9 => self.answer(0x01), // auxiliary interface test: its clock line is stuck low
            0xaa => {
                let off = COMMAND_BYTE_KEYBOARD_OFF | COMMAND_BYTE_AUX_OFF;
                self.command_byte = COMMAND_BYTE_SYSTEM | COMMAND_BYTE_TRANSLATE | off;
                self.answer(0x55); // self-test passed
            }
            0xab => self.answer(0x00), // keyboard interface test: no error
            0xad => self.command_byte |= COMMAND_BYTE_KEYBOARD_OFF,
            0xae => self.command_byte &= !COMMAND_BYTE_KEYBOARD_OFF,
            0xc0 => self.answer(0x80), // input port: keyboard not inhibited
            0xd0 => self.answer(self.output_port),
            0xd1 => self.parameter = Parameter::OutputPort,
            0xd2 => self.parameter = Parameter::KeyboardBuffer,
            0xd3 => self.parameter = Parameter::AuxBuffer,
            0xd4 => self.parameter = Parameter::AuxDevice,
            // Pulses the bits of the output port that are 0 in the command.
            0xf0..=0xff if command & OUTPUT_PORT_RESET == 0 => effects.push(Effect::Reset),
            _ => {}
        }
    }
}

impl Device for I8042 {
    fn kind(&self) -> &'static str {
        "i8042"
    }

    fn version(&self) -> u16 {
        1
    }

    fn save(&self, out: &mut Encoder) {
        out.u8(self.command_byte);
        out.u8(self.output_port);
        out.bool(self.last_was_command);
        out.u8(self.parameter as u8);
        out.option(self.output, |out, (value, status)| out.array(&[value, status]));
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.command_byte = input.u8("command_byte")?;
        self.output_port = input.u8("output_port")?;
        self.last_was_command = input.bool("last_was_command")?;
        self.parameter = match input.u8("parameter")? {
            0 => Parameter::None,
            1 => Parameter::CommandByte,
            2 => Parameter::OutputPort,
            3 => Parameter::KeyboardBuffer,
            4 => Parameter::AuxBuffer,
            5 => Parameter::AuxDevice,
            other => return input.check("parameter", other.into(), false),
        };
        self.output =
            input.option("output", |input, field| input.array(field).map(|[v, s]: [u8; 2]| (v, s)))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: u8 = STATUS_OUTPUT_FULL;

    /// Writes to the ports in order; the answer, if there is one, with its status.
    fn run(controller: &mut I8042, writes: &[(u16, u8)]) -> (Vec<Effect>, Option<(u8, u8)>) {
        let mut effects = Vec::new();
        for (port, value) in writes {
            controller.write(*port, *value, &mut effects);
        }
        let status = controller.read(0x64);
        let answer = (status & FULL != 0).then(|| (controller.read(0x60), status));
        (effects, answer)
    }

    fn answer(controller: &mut I8042, writes: &[(u16, u8)]) -> Option<u8> {
        run(controller, writes).1.map(|(value, _)| value)
    }

    #[test]
    fn new_controller_is_idle_and_ready() {
        let mut controller = I8042::new();
        assert_eq!(controller.read(0x64), STATUS_UNLOCKED | STATUS_SYSTEM);
        assert_eq!(controller.read(0x60), 0);
    }

    #[test]
    fn tests_are_answered_at_once() {
        let mut controller = I8042::new();
        assert_eq!(answer(&mut controller, &[(0x64, 0xaa)]), Some(0x55));
        assert_eq!(answer(&mut controller, &[(0x64, 0xab)]), Some(0x00));
        assert_eq!(answer(&mut controller, &[(0x64, 0xa9)]), Some(0x01), "no auxiliary device");
        assert_eq!(answer(&mut controller, &[(0x64, 0xc0)]), Some(0x80));
        assert_eq!(controller.read(0x64) & FULL, 0);
    }

    #[test]
    fn command_byte_keeps_seven_bits() {
        let mut controller = I8042::new();
        for value in [0xff, 0x00, 0xa5, 0x5a] {
            assert_eq!(
                answer(&mut controller, &[(0x64, 0x60), (0x60, value), (0x64, 0x20)]),
                Some(value & 0x7f)
            );
        }
    }

    #[test]
    fn enable_commands_change_the_command_byte() {
        let mut controller = I8042::new();
        for (command, expected) in [(0xae, 0x24), (0xa8, 0x04), (0xad, 0x14), (0xa7, 0x34)] {
            assert_eq!(answer(&mut controller, &[(0x64, command), (0x64, 0x20)]), Some(expected));
        }
    }

    #[test]
    fn auxiliary_loop_comes_back_without_the_auxiliary_bit() {
        let (_, answer) = run(&mut I8042::new(), &[(0x64, 0xd3), (0x60, 0x5a)]);
        let (value, status) = answer.unwrap();
        assert_eq!((value, status & STATUS_AUX), (0x5a, 0));
    }

    #[test]
    fn absent_devices_answer_resend_with_time_out() {
        let (_, keyboard) = run(&mut I8042::new(), &[(0x60, 0xf2)]);
        let (value, status) = keyboard.unwrap();
        assert_eq!((value, status & (STATUS_TIMEOUT | STATUS_AUX)), (0xfe, STATUS_TIMEOUT));
        let (_, mouse) = run(&mut I8042::new(), &[(0x64, 0xd4), (0x60, 0xf2)]);
        let (value, status) = mouse.unwrap();
        assert_eq!((value, status & (STATUS_TIMEOUT | STATUS_AUX)), (0xfe, STATUS_TIMEOUT | STATUS_AUX));
    }

    #[test]
    fn keyboard_interrupt_follows_the_output_buffer_while_enabled() {
        let mut controller = I8042::new();
        let mut effects = Vec::new();
        for (port, value) in [(0x64, 0xd2), (0x60, 0x1c)] {
            controller.write(port, value, &mut effects);
        }
        assert!(!controller.interrupt());
        for (port, value) in [(0x64, 0x60), (0x60, 0x45)] {
            controller.write(port, value, &mut effects);
        }
        assert!(controller.interrupt());
        assert_eq!(controller.read(0x60), 0x1c);
        assert!(!controller.interrupt());
    }

    #[test]
    fn reset_line_resets_and_other_pulses_do_not() {
        let mut controller = I8042::new();
        assert_eq!(run(&mut controller, &[(0x64, 0xfe)]).0, [Effect::Reset]);
        assert_eq!(run(&mut controller, &[(0x64, 0xf0)]).0, [Effect::Reset]);
        assert_eq!(run(&mut controller, &[(0x64, 0xff)]).0, []);
        assert_eq!(run(&mut controller, &[(0x64, 0xd1), (0x60, 0xdf)]).0, []);
        assert_eq!(answer(&mut controller, &[(0x64, 0xd0)]), Some(0xdf));
        assert_eq!(run(&mut controller, &[(0x64, 0xd1), (0x60, 0xfe)]).0, [Effect::Reset]);
    }
}
