//! Reads the service's log from the disk image: what survives when everything else is gone.
//!
//! Owns: the repair of the image's file system (a journal of a machine that lost power) and the check of the log.
//! Must never: run while a monitor may use the image.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use super::DemoError;

/// The service's writes as the disk has them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Log {
    /// Number of writes; they are numbered from 1 without a gap.
    pub(super) writes: usize,
    /// The last value of each key.
    pub(super) pairs: BTreeMap<String, String>,
}

/// Repairs the image's file system and reads the service's log.
pub(super) fn read_log(image: &Path) -> Result<Log, DemoError> {
    let mut check = Command::new("e2fsck");
    // 1: repaired, as a disk that lost power must be.
    tool(check.args(["-f", "-p"]).arg(image), &[0, 1])?;
    let mut cat = Command::new("debugfs");
    parse(&tool(cat.args(["-R", "cat /log"]).arg(image), &[0])?)
}

fn tool(command: &mut Command, good: &[i32]) -> Result<String, DemoError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .map_err(|source| DemoError::Disk { why: format!("'{program}' cannot be run: {source}") })?;
    if !output.status.code().is_some_and(|code| good.contains(&code)) {
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        return Err(DemoError::Disk {
            why: format!("'{program}' ended with {}: {}", output.status, said.trim()),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Lines are `number key value`. What follows the last line's end was never acknowledged.
fn parse(text: &str) -> Result<Log, DemoError> {
    let complete = text.rfind('\n').map_or(0, |end| end + 1);
    let mut log = Log::default();
    for line in text[..complete].lines() {
        let mut words = line.splitn(3, ' ');
        match (words.next().and_then(|number| number.parse().ok()), words.next(), words.next()) {
            (Some(number), Some(key), Some(value)) if log.writes + 1 == number => {
                log.writes = number;
                log.pairs.insert(key.to_owned(), value.to_owned());
            }
            _ => {
                let why = format!("behind write {} the service's log says '{line}'", log.writes);
                return Err(DemoError::Disk { why });
            }
        }
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_values_count_and_an_unfinished_line_does_not() {
        let log = parse("1 a x\n2 b two words\n3 a y\n4 b unfin").unwrap();
        assert_eq!(log.writes, 3);
        let pairs = [("a", "y"), ("b", "two words")];
        assert_eq!(log.pairs, pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        assert_eq!(parse("").unwrap(), Log::default());
    }

    #[test]
    fn write_done_twice_or_left_out_is_found() {
        for text in ["1 a x\n1 a x\n", "1 a x\n3 b y\n", "2 a x\n", "1 a\n", "\0\0\n"] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains("behind write"), "{text}: {error}");
        }
    }

    #[test]
    fn an_image_without_a_log_is_an_error() {
        let image = Path::new("/no/such/image");
        assert!(matches!(read_log(image), Err(DemoError::Disk { .. })));
    }
}
