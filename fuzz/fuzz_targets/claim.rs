//! Any bytes as a claim, which is also the record of an image's owner, and any text in the place of one of its lines: no
//! panic, one form.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmft::pair::claims::claim::{read_record, write_record};

const CLAIM: &str = "vmft-claim 2\nguest web\nview 3\nrole backup\nhost a\npid 1\nuuid 0102030405060708090a0b0c0d0e0f10\n\
                     backup 1112131415161718191a1b1c1d1e1f20 b\nend\n";

fuzz_target!(|input: (u8, &[u8])| {
    let (line, bytes) = input;
    check(bytes);
    // Random bytes almost never have all the lines, so the others are right.
    let mut lines: Vec<&[u8]> = CLAIM.as_bytes().split_inclusive(|byte| *byte == b'\n').collect();
    let index = usize::from(line) % lines.len();
    let name = lines[index].split_inclusive(|byte| *byte == b' ').next().unwrap_or_default();
    let replaced = [name, bytes, b"\n"].concat();
    lines[index] = &replaced;
    check(&lines.concat());
});

fn check(bytes: &[u8]) {
    if let Ok(record) = read_record(bytes) {
        assert_eq!(write_record(&record).as_bytes(), bytes);
    }
}
