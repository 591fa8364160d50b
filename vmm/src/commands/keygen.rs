//! `vmft keygen`: a new key for a pair.
//!
//! Owns: what is said about it. Must never: print the key.

use std::path::Path;

use super::pair::PairError;
use super::{CommandError, Ending};
use crate::ft::key_file;

/// `vmft keygen`.
pub fn keygen(file: &Path) -> Result<Ending, CommandError> {
    key_file::create(file).map_err(PairError::from)?;
    tracing::info!("{}: a new key; copy it to the other host, as secretly as a password", file.display());
    Ok(Ending::Orderly)
}
