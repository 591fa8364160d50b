//! Any frames as a recording, with right checksums: no panic, and the end comes only behind a whole recording.
#![no_main]

use std::io::Read;
use std::path::Path;

use ft_log::{LogPart, RECORDING_MAGIC, RECORDING_VERSION, RecordingReader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (Vec<(u8, Vec<u8>)>, &[u8])| {
    let (frames, behind) = input;
    let mut file = [&RECORDING_MAGIC[..], &RECORDING_VERSION.to_le_bytes()].concat();
    for (kind, payload) in &frames {
        // Kinds of a recording only; the others are refused at once.
        put_frame(&mut file, [4, 5, 6, 8, 9][usize::from(kind % 5)], payload);
    }
    file.extend(behind);
    let mut reader = RecordingReader::new(&file[..], Path::new("fuzz")).expect("the header is right");
    let _ = reader.snapshot().read_to_end(&mut Vec::new());
    let mut batches = 0;
    loop {
        match reader.next_part() {
            Ok(Some(LogPart::Batch(batch))) => {
                batches += 1;
                assert_eq!(batch.seq, batches);
            }
            Ok(Some(LogPart::Checkpoint(_))) => {}
            Ok(None) => {
                assert!(behind.is_empty(), "bytes behind the end went unnoticed");
                break;
            }
            Err(_) => break,
        }
    }
});

fn put_frame(file: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    let mut header = vec![kind, 1, 0, 0];
    header.extend((payload.len() as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header);
    crc.update(payload);
    file.extend(header);
    file.extend(crc.finalize().to_le_bytes());
    file.extend(payload);
}
