//! Any parts of a snapshot container: no panic, every part within its limits, and what was read can be written.
#![no_main]

use std::io::sink;

use ft_log::{MAX_RUN_PAGES, PAGE_BYTES, SnapshotPart, SnapshotReader, SnapshotWriter};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|parts: &[u8]| {
    let container = [&b"VMFTSNAP\x01\0\0\0"[..], parts].concat();
    let mut reader = SnapshotReader::new(&container[..]).expect("magic and version are right");
    let mut writer = SnapshotWriter::new(sink()).expect("a sink takes all");
    while let Ok(Some(part)) = reader.next_part() {
        match part {
            SnapshotPart::Payload { kind, version, bytes } => writer.payload(&kind, version, &bytes),
            SnapshotPart::Pages { gpa, bytes } => {
                assert!((1..=MAX_RUN_PAGES * PAGE_BYTES).contains(&bytes.len()));
                writer.memory(gpa, &bytes)
            }
        }
        .expect("a part that was read is valid");
    }
});
