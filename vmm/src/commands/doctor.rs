//! `vmft doctor`: whether this host can run guests.
//!
//! Owns: the report. Must never: change the host.

use super::{CommandError, Ending};
use crate::boot;
use crate::kvm::{Kvm, host_flavour};

/// `vmft doctor`: a line for each thing that matters, then a verdict.
pub fn doctor() -> Result<Ending, CommandError> {
    println!("kvm flavour: {}", host_flavour());
    let kvm = Kvm::open()?;
    println!("kvm capabilities: complete");
    let (_, cpu) = boot::cpuid_table(&kvm.supported_cpuid()?).map_err(crate::guest::GuestError::from)?;
    println!("cpu: {cpu}");
    println!("verdict: fit");
    Ok(Ending::Orderly)
}
