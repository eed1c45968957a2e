//! Memory and registers as drivers of the machine's virtio devices see them: mapped one to one, coherent. Where an IOMMU
//! holds devices to it, what they reach is an arena, into and out of which buffers are copied.
//!
//! Called by: the `virtio-drivers` crate. Invariant: whoever has an arena has it before the first driver starts.

use crate::heap::Heap;
use alloc::alloc::{alloc_zeroed, dealloc};
use core::alloc::{GlobalAlloc, Layout};
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

/// Bytes that devices reach: rings, buffers of a network card, a piece of each disk that is busy.
pub const ARENA_BYTES: u64 = 4 << 20;
/// Of a buffer's copy: what has fewer bytes than a line of the cache shares none with another.
const ALIGN: usize = 64;

static ARENA: Heap = Heap::new();
static HAS_ARENA: AtomicBool = AtomicBool::new(false);

/// From now on devices are handed out addresses in `arena` only.
///
/// # Safety
/// Whole pages of mapped RAM that nothing else uses; no driver was started.
pub unsafe fn set_arena(arena: Range<u64>) {
    let start = core::ptr::with_exposed_provenance_mut(arena.start as usize);
    // SAFETY: as the caller says.
    let claimed = unsafe { ARENA.claim(start, (arena.end - arena.start) as usize) };
    HAS_ARENA.store(claimed, SeqCst);
}

/// See the module's header.
pub struct OneToOne;

fn pages_layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages.checked_mul(PAGE_SIZE)?, PAGE_SIZE).ok().filter(|layout| layout.size() > 0)
}

/// Of the copy of a buffer in the arena.
fn copy_layout(buffer: NonNull<[u8]>) -> Layout {
    Layout::from_size_align(buffer.len().max(1), ALIGN).unwrap_or(Layout::new::<u64>())
}

// SAFETY: the heaps give aligned memory that is nobody else's, and zeroed; memory and registers are mapped one to one
// for ever.
unsafe impl Hal for OneToOne {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let at = pages_layout(pages).and_then(|layout| {
            // SAFETY: the layout is not empty.
            NonNull::new(unsafe {
                if HAS_ARENA.load(SeqCst) { ARENA.alloc_zeroed(layout) } else { alloc_zeroed(layout) }
            })
        });
        // Address 0 tells the drivers that there is none.
        at.map_or((0, NonNull::dangling()), |at| (at.as_ptr().expose_provenance() as u64, at))
    }
    unsafe fn dma_dealloc(_: PhysAddr, at: NonNull<u8>, pages: usize) -> i32 {
        let Some(layout) = pages_layout(pages) else { return 0 };
        // SAFETY: the caller gives back what `dma_alloc` gave, with the same length; the arena was there before.
        unsafe {
            if HAS_ARENA.load(SeqCst) {
                ARENA.dealloc(at.as_ptr(), layout);
            } else {
                dealloc(at.as_ptr(), layout);
            }
        }
        0
    }
    unsafe fn mmio_phys_to_virt(at: PhysAddr, _: usize) -> NonNull<u8> {
        let at = core::ptr::with_exposed_provenance_mut(at as usize);
        NonNull::new(at).unwrap_or(NonNull::dangling())
    }
    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        if !HAS_ARENA.load(SeqCst) {
            return buffer.as_ptr().expose_provenance() as u64;
        }
        // SAFETY: the layout is not empty.
        let copy = unsafe { ARENA.alloc_zeroed(copy_layout(buffer)) };
        assert!(!copy.is_null(), "there is no room left in what devices reach");
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller vouches for the buffer; the copy is as long, and new.
            unsafe { copy.copy_from_nonoverlapping(buffer.as_ptr().cast(), buffer.len()) };
        }
        copy.expose_provenance() as u64
    }
    unsafe fn unshare(at: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if !HAS_ARENA.load(SeqCst) {
            return;
        }
        let copy = core::ptr::with_exposed_provenance_mut::<u8>(at as usize);
        // SAFETY: the caller vouches for the buffer, and gives back what `share` gave for it.
        unsafe {
            if direction != BufferDirection::DriverToDevice {
                buffer.as_ptr().cast::<u8>().copy_from_nonoverlapping(copy, buffer.len());
            }
            ARENA.dealloc(copy, copy_layout(buffer));
        }
    }
}

/// The same, but buffers are named where they are: what an IOMMU must not let a device reach. For a test.
pub struct NotGranted;

// SAFETY: as above.
unsafe impl Hal for NotGranted {
    fn dma_alloc(pages: usize, direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        OneToOne::dma_alloc(pages, direction)
    }
    unsafe fn dma_dealloc(at: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller's contract is handed on.
        unsafe { OneToOne::dma_dealloc(at, memory, pages) }
    }
    unsafe fn mmio_phys_to_virt(at: PhysAddr, bytes: usize) -> NonNull<u8> {
        // SAFETY: as above.
        unsafe { OneToOne::mmio_phys_to_virt(at, bytes) }
    }
    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        buffer.as_ptr().expose_provenance() as u64
    }
    unsafe fn unshare(_: PhysAddr, _: NonNull<[u8]>, _: BufferDirection) {}
}
