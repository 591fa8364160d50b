//! Keeps TSD in Linux's shadow of CR4, from which all of its later writes to CR4 are made.
//!
//! Owns: [`Cr4Shadow`], the patches to code that changes the shadow. Must never: touch a constant that does not
//! end in the shadow.
//!
//! `cpu_tlbstate.cr4` is a per-CPU variable, or a plain one in a kernel for one CPU: a value read from CR4 is stored
//! to it at once (`cr4_init_shadow`). These are its uses that can take TSD away, as compilers write them; `X` is
//! the variable and `...` may hold jumps, also to code far away:
//!
//! ```text
//! cpu_init, inlined     mov r, X; ... and r, ~(VME|PVI|TSD|DE)                  keep bit 2 of the mask
//! cpu_init, enable_TSC  mov esi, mask; call update       update: mov r, X; and  clear bit 2 of the mask
//!                       mov edi, mask; call clear         clear: mov rsi, rdi; ... call update
//! __switch_to_xtra      mov r, X; ... xor r, TSD                                clear bit 2 of the mask
//! ```
//!
//! With these patched `PR_SET_TSC` changes nothing but a flag of the process.

use std::collections::{BTreeSet, VecDeque};

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::image::KernelImage;
use super::sweep::{Site, decode_at, immediate};

const TSD: u8 = 1 << 2;
/// VME, PVI, TSD, DE.
const CLEARED_BY_CPU_INIT: u64 = 0xf;
/// How many instructions a value is followed behind its load, on all paths together.
const FOLLOWED_INSTRUCTIONS: usize = 64;
/// A function of the two kinds above reads its arguments within so many bytes of its start.
const PROLOGUE_BYTES: u64 = 0x20;

/// A constant with bit 2 that is on its way into a function.
#[derive(Clone, Copy, Debug)]
struct Argument {
    offset: usize,
    value: u64,
    target: u64,
}

/// A load of a variable that may be the shadow.
#[derive(Clone, Copy, Debug)]
struct Load {
    variable: u64,
    ip: u64,
    into: Register,
    next_ip: u64,
}

/// What was found of a function's uses of the shadow.
#[derive(Debug, Default)]
struct Uses {
    /// File offsets of masks that clear TSD, with whether they clear all that `cpu_init` does.
    clears: BTreeSet<(usize, bool)>,
    /// File offsets of constants that toggle TSD.
    toggles: BTreeSet<usize>,
    /// Addresses of loads of what is then masked by no constant: the body of `update`.
    masked_by_variable: Vec<u64>,
}

/// What was done to the kernel's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ShadowReport {
    /// Places that cleared TSD among other bits or alone.
    pub clears: usize,
    /// Places that toggled it.
    pub toggles: usize,
}

/// Everything seen in a sweep that may concern the shadow; which of it does is known at the end.
#[derive(Debug, Default)]
pub(super) struct Cr4Shadow {
    /// Variables that CR4 is stored to.
    shadows: Vec<u64>,
    loads: Vec<Load>,
    /// (address of the copy, target) of calls behind a `mov rsi, rdi`: the body of `clear`.
    forwards: Vec<(u64, u64)>,
    first_arguments: Vec<Argument>,
    second_arguments: Vec<Argument>,
    state: Recent,
}

/// What the last few instructions left behind: file offset and value of arguments.
#[derive(Debug, Default)]
struct Recent {
    cr4: Option<Register>,
    edi: Option<(usize, u64)>,
    esi: Option<(usize, u64)>,
    rdi_copied_at: Option<u64>,
}

impl Cr4Shadow {
    /// Takes note of an instruction.
    pub fn visit(&mut self, site: &Site<'_, '_>) {
        let instruction = site.instruction;
        match instruction.flow_control() {
            FlowControl::Next => {
                self.visit_store_of_cr4(instruction);
                self.visit_arguments(site);
                self.visit_load(instruction);
            }
            FlowControl::Call | FlowControl::UnconditionalBranch => self.visit_call(instruction),
            FlowControl::ConditionalBranch => {}
            // The interrupt flag is saved by an indirect call that keeps all registers but RAX.
            FlowControl::IndirectCall => (self.state.edi, self.state.esi) = (None, None),
            _ => self.state = Recent::default(),
        }
    }

    fn visit_store_of_cr4(&mut self, instruction: &Instruction) {
        if instruction.mnemonic() == Mnemonic::Mov && instruction.op1_register() == Register::CR4 {
            self.state.cr4 = Some(instruction.op0_register());
        } else if let Some(register) = self.state.cr4.take()
            && instruction.op0_kind() == OpKind::Memory
            && instruction.op1_register() == register
            && let Some(variable) = variable_move(instruction)
        {
            self.shadows.push(variable);
        }
    }

    fn visit_arguments(&mut self, site: &Site<'_, '_>) {
        let instruction = site.instruction;
        if instruction.op_count() == 0 || instruction.op0_kind() != OpKind::Register {
            return;
        }
        let with_tsd = immediate(instruction)
            .filter(|v| instruction.mnemonic() == Mnemonic::Mov && v & u64::from(TSD) != 0)
            .and_then(|value| Some((site.immediate_offset()?, value)));
        match instruction.op0_register().full_register() {
            Register::RDI => self.state.edi = with_tsd,
            Register::RSI => {
                self.state.esi = with_tsd;
                let copies =
                    instruction.mnemonic() == Mnemonic::Mov && instruction.op1_register() == Register::RDI;
                if copies {
                    self.state.rdi_copied_at = Some(instruction.ip());
                }
            }
            _ => {}
        }
    }

    fn visit_load(&mut self, instruction: &Instruction) {
        if instruction.op0_kind() == OpKind::Register
            && let Some(variable) = variable_move(instruction)
        {
            let (ip, next_ip) = (instruction.ip(), instruction.next_ip());
            self.loads.push(Load { variable, ip, into: instruction.op0_register(), next_ip });
        }
    }

    fn visit_call(&mut self, instruction: &Instruction) {
        let target = instruction.near_branch_target();
        let recent = std::mem::take(&mut self.state);
        let argument = |(offset, value)| Argument { offset, value, target };
        self.first_arguments.extend(recent.edi.map(argument));
        self.second_arguments.extend(recent.esi.map(argument));
        self.forwards.extend(recent.rdi_copied_at.map(|ip| (ip, target)));
    }

    /// The start of the function that reads its arguments at `ip`: the last address before it that is called.
    fn function_of(&self, ip: u64) -> Option<u64> {
        let arguments = self.first_arguments.iter().chain(&self.second_arguments).map(|a| a.target);
        let called = arguments.chain(self.forwards.iter().map(|(_, target)| *target));
        called.filter(|target| ip.checked_sub(*target).is_some_and(|at| at < PROLOGUE_BYTES)).max()
    }

    /// Applies what concerns the shadow.
    ///
    /// # Errors
    /// A description of what was not found: then the kernel would clear TSD in a way that is not known here.
    pub fn keep_tsd(self, image: &mut KernelImage) -> Result<ShadowReport, String> {
        if self.shadows.is_empty() {
            return Err("its copy of CR4 was not found".into());
        }
        let mut uses = Uses::default();
        for load in self.loads.iter().filter(|load| self.shadows.contains(&load.variable)) {
            uses.follow(image, load);
        }
        let updates: Vec<u64> =
            uses.masked_by_variable.iter().filter_map(|ip| self.function_of(*ip)).collect();
        let is_update = |function: u64| updates.contains(&function);
        let bodies = self.forwards.iter().filter(|(_, target)| is_update(*target));
        let clears: Vec<u64> = bodies.filter_map(|(ip, _)| self.function_of(*ip)).collect();
        let second = self.second_arguments.iter().filter(|a| is_update(a.target));
        let first = self.first_arguments.iter().filter(|a| clears.contains(&a.target));
        let passed: BTreeSet<(usize, bool)> =
            second.chain(first).map(|a| (a.offset, clears_all_of_cpu_init(a.value))).collect();

        if !uses.clears.iter().chain(&passed).any(|(_, in_cpu_init)| *in_cpu_init) {
            return Err("the place where it clears TSD (cpu_init) was not found".into());
        }
        for (kept, _) in &uses.clears {
            image.bytes[*kept] |= TSD;
        }
        for cleared in passed.iter().map(|(offset, _)| offset).chain(&uses.toggles) {
            image.bytes[*cleared] &= !TSD;
        }
        Ok(ShadowReport { clears: uses.clears.len() + passed.len(), toggles: uses.toggles.len() })
    }
}

impl Uses {
    /// Takes note of what is done with a loaded value, along every path behind the load up to calls and returns.
    fn follow(&mut self, image: &KernelImage, load: &Load) {
        let mut info = InstructionInfoFactory::new();
        let mut queue = VecDeque::from([(load.next_ip, vec![load.into])]);
        let mut seen = BTreeSet::new();
        while let Some((address, mut registers)) = queue.pop_front() {
            if seen.len() == FOLLOWED_INSTRUCTIONS || !seen.insert(address) {
                continue;
            }
            let Some((instruction, offset, constants)) = decode_at(image, address) else { continue };
            let constant = constants.has_immediate().then(|| offset + constants.immediate_offset());
            self.note(&instruction, constant, &registers, load);
            copy_or_forget(&instruction, &mut info, &mut registers);
            let (next, target) = (instruction.next_ip(), instruction.near_branch_target());
            match instruction.flow_control() {
                FlowControl::Next => queue.push_back((next, registers)),
                FlowControl::UnconditionalBranch => queue.push_back((target, registers)),
                FlowControl::ConditionalBranch => {
                    queue.push_back((next, registers.clone()));
                    queue.push_back((target, registers));
                }
                _ => {}
            }
        }
    }

    fn note(
        &mut self,
        instruction: &Instruction,
        constant: Option<usize>,
        registers: &[Register],
        load: &Load,
    ) {
        let is_value = |operand: u32| {
            instruction.op_kind(operand) == OpKind::Register
                && registers.contains(&instruction.op_register(operand).full_register())
        };
        if instruction.mnemonic() == Mnemonic::And
            && instruction.op1_kind() == OpKind::Register
            && is_value(0) != is_value(1)
        {
            self.masked_by_variable.push(load.ip);
        }
        let into = instruction.op0_register();
        let known = instruction.op_count() > 0 && is_value(0) && !is_high_byte(into);
        let (true, Some(mask), Some(constant)) = (known, immediate(instruction), constant) else { return };
        let cleared = !mask & u64::MAX >> (64 - 8 * into.size());
        match instruction.mnemonic() {
            Mnemonic::And if clears_only_tsd_and_its_neighbours(cleared) => {
                self.clears.insert((constant, clears_all_of_cpu_init(cleared)));
            }
            Mnemonic::Xor if mask & u64::from(TSD) != 0 => {
                self.toggles.insert(constant);
            }
            _ => {}
        }
    }
}

/// Keeps in `registers` those that hold the followed value, changed or not, behind an instruction.
fn copy_or_forget(
    instruction: &Instruction,
    info: &mut InstructionInfoFactory,
    registers: &mut Vec<Register>,
) {
    let copied = instruction.mnemonic() == Mnemonic::Mov
        && instruction.op0_kind() == OpKind::Register
        && instruction.op1_kind() == OpKind::Register
        && registers.contains(&instruction.op1_register().full_register());
    for used in info.info(instruction).used_registers().iter().filter(|u| u.access() == OpAccess::Write) {
        registers.retain(|register| *register != used.register().full_register());
    }
    if copied {
        registers.push(instruction.op0_register().full_register());
    }
}

/// Whether TSD is cleared and nothing else but VME, PVI or DE. An AND that clears anything else does not make a new
/// CR4: `setup_cr_pinning` picks some bits out of the shadow that way.
fn clears_only_tsd_and_its_neighbours(cleared: u64) -> bool {
    cleared & u64::from(TSD) != 0 && cleared & !CLEARED_BY_CPU_INIT == 0
}

fn clears_all_of_cpu_init(cleared: u64) -> bool {
    cleared & CLEARED_BY_CPU_INIT == CLEARED_BY_CPU_INIT
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

/// The variable, per-CPU or plain, that a 64-bit MOV loads or stores. Addresses of plain ones are those of the
/// kernel's half, per-CPU ones are offsets: the two do not meet.
fn variable_move(instruction: &Instruction) -> Option<u64> {
    let (to, from) = (instruction.op0_kind(), instruction.op1_kind());
    let register = match (to, from) {
        (OpKind::Memory, OpKind::Register) => instruction.op1_register(),
        (OpKind::Register, OpKind::Memory) => instruction.op0_register(),
        _ => return None,
    };
    let of_the_kernel = matches!(instruction.memory_segment(), Register::GS | Register::DS);
    let names_a_variable = instruction.mnemonic() == Mnemonic::Mov
        && register.is_gpr64()
        && of_the_kernel
        && instruction.memory_index() == Register::None
        && matches!(instruction.memory_base(), Register::None | Register::RIP);
    names_a_variable.then(|| instruction.memory_displacement64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sweep::sweep;
    use crate::boot::testing::{debian_kernels, image_of};

    /// mov rax, cr4; mov gs:[0x100], rax; ret
    const INIT_SHADOW: &[u8] = &[0x0f, 0x20, 0xe0, 0x65, 0x48, 0x89, 0x04, 0x25, 0, 1, 0, 0, 0xc3];
    /// mov rdi, gs:[0x100]
    const LOAD_RDI: &[u8] = &[0x65, 0x48, 0x8b, 0x3c, 0x25, 0, 1, 0, 0];
    /// mov rdi, gs:[0x108]
    const LOAD_OTHER: &[u8] = &[0x65, 0x48, 0x8b, 0x3c, 0x25, 8, 1, 0, 0];
    const RET: &[u8] = &[0xc3];

    fn patched(parts: &[&[u8]]) -> Result<(Vec<u8>, ShadowReport), String> {
        let mut image = image_of(&parts.concat());
        let mut shadow = Cr4Shadow::default();
        sweep(&image, |site| shadow.visit(site));
        let report = shadow.keep_tsd(&mut image)?;
        Ok((image.bytes, report))
    }

    #[test]
    fn inlined_clears_and_toggles_of_the_shadow_are_patched() {
        let and = |mask| [0x48, 0x83, 0xe7, mask]; // and rdi, mask
        let xor = |mask| [0x48, 0x83, 0xf7, mask]; // xor rdi, mask
        let code = |mask: u8, toggle: u8| {
            [LOAD_RDI, &and(mask), RET, LOAD_RDI, &xor(toggle), RET, LOAD_OTHER, &and(0xf0), RET, INIT_SHADOW]
                .concat()
        };
        let (after, report) = patched(&[&code(0xf0, 0x04)]).unwrap();
        assert_eq!(after, code(0xf4, 0x00));
        assert_eq!(report, ShadowReport { clears: 1, toggles: 1 });
    }

    #[test]
    fn a_copy_of_the_shadow_counts_other_registers_and_masks_do_not() {
        // mov rax, rdi; and al, 0xf0; and ecx, 0xfffffff0
        let code =
            |mask| [LOAD_RDI, &[0x48, 0x89, 0xf8, 0x24, mask, 0x83, 0xe1, 0xf0], RET, INIT_SHADOW].concat();
        assert_eq!(patched(&[&code(0xf0)]).unwrap().0, code(0xf4));
    }

    #[test]
    fn the_value_is_followed_through_jumps_in_both_directions() {
        let code = |mask| {
            [
                // the body, far from the load: and rdx, mask; mov gs:[0x100], rdx; ret (0x00 to 0x0d)
                &[0x48, 0x83, 0xe2, mask][..],
                &[0x65, 0x48, 0x89, 0x14, 0x25, 0, 1, 0, 0, 0xc3],
                // cpu_init, at 0x0e: mov rdx, gs:[0x100]; test dl, 15; jne over the next; ret
                &[0x65, 0x48, 0x8b, 0x14, 0x25, 0, 1, 0, 0, 0xf6, 0xc2, 0x0f, 0x75, 0x01, 0xc3],
                // jmp to the body
                &[0xeb, 0xe1],
                INIT_SHADOW,
            ]
            .concat()
        };
        let (after, report) = patched(&[&code(0xf0)]).unwrap();
        assert_eq!(after, code(0xf4));
        assert_eq!(report, ShadowReport { clears: 1, toggles: 0 });
    }

    #[test]
    fn a_plain_variable_is_a_shadow_too() {
        let code = |mask| {
            [
                &[0x48, 0x8b, 0x05, 0xf9, 0x0f, 0, 0][..], // mov rax, [rip to 0x1000]
                &[0x24, mask, 0xc3],                       // and al, mask; ret
                &[0x0f, 0x20, 0xe0],                       // mov rax, cr4
                &[0x48, 0x89, 0x05, 0xec, 0x0f, 0, 0],     // mov [rip to 0x1000], rax
                RET,
            ]
            .concat()
        };
        assert_eq!(patched(&[&code(0xf0)]).unwrap().0, code(0xf4));
    }

    #[test]
    fn an_overwritten_register_and_other_bits_are_left_alone() {
        for other in [
            &[0x48, 0x89, 0xf7, 0x48, 0x83, 0xe7, 0xf0][..], // mov rdi, rsi; and rdi, ~15
            &[0x5f, 0x48, 0x83, 0xf7, 0x04],                 // pop rdi; xor rdi, 4
            &[0x48, 0x89, 0xf8, 0x80, 0xe4, 0xf0],           // mov rax, rdi; and ah, 0xf0
            &[0x40, 0x80, 0xe7, 0x70],                       // and dil, 0x70
        ] {
            let code = [LOAD_RDI, other, RET].concat();
            let clear = [LOAD_RDI, &[0x48, 0x83, 0xe7, 0xf0], RET].concat();
            let (after, report) = patched(&[&code, &clear, INIT_SHADOW]).unwrap();
            assert_eq!(after[..code.len()], code, "{other:02x?}");
            assert_eq!(report, ShadowReport { clears: 1, toggles: 0 }, "{other:02x?}");
        }
    }

    #[test]
    fn code_that_jumps_in_circles_ends() {
        // load rdi; jmp back to behind the load; and a jump out of the image
        let circle = [LOAD_RDI, &[0xeb, 0xfe], LOAD_RDI, &[0xe9, 0xff, 0xff, 0xff, 0x7f]].concat();
        assert!(patched(&[&circle, INIT_SHADOW]).is_err());
    }

    #[test]
    fn masks_passed_to_functions_are_patched() {
        let code = |mask: u8, passed: u8| {
            [
                // update: not rsi; load rdx; mov rdi, rsi; and rdi, rdx; ret (0x00 to 0x12)
                &[0x48, 0xf7, 0xd6, 0x65, 0x48, 0x8b, 0x14, 0x25, 0, 1, 0, 0][..],
                &[0x48, 0x89, 0xf7, 0x48, 0x21, 0xd7, 0xc3],
                // clear, at 0x13: mov rsi, rdi; xor edi, edi; call update; ret (to 0x1d)
                &[0x48, 0x89, 0xfe, 0x31, 0xff, 0xe8, 0xe3, 0xff, 0xff, 0xff, 0xc3],
                // at 0x1e: mov edi, mask; call clear; ret (to 0x28)
                &[0xbf, mask, 0, 0, 0, 0xe8, 0xeb, 0xff, 0xff, 0xff, 0xc3],
                // at 0x29: xor edi, edi; mov esi, passed; call update; ret
                &[0x31, 0xff, 0xbe, passed, 0, 0, 0, 0xe8, 0xcb, 0xff, 0xff, 0xff, 0xc3],
                // mov edi, 4; xor esi, esi; call update: sets TSD; ret
                &[0xbf, 4, 0, 0, 0, 0x31, 0xf6, 0xe8, 0xbe, 0xff, 0xff, 0xff, 0xc3],
                INIT_SHADOW,
            ]
            .concat()
        };
        let (after, report) = patched(&[&code(0x0f, 0x04)]).unwrap();
        assert_eq!(after, code(0x0b, 0x00));
        assert_eq!(report, ShadowReport { clears: 2, toggles: 0 });
    }

    #[test]
    fn a_kernel_without_a_known_clear_is_refused() {
        assert!(patched(&[RET]).unwrap_err().contains("copy of CR4"));
        assert!(patched(&[LOAD_RDI, RET, INIT_SHADOW]).unwrap_err().contains("cpu_init"));
        // and rdi, ~TSD: that is PR_SET_TSC alone; where cpu_init clears it is not known.
        let only_tsd = [LOAD_RDI, &[0x48, 0x83, 0xe7, 0xfb], RET, INIT_SHADOW];
        assert!(patched(&only_tsd).unwrap_err().contains("cpu_init"));
    }

    #[test]
    fn debians_cloud_kernels_keep_tsd_in_their_shadow() {
        for kernel in debian_kernels("debians_cloud_kernels_keep_tsd_in_their_shadow", "cloud-") {
            let packed = std::fs::read(&kernel.path).unwrap();
            let (mut image, _) = crate::boot::parse_kernel(packed, &kernel.path).unwrap();
            let before = image.bytes.clone();
            let mut shadow = Cr4Shadow::default();
            sweep(&image, |site| shadow.visit(site));
            let report = shadow.keep_tsd(&mut image).unwrap();
            // cpu_init, enable_TSC; __switch_to_xtra.
            assert!((2..=3).contains(&report.clears) && report.toggles == 1, "{:?}: {report:?}", kernel.path);
            let changed = before.iter().zip(&image.bytes).filter(|(a, b)| a != b);
            let changed: Vec<_> = changed.map(|(a, b)| (*a, *b)).collect();
            assert_eq!(changed.len(), report.clears + report.toggles, "{:?}", kernel.path);
            assert!(changed.iter().all(|(a, b)| a ^ b == TSD), "{:?}: {changed:02x?}", kernel.path);
        }
    }
}
