//! What all sealed datagrams begin and end with: magic, version, .., tag.
//!
//! Owns: the order in which they are judged: magic, version, length, seal. So another version is told by its name, and
//! no field is looked at that nobody with the key has written. Must never: know what the fields mean.

use thiserror::Error;

use crate::error::LogError;
use crate::fields::{get_array, get_u32};
use crate::key::SealKey;

/// What a kind of datagram is.
pub(crate) struct Kind {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    /// Its length, the tag included.
    pub(crate) len_bytes: usize,
}

/// Why a datagram is not one of the kind that it is taken for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DatagramError {
    /// Another length.
    #[error("The datagram has {len_bytes} bytes in place of {known_bytes}")]
    Length {
        /// The length found.
        len_bytes: usize,
        /// That of its kind.
        known_bytes: usize,
    },
    /// Something else.
    #[error("The datagram starts with {} in place of {}", found.escape_ascii(), known.escape_ascii())]
    Magic {
        /// The first bytes found.
        found: [u8; 8],
        /// Those of its kind.
        known: [u8; 8],
    },
    /// Another version.
    #[error("The datagram has version {found}, this monitor knows {known}")]
    Version {
        /// The version found.
        found: u32,
        /// That of this monitor.
        known: u32,
    },
    /// Changed on its way, of another connection, or made by somebody without the key.
    #[error("The datagram is not sealed with this side's key")]
    Seal,
    /// A reserved byte is in use.
    #[error("A reserved byte of the datagram is not 0")]
    Reserved,
    /// Nobody can connect to port 0.
    #[error("The datagram names port 0")]
    Port,
    /// A field has no meaning.
    #[error("The datagram is not valid")]
    Field(#[from] LogError),
}

/// The fields of a datagram that `key` has sealed, with the tag behind them.
pub(crate) fn open<'a>(datagram: &'a [u8], kind: &Kind, key: &SealKey) -> Result<&'a [u8], DatagramError> {
    let length = DatagramError::Length { len_bytes: datagram.len(), known_bytes: kind.len_bytes };
    let mut input = datagram;
    let Ok(magic) = get_array(&mut input, "magic") else { return Err(length) };
    if magic != kind.magic {
        return Err(DatagramError::Magic { found: magic, known: kind.magic });
    }
    let Ok(version) = get_u32(&mut input, "version") else { return Err(length) };
    if version != kind.version {
        return Err(DatagramError::Version { found: version, known: kind.version });
    }
    if datagram.len() != kind.len_bytes {
        return Err(length);
    }
    key.open(datagram).ok_or(DatagramError::Seal)?;
    Ok(input)
}

/// Takes `LEN` reserved bytes, all of which are 0.
pub(crate) fn reserved<const LEN: usize>(input: &mut &[u8]) -> Result<(), DatagramError> {
    if get_array(input, "reserved bytes")? == [0; LEN] { Ok(()) } else { Err(DatagramError::Reserved) }
}
