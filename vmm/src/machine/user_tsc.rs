//! RDTSC in user mode, trapped without the guest's help.
//!
//! Owns: the hook in the guest's #GP handler. Must never: run before the guest has set up its handlers.
//!
//! The kernel runs with CR4.TSD from its first instructions (`boot/tsd.rs`), so RDTSC in ring 3 raises
//! #GP. The handler begins with padding (`endbr64`, or the place of `clac`), which becomes
//! `out GP_PORT, al` followed by NOPs: the exit comes before the handler has touched anything.
//!
//! ```text
//!   Looking ── LSTAR set and IDT[13] in the kernel ──> Installed
//! ```
//! Looking happens at every 64th anchor: a function of the log position alone.

use devices::GuestRam;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use kvm_bindings::kvm_segment;

use super::MachineError;
use crate::boot::GP_PORT;
use crate::kvm::{Vcpu, segments};

const LOOK_EVERY_ANCHORS: u64 = 64;
const MSR_LSTAR: u32 = 0xc000_0082;
const CR4_TSD: u64 = 1 << 2;
const GP_VECTOR: u8 = 13;
/// Where 64-bit kernels live: the upper half of the canonical addresses.
const KERNEL_HALF: u64 = 1 << 63;
const OUT_IMM8_AL: u8 = 0xe6;
const NOP: u8 = 0x90;
/// Longest padding that is replaced.
const PADDING_BYTES: usize = 4;

/// The hook's state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UserTsc {
    hook: Option<Hook>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Hook {
    /// Linear address of the first instruction behind the padding.
    resume_at: u64,
}

/// A user-mode RDTSC or RDTSCP that raised #GP.
#[derive(Clone, Copy, Debug)]
pub struct Trap {
    frame: Frame,
    len: u64,
    with_aux: bool,
}

/// What the CPU pushes for an exception with an error code (AMD64 APM vol. 2, 8.9).
#[derive(Clone, Copy, Debug)]
struct Frame {
    error_code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

impl UserTsc {
    /// Is the hook in place?
    pub fn installed(&self) -> bool {
        self.hook.is_some()
    }

    /// Is `rip`, as of a write to the hook's port, inside the hook? Where exactly differs between KVMs.
    pub fn is_hook(&self, rip: u64) -> bool {
        self.hook.is_some_and(|hook| (hook.resume_at - PADDING_BYTES as u64..=hook.resume_at).contains(&rip))
    }

    /// For the snapshot: the address behind the padding, 0 if not installed.
    pub fn to_saved(self) -> u64 {
        self.hook.map_or(0, |hook| hook.resume_at)
    }

    /// The opposite of [`Self::to_saved`].
    pub fn from_saved(resume_at: u64) -> Self {
        Self { hook: (resume_at != 0).then_some(Hook { resume_at }) }
    }

    /// Installs the hook once the guest has its handlers in place.
    pub fn look_for_handler(
        &mut self,
        anchors: u64,
        vcpu: &Vcpu,
        ram: &GuestRam,
    ) -> Result<(), MachineError> {
        if self.installed() || !anchors.is_multiple_of(LOOK_EVERY_ANCHORS) {
            return Ok(());
        }
        if vcpu.msr(MSR_LSTAR)? & KERNEL_HALF == 0 {
            return Ok(());
        }
        let sregs = vcpu.special_registers()?;
        let handler = vcpu
            .handler(ram, &sregs, GP_VECTOR)?
            .map(|handler| handler.at)
            .filter(|handler| handler & KERNEL_HALF != 0);
        let Some(handler) = handler else { return Ok(()) };
        if sregs.cr4 & CR4_TSD == 0 {
            return Err(MachineError::UserTsc(
                "the kernel has cleared CR4.TSD, which makes RDTSC trap".into(),
            ));
        }
        let mut code = [0; 16];
        read(vcpu, ram, handler, &mut code)?;
        let padding = padding_len(&code).ok_or_else(|| {
            MachineError::UserTsc(format!(
                "its #GP handler at {handler:#x} begins with {:02x?}, no padding to hook",
                &code[..PADDING_BYTES]
            ))
        })?;
        let mut hook = [NOP; PADDING_BYTES];
        hook[..2].copy_from_slice(&[OUT_IMM8_AL, GP_PORT]);
        if !vcpu.write_linear(ram, handler, &hook[..padding])? {
            return Err(not_ram(handler));
        }
        self.hook = Some(Hook { resume_at: handler + padding as u64 });
        tracing::debug!(handler = format_args!("{handler:#x}"), padding, anchors, "hooked the #GP handler");
        Ok(())
    }

    /// At the hook's exit, completed: was it a user-mode RDTSC that raised this #GP?
    pub fn trapped(&self, vcpu: &Vcpu, ram: &GuestRam) -> Result<Option<Trap>, MachineError> {
        let frame = Frame::read(vcpu, ram)?;
        if frame.cs & 3 != 3 || frame.error_code != 0 {
            return Ok(None);
        }
        let mut code = [0; 3];
        let mut known = 0;
        for (offset, byte) in code.iter_mut().enumerate() {
            let mut one = [0];
            if !vcpu.read_linear(ram, frame.rip.wrapping_add(offset as u64), &mut one)? {
                break;
            }
            *byte = one[0];
            known = offset + 1;
        }
        Ok(match &code[..known] {
            [0x0f, 0x31, ..] => Some(Trap { frame, len: 2, with_aux: false }),
            [0x0f, 0x01, 0xf9] => Some(Trap { frame, len: 3, with_aux: true }),
            _ => None,
        })
    }

    /// Goes on: behind the user's RDTSC with its result, or behind the padding into the guest's handler.
    pub fn resume(&self, vcpu: &Vcpu, trap: Option<Trap>, tsc: Option<u64>) -> Result<(), MachineError> {
        let mut regs = vcpu.registers()?;
        match (trap, tsc, self.hook) {
            (Some(trap), Some(tsc), _) => {
                regs.rax = tsc & 0xffff_ffff;
                regs.rdx = tsc >> 32;
                if trap.with_aux {
                    regs.rcx = 0;
                }
                regs.rip = trap.frame.rip.wrapping_add(trap.len);
                regs.rflags = trap.frame.rflags;
                regs.rsp = trap.frame.rsp;
                let mut sregs = vcpu.special_registers()?;
                sregs.cs = user_code_segment(trap.frame.cs as u16);
                sregs.ss = segments::data(trap.frame.ss as u16, 3);
                vcpu.set_special_registers(&sregs)?;
            }
            (_, _, Some(hook)) => regs.rip = hook.resume_at,
            (_, _, None) => {
                return Err(MachineError::UserTsc("the hook's port was used without a hook".into()));
            }
        }
        Ok(vcpu.set_registers(&regs)?)
    }
}

impl Frame {
    fn read(vcpu: &Vcpu, ram: &GuestRam) -> Result<Self, MachineError> {
        let mut bytes = [0; 48];
        let rsp = vcpu.registers()?.rsp;
        read(vcpu, ram, rsp, &mut bytes)?;
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        Ok(Self {
            error_code: word(0),
            rip: word(1),
            cs: word(2),
            rflags: word(3),
            rsp: word(4),
            ss: word(5),
        })
    }
}

/// Linux's 32-bit user code selector; every other ring-3 code segment of a 64-bit kernel is a 64-bit one.
const USER32_CS: u16 = 0x23;

fn user_code_segment(selector: u16) -> kvm_segment {
    if selector == USER32_CS { segments::code_32(selector, 3) } else { segments::code_64(selector, 3) }
}

/// How many of the first bytes are padding: `endbr64`, or at least two bytes of NOPs.
fn padding_len(code: &[u8]) -> Option<usize> {
    let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
    let mut len = 0;
    while len < 2 {
        let instruction = decoder.decode();
        if !matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Endbr64) {
            return None;
        }
        len += instruction.len();
    }
    (len <= PADDING_BYTES).then_some(len)
}

fn read(vcpu: &Vcpu, ram: &GuestRam, linear: u64, out: &mut [u8]) -> Result<(), MachineError> {
    if vcpu.read_linear(ram, linear, out)? { Ok(()) } else { Err(not_ram(linear)) }
}

fn not_ram(linear: u64) -> MachineError {
    MachineError::UserTsc(format!("linear address {linear:#x} is not mapped to RAM"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_is_endbr64_or_nops() {
        assert_eq!(padding_len(&[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x00]), Some(4));
        assert_eq!(padding_len(&[0x0f, 0x1f, 0x00, 0xfc, 0, 0, 0]), Some(3));
        assert_eq!(padding_len(&[0x90, 0x90, 0x90, 0xfc]), Some(2));
        assert_eq!(padding_len(&[0x0f, 0x01, 0xca, 0xfc]), None);
    }
}
