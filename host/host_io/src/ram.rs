//! Guest RAM: one host mapping per region, sparse until the guest touches it.
//!
//! Called by: `vmm`, which hands base and length to `guest_memory` and keeps the owner alive for as long as any view exists.
//!
//! Invariants:
//! - The mapping has a fixed address and length from `map` to drop, with an inaccessible guard page on each side.
//! - Untouched pages cost nothing (`MAP_NORESERVE`) and read as zero; `discard` brings pages back to that state.
//! - A memfd is sealed against growing and shrinking, so that no holder of the descriptor can make an access fault.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use guest_memory::HostSpan;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Where the pages of a RAM region come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamBacking {
    /// Private anonymous memory: the simplest, visible to this process only.
    Anonymous,
    /// A sealed memfd: can be mapped a second time (translator, sandboxed processes, vhost-user).
    Memfd,
}

/// Why guest RAM could not be made or inspected.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is zero, not a multiple of the page size, or does not fit the address space.
    #[error(
        "guest RAM of {bytes} bytes: the size must be a positive multiple of {page} bytes that fits the address space"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
        /// The host's page size.
        page: u64,
    },
    /// The host has no room.
    #[error(
        "cannot reserve {bytes} bytes of guest RAM: {source}; lower the memory size, or allow overcommit (vm.overcommit_memory=0 or 1)"
    )]
    Reserve {
        /// What was asked for.
        bytes: u64,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A range does not lie inside the region.
    #[error("range {start:#x}..{end:#x} is not made of whole pages inside a region of {bytes} bytes")]
    Range {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Length of the region.
        bytes: u64,
    },
    /// A system call on an existing region failed.
    #[error("cannot {what} guest RAM: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
}

/// The owner of one mapped RAM region; unmaps it when dropped.
#[derive(Debug)]
pub struct RamMapping {
    base: NonNull<u8>,
    len: usize,
    page: usize,
    memfd: Option<OwnedFd>,
}

// SAFETY: the struct is an address range and a descriptor; it never dereferences the memory, and its methods are
// system calls that the kernel serializes. Moving or sharing it between threads moves no thread-bound state.
unsafe impl Send for RamMapping {}
// SAFETY: as above; all methods take `&self` and are thread-safe system calls.
unsafe impl Sync for RamMapping {}

impl RamMapping {
    /// Reserves and maps `bytes` of zeroed guest RAM without touching it.
    pub fn map(bytes: u64, backing: RamBacking) -> Result<RamMapping, RamError> {
        let page = rustix::param::page_size();
        let size_error = RamError::Size { bytes, page: page as u64 };
        let len = match usize::try_from(bytes) {
            Ok(len) if len > 0 && len.is_multiple_of(page) && len < isize::MAX as usize - 2 * page => len,
            _ => return Err(size_error),
        };
        let reserve = |source: Errno| RamError::Reserve { bytes, source: source.into() };
        let memfd = match backing {
            RamBacking::Anonymous => None,
            RamBacking::Memfd => Some(sealed_memfd(bytes).map_err(reserve)?),
        };
        // SAFETY: a fresh anonymous reservation at an address of the kernel's choice disturbs no existing mapping.
        let outer = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                len + 2 * page,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(reserve)?;
        let inner = outer.wrapping_byte_add(page);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let mapped = match &memfd {
            // SAFETY: [inner, inner + len) lies inside the reservation made above, which nothing else uses yet.
            None => unsafe {
                let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
                rustix::mm::mmap_anonymous(inner, len, prot, flags)
            },
            // SAFETY: as above; the file has exactly `len` bytes and is sealed against shrinking.
            Some(fd) => unsafe {
                let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
                rustix::mm::mmap(inner, len, prot, flags, fd, 0)
            },
        };
        match mapped.map_err(reserve).and_then(|p| NonNull::new(p.cast::<u8>()).ok_or(size_error)) {
            Ok(base) => Ok(RamMapping { base, len, page, memfd }),
            Err(error) => {
                // SAFETY: the reservation made above, of this length, which nobody else knows.
                let _ = unsafe { rustix::mm::munmap(outer, len + 2 * page) };
                Err(error)
            }
        }
    }

    /// Host address of the first byte.
    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Length in bytes, a multiple of the page size.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true: an empty region cannot be made.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The host's page size: the grain of `populated` and `discard`.
    pub fn page_size(&self) -> usize {
        self.page
    }

    /// The file behind the region, when it is a memfd.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        self.memfd.as_ref().map(|fd| fd.as_fd())
    }

    /// The region as the host memory behind a VM's `GuestRam`. The memory stays mapped until the last of them is gone.
    pub fn host_span(self: &Arc<Self>) -> HostSpan {
        // SAFETY: base and length are this mapping's, valid for reads and writes until the owner given along is
        // dropped, page-aligned; this module hands out no reference to the memory.
        unsafe { HostSpan::new(self.base, self.len, Box::new(self.clone())) }
    }

    /// Byte ranges that may hold something other than zero, in rising order: what a save must look at.
    /// Everything outside them was never touched or was discarded, and reads as zero.
    pub fn populated(&self) -> Result<Vec<Range<u64>>, RamError> {
        match &self.memfd {
            Some(fd) => data_ranges(fd.as_fd(), self.len as u64),
            None => self.present_ranges(),
        }
        .map_err(|source| RamError::System { what: "find the touched pages of", source })
    }

    /// Gives the pages of `range` back to the host; they read as zero afterwards.
    pub fn discard(&self, range: Range<u64>) -> Result<(), RamError> {
        let page = self.page as u64;
        let bytes = self.len as u64;
        let whole = range.start.is_multiple_of(page) && range.end.is_multiple_of(page);
        if !whole || range.start > range.end || range.end > bytes {
            return Err(RamError::Range { start: range.start, end: range.end, bytes });
        }
        if range.is_empty() {
            return Ok(());
        }
        let len = range.end - range.start;
        match &self.memfd {
            Some(fd) => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(fd, mode, range.start, len)
            }
            // SAFETY: the range was checked to lie inside the mapping. Guest RAM is only ever read and written
            // through raw accesses that expect other parties to change it, so zeroing it breaks no reference.
            None => unsafe {
                let at = self.base.as_ptr().add(range.start as usize);
                rustix::mm::madvise(at.cast(), len as usize, Advice::LinuxDontNeed)
            },
        }
        .map_err(|source| RamError::System { what: "discard pages of", source: source.into() })
    }

    /// Anonymous memory: the kernel's page map tells which pages are present or swapped.
    fn present_ranges(&self) -> std::io::Result<Vec<Range<u64>>> {
        const ENTRY: usize = 8;
        const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
        let pagemap = File::open("/proc/self/pagemap")?;
        let first = self.base.as_ptr() as usize / self.page;
        let pages = self.len / self.page;
        let mut ranges = Vec::new();
        let mut chunk = vec![0u8; 8192 * ENTRY];
        let mut done = 0;
        while done < pages {
            let want = (pages - done).min(chunk.len() / ENTRY);
            let bytes = &mut chunk[..want * ENTRY];
            pagemap.read_exact_at(bytes, ((first + done) * ENTRY) as u64)?;
            for (i, entry) in bytes.chunks_exact(ENTRY).enumerate() {
                let entry = u64::from_ne_bytes(entry.try_into().unwrap_or_default());
                if entry & PRESENT_OR_SWAPPED != 0 {
                    push_range(&mut ranges, ((done + i) * self.page) as u64, self.page as u64);
                }
            }
            done += want;
        }
        Ok(ranges)
    }
}

impl Drop for RamMapping {
    fn drop(&mut self) {
        let outer = self.base.as_ptr().wrapping_sub(self.page);
        // SAFETY: exactly the reservation of `map`, guards included; the owner is going away, and whoever uses the
        // memory holds the owner, as the module's contract says.
        let _ = unsafe { rustix::mm::munmap(outer.cast(), self.len + 2 * self.page) };
    }
}

fn sealed_memfd(bytes: u64) -> Result<OwnedFd, Errno> {
    let fd = rustix::fs::memfd_create("guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, bytes)?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(fd)
}

/// Walks a sparse file from data to hole to data.
fn data_ranges(fd: BorrowedFd<'_>, len: u64) -> std::io::Result<Vec<Range<u64>>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < len {
        let start = match rustix::fs::seek(fd, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(fd, SeekFrom::Hole(start))?.min(len);
        if end <= start {
            break;
        }
        ranges.push(start..end);
        at = end;
    }
    Ok(ranges)
}

/// Appends a page, joining it to the range before when they touch.
fn push_range(ranges: &mut Vec<Range<u64>>, start: u64, len: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == start => last.end += len,
        _ => ranges.push(start..start + len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poke(ram: &RamMapping, at: usize, value: u8) {
        assert!(at < ram.len());
        // SAFETY: inside the mapping, and the test is the only user.
        unsafe { ram.base().as_ptr().add(at).write(value) }
    }

    fn peek(ram: &RamMapping, at: usize) -> u8 {
        assert!(at < ram.len());
        // SAFETY: inside the mapping, and the test is the only user.
        unsafe { ram.base().as_ptr().add(at).read() }
    }

    fn sparse_then_discard(backing: RamBacking) {
        let ram = RamMapping::map(1 << 36, backing).expect("64 GiB of untouched memory cost nothing");
        let page = ram.page_size();
        assert_eq!(ram.populated().unwrap(), vec![]);
        for at in [5 * page + 3, 6 * page, 1 << 30, ram.len() - 1] {
            poke(&ram, at, 0x5a);
        }
        let found = ram.populated().unwrap();
        for at in [5 * page + 3, 6 * page, 1 << 30, ram.len() - 1] {
            assert!(found.iter().any(|r| r.contains(&(at as u64))), "{at:#x} not in {found:?}");
        }
        assert!(found.iter().map(|r| r.end - r.start).sum::<u64>() <= 4 << 21);
        let p = page as u64;
        ram.discard(5 * p..6 * p).unwrap();
        assert_eq!((peek(&ram, 5 * page + 3), peek(&ram, 6 * page)), (0, 0x5a));
    }

    #[test]
    fn anonymous_ram_is_sparse_and_discards() {
        sparse_then_discard(RamBacking::Anonymous);
    }

    #[test]
    fn memfd_ram_is_sparse_and_discards() {
        sparse_then_discard(RamBacking::Memfd);
    }

    #[test]
    fn wrong_sizes_and_ranges_are_refused() {
        for bytes in [0, 1, 4095, u64::MAX, !4095] {
            assert!(
                matches!(RamMapping::map(bytes, RamBacking::Memfd), Err(RamError::Size { .. })),
                "{bytes}"
            );
        }
        let ram = RamMapping::map(1 << 20, RamBacking::Memfd).unwrap();
        for range in [1..4096, 0..4095, 0..(1 << 20) + 4096, Range { start: 8192, end: 4096 }] {
            assert!(matches!(ram.discard(range), Err(RamError::Range { .. })));
        }
    }

    #[test]
    fn a_memfd_cannot_shrink_under_the_mapping() {
        let ram = RamMapping::map(1 << 20, RamBacking::Memfd).unwrap();
        assert_eq!(rustix::fs::ftruncate(ram.memfd().unwrap(), 0), Err(Errno::PERM));
    }
}
