//! The secret that both hosts hold, what is derived from it, and the seal on datagrams.
//!
//! Owns: the text of a key file, the keys for one purpose each, the tag at the end of a datagram. Must never: read a
//! file, show a secret, or use the same key for two purposes.
//!
//! ```text
//! key file ── Key ── derive("log") ────────────────────────────────────────> the connection's handshake (channel.rs)
//!              ├──── derive("heartbeat", handshake's hash, guest's name) ──> SealKey: datagrams beside one connection
//!              └──── derive("invitation") ────────────────────────────────> SealKey: datagrams before any connection
//! ```
//!
//! A key file is text, a field per line, this order, each line ended by a line feed:
//!
//! ```text
//! vmft-key 1            magic and version
//! key 64 hex digits     32 random bytes
//! check 8 hex digits    CRC-32 of the 32 bytes, so that a digit that was changed or lost is seen
//! ```
//!
//! Derivation and tags are BLAKE2s in its keyed mode (RFC 7693), which is made for both.

use std::fmt;

use blake2::digest::consts::U16;
use blake2::digest::{KeyInit, Mac};
use blake2::{Blake2sMac, Blake2sMac256};
use thiserror::Error;

use crate::hex::{from_hex, to_hex};

/// Bytes of a secret.
pub const KEY_BYTES: usize = 32;
/// More than a key file has.
pub const MAX_KEY_FILE_BYTES: usize = 1_024;
/// Bytes by which a seal makes a datagram longer.
pub const TAG_BYTES: usize = 16;

const NAME: &str = "vmft-key ";
const VERSION: &str = "1";
/// What derivations are for; a purpose of another program with the same secret would be another key.
const DOMAIN: &[u8] = b"vmft";

/// Why a text is not a key.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum KeyError {
    /// Something else.
    #[error("it is not a key file of vmft")]
    Magic,
    /// Another version.
    #[error("it is a key file of version {found}, this monitor knows {VERSION}")]
    Version {
        /// The version found.
        found: String,
    },
    /// Cut off or changed.
    #[error("it is damaged: {what}")]
    Damaged {
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The secret that both hosts hold.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; KEY_BYTES]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// The secret with these bytes, which must be random.
    pub fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The text of its key file.
    pub fn to_text(&self) -> String {
        let check = crc32fast::hash(&self.0);
        format!("{NAME}{VERSION}\nkey {}\ncheck {check:08x}\n", to_hex(&self.0))
    }

    /// The secret that a key file holds.
    ///
    /// # Errors
    /// Magic and version are judged first, so that another version is told by its name.
    pub fn from_text(text: &[u8]) -> Result<Self, KeyError> {
        let damaged = |what| KeyError::Damaged { what };
        let rest = text.strip_prefix(NAME.as_bytes()).ok_or(KeyError::Magic)?;
        let rest = std::str::from_utf8(rest).map_err(|_| damaged("it is not text"))?;
        let (version, rest) = rest.split_once('\n').ok_or(damaged("its first line does not end"))?;
        if version != VERSION {
            return Err(KeyError::Version { found: version.escape_default().to_string() });
        }
        let (digits, rest) = rest
            .strip_prefix("key ")
            .and_then(|rest| rest.split_once('\n'))
            .ok_or(damaged("its second line is not a key"))?;
        let bytes: [u8; KEY_BYTES] =
            from_hex(digits).ok_or(damaged("the key has not 64 hexadecimal digits"))?;
        let check = rest
            .strip_prefix("check ")
            .and_then(|rest| rest.strip_suffix('\n'))
            .and_then(from_hex)
            .map(u32::from_be_bytes)
            .ok_or(damaged("its third and last line is not a checksum"))?;
        if check != crc32fast::hash(&bytes) {
            return Err(damaged("key and checksum do not belong together"));
        }
        Ok(Self(bytes))
    }

    /// The key for one purpose. `context` says more exactly for what, each part by itself.
    pub(crate) fn derive(&self, purpose: &str, context: &[&[u8]]) -> [u8; KEY_BYTES] {
        derive(&self.0, purpose, context)
    }

    /// The key that seals datagrams of one purpose. `context` says more exactly for what, each part by itself.
    pub fn seal_key(&self, purpose: &str, context: &[&[u8]]) -> SealKey {
        SealKey(self.derive(purpose, context))
    }
}

fn derive(secret: &[u8; KEY_BYTES], purpose: &str, context: &[&[u8]]) -> [u8; KEY_BYTES] {
    let mut mac = <Blake2sMac256 as KeyInit>::new(secret.into());
    for part in [DOMAIN, purpose.as_bytes()].into_iter().chain(context.iter().copied()) {
        // Lengths keep two parts from reading like two others.
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// Seals datagrams: whoever has not this key can neither make one nor change one.
///
/// A seal does not tell whether a datagram has come before; a counter in it must.
#[derive(Clone, PartialEq, Eq)]
pub struct SealKey([u8; KEY_BYTES]);

impl fmt::Debug for SealKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SealKey(..)")
    }
}

impl SealKey {
    /// The key of those who have no secret. Everybody knows it: a seal finds accidents then, and nothing else.
    pub fn without_secret(purpose: &str, context: &[&[u8]]) -> Self {
        Self(derive(&[0; KEY_BYTES], purpose, context))
    }

    fn mac(&self, bytes: &[u8]) -> Blake2sMac<U16> {
        let mut mac = <Blake2sMac<U16> as KeyInit>::new((&self.0).into());
        mac.update(bytes);
        mac
    }

    /// Appends the tag of what `datagram` holds.
    pub fn seal(&self, datagram: &mut Vec<u8>) {
        let tag = self.mac(datagram).finalize().into_bytes();
        datagram.extend_from_slice(&tag);
    }

    /// What `datagram` holds, if this key has sealed it.
    pub fn open<'a>(&self, datagram: &'a [u8]) -> Option<&'a [u8]> {
        let (bytes, tag) = datagram.split_last_chunk::<TAG_BYTES>()?;
        // In a time that does not depend on how many bytes are right.
        self.mac(bytes).verify(tag.into()).ok().map(|()| bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_blake2s_is_that_of_its_authors() {
        // The first of their test vectors: no input, a key of the bytes 0 to 31.
        let key: [u8; KEY_BYTES] = std::array::from_fn(|index| index as u8);
        let mac = <Blake2sMac256 as KeyInit>::new(&key.into());
        let expected = from_hex("48a8997da407876b3d79c0d92325ad3b89cbb754d86ab71aee047ad345fd2c49");
        assert_eq!(Some(mac.finalize().into_bytes().into()), expected);
    }
}
