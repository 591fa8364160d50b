//! The datagrams by which a monitor finds out whether it hears anybody but the peer that is silent.
//!
//! Owns: the 48 bytes of a [`Probe`]. Must never: decide what follows from an answer, or from none.
//!
//! ```text
//! magic "VMFTECHO" | version u32 | guest u64 | number u64 | kind u8 | reserved [u8; 3] = 0 | tag [u8; 16]
//! ```
//!
//! The tag seals all bytes before it, as that of an invitation does.

use crate::datagram::{self, Kind};
use crate::fields::{get_u8, get_u64};
use crate::key::{SealKey, TAG_BYTES};

/// Length of a probe.
pub const PROBE_BYTES: usize = SEALED_BYTES + TAG_BYTES;
/// Version of the probe.
pub const PROBE_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"VMFTECHO";
const KIND: Kind = Kind { magic: MAGIC, version: PROBE_VERSION, len_bytes: PROBE_BYTES };
const SEALED_BYTES: usize = 32;

/// "Are you there?", or "I am here."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// [`crate::guest_name_hash`] of the guest.
    pub guest: u64,
    /// The asker's; an answer repeats it.
    pub number: u64,
    /// Which of the two.
    pub kind: ProbeKind,
}

/// Question or answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ProbeKind {
    /// To be answered at once.
    Question = 1,
    /// Of a monitor of the same guest.
    Answer = 2,
}

impl Probe {
    /// Does `datagram` start as a probe of any version does?
    pub fn is_meant(datagram: &[u8]) -> bool {
        datagram.starts_with(&MAGIC)
    }

    /// The datagram, sealed with `key`.
    pub fn encode(&self, key: &SealKey) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PROBE_BYTES);
        bytes.extend_from_slice(&crate::stream::header(MAGIC, PROBE_VERSION));
        bytes.extend_from_slice(&self.guest.to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&[self.kind as u8, 0, 0, 0]);
        key.seal(&mut bytes);
        bytes
    }

    /// The probe that a datagram holds, if `key` has sealed it. Nobody is told why it holds none: another one follows.
    pub fn decode(datagram: &[u8], key: &SealKey) -> Option<Self> {
        let input = &mut datagram::open(datagram, &KIND, key).ok()?;
        let guest = get_u64(input, "guest").ok()?;
        let number = get_u64(input, "number").ok()?;
        let kind = match get_u8(input, "kind").ok()? {
            1 => ProbeKind::Question,
            2 => ProbeKind::Answer,
            _ => return None,
        };
        datagram::reserved::<3>(input).ok()?;
        Some(Self { guest, number, kind })
    }
}
