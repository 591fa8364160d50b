//! Unpacks the `vmlinux` inside a bzImage, so that no guest instruction is spent on it.
//!
//! Owns: [`unpack`]. Must never: run or trust anything in the file; the sizes it states are checked against its
//! length, and what it unpacks to against the size it states.
//! Follows: Linux `Documentation/arch/x86/boot.rst`, fields `setup_sects`, `payload_offset`, `payload_length`,
//! `xloadflags`. The payload's last four bytes are its unpacked size.

use std::io::Read;
use std::path::Path;

use super::BootError;

const VERSION_OFFSET: usize = 0x206;
const XLOADFLAGS_OFFSET: usize = 0x236;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const SETUP_SECTS_OFFSET: usize = 0x1f1;
/// First boot protocol with `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
const SECTOR_BYTES: usize = 512;
/// A kernel that claims to be larger is refused before any memory is set aside for it.
const UNPACKED_BYTES_MAX: usize = 1 << 30;
const LZ4_LEGACY_BLOCK_BYTES_MAX: usize = 8 << 20;
const ZSTD_WINDOW_LOG_MIN: u32 = 10;

/// How the kernel in a bzImage is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Xz,
    Lzma,
    Lz4Legacy,
    Zstd,
    Plain,
}

impl Packing {
    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Lz4Legacy => "lz4",
            Self::Zstd => "zstd",
            Self::Plain => "no packing",
        }
    }
}

/// The ELF file inside the bzImage `bytes` and how it was packed; `path` only names it in errors.
///
/// # Errors
/// [`BootError::KernelTruncated`], [`BootError::No64BitEntry`], [`BootError::PackingUnknown`],
/// [`BootError::Unpack`].
pub(super) fn unpack(bytes: &[u8], path: &Path) -> Result<(Vec<u8>, Packing), BootError> {
    let truncated = |part| BootError::KernelTruncated { path: path.into(), part };
    let field = |at: usize, len: usize| -> Result<u32, BootError> {
        let raw = bytes.get(at..at + len).ok_or_else(|| truncated("setup header"))?;
        Ok(raw.iter().rev().fold(0, |value, b| value << 8 | u32::from(*b)))
    };
    let version = field(VERSION_OFFSET, 2)? as u16;
    if version < VERSION_MIN || field(XLOADFLAGS_OFFSET, 2)? as u16 & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry {
            path: path.into(),
            detail: format!(
                "it is a bzImage (boot protocol {}.{}) of a 32-bit kernel",
                version >> 8,
                version & 0xff
            ),
        });
    }
    let setup_sectors = match field(SETUP_SECTS_OFFSET, 1)? as usize {
        0 => 4,
        n => n,
    };
    let start = (setup_sectors + 1) * SECTOR_BYTES + field(PAYLOAD_OFFSET, 4)? as usize;
    let payload = bytes
        .get(start..start.saturating_add(field(PAYLOAD_LENGTH, 4)? as usize))
        .ok_or_else(|| truncated("packed kernel"))?;
    let (packed, size) = payload.split_last_chunk::<4>().ok_or_else(|| truncated("packed kernel"))?;
    let unpacked_bytes = u32::from_le_bytes(*size) as usize;
    let failed = |detail: String| BootError::Unpack { path: path.into(), detail };
    if unpacked_bytes > UNPACKED_BYTES_MAX {
        return Err(failed(format!("it claims to unpack to {unpacked_bytes} bytes")));
    }
    let packing =
        packing_of(payload).map_err(|name| BootError::PackingUnknown { path: path.into(), packing: name })?;
    let kernel = unpack_payload(packing, payload, packed, unpacked_bytes)
        .map_err(|e| failed(format!("{}: {e}", packing.name())))?;
    if packing != Packing::Plain && kernel.len() != unpacked_bytes {
        return Err(failed(format!("it unpacked to {} bytes instead of {unpacked_bytes}", kernel.len())));
    }
    Ok((kernel, packing))
}

/// By magic number. The error is the name of what was found.
fn packing_of(payload: &[u8]) -> Result<Packing, &'static str> {
    const MAGICS: [(&[u8], Result<Packing, &str>); 8] = [
        (&[0x1f, 0x8b], Ok(Packing::Gzip)),
        (b"\xfd7zXZ\0", Ok(Packing::Xz)),
        (&[0x5d, 0, 0], Ok(Packing::Lzma)),
        (&[0x02, 0x21, 0x4c, 0x18], Ok(Packing::Lz4Legacy)),
        (&[0x28, 0xb5, 0x2f, 0xfd], Ok(Packing::Zstd)),
        (b"\x7fELF", Ok(Packing::Plain)),
        (b"BZh", Err("bzip2")),
        (&[0x89, b'L', b'Z', b'O'], Err("LZO")),
    ];
    MAGICS.iter().find(|(magic, _)| payload.starts_with(magic)).map_or(Err("an unknown way"), |(_, p)| *p)
}

/// Unpacks to at most one byte more than `unpacked_bytes`, which is enough to see that it was wrong.
fn unpack_payload(
    packing: Packing,
    payload: &[u8],
    packed: &[u8],
    unpacked_bytes: usize,
) -> std::io::Result<Vec<u8>> {
    let other = |e: String| std::io::Error::new(std::io::ErrorKind::InvalidData, e);
    let zstd;
    let mut reader: Box<dyn Read + '_> = match packing {
        Packing::Plain => return Ok(payload.to_vec()),
        Packing::Lz4Legacy => return unpack_lz4_legacy(packed, unpacked_bytes),
        // gzip ends with its own unpacked size, and the kernel's build adds no second one.
        Packing::Gzip => Box::new(flate2::read::GzDecoder::new(payload)),
        Packing::Xz => Box::new(lzma_rust2::XzReader::new(packed, false)),
        Packing::Lzma => {
            let limit_kib = (UNPACKED_BYTES_MAX / 1024) as u32;
            Box::new(lzma_rust2::LzmaReader::new_mem_limit(packed, limit_kib, None)?)
        }
        Packing::Zstd => {
            zstd = with_small_window(packed, unpacked_bytes);
            Box::new(ruzstd::decoding::StreamingDecoder::new(&zstd[..]).map_err(|e| other(e.to_string()))?)
        }
    };
    let mut kernel = Vec::with_capacity(unpacked_bytes);
    reader.by_ref().take(unpacked_bytes as u64 + 1).read_to_end(&mut kernel)?;
    Ok(kernel)
}

/// The old LZ4 container that the kernel's build uses: after the magic, blocks of (length, LZ4 block).
fn unpack_lz4_legacy(packed: &[u8], unpacked_bytes: usize) -> std::io::Result<Vec<u8>> {
    let invalid = |e: String| std::io::Error::new(std::io::ErrorKind::InvalidData, e);
    let mut kernel = vec![0; unpacked_bytes];
    let mut filled = 0;
    let mut rest = packed.get(4..).unwrap_or_default();
    while let Some((length, behind)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        let block =
            behind.get(..length).ok_or_else(|| invalid(format!("a block of {length} bytes is cut off")))?;
        let room = (unpacked_bytes - filled).min(LZ4_LEGACY_BLOCK_BYTES_MAX);
        filled += lz4_flex::block::decompress_into(block, &mut kernel[filled..filled + room])
            .map_err(|e| invalid(e.to_string()))?;
        rest = &behind[length..];
    }
    kernel.truncate(filled);
    Ok(kernel)
}

/// `zstd -22` packs a stream with a window of 128 MiB, more than the unpacker allows. No reference can reach
/// further back than the beginning, so a window of the unpacked size says the same.
fn with_small_window(packed: &[u8], unpacked_bytes: usize) -> Vec<u8> {
    let mut frame = packed.to_vec();
    let enough = unpacked_bytes.max(1 << ZSTD_WINDOW_LOG_MIN);
    let base_log = enough.ilog2();
    let eighths = (enough - (1 << base_log)).div_ceil(1 << (base_log - 3)) as u32;
    let smaller = ((base_log - ZSTD_WINDOW_LOG_MIN) << 3) + eighths;
    // RFC 8878, 3.1.1.1: a descriptor with its bit 5 clear is followed by the window descriptor.
    if frame.len() > 5 && frame[4] & 0x20 == 0 && u32::from(frame[5]) > smaller {
        frame[5] = smaller as u8;
    }
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 128 times `vmlinux `, packed by the tools that the kernel's build uses.
    const GZIP: &[u8] = &[
        0x1f, 0x8b, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03, 0x2b, 0xcb, 0xcd, 0xc9, 0xcc, 0x2b, 0xad,
        0x50, 0x28, 0x1b, 0xa5, 0x47, 0xe9, 0x51, 0x7a, 0xc4, 0xd1, 0x00, 0x4c, 0xbd, 0x14, 0x55, 0x00, 0x04,
        0x00, 0x00,
    ];
    const LZMA: &[u8] = &[
        0x5d, 0x00, 0x00, 0x80, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x00, 0x3b, 0x1b, 0x49,
        0xce, 0x3b, 0x5c, 0x1e, 0xa4, 0x29, 0x6a, 0xbf, 0xf6, 0xf6, 0xc2, 0x5a, 0xa0, 0x47, 0x24, 0x36, 0xff,
        0xff, 0xf4, 0x9f, 0x80, 0x00,
    ];
    const LZ4: &[u8] = &[
        0x02, 0x21, 0x4c, 0x18, 0x15, 0x00, 0x00, 0x00, 0x8f, 0x76, 0x6d, 0x6c, 0x69, 0x6e, 0x75, 0x78, 0x20,
        0x08, 0x00, 0xff, 0xff, 0xff, 0xe3, 0x50, 0x69, 0x6e, 0x75, 0x78, 0x20,
    ];
    /// From a pipe, so with a window of 128 MiB.
    const ZSTD: &[u8] = &[
        0x28, 0xb5, 0x2f, 0xfd, 0x04, 0x88, 0x7d, 0x00, 0x00, 0x40, 0x76, 0x6d, 0x6c, 0x69, 0x6e, 0x75, 0x78,
        0x20, 0x01, 0x00, 0xf5, 0x57, 0x97, 0x0b, 0x49, 0xda, 0xac, 0x01,
    ];
    /// 128 calls of one function, packed with the BCJ filter for x86.
    const XZ_BCJ: &[u8] = &[
        0xfd, 0x37, 0x7a, 0x58, 0x5a, 0x00, 0x00, 0x01, 0x69, 0x22, 0xde, 0x36, 0x02, 0x01, 0x04, 0x00, 0x21,
        0x01, 0x10, 0x00, 0x8b, 0x21, 0x6f, 0x49, 0xe0, 0x03, 0xff, 0x00, 0x12, 0x5d, 0x00, 0x74, 0x00, 0x03,
        0xc0, 0x0c, 0x02, 0xb4, 0xd3, 0x9f, 0xe6, 0xdb, 0x80, 0xf4, 0x19, 0x04, 0xb2, 0xc6, 0x00, 0x00, 0x00,
        0x00, 0x2d, 0xd8, 0xc1, 0x99, 0x00, 0x01, 0x2a, 0x80, 0x08, 0x00, 0x00, 0x00, 0xf0, 0x6a, 0x30, 0x11,
        0x3e, 0x30, 0x0d, 0x8b, 0x02, 0x00, 0x00, 0x00, 0x00, 0x01, 0x59, 0x5a,
    ];

    fn words() -> Vec<u8> {
        b"vmlinux ".repeat(128)
    }

    fn calls() -> Vec<u8> {
        let call = |at: i32| [&[0xe8][..], &(0x4000 - at - 5).to_le_bytes(), &[0x90; 3]].concat();
        (0..128).flat_map(|i| call(i * 8)).collect()
    }

    /// A bzImage of one setup sector around a payload that has its size appended already.
    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024 + 16];
        image[SETUP_SECTS_OFFSET] = 1;
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[VERSION_OFFSET..VERSION_OFFSET + 2].copy_from_slice(&[0x0f, 0x02]);
        image[XLOADFLAGS_OFFSET] = 1;
        image[PAYLOAD_OFFSET] = 16;
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image
    }

    fn sized(packed: &[u8]) -> Vec<u8> {
        [packed, &1024u32.to_le_bytes()].concat()
    }

    fn unpacked(image: &[u8]) -> Result<Vec<u8>, BootError> {
        unpack(image, Path::new("vmlinuz")).map(|(kernel, _)| kernel)
    }

    #[test]
    fn each_packing_unpacks() {
        assert_eq!(unpacked(&bzimage(GZIP)).unwrap(), words());
        for packed in [LZMA, LZ4, ZSTD] {
            assert_eq!(unpacked(&bzimage(&sized(packed))).unwrap(), words());
        }
        assert_eq!(unpacked(&bzimage(&sized(XZ_BCJ))).unwrap(), calls());
    }

    #[test]
    fn no_packing_is_a_packing() {
        let elf = [&b"\x7fELF"[..], &[1; 60]].concat();
        assert_eq!(unpack(&bzimage(&elf), Path::new("vmlinuz")).unwrap(), (elf, Packing::Plain));
    }

    #[test]
    fn other_packings_are_named() {
        let names = [(&b"BZh9"[..], "bzip2"), (b"\x89LZO", "LZO"), (b"\0\0\0\0", "an unknown way")];
        for (magic, name) in names {
            let error = unpacked(&bzimage(&sized(magic))).unwrap_err();
            assert!(
                matches!(&error, BootError::PackingUnknown { packing, .. } if *packing == name),
                "{error}"
            );
        }
    }

    #[test]
    fn a_wrong_size_is_refused() {
        for packed in [LZMA, LZ4, ZSTD, XZ_BCJ] {
            for size in [1023u32, 1025, 0, u32::MAX] {
                let payload = [packed, &size.to_le_bytes()].concat();
                assert!(matches!(unpacked(&bzimage(&payload)), Err(BootError::Unpack { .. })), "{size}");
            }
        }
    }

    #[test]
    fn a_32_bit_kernel_is_refused() {
        let mut image = bzimage(GZIP);
        image[XLOADFLAGS_OFFSET] = 0;
        assert!(matches!(unpacked(&image), Err(BootError::No64BitEntry { .. })));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_ends_without_panic() {
        for payload in [GZIP.to_vec(), sized(LZMA), sized(LZ4), sized(ZSTD), sized(XZ_BCJ)] {
            let image = bzimage(&payload);
            for len in 0..image.len() {
                assert!(unpacked(&image[..len]).is_err(), "{len}");
            }
            for at in image.len() - payload.len()..image.len() {
                let mut image = image.clone();
                image[at] ^= 1 << (at % 8);
                // A packing without a checksum may unpack to something else, of the same size.
                if let Ok(kernel) = unpacked(&image) {
                    assert_eq!(kernel.len(), 1024);
                }
            }
        }
    }
}
