//! Dirty rings: KVM writes the page of each first write into a ring of the vCPU that made it (api.rst,
//! KVM_CAP_DIRTY_LOG_RING).
//!
//! Invariant: under the lock around [`Rings`] all entries up to `next` were taken, and none behind.

use guest_memory::Region;
use hypervisor::PageSet;
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_dirty_gfn, kvm_enable_cap,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

/// Flags of an entry: KVM wrote it; it was taken.
const DIRTY: u32 = 1;
const TAKEN: u32 = 2;
const PAGE_BYTES: i64 = 4096;

/// Whether `kvm` has them.
pub fn is_there(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()) > 0
}

/// Gives all vCPUs that `vm` will have a ring of `entries`.
pub fn enable(vm: &VmFd, entries: u32) -> io::Result<()> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ..kvm_enable_cap::default() };
    cap.args[0] = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    vm.enable_cap(&cap).map_err(crate::ioctls::error)
}

/// A vCPU's, mapped.
struct Ring {
    entries: NonNull<kvm_dirty_gfn>,
    count: u32,
    /// Number of the next entry, counted on without end.
    next: u32,
    /// What that was when the ring was full.
    full_at: u32,
}

// SAFETY: the mapping belongs to nobody else, and is reached through `&mut` only.
unsafe impl Send for Ring {}

impl Ring {
    fn map(fd: &VcpuFd, count: u32) -> io::Result<Self> {
        let bytes = count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: a new mapping at a place that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let entries = NonNull::new(at.cast()).ok_or_else(|| io::Error::other("a mapping at address 0"))?;
        Ok(Self { entries, count, next: 0, full_at: 0 })
    }

    /// Takes the next entry: slot and page in it.
    fn take(&mut self) -> Option<(u32, u64)> {
        let entry = self.entries.as_ptr().wrapping_add((self.next % self.count) as usize);
        // SAFETY: the entry lies in the mapping, which lives as long as `self`; KVM writes its flags concurrently, so
        // they are accessed atomically, and the rest only while they say that it is ours.
        unsafe {
            let flags = AtomicU32::from_ptr(&raw mut (*entry).flags);
            if flags.load(Ordering::Acquire) & DIRTY == 0 {
                return None;
            }
            let found = ((*entry).slot, (*entry).offset);
            flags.store(TAKEN, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            Some(found)
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.count as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping is ours, whole, and not used any more.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), bytes) };
    }
}

/// Those of a partition, and what was found in them.
pub struct Rings {
    entries: u32,
    pages: u64,
    rings: Vec<Ring>,
    found: PageSet,
}

impl Rings {
    /// For rings of `entries` and a span of `pages`.
    pub fn new(entries: u32, pages: u64) -> Self {
        Self { entries, pages, rings: Vec::new(), found: PageSet::empty(pages) }
    }

    /// That of the next vCPU.
    pub fn add(&mut self, fd: &VcpuFd) -> io::Result<()> {
        self.rings.push(Ring::map(fd, self.entries)?);
        Ok(())
    }

    /// Takes all entries; `regions` by slot. KVM is to be told afterwards.
    pub fn collect(&mut self, regions: &[Region]) {
        for ring in &mut self.rings {
            while let Some((slot, page)) = ring.take() {
                if let Some(region) = regions.get(slot as usize) {
                    self.found.insert((region.offset >> 12) + page);
                }
            }
        }
    }

    /// The ring of vCPU `id` is full: how many entries were taken since it last was.
    pub fn taken_since_full(&mut self, id: u32) -> u32 {
        let Some(ring) = self.rings.get_mut(id as usize) else { return 0 };
        let taken = ring.next.wrapping_sub(ring.full_at);
        ring.full_at = ring.next;
        taken
    }

    /// What was found since the last call.
    pub fn take(&mut self) -> PageSet {
        std::mem::replace(&mut self.found, PageSet::empty(self.pages))
    }
}
