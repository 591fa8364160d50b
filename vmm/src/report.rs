//! Reports of guests that differed, as files: a text for a person, and a recording that shows it again.
//!
//! Owns: the files of one guest's monitors on this host in one directory. Must never: fill the directory up, fail a
//! monitor, keep anything of a guest that never differed, or let others read a guest's memory: others may write to the
//! directory (`/tmp`), so names are unpredictable or, as SECONDS, the next one that is free.
//!
//! ```text
//!   GUEST.HOST.PID.RANDOM.kept.incomplete   what a backup is sent, while it follows   ── gone when it no longer does
//!        │ the guest differed
//!        v
//!   GUEST.HOST.SECONDS.rec, .txt            the newest REPORTS_KEPT of each
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use ft_log::{LogPart, RecordingWriter, SnapshotSink, StreamError, create_private, to_hex};
use thiserror::Error;

use crate::host::random_bytes;
use crate::with_causes;

/// How many names in a row are tried for a report.
const NAMES_TRIED: u64 = 64;
/// Reports of each kind that are kept; older ones are removed.
const REPORTS_KEPT: usize = 4;
/// The end of the name of a recording that is being kept.
const KEPT: &str = "kept";

/// Why there are no reports.
#[derive(Debug, Error)]
pub enum ReportError {
    /// The directory.
    #[error("reports cannot be written to the directory {} (--report-dir): {source}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file in it.
    #[error("the report {} cannot be written: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Where the reports of one guest go.
#[derive(Clone, Debug)]
pub struct Reports {
    directory: PathBuf,
    prefix: String,
    limit_bytes: u64,
}

impl Reports {
    /// Reports in `directory`, which exists. A recording of one has `limit_bytes` at most.
    pub fn open(directory: &Path, guest: &str, host: &str, limit_bytes: u64) -> Result<Self, ReportError> {
        let reports = Self { directory: directory.into(), prefix: format!("{guest}.{host}."), limit_bytes };
        let files =
            reports.files().map_err(|source| ReportError::Directory { path: directory.into(), source })?;
        for name in files {
            // What monitors left behind that were killed.
            let pid = name[reports.prefix.len()..].split('.').next().and_then(|pid| pid.parse::<u32>().ok());
            let is_left = pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists());
            if is_left && name.contains(&format!(".{KEPT}")) {
                reports.remove(&name);
            }
        }
        Ok(reports)
    }

    /// The names of this guest's files from this host: behind the prefix comes a number.
    fn files(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let rest = name.strip_prefix(&self.prefix).and_then(|rest| rest.split_once('.'));
            if rest.is_some_and(|(number, _)| number.bytes().all(|byte| byte.is_ascii_digit())) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) {
        let path = self.directory.join(name);
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "an old report cannot be removed");
        }
    }

    /// Begins to keep what a backup is sent.
    pub fn keep(&self) -> Kept {
        let mut kept =
            Kept { writer: None, path: self.directory.clone(), bytes: 0, limit_bytes: self.limit_bytes };
        let mut random = [0; 8];
        if let Err(error) = random_bytes(&mut random) {
            kept.give_up(&format!("no random name for it: {error}"));
            return kept;
        }
        let name = format!("{}{}.{}.{KEPT}", self.prefix, std::process::id(), to_hex(&random));
        kept.path.push(name);
        match RecordingWriter::create(&kept.path) {
            Ok(writer) => kept.writer = Some(writer),
            Err(error) => kept.give_up(&with_causes(&error)),
        }
        kept
    }

    /// Creates the text of a report, under the first name at or after `seconds` that is free, for its recording too.
    fn create_text(&self, seconds: u64) -> Result<(File, PathBuf), ReportError> {
        let mut number = seconds;
        loop {
            let path = self.directory.join(format!("{}{number:010}.txt", self.prefix));
            let created = match path.with_extension("rec").symlink_metadata() {
                Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
                Err(_) => create_private(&path),
            };
            number += 1;
            match created {
                Ok(file) => return Ok((file, path)),
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists && number < seconds + NAMES_TRIED => {}
                Err(source) => return Err(ReportError::File { path, source }),
            }
        }
    }

    /// Writes a report, with the recording that belongs to it if there is one. Answers the names of what was written.
    ///
    /// # Errors
    /// The text cannot be written.
    pub fn write(&self, text: &str, brief: &str, kept: Option<Kept>) -> Result<Vec<PathBuf>, ReportError> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (mut file, path) = self.create_text(seconds)?;
        let mut written = Vec::new();
        written.extend(kept.and_then(|kept| kept.finish(brief, path.with_extension("rec"))));
        let told = match written.first() {
            Some(recording) => format!(
                "{text}\n\nThe guest as this monitor got it, and the log from there on: `vmft replay {}`.\n\
                 Equal: the log is sound, and this host erred (its memory, its processor).\n\
                 Different at the same anchor: the host that wrote the log erred, or something reaches the guest past the log.\n",
                recording.display()
            ),
            None => format!("{text}\n\nNo recording belongs to this report.\n"),
        };
        file.write_all(told.as_bytes()).map_err(|source| ReportError::File { path: path.clone(), source })?;
        written.push(path);
        self.forget_old(&written);
        Ok(written)
    }

    /// Leaves the newest of each kind, and in any case what was just `written`: names may be planted, and clocks set back.
    fn forget_old(&self, written: &[PathBuf]) {
        for kind in [".rec", ".txt"] {
            let Ok(files) = self.files() else { return };
            let is_new = |name: &&String| written.contains(&self.directory.join(name));
            let (new, old): (Vec<&String>, Vec<&String>) =
                files.iter().filter(|name| name.ends_with(kind)).partition(is_new);
            let kept = REPORTS_KEPT - new.len().min(REPORTS_KEPT);
            old.iter().rev().skip(kept).for_each(|name| self.remove(name));
        }
    }
}

/// The names of what was written, for a message.
pub fn listed(files: &[PathBuf]) -> String {
    files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// What a backup was sent so far. The file goes when this is dropped.
#[derive(Debug)]
pub struct Kept {
    writer: Option<RecordingWriter>,
    path: PathBuf,
    bytes: u64,
    limit_bytes: u64,
}

impl Kept {
    fn give_up(&mut self, why: &str) {
        tracing::warn!("a divergence from here on is reported without a recording: {why}");
        self.discard();
    }

    fn discard(&mut self) {
        if self.writer.take().is_some() {
            let mut incomplete = self.path.clone().into_os_string();
            incomplete.push(".incomplete");
            if let Err(error) = fs::remove_file(&incomplete) {
                tracing::warn!(path = ?incomplete, %error, "what was kept for a report cannot be removed");
            }
        }
    }

    /// Lets `load` read the snapshot in `input`, and keeps what it reads.
    pub fn snapshot<T>(&mut self, input: impl Read, load: impl FnOnce(&mut dyn Read) -> T) -> T {
        let Some(writer) = &mut self.writer else { return load(&mut { input }) };
        let mut tee =
            Tee { input, sink: writer.snapshot(), bytes: 0, limit_bytes: self.limit_bytes, failed: None };
        let loaded = load(&mut tee);
        let Tee { sink, bytes, failed, .. } = tee;
        self.bytes = bytes;
        if let Some(why) = failed.or_else(|| sink.finish().err().map(|error| with_causes(&error))) {
            self.give_up(&why);
        }
        loaded
    }

    /// Keeps a part of the log.
    pub fn part(&mut self, part: &LogPart) {
        let Some(writer) = &mut self.writer else { return };
        let (len_bytes, kept) = match part {
            LogPart::Checkpoint(piece) => (piece.len(), writer.checkpoint(piece.clone())),
            LogPart::Batch(batch) => (batch.entries.len(), writer.batch(batch.clone())),
        };
        self.bytes += (len_bytes + ft_log::FRAME_HEADER_BYTES) as u64;
        match kept {
            Err(error) => self.give_up(&with_causes(&error)),
            Ok(()) if self.bytes > self.limit_bytes => self.give_up(&over(self.limit_bytes)),
            Ok(()) => {}
        }
    }

    /// Makes it the recording `path` of a guest that differed in the way that `brief` says.
    fn finish(mut self, brief: &str, path: PathBuf) -> Option<PathBuf> {
        let finished = self.writer.take()?.finish_diverged(brief, &path);
        finished
            .map_err(|error| {
                tracing::warn!("the report has no recording: {}", with_causes(&error));
            })
            .ok()
            .map(|()| path)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.discard();
    }
}

fn over(limit_bytes: u64) -> String {
    format!("guest and log since it joined are more than {} MiB (--report-mib)", limit_bytes >> 20)
}

/// Reads, and writes down what it read, as long as that works.
struct Tee<'a, R> {
    input: R,
    sink: SnapshotSink<'a, File>,
    bytes: u64,
    limit_bytes: u64,
    failed: Option<String>,
}

impl<R: Read> Read for Tee<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.bytes += len as u64;
        if self.failed.is_none() {
            self.failed = if self.bytes > self.limit_bytes {
                Some(over(self.limit_bytes))
            } else {
                self.sink.write_all(&buffer[..len]).err().map(|error| with_causes(&StreamError::Io(error)))
            };
        }
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use ft_log::{Batch, RecordingReader};

    use super::*;

    fn batch(seq: u64) -> LogPart {
        LogPart::Batch(Batch {
            view: 2,
            seq,
            start: (seq == 1).then_some(0),
            reached: seq,
            released: 0,
            entries: vec![1; 100],
        })
    }

    /// Keeps a snapshot of 5 bytes and two batches.
    fn kept(reports: &Reports) -> Kept {
        let mut kept = reports.keep();
        let read = kept.snapshot(&b"state"[..], |input| {
            let mut all = Vec::new();
            input.read_to_end(&mut all).unwrap();
            all
        });
        assert_eq!(read, b"state");
        kept.part(&batch(1));
        kept.part(&batch(2));
        kept
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_kept_becomes_a_recording_that_says_how_the_guest_differed() {
        let directory = tempfile::tempdir().unwrap();
        let reports = Reports::open(directory.path(), "web", "a", 1 << 20).unwrap();
        let written = reports.write("text", "brief", Some(kept(&reports))).unwrap();
        let mut reader = RecordingReader::open(&written[0]).unwrap();
        let mut snapshot = Vec::new();
        reader.snapshot().read_to_end(&mut snapshot).unwrap();
        assert_eq!(snapshot, b"state");
        assert_eq!(reader.next_part().unwrap(), Some(batch(1)));
        assert_eq!(reader.next_part().unwrap(), Some(batch(2)));
        assert_eq!(reader.next_part().unwrap(), None);
        assert_eq!(reader.divergence(), Some("brief"));
        let text = fs::read_to_string(&written[1]).unwrap();
        assert!(text.starts_with("text\n") && text.contains(&written[0].display().to_string()), "{text}");
        assert_eq!(names(directory.path()).len(), 2);
    }

    #[test]
    fn nothing_is_left_of_a_guest_that_never_differed() {
        let directory = tempfile::tempdir().unwrap();
        let reports = Reports::open(directory.path(), "web", "a", 1 << 20).unwrap();
        let kept = kept(&reports);
        assert_eq!(names(directory.path()).len(), 1);
        drop(kept);
        assert!(names(directory.path()).is_empty());
        // A process that is no more, and one that is: this one.
        for pid in [u32::MAX, std::process::id()] {
            File::create(directory.path().join(format!("web.a.{pid}.00ff.kept.incomplete"))).unwrap();
        }
        Reports::open(directory.path(), "web", "a", 1 << 20).unwrap();
        assert_eq!(names(directory.path()), [format!("web.a.{}.00ff.kept.incomplete", std::process::id())]);
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn only_the_owner_may_read_what_is_kept_and_reported() {
        let directory = tempfile::tempdir().unwrap();
        let reports = Reports::open(directory.path(), "web", "a", 1 << 20).unwrap();
        let kept = kept(&reports);
        let [incomplete] = &names(directory.path())[..] else { panic!("one file") };
        assert_eq!(mode(&directory.path().join(incomplete)), 0o600);
        for file in reports.write("text", "brief", Some(kept)).unwrap() {
            assert_eq!(mode(&file), 0o600, "{}", file.display());
        }
    }

    #[test]
    fn names_that_are_taken_or_planted_are_passed_over() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        fs::write(&victim, "of value").unwrap();
        let absent = directory.path().join("absent");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        // The test may run into the next second or the one after it.
        let taken = now..now + 20;
        for number in taken.clone() {
            let kind = ["txt", "rec"][number as usize % 2];
            let to = if number % 4 < 2 { &victim } else { &absent };
            symlink(to, directory.path().join(format!("web.a.{number:010}.{kind}"))).unwrap();
        }
        let reports = Reports::open(directory.path(), "web", "a", 1 << 20).unwrap();
        // Two within the same second, too.
        let first = reports.write("first", "brief", Some(kept(&reports))).unwrap();
        let second = reports.write("second", "brief", Some(kept(&reports))).unwrap();
        for (files, text) in [(&first, "first"), (&second, "second")] {
            let mut snapshot = Vec::new();
            RecordingReader::open(&files[0]).unwrap().snapshot().read_to_end(&mut snapshot).unwrap();
            assert_eq!(snapshot, b"state");
            assert!(fs::read_to_string(&files[1]).unwrap().starts_with(text));
            assert_eq!(files[0].with_extension("txt"), files[1]);
        }
        assert_ne!(first, second);
        assert_eq!(fs::read(&victim).unwrap(), b"of value");
        assert!(!absent.exists(), "a link was followed");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_text_is_written_without_it() {
        let directory = tempfile::tempdir().unwrap();
        let reports = Reports::open(directory.path(), "web", "a", 150).unwrap();
        let kept = kept(&reports);
        assert!(names(directory.path()).is_empty(), "two batches are more than the limit");
        let written = reports.write("text", "brief", Some(kept)).unwrap();
        assert_eq!(written.len(), 1);
        assert!(fs::read_to_string(&written[0]).unwrap().contains("No recording"));
    }

    #[test]
    fn old_reports_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        for seconds in 1..=5 {
            for name in ["web.a", "web.b"] {
                File::create(directory.path().join(format!("{name}.{seconds:010}.txt"))).unwrap();
            }
        }
        let reports = Reports::open(directory.path(), "web", "a", 1).unwrap();
        reports.write("text", "brief", None).unwrap();
        let own = names(directory.path()).into_iter().filter(|name| name.starts_with("web.a")).count();
        assert_eq!((own, names(directory.path()).len()), (REPORTS_KEPT, REPORTS_KEPT + 5));
    }
}
