//! What holds for all values and all bytes: what is written is read back, there is one form for each value,
//! and no bytes make a decoder panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::io::{self, Read, Write};
use std::path::Path;

use ft_log::{
    Ack, Batch, ByeReason, CLOCK_TOLERANCE, Checkpoint, CheckpointDecoder, CheckpointEncoder, ClockModel,
    Counted, Cursor, Decoder, DiskStatus, Encoder, Entry, Event, FIRST_BATCH, FrameDecoder, FrameReader,
    FrameWriter, GuestTime, Heartbeat, Hello, HelloDisk, HelloImage, Invitation, Key, LogError, Message,
    PAGE_BYTES, Pages, Position, Probe, ProbeKind, RECORDING_MAGIC, RECORDING_VERSION, REGISTERS,
    RecordingReader, Refusal, Role, SNAPSHOT_MAGIC, SnapshotPart, SnapshotReader, SnapshotWriter,
    StateDigest,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// A number of any magnitude, small ones as likely as large ones.
fn magnitude(bits: u32) -> impl Strategy<Value = u64> {
    (0..=bits, any::<u64>()).prop_map(|(bits, value)| value.checked_shr(64 - bits).unwrap_or(0))
}

fn any_event() -> impl Strategy<Value = Event> {
    let data = || vec(any::<u8>(), 0..300);
    let status = prop_oneof![Just(DiskStatus::Ok), Just(DiskStatus::IoError)];
    prop_oneof![
        magnitude(50).prop_map(|ticks| Event::Tick { now: GuestTime(ticks) }),
        data().prop_map(|data| Event::Frame { data }),
        (any::<u64>(), status, data()).prop_map(|(id, status, data)| Event::DiskDone { id, status, data }),
        data().prop_map(|data| Event::Console { data }),
        data().prop_map(|data| Event::Entropy { data }),
        Just(Event::PowerButton),
    ]
}

fn any_position() -> impl Strategy<Value = Position> {
    let counted = |(branches, set, values): (_, u32, [u64; REGISTERS.len()])| {
        // Most registers keep their values from stop to stop.
        let mut index = 0..;
        let registers = values.map(|value| if set >> index.next().unwrap() & 1 == 0 { 0 } else { value });
        Position::Counted(Box::new(Counted { branches, registers }))
    };
    prop_oneof![
        Just(Position::Checkpoint),
        (magnitude(64), any::<u32>(), any::<[u64; REGISTERS.len()]>()).prop_map(counted),
    ]
}

/// An entry whose times and anchors are still distances; [`absolute`] adds them up.
fn any_entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        4 => (magnitude(64), magnitude(50))
            .prop_map(|(unlogged, ticks)| Entry::Clock { unlogged, now: GuestTime(ticks) }),
        3 => (magnitude(50), any_event()).prop_map(|(anchor, event)| Entry::Event { anchor, event }),
        1 => (magnitude(50), any::<u32>()).prop_map(|(anchor, digest)| Entry::Check { anchor, digest }),
        1 => (magnitude(50), any_position()).prop_map(|(anchor, position)| Entry::Stop { anchor, position }),
    ]
}

fn absolute(start: Cursor, distances: Vec<Entry>) -> Vec<Entry> {
    let Cursor { time: GuestTime(mut time), anchor: mut position } = start;
    let mut entries = distances;
    for entry in &mut entries {
        if let Entry::Event { anchor, .. } | Entry::Check { anchor, .. } | Entry::Stop { anchor, .. } = entry
        {
            position += *anchor;
            *anchor = position;
        }
        if let Entry::Clock { now, .. } | Entry::Event { event: Event::Tick { now }, .. } = entry {
            time += now.0;
            now.0 = time;
        }
    }
    let digest = StateDigest { registers: time, memory: position, devices: u64::MAX };
    entries.push(Entry::End { anchor: position, digest });
    entries
}

fn decode_all(decoder: &mut Decoder, bytes: &[u8]) -> (Vec<Entry>, usize, Result<(), LogError>) {
    let mut rest = bytes;
    let mut entries = Vec::new();
    loop {
        match decoder.next(&mut rest) {
            Ok(Some(entry)) => entries.push(entry),
            Ok(None) => return (entries, bytes.len(), Ok(())),
            Err(error) => return (entries, bytes.len() - rest.len(), Err(error)),
        }
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    let seq = prop_oneof![Just(FIRST_BATCH), any::<u64>()];
    let batch = (any::<u64>(), seq, any::<[u64; 3]>(), vec(any::<u8>(), 0..300)).prop_map(
        |(view, seq, [start, reached, released], entries)| {
            let start = (seq == FIRST_BATCH).then_some(start);
            Batch { view, seq, start, reached, released: released.min(seq), entries }
        },
    );
    let ack = (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(received, executed, ticks)| Ack {
        received,
        executed,
        executed_time: GuestTime(ticks),
    });
    let mark = prop_oneof![any::<[u8; 16]>().prop_map(Ok), any::<String>().prop_map(Err)];
    let image = (any::<String>(), vec(any::<u8>(), 0..300), mark)
        .prop_map(|(path, owner, mark)| HelloImage { path, owner, mark });
    let disk = (any::<u64>(), proptest::option::of(image))
        .prop_map(|(len_bytes, image)| HelloDisk { len_bytes, image });
    let hello = proptest::option::of(disk).prop_map(|disk| Hello { disk, ..common::hello() });
    prop_oneof![
        proptest::sample::select(common::messages()),
        hello.prop_map(Message::Hello),
        batch.prop_map(Message::Batch),
        ack.prop_map(Message::Ack),
        vec(any::<u8>(), 0..300).prop_map(Message::Snapshot),
        vec(any::<u8>(), 0..300).prop_map(Message::Checkpoint),
        any::<String>().prop_map(|reason| Message::Refuse { refusal: Refusal::Unfit, reason }),
        any::<String>().prop_map(|text| Message::Bye { reason: ByeReason::LostClaim, text }),
    ]
}

/// Pages that change a little, much or not at all from one checkpoint to the next.
fn any_checkpoint() -> impl Strategy<Value = Checkpoint> {
    let content = prop_oneof![
        Just([0; PAGE_BYTES]),
        (0..PAGE_BYTES, any::<u8>()).prop_map(|(at, byte)| {
            let mut page = [3; PAGE_BYTES];
            page[at] = byte;
            page
        }),
        Just(common::incompressible(PAGE_BYTES).try_into().unwrap()),
    ];
    let pages = proptest::collection::btree_map(0u64..12, content, 0..8);
    (vec(any::<u8>(), 0..50), pages).prop_map(|(state, contents)| {
        let mut pages = Pages::default();
        contents.iter().for_each(|(number, page)| pages.push(*number, page));
        Checkpoint { state, pages }
    })
}

fn send_all(messages: &[Message]) -> Vec<u8> {
    let mut writer = FrameWriter::new(Vec::new());
    for message in messages {
        writer.send(message).unwrap();
    }
    writer.get_ref().clone()
}

/// Gives the bytes of a slice in pieces of the given lengths, over and over, with a timeout before each.
struct Pieces<'a> {
    rest: &'a [u8],
    lengths: std::iter::Cycle<std::vec::IntoIter<usize>>,
    timed_out: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.timed_out = !self.timed_out;
        if self.timed_out {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = self.lengths.next().unwrap_or(1).min(bytes.len());
        self.rest.read(&mut bytes[..len])
    }
}

proptest! {
    #[test]
    fn entries_are_read_back(
        time in magnitude(50),
        anchor in magnitude(50),
        distances in vec(any_entry(), 0..40),
    ) {
        let start = Cursor { time: GuestTime(time), anchor };
        let entries = absolute(start, distances);
        let mut encoder = Encoder::new(start);
        let mut decoder = Decoder::new(start);
        for entry in &entries {
            encoder.push(entry).unwrap();
        }
        let bytes = encoder.take();
        let (read, _, result) = decode_all(&mut decoder, &bytes);
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(read, entries);
        prop_assert_eq!(decoder.cursor(), encoder.cursor());
    }

    #[test]
    fn entry_bytes_have_one_form(bytes in vec(any::<u8>(), 0..200)) {
        let (entries, consumed, _) = decode_all(&mut Decoder::new(common::START), &bytes);
        let mut encoder = Encoder::new(common::START);
        for entry in &entries {
            encoder.push(entry).unwrap();
        }
        prop_assert_eq!(encoder.take(), &bytes[..consumed]);
    }

    #[test]
    fn messages_are_read_back_from_pieces_and_over_timeouts(
        messages in vec(any_message(), 0..6),
        lengths in vec(1usize..50, 1..8),
    ) {
        let bytes = send_all(&messages);
        let pieces = Pieces { rest: &bytes, lengths: lengths.into_iter().cycle(), timed_out: false };
        let mut reader = FrameReader::new(pieces);
        let mut read = Vec::new();
        loop {
            match reader.receive() {
                Ok(Some(message)) => read.push(message),
                Ok(None) => break,
                Err(error) => prop_assert!(error.is_timeout(), "{error}"),
            }
        }
        prop_assert_eq!(read, messages);
    }

    #[test]
    fn message_payloads_have_one_form(kind in 0u8..10, payload in vec(any::<u8>(), 0..120)) {
        let mut frame = vec![kind, 1, 0, 0, payload.len() as u8, 0, 0, 0];
        let crc = crc32fast::hash(&[&frame[..], &payload].concat());
        frame.extend(crc.to_le_bytes());
        frame.extend(payload);
        if let Ok(message) = FrameReader::new(&frame[..]).receive() {
            prop_assert_eq!(send_all(&[message.unwrap()]), frame);
        }
    }

    #[test]
    fn checkpoints_are_read_back(checkpoints in vec(any_checkpoint(), 1..6)) {
        let mut encoder = CheckpointEncoder::default();
        let mut decoder = CheckpointDecoder::new(12);
        for checkpoint in checkpoints {
            let mut read = None;
            encoder.encode(&checkpoint, |bytes| {
                assert_eq!(read, None, "nothing follows the end");
                read = decoder.accept(&bytes).unwrap();
                Ok::<_, ()>(())
            }).unwrap();
            prop_assert_eq!(read, Some(checkpoint));
        }
    }

    #[test]
    fn random_bytes_do_not_make_checkpoints_panic(tags in vec((1u8..4, 0u8..7, any::<u8>()), 0..40)) {
        let mut decoder = CheckpointDecoder::new(1 << 20);
        let bytes: Vec<u8> = tags.into_iter().flat_map(|(tag, packing, more)| [tag, packing, more]).collect();
        let _ = decoder.accept(&bytes);
    }

    #[test]
    fn random_bytes_do_not_make_frames_panic(bytes in vec(any::<u8>(), 0..200)) {
        let mut decoder = FrameDecoder::default();
        for piece in bytes.chunks(7) {
            decoder.feed(piece);
            while let Ok(Some(_)) = decoder.next_message() {}
        }
    }

    #[test]
    fn heartbeats_are_read_back(view: u64, counter: u64, guest: u64, primary: bool) {
        let role = if primary { Role::Primary } else { Role::Backup };
        let heartbeat = Heartbeat { view, counter, guest, role };
        let key = common::seal_key();
        prop_assert_eq!(Heartbeat::decode(&heartbeat.encode(&key), &key), Ok(heartbeat));
    }

    #[test]
    fn random_datagrams_are_no_heartbeats(bytes in vec(any::<u8>(), 0..60), behind_header: bool) {
        let key = common::seal_key();
        let mut datagram = common::HEARTBEAT.encode(&key)[..if behind_header { 12 } else { 0 }].to_vec();
        datagram.extend(bytes);
        prop_assert!(Heartbeat::decode(&datagram, &key).is_err());
    }

    #[test]
    fn keys_are_read_back(bytes: [u8; 32]) {
        let key = Key::new(bytes);
        prop_assert_eq!(Key::from_text(key.to_text().as_bytes()), Ok(key));
    }

    #[test]
    fn random_texts_are_no_keys(bytes in vec(any::<u8>(), 0..120), behind_magic: bool) {
        let text = [if behind_magic { &b"vmft-key 1\nkey "[..] } else { b"" }, &bytes].concat();
        prop_assert!(Key::from_text(&text).is_err());
    }

    #[test]
    fn invitations_are_read_back(view: u64, guest: u64, port in 1u16..) {
        let invitation = Invitation { view, guest, port };
        let key = common::invitation_key();
        prop_assert_eq!(Invitation::decode(&invitation.encode(&key), &key), Ok(invitation));
    }

    #[test]
    fn random_datagrams_are_no_invitations(bytes in vec(any::<u8>(), 0..60), behind_header: bool) {
        let key = common::invitation_key();
        let mut datagram = common::INVITATION.encode(&key)[..if behind_header { 12 } else { 0 }].to_vec();
        datagram.extend(bytes);
        prop_assert!(Invitation::decode(&datagram, &key).is_err());
    }

    #[test]
    fn probes_are_read_back_and_random_datagrams_are_none(guest: u64, number: u64, asks: bool, bytes in vec(any::<u8>(), 0..60)) {
        let kind = if asks { ProbeKind::Question } else { ProbeKind::Answer };
        let (probe, key) = (Probe { guest, number, kind }, common::probe_key());
        let sealed = probe.encode(&key);
        prop_assert_eq!(Probe::decode(&sealed, &key), Some(probe));
        prop_assert_eq!(Probe::decode(&[&sealed[..12], &bytes].concat(), &key), None);
    }

    #[test]
    fn memory_is_read_back(fills in vec(0u8..3, 0..150), first_page in 0u64..1 << 40) {
        // Each page: all zero, one byte set at its very end, or incompressible.
        let mut memory = Vec::new();
        for fill in fills {
            let mut page = if fill == 2 { common::incompressible(PAGE_BYTES) } else { vec![0; PAGE_BYTES] };
            page[PAGE_BYTES - 1] = fill;
            memory.extend(page);
        }
        let gpa = first_page * PAGE_BYTES as u64;
        let mut writer = SnapshotWriter::new(Vec::new()).unwrap();
        writer.memory(gpa, &memory).unwrap();
        let container = writer.finish().unwrap();

        let mut copy = vec![0; memory.len()];
        let mut reader = SnapshotReader::new(&container[..]).unwrap();
        while let Some(part) = reader.next_part().unwrap() {
            let SnapshotPart::Pages { gpa: at, bytes } = part else { panic!("no payload was written") };
            prop_assert!(bytes.as_chunks::<PAGE_BYTES>().0.iter().all(|page| *page != [0; PAGE_BYTES]));
            let at = (at - gpa) as usize;
            copy[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        prop_assert_eq!(copy, memory);
    }

    #[test]
    fn random_bytes_do_not_make_snapshots_panic(tag in 0u8..5, bytes in vec(any::<u8>(), 0..200)) {
        let container = [&SNAPSHOT_MAGIC[..], &[1, 0, 0, 0, tag], &bytes].concat();
        let mut reader = SnapshotReader::new(&container[..]).unwrap();
        while let Ok(Some(_)) = reader.next_part() {}
    }

    #[test]
    fn recordings_of_any_messages_do_not_panic(messages in vec(any_message(), 0..8)) {
        let file = [&RECORDING_MAGIC[..], &RECORDING_VERSION.to_le_bytes(), &send_all(&messages)].concat();
        let mut reader = RecordingReader::new(&file[..], Path::new("any")).unwrap();
        let _ = reader.snapshot().read_to_end(&mut Vec::new());
        while let Ok(Some(_)) = reader.next_part() {}
    }
}

#[test]
fn snapshot_pieces_larger_than_a_message_are_read_back() {
    let bytes = common::incompressible(2_500_000);
    let mut writer = FrameWriter::new(Vec::new());
    let mut sink = writer.snapshot();
    sink.write_all(&bytes).unwrap();
    sink.finish().unwrap();
    let mut read = Vec::new();
    let mut reader = FrameReader::new(&writer.get_ref()[..]);
    reader.snapshot().read_to_end(&mut read).unwrap();
    assert!(read == bytes, "the bytes differ");
    assert_eq!(reader.receive().unwrap(), None);
}

/// 20 wake-ups a second after a day of running, each in a batch of its own: a timer tick, eight clock reads.
#[test]
fn an_idle_guest_takes_less_than_650_bytes_a_second() {
    let day = 86_400 * GuestTime::HZ;
    let start = Cursor { time: GuestTime(day), anchor: 200_000_000 };
    let mut encoder = Encoder::new(start);
    let mut model = ClockModel::starting_at(start.time);
    let mut writer = FrameWriter::new(Vec::new());
    let first_seq = 1_700_000;
    for wake in 0..20 {
        let mut now = GuestTime(day + (wake + 1) * GuestTime::HZ / 20);
        let anchor = start.anchor + wake * 6;
        encoder.push(&Entry::Event { anchor, event: Event::Tick { now } }).unwrap();
        model.tick(now);
        for _ in 0..8 {
            now.0 += 350;
            if model.prediction().0.abs_diff(now.0) <= CLOCK_TOLERANCE {
                model.accept();
            } else {
                encoder.push(&Entry::Clock { unlogged: model.unlogged(), now }).unwrap();
                model.correct(now);
            }
        }
        let (seq, entries) = (first_seq + wake, encoder.take());
        let batch = Batch { view: 2, seq, start: None, reached: anchor + 5, released: seq - 1, entries };
        writer.send(&Message::Batch(batch)).unwrap();
    }
    let sent_bytes = writer.get_ref().len();
    assert!(sent_bytes < 650, "{sent_bytes}");
}
