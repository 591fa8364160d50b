//! Where a guest was stopped between two of its own exits, as values and bytes.
//!
//! Owns: [`Position`] and its byte form. Must never: know how a position is found; that is the monitor's.
//!
//! ```text
//! u8 1  checkpoint
//! u8 2  counted: varint branches, varint of a bit for each register that differs from that of the last counted position
//!                (bit 0 = the first of REGISTERS, all zero before the first position), and for each of these a varint:
//!                the difference, as a number of 64 bits with its sign in bit 0
//! ```

use std::fmt;
use std::str::FromStr;

use crate::error::LogError;
use crate::fields::{get_u8, get_varint, put_varint};

/// The names of a position's registers, in their order.
pub const REGISTERS: [&str; 18] = [
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15", "rip", "rflags",
];

/// The values of [`REGISTERS`].
pub type Registers = [u64; REGISTERS.len()];

/// Who supplies positions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum PositionSource {
    /// Nobody: each forced stop is a checkpoint.
    #[default]
    Checkpoint = 1,
    /// The CPU's counter of retired conditional branches.
    Pmu = 2,
    /// The monitor, which steps through the guest and counts its conditional branches.
    Step = 3,
}

impl PositionSource {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Checkpoint, Self::Pmu, Self::Step];

    /// Its name on command lines and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Pmu => "pmu",
            Self::Step => "step",
        }
    }

    /// The one with this tag.
    ///
    /// # Errors
    /// There is none.
    pub fn from_tag(tag: u8) -> Result<Self, LogError> {
        let found = Self::ALL.into_iter().find(|source| *source as u8 == tag);
        found.ok_or(LogError::UnknownTag { what: "position source", tag })
    }
}

impl fmt::Display for PositionSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PositionSource {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|source| source.name() == name);
        found.ok_or_else(|| format!("there is no position source '{name}'"))
    }
}

/// How a follower finds the instruction of a forced stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// It does not run there, but loads the next [`crate::Checkpoint`] that the log holds.
    Checkpoint,
    /// It runs there.
    Counted(Box<Counted>),
}

/// The first instruction behind the guest's `branches`-th conditional branch since the boundary before the stop. Since
/// that number never goes back, no other instruction has the same position.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Conditional branches, taken or not, the last one included.
    pub branches: u64,
    /// What the registers must be there.
    pub registers: Registers,
}

const CHECKPOINT: u8 = 1;
const COUNTED: u8 = 2;

/// Appends `position`; `last` holds the registers of the last counted one.
pub(crate) fn put_position(out: &mut Vec<u8>, last: &mut Registers, position: &Position) {
    let counted = match position {
        Position::Checkpoint => return out.push(CHECKPOINT),
        Position::Counted(counted) => counted,
    };
    out.push(COUNTED);
    put_varint(out, counted.branches);
    let differences = || counted.registers.iter().zip(last.iter()).map(|(now, last)| now.wrapping_sub(*last));
    let changed = differences().enumerate().filter(|(_, by)| *by != 0);
    put_varint(out, changed.fold(0, |bits, (index, _)| bits | 1 << index));
    for difference in differences().filter(|by| *by != 0) {
        put_varint(out, difference << 1 ^ (difference as i64 >> 63) as u64);
    }
    *last = counted.registers;
}

/// Takes a position off `input`; `last` is left as it was if there is none.
pub(crate) fn get_position(input: &mut &[u8], last: &mut Registers) -> Result<Position, LogError> {
    match get_u8(input, "position")? {
        CHECKPOINT => Ok(Position::Checkpoint),
        COUNTED => {
            let branches = get_varint(input, "branches")?;
            let changed = get_varint(input, "changed registers")?;
            if changed >> REGISTERS.len() != 0 {
                return Err(LogError::Overflow { what: "set of changed registers" });
            }
            let mut registers = *last;
            for (index, register) in registers.iter_mut().enumerate() {
                if changed & 1 << index == 0 {
                    continue;
                }
                let folded = get_varint(input, "register")?;
                if folded == 0 {
                    return Err(LogError::NotShortest { what: "set of changed registers" });
                }
                *register = register.wrapping_add(folded >> 1 ^ (folded & 1).wrapping_neg());
            }
            *last = registers;
            Ok(Position::Counted(Box::new(Counted { branches, registers })))
        }
        tag => Err(LogError::UnknownTag { what: "position", tag }),
    }
}
