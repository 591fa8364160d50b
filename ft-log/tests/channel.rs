//! A connection with and without a key, over real TCP: what one side writes the other reads, and whoever is in between
//! can neither read, change, leave out nor repeat any of it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

use ft_log::{
    ChannelError, ChannelReader, ChannelWriter, FrameReader, FrameWriter, Key, Message, OPENING_BYTES,
    Session,
};

type Side = (ChannelReader<TcpStream>, ChannelWriter<TcpStream>);
type Greeted = Result<Session, ChannelError>;
type Recorded = std::io::Cursor<Vec<u8>>;

const GUEST: &str = "web";
/// Bytes of a record that are not content.
const RECORD_BYTES: usize = 2 + 16;

/// Both ends of a connection.
fn streams() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let backup = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (backup, listener.accept().unwrap().0)
}

fn halves(stream: TcpStream) -> (TcpStream, TcpStream) {
    (stream.try_clone().unwrap(), stream)
}

/// What a backup with the one key and a primary with the other make of each other.
fn greet(backup_key: Option<Key>, primary_key: Option<&Key>) -> (Greeted, Greeted, TcpStream, TcpStream) {
    let (backup, primary) = streams();
    let (mut input, mut out) = halves(backup.try_clone().unwrap());
    let greeting = thread::spawn(move || Session::initiate(&mut input, &mut out, backup_key.as_ref(), GUEST));
    let (mut input, mut out) = halves(primary.try_clone().unwrap());
    let greeted = Session::respond(&mut input, &mut out, primary_key, GUEST);
    (greeting.join().unwrap(), greeted, backup, primary)
}

fn pair(key: Option<Key>) -> (Side, Side) {
    let (backup, primary, backup_stream, primary_stream) = greet(key.clone(), key.as_ref());
    let split = |session: Greeted, stream| {
        let (input, out) = halves(stream);
        session.unwrap().split(input, out)
    };
    (split(backup, backup_stream), split(primary, primary_stream))
}

/// A writer into memory and a reader of what was made of it. The backup's, so that the reader is the primary's.
fn records(contents: &[&[u8]]) -> (Vec<Vec<u8>>, impl Fn(Vec<u8>) -> ChannelReader<Recorded>) {
    let key = common::key();
    let (backup, primary, _, _) = greet(Some(key.clone()), Some(&key));
    let (_, mut writer) = backup.unwrap().split(&b""[..], Vec::new());
    let mut records = Vec::new();
    for content in contents {
        writer.write_all(content).unwrap();
        let mut record = Vec::new();
        writer = writer.map(|bytes| {
            record = bytes;
            Vec::new()
        });
        records.push(record);
    }
    let primary = std::cell::RefCell::new(Some(primary.unwrap()));
    let reader = move |bytes| {
        let session = primary.borrow_mut().take().unwrap();
        session.split(std::io::Cursor::new(bytes), std::io::sink()).0
    };
    (records, reader)
}

#[test]
fn messages_get_through_with_and_without_a_key() {
    for key in [None, Some(common::key())] {
        let ((from_primary, to_primary), (from_backup, to_backup)) = pair(key);
        for (out, input) in [(to_primary, from_backup), (to_backup, from_primary)] {
            let (mut writer, mut reader) = (FrameWriter::new(out), FrameReader::new(input));
            for message in common::messages() {
                writer.send(&message).unwrap();
                assert_eq!(reader.receive().unwrap(), Some(message));
            }
            let long = Message::Snapshot(common::incompressible(1 << 20));
            let (sent, writing) = (long.clone(), thread::spawn(move || writer.send(&long).map(|()| writer)));
            assert_eq!(reader.receive().unwrap(), Some(sent));
            drop(writing.join().unwrap().unwrap());
        }
    }
}

#[test]
fn both_directions_work_at_the_same_time() {
    const MESSAGES: u32 = 300;
    let batch = |number: u32| Message::Snapshot(vec![number as u8; number as usize * 711]);
    let (backup, primary) = pair(Some(common::key()));
    let both = |(input, out): Side| {
        let sending = thread::spawn(move || {
            let mut writer = FrameWriter::new(out);
            (0..MESSAGES).for_each(|number| writer.send(&batch(number)).unwrap());
        });
        let receiving = thread::spawn(move || {
            let mut reader = FrameReader::new(input);
            for number in 0..MESSAGES {
                assert_eq!(reader.receive().unwrap(), Some(batch(number)));
            }
        });
        [sending, receiving]
    };
    let threads = [both(backup), both(primary)];
    threads.into_iter().flatten().for_each(|thread| thread.join().unwrap());
}

#[test]
fn an_end_between_records_is_an_end() {
    for key in [None, Some(common::key())] {
        let ((mut input, _), (from_backup, mut out)) = pair(key);
        out.write_all(b"last").unwrap();
        drop((out, from_backup));
        let mut all = Vec::new();
        input.read_to_end(&mut all).unwrap();
        assert_eq!(all, b"last");
    }
}

#[test]
fn another_key_is_named_on_both_sides() {
    let other = Key::new([7; 32]);
    let (backup, primary, _, _) = greet(Some(other), Some(&common::key()));
    for refused in [backup.unwrap_err(), primary.unwrap_err()] {
        assert!(matches!(refused, ChannelError::OtherKey), "{refused}");
        let said = refused.to_string();
        assert!(said.contains("does not have the key") && said.contains("--key-file"), "{said}");
    }
}

#[test]
fn a_key_on_one_side_only_is_named_on_both_sides() {
    let key = common::key();
    let (backup, primary, _, _) = greet(None, Some(&key));
    assert!(matches!(backup.unwrap_err(), ChannelError::OnlyThere));
    assert!(matches!(primary.unwrap_err(), ChannelError::OnlyHere));
    let (backup, primary, _, _) = greet(Some(key), None);
    assert!(matches!(backup.unwrap_err(), ChannelError::OnlyHere));
    assert!(matches!(primary.unwrap_err(), ChannelError::OnlyThere));
}

/// What a backup sends up to its last message of the handshake, and the primary's answer to it.
fn recorded_greeting(key: &Key) -> (Vec<u8>, Vec<u8>) {
    let mut primary_hears = Vec::new();
    let (backup, primary) = streams();
    let responding = {
        let key = key.clone();
        let (mut input, mut out) = halves(primary);
        thread::spawn(move || Session::respond(&mut input, &mut out, Some(&key), GUEST).map(drop))
    };
    let (mut input, out) = halves(backup);
    let mut primary_says = Vec::new();
    let mut tapped_input = Tap { stream: &mut input, seen: &mut primary_says };
    let mut tapped_out = Tap { stream: out, seen: &mut primary_hears };
    Session::initiate(&mut tapped_input, &mut tapped_out, Some(key), GUEST).unwrap();
    responding.join().unwrap().unwrap();
    (primary_hears, primary_says)
}

/// A stream somebody listens to.
struct Tap<'a, S> {
    stream: S,
    seen: &'a mut Vec<u8>,
}

impl<S: Read> Read for Tap<'_, S> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let len = self.stream.read(bytes)?;
        self.seen.extend(&bytes[..len]);
        Ok(len)
    }
}

impl<S: Write> Write for Tap<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let len = self.stream.write(bytes)?;
        self.seen.extend(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stream.flush()
    }
}

#[test]
fn a_changed_greeting_is_refused() {
    let key = common::key();
    let (greeting, answer) = recorded_greeting(&key);
    assert_eq!((greeting.len(), answer.len()), (OPENING_BYTES + 48, OPENING_BYTES + 1 + 48));
    for at in 0..greeting.len() {
        let mut changed = greeting.clone();
        changed[at] ^= 1;
        let refused = Session::respond(&mut &changed[..], &mut Vec::new(), Some(&key), GUEST);
        assert!(refused.is_err(), "byte {at}");
        let cut = Session::respond(&mut &greeting[..at], &mut Vec::new(), Some(&key), GUEST);
        assert!(matches!(cut, Err(ChannelError::Stream(_))), "cut at {at}");
    }
    // An answer to somebody else's question.
    let replayed = Session::initiate(&mut &answer[..], &mut Vec::new(), Some(&key), GUEST);
    assert!(matches!(replayed, Err(ChannelError::OtherKey)));
}

#[test]
fn a_replayed_greeting_gets_a_connection_on_which_nothing_recorded_opens() {
    let key = common::key();
    let (greeting, _) = recorded_greeting(&key);
    let (records, _) = records(&[b"Hello"]);
    let replayed = [&greeting[..], &records[0]].concat();
    let mut input = &replayed[..];
    let session = Session::respond(&mut input, &mut Vec::new(), Some(&key), GUEST).unwrap();
    let mut reader = session.split(input, std::io::sink()).0;
    assert_eq!(reader.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn each_connection_has_its_own_heartbeat_key() {
    let greeted = |key: Option<Key>| {
        let (backup, primary, _, _) = greet(key.clone(), key.as_ref());
        (backup.unwrap().heartbeat_key().clone(), primary.unwrap().heartbeat_key().clone())
    };
    let (backup, primary) = greeted(Some(common::key()));
    assert_eq!(backup, primary);
    assert_ne!(backup, greeted(Some(common::key())).0, "an earlier connection's would open");
    let (backup, primary) = greeted(None);
    assert_eq!(backup, primary);
}

#[test]
fn nothing_can_be_read_on_the_way() {
    let secret = b"a password that nobody else may see";
    let (records, _) = records(&[secret]);
    assert_eq!(records[0].len(), secret.len() + RECORD_BYTES);
    assert!(!records[0].windows(4).any(|bytes| secret.windows(4).any(|part| part == bytes)));
}

#[test]
fn changed_records_do_not_open() {
    for at in 0..b"content".len() + RECORD_BYTES {
        let (records, reader) = records(&[b"content"]);
        let mut changed = records[0].clone();
        changed[at] ^= 1;
        let mut reader = reader(changed);
        // A length that was made longer waits for bytes that do not come.
        let kind = reader.read(&mut [0; 9]).unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::InvalidData | ErrorKind::UnexpectedEof), "byte {at}: {kind}");
        assert!(reader.read(&mut [0; 9]).is_err(), "what does not open must not be skipped");
    }
}

#[test]
fn cut_records_do_not_open() {
    let len = b"content".len() + RECORD_BYTES;
    for cut in 1..len {
        let (records, reader) = records(&[b"content"]);
        let error = reader(records[0][..cut].to_vec()).read(&mut [0; 9]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "cut at {cut}");
    }
}

#[test]
fn repeated_missing_moved_and_reflected_records_do_not_open() {
    for order in [&[0, 0][..], &[1], &[0, 2], &[0, 1, 1], &[0, 1, 0], &[1, 0]] {
        let (records, reader) = records(&[b"first", b"second", b"third"]);
        let bytes = order.iter().flat_map(|index: &usize| records[*index].clone()).collect();
        let mut all = Vec::new();
        let error = reader(bytes).read_to_end(&mut all).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidData, "{order:?}");
        assert!(b"firstsecond".starts_with(&all[..]), "{order:?} gave {all:?}");
    }
    // Back to whoever sent it.
    let key = common::key();
    let (backup, _, _, _) = greet(Some(key.clone()), Some(&key));
    let (mut input, mut writer) = backup.unwrap().split(std::io::Cursor::new(Vec::new()), Vec::new());
    writer.write_all(b"echo").unwrap();
    writer.map(|record| *input.get_mut() = std::io::Cursor::new(record));
    assert_eq!(input.read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::InvalidData);
}

#[test]
fn lengths_that_no_record_has_are_refused() {
    for len in 0..=16u16 {
        let (_, reader) = records(&[]);
        let bytes = [&len.to_le_bytes()[..], &[0; 16]].concat();
        assert_eq!(reader(bytes).read(&mut [0; 9]).unwrap_err().kind(), ErrorKind::InvalidData, "{len}");
    }
}

#[test]
fn the_longest_record_is_the_protocols() {
    let (mut records, reader) = records(&[&[7; 65_519], &[8; 65_520]]);
    assert_eq!(records[0].len(), 2 + 65_535);
    assert_eq!(records[1].len(), 2 + 65_535 + RECORD_BYTES + 1);
    let mut all = Vec::new();
    records.drain(..).for_each(|record| all.extend(record));
    let mut read = Vec::new();
    reader(all).read_to_end(&mut read).unwrap();
    assert_eq!(read, [vec![7; 65_519], vec![8; 65_520]].concat());
}
