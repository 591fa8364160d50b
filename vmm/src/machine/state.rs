//! The machine's own part of a snapshot.
//!
//! Owns: the order in which vCPU, devices and counters are saved and restored. Memory is not here; it is
//! streamed beside these payloads (`snapshot.rs`). Must never: restore half a machine silently: a missing,
//! unknown or leftover payload is an error that names it.

use devices::{Board, BoardConfig, Payload};

use super::user_tsc::UserTsc;
use super::{Machine, MachineError};
use crate::kvm::state as vcpu_state;
use crate::kvm::{Vcpu, Vm};

use devices::GuestRam;

const MACHINE_KIND: &str = "machine";
const MACHINE_VERSION: u16 = 1;
/// anchors u64, register digest u64, hook address u64, halted u8.
const MACHINE_BYTES: usize = 25;
const VCPU_PREFIX: &str = "vcpu-";

impl Machine {
    /// Everything but memory. The machine has been settled ([`Machine::settle`]).
    pub fn save(&self) -> Result<Vec<Payload>, MachineError> {
        let mut own = Vec::with_capacity(MACHINE_BYTES);
        own.extend_from_slice(&self.anchors.to_le_bytes());
        own.extend_from_slice(&self.registers_digest.to_le_bytes());
        own.extend_from_slice(&self.user_tsc.to_saved().to_le_bytes());
        own.push(u8::from(self.halted));
        let mut payloads = vec![Payload { kind: MACHINE_KIND.into(), version: MACHINE_VERSION, bytes: own }];
        payloads.extend(vcpu_state::save(&self.vcpu)?.into_iter().map(|part| Payload {
            kind: part.kind.into(),
            version: vcpu_state::VERSION,
            bytes: part.bytes,
        }));
        payloads.extend(self.board.save());
        Ok(payloads)
    }

    /// A machine from what [`Machine::save`] gave, on memory that has been loaded already.
    pub fn load(
        vm: Vm,
        vcpu: Vcpu,
        ram: GuestRam,
        config: &BoardConfig,
        payloads: &[Payload],
    ) -> Result<Self, MachineError> {
        let mut machine = Self::new(vm, vcpu, ram, Board::new(config));
        machine.restore(config, payloads)?;
        Ok(machine)
    }

    /// Makes this machine the saved one, but for memory. It has been settled.
    pub(super) fn restore(&mut self, config: &BoardConfig, payloads: &[Payload]) -> Result<(), MachineError> {
        let (own, rest): (Vec<&Payload>, Vec<&Payload>) =
            payloads.iter().partition(|payload| payload.kind == MACHINE_KIND);
        let (cpu, board): (Vec<&Payload>, Vec<&Payload>) =
            rest.into_iter().partition(|payload| payload.kind.starts_with(VCPU_PREFIX));
        let [own] = own[..] else {
            return Err(MachineError::BadState(format!("it has {} `{MACHINE_KIND}` payloads", own.len())));
        };
        if own.version != MACHINE_VERSION {
            return Err(MachineError::BadState(format!(
                "`{MACHINE_KIND}` has version {}, this monitor reads {MACHINE_VERSION}",
                own.version
            )));
        }
        let bytes: &[u8; MACHINE_BYTES] = own.bytes.as_slice().try_into().map_err(|_| {
            MachineError::BadState(format!(
                "`{MACHINE_KIND}` has {} bytes, not {MACHINE_BYTES}",
                own.bytes.len()
            ))
        })?;
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_le_bytes(word)
        };
        if let Some(odd) = cpu.iter().find(|payload| payload.version != vcpu_state::VERSION) {
            return Err(MachineError::BadState(format!(
                "`{}` has version {}, this monitor reads {}",
                odd.kind,
                odd.version,
                vcpu_state::VERSION
            )));
        }
        vcpu_state::load(&self.vcpu, |kind| {
            cpu.iter().find(|payload| payload.kind == kind).map(|payload| payload.bytes.as_slice())
        })?;
        let board: Vec<Payload> = board.into_iter().cloned().collect();
        self.board = Board::load(config, &board)?;
        self.anchors = word(0);
        self.registers_digest = word(1);
        self.halted = bytes[24] != 0;
        self.user_tsc = UserTsc::from_saved(word(2));
        // Refreshes what KVM says about interrupt delivery, as `settle` did where the state was saved.
        if self.vcpu.complete()?.is_some() {
            return Err(MachineError::BadState("the vCPU left the guest while it was being loaded".into()));
        }
        Ok(())
    }
}
