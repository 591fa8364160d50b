//! Work for the guest's processor alone, without system calls: for guests that make no exits.
//!
//! Usage: `vmft-compute loop MILLIONS` counts in a register, `vmft-compute dirty MIB ROUNDS` writes a word of every
//! page of a buffer in each round. A number of 0 means for ever. It must do the same work at every run.

use std::process::ExitCode;

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
        _ => {
            eprintln!("usage: vmft-compute loop MILLIONS | vmft-compute dirty MIB ROUNDS");
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
