//! Tells, while a guest runs, that it has loaded kernel code with an RDTSC that nobody rewrites.
//!
//! Owns: when the guest's memory is searched, and what was told. Must never: change the guest, or end it.

use ft_log::GuestTime;

use crate::machine::{LoadedRdtscs, Machine};
use crate::with_causes;

/// A search takes milliseconds, while the guest stands still.
const LOOK_EVERY_NS: u64 = 5_000_000_000;

/// Looks now and then.
#[derive(Debug, Default)]
pub struct CodeWatch {
    next: GuestTime,
    told: LoadedRdtscs,
}

impl CodeWatch {
    /// Looks if the last look was long ago.
    pub fn look_if_due(&mut self, machine: &Machine, now: GuestTime) {
        if now >= self.next {
            self.next = GuestTime::from_ns(now.to_ns().saturating_add(LOOK_EVERY_NS));
            self.look(machine);
        }
    }

    /// Looks, and tells what is new.
    pub fn look(&mut self, machine: &Machine) {
        match machine.loaded_rdtscs() {
            Ok(found) if found != self.told => {
                if !found.is_empty() {
                    tracing::warn!(
                        anchor = machine.anchors(),
                        "{found}. They read this host's counter, so a backup or a replay will differ once they run. \
                         Unload the module, or keep it from being loaded (docs/determinism.md)"
                    );
                }
                self.told = found;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!("loaded kernel code was not searched: {}", with_causes(&error)),
        }
    }
}
