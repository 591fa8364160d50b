//! Any bytes as a key file, also behind a right magic and before a right checksum: no panic, one form.
#![no_main]

use ft_log::Key;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let line = [&b"vmft-key 1\n"[..], bytes].concat();
    let mut checked = [&b"vmft-key 1\nkey "[..], bytes].concat();
    let value: Vec<u8> = bytes.chunks(2).map(|pair| hex(pair).unwrap_or(0)).collect();
    checked.extend(format!("\ncheck {:08x}\n", crc32fast::hash(&value)).as_bytes());
    for text in [bytes, &line, &checked] {
        if let Ok(key) = Key::from_text(text) {
            assert_eq!(key.to_text().as_bytes(), text);
        }
    }
});

fn hex(pair: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()
}
