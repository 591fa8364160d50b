//! Turns the kernel's RDTSC and RDTSCP into port reads, which exit to the monitor.
//!
//! Owns: [`RdtscSites`] and the port numbers. Must never: search for bytes; an instruction is rewritten only where
//! the sweep over the code, instruction by instruction, finds it.
//!
//! Linux reads the TSC in ring 0 even when CPUID says there is none, and CR4.TSD does not trap ring 0. The
//! replacement has the length of the original, so that nothing moves:
//!
//! ```text
//! rdtsc   0f 31     ->  e5 f1      in eax, 0xf1
//! rdtscp  0f 01 f9  ->  e5 f3 90   in eax, 0xf3; nop
//! ```
//!
//! At a 4-byte read of [`RDTSC_PORT`] the monitor supplies EAX as the value read and sets RDX to the high half;
//! at one of [`RDTSCP_PORT`] it sets RCX (TSC_AUX, 0) too. The ports differ because the bytes behind `e5 f1`
//! prove nothing: a NOP may follow an RDTSC. Alternatives (`.altinstr_replacement`) are rewritten like code, so
//! what the kernel copies over its own code at boot is a port read as well.
//!
//! Not covered: code loaded later. docs/determinism.md lists the modules that read the TSC; about ext4, which is the one
//! that guests load without being asked to, [`super::ext4`] warns.

use iced_x86::Mnemonic;

use super::sweep::Site;

/// A 4-byte read of this port is an RDTSC of the kernel.
pub const RDTSC_PORT: u8 = 0xf1;
/// A write to this port is the monitor's hook in the guest's #GP handler.
pub const GP_PORT: u8 = 0xf2;
/// A 4-byte read of this port is an RDTSCP of the kernel.
pub const RDTSCP_PORT: u8 = 0xf3;

const IN_EAX_IMM8: u8 = 0xe5;
const NOP: u8 = 0x90;

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RdtscReport {
    /// RDTSC instructions rewritten.
    pub rdtsc: usize,
    /// RDTSCP instructions rewritten.
    pub rdtscp: usize,
    /// RDRAND, RDSEED and RDPID seen. They stay: the CPUID table says that the guest has none of them.
    pub masked_by_cpuid: usize,
}

/// The instructions to rewrite, found in a sweep.
#[derive(Debug, Default)]
pub(super) struct RdtscSites {
    /// File offset, length in bytes and port of each.
    sites: Vec<(usize, usize, u8)>,
    /// The address that each is linked to.
    addresses: Vec<u64>,
    masked_by_cpuid: usize,
}

impl RdtscSites {
    /// Takes note of an instruction.
    pub fn visit(&mut self, site: &Site<'_, '_>) {
        let mut note = |port| {
            self.sites.push((site.offset, site.instruction.len(), port));
            self.addresses.push(site.instruction.ip());
        };
        match site.instruction.mnemonic() {
            Mnemonic::Rdtsc => note(RDTSC_PORT),
            Mnemonic::Rdtscp => note(RDTSCP_PORT),
            Mnemonic::Rdrand | Mnemonic::Rdseed | Mnemonic::Rdpid => self.masked_by_cpuid += 1,
            _ => {}
        }
    }

    /// The addresses that they are linked to, in the order of the sections.
    pub fn addresses(&self) -> Vec<u64> {
        self.addresses.clone()
    }

    /// Rewrites them in the file that they were found in.
    pub fn rewrite(self, bytes: &mut [u8]) -> RdtscReport {
        let mut report = RdtscReport { masked_by_cpuid: self.masked_by_cpuid, ..Default::default() };
        for (at, len, port) in self.sites {
            replace(&mut bytes[at..at + len], port);
            if port == RDTSC_PORT { report.rdtsc += 1 } else { report.rdtscp += 1 }
        }
        report
    }
}

/// Prefixes have no meaning for RDTSC but would change IN, so NOPs take their place.
fn replace(instruction: &mut [u8], port: u8) {
    let opcode_bytes = if port == RDTSC_PORT { 2 } else { 3 };
    instruction.fill(NOP);
    let opcode = instruction.len() - opcode_bytes;
    instruction[opcode] = IN_EAX_IMM8;
    instruction[opcode + 1] = port;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sweep::sweep;
    use crate::boot::testing::image_of;

    fn swept(code: &[u8]) -> (Vec<u8>, RdtscReport) {
        let mut image = image_of(code);
        let mut sites = RdtscSites::default();
        sweep(&image, |site| sites.visit(site));
        let report = sites.rewrite(&mut image.bytes);
        (image.bytes, report)
    }

    #[test]
    fn rdtsc_and_rdtscp_keep_their_length_and_get_their_own_port() {
        let (code, report) = swept(&[0x0f, 0x31, 0x90, 0x0f, 0x01, 0xf9, 0xc3]);
        assert_eq!(code, [0xe5, 0xf1, 0x90, 0xe5, 0xf3, 0x90, 0xc3]);
        assert_eq!(report, RdtscReport { rdtsc: 1, rdtscp: 1, masked_by_cpuid: 0 });
    }

    #[test]
    fn the_same_bytes_inside_an_immediate_are_left_alone() {
        let code = [0xb8, 0x0f, 0x31, 0x0f, 0x31, 0xc3]; // mov eax, 0x310f310f; ret
        assert_eq!(swept(&code), (code.to_vec(), RdtscReport::default()));
    }

    #[test]
    fn prefixed_forms_lose_their_prefixes() {
        let (code, report) = swept(&[0x66, 0x0f, 0x31, 0xf3, 0x48, 0x0f, 0x31, 0x48, 0x0f, 0x01, 0xf9]);
        assert_eq!(code, [0x90, 0xe5, 0xf1, 0x90, 0x90, 0xe5, 0xf1, 0x90, 0xe5, 0xf3, 0x90]);
        assert_eq!((report.rdtsc, report.rdtscp), (2, 1));
    }

    #[test]
    fn the_sweep_goes_on_behind_bytes_that_are_no_instruction() {
        // 0x06 (push es) does not exist in 64-bit mode.
        assert_eq!(swept(&[0x06, 0x0f, 0x31]).0, [0x06, 0xe5, 0xf1]);
        // A lock prefix makes RDTSC undefined; the byte behind it begins a valid one that a jump could reach.
        assert_eq!(swept(&[0xf0, 0x0f, 0x31]).0, [0xf0, 0xe5, 0xf1]);
    }

    #[test]
    fn code_cut_off_in_an_instruction_is_left_alone() {
        assert_eq!(swept(&[0x90, 0x0f]).0, [0x90, 0x0f]);
        assert_eq!(swept(&[0x90, 0x0f, 0x01]).0, [0x90, 0x0f, 0x01]);
    }

    #[test]
    fn masked_instructions_are_counted_not_changed() {
        let code = [0x48, 0x0f, 0xc7, 0xf2, 0x48, 0x0f, 0xc7, 0xf8, 0xf3, 0x0f, 0xc7, 0xf8];
        let (after, report) = swept(&code);
        assert_eq!(after, code);
        assert_eq!(report.masked_by_cpuid, 3);
    }
}
