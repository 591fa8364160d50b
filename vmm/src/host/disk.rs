//! The guest's disk: a raw image in a file or on a block device.
//!
//! Owns: the image's descriptor, its lock, and the one thread that does the guest's requests in their order.
//! Must never: touch the image while the guard says that this monitor has no right to (another one may
//! run the guest), write to it when another monitor has taken it (`host/owner.rs`), or write beyond its end.
//! States: [`Disk`] opened, locked or (on a backup) not yet -> [`Disk::start`] -> [`DiskWorker`] -> dropped.
//!
//! The lock only refuses an image that another monitor *of a live host* uses by mistake. Which of a pair may
//! write is decided by their claims (see `pair/claims/claim.rs`): the file server may hold a dead host's lock for
//! minutes, so a takeover that finds the image locked may go on if it holds the claim.
//!
//! Not covered: a request that the host has already passed to a hung file server can reach the image later, and one
//! between the last look at guard and owner and the system call.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{self, Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use devices::{DiskOp, DiskRequest};
use ft_log::{DiskStatus, Event, MAX_DISK_BYTES};
use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::image::{Image, ImageError};
use super::inbox::Inbox;
use super::owner::{Owned, Ownership};
use super::{StopToken, Worker};
use crate::file_kind::FileKind;
use crate::host::LogEvent;

/// Bytes per sector; an image is a whole number of them.
const SECTOR_BYTES: u64 = 512;
/// Requests that wait for the thread before [`DiskWorker::submit`] makes its caller wait.
const QUEUE_REQUESTS: usize = 256;

/// How often a guard that said no is asked again.
const GUARD_PAUSE: Duration = Duration::from_millis(5);
/// Pause between two looks at whether a request is under way.
const QUIESCE_POLL: Duration = Duration::from_millis(1);

/// Asked before each request: whether this monitor may touch the disk now. After a no, nothing is done until
/// it says yes again: the lease is back, or a claim has been won. Otherwise nothing is done ever.
pub type Guard = Arc<dyn Fn() -> bool + Send + Sync>;

/// When a write counts as done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Once this host's kernel has it. For a guest without a backup: a write that the guest did not flush
    /// dies with the host, and so does the guest.
    Host,
    /// Once the image's storage has it (`O_DSYNC`). For a guest with a backup: the guest outlives this host,
    /// so what it was told is written must be there for the other one to read. The guest knows, and flushes nothing.
    WriteThrough,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error("Disk image '{path}' does not exist; create one with `truncate -s 1G {path}`")]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// A directory, socket or the like.
    #[error("Disk image '{path}' is neither a file nor a block device")]
    NotAnImage {
        /// The image.
        path: PathBuf,
    },
    /// A format of its own, which the guest would see as the content of its disk.
    #[error("Disk image '{path}' is {kind}; make a raw one of it: `qemu-img convert -O raw {path} disk.img`")]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// What it is.
        kind: FileKind,
    },
    /// The size is not that of a disk.
    #[error("Disk image '{path}' has {len_bytes} bytes; it needs a multiple of 512, and more than none")]
    BadSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        len_bytes: u64,
    },
    /// This user may not open it.
    #[error("No permission to open disk image '{path}' for {access}")]
    NoPermission {
        /// The image.
        path: PathBuf,
        /// "reading" or "reading and writing".
        access: &'static str,
    },
    /// Another monitor holds the lock.
    #[error("Disk image '{path}' is in use by another monitor")]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// The size changed between opening and go-live.
    #[error("Disk image '{path}' had {was_bytes} bytes when it was opened and has {is_bytes} now")]
    SizeChanged {
        /// The image.
        path: PathBuf,
        /// When it was opened.
        was_bytes: u64,
        /// Now.
        is_bytes: u64,
    },
    /// Anything else that the host refuses.
    #[error("Disk image '{path}' cannot be used")]
    Io {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// An open image that nobody reads or writes yet.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    file: File,
    read_only: bool,
    caching: Caching,
    capacity_bytes: u64,
    owned: Option<Arc<Ownership>>,
}

impl Disk {
    /// Opens the image at `path` and locks it: exclusively, or shared with other readers if `read_only`.
    pub fn open(path: &Path, read_only: bool, caching: Caching) -> Result<Self, DiskError> {
        check_format(path)?;
        let disk = Self::open_unlocked(path, read_only, caching)?;
        disk.try_lock()?;
        Ok(disk)
    }

    /// Opens the image at `path` as a backup does: faults show early, the lock stays with the primary.
    pub fn open_unlocked(path: &Path, read_only: bool, caching: Caching) -> Result<Self, DiskError> {
        let access = if read_only { "reading" } else { "reading and writing" };
        let error = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => DiskError::Missing { path: path.to_owned() },
            io::ErrorKind::PermissionDenied => DiskError::NoPermission { path: path.to_owned(), access },
            _ => DiskError::Io { path: path.to_owned(), source },
        };
        // Before opening: opening a FIFO would wait for its other end.
        let kind = fs::metadata(path).map_err(error)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(DiskError::NotAnImage { path: path.to_owned() });
        }
        let file = Self::open_file(path, read_only, caching).map_err(error)?;
        Self::with_file(path, file, read_only, caching)
    }

    fn open_file(path: &Path, read_only: bool, caching: Caching) -> io::Result<File> {
        let flags = if caching == Caching::WriteThrough { libc::O_DSYNC } else { 0 };
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
    }

    fn with_file(path: &Path, mut file: File, read_only: bool, caching: Caching) -> Result<Self, DiskError> {
        // The end of a block device, unlike its metadata, tells its size.
        let capacity_bytes =
            file.seek(SeekFrom::End(0)).map_err(|source| DiskError::Io { path: path.to_owned(), source })?;
        if capacity_bytes == 0 || !capacity_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(DiskError::BadSize { path: path.to_owned(), len_bytes: capacity_bytes });
        }
        Ok(Self { path: path.to_owned(), file, read_only, caching, capacity_bytes, owned: None })
    }

    /// Takes the lock at go-live, and lets go of everything that this host remembers of the image: the other
    /// host has written to it since.
    ///
    /// [`DiskError::InUse`] leaves the image usable; whether to go on is the caller's decision (see above).
    pub fn lock(&mut self) -> Result<(), DiskError> {
        // Network file systems look for changes when a file is opened. The descriptor leads to the file that was opened
        // before, whatever the path leads to now.
        let same = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let opened = Self::open_file(Path::new(&same), self.read_only, self.caching);
        let file = opened.map_err(|source| DiskError::Io { path: self.path.clone(), source })?;
        let fresh = Self::with_file(&self.path, file, self.read_only, self.caching)?;
        if fresh.capacity_bytes != self.capacity_bytes {
            return Err(DiskError::SizeChanged {
                path: fresh.path,
                was_bytes: self.capacity_bytes,
                is_bytes: fresh.capacity_bytes,
            });
        }
        *self = fresh;
        posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|error| DiskError::Io { path: self.path.clone(), source: error.into() })?;
        self.try_lock()
    }

    fn try_lock(&self) -> Result<(), DiskError> {
        let locked = if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() };
        match locked {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(DiskError::InUse { path: self.path.clone() }),
            Err(TryLockError::Error(error)) if locks_unsupported(&error) => {
                tracing::warn!(image = %self.path.display(), %error,
                    "The file system has no locks; nothing refuses a second monitor that uses this image.");
                Ok(())
            }
            Err(TryLockError::Error(source)) => Err(DiskError::Io { path: self.path.clone(), source }),
        }
    }

    /// From now on nothing is written but while the image is `owned`.
    pub fn own(&mut self, owned: Ownership) {
        self.owned = Some(Arc::new(owned));
    }

    /// What says that the image is this monitor's, to give it back one day.
    pub fn owned(&self) -> Option<Arc<Ownership>> {
        self.owned.clone()
    }

    /// The file that the image is; `None` for a block device.
    ///
    /// # Errors
    /// Its path leads to another file by now, or the storage does not answer.
    pub fn image(&self) -> Result<Option<Image>, ImageError> {
        Image::of(&self.path, &self.file)
    }

    /// The image's size in bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Starts the thread. Each request is done once `guard` allows it and answered with [`Event::DiskDone`]
    /// in `inbox`, in order.
    pub fn start(self, inbox: impl Into<Inbox>, guard: Guard) -> Result<DiskWorker, DiskError> {
        let inbox = inbox.into();
        let (queue, requests) = bounded(QUEUE_REQUESTS);
        let path = self.path.clone();
        let busy = Arc::new(Mutex::new(()));
        let at_work = Arc::clone(&busy);
        let worker = Worker::spawn("disk", move |stop| self.run(stop, &requests, &inbox, &guard, &at_work))
            .map_err(|source| DiskError::Io { path, source })?;
        Ok(DiskWorker { _worker: worker, queue, busy })
    }

    fn run(
        self,
        stop: &StopToken,
        requests: &Receiver<DiskRequest>,
        inbox: &Inbox,
        guard: &Guard,
        busy: &Mutex<()>,
    ) {
        let mut backlog = VecDeque::new();
        loop {
            let next = backlog.pop_front().or_else(|| {
                select! {
                    recv(requests) -> request => request.ok(),
                    recv(stop.channel()) -> _ => None,
                }
            });
            let Some(request) = next else { return };
            if stop.stopped() {
                return;
            }
            let done = loop {
                if !wait_for(guard, stop, requests, &mut backlog) {
                    return;
                }
                let at_work = busy.lock().unwrap_or_else(PoisonError::into_inner);
                match self.may_perform(&request) {
                    // The guard is asked again, and last: a refusal that came before the lock was taken holds, and the
                    // storage's answer may be as old as this host was frozen after it was given.
                    Owned::Yes if guard() => break self.perform(request),
                    Owned::No => return,
                    Owned::Yes | Owned::Unknown(_) => {}
                }
                drop(at_work);
                if stop.stopped() {
                    return;
                }
                std::thread::sleep(GUARD_PAUSE);
            };
            if !deliver(done, stop, requests, inbox, &mut backlog) {
                return;
            }
        }
    }

    /// Whether nothing but the guard speaks against a request. Only writes can harm a new owner.
    fn may_perform(&self, request: &DiskRequest) -> Owned {
        let (Some(owned), DiskOp::Write { .. }) = (&self.owned, &request.op) else { return Owned::Yes };
        let answer = owned.ask();
        match &answer {
            Owned::Yes => {}
            Owned::No => {
                tracing::error!(event = %LogEvent::ImageLost, image = %self.path.display(), owner = %owned.path().display(),
                "Another monitor has taken the disk image, or its owner's record was removed; this one writes to it no more.")
            }
            Owned::Unknown(error) => tracing::warn!(image = %self.path.display(), %error,
                "The disk waits: the storage does not say whether the image is still this monitor's."),
        }
        answer
    }

    fn perform(&self, request: DiskRequest) -> Event {
        let id = request.id;
        let result = match request.op {
            DiskOp::Read { offset_bytes, len_bytes } => self.read(offset_bytes, len_bytes),
            DiskOp::Write { offset_bytes, data } => self.write(offset_bytes, &data).map(|()| Vec::new()),
            DiskOp::Flush => self.file.sync_data().map(|()| Vec::new()),
        };
        match result {
            Ok(data) => Event::DiskDone { id, status: DiskStatus::Ok, data },
            Err(error) => {
                tracing::warn!(image = %self.path.display(), request = id, %error, "A disk request failed.");
                Event::DiskDone { id, status: DiskStatus::IoError, data: Vec::new() }
            }
        }
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> io::Result<Vec<u8>> {
        self.check_range(offset_bytes, len_bytes as usize)?;
        let mut data = vec![0; len_bytes as usize];
        self.file.read_exact_at(&mut data, offset_bytes)?;
        Ok(data)
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
        self.check_range(offset_bytes, data.len())?;
        self.file.write_all_at(data, offset_bytes)
    }

    /// A write beyond the end would make the file longer; a read of any length would take any memory.
    fn check_range(&self, offset_bytes: u64, len_bytes: usize) -> io::Result<()> {
        let end = offset_bytes.checked_add(len_bytes as u64);
        if len_bytes > MAX_DISK_BYTES || end.is_none_or(|end| end > self.capacity_bytes) {
            let text = format!("{len_bytes} bytes at {offset_bytes} are not a request for this image");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(())
    }
}

/// Waits until `guard` says yes. Requests are taken in meanwhile, so that nobody hangs in submitting one and
/// cannot be stopped. False: the thread is to end.
fn wait_for(
    guard: &Guard,
    stop: &StopToken,
    requests: &Receiver<DiskRequest>,
    backlog: &mut VecDeque<DiskRequest>,
) -> bool {
    while !guard() {
        select! {
            recv(requests) -> request => match request {
                Ok(request) => backlog.push_back(request),
                Err(_) => return false,
            },
            recv(stop.channel()) -> _ => return false,
            default(GUARD_PAUSE) => {}
        }
    }
    true
}

/// Puts `done` on the queue of events. While that is full, requests are taken in: the thread that should
/// drain the events may be the one that waits to submit a request. False: the thread is to end.
fn deliver(
    done: Event,
    stop: &StopToken,
    requests: &Receiver<DiskRequest>,
    inbox: &Inbox,
    backlog: &mut VecDeque<DiskRequest>,
) -> bool {
    let done = match inbox.try_send(done) {
        Ok(()) => return true,
        Err(TrySendError::Disconnected(_)) => return false,
        Err(TrySendError::Full(done)) => done,
    };
    loop {
        select! {
            send(inbox.channel(), done) -> sent => {
                inbox.note();
                return sent.is_ok();
            }
            recv(requests) -> request => match request {
                Ok(request) => backlog.push_back(request),
                Err(_) => return false,
            },
            recv(stop.channel()) -> _ => return false,
        }
    }
}

/// Refuses the formats of virtual disks. Only where a guest starts: later the content is the guest's affair.
fn check_format(path: &Path) -> Result<(), DiskError> {
    let mut start = Vec::new();
    // What cannot be read is refused for that reason, soon.
    if path.is_file()
        && let Ok(file) = File::open(path)
        && file.take(SECTOR_BYTES).read_to_end(&mut start).is_ok()
        && let kind @ FileKind::VirtualDisk(_) = FileKind::of(&start)
    {
        return Err(DiskError::NotRaw { path: path.to_owned(), kind });
    }
    Ok(())
}

fn locks_unsupported(error: &io::Error) -> bool {
    let unsupported = [Errno::ENOLCK, Errno::EOPNOTSUPP, Errno::ENOSYS];
    unsupported.iter().any(|errno| error.raw_os_error() == Some(*errno as i32))
}

/// A disk at work. Dropping it ends the thread after the request that it is doing; requests that still wait
/// are not done, as if the power had failed. The lock is released with it.
pub struct DiskWorker {
    // First, so that the thread is told to stop before its queue closes.
    _worker: Worker,
    queue: Sender<DiskRequest>,
    busy: Arc<Mutex<()>>,
}

impl DiskWorker {
    /// With the guard saying no: waits until no request is under way. False: one still was after `timeout`.
    pub fn quiesce(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        loop {
            match self.busy.try_lock() {
                Ok(_) | Err(sync::TryLockError::Poisoned(_)) => return true,
                Err(sync::TryLockError::WouldBlock) if Instant::now() >= deadline => return false,
                Err(sync::TryLockError::WouldBlock) => std::thread::sleep(QUIESCE_POLL),
            }
        }
    }

    /// Queues `request` behind the others. Waits while the queue is full, which slows the guest down to the
    /// speed of its disk.
    pub fn submit(&self, request: DiskRequest) {
        if self.queue.send(request).is_err() {
            tracing::debug!("A disk request came after the disk's thread had ended.");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tempfile::{NamedTempFile, TempDir};

    use super::*;

    fn image(len_bytes: u64) -> NamedTempFile {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(len_bytes).unwrap();
        file
    }

    fn start(image: &NamedTempFile, guard: Guard) -> (DiskWorker, Receiver<Event>) {
        let (events, answers) = bounded(16);
        let disk = Disk::open(image.path(), false, Caching::Host).unwrap();
        (disk.start(events, guard).unwrap(), answers)
    }

    fn always() -> Guard {
        Arc::new(|| true)
    }

    fn write(id: u64, offset_bytes: u64, data: &[u8]) -> DiskRequest {
        DiskRequest { id, op: DiskOp::Write { offset_bytes, data: data.to_vec() } }
    }

    fn read(id: u64, offset_bytes: u64, len_bytes: u32) -> DiskRequest {
        DiskRequest { id, op: DiskOp::Read { offset_bytes, len_bytes } }
    }

    fn done(id: u64, status: DiskStatus, data: &[u8]) -> Event {
        Event::DiskDone { id, status, data: data.to_vec() }
    }

    #[test]
    fn nothing_is_written_once_another_has_taken_the_image() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, [0; 1024]).unwrap();
        let (events, answers) = bounded(16);
        let mut disk = Disk::open(&path, false, Caching::Host).unwrap();
        let image = Arc::new(disk.image().unwrap().unwrap());
        let take = || Ownership::take(&image, b"record", None).unwrap();
        disk.own(take());
        let disk = disk.start(events, always()).unwrap();
        disk.submit(write(1, 0, &[1; 512]));
        assert_eq!(answers.recv(), Ok(done(1, DiskStatus::Ok, &[])));
        let _new_owner = take();
        disk.submit(read(2, 0, 512));
        assert_eq!(answers.recv(), Ok(done(2, DiskStatus::Ok, &[1; 512])), "reading harms nobody");
        disk.submit(write(3, 512, &[3; 512]));
        assert!(answers.recv().is_err(), "the thread has ended, and answered nothing");
        assert_eq!(fs::read(&path).unwrap(), [[1; 512], [0; 512]].concat());
        // Nobody hangs who does not know yet.
        disk.submit(write(4, 512, &[4; 512]));
        assert!(disk.quiesce(Duration::ZERO));
    }

    #[test]
    fn requests_are_done_and_answered_in_order() {
        let image = image(4096);
        let (disk, answers) = start(&image, always());
        disk.submit(write(7, 1024, &[0xab; 512]));
        disk.submit(read(8, 512, 1024));
        disk.submit(DiskRequest { id: 9, op: DiskOp::Flush });
        assert_eq!(answers.recv(), Ok(done(7, DiskStatus::Ok, &[])));
        assert_eq!(answers.recv(), Ok(done(8, DiskStatus::Ok, &[[0u8; 512], [0xab; 512]].concat())));
        assert_eq!(answers.recv(), Ok(done(9, DiskStatus::Ok, &[])));
    }

    #[test]
    fn requests_that_the_guard_does_not_allow_are_neither_done_nor_answered() {
        let image = image(4096);
        let asked = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&asked);
        let never = move || {
            count.fetch_add(1, Ordering::SeqCst);
            false
        };
        let (disk, answers) = start(&image, Arc::new(never));
        disk.submit(write(1, 0, &[1; 512]));
        while asked.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        drop(disk);
        assert!(answers.is_empty());
        assert_eq!(fs::read(image.path()).unwrap(), [0; 4096]);
    }

    #[test]
    fn requests_wait_in_order_for_a_guard_that_says_yes_later() {
        let image = image(4096);
        let asked = AtomicU64::new(0);
        let (disk, answers) = start(&image, Arc::new(move || asked.fetch_add(1, Ordering::SeqCst) >= 3));
        disk.submit(write(1, 0, &[1; 512]));
        disk.submit(read(2, 0, 512));
        assert_eq!(answers.recv(), Ok(done(1, DiskStatus::Ok, &[])));
        assert_eq!(answers.recv(), Ok(done(2, DiskStatus::Ok, &[1; 512])));
    }

    #[test]
    fn requests_outside_the_image_fail_and_leave_it_alone() {
        let image = image(1024);
        let (disk, answers) = start(&image, always());
        disk.submit(write(1, 512, &[1; 1024]));
        disk.submit(read(2, 1024, 512));
        disk.submit(read(3, u64::MAX - 511, 512));
        disk.submit(read(4, 0, MAX_DISK_BYTES as u32 + 512));
        for id in 1..=4 {
            assert_eq!(answers.recv(), Ok(done(id, DiskStatus::IoError, &[])));
        }
        assert_eq!(fs::read(image.path()).unwrap(), [0; 1024]);
    }

    #[test]
    fn an_image_that_shrinks_gives_an_io_error() {
        let image = image(1024);
        let (disk, answers) = start(&image, always());
        image.as_file().set_len(512).unwrap();
        disk.submit(read(1, 512, 512));
        assert_eq!(answers.recv(), Ok(done(1, DiskStatus::IoError, &[])));
    }

    #[test]
    fn a_read_only_image_refuses_writes_and_shares_its_lock_with_readers() {
        let image = image(1024);
        let disk = Disk::open(image.path(), true, Caching::Host).unwrap();
        Disk::open(image.path(), true, Caching::Host).unwrap();
        let refused = Disk::open(image.path(), false, Caching::Host);
        assert!(matches!(refused, Err(DiskError::InUse { .. })));
        let (events, answers) = bounded(1);
        let disk = disk.start(events, always()).unwrap();
        disk.submit(write(1, 0, &[1; 512]));
        assert_eq!(answers.recv(), Ok(done(1, DiskStatus::IoError, &[])));
    }

    #[test]
    fn a_backup_gets_the_lock_once_the_primary_is_gone() {
        let image = image(1024);
        let primary = Disk::open(image.path(), false, Caching::WriteThrough).unwrap();
        assert!(matches!(Disk::open(image.path(), false, Caching::Host), Err(DiskError::InUse { .. })));
        let mut backup = Disk::open_unlocked(image.path(), false, Caching::WriteThrough).unwrap();
        assert!(matches!(backup.lock(), Err(DiskError::InUse { .. })));
        drop(primary);
        backup.lock().unwrap();
        assert!(matches!(Disk::open(image.path(), false, Caching::Host), Err(DiskError::InUse { .. })));
    }

    #[test]
    fn dropping_the_worker_releases_the_lock_even_when_nobody_takes_its_answers() {
        let image = image(1024);
        let (events, _nobody_reads) = bounded(0);
        let disk = Disk::open(image.path(), false, Caching::Host).unwrap();
        let disk = disk.start(events, always()).unwrap();
        disk.submit(read(1, 0, 512));
        drop(disk);
        Disk::open(image.path(), false, Caching::Host).unwrap();
    }

    #[test]
    fn submitting_goes_on_while_nobody_takes_the_answers() {
        let image = image(1024);
        let (events, answers) = bounded(0);
        let disk = Disk::open(image.path(), false, Caching::Host).unwrap();
        let disk = disk.start(events, always()).unwrap();
        let count = 2 * QUEUE_REQUESTS as u64;
        for id in 0..count {
            disk.submit(read(id, 0, 512));
        }
        for id in 0..count {
            assert_eq!(answers.recv(), Ok(done(id, DiskStatus::Ok, &[0; 512])));
        }
    }

    #[test]
    fn unusable_images_are_refused_by_reason() {
        let directory = TempDir::new().unwrap();
        let open = |path: &Path| Disk::open(path, false, Caching::Host).unwrap_err();
        assert!(matches!(open(&directory.path().join("none")), DiskError::Missing { .. }));
        assert!(matches!(open(directory.path()), DiskError::NotAnImage { .. }));
        assert!(matches!(open(image(0).path()), DiskError::BadSize { len_bytes: 0, .. }));
        assert!(matches!(open(image(1000).path()), DiskError::BadSize { len_bytes: 1000, .. }));
    }

    #[test]
    fn a_backup_goes_live_with_the_image_that_it_has_opened() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, [1; 512]).unwrap();
        let mut backup = Disk::open_unlocked(&path, false, Caching::Host).unwrap();
        fs::write(directory.path().join("other"), [2; 512]).unwrap();
        fs::rename(directory.path().join("other"), &path).unwrap();
        backup.lock().unwrap();
        assert_eq!(backup.read(0, 512).unwrap(), [1; 512]);
        assert!(matches!(backup.image(), Err(ImageError::Replaced { .. })));
    }

    #[test]
    fn virtual_disks_are_refused_unless_the_guest_wrote_one_itself() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("disk.qcow2");
        for (start, size_bytes) in
            [(&b"QFI\xfb"[..], 1024), (b"# Disk DescriptorFile", 700), (b"vhdxfile", 0x200)]
        {
            fs::write(&path, [start, &vec![0; size_bytes - start.len()]].concat()).unwrap();
            let error = Disk::open(&path, false, Caching::Host).unwrap_err();
            assert!(matches!(error, DiskError::NotRaw { .. }), "{error}");
            assert!(error.to_string().contains("qemu-img convert -O raw"), "{error}");
        }
        fs::write(&path, [0; 1024]).unwrap();
        let mut disk = Disk::open_unlocked(&path, false, Caching::WriteThrough).unwrap();
        fs::write(&path, [&b"QFI\xfb"[..], &[0; 1020]].concat()).unwrap();
        disk.lock().unwrap();
    }

    #[test]
    fn a_size_that_changed_before_go_live_is_refused() {
        let image = image(1024);
        let mut backup = Disk::open_unlocked(image.path(), false, Caching::Host).unwrap();
        image.as_file().set_len(2048).unwrap();
        let refused = backup.lock();
        assert!(matches!(refused, Err(DiskError::SizeChanged { was_bytes: 1024, is_bytes: 2048, .. })));
    }
}
