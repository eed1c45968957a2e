//! Bytes on their way into guest RAM.

use alloc::borrow::Cow;
use guest_memory::Gpa;

/// Bytes that belong at a guest-physical address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Where the first byte goes.
    pub gpa: Gpa,
    /// The bytes; those of kernel and RAM disk are borrowed, not copied.
    pub bytes: Cow<'a, [u8]>,
    /// Zeros to write after the bytes (an ELF segment's bss).
    pub zeros_after: u64,
}
