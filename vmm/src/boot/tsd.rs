//! Keeps CR4.TSD through the kernel's startup code, so that RDTSC in user mode raises #GP.
//!
//! Owns: the patches to startup code that writes CR4. Must never: let a kernel start whose startup code would clear
//! TSD; that kernel is refused.
//!
//! The vCPU starts with TSD set ([`super::start`]). What Linux does with CR4 afterwards:
//!
//! | where | what it writes | here |
//! | --- | --- | --- |
//! | `startup_64` | bits from constants (5.x, 6.1: `mov`/`or`; later: `and` with a mask) | patched, see [`patch_startup`] |
//! | `sev_verify_cbit`, TLB flushes, EFI | what it read from CR4, with PGE toggled | keeps TSD |
//! | `cr4_init_shadow`, `mmu_cr4_features` | read CR4 once; all later changes start from these copies | keeps TSD |
//! | `cpu_init`, `enable_TSC`, `__switch_to_xtra` | the shadow, with TSD cleared or toggled | patched, see [`super::cr4_shadow`] |
//! | `relocate_kernel` (kexec) | a constant | not covered: kexec loads code that was not rewritten anyway |
//! | resume from suspend or hibernation | a saved copy | not covered: the guest has no such sleep state |
//! | trampoline of further CPUs | its own constants | not covered: there is one vCPU |

use std::collections::{BTreeMap, BTreeSet};

use iced_x86::{
    Code, ConstantOffsets, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind,
    Register,
};

use super::image::KernelImage;
use super::sweep::{decode_at, immediate};

const TSD_BIT: u64 = 2;
const TSD: u8 = 1 << TSD_BIT;
/// Linux's startup code has a few hundred instructions; what needs more is something else.
const STARTUP_STEPS_MAX: usize = 50_000;
/// How deep calls from the entry point are followed: into `sev_verify_cbit`, not into all of Linux.
const CALL_DEPTH_MAX: u32 = 1;

/// What is known of bit 2 of a register, on every path to an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Bit {
    /// Nothing.
    Unknown,
    /// Set, if it was set in CR4.
    Set,
    /// Clear, but set if the immediates at these file offsets get bit 2.
    Fixable(BTreeSet<usize>),
}

/// Bit 2 of the 16 general registers, in the order of their numbers.
type Bits = [Bit; 16];

impl Bit {
    /// What holds when control may come from either side, or when the result needs both.
    fn and(&self, other: &Bit) -> Bit {
        match (self, other) {
            (Bit::Unknown, _) | (_, Bit::Unknown) => Bit::Unknown,
            (Bit::Set, bit) | (bit, Bit::Set) => bit.clone(),
            (Bit::Fixable(a), Bit::Fixable(b)) if a.is_empty() || b.is_empty() => {
                Bit::Fixable(BTreeSet::new())
            }
            (Bit::Fixable(a), Bit::Fixable(b)) => Bit::Fixable(a | b),
        }
    }

    /// What holds when one of both is enough.
    fn or(&self, other: &Bit) -> Bit {
        match (self, other) {
            (Bit::Set, _) | (_, Bit::Set) => Bit::Set,
            (Bit::Fixable(a), _) if !a.is_empty() => self.clone(),
            (_, Bit::Fixable(b)) if !b.is_empty() => other.clone(),
            _ => Bit::Unknown,
        }
    }
}

/// Changes the startup code so that each CR4 it writes has TSD set if CR4 had it before. Gives the number of
/// constants changed.
///
/// # Errors
/// A description of what the code does that cannot be changed, or that no write to CR4 was found.
pub(super) fn patch_startup(image: &mut KernelImage) -> Result<usize, String> {
    let patches = startup_patches(image)?;
    for at in &patches {
        image.bytes[*at] |= TSD;
    }
    Ok(patches.len())
}

/// File offsets of the immediates that decide bit 2 of what the startup code writes to CR4.
///
/// This follows the code from the entry point along every path and keeps track, for each register, of which
/// constants its bit 2 comes from, until nothing new is learned. Behind a far return or an indirect jump the
/// startup code goes on at the next instruction (it reloads CS and moves to its linked address this way), or
/// where a constant in the image says.
fn startup_patches(image: &KernelImage) -> Result<BTreeSet<usize>, String> {
    let entry = image.entry_vaddr;
    let mut walk =
        Walk { image, seen: BTreeMap::new(), queue: Vec::new(), info: InstructionInfoFactory::new() };
    walk.enqueue(entry, &unknown(), 0);
    let mut steps = 0;
    while let Some(address) = walk.queue.pop() {
        steps += 1;
        if steps > STARTUP_STEPS_MAX {
            return Err(format!(
                "its startup code at {entry:#x} goes on for more than {STARTUP_STEPS_MAX} steps"
            ));
        }
        walk.step(address);
    }
    walk.patches()
}

fn unknown() -> Bits {
    std::array::from_fn(|_| Bit::Unknown)
}

/// The state of following the code.
struct Walk<'a> {
    image: &'a KernelImage,
    /// What is known before each instruction reached, and how many calls deep.
    seen: BTreeMap<u64, (Bits, u32)>,
    /// Instructions about which something new was learned.
    queue: Vec<u64>,
    info: InstructionInfoFactory,
}

impl Walk<'_> {
    /// Control may come to `address` with this knowledge.
    fn enqueue(&mut self, address: u64, bits: &Bits, depth: u32) {
        if self.image.code_from(address).is_none() {
            return;
        }
        let merged = match self.seen.get(&address) {
            None => (bits.clone(), depth),
            Some((known, known_depth)) => {
                (std::array::from_fn(|i| known[i].and(&bits[i])), depth.min(*known_depth))
            }
        };
        if self.seen.get(&address) != Some(&merged) {
            self.seen.insert(address, merged);
            self.queue.push(address);
        }
    }

    fn step(&mut self, address: u64) {
        let Some((bits, depth)) = self.seen.get(&address).cloned() else { return };
        let Some((instruction, offset, constants)) = decode_at(self.image, address) else { return };
        let after = self.effect(&instruction, offset, &constants, &bits);
        let (next, target) = (instruction.next_ip(), instruction.near_branch_target());
        match instruction.flow_control() {
            FlowControl::ConditionalBranch => {
                self.enqueue(target, &after, depth);
                self.enqueue(next, &after, depth);
            }
            FlowControl::UnconditionalBranch => self.enqueue(target, &after, depth),
            FlowControl::Call => {
                if depth < CALL_DEPTH_MAX {
                    self.enqueue(target, &unknown(), depth + 1);
                }
                self.enqueue(next, &after, depth);
            }
            FlowControl::IndirectBranch if depth == 0 => {
                if let Some(target) = self.constant_target(&instruction) {
                    self.enqueue(target, &after, depth);
                }
                self.enqueue(next, &after, depth);
            }
            FlowControl::Return if depth == 0 && is_far_return(&instruction) => {
                self.enqueue(next, &after, depth);
            }
            FlowControl::Next | FlowControl::IndirectCall => self.enqueue(next, &after, depth),
            _ => {}
        }
    }

    /// Where `jmp *constant(%rip)` goes.
    fn constant_target(&self, instruction: &Instruction) -> Option<u64> {
        if !instruction.is_ip_rel_memory_operand() {
            return None;
        }
        let offset = self.image.data_offset(instruction.ip_rel_memory_address())?;
        let raw = self.image.bytes.get(offset..offset + 8)?;
        Some(u64::from_le_bytes(raw.try_into().ok()?))
    }

    /// What is known behind an instruction.
    fn effect(
        &mut self,
        instruction: &Instruction,
        offset: usize,
        constants: &ConstantOffsets,
        before: &Bits,
    ) -> Bits {
        let mut after = before.clone();
        if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
            for caller_saved in [0, 1, 2, 6, 7, 8, 9, 10, 11] {
                after[caller_saved] = Bit::Unknown;
            }
            return after;
        }
        for used in self.info.info(instruction).used_registers() {
            let writes = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            if let (true, Some(number)) = (writes, number_of(used.register())) {
                after[number] = Bit::Unknown;
            }
        }
        if let Some(number) = number_of(instruction.op0_register())
            && instruction.op0_kind() == OpKind::Register
            && instruction.op0_register().size() >= 4
        {
            let site = constants.has_immediate().then(|| offset + constants.immediate_offset());
            if let Some(bit) = result(instruction, site, &before[number], before) {
                after[number] = bit;
            }
        }
        after
    }

    /// Judges every write to CR4 that was reached.
    fn patches(&self) -> Result<BTreeSet<usize>, String> {
        let mut patches = BTreeSet::new();
        let mut writes = 0;
        for (address, (bits, depth)) in &self.seen {
            let Some((instruction, ..)) = decode_at(self.image, *address) else { continue };
            if instruction.code() != Code::Mov_cr_r64 || instruction.op0_register() != Register::CR4 {
                continue;
            }
            writes += usize::from(*depth == 0);
            match number_of(instruction.op1_register()).map(|n| &bits[n]) {
                Some(Bit::Set) => {}
                Some(Bit::Fixable(sites)) if !sites.is_empty() => patches.extend(sites),
                // A called function writes what it was given: a value that was read from CR4 before.
                _ if *depth > 0 => {}
                _ => {
                    return Err(format!(
                        "what its startup code writes to CR4 at {address:#x} cannot be followed"
                    ));
                }
            }
        }
        if writes == 0 { Err("its startup code writes CR4 nowhere".into()) } else { Ok(patches) }
    }
}

/// Bit 2 of the first operand behind an instruction that this analysis understands.
fn result(instruction: &Instruction, site: Option<usize>, old: &Bit, before: &Bits) -> Option<Bit> {
    let fixable = |site: Option<usize>| Bit::Fixable(site.into_iter().collect());
    let source = (instruction.op_count() > 1 && instruction.op1_kind() == OpKind::Register)
        .then(|| instruction.op1_register());
    let source_bit = source.and_then(number_of).map(|n| &before[n]);
    let value = immediate(instruction);
    let from_value = value.map(|v| if v >> TSD_BIT & 1 == 1 { Bit::Set } else { fixable(site) });
    Some(match instruction.mnemonic() {
        Mnemonic::Mov if source == Some(Register::CR4) => Bit::Set,
        Mnemonic::Mov => from_value.or(source_bit.cloned())?,
        Mnemonic::Or => match (from_value, source_bit) {
            // The nearest constant, because an earlier one may have other uses.
            (Some(bit), _) => bit.or(old),
            (None, Some(bit)) => old.or(bit),
            (None, None) => return None,
        },
        Mnemonic::And => match (from_value, source_bit) {
            (Some(bit), _) => old.and(&bit),
            (None, Some(bit)) => old.and(bit),
            (None, None) => return None,
        },
        Mnemonic::Xor if source == Some(instruction.op0_register()) => fixable(None),
        Mnemonic::Xor if value? >> TSD_BIT & 1 == 0 => old.clone(),
        Mnemonic::Bts if value? & 63 == TSD_BIT => Bit::Set,
        Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc if value? & 63 != TSD_BIT => old.clone(),
        _ => return None,
    })
}

/// 0 (RAX) to 15 (R15), for a general register of any width.
fn number_of(register: Register) -> Option<usize> {
    register.is_gpr().then(|| register.full_register() as usize - Register::RAX as usize)
}

fn is_far_return(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Retf
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{debian_kernels, image_of};

    /// Patches `code` as startup code and gives it back.
    fn patched(code: &[u8]) -> Result<Vec<u8>, String> {
        let mut image = image_of(code);
        patch_startup(&mut image).map(|_| image.bytes)
    }

    fn concat(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    const TO_CR4_RCX: &[u8] = &[0x0f, 0x22, 0xe1]; // mov cr4, rcx
    const FROM_CR4_RCX: &[u8] = &[0x0f, 0x20, 0xe1]; // mov rcx, cr4
    const RET: &[u8] = &[0xc3];
    const OR_ECX_A0: &[u8] = &[0x81, 0xc9, 0xa0, 0, 0, 0]; // or ecx, 0xa0
    const OR_ECX_A4: &[u8] = &[0x81, 0xc9, 0xa4, 0, 0, 0];
    const JE_OVER_6: &[u8] = &[0x74, 0x06];
    const OR_ECX_LA57: &[u8] = &[0x81, 0xc9, 0, 0x10, 0, 0]; // or ecx, 0x1000
    const OR_ECX_LA57_TSD: &[u8] = &[0x81, 0xc9, 4, 0x10, 0, 0];

    #[test]
    fn linux_6_1_with_an_or_that_a_jump_may_skip() {
        let head = [0xb9, 0, 0, 0, 0]; // mov ecx, 0
        let code = |first, second| concat(&[&head, first, JE_OVER_6, second, TO_CR4_RCX, RET]);
        assert_eq!(patched(&code(OR_ECX_A0, OR_ECX_LA57)).unwrap(), code(OR_ECX_A4, OR_ECX_LA57_TSD));
    }

    #[test]
    fn linux_5_10_with_a_mov() {
        let code = |first, second| {
            concat(&[&[0xb9, first, 0, 0, 0], JE_OVER_6, second, TO_CR4_RCX, RET]) // mov ecx, first
        };
        assert_eq!(patched(&code(0xa0, OR_ECX_LA57)).unwrap(), code(0xa4, OR_ECX_LA57_TSD));
    }

    #[test]
    fn linux_6_6_with_a_mask_in_another_register() {
        // mov edx, PAE|LA57; or edx, MCE; mov rcx, cr4; and ecx, edx; bts ecx, 4; mov cr4, rcx;
        // bts ecx, 7; mov cr4, rcx
        let code = |mce: u8| {
            concat(&[
                &[0xba, 0x20, 0x10, 0, 0],
                &[0x83, 0xca, mce],
                FROM_CR4_RCX,
                &[0x21, 0xd1],
                &[0x0f, 0xba, 0xe9, 4],
                TO_CR4_RCX,
                &[0x0f, 0xba, 0xe9, 7],
                TO_CR4_RCX,
                RET,
            ])
        };
        assert_eq!(patched(&code(0x40)).unwrap(), code(0x44));
    }

    #[test]
    fn a_write_of_what_was_read_needs_no_patch() {
        let code = concat(&[FROM_CR4_RCX, &[0x48, 0x83, 0xf1, 0x80], TO_CR4_RCX, RET]); // xor rcx, ~0x7f
        assert_eq!(patched(&code).unwrap(), code);
    }

    #[test]
    fn both_sides_of_a_branch_are_patched() {
        // je over; mov ecx, 0x20; jmp to the write; mov ecx, 0xa0
        let code = |a: u8, b: u8| {
            concat(&[&[0x74, 7, 0xb9, a, 0, 0, 0, 0xeb, 5, 0xb9, b, 0, 0, 0], TO_CR4_RCX, RET])
        };
        assert_eq!(patched(&code(0x20, 0xa0)).unwrap(), code(0x24, 0xa4));
    }

    #[test]
    fn a_far_return_and_a_call_are_followed() {
        // call f; retf; mov ecx, 0xa0; mov cr4, rcx; ret; f: mov eax, 0x20; mov cr4, rax; ret
        let code = |entry: u8, called: u8| {
            concat(&[
                &[0xe8, 11, 0, 0, 0],
                &[0x48, 0xcb],
                &[0xb9, entry, 0, 0, 0],
                TO_CR4_RCX,
                RET,
                &[0xb8, called, 0, 0, 0],
                &[0x0f, 0x22, 0xe0],
                RET,
            ])
        };
        assert_eq!(patched(&code(0xa0, 0x20)).unwrap(), code(0xa4, 0x24));
    }

    #[test]
    fn code_that_cannot_be_patched_is_refused() {
        let from_memory = concat(&[&[0x8b, 0x0e], TO_CR4_RCX, RET]); // mov ecx, [rsi]
        assert!(patched(&from_memory).unwrap_err().contains("cannot be followed"));
        let cleared = concat(&[&[0x31, 0xc9], TO_CR4_RCX, RET]); // xor ecx, ecx
        assert!(patched(&cleared).unwrap_err().contains("cannot be followed"));
        let one_path = concat(&[&[0x31, 0xc9, 0x74, 5, 0xb9, 0xa0, 0, 0, 0], TO_CR4_RCX, RET]);
        assert!(patched(&one_path).unwrap_err().contains("cannot be followed"));
        assert!(patched(&[0x90, 0xc3]).unwrap_err().contains("nowhere"));
    }

    #[test]
    fn endless_and_wild_code_ends() {
        assert!(patched(&[0xeb, 0xfe]).is_err()); // jmp to itself
        assert!(patched(&[0xe9, 0xff, 0xff, 0xff, 0x7f]).is_err()); // jmp out of the image
        assert!(patched(&[0x0f]).is_err()); // cut off
    }

    #[test]
    fn debians_cloud_kernels_keep_tsd_in_startup_64() {
        for kernel in debian_kernels("debians_cloud_kernels_keep_tsd_in_startup_64", "cloud-") {
            let packed = std::fs::read(&kernel.path).unwrap();
            let (mut image, _) = crate::boot::parse_kernel(packed, &kernel.path).unwrap();
            let before = image.bytes.clone();
            let patches = patch_startup(&mut image).unwrap();
            // The constants of one or two instructions (see the examples above).
            assert!((1..=2).contains(&patches), "{}: {patches}", kernel.path.display());
            let changed: Vec<usize> = (0..before.len()).filter(|i| before[*i] != image.bytes[*i]).collect();
            assert_eq!(changed.len(), patches);
            for at in changed {
                assert_eq!(image.bytes[at], before[at] | TSD);
                // `mov cr4, ...` soon follows.
                let writes = image.bytes[at..at + 0x40]
                    .windows(3)
                    .any(|b| b[..2] == TO_CR4_RCX[..2] && b[2] >> 3 == 0x1c);
                assert!(writes, "{}: {at:#x}", kernel.path.display());
            }
        }
    }
}
