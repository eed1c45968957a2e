//! Which pages of RAM were written: by vCPUs as KVM logs it, in bitmaps or in rings; by devices and by instructions that
//! the interpreter completes as `guest_memory` does.
//!
//! Called by: whoever copies RAM while the guest runs.
//!
//! Invariant: pages are marked clean before their contents are read: a write that is not in one answer is in the next.
//! KVM may keep the last writes of a vCPU that runs to itself until it stops.

pub mod ring;

pub use ring::Rings;

use crate::engine::host;
use crate::ioctls::{error, reset_dirty_rings};
use crate::partition::{Shared, map_all};
use hypervisor::{DirtyLog, EngineError, PageSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// See the module's header.
pub struct KvmDirtyLog(pub Arc<Shared>);

impl DirtyLog for KvmDirtyLog {
    fn start(&self) -> Result<(), EngineError> {
        let ram = &self.0.layout.ram;
        self.0.logging.store(true, Ordering::SeqCst);
        ram.start_log();
        map_all(&self.0.vm, ram, true).map_err(host)
    }

    fn take(&self) -> Result<PageSet, EngineError> {
        let ram = &self.0.layout.ram;
        let mut pages = PageSet::empty(ram.pages());
        ram.take_log(|page| pages.insert(page));
        match &self.0.rings {
            Some(rings) => {
                self.0.empty_rings().map_err(host)?;
                pages.union(&rings.lock().take());
            }
            None => self.0.add_bitmaps(&mut pages).map_err(host)?,
        }
        Ok(pages)
    }

    fn stop(&self) {
        if !self.0.logging.swap(false, Ordering::SeqCst) {
            return;
        }
        let ram = &self.0.layout.ram;
        // Needs no memory; a log that goes on costs time only.
        let _ = map_all(&self.0.vm, ram, false);
        ram.stop_log();
    }
}

impl Shared {
    /// KVM_GET_DIRTY_LOG of each slot, which makes its pages clean.
    fn add_bitmaps(&self, pages: &mut PageSet) -> io::Result<()> {
        for (slot, region) in self.layout.ram.regions().iter().enumerate() {
            let bitmap = self.vm.get_dirty_log(slot as u32, region.bytes as usize).map_err(error)?;
            pages.insert_bitmap(region.offset >> 12, &bitmap);
        }
        Ok(())
    }

    /// Takes what is in the vCPUs' rings, so that they have room.
    pub fn empty_rings(&self) -> io::Result<()> {
        let Some(rings) = &self.rings else { return Ok(()) };
        let mut rings = rings.lock();
        rings.collect(self.layout.ram.regions());
        reset_dirty_rings(&self.vm).map(drop)
    }

    /// KVM says that the ring of vCPU `id` is full: empties it. An error if it was empty: KVM wrote on beyond its end.
    pub fn empty_full_ring(&self, id: u32) -> io::Result<()> {
        let Some(rings) = &self.rings else { return Ok(()) };
        self.empty_rings()?;
        match rings.lock().taken_since_full(id) {
            0 => Err(io::Error::other("more was written than there is room for")),
            _ => Ok(()),
        }
    }
}
