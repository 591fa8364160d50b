//! Unpacks the `vmlinux` inside a bzImage, so that no guest instruction is spent on it.
//!
//! Owns: [`unpack`]. Must never: run or trust anything in the file; the sizes it states are checked against its
//! length, and what it unpacks to against the size it states.
//! Follows: Linux `Documentation/arch/x86/boot.rst`, fields `setup_sects`, `payload_offset`, `payload_length`,
//! `xloadflags`. The payload's last four bytes are its unpacked size.

use std::io::Read;
use std::path::Path;

use super::BootError;

const BOOT_FLAG_OFFSET: usize = 0x1fe;
const HEADER_MAGIC_OFFSET: usize = 0x202;
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

/// How a payload is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Gzip,
    Xz,
    Lzma,
    Lz4Legacy,
    Zstd,
    Plain,
}

/// Whether `bytes` begin like a bzImage.
pub(super) fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(BOOT_FLAG_OFFSET..BOOT_FLAG_OFFSET + 2) == Some(&[0x55, 0xaa])
        && bytes.get(HEADER_MAGIC_OFFSET..HEADER_MAGIC_OFFSET + 4) == Some(b"HdrS")
}

/// The ELF file inside the bzImage `bytes`; `path` only names it in errors.
///
/// # Errors
/// [`BootError::KernelTruncated`], [`BootError::No64BitEntry`], [`BootError::PackingUnknown`],
/// [`BootError::Unpack`].
pub(super) fn unpack(bytes: &[u8], path: &Path) -> Result<Vec<u8>, BootError> {
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
        .map_err(|e| failed(format!("{packing:?}: {e}")))?;
    if packing != Packing::Plain && kernel.len() != unpacked_bytes {
        return Err(failed(format!("it unpacked to {} bytes instead of {unpacked_bytes}", kernel.len())));
    }
    Ok(kernel)
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
