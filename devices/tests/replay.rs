//! What the whole design rests on: the same accesses and events give the same board.
//!
//! Streams of random accesses, events and changes of guest memory (random descriptors and raw bytes in the
//! rings among them) run on two boards. Values read, effects, errors, interrupts, final state and final guest
//! memory must be equal, also if one board is saved and loaded again on the way. Nothing may panic.

mod common;

use common::*;
use devices::{Board, DeviceError, Effect, VirtioKind};
use ft_log::{DiskStatus, Event, GuestTime};
use proptest::prelude::*;

const KINDS: [VirtioKind; 3] = [VirtioKind::Net, VirtioKind::Blk, VirtioKind::Rng];

#[derive(Clone, Debug)]
enum Step {
    PioRead {
        port: u16,
        width: usize,
    },
    PioWrite {
        port: u16,
        width: usize,
        value: u32,
    },
    MmioRead {
        gpa: u64,
        width: usize,
    },
    MmioWrite {
        gpa: u64,
        width: usize,
        value: u64,
    },
    Advance {
        by: u64,
    },
    Acknowledge,
    Tsc,
    Frame {
        fill: u8,
        len_bytes: usize,
    },
    DiskDone {
        pick: usize,
        fail: bool,
        fill: u8,
    },
    BogusDiskDone {
        id: u64,
        len_bytes: usize,
    },
    Console {
        data: Vec<u8>,
    },
    Entropy {
        fill: u8,
        off_by: usize,
    },
    PowerButton,
    /// The driver starts a device anew.
    Start {
        device: usize,
        event_idx: bool,
    },
    /// The driver writes a descriptor, good or bad.
    Descriptor {
        queue: usize,
        at: u16,
        gpa: u64,
        len_bytes: u32,
        flags: u16,
        next: u16,
    },
    /// The driver offers a chain and notifies.
    Offer {
        queue: usize,
        head: u16,
    },
    /// The driver makes a disk request as it should.
    DiskRequest {
        op: u32,
        sector: u64,
        data_bytes: u32,
    },
    /// Bytes anywhere in guest memory, most often in a ring.
    Poke {
        gpa: u64,
        data: Vec<u8>,
    },
}

/// Everything that a guest or the monitor can see of a run.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Value(u64),
    Effects(Vec<Effect>),
    Applied(Result<(), DeviceError>),
    State { interrupt: bool, deadline: Option<GuestTime>, entropy: Option<usize>, requests: usize },
}

struct Run {
    guest: Guest,
    queues: Vec<Queue>,
    seen: Vec<Seen>,
}

impl Run {
    fn new(board: Board) -> Self {
        let queues = [(VirtioKind::Net, 0), (VirtioKind::Net, 1), (VirtioKind::Blk, 0), (VirtioKind::Rng, 0)];
        let queues = queues.map(|(kind, index)| Queue::new(kind, index)).into();
        let mut guest = Guest::new(config());
        guest.board = board;
        Self { guest, queues, seen: Vec::new() }
    }

    fn apply(&mut self, event: Event) {
        let result = self.guest.apply(event);
        self.seen.push(Seen::Applied(result));
    }

    fn offer(&mut self, queue: usize, head: u16) {
        self.queues[queue].offer(&self.guest, head);
        self.queues[queue].notify(&mut self.guest);
    }

    fn access(&mut self, step: &Step) {
        let guest = &mut self.guest;
        let mut data = [0; 8];
        match step {
            Step::PioRead { port, width } => {
                guest.board.pio_read(*port, &mut data[..*width], &mut guest.effects);
            }
            Step::PioWrite { port, width, value } => {
                guest.board.pio_write(*port, &value.to_le_bytes()[..*width], &mut guest.effects);
            }
            Step::MmioRead { gpa, width } => guest.board.mmio_read(*gpa, &mut data[..*width]),
            Step::MmioWrite { gpa, width, value } => {
                let value = value.to_le_bytes();
                guest.board.mmio_write(&guest.ram, *gpa, &value[..*width], &mut guest.effects);
            }
            Step::Acknowledge => data[0] = guest.board.acknowledge_interrupt(),
            _ => data = guest.board.tsc().to_le_bytes(),
        }
        self.seen.push(Seen::Value(u64::from_le_bytes(data)));
    }

    fn step(&mut self, step: &Step) {
        match step.clone() {
            Step::Advance { by } => {
                let now = GuestTime(self.guest.board.now().0.saturating_add(by));
                self.apply(Event::Tick { now });
            }
            Step::Frame { fill, len_bytes } => self.apply(Event::Frame { data: vec![fill; len_bytes] }),
            Step::DiskDone { pick, fail, fill } => {
                let requests = self.guest.board.outstanding_disk_requests();
                let Some(request) = requests.get(pick % requests.len().max(1)) else { return };
                let status = if fail { DiskStatus::IoError } else { DiskStatus::Ok };
                let len_bytes = match request.op {
                    devices::DiskOp::Read { len_bytes, .. } if !fail => len_bytes as usize,
                    _ => 0,
                };
                self.apply(Event::DiskDone { id: request.id, status, data: vec![fill; len_bytes] });
            }
            Step::BogusDiskDone { id, len_bytes } => {
                self.apply(Event::DiskDone { id, status: DiskStatus::Ok, data: vec![0; len_bytes] });
            }
            Step::Console { data } => self.apply(Event::Console { data }),
            Step::Entropy { fill, off_by } => {
                let len_bytes = self.guest.board.outstanding_entropy().unwrap_or(0) + off_by;
                self.apply(Event::Entropy { data: vec![fill; len_bytes] });
            }
            Step::PowerButton => self.apply(Event::PowerButton),
            Step::Start { device, event_idx } => {
                let features = F_VERSION_1 | if event_idx { F_EVENT_IDX } else { 0 };
                let kind = KINDS[device];
                let started = self.guest.start(kind, features);
                let of_kind = self.queues.iter_mut().filter(|queue| queue.kind == kind);
                for (queue, fresh) in of_kind.zip(started) {
                    *queue = fresh;
                }
            }
            Step::Descriptor { queue, at, gpa, len_bytes, flags, next } => {
                self.queues[queue].put_descriptor(&self.guest, at, gpa, len_bytes, flags, next);
            }
            Step::Offer { queue, head } => self.offer(queue, head),
            Step::DiskRequest { op, sector, data_bytes } => {
                let header = [op.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
                self.guest.poke(0x8000, &header);
                let flags = if op == 1 { 0 } else { WRITE };
                let buffers = [(0x8000, 16, 0), (0x9000, data_bytes, flags), (0x8800, 1, WRITE)];
                self.queues[2].add(&self.guest, &buffers);
                self.queues[2].notify(&mut self.guest);
            }
            Step::Poke { gpa, data } => self.guest.poke(gpa, &data),
            access => self.access(&access),
        }
    }

    /// Runs all steps; with `reload_every`, the board is saved and loaded after that many.
    fn run(mut self, steps: &[Step], reload_every: Option<usize>) -> (Vec<Seen>, u64, Vec<u8>) {
        for device in 0..KINDS.len() {
            self.step(&Step::Start { device, event_idx: true });
        }
        for (number, step) in steps.iter().enumerate() {
            self.step(step);
            if reload_every.is_some_and(|every| number % every == 0) {
                self.guest.reload();
            }
            let effects = self.guest.take_effects();
            self.seen.push(Seen::Effects(effects));
            let board = &self.guest.board;
            self.seen.push(Seen::State {
                interrupt: board.interrupt_pending(),
                deadline: board.deadline(),
                entropy: board.outstanding_entropy(),
                requests: board.outstanding_disk_requests().len(),
            });
        }
        let memory = self.guest.peek(0, RAM_BYTES as usize);
        (self.seen, self.guest.board.digest(), memory)
    }
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        8 => prop::sample::select(vec![
            0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0x60, 0x64, 0x70, 0x71, 0xcf9,
        ]),
        4 => 0x3f8_u16..0x400,
        4 => 0x600_u16..0x60c,
        1 => any::<u16>(),
    ]
}

fn register() -> impl Strategy<Value = u64> {
    let known = vec![
        0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0xa0, 0x100,
    ];
    let offset = prop_oneof![4 => prop::sample::select(known), 1 => 0_u64..0x1000];
    let known_window = (0_u64..4, offset).prop_map(|(window, offset)| 0xd000_0000 + 0x1000 * window + offset);
    prop_oneof![8 => known_window, 1 => any::<u64>()]
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 0_u64..16, 2 => 0_u64..256, 1 => any::<u64>()]
}

fn buffer() -> impl Strategy<Value = (u64, u32)> {
    let inside = (0_u64..RAM_BYTES, 0_u32..2048);
    let in_a_ring = (0x1000_u64..0x5000, 0_u32..64);
    prop_oneof![6 => inside, 2 => in_a_ring, 1 => any::<(u64, u32)>()]
}

fn access() -> impl Strategy<Value = Step> {
    let width = || prop::sample::select(vec![1_usize, 2, 4]);
    let wide = || prop::sample::select(vec![1_usize, 2, 4, 4, 4, 4, 8]);
    prop_oneof![
        2 => (port(), width()).prop_map(|(port, width)| Step::PioRead { port, width }),
        4 => (port(), width(), value())
            .prop_map(|(port, width, value)| Step::PioWrite { port, width, value: value as u32 }),
        1 => (register(), wide()).prop_map(|(gpa, width)| Step::MmioRead { gpa, width }),
        2 => (register(), wide(), value())
            .prop_map(|(gpa, width, value)| Step::MmioWrite { gpa, width, value }),
        1 => Just(Step::Acknowledge),
        1 => Just(Step::Tsc),
    ]
}

fn event() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => prop_oneof![6 => 0_u64..100_000, 1 => any::<u64>()].prop_map(|by| Step::Advance { by }),
        4 => (any::<u8>(), 0_usize..2_000).prop_map(|(fill, len_bytes)| Step::Frame { fill, len_bytes }),
        6 => (any::<usize>(), any::<bool>(), any::<u8>())
            .prop_map(|(pick, fail, fill)| Step::DiskDone { pick, fail, fill }),
        1 => (0_u64..8, 0_usize..600).prop_map(|(id, len_bytes)| Step::BogusDiskDone { id, len_bytes }),
        1 => prop::collection::vec(any::<u8>(), 0..40).prop_map(|data| Step::Console { data }),
        3 => (any::<u8>(), prop::sample::select(vec![0, 0, 0, 1]))
            .prop_map(|(fill, off_by)| Step::Entropy { fill, off_by }),
        1 => Just(Step::PowerButton),
    ]
}

fn driver() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![8 => 0_u16..4, 1 => 0_u16..8];
    prop_oneof![
        1 => (0_usize..3, any::<bool>()).prop_map(|(device, event_idx)| Step::Start { device, event_idx }),
        8 => (0_usize..4, 0_u16..16, buffer(), flags, 0_u16..17).prop_map(
            |(queue, at, (gpa, len_bytes), flags, next)| Step::Descriptor {
                queue, at, gpa, len_bytes, flags, next
            }
        ),
        8 => (0_usize..4, 0_u16..17).prop_map(|(queue, head)| Step::Offer { queue, head }),
        6 => (0_u32..12, 0_u64..2_100, prop::sample::select(vec![0, 512, 512, 1024, 20, 513]))
            .prop_map(|(op, sector, data_bytes)| Step::DiskRequest { op, sector, data_bytes }),
        2 => (0x1000_u64..0x5000, prop::collection::vec(any::<u8>(), 1..8))
            .prop_map(|(gpa, data)| Step::Poke { gpa, data }),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    prop::collection::vec(prop_oneof![2 => access(), 2 => event(), 3 => driver()], 1..150)
}

fn new_run() -> Run {
    Run::new(Board::new(&config()))
}

proptest! {
    #[test]
    fn same_stream_gives_the_same_board_effects_and_memory(steps in steps()) {
        let first = new_run().run(&steps, None);
        let second = new_run().run(&steps, None);
        prop_assert!(first == second);
    }

    #[test]
    fn saving_and_loading_in_between_changes_nothing(steps in steps(), reload_every in 1_usize..20) {
        let straight = new_run().run(&steps, None);
        let reloaded = new_run().run(&steps, Some(reload_every));
        prop_assert_eq!(straight.0, reloaded.0);
        prop_assert_eq!(straight.1, reloaded.1);
        prop_assert!(straight.2 == reloaded.2, "guest memory differs");
    }

    #[test]
    fn damaged_state_is_refused_or_runs_without_panic(
        before in steps(),
        after in steps(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut run = new_run();
        for step in &before {
            run.step(step);
        }
        let mut payloads = run.guest.board.save();
        for (payload, byte, value) in damage {
            let payload = payload.index(payloads.len());
            let bytes = &mut payloads[payload].bytes;
            *byte.get_mut(bytes) = value;
        }
        if let Ok(board) = Board::load(&config(), &payloads) {
            prop_assert_eq!(&board.save(), &payloads, "what was loaded is what is saved");
            run.guest.board = board;
            for step in &after {
                run.step(step);
            }
        }
    }
}
