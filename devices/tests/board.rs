//! The board as the monitor and a booting guest use it: time, interrupts, ports, saved state.

#![allow(clippy::unwrap_used, reason = "a failure here is a failed test")]

mod common;

use common::*;
use devices::{Board, BoardConfig, DeviceError, Effect, Payload, virtio_windows};
use ft_log::{Event, GuestTime};

const PIT_PERIOD: u64 = 3 * 11_932; // 100 Hz

fn guest() -> Guest {
    let mut guest = Guest::new(config());
    guest.init_pic();
    guest
}

/// Programs counter 0 of the 8254 as Linux does for a periodic (mode 2) or a one-shot (mode 4) tick.
fn program_timer(guest: &mut Guest, control: u8, count: u16) {
    guest.outb(0x43, control);
    for byte in count.to_le_bytes() {
        guest.outb(0x40, byte);
    }
}

#[test]
fn periodic_timer_interrupts_at_its_deadlines() {
    let mut guest = guest();
    program_timer(&mut guest, 0x34, 11_932);
    guest.board.acknowledge_interrupt(); // the output rose with the control word
    guest.end_of_interrupt(0);
    for period in 1..4 {
        let deadline = GuestTime(3 + period * PIT_PERIOD);
        assert_eq!(guest.board.deadline(), Some(deadline));
        guest.board.advance(GuestTime(deadline.0 - 1));
        assert!(!guest.board.interrupt_pending());
        guest.apply(Event::Tick { now: deadline }).unwrap();
        assert_eq!(guest.board.deadline(), None, "one more edge would change nothing");
        assert_eq!(guest.board.acknowledge_interrupt(), 0x30);
        guest.end_of_interrupt(0);
    }
}

#[test]
fn one_shot_timer_interrupts_once() {
    let mut guest = guest();
    program_timer(&mut guest, 0x38, 1_000);
    guest.board.acknowledge_interrupt();
    guest.end_of_interrupt(0);
    guest.board.advance(GuestTime(1_000_000));
    assert_eq!(guest.board.acknowledge_interrupt(), 0x30);
    guest.end_of_interrupt(0);
    assert_eq!(guest.board.deadline(), None);
    guest.board.advance(GuestTime(2_000_000));
    assert!(!guest.board.interrupt_pending());
}

#[test]
fn timer_of_the_firmware_asks_for_one_interrupt_while_it_is_masked() {
    let mut board = Board::new(&config());
    assert_eq!(board.deadline(), Some(GuestTime(3 * 65_537)));
    board.advance(GuestTime(GuestTime::HZ));
    assert!(!board.interrupt_pending(), "the line is masked");
    assert_eq!(board.deadline(), None, "further edges are lost in the request");
}

#[test]
fn time_never_goes_back() {
    let mut guest = guest();
    guest.board.advance(GuestTime(100));
    let digest = guest.board.digest();
    guest.apply(Event::Tick { now: GuestTime(99) }).unwrap();
    assert_eq!((guest.board.now(), guest.board.digest()), (GuestTime(100), digest));
}

#[test]
fn tsc_is_nanoseconds_and_strictly_increasing() {
    let mut board = Board::new(&config());
    assert_eq!([board.tsc(), board.tsc()], [1, 2]);
    board.advance(GuestTime(GuestTime::HZ));
    assert_eq!([board.tsc(), board.tsc()], [1_000_000_000, 1_000_000_001]);
}

#[test]
fn pm_timer_reads_as_one_double_word() {
    let mut guest = guest();
    guest.board.advance(GuestTime(0x0312_3456));
    assert_eq!(guest.inl(0x608), 0x0012_3456);
}

#[test]
fn unclaimed_ports_read_ones_and_there_is_no_pci() {
    let mut guest = guest();
    for port in [0x80, 0xed, 0x2f8, 0x92, 0xcfc, 0x1234, 0xffff] {
        guest.outb(port, 0x12);
        assert_eq!(guest.inb(port), 0xff, "port {port:#x}");
    }
    guest.outb(0xcfb, 0x01);
    for address in [0x8000_0000, 0x8000_ff00] {
        guest.outl(0xcf8, address);
        assert_eq!([guest.inl(0xcf8), guest.inl(0xcfc)], [u32::MAX; 2]);
    }
    guest.outl(0xffff, 0x1234_5678);
    assert_eq!(guest.inl(0xfffe), u32::MAX);
    assert_eq!(guest.take_effects(), []);
}

#[test]
fn console_output_is_interrupt_driven_with_one_edge_per_byte() {
    let mut guest = guest();
    guest.outb(0x3f9, 0x02);
    for byte in *b"ok" {
        assert_eq!(guest.board.acknowledge_interrupt(), 0x34);
        assert_eq!(guest.inb(0x3fa) & 0x0f, 0x02);
        guest.outb(0x3f8, byte);
        guest.end_of_interrupt(4);
    }
    assert!(guest.board.interrupt_pending());
    assert_eq!(guest.take_effects(), [Effect::Console(b'o'), Effect::Console(b'k')]);
}

#[test]
fn byte_sent_without_reading_the_identification_interrupts_again() {
    let mut guest = guest();
    guest.outb(0x3f9, 0x02);
    guest.board.acknowledge_interrupt();
    guest.outb(0x3f8, b'x');
    guest.end_of_interrupt(4);
    assert_eq!(guest.board.acknowledge_interrupt(), 0x34);
}

#[test]
fn typed_bytes_interrupt_until_they_are_read() {
    let mut guest = guest();
    guest.outb(0x3f9, 0x01);
    guest.apply(Event::Console { data: b"hi".to_vec() }).unwrap();
    assert_eq!(guest.board.acknowledge_interrupt(), 0x34);
    assert_eq!([guest.inb(0x3f8), guest.inb(0x3f8)], *b"hi");
    guest.end_of_interrupt(4);
    guest.apply(Event::Console { data: b"!".to_vec() }).unwrap();
    assert_eq!(guest.board.acknowledge_interrupt(), 0x34, "a new edge");
}

/// What Linux's i8042 driver does at boot; each read of the status must find the answer at once.
#[test]
fn keyboard_controller_probe_needs_no_polling() {
    let mut guest = guest();
    let mut command = |writes: &[(u16, u8)]| {
        for (port, value) in writes {
            assert_eq!(guest.inb(0x64) & 0x02, 0, "the input buffer is always free");
            guest.outb(*port, *value);
        }
        (guest.inb(0x64), guest.inb(0x60))
    };
    assert_eq!(command(&[]).0 & 0x01, 0, "nothing to flush");
    assert_eq!(command(&[(0x64, 0xaa)]).1, 0x55);
    let (status, command_byte) = command(&[(0x64, 0x20)]);
    assert_eq!(status & 0x11, 0x11, "full, and the keyboard is not locked");
    assert_eq!(command(&[(0x64, 0x20)]).1, command_byte);
    let (status, looped) = command(&[(0x64, 0xd3), (0x60, 0x5a)]);
    assert_eq!((status & 0x21, looped), (0x01, 0x5a), "answered, but not by an auxiliary port");
    assert_eq!(command(&[(0x64, 0xa9)]), (0x1d, 0x01));
}

#[test]
fn every_way_to_reset_or_power_off_is_an_effect() {
    let mut guest = guest();
    guest.outb(0x64, 0xfe);
    assert_eq!(guest.take_effects(), [Effect::Reset]);
    guest.outb(0xcf9, 0x02);
    guest.outb(0xcf9, 0x06);
    assert_eq!(guest.take_effects(), [Effect::Reset]);
    guest.outw(0x604, 5 << 10);
    guest.outw(0x604, 5 << 10 | 1 << 13);
    assert_eq!(guest.take_effects(), [Effect::PowerOff]);
}

#[test]
fn power_button_raises_the_sci_until_it_is_acknowledged() {
    let mut guest = guest();
    guest.outw(0x602, 0x0100);
    guest.apply(Event::PowerButton).unwrap();
    assert_eq!(guest.board.acknowledge_interrupt(), 0x39);
    guest.outw(0x600, 0x0100);
    guest.end_of_interrupt(9);
    assert!(!guest.board.interrupt_pending());
}

#[test]
fn virtio_windows_do_not_move_when_a_device_is_missing() {
    let all = virtio_windows(&config());
    assert_eq!(
        all.iter().map(|w| (w.gpa, w.irq)).collect::<Vec<_>>(),
        [(0xd000_0000, 5), (0xd000_1000, 10), (0xd000_2000, 11)]
    );
    let without_net = virtio_windows(&BoardConfig { net_mac: None, ..config() });
    assert_eq!(without_net, all[1..]);
}

#[test]
fn hpet_counts_guest_time_and_is_written_through_its_page() {
    let mut guest = guest();
    let counter =
        |guest: &Guest| guest.board.hpet_registers().map(|(at, value)| (at == 0xf0).then_some(value));
    guest.board.advance(GuestTime(100));
    assert!(counter(&guest).contains(&Some(0)));
    guest.board.mmio_write(&guest.ram, 0xfed0_0010, &1u32.to_le_bytes(), &mut guest.effects);
    guest.board.advance(GuestTime(350));
    guest.reload();
    assert!(counter(&guest).contains(&Some(1_000)));
    assert!(guest.take_effects().is_empty());
}

/// A changed number means a changed layout: raise the version of the payload that changed.
#[test]
fn layout_of_a_new_board_is_fixed() {
    let board = Board::new(&config());
    let layout: Vec<_> = board.save().iter().map(|p| (p.kind.clone(), p.version, p.bytes.len())).collect();
    let expected = [
        ("clock", 16),
        ("pic-8259", 32),
        ("pit-8254", 106),
        ("acpi-pm", 7),
        ("cmos-mc146818", 146),
        ("uart-16550", 14),
        ("i8042", 5),
        ("hpet", 17),
        ("virtio-rng", 61),
        ("virtio-net", 112),
        ("virtio-blk", 72),
    ];
    assert_eq!(layout, expected.map(|(kind, len_bytes)| (kind.to_owned(), 1, len_bytes)));
    assert_eq!(board.digest(), 0x11e6_6f3a_d17b_a847);
}

/// A board with something in every device.
fn busy() -> Guest {
    let mut guest = guest();
    guest.board.advance(GuestTime(12_345_678));
    program_timer(&mut guest, 0x34, 11_932);
    guest.outb(0x3f9, 0x03);
    guest.apply(Event::Console { data: b"typed".to_vec() }).unwrap();
    guest.outb(0x64, 0x20);
    guest.outb(0x70, 0x00);
    guest.inb(0x71);
    for kind in [devices::VirtioKind::Net, devices::VirtioKind::Blk, devices::VirtioKind::Rng] {
        guest.start(kind, F_VERSION_1);
    }
    guest.apply(Event::Frame { data: vec![1; 60] }).unwrap();
    guest
}

#[test]
fn loading_what_was_saved_gives_the_same_board() {
    let guest = busy();
    let saved = guest.board.save();
    let loaded = Board::load(&guest.config, &saved).unwrap();
    assert_eq!(loaded.save(), saved);
    assert_eq!(loaded.digest(), guest.board.digest());
    assert_eq!(loaded.interrupt_pending(), guest.board.interrupt_pending());
    let mut reversed = saved.clone();
    reversed.reverse();
    assert_eq!(Board::load(&guest.config, &reversed).unwrap().save(), saved);
}

#[test]
fn digest_tells_every_device_apart() {
    let saved = busy().board.save();
    let fresh = Board::new(&config());
    let mut digests = vec![fresh.digest()];
    for (index, payload) in saved.into_iter().enumerate() {
        let mut payloads = fresh.save();
        payloads[index] = payload;
        digests.push(Board::load(&config(), &payloads).unwrap().digest());
    }
    digests.sort_unstable();
    digests.dedup();
    assert_eq!(digests.len(), 11);
}

#[test]
fn payloads_that_do_not_belong_are_refused_by_name() {
    let payloads = Board::new(&config()).save();
    let load = |change: &dyn Fn(&mut Vec<Payload>)| {
        let mut payloads = payloads.clone();
        change(&mut payloads);
        Board::load(&config(), &payloads).err()
    };
    assert_eq!(load(&|_| {}), None);
    assert_eq!(load(&|p| drop(p.remove(1))), Some(DeviceError::MissingPayload { kind: "pic-8259" }));
    let twice = load(&|p| p.push(p[2].clone()));
    assert_eq!(twice, Some(DeviceError::UnknownPayload { kind: "pit-8254".to_owned() }));
    let alien = Payload { kind: "apic".to_owned(), version: 1, bytes: vec![] };
    let unknown = load(&|p| p.push(alien.clone()));
    assert_eq!(unknown, Some(DeviceError::UnknownPayload { kind: "apic".to_owned() }));
    let version = load(&|p| p[3].version = 2);
    assert_eq!(version, Some(DeviceError::PayloadVersion { kind: "acpi-pm", expected: 1, found: 2 }));
    let invalid = load(&|p| p[1].bytes[6] = 8);
    assert_eq!(invalid, Some(DeviceError::InvalidField { kind: "pic-8259", field: "lowest", value: 8 }));
    for index in 0..payloads.len() {
        let short = load(&|p| {
            p[index].bytes.pop();
        });
        assert!(matches!(short, Some(DeviceError::TruncatedPayload { .. })), "payload {index}: {short:?}");
        let long = load(&|p| p[index].bytes.push(0));
        assert!(
            matches!(long, Some(DeviceError::LeftoverBytes { bytes: 1, .. })),
            "payload {index}: {long:?}"
        );
    }
    let smaller = BoardConfig { disk_bytes: None, ..config() };
    let error = Board::load(&smaller, &payloads).err();
    assert_eq!(error, Some(DeviceError::UnknownPayload { kind: "virtio-blk".to_owned() }));
}
