//! A tiny guest of a few instructions, for measuring one thing.
//!
//! Owns: the map below, 64-bit mode in ring 0 or ring 3 with I/O privilege in both, and a time limit, so that
//! a host which does not keep its word cannot hold the monitor up. Must never: be shared between two
//! measurements that could disturb each other, or be made while another guest exists in this process.
//!
//! ```text
//! 0x01000  GDT: ring 0 code and data, ring 3 data and code, TSS
//! 0x02000  IDT: each vector has its handler
//! 0x03000  TSS: the stack of ring 0
//! 0x04000  handlers, 16 bytes each: mov al, VECTOR; out TRAP_PORT, al; hlt
//! 0x06000  top of ring 0's stack     0x07000  top of ring 3's stack
//! 0x08000  the code that is measured
//! 0x10000  page tables: 0 to 2 MiB, one to one, open to both rings
//! 0x100000 data
//! ```
//! States: made -> started -> stopped at a [`Stop`] -> started again or dropped.
//!
//! Follows: Intel SDM volume 3, 3.4.5 (segments), 6.14 (interrupts in 64-bit mode), 8.7 (64-bit TSS).

use std::time::{Duration, Instant};

use devices::GuestRam;
use kvm_bindings::{CpuId, kvm_regs, kvm_sregs};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::watchdog::Watch;
use crate::kvm::{Exit, Kvm, KvmError, PAGE_BYTES, Vcpu, Vm, segments};

/// Where the measured code starts.
pub const CODE: u64 = 0x8000;
/// Where the guest may write what it likes.
pub const DATA: u64 = 0x10_0000;
/// Port that the handlers write to.
pub const TRAP_PORT: u8 = 0x13;
/// General protection.
pub const VECTOR_GP: u8 = 13;

const RAM_BYTES: usize = 2 << 20;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u32 = 0x3000;
const HANDLERS: u64 = 0x4000;
const HANDLER_BYTES: u64 = 16;
const STACK_TOP_RING_0: u64 = 0x6000;
const STACK_TOP_RING_3: u64 = 0x7000;
const PML4: u64 = 0x1_0000;

const CODE_RING_0: u16 = 0x08;
const DATA_RING_0: u16 = 0x10;
const DATA_RING_3: u16 = 0x18 | 3;
const CODE_RING_3: u16 = 0x20 | 3;
const TSS_SELECTOR: u16 = 0x28;
/// Seven entries.
const GDT_LIMIT: u16 = TSS_SELECTOR + 16 - 1;
const TSS_LIMIT: u16 = 0x67;
/// Interrupt gate, present, 64 bits.
const GATE: u64 = 0x8e00;

/// CR0: PG, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8001_0033;
const CR4_TSD: u64 = 1 << 2;
const CR4_PAE: u64 = 1 << 5;
/// EFER: LMA, LME.
const EFER: u64 = 0x500;
/// RFLAGS with I/O privilege for ring 3.
const RFLAGS: u64 = 3 << 12 | 2;
/// Page table entry: dirty and accessed already, user, writable, present.
const ENTRY: u64 = 0x67;
const LARGE_PAGE: u64 = 0x80;

/// How long a guest may run without stopping where it should.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// What can go wrong with a measurement.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No memory for a guest.
    #[error("no memory for a small guest: {0}")]
    Memory(String),
    /// The guest ran on where it should have stopped.
    #[error("the guest did not stop within {} s", STUCK_AFTER.as_secs())]
    Stuck,
    /// It stopped elsewhere.
    #[error("the guest stopped at {found}, not at {expected}")]
    Elsewhere {
        /// Where it should have stopped.
        expected: &'static str,
        /// Where it did.
        found: Stop,
    },
    /// The host's perf events fail in the middle of a measurement.
    #[error("reading a counter failed: {0}")]
    Counter(#[from] std::io::Error),
}

/// Privilege level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ring {
    /// The kernel's.
    Zero,
    /// Programs'.
    Three,
}

impl Ring {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Zero, Self::Three];
}

impl std::fmt::Display for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zero => "ring 0",
            Self::Three => "ring 3",
        })
    }
}

/// An exception or interrupt that the guest took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Its number.
    pub vector: u8,
    /// The instruction that raised it, or that it came before.
    pub rip: u64,
    /// Where the guest was.
    pub ring: Ring,
}

/// Where a guest stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It wrote to this port; the instruction is finished.
    Port(u8),
    /// It took an exception or interrupt.
    Trap(Trap),
    /// A single step is done, or a breakpoint reached.
    Debug,
    /// It can take an interrupt.
    Window,
    /// It left in another way.
    Other(Exit),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Port(port) => write!(f, "port {port:#x}"),
            Self::Trap(trap) => write!(f, "exception {} at {:#x} in {}", trap.vector, trap.rip, trap.ring),
            Self::Debug => f.write_str("a debug exit"),
            Self::Window => f.write_str("an interrupt window"),
            Self::Other(exit) => write!(f, "{exit:?}"),
        }
    }
}

/// A guest.
pub struct Guest {
    // The vCPU goes before its virtual machine.
    vcpu: Vcpu,
    vm: Vm,
    ram: GuestRam,
    watch: Watch,
}

impl Guest {
    /// A guest that shows `cpuid` and has `code` at [`CODE`]. `watch` belongs to the calling thread's
    /// watchdog.
    pub fn new(kvm: &Kvm, cpuid: &CpuId, code: &[u8], watch: Watch) -> Result<Self, ProbeError> {
        let memory = |error: String| ProbeError::Memory(error);
        let ram =
            GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).map_err(|e| memory(e.to_string()))?;
        for (at, bytes) in image(code) {
            ram.write_slice(&bytes, GuestAddress(at)).map_err(|e| memory(e.to_string()))?;
        }
        let vm = kvm.create_vm(ram.clone())?;
        let vcpu = vm.create_vcpu(cpuid)?;
        Ok(Self { vcpu, vm, ram, watch })
    }

    /// Sets the guest to the start of its code, with interrupts off and CR4.TSD set. `change` may change
    /// registers.
    pub fn start(&mut self, ring: Ring, change: impl FnOnce(&mut kvm_regs)) -> Result<(), ProbeError> {
        // Nothing of the last run may be finished later.
        self.vcpu.complete()?;
        let mut sregs = self.vcpu.special_registers()?;
        set_start(&mut sregs, ring);
        self.vcpu.set_special_registers(&sregs)?;
        let rsp = match ring {
            Ring::Zero => STACK_TOP_RING_0 - 0x100,
            Ring::Three => STACK_TOP_RING_3 - 0x100,
        };
        let mut regs = kvm_regs { rip: CODE, rsp, rflags: RFLAGS, ..Default::default() };
        change(&mut regs);
        Ok(self.vcpu.set_registers(&regs)?)
    }

    /// Runs until something of interest.
    pub fn go(&mut self) -> Result<Stop, ProbeError> {
        self.go_until(|_| Ok(false))?.ok_or(ProbeError::Stuck)
    }

    /// As [`Self::go`], but at each kick asks whether that is enough; then the answer is `None`.
    pub fn go_until(
        &mut self,
        mut enough: impl FnMut(&mut Vcpu) -> Result<bool, ProbeError>,
    ) -> Result<Option<Stop>, ProbeError> {
        let started = Instant::now();
        loop {
            let watching = self.watch.begin();
            let exit = self.vcpu.enter()?;
            drop(watching);
            if exit != Exit::Kicked {
                return self.stop(exit).map(Some);
            }
            if enough(&mut self.vcpu)? {
                return Ok(None);
            }
            if started.elapsed() > STUCK_AFTER {
                return Err(ProbeError::Stuck);
            }
        }
    }

    fn stop(&mut self, exit: Exit) -> Result<Stop, ProbeError> {
        let port = match exit {
            Exit::PioWrite { port, size: 1, count: 1 } if port <= 0xff => port as u8,
            Exit::Step => return Ok(Stop::Debug),
            Exit::InterruptWindow => return Ok(Stop::Window),
            exit => return Ok(Stop::Other(exit)),
        };
        let regs = self.vcpu.last_registers();
        if port != TRAP_PORT {
            return Ok(Stop::Port(port));
        }
        let vector = regs.rax as u8;
        let frame = regs.rsp + if matches!(vector, 8 | 10..=14 | 17) { 8 } else { 0 };
        let ring = if self.read(frame + 8)? & 3 == 3 { Ring::Three } else { Ring::Zero };
        Ok(Stop::Trap(Trap { vector, rip: self.read(frame)?, ring }))
    }

    /// Fails unless the guest stops at `port`.
    pub fn expect_port(&mut self, port: u8, expected: &'static str) -> Result<(), ProbeError> {
        match self.go()? {
            Stop::Port(found) if found == port => Ok(()),
            found => Err(ProbeError::Elsewhere { expected, found }),
        }
    }

    fn read(&self, address: u64) -> Result<u64, ProbeError> {
        self.ram.read_obj(GuestAddress(address)).map_err(|error| ProbeError::Memory(error.to_string()))
    }

    /// Puts a number into the guest's memory.
    pub fn write(&self, address: u64, value: u64) -> Result<(), ProbeError> {
        self.ram
            .write_obj(value, GuestAddress(address))
            .map_err(|error| ProbeError::Memory(error.to_string()))
    }

    /// The vCPU, for what only one measurement does.
    pub fn vcpu(&mut self) -> &mut Vcpu {
        &mut self.vcpu
    }

    /// The virtual machine, likewise.
    pub fn vm(&mut self) -> &mut Vm {
        &mut self.vm
    }
}

/// What is in memory at the start.
fn image(code: &[u8]) -> Vec<(u64, Vec<u8>)> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let vectors = 0..PAGE_BYTES / 16;
    let idt: Vec<u64> = vectors.clone().flat_map(|vector| gate(HANDLERS + vector * HANDLER_BYTES)).collect();
    let handlers = vectors.flat_map(|vector| {
        // mov al, VECTOR; out TRAP_PORT, al; hlt
        let mut handler = [0xf4; HANDLER_BYTES as usize];
        handler[..4].copy_from_slice(&[0xb0, vector as u8, 0xe6, TRAP_PORT]);
        handler
    });
    let gdt = [&segments::GDT_BOTH_RINGS[..], &segments::tss_descriptor(TSS, TSS_LIMIT)].concat();
    let mut tss = vec![0; usize::from(TSS_LIMIT) + 1];
    tss[4..12].copy_from_slice(&STACK_TOP_RING_0.to_le_bytes());
    // The bitmap of ports lies behind the limit: there is none.
    tss[0x66..].copy_from_slice(&(TSS_LIMIT + 1).to_le_bytes());
    vec![
        (GDT, words(&gdt)),
        (IDT, words(&idt)),
        (TSS.into(), tss),
        (HANDLERS, handlers.collect()),
        (CODE, code.to_vec()),
        (PML4, words(&[(PML4 + PAGE_BYTES) | ENTRY])),
        (PML4 + PAGE_BYTES, words(&[(PML4 + 2 * PAGE_BYTES) | ENTRY])),
        (PML4 + 2 * PAGE_BYTES, words(&[LARGE_PAGE | ENTRY])),
    ]
}

/// Interrupt gate to ring 0; the handlers lie below 64 KiB.
fn gate(handler: u64) -> [u64; 2] {
    [GATE << 32 | u64::from(CODE_RING_0) << 16 | handler, 0]
}

fn set_start(sregs: &mut kvm_sregs, ring: Ring) {
    let (code, data, dpl) = match ring {
        Ring::Zero => (CODE_RING_0, DATA_RING_0, 0),
        Ring::Three => (CODE_RING_3, DATA_RING_3, 3),
    };
    let flat = segments::data(data, dpl);
    sregs.cs = segments::code_64(code, dpl);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
    sregs.tr = segments::tss(TSS_SELECTOR, TSS, TSS_LIMIT);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, GDT_LIMIT);
    (sregs.idt.base, sregs.idt.limit) = (IDT, PAGE_BYTES as u16 - 1);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, PML4, CR4_PAE | CR4_TSD, EFER);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_memory_do_not_overlap() {
        let mut parts: Vec<_> =
            image(&[0x90; 256]).into_iter().map(|(at, b)| (at, at + b.len() as u64)).collect();
        parts.extend([
            (STACK_TOP_RING_0 - 0x1000, STACK_TOP_RING_0),
            (STACK_TOP_RING_3 - 0x1000, STACK_TOP_RING_3),
        ]);
        parts.push((DATA, RAM_BYTES as u64));
        parts.sort_unstable();
        assert!(parts.windows(2).all(|pair| pair[0].1 <= pair[1].0), "{parts:x?}");
    }

    #[test]
    fn each_gate_leads_to_the_handler_of_its_vector() {
        let image = image(&[]);
        let part = |start: u64| &image.iter().find(|(at, _)| *at == start).unwrap().1;
        let (idt, handlers) = (part(IDT), part(HANDLERS));
        for vector in 0..=255u8 {
            let gate = &idt[usize::from(vector) * 16..][..16];
            let low = u64::from(u16::from_le_bytes([gate[0], gate[1]]));
            assert_eq!((&gate[2..4], &gate[4..6], &gate[6..]), (&[8, 0][..], &[0, 0x8e][..], &[0; 10][..]));
            let handler = &handlers[(low - HANDLERS) as usize..][..4];
            assert_eq!(handler, [0xb0, vector, 0xe6, TRAP_PORT]);
        }
    }

    #[test]
    fn ring_3_starts_with_its_own_segments() {
        let mut sregs = kvm_sregs::default();
        set_start(&mut sregs, Ring::Three);
        assert_eq!((sregs.cs.selector, sregs.cs.dpl, sregs.cs.l, sregs.cs.db), (0x23, 3, 1, 0));
        assert_eq!(
            (sregs.ss.selector, sregs.ss.dpl, sregs.tr.base, sregs.tr.limit),
            (0x1b, 3, TSS.into(), 0x67)
        );
        set_start(&mut sregs, Ring::Zero);
        assert_eq!((sregs.cs.selector, sregs.ss.dpl, sregs.cr4), (8, 0, 0x24));
    }
}
