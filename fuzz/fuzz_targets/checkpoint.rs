//! Any bytes as pieces of checkpoints: no panic, and what decodes is read back from its encoding.
#![no_main]

use ft_log::{CheckpointDecoder, CheckpointEncoder};
use libfuzzer_sys::fuzz_target;

const END_PAGE: u64 = 1 << 20;

fuzz_target!(|messages: Vec<Vec<u8>>| {
    let mut decoder = CheckpointDecoder::new(END_PAGE);
    let mut encoder = CheckpointEncoder::default();
    let mut again = CheckpointDecoder::new(END_PAGE);
    for message in messages {
        let Ok(decoded) = decoder.accept(&message) else { return };
        let Some(checkpoint) = decoded else { continue };
        let mut read = None;
        let sent: Result<(), ft_log::CheckpointError> = encoder.encode(&checkpoint, |bytes| {
            read = again.accept(&bytes)?;
            Ok(())
        });
        sent.expect("what is encoded is valid");
        assert_eq!(read, Some(checkpoint));
    }
});
