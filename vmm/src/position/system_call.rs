//! SYSCALL and SYSRET of 64-bit code: the CPU would take the trap flag with them, so they are carried out here.
//!
//! Owns: what they do to the registers, where Intel and AMD agree (Intel SDM volume 2B, AMD APM volume 3). Must never: do
//! more than the CPU would; a SYSRET of ring 3 is a #GP, which is left to the CPU.

use kvm_bindings::{kvm_regs, kvm_sregs};

use crate::kvm::segments;

const RFLAGS_ONE: u64 = 1 << 1;
const RFLAGS_TF: u64 = 1 << 8;
const RFLAGS_RF: u64 = 1 << 16;
/// What SYSRET takes of R11.
const RFLAGS_SYSRET: u64 = 0x3c_7fd7;
const EFER_SCE: u64 = 1 << 0;

/// The MSRs that both read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Msrs {
    pub(super) star: u64,
    pub(super) lstar: u64,
    pub(super) sfmask: u64,
}

/// What becomes of one of them.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Outcome {
    /// These registers.
    Done(Box<(kvm_regs, kvm_sregs)>),
    /// An exception, which the CPU raises when it is stepped.
    Fault,
    /// It cannot be stepped over.
    Never(&'static str),
}

/// SYSCALL; the next instruction is at `next_ip`.
pub(super) fn enter(regs: &kvm_regs, sregs: &kvm_sregs, msrs: Msrs, next_ip: u64) -> Outcome {
    if sregs.efer & EFER_SCE == 0 {
        return Outcome::Fault;
    }
    if sregs.cs.l == 0 {
        return Outcome::Never("a system call of 32-bit code");
    }
    let (mut regs, mut sregs) = (*regs, *sregs);
    regs.rcx = next_ip;
    regs.r11 = regs.rflags & !RFLAGS_RF;
    regs.rip = msrs.lstar;
    regs.rflags = regs.r11 & !msrs.sfmask | RFLAGS_ONE;
    let code = (msrs.star >> 32) as u16 & !3;
    (sregs.cs, sregs.ss) = (segments::code_64(code, 0), segments::data(code.wrapping_add(8), 0));
    Outcome::Done(Box::new((regs, sregs)))
}

/// SYSRET to 64-bit code.
pub(super) fn leave(regs: &kvm_regs, sregs: &kvm_sregs, msrs: Msrs) -> Outcome {
    if sregs.efer & EFER_SCE == 0 || sregs.ss.dpl != 0 {
        return Outcome::Fault;
    }
    if sregs.cs.l == 0 || (regs.rcx as i64) << 16 >> 16 != regs.rcx as i64 {
        return Outcome::Never("a SYSRET on which processors differ");
    }
    if regs.r11 & RFLAGS_TF != 0 {
        return Outcome::Never("the guest debugs itself");
    }
    let (mut regs, mut sregs) = (*regs, *sregs);
    regs.rip = regs.rcx;
    regs.rflags = regs.r11 & RFLAGS_SYSRET | RFLAGS_ONE;
    let base = (msrs.star >> 48) as u16;
    let (code, stack) = (base.wrapping_add(16) | 3, base.wrapping_add(8) | 3);
    (sregs.cs, sregs.ss) = (segments::code_64(code, 3), segments::data(stack, 3));
    Outcome::Done(Box::new((regs, sregs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MSRS: Msrs = Msrs { star: 0x13 << 48 | 0x08 << 32, lstar: 0xffff_8000_0000_1000, sfmask: 0x300 };
    /// IOPL 3 and carry.
    const WANTED: u64 = 0x3003;

    fn in_ring(ring: u8) -> (kvm_regs, kvm_sregs) {
        let mut sregs = kvm_sregs { efer: EFER_SCE | 0x500, ..Default::default() };
        (sregs.cs, sregs.ss) = (segments::code_64(0x23, ring), segments::data(0x1b, ring));
        let regs = kvm_regs { rcx: 0x40_0000, r11: WANTED, rflags: 0x1_0246, ..Default::default() };
        (regs, sregs)
    }

    #[test]
    fn sysret_is_done_in_ring_0_only() {
        let (regs, sregs) = in_ring(3);
        assert_eq!(leave(&regs, &sregs, MSRS), Outcome::Fault, "a program would choose its own rights");
        let (regs, sregs) = in_ring(0);
        let Outcome::Done(done) = leave(&regs, &sregs, MSRS) else { panic!("not done") };
        assert_eq!((done.0.rip, done.0.rflags), (0x40_0000, WANTED));
        assert_eq!((done.1.cs.selector, done.1.cs.dpl, done.1.ss.selector), (0x23, 3, 0x1b));
    }

    #[test]
    fn sysret_is_refused_where_processors_differ() {
        let (mut regs, mut sregs) = in_ring(0);
        regs.rcx = 1 << 47;
        assert!(matches!(leave(&regs, &sregs, MSRS), Outcome::Never(_)), "RIP is not canonical");
        (regs, sregs) = in_ring(0);
        regs.r11 |= RFLAGS_TF;
        assert!(matches!(leave(&regs, &sregs, MSRS), Outcome::Never(_)), "the program's own trap flag");
        (regs, sregs) = in_ring(0);
        sregs.cs.l = 0;
        assert!(matches!(leave(&regs, &sregs, MSRS), Outcome::Never(_)), "compatibility mode");
    }

    #[test]
    fn neither_is_done_where_the_guest_has_switched_them_off() {
        let (regs, mut sregs) = in_ring(0);
        sregs.efer &= !EFER_SCE;
        assert_eq!(leave(&regs, &sregs, MSRS), Outcome::Fault);
        assert_eq!(enter(&regs, &sregs, MSRS, 2), Outcome::Fault);
    }

    #[test]
    fn syscall_goes_where_the_msrs_say() {
        let (regs, sregs) = in_ring(3);
        let Outcome::Done(done) = enter(&regs, &sregs, MSRS, 0x40_0002) else { panic!("not done") };
        assert_eq!((done.0.rip, done.0.rcx, done.0.r11), (MSRS.lstar, 0x40_0002, 0x246));
        assert_eq!(done.0.rflags, 0x046);
        assert_eq!((done.1.cs.selector, done.1.cs.dpl, done.1.ss.selector), (0x08, 0, 0x10));
    }
}
