//! The datagram by which the two sides see each other alive.
//!
//! Owns: the 56 bytes of a [`Heartbeat`]. Must never: send one, or decide from one that the peer is dead.
//!
//! ```text
//! magic "VMFTBEAT" | version u32 | view u64 | counter u64 | guest u64 | role u8 | reserved [u8; 3] = 0 | tag [u8; 16]
//! ```
//!
//! The tag seals all bytes before it (`key.rs`) with a key of the pair's present connection, so that a datagram of an
//! earlier connection, view or run does not open; within one connection the counter tells old from new. Without a
//! secret the tag guards against accidents only. In any case a heartbeat may delay a takeover and never cause one.

use xxhash_rust::xxh3::xxh3_64;

use crate::datagram::{self, DatagramError, Kind};
use crate::error::LogError;
use crate::fields::{get_u8, get_u64};
use crate::key::{SealKey, TAG_BYTES};

/// Length of a heartbeat.
pub const HEARTBEAT_BYTES: usize = SEALED_BYTES + TAG_BYTES;
/// Version of the heartbeat.
pub const HEARTBEAT_VERSION: u32 = 2;

const MAGIC: [u8; 8] = *b"VMFTBEAT";
const KIND: Kind = Kind { magic: MAGIC, version: HEARTBEAT_VERSION, len_bytes: HEARTBEAT_BYTES };
const SEALED_BYTES: usize = 40;

/// What a side is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// Runs the guest.
    Primary = 1,
    /// Follows.
    Backup = 2,
}

/// "I am alive."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heartbeat {
    /// The view that the sender is in.
    pub view: u64,
    /// Rises by one with every heartbeat of the sender.
    pub counter: u64,
    /// [`guest_name_hash`] of the guest, so that pairs that share an address ignore each other.
    pub guest: u64,
    /// What the sender is.
    pub role: Role,
}

/// The number that stands for a guest's name (XXH3, 64 bits).
pub fn guest_name_hash(name: &str) -> u64 {
    xxh3_64(name.as_bytes())
}

impl Heartbeat {
    /// The datagram, sealed with `key`.
    pub fn encode(&self, key: &SealKey) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEARTBEAT_BYTES);
        bytes.extend_from_slice(&crate::stream::header(MAGIC, HEARTBEAT_VERSION));
        for number in [self.view, self.counter, self.guest] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&[self.role as u8, 0, 0, 0]);
        key.seal(&mut bytes);
        bytes
    }

    /// The heartbeat that a datagram holds, if `key` has sealed it.
    ///
    /// # Errors
    /// Magic and version are judged before the length, so that another version is told by its name.
    pub fn decode(datagram: &[u8], key: &SealKey) -> Result<Self, DatagramError> {
        let input = &mut datagram::open(datagram, &KIND, key)?;
        let heartbeat = Self::get_fields(input)?;
        datagram::reserved::<3>(input)?;
        Ok(heartbeat)
    }

    fn get_fields(input: &mut &[u8]) -> Result<Self, LogError> {
        Ok(Self {
            view: get_u64(input, "view")?,
            counter: get_u64(input, "counter")?,
            guest: get_u64(input, "guest")?,
            role: match get_u8(input, "role")? {
                tag if tag == Role::Primary as u8 => Role::Primary,
                tag if tag == Role::Backup as u8 => Role::Backup,
                tag => return Err(LogError::UnknownTag { what: "role", tag }),
            },
        })
    }
}
