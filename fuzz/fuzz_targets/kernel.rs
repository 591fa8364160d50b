//! Any bytes as a kernel: raw, as the body of an ELF file with right headers, and as the headers before a body: no panic,
//! and nothing but executable sections that are not writable changes.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use vmft::boot::check_bytes;
use vmft::file_kind::FileKind;

/// mov ecx, PGE|PAE; mov cr4, rcx; mov rax, cr4; mov gs:[0x100], rax; mov rdi, gs:[0x100]; and rdi, ~15; rdtsc; ret
const CODE: [u8; 36] = [
    0xb9, 0xa0, 0, 0, 0, 0x0f, 0x22, 0xe1, 0x0f, 0x20, 0xe0, 0x65, 0x48, 0x89, 0x04, 0x25, 0, 1, 0, 0, 0x65,
    0x48, 0x8b, 0x3c, 0x25, 0, 1, 0, 0, 0x48, 0x83, 0xe7, 0xf0, 0x0f, 0x31, 0xc3,
];
const BODY: usize = 0x400;

fuzz_target!(|bytes: &[u8]| {
    let _ = FileKind::of(bytes);
    check(bytes.to_vec());
    check(with_headers(&[&CODE, bytes].concat(), &[]));
    // The first part patches the headers: pairs of a place and a value.
    let patches = &bytes[..bytes.len().min(64)];
    check(with_headers(&CODE, patches));
});

/// An ELF file of one segment and one section of code.
fn with_headers(body: &[u8], patches: &[u8]) -> Vec<u8> {
    let len = body.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    let sections = BODY as u64 + len;
    elf.extend([0x100_0000, 64, sections].iter().flat_map(|field: &u64| field.to_le_bytes()));
    elf.extend([0, 0, 64, 56, 1, 64, 2, 0].iter().flat_map(|field: &u16| field.to_le_bytes()));
    let program = [5 << 32 | 1, BODY as u64, 0xffff_ffff_8100_0000, 0x100_0000, len, len, 0x1000];
    elf.extend(program.iter().flat_map(|field| field.to_le_bytes()));
    elf.resize(BODY, 0);
    elf.extend(body);
    elf.extend([0; 64]);
    let section = [1 << 32, 6, 0xffff_ffff_8100_0000, BODY as u64, len, 0, 16, 0];
    elf.extend(section.iter().flat_map(|field: &u64| field.to_le_bytes()));
    for patch in patches.chunks_exact(2) {
        // 64 bytes of ELF header, 56 of the program header, 128 of section headers.
        let at = usize::from(patch[0]) % 248;
        let at = if at < 120 { at } else { BODY + body.len() + at - 120 };
        elf[at] = patch[1];
    }
    elf
}

fn check(elf: Vec<u8>) {
    let before = elf.clone();
    let Ok(report) = check_bytes(elf, Path::new("fuzzed")) else { return };
    if !before.starts_with(b"\x7fELF") {
        return;
    }
    let word = |at: usize| u64::from_le_bytes(before[at..at + 8].try_into().unwrap_or_default());
    let half = |at: usize| u64::from(u16::from_le_bytes([before[at], before[at + 1]]));
    let sections = word(40) as usize;
    let count = if half(60) == 0 { word(sections + 32) } else { half(60) } as usize;
    let in_code = |at: usize| {
        (0..count).map(|i| sections + i * 64).any(|header| {
            let (flags, start, len) =
                (word(header + 8), word(header + 24) as usize, word(header + 32) as usize);
            flags & 7 == 6 && at >= start && at - start < len
        })
    };
    for at in (0..before.len()).filter(|at| before[*at] != report.image[*at]) {
        assert!(in_code(at), "byte {at:#x} changed");
    }
}
