//! The rules of a connection, and recordings on a disk.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

use ft_log::{
    Ack, Batch, BatchReceiver, BatchSender, CpuIdentity, Expected, FIRST_BATCH, GuestTime, Hello, LogPart,
    MAX_TEXT_BYTES, Mismatch, PositionSource, RecordingError, RecordingReader, RecordingWriter,
    SequenceError, check_hello,
};

fn expected() -> Expected {
    let Hello {
        monitor_version,
        cpu,
        guest_name,
        disk,
        claims_id,
        timeout_ms,
        has_network,
        positions,
        listen_port: _,
        ..
    } = common::hello();
    let disk_bytes = disk.map(|disk| disk.len_bytes);
    Expected { monitor_version, cpu, guest_name, disk_bytes, claims_id, timeout_ms, has_network, positions }
}

#[test]
fn a_backup_that_fits_is_accepted() {
    assert_eq!(check_hello(&common::hello(), &expected()), Ok(()));
}

#[test]
fn a_backup_that_differs_is_told_in_what() {
    let says =
        |hello: Hello| check_hello(&hello, &expected()).map_err(|mismatch: Mismatch| mismatch.to_string());
    let cpu = common::hello().cpu;
    let cases = [
        (
            Hello { has_network: false, ..common::hello() },
            "The guest has a network card, but backup host beta was started without --tap",
        ),
        (
            Hello { positions: PositionSource::Checkpoint, ..common::hello() },
            "Backup host beta finds forced stops by checkpoint, the primary by pmu: start both with --position \
             checkpoint, or both with another source that both hosts have",
        ),
        (
            Hello { timeout_ms: 100, ..common::hello() },
            "Backup host beta was started with --timeout-ms 100, the primary with 500: both must be equal",
        ),
        (
            Hello { monitor_version: "0.2.0".into(), ..common::hello() },
            "Backup host beta runs monitor version 0.2.0, the primary runs 0.1.0",
        ),
        (
            Hello { guest_name: "mail".into(), ..common::hello() },
            "Backup host beta wants to follow guest \"mail\", the primary runs guest \"web\"",
        ),
        (
            Hello { cpu: CpuIdentity { stepping: 3, ..cpu }, ..common::hello() },
            "Backup host beta has the CPU AuthenticAMD family 23 model 49 stepping 3, \
             the primary has AuthenticAMD family 23 model 49 stepping 2",
        ),
        (
            Hello { disk: None, ..common::hello() },
            "Backup host beta has no disk, the primary has a disk of 1073741824 bytes",
        ),
        (
            Hello { claims_id: [0xab; 16], ..common::hello() },
            "Backup host beta asks the arbiter abababababababababababababababab, the primary asks \
             30313233343536373839616263646566: both must name the same one with --arbiter",
        ),
    ];
    for (hello, sentence) in cases {
        assert_eq!(says(hello), Err(sentence.into()));
    }
}

fn batch(seq: u64, reached: u64, released: u64) -> Batch {
    let start = (seq == FIRST_BATCH).then_some(4);
    Batch { view: 7, seq, start, reached, released, entries: vec![0x02] }
}

#[test]
fn batches_come_once_and_in_order() {
    let mut receiver = BatchReceiver::new(7, 4);
    assert_eq!(receiver.accept(&batch(2, 5, 0)), Err(SequenceError::Gap { expected: 1, found: 2 }));
    assert_eq!(receiver.accept(&batch(0, 5, 0)), Err(SequenceError::Repeated { expected: 1, found: 0 }));
    receiver.accept(&batch(1, 5, 0)).unwrap();
    receiver.accept(&batch(2, 5, 1)).unwrap();
    assert_eq!(receiver.accept(&batch(2, 6, 1)), Err(SequenceError::Repeated { expected: 3, found: 2 }));
    assert_eq!(receiver.accept(&batch(4, 6, 1)), Err(SequenceError::Gap { expected: 3, found: 4 }));
    let back = receiver.accept(&batch(3, 4, 1));
    assert_eq!(back, Err(SequenceError::WentBack { what: "reached anchor", previous: 5, found: 4 }));
    let back = receiver.accept(&batch(3, 6, 0));
    assert_eq!(back, Err(SequenceError::WentBack { what: "released batch", previous: 1, found: 0 }));
    let ahead = receiver.accept(&batch(3, 6, 4));
    assert_eq!(ahead, Err(SequenceError::Ahead { what: "released batch", found: 4, sent: 3 }));
    assert_eq!((receiver.received(), receiver.reached(), receiver.released()), (2, 5, 1));
}

#[test]
fn acknowledgements_go_forward_and_not_ahead() {
    let ack = |received, executed, ticks| Ack { received, executed, executed_time: GuestTime(ticks) };
    let mut sender = BatchSender::default();
    let ahead = |found, sent| Err(SequenceError::Ahead { what: "acknowledged batch", found, sent });
    assert_eq!(sender.accept(&ack(1, 0, 0)), ahead(1, 0));
    assert_eq!((sender.next_seq(), sender.next_seq()), (1, 2));
    sender.accept(&ack(2, 7, 70)).unwrap();
    assert_eq!(sender.accept(&ack(3, 7, 70)), ahead(3, 2));
    for (back, what) in [
        (ack(1, 7, 70), "acknowledged batch"),
        (ack(2, 6, 70), "executed anchor"),
        (ack(2, 7, 69), "executed time"),
    ] {
        let refused = sender.accept(&back).unwrap_err();
        assert!(matches!(refused, SequenceError::WentBack { what: named, .. } if named == what), "{refused}");
    }
    assert_eq!(sender.acked(), ack(2, 7, 70));
    assert_eq!(sender.sent(), 2);
}

#[test]
fn a_log_of_another_view_or_from_another_position_is_refused() {
    let mut receiver = BatchReceiver::new(7, 4);
    for view in [6, 8] {
        let refused = receiver.accept(&Batch { view, ..batch(1, 5, 0) }).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("Batch 1 is of view {view}, and what is followed here is the log of view 7")
        );
    }
    for start in [3, 5] {
        let refused = receiver.accept(&Batch { start: Some(start), ..batch(1, 5, 0) }).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("The log starts at anchor {start}, and the snapshot before it ends at anchor 4")
        );
    }
    let before = receiver.accept(&batch(1, 3, 0)).unwrap_err();
    assert_eq!(before, SequenceError::WentBack { what: "reached anchor", previous: 4, found: 3 });
    assert_eq!(receiver, BatchReceiver::new(7, 4), "what is refused changes nothing");
    receiver.accept(&batch(1, 4, 0)).unwrap();
    let other = receiver.accept(&Batch { view: 8, ..batch(2, 5, 0) }).unwrap_err();
    assert_eq!(other, SequenceError::OtherView { seq: 2, expected: 7, found: 8 });
}

#[test]
fn of_a_recording_the_first_batch_tells_where_it_starts() {
    let mut receiver = BatchReceiver::default();
    receiver.accept(&batch(1, 5, 0)).unwrap();
    let other = receiver.accept(&Batch { view: 8, ..batch(2, 5, 0) }).unwrap_err();
    assert_eq!(other, SequenceError::OtherView { seq: 2, expected: 7, found: 8 });
}

/// A recording with a snapshot of 5 bytes and two batches, not finished.
fn record(path: &Path) -> RecordingWriter {
    let mut writer = RecordingWriter::create(path).unwrap();
    let mut sink = writer.snapshot();
    sink.write_all(b"state").unwrap();
    sink.finish().unwrap();
    writer.batch(batch(1, 5, 0)).unwrap();
    writer.batch(batch(2, 6, 1)).unwrap();
    writer
}

fn replay<R: Read>(mut reader: RecordingReader<R>) -> Result<u64, RecordingError> {
    let mut snapshot = Vec::new();
    if reader.snapshot().read_to_end(&mut snapshot).is_ok() {
        assert_eq!(snapshot, b"state");
    }
    let mut batches = 0;
    while reader.next_part()?.is_some() {
        batches += 1;
    }
    Ok(batches)
}

#[test]
fn a_recording_gets_its_name_when_it_is_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    let incomplete = directory.path().join("run.incomplete");
    let writer = record(&path);
    assert!(!path.exists() && incomplete.exists());
    writer.finish().unwrap();
    assert!(path.exists() && !incomplete.exists());
    assert_eq!(replay(RecordingReader::open(&path).unwrap()).unwrap(), 2);
}

#[test]
fn a_recording_that_was_not_finished_is_told_and_still_readable() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    let incomplete = directory.path().join("run.incomplete");
    drop(record(&path));
    let refused = RecordingReader::open(&path).unwrap_err();
    assert!(matches!(&refused, RecordingError::Incomplete { incomplete: named, .. } if *named == incomplete));
    let mut reader = RecordingReader::open(&incomplete).unwrap();
    reader.snapshot().read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(reader.next_part().unwrap(), Some(LogPart::Batch(batch(1, 5, 0))));
    assert_eq!(reader.next_part().unwrap(), Some(LogPart::Batch(batch(2, 6, 1))));
    let cut = reader.next_part().unwrap_err().to_string();
    assert_eq!(cut, format!("{} is cut off after 2 whole batches", incomplete.display()));
}

#[test]
fn a_recording_cut_at_any_byte_is_never_taken_for_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    record(&path).finish().unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(replay(RecordingReader::new(&bytes[..], &path).unwrap()).unwrap(), 2);
    for cut in 0..bytes.len() {
        let result = RecordingReader::new(&bytes[..cut], &path).and_then(replay);
        assert!(matches!(result, Err(RecordingError::Truncated { .. })), "cut at {cut}: {result:?}");
    }
    // Behind the end there is neither another message nor a part of one.
    for extra in [&bytes[12..], &bytes[12..20]] {
        let longer = [&bytes[..], extra].concat();
        assert!(RecordingReader::new(&longer[..], &path).and_then(replay).is_err());
    }
}

#[test]
fn a_recording_of_a_guest_that_differed_says_how() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    let long = "ä".repeat(MAX_TEXT_BYTES);
    record(&directory.path().join("kept")).finish_diverged(&long, &path).unwrap();
    let mut reader = RecordingReader::open(&path).unwrap();
    reader.snapshot().read_to_end(&mut Vec::new()).unwrap();
    while reader.next_part().unwrap().is_some() {
        assert_eq!(reader.divergence(), None, "that is not known before the end");
    }
    assert_eq!(reader.divergence(), Some(&long[..MAX_TEXT_BYTES]));

    let path = directory.path().join("other");
    record(&path).finish().unwrap();
    let mut reader = RecordingReader::open(&path).unwrap();
    reader.snapshot().read_to_end(&mut Vec::new()).unwrap();
    while reader.next_part().unwrap().is_some() {}
    assert_eq!(reader.divergence(), None);
}

#[test]
fn a_recording_whose_log_is_not_its_snapshots_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    record(&path).finish().unwrap();
    let open = |anchor| {
        let mut reader = RecordingReader::open(&path).unwrap();
        reader.snapshot().read_to_end(&mut Vec::new()).unwrap();
        reader.snapshot_is_at(anchor);
        reader
    };
    for anchor in [3, 5] {
        let refused = open(anchor).next_part().unwrap_err().to_string();
        let expected = format!(
            "The recording {} cannot be replayed: its log starts at anchor 4, and its snapshot is of anchor {anchor}; they \
             were not recorded together",
            path.display()
        );
        assert_eq!(refused, expected);
    }
    let mut whole = open(4);
    assert_eq!(whole.next_part().unwrap(), Some(LogPart::Batch(batch(1, 5, 0))));
    assert_eq!(whole.next_part().unwrap(), Some(LogPart::Batch(batch(2, 6, 1))));
    assert_eq!(whole.next_part().unwrap(), None);
}

#[test]
fn no_recording_is_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("run");
    File::create(&path).unwrap();
    assert!(
        matches!(RecordingWriter::create(&path), Err(RecordingError::Exists { path: named }) if named == path)
    );
    let path = directory.path().join("other");
    drop(record(&path));
    let incomplete = directory.path().join("other.incomplete");
    assert!(
        matches!(RecordingWriter::create(&path), Err(RecordingError::Exists { path: named }) if named == incomplete)
    );
}

#[test]
fn a_name_that_is_taken_meanwhile_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let victim = directory.path().join("victim");
    fs::write(&victim, "of value").unwrap();
    for (name, diverged) in [("run", false), ("kept", true)] {
        let path = directory.path().join(name);
        let finish = |writer: RecordingWriter| {
            if diverged { writer.finish_diverged("rax", &path) } else { writer.finish() }
        };
        let writer = record(&path);
        fs::write(&path, "of value").unwrap();
        let refused = finish(writer).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("{} exists already: move it away or choose another name", path.display())
        );
        assert_eq!(fs::read(&path).unwrap(), b"of value");
        let incomplete = directory.path().join(format!("{name}.incomplete"));
        assert_eq!(
            replay(RecordingReader::open(&incomplete).unwrap()).unwrap(),
            2,
            "what was recorded is there"
        );
    }
}

#[test]
fn a_planted_link_is_neither_followed_nor_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let victim = directory.path().join("victim");
    for planted in ["run", "run.incomplete"] {
        let planted = directory.path().join(planted);
        symlink(&victim, &planted).unwrap();
        for there in [false, true] {
            if there {
                fs::write(&victim, "of value").unwrap();
            }
            let refused = RecordingWriter::create(&directory.path().join("run")).unwrap_err();
            assert!(matches!(&refused, RecordingError::Exists { path } if *path == planted), "{refused}");
            assert_eq!(fs::read(&victim).ok(), there.then(|| b"of value".to_vec()));
        }
        assert!(fs::symlink_metadata(&planted).unwrap().is_symlink());
        [&victim, &planted].into_iter().for_each(|path| fs::remove_file(path).unwrap());
    }
}

/// Is run by the test below as a process of its own: the umask is a process's.
#[test]
fn a_recording_under_a_umask() {
    let Some(directory) = std::env::var_os("VMFT_TEST_UMASK_DIRECTORY") else { return };
    let directory = Path::new(&directory);
    record(&directory.join("whole")).finish().unwrap();
    record(&directory.join("kept")).finish_diverged("rax", &directory.join("differed")).unwrap();
    drop(record(&directory.join("cut")));
}

#[test]
fn only_its_owner_may_read_a_recording_whatever_the_umask_says() {
    for umask in ["0", "022", "077"] {
        let directory = tempfile::tempdir().unwrap();
        let status = Command::new("sh")
            .args(["-c", "umask \"$0\" && exec \"$1\" --exact a_recording_under_a_umask", umask])
            .arg(std::env::current_exe().unwrap())
            .env("VMFT_TEST_UMASK_DIRECTORY", directory.path())
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        for name in ["whole", "differed", "cut.incomplete"] {
            let mode = fs::metadata(directory.path().join(name)).unwrap().mode() & 0o7777;
            assert_eq!(mode, 0o600, "{name} under umask {umask}: {mode:o}");
        }
    }
}

#[test]
fn a_recording_is_written_in_its_order() {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = RecordingWriter::create(&directory.path().join("run")).unwrap();
    assert!(matches!(writer.batch(batch(1, 4, 0)), Err(RecordingError::Stream { .. })));
    assert!(matches!(writer.finish(), Err(RecordingError::Stream { .. })));
    let mut writer = record(&directory.path().join("other"));
    assert!(matches!(writer.batch(batch(4, 9, 1)), Err(RecordingError::Sequence { .. })));
}

#[test]
fn other_files_and_versions_are_refused_by_name() {
    let open = |bytes: &[u8]| RecordingReader::new(bytes, Path::new("run")).unwrap_err().to_string();
    assert_eq!(open(b"VMFTREC\0\x08\0\0\0"), "run is a recording of version 8, this monitor knows 7");
    assert_eq!(open(b"#!/bin/sh\nls"), "run is not a recording: it starts with #!/bin/s");
}
