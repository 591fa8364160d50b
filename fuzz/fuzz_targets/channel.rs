//! Any bytes as a greeting, and as records of a greeted connection: no panic, and nothing that was not sealed comes out.
#![no_main]

use std::io::{Read, sink};
use std::os::unix::net::UnixStream;
use std::thread;

use ft_log::{Key, OPENING_BYTES, Session};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let key = Key::new([7; 32]);
    let opening = |security: u8| [&b"VMFTLINK\x06\0\0\0"[..], &[security, 0, 0, 0]].concat();
    for greeting in
        [bytes.to_vec(), [opening(1), bytes.to_vec()].concat(), [opening(2), bytes.to_vec()].concat()]
    {
        let session = Session::respond(&mut &greeting[..], &mut sink(), None, "web");
        assert!(session.is_err() || greeting.starts_with(&opening(1)));
        assert!(Session::initiate(&mut &greeting[..], &mut sink(), Some(&key), "web").is_err());
        assert!(Session::respond(&mut &greeting[..], &mut sink(), Some(&key), "web").is_err());
    }
    assert_eq!(opening(1).len(), OPENING_BYTES);

    let (backup, primary) = UnixStream::pair().expect("the host has descriptors");
    let other = key.clone();
    let backup = thread::spawn(move || Session::initiate(&mut &backup, &mut &backup, Some(&other), "web"));
    let session =
        Session::respond(&mut &primary, &mut &primary, Some(&key), "web").expect("both have the key");
    drop(backup.join().expect("no input makes it panic"));
    let mut opened = Vec::new();
    let _ = session.split(bytes, sink()).0.read_to_end(&mut opened);
    assert!(opened.is_empty());
});
