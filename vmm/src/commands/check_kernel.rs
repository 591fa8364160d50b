//! `vmft check-kernel`: whether a kernel can be loaded.
//!
//! Owns: how the report is printed. Must never: need KVM, or say that a kernel can be loaded which `run` refuses.

use std::path::Path;

use super::{CommandError, Ending};
use crate::boot;
use crate::guest::GuestError;

/// `vmft check-kernel`.
pub fn check_kernel(file: &Path, addresses: bool) -> Result<Ending, CommandError> {
    let report = boot::check(file).map_err(GuestError::from)?;
    print!("{report}");
    if addresses {
        report.rewritten.iter().for_each(|address| println!("{address:#x}"));
    }
    Ok(Ending::Orderly)
}
