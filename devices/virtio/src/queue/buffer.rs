//! A piece of guest memory that a request reads or writes.

/// A buffer of a descriptor chain, already checked to lie in one region of guest RAM.
///
/// `offset` is an offset in the RAM's span ([`guest_memory::GuestRam::load_bytes`] and its like take it):
/// a backend may hand the range to the host's kernel without a copy. Whoever writes into it without
/// [`guest_memory::DmaSpace`] calls [`guest_memory::GuestRam::note_write`] afterwards (devices do so for
/// their backends when a request completes).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Buffer {
    /// Where it starts in the RAM's span.
    pub offset: u64,
    /// Bytes; never zero.
    pub len: u32,
}
