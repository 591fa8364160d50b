//! Any bytes as a heartbeat, also behind a right magic and before a right seal: no panic, one form.
#![no_main]

use ft_log::{HEARTBEAT_BYTES, Heartbeat, Key, TAG_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = Key::new([7; 32]).seal_key("heartbeat", &[b"web"]);
    assert!(Heartbeat::decode(bytes, &key).is_err(), "nobody has sealed it");
    let mut datagram = [&b"VMFTBEAT\x02\0\0\0"[..], bytes].concat();
    datagram.resize(HEARTBEAT_BYTES - TAG_BYTES, 0);
    key.seal(&mut datagram);
    if let Ok(heartbeat) = Heartbeat::decode(&datagram, &key) {
        assert_eq!(heartbeat.encode(&key), datagram);
    }
});
