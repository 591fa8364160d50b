//! Where host threads put what is to reach a guest.
//!
//! Owns: the way into the vCPU thread's bounded queue of events, and that its arrival is noted for the deferral. Must never:
//! say what happens when it is full; that is each thread's own policy.
//! Threads: any may hold an [`Inbox`]. Locks: none.

use std::sync::Arc;

use crossbeam_channel::{Sender, TrySendError};
use ft_log::Event;

use super::deferral::Deferral;

/// Where host threads put events for the guest. Bounded; what happens when it is full is each thread's own policy.
#[derive(Clone, Debug)]
pub struct Inbox {
    events: Sender<Event>,
    deferral: Option<Arc<Deferral>>,
}

impl Inbox {
    /// An inbox whose events wait no longer than `deferral` says.
    pub fn new(events: Sender<Event>, deferral: Arc<Deferral>) -> Self {
        Self { events, deferral: Some(deferral) }
    }

    /// Puts `event` in if there is room.
    pub fn try_send(&self, event: Event) -> Result<(), TrySendError<Event>> {
        self.events.try_send(event)?;
        self.note();
        Ok(())
    }

    /// The channel, for waiting on several; call [`Inbox::note`] when something was sent.
    pub fn channel(&self) -> &Sender<Event> {
        &self.events
    }

    /// Something was sent.
    pub fn note(&self) {
        if let Some(deferral) = &self.deferral {
            deferral.arrived();
        }
    }
}

impl From<Sender<Event>> for Inbox {
    fn from(events: Sender<Event>) -> Self {
        Self { events, deferral: None }
    }
}
