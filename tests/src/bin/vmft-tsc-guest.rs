//! A guest that is one program: init, which reads the time stamp counter in user mode, forks, and powers off.
//!
//! It prints the sum of its readings, and its child prints its own, so that two runs with the same output have read
//! the same values. It must never read the counter through the kernel. Then it tries RDTSCP, which CPUID denies: with
//! CR4.TSD set AMD raises #GP as for RDTSC, Intel #UD.

use std::arch::x86_64::{__cpuid, __rdtscp, _rdtsc};
use std::process::exit;

use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

const READINGS: u32 = 100;

fn main() {
    say("before the fork");
    // SAFETY: there is one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            say("child");
            exit(0);
        }
        Ok(ForkResult::Parent { child }) => {
            if let Err(error) = waitpid(child, None) {
                println!("vmft-tsc: the child cannot be waited for: {error}");
            }
            say("parent");
        }
        Err(error) => println!("vmft-tsc: cannot fork: {error}"),
    }
    try_rdtscp();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    println!("vmft-tsc: cannot power off: {error}");
}

/// Tries RDTSCP in a child, which may die of it, and prints what became of it.
fn try_rdtscp() {
    let vendor = if __cpuid(0).ebx.to_le_bytes() == *b"Genu" { "Intel" } else { "AMD" };
    // SAFETY: there is one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let (mut first, mut second) = (1, 1);
            // SAFETY: at worst it kills the child, which is what is to be found out.
            let rises = unsafe { __rdtscp(&mut first) < __rdtscp(&mut second) };
            exit(i32::from(!rises || first != 0 || second != 0));
        }
        Ok(ForkResult::Parent { child }) => {
            let what = match waitpid(child, None) {
                Ok(WaitStatus::Exited(_, 0)) => "supplied, with 0 in TSC_AUX".to_owned(),
                Ok(WaitStatus::Signaled(_, signal, _)) => signal.to_string(),
                other => format!("{other:?}"),
            };
            println!("vmft-tsc: rdtscp on {vendor}: {what}");
        }
        Err(error) => println!("vmft-tsc: cannot fork: {error}"),
    }
}

/// Reads the counter many times and prints the sum, and how often it did not rise.
fn say(who: &str) {
    let (mut sum, mut last, mut not_rising) = (0u64, 0, 0);
    for _ in 0..READINGS {
        // SAFETY: every x86-64 processor has the instruction.
        let now = unsafe { _rdtsc() };
        sum = sum.wrapping_add(now);
        not_rising += u32::from(now < last);
        last = now;
    }
    println!("vmft-tsc: {who}: sum {sum:016x}, {not_rising} of {READINGS} fell");
}
