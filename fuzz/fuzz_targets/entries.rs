//! Any bytes as entries: no panic, and what decodes encodes to the same bytes.
#![no_main]

use ft_log::{Cursor, Decoder, Encoder, GuestTime};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, u64, Vec<u8>)| {
    let (time, anchor, bytes) = input;
    let start = Cursor { time: GuestTime(time), anchor };
    let mut decoder = Decoder::new(start);
    let mut encoder = Encoder::new(start);
    let mut rest = &bytes[..];
    while let Ok(Some(entry)) = decoder.next(&mut rest) {
        encoder.push(&entry).expect("a decoded entry is valid");
    }
    assert_eq!(decoder.cursor(), encoder.cursor());
    assert_eq!(encoder.take(), &bytes[..bytes.len() - rest.len()]);
});
