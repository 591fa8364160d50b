//! The datagram by which a primary without a backup asks a host for one.
//!
//! Owns: the 48 bytes of an [`Invitation`]. Must never: send one, or decide from one that anybody may follow: the
//! greeting of a connection does.
//!
//! ```text
//! magic "VMFTCALL" | version u32 | view u64 | guest u64 | port u16 | reserved [u8; 2] = 0 | tag [u8; 16]
//! ```
//!
//! The tag seals all bytes before it (`key.rs`) with a key of the hosts' secret; without a secret it guards against
//! accidents only. Nothing in it tells new from old: an invitation that is old or forged leads to a connection that comes
//! to nothing.

use crate::datagram::{self, DatagramError, Kind};
use crate::error::LogError;
use crate::fields::{get_u16, get_u64};
use crate::key::{SealKey, TAG_BYTES};

/// Length of an invitation.
pub const INVITATION_BYTES: usize = SEALED_BYTES + TAG_BYTES;
/// Version of the invitation.
pub const INVITATION_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"VMFTCALL";
const KIND: Kind = Kind { magic: MAGIC, version: INVITATION_VERSION, len_bytes: INVITATION_BYTES };
const SEALED_BYTES: usize = 32;

/// "I run this guest and have no backup."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invitation {
    /// The view that the sender is in.
    pub view: u64,
    /// [`crate::guest_name_hash`] of the guest.
    pub guest: u64,
    /// The TCP port on which the sender awaits backups, at the address that the datagram comes from. Not 0.
    pub port: u16,
}

impl Invitation {
    /// Does `datagram` start as an invitation of any version does?
    pub fn is_meant(datagram: &[u8]) -> bool {
        datagram.starts_with(&MAGIC)
    }

    /// The datagram, sealed with `key`.
    pub fn encode(&self, key: &SealKey) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(INVITATION_BYTES);
        bytes.extend_from_slice(&crate::stream::header(MAGIC, INVITATION_VERSION));
        bytes.extend_from_slice(&self.view.to_le_bytes());
        bytes.extend_from_slice(&self.guest.to_le_bytes());
        bytes.extend_from_slice(&self.port.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        key.seal(&mut bytes);
        bytes
    }

    /// The invitation that a datagram holds, if `key` has sealed it.
    ///
    /// # Errors
    /// Magic and version are judged before the length, so that another version is told by its name.
    pub fn decode(datagram: &[u8], key: &SealKey) -> Result<Self, DatagramError> {
        let input = &mut datagram::open(datagram, &KIND, key)?;
        let invitation = Self::get_fields(input)?;
        datagram::reserved::<2>(input)?;
        if invitation.port == 0 {
            return Err(DatagramError::Port);
        }
        Ok(invitation)
    }

    fn get_fields(input: &mut &[u8]) -> Result<Self, LogError> {
        Ok(Self {
            view: get_u64(input, "view")?,
            guest: get_u64(input, "guest")?,
            port: get_u16(input, "port")?,
        })
    }
}
