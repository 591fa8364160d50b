//! Work for the guest's processor and page tables alone: for guests that make no exits.
//!
//! Usage: `vmft-compute loop MILLIONS` counts in a register, `vmft-compute dirty MIB ROUNDS` writes a word of every
//! page of a buffer in each round, `vmft-compute paging MIB ROUNDS` maps, protects, forks, copies on write and unmaps,
//! `vmft-compute rate MIB MIB_PER_S` writes to pages of a buffer, one after the other, at that rate and for ever,
//! `vmft-compute noise MIB` fills them with what nobody can compress, for ever.
//! A number of 0 rounds means for ever. But for the rate it must do the same work at every run.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

const PAGE_WORDS: usize = 512;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Option<Vec<u64>> = arguments.iter().skip(1).map(|number| number.parse().ok()).collect();
    match (arguments.first().map(String::as_str), numbers.as_deref()) {
        (Some("loop"), Some([millions])) => repeat(*millions, |_| count(1_000_000)),
        (Some("dirty"), Some([mib, rounds])) => {
            let mut buffer = vec![0u64; (*mib as usize) << 17];
            repeat(*rounds, |round| dirty(&mut buffer, round));
        }
        (Some("paging"), Some([mib, rounds])) => repeat(*rounds, |round| {
            if let Err(error) = paging((*mib as usize) << 20, round) {
                eprintln!("vmft-compute: paging: {error}");
            }
        }),
        (Some("rate"), Some([mib, mib_per_s])) => dirty_at(*mib as usize, *mib_per_s as usize),
        (Some("noise"), Some([mib])) => noise(&mut vec![0u64; (*mib as usize) << 17]),
        _ => {
            eprintln!(
                "usage: vmft-compute loop MILLIONS | vmft-compute (dirty | paging) MIB ROUNDS | \
                 vmft-compute rate MIB MIB_PER_S | vmft-compute noise MIB"
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

fn repeat(rounds: u64, mut work: impl FnMut(u64)) {
    let mut round = 0;
    while rounds == 0 || round < rounds {
        round += 1;
        work(round);
    }
}

/// Counts down in a register, with no access to memory.
fn count(steps: u64) {
    // SAFETY: the loop changes only the register and the flags, which the compiler is told.
    unsafe {
        std::arch::asm!("2:", "dec {0}", "jnz 2b", inout(reg) steps => _, options(nomem, nostack));
    }
}

fn dirty(buffer: &mut [u64], round: u64) {
    for page in buffer.chunks_mut(PAGE_WORDS) {
        let word = (round as usize * 7) % PAGE_WORDS;
        // Each write counts, whatever the optimiser thinks of a buffer that nobody reads.
        page[word] = std::hint::black_box(page[word].wrapping_mul(31).wrapping_add(round));
    }
}

/// Writes to so many pages in each tick; ticks that were missed are made up for, so that the rate holds if it can.
fn dirty_at(mib: usize, mib_per_s: usize) {
    const TICK: Duration = Duration::from_millis(10);
    let mut buffer = vec![0u64; mib << 17];
    let pages_per_tick = (mib_per_s * 256 / 100).max(1);
    let (started, mut next) = (Instant::now(), 0);
    for tick in 1.. {
        for _ in 0..pages_per_tick {
            let at = next % buffer.len();
            dirty(&mut buffer[at..at + PAGE_WORDS], u64::from(tick));
            next += PAGE_WORDS;
        }
        std::thread::sleep((TICK * tick).saturating_sub(started.elapsed()));
    }
}

/// Fills the buffer with random numbers, again and again: xorshift (Marsaglia, 2003).
fn noise(buffer: &mut [u64]) {
    let mut number = 88_172_645_463_325_252_u64;
    loop {
        for word in &mut *buffer {
            number ^= number << 13;
            number ^= number >> 7;
            number ^= number << 17;
            *word = std::hint::black_box(number);
        }
    }
}

/// Changes page tables in every way that user space can, and uses what they map.
fn paging(len_bytes: usize, round: u64) -> nix::Result<()> {
    let read_write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let len = NonZeroUsize::new(len_bytes).ok_or(nix::errno::Errno::EINVAL)?;
    // SAFETY: a new mapping, which nothing else refers to.
    let start = unsafe { mmap_anonymous(None, len, read_write, MapFlags::MAP_PRIVATE) }?;
    // SAFETY: the mapping has this length and is writable where and when the slice is written below.
    let words = unsafe { std::slice::from_raw_parts_mut(start.as_ptr().cast::<u64>(), len_bytes / 8) };
    dirty(words, round);
    // SAFETY: inside the mapping; nobody writes it until it is writable again.
    unsafe { mprotect(start, len_bytes / 2, ProtFlags::PROT_READ) }?;
    let sum: u64 = words.iter().step_by(PAGE_WORDS).fold(0, |sum, word| sum.wrapping_add(*word));
    // SAFETY: as above.
    unsafe { mprotect(start, len_bytes / 2, read_write) }?;
    // SAFETY: one thread; the child only writes its copy and exits.
    match unsafe { fork() }? {
        ForkResult::Child => {
            dirty(words, sum);
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            dirty(&mut words[..len_bytes / 16], round + 1);
            waitpid(child, None)?;
        }
    }
    // SAFETY: inside the mapping; its content is not needed any more.
    unsafe { madvise(start, len_bytes / 4, MmapAdvise::MADV_DONTNEED) }?;
    dirty(words, round + 2);
    // SAFETY: the slice is not used behind this.
    unsafe { munmap(start, len_bytes) }
}
