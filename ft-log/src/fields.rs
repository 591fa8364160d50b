//! Reading and writing the fields that entries and messages are made of.
//!
//! Owns: varints, fixed little-endian numbers, byte strings. Must never: panic, or reserve memory for a
//! length that the input only claims. A getter moves `input` past the field only if the field is valid.
//!
//! A varint holds 7 bits a byte, lowest first; bit 7 says that another byte follows (LEB128). Only the
//! shortest form is valid, so equal values are equal bytes.

use crate::error::LogError;

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A varint length, then the bytes.
pub(crate) fn put_bytes(
    out: &mut Vec<u8>,
    what: &'static str,
    bytes: &[u8],
    limit_bytes: usize,
) -> Result<(), LogError> {
    check_len(what, bytes.len() as u64, limit_bytes)?;
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
    Ok(())
}

pub(crate) fn check_len(what: &'static str, len_bytes: u64, limit_bytes: usize) -> Result<(), LogError> {
    if len_bytes > limit_bytes as u64 {
        return Err(LogError::TooLong { what, len_bytes, limit_bytes });
    }
    Ok(())
}

#[inline]
pub(crate) fn get_varint(input: &mut &[u8], what: &'static str) -> Result<u64, LogError> {
    let mut value = 0u64;
    for (index, &byte) in input.iter().enumerate() {
        // The tenth byte holds bit 63 alone.
        if index == 9 && byte > 1 {
            return Err(LogError::Overflow { what });
        }
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            if byte == 0 && index > 0 {
                return Err(LogError::NotShortest { what });
            }
            *input = &input[index + 1..];
            return Ok(value);
        }
    }
    Err(LogError::Truncated { what })
}

pub(crate) fn get_array<const N: usize>(input: &mut &[u8], what: &'static str) -> Result<[u8; N], LogError> {
    let (array, rest) = input.split_first_chunk::<N>().ok_or(LogError::Truncated { what })?;
    *input = rest;
    Ok(*array)
}

pub(crate) fn get_u8(input: &mut &[u8], what: &'static str) -> Result<u8, LogError> {
    get_array::<1>(input, what).map(|[byte]| byte)
}

pub(crate) fn get_u16(input: &mut &[u8], what: &'static str) -> Result<u16, LogError> {
    get_array(input, what).map(u16::from_le_bytes)
}

pub(crate) fn get_u32(input: &mut &[u8], what: &'static str) -> Result<u32, LogError> {
    get_array(input, what).map(u32::from_le_bytes)
}

pub(crate) fn get_u64(input: &mut &[u8], what: &'static str) -> Result<u64, LogError> {
    get_array(input, what).map(u64::from_le_bytes)
}

pub(crate) fn get_bytes<'a>(
    input: &mut &'a [u8],
    what: &'static str,
    limit_bytes: usize,
) -> Result<&'a [u8], LogError> {
    let mut rest = *input;
    let len = get_varint(&mut rest, what)?;
    check_len(what, len, limit_bytes)?;
    let (bytes, rest) = rest.split_at_checked(len as usize).ok_or(LogError::Truncated { what })?;
    *input = rest;
    Ok(bytes)
}

pub(crate) fn get_text(
    input: &mut &[u8],
    what: &'static str,
    limit_bytes: usize,
) -> Result<String, LogError> {
    let bytes = get_bytes(input, what, limit_bytes)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| LogError::NotText { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varint_has_one_form_at_every_length() {
        for shift in 0..64 {
            for value in [1u64 << shift, (1u64 << shift) - 1, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                put_varint(&mut bytes, value);
                let significant_bits = 64 - value.leading_zeros().min(63);
                assert_eq!(bytes.len() as u32, significant_bits.div_ceil(7), "{value}");
                assert_eq!(get_varint(&mut &bytes[..], "number"), Ok(value));
            }
        }
    }

    #[test]
    fn varint_rejects_long_forms_and_more_than_64_bits() {
        let long = [0x80, 0x00];
        let mut too_big = [0xff; 10];
        too_big[9] = 0x02;
        let endless = [0x80; 11];
        assert_eq!(get_varint(&mut &long[..], "number"), Err(LogError::NotShortest { what: "number" }));
        assert_eq!(get_varint(&mut &too_big[..], "number"), Err(LogError::Overflow { what: "number" }));
        assert_eq!(get_varint(&mut &endless[..], "number"), Err(LogError::Overflow { what: "number" }));
        assert_eq!(get_varint(&mut &long[..1], "number"), Err(LogError::Truncated { what: "number" }));
    }
}
