//! How fast entries are encoded and decoded, and how fast a snapshot skips zero pages.

use std::hint::black_box;
use std::io::sink;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ft_log::{Cursor, Decoder, Encoder, Entry, GuestTime, SnapshotWriter};

const CLOCK_READS: u64 = 100_000;
const ZERO_BYTES: usize = 64 << 20;

/// Clock reads of a busy guest, one every 4 microseconds or so.
fn clock_reads() -> Vec<Entry> {
    (1..=CLOCK_READS).map(|read| Entry::Clock { unlogged: 0, now: GuestTime(read * 15 + read % 7) }).collect()
}

fn encode(entries: &[Entry]) -> Vec<u8> {
    let mut encoder = Encoder::new(Cursor::default());
    for entry in entries {
        encoder.push(entry).expect("the times rise");
    }
    encoder.take()
}

fn entries(criterion: &mut Criterion) {
    let entries = clock_reads();
    let bytes = encode(&entries);
    let mut group = criterion.benchmark_group("clock entries");
    group.throughput(Throughput::Elements(CLOCK_READS));
    group.bench_function("encode", |bencher| bencher.iter(|| encode(black_box(&entries))));
    group.bench_function("decode", |bencher| {
        bencher.iter(|| {
            let mut decoder = Decoder::new(Cursor::default());
            let mut rest = black_box(&bytes[..]);
            while let Some(entry) = decoder.next(&mut rest).expect("the bytes are valid") {
                black_box(entry);
            }
        });
    });
    group.finish();
}

fn zero_pages(criterion: &mut Criterion) {
    // Written once, so that it is memory of its own and not the kernel's one page of zeros.
    let mut memory = black_box(vec![1; ZERO_BYTES]);
    memory.fill(0);
    let mut group = criterion.benchmark_group("snapshot");
    group.sample_size(20).throughput(Throughput::Bytes(ZERO_BYTES as u64));
    group.bench_function("zero pages", |bencher| {
        bencher.iter(|| {
            let mut writer = SnapshotWriter::new(sink()).expect("a sink takes all");
            writer.memory(0, black_box(&memory)).expect("whole pages");
        });
    });
    group.finish();
}

criterion_group!(benches, entries, zero_pages);
criterion_main!(benches);
