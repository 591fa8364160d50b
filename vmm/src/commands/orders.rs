//! What an operator can have done to a guest that runs here.
//!
//! Owns: which order is possible when, and which thread is told. Must never: wait for any of them.

use std::sync::Arc;

use crossbeam_channel::{Sender, TrySendError};
use ft_log::Event;

use super::stop::Stop;
use crate::control::Monitor;
use crate::control::orders::Orders;
use crate::control::protocol::{Answer, Command, Reason, Refusal};
use crate::ft::link::Link;
use crate::ft::protocol::Phase;
use crate::ft::supervise::LinkEvent;
use crate::host::deferral::Inbox;

/// The ways to those who carry orders out.
pub(super) struct Desk {
    pub(super) orders: Arc<Orders>,
    pub(super) inbox: Inbox,
    pub(super) link: Arc<Link>,
    pub(super) events: Sender<LinkEvent>,
    pub(super) stop: Stop,
}

impl Desk {
    /// Passes an order on, or says why it cannot be.
    pub(super) fn take(&self, command: Command, monitor: &Monitor) -> Answer {
        match command {
            Command::Status => Answer::Status(Box::new(monitor.status())),
            Command::Pause => {
                self.orders.set_pause(true);
                self.ask_for_boundary();
                done("the guest stands at its next boundary")
            }
            Command::Resume => {
                self.orders.set_pause(false);
                self.stop.wake();
                done("the guest goes on")
            }
            Command::Shutdown if self.orders.pause() => refused(
                Reason::Paused,
                "the guest is paused and would not see its power button; resume it first",
            ),
            Command::Shutdown => match self.inbox.try_send(Event::PowerButton) {
                Ok(()) => done("the guest's power button is pressed"),
                Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                    refused(Reason::Busy, "too much waits for the guest at this moment; ask again")
                }
            },
            Command::PowerOff => {
                self.orders.pull_plug();
                self.stop.request();
                done("the guest ends as if its plug were pulled")
            }
            Command::DropBackup => self.drop_backup(),
            Command::Switch => self.switch(monitor),
        }
    }

    fn ask_for_boundary(&self) {
        self.stop.wake();
        self.stop.kick();
    }

    fn drop_backup(&self) -> Answer {
        if self.link.phase() != Phase::Paired {
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
        if !status.protected || self.link.phase() != Phase::Paired {
            return no_backup();
        }
        if status.peer.is_none_or(|peer| peer.listen.is_none()) {
            let text = "the backup was started without --listen, so this monitor could not become its backup";
            return refused(Reason::NoBackup, text);
        }
        self.orders.ask_for_switch();
        self.ask_for_boundary();
        done("the backup is handed the guest")
    }
}

fn done(text: &str) -> Answer {
    Answer::Done(text.to_owned())
}

fn refused(reason: Reason, text: &str) -> Answer {
    Answer::Refused(Refusal { reason, text: text.to_owned(), primary: None })
}

fn no_backup() -> Answer {
    refused(Reason::NoBackup, "the guest has no backup that follows")
}
