//! `vmft keygen`: a new key for a pair.
//!
//! Owns: what is said about it. Must never: print the key.

use std::path::Path;

use super::CommandError;
use crate::launch::Ending;
use crate::pair::wire::key_file;

/// `vmft keygen`.
pub fn keygen(file: &Path) -> Result<Ending, CommandError> {
    key_file::create(file)?;
    tracing::info!("{}: a new key; copy it to the other host, as secretly as a password", file.display());
    Ok(Ending::Orderly)
}
