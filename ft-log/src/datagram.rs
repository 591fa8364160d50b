//! What all sealed datagrams begin and end with: magic, version, .., tag.
//!
//! Owns: the order in which they are judged: magic, version, length, seal. So another version is told by its name, and
//! no field is looked at that nobody with the key has written. Must never: know what the fields mean.

use crate::fields::{get_array, get_u32};
use crate::key::SealKey;

/// What a kind of datagram is.
pub(crate) struct Kind {
    pub(crate) magic: [u8; 8],
    pub(crate) version: u32,
    /// Its length, the tag included.
    pub(crate) len_bytes: usize,
}

/// Why a datagram is not one of a kind.
pub(crate) enum Unopened {
    Length { len_bytes: usize },
    Magic { found: [u8; 8] },
    Version { found: u32 },
    Seal,
}

/// The fields of a datagram that `key` has sealed, with the tag behind them.
pub(crate) fn open<'a>(datagram: &'a [u8], kind: &Kind, key: &SealKey) -> Result<&'a [u8], Unopened> {
    let short = |_| Unopened::Length { len_bytes: datagram.len() };
    let mut input = datagram;
    let magic = get_array(&mut input, "magic").map_err(short)?;
    if magic != kind.magic {
        return Err(Unopened::Magic { found: magic });
    }
    let version = get_u32(&mut input, "version").map_err(short)?;
    if version != kind.version {
        return Err(Unopened::Version { found: version });
    }
    if datagram.len() != kind.len_bytes {
        return Err(Unopened::Length { len_bytes: datagram.len() });
    }
    key.open(datagram).ok_or(Unopened::Seal)?;
    Ok(input)
}
