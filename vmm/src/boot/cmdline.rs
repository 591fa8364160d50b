//! The kernel command line that suits the monitor's hardware.
//!
//! Owns: [`command_line`]. Must never: name anything that differs between hosts.
//!
//! How the guest learns of its virtio devices: from ACPI, and from `virtio_mmio.device=` only where ACPI cannot
//! tell it (a kernel built without ACPI, or `acpi=off`). Both at once would be two drivers for one device. The
//! parameter is left out for ACPI kernels even if they know it.

use devices::VirtioWindow;
use devices::layout::{PM_TIMER_PORT, VIRTIO_WINDOW_BYTES};

use super::image::KernelImage;

/// In the order of the reasons below; what the user adds comes last and wins.
///
/// - `notsc nolapic noapic pci=off`: there are none, and looking for them is exits.
/// - `lpj=`: no delay-loop calibration against timer ticks. A delay for hardware that is not there may be short.
/// - `no_timer_check`, `io_delay=none`: no probing of interrupt lines that work, no writes to port 0x80.
/// - `8250.nr_uarts=1`: three serial ports less to probe.
/// - `mitigations=off`: one guest on a CPU whose host has its own; they would cost guest time and MSR exits.
/// - `reboot=k`: the keyboard controller's reset line, one read and one write, with ACPI or without.
/// - `randomize_kstack_offset=off`: else each system call and each interrupt of user code reads the TSC, an exit:
///   five in six of all exits of a guest that starts processes. It hardens kernels against attacks from within.
/// - `random.trust_bootloader=on`: the seed from the monitor counts, so nothing waits for entropy.
/// - `initcall_blacklist=jent_mod_init`: no self-test of a generator that is made of nothing but RDTSC, thousands
///   of exits, and that never ends if the reads are too regular.
/// - `panic=-1`: a guest that panics resets instead of spinning, which no replay could stop.
/// - `quiet`: a character on the console is three exits.
const DEFAULTS: &str = "console=ttyS0 notsc nolapic noapic pci=off lpj=1000000 no_timer_check io_delay=none \
                        8250.nr_uarts=1 mitigations=off reboot=k randomize_kstack_offset=off random.trust_bootloader=on \
                        initcall_blacklist=jent_mod_init panic=-1 quiet";

/// How a kernel with these capabilities finds devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Discovery {
    /// It was built with ACPI.
    acpi: bool,
    /// It reads `virtio_mmio.device=`.
    mmio_parameter: bool,
}

impl Discovery {
    /// By strings that only kernels with the one or the other hold.
    pub(super) fn of(kernel: &KernelImage) -> Self {
        let acpi = kernel.contains("RSD PTR ");
        Self { acpi, mmio_parameter: kernel.contains("virtio_mmio.device") }
    }
}

/// The whole command line. `user` is appended as it is.
pub(super) fn command_line(user: Option<&str>, discovery: Discovery, windows: &[VirtioWindow]) -> String {
    let user = user.unwrap_or_default().trim();
    let mut line = DEFAULTS.to_owned();
    // Where the PM timer is, for a kernel that does not read the FADT.
    line.push_str(&format!(" pmtmr={PM_TIMER_PORT:#x}"));
    let acpi_off = user.split_ascii_whitespace().any(|word| word == "acpi=off");
    if (!discovery.acpi || acpi_off) && discovery.mmio_parameter {
        for window in windows {
            let kib = VIRTIO_WINDOW_BYTES / 1024;
            line.push_str(&format!(" virtio_mmio.device={kib}K@{:#x}:{}", window.gpa, window.irq));
        }
    }
    if !user.is_empty() {
        line.push(' ');
        line.push_str(user);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::VirtioKind;

    const BOTH: Discovery = Discovery { acpi: true, mmio_parameter: true };

    fn line(user: Option<&str>, discovery: Discovery) -> String {
        command_line(user, discovery, &[VirtioKind::Net.window(), VirtioKind::Blk.window()])
    }

    #[test]
    fn the_users_words_come_last() {
        assert!(line(Some(" panic=5 init=/bin/sh "), BOTH).ends_with(" panic=5 init=/bin/sh"));
        assert!(!line(None, BOTH).ends_with(' '));
    }

    #[test]
    fn devices_are_told_once() {
        assert!(!line(None, BOTH).contains("virtio_mmio.device"));
        let parameters = " virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:10";
        assert!(line(None, Discovery { acpi: false, ..BOTH }).contains(parameters));
        assert!(line(Some("acpi=off"), BOTH).contains(parameters));
        assert!(!line(Some("acpi=off"), Discovery { mmio_parameter: false, ..BOTH }).contains("virtio_mmio"));
    }
}
