//! The heap: `talc` behind a spinning lock, over memory that is handed to it once free memory is known.
//!
//! Called by: everything that allocates, through `main.rs`'s global allocator. Interrupt handlers never do.

use core::alloc::{GlobalAlloc, Layout};
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use talc::TalcLock;
use talc::source::Manual;

/// See the module's header. Empty until [`Heap::claim`].
pub struct Heap(TalcLock<spin::Mutex<()>, Manual>);

/// Bytes that are handed out, by all heaps: the one, and what devices reach where there is an IOMMU.
static IN_USE: AtomicUsize = AtomicUsize::new(0);

/// Bytes that were handed over to it.
static CLAIMED: AtomicUsize = AtomicUsize::new(0);

/// Bytes that are left, in pieces of any size.
pub fn bytes_free() -> usize {
    CLAIMED.load(Relaxed).saturating_sub(bytes_in_use())
}

/// Bytes that are handed out now.
pub fn bytes_in_use() -> usize {
    IN_USE.load(Relaxed)
}

impl Heap {
    /// Without memory.
    pub const fn new() -> Self {
        Self(TalcLock::new(Manual))
    }

    /// Hands memory over for good; `false` if it is too little to be of use.
    ///
    /// # Safety
    /// The range is mapped, writable RAM that nothing else uses from now on.
    pub unsafe fn claim(&self, start: *mut u8, bytes: usize) -> bool {
        // SAFETY: the caller vouches for the range.
        let claimed = unsafe { self.0.lock().claim(start, bytes) }.is_some();
        if claimed {
            CLAIMED.fetch_add(bytes, Relaxed);
        }
        claimed
    }
}

impl Default for Heap {
    fn default() -> Self {
        Self::new()
    }
}

// SAFETY: all calls go to talc's own implementation, which upholds the contract.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is handed on.
        let at = unsafe { self.0.alloc(layout) };
        if !at.is_null() {
            IN_USE.fetch_add(layout.size(), Relaxed);
        }
        at
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { self.0.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: as above.
        let new = unsafe { self.0.realloc(at, layout, bytes) };
        if !new.is_null() {
            IN_USE.fetch_add(bytes, Relaxed);
            IN_USE.fetch_sub(layout.size(), Relaxed);
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    #[test]
    fn it_gives_what_it_was_given_and_takes_it_back() {
        let heap = Heap::new();
        let layout = Layout::from_size_align(1 << 16, 4096).unwrap();
        // SAFETY: the layout is not empty.
        unsafe {
            assert!(heap.alloc(layout).is_null());
            let arena: &'static mut Vec<u8> =
                std::boxed::Box::leak(std::boxed::Box::new(std::vec![0u8; 1 << 20]));
            assert!(heap.claim(arena.as_mut_ptr(), arena.len()));
            for _ in 0..100 {
                let at = heap.alloc(layout);
                assert!(!at.is_null() && at.addr().is_multiple_of(4096));
                assert_eq!((bytes_in_use(), bytes_free()), (layout.size(), (1 << 20) - layout.size()));
                at.write_bytes(0x55, layout.size());
                heap.dealloc(at, layout);
            }
        }
    }
}
