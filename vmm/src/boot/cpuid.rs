//! The one CPU model that every guest sees, whatever the host.
//!
//! Owns: [`cpuid_table`], which leaves exist and what they hold. Must never: pass on a host's feature, topology or
//! cache; two hosts of the same make give the same table.
//!
//! Of the host come only its vendor, family, model, stepping and brand string, and its physical address width up
//! to [`PHYSICAL_BITS_MAX`]. The features are those of the x86-64-v2 baseline. Left out, because their result is
//! not a function of the guest's state: the TSC, RDRAND, RDSEED, RDPID, RDTSCP, MONITOR, TSX, UMWAIT, XSAVE with
//! its history-dependent writes, every hypervisor leaf (clock, steal time and page faults of the host). Left out,
//! because the monitor has no such device: APIC, MTRR, machine checks.
//!
//! Follows: Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E.

use ft_log::CpuIdentity;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::BootError;

/// Guest-physical addresses have at most this many bits.
pub const PHYSICAL_BITS_MAX: u32 = 40;
const VIRTUAL_BITS: u32 = 48;
const BASIC_LEAF_MAX: u32 = 7;
const EXTENDED_LEAF_MAX: u32 = 0x8000_0008;

/// A register that CPUID returns.
#[derive(Clone, Copy)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// One feature bit of the baseline.
struct Feature {
    leaf: u32,
    register: Register,
    bit: u32,
    name: &'static str,
}

const fn feature(leaf: u32, register: Register, bit: u32, name: &'static str) -> Feature {
    Feature { leaf, register, bit, name }
}

const BASELINE: [Feature; 25] = [
    feature(1, Register::Edx, 0, "FPU"),
    feature(1, Register::Edx, 3, "PSE"),
    feature(1, Register::Edx, 5, "MSR"),
    feature(1, Register::Edx, 6, "PAE"),
    feature(1, Register::Edx, 8, "CX8"),
    feature(1, Register::Edx, 11, "SEP"),
    feature(1, Register::Edx, 13, "PGE"),
    feature(1, Register::Edx, 15, "CMOV"),
    feature(1, Register::Edx, 16, "PAT"),
    feature(1, Register::Edx, 19, "CLFSH"),
    feature(1, Register::Edx, 23, "MMX"),
    feature(1, Register::Edx, 24, "FXSR"),
    feature(1, Register::Edx, 25, "SSE"),
    feature(1, Register::Edx, 26, "SSE2"),
    feature(1, Register::Ecx, 0, "SSE3"),
    feature(1, Register::Ecx, 9, "SSSE3"),
    feature(1, Register::Ecx, 13, "CX16"),
    feature(1, Register::Ecx, 19, "SSE4.1"),
    feature(1, Register::Ecx, 20, "SSE4.2"),
    feature(1, Register::Ecx, 23, "POPCNT"),
    feature(0x8000_0001, Register::Ecx, 0, "LAHF"),
    feature(0x8000_0001, Register::Edx, 11, "SYSCALL"),
    feature(0x8000_0001, Register::Edx, 20, "NX"),
    feature(0x8000_0001, Register::Edx, 29, "LM"),
    // Not a feature bit in the strict sense: without a line size there is no CLFLUSH.
    feature(1, Register::Ebx, 11, "CLFLUSH with lines of 64 bytes"),
];

/// Leaf 1 EBX: one logical processor, CLFLUSH lines of 8 quadwords, APIC ID 0.
const LEAF_1_EBX: u32 = 1 << 16 | 8 << 8;
/// Leaf 2: one round; caches are in leaf 4.
const LEAF_2: [u32; 4] = [0x00ff_0001, 0, 0, 0];

/// A cache in leaf 4 (Intel). AMD's leaves say the same in other words.
struct Cache {
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
}

const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64 },
    Cache { kind: 3, level: 2, ways: 8, sets: 1024 },
    Cache { kind: 3, level: 3, ways: 16, sets: 8192 },
];

/// AMD L1: TLBs (any), then data and instruction cache of 32 KiB, 8 ways, lines of 64 bytes.
const LEAF_8000_0005: [u32; 4] = [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140];
/// AMD L2 of 512 KiB, 8 ways, and L3 of 8 MiB (16 units of 512 KiB), 16 ways.
const LEAF_8000_0006: [u32; 4] = [0, 0x4200_4200, 0x0200_6140, 16 << 18 | 0x8140];

/// The guest's table for `KVM_SET_CPUID2` and the host's CPU, both made from the answer of
/// `KVM_GET_SUPPORTED_CPUID`.
///
/// # Errors
/// [`BootError::CpuFeatureMissing`] for the first baseline feature that the host lacks, and
/// [`BootError::CpuLeafMissing`] when the host does not say who it is.
pub fn cpuid_table(supported: &CpuId) -> Result<(CpuId, CpuIdentity), BootError> {
    let host = |leaf: u32| {
        supported
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && e.index == 0)
            .copied()
            .ok_or(BootError::CpuLeafMissing { leaf })
    };
    if let Some(f) = BASELINE.iter().find(|f| !supports(supported, f)) {
        return Err(BootError::CpuFeatureMissing { feature: f.name, leaf: f.leaf });
    }
    let (vendor, signature, widths) = (host(0)?, host(1)?.eax, host(0x8000_0008)?.eax);
    let physical_bits = (widths & 0xff).min(PHYSICAL_BITS_MAX);

    let mut entries = vec![
        leaf(0, [BASIC_LEAF_MAX, vendor.ebx, vendor.ecx, vendor.edx]),
        leaf(1, [signature, LEAF_1_EBX, baseline(1, Register::Ecx), baseline(1, Register::Edx)]),
        leaf(2, LEAF_2),
    ];
    entries.extend((0..=CACHES.len()).map(|index| subleaf(4, index as u32, cache_leaf(index))));
    entries.push(subleaf(7, 0, [0; 4]));
    let is_amd = is_amd(vendor.ebx);
    // AMD repeats vendor and signature in the extended leaves; on Intel these registers are reserved.
    let (name, extended_signature) =
        if is_amd { ([vendor.ebx, vendor.ecx, vendor.edx], signature) } else { ([0; 3], 0) };
    entries.push(leaf(0x8000_0000, [EXTENDED_LEAF_MAX, name[0], name[1], name[2]]));
    let (ecx, edx) = (baseline(0x8000_0001, Register::Ecx), baseline(0x8000_0001, Register::Edx));
    entries.push(leaf(0x8000_0001, [extended_signature, 0, ecx, edx]));
    for brand in 0x8000_0002..=0x8000_0004 {
        entries.push(host(brand).map_or(leaf(brand, [0; 4]), |e| leaf(brand, [e.eax, e.ebx, e.ecx, e.edx])));
    }
    entries.push(leaf(0x8000_0005, if is_amd { LEAF_8000_0005 } else { [0; 4] }));
    entries.push(leaf(0x8000_0006, LEAF_8000_0006));
    entries.push(leaf(0x8000_0007, [0; 4]));
    entries.push(leaf(0x8000_0008, [VIRTUAL_BITS << 8 | physical_bits, 0, 0, 0]));

    let table =
        CpuId::from_entries(&entries).map_err(|e| BootError::CpuTable { detail: format!("{e:?}") })?;
    Ok((table, identity(&vendor, signature)))
}

fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

fn subleaf(function: u32, index: u32, values: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { index, flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX, ..leaf(function, values) }
}

/// Leaf 4 of the cache with this index; behind the last one, the terminator.
fn cache_leaf(index: usize) -> [u32; 4] {
    const LINE_BYTES: u32 = 64;
    const SELF_INITIALISING: u32 = 1 << 8;
    CACHES.get(index).map_or([0; 4], |c| {
        [c.kind | c.level << 5 | SELF_INITIALISING, (c.ways - 1) << 22 | (LINE_BYTES - 1), c.sets - 1, 0]
    })
}

fn baseline(leaf: u32, register: Register) -> u32 {
    BASELINE
        .iter()
        .filter(|f| {
            f.leaf == leaf && std::mem::discriminant(&f.register) == std::mem::discriminant(&register)
        })
        .fold(0, |bits, f| bits | 1 << f.bit)
}

fn supports(supported: &CpuId, f: &Feature) -> bool {
    supported.as_slice().iter().any(|e| {
        let value = match f.register {
            Register::Ebx => e.ebx,
            Register::Ecx => e.ecx,
            Register::Edx => e.edx,
        };
        e.function == f.leaf && value & 1 << f.bit != 0
    })
}

/// By the first four letters of the vendor: AuthenticAMD, HygonGenuine.
fn is_amd(ebx: u32) -> bool {
    [*b"Auth", *b"Hygo"].contains(&ebx.to_le_bytes())
}

fn identity(vendor: &kvm_cpuid_entry2, signature: u32) -> CpuIdentity {
    let mut name = [0; 12];
    for (part, value) in name.chunks_exact_mut(4).zip([vendor.ebx, vendor.edx, vendor.ecx]) {
        part.copy_from_slice(&value.to_le_bytes());
    }
    let (family, model) = (signature >> 8 & 0xf, signature >> 4 & 0xf);
    let (extended_family, extended_model) = (signature >> 20 & 0xff, signature >> 16 & 0xf);
    let full_family = if family == 0xf { family + extended_family } else { family };
    let full_model = if family == 0xf || family == 6 { model | extended_model << 4 } else { model };
    CpuIdentity {
        vendor: name,
        family: full_family as u16,
        model: full_model as u8,
        stepping: (signature & 0xf) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host with every feature bit set.
    fn host(vendor: &[u8; 12], signature: u32, physical_bits: u32) -> CpuId {
        let part = |i: usize| u32::from_le_bytes(vendor[i..i + 4].try_into().unwrap());
        CpuId::from_entries(&[
            leaf(0, [0x20, part(0), part(8), part(4)]),
            leaf(1, [signature, u32::MAX, u32::MAX, u32::MAX]),
            subleaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            subleaf(0xb, 0, [1, 2, 3, 4]),
            subleaf(0xd, 0, [7, 0x340, 0x340, 0]),
            leaf(0x4000_0000, [0x4000_0001, 1, 2, 3]),
            leaf(0x8000_0001, [signature, u32::MAX, u32::MAX, u32::MAX]),
            leaf(0x8000_0002, [0x4d45_5146, 0, 0, 0]),
            leaf(0x8000_0008, [48 << 8 | physical_bits, u32::MAX, u32::MAX, u32::MAX]),
        ])
        .unwrap()
    }

    fn read(table: &CpuId, function: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| e.function == function).unwrap()
    }

    #[test]
    fn nothing_that_is_not_in_the_baseline_is_passed_on() {
        let (table, _) = cpuid_table(&host(b"AuthenticAMD", 0x00a2_0f12, 48)).unwrap();
        let one = read(&table, 1);
        assert_eq!(one.edx, 0x0789_a969);
        assert_eq!(one.ecx, 0x0098_2201);
        assert_eq!(one.edx & (1 << 4 | 1 << 9 | 1 << 12 | 1 << 7 | 1 << 14), 0, "TSC, APIC, MTRR, MCE, MCA");
        let seven = read(&table, 7);
        assert_eq!([seven.eax, seven.ebx, seven.ecx, seven.edx], [0; 4]);
        let extended = read(&table, 0x8000_0001);
        assert_eq!((extended.ecx, extended.edx), (1, 1 << 11 | 1 << 20 | 1 << 29));
        let known = [0, 1, 2, 4, 7];
        assert!(
            table
                .as_slice()
                .iter()
                .all(|e| known.contains(&e.function) || (0x8000_0000..=0x8000_0008).contains(&e.function))
        );
        assert_eq!((read(&table, 0).eax, read(&table, 0x8000_0000).eax), (7, 0x8000_0008));
    }

    #[test]
    fn address_widths_are_bounded() {
        let widths =
            |bits| read(&cpuid_table(&host(b"GenuineIntel", 0x306a9, bits)).unwrap().0, 0x8000_0008).eax;
        assert_eq!((widths(52), widths(40), widths(39)), (48 << 8 | 40, 48 << 8 | 40, 48 << 8 | 39));
    }

    #[test]
    fn the_identity_is_the_hosts() {
        let (_, amd) = cpuid_table(&host(b"AuthenticAMD", 0x00a2_0f12, 48)).unwrap();
        assert_eq!((&amd.vendor, amd.family, amd.model, amd.stepping), (b"AuthenticAMD", 0x19, 0x21, 2));
        let (table, intel) = cpuid_table(&host(b"GenuineIntel", 0x0005_06e3, 39)).unwrap();
        assert_eq!((&intel.vendor, intel.family, intel.model, intel.stepping), (b"GenuineIntel", 6, 0x5e, 3));
        assert_eq!(read(&table, 0x8000_0001).eax, 0, "reserved on Intel");
    }

    #[test]
    fn each_baseline_feature_is_required_by_name() {
        for wanted in &BASELINE {
            let mut table = host(b"GenuineIntel", 0x0005_06e3, 39);
            for e in table.as_mut_slice().iter_mut().filter(|e| e.function == wanted.leaf) {
                match wanted.register {
                    Register::Ebx => e.ebx &= !(1 << wanted.bit),
                    Register::Ecx => e.ecx &= !(1 << wanted.bit),
                    Register::Edx => e.edx &= !(1 << wanted.bit),
                }
            }
            let error = cpuid_table(&table).unwrap_err();
            assert!(
                matches!(error, BootError::CpuFeatureMissing { feature, .. } if feature == wanted.name),
                "{error}"
            );
        }
    }

    #[test]
    fn a_table_without_the_address_widths_is_refused() {
        let entries: Vec<_> =
            host(b"GenuineIntel", 0x0005_06e3, 39).as_slice().iter().take(8).copied().collect();
        let error = cpuid_table(&CpuId::from_entries(&entries).unwrap()).unwrap_err();
        assert!(matches!(error, BootError::CpuLeafMissing { leaf: 0x8000_0008 }), "{error}");
    }

    #[test]
    fn intels_cache_list_ends() {
        let (table, _) = cpuid_table(&host(b"GenuineIntel", 0x0005_06e3, 39)).unwrap();
        let caches: Vec<_> = table.as_slice().iter().filter(|e| e.function == 4).collect();
        let kinds: Vec<u32> = caches.iter().map(|e| e.eax & 0x1f).collect();
        assert_eq!(kinds, [1, 2, 3, 3, 0]);
        let bytes: Vec<u32> =
            caches[..4].iter().map(|e| ((e.ebx >> 22) + 1) * ((e.ebx & 0xfff) + 1) * (e.ecx + 1)).collect();
        assert_eq!(bytes, [32 << 10, 32 << 10, 512 << 10, 8 << 20]);
    }
}
