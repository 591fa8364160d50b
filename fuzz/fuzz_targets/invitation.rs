//! Any bytes as an invitation, also behind a right magic and before a right seal: no panic, one form, and nothing counts
//! that was not sealed.
#![no_main]

use ft_log::{INVITATION_BYTES, Invitation, SealKey, TAG_BYTES};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = SealKey::without_secret("invitation", &[]);
    let _ = Invitation::decode(bytes, &key);
    let mut datagram = [&b"VMFTCALL\x01\0\0\0"[..], bytes].concat();
    datagram.resize(INVITATION_BYTES - TAG_BYTES, 0);
    key.seal(&mut datagram);
    if let Ok(invitation) = Invitation::decode(&datagram, &key) {
        assert_eq!(invitation.encode(&key), datagram);
    }
    let other = SealKey::without_secret("another", &[]);
    assert!(Invitation::decode(&datagram, &other).is_err());
});
