//! What can be wrong with the bytes of an entry or a message.
//!
//! Owns: [`LogError`], shared by every codec that works on a byte slice. Must never: hold an I/O error;
//! slices cannot fail to be read. `what` is always the name of the field at fault.

use thiserror::Error;

/// Bytes that are not a valid entry or message, or a value that has no valid form.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LogError {
    /// The bytes end inside a field.
    #[error("The bytes end inside the {what}")]
    Truncated {
        /// The field.
        what: &'static str,
    },
    /// A varint is longer than it needs to be; every value has exactly one form.
    #[error("The {what} is not in its shortest form")]
    NotShortest {
        /// The field.
        what: &'static str,
    },
    /// A number does not fit its field, or a delta leads past the largest number.
    #[error("The {what} is larger than its field can hold")]
    Overflow {
        /// The field.
        what: &'static str,
    },
    /// A byte string is longer than the format allows.
    #[error("The {what} has {len_bytes} bytes, the limit is {limit_bytes}")]
    TooLong {
        /// The field.
        what: &'static str,
        /// Its length.
        len_bytes: u64,
        /// The most that is allowed.
        limit_bytes: usize,
    },
    /// A tag has no meaning in this version of the format.
    #[error("The {what} {tag} is not known")]
    UnknownTag {
        /// The field.
        what: &'static str,
        /// The value found.
        tag: u8,
    },
    /// The first batch says where the log starts, and no other does.
    #[error("Batch {seq} must say where the log starts if it is the first one, and must not otherwise")]
    StartOfLog {
        /// The batch's number.
        seq: u64,
    },
    /// A text is not UTF-8.
    #[error("The {what} is not UTF-8 text")]
    NotText {
        /// The field.
        what: &'static str,
    },
    /// Bytes are left over behind the last field.
    #[error("{len_bytes} bytes follow the last field of the {what}")]
    Trailing {
        /// The message.
        what: &'static str,
        /// How many bytes.
        len_bytes: usize,
    },
    /// Guest time would go back.
    #[error("Guest time goes back from {previous} to {next} ticks")]
    TimeWentBack {
        /// The time of the previous entry, in PM-timer ticks.
        previous: u64,
        /// The time of this entry.
        next: u64,
    },
    /// The anchor count would go back.
    #[error("The anchor goes back from {previous} to {next}")]
    AnchorWentBack {
        /// The anchor of the previous entry.
        previous: u64,
        /// The anchor of this entry.
        next: u64,
    },
    /// An entry follows the entry that ends the log.
    #[error("An entry follows the end of the log at anchor {anchor}")]
    AfterEnd {
        /// Where the log ended.
        anchor: u64,
    },
}
