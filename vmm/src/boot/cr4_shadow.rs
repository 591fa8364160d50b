//! Keeps TSD in Linux's shadow of CR4, from which all of its later writes to CR4 are made.
//!
//! Owns: [`Cr4Shadow`], the patches to code that changes the shadow. Must never: touch a constant that does not
//! end in the shadow.
//!
//! `cpu_tlbstate.cr4` is a per-CPU variable: the only one that a value read from CR4 is stored to at once
//! (`cr4_init_shadow`). These are its uses that can take TSD away, as compilers write them; `X` is its address:
//!
//! ```text
//! cpu_init, inlined     mov r, gs:[X]; and r, ~(VME|PVI|TSD|DE)                      keep bit 2 of the mask
//! cpu_init, enable_TSC  mov esi, mask; call update       update: mov r, gs:[X]; not  clear bit 2 of the mask
//!                       mov edi, mask; call clear         clear: mov rsi, rdi; ... call update
//! __switch_to_xtra      mov r, gs:[X]; xor r, TSD                                    clear bit 2 of the mask
//! ```
//!
//! With these patched `PR_SET_TSC` changes nothing but a flag of the process.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::sweep::{Site, immediate};

const TSD: u8 = 1 << 2;
/// VME, PVI, TSD, DE.
const CLEARED_BY_CPU_INIT: u64 = 0xf;
/// How many instructions a value is followed behind its load.
const WINDOW_INSTRUCTIONS: u32 = 8;
/// A function of the two kinds above reads its arguments within so many bytes of its start.
const PROLOGUE_BYTES: u64 = 0x20;

/// A constant with bit 2 that is on its way into a function.
#[derive(Clone, Copy, Debug)]
struct Argument {
    offset: usize,
    target: u64,
}

/// A change of a loaded per-CPU variable by a constant.
#[derive(Clone, Copy, Debug)]
struct Change {
    variable: u64,
    offset: usize,
    toggles: bool,
}

/// A value that was loaded a few instructions ago.
#[derive(Clone, Debug)]
struct Loaded {
    variable: u64,
    ip: u64,
    registers: Vec<Register>,
    instructions_left: u32,
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
    changes: Vec<Change>,
    /// (variable, address) of loads followed by a NOT: the body of `update`.
    complements: Vec<(u64, u64)>,
    /// (address of the copy, target) of calls behind a `mov rsi, rdi`: the body of `clear`.
    forwards: Vec<(u64, u64)>,
    first_arguments: Vec<Argument>,
    second_arguments: Vec<Argument>,
    state: Recent,
}

/// What the last few instructions left behind.
#[derive(Debug, Default)]
struct Recent {
    cr4: Option<Register>,
    loaded: Option<Loaded>,
    edi: Option<usize>,
    esi: Option<usize>,
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
                self.visit_loaded(site);
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
            && let Some(variable) = per_cpu_move(instruction)
        {
            self.shadows.push(variable);
        }
    }

    fn visit_arguments(&mut self, site: &Site<'_, '_>) {
        let instruction = site.instruction;
        if instruction.op_count() == 0 || instruction.op0_kind() != OpKind::Register {
            return;
        }
        let with_tsd = (instruction.mnemonic() == Mnemonic::Mov
            && immediate(instruction).is_some_and(|v| v & u64::from(TSD) != 0))
        .then(|| site.immediate_offset())
        .flatten();
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

    fn visit_loaded(&mut self, site: &Site<'_, '_>) {
        let instruction = site.instruction;
        if instruction.op0_kind() == OpKind::Register
            && let Some(variable) = per_cpu_move(instruction)
        {
            self.state.loaded = Some(Loaded {
                variable,
                ip: instruction.ip(),
                registers: vec![instruction.op0_register().full_register()],
                instructions_left: WINDOW_INSTRUCTIONS,
            });
            return;
        }
        let Some(loaded) = &mut self.state.loaded else { return };
        loaded.instructions_left -= 1;
        let into = instruction.op0_register().full_register();
        let known = instruction.op0_kind() == OpKind::Register && loaded.registers.contains(&into);
        match (instruction.mnemonic(), immediate(instruction)) {
            (Mnemonic::Mov, None)
                if instruction.op0_kind() == OpKind::Register
                    && loaded.registers.contains(&instruction.op1_register()) =>
            {
                loaded.registers.push(into);
            }
            (Mnemonic::And | Mnemonic::Xor, Some(mask)) if known => {
                let toggles = instruction.mnemonic() == Mnemonic::Xor;
                let concerns_tsd = if toggles {
                    mask & u64::from(TSD) != 0
                } else {
                    clears_only_tsd_and_its_neighbours(mask, instruction.op0_register())
                };
                if let (true, Some(offset)) = (concerns_tsd, site.immediate_offset()) {
                    self.changes.push(Change { variable: loaded.variable, offset, toggles });
                }
            }
            (Mnemonic::Not, _) => self.complements.push((loaded.variable, loaded.ip)),
            _ => {}
        }
        if loaded.instructions_left == 0 {
            self.state.loaded = None;
        }
    }

    fn visit_call(&mut self, instruction: &Instruction) {
        let target = instruction.near_branch_target();
        let recent = std::mem::take(&mut self.state);
        let argument = |offset| Argument { offset, target };
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
    pub fn keep_tsd(self, bytes: &mut [u8]) -> Result<ShadowReport, String> {
        if self.shadows.is_empty() {
            return Err("its copy of CR4 was not found".into());
        }
        let is_shadow = |variable: u64| self.shadows.contains(&variable);
        let bodies = self.complements.iter().filter(|(variable, _)| is_shadow(*variable));
        let updates: Vec<u64> = bodies.filter_map(|(_, ip)| self.function_of(*ip)).collect();
        let is_update = |function: u64| updates.contains(&function);
        let bodies = self.forwards.iter().filter(|(_, target)| is_update(*target));
        let clears: Vec<u64> = bodies.filter_map(|(ip, _)| self.function_of(*ip)).collect();
        let is_clear = |function: u64| clears.contains(&function);

        let mut report = ShadowReport::default();
        for change in self.changes.iter().filter(|c| is_shadow(c.variable)) {
            if change.toggles {
                bytes[change.offset] &= !TSD;
                report.toggles += 1;
            } else {
                bytes[change.offset] |= TSD;
                report.clears += 1;
            }
        }
        let second = self.second_arguments.iter().filter(|a| is_update(a.target));
        let first = self.first_arguments.iter().filter(|a| is_clear(a.target));
        for argument in second.chain(first) {
            bytes[argument.offset] &= !TSD;
            report.clears += 1;
        }
        if report.clears == 0 {
            return Err("the place where it clears TSD (cpu_init) was not found".into());
        }
        Ok(report)
    }
}

/// Whether an AND of `register` with `mask` takes away TSD and nothing else but VME, PVI or DE. An AND with any
/// other mask does not make a new CR4: `setup_cr_pinning` picks some bits out of the shadow that way.
fn clears_only_tsd_and_its_neighbours(mask: u64, register: Register) -> bool {
    let width = u64::MAX >> (64 - 8 * register.size());
    let cleared = !mask & width;
    cleared & u64::from(TSD) != 0 && cleared & !CLEARED_BY_CPU_INIT == 0
}

/// The per-CPU variable that a 64-bit MOV loads or stores.
fn per_cpu_move(instruction: &Instruction) -> Option<u64> {
    let plain = instruction.mnemonic() == Mnemonic::Mov
        && instruction.memory_segment() == Register::GS
        && instruction.memory_index() == Register::None
        && matches!(instruction.memory_base(), Register::None | Register::RIP)
        && (instruction.op0_kind() == OpKind::Memory || instruction.op1_kind() == OpKind::Memory);
    plain.then(|| instruction.memory_displacement64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sweep::sweep;
    use crate::boot::testing::{debian_kernel, image_of};

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
        let report = shadow.keep_tsd(&mut image.bytes)?;
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
    fn masks_passed_to_functions_are_patched() {
        let code = |mask: u8, passed: u8| {
            [
                // update: mov rax, rdi; mov rdi, rsi; load; not rdi; ret (0x00 to 0x12)
                &[0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7][..],
                &[0x65, 0x48, 0x8b, 0x14, 0x25, 0, 1, 0, 0, 0x48, 0xf7, 0xd7, 0xc3],
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
    }

    #[test]
    fn debians_cloud_kernel_keeps_tsd_in_its_shadow() {
        let Some((_dir, path)) = debian_kernel("debians_cloud_kernel_keeps_tsd_in_its_shadow") else {
            return;
        };
        let mut image = crate::boot::read_kernel(&path).unwrap();
        let before = image.bytes.clone();
        let mut shadow = Cr4Shadow::default();
        sweep(&image, |site| shadow.visit(site));
        // cpu_init and enable_TSC; __switch_to_xtra.
        assert_eq!(shadow.keep_tsd(&mut image.bytes), Ok(ShadowReport { clears: 2, toggles: 1 }));
        let changed = before.iter().zip(&image.bytes).filter(|(a, b)| a != b).map(|(a, b)| (*a, *b));
        let mut changed: Vec<_> = changed.collect();
        changed.sort_unstable();
        assert_eq!(changed, [(0x04, 0x00), (0x04, 0x00), (0x0f, 0x0b)]);
    }
}
