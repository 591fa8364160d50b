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

use thiserror::Error;

use crate::datagram::{self, Kind, Unopened};
use crate::error::LogError;
use crate::fields::{get_array, get_u16, get_u64};
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

/// Why a datagram is not an invitation.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum InvitationError {
    /// Another length.
    #[error("The datagram has {len_bytes} bytes, an invitation has {INVITATION_BYTES}")]
    Length {
        /// The length found.
        len_bytes: usize,
    },
    /// Something else.
    #[error("The datagram is not an invitation: it starts with {}", found.escape_ascii())]
    Magic {
        /// The first bytes found.
        found: [u8; 8],
    },
    /// Another version.
    #[error("The invitation has version {found}, this monitor knows {INVITATION_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
    /// Changed on its way, or made by somebody with another key.
    #[error("The invitation is not sealed with this host's key")]
    Seal,
    /// A reserved byte is in use.
    #[error("A reserved byte of the invitation is not 0")]
    Reserved,
    /// Nobody can connect to port 0.
    #[error("The invitation names port 0")]
    Port,
    /// A field is missing.
    #[error("The invitation is not valid")]
    Field(#[source] LogError),
}

impl From<Unopened> for InvitationError {
    fn from(why: Unopened) -> Self {
        match why {
            Unopened::Length { len_bytes } => Self::Length { len_bytes },
            Unopened::Magic { found } => Self::Magic { found },
            Unopened::Version { found } => Self::Version { found },
            Unopened::Seal => Self::Seal,
        }
    }
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
    pub fn decode(datagram: &[u8], key: &SealKey) -> Result<Self, InvitationError> {
        let input = &mut datagram::open(datagram, &KIND, key)?;
        let invitation = Self::get_fields(input).map_err(InvitationError::Field)?;
        if get_array(input, "reserved bytes") != Ok([0; 2]) {
            return Err(InvitationError::Reserved);
        }
        if invitation.port == 0 {
            return Err(InvitationError::Port);
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
