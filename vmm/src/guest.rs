//! What a guest is made of: the configuration that both hosts must agree on.
//!
//! Owns: [`GuestConfig`], its saved form and its digest, and how a guest is built from it. Must never: hold
//! anything of one host only (taps, paths, addresses).

use std::path::PathBuf;

use devices::{Board, BoardConfig, GuestRam, Payload, virtio_windows};
use ft_log::{CpuIdentity, PAGE_BYTES, PositionSource};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use thiserror::Error;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use xxhash_rust::xxh3::xxh3_64;
use zerocopy::{FromBytes, IntoBytes};

use crate::boot::{self, BootConfig, BootError};
use crate::kvm::{Kvm, KvmError};
use crate::machine::{Machine, MachineError};

const KIND: &str = "guest";
const VERSION: u16 = 3;
/// Least memory that a Linux kernel with an initramfs boots in.
pub const MIN_MEMORY_MIB: u64 = 32;
/// Most memory of a guest: what fits below 1 TiB with the hole for devices.
pub const MAX_MEMORY_MIB: u64 = 1 << 19;

/// What can go wrong while a guest is built.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The kernel or what goes with it.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A memory size that makes no sense.
    #[error("--memory-mib {mib} is not between {MIN_MEMORY_MIB} and {MAX_MEMORY_MIB}")]
    MemorySize {
        /// What was asked for.
        mib: u64,
    },
    /// The host has not that much.
    #[error("this host cannot give the guest {mib} MiB of memory: {reason}. Ask for less with --memory-mib")]
    NoMemory {
        /// What was asked for.
        mib: u64,
        /// What the host said.
        reason: String,
    },
    /// The saved configuration cannot be read.
    #[error("the guest's saved configuration cannot be used: {0}")]
    BadConfig(String),
}

/// What a guest is.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The guest's name; its claims are made under it.
    pub name: String,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Its devices.
    pub board: BoardConfig,
    /// Its CPUID table, an array of `kvm_cpuid_entry2`.
    pub cpuid_bytes: Vec<u8>,
    /// The CPU that the table was made on.
    pub cpu: CpuIdentity,
    /// Who supplies the positions of its forced stops.
    pub positions: PositionSource,
}

/// What a guest boots.
#[derive(Clone, Debug)]
pub struct BootFiles {
    /// vmlinux or bzImage.
    pub kernel: PathBuf,
    /// The initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Added to the monitor's own kernel command line.
    pub cmdline: Option<String>,
}

impl GuestConfig {
    /// Checks a memory size given in MiB.
    pub fn memory_bytes(mib: u64) -> Result<u64, GuestError> {
        if (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib) {
            Ok(mib << 20)
        } else {
            Err(GuestError::MemorySize { mib })
        }
    }

    /// A configuration with this host's form of the fixed CPUID table.
    pub fn new(kvm: &Kvm, name: &str, memory_bytes: u64, board: BoardConfig) -> Result<Self, GuestError> {
        let (table, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?)?;
        let cpuid_bytes = table_bytes(&table);
        let positions = PositionSource::default();
        Ok(Self { name: name.to_owned(), memory_bytes, board, cpuid_bytes, cpu, positions })
    }

    /// The first number that no page of its memory has.
    pub fn end_page(&self) -> u64 {
        boot::ram_regions(self.memory_bytes)
            .into_iter()
            .map(|(start, len)| (start.raw_value() + len as u64) / PAGE_BYTES as u64)
            .max()
            .unwrap_or(0)
    }

    /// The CPUID table.
    pub fn cpuid(&self) -> Result<CpuId, GuestError> {
        let entries: Vec<kvm_cpuid_entry2> = self
            .cpuid_bytes
            .chunks(size_of::<kvm_cpuid_entry2>())
            .map(kvm_cpuid_entry2::read_from_bytes)
            .collect::<Result<_, _>>()
            .map_err(|_| GuestError::BadConfig("its CPUID table is cut short".into()))?;
        CpuId::from_entries(&entries)
            .map_err(|error| GuestError::BadConfig(format!("its CPUID table is too long: {error:?}")))
    }

    /// Digest of the CPUID table.
    pub fn cpuid_digest(&self) -> u64 {
        xxh3_64(&self.cpuid_bytes)
    }

    /// Digest of a CPUID table, as [`Self::cpuid_digest`] gives it.
    pub fn digest_of(table: &CpuId) -> u64 {
        xxh3_64(&table_bytes(table))
    }

    /// Digest of everything here.
    pub fn digest(&self) -> u64 {
        xxh3_64(&self.to_payload().bytes)
    }

    /// Guest memory, all zero. A core dump of the monitor leaves it out: it is the guest's, and big.
    pub fn allocate_ram(&self) -> Result<GuestRam, GuestError> {
        let host = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
        if self.memory_bytes > host {
            let reason = format!("it has {} MiB in all", host >> 20);
            return Err(GuestError::NoMemory { mib: self.memory_bytes >> 20, reason });
        }
        let no_memory = |reason: String| GuestError::NoMemory { mib: self.memory_bytes >> 20, reason };
        let ram = GuestRam::from_ranges(&boot::ram_regions(self.memory_bytes))
            .map_err(|error| no_memory(error.to_string()))?;
        for region in ram.iter() {
            // SAFETY: the range is the region's mapping, and the advice changes nothing but what a core dump holds.
            let result =
                unsafe { libc::madvise(region.as_ptr().cast(), region.len() as usize, libc::MADV_DONTDUMP) };
            if result != 0 {
                return Err(no_memory(std::io::Error::last_os_error().to_string()));
            }
        }
        Ok(ram)
    }

    /// A machine at boundary 0 that will boot `files`. `random_seed` seeds the guest's generator.
    pub fn boot(&self, kvm: &Kvm, files: &BootFiles, random_seed: [u8; 32]) -> Result<Machine, GuestError> {
        let ram = self.allocate_ram()?;
        let windows = virtio_windows(&self.board);
        let started = boot::load(
            &ram,
            &BootConfig {
                kernel: &files.kernel,
                initrd: files.initrd.as_deref(),
                cmdline: files.cmdline.as_deref(),
                memory_bytes: self.memory_bytes,
                random_seed,
                windows: &windows,
            },
        )?;
        let vm = kvm.create_vm(ram.clone())?;
        let vcpu = vm.create_vcpu(&self.cpuid()?)?;
        let mut sregs = vcpu.special_registers()?;
        started.apply_sregs(&mut sregs);
        vcpu.set_special_registers(&sregs)?;
        vcpu.set_registers(&started.regs)?;
        tracing::info!(
            kernel = %files.kernel.display(),
            version = started.kernel_version.as_deref().unwrap_or("unknown"),
            rdtsc_rewritten = started.rdtsc_rewritten,
            "kernel loaded"
        );
        Ok(Machine::new(vm, vcpu, ram, Board::new(&self.board)))
    }

    /// The saved form: name, memory u64, epoch u64, MAC, disk, CPU, CPUID table and u8 position source,
    /// little-endian.
    pub fn to_payload(&self) -> Payload {
        let mut bytes = Vec::new();
        put_bytes(&mut bytes, self.name.as_bytes());
        bytes.extend_from_slice(&self.memory_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.board.epoch_s.to_le_bytes());
        put_bytes(&mut bytes, self.board.net_mac.as_ref().map_or(&[], |mac| mac.as_slice()));
        let disk = self.board.disk_bytes.map(u64::to_le_bytes);
        put_bytes(&mut bytes, disk.as_ref().map_or(&[], |disk| disk.as_slice()));
        bytes.extend([self.board.disk_read_only, self.board.disk_write_through].map(u8::from));
        bytes.extend_from_slice(&self.cpu.vendor);
        bytes.extend_from_slice(&self.cpu.family.to_le_bytes());
        bytes.extend_from_slice(&[self.cpu.model, self.cpu.stepping]);
        put_bytes(&mut bytes, &self.cpuid_bytes);
        bytes.push(self.positions as u8);
        Payload { kind: KIND.into(), version: VERSION, bytes }
    }

    /// The opposite of [`Self::to_payload`].
    pub fn from_payload(payload: &Payload) -> Result<Self, GuestError> {
        if payload.kind != KIND || payload.version != VERSION {
            return Err(GuestError::BadConfig(format!(
                "found `{}` version {}, this monitor reads `{KIND}` version {VERSION}",
                payload.kind, payload.version
            )));
        }
        let mut input = payload.bytes.as_slice();
        Self::decode(&mut input)
            .filter(|_| input.is_empty())
            .ok_or_else(|| GuestError::BadConfig("its bytes do not add up".into()))
    }

    fn decode(input: &mut &[u8]) -> Option<Self> {
        let name = String::from_utf8(get_bytes(input)?.to_vec()).ok()?;
        let memory_bytes = u64::from_le_bytes(get(input)?);
        let epoch_s = u64::from_le_bytes(get(input)?);
        let net_mac = match get_bytes(input)? {
            [] => None,
            mac => Some(mac.try_into().ok()?),
        };
        let disk_bytes = match get_bytes(input)? {
            [] => None,
            disk => Some(u64::from_le_bytes(disk.try_into().ok()?)),
        };
        let [read_only, write_through] = get(input)?;
        let vendor = get(input)?;
        let family = u16::from_le_bytes(get(input)?);
        let [model, stepping] = get(input)?;
        let cpu = CpuIdentity { vendor, family, model, stepping };
        let cpuid_bytes = get_bytes(input)?.to_vec();
        let [positions] = get(input)?;
        let positions = PositionSource::from_tag(positions).ok()?;
        let mib = memory_bytes >> 20;
        let fits = memory_bytes.is_multiple_of(1 << 20) && (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&mib);
        let board = BoardConfig {
            epoch_s,
            ram_bytes: memory_bytes,
            net_mac,
            disk_bytes,
            disk_read_only: read_only != 0,
            disk_write_through: write_through != 0,
        };
        fits.then_some(Self { name, memory_bytes, board, cpuid_bytes, cpu, positions })
    }
}

fn table_bytes(table: &CpuId) -> Vec<u8> {
    table.as_slice().iter().flat_map(|entry| entry.as_bytes().to_vec()).collect()
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

fn get<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (array, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(*array)
}

fn get_bytes<'a>(input: &mut &'a [u8]) -> Option<&'a [u8]> {
    let len = u32::from_le_bytes(get(input)?) as usize;
    let (bytes, rest) = input.split_at_checked(len)?;
    *input = rest;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_back() {
        for (disk_read_only, disk_write_through) in [(false, false), (true, false), (false, true)] {
            let board = BoardConfig {
                epoch_s: 1,
                ram_bytes: 64 << 20,
                net_mac: Some([2; 6]),
                disk_bytes: Some(1 << 20),
                disk_read_only,
                disk_write_through,
            };
            let cpu = CpuIdentity { vendor: *b"AuthenticAMD", family: 25, model: 1, stepping: 2 };
            let config = GuestConfig {
                name: "guest".into(),
                memory_bytes: board.ram_bytes,
                board,
                cpuid_bytes: vec![1; 40],
                cpu,
                positions: PositionSource::default(),
            };
            let payload = config.to_payload();
            let read = GuestConfig::from_payload(&payload).unwrap();
            assert_eq!((&read.name, &read.board, read.cpu), (&config.name, &config.board, config.cpu));
            assert_eq!(read.digest(), config.digest());
            let older = Payload { version: VERSION - 1, ..payload };
            assert!(GuestConfig::from_payload(&older).is_err());
        }
    }
}
