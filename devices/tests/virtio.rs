//! Virtio devices as a driver sees them: register masks, round trips, and drivers that break the rules.

mod common;

use common::*;
use devices::{BoardConfig, DeviceError, DiskOp, DiskRequest, Effect, VirtioKind};
use ft_log::{DiskStatus, Event, MAX_DISK_BYTES, MAX_ENTROPY_BYTES, MAX_FRAME_BYTES};
use vm_memory::GuestAddress;

const DATA: u64 = 0x1_0000;
const STATUS: u64 = 0x2_0000;
const KINDS: [VirtioKind; 3] = [VirtioKind::Net, VirtioKind::Blk, VirtioKind::Rng];
const FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

fn started(kind: VirtioKind) -> (Guest, Vec<Queue>) {
    let mut guest = Guest::new(config());
    let queues = guest.start(kind, FEATURES);
    assert_eq!(guest.status(kind), ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    (guest, queues)
}

fn frame(fill: u8, len_bytes: usize) -> Vec<u8> {
    vec![fill; len_bytes]
}

/// Makes a block request available: header, data buffer with `flags`, status byte.
fn request(guest: &Guest, queue: &mut Queue, op: u32, sector: u64, data_bytes: u32, flags: u16) -> u16 {
    let mut header = op.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    let at = DATA - 0x1000 + 16 * u64::from(op);
    guest.poke(at, &header);
    guest.poke(STATUS, &[0xee]);
    let mut buffers = vec![(at, 16, 0), (STATUS, 1, WRITE)];
    if data_bytes > 0 {
        buffers.insert(1, (DATA, data_bytes, flags));
    }
    queue.add(guest, &buffers)
}

fn disk_done(guest: &mut Guest, id: u64, data: Vec<u8>) -> Result<(), DeviceError> {
    guest.apply(Event::DiskDone { id, status: DiskStatus::Ok, data })
}

#[test]
fn windows_tell_what_they_are() {
    let mut guest = Guest::new(config());
    for (kind, device_id, features, queues) in [
        (VirtioKind::Net, 1, 1 << 5, 2),
        (VirtioKind::Blk, 2, 1 << 1 | 1 << 2 | 1 << 9, 1),
        (VirtioKind::Rng, 4, 0, 1),
    ] {
        assert_eq!([0x00, 0x04, 0x08].map(|r| guest.read32(kind, r)), [0x7472_6976, 2, device_id]);
        let mut offered = 0;
        for sel in [0, 1] {
            guest.write32(kind, 0x14, sel);
            offered |= u64::from(guest.read32(kind, 0x10)) << (32 * sel);
        }
        assert_eq!(offered, features | FEATURES);
        guest.write32(kind, 0x14, 2);
        assert_eq!(guest.read32(kind, 0x10), 0);
        for index in 0..3 {
            guest.write32(kind, 0x30, index);
            assert_eq!(guest.read32(kind, 0x34), if index < queues { 256 } else { 0 });
        }
        assert_eq!([0xb0, 0xb4, 0xb8, 0xbc].map(|r| guest.read32(kind, r)), [u32::MAX; 4]);
        assert_eq!(guest.read32(kind, 0xfc), 0);
    }
}

#[test]
fn configuration_spaces_can_be_read_at_any_width() {
    let mut guest = Guest::new(config());
    let mut read = |kind: VirtioKind, offset, len_bytes| {
        let mut data = vec![0xaa; len_bytes];
        guest.board.mmio_read(kind.window().gpa + 0x100 + offset, &mut data);
        data
    };
    assert_eq!(read(VirtioKind::Net, 0, 8), [&MAC[..], &[0, 0]].concat());
    assert_eq!(read(VirtioKind::Net, 5, 1), [MAC[5]]);
    assert_eq!(read(VirtioKind::Blk, 0, 8), (DISK_BYTES / 512).to_le_bytes());
    let (size_max, seg_max) = (read(VirtioKind::Blk, 8, 4), read(VirtioKind::Blk, 12, 4));
    let [size_max, seg_max] = [size_max, seg_max].map(|v| u32::from_le_bytes(v.try_into().unwrap()));
    assert!(size_max >= 4096 && size_max as usize * seg_max as usize <= MAX_DISK_BYTES);
    assert_eq!(read(VirtioKind::Blk, 0xeff, 4), [0; 4]);
}

#[test]
fn absent_devices_and_other_widths_are_not_claimed() {
    let without = BoardConfig { net_mac: None, disk_bytes: None, ..config() };
    let mut guest = Guest::new(without);
    assert_eq!(guest.read32(VirtioKind::Net, 0), u32::MAX);
    assert_eq!(guest.read32(VirtioKind::Blk, 0), u32::MAX);
    let mut wide = [0xaa; 8];
    guest.board.mmio_read(VirtioKind::Rng.window().gpa, &mut wide);
    assert_eq!(wide, [0; 8]);
    let mut beyond = [0; 4];
    guest.board.mmio_read(VirtioKind::Rng.window().gpa + 0x1000, &mut beyond);
    assert_eq!(beyond, [0xff; 4]);
    let event = Event::Frame { data: frame(1, 60) };
    assert_eq!(guest.apply(event), Err(DeviceError::NoSuchDevice { kind: "virtio-net" }));
}

#[test]
fn write_only_registers_read_zero_and_read_only_ones_keep_their_value() {
    let mut guest = Guest::new(config());
    for register in [0x14, 0x20, 0x24, 0x30, 0x38, 0x50, 0x64, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        for value in [u32::MAX, 0x5a5a_5a5a] {
            guest.write32(VirtioKind::Rng, register, value);
            assert_eq!(guest.read32(VirtioKind::Rng, register), 0, "register {register:#x}");
        }
    }
    for register in [0x00, 0x04, 0x08, 0x0c, 0x34, 0x60, 0xfc] {
        let before = guest.read32(VirtioKind::Rng, register);
        guest.write32(VirtioKind::Rng, register, !before);
        assert_eq!(guest.read32(VirtioKind::Rng, register), before, "register {register:#x}");
    }
}

#[test]
fn features_are_refused_unless_offered_and_version_1() {
    for kind in KINDS {
        let mut guest = Guest::new(config());
        for features in [FEATURES | 1 << 28, F_EVENT_IDX, 0] {
            guest.negotiate(kind, features);
            assert_eq!(guest.status(kind), ACKNOWLEDGE | DRIVER, "{kind:?} {features:#x}");
            guest.write32(kind, 0x70, ACKNOWLEDGE | DRIVER | DRIVER_OK);
            assert_eq!(guest.status(kind), ACKNOWLEDGE | DRIVER, "not running without features");
        }
        guest.negotiate(kind, F_VERSION_1);
        assert_eq!(guest.status(kind), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }
}

#[test]
fn status_bits_stay_until_reset() {
    let mut guest = Guest::new(config());
    for value in [ACKNOWLEDGE, DRIVER, NEEDS_RESET, 0x80] {
        guest.write32(VirtioKind::Rng, 0x70, value);
    }
    assert_eq!(guest.status(VirtioKind::Rng), ACKNOWLEDGE | DRIVER | 0x80);
    guest.write32(VirtioKind::Rng, 0x70, 0);
    assert_eq!(guest.status(VirtioKind::Rng), 0);
}

#[test]
fn queue_is_made_ready_only_inside_memory_and_after_features() {
    let mut guest = Guest::new(config());
    let queue = Queue::new(VirtioKind::Rng, 0);
    queue.enable(&mut guest);
    assert_eq!(guest.read32(VirtioKind::Rng, 0x44), 0, "before FEATURES_OK");
    guest.negotiate(VirtioKind::Rng, FEATURES);
    for (register, gpa) in [(0x80, RAM_BYTES - 16), (0x90, RAM_BYTES - 2), (0xa0, 1 << 40)] {
        queue.enable(&mut guest);
        assert_eq!(guest.read32(VirtioKind::Rng, 0x44), 1);
        guest.write32(VirtioKind::Rng, 0x44, 0);
        guest.write32(VirtioKind::Rng, register, gpa as u32);
        guest.write32(VirtioKind::Rng, register + 4, (gpa >> 32) as u32);
        guest.write32(VirtioKind::Rng, 0x44, 1);
        assert_eq!(guest.read32(VirtioKind::Rng, 0x44), 0, "register {register:#x}");
    }
}

#[test]
fn nothing_is_consumed_before_driver_ok_and_all_of_it_then() {
    let mut guest = Guest::new(config());
    guest.negotiate(VirtioKind::Rng, FEATURES);
    let mut queue = Queue::new(VirtioKind::Rng, 0);
    queue.enable(&mut guest);
    queue.add(&guest, &[(DATA, 8, WRITE)]);
    queue.notify(&mut guest);
    assert_eq!(guest.take_effects(), []);
    guest.write32(VirtioKind::Rng, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(guest.take_effects(), [Effect::Entropy { len_bytes: 8 }]);
}

#[test]
fn interrupt_line_follows_the_status_and_its_acknowledgement() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    guest.init_pic();
    queues[1].add(&guest, &[(DATA, 12 + 60, 0)]);
    queues[1].notify(&mut guest);
    assert_eq!(guest.read32(VirtioKind::Net, 0x60), 1);
    assert_eq!(guest.board.acknowledge_interrupt(), 0x35);
    guest.write32(VirtioKind::Net, 0x64, 2);
    assert_eq!(guest.read32(VirtioKind::Net, 0x60), 1, "another bit was acknowledged");
    guest.write32(VirtioKind::Net, 0x64, 1);
    guest.end_of_interrupt(5);
    assert!(!guest.board.interrupt_pending());
}

#[test]
fn sent_frames_leave_in_order_without_their_header() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    guest.poke(DATA, &[0; 12]);
    guest.poke(DATA + 0x100, &frame(0x11, 60));
    guest.poke(DATA + 0x200, &[[0; 12].as_slice(), &frame(0x22, 14)].concat());
    let first = queues[1].add(&guest, &[(DATA, 12, 0), (DATA + 0x100, 20, 0), (DATA + 0x114, 40, 0)]);
    let second = queues[1].add(&guest, &[(DATA + 0x200, 26, 0)]);
    queues[1].notify(&mut guest);
    assert_eq!(guest.take_effects(), [Effect::Frame(frame(0x11, 60)), Effect::Frame(frame(0x22, 14))]);
    assert_eq!(queues[1].take_used(&guest), [(first, 0), (second, 0)]);
}

#[test]
fn frames_too_short_or_too_long_are_used_up_but_not_sent() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    queues[1].add(&guest, &[(DATA, 12 + 13, 0)]);
    queues[1].add(&guest, &[(DATA, 12 + MAX_FRAME_BYTES as u32 + 1, 0)]);
    queues[1].add(&guest, &[(DATA, 12 + MAX_FRAME_BYTES as u32, 0)]);
    queues[1].notify(&mut guest);
    assert_eq!(guest.take_effects(), [Effect::Frame(frame(0, MAX_FRAME_BYTES))]);
    assert_eq!(queues[1].take_used(&guest).len(), 3);
}

#[test]
fn received_frame_fills_a_buffer_behind_its_header() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    let head = queues[0].add(&guest, &[(DATA, 30, WRITE), (DATA + 0x100, 100, WRITE)]);
    queues[0].notify(&mut guest);
    guest.apply(Event::Frame { data: frame(0x33, 60) }).unwrap();
    assert_eq!(queues[0].take_used(&guest), [(head, 72)]);
    assert_eq!(guest.peek(DATA, 12), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!([guest.peek(DATA + 12, 18), guest.peek(DATA + 0x100, 42)].concat(), frame(0x33, 60));
    assert_eq!(guest.peek(DATA + 0x12a, 1), [0], "nothing behind the frame");
    assert_eq!(guest.read32(VirtioKind::Net, 0x60), 1);
}

#[test]
fn frames_wait_for_buffers_in_order_and_the_newest_is_dropped() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    for number in 0..=256_u32 {
        let data = [number.to_le_bytes().as_slice(), &frame(0, 56)].concat();
        guest.apply(Event::Frame { data }).unwrap();
    }
    let mut received = Vec::new();
    for _ in 0..257 {
        queues[0].add(&guest, &[(DATA, 1526, WRITE)]);
        queues[0].notify(&mut guest);
        if !queues[0].take_used(&guest).is_empty() {
            received.push(u32::from_le_bytes(guest.peek(DATA + 12, 4).try_into().unwrap()));
        }
    }
    assert_eq!(received, (0..256).collect::<Vec<_>>());
}

#[test]
fn starved_receiver_asks_for_a_notification() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    queues[0].add(&guest, &[(DATA, 1526, WRITE)]);
    guest.apply(Event::Frame { data: frame(1, 60) }).unwrap();
    assert_eq!(queues[0].avail_event(&guest), 0, "one buffer was enough");
    guest.apply(Event::Frame { data: frame(2, 60) }).unwrap();
    assert_eq!(queues[0].avail_event(&guest), 1);
}

#[test]
fn frame_that_does_not_fit_is_dropped_and_leaves_the_buffer() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    let head = queues[0].add(&guest, &[(DATA, 80, WRITE)]);
    guest.apply(Event::Frame { data: frame(1, 69) }).unwrap();
    assert_eq!(queues[0].take_used(&guest), []);
    guest.apply(Event::Frame { data: frame(2, 68) }).unwrap();
    assert_eq!(queues[0].take_used(&guest), [(head, 80)]);
}

#[test]
fn frames_without_a_driver_are_dropped_and_oversized_ones_refused() {
    let mut guest = Guest::new(config());
    guest.apply(Event::Frame { data: frame(1, 60) }).unwrap();
    let mut queues = guest.start(VirtioKind::Net, FEATURES);
    queues[0].add(&guest, &[(DATA, 1526, WRITE)]);
    queues[0].notify(&mut guest);
    assert_eq!(queues[0].take_used(&guest), []);
    let found = MAX_FRAME_BYTES + 1;
    let event = Event::Frame { data: frame(1, found) };
    assert_eq!(guest.apply(event), Err(DeviceError::FrameTooLong { found }));
}

#[test]
fn driver_decides_by_used_event_whether_it_is_interrupted() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    queues[1].set_used_event(&guest, 2);
    for interrupted in [0, 0, 1] {
        queues[1].add(&guest, &[(DATA, 72, 0)]);
        queues[1].notify(&mut guest);
        assert_eq!(guest.read32(VirtioKind::Net, 0x60), interrupted);
    }
    assert_eq!(queues[1].avail_event(&guest), 3);
}

#[test]
fn read_changes_memory_only_when_it_is_done() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    let head = request(&guest, &mut queues[0], T_IN, 3, 1024, WRITE);
    queues[0].notify(&mut guest);
    let op = DiskOp::Read { offset_bytes: 1536, len_bytes: 1024 };
    assert_eq!(guest.take_effects(), [Effect::Disk(DiskRequest { id: 0, op: op.clone() })]);
    assert_eq!(guest.board.outstanding_disk_requests(), [DiskRequest { id: 0, op }]);
    assert_eq!((guest.peek(STATUS, 1), queues[0].take_used(&guest)), (vec![0xee], vec![]));

    disk_done(&mut guest, 0, vec![0x44; 1024]).unwrap();
    assert_eq!(guest.peek(DATA, 1024), vec![0x44; 1024]);
    assert_eq!(guest.peek(STATUS, 1), [S_OK]);
    assert_eq!(queues[0].take_used(&guest), [(head, 1025)]);
    assert_eq!(guest.read32(VirtioKind::Blk, 0x60), 1);
    assert_eq!(guest.board.outstanding_disk_requests(), []);
}

#[test]
fn write_carries_the_bytes_of_the_moment_it_was_made() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    guest.poke(DATA, &[0x55; 512]);
    let head = request(&guest, &mut queues[0], T_OUT, 0, 512, 0);
    queues[0].notify(&mut guest);
    guest.poke(DATA, &[0x66; 512]);
    let op = DiskOp::Write { offset_bytes: 0, data: vec![0x55; 512] };
    assert_eq!(guest.board.outstanding_disk_requests(), [DiskRequest { id: 0, op }]);
    disk_done(&mut guest, 0, vec![]).unwrap();
    assert_eq!((guest.peek(STATUS, 1), queues[0].take_used(&guest)), (vec![S_OK], vec![(head, 1)]));
}

#[test]
fn flush_and_identification_are_answered() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    request(&guest, &mut queues[0], T_FLUSH, 0, 0, 0);
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects(), [Effect::Disk(DiskRequest { id: 0, op: DiskOp::Flush })]);
    disk_done(&mut guest, 0, vec![]).unwrap();
    assert_eq!(guest.peek(STATUS, 1), [S_OK]);

    guest.poke(DATA, &[0xaa; 20]);
    request(&guest, &mut queues[0], T_GET_ID, 0, 20, WRITE);
    queues[0].notify(&mut guest);
    assert_eq!(guest.peek(DATA, 20), b"vmft-disk\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!((guest.peek(STATUS, 1), guest.take_effects()), (vec![S_OK], vec![]));
}

#[test]
fn requests_outside_the_disk_or_of_odd_size_fail_without_reaching_it() {
    let last = DISK_BYTES / 512 - 1;
    for (op, sector, data_bytes) in [
        (T_IN, last, 1024),
        (T_IN, last + 1, 512),
        (T_IN, u64::MAX, 512),
        (T_IN, u64::MAX / 512, 512),
        (T_IN, 0, 511),
        (T_IN, 0, 0),
        (T_OUT, last, 1024),
        (T_OUT, 0, 100),
        (T_GET_ID, 0, 19),
    ] {
        let (mut guest, mut queues) = started(VirtioKind::Blk);
        let flags = if op == T_OUT { 0 } else { WRITE };
        request(&guest, &mut queues[0], op, sector, data_bytes, flags);
        queues[0].notify(&mut guest);
        assert_eq!(guest.peek(STATUS, 1), [S_IOERR], "type {op} sector {sector} bytes {data_bytes}");
        assert_eq!((guest.take_effects(), queues[0].take_used(&guest).len()), (vec![], 1));
    }
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    request(&guest, &mut queues[0], T_IN, last, 512, WRITE);
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects().len(), 1, "the last sector can be read");
}

#[test]
fn unknown_type_is_unsupported_and_a_read_only_disk_refuses_writes() {
    let mut guest = Guest::new(BoardConfig { disk_read_only: true, ..config() });
    guest.write32(VirtioKind::Blk, 0x14, 0);
    assert_ne!(guest.read32(VirtioKind::Blk, 0x10) & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    let mut queues = guest.start(VirtioKind::Blk, FEATURES);
    for (op, flags, status) in [(T_OUT, 0, S_IOERR), (11, WRITE, S_UNSUPP)] {
        request(&guest, &mut queues[0], op, 0, 512, flags);
        queues[0].notify(&mut guest);
        assert_eq!(guest.peek(STATUS, 1), [status]);
    }
    assert_eq!(guest.take_effects(), []);
}

#[test]
fn a_disk_that_writes_through_offers_no_flush_and_answers_one_all_the_same() {
    let mut guest = Guest::new(BoardConfig { disk_write_through: true, ..config() });
    guest.write32(VirtioKind::Blk, 0x14, 0);
    assert_eq!(guest.read32(VirtioKind::Blk, 0x10) & 1 << 9, 0, "VIRTIO_BLK_F_FLUSH");
    guest.negotiate(VirtioKind::Blk, FEATURES | 1 << 9);
    assert_eq!(guest.status(VirtioKind::Blk), ACKNOWLEDGE | DRIVER, "refused");
    let mut queues = guest.start(VirtioKind::Blk, FEATURES);
    request(&guest, &mut queues[0], T_FLUSH, 0, 0, 0);
    queues[0].notify(&mut guest);
    assert!(matches!(guest.take_effects()[..], [Effect::Disk(DiskRequest { op: DiskOp::Flush, .. })]));
    disk_done(&mut guest, 0, vec![]).unwrap();
    assert_eq!(guest.peek(STATUS, 1), [S_OK]);
}

#[test]
fn completions_may_come_in_any_order_and_errors_reach_the_guest() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    let heads = [0, 1].map(|sector| request(&guest, &mut queues[0], T_OUT, sector, 512, 0));
    queues[0].notify(&mut guest);
    disk_done(&mut guest, 1, vec![]).unwrap();
    assert_eq!(guest.peek(STATUS, 1), [S_OK]);
    guest.apply(Event::DiskDone { id: 0, status: DiskStatus::IoError, data: vec![] }).unwrap();
    assert_eq!(guest.peek(STATUS, 1), [S_IOERR]);
    assert_eq!(queues[0].take_used(&guest), [(heads[1], 1), (heads[0], 1)]);
}

#[test]
fn completions_that_fit_no_request_are_refused_and_change_nothing() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    request(&guest, &mut queues[0], T_IN, 0, 512, WRITE);
    queues[0].notify(&mut guest);
    let before = guest.board.digest();
    assert_eq!(disk_done(&mut guest, 1, vec![]), Err(DeviceError::UnknownDiskRequest { id: 1 }));
    let wrong = disk_done(&mut guest, 0, vec![0; 511]);
    assert_eq!(wrong, Err(DeviceError::DiskDataLength { id: 0, expected: 512, found: 511 }));
    assert_eq!(guest.board.digest(), before);
}

#[test]
fn request_overtaken_by_a_reset_is_still_completed_but_touches_nothing() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    request(&guest, &mut queues[0], T_IN, 0, 512, WRITE);
    queues[0].notify(&mut guest);
    let mut queues = guest.start(VirtioKind::Blk, FEATURES);
    assert_eq!(guest.board.outstanding_disk_requests().len(), 1);
    disk_done(&mut guest, 0, vec![0x77; 512]).unwrap();
    assert_eq!((guest.peek(DATA, 1), guest.peek(STATUS, 1)), (vec![0], vec![0xee]));
    assert_eq!(queues[0].take_used(&guest), []);
    request(&guest, &mut queues[0], T_FLUSH, 0, 0, 0);
    queues[0].notify(&mut guest);
    assert_eq!(guest.board.outstanding_disk_requests()[0].id, 1, "ids go on rising");
}

#[test]
fn in_flight_requests_survive_saving_and_loading() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    let ops = [(T_IN, WRITE), (T_OUT, 0)];
    let heads = ops.map(|(op, flags)| request(&guest, &mut queues[0], op, 1, 512, flags));
    queues[0].notify(&mut guest);
    let before = (guest.board.digest(), guest.board.outstanding_disk_requests());
    guest.reload();
    assert_eq!((guest.board.digest(), guest.board.outstanding_disk_requests()), before);
    disk_done(&mut guest, 0, vec![0x12; 512]).unwrap();
    disk_done(&mut guest, 1, vec![]).unwrap();
    assert_eq!(guest.peek(DATA, 512), vec![0x12; 512]);
    assert_eq!(queues[0].take_used(&guest), [(heads[0], 513), (heads[1], 1)]);
}

#[test]
fn requests_in_flight_are_bounded_and_the_rest_waits_in_the_ring() {
    let (mut guest, _) = started(VirtioKind::Blk);
    // Each reset abandons 16 requests and lets the driver make 16 more.
    for _ in 0..20 {
        let mut queues = guest.start(VirtioKind::Blk, FEATURES);
        let head = request(&guest, &mut queues[0], T_FLUSH, 0, 0, 0);
        for _ in 1..16 {
            queues[0].offer(&guest, head);
        }
        queues[0].notify(&mut guest);
    }
    let requests = guest.board.outstanding_disk_requests();
    assert_eq!(requests.len(), 256);
    guest.take_effects();
    disk_done(&mut guest, 0, vec![]).unwrap();
    assert_eq!(guest.take_effects(), [Effect::Disk(DiskRequest { id: 256, op: DiskOp::Flush })]);
}

#[test]
fn bytes_in_flight_are_bounded() {
    let mut guest = Guest::new(BoardConfig { disk_bytes: Some(MAX_DISK_BYTES as u64), ..config() });
    let mut queues = guest.start(VirtioKind::Blk, FEATURES);
    guest.poke(DATA, &[0; 16]);
    // The same 512 KiB eight times: one request of 4 MiB.
    let mut buffers = vec![(DATA, 16, 0)];
    buffers.extend([(RAM_BYTES / 2, 512 << 10, WRITE); 8]);
    buffers.push((STATUS, 1, WRITE));
    let head = queues[0].add(&guest, &buffers);
    for _ in 1..16 {
        queues[0].offer(&guest, head);
    }
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects().len(), 16, "64 MiB");
    queues[0].offer(&guest, head);
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects(), []);
    disk_done(&mut guest, 0, vec![1; MAX_DISK_BYTES]).unwrap();
    assert_eq!(guest.take_effects().len(), 1);
}

#[test]
fn queue_that_is_not_ready_any_more_is_not_touched_by_a_completion() {
    for kind in [VirtioKind::Blk, VirtioKind::Rng] {
        let (mut guest, mut queues) = started(kind);
        let event = if kind == VirtioKind::Blk {
            request(&guest, &mut queues[0], T_IN, 0, 512, WRITE);
            Event::DiskDone { id: 0, status: DiskStatus::Ok, data: vec![1; 512] }
        } else {
            queues[0].add(&guest, &[(DATA, 512, WRITE)]);
            Event::Entropy { data: vec![1; 512] }
        };
        queues[0].notify(&mut guest);
        guest.write32(kind, 0x44, 0);
        guest.apply(event).unwrap();
        assert_eq!((guest.peek(DATA, 1), queues[0].take_used(&guest)), (vec![0], vec![]), "{kind:?}");
        assert_eq!(guest.read32(kind, 0x60), 0, "{kind:?}");
    }
}

#[test]
fn queue_registers_are_locked_while_the_queue_is_ready() {
    let (mut guest, mut queues) = started(VirtioKind::Rng);
    for register in [0x38, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
        guest.write32(VirtioKind::Rng, register, 4);
    }
    let head = queues[0].add(&guest, &[(DATA, 8, WRITE)]);
    queues[0].notify(&mut guest);
    guest.apply(Event::Entropy { data: vec![1; 8] }).unwrap();
    assert_eq!(queues[0].take_used(&guest), [(head, 8)]);
}

#[test]
fn device_that_lengthens_its_own_ring_stops_after_as_many_chains_as_descriptors() {
    let (mut guest, mut queues) = started(VirtioKind::Blk);
    let queue = &mut queues[0];
    let ask = |guest: &mut Guest, queue: &mut Queue, id_gpa: u64, times: u16| {
        guest.poke(DATA, &[T_GET_ID as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let rest = (DATA + 0x100, 19, WRITE);
        let head = queue.add(guest, &[(DATA, 16, 0), (id_gpa, 1, WRITE), rest, (STATUS, 1, WRITE)]);
        for _ in 1..times {
            queue.offer(guest, head);
        }
        queue.notify(guest);
    };
    for _ in 0..101 {
        ask(&mut guest, queue, DATA + 0x200, 1);
    }
    assert_eq!(queue.take_used(&guest).len(), 101);
    // 16 chains bring the index to 117; the first letter of the serial number, written on it, makes it 118.
    let index = queue.avail() + 2;
    ask(&mut guest, queue, index, 16);
    assert_eq!(guest.peek(index, 1), b"v");
    assert_eq!(queue.take_used(&guest).len(), 16);
    assert_ne!(guest.status(VirtioKind::Blk) & NEEDS_RESET, 0);
}

#[test]
fn broken_rings_ask_for_a_reset_and_nothing_else_happens() {
    let cases: [(&str, &[Buffer]); 6] = [
        ("buffer outside memory", &[(RAM_BYTES, 16, 0), (STATUS, 1, WRITE)]),
        ("buffer across the end of memory", &[(RAM_BYTES - 8, 16, 0), (STATUS, 1, WRITE)]),
        ("address that wraps", &[(u64::MAX - 8, 16, 0), (STATUS, 1, WRITE)]),
        ("no status byte", &[(DATA, 16, 0)]),
        ("short header", &[(DATA, 15, 0), (STATUS, 1, WRITE)]),
        ("readable after writable", &[(STATUS, 1, WRITE), (DATA, 16, 0)]),
    ];
    for (what, buffers) in cases {
        let (mut guest, mut queues) = started(VirtioKind::Blk);
        queues[0].add(&guest, buffers);
        queues[0].notify(&mut guest);
        assert_ne!(guest.status(VirtioKind::Blk) & NEEDS_RESET, 0, "{what}");
        assert_eq!(guest.read32(VirtioKind::Blk, 0x60), 2, "{what}: configuration change");
        assert_eq!((guest.take_effects(), queues[0].take_used(&guest)), (vec![], vec![]), "{what}");
        request(&guest, &mut queues[0], T_FLUSH, 0, 0, 0);
        queues[0].notify(&mut guest);
        assert_eq!(guest.take_effects(), [], "{what}: the device stands still");
        guest.start(VirtioKind::Blk, FEATURES);
        assert_eq!(guest.status(VirtioKind::Blk) & NEEDS_RESET, 0, "{what}");
    }
}

#[test]
fn looping_chains_and_jumping_indices_ask_for_a_reset() {
    let (mut guest, mut queues) = started(VirtioKind::Net);
    queues[1].put_descriptor(&guest, 0, DATA, 16, 1, 0);
    queues[1].offer(&guest, 0);
    queues[1].notify(&mut guest);
    assert_ne!(guest.status(VirtioKind::Net) & NEEDS_RESET, 0, "a descriptor that follows itself");

    let (mut guest, queues) = started(VirtioKind::Net);
    guest.poke(queues[1].avail() + 2, &17_u16.to_le_bytes());
    queues[1].notify(&mut guest);
    assert_ne!(guest.status(VirtioKind::Net) & NEEDS_RESET, 0, "more chains than descriptors");

    let (mut guest, mut queues) = started(VirtioKind::Net);
    queues[1].offer(&guest, 16);
    queues[1].notify(&mut guest);
    assert_ne!(guest.status(VirtioKind::Net) & NEEDS_RESET, 0, "a head outside the table");
}

#[test]
fn ring_whose_index_the_device_overwrites_asks_for_a_reset() {
    let mut guest = Guest::new(config());
    guest.negotiate(VirtioKind::Net, FEATURES);
    let queue = Queue::new(VirtioKind::Net, 1);
    queue.enable(&mut guest);
    guest.write32(VirtioKind::Net, 0x44, 0);
    // The first element of the used ring lies on the index of the available ring.
    guest.write32(VirtioKind::Net, 0xa0, (queue.avail() - 4) as u32);
    guest.write32(VirtioKind::Net, 0x44, 1);
    guest.poke(queue.avail() + 2, &1_u16.to_le_bytes());
    guest.write32(VirtioKind::Net, 0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_ne!(guest.status(VirtioKind::Net) & NEEDS_RESET, 0);
}

#[test]
fn entropy_is_asked_for_one_request_at_a_time() {
    let (mut guest, mut queues) = started(VirtioKind::Rng);
    let first = queues[0].add(&guest, &[(DATA, 10, WRITE), (DATA + 0x100, 22, WRITE)]);
    let second = queues[0].add(&guest, &[(DATA + 0x1000, 0x2000, WRITE)]);
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects(), [Effect::Entropy { len_bytes: 32 }]);
    assert_eq!(guest.board.outstanding_entropy(), Some(32));

    let data: Vec<u8> = (1..=32).collect();
    guest.apply(Event::Entropy { data: data.clone() }).unwrap();
    assert_eq!([guest.peek(DATA, 10), guest.peek(DATA + 0x100, 22)].concat(), data);
    assert_eq!(queues[0].take_used(&guest), [(first, 32)]);
    assert_eq!(guest.take_effects(), [Effect::Entropy { len_bytes: MAX_ENTROPY_BYTES }]);
    guest.apply(Event::Entropy { data: vec![9; MAX_ENTROPY_BYTES] }).unwrap();
    assert_eq!(queues[0].take_used(&guest), [(second, MAX_ENTROPY_BYTES as u32)]);
    assert_eq!(guest.board.outstanding_entropy(), None);
}

#[test]
fn entropy_that_was_not_asked_for_is_refused() {
    let (mut guest, mut queues) = started(VirtioKind::Rng);
    let event = Event::Entropy { data: vec![1; 4] };
    assert_eq!(guest.apply(event.clone()), Err(DeviceError::EntropyLength { expected: 0, found: 4 }));
    queues[0].add(&guest, &[(DATA, 8, WRITE)]);
    queues[0].notify(&mut guest);
    assert_eq!(guest.apply(event), Err(DeviceError::EntropyLength { expected: 8, found: 4 }));
    assert_eq!(guest.board.outstanding_entropy(), Some(8));
}

#[test]
fn entropy_request_overtaken_by_a_reset_is_answered_into_nothing() {
    let (mut guest, mut queues) = started(VirtioKind::Rng);
    queues[0].add(&guest, &[(DATA, 8, WRITE)]);
    queues[0].notify(&mut guest);
    let mut queues = guest.start(VirtioKind::Rng, FEATURES);
    queues[0].add(&guest, &[(DATA + 8, 4, WRITE)]);
    queues[0].notify(&mut guest);
    assert_eq!(guest.take_effects(), [Effect::Entropy { len_bytes: 8 }]);
    guest.reload();
    guest.apply(Event::Entropy { data: vec![7; 8] }).unwrap();
    assert_eq!(guest.peek(DATA, 12), [0; 12]);
    assert_eq!(guest.take_effects(), [Effect::Entropy { len_bytes: 4 }]);
}

#[test]
fn memory_with_a_hole_is_handled_like_memory_that_ends() {
    let ranges = [(GuestAddress(0), 0x2_0000), (GuestAddress(0x4_0000), 0x2_0000)];
    let mut guest = Guest::new(config());
    guest.ram = devices::GuestRam::from_ranges(&ranges).unwrap();
    let mut queues = guest.start(VirtioKind::Net, FEATURES);
    queues[1].add(&guest, &[(0x4_0000, 72, 0)]);
    queues[1].notify(&mut guest);
    assert_eq!(guest.take_effects().len(), 1);
    queues[1].add(&guest, &[(0x1_ffc0, 72, 0)]);
    queues[1].notify(&mut guest);
    assert_ne!(guest.status(VirtioKind::Net) & NEEDS_RESET, 0);
}
