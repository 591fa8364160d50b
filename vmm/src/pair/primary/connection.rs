//! The threads of one connection to a backup: the log out, the acknowledgements in.
//!
//! Owns: nothing beyond the calls. Must never: act for another epoch than that of its outbox; all that is reported names it.
//! Threads: `log-sender` and `log-acks`. Locks: none of its own.

use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

use crossbeam_channel::Sender;
use ft_log::{ByeReason, CheckpointEncoder, FrameWriter, Message};

use super::gate::OutputGate;
use super::outbox::{Counted, Outbox, Outgoing};
use super::state::PrimaryState;
use super::supervisor::LinkEvent;
use crate::host::backends::Outlet;
use crate::pair::wire::channel::{Receiving, Sending};
use crate::with_causes;

/// Sends the log until it is over or the backup is lost.
pub(super) fn send_log(outbox: &Outbox, out: Sending, stream: &TcpStream, events: &Sender<LinkEvent>) {
    // What is counted is what the link carries.
    let mut frames = FrameWriter::new(out.map(|out| Counted { out, outbox }));
    let mut checkpoints = CheckpointEncoder::default();
    while let Some(Outgoing { checkpoint, batch }) = outbox.next_batch() {
        let sent = checkpoint.map_or(Ok(()), |checkpoint| {
            let send = |piece| frames.send(&Message::Checkpoint(piece));
            checkpoints.encode(&checkpoint, send).map(|()| outbox.checkpoint_sent())
        });
        if let Err(error) = sent.and_then(|()| frames.send(&Message::Batch(batch))) {
            let why = format!("the log cannot be sent: {}", with_causes(&error));
            let _ = events.send(LinkEvent::Down { epoch: outbox.epoch(), why });
            return;
        }
    }
    let Some(bye) = outbox.last_word() else { return };
    if let Some(reason) = bye {
        // The backup learns the same from the closed connection, only less exactly.
        let _ = frames.send(&Message::Bye { reason, text: String::new() });
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// What takes the acknowledgements in.
pub(super) struct Acks {
    pub(super) outbox: Arc<Outbox>,
    pub(super) state: Arc<PrimaryState>,
    pub(super) gate: Arc<OutputGate<Outlet>>,
    pub(super) events: Sender<LinkEvent>,
}

impl Acks {
    /// Receives until the connection ends.
    pub(super) fn receive(self, mut frames: Receiving) {
        let epoch = self.outbox.epoch();
        let mut protected = false;
        let why = loop {
            match frames.receive() {
                Ok(Some(Message::Ack(ack))) => match self.outbox.acknowledged(&ack) {
                    Ok(()) => {
                        if !std::mem::replace(&mut protected, true) {
                            let _ = self.events.send(LinkEvent::Protected { epoch });
                        }
                        self.gate.retry();
                        tell_released(&self.outbox, &self.state, &self.gate);
                    }
                    Err(error) => break format!("the backup acknowledges nonsense: {error}"),
                },
                Ok(Some(Message::Bye { text, reason })) => {
                    if reason == ByeReason::Diverged {
                        self.outbox.diverged(text.clone());
                    }
                    break format!("the backup left: {reason:?} {text}");
                }
                Ok(Some(other)) => break format!("the backup sent a {} message", other.kind().name()),
                Ok(None) => break "the backup closed the connection".into(),
                Err(error) => break format!("the connection to the backup failed: {}", with_causes(&error)),
            }
        };
        let _ = self.events.send(LinkEvent::Down { epoch, why });
    }
}

/// The next batch tells the backup up to where outputs have left.
pub(super) fn tell_released(outbox: &Outbox, state: &PrimaryState, gate: &OutputGate<Outlet>) {
    let released = gate.with_first_waiting(|waiting| state.protocol(|primary| primary.released(waiting)));
    outbox.released(released);
}
