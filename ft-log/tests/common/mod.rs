//! Values of every kind, for the tests.
#![allow(dead_code, reason = "each test program uses a part")]

use ft_log::{
    Ack, Batch, ByeReason, Counted, CpuIdentity, Cursor, DiskStatus, Entry, Event, GuestTime, Heartbeat,
    Hello, HelloDisk, HelloImage, Invitation, Key, Message, Position, PositionSource, Probe, ProbeKind,
    REGISTERS, Refusal, Role, SealKey, StateDigest, Welcome,
};

/// A cursor that is not at zero, so that a codec that forgets it is noticed.
pub const START: Cursor = Cursor { time: GuestTime(1_000), anchor: 50 };

/// One entry of every kind, in an order that [`START`] allows.
pub fn entries() -> Vec<Entry> {
    let event = |anchor, event| Entry::Event { anchor, event };
    vec![
        Entry::Clock { unlogged: 0, now: GuestTime(1_000) },
        Entry::Clock { unlogged: 0, now: GuestTime(1_063) },
        Entry::Clock { unlogged: 6, now: GuestTime(9_254) },
        event(50, Event::Tick { now: GuestTime(9_254) }),
        event(53, Event::Tick { now: GuestTime(45_049) }),
        event(54, Event::Frame { data: vec![0xde, 0xad] }),
        event(565, Event::DiskDone { id: 300, status: DiskStatus::Ok, data: vec![7; 3] }),
        event(565, Event::DiskDone { id: 301, status: DiskStatus::IoError, data: vec![] }),
        event(566, Event::Console { data: b"ls\n".to_vec() }),
        event(567, Event::Entropy { data: vec![1, 2, 3, 4] }),
        event(568, Event::PowerButton),
        Entry::Check { anchor: 1_024, digest: 0x1234_5678 },
        Entry::Clock { unlogged: 300, now: GuestTime(45_050) },
        Entry::Stop { anchor: 1_025, position: Position::Checkpoint },
        Entry::Stop { anchor: 1_026, position: counted(300, 5) },
        Entry::Stop { anchor: 1_028, position: counted(1, 4) },
        Entry::End { anchor: 2_000, digest: StateDigest { registers: 1, memory: 2, devices: 3 } },
    ]
}

/// A position whose RCX is `rcx` and whose RIP is always the same.
pub fn counted(branches: u64, rcx: u64) -> Position {
    let mut registers = [0; REGISTERS.len()];
    (registers[2], registers[16]) = (rcx, 0x1_0000);
    Position::Counted(Box::new(Counted { branches, registers }))
}

/// One message of every kind.
pub fn messages() -> Vec<Message> {
    vec![
        Message::Hello(hello()),
        Message::Hello(Hello { disk: None, ..hello() }),
        Message::Hello(Hello { disk: Some(HelloDisk { len_bytes: 1 << 30, image: None }), ..hello() }),
        Message::Hello(with_mark(Err("No".into()))),
        Message::Welcome(Welcome {
            view: 7,
            guest_name: "web".into(),
            memory_bytes: 256 << 20,
            config_digest: 0x1111_2222_3333_4444,
            cpuid_digest: 0x5555_6666_7777_8888,
            host_name: "alpha".into(),
        }),
        Message::Refuse { refusal: Refusal::Busy, reason: "No".into() },
        Message::Snapshot(b"piece".to_vec()),
        Message::SnapshotEnd,
        Message::Batch(Batch {
            view: 7,
            seq: 300,
            start: None,
            reached: 70_000,
            released: 298,
            entries: vec![0x7e, 0xfe, 0x7f],
        }),
        Message::Batch(Batch {
            view: 7,
            seq: 1,
            start: Some(66),
            reached: 70,
            released: 0,
            entries: vec![0x02],
        }),
        Message::Ack(Ack { received: 300, executed: 69_999, executed_time: GuestTime(45_049) }),
        Message::Bye { reason: ByeReason::Diverged, text: "registers".into() },
        Message::Checkpoint(b"piece".to_vec()),
        Message::Bye { reason: ByeReason::Dismissed, text: String::new() },
    ]
}

pub fn hello() -> Hello {
    with_mark(Ok(*b"a mark beside it"))
}

/// What a backup says that has left this mark beside its image.
pub fn with_mark(mark: Result<[u8; 16], String>) -> Hello {
    let image = HelloImage { path: "/d.img".into(), owner: b"web".to_vec(), mark };
    Hello {
        monitor_version: "0.1.0".into(),
        cpu: CpuIdentity { vendor: *b"AuthenticAMD", family: 0x17, model: 0x31, stepping: 2 },
        guest_name: "web".into(),
        disk: Some(HelloDisk { len_bytes: 1 << 30, image: Some(image) }),
        claims_id: *b"0123456789abcdef",
        life: *b"fedcba9876543210",
        host_name: "beta".into(),
        timeout_ms: 500,
        has_network: true,
        positions: PositionSource::Pmu,
        listen_port: 7_700,
    }
}

pub const HEARTBEAT: Heartbeat =
    Heartbeat { view: 7, counter: 513, guest: 0x0102_0304_0506_0708, role: Role::Backup };

pub const INVITATION: Invitation = Invitation { view: 7, guest: 0x0102_0304_0506_0708, port: 7_700 };

pub const PROBE: Probe = Probe { guest: 0x0102_0304_0506_0708, number: 513, kind: ProbeKind::Answer };

/// The secret whose bytes are 0 to 31.
pub fn key() -> Key {
    Key::new(std::array::from_fn(|index| index as u8))
}

/// A key of its.
pub fn seal_key() -> SealKey {
    key().seal_key("heartbeat", &[b"connection", b"web"])
}

/// Another of its.
pub fn invitation_key() -> SealKey {
    key().seal_key("invitation", &[])
}

/// A third.
pub fn probe_key() -> SealKey {
    key().seal_key("probe", &[])
}

/// Bytes without a pattern that a compressor could use (xorshift64).
pub fn incompressible(len_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..len_bytes).map(|_| next()).collect()
}
