//! The guest's devices as pure state machines.
//!
//! Owns: every device model of one x86_64 guest, put together as a [`Board`]. Must never: read a clock,
//! open a file, start a thread or use randomness (`clippy.toml` enforces it). Time comes in as
//! [`ft_log::GuestTime`], what happens outside comes in as [`ft_log::Event`], what the guest wants done
//! goes out as [`Effect`]. The same code runs on the primary, on the backup and in replay:
//!
//! ```text
//! port or memory access ─┐                 ┌─> value for the guest
//! Event, clock value ────┼──> Board ───────┼─> Effects (frames, disk requests, console bytes, reset)
//!                        │                 ├─> guest memory (virtqueues)
//!                        │                 └─> interrupt line of the 8259A
//! ```

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the devices model an x86_64 board");

mod acpi_pm;
mod board;
mod cmos;
mod effects;
mod error;
mod hpet;
mod i8042;
pub mod layout;
mod pic;
mod pit;
mod schema;
mod uart;
mod virtio;

pub use board::{Board, BoardConfig};
pub use effects::{DiskOp, DiskRequest, Effect};
pub use error::DeviceError;
pub use hpet::HPET_IDENTITY;
pub use layout::{VirtioKind, VirtioWindow, virtio_windows};
pub use schema::Payload;

/// The guest's physical memory.
pub type GuestRam = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;
