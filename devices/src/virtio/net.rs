//! The network card.
//!
//! Owns: frames that arrived and found no receive buffer, and counts of dropped frames. Must never: know a
//! link; sent frames are [`Effect::Frame`], received ones come in as events.
//!
//! Follows virtio 1.2 section 5.1 with the MAC feature only: no offloads, one receive and one transmit
//! queue. A sent frame is used up at once. At most [`PENDING_MAX_FRAMES`] received frames wait for buffers;
//! what arrives beyond that, without a driver, or does not fit its buffer, is dropped and counted.

use super::mmio::Backend;
use super::queue::{Broken, Ring};
use crate::schema::{Decoder, Encoder};
use crate::{DeviceError, Effect, GuestRam};
use ft_log::MAX_FRAME_BYTES;
use std::collections::VecDeque;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;
use virtio_queue::Queue;

/// Most received frames that wait for buffers.
const PENDING_MAX_FRAMES: usize = 256;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// `struct virtio_net_hdr_v1` (section 5.1.6): all zero but `num_buffers`, its last field, which is 1.
const HEADER_BYTES: usize = 12;
const RECEIVE_HEADER: [u8; HEADER_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// Destination, source and type: nothing shorter is a frame.
const FRAME_MIN_BYTES: usize = 14;

/// The card.
pub(crate) struct Net {
    mac: [u8; 6],
    pending: VecDeque<Vec<u8>>,
    dropped_received: u64,
    dropped_sent: u64,
}

impl Net {
    pub(crate) fn new(mac: [u8; 6]) -> Self {
        Self { mac, pending: VecDeque::new(), dropped_received: 0, dropped_sent: 0 }
    }

    /// A frame arrived; `queues` is `None` while no driver is ready.
    pub(crate) fn receive(
        &mut self,
        queues: Option<&mut [Queue]>,
        ram: &GuestRam,
        frame: &[u8],
    ) -> Result<bool, Broken> {
        let Some(queues) = queues.filter(|_| self.pending.len() < PENDING_MAX_FRAMES) else {
            self.dropped_received += 1;
            return Ok(false);
        };
        self.pending.push_back(frame.to_vec());
        self.deliver(&mut queues[RECEIVE], ram)
    }

    fn deliver(&mut self, queue: &mut Queue, ram: &GuestRam) -> Result<bool, Broken> {
        let mut ring = Ring::new(queue, ram);
        while let Some(frame) = self.pending.front() {
            let Some(chain) = ring.next()? else { break };
            let total_bytes = HEADER_BYTES + frame.len();
            if chain.writable.len_bytes() < total_bytes {
                ring.put_back();
                self.dropped_received += 1;
            } else {
                chain.writable.write(ram, 0, &RECEIVE_HEADER)?;
                chain.writable.write(ram, HEADER_BYTES, frame)?;
                ring.push_used(chain.head, total_bytes)?;
            }
            self.pending.pop_front();
        }
        ring.finish()
    }

    fn transmit(
        &mut self,
        queue: &mut Queue,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        let mut ring = Ring::new(queue, ram);
        while let Some(chain) = ring.next()? {
            let frame_bytes = chain.readable.len_bytes().saturating_sub(HEADER_BYTES);
            if (FRAME_MIN_BYTES..=MAX_FRAME_BYTES).contains(&frame_bytes) {
                let mut frame = vec![0; frame_bytes];
                chain.readable.read(ram, HEADER_BYTES, &mut frame)?;
                effects.push(Effect::Frame(frame));
            } else {
                self.dropped_sent += 1;
            }
            ring.push_used(chain.head, 0)?;
        }
        ring.finish()
    }
}

impl Backend for Net {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 1;
    const DEVICE_ID: u32 = VIRTIO_ID_NET;
    const QUEUES: usize = 2;

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
    }

    fn config(&self) -> Vec<u8> {
        self.mac.to_vec()
    }

    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        match index {
            TRANSMIT => self.transmit(&mut queues[TRANSMIT], ram, effects),
            _ => self.deliver(&mut queues[RECEIVE], ram),
        }
    }

    fn reset(&mut self) {
        self.dropped_received += self.pending.len() as u64;
        self.pending.clear();
    }

    fn save(&self, out: &mut Encoder) {
        out.count(self.pending.len());
        for frame in &self.pending {
            out.bytes(frame);
        }
        out.u64(self.dropped_received);
        out.u64(self.dropped_sent);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        let count = input.count("pending", PENDING_MAX_FRAMES)?;
        let frames = (0..count).map(|_| input.bytes("pending frame", MAX_FRAME_BYTES).map(<[u8]>::to_vec));
        self.pending = frames.collect::<Result<_, _>>()?;
        self.dropped_received = input.u64("dropped_received")?;
        self.dropped_sent = input.u64("dropped_sent")?;
        Ok(())
    }
}
