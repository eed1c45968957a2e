//! The smallest thing that can stand behind a virtual disk: bytes at offsets, flush, and ways to give space back.
//!
//! Called by: `block_pool` (which runs requests on worker threads); implemented by `disk_formats`.
//!
//! Invariants every implementation keeps:
//! - A range that does not lie inside `size_bytes` is refused with `InvalidInput`; nothing is done in part because of it.
//! - What was written before `flush` was called survives a crash of the host once `flush` has returned.
//! - A read-only store refuses every change with `PermissionDenied`.

use std::io;

/// Random access to the content of a disk, from any thread.
pub trait BlockStore: Send + Sync {
    /// The size the guest sees.
    fn size_bytes(&self) -> u64;

    /// Whether changes are refused.
    fn read_only(&self) -> bool;

    /// Fills `buf` from `offset`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes everything written so far durable.
    fn flush(&self) -> io::Result<()>;

    /// Says that the content of a range is not needed any more; what is read there afterwards is unspecified (usually
    /// zero). A store that was opened without discard does nothing.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes a range read as zero, giving its space back if `may_unmap`.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}

/// Refuses a range that does not lie inside `size_bytes`; every implementation's first line.
pub fn check_range(offset: u64, len: u64, size_bytes: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size_bytes => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{len} bytes at {offset} do not lie inside a disk of {size_bytes} bytes"),
        )),
    }
}
