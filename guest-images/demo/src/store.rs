//! The store: all pairs in memory, each write appended to a log file and synced before it counts.
//!
//! The file is text, one line per write: `total_writes key value`. On start it is read back; a last line without its
//! end is a write that was never acknowledged and is cut off. Anything else that does not fit is an error: the store
//! must not go on from a file that it did not write.
//!
//! States: open -> failed (a write or sync failed: what is on the disk is unknown, so no more writes are taken).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Why the store cannot be opened or written to.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("Cannot use the log file {path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error("The log file {path} is damaged at write {write}")]
    Damaged { path: PathBuf, write: u64 },
    #[error("an earlier write to the disk failed; no more writes are taken")]
    Failed,
}

/// See the module's description.
pub struct Store {
    path: PathBuf,
    file: File,
    pairs: BTreeMap<String, String>,
    writes: u64,
    failed: bool,
}

impl Store {
    /// Reads the log file back, or creates it.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let failed = |source| StoreError::File { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        let mut text = String::new();
        file.read_to_string(&mut text).map_err(failed)?;

        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        if complete < text.len() {
            file.set_len(complete as u64).map_err(failed)?;
        }
        let mut store =
            Store { path: path.to_owned(), file, pairs: BTreeMap::new(), writes: 0, failed: false };
        for line in text[..complete].lines() {
            let mut words = line.splitn(3, ' ');
            let number = words.next().and_then(|word| word.parse().ok());
            match (number, words.next(), words.next()) {
                (Some(number), Some(key), Some(value)) if number == store.writes + 1 => {
                    store.pairs.insert(key.to_owned(), value.to_owned());
                    store.writes = number;
                }
                _ => return Err(StoreError::Damaged { path: store.path, write: store.writes + 1 }),
            }
        }
        Ok(store)
    }

    /// Sets a key. When this returns, the write is on the disk. Returns the number of writes so far.
    pub fn put(&mut self, key: &str, value: &str) -> Result<u64, StoreError> {
        if self.failed {
            return Err(StoreError::Failed);
        }
        let number = self.writes + 1;
        let line = format!("{number} {key} {value}\n");
        if let Err(source) = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data()) {
            self.failed = true;
            return Err(StoreError::File { path: self.path.clone(), source });
        }
        self.pairs.insert(key.to_owned(), value.to_owned());
        self.writes = number;
        Ok(number)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.pairs.get(key).map(String::as_str)
    }

    /// Number of writes ever.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// All pairs, ordered by key.
    pub fn pairs(&self) -> Vec<(String, String)> {
        self.pairs.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_are_there_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut store = Store::open(&path).unwrap();
        store.put("a", "1").unwrap();
        store.put("b", "two words").unwrap();
        assert_eq!(store.put("a", "").unwrap(), 3);
        drop(store);

        let store = Store::open(&path).unwrap();
        assert_eq!((store.writes(), store.len()), (3, 2));
        assert_eq!(store.get("a"), Some(""));
        assert_eq!(store.get("b"), Some("two words"));
    }

    #[test]
    fn unfinished_last_write_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "1 a x\n2 b unfinis").unwrap();
        let mut store = Store::open(&path).unwrap();
        assert_eq!((store.writes(), store.get("b")), (1, None));
        assert_eq!(store.put("c", "y").unwrap(), 2);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1 a x\n2 c y\n");
    }

    #[test]
    fn damaged_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "1 a x\n3 b y\n").unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Damaged { write: 2, .. })));
    }

    #[test]
    fn no_write_is_taken_after_a_failed_one() {
        // Writes to this device fail with ENOSPC; reads of it never end, so it comes in after the start.
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(&dir.path().join("log")).unwrap();
        store.file = OpenOptions::new().write(true).open("/dev/full").unwrap();
        assert!(matches!(store.put("a", "1"), Err(StoreError::File { .. })));
        assert!(matches!(store.put("a", "1"), Err(StoreError::Failed)));
        assert_eq!((store.get("a"), store.writes()), (None, 0));
    }
}
