//! The report of a guest that is not the one the log describes.
//!
//! Owns: the text that a person needs to hunt the cause: position, expected, found, last entries.

use std::collections::VecDeque;
use std::fmt;

use ft_log::{Entry, Event, Position};

use crate::machine::{LoadedRdtscs, Machine};

/// An RDTSC that nobody rewrote reads the host's counter, so it is suspected first.
const LIKELY_CAUSE: &str = "likely cause";

/// Where and how replay left the log.
#[derive(Debug)]
pub struct Divergence {
    anchor: u64,
    expected: String,
    found: String,
    registers: String,
    /// RDTSCs that may be the cause, or why they were not searched for.
    loaded: Result<LoadedRdtscs, String>,
    recent: Vec<String>,
}

/// The last entries of a log, those that were applied or those that were written.
#[derive(Debug)]
pub struct Recent {
    briefs: VecDeque<Brief>,
    kept: usize,
}

/// An entry without the bulk of its data, cheap to keep.
#[derive(Debug)]
struct Brief {
    what: &'static str,
    anchor: Option<u64>,
    number: u64,
}

impl Brief {
    fn new(entry: &Entry) -> Self {
        let (what, anchor, number) = match entry {
            Entry::Clock { now, .. } => ("clock read, ticks", None, now.0),
            Entry::Check { anchor, digest } => ("digest", Some(*anchor), u64::from(*digest)),
            Entry::Stop { anchor, position: Position::Checkpoint } => {
                ("forced stop, checkpoint", Some(*anchor), 0)
            }
            Entry::Stop { anchor, position: Position::Counted(counted) } => {
                ("forced stop, branches", Some(*anchor), counted.branches)
            }
            Entry::End { anchor, digest } => ("end, digest", Some(*anchor), digest.registers),
            Entry::Event { anchor, event } => {
                let (what, number) = match event {
                    Event::Tick { now } => ("tick, ticks", now.0),
                    Event::Frame { data } => ("frame, bytes", data.len() as u64),
                    Event::DiskDone { id, .. } => ("disk request done, id", *id),
                    Event::Console { data } => ("console input, bytes", data.len() as u64),
                    Event::Entropy { data } => ("random bytes", data.len() as u64),
                    Event::PowerButton => ("power button", 0),
                };
                (what, Some(*anchor), number)
            }
        };
        Self { what, anchor, number }
    }
}

impl fmt::Display for Brief {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.anchor {
            Some(anchor) => write!(f, "anchor {anchor}: {} {} ({:#x})", self.what, self.number, self.number),
            None => write!(f, "{} {}", self.what, self.number),
        }
    }
}

impl Recent {
    /// Remembers `kept` entries.
    pub fn keeping(kept: usize) -> Self {
        Self { briefs: VecDeque::new(), kept }
    }

    /// Remembers an entry, forgetting the oldest.
    pub fn note(&mut self, entry: &Entry) {
        if self.briefs.len() == self.kept {
            self.briefs.pop_front();
        }
        self.briefs.push_back(Brief::new(entry));
    }

    /// A line for each, oldest first.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        self.briefs.iter().map(Brief::to_string)
    }

    /// Makes the report.
    pub fn diverged(&self, machine: &Machine, expected: String, found: String) -> Box<Divergence> {
        let registers = format!("{:x?}", machine.last_registers());
        let loaded = machine.loaded_rdtscs().map_err(|error| crate::with_causes(&error));
        Box::new(Divergence { loaded, ..*self.report(machine.anchors(), expected, found, registers) })
    }

    /// As [`Self::diverged`], of a guest at `anchor` with these registers.
    pub fn report(&self, anchor: u64, expected: String, found: String, registers: String) -> Box<Divergence> {
        let recent = self.lines().collect();
        Box::new(Divergence {
            anchor,
            expected,
            found,
            registers,
            loaded: Ok(LoadedRdtscs::default()),
            recent,
        })
    }
}

impl Divergence {
    /// Where, and how, in one line.
    pub fn brief(&self) -> String {
        let mut brief =
            format!("at anchor {}: expected {}, found {}", self.anchor, self.expected, self.found);
        if let Ok(loaded) = &self.loaded
            && !loaded.is_empty()
        {
            brief.push_str(&format!("; {LIKELY_CAUSE}: {loaded}"));
        }
        brief
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the guest diverged from the log at anchor {}", self.anchor)?;
        writeln!(f, "  expected: {}", self.expected)?;
        writeln!(f, "  found:    {}", self.found)?;
        writeln!(f, "  registers at the last exit: {}", self.registers)?;
        match &self.loaded {
            Ok(loaded) if loaded.is_empty() => writeln!(f, "  loaded kernel code: no RDTSC")?,
            Ok(loaded) => writeln!(f, "  {LIKELY_CAUSE}: {loaded}")?,
            Err(why) => writeln!(f, "  loaded kernel code: not searched: {why}")?,
        }
        write!(f, "  last entries, oldest first:")?;
        for entry in &self.recent {
            write!(f, "\n    {entry}")?;
        }
        Ok(())
    }
}

/// One line for an entry, without the bulk of its data.
pub fn describe(entry: &Entry) -> String {
    Brief::new(entry).to_string()
}
