//! `vmft check-kernel`: whether a kernel can be loaded.
//!
//! Owns: how the report is printed. Must never: need KVM, or say that a kernel can be loaded which `run` refuses.

use std::path::Path;

use super::{CommandError, say};
use crate::boot;
use crate::guest::GuestError;
use crate::launch::Ending;

/// `vmft check-kernel`.
pub fn check_kernel(file: &Path, addresses: bool) -> Result<Ending, CommandError> {
    let report = boot::check(file).map_err(GuestError::from)?;
    let mut text = report.to_string();
    if addresses {
        text.extend(report.rewritten.iter().map(|address| format!("{address:#x}\n")));
    }
    say(text.trim_end())?;
    Ok(Ending::Orderly)
}
