//! What can go wrong with a board from outside.
//!
//! Owns: [`DeviceError`]. Must never: be caused by the guest. Whatever a guest writes is answered as
//! hardware would; these errors mean that a log or a saved state does not belong to this board.

/// An event or a saved state that this board cannot take. The board is unchanged by a refused event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// A disk completion names a request that is not outstanding.
    #[error("disk request {id} was completed, but no such request is outstanding")]
    UnknownDiskRequest {
        /// The id in the event.
        id: u64,
    },
    /// A disk completion carries the wrong number of bytes.
    #[error("disk request {id} was completed with {found} bytes of data where {expected} were asked for")]
    DiskDataLength {
        /// The id in the event.
        id: u64,
        /// Bytes the request asked for.
        expected: usize,
        /// Bytes in the event.
        found: usize,
    },
    /// Random bytes arrived that were not asked for, or not as many as asked for.
    #[error("{found} random bytes arrived where the guest waits for {expected}")]
    EntropyLength {
        /// Bytes the guest waits for; 0 if it waits for none.
        expected: usize,
        /// Bytes in the event.
        found: usize,
    },
    /// A frame is longer than the network device carries.
    #[error("a frame of {found} bytes arrived, the longest carried is {max}", max = ft_log::MAX_FRAME_BYTES)]
    FrameTooLong {
        /// Bytes in the event.
        found: usize,
    },
    /// The event is for a device that this board was built without.
    #[error("an event arrived for {kind}, but the board has no such device")]
    NoSuchDevice {
        /// The device's payload kind.
        kind: &'static str,
    },
    /// A device of the board has no payload in the saved state.
    #[error("the saved state has no payload \"{kind}\", which this board needs")]
    MissingPayload {
        /// The payload kind.
        kind: &'static str,
    },
    /// The saved state holds a payload that no device of the board takes.
    #[error(
        "the saved state holds a payload \"{kind}\" that this board has no device for, or holds it twice"
    )]
    UnknownPayload {
        /// The payload kind.
        kind: String,
    },
    /// The payload has a layout that this build does not know.
    #[error("payload \"{kind}\" has version {found}, this build reads version {expected}")]
    PayloadVersion {
        /// The payload kind.
        kind: &'static str,
        /// The version this build reads.
        expected: u16,
        /// The version in the saved state.
        found: u16,
    },
    /// The payload ends before its last field.
    #[error("payload \"{kind}\" ends inside field \"{field}\"")]
    TruncatedPayload {
        /// The payload kind.
        kind: &'static str,
        /// The field that is cut short.
        field: &'static str,
    },
    /// The payload goes on after its last field.
    #[error("payload \"{kind}\" has {bytes} bytes after its last field")]
    LeftoverBytes {
        /// The payload kind.
        kind: &'static str,
        /// How many.
        bytes: usize,
    },
    /// A field of the payload holds a value that the device can never hold.
    #[error("payload \"{kind}\" holds {value:#x} in field \"{field}\", which the device can never hold")]
    InvalidField {
        /// The payload kind.
        kind: &'static str,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
}
