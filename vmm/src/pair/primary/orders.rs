//! What an operator can have done to a guest that runs here.
//!
//! Owns: which order is possible when, and which thread is told. Must never: wait for any of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Sender, TrySendError};
use ft_log::Event;

use crate::control::Monitor;
use crate::control::protocol::{Answer, Command, Reason, Refusal};
use crate::host::inbox::Inbox;
use crate::pair::primary::state::PrimaryState;
use crate::pair::primary::supervisor::LinkEvent;
use crate::pair::protocol::Phase;
use crate::run::{Control, StopKind, VcpuHandle};

/// The ways to those who carry orders out.
pub(super) struct OrderHandler {
    /// Was the last order of that kind to pause?
    pub(super) paused: AtomicBool,
    pub(super) inbox: Inbox,
    pub(super) state: Arc<PrimaryState>,
    pub(super) events: Sender<LinkEvent>,
    pub(super) vcpu: VcpuHandle,
}

impl OrderHandler {
    /// Passes an order on, or says why it cannot be.
    pub(super) fn take(&self, command: Command, monitor: &Monitor) -> Answer {
        match command {
            Command::Status => Answer::Status(Box::new(monitor.status())),
            Command::Pause => self.pause(true, "the guest stands at its next boundary"),
            Command::Resume => self.pause(false, "the guest goes on"),
            Command::Shutdown if self.paused.load(Ordering::SeqCst) => refused(
                Reason::Paused,
                "the guest is paused and would not see its power button; resume it first",
            ),
            Command::Shutdown => match self.inbox.try_send(Event::PowerButton) {
                Ok(()) => done("the guest's power button is pressed"),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => busy(),
            },
            Command::PowerOff => {
                self.vcpu.stop(StopKind::PowerOff);
                done("the guest ends as if its plug were pulled")
            }
            Command::DropBackup => self.drop_backup(),
            Command::Switch => self.switch(monitor),
        }
    }

    fn pause(&self, pause: bool, text: &str) -> Answer {
        if !self.vcpu.order(if pause { Control::Pause } else { Control::Resume }) {
            return busy();
        }
        self.paused.store(pause, Ordering::SeqCst);
        done(text)
    }

    fn drop_backup(&self) -> Answer {
        if self.state.phase() != Phase::Paired {
            return no_backup();
        }
        match self.events.try_send(LinkEvent::Dismiss) {
            Ok(()) => done("the backup is let go"),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                refused(Reason::Busy, "the supervisor has much to do at this moment; ask again")
            }
        }
    }

    fn switch(&self, monitor: &Monitor) -> Answer {
        let status = monitor.status();
        if !status.protected || self.state.phase() != Phase::Paired {
            return no_backup();
        }
        if status.peer.is_none_or(|peer| peer.listen.is_none()) {
            let text = "the backup was started without --listen, so this monitor could not become its backup";
            return refused(Reason::NoBackup, text);
        }
        if !self.vcpu.order(Control::HandOver) {
            return busy();
        }
        done("the backup is handed the guest")
    }
}

fn done(text: &str) -> Answer {
    Answer::Done(text.to_owned())
}

fn refused(reason: Reason, text: &str) -> Answer {
    Answer::Refused(Refusal { reason, text: text.to_owned(), primary: None })
}

fn busy() -> Answer {
    refused(Reason::Busy, "too much waits for the guest at this moment; ask again")
}

fn no_backup() -> Answer {
    refused(Reason::NoBackup, "the guest has no backup that follows")
}
