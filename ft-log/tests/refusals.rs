//! What is refused, and what the refusal says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::error::Error;
use std::io::{Cursor as Bytes, Read, Write};

use ft_log::{
    Batch, ByeReason, ChannelError, CheckpointDecoder, Cursor, DatagramError, Decoder, Encoder, Entry, Event,
    FrameReader, FrameWriter, GuestTime, Heartbeat, Invitation, Key, KeyError, LogError, MAX_CONSOLE_BYTES,
    MAX_DISK_BYTES, MAX_ENTROPY_BYTES, MAX_FRAME_BYTES, MAX_MESSAGE_BYTES, MAX_TEXT_BYTES, Message,
    PAGE_BYTES, PositionSource, Probe, SealKey, Session, SnapshotError, SnapshotReader, SnapshotWriter,
    StateDigest, StreamError, TAG_BYTES,
};

fn encoded(entries: &[Entry]) -> Vec<u8> {
    let mut encoder = Encoder::new(common::START);
    for entry in entries {
        encoder.push(entry).unwrap();
    }
    encoder.take()
}

fn first(start: Cursor, bytes: &[u8]) -> Result<Option<Entry>, LogError> {
    Decoder::new(start).next(&mut &*bytes)
}

fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    FrameWriter::new(&mut bytes).send(message).unwrap();
    bytes
}

/// A frame whose header is altered and whose checksum is right.
fn forged(kind: u8, version: u8, reserved: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind, version];
    bytes.extend(reserved.to_le_bytes());
    bytes.extend((payload.len() as u32).to_le_bytes());
    let crc = crc32fast::hash(&[&bytes[..], payload].concat());
    bytes.extend(crc.to_le_bytes());
    bytes.extend(payload);
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    FrameReader::new(bytes).receive().unwrap_err().to_string()
}

#[test]
fn entries_cut_at_any_byte_are_refused_and_change_nothing() {
    let bytes = encoded(&common::entries());
    for cut in 0..bytes.len() {
        let mut decoder = Decoder::new(common::START);
        let mut encoder = Encoder::new(common::START);
        let mut rest = &bytes[..cut];
        while let Ok(Some(entry)) = decoder.next(&mut rest) {
            encoder.push(&entry).unwrap();
        }
        assert_eq!(encoder.len_bytes(), cut - rest.len());
        assert_eq!(encoder.cursor(), decoder.cursor());
        if !rest.is_empty() {
            assert!(matches!(decoder.next(&mut rest), Err(LogError::Truncated { .. })), "cut at {cut}");
        }
    }
}

#[test]
fn time_and_anchor_that_go_back_are_not_encoded() {
    let mut encoder = Encoder::new(common::START);
    let back = encoder.push(&Entry::Clock { unlogged: 0, now: GuestTime(999) });
    assert_eq!(back, Err(LogError::TimeWentBack { previous: 1_000, next: 999 }));
    let back = encoder.push(&Entry::Event { anchor: 60, event: Event::Tick { now: GuestTime(999) } });
    assert_eq!(back, Err(LogError::TimeWentBack { previous: 1_000, next: 999 }));
    let back = encoder.push(&Entry::Event { anchor: 49, event: Event::Tick { now: GuestTime(1_001) } });
    assert_eq!(back, Err(LogError::AnchorWentBack { previous: 50, next: 49 }));
    assert!(encoder.is_empty());
    assert_eq!(encoder.cursor(), common::START);
}

#[test]
fn numbers_that_overflow_are_refused() {
    let late = Cursor { time: GuestTime(u64::MAX), anchor: u64::MAX };
    // Clock +1; Tick at +0 with one tick; PowerButton at anchor +1.
    assert_eq!(first(late, &[0x10]), Err(LogError::Overflow { what: "guest time" }));
    assert_eq!(first(late, &[0x03, 0x01]), Err(LogError::Overflow { what: "guest time" }));
    assert_eq!(first(late, &[0x2d]), Err(LogError::Overflow { what: "anchor" }));
    let mut encoder = Encoder::new(Cursor::default());
    let leap = encoder.push(&Entry::Clock { unlogged: 0, now: GuestTime(u64::MAX) });
    assert_eq!(leap, Err(LogError::Overflow { what: "clock delta" }));
    let leap = encoder.push(&Entry::Check { anchor: 1 << 59, digest: 0 });
    assert_eq!(leap, Err(LogError::Overflow { what: "anchor delta" }));
    assert!(encoder.is_empty());
    encoder.push(&Entry::Check { anchor: (1 << 59) - 1, digest: 0 }).unwrap();
}

#[test]
fn unknown_entry_tags_and_statuses_are_refused() {
    for tag in [0u8, 10, 11, 12, 13, 14, 15] {
        let refused = first(common::START, &[tag << 1 | 1, 0, 0, 0, 0]);
        assert_eq!(refused, Err(LogError::UnknownTag { what: "entry tag", tag }));
    }
    for tag in [0, 3] {
        let refused = first(common::START, &[3 << 1 | 1, 1, tag, 0]);
        assert_eq!(refused, Err(LogError::UnknownTag { what: "disk status", tag }));
    }
    for tag in [0, 3] {
        let refused = first(common::START, &[9 << 1 | 1, tag]);
        assert_eq!(refused, Err(LogError::UnknownTag { what: "position", tag }));
    }
    assert_eq!(PositionSource::from_tag(4), Err(LogError::UnknownTag { what: "position source", tag: 4 }));
}

#[test]
fn registers_of_a_position_that_do_not_exist_or_do_not_change_are_refused() {
    let refused = first(common::START, &[9 << 1 | 1, 2, 1, 0x80, 0x80, 0x10]);
    assert_eq!(refused, Err(LogError::Overflow { what: "set of changed registers" }));
    let refused = first(common::START, &[9 << 1 | 1, 2, 1, 0x04, 0]);
    assert_eq!(refused, Err(LogError::NotShortest { what: "set of changed registers" }));
}

#[test]
fn nothing_follows_the_end_of_a_log() {
    let end = Entry::End { anchor: 60, digest: StateDigest::default() };
    let mut encoder = Encoder::new(common::START);
    encoder.push(&end).unwrap();
    let after = Err(LogError::AfterEnd { anchor: 60 });
    assert_eq!(encoder.push(&Entry::Clock { unlogged: 0, now: GuestTime(1_000) }), after);
    let mut bytes = encoder.take();
    bytes.push(0);
    let mut decoder = Decoder::new(common::START);
    let mut rest = &bytes[..];
    assert_eq!(decoder.next(&mut rest), Ok(Some(end)));
    assert_eq!(decoder.next(&mut rest).map(|_| ()), after);
}

#[test]
fn event_data_is_held_to_its_limit_on_both_sides() {
    let of = |tag: u8, len: usize| {
        let data = vec![0; len];
        match tag {
            2 => Event::Frame { data },
            3 => Event::DiskDone { id: 0, status: ft_log::DiskStatus::Ok, data },
            4 => Event::Console { data },
            _ => Event::Entropy { data },
        }
    };
    for (tag, limit) in
        [(2, MAX_FRAME_BYTES), (3, MAX_DISK_BYTES), (4, MAX_CONSOLE_BYTES), (5, MAX_ENTROPY_BYTES)]
    {
        let longest = Entry::Event { anchor: 50, event: of(tag, limit) };
        let mut bytes = encoded(std::slice::from_ref(&longest));
        assert_eq!(first(common::START, &bytes), Ok(Some(longest)));

        let too_long = Entry::Event { anchor: 50, event: of(tag, limit + 1) };
        let mut encoder = Encoder::new(common::START);
        assert!(matches!(encoder.push(&too_long), Err(LogError::TooLong { .. })));
        assert!(encoder.is_empty());

        // One more than the limit, by adding one to the length's first byte: no limit ends in 0x7f.
        bytes.push(0);
        let length_at = if tag == 3 { 3 } else { 1 };
        bytes[length_at] += 1;
        assert!(matches!(first(common::START, &bytes), Err(LogError::TooLong { .. })));
    }
}

#[test]
fn an_encoder_is_full_before_a_batch_is_too_long() {
    let mut encoder = Encoder::new(Cursor::default());
    let mut pushed = 0;
    while !encoder.is_full() {
        let data = vec![0; MAX_DISK_BYTES];
        let event = Event::DiskDone { id: u64::MAX, status: ft_log::DiskStatus::Ok, data };
        encoder.push(&Entry::Event { anchor: (1 << 59) - 1, event }).unwrap();
        pushed += 1;
    }
    assert_eq!(pushed, 1);
    let batch = Batch {
        view: u64::MAX,
        seq: u64::MAX,
        start: None,
        reached: u64::MAX,
        released: 0,
        entries: encoder.take(),
    };
    assert!(frame(&Message::Batch(batch)).len() < MAX_MESSAGE_BYTES);
}

#[test]
fn messages_cut_at_any_byte_are_truncated_or_absent() {
    for message in common::messages() {
        let bytes = frame(&message);
        assert_eq!(FrameReader::new(&bytes[..0]).receive().unwrap(), None);
        for cut in 1..bytes.len() {
            match FrameReader::new(&bytes[..cut]).receive() {
                Err(StreamError::Truncated { len_bytes }) => assert_eq!(len_bytes, cut),
                other => panic!("{message:?} cut at {cut} gives {other:?}"),
            }
        }
    }
}

/// As above, with a header that says that the shorter payload is whole.
#[test]
fn payloads_cut_at_any_byte_are_refused() {
    for message in common::messages() {
        let bytes = frame(&message);
        let payload = &bytes[12..];
        // These carry bytes of any length at their end.
        let open_end = match &message {
            Message::Snapshot(_) | Message::Checkpoint(_) => payload.len(),
            Message::Batch(batch) => batch.entries.len(),
            _ => 0,
        };
        for cut in 0..payload.len() - open_end {
            let result = FrameReader::new(&forged(bytes[0], 1, 0, &payload[..cut])[..]).receive();
            let Err(StreamError::Payload { source: LogError::Truncated { .. }, .. }) = result else {
                panic!("{message:?} cut at {cut} gives {result:?}");
            };
        }
        if open_end == 0 {
            let longer = [payload, &[0]].concat();
            let result = FrameReader::new(&forged(bytes[0], 1, 0, &longer)[..]).receive();
            let Err(StreamError::Payload { source: LogError::Trailing { len_bytes: 1, .. }, .. }) = result
            else {
                panic!("{message:?} with a byte more gives {result:?}");
            };
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_frame_is_noticed() {
    let bytes = frame(&common::messages()[0]);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(FrameReader::new(&damaged[..]).receive().is_err(), "bit {bit}");
    }
}

#[test]
fn frame_headers_are_refused_by_name() {
    assert_eq!(refusal(&forged(0, 1, 0, &[])), "The frame kind 0 is not known");
    assert_eq!(refusal(&forged(10, 1, 0, &[])), "The frame kind 10 is not known");
    assert_eq!(refusal(&forged(5, 2, 0, &[])), "The frame has version 2, this monitor knows 1");
    assert_eq!(refusal(&forged(5, 1, 0x100, &[])), "The reserved field of a frame is 0x0100, it must be 0");
    let mut long = forged(4, 1, 0, &[]);
    long[4..8].copy_from_slice(&(MAX_MESSAGE_BYTES as u32 + 1).to_le_bytes());
    assert_eq!(refusal(&long), "A Snapshot message has 8388609 bytes, the limit is 8388608");
}

#[test]
fn messages_over_a_limit_are_not_sent() {
    let mut writer = FrameWriter::new(Vec::new());
    let snapshot = writer.send(&Message::Snapshot(vec![0; MAX_MESSAGE_BYTES + 1]));
    assert!(matches!(snapshot, Err(StreamError::TooLong { .. })));
    let text = "x".repeat(MAX_TEXT_BYTES + 1);
    let bye = writer.send(&Message::Bye { reason: ByeReason::Shutdown, text });
    assert!(matches!(bye, Err(StreamError::Payload { source: LogError::TooLong { .. }, .. })));
    let ahead = writer.send(&Message::Batch(Batch { seq: 2, released: 3, ..Batch::default() }));
    assert!(matches!(ahead, Err(StreamError::Payload { source: LogError::Overflow { .. }, .. })));
    for batch in [Batch { seq: 1, ..Batch::default() }, Batch { seq: 2, start: Some(0), ..Batch::default() }]
    {
        let elsewhere = writer.send(&Message::Batch(batch));
        assert!(matches!(elsewhere, Err(StreamError::Payload { source: LogError::StartOfLog { .. }, .. })));
    }
    assert!(writer.get_ref().is_empty());
}

#[test]
fn a_batch_is_not_sent_before_the_snapshot_is_finished() {
    let batch = Message::Batch(Batch { seq: 1, start: Some(0), ..Batch::default() });
    let mut writer = FrameWriter::new(Vec::new());
    writer.snapshot().write_all(b"half").unwrap();
    assert!(matches!(writer.send(&batch), Err(StreamError::Unexpected { .. })));
    writer.snapshot().finish().unwrap();
    writer.send(&batch).unwrap();
}

#[test]
fn a_frame_is_one_write() {
    struct Count(usize);
    impl Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += 1;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut writer = FrameWriter::new(Count(0));
    for message in common::messages() {
        writer.send(&message).unwrap();
    }
    assert_eq!(writer.get_ref().0, common::messages().len());
}

#[test]
fn a_snapshot_that_the_peer_breaks_off_says_why() {
    let mut bytes = frame(&Message::Snapshot(b"half".to_vec()));
    bytes.extend(frame(&Message::Bye { reason: ByeReason::HostFailure, text: "disk full".into() }));
    let error = FrameReader::new(&bytes[..]).snapshot().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "the peer broke the snapshot off: disk full");
    let error = FrameReader::new(&bytes[..16]).snapshot().read_to_end(&mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "Expected a piece of the snapshot, found the end of the stream");
}

/// What a side that is greeted with `opening` says.
fn greeted(opening: &[u8], key: Option<&Key>) -> ChannelError {
    let initiated = Session::initiate(&mut &*opening, &mut Vec::new(), key, "web").unwrap_err();
    let responded = Session::respond(&mut &*opening, &mut Vec::new(), key, "web").unwrap_err();
    assert_eq!(initiated.to_string(), responded.to_string());
    responded
}

#[test]
fn a_peer_of_another_version_is_refused_by_name() {
    for key in [None, Some(&common::key())] {
        // Another version may have nothing behind it.
        let refused = greeted(b"VMFTLINK\x0d\0\0\0", key);
        assert_eq!(refused.to_string(), "The peer speaks protocol version 13, this monitor speaks 12");
        let refused = greeted(b"GET / HT\x01\0\0\0", key);
        assert_eq!(refused.to_string(), "The peer does not speak this protocol: it starts with GET / HT");
        let cut = greeted(b"VMFTLINK\x01\0\0", key);
        assert!(matches!(cut, ChannelError::Stream(StreamError::Io(_))), "{cut}");
    }
}

#[test]
fn a_key_on_one_side_only_is_refused_by_both() {
    let opening = |security: u8| [&b"VMFTLINK\x0c\0\0\0"[..], &[security, 0, 0, 0]].concat();
    let refused = greeted(&opening(1), Some(&common::key()));
    assert!(matches!(refused, ChannelError::OnlyHere), "{refused}");
    let refused = greeted(&opening(2), None);
    assert!(matches!(refused, ChannelError::OnlyThere), "{refused}");
    for security in [0, 3] {
        let refused = greeted(&opening(security), None);
        assert!(matches!(refused, ChannelError::Opening { .. }), "{refused}");
    }
    let refused = greeted(b"VMFTLINK\x0c\0\0\0\x01\0\0\x01", None);
    assert!(matches!(refused, ChannelError::Opening { .. }), "{refused}");
}

#[test]
fn heartbeats_are_refused_when_cut_longer_or_changed() {
    let key = common::seal_key();
    let bytes = common::HEARTBEAT.encode(&key);
    for cut in 0..bytes.len() {
        let refused = Heartbeat::decode(&bytes[..cut], &key);
        assert_eq!(refused, Err(DatagramError::Length { len_bytes: cut, known_bytes: bytes.len() }));
    }
    assert!(Heartbeat::decode(&[&bytes[..], &[0]].concat(), &key).is_err());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Heartbeat::decode(&damaged, &key).is_err(), "bit {bit}");
    }
}

#[test]
fn heartbeats_of_another_key_are_refused() {
    let (key, other) = (common::key(), Key::new([7; 32]));
    let bytes = common::HEARTBEAT.encode(&common::seal_key());
    for wrong in [
        other.seal_key("heartbeat", &[b"connection", b"web"]),
        key.seal_key("invitation", &[b"connection", b"web"]),
        key.seal_key("heartbeat", &[b"other connection", b"web"]),
        key.seal_key("heartbeat", &[b"connection", b"mail"]),
        // The same bytes in other parts.
        key.seal_key("heartbeat", &[b"connectionweb"]),
        key.seal_key("heartbeat", &[b"connectio", b"nweb"]),
        SealKey::without_secret("heartbeat", &[b"connection", b"web"]),
    ] {
        assert_eq!(Heartbeat::decode(&bytes, &wrong), Err(DatagramError::Seal));
    }
}

#[test]
fn heartbeat_fields_are_refused_even_with_a_right_seal() {
    let key = common::seal_key();
    let forged = |at: usize, value: u8| {
        let mut bytes = common::HEARTBEAT.encode(&key);
        bytes.truncate(bytes.len() - TAG_BYTES);
        bytes[at] = value;
        key.seal(&mut bytes);
        Heartbeat::decode(&bytes, &key)
    };
    assert_eq!(forged(8, 1), Err(DatagramError::Version { found: 1, known: 2 }));
    assert_eq!(forged(36, 3), Err(DatagramError::Field(LogError::UnknownTag { what: "role", tag: 3 })));
    assert_eq!(forged(39, 1), Err(DatagramError::Reserved));
}

#[test]
fn key_files_are_refused_when_cut_longer_or_changed() {
    let text = common::key().to_text().into_bytes();
    for cut in 0..text.len() {
        let refused = Key::from_text(&text[..cut]).unwrap_err();
        let magic = cut < b"vmft-key ".len();
        assert_eq!(matches!(refused, KeyError::Magic), magic, "cut at {cut}: {refused}");
        assert!(magic || matches!(refused, KeyError::Damaged { .. }), "cut at {cut}: {refused}");
    }
    assert!(Key::from_text(&[&text[..], b"\n"].concat()).is_err());
    for bit in 0..text.len() * 8 {
        let mut damaged = text.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Key::from_text(&damaged).is_err(), "bit {bit}");
    }
    let newer = Key::from_text(b"vmft-key 2\nsomething else").unwrap_err();
    assert_eq!(newer.to_string(), "it is a key file of version 2, this monitor knows 1");
    // One form for each key.
    let upper = String::from_utf8(text).unwrap().replace("0a0b", "0A0B");
    assert!(matches!(Key::from_text(upper.as_bytes()), Err(KeyError::Damaged { .. })));
}

#[test]
fn secrets_are_not_shown() {
    assert_eq!(format!("{:?} {:?}", common::key(), common::seal_key()), "Key(..) SealKey(..)");
}

#[test]
fn invitations_are_refused_when_cut_longer_or_changed() {
    let key = common::invitation_key();
    let bytes = common::INVITATION.encode(&key);
    for cut in 0..bytes.len() {
        let refused = Invitation::decode(&bytes[..cut], &key);
        assert_eq!(refused, Err(DatagramError::Length { len_bytes: cut, known_bytes: bytes.len() }));
    }
    assert!(Invitation::decode(&[&bytes[..], &[0]].concat(), &key).is_err());
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Invitation::decode(&damaged, &key).is_err(), "bit {bit}");
    }
    let heartbeat = Invitation::decode(&common::HEARTBEAT.encode(&key), &key);
    assert_eq!(heartbeat, Err(DatagramError::Magic { found: *b"VMFTBEAT", known: *b"VMFTCALL" }));
    for other in [common::seal_key(), SealKey::without_secret("invitation", &[])] {
        assert_eq!(Invitation::decode(&bytes, &other), Err(DatagramError::Seal));
    }
}

#[test]
fn invitation_fields_are_refused_even_with_a_right_seal() {
    let key = common::invitation_key();
    let forged = |at: usize, value: [u8; 2]| {
        let mut bytes = common::INVITATION.encode(&key);
        bytes.truncate(bytes.len() - TAG_BYTES);
        bytes[at..at + 2].copy_from_slice(&value);
        key.seal(&mut bytes);
        Invitation::decode(&bytes, &key)
    };
    assert_eq!(forged(8, [2, 0]), Err(DatagramError::Version { found: 2, known: 1 }));
    assert_eq!(forged(28, [0, 0]), Err(DatagramError::Port));
    assert_eq!(forged(30, [0, 1]), Err(DatagramError::Reserved));
}

#[test]
fn probes_are_refused_when_cut_longer_changed_or_forged() {
    let key = common::probe_key();
    let bytes = common::PROBE.encode(&key);
    assert!((0..bytes.len()).all(|cut| Probe::decode(&bytes[..cut], &key).is_none()));
    assert_eq!(Probe::decode(&[&bytes[..], &[0]].concat(), &key), None);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(Probe::decode(&damaged, &key), None, "bit {bit}");
    }
    for other in [common::invitation_key(), SealKey::without_secret("probe", &[])] {
        assert_eq!(Probe::decode(&bytes, &other), None);
    }
    // Version, kind and reserved bytes, with a right seal.
    for (at, value) in [(8, 2), (28, 0), (28, 3), (29, 1), (31, 1)] {
        let mut forged = bytes[..bytes.len() - TAG_BYTES].to_vec();
        forged[at] = value;
        key.seal(&mut forged);
        assert_eq!(Probe::decode(&forged, &key), None, "byte {at}");
    }
}

fn container() -> Vec<u8> {
    let mut writer = SnapshotWriter::new(Vec::new()).unwrap();
    writer.payload("uart", 1, b"state").unwrap();
    writer.memory(0x3000, &[0xaa; PAGE_BYTES]).unwrap();
    writer.finish().unwrap()
}

fn read_container(bytes: &[u8]) -> Result<usize, SnapshotError> {
    let mut reader = SnapshotReader::new(bytes)?;
    let mut parts = 0;
    while reader.next_part()?.is_some() {
        parts += 1;
    }
    Ok(parts)
}

#[test]
fn snapshots_are_refused_when_cut_longer_or_changed() {
    let bytes = container();
    assert_eq!(read_container(&bytes).unwrap(), 2);
    for cut in 0..bytes.len() {
        let refused = read_container(&bytes[..cut]);
        assert!(matches!(refused, Err(SnapshotError::Truncated { .. })), "cut at {cut}");
    }
    assert!(matches!(read_container(&[&bytes[..], &[0]].concat()), Err(SnapshotError::Trailing)));
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(read_container(&damaged).is_err(), "bit {bit}");
    }
}

#[test]
fn snapshot_parts_are_refused_by_name() {
    let part = |bytes: &[u8]| {
        let container = [b"VMFTSNAP\x01\0\0\0", bytes].concat();
        read_container(&container).unwrap_err().to_string()
    };
    let pages = |packing: u8, pages: u8, reserved: u8, gpa: u64, len: u32| {
        let header = [2, packing, pages, reserved];
        part(&[&header[..], &gpa.to_le_bytes(), &len.to_le_bytes(), &[0; 64]].concat())
    };
    assert_eq!(part(&[0]), "The part tag 0 is not known");
    assert_eq!(part(&[4]), "The part tag 4 is not known");
    assert_eq!(pages(0, 1, 0, 0, 64), "The packing 0 is not known");
    assert_eq!(pages(2, 0, 0, 0, 64), "The number of pages is 0, it must be from 1 to 64");
    assert_eq!(pages(2, 65, 0, 0, 64), "The number of pages is 65, it must be from 1 to 64");
    assert_eq!(pages(2, 1, 1, 0, 64), "The reserved byte of pages is 1, it must be from 0 to 0");
    assert_eq!(pages(2, 1, 0, 0, 4096), "The length of stored pages is 4096, it must be from 1 to 4095");
    assert_eq!(pages(1, 1, 0, 0, 4095), "The length of stored pages is 4095, it must be from 4096 to 4096");
    assert_eq!(pages(2, 1, 0, 0x5000, 64), "The compressed pages at 0x5000 are damaged");
    let range = "is not whole pages inside the 64-bit address space";
    assert_eq!(pages(2, 1, 0, 1, 64), format!("Memory of 4096 bytes at 0x1 {range}"));
    let top = u64::MAX - 0xfff;
    assert_eq!(pages(2, 1, 0, top, 64), format!("Memory of 4096 bytes at {top:#x} {range}"));
    let long = [&[1, 0, 0, 0][..], &u32::MAX.to_le_bytes()].concat();
    assert_eq!(part(&long), "The payload's length is 4294967295, it must be from 0 to 268435456");
    assert_eq!(part(&[1, 1, 0xff, 0, 0, 0, 0, 0, 0]), "A payload's kind is not UTF-8 text");
}

#[test]
fn memory_that_is_not_whole_pages_is_not_written() {
    let mut writer = SnapshotWriter::new(Bytes::new(Vec::new())).unwrap();
    for (gpa, len_bytes) in [(1, PAGE_BYTES), (0, PAGE_BYTES - 1), (u64::MAX - 0xfff, PAGE_BYTES)] {
        let refused = writer.memory(gpa, &vec![1; len_bytes]);
        assert!(matches!(refused, Err(SnapshotError::Range { .. })), "{gpa:#x}, {len_bytes}");
    }
    let kind = "k".repeat(256);
    assert!(matches!(writer.payload(&kind, 1, &[]), Err(SnapshotError::Size { .. })));
    assert_eq!(writer.finish().unwrap().into_inner().len(), 12 + 5);
}

#[test]
fn an_invalid_message_keeps_its_cause() {
    let error = FrameReader::new(&forged(8, 1, 0, &[255, 0])[..]).receive().unwrap_err();
    assert_eq!(error.to_string(), "A Bye message is not valid");
    assert_eq!(error.source().unwrap().to_string(), "The reason 255 is not known");
}

#[test]
fn checkpoint_parts_are_refused_by_name() {
    let refused = |bytes: &[u8]| CheckpointDecoder::new(10).accept(bytes).unwrap_err().to_string();
    // A state of no bytes: an LZ4 block is one token at least.
    let behind_state = |bytes: &[u8]| refused(&[&[1, 0, 1, 0][..], bytes].concat());
    assert_eq!(refused(&[0]), "The checkpoint tag 0 is not known");
    assert_eq!(refused(&[3]), "A checkpoint's end stands where none may");
    assert_eq!(refused(&[2, 1, 3]), "A checkpoint's page stands where none may");
    assert_eq!(behind_state(&[1, 0, 1, 0]), "A checkpoint's state stands where none may");
    assert_eq!(behind_state(&[2, 0, 3]), "A checkpoint's page stands where none may");
    assert_eq!(behind_state(&[2, 1, 6]), "The page packing 6 is not known");
    assert_eq!(
        behind_state(&[2, 1, 2]),
        "The checkpoint holds a change of page 0x0, which was in none of the last ones"
    );
    assert_eq!(
        behind_state(&[2, 11, 3]),
        "The checkpoint holds page 0xa, the guest's memory ends before page 0xa"
    );
    assert_eq!(behind_state(&[2, 1, 1, 0]), "The bytes end inside the page");
    assert_eq!(
        behind_state(&[2, 1, 4, 1, 0]),
        "The checkpoint's page is damaged: its compressed bytes do not give what they should"
    );
    assert_eq!(behind_state(&[3, 0]), "1 bytes follow the last field of the checkpoint");
    // A state that is only claimed to be long.
    assert_eq!(
        refused(&[1, 0x80, 0x80, 0x04, 1, 0]),
        "The checkpoint's state is damaged: its compressed bytes do not give what they should"
    );
}
