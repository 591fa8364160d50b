//! The output rule: what lets an output go.
//!
//! Owns: the mode of the gate and the newest acknowledged batch. Must never: open again once closed.
//!
//! ```text
//!              protect           unprotect
//! Unprotected ---------> Protected ---------> Unprotected
//!      '---------------------'------ close ------> Closed, for ever
//! ```

/// What happens to outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Held until acknowledged.
    Protected,
    /// Let out at once.
    Unprotected,
    /// Dropped, for ever.
    Closed,
}

/// Whether an output may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Leave {
    /// Yes.
    Yes,
    /// Its batch is not acknowledged, or the gate is closed.
    NotYet,
    /// It is acknowledged, but the lease is over.
    NoLease,
}

/// The rule, in its present mode.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct OutputRule {
    mode: Mode,
    acknowledged: u64,
}

impl OutputRule {
    /// A rule in `mode`; nothing is acknowledged.
    pub fn new(mode: Mode) -> Self {
        Self { mode, acknowledged: 0 }
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The newest acknowledged batch.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// The backup has all batches up to `seq`.
    pub fn acknowledge(&mut self, seq: u64) {
        self.acknowledged = self.acknowledged.max(seq);
    }

    /// A backup follows from here on. Its batches count from 1; none is acknowledged yet.
    pub fn protect(&mut self) {
        self.acknowledged = 0;
        self.set(Mode::Protected);
    }

    /// Changes the mode, unless it is closed.
    pub fn set(&mut self, mode: Mode) {
        if self.mode != Mode::Closed {
            self.mode = mode;
        }
    }

    /// May an output leave whose batch is `seq`? The lease is asked only if all else is well.
    pub fn may_leave(&self, seq: u64, lease: impl FnOnce() -> bool) -> Leave {
        match self.mode {
            Mode::Unprotected => Leave::Yes,
            Mode::Protected if seq > self.acknowledged => Leave::NotYet,
            Mode::Protected if lease() => Leave::Yes,
            Mode::Protected => Leave::NoLease,
            Mode::Closed => Leave::NotYet,
        }
    }
}
