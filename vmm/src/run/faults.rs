//! Faults that a follower's host has once in a long while, made on purpose: for tests of what follows.
//!
//! Owns: when they happen. Must never: happen without being asked for, or twice.

use std::str::FromStr;
use std::time::Duration;

use crate::machine::{Corruption, Machine, MachineError};

/// A guest that is corrupted, so many boundaries from where following began or as soon after that as it can be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorruptAt {
    what: Corruption,
    boundaries: u64,
}

/// A guest that takes so long at each of so many boundaries, from so many boundaries on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slowness {
    pause: Duration,
    from: u64,
    count: u64,
}

/// What is to go wrong.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// The so-manieth forced stop that is a checkpoint counts as missed.
    pub missed_stop: Option<u64>,
    /// The guest is corrupted.
    pub corruption: Option<CorruptAt>,
    /// The guest is slow.
    pub slowness: Option<Slowness>,
}

/// `N:register` or `N:memory=TEXT`.
impl FromStr for CorruptAt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (boundaries, what) = text.split_once(':').ok_or_else(|| format!("'{text}' has no ':'"))?;
        Ok(Self { what: what.parse()?, boundaries: number(boundaries)? })
    }
}

/// `MS:FROM:COUNT`.
impl FromStr for Slowness {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<u64> = text.split(':').map(number).collect::<Result<_, _>>()?;
        let [pause_ms, from, count] = parts[..] else {
            return Err(format!("'{text}' is not three numbers with ':' between them"));
        };
        Ok(Self { pause: Duration::from_millis(pause_ms), from, count })
    }
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("'{text}' is not a number"))
}

impl Faults {
    /// Does the forced stop that comes now count as missed?
    pub fn misses_stop(&mut self) -> bool {
        match &mut self.missed_stop {
            None => false,
            Some(0 | 1) => {
                self.missed_stop = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
        }
    }

    /// The guest stands at a boundary, `passed` of them behind where following began.
    pub fn at_boundary(&mut self, machine: &mut Machine, passed: u64) -> Result<(), MachineError> {
        let due = |fault: &mut CorruptAt| passed >= fault.boundaries && machine.can_corrupt(&fault.what);
        if let Some(CorruptAt { what, .. }) = self.corruption.take_if(due) {
            let bits = machine.corrupt(&what)?;
            tracing::warn!(
                anchor = machine.anchors(),
                bits,
                "an injected fault corrupts this guest: {what:?}"
            );
        }
        if let Some(Slowness { pause, from, count }) = &self.slowness
            && (*from..from.saturating_add(*count)).contains(&passed)
        {
            std::thread::sleep(*pause);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_parsed_or_refused() {
        let corrupt = CorruptAt { what: Corruption::Memory("a:b".into()), boundaries: 7 };
        assert_eq!("7:memory=a:b".parse(), Ok(corrupt));
        let slow = Slowness { pause: Duration::from_millis(2), from: 3, count: 4 };
        assert_eq!("2:3:4".parse(), Ok(slow));
        for bad in ["register", "x:register", "7:disk"] {
            assert!(bad.parse::<CorruptAt>().is_err(), "{bad}");
        }
        for bad in ["2", "2:3", "2:3:x", "2:3:4:5"] {
            assert!(bad.parse::<Slowness>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_stop_is_missed() {
        let mut faults = Faults { missed_stop: Some(2), ..Faults::default() };
        let missed: Vec<bool> = (0..4).map(|_| faults.misses_stop()).collect();
        assert_eq!(missed, [false, true, false, false]);
        assert!(!Faults::default().misses_stop());
    }
}
