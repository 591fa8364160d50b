//! Any bytes as a heartbeat, also behind a right magic and before a right checksum: no panic, one form.
#![no_main]

use ft_log::{HEARTBEAT_BYTES, Heartbeat};
use libfuzzer_sys::fuzz_target;

const CHECKED_BYTES: usize = HEARTBEAT_BYTES - 4;

fuzz_target!(|bytes: &[u8]| {
    let _ = Heartbeat::decode(bytes);
    let mut datagram = [&b"VMFTBEAT\x01\0\0\0"[..], bytes].concat();
    datagram.resize(CHECKED_BYTES, 0);
    let crc = crc32fast::hash(&datagram);
    datagram.extend(crc.to_le_bytes());
    if let Ok(heartbeat) = Heartbeat::decode(&datagram) {
        assert_eq!(&heartbeat.encode()[..], datagram);
    }
});
