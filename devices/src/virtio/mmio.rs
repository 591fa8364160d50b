//! The virtio transport over memory-mapped registers, version 2.
//!
//! Owns: feature negotiation, device status, queue set-up and the interrupt of one device, whose own part
//! is a [`Backend`]. Must never: run a queue before the driver is ready or after it broke the rules.
//!
//! Follows virtio 1.2 section 4.2 (registers) and 3.1 (device initialisation). Registers are 32 bits wide
//! and aligned; other accesses read 0 and write nothing. There is no shared memory and no per-queue reset.
//!
//! ```text
//! reset -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK -> (NEEDS_RESET) -> reset
//!                                        queues are set up here
//! ```

use super::queue::{self, Broken, QUEUE_MAX_SIZE};
use crate::schema::{Decoder, Device, Encoder};
use crate::{DeviceError, Effect, GuestRam};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING,
    VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS, VIRTIO_MMIO_MAGIC_VALUE,
    VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_DESC_HIGH,
    VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM, VIRTIO_MMIO_QUEUE_NUM_MAX,
    VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH, VIRTIO_MMIO_QUEUE_USED_LOW,
    VIRTIO_MMIO_SHM_BASE_HIGH, VIRTIO_MMIO_SHM_BASE_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW,
    VIRTIO_MMIO_STATUS, VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "vmft"
const VENDOR_ID: u32 = 0x7466_6d76;

const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
const NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;
const STATUS_MASK: u32 = 0xff;

const FEATURE_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// The part of a virtio device that is its own.
pub(crate) trait Backend {
    /// Payload kind of the device with its transport.
    const KIND: &'static str;
    /// Version of the payload.
    const VERSION: u16;
    /// Virtio device ID (section 5).
    const DEVICE_ID: u32;
    /// How many queues.
    const QUEUES: usize;

    /// Device-specific feature bits.
    fn features(&self) -> u64;

    /// The device configuration space; bytes behind it read 0.
    fn config(&self) -> Vec<u8>;

    /// The driver made buffers available in queue `index`. Whether it wants an interrupt for used ones.
    fn process(
        &mut self,
        queues: &mut [Queue],
        index: usize,
        ram: &GuestRam,
        effects: &mut Vec<Effect>,
    ) -> Result<bool, Broken>;

    /// Forgets the driver: nothing that is under way may touch guest memory any more.
    fn reset(&mut self);

    /// Appends all fields.
    fn save(&self, out: &mut Encoder);

    /// Sets all fields.
    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError>;
}

/// A virtio device behind its registers.
pub(crate) struct Transport<B> {
    backend: B,
    queues: Vec<Queue>,
    status: u32,
    interrupt_status: u32,
    driver_features: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
}

impl<B: Backend> Transport<B> {
    pub(crate) fn new(backend: B) -> Self {
        let mut transport = Self {
            backend,
            queues: Vec::new(),
            status: 0,
            interrupt_status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        };
        transport.reset();
        transport
    }

    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    /// Level of the interrupt line.
    pub(crate) fn interrupt(&self) -> bool {
        self.interrupt_status != 0
    }

    fn is_running(&self) -> bool {
        self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
    }

    /// Runs `event` on the device. It gets the queues only while the driver may see them change.
    pub(crate) fn handle(
        &mut self,
        event: impl FnOnce(&mut B, Option<&mut [Queue]>) -> Result<bool, Broken>,
    ) {
        let queues = if self.is_running() { Some(self.queues.as_mut_slice()) } else { None };
        match event(&mut self.backend, queues) {
            Ok(false) => {}
            Ok(true) => self.interrupt_status |= VIRTIO_MMIO_INT_VRING,
            Err(Broken) => {
                self.status |= NEEDS_RESET;
                self.interrupt_status |= VIRTIO_MMIO_INT_CONFIG;
            }
        }
    }

    fn reset(&mut self) {
        self.backend.reset();
        self.queues.clear();
        // Any power of two is a valid size.
        self.queues.resize_with(B::QUEUES, || Queue::new(QUEUE_MAX_SIZE).expect("a valid queue size"));
        self.status = 0;
        self.interrupt_status = 0;
        self.driver_features = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.queue_sel = 0;
    }

    fn device_features(&self) -> u64 {
        self.backend.features() | FEATURE_VERSION_1 | FEATURE_EVENT_IDX
    }

    fn selected(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    /// Reads `data.len()` bytes at `offset` of the window.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(start) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            let config = self.backend.config();
            let bytes = config.get(start as usize..).unwrap_or_default();
            for (to, from) in data.iter_mut().zip(bytes) {
                *to = *from;
            }
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.read_register(offset as u32).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u32) -> u32 {
        match offset {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => B::DEVICE_ID,
            VIRTIO_MMIO_VENDOR_ID => VENDOR_ID,
            VIRTIO_MMIO_DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device_features() as u32,
                1 => (self.device_features() >> 32) as u32,
                _ => 0,
            },
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.selected().map_or(0, |queue| queue.max_size().into()),
            VIRTIO_MMIO_QUEUE_READY => self.selected().map_or(0, |queue| queue.ready().into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => self.interrupt_status,
            VIRTIO_MMIO_STATUS => self.status,
            // All ones: there is no such shared memory region.
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_SHM_BASE_LOW | VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            // The configuration never changes.
            VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    /// Writes `data` at `offset` of the window.
    pub(crate) fn write(&mut self, ram: &GuestRam, offset: u64, data: &[u8], effects: &mut Vec<Effect>) {
        let Ok(value) = <[u8; 4]>::try_from(data).map(u32::from_le_bytes) else { return };
        let Ok(offset) = u32::try_from(offset) else { return };
        match offset {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.device_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            VIRTIO_MMIO_DRIVER_FEATURES => self.write_driver_features(value),
            VIRTIO_MMIO_QUEUE_SEL => self.queue_sel = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(ram, value as usize, effects),
            VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt_status &= !value,
            VIRTIO_MMIO_STATUS => self.write_status(ram, value & STATUS_MASK, effects),
            VIRTIO_MMIO_QUEUE_NUM..=VIRTIO_MMIO_QUEUE_USED_HIGH => self.write_queue(ram, offset, value),
            _ => {}
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & FEATURES_OK != 0 {
            return;
        }
        let [low, high] = [self.driver_features as u32, (self.driver_features >> 32) as u32];
        let (low, high) = match self.driver_features_sel {
            0 => (value, high),
            1 => (low, value),
            _ => return,
        };
        self.driver_features = u64::from(high) << 32 | u64::from(low);
    }

    fn write_status(&mut self, ram: &GuestRam, value: u32, effects: &mut Vec<Effect>) {
        if value == 0 {
            return self.reset();
        }
        // A driver only ever adds bits (section 2.1.1), and cannot ask for a reset of itself.
        let mut added = value & !self.status & !NEEDS_RESET;
        let unknown = self.driver_features & !self.device_features();
        if unknown != 0 || self.driver_features & FEATURE_VERSION_1 == 0 {
            added &= !FEATURES_OK;
        }
        if (self.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        self.status |= added;
        if added & DRIVER_OK != 0 {
            for index in 0..B::QUEUES {
                self.notify(ram, index, effects);
            }
        }
    }

    fn notify(&mut self, ram: &GuestRam, index: usize, effects: &mut Vec<Effect>) {
        if index < B::QUEUES {
            self.handle(|backend, queues| match queues {
                Some(queues) => backend.process(queues, index, ram, effects),
                None => Ok(false),
            });
        }
    }

    /// Queue registers take writes between `FEATURES_OK` and `QueueReady`.
    fn write_queue(&mut self, ram: &GuestRam, offset: u32, value: u32) {
        let event_idx = self.driver_features & FEATURE_EVENT_IDX != 0;
        let features_ok = self.status & FEATURES_OK != 0;
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        if offset == VIRTIO_MMIO_QUEUE_READY {
            queue.set_event_idx(event_idx);
            queue.set_ready(value == 1 && features_ok);
            // A ring that is not in guest memory cannot be made ready.
            let valid = queue.ready() && queue.is_valid(ram);
            queue.set_ready(valid);
            return;
        }
        if queue.ready() {
            return;
        }
        match offset {
            // A size that does not fit is refused; the queue keeps the one it has.
            VIRTIO_MMIO_QUEUE_NUM => queue.set_size(u16::try_from(value).unwrap_or(0)),
            VIRTIO_MMIO_QUEUE_DESC_LOW => queue.set_desc_table_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => queue.set_desc_table_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => queue.set_avail_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => queue.set_avail_ring_address(None, Some(value)),
            VIRTIO_MMIO_QUEUE_USED_LOW => queue.set_used_ring_address(Some(value), None),
            VIRTIO_MMIO_QUEUE_USED_HIGH => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }
}

impl<B: Backend> Device for Transport<B> {
    fn kind(&self) -> &'static str {
        B::KIND
    }

    fn version(&self) -> u16 {
        B::VERSION
    }

    fn save(&self, out: &mut Encoder) {
        out.u32(self.status);
        out.u32(self.interrupt_status);
        out.u64(self.driver_features);
        out.u32(self.device_features_sel);
        out.u32(self.driver_features_sel);
        out.u32(self.queue_sel);
        for queue in &self.queues {
            queue::save(queue, out);
        }
        self.backend.save(out);
    }

    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError> {
        self.status = input.u32("status")?;
        input.check("status", self.status.into(), self.status & !STATUS_MASK == 0)?;
        self.interrupt_status = input.u32("interrupt_status")?;
        self.driver_features = input.u64("driver_features")?;
        self.device_features_sel = input.u32("device_features_sel")?;
        self.driver_features_sel = input.u32("driver_features_sel")?;
        self.queue_sel = input.u32("queue_sel")?;
        for queue in &mut self.queues {
            *queue = queue::load(input)?;
        }
        self.backend.load(input)
    }
}
