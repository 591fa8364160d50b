//! Test hosts: machines with a stock KVM for monitors to run on, and the faults that befall them.
//!
//! ```text
//!  network namespace of the test ([`Net`])
//!   client 10.77.0.1 --- bridge "guest" 10.77.0.0/24 --- host 1: br0 (taps of guests), host 2: br0
//!                        bridge "log"   10.78.0.0/24 --- host 1: eth1,                 host 2: eth1
//!                        bridge "ctl"   10.79.0.0/24 --- host 1: eth2 (agent),         host 2: eth2 (agent)
//!  directory "shared", the same on both hosts; directory of read-only images
//! ```
//!
//! A host is a QEMU TCG machine with emulated SVM, or, on a machine with a good KVM of its own, another network
//! namespace ([`HostKind`]). Tests see the same [`TestHost`] for both. Everything has a deadline, and what a test
//! creates goes away with it; what a killed test left behind is removed by the next one.

mod capture;
mod certificates;
mod error;
mod etcd;
mod host;
mod images;
mod leftovers;
mod net;
mod netns;
mod process;
pub mod protocol;
mod qemu;
mod senders;
mod storage;
mod tool;

pub use capture::Capture;
pub use error::HostError;
pub use etcd::Etcd;
pub use host::{HostConfig, HostKind, TestHost};
pub use images::{
    Images, archive_missing, archive_with_init, build_small_guests, build_vmft, make_debian_disk, make_disk,
    make_key, newest_kernel,
};
pub use net::{Link, Net};
pub use process::{Ending, HostProcess, Output};
pub use senders::Senders;
pub use storage::{SmallDir, Writers};
