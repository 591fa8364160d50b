//! Guest memory as the guest addresses it.
//!
//! Owns: nothing; it asks the vCPU's page tables. Must never: be used while the guest runs.

use devices::GuestRam;
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use super::{KvmError, Vcpu};

impl Vcpu {
    /// Fills `out` from the linear address `linear` on. False: part of that is not mapped, or no RAM.
    pub fn read_linear(&self, ram: &GuestRam, linear: u64, out: &mut [u8]) -> Result<bool, KvmError> {
        for (piece, at) in pages(linear, out.len()) {
            let Some(gpa) = self.translate(at)? else { return Ok(false) };
            if ram.read_slice(&mut out[piece], GuestAddress(gpa)).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes `bytes` from the linear address `linear` on. False: part of that is not mapped, or no RAM.
    pub fn write_linear(&self, ram: &GuestRam, linear: u64, bytes: &[u8]) -> Result<bool, KvmError> {
        for (piece, at) in pages(linear, bytes.len()) {
            let Some(gpa) = self.translate(at)? else { return Ok(false) };
            if ram.write_slice(&bytes[piece], GuestAddress(gpa)).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where the guest's interrupt descriptor table leads for `vector` (AMD64 APM volume 2, 4.8.4: 64-bit gates).
    pub fn handler(
        &self,
        ram: &GuestRam,
        sregs: &kvm_sregs,
        vector: u8,
    ) -> Result<Option<Handler>, KvmError> {
        const GATE_BYTES: u64 = 16;
        const PRESENT: u128 = 1 << 47;
        let at = u64::from(vector) * GATE_BYTES;
        let mut gate = [0; GATE_BYTES as usize];
        if at + GATE_BYTES > u64::from(sregs.idt.limit) + 1
            || !self.read_linear(ram, sregs.idt.base.wrapping_add(at), &mut gate)?
        {
            return Ok(None);
        }
        let gate = u128::from_le_bytes(gate);
        let at = (gate & 0xffff) | (gate >> 32 & 0xffff_0000) | (gate >> 32 & (0xffff_ffff << 32));
        let handler = Handler { at: at as u64, own_stack: gate >> 32 & 7 != 0 };
        Ok((gate & PRESENT != 0).then_some(handler))
    }
}

/// A handler of an exception or interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handler {
    /// Linear address of its first instruction.
    pub at: u64,
    /// Does it run on a stack of its own, in whatever ring the guest was?
    pub own_stack: bool,
}

/// Splits a linear range at page boundaries.
pub(super) fn pages(linear: u64, len: usize) -> impl Iterator<Item = (std::ops::Range<usize>, u64)> {
    const PAGE: u64 = 4096;
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = linear.wrapping_add(done as u64);
        let take = ((PAGE - at % PAGE) as usize).min(len - done);
        let piece = done..done + take;
        done += take;
        Some((piece, at))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_split_at_pages() {
        let pieces: Vec<_> = pages(0xffe, 4).collect();
        assert_eq!(pieces, [(0..2, 0xffe), (2..4, 0x1000)]);
    }
}
