//! The span of host memory behind guest RAM, its regions, and write tracking.

use crate::access::{self, Word};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU8, Ordering};
use spin::RwLock;

/// Host memory that backs guest RAM, with whatever keeps it mapped.
pub struct HostSpan {
    base: NonNull<u8>,
    len: usize,
    /// Dropped after the last access.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the memory is reached only through the accesses of this crate, which are sound concurrently.
unsafe impl Send for HostSpan {}
// SAFETY: as above.
unsafe impl Sync for HostSpan {}

impl HostSpan {
    /// Wraps `len` bytes at `base`.
    ///
    /// # Safety
    /// The range is valid for reads and writes until `owner` is dropped, page-aligned, and no Rust
    /// reference to it exists.
    pub unsafe fn new(base: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Self { base, len, _owner: owner }
    }

    /// Zeroed memory from the allocator, for tests and small machines. Rounded up to whole pages. Large blocks cost
    /// nothing before they are touched.
    pub fn allocate(len: usize) -> Self {
        struct Owner(*mut [u8]);
        // SAFETY: only the pointer is kept; the memory is used through `HostSpan`.
        unsafe impl Send for Owner {}
        // SAFETY: as above.
        unsafe impl Sync for Owner {}
        impl Drop for Owner {
            fn drop(&mut self) {
                // SAFETY: it came from `Box::into_raw` below and is dropped once.
                drop(unsafe { Box::from_raw(self.0) });
            }
        }
        let bytes = len.next_multiple_of(4096);
        // Bytes, because the allocator gives only those zeroed by the operating system; one page more, to align.
        let raw = Box::into_raw(alloc::vec![0u8; bytes + 4096].into_boxed_slice());
        let first = raw.cast::<u8>();
        let base = NonNull::new(first.wrapping_add(first.align_offset(4096))).unwrap_or(NonNull::dangling());
        // SAFETY: the allocation lives until `Owner` is dropped and nothing refers to it; `align_offset` is below a
        // page, so that `bytes` bytes follow.
        unsafe { Self::new(base, bytes, Box::new(Owner(raw))) }
    }

    /// Its length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }
    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A guest-physical range backed by the span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First guest-physical address; page-aligned.
    pub gpa: u64,
    /// Length in bytes; whole pages.
    pub bytes: u64,
    /// Where it starts in the span; page-aligned.
    pub offset: u64,
}

/// The regions do not fit the span.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// An address, length or offset is not a multiple of 4096, or a region is empty or wraps.
    #[error("RAM region at {0:#x} is not made of whole pages")]
    NotPages(u64),
    /// A region reaches beyond the host memory.
    #[error("RAM region at {0:#x} reaches beyond the memory behind it")]
    BeyondSpan(u64),
    /// There is less than a page of host memory.
    #[error("there is no memory behind guest RAM")]
    Empty,
    /// Two regions overlap.
    #[error("RAM regions overlap at {0:#x}")]
    Overlap(u64),
}

/// Why a page's writes are tracked: bits of its tracking byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Track {
    /// A software engine decoded instructions from it.
    Code = 1 << 0,
    /// A dirty log has it as clean.
    Clean = 1 << 1,
}

/// Told when a tracked page is written by somebody other than the engine that tracks it.
pub trait WriteListener: Send + Sync {
    /// Page `page` (an index into the span) was written; its tracking byte was `tracks`.
    fn page_written(&self, page: u64, tracks: u8);
}

struct Inner {
    span: HostSpan,
    regions: Vec<Region>,
    tracks: Box<[AtomicU8]>,
    listener: RwLock<Option<Arc<dyn WriteListener>>>,
}

/// Guest RAM. Clones share it.
#[derive(Clone)]
pub struct GuestRam {
    /// Copies of the span's extent, so that the hot path reads no second cache line.
    base: *mut u8,
    len: u64,
    inner: Arc<Inner>,
}

// SAFETY: `base` points into `inner.span`, which is Send and Sync and lives as long.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

impl core::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("GuestRam").field("len", &self.len).field("regions", &self.inner.regions).finish()
    }
}

impl GuestRam {
    /// Guest RAM of `regions` over `span`.
    pub fn new(span: HostSpan, mut regions: Vec<Region>) -> Result<Self, LayoutError> {
        if span.len < 4096 {
            return Err(LayoutError::Empty);
        }
        regions.sort_by_key(|r| r.gpa);
        let mut end = 0;
        for r in &regions {
            if (r.gpa | r.bytes | r.offset) & 0xFFF != 0
                || r.bytes == 0
                || r.gpa.checked_add(r.bytes).is_none()
            {
                return Err(LayoutError::NotPages(r.gpa));
            }
            if r.offset.checked_add(r.bytes).is_none_or(|e| e > span.len as u64) {
                return Err(LayoutError::BeyondSpan(r.gpa));
            }
            if r.gpa < end {
                return Err(LayoutError::Overlap(r.gpa));
            }
            end = r.gpa + r.bytes;
        }
        let pages = span.len.div_ceil(4096);
        let tracks = (0..pages).map(|_| AtomicU8::new(0)).collect();
        let (base, len) = (span.base.as_ptr(), span.len as u64);
        let inner = Arc::new(Inner { span, regions, tracks, listener: RwLock::new(None) });
        Ok(Self { base, len, inner })
    }

    /// `bytes` of zeroed RAM at address 0, for tests.
    pub fn for_test(bytes: u64) -> Self {
        let span = HostSpan::allocate(bytes.max(1) as usize);
        let region = Region { gpa: 0, bytes: span.len() as u64, offset: 0 };
        Self::new(span, alloc::vec![region]).expect("one whole region fits its own span")
    }

    /// The regions, by address.
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// Length of the whole span in bytes.
    pub fn span_bytes(&self) -> u64 {
        self.inner.span.len as u64
    }

    /// Address of the span's first byte in this process: for engines that map it into hardware or emit
    /// code, and for system calls. Dereferencing it is theirs to justify.
    pub fn host_base(&self) -> *mut u8 {
        self.base
    }

    /// Offset in the span of `gpa`, if it and the following `bytes` lie in one region.
    #[inline]
    pub fn offset(&self, gpa: u64, bytes: u64) -> Option<u64> {
        let regions = &self.inner.regions;
        let i = regions.partition_point(|r| r.gpa <= gpa).checked_sub(1)?;
        let r = &regions[i];
        let inside = gpa - r.gpa;
        (inside < r.bytes && bytes <= r.bytes - inside).then(|| r.offset + inside)
    }

    /// The guest-physical address of an offset in the span.
    pub fn gpa_of(&self, offset: u64) -> Option<u64> {
        let r = self.inner.regions.iter().find(|r| offset >= r.offset && offset - r.offset < r.bytes)?;
        Some(r.gpa + (offset - r.offset))
    }

    #[inline(always)]
    fn at(&self, offset: u64, bytes: u64) -> *mut u8 {
        assert!(bytes <= self.len && offset <= self.len - bytes, "offset beyond guest RAM");
        self.base.wrapping_add(offset as usize)
    }

    /// As `at` for a word: one comparison, because the span has at least a page.
    #[inline(always)]
    fn word_at<T: Word>(&self, offset: u64) -> *mut u8 {
        assert!(offset <= self.len.wrapping_sub(u64::from(T::BYTES)), "offset beyond guest RAM");
        self.base.wrapping_add(offset as usize)
    }

    /// Reads a word at an offset of the span. Panics if it is outside (an engine's bug, never a guest's).
    #[inline(always)]
    pub fn load<T: Word>(&self, offset: u64) -> T {
        let at = self.word_at::<T>(offset);
        // SAFETY: `at` checked the range.
        unsafe { T::raw_load(at) }
    }

    /// Writes a word at an offset of the span; tracking is the caller's (see [`GuestRam::note_write`]).
    #[inline(always)]
    pub fn store<T: Word>(&self, offset: u64, value: T) {
        let at = self.word_at::<T>(offset);
        // SAFETY: `at` checked the range.
        unsafe { T::raw_store(at, value) }
    }

    /// Atomic compare and exchange at any alignment; returns the old value.
    #[inline(always)]
    pub fn compare_exchange<T: Word>(&self, offset: u64, expected: T, new: T) -> T {
        let at = self.word_at::<T>(offset);
        // SAFETY: `at` checked the range.
        unsafe { T::raw_compare_exchange(at, expected, new) }
    }

    /// Atomic compare and exchange of 16 bytes; `offset` must be a multiple of 16.
    pub fn compare_exchange_16(&self, offset: u64, expected: u128, new: u128) -> u128 {
        assert!(offset & 15 == 0, "16-byte exchange at an unaligned offset");
        let at = self.at(offset, 16);
        // SAFETY: `at` checked the range, and the span is page-aligned.
        unsafe { access::compare_exchange_16(at, expected, new) }
    }

    /// Reads 16 bytes: one access if `offset` is a multiple of 16, otherwise two of 8 bytes.
    #[inline(always)]
    pub fn load_16(&self, offset: u64) -> [u64; 2] {
        let at = self.at(offset, 16);
        // SAFETY: `at` checked the range, and the span is page-aligned.
        unsafe {
            if offset & 15 == 0 {
                access::load_16(at)
            } else {
                [u64::raw_load(at), u64::raw_load(at.wrapping_add(8))]
            }
        }
    }

    /// Writes 16 bytes, as [`GuestRam::load_16`] reads them; tracking is the caller's.
    #[inline(always)]
    pub fn store_16(&self, offset: u64, value: [u64; 2]) {
        let at = self.at(offset, 16);
        // SAFETY: `at` checked the range, and the span is page-aligned.
        unsafe {
            if offset & 15 == 0 {
                access::store_16(at, value);
            } else {
                u64::raw_store(at, value[0]);
                u64::raw_store(at.wrapping_add(8), value[1]);
            }
        }
    }

    /// Copies out of the span.
    pub fn load_bytes(&self, offset: u64, to: &mut [u8]) {
        let from = self.at(offset, to.len() as u64);
        // SAFETY: both ranges are valid; `to` is ours alone, and the copy is made outside Rust's view.
        unsafe { copy_bytes(from, to.as_mut_ptr(), to.len()) }
    }

    /// Copies into the span; tracking is the caller's.
    pub fn store_bytes(&self, offset: u64, from: &[u8]) {
        let to = self.at(offset, from.len() as u64);
        // SAFETY: as above.
        unsafe { copy_bytes(from.as_ptr(), to, from.len()) }
    }

    /// Copies inside the span, byte after byte upwards (an overlap repeats, as REP MOVSB does).
    pub fn copy_within(&self, from: u64, to: u64, len: u64) {
        let (from, to) = (self.at(from, len), self.at(to, len));
        // SAFETY: both ranges were checked.
        unsafe { copy_bytes(from, to, len as usize) }
    }

    /// Fills `len` bytes with `value`.
    pub fn fill_bytes(&self, offset: u64, value: u8, len: u64) {
        let to = self.at(offset, len);
        // SAFETY: the range was checked.
        unsafe { fill_bytes(to, value, len as usize) }
    }

    /// Fills `words` times 8 bytes with `value`.
    pub fn fill_words(&self, offset: u64, value: u64, words: u64) {
        let to = self.at(offset, words.saturating_mul(8));
        // SAFETY: the range was checked.
        unsafe { fill_words(to, value, words as usize) }
    }

    /// Tracking byte of page `page` of the span.
    #[inline]
    pub fn tracks(&self, page: u64) -> u8 {
        self.inner.tracks[page as usize].load(Ordering::Acquire)
    }
    /// Starts tracking a page for `track`; returns whether it was not tracked so before.
    pub fn track(&self, page: u64, track: Track) -> bool {
        self.inner.tracks[page as usize].fetch_or(track as u8, Ordering::SeqCst) & track as u8 == 0
    }
    /// Stops tracking a page for `track`; returns whether it was tracked.
    pub fn untrack(&self, page: u64, track: Track) -> bool {
        self.inner.tracks[page as usize].fetch_and(!(track as u8), Ordering::SeqCst) & track as u8 != 0
    }
    /// Says who hears of writes to tracked pages by DMA, from now on alone.
    pub fn set_listener(&self, listener: Arc<dyn WriteListener>) {
        *self.inner.listener.write() = Some(listener);
    }
    /// A range was written by DMA: tells the listener of each tracked page. Called after the write.
    pub fn note_write(&self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        for page in offset >> 12..=(offset + len - 1) >> 12 {
            let tracks = self.note_page(page);
            if tracks != 0
                && let Some(listener) = self.inner.listener.read().clone()
            {
                listener.page_written(page, tracks);
            }
        }
    }
    /// Page `page` was written: a log of writes hears of it. Gives what else it is tracked for.
    pub fn note_page(&self, page: u64) -> u8 {
        let tracks = self.tracks(page);
        if tracks & Track::Clean as u8 != 0 {
            self.untrack(page, Track::Clean);
        }
        tracks & !(Track::Clean as u8)
    }

    /// Starts a log of what software writes, vCPUs of software engines and DMA: all pages are clean. There is one.
    pub fn start_log(&self) {
        (0..self.pages()).for_each(|page| _ = self.track(page, Track::Clean));
    }
    /// Ends it.
    pub fn stop_log(&self) {
        (0..self.pages()).for_each(|page| _ = self.untrack(page, Track::Clean));
    }
    /// Tells `written` of each page that was written since it started or this was called, and makes them clean.
    pub fn take_log(&self, mut written: impl FnMut(u64)) {
        (0..self.pages()).filter(|page| self.track(*page, Track::Clean)).for_each(&mut written);
    }
    /// Pages in the span.
    pub fn pages(&self) -> u64 {
        self.inner.tracks.len() as u64
    }
}

/// # Safety
/// Both ranges are valid for `len` bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for the ranges; DF is clear in Rust code.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}
/// # Safety
/// The range is valid for `len` bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn fill_bytes(to: *mut u8, value: u8, len: usize) {
    // SAFETY: the caller vouches for the range; DF is clear in Rust code.
    unsafe {
        core::arch::asm!("rep stosb", inout("rcx") len => _, inout("rdi") to => _, in("al") value,
            options(nostack, preserves_flags));
    }
}
/// # Safety
/// The range is valid for `words` times 8 bytes.
#[cfg(target_arch = "x86_64")]
unsafe fn fill_words(to: *mut u8, value: u64, words: usize) {
    // SAFETY: the caller vouches for the range; DF is clear in Rust code.
    unsafe {
        core::arch::asm!("rep stosq", inout("rcx") words => _, inout("rdi") to => _, in("rax") value,
            options(nostack, preserves_flags));
    }
}
/// # Safety
/// The range is valid for `words` times 8 bytes.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn fill_words(to: *mut u8, value: u64, words: usize) {
    for (i, byte) in (0..words * 8).zip(value.to_le_bytes().into_iter().cycle()) {
        // SAFETY: the caller vouches for the range.
        unsafe { to.add(i).write_volatile(byte) }
    }
}
/// # Safety
/// Both ranges are valid for `len` bytes.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_bytes(from: *const u8, to: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: the caller vouches for the ranges.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) }
    }
}
/// # Safety
/// The range is valid for `len` bytes.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn fill_bytes(to: *mut u8, value: u8, len: usize) {
    for i in 0..len {
        // SAFETY: the caller vouches for the range.
        unsafe { to.add(i).write_volatile(value) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_map_and_refuse() {
        let span = HostSpan::allocate(0x4000);
        let regions = alloc::vec![
            Region { gpa: 0x10_0000, bytes: 0x2000, offset: 0x2000 },
            Region { gpa: 0, bytes: 0x2000, offset: 0 },
        ];
        let ram = GuestRam::new(span, regions).unwrap();
        assert_eq!(ram.offset(0x1FFF, 1), Some(0x1FFF));
        assert_eq!(ram.offset(0x1FFF, 2), None);
        assert_eq!(ram.offset(0x10_0004, 8), Some(0x2004));
        assert_eq!(ram.offset(0x2000, 1), None);
        assert_eq!(ram.offset(u64::MAX, 1), None);
        assert_eq!(ram.gpa_of(0x2004), Some(0x10_0004));
        ram.store::<u64>(0xFF9, 0x1122_3344_5566_7788);
        assert_eq!(ram.load::<u16>(0xFFA), 0x6677);
        assert_eq!(ram.compare_exchange::<u32>(0xFF9, 0x5566_7788, 1), 0x5566_7788);
        assert_eq!(ram.load::<u64>(0xFF9), 0x1122_3344_0000_0001);
        assert_eq!(ram.compare_exchange_16(0x10, 0, 5 << 64 | 3), 0);
        assert_eq!(ram.compare_exchange_16(0x10, 0, 1), 5 << 64 | 3);
    }

    #[test]
    fn written_pages_are_logged_once() {
        let ram = GuestRam::for_test(0x4000);
        let taken = || {
            let mut pages = Vec::new();
            ram.take_log(|page| pages.push(page));
            pages
        };
        ram.start_log();
        ram.note_write(0x1FFF, 2);
        ram.note_write(0x1000, 1);
        ram.track(3, Track::Code);
        assert_eq!(ram.note_page(3), Track::Code as u8);
        assert_eq!((taken(), taken()), (alloc::vec![1, 2, 3], Vec::new()));
        ram.stop_log();
        assert_eq!((ram.tracks(1), ram.tracks(3)), (0, Track::Code as u8));
    }

    #[test]
    fn bad_layouts_are_refused() {
        let bad = |r: Region| GuestRam::new(HostSpan::allocate(0x2000), alloc::vec![r]).unwrap_err();
        assert_eq!(GuestRam::new(HostSpan::allocate(0), alloc::vec![]).unwrap_err(), LayoutError::Empty);
        assert_eq!(bad(Region { gpa: 1, bytes: 0x1000, offset: 0 }), LayoutError::NotPages(1));
        assert_eq!(bad(Region { gpa: 0, bytes: 0x3000, offset: 0 }), LayoutError::BeyondSpan(0));
        let two = alloc::vec![Region { gpa: 0, bytes: 0x1000, offset: 0 }; 2];
        assert_eq!(GuestRam::new(HostSpan::allocate(0x2000), two).unwrap_err(), LayoutError::Overlap(0));
    }

    #[test]
    #[should_panic(expected = "beyond guest RAM")]
    fn outside_of_the_span_panics() {
        GuestRam::for_test(0x1000).load::<u64>(0xFF9);
    }

    #[test]
    fn overlapping_copies_repeat() {
        let ram = GuestRam::for_test(0x1000);
        ram.store_bytes(0, b"abc");
        ram.copy_within(0, 3, 9);
        let mut out = [0; 12];
        ram.load_bytes(0, &mut out);
        assert_eq!(&out, b"abcabcabcabc");
    }
}
