//! The only place that issues KVM ioctls.
//!
//! Owns: the KVM handles of one guest with one vCPU. Must never: interpret an exit or touch a device;
//! exits leave here as plain data ([`Exit`]) and the answers come back as plain calls.

mod dirty;
mod fitness;
mod linear;
mod msr;
pub mod paging;
mod read_page;
pub mod segments;
pub mod state;
mod vcpu;
mod vm;

pub use dirty::{DirtyLog, page_count, page_numbers};
pub use fitness::{Modules, Unfit};
pub use linear::Handler;
pub use vcpu::{Exit, Vcpu, install_kick_handler, kick, kick_signal};
pub use vm::{Kvm, Vm};

use kvm_bindings::kvm_enable_cap;
use kvm_ioctls::VmFd;
use thiserror::Error;

/// Size of a page of the guest, in the width of its addresses.
pub const PAGE_BYTES: u64 = ft_log::PAGE_BYTES as u64;

/// What can go wrong with KVM.
#[derive(Debug, Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {0}. {1}")]
    Open(#[source] std::io::Error, &'static str),
    /// The KVM is one that cannot hold a guest deterministically.
    #[error("this host's KVM is unfit: {0}. Run `vmft doctor` for the details")]
    Unfit(Unfit),
    /// An ioctl failed.
    #[error("KVM call {call} failed: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The guest left in a way that the monitor has no answer for.
    #[error("the guest left KVM in a way that cannot be handled: {0}")]
    UnexpectedExit(String),
    /// A saved vCPU state does not fit.
    #[error("the saved vCPU state cannot be used: {0}")]
    BadState(String),
}

impl KvmError {
    fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Call { call, source: error.into() }
    }
}

/// Switches a capability of a virtual machine on; `call` is its name for an error.
fn enable_cap(vm: &VmFd, cap: u32, argument: u64, call: &'static str) -> Result<(), KvmError> {
    let cap = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(KvmError::call(call))
}
