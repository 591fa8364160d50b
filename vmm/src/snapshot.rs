//! A whole guest as a stream of bytes: how a backup and a recording begin.
//!
//! Owns: what a snapshot consists of (configuration, machine, memory). Must never: run the guest.
//! The container's layout is `ft_log`'s; see docs/log-format.md.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use devices::{GuestRam, Payload};
use ft_log::{Cursor, MAX_RUN_PAGES, PAGE_BYTES, Pages, SnapshotPart, SnapshotReader, SnapshotWriter};
use thiserror::Error;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use crate::guest::{GuestConfig, GuestError};
use crate::kvm::{Kvm, KvmError, page_numbers};
use crate::machine::{Machine, MachineError};

/// What can go wrong with a snapshot.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The container is damaged, or its stream failed.
    #[error(transparent)]
    Container(#[from] ft_log::SnapshotError),
    /// The machine in it cannot be used here.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The configuration in it cannot be used here.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be reached.
    #[error("guest memory at {gpa:#x} cannot be reached: {reason}")]
    Memory {
        /// Where.
        gpa: u64,
        /// Why.
        reason: String,
    },
    /// The first part is not the configuration, or there is none.
    #[error("the snapshot does not begin with the guest's configuration")]
    NoConfiguration,
}

/// Pages that are compressed at a time: what a snapshot costs in memory beyond the guest's.
const CHUNK_BYTES: usize = 256 * PAGE_BYTES;

/// Writes the guest. The machine has been settled.
pub fn save<W: Write>(machine: &Machine, config: &GuestConfig, out: W) -> Result<W, SnapshotError> {
    let mut writer = SnapshotWriter::new(out)?;
    let own = config.to_payload();
    writer.payload(&own.kind, own.version, &own.bytes)?;
    for payload in machine.save()? {
        writer.payload(&payload.kind, payload.version, &payload.bytes)?;
    }
    memory(machine.ram(), &mut writer, |_, _| {})?;
    Ok(writer.finish()?)
}

/// Writes all memory that may be other than zero; the guest may run meanwhile. Progress: bytes done, and in all.
pub fn memory<W: Write>(
    ram: &GuestRam,
    writer: &mut SnapshotWriter<W>,
    mut progress: impl FnMut(u64, u64),
) -> Result<(), SnapshotError> {
    let total_bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    let mut done_bytes = 0;
    let mut chunk = vec![0; CHUNK_BYTES];
    let touched = Touched::open();
    for region in ram.iter() {
        let mut offset = 0;
        while offset < region.len() {
            let take = (region.len() - offset).min(CHUNK_BYTES as u64);
            let gpa = region.start_addr().raw_value() + offset;
            let unreachable = |reason: String| SnapshotError::Memory { gpa, reason };
            let address = region
                .get_host_address(MemoryRegionAddress(offset))
                .map_err(|error| unreachable(error.to_string()))?;
            if touched.any(address as u64, take) {
                let piece = &mut chunk[..take as usize];
                ram.read_slice(piece, GuestAddress(gpa)).map_err(|error| unreachable(error.to_string()))?;
                writer.memory(gpa, piece)?;
            }
            offset += take;
            done_bytes += take;
            progress(done_bytes, total_bytes);
        }
    }
    Ok(())
}

/// Writes these pages, whatever was written of them before; the guest may run meanwhile.
pub fn pages_again<W: Write>(
    ram: &GuestRam,
    bitmaps: &[(u64, Vec<u64>)],
    writer: &mut SnapshotWriter<W>,
) -> Result<(), SnapshotError> {
    let mut page = [0; PAGE_BYTES];
    let mut runs = Runs::new(writer);
    for number in page_numbers(bitmaps) {
        let gpa = number * PAGE_BYTES as u64;
        ram.read_slice(&mut page, GuestAddress(gpa))
            .map_err(|error| SnapshotError::Memory { gpa, reason: error.to_string() })?;
        runs.push(number, &page)?;
    }
    runs.finish()
}

/// As [`pages_again`], with pages that were copied.
pub fn copies_again<W: Write>(pages: &Pages, writer: &mut SnapshotWriter<W>) -> Result<(), SnapshotError> {
    let mut runs = Runs::new(writer);
    pages.iter().try_for_each(|(number, page)| runs.push(number, page))?;
    runs.finish()
}

/// Puts pages that follow each other together, which compresses better and faster.
struct Runs<'a, W> {
    writer: &'a mut SnapshotWriter<W>,
    next: u64,
    bytes: Vec<u8>,
}

impl<'a, W: Write> Runs<'a, W> {
    fn new(writer: &'a mut SnapshotWriter<W>) -> Self {
        Self { writer, next: 0, bytes: Vec::with_capacity(MAX_RUN_PAGES * PAGE_BYTES) }
    }

    fn push(&mut self, number: u64, page: &[u8; PAGE_BYTES]) -> Result<(), SnapshotError> {
        if number != self.next || self.bytes.len() == self.bytes.capacity() {
            self.flush()?;
        }
        self.bytes.extend_from_slice(page);
        self.next = number + 1;
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        let pages = (self.bytes.len() / PAGE_BYTES) as u64;
        self.writer.memory_again((self.next - pages) * PAGE_BYTES as u64, &self.bytes)?;
        self.bytes.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(), SnapshotError> {
        self.flush()
    }
}

/// Knows which memory of this process has ever been touched. What has not is all zero, and reading it would cost
/// a page fault for each page.
struct Touched(Option<File>);

impl Touched {
    const ENTRY_BYTES: u64 = 8;
    /// Present, or swapped out (Linux, Documentation/admin-guide/mm/pagemap.rst).
    const PRESENT_OR_SWAPPED: u64 = 3 << 62;

    fn open() -> Self {
        Self(File::open("/proc/self/pagemap").ok())
    }

    /// May any of the `len` bytes at `address`, whole pages, be other than zero?
    fn any(&self, address: u64, len: u64) -> bool {
        let Some(pagemap) = &self.0 else { return true };
        let mut entries = vec![0; (len / PAGE_BYTES as u64 * Self::ENTRY_BYTES) as usize];
        if pagemap.read_exact_at(&mut entries, address / PAGE_BYTES as u64 * Self::ENTRY_BYTES).is_err() {
            return true;
        }
        entries.chunks_exact(Self::ENTRY_BYTES as usize).any(|entry| {
            let mut word = [0; Self::ENTRY_BYTES as usize];
            word.copy_from_slice(entry);
            u64::from_le_bytes(word) & Self::PRESENT_OR_SWAPPED != 0
        })
    }
}

/// Where the log goes on behind a snapshot of `machine`.
pub fn cursor(machine: &Machine) -> Cursor {
    Cursor { time: machine.now(), anchor: machine.anchors() }
}

/// Reads a guest and builds it on this host.
///
/// # Errors
/// A damaged stream, a configuration that this host cannot give, a state that does not fit.
pub fn load<R: Read>(
    kvm: &Kvm,
    input: R,
    mut progress: impl FnMut(u64),
) -> Result<(GuestConfig, Machine), SnapshotError> {
    let mut reader = SnapshotReader::new(input)?;
    let config = match reader.next_part()? {
        Some(SnapshotPart::Payload { kind, version, bytes }) => {
            GuestConfig::from_payload(&Payload { kind, version, bytes })?
        }
        _ => return Err(SnapshotError::NoConfiguration),
    };
    let ram = config.allocate_ram()?;
    // Before the memory comes, since the output of a guest that is sent waits for what is done at the end.
    let vm = kvm.create_vm(ram.clone())?;
    let vcpu = vm.create_vcpu(&config.cpuid()?)?;
    let mut payloads = Vec::new();
    while let Some(part) = reader.next_part()? {
        match part {
            SnapshotPart::Payload { kind, version, bytes } => payloads.push(Payload { kind, version, bytes }),
            SnapshotPart::Pages { gpa, bytes } => {
                ram.write_slice(&bytes, GuestAddress(gpa))
                    .map_err(|error| SnapshotError::Memory { gpa, reason: error.to_string() })?;
                progress(gpa);
            }
        }
    }
    let machine = Machine::load(vm, vcpu, ram, &config.board, &payloads)?;
    Ok((config, machine))
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    #[test]
    fn memory_that_was_never_written_is_known_to_be_zero() {
        const LEN: usize = 64 << 20;
        let ram: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), LEN)]).unwrap();
        let address = ram.get_host_address(GuestAddress(0)).unwrap() as u64;
        let touched = Touched::open();
        assert!(!touched.any(address, LEN as u64));
        let page = (LEN - PAGE_BYTES) as u64;
        ram.write_obj(1_u8, GuestAddress(page)).unwrap();
        assert!(touched.any(address, LEN as u64));
        assert!(touched.any(address + page, PAGE_BYTES as u64));
        assert!(!touched.any(address, PAGE_BYTES as u64), "the other end is as it was");
    }
}
