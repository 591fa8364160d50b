//! Interrupt windows right after STI.
//!
//! Owns: the rule that moves such a window by one instruction. Must never: depend on anything but the guest's state, or show
//! in the guest.
//!
//! Hardware knows that the instruction after STI takes no interrupt (the STI shadow), but a host that loses the shadow when
//! an exit falls into it opens the window early, in some runs only. Whether STI came before cannot be known from memory: a
//! byte `fb` may also be the end of another instruction. So the rule takes every `fb` that can be one, and its step is as
//! exact as any other. A program of ring 3 without I/O rights cannot execute STI, and is never stepped for it.

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::{Machine, MachineError};
use crate::kvm::Exit;
use crate::kvm::paging::AddressSpace;
use crate::position::{PositionError, Stepped, Stepper};

const STI: u8 = 0xfb;
const IOPL_SHIFT: u32 = 12;

impl Machine {
    /// Moves a window that may be one instruction early. The answer is the exit that the instruction led to, if any.
    pub(super) fn normalise_window(&mut self) -> Result<Option<Exit>, MachineError> {
        let (regs, sregs) = (self.vcpu.last_registers(), self.vcpu.special_registers()?);
        let space = AddressSpace::of_instruction(&self.ram, &sregs, regs.rflags);
        if !may_follow_sti(space, &regs, &sregs) {
            return Ok(None);
        }
        self.vcpu.request_window(false);
        let stepped = self.step_once();
        self.vcpu.single_step(false)?;
        match stepped {
            Ok(exit) => Ok((exit != Exit::Step).then_some(exit)),
            Err(PositionError::Unsteppable { rip, what }) => {
                tracing::debug!(rip = format_args!("{rip:#x}"), what, "a window after STI stays where it is");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn step_once(&mut self) -> Result<Exit, PositionError> {
        let mut stepper = Stepper::default();
        loop {
            let Stepped { conditional, exit, .. } = stepper.step(&mut self.vcpu, &self.ram)?;
            if let Some(counter) = &mut self.counter {
                counter.stepped(conditional);
            }
            if exit != Exit::Kicked {
                return Ok(exit);
            }
        }
    }
}

/// Can the instruction before the one at `regs` be an STI that the guest has executed?
fn may_follow_sti(space: AddressSpace<'_>, regs: &kvm_regs, sregs: &kvm_sregs) -> bool {
    let io_rights = u64::from(sregs.ss.dpl) <= regs.rflags >> IOPL_SHIFT & 3;
    let mut before = [0];
    io_rights && space.code(regs.rip.wrapping_sub(1), &mut before) == 1 && before[0] == STI
}

#[cfg(test)]
mod tests {
    use devices::GuestRam;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    /// Does the rule apply to a guest in `ring` with these flags, after the byte `before`?
    fn applies(ring: u8, rflags: u64, before: u8) -> bool {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 21)]).unwrap();
        for (table, entry) in [(0x1000, 0x2067), (0x2000, 0x3067), (0x3000, 0xe7_u64)] {
            ram.write_obj(entry, GuestAddress(table)).unwrap();
        }
        ram.write_obj(before, GuestAddress(0x7fff)).unwrap();
        let mut sregs =
            kvm_sregs { cr0: 0x8001_0001, cr3: 0x1000, cr4: 0x20, efer: 0x500, ..Default::default() };
        sregs.ss.dpl = ring;
        let regs = kvm_regs { rip: 0x8000, rflags, ..Default::default() };
        may_follow_sti(AddressSpace::of_instruction(&ram, &sregs, rflags), &regs, &sregs)
    }

    #[test]
    fn only_who_may_execute_sti_can_have_done_so() {
        assert!(applies(0, 0x202, STI));
        assert!(applies(3, 0x3202, STI), "ring 3 with I/O rights");
        assert!(!applies(3, 0x202, STI), "a program: the byte ends another instruction");
        assert!(!applies(3, 0x2202, STI));
        assert!(!applies(0, 0x202, 0x90));
    }
}
