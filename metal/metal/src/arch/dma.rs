//! Memory and registers as drivers of the machine's virtio devices see them: mapped one to one, coherent.
//!
//! Called by: the `virtio-drivers` crate.

use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::Layout;
use core::ptr::NonNull;
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// See the module's header.
pub struct OneToOne;

fn pages_layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE).ok().filter(|layout| layout.size() > 0)
}

// SAFETY: the heap gives aligned memory that is nobody else's, and zeroed; memory and registers are mapped one to one
// for ever.
unsafe impl Hal for OneToOne {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        // SAFETY: the layout is not empty.
        let at = pages_layout(pages).and_then(|layout| NonNull::new(unsafe { alloc_zeroed(layout) }));
        // Address 0 tells the drivers that there is none.
        at.map_or((0, NonNull::dangling()), |at| (at.as_ptr().expose_provenance() as u64, at))
    }
    unsafe fn dma_dealloc(_: PhysAddr, at: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = pages_layout(pages) {
            // SAFETY: the caller gives back what `dma_alloc` gave, with the same length.
            unsafe { dealloc(at.as_ptr(), layout) };
        }
        0
    }
    unsafe fn mmio_phys_to_virt(at: PhysAddr, _: usize) -> NonNull<u8> {
        let at = core::ptr::with_exposed_provenance_mut(at as usize);
        NonNull::new(at).unwrap_or(NonNull::dangling())
    }
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().expose_provenance() as u64
    }
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
