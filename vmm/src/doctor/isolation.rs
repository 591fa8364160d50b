//! Keeping the host out of the guest, and knowing what the guest has written.
//!
//! Owns: the measurements of CPUID, the TSC trap, the MSR filter and the dirty log. Must never: trust a
//! capability where a guest can show it.

use kvm_bindings::CpuId;

use super::guest::{CODE, DATA, Guest, ProbeError, Ring, Stop, Trap, VECTOR_GP};
use super::{Bench, Finding};
use crate::kvm::{Exit, PAGE_BYTES, page_numbers};

const PORT_FIRST: u8 = 0x10;
const PORT_LAST: u8 = 0x11;
const MSR_TSC: u32 = 0x10;
/// No clock shows it.
const MSR_ANSWER: u64 = 0xfedc_ba98_7654_3210;

#[rustfmt::skip]
const RDTSC: [u8; 4] = [
    0x0f, 0x31,             // rdtsc
    0xe6, PORT_LAST,        // out PORT_LAST, al
];

/// Does CR4.TSD make RDTSC fault in ring 3, and only there?
pub fn tsc_trap(bench: &Bench) -> Result<Finding, ProbeError> {
    let mut guest = bench.guest(&RDTSC)?;
    guest.start(Ring::Three, |_| {})?;
    let advice = "use a stock KVM on VT-x or AMD-V; otherwise programs in the guest read the host's clock";
    match guest.go()? {
        Stop::Trap(Trap { vector: VECTOR_GP, rip: CODE, ring: Ring::Three }) => {}
        Stop::Port(PORT_LAST) => return Ok(Finding::failed("RDTSC in ring 3 was not trapped", advice)),
        stop => return Ok(Finding::failed(format!("RDTSC in ring 3 led to {stop}"), advice)),
    }
    Ok(Finding::ok("RDTSC in ring 3 raises #GP"))
}

#[rustfmt::skip]
const CPUID: [u8; 4] = [
    0x0f, 0xa2,             // cpuid
    0xe6, PORT_LAST,        // out PORT_LAST, al
];
/// Leaf, mask of EAX, EBX, ECX and EDX: KVM itself puts the states of OSXSAVE and the APIC into leaf 1.
const LEAVES: [(u32, [u32; 4]); 5] = [
    (0, [u32::MAX; 4]),
    (1, [u32::MAX, u32::MAX, !(1 << 27), !(1 << 9)]),
    (7, [u32::MAX; 4]),
    (0x8000_0001, [u32::MAX; 4]),
    (BRAND_LEAF, [u32::MAX; 4]),
];
const BRAND_LEAF: u32 = 0x8000_0002;
const BRAND: [u32; 4] = [0x746d_6676, 0x636f_6420, 0x2072_6f74, 0x6162_6364];

/// Does the guest see the CPUID table that it was given, and nothing of the host?
pub fn cpuid_masking(bench: &Bench) -> Result<Finding, ProbeError> {
    let mut table = bench.cpuid.clone();
    mark(&mut table);
    let mut guest = bench.guest_that_sees(&table, &CPUID)?;
    for ring in Ring::BOTH {
        for (leaf, mask) in LEAVES {
            let Some(given) = table.as_slice().iter().find(|e| e.function == leaf && e.index == 0) else {
                continue;
            };
            let given = [given.eax, given.ebx, given.ecx, given.edx];
            guest.start(ring, |regs| regs.rax = u64::from(leaf))?;
            guest.expect_port(PORT_LAST, "the port behind CPUID")?;
            let regs = guest.vcpu().last_registers();
            let seen = [regs.rax, regs.rbx, regs.rcx, regs.rdx].map(|value| value as u32);
            if (0..4).any(|i| seen[i] & mask[i] != given[i] & mask[i]) {
                let seen = format!("{ring} sees {seen:x?} in leaf {leaf:#x}, it was given {given:x?}");
                let advice = "use a stock KVM on VT-x or AMD-V; this one shows the host's CPUID";
                return Ok(Finding::failed(seen, advice));
            }
        }
    }
    Ok(Finding::ok("ring 0 and ring 3 see the table that they are given"))
}

/// Puts a brand string into the table that no host has.
fn mark(table: &mut CpuId) {
    for entry in table.as_mut_slice().iter_mut().filter(|entry| entry.function == BRAND_LEAF) {
        [entry.eax, entry.ebx, entry.ecx, entry.edx] = BRAND;
    }
}

#[rustfmt::skip]
const RDMSR: [u8; 4] = [
    0x0f, 0x32,             // rdmsr
    0xe6, PORT_LAST,        // out PORT_LAST, al
];

/// Does the monitor answer reads of MSRs that are the host's or count, and is its answer what the guest gets?
pub fn msr_filter(bench: &Bench) -> Result<Finding, ProbeError> {
    let advice = "use a stock KVM of Linux 5.10 or newer; otherwise guests read the host's counters";
    let mut guest = bench.guest(&RDMSR)?;
    for answer in [Some(MSR_ANSWER), None] {
        guest.start(Ring::Zero, |regs| regs.rcx = u64::from(MSR_TSC))?;
        match guest.go()? {
            Stop::Other(Exit::MsrRead { index: MSR_TSC }) => guest.vcpu().answer_msr(answer),
            stop => return Ok(Finding::failed(format!("RDMSR of the TSC led to {stop}"), advice)),
        }
        let stop = guest.go()?;
        let regs = guest.vcpu().last_registers();
        let got = regs.rdx << 32 | regs.rax & u64::from(u32::MAX);
        match (answer, stop) {
            (Some(MSR_ANSWER), Stop::Port(PORT_LAST)) if got == MSR_ANSWER => {}
            (None, Stop::Trap(Trap { vector: VECTOR_GP, rip: CODE, ring: Ring::Zero })) => {}
            (_, stop) => {
                let seen = format!("RDMSR that was answered with {answer:x?} led to {stop} and {got:#x}");
                return Ok(Finding::failed(seen, advice));
            }
        }
    }
    Ok(Finding::ok("RDMSR of the TSC gets the monitor's answer, or #GP"))
}

/// Ring 0 or 3: writes to the page that RBX points to, stops, writes to the one that RDX points to.
#[rustfmt::skip]
const WRITES: [u8; 8] = [
    0x88, 0x03,             // mov [rbx], al
    0xe6, PORT_FIRST,       // out PORT_FIRST, al
    0x88, 0x02,             // mov [rdx], al
    0xe6, PORT_LAST,        // out PORT_LAST, al
];

/// Does the dirty log name the pages that the guest writes, once for each time that they were marked clean?
pub fn dirty_log(bench: &Bench) -> Result<Finding, ProbeError> {
    let (first, last) = (DATA + 5 * PAGE_BYTES, DATA + 70 * PAGE_BYTES);
    let mut guest = bench.guest(&WRITES)?;
    guest.vm().track_writes(true)?;
    for ring in Ring::BOTH {
        for (port, page) in [(PORT_FIRST, first), (PORT_LAST, last)] {
            if port == PORT_FIRST {
                guest.start(ring, |regs| (regs.rbx, regs.rdx) = (first, last))?;
            }
            guest.vm().mark_all_clean()?;
            guest.expect_port(port, "the port behind the write")?;
            let written = written_data(&mut guest)?;
            if written != [page] {
                let seen = format!("{ring} wrote to page {page:#x}, the log names {written:x?}");
                let advice = "use a stock KVM of Linux 5.10 or newer; checkpoints would lack memory";
                return Ok(Finding::failed(seen, advice));
            }
        }
    }
    Ok(Finding::ok("it names each page that ring 0 and ring 3 write, and no other"))
}

/// The written pages from [`DATA`] on. The processor itself may write those below: tables, stacks.
fn written_data(guest: &mut Guest) -> Result<Vec<u64>, ProbeError> {
    let bitmaps = guest.vm().written_pages()?;
    Ok(page_numbers(&bitmaps).map(|number| number * PAGE_BYTES).filter(|page| *page >= DATA).collect())
}
