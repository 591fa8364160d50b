//! The door of a follower: events and clock reads come from a log.
//!
//! Owns: the reading position in the log and what the primary is not known to have let out.
//! Must never: go beyond what the log allows. The guest leaves boundary k only when the log is complete up to exit
//! k+1 (`reached`). Where that is a forced stop it runs to the position that the log names, or does not run at all and
//! loads a checkpoint. So a follower never guesses and never rolls back.

use std::collections::VecDeque;

use devices::BoardConfig;
use devices::Effect;
use ft_log::{
    Checkpoint, CheckpointDecoder, ClockModel, Counted, Cursor, Decoder, Entry, Event, GuestTime, LogPart,
    Position,
};

use super::divergence::{Divergence, Recent, describe};
use super::faults::Faults;
use super::{Door, Next, RunError, Stopped};
use crate::machine::{Clock, GuestEnd, Kicked, Machine, Missed};

/// Where the log comes from: a file, or the connection to the primary.
pub trait PartSource {
    /// The next part in order. Waits for it. `None`: there will be no more.
    fn next(&mut self) -> Result<Option<LogPart>, RunError>;
    /// The guest stands at `anchor` and has seen `time`.
    fn executed(&mut self, anchor: u64, time: GuestTime);
    /// Somebody asked the monitor to stop: it does not wait for the guest's next exit.
    fn stopped(&self) -> bool {
        false
    }
}

/// What the log has next.
enum Ahead {
    /// An exit of the guest's own.
    Exit,
    /// A forced stop to run to.
    Stop(Box<Counted>),
    /// A checkpoint, which has been loaded.
    Behind,
}

/// Entries that are remembered for a report.
const RECENT: usize = 32;
/// Clock reads that are looked past for the entry behind them. With more of them in a row, an entry that is overdue is
/// noticed at the end of its batch only.
const LOOK_PAST_MAX: usize = 4_096;
/// Most effects that are kept for a takeover; the primary reports what it let out far more often.
const KEPT_EFFECTS: usize = 16_384;

/// A follower's door.
pub struct Follow<S> {
    source: S,
    decoder: Decoder,
    model: ClockModel,
    batch: Vec<u8>,
    offset: usize,
    /// What comes next, as far as it was looked at.
    ahead: VecDeque<Entry>,
    seq: u64,
    reached: u64,
    board: BoardConfig,
    checkpoint_decoder: CheckpointDecoder,
    checkpoints: VecDeque<Checkpoint>,
    unreleased: VecDeque<(u64, Effect)>,
    recent: Recent,
    watcher: Option<Watcher>,
    began: u64,
    faults: Faults,
    equal: bool,
}

/// Sees every effect of a followed guest.
pub type Watcher = Box<dyn FnMut(&Effect)>;

impl<S: PartSource> Follow<S> {
    /// Follows `source` from the snapshot whose position is `cursor`. `board` is the guest's; it has no page with
    /// the number `end_page` or a greater one.
    pub fn new(source: S, cursor: Cursor, board: BoardConfig, end_page: u64) -> Self {
        Self {
            source,
            reached: cursor.anchor,
            decoder: Decoder::new(cursor),
            model: ClockModel::starting_at(cursor.time),
            batch: Vec::new(),
            offset: 0,
            ahead: VecDeque::new(),
            seq: 0,
            board,
            checkpoint_decoder: CheckpointDecoder::new(end_page),
            checkpoints: VecDeque::new(),
            unreleased: VecDeque::new(),
            recent: Recent::keeping(RECENT),
            watcher: None,
            began: cursor.anchor,
            faults: Faults::default(),
            equal: false,
        }
    }

    /// Lets these faults happen.
    pub fn inject(&mut self, faults: Faults) {
        self.faults = faults;
    }

    /// Shows `watcher` every effect. Nothing is performed.
    pub fn watch_effects(&mut self, watcher: Watcher) {
        self.watcher = Some(watcher);
    }

    /// Effects of the guest that the primary is not known to have let out, in order.
    pub fn into_unreleased(self) -> Vec<Effect> {
        self.unreleased.into_iter().map(|(_, effect)| effect).collect()
    }

    /// Was the log's end mark reached, with every digest equal?
    pub fn was_equal(&self) -> bool {
        self.equal
    }

    /// Where the log comes from.
    pub fn source_mut(&mut self) -> &mut S {
        &mut self.source
    }

    /// The next entry of the batches that are here, without waiting.
    fn peek(&mut self) -> Result<Option<&Entry>, RunError> {
        if self.ahead.is_empty() {
            self.look_further()?;
        }
        Ok(self.ahead.front())
    }

    /// Reads one more entry of the batch that is here, if it has one.
    fn look_further(&mut self) -> Result<bool, RunError> {
        let mut rest = &self.batch[self.offset..];
        let entry = self.decoder.next(&mut rest)?;
        self.offset = self.batch.len() - rest.len();
        let found = entry.is_some();
        self.ahead.extend(entry);
        Ok(found)
    }

    /// The boundary of the next entry that has one, as far as it is here. All clock reads before it belong to exits up to
    /// that boundary; those before a forced stop, to exits before the stop.
    fn next_boundary(&mut self) -> Result<Option<u64>, RunError> {
        while self.ahead.back().is_none_or(|entry| matches!(entry, Entry::Clock { .. })) {
            if self.ahead.len() == LOOK_PAST_MAX || !self.look_further()? {
                return Ok(None);
            }
        }
        Ok(self.ahead.back().and_then(|entry| match entry {
            Entry::Clock { .. } => None,
            Entry::Stop { anchor, .. } if self.ahead.len() > 1 => Some(anchor.saturating_sub(1)),
            Entry::Event { anchor, .. }
            | Entry::Check { anchor, .. }
            | Entry::Stop { anchor, .. }
            | Entry::End { anchor, .. } => Some(*anchor),
        }))
    }

    /// Gets the next batch. False: there are no more.
    fn fetch(&mut self) -> Result<bool, RunError> {
        let batch = loop {
            match self.source.next()? {
                None => return Ok(false),
                Some(LogPart::Batch(batch)) => break batch,
                Some(LogPart::Checkpoint(piece)) => {
                    self.checkpoints.extend(self.checkpoint_decoder.accept(&piece)?);
                }
            }
        };
        self.seq = batch.seq;
        self.reached = batch.reached;
        while self.unreleased.front().is_some_and(|(seq, _)| *seq <= batch.released) {
            self.unreleased.pop_front();
        }
        self.batch = batch.entries;
        self.offset = 0;
        Ok(true)
    }

    /// Applies what the log holds for the present boundary. `Some`: the recording's end was reached.
    fn apply_due(
        &mut self,
        machine: &mut Machine,
        effects: &mut Vec<Effect>,
    ) -> Result<Option<Stopped>, RunError> {
        let here = machine.anchors();
        loop {
            let Some(due) = self.next_boundary()? else { return Ok(None) };
            if due > here {
                return Ok(None);
            }
            let Some(entry) = self.ahead.pop_front() else { return Ok(None) };
            if let Entry::Clock { .. } = entry {
                let found = format!("a guest at anchor {here} that has not read its clock so often");
                return Err(self.diverged(machine, describe(&entry), found));
            }
            if due < here {
                let found = format!("the guest is already at anchor {here}");
                return Err(self.diverged(machine, describe(&entry), found));
            }
            match &entry {
                Entry::Event { event, .. } => {
                    if let Err(error) = machine.apply(event, effects) {
                        return Err(self.diverged(machine, describe(&entry), error.to_string()));
                    }
                    if let Event::Tick { now } = event {
                        self.model.tick(*now);
                    }
                }
                Entry::Check { digest, .. } if *digest == machine.registers_digest() as u32 => {}
                Entry::Check { .. } => {
                    let found = format!("digest {:08x}", machine.registers_digest() as u32);
                    return Err(self.diverged(machine, describe(&entry), found));
                }
                Entry::End { digest, .. } => {
                    let found = machine.state_digest();
                    if *digest != found {
                        return Err(self.diverged(machine, format!("{digest:x?}"), format!("{found:x?}")));
                    }
                    self.equal = true;
                    // What follows an end mark is the end, or the log is damaged.
                    while self.fetch()? {}
                    return Ok(Some(Stopped::ReplayEqual));
                }
                Entry::Stop { .. } => {
                    let found = "a guest that is there by its own exit".to_owned();
                    return Err(self.diverged(machine, describe(&entry), found));
                }
                Entry::Clock { .. } => {}
            }
            self.recent.note(&entry);
        }
    }

    /// If the guest goes on from here to a forced stop that is a checkpoint: takes it there. If to another: says which.
    fn follow_stop(&mut self, machine: &mut Machine) -> Result<Ahead, RunError> {
        let next = machine.anchors() + 1;
        match self.peek()? {
            Some(Entry::Stop { anchor, position }) if *anchor == next => {
                if let Position::Counted(target) = position {
                    return Ok(Ahead::Stop(target.clone()));
                }
            }
            _ => return Ok(Ahead::Exit),
        }
        if self.faults.misses_stop() {
            return Err(RunError::Missed(machine.injected_miss()));
        }
        let checkpoint = self.checkpoints.pop_front().ok_or(RunError::NoCheckpoint { anchor: next })?;
        machine.load_checkpoint(&self.board, &checkpoint)?;
        if machine.anchors() == next {
            self.applied();
            return Ok(Ahead::Behind);
        }
        let found = "another position in the checkpoint".to_owned();
        Err(self.diverged(machine, format!("forced stop at anchor {next}"), found))
    }

    /// The next entry has been applied.
    fn applied(&mut self) {
        if let Some(entry) = self.ahead.pop_front() {
            self.recent.note(&entry);
        }
    }

    fn diverged(&self, machine: &Machine, expected: String, found: String) -> RunError {
        RunError::Diverged(self.recent.diverged(machine, expected, found))
    }

    /// Is another guest, or another log, the reason for `error`? Then the report of it.
    pub fn differs(&self, machine: &Machine, error: RunError) -> Result<Box<Divergence>, RunError> {
        match error {
            RunError::Diverged(divergence) => Ok(divergence),
            // A guest that is what the log describes goes on, and a log that is whole can be read.
            RunError::Machine(_)
            | RunError::Log(_)
            | RunError::Checkpoint(_)
            | RunError::NoCheckpoint { .. } => {
                let expected = "a guest and a log with which to go on".to_owned();
                Ok(self.recent.diverged(machine, expected, crate::with_causes(&error)))
            }
            other => Err(other),
        }
    }
}

impl<S: PartSource> Clock for Follow<S> {
    type Error = RunError;

    fn read(&mut self) -> Result<GuestTime, RunError> {
        // The log is complete up to the exit that asks, so a read without an entry is one that was predicted.
        let unlogged_so_far = self.model.unlogged();
        match self.peek()? {
            Some(Entry::Clock { unlogged, now }) if *unlogged == unlogged_so_far => {
                let now = *now;
                self.applied();
                self.model.correct(now);
                Ok(now)
            }
            _ => Ok(self.model.accept()),
        }
    }

    fn kicked(&mut self, _: &Machine) -> Result<Kicked, RunError> {
        if self.source.stopped() { Err(RunError::StopRequested) } else { Ok(Kicked::GoOn) }
    }
}

impl<S: PartSource> Door for Follow<S> {
    fn boundary(&mut self, machine: &mut Machine, effects: &mut Vec<Effect>) -> Result<Next, RunError> {
        self.faults.at_boundary(machine, machine.anchors().saturating_sub(self.began))?;
        self.source.executed(machine.anchors(), machine.now());
        loop {
            if let Some(stopped) = self.apply_due(machine, effects)? {
                return Ok(Next::Stop(stopped));
            }
            if !effects.is_empty() {
                self.publish(machine, effects)?;
            }
            if self.reached > machine.anchors() {
                let next = match self.follow_stop(machine)? {
                    Ahead::Behind => {
                        self.source.executed(machine.anchors(), machine.now());
                        continue;
                    }
                    Ahead::Stop(target) => Next::EnterTo(target),
                    Ahead::Exit => Next::Enter,
                };
                if machine.waiting() {
                    let expected = "a guest that runs on".to_owned();
                    return Err(self.diverged(machine, expected, "a halted guest with no interrupt".into()));
                }
                return Ok(next);
            }
            // Everything up to here has been executed, so nothing may be left of what was logged up to here.
            if let Some(entry) = self.ahead.pop_front() {
                let found = "a guest that did not ask for it".to_owned();
                return Err(self.diverged(machine, describe(&entry), found));
            }
            if !self.fetch()? {
                return Ok(Next::Stop(Stopped::LogEnded));
            }
        }
    }

    fn entering(&mut self, _: &Machine) {}

    fn stopped(&mut self, _: &mut Machine, _: Position) -> Result<(), RunError> {
        self.applied();
        Ok(())
    }

    fn missed(&self, machine: &Machine, missed: Box<Missed>) -> RunError {
        if missed.is_divergence() {
            return self.diverged(machine, missed.expected(), missed.found());
        }
        RunError::Missed(missed)
    }

    fn publish(&mut self, _: &Machine, effects: &mut Vec<Effect>) -> Result<(), RunError> {
        for effect in effects.drain(..) {
            if let Some(watcher) = &mut self.watcher {
                watcher(&effect);
            }
            if matches!(effect, Effect::Frame(_) | Effect::Console(_)) {
                if self.unreleased.len() == KEPT_EFFECTS {
                    self.unreleased.pop_front();
                }
                self.unreleased.push_back((self.seq, effect));
            }
        }
        Ok(())
    }

    fn broken_off(&mut self, _: &mut Machine) -> Result<(), RunError> {
        Ok(())
    }

    fn ended(&mut self, machine: &mut Machine, _: GuestEnd) -> Result<(), RunError> {
        let mut effects = Vec::new();
        loop {
            if self.apply_due(machine, &mut effects)?.is_some() {
                return Ok(());
            }
            let found = "a guest whose life has ended".to_owned();
            if let Some(entry) = self.ahead.pop_front() {
                return Err(self.diverged(machine, describe(&entry), found));
            }
            if self.reached > machine.anchors() {
                return Err(self.diverged(machine, "a guest that runs on".into(), found));
            }
            if !self.fetch()? {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ft_log::{Batch, Encoder};

    use super::*;

    struct OneBatch(Option<Vec<u8>>);

    impl PartSource for OneBatch {
        fn next(&mut self) -> Result<Option<LogPart>, RunError> {
            let part = |entries| LogPart::Batch(Batch { seq: 1, reached: 9, entries, ..Batch::default() });
            Ok(self.0.take().map(part))
        }

        fn executed(&mut self, _: u64, _: GuestTime) {}
    }

    fn boundary_of(entries: &[Entry]) -> Option<u64> {
        let mut encoder = Encoder::new(Cursor::default());
        entries.iter().for_each(|entry| encoder.push(entry).unwrap());
        let board = BoardConfig {
            epoch_s: 0,
            ram_bytes: 32 << 20,
            net_mac: None,
            disk_bytes: None,
            disk_read_only: false,
            disk_write_through: false,
        };
        let mut door = Follow::new(OneBatch(Some(encoder.take())), Cursor::default(), board, 1);
        assert!(door.fetch().unwrap());
        door.next_boundary().unwrap()
    }

    #[test]
    fn clock_reads_are_due_at_the_boundary_of_what_is_behind_them() {
        let clock = |now| Entry::Clock { unlogged: 3, now: GuestTime(now) };
        let check = Entry::Check { anchor: 7, digest: 1 };
        let stop = Entry::Stop { anchor: 7, position: Position::Checkpoint };
        assert_eq!(boundary_of(std::slice::from_ref(&check)), Some(7));
        assert_eq!(boundary_of(&[clock(1), clock(2), check.clone()]), Some(7));
        assert_eq!(boundary_of(&[clock(1), stop.clone()]), Some(6), "a stop asks for nothing");
        assert_eq!(boundary_of(&[stop]), Some(7));
        assert_eq!(boundary_of(&[clock(1), clock(2)]), None);
        let many: Vec<Entry> = (0..=LOOK_PAST_MAX as u64).map(clock).chain([check]).collect();
        assert_eq!(boundary_of(&many), None, "what is looked past is bounded");
    }
}
