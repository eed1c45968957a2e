//! Tables of indirect branches, one a context, as emitted code reads them.

use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

/// Entries of a table.
pub const TABLE_ENTRIES: usize = 64 << 10;
/// Bytes of a table.
pub const TABLE_BYTES: usize = TABLE_ENTRIES * size_of::<TableEntry>();

/// Linear address, code.
pub type TableEntry = [u64; 2];

/// Memory of its own: pages that nothing was written to since it was emptied take none.
pub struct Table(NonNull<TableEntry>);

// SAFETY: it owns the mapping.
unsafe impl Send for Table {}

impl Table {
    /// A table in which nothing is found. Aborts as any allocation does if there is no memory.
    pub fn new() -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p = unsafe { libc::mmap(ptr::null_mut(), TABLE_BYTES, protection, flags, -1, 0) };
        match NonNull::new(p.cast::<TableEntry>()) {
            Some(at) if p != libc::MAP_FAILED => {
                let mut table = Self(at);
                table[0] = nothing(0);
                table
            }
            _ => std::alloc::handle_alloc_error(std::alloc::Layout::new::<[TableEntry; TABLE_ENTRIES]>()),
        }
    }

    /// Gives its memory back; nothing is found in it.
    pub fn empty(&mut self) {
        // SAFETY: the mapping is ours, private and anonymous: its pages read as zeros behind this.
        let done = unsafe { libc::madvise(self.0.as_ptr().cast(), TABLE_BYTES, libc::MADV_DONTNEED) };
        if done != 0 {
            self.fill([0; 2]);
        }
        self[0] = nothing(0);
    }
}

impl Deref for Table {
    type Target = [TableEntry];
    fn deref(&self) -> &[TableEntry] {
        // SAFETY: the mapping has this length, is ours and was zeroed when it was made.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), TABLE_ENTRIES) }
    }
}

impl DerefMut for Table {
    fn deref_mut(&mut self) -> &mut [TableEntry] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr(), TABLE_ENTRIES) }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and is not used any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), TABLE_BYTES) };
    }
}

/// An entry for slot `slot` in which nothing is found: the address that it holds has another slot. (Any address can be
/// asked for, canonical or not.)
pub fn nothing(slot: usize) -> TableEntry {
    [u64::from(slot == 0), 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emptied_table_finds_nothing() {
        let mut table = Table::new();
        (table[0], table[7], table[TABLE_ENTRIES - 1]) = ([1 << 16, 2], [7, 3], [0xFFFF, 4]);
        table.empty();
        assert!(table.iter().enumerate().all(|(slot, entry)| *entry == nothing(slot)));
    }
}
