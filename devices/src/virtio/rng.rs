//! The entropy device.
//!
//! Owns: the one request for random bytes that is under way. Must never: make up bytes itself; they are
//! asked for as [`Effect::Entropy`] and come in as an event.
//!
//! Follows virtio 1.2 section 5.4. Requests are served one after the other. A request that a reset of the
//! device overtook still gets its bytes, which then go nowhere.
//!
//! ```text
//! Idle -> Waiting for the driver -> Idle
//!              └─ reset ─> Waiting for nobody -> Idle
//! ```

use super::mmio::Backend;
use super::queue::{Broken, Buffers, Ring};
use crate::schema::{Decoder, Encoder};
use crate::{DeviceError, Effect, GuestRam};
use ft_log::MAX_ENTROPY_BYTES;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::Queue;

/// Where the bytes go.
struct Target {
    head: u16,
    buffers: Buffers,
}

struct Request {
    len_bytes: usize,
    /// `None` once the driver has reset the device.
    target: Option<Target>,
}

/// The device.
pub(crate) struct Rng {
    request: Option<Request>,
}

impl Rng {
    pub(crate) fn new() -> Self {
        Self { request: None }
    }

    /// Bytes asked for and not delivered.
    pub(crate) fn outstanding_bytes(&self) -> Option<usize> {
        self.request.as_ref().map(|request| request.len_bytes)
    }

    /// The bytes that were asked for have come; the caller has checked their number.
    pub(crate) fn deliver(
        &mut self,
        queues: Option<&mut [Queue]>,
        ram: &GuestRam,
        data: &[u8],
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        let target = self.request.take().and_then(|request| request.target);
        let Some(queues) = queues else { return Ok(false) };
        let mut ring = Ring::new(&mut queues[0], ram);
        if let Some(target) = target.filter(|_| ring.is_ready()) {
            target.buffers.write(ram, 0, data)?;
            ring.push_used(target.head, data.len())?;
        }
        self.take_next(&mut ring, effects)?;
        ring.finish()
    }

    fn take_next(&mut self, ring: &mut Ring<'_>, effects: &mut Vec<Effect>) -> Result<(), Broken> {
        while self.request.is_none() {
            let Some(chain) = ring.next()? else { break };
            let len_bytes = chain.writable.len_bytes().min(MAX_ENTROPY_BYTES);
            if len_bytes == 0 {
                ring.push_used(chain.head, 0)?;
                continue;
            }
            let target = Some(Target { head: chain.head, buffers: chain.writable });
            self.request = Some(Request { len_bytes, target });
            effects.push(Effect::Entropy { len_bytes });
        }
        Ok(())
    }
}

impl Backend for Rng {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
    const DEVICE_ID: u32 = VIRTIO_ID_RNG;
    const QUEUES: usize = 1;

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken> {
        let mut ring = Ring::new(&mut queues[index], ram);
        self.take_next(&mut ring, effects)?;
        ring.finish()
    }

    fn reset(&mut self) {
        if let Some(request) = &mut self.request {
            request.target = None;
        }
    }

    fn save(&self, out: &mut Encoder) {
        out.option(self.request.as_ref(), |out, request| {
            out.count(request.len_bytes);
            out.option(request.target.as_ref(), |out, target| {
                out.u16(target.head);
                target.buffers.save(out);
            });
        });
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.request = input.option("request", |input, field| {
            let len_bytes = input.count(field, MAX_ENTROPY_BYTES)?;
            let target = input.option("target", |input, field| {
                Ok(Target { head: input.u16(field)?, buffers: Buffers::load(input, field)? })
            })?;
            Ok(Request { len_bytes, target })
        })?;
        Ok(())
    }
}
