//! Any bytes as a probe, also behind a right magic and before a right seal: no panic, one form, and nothing counts that was
//! not sealed.
#![no_main]

use ft_log::{PROBE_BYTES, Probe, SealKey, TAG_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = SealKey::without_secret("probe", &[]);
    let _ = Probe::decode(bytes, &key);
    let mut datagram = [&b"VMFTECHO\x01\0\0\0"[..], bytes].concat();
    datagram.resize(PROBE_BYTES - TAG_BYTES, 0);
    key.seal(&mut datagram);
    if let Some(probe) = Probe::decode(&datagram, &key) {
        assert_eq!(probe.encode(&key), datagram);
    }
    let other = SealKey::without_secret("another", &[]);
    assert!(Probe::decode(&datagram, &other).is_none());
});
