//! Any payload in a whole frame, and any bytes as a stream: no panic, and a message that is read is sent as the
//! same bytes. The handshake's messages are among the kinds.
#![no_main]

use ft_log::{FrameDecoder, FrameReader, FrameWriter, Message};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, bytes) = input;
    let frame = frame(kind, bytes);
    if let Ok(Some(message)) = FrameReader::new(&frame[..]).receive() {
        assert_eq!(sent(&message), frame);
    }
    let mut decoder = FrameDecoder::default();
    for piece in bytes.chunks(usize::from(kind) + 1) {
        decoder.feed(piece);
        while let Ok(Some(message)) = decoder.next_message() {
            sent(&message);
        }
    }
});

/// Random bytes almost never have a right checksum, so the frame is made around them.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind % 10, 1, 0, 0];
    frame.extend((payload.len() as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame);
    crc.update(payload);
    frame.extend(crc.finalize().to_le_bytes());
    frame.extend(payload);
    frame
}

fn sent(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).send(message).expect("a message that was read is valid");
    bytes
}
