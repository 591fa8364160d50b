//! A counter of what this thread's guest does, and the signal of its overflow.
//!
//! Owns: the perf event. Must never: count the host, or be read while the guest runs.
//! States: opened (stands still at 0) -> started -> stopped -> started again, counting on.

use std::io;
use std::os::fd::AsRawFd;

use perf_event::events::Raw;
use perf_event::{Builder, Counter as PerfCounter};

use super::events::BranchEvent;
use super::host::HostPmu;

/// `F_SETOWN_EX`, `F_SETSIG` and `F_OWNER_TID` of `asm-generic/fcntl.h`; absent from libc for this target.
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// `struct f_owner_ex` of `asm-generic/fcntl.h`.
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    id: libc::pid_t,
}

/// A counter of this thread.
#[derive(Debug)]
pub struct Counter {
    perf: PerfCounter,
}

impl Counter {
    /// Counts `event` while this thread is in a guest, in both rings.
    pub fn guest_branches(pmu: &HostPmu, event: &BranchEvent) -> io::Result<Self> {
        guest_only(pmu, event).build().map(|perf| Self { perf })
    }

    /// As [`Self::guest_branches`], and sends `signal` to this thread each time another `period` of them are
    /// counted.
    pub fn guest_branches_with_signal(
        pmu: &HostPmu,
        event: &BranchEvent,
        period: u64,
        signal: libc::c_int,
    ) -> io::Result<Self> {
        Self::with_signal(&mut guest_only(pmu, event), period, signal)
    }

    /// Counts a raw event of this thread in the host's user mode.
    pub fn host_user(pmu: &HostPmu, config: u64) -> io::Result<Self> {
        raw(pmu, config).exclude_guest(true).build().map(|perf| Self { perf })
    }

    fn with_signal(builder: &mut Builder<'_>, period: u64, signal: libc::c_int) -> io::Result<Self> {
        let perf = builder.sample_period(period).wakeup_events(1).build()?;
        send_overflows(perf.as_raw_fd(), signal)?;
        Ok(Self { perf })
    }

    /// The next signal comes after `branches` more, and then after as many again.
    pub fn set_period(&self, branches: u64) -> io::Result<()> {
        /// `PERF_EVENT_IOC_PERIOD`: `_IOW('$', 4, __u64)`.
        const IOC_PERIOD: libc::c_ulong = 0x4008_2404;
        // SAFETY: the descriptor is open, and the kernel only reads the number that it is given.
        check(unsafe { libc::ioctl(self.perf.as_raw_fd(), IOC_PERIOD, &raw const branches) })
    }

    /// Starts counting.
    pub fn start(&mut self) -> io::Result<()> {
        self.perf.enable()
    }

    /// Stops counting.
    pub fn stop(&mut self) -> io::Result<()> {
        self.perf.disable()
    }

    /// The count.
    ///
    /// # Errors
    /// Also when the event did not have its counter all the time, since the count then lacks something.
    pub fn read(&mut self) -> io::Result<u64> {
        let count = self.perf.read_count_and_time()?;
        if count.time_running < count.time_enabled {
            return Err(io::Error::other("the counter was shared with other users of performance counters"));
        }
        Ok(count.count)
    }
}

/// Pinned: the event has its counter or fails, it never takes turns with others.
fn raw(pmu: &HostPmu, config: u64) -> Builder<'static> {
    let mut builder = Builder::new(Raw::new(config));
    builder.attrs_mut().type_ = pmu.perf_type;
    builder.pinned(true);
    builder
}

fn guest_only(pmu: &HostPmu, event: &BranchEvent) -> Builder<'static> {
    let mut builder = raw(pmu, event.config);
    builder.exclude_host(true).include_kernel();
    builder
}

fn send_overflows(fd: libc::c_int, signal: libc::c_int) -> io::Result<()> {
    let owner = OwnerEx { kind: F_OWNER_TID, id: nix::unistd::gettid().as_raw() };
    // SAFETY: the descriptor is open, and F_SETOWN_EX only reads the `f_owner_ex` that it is given.
    check(unsafe { libc::fcntl(fd, F_SETOWN_EX, &raw const owner) })?;
    // SAFETY: the descriptor is open, and the argument is a number.
    check(unsafe { libc::fcntl(fd, F_SETSIG, signal) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use devices::GuestRam;
    use perf_event::events::Software;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    static SIGNALS: AtomicU32 = AtomicU32::new(0);

    extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }

    /// With an event that the kernel counts itself, since few machines have a PMU for tests.
    #[test]
    fn each_overflow_sends_the_signal_to_the_counting_thread() {
        const PAGES: usize = 100;
        let signal = vmm_sys_util::signal::SIGRTMIN() + 5;
        vmm_sys_util::signal::register_signal_handler(signal, on_signal).unwrap();
        let mut builder = Builder::new(Software::PAGE_FAULTS_MIN);
        let mut counter = match Counter::with_signal(&mut builder, 10, signal) {
            Ok(counter) => counter,
            Err(error) => {
                println!("SKIPPED each_overflow_sends_the_signal_to_the_counting_thread: {error}");
                return;
            }
        };
        // A mapping of its own: what an allocator gives may have been touched before.
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), PAGES * 4096)]).unwrap();
        counter.start().unwrap();
        for page in 0..PAGES {
            memory.write_obj(1u8, GuestAddress(page as u64 * 4096)).unwrap();
        }
        counter.stop().unwrap();
        let count = counter.read().unwrap();
        assert!(count >= PAGES as u64 / 2, "{count} page faults for {PAGES} pages");
        let signals = u64::from(SIGNALS.load(Ordering::Relaxed));
        assert!((1..=count / 10).contains(&signals), "{signals} signals for {count} page faults");
    }

    #[test]
    fn a_guests_branches_are_counted_in_both_rings_and_nowhere_else() {
        use super::super::events::{CoreKind, Erratum};
        let pmu = HostPmu { perf_type: 10, core: CoreKind::Performance, cpus: None };
        let event = BranchEvent {
            microarchitecture: "test",
            config: 0x11c4,
            skid_max: 1,
            skid_unbounded: false,
            erratum: Erratum::SmiFreeze,
        };
        let builder = guest_only(&pmu, &event);
        let attrs = builder.attrs();
        assert_eq!((attrs.type_, attrs.config), (10, 0x11c4));
        assert_eq!((attrs.exclude_host(), attrs.exclude_guest()), (1, 0));
        assert_eq!((attrs.exclude_kernel(), attrs.exclude_user(), attrs.pinned()), (0, 0, 1));
    }
}
