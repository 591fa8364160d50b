//! Recordings: a snapshot and the log behind it, in one file.
//!
//! Owns: the file's layout, writer and reader together, and its states on disk. Must never: give a file
//! its final name before all of it is durable, or pass a file that is cut off for a whole one.
//!
//! ```text
//! magic "VMFTREC\0" | version u32 | frames: Snapshot.., SnapshotEnd, Batch 1, 2, .., Bye(RecordingEnd)
//!                                          with Checkpoint.. before the batch that holds its stop
//! ```
//!
//! A recording that a backup kept of what it was sent, up to where its guest differed, ends with Bye(Diverged) in place
//! of Bye(RecordingEnd), and its last batch without an `End`.
//!
//! States on disk: `FILE.incomplete` while it is written, or if the monitor died; `FILE` when it is whole. A recording holds
//! the guest's memory: only its owner may read it, whatever the umask says, and neither name replaces or follows anything.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::message::{Batch, ByeReason, LogPart, MAX_TEXT_BYTES, Message};
use crate::private_file::{create_private, rename_new};
use crate::session::{BatchReceiver, SequenceError};
use crate::stream::{
    FrameReader, FrameWriter, SnapshotSink, SnapshotSource, StreamError, header, read_header,
};

/// Version of the file: of its frames, the entries and the snapshot in it.
pub const RECORDING_VERSION: u32 = 7;
/// First bytes of the file.
pub const RECORDING_MAGIC: [u8; 8] = *b"VMFTREC\0";

/// What can go wrong with a recording.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// The file system failed.
    #[error("Cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A recording would be overwritten.
    #[error("{} exists already: move it away or choose another name", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// Only the unfinished file is there.
    #[error(
        "{} was never completed: its monitor did not stop cleanly. What it got to write is in {}",
        path.display(),
        incomplete.display()
    )]
    Incomplete {
        /// The file that was asked for.
        path: PathBuf,
        /// The file that is there.
        incomplete: PathBuf,
    },
    /// The file ends early.
    #[error("{} is cut off after {batches} whole batches", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The batches before the cut.
        batches: u64,
    },
    /// Something else.
    #[error("{} is not a recording: it starts with {}", path.display(), found.escape_ascii())]
    Magic {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        found: [u8; 8],
    },
    /// Another version.
    #[error("{} is a recording of version {found}, this monitor knows {RECORDING_VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// A frame is damaged or out of place.
    #[error("The recording {} is damaged", path.display())]
    Stream {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: StreamError,
    },
    /// The log in it is not that of the snapshot in it.
    #[error(
        "The recording {} cannot be replayed: its log starts at anchor {found}, and its snapshot is of anchor {snapshot}; \
         they were not recorded together",
        path.display()
    )]
    Start {
        /// The file.
        path: PathBuf,
        /// Where the snapshot's guest is.
        snapshot: u64,
        /// Where the log starts.
        found: u64,
    },
    /// Batches are missing or out of order.
    #[error("The recording {} has its batches out of order", path.display())]
    Sequence {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: SequenceError,
    },
}

/// Writes a recording: first the snapshot, then batches, then [`RecordingWriter::finish`].
///
/// Dropped before that, it leaves `FILE.incomplete` behind.
#[derive(Debug)]
pub struct RecordingWriter {
    path: PathBuf,
    incomplete: PathBuf,
    frames: FrameWriter<File>,
    sequence: BatchReceiver,
}

impl RecordingWriter {
    /// Starts the recording that will be `path`.
    ///
    /// # Errors
    /// [`RecordingError::Exists`] if there is a recording of that name, finished or not.
    pub fn create(path: &Path) -> Result<Self, RecordingError> {
        // A link that leads nowhere is there, too.
        if path.symlink_metadata().is_ok() {
            return Err(RecordingError::Exists { path: path.into() });
        }
        let incomplete = incomplete_path(path);
        let mut file = create_private(&incomplete)
            .map_err(|source| exists_or("create", &incomplete, &incomplete, source))?;
        file.write_all(&header(RECORDING_MAGIC, RECORDING_VERSION))
            .map_err(|source| io_error("write", &incomplete, source))?;
        let frames = FrameWriter::with_snapshot_due(file);
        Ok(Self { path: path.into(), incomplete, frames, sequence: BatchReceiver::default() })
    }

    /// Starts the snapshot. Write its container, then call [`SnapshotSink::finish`].
    pub fn snapshot(&mut self) -> SnapshotSink<'_, File> {
        self.frames.snapshot()
    }

    /// Adds `batch`, the first is number 1.
    ///
    /// # Errors
    /// A batch out of order, or before the snapshot was finished; the file's error.
    pub fn batch(&mut self, batch: Batch) -> Result<(), RecordingError> {
        self.sequence
            .accept(&batch)
            .map_err(|source| RecordingError::Sequence { path: self.incomplete.clone(), source })?;
        self.send(&Message::Batch(batch))
    }

    /// Adds a piece of a checkpoint; the batch with its stop follows.
    ///
    /// # Errors
    /// As [`RecordingWriter::batch`].
    pub fn checkpoint(&mut self, piece: Vec<u8>) -> Result<(), RecordingError> {
        self.send(&Message::Checkpoint(piece))
    }

    /// Marks the file as whole, makes it durable and gives it its name.
    ///
    /// # Errors
    /// [`RecordingError::Exists`] if there is a file of its name by now, or the file system's error; the file then keeps
    /// its unfinished name.
    pub fn finish(self) -> Result<(), RecordingError> {
        let path = self.path.clone();
        self.end(ByeReason::RecordingEnd, "", &path)
    }

    /// As [`RecordingWriter::finish`], for what a backup was sent until its guest differed, as the file `path`. `text`
    /// says how; what is over [`MAX_TEXT_BYTES`] of it is cut off.
    ///
    /// # Errors
    /// As [`RecordingWriter::finish`].
    pub fn finish_diverged(self, text: &str, path: &Path) -> Result<(), RecordingError> {
        self.end(ByeReason::Diverged, &text[..text.floor_char_boundary(MAX_TEXT_BYTES)], path)
    }

    fn end(mut self, reason: ByeReason, text: &str, path: &Path) -> Result<(), RecordingError> {
        self.send(&Message::Bye { reason, text: text.to_owned() })?;
        self.frames.get_ref().sync_all().map_err(|source| io_error("sync", &self.incomplete, source))?;
        rename_new(&self.incomplete, path)
            .map_err(|source| exists_or("rename", &self.incomplete, path, source))?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(directory)
            .and_then(|opened| opened.sync_all())
            .map_err(|source| io_error("sync", directory, source))
    }

    fn send(&mut self, message: &Message) -> Result<(), RecordingError> {
        self.frames.send(message).map_err(|error| match error {
            StreamError::Io(source) => io_error("write", &self.incomplete, source),
            source => RecordingError::Stream { path: self.incomplete.clone(), source },
        })
    }
}

fn incomplete_path(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".incomplete");
    name.into()
}

/// The error of an `action` on `file` that makes the name `new`, which may be taken.
fn exists_or(action: &'static str, file: &Path, new: &Path, source: io::Error) -> RecordingError {
    match source.kind() {
        io::ErrorKind::AlreadyExists => RecordingError::Exists { path: new.into() },
        _ => io_error(action, file, source),
    }
}

fn io_error(action: &'static str, path: &Path, source: io::Error) -> RecordingError {
    RecordingError::Io { action, path: path.into(), source }
}

/// Reads a recording: first the snapshot, then the log.
///
/// A file that is cut off reads well up to the cut, so that what there is can be looked at.
#[derive(Debug)]
pub struct RecordingReader<R> {
    path: PathBuf,
    frames: FrameReader<R>,
    sequence: BatchReceiver,
    ended: bool,
    divergence: Option<String>,
}

impl RecordingReader<File> {
    /// Opens a recording.
    ///
    /// # Errors
    /// [`RecordingError::Incomplete`] if only `path.incomplete` is there, which may be opened by that name.
    pub fn open(path: &Path) -> Result<Self, RecordingError> {
        let file = File::open(path).map_err(|source| {
            let incomplete = incomplete_path(path);
            if source.kind() == io::ErrorKind::NotFound && incomplete.exists() {
                RecordingError::Incomplete { path: path.into(), incomplete }
            } else {
                io_error("open", path, source)
            }
        })?;
        Self::new(file, path)
    }
}

impl<R: Read> RecordingReader<R> {
    /// Reads the recording in `input`, which errors call `path`.
    ///
    /// # Errors
    /// Something else than a recording of this version.
    pub fn new(mut input: R, path: &Path) -> Result<Self, RecordingError> {
        let (magic, version) = read_header(&mut input).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => RecordingError::Truncated { path: path.into(), batches: 0 },
            _ => io_error("read", path, source),
        })?;
        if magic != RECORDING_MAGIC {
            return Err(RecordingError::Magic { path: path.into(), found: magic });
        }
        if version != RECORDING_VERSION {
            return Err(RecordingError::Version { path: path.into(), found: version });
        }
        let frames = FrameReader::new(input);
        Ok(Self {
            path: path.into(),
            frames,
            sequence: BatchReceiver::default(),
            ended: false,
            divergence: None,
        })
    }

    /// The snapshot's bytes; read them to their end before the first batch.
    pub fn snapshot(&mut self) -> SnapshotSource<'_, R> {
        self.frames.snapshot()
    }

    /// What only the snapshot's reader knows: the guest in it is at `anchor`. A log that starts elsewhere is refused. To
    /// be told before the first batch.
    pub fn snapshot_is_at(&mut self, anchor: u64) {
        self.sequence = BatchReceiver::of_recording(anchor);
    }

    /// The next part of the log, or `None` at the end of a whole recording.
    ///
    /// # Errors
    /// [`RecordingError::Truncated`] where a recording that is not whole ends, [`RecordingError::Start`] if the snapshot is
    /// another log's.
    pub fn next_part(&mut self) -> Result<Option<LogPart>, RecordingError> {
        if self.ended {
            return Ok(None);
        }
        match self.receive()? {
            Some(Message::Batch(batch)) => {
                self.sequence.accept(&batch).map_err(|error| match error {
                    SequenceError::Start { expected: snapshot, found } => {
                        RecordingError::Start { path: self.path.clone(), snapshot, found }
                    }
                    source => RecordingError::Sequence { path: self.path.clone(), source },
                })?;
                Ok(Some(LogPart::Batch(batch)))
            }
            Some(Message::Checkpoint(piece)) => Ok(Some(LogPart::Checkpoint(piece))),
            Some(Message::Bye { reason: reason @ (ByeReason::RecordingEnd | ByeReason::Diverged), text }) => {
                if let Some(message) = self.receive()? {
                    return Err(self.unexpected("the end of the file", &message));
                }
                self.ended = true;
                self.divergence = (reason == ByeReason::Diverged).then_some(text);
                Ok(None)
            }
            Some(message) => Err(self.unexpected("a batch", &message)),
            None => Err(self.truncated()),
        }
    }

    /// At the end of a recording that a backup kept: how its guest differed.
    pub fn divergence(&self) -> Option<&str> {
        self.divergence.as_deref()
    }

    fn receive(&mut self) -> Result<Option<Message>, RecordingError> {
        self.frames.receive().map_err(|error| match error {
            StreamError::Truncated { .. } => self.truncated(),
            StreamError::Io(source) => io_error("read", &self.path, source),
            source => RecordingError::Stream { path: self.path.clone(), source },
        })
    }

    fn truncated(&self) -> RecordingError {
        RecordingError::Truncated { path: self.path.clone(), batches: self.sequence.received() }
    }

    fn unexpected(&self, expected: &'static str, message: &Message) -> RecordingError {
        let source = StreamError::Unexpected { expected, found: message.kind().name() };
        RecordingError::Stream { path: self.path.clone(), source }
    }
}
