//! RDTSC in kernel code that the guest loads after its start.
//!
//! Owns: the search for such instructions. Must never: change the guest, or let a run depend on what is found.
//!
//! `boot/rdtsc.rs` rewrites the kernel's image. Modules and BPF programs come later, and CR4.TSD does not trap ring 0: an
//! RDTSC there reads the host's counter, which no log holds. This file finds it once it is in memory, so that somebody is told.
//!
//! ```text
//!   module area ── page tables ──> executable runs ── the opcode's bytes? ──> decode from the run's start ──> addresses
//! ```
//! Follows: Linux, Documentation/arch/x86/x86_64/mm.rst (the module area).
//!
//! Not covered: code outside the module area, and code that is gone again, such as a module's init section.

use std::fmt;

use devices::GuestRam;
use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use kvm_bindings::kvm_sregs;
use memchr::memmem;
use vm_memory::{Bytes, GuestAddress};

use super::Machine;
use crate::kvm::KvmError;
use crate::kvm::paging::{Access, AddressSpace};

/// The area begins here in a kernel that was built without KASLR, and 512 MiB later in others, whose image does not
/// reach that far.
const AREA_START: u64 = 0xffff_ffff_a000_0000;
const AREA_END: u64 = 0xffff_ffff_ff00_0000;
/// Executable bytes that are searched. A distribution's modules have a few MiB.
const SEARCHED_BYTES_MAX: usize = 64 << 20;
/// Addresses that are told.
const TOLD_MAX: usize = 8;

const RDTSC: &[u8] = &[0x0f, 0x31];
const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];

/// With page-table isolation a process has two top-level tables side by side; the lower one maps the whole kernel.
const USER_TABLE: u64 = 1 << 12;

/// Linear addresses of RDTSC and RDTSCP instructions that nobody has rewritten.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadedRdtscs(Vec<u64>);

impl LoadedRdtscs {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for LoadedRdtscs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} RDTSC or RDTSCP in kernel code that the guest has loaded, at", self.0.len())?;
        for address in self.0.iter().take(TOLD_MAX) {
            write!(f, " {address:#x}")?;
        }
        if self.0.len() > TOLD_MAX { f.write_str(" ...") } else { Ok(()) }
    }
}

impl Machine {
    /// Searches what the guest has loaded. It must stand still.
    ///
    /// # Errors
    /// KVM does not say where the guest's page tables are.
    pub fn loaded_rdtscs(&self) -> Result<LoadedRdtscs, KvmError> {
        Ok(search(&self.ram, self.vcpu.special_registers()?))
    }
}

fn search(ram: &GuestRam, mut sregs: kvm_sregs) -> LoadedRdtscs {
    let mut runs = executable_runs(ram, &sregs);
    if runs.is_empty() && sregs.cr3 & USER_TABLE != 0 {
        sregs.cr3 &= !USER_TABLE;
        runs = executable_runs(ram, &sregs);
    }
    LoadedRdtscs(runs.iter().flat_map(|run| run.rdtscs()).collect())
}

/// Executable memory without a gap.
struct Run {
    linear: u64,
    code: Vec<u8>,
}

impl Run {
    /// Addresses of the instructions. The bytes alone prove nothing: they may be part of another instruction.
    fn rdtscs(&self) -> Vec<u64> {
        let bytes_of = |opcode| memmem::find(&self.code, opcode).is_some();
        if !bytes_of(RDTSC) && !bytes_of(RDTSCP) {
            return Vec::new();
        }
        let decoder = Decoder::with_ip(64, &self.code, self.linear, DecoderOptions::NONE);
        decoder
            .into_iter()
            .filter(|instruction| matches!(instruction.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp))
            .map(|instruction| instruction.ip())
            .collect()
    }
}

fn executable_runs(ram: &GuestRam, sregs: &kvm_sregs) -> Vec<Run> {
    let space = AddressSpace::of_delivery(ram, sregs);
    let mut runs: Vec<Run> = Vec::new();
    let mut searched_bytes = 0;
    let mut linear = AREA_START;
    while linear < AREA_END && searched_bytes < SEARCHED_BYTES_MAX {
        let (mapped, left_bytes) = space.translate_run(linear, Access::Execute);
        let len_bytes = left_bytes.min(AREA_END - linear);
        let mut code = Vec::new();
        if let Some(gpa) = mapped {
            // The entry of a page of 1 GiB alone would be more than that.
            code.resize((SEARCHED_BYTES_MAX - searched_bytes).min(len_bytes as usize), 0);
            if ram.read_slice(&mut code, GuestAddress(gpa)).is_err() {
                code.clear();
            }
        }
        searched_bytes += code.len();
        match runs.last_mut() {
            _ if code.is_empty() => {}
            Some(run) if run.linear + run.code.len() as u64 == linear => run.code.append(&mut code),
            _ => runs.push(Run { linear, code }),
        }
        linear += len_bytes;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRESENT: u64 = 1;
    const LARGE: u64 = 1 << 7;
    const NO_EXECUTE: u64 = 1 << 63;
    const CR3: u64 = 0x10_0000;
    const POINTERS: u64 = 0x10_2000;
    const DIRECTORY: u64 = 0x10_3000;
    const TABLE: u64 = 0x10_4000;
    const CODE: u64 = 0x20_0000;
    const AREA_WITH_KASLR: u64 = 0xffff_ffff_c000_0000;
    const RET: u8 = 0xc3;

    fn registers(cr3: u64) -> kvm_sregs {
        let (paging, long_mode, no_execute) = (1 << 31, 1 << 10, 1 << 11);
        kvm_sregs { cr0: paging | 1, cr3, cr4: 1 << 5, efer: long_mode | no_execute, ..Default::default() }
    }

    struct Guest(GuestRam);

    impl Guest {
        /// Page tables that map nothing of the area, up to a table of pages at its start in a kernel with KASLR.
        fn new() -> Self {
            let guest = Self(GuestRam::from_ranges(&[(GuestAddress(0), 8 << 20)]).unwrap());
            guest.entry(CR3, 511, POINTERS | 3);
            guest.entry(POINTERS, 511, DIRECTORY | 3);
            guest.entry(DIRECTORY, 0, TABLE | 3);
            guest
        }

        fn entry(&self, table: u64, index: u64, entry: u64) {
            self.0.write_obj(entry, GuestAddress(table + index * 8)).unwrap();
        }

        /// Maps a page of code, as executable or not.
        fn page(&self, index: u64, code: &[u8], flags: u64) {
            let gpa = CODE + index * 0x1000;
            self.0.write_slice(code, GuestAddress(gpa)).unwrap();
            self.entry(TABLE, index, gpa | flags);
        }

        fn found(&self) -> Vec<u64> {
            search(&self.0, registers(CR3)).0
        }
    }

    #[test]
    fn instructions_are_found_and_bytes_that_look_alike_are_not() {
        let guest = Guest::new();
        // mov eax, 0x310f310f; rdtsc; ret; lfence; rdtscp; ret
        guest.page(2, &[0xb8, 0x0f, 0x31, 0x0f, 0x31, 0x0f, 0x31, RET], PRESENT);
        guest.page(4, &[0x0f, 0xae, 0xe8, 0x0f, 0x01, 0xf9, RET], PRESENT);
        assert_eq!(guest.found(), [AREA_WITH_KASLR + 0x2005, AREA_WITH_KASLR + 0x4003]);
    }

    #[test]
    fn an_instruction_across_two_pages_is_found() {
        let guest = Guest::new();
        let mut first = vec![0x90; 4096];
        first[4095] = 0x0f;
        guest.page(0, &first, PRESENT);
        guest.page(1, &[0x31, RET], PRESENT);
        assert_eq!(guest.found(), [AREA_WITH_KASLR + 4095]);
    }

    #[test]
    fn data_is_not_searched() {
        let guest = Guest::new();
        guest.page(0, RDTSC, PRESENT | NO_EXECUTE);
        guest.page(1, RDTSC, 0);
        assert!(guest.found().is_empty());
        guest.page(2, RDTSC, PRESENT);
        guest.entry(DIRECTORY, 0, TABLE | 3 | NO_EXECUTE);
        assert!(guest.found().is_empty(), "a table that is not executable");
    }

    #[test]
    fn large_pages_and_kernels_without_kaslr_are_searched() {
        let guest = Guest::new();
        guest.0.write_slice(RDTSC, GuestAddress(0x40_0124)).unwrap();
        // Bit 12 of a large page's entry is no part of its address.
        guest.entry(POINTERS, 510, DIRECTORY | 3);
        guest.entry(DIRECTORY, 256, 0x40_0000 | LARGE | USER_TABLE | PRESENT);
        assert_eq!(guest.found(), [0xffff_ffff_a000_0124, 0xffff_ffff_e000_0124]);
    }

    #[test]
    fn the_kernels_table_is_searched_where_a_process_has_its_own() {
        let guest = Guest::new();
        guest.page(0, RDTSC, PRESENT);
        assert_eq!(search(&guest.0, registers(CR3 | USER_TABLE)).0, [AREA_WITH_KASLR]);
    }

    #[test]
    fn page_tables_that_lead_nowhere_or_in_circles_end() {
        let guest = Guest::new();
        for index in 0..512 {
            guest.entry(CR3, index, CR3 | 3);
        }
        assert!(guest.found().len() < SEARCHED_BYTES_MAX);
        assert!(search(&guest.0, registers(0x7_ffff_f000)).is_empty());
        guest.entry(CR3, 511, 0x8_0000_0000 | 3);
        assert!(guest.found().is_empty());
    }

    #[test]
    fn a_page_of_a_gibibyte_is_searched_within_the_limit() {
        let guest = Guest(GuestRam::from_ranges(&[(GuestAddress(0), SEARCHED_BYTES_MAX + 4096)]).unwrap());
        guest.entry(CR3, 511, POINTERS | 3);
        guest.entry(POINTERS, 511, LARGE | PRESENT);
        guest.0.write_slice(RDTSC, GuestAddress(CODE)).unwrap();
        guest.0.write_slice(RDTSC, GuestAddress(SEARCHED_BYTES_MAX as u64)).unwrap();
        let runs = executable_runs(&guest.0, &registers(CR3));
        assert_eq!(runs.iter().map(|run| run.code.len()).sum::<usize>(), SEARCHED_BYTES_MAX);
        assert_eq!(guest.found(), [AREA_WITH_KASLR + CODE]);
    }

    #[test]
    fn the_sentence_has_some_of_the_addresses() {
        let told = LoadedRdtscs((0..9).collect()).to_string();
        assert_eq!(
            told,
            "9 RDTSC or RDTSCP in kernel code that the guest has loaded, at 0x0 0x1 0x2 0x3 0x4 0x5 0x6 0x7 ..."
        );
    }
}
