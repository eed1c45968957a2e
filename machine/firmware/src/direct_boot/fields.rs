//! Little-endian fields in byte slices: reads that name what is missing, writes into our own
//! buffers.

use super::error::{DirectBootError, FileRole};

/// A file whose fields are read with its role named in every error.
#[derive(Clone, Copy)]
pub(super) struct FileView<'a> {
    pub role: FileRole,
    pub bytes: &'a [u8],
}

impl<'a> FileView<'a> {
    /// `len` bytes at `offset`, or an error that names `field`.
    pub fn slice(&self, offset: u64, len: u64, field: &'static str) -> Result<&'a [u8], DirectBootError> {
        let cut =
            |needed| DirectBootError::Cut { role: self.role, field, needed, have: self.bytes.len() as u64 };
        let end = offset.checked_add(len).ok_or(cut(u64::MAX))?;
        let range = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
        range.and_then(|(start, end)| self.bytes.get(start..end)).ok_or(cut(end))
    }

    fn array<const N: usize>(&self, offset: u64, field: &'static str) -> Result<[u8; N], DirectBootError> {
        let mut array = [0; N];
        array.copy_from_slice(self.slice(offset, N as u64, field)?);
        Ok(array)
    }

    pub fn u8(&self, offset: u64, field: &'static str) -> Result<u8, DirectBootError> {
        Ok(self.array::<1>(offset, field)?[0])
    }
    pub fn u16(&self, offset: u64, field: &'static str) -> Result<u16, DirectBootError> {
        self.array(offset, field).map(u16::from_le_bytes)
    }
    pub fn u32(&self, offset: u64, field: &'static str) -> Result<u32, DirectBootError> {
        self.array(offset, field).map(u32::from_le_bytes)
    }
    pub fn u64(&self, offset: u64, field: &'static str) -> Result<u64, DirectBootError> {
        self.array(offset, field).map(u64::from_le_bytes)
    }

    /// The error that `field` cannot have `value`.
    pub fn refuse(&self, field: &'static str, value: u64, reason: &'static str) -> DirectBootError {
        DirectBootError::Field { role: self.role, field, value, reason }
    }
}

/// Writes `value` at `offset` of a buffer of ours.
pub(super) fn put(buffer: &mut [u8], offset: usize, value: &[u8]) {
    buffer[offset..offset + value.len()].copy_from_slice(value);
}
