//! Faults that a host's memory or processor has once in a long while, made on purpose: for tests of what follows.
//!
//! Owns: which bits are flipped. Must never: happen without being asked for.

use std::str::FromStr;

use memchr::memmem;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Machine, MachineError};

/// Bytes of memory that are searched at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Longest text that is searched for.
const TEXT_MAX_BYTES: usize = 256;

/// RFLAGS.ID: of no use but to ask for CPUID, so the guest goes on as if nothing had happened.
const RFLAGS_ID: u64 = 1 << 21;

/// What is to be corrupted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Corruption {
    /// A bit of the flags, when the guest halts: the interrupt that wakes it takes the flag along to its next exit.
    Register,
    /// A bit of the first byte of each copy of this text in guest memory.
    Memory(String),
}

/// `register`, or `memory=TEXT`.
impl FromStr for Corruption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "register" => Ok(Self::Register),
            Some(("memory", wanted)) if (1..=TEXT_MAX_BYTES).contains(&wanted.len()) => {
                Ok(Self::Memory(wanted.to_owned()))
            }
            _ => Err(format!("'{text}' is neither register nor memory=TEXT")),
        }
    }
}

impl Machine {
    /// Can this be corrupted at the boundary where the guest stands?
    pub fn can_corrupt(&self, what: &Corruption) -> bool {
        *what != Corruption::Register || self.waiting()
    }

    /// Corrupts this guest, which stands at a boundary. Answers how many bits were flipped.
    pub fn corrupt(&mut self, what: &Corruption) -> Result<usize, MachineError> {
        match what {
            Corruption::Register => {
                self.vcpu.change_registers(|regs| regs.rflags ^= RFLAGS_ID);
                Ok(1)
            }
            Corruption::Memory(text) => self.corrupt_copies_of(text.as_bytes()),
        }
    }

    fn corrupt_copies_of(&self, text: &[u8]) -> Result<usize, MachineError> {
        let finder = memmem::Finder::new(text);
        let mut places = Vec::new();
        for region in self.ram.iter() {
            let start = region.start_addr().0;
            let mut chunk = vec![0; CHUNK_BYTES + text.len() - 1];
            for offset in (0..region.len()).step_by(CHUNK_BYTES) {
                let len = (region.len() - offset).min(chunk.len() as u64) as usize;
                let gpa = GuestAddress(start + offset);
                self.ram
                    .read_slice(&mut chunk[..len], gpa)
                    .map_err(|error| MachineError::BadState(format!("memory at {:#x}: {error}", gpa.0)))?;
                places.extend(finder.find_iter(&chunk[..len]).map(|at| gpa.0 + at as u64));
            }
        }
        for place in &places {
            self.ram
                .write_obj(text[0] ^ 1, GuestAddress(*place))
                .map_err(|error| MachineError::BadState(format!("memory at {place:#x}: {error}")))?;
        }
        Ok(places.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corruptions_are_parsed_or_refused() {
        assert_eq!("register".parse(), Ok(Corruption::Register));
        assert_eq!("memory=a=b".parse(), Ok(Corruption::Memory("a=b".into())));
        for bad in ["", "memory", "memory=", "registers", "disk=a"] {
            assert!(bad.parse::<Corruption>().is_err(), "{bad}");
        }
    }
}
