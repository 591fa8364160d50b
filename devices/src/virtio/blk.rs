//! The disk.
//!
//! Owns: the requests that were handed out and not answered yet. Must never: do I/O, or change guest memory
//! for a read, write or flush before its completion event.
//!
//! Follows virtio 1.2 section 5.2. A request is checked against the disk's size, gets a rising id and goes
//! out as [`Effect::Disk`], with a copy of the data if it writes. Its completion writes the data read, the
//! status byte and the used ring. A request that a reset of the device overtook is still done and answered,
//! but its completion changes nothing. At most [`IN_FLIGHT_MAX`] requests and about
//! [`IN_FLIGHT_MAX_BYTES`] are out; further ones wait in the guest's ring.
//!
//! ```text
//! available -> checked -> answered at once (bad range, unknown type, device id)
//!                └─ in flight -> completed -> used
//!                        └─ reset ─> in flight for nobody -> completed
//! ```

use super::mmio::Backend;
use super::queue::{Broken, Buffers, Chain, QUEUE_MAX_SIZE, Ring};
use crate::schema::{Decoder, Encoder};
use crate::{BoardConfig, DeviceError, DiskOp, DiskRequest, Effect, GuestRam};
use ft_log::{DiskStatus, MAX_DISK_BYTES};
use std::collections::BTreeMap;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_ID_BYTES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::Queue;

const SECTOR_BYTES: u64 = 512;

/// Most requests that are handed out at a time.
const IN_FLIGHT_MAX: usize = QUEUE_MAX_SIZE as usize;
/// No more requests are handed out while those that are hold this many bytes.
const IN_FLIGHT_MAX_BYTES: usize = 64 << 20;

/// Most data buffers in a request, and the longest: together at most [`MAX_DISK_BYTES`].
const SEGMENTS_MAX: u32 = 126;
const SEGMENT_MAX_BYTES: u32 = 32 << 10;
const _: () = assert!(SEGMENTS_MAX as usize * SEGMENT_MAX_BYTES as usize <= MAX_DISK_BYTES);

/// `struct virtio_blk_req` (section 5.2.6): type, reserved, sector; data follows, then one status byte.
const HEADER_BYTES: usize = 16;

/// What the driver reads as the disk's serial number, padded with zeros.
const SERIAL: &[u8; VIRTIO_BLK_ID_BYTES as usize] = b"vmft-disk\0\0\0\0\0\0\0\0\0\0\0";

/// Where a completion goes: the last byte of the buffers is the status.
struct Target {
    head: u16,
    buffers: Buffers,
}

struct InFlight {
    op: DiskOp,
    /// `None` once the driver has reset the device.
    target: Option<Target>,
}

/// What to do with a request that was read from the ring.
enum Verdict {
    Submit(DiskOp),
    /// Status byte, and data that goes before it.
    Answer(u32, &'static [u8]),
}

/// The disk.
pub(crate) struct Blk {
    capacity_bytes: u64,
    read_only: bool,
    write_through: bool,
    next_id: u64,
    in_flight: BTreeMap<u64, InFlight>,
}

fn op_bytes(op: &DiskOp) -> usize {
    match op {
        DiskOp::Read { len_bytes, .. } => *len_bytes as usize,
        DiskOp::Write { data, .. } => data.len(),
        DiskOp::Flush => 0,
    }
}

impl Blk {
    /// A disk of `disk_bytes`, rounded down to whole sectors, that is what `config` says.
    pub(crate) fn new(disk_bytes: u64, config: &BoardConfig) -> Self {
        let capacity_bytes = disk_bytes - disk_bytes % SECTOR_BYTES;
        let (read_only, write_through) = (config.disk_read_only, config.disk_write_through);
        Self { capacity_bytes, read_only, write_through, next_id: 0, in_flight: BTreeMap::new() }
    }

    /// Requests handed out and not answered, in the order of their ids.
    pub(crate) fn outstanding(&self) -> Vec<DiskRequest> {
        self.in_flight.iter().map(|(id, request)| DiskRequest { id: *id, op: request.op.clone() }).collect()
    }

    /// Whether this completion belongs to an outstanding request.
    pub(crate) fn check_completion(
        &self,
        id: u64,
        status: DiskStatus,
        data: &[u8],
    ) -> Result<(), DeviceError> {
        let request = self.in_flight.get(&id).ok_or(DeviceError::UnknownDiskRequest { id })?;
        let expected = match (&request.op, status) {
            (DiskOp::Read { len_bytes, .. }, DiskStatus::Ok) => *len_bytes as usize,
            _ => 0,
        };
        if data.len() == expected {
            Ok(())
        } else {
            Err(DeviceError::DiskDataLength { id, expected, found: data.len() })
        }
    }

    /// Request `id` is done; the caller has checked the completion.
    pub(crate) fn complete(
        &mut self,
        queues: Option<&mut [Queue]>,
        ram: &GuestRam,
        (id, status, data): (u64, DiskStatus, &[u8]),
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        let target = self.in_flight.remove(&id).and_then(|request| request.target);
        let Some(queues) = queues else { return Ok(false) };
        let mut ring = Ring::new(&mut queues[0], ram);
        if let Some(target) = target.filter(|_| ring.is_ready()) {
            let status = match status {
                DiskStatus::Ok => VIRTIO_BLK_S_OK,
                DiskStatus::IoError => VIRTIO_BLK_S_IOERR,
            };
            answer(&mut ring, ram, target.head, &target.buffers, status, data)?;
        }
        self.submit_available(&mut ring, ram, effects)?;
        ring.finish()
    }

    fn has_room(&self) -> bool {
        let bytes: usize = self.in_flight.values().map(|request| op_bytes(&request.op)).sum();
        self.in_flight.len() < IN_FLIGHT_MAX && bytes < IN_FLIGHT_MAX_BYTES
    }

    fn submit_available(
        &mut self,
        ring: &mut Ring<'_>,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Broken> {
        while self.has_room() {
            let Some(chain) = ring.next()? else { break };
            if chain.readable.len_bytes() < HEADER_BYTES || chain.writable.len_bytes() == 0 {
                return Err(Broken); // there is nowhere to put a status
            }
            match self.check(&chain, ram)? {
                Verdict::Answer(status, data) => {
                    answer(ring, ram, chain.head, &chain.writable, status, data)?;
                }
                Verdict::Submit(op) => {
                    let id = self.next_id;
                    self.next_id += 1;
                    effects.push(Effect::Disk(DiskRequest { id, op: op.clone() }));
                    let target = Some(Target { head: chain.head, buffers: chain.writable });
                    self.in_flight.insert(id, InFlight { op, target });
                }
            }
        }
        Ok(())
    }

    fn check(&self, chain: &Chain, ram: &GuestRam) -> Result<Verdict, Broken> {
        let mut header = [0; HEADER_BYTES];
        chain.readable.read(ram, 0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let read_bytes = chain.writable.len_bytes() - 1;
        let written_bytes = chain.readable.len_bytes() - HEADER_BYTES;
        let verdict = match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => match self.offset_of(sector, read_bytes) {
                Some(offset_bytes) => {
                    Verdict::Submit(DiskOp::Read { offset_bytes, len_bytes: read_bytes as u32 })
                }
                None => Verdict::Answer(VIRTIO_BLK_S_IOERR, &[]),
            },
            VIRTIO_BLK_T_OUT => match self.offset_of(sector, written_bytes).filter(|_| !self.read_only) {
                Some(offset_bytes) => {
                    let mut data = vec![0; written_bytes];
                    chain.readable.read(ram, HEADER_BYTES, &mut data)?;
                    Verdict::Submit(DiskOp::Write { offset_bytes, data })
                }
                None => Verdict::Answer(VIRTIO_BLK_S_IOERR, &[]),
            },
            VIRTIO_BLK_T_FLUSH => Verdict::Submit(DiskOp::Flush),
            VIRTIO_BLK_T_GET_ID if read_bytes >= SERIAL.len() => Verdict::Answer(VIRTIO_BLK_S_OK, SERIAL),
            VIRTIO_BLK_T_GET_ID => Verdict::Answer(VIRTIO_BLK_S_IOERR, &[]),
            _ => Verdict::Answer(VIRTIO_BLK_S_UNSUPP, &[]),
        };
        Ok(verdict)
    }

    /// Where `sector` is, if `len_bytes` from there on are whole sectors inside the disk.
    fn offset_of(&self, sector: u64, len_bytes: usize) -> Option<u64> {
        let offset_bytes = sector.checked_mul(SECTOR_BYTES)?;
        let end = offset_bytes.checked_add(len_bytes as u64)?;
        let whole = len_bytes > 0 && (len_bytes as u64).is_multiple_of(SECTOR_BYTES);
        (whole && len_bytes <= MAX_DISK_BYTES && end <= self.capacity_bytes).then_some(offset_bytes)
    }
}

/// Writes data and status and gives the chain back.
fn answer(
    ring: &mut Ring<'_>,
    ram: &GuestRam,
    head: u16,
    buffers: &Buffers,
    status: u32,
    data: &[u8],
) -> Result<(), Broken> {
    let status_at = buffers.len_bytes().checked_sub(1).ok_or(Broken)?;
    buffers.write(ram, 0, data)?;
    buffers.write(ram, status_at, &[status as u8])?;
    // The used length counts what was written without a gap from the start (section 2.7.8.2).
    let written_bytes = if data.len() == status_at { data.len() + 1 } else { data.len() };
    ring.push_used(head, written_bytes)
}

impl Backend for Blk {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
    const DEVICE_ID: u32 = VIRTIO_ID_BLOCK;
    const QUEUES: usize = 1;

    /// Without `VIRTIO_BLK_F_FLUSH` a driver takes the disk for one that writes through (section 5.2.6.2), and sends
    /// no flushes; one that comes all the same is passed on.
    fn features(&self) -> u64 {
        let read_only = if self.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
        let flush = if self.write_through { 0 } else { 1 << VIRTIO_BLK_F_FLUSH };
        1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX | flush | read_only
    }

    /// Capacity in sectors, `size_max`, `seg_max` (section 5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = (self.capacity_bytes / SECTOR_BYTES).to_le_bytes().to_vec();
        config.extend(SEGMENT_MAX_BYTES.to_le_bytes());
        config.extend(SEGMENTS_MAX.to_le_bytes());
        config
    }

    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        let mut ring = Ring::new(&mut queues[index], ram);
        self.submit_available(&mut ring, ram, effects)?;
        ring.finish()
    }

    fn reset(&mut self) {
        for request in self.in_flight.values_mut() {
            request.target = None;
        }
    }

    fn save(&self, out: &mut Encoder) {
        out.u64(self.next_id);
        out.count(self.in_flight.len());
        for (id, request) in &self.in_flight {
            out.u64(*id);
            save_op(&request.op, out);
            out.option(request.target.as_ref(), |out, target| {
                out.u16(target.head);
                target.buffers.save(out);
            });
        }
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.next_id = input.u64("next_id")?;
        for _ in 0..input.count("in_flight", IN_FLIGHT_MAX)? {
            let id = input.u64("request id")?;
            let rising = self.in_flight.last_key_value().is_none_or(|(last, _)| *last < id);
            input.check("request id", id, rising && id < self.next_id)?;
            let op = load_op(input)?;
            let target = input.option("target", |input, field| {
                Ok(Target { head: input.u16(field)?, buffers: Buffers::load(input, field)? })
            })?;
            self.in_flight.insert(id, InFlight { op, target });
        }
        Ok(())
    }
}

/// Tags of a saved operation; 0 is invalid.
const OP_READ: u8 = 1;
const OP_WRITE: u8 = 2;
const OP_FLUSH: u8 = 3;

fn save_op(op: &DiskOp, out: &mut Encoder) {
    match op {
        DiskOp::Read { offset_bytes, len_bytes } => {
            out.u8(OP_READ);
            out.u64(*offset_bytes);
            out.u32(*len_bytes);
        }
        DiskOp::Write { offset_bytes, data } => {
            out.u8(OP_WRITE);
            out.u64(*offset_bytes);
            out.bytes(data);
        }
        DiskOp::Flush => out.u8(OP_FLUSH),
    }
}

fn load_op(input: &mut Decoder<'_>) -> Result<DiskOp, DeviceError> {
    match input.u8("operation")? {
        OP_READ => {
            let offset_bytes = input.u64("read offset")?;
            Ok(DiskOp::Read { offset_bytes, len_bytes: input.count("read length", MAX_DISK_BYTES)? as u32 })
        }
        OP_WRITE => {
            let offset_bytes = input.u64("write offset")?;
            Ok(DiskOp::Write { offset_bytes, data: input.bytes("write data", MAX_DISK_BYTES)?.to_vec() })
        }
        OP_FLUSH => Ok(DiskOp::Flush),
        other => input.check("operation", other.into(), false).map(|()| DiskOp::Flush),
    }
}
