//! How device state is laid out as bytes.
//!
//! Owns: [`Payload`], the writer and the reader of its bytes, and the [`Device`] contract. Must never:
//! have a default body for saving or loading, so that no device can be forgotten.
//!
//! All integers are little-endian. A `bool` is one byte, 0 or 1. A byte string is a `u32` length and the
//! bytes. An option is a `bool` and, if it is 1, the value. Each device's `save` is the list of its fields
//! in order; a changed list is a new version.

use crate::DeviceError;

/// The saved state of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// Which device, for example `pic-8259`.
    pub kind: String,
    /// Version of the layout of `bytes`.
    pub version: u16,
    /// The fields of the device.
    pub bytes: Vec<u8>,
}

/// What every part of the board that has state does.
pub(crate) trait Device {
    /// Names the payload.
    fn kind(&self) -> &'static str;

    /// Version of the layout that `save` writes and `load` reads.
    fn version(&self) -> u16;

    /// Appends all fields.
    fn save(&self, out: &mut Encoder);

    /// Sets all fields of a freshly made device, and does nothing else.
    fn load(&mut self, input: &mut Decoder<'_>) -> Result<(), DeviceError>;
}

/// Saves one device.
pub(crate) fn save(device: &dyn Device) -> Payload {
    let mut out = Encoder { bytes: Vec::new() };
    device.save(&mut out);
    Payload { kind: device.kind().to_owned(), version: device.version(), bytes: out.bytes }
}

/// Loads one device from its payload, which must be used up.
pub(crate) fn load(device: &mut dyn Device, payload: &Payload) -> Result<(), DeviceError> {
    let kind = device.kind();
    if payload.version != device.version() {
        return Err(DeviceError::PayloadVersion { kind, expected: device.version(), found: payload.version });
    }
    let mut input = Decoder { kind, bytes: &payload.bytes };
    device.load(&mut input)?;
    match input.bytes.len() {
        0 => Ok(()),
        bytes => Err(DeviceError::LeftoverBytes { kind, bytes }),
    }
}

/// Appends fields to a payload.
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn i64(&mut self, value: i64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.u8(value.into());
    }

    /// A number of things that follow. Everything a device holds is bounded far below `u32::MAX`.
    pub(crate) fn count(&mut self, value: usize) {
        self.u32(value as u32);
    }

    /// Bytes whose number is fixed by the layout.
    pub(crate) fn array(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.count(value.len());
        self.array(value);
    }

    /// `None` is 0; `Some` is 1 and what `put` appends.
    pub(crate) fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.bool(value.is_some());
        if let Some(value) = value {
            put(self, value);
        }
    }
}

/// Takes fields from the front of a payload.
pub(crate) struct Decoder<'a> {
    kind: &'static str,
    bytes: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn take(&mut self, field: &'static str, len_bytes: usize) -> Result<&'a [u8], DeviceError> {
        let Some((head, tail)) = self.bytes.split_at_checked(len_bytes) else {
            return Err(DeviceError::TruncatedPayload { kind: self.kind, field });
        };
        self.bytes = tail;
        Ok(head)
    }

    /// Bytes whose number is fixed by the layout.
    pub(crate) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DeviceError> {
        let mut value = [0; N];
        value.copy_from_slice(self.take(field, N)?);
        Ok(value)
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, DeviceError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, DeviceError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, DeviceError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, DeviceError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn i64(&mut self, field: &'static str) -> Result<i64, DeviceError> {
        self.array(field).map(i64::from_le_bytes)
    }

    pub(crate) fn bool(&mut self, field: &'static str) -> Result<bool, DeviceError> {
        let value = self.u8(field)?;
        self.check(field, value.into(), value <= 1)?;
        Ok(value == 1)
    }

    /// A number of things that follow, at most `max`.
    pub(crate) fn count(&mut self, field: &'static str, max: usize) -> Result<usize, DeviceError> {
        let value = self.u32(field)?;
        self.check(field, value.into(), value as usize <= max)?;
        Ok(value as usize)
    }

    /// A byte string of at most `max` bytes.
    pub(crate) fn bytes(&mut self, field: &'static str, max: usize) -> Result<&'a [u8], DeviceError> {
        let len_bytes = self.count(field, max)?;
        self.take(field, len_bytes)
    }

    pub(crate) fn option<T>(
        &mut self,
        field: &'static str,
        get: impl FnOnce(&mut Self, &'static str) -> Result<T, DeviceError>,
    ) -> Result<Option<T>, DeviceError> {
        if self.bool(field)? { get(self, field).map(Some) } else { Ok(None) }
    }

    /// Refuses `value` unless it is `valid`.
    pub(crate) fn check(&self, field: &'static str, value: u64, valid: bool) -> Result<(), DeviceError> {
        if valid { Ok(()) } else { Err(DeviceError::InvalidField { kind: self.kind, field, value }) }
    }
}
