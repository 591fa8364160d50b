//! Glue over the `virtio-queue` crate: descriptor chains as checked lists of buffers.
//!
//! Owns: [`Chain`], [`Ring`] and how a queue is saved. Must never: let a chain through whose buffers are not
//! all in guest memory, or run longer than the queue is.
//!
//! Follows virtio 1.2 section 2.7 (split virtqueues). A driver that breaks the rules of the ring is answered
//! with [`Broken`], and the transport then asks it to reset the device (section 2.1.2).

use crate::schema::{Decoder, Encoder};
use crate::{DeviceError, GuestRam};
use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

/// Largest number of descriptors in a queue.
pub(crate) const QUEUE_MAX_SIZE: u16 = 256;

/// The driver broke the rules of the ring; the device must be reset.
#[derive(Debug)]
pub(crate) struct Broken;

impl From<Error> for Broken {
    fn from(_: Error) -> Self {
        Broken
    }
}

impl From<vm_memory::GuestMemoryError> for Broken {
    fn from(_: vm_memory::GuestMemoryError) -> Self {
        Broken
    }
}

/// A buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) gpa: u64,
    pub(crate) len_bytes: u32,
}

/// Buffers that are used as if they were one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Buffers(Vec<Segment>);

impl Buffers {
    pub(crate) fn len_bytes(&self) -> usize {
        self.0.iter().map(|segment| segment.len_bytes as usize).sum()
    }

    /// Copies `data.len()` bytes from `offset_bytes` on. The caller has checked the length.
    pub(crate) fn read(&self, ram: &GuestRam, offset_bytes: usize, data: &mut [u8]) -> Result<(), Broken> {
        let mut done = 0;
        for (gpa, len_bytes) in self.pieces(offset_bytes, data.len()) {
            ram.read_slice(&mut data[done..done + len_bytes], gpa)?;
            done += len_bytes;
        }
        if done == data.len() { Ok(()) } else { Err(Broken) }
    }

    /// Copies `data` to `offset_bytes`. The caller has checked the length.
    pub(crate) fn write(&self, ram: &GuestRam, offset_bytes: usize, data: &[u8]) -> Result<(), Broken> {
        let mut done = 0;
        for (gpa, len_bytes) in self.pieces(offset_bytes, data.len()) {
            ram.write_slice(&data[done..done + len_bytes], gpa)?;
            done += len_bytes;
        }
        if done == data.len() { Ok(()) } else { Err(Broken) }
    }

    /// The parts of the segments that hold `len_bytes` from `offset_bytes` on.
    fn pieces(&self, offset_bytes: usize, len_bytes: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let (mut skip, mut left) = (offset_bytes, len_bytes);
        self.0.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len_bytes as usize);
            skip -= skipped;
            let taken = left.min(segment.len_bytes as usize - skipped);
            left -= taken;
            (taken > 0).then_some((GuestAddress(segment.gpa + skipped as u64), taken))
        })
    }

    pub(crate) fn save(&self, out: &mut Encoder) {
        out.count(self.0.len());
        for segment in &self.0 {
            out.u64(segment.gpa);
            out.u32(segment.len_bytes);
        }
    }

    pub(crate) fn load(input: &mut Decoder<'_>, field: &'static str) -> Result<Self, DeviceError> {
        let count = input.count(field, QUEUE_MAX_SIZE.into())?;
        let segments = (0..count).map(|_| {
            let gpa = input.u64(field)?;
            let len_bytes = input.u32(field)?;
            input.check(field, gpa, gpa.checked_add(len_bytes.into()).is_some())?;
            Ok(Segment { gpa, len_bytes })
        });
        segments.collect::<Result<_, _>>().map(Self)
    }
}

/// One descriptor chain: what the device reads, then what it writes.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Buffers,
    pub(crate) writable: Buffers,
}

/// A queue while its available chains are handled.
pub(crate) struct Ring<'a> {
    queue: &'a mut Queue,
    ram: &'a GuestRam,
    /// Chains that a driver keeping to the rules can still have made available.
    budget: u16,
    used: bool,
}

impl<'a> Ring<'a> {
    pub(crate) fn new(queue: &'a mut Queue, ram: &'a GuestRam) -> Self {
        let budget = queue.size();
        Self { queue, ram, budget, used: false }
    }

    /// Whether the driver can see the ring.
    pub(crate) fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// The next available chain. With `None` the driver will notify when it adds one.
    pub(crate) fn next(&mut self) -> Result<Option<Chain>, Broken> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let Some(descriptors) = self.queue.iter(self.ram)?.next() else {
            // The vCPU stands still, so a ring that grows now overlaps something the device writes.
            return if self.queue.enable_notification(self.ram)? { Err(Broken) } else { Ok(None) };
        };
        self.budget = self.budget.checked_sub(1).ok_or(Broken)?;
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut complete = false;
        for descriptor in descriptors {
            let gpa = descriptor.addr();
            let writes = descriptor.is_write_only();
            let misplaced = !writes && !chain.writable.0.is_empty();
            if misplaced || !self.ram.check_range(gpa, descriptor.len() as usize) {
                return Err(Broken);
            }
            let buffers = if writes { &mut chain.writable } else { &mut chain.readable };
            if buffers.0.len() >= QUEUE_MAX_SIZE.into() {
                return Err(Broken);
            }
            buffers.0.push(Segment { gpa: gpa.0, len_bytes: descriptor.len() });
            complete = !descriptor.has_next();
        }
        if complete { Ok(Some(chain)) } else { Err(Broken) }
    }

    /// Puts the chain that `next` gave last back.
    pub(crate) fn put_back(&mut self) {
        self.queue.go_to_previous_position();
        self.budget += 1;
    }

    /// Gives a chain back to the driver with the number of bytes written to it.
    pub(crate) fn push_used(&mut self, head: u16, written_bytes: usize) -> Result<(), Broken> {
        self.queue.add_used(self.ram, head, written_bytes as u32)?;
        self.used = true;
        Ok(())
    }

    /// Whether the driver wants an interrupt for what was given back.
    pub(crate) fn finish(self) -> Result<bool, Broken> {
        Ok(self.used && self.queue.needs_notification(self.ram)?)
    }
}

/// Saves a queue between two accesses, when no used buffer waits for its notification.
pub(crate) fn save(queue: &Queue, out: &mut Encoder) {
    let state = queue.state();
    out.u16(state.size);
    out.bool(state.ready);
    out.bool(state.event_idx_enabled);
    out.u16(state.next_avail);
    out.u16(state.next_used);
    out.u64(state.desc_table);
    out.u64(state.avail_ring);
    out.u64(state.used_ring);
}

/// The inverse of [`save`].
pub(crate) fn load(input: &mut Decoder<'_>) -> Result<Queue, DeviceError> {
    let state = QueueState {
        max_size: QUEUE_MAX_SIZE,
        size: input.u16("queue size")?,
        ready: input.bool("queue ready")?,
        event_idx_enabled: input.bool("queue event_idx")?,
        next_avail: input.u16("queue next_avail")?,
        next_used: input.u16("queue next_used")?,
        desc_table: input.u64("queue descriptor table")?,
        avail_ring: input.u64("queue available ring")?,
        used_ring: input.u64("queue used ring")?,
    };
    let size = state.size;
    match Queue::try_from(state) {
        Ok(queue) => Ok(queue),
        Err(_) => input.check("queue", size.into(), false).map(|()| Queue::default()),
    }
}
