//! Bytes as hexadecimal digits, as in key files, claims and sentences.
//!
//! Owns: the one form that bytes have there. Must never: read another one.

use std::fmt::Write as _;

/// Two lower-case digits a byte.
pub fn to_hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // A String takes everything.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// What [`to_hex`] wrote, if it was `N` bytes.
pub fn from_hex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_one_form() {
        assert_eq!(to_hex(&[0x00, 0x9a, 0xff]), "009aff");
        assert_eq!(from_hex("009aff"), Some([0x00, 0x9a, 0xff]));
        for other in ["", "009af", "009aff00", "009aFF", "009ag0", "+09aff", "009a\u{e9}"] {
            assert_eq!(from_hex::<3>(other), None, "{other}");
        }
    }
}
