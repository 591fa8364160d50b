//! What a primary tells a backup, and what a recording holds.
//!
//! No KVM, no threads, no clock: sockets and files come in as `Read` and `Write`.

mod event;

pub use event::{
    DiskStatus, Event, GuestTime, MAX_CONSOLE_BYTES, MAX_DISK_BYTES, MAX_ENTROPY_BYTES, MAX_FRAME_BYTES,
};
