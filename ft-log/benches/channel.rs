//! What a key costs on a connection: `cargo bench -p ft-log --bench channel`.
//!
//! Both kinds of connection are measured in turn, over TCP on this machine, so that their ratio means something even
//! where machines are noisy. Prints a table for `docs/benchmarks.md`. Nothing here passes or fails by a time.

use std::hint::black_box;
use std::io::{Write, sink};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use ft_log::{
    Ack, Batch, ChannelReader, ChannelWriter, FrameReader, FrameWriter, Key, Message, SealKey, Session,
};

type Side = (FrameReader<ChannelReader<TcpStream>>, FrameWriter<ChannelWriter<TcpStream>>);

const ROUNDS: usize = 9;
/// As a transfer sends them.
const CHUNK_BYTES: usize = 1 << 20;
const CHUNKS: usize = 256;
/// A busy guest's batch, about.
const BATCH_BYTES: usize = 500;
const BATCHES: u64 = 4_000;
const GREETINGS: u32 = 50;
const DATAGRAMS: u32 = 200_000;

fn main() {
    // Without a key, with one.
    let both = [None, Some(Key::new([7; 32]))];
    println!("| What | Without a key | With one | Ratio |\n| --- | --- | --- | --- |");
    let [open, sealed] = alternate(&both, throughput);
    let ratio = open / sealed;
    println!("| transfer, messages of 1 MiB | {open:.0} MiB/s | {sealed:.0} MiB/s | time {ratio:.2} |");
    let [open, sealed] = alternate(&both, round_trip_us);
    let ratio = sealed / open;
    println!(
        "| batch of {BATCH_BYTES} bytes and its acknowledgement | {open:.1} us | {sealed:.1} us | {ratio:.2} |"
    );
    let [open, sealed] = alternate(&both, greeting_us);
    println!("| greeting | {open:.0} us | {sealed:.0} us | {:.2} |", sealed / open);
    println!("| sealing alone, one thread | | {:.0} MiB/s | |", median(ROUNDS, || sealing(&both[1])));
    println!("| sealing and opening a heartbeat | | {:.2} us | |", median(ROUNDS, datagram_us));
}

/// The medians of what `measure` gives for either.
fn alternate(keys: &[Option<Key>; 2], measure: impl Fn(&Option<Key>) -> f64) -> [f64; 2] {
    let mut figures = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (figures, key) in figures.iter_mut().zip(keys) {
            figures.push(measure(key));
        }
    }
    figures.map(middle)
}

fn median(rounds: usize, measure: impl Fn() -> f64) -> f64 {
    middle((0..rounds).map(|_| measure()).collect())
}

fn middle(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// A greeted connection: the backup's end, the primary's end.
fn connect(key: &Option<Key>) -> (Side, Side) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback interface");
    let address = listener.local_addr().expect("it has an address");
    let other = key.clone();
    let backup = thread::spawn(move || {
        side(TcpStream::connect(address).expect("it listens"), |input, out| {
            Session::initiate(input, out, other.as_ref(), "bench")
        })
    });
    let primary = side(listener.accept().expect("somebody connects").0, |input, out| {
        Session::respond(input, out, key.as_ref(), "bench")
    });
    (backup.join().expect("the greeting succeeds"), primary)
}

fn side(
    stream: TcpStream,
    greet: impl FnOnce(&mut TcpStream, &mut TcpStream) -> Result<Session, ft_log::ChannelError>,
) -> Side {
    stream.set_nodelay(true).expect("TCP has it");
    let (mut input, mut out) = (stream.try_clone().expect("there are descriptors"), stream);
    let (input, out) = greet(&mut input, &mut out).expect("both have the same key").split(input, out);
    (FrameReader::new(input), FrameWriter::new(out))
}

/// MiB/s from one end to the other.
fn throughput(key: &Option<Key>) -> f64 {
    let (backup, primary) = connect(key);
    let chunk = Message::Snapshot((0..CHUNK_BYTES).map(|index| ((index * 31) >> 3) as u8).collect());
    let started = Instant::now();
    let sending = thread::spawn(move || {
        let mut writer = primary.1;
        for _ in 0..CHUNKS {
            writer.send(&chunk).expect("the other end reads");
        }
        // The end of it says that all has come.
        drop(primary.0);
    });
    let mut reader = backup.0;
    for _ in 0..CHUNKS {
        black_box(reader.receive().expect("the other end writes"));
    }
    let took = started.elapsed();
    sending.join().expect("all was sent");
    ((CHUNKS * CHUNK_BYTES) >> 20) as f64 / took.as_secs_f64()
}

/// From the sending of a batch to its acknowledgement.
fn round_trip_us(key: &Option<Key>) -> f64 {
    let (backup, primary) = connect(key);
    let answering = thread::spawn(move || {
        let (mut reader, mut writer) = backup;
        while let Ok(Some(Message::Batch(batch))) = reader.receive() {
            writer
                .send(&Message::Ack(Ack { received: batch.seq, ..Ack::default() }))
                .expect("the other end reads");
        }
    });
    let (mut reader, mut writer) = primary;
    let started = Instant::now();
    for seq in 1..=BATCHES {
        let batch = Batch {
            view: 2,
            seq,
            start: (seq == 1).then_some(0),
            reached: seq,
            released: 0,
            entries: vec![7; BATCH_BYTES],
        };
        writer.send(&Message::Batch(batch)).expect("the other end reads");
        black_box(reader.receive().expect("the other end answers"));
    }
    let took = started.elapsed();
    drop((reader, writer));
    answering.join().expect("it answers until the end");
    us(took, BATCHES as u32)
}

fn greeting_us(key: &Option<Key>) -> f64 {
    let started = Instant::now();
    for _ in 0..GREETINGS {
        drop(connect(key));
    }
    us(started.elapsed(), GREETINGS)
}

/// MiB/s into nothing.
fn sealing(key: &Option<Key>) -> f64 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a loopback interface");
    let address = listener.local_addr().expect("it has an address");
    let other = key.clone();
    let backup = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).expect("it listens");
        let mut input = stream.try_clone().expect("there are descriptors");
        Session::initiate(&mut input, &mut stream, other.as_ref(), "bench").expect("both have the same key")
    });
    let mut stream = listener.accept().expect("somebody connects").0;
    let mut input = stream.try_clone().expect("there are descriptors");
    Session::respond(&mut input, &mut stream, key.as_ref(), "bench").expect("both have the same key");
    let (_, mut writer) = backup.join().expect("the greeting succeeds").split(input, sink());
    let chunk = vec![7; CHUNK_BYTES];
    let started = Instant::now();
    for _ in 0..CHUNKS {
        writer.write_all(black_box(&chunk)).expect("a sink takes all");
    }
    ((CHUNKS * CHUNK_BYTES) >> 20) as f64 / started.elapsed().as_secs_f64()
}

fn datagram_us() -> f64 {
    let key: SealKey = Key::new([7; 32]).seal_key("bench", &[]);
    let started = Instant::now();
    for _ in 0..DATAGRAMS {
        let mut datagram = black_box(vec![7; 40]);
        key.seal(&mut datagram);
        black_box(key.open(&datagram).expect("it was sealed"));
    }
    us(started.elapsed(), DATAGRAMS)
}

fn us(took: Duration, times: u32) -> f64 {
    took.as_secs_f64() * 1e6 / f64::from(times)
}
