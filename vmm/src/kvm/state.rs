//! Saving and restoring the vCPU, in an order that matters.
//!
//! Owns: the list of what a vCPU's state is. Must never: save with I/O unfinished; the caller has run
//! [`Vcpu::complete`] and it answered `None`.
//!
//! Each part is the kernel's own structure (little-endian, fixed layout, `Documentation/virt/kvm/api.rst`)
//! under a name and version of its own.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::msr::SAVED;
use super::vcpu::read_msrs;
use super::{KvmError, Vcpu};

/// One named part of the vCPU's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Which part.
    pub kind: &'static str,
    /// The kernel structure's bytes.
    pub bytes: Vec<u8>,
}

/// Version of every part here.
pub const VERSION: u16 = 1;

/// Saves the vCPU. Order: events first, because reading registers must not see an event that KVM
/// folds into them later; the rest in any order.
pub fn save(vcpu: &Vcpu) -> Result<Vec<Part>, KvmError> {
    let fd = vcpu.fd();
    let events = fd.get_vcpu_events().map_err(KvmError::call("KVM_GET_VCPU_EVENTS"))?;
    let regs = vcpu.registers()?;
    let sregs = vcpu.special_registers()?;
    let xsave = fd.get_xsave().map_err(KvmError::call("KVM_GET_XSAVE"))?;
    let xcrs = fd.get_xcrs().map_err(KvmError::call("KVM_GET_XCRS"))?;
    let debug = fd.get_debug_regs().map_err(KvmError::call("KVM_GET_DEBUGREGS"))?;
    let mut msrs = Vec::with_capacity(SAVED.len() * 12);
    for (index, value) in SAVED.into_iter().zip(read_msrs(fd, &SAVED)?) {
        msrs.extend_from_slice(&index.to_le_bytes());
        msrs.extend_from_slice(&value.to_le_bytes());
    }
    Ok(vec![
        Part { kind: "vcpu-sregs", bytes: sregs.as_bytes().to_vec() },
        Part { kind: "vcpu-msrs", bytes: msrs },
        Part { kind: "vcpu-xsave", bytes: xsave.as_bytes().to_vec() },
        Part { kind: "vcpu-xcrs", bytes: xcrs.as_bytes().to_vec() },
        Part { kind: "vcpu-debugregs", bytes: debug.as_bytes().to_vec() },
        Part { kind: "vcpu-regs", bytes: regs.as_bytes().to_vec() },
        Part { kind: "vcpu-events", bytes: events.as_bytes().to_vec() },
    ])
}

/// Restores the vCPU from `part(kind)`. Order: `sregs` first (mode and EFER decide how the rest is
/// read), then MSRs, FPU, debug registers; `regs` after them (KVM_SET_REGS drops a pending exception) and
/// events last, because they may hold such a pending exception or interrupt shadow.
pub fn load<'a>(vcpu: &Vcpu, part: impl Fn(&str) -> Option<&'a [u8]>) -> Result<(), KvmError> {
    let fd = vcpu.fd();
    let sregs: kvm_sregs = decode(&part, "vcpu-sregs")?;
    vcpu.set_special_registers(&sregs)?;
    load_msrs(vcpu, part("vcpu-msrs").ok_or_else(|| missing("vcpu-msrs"))?)?;
    let xsave: kvm_xsave = decode(&part, "vcpu-xsave")?;
    // SAFETY: `kvm_xsave` is the fixed 4,096-byte area; the larger one of KVM_CAP_XSAVE2 is needed only for
    // features (AMX) that this monitor never enables.
    unsafe { fd.set_xsave(&xsave) }.map_err(KvmError::call("KVM_SET_XSAVE"))?;
    let xcrs: kvm_xcrs = decode(&part, "vcpu-xcrs")?;
    fd.set_xcrs(&xcrs).map_err(KvmError::call("KVM_SET_XCRS"))?;
    let debug: kvm_debugregs = decode(&part, "vcpu-debugregs")?;
    fd.set_debug_regs(&debug).map_err(KvmError::call("KVM_SET_DEBUGREGS"))?;
    let regs: kvm_regs = decode(&part, "vcpu-regs")?;
    vcpu.set_registers(&regs)?;
    let events: kvm_vcpu_events = decode(&part, "vcpu-events")?;
    fd.set_vcpu_events(&events).map_err(KvmError::call("KVM_SET_VCPU_EVENTS"))
}

fn load_msrs(vcpu: &Vcpu, bytes: &[u8]) -> Result<(), KvmError> {
    let mut entries = Vec::new();
    for (chunk, expected) in bytes.chunks(12).zip(SAVED) {
        let (index, data) = chunk
            .split_first_chunk::<4>()
            .and_then(|(index, rest)| {
                Some((u32::from_le_bytes(*index), u64::from_le_bytes(*rest.first_chunk()?)))
            })
            .ok_or_else(|| KvmError::BadState("the MSR list is cut short".into()))?;
        if index != expected {
            return Err(KvmError::BadState(format!("MSR {index:#x} stands where {expected:#x} belongs")));
        }
        entries.push(kvm_msr_entry { index, data, ..Default::default() });
    }
    if entries.len() != SAVED.len() || bytes.len() != SAVED.len() * 12 {
        return Err(KvmError::BadState(format!(
            "{} bytes of MSRs, expected {}",
            bytes.len(),
            SAVED.len() * 12
        )));
    }
    let msrs =
        Msrs::from_entries(&entries).map_err(|error| KvmError::BadState(format!("MSR list: {error:?}")))?;
    match vcpu.fd().set_msrs(&msrs).map_err(KvmError::call("KVM_SET_MSRS"))? {
        n if n == entries.len() => Ok(()),
        n => Err(KvmError::BadState(format!("this host refuses MSR {:#x}", entries[n].index))),
    }
}

fn missing(kind: &str) -> KvmError {
    KvmError::BadState(format!("part `{kind}` is missing"))
}

fn decode<'a, T: FromBytes + Immutable>(
    part: &impl Fn(&str) -> Option<&'a [u8]>,
    kind: &'static str,
) -> Result<T, KvmError> {
    let bytes = part(kind).ok_or_else(|| missing(kind))?;
    T::read_from_bytes(bytes).map_err(|_| {
        KvmError::BadState(format!("part `{kind}` has {} bytes, expected {}", bytes.len(), size_of::<T>()))
    })
}
