//! What the guest finds in memory and registers when its kernel starts.
//!
//! Owns: the map of low memory below, the zero page, identity page tables, GDT, start registers.
//! Must never: depend on the host; the same configuration gives the same bytes on both hosts.
//! Follows: Linux `Documentation/arch/x86/boot.rst` (64-bit boot protocol) and `zero-page.rst`; Intel SDM
//! volume 3, 4.5 (paging) and 3.4.5 (segment descriptors).
//!
//! ```text
//! 0x00500  GDT, 4 entries
//! 0x07000  zero page (boot_params)
//! 0x08ff0  top of the first stack
//! 0x09000  page tables: PML4, PDPT, then a page directory for each GiB of 4
//! 0x10000  setup_data: random seed
//! 0x20000  command line
//! 0xe0000  ACPI tables, RSDP first
//! ```

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_sregs};
use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, acpi};
use crate::kvm::{PAGE_BYTES, segments};

/// First address behind the RAM below the hole for devices.
pub(super) const LOW_RAM_END: u64 = 0xc000_0000;
/// Where RAM goes on behind the hole.
pub(super) const HIGH_RAM_START: u64 = 1 << 32;
/// Where the kernel may begin: everything below belongs to the boot data.
pub(super) const KERNEL_START_MIN: u64 = 1 << 20;
/// The longest command line Linux keeps (`COMMAND_LINE_SIZE` less its zero byte).
pub(super) const CMDLINE_BYTES_MAX: usize = 2047;
/// Initial RAM disks lie below this (`initrd_addr_max` of every x86-64 kernel).
pub(super) const INITRD_END_MAX: u64 = 1 << 31;

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PML4: u64 = 0x9000;
const SETUP_DATA: u64 = 0x1_0000;
const CMDLINE: u64 = 0x2_0000;
const LOW_CONVENTIONAL_END: u64 = 0x9_fc00;

const PTE_PRESENT_WRITABLE: u64 = 3;
const PTE_LARGE: u64 = 0x80;
const IDENTITY_GIB: u64 = 4;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `SETUP_RNG_SEED`, Linux `arch/x86/include/uapi/asm/setup_data.h`.
const SETUP_RNG_SEED: u32 = 9;
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
const PROTOCOL_VERSION: u16 = 0x020f;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// CR0: PG, AM, WP, NE, ET, MP, PE: what Linux itself sets.
const CR0: u64 = 0x8005_0033;
const CR4_TSD: u64 = 1 << 2;
const CR4_PAE: u64 = 1 << 5;
/// EFER: LMA, LME.
const EFER: u64 = 0x500;
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Where the initial RAM disk was put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct InitrdPlace {
    /// Guest-physical address, page aligned.
    pub start: u64,
    /// Length in bytes.
    pub len_bytes: u64,
}

/// Writes everything but the kernel, the initial RAM disk and the ACPI tables.
///
/// # Errors
/// [`BootError::Memory`] when guest RAM does not reach to 1 MiB.
pub(super) fn write_boot_data(
    ram: &GuestRam,
    cmdline: &str,
    initrd: InitrdPlace,
    random_seed: &[u8; 32],
    memory_bytes: u64,
) -> Result<(), BootError> {
    let put = |bytes: &[u8], at: u64| -> Result<(), BootError> {
        ram.write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Memory {
            what: "boot data",
            address: at,
            detail: e.to_string(),
        })
    };
    let gdt: Vec<u8> = GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect();
    put(&gdt, GDT)?;
    put(&page_tables(), PML4)?;
    put(&seed_node(random_seed), SETUP_DATA)?;
    put(cmdline.as_bytes(), CMDLINE)?;
    put(&[0], CMDLINE + cmdline.len() as u64)?;
    let params = zero_page(cmdline.len() as u32, initrd, memory_bytes);
    ram.write_obj(params, GuestAddress(ZERO_PAGE)).map_err(|e| BootError::Memory {
        what: "zero page",
        address: ZERO_PAGE,
        detail: e.to_string(),
    })
}

fn zero_page(cmdline_bytes: u32, initrd: InitrdPlace, memory_bytes: u64) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = LOADED_HIGH;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_bytes;
    // Below INITRD_END_MAX, so both fit in 32 bits.
    params.hdr.ramdisk_image = initrd.start as u32;
    params.hdr.ramdisk_size = initrd.len_bytes as u32;
    params.hdr.setup_data = SETUP_DATA;
    params.acpi_rsdp_addr = acpi::TABLES_START;
    let map = memory_map(memory_bytes);
    params.e820_entries = map.len() as u8;
    params.e820_table[..map.len()].copy_from_slice(&map);
    params
}

fn memory_map(memory_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let low_end = memory_bytes.min(LOW_RAM_END);
    let mut map = vec![
        entry(0, LOW_CONVENTIONAL_END, E820_RAM),
        entry(acpi::TABLES_START, acpi::TABLES_END, E820_RESERVED),
        entry(KERNEL_START_MIN, low_end, E820_RAM),
    ];
    if memory_bytes > LOW_RAM_END {
        map.push(entry(HIGH_RAM_START, HIGH_RAM_START + (memory_bytes - LOW_RAM_END), E820_RAM));
    }
    map
}

/// PML4, PDPT and page directories that map the first 4 GiB to themselves in pages of 2 MiB.
fn page_tables() -> Vec<u8> {
    let pdpt = PML4 + PAGE_BYTES;
    let first_directory = pdpt + PAGE_BYTES;
    let mut tables = vec![0; (PAGE_BYTES * (2 + IDENTITY_GIB)) as usize];
    let mut set = |at: u64, value: u64| {
        let at = (at - PML4) as usize;
        tables[at..at + 8].copy_from_slice(&value.to_le_bytes());
    };
    set(PML4, pdpt | PTE_PRESENT_WRITABLE);
    for gib in 0..IDENTITY_GIB {
        set(pdpt + gib * 8, (first_directory + gib * PAGE_BYTES) | PTE_PRESENT_WRITABLE);
    }
    for page in 0..IDENTITY_GIB * 512 {
        set(first_directory + page * 8, page << 21 | PTE_LARGE | PTE_PRESENT_WRITABLE);
    }
    tables
}

/// `struct setup_data { u64 next; u32 type; u32 len; u8 data[]; }`
fn seed_node(random_seed: &[u8; 32]) -> Vec<u8> {
    let mut node = 0u64.to_le_bytes().to_vec();
    node.extend(SETUP_RNG_SEED.to_le_bytes());
    node.extend((random_seed.len() as u32).to_le_bytes());
    node.extend(random_seed);
    node
}

/// General registers at the kernel's first instruction: RSI points to the zero page.
pub(super) fn start_regs(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsi: ZERO_PAGE, rsp: STACK_TOP, rflags: 2, ..Default::default() }
}

/// Turns `sregs`, as a fresh vCPU has them, into flat 64-bit mode with identity paging.
pub(super) fn set_start_sregs(sregs: &mut kvm_sregs) {
    let data = segments::data(DATA_SELECTOR, 0);
    sregs.cs = segments::code_64(CODE_SELECTOR, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0;
    sregs.cr3 = PML4;
    sregs.cr4 = CR4_PAE | CR4_TSD;
    sregs.efer = EFER;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_map_covers_exactly_the_ram_and_the_tables() {
        let spans = |bytes| -> Vec<(u64, u64, u32)> {
            memory_map(bytes).iter().map(|e| (e.addr, e.addr + e.size, e.r#type)).collect()
        };
        assert_eq!(spans(256 << 20), [(0, 0x9fc00, 1), (0xe0000, 0x100000, 2), (0x100000, 256 << 20, 1)]);
        assert_eq!(spans(5 << 30)[2..], [(1 << 20, 0xc000_0000, 1), (1 << 32, (6u64 << 30), 1)]);
    }

    #[test]
    fn page_tables_map_every_address_below_4_gib_to_itself() {
        let tables = page_tables();
        let read = |at: u64| {
            let at = (at - PML4) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x1f_ffff, 0x20_0000, 0x100_0000, 0xbfff_f123, 0xffff_ffff_u64] {
            let pdpt = read(PML4 + 8 * (address >> 39)) & !0xfff;
            let directory = read(pdpt + 8 * (address >> 30 & 511)) & !0xfff;
            let entry = read(directory + 8 * (address >> 21 & 511));
            assert_eq!(entry & 0x83, 0x83);
            assert_eq!((entry & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
    }

    #[test]
    fn start_state_traps_user_rdtsc_and_enters_long_mode() {
        let mut sregs = kvm_sregs::default();
        set_start_sregs(&mut sregs);
        assert_eq!(sregs.cr4, 0x24);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.efer), (1, 0, 0x500));
        let regs = start_regs(0x100_0000);
        assert_eq!((regs.rip, regs.rsi, regs.rflags), (0x100_0000, 0x7000, 2));
    }

    #[test]
    fn seed_node_has_the_layout_of_setup_data() {
        let node = seed_node(&[7; 32]);
        assert_eq!(node[..16], [0, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 32, 0, 0, 0]);
        assert_eq!(node[16..], [7; 32]);
    }
}
