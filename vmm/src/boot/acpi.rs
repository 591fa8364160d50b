//! The ACPI tables of the guest: legacy hardware, the PM timer, the HPET, power-off, and where the virtio devices are.
//!
//! Owns: [`write_tables`] and the area [`TABLES_START`]..[`TABLES_END`]. Must never: describe a device that the
//! monitor does not have, or an APIC: without a MADT Linux stays with the 8259.
//!
//! The platform is not "hardware-reduced": then Linux would drop the 8259 and the 8254. SMI_CMD is 0, so ACPI
//! mode is always on. There is no PCI root, no 8042 (declared absent: Linux does not probe for a keyboard; reset
//! through port 0x64 does not need the declaration), no VGA. The UART is not described: Linux knows where COM1 is,
//! and would set it up a second time for a description.
//!
//! Follows: ACPI specification 6.5, chapters 5 (tables), 4.8 (fixed hardware), 6.4 (resources), 20 (AML).

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::{Aml, aml};
use acpi_tables::{facs::FACS, rsdp::Rsdp, sdt::Sdt, xsdt::XSDT};
use devices::layout::{
    HPET_BASE, PM_TIMER_PORT, PM1A_CONTROL_PORT, PM1A_EVENT_PORT, RESET_PORT, RESET_VALUE, SCI_IRQ,
    SLEEP_TYPE_S5, VIRTIO_WINDOW_BYTES,
};
use devices::{GuestRam, HPET_IDENTITY, VirtioWindow};
use vm_memory::{Bytes, GuestAddress};

use super::BootError;

/// The RSDP is here, in the BIOS area that operating systems search, and its address is in the zero page.
pub(super) const TABLES_START: u64 = 0xe_0000;
/// First address behind the tables' area.
pub(super) const TABLES_END: u64 = 0x10_0000;

const OEM_ID: [u8; 6] = *b"VMFT  ";
const OEM_TABLE_ID: [u8; 8] = *b"VMFTGUST";
const OEM_REVISION: u32 = 1;
const DSDT_REVISION: u8 = 2;
/// FACS must be aligned to 64 bytes; so is everything else.
const TABLE_ALIGN: u64 = 64;
/// FADT IA-PC boot architecture: legacy devices present, no VGA, no MSI.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 3;
/// A latency above 100 (C2) or 1000 us (C3) says that there is no such state.
const NO_C2_LATENCY: u16 = 0x0fff;
const NO_C3_LATENCY: u16 = 0x0fff;
/// The BIOS area has room for far more, but no guest has more devices than interrupt lines.
const WINDOWS_MAX: usize = 16;

/// Writes all tables for a guest with these virtio devices.
///
/// # Errors
/// [`BootError::TooManyDevices`], [`BootError::Memory`].
pub(super) fn write_tables(ram: &GuestRam, windows: &[VirtioWindow]) -> Result<(), BootError> {
    if windows.len() > WINDOWS_MAX {
        return Err(BootError::TooManyDevices { count: windows.len(), max: WINDOWS_MAX });
    }
    let mut next = TABLES_START + aligned(Rsdp::len() as u64);
    let mut place = |bytes: &[u8]| -> Result<u64, BootError> {
        let at = next;
        next += aligned(bytes.len() as u64);
        put(ram, bytes, at)?;
        Ok(at)
    };
    let facs = place(&bytes_of(&FACS::new()))?;
    let dsdt = place(dsdt(windows)?.as_slice())?;
    let fadt = place(&bytes_of(&fadt(facs, dsdt)))?;
    let hpet = place(hpet().as_slice())?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(hpet);
    let xsdt = place(&bytes_of(&xsdt))?;
    put(ram, &bytes_of(&Rsdp::new(OEM_ID, xsdt)), TABLES_START)
}

fn put(ram: &GuestRam, bytes: &[u8], at: u64) -> Result<(), BootError> {
    ram.write_slice(bytes, GuestAddress(at)).map_err(|e| BootError::Memory {
        what: "ACPI tables",
        address: at,
        detail: e.to_string(),
    })
}

fn aligned(bytes: u64) -> u64 {
    bytes.next_multiple_of(TABLE_ALIGN)
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(facs: u64, dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::Wbinvd)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless);
    // Both widths of each address: ACPI takes the wide one and compares.
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.dsdt = (dsdt as u32).into();
    fadt.x_dsdt = dsdt.into();
    fadt.sci_int = u16::from(SCI_IRQ).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(PM_TIMER_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = port(PM1A_EVENT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CONTROL_PORT, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(PM_TIMER_PORT, 32, AccessSize::DwordAccess);
    fadt.p_lvl2_lat = NO_C2_LATENCY.into();
    fadt.p_lvl3_lat = NO_C3_LATENCY.into();
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

fn port(port: u16, bits: u8, access_size: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access_size, u64::from(port))
}

/// One block of timers, without interrupts (IA-PC HPET specification 1.0a, section 3.2.4).
fn hpet() -> Sdt {
    let mut hpet = Sdt::new(*b"HPET", 36, 1, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    hpet.append(HPET_IDENTITY);
    hpet.append_slice(&bytes_of(&GAS::new(
        AddressSpace::SystemMemory,
        64,
        0,
        AccessSize::QwordAccess,
        HPET_BASE,
    )));
    // Sequence number, least ticks of a periodic timer, and no promise about the rest of the page.
    hpet.append_slice(&[0, 0, 0, 0]);
    hpet
}

/// `\_S5` and one device for each window.
fn dsdt(windows: &[VirtioWindow]) -> Result<Sdt, BootError> {
    let mut body =
        bytes_of(&aml::Name::new("_S5_".into(), &aml::Package::new(vec![&SLEEP_TYPE_S5, &0u8, &0u8, &0u8])));
    for (number, window) in windows.iter().enumerate() {
        body.extend(virtio_device(number as u8, window)?);
    }
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    Ok(dsdt)
}

/// What Linux's `virtio_mmio` binds to: `LNRO0005` with one memory range and one interrupt.
fn virtio_device(number: u8, window: &VirtioWindow) -> Result<Vec<u8>, BootError> {
    let base = u32::try_from(window.gpa).map_err(|_| BootError::DeviceAddress { address: window.gpa })?;
    let memory = aml::Memory32Fixed::new(true, base, VIRTIO_WINDOW_BYTES as u32);
    // A level: Linux sets the line's bit in the ELCR, and the 8259 keeps asking until the device lets go.
    let interrupt = aml::Interrupt::new(true, false, false, false, u32::from(window.irq));
    let name = format!("_SB_.VR{number:02X}");
    let resources = aml::ResourceTemplate::new(vec![&memory, &interrupt]);
    let (id, unique) = (aml::Name::new("_HID".into(), &"LNRO0005"), aml::Name::new("_UID".into(), &number));
    let coherent = aml::Name::new("_CCA".into(), &aml::ONE);
    let settings = aml::Name::new("_CRS".into(), &resources);
    Ok(bytes_of(&aml::Device::new(name.as_str().into(), vec![&id, &unique, &coherent, &settings])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::ram;
    use devices::VirtioKind;

    fn bytes(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn number(table: &[u8], at: usize, len: usize) -> u64 {
        table[at..at + len].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// The table at `at`, with its signature, alignment and checksum checked.
    fn table(ram: &GuestRam, at: u64, signature: &[u8; 4]) -> Vec<u8> {
        assert_eq!(at % TABLE_ALIGN, 0);
        let table = bytes(ram, at, number(&bytes(ram, at, 8), 4, 4) as usize);
        assert_eq!(&table[..4], signature);
        assert!(at + table.len() as u64 <= TABLES_END);
        if signature != b"FACS" {
            assert_eq!(table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        }
        table
    }

    /// FADT and DSDT of a guest with these windows, found the way an operating system does.
    fn tables(windows: &[VirtioWindow]) -> (Vec<u8>, Vec<u8>) {
        let ram = ram(2);
        write_tables(&ram, windows).unwrap();
        let rsdp = bytes(&ram, TABLES_START, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        for len in [20, 36] {
            assert_eq!(rsdp[..len].iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        }
        let xsdt = table(&ram, number(&rsdp, 24, 8), b"XSDT");
        let fadt = table(&ram, number(&xsdt, 36, 8), b"FACP");
        let hpet = table(&ram, number(&xsdt, 44, 8), b"HPET");
        assert_eq!((hpet.len(), number(&hpet, 36, 4), number(&hpet, 44, 8)), (56, 0x8086_2201, 0xfed0_0000));
        table(&ram, number(&fadt, 36, 4), b"FACS");
        assert_eq!(number(&fadt, 40, 4), number(&fadt, 140, 8));
        let dsdt = table(&ram, number(&fadt, 140, 8), b"DSDT");
        (fadt, dsdt)
    }

    #[test]
    fn the_fadt_describes_the_legacy_board() {
        let (fadt, _) = tables(&[]);
        assert_eq!(number(&fadt, 46, 2), 9, "SCI_INT");
        assert_eq!(number(&fadt, 48, 4), 0, "SMI_CMD");
        let ports = [(56, 0x600), (64, 0x604), (76, 0x608)];
        assert!(ports.iter().all(|(at, port)| number(&fadt, *at, 4) == *port));
        assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
        assert_eq!(number(&fadt, 109, 2), 0b1101, "legacy devices, no 8042, no VGA, no MSI");
        let flags = number(&fadt, 112, 4);
        assert_eq!(
            flags & (1 << 20 | 1 << 8 | 1 << 4),
            0,
            "not hardware-reduced, 24-bit timer, power button"
        );
        assert_eq!(flags & 1 << 10, 1 << 10, "RESET_REG_SUP");
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 6], "RESET_REG, RESET_VALUE");
    }

    #[test]
    fn the_dsdt_has_s5_and_each_device() {
        let windows = [VirtioKind::Net.window(), VirtioKind::Rng.window()];
        let (_, dsdt) = tables(&windows);
        let has = |needle: &[u8]| dsdt.windows(needle.len()).any(|w| w == needle);
        assert!(
            has(&[8, b'_', b'S', b'5', b'_', 0x12, 7, 4, 0x0a, 5, 0, 0, 0]),
            "Name (_S5, Package (4) {{ 5, 0, 0, 0 }})"
        );
        for window in windows {
            let base = (window.gpa as u32).to_le_bytes();
            assert!(has(&[&[0x86, 9, 0, 1], &base[..], &[0, 0x10, 0, 0]].concat()), "Memory32Fixed");
            assert!(has(&[0x89, 6, 0, 1, 1, window.irq, 0, 0, 0]), "Interrupt");
        }
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 2);
    }

    #[test]
    fn devices_that_cannot_be_described_are_refused() {
        let high = VirtioWindow { gpa: 1 << 32, ..VirtioKind::Net.window() };
        assert!(matches!(write_tables(&ram(2), &[high]), Err(BootError::DeviceAddress { .. })));
        let many = [VirtioKind::Net.window(); 17];
        assert!(matches!(write_tables(&ram(2), &many), Err(BootError::TooManyDevices { count: 17, .. })));
    }
}
