//! Where a live guest's effects are performed: tap, disk, console.
//!
//! Owns: the host side of the guest's devices. Must never: decide whether an effect may be performed; on a
//! pair the output gate has decided that before.

use std::io::Stdout;
use std::sync::Arc;
use std::time::Duration;

use devices::{DiskRequest, Effect};

use super::console::ConsoleWriter;
use super::disk::{Disk, DiskError, DiskWorker, Guard};
use super::inbox::Inbox;
use super::tap::{Tap, TapError};

/// Performs effects that are seen outside, one at a time.
pub trait Performer: Send + Sync {
    /// Sends a frame.
    fn frame(&self, frame: &[u8]);
    /// Starts a disk request.
    fn disk(&self, request: DiskRequest);
    /// Writes to the console.
    fn console(&self, bytes: &[u8]);
}

/// The host's resources for one guest, opened but at rest.
pub struct Resources {
    /// The network card's other end.
    pub tap: Option<Tap>,
    /// The disk image.
    pub disk: Option<Disk>,
}

/// The host side of a guest's devices, at work.
pub struct Outlet {
    tap: Option<Tap>,
    disk: Option<DiskWorker>,
    console: ConsoleWriter<Stdout>,
}

/// Why the host side could not be put to work.
#[derive(Debug, thiserror::Error)]
pub enum OutletError {
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl Resources {
    /// Puts tap and disk to work: what arrives goes to `inbox`. `guard` is asked before each disk request.
    pub fn start(self, inbox: &Inbox, guard: Guard) -> Result<Outlet, OutletError> {
        if let Some(tap) = &self.tap {
            tap.start(inbox.clone())?;
        }
        let disk = self.disk.map(|disk| disk.start(inbox.clone(), guard)).transpose()?;
        Ok(Outlet { tap: self.tap, disk, console: ConsoleWriter::new(std::io::stdout()) })
    }
}

/// A guard for a guest that nobody else can be running.
pub fn always() -> Guard {
    Arc::new(|| true)
}

impl Outlet {
    /// Tells the network where the guest now is.
    pub fn announce(&self, mac: [u8; 6]) {
        if let Some(tap) = &self.tap {
            tap.announce(mac);
        }
    }

    /// With the guard saying no: waits until no disk request is under way. False: one still was after
    /// `timeout`.
    pub fn quiesce(&self, timeout: Duration) -> bool {
        self.disk.as_ref().is_none_or(|disk| disk.quiesce(timeout))
    }

    /// Performs one effect now.
    pub fn perform(&self, effect: Effect) {
        match effect {
            Effect::Frame(frame) => self.frame(&frame),
            Effect::Disk(request) => self.disk(request),
            Effect::Console(byte) => self.console(&[byte]),
            // Entropy is answered where the guest's events are made; the ends of the guest by the loop.
            Effect::Entropy { .. } | Effect::Reset | Effect::PowerOff => {}
        }
    }
}

impl Performer for Outlet {
    fn frame(&self, frame: &[u8]) {
        if let Some(tap) = &self.tap {
            tap.send(frame);
        }
    }

    fn disk(&self, request: DiskRequest) {
        if let Some(disk) = &self.disk {
            disk.submit(request);
        }
    }

    fn console(&self, bytes: &[u8]) {
        self.console.write(bytes);
    }
}
