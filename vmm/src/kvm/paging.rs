//! Guest memory with the rights that the guest's own page tables give.
//!
//! Owns: the walk through four-level page tables (Intel SDM volume 3, 4.5 and 4.6). Must never: reach what the CPU would
//! refuse. What is not certain counts as refused. It does not set accessed or dirty bits.

use devices::GuestRam;
use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress};

use super::PAGE_BYTES;
use super::linear::pages;

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
/// Five levels, protection keys of both kinds: no guest is offered them.
const CR4_UNKNOWN: u64 = 1 << 12 | 1 << 22 | 1 << 24;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Addresses of tables and pages, of which every guest has 40 bits at most.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// What a linear address of an entry takes of the address, from the highest level on.
const SHIFTS: [u32; 4] = [39, 30, 21, 12];

/// What is done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A load.
    Read,
    /// A store. Refused where an accessed bit or the dirty bit is not set: the CPU would set it.
    Write,
    /// An instruction.
    Execute,
}

/// Where a linear address leads, and what all entries on the way say together.
struct Leaf {
    gpa: u64,
    user: bool,
    writable: bool,
    accessed: bool,
    dirty: bool,
    no_execute: bool,
}

/// What a walk came to, and how many bytes around the address the last entry on the way speaks for.
struct Walk {
    leaf: Option<Leaf>,
    entry_bytes: u64,
}

/// Who asks for memory, and by which tables.
#[derive(Clone, Copy)]
pub struct AddressSpace<'a> {
    ram: &'a GuestRam,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    user: bool,
    /// SMAP lets ring 0 reach pages of ring 3.
    may_reach_user: bool,
}

impl<'a> AddressSpace<'a> {
    /// As the guest's next instruction would reach it.
    pub fn of_instruction(ram: &'a GuestRam, sregs: &kvm_sregs, rflags: u64) -> Self {
        Self {
            ram,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            user: sregs.ss.dpl == 3,
            may_reach_user: rflags & RFLAGS_AC != 0,
        }
    }

    /// As the CPU itself reaches tables and stacks of ring 0 while it delivers an exception.
    pub fn of_delivery(ram: &'a GuestRam, sregs: &kvm_sregs) -> Self {
        Self { user: false, may_reach_user: false, ..Self::of_instruction(ram, sregs, 0) }
    }

    /// The guest-physical address of `linear`, if the CPU would reach it without a fault.
    pub fn translate(&self, linear: u64, access: Access) -> Option<u64> {
        self.translate_run(linear, access).0
    }

    /// Does `linear` lie in a page that was accessed before, so that the CPU would change no entry?
    pub fn was_accessed(&self, linear: u64) -> bool {
        self.walk(linear).leaf.is_some_and(|leaf| leaf.accessed)
    }

    /// As [`AddressSpace::translate`], and how many bytes from `linear` on have the same answer.
    pub fn translate_run(&self, linear: u64, access: Access) -> (Option<u64>, u64) {
        let Walk { leaf, entry_bytes } = self.walk(linear);
        let gpa = leaf.filter(|leaf| self.allows(access, leaf)).map(|leaf| leaf.gpa);
        (gpa, entry_bytes - (linear & (entry_bytes - 1)))
    }

    fn walk(&self, linear: u64) -> Walk {
        let long_mode = self.cr0 & CR0_PG != 0 && self.efer & EFER_LMA != 0 && self.cr4 & CR4_UNKNOWN == 0;
        let canonical = (linear as i64) << 16 >> 16 == linear as i64;
        if !long_mode || !canonical {
            return Walk { leaf: None, entry_bytes: PAGE_BYTES };
        }
        let mut table = self.cr3 & ADDRESS;
        let (mut all, mut any) = (WRITABLE | USER | ACCESSED, 0);
        for shift in SHIFTS {
            let index = linear >> shift & 0x1ff;
            let entry_bytes = 1 << shift;
            let nothing = Walk { leaf: None, entry_bytes };
            let Ok(entry) = self.ram.read_obj::<u64>(GuestAddress(table + index * 8)) else { return nothing };
            let large = entry & LARGE != 0 && shift != SHIFTS[3];
            let reserved =
                (large && shift == SHIFTS[0]) || (entry & NO_EXECUTE != 0 && self.efer & EFER_NXE == 0);
            if entry & PRESENT == 0 || reserved {
                return nothing;
            }
            all &= entry;
            any |= entry;
            if shift == SHIFTS[3] || large {
                let into = entry_bytes - 1;
                // Bit 12 of a large page's entry belongs to its memory type.
                let gpa = entry & ADDRESS & !into | linear & into;
                let leaf = Leaf {
                    gpa,
                    user: all & USER != 0,
                    writable: all & WRITABLE != 0,
                    accessed: all & ACCESSED != 0,
                    dirty: entry & DIRTY != 0,
                    no_execute: any & NO_EXECUTE != 0,
                };
                return Walk { leaf: Some(leaf), entry_bytes };
            }
            table = entry & ADDRESS;
        }
        Walk { leaf: None, entry_bytes: PAGE_BYTES }
    }

    fn allows(&self, access: Access, leaf: &Leaf) -> bool {
        let reaches = if self.user {
            leaf.user
        } else if access == Access::Execute {
            !leaf.user || self.cr4 & CR4_SMEP == 0
        } else {
            !leaf.user || self.cr4 & CR4_SMAP == 0 || self.may_reach_user
        };
        reaches
            && match access {
                Access::Read => true,
                Access::Write => {
                    let unprotected = !self.user && self.cr0 & CR0_WP == 0;
                    leaf.accessed && leaf.dirty && (leaf.writable || unprotected)
                }
                Access::Execute => !leaf.no_execute,
            }
    }

    /// Fills `out` from `linear` on. False: part of that cannot be reached.
    pub fn read(&self, linear: u64, out: &mut [u8]) -> bool {
        self.fetch(linear, out, Access::Read) == out.len()
    }

    /// Fills `out` with code from `linear` on, and answers how many bytes of it can be reached.
    pub fn code(&self, linear: u64, out: &mut [u8]) -> usize {
        self.fetch(linear, out, Access::Execute)
    }

    fn fetch(&self, linear: u64, out: &mut [u8], access: Access) -> usize {
        for (piece, at) in pages(linear, out.len()) {
            let start = piece.start;
            let Some(gpa) = self.translate(at, access) else { return start };
            if self.ram.read_slice(&mut out[piece], GuestAddress(gpa)).is_err() {
                return start;
            }
        }
        out.len()
    }

    /// Writes `bytes` from `linear` on. False: part of that cannot be reached, and nothing was written.
    pub fn write(&self, linear: u64, bytes: &[u8]) -> bool {
        let places: Option<Vec<_>> = pages(linear, bytes.len())
            .map(|(piece, at)| self.translate(at, Access::Write).map(|gpa| (piece, GuestAddress(gpa))))
            .collect();
        let Some(places) = places else { return false };
        // A page lies in one piece of memory as a whole, or not at all.
        let in_ram = |gpa: GuestAddress| self.ram.read_obj::<u8>(gpa).is_ok();
        places.iter().all(|(_, gpa)| in_ram(*gpa))
            && places.into_iter().all(|(piece, gpa)| self.ram.write_slice(&bytes[piece], gpa).is_ok())
    }

    /// Do both addresses lie in the same page of the guest's memory?
    pub fn same_page(&self, one: u64, other: u64) -> bool {
        let page = |linear| self.translate(linear, Access::Read).map(|gpa| gpa / PAGE_BYTES);
        page(one) == page(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLES: [u64; 4] = [0x1000, 0x2000, 0x3000, 0x4000];
    const PAGE: u64 = 0x8000;
    const LINEAR: u64 = 0x1234_5678_9000;
    const ALL: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;

    /// Memory in which `LINEAR` leads to `PAGE`, with the bits of `leaf` in the last entry.
    fn memory(leaf: u64) -> GuestRam {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let next = [TABLES[1] | ALL, TABLES[2] | ALL, TABLES[3] | ALL, PAGE | leaf];
        for ((table, shift), entry) in TABLES.into_iter().zip(SHIFTS).zip(next) {
            ram.write_obj(entry, GuestAddress(table + (LINEAR >> shift & 0x1ff) * 8)).unwrap();
        }
        ram
    }

    fn registers(ring: u8) -> kvm_sregs {
        let mut sregs = kvm_sregs {
            cr0: CR0_PG | CR0_WP | 1,
            cr3: TABLES[0],
            cr4: 1 << 5,
            efer: EFER_LMA | EFER_NXE,
            ..Default::default()
        };
        sregs.ss.dpl = ring;
        sregs
    }

    fn reached(leaf: u64, ring: u8, access: Access) -> bool {
        let ram = memory(leaf);
        let space = AddressSpace::of_instruction(&ram, &registers(ring), 2);
        space.translate(LINEAR + 5, access) == Some(PAGE + 5)
    }

    #[test]
    fn rights_are_those_of_the_page_tables() {
        use Access::{Execute, Read, Write};
        for (what, leaf, ring, access, expected) in [
            ("all", ALL, 3, Write, true),
            ("not present", ALL & !PRESENT, 0, Read, false),
            ("a first access that writes", ALL & !ACCESSED, 0, Write, false),
            ("a first access that reads", ALL & !ACCESSED, 0, Read, true),
            ("ring 3 reads a page of ring 0", ALL & !USER, 3, Read, false),
            ("ring 3 writes a page of ring 0", ALL & !USER, 3, Write, false),
            ("ring 3 runs a page of ring 0", ALL & !USER, 3, Execute, false),
            ("ring 0 writes it", ALL & !USER, 0, Write, true),
            ("a write to a read-only page", ALL & !WRITABLE, 3, Write, false),
            ("the same in ring 0", ALL & !WRITABLE, 0, Write, false),
            ("a first write", ALL & !DIRTY, 3, Write, false),
            ("a read before any write", ALL & !DIRTY, 3, Read, true),
            ("code in data", ALL | NO_EXECUTE, 3, Execute, false),
            ("a read of it", ALL | NO_EXECUTE, 3, Read, true),
        ] {
            assert_eq!(reached(leaf, ring, access), expected, "{what}");
        }
    }

    #[test]
    fn a_page_was_accessed_if_all_entries_say_so() {
        for (leaf, expected) in [(ALL, true), (ALL & !ACCESSED, false), (ALL & !PRESENT, false)] {
            let ram = memory(leaf);
            assert_eq!(AddressSpace::of_delivery(&ram, &registers(3)).was_accessed(LINEAR), expected);
        }
    }

    #[test]
    fn control_registers_decide_about_ring_0() {
        let ram = memory(ALL & !WRITABLE);
        let mut sregs = registers(0);
        sregs.cr0 &= !CR0_WP;
        assert!(AddressSpace::of_instruction(&ram, &sregs, 2).translate(LINEAR, Access::Write).is_some());
        let ram = memory(ALL);
        let mut sregs = registers(0);
        sregs.cr4 |= CR4_SMAP | CR4_SMEP;
        let reached = |space: AddressSpace<'_>, access| space.translate(LINEAR, access).is_some();
        assert!(!reached(AddressSpace::of_instruction(&ram, &sregs, 2), Access::Read));
        assert!(reached(AddressSpace::of_instruction(&ram, &sregs, 2 | RFLAGS_AC), Access::Write));
        assert!(!reached(AddressSpace::of_instruction(&ram, &sregs, 2 | RFLAGS_AC), Access::Execute));
        assert!(!reached(AddressSpace::of_delivery(&ram, &sregs), Access::Write));
        sregs.cr4 |= 1 << 22;
        assert!(!reached(AddressSpace::of_instruction(&ram, &sregs, 2 | RFLAGS_AC), Access::Write));
    }

    #[test]
    fn a_missing_right_on_a_higher_level_counts() {
        let ram = memory(ALL);
        let entry = TABLES[2] + (LINEAR >> SHIFTS[2] & 0x1ff) * 8;
        ram.write_obj(TABLES[3] | ALL & !USER, GuestAddress(entry)).unwrap();
        let space = |ring| AddressSpace::of_instruction(&ram, &registers(ring), 2);
        assert_eq!(space(3).translate(LINEAR, Access::Read), None);
        assert_eq!(space(0).translate(LINEAR, Access::Read), Some(PAGE));
    }

    #[test]
    fn large_pages_and_addresses_that_are_not_canonical() {
        let ram = memory(ALL);
        let entry = TABLES[2] + (LINEAR >> SHIFTS[2] & 0x1ff) * 8;
        ram.write_obj(0x20_0000 | ALL | LARGE | 1 << 12, GuestAddress(entry)).unwrap();
        let space = AddressSpace::of_instruction(&ram, &registers(3), 2);
        assert_eq!(space.translate(LINEAR, Access::Read), Some(0x20_0000 | LINEAR & 0x1f_ffff));
        assert_eq!(space.translate(LINEAR | 1 << 47, Access::Read), None);
    }

    #[test]
    fn nothing_is_written_where_a_part_is_refused() {
        let ram = memory(ALL);
        let space = AddressSpace::of_instruction(&ram, &registers(3), 2);
        // The next page is not mapped.
        assert!(!space.write(LINEAR + 0xffe, &[7; 4]));
        assert_eq!(ram.read_obj::<u16>(GuestAddress(PAGE + 0xffe)).unwrap(), 0);
        assert!(space.write(LINEAR + 0xffc, &[7; 4]));
        assert_eq!(ram.read_obj::<u32>(GuestAddress(PAGE + 0xffc)).unwrap(), 0x0707_0707);
    }
}
