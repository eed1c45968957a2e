//! A bus: from an address to a device's registers.
//!
//! Two of them make a machine: ports and memory-mapped I/O. The map is an immutable snapshot, swapped whole
//! when a region comes, goes or moves (a BAR), so that an access holds no lock of the bus while it runs
//! in the device. Lock order: request queue → device → interrupt controller → partition.

use crate::{Device, IoError};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use sync::{Mutex, RwLock};

/// A region's handle on its bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RegionId(u64);

/// A region that cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BusError {
    /// It overlaps another region.
    Overlap {
        /// First address of the other one.
        other: u64,
    },
    /// It is empty or wraps.
    Range,
}

impl core::fmt::Display for BusError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Overlap { other } => write!(f, "overlaps the region at {other:#x}"),
            Self::Range => f.write_str("is empty or wraps around"),
        }
    }
}

impl core::error::Error for BusError {}

/// Accesses that no device took.
#[derive(Default)]
pub struct IoStats {
    /// No region there.
    pub unclaimed: AtomicU64,
    /// The device had no such register or width.
    pub refused: AtomicU64,
}

#[derive(Clone)]
struct Entry {
    id: RegionId,
    base: u64,
    bytes: u64,
    region: usize,
    device: Arc<Mutex<dyn Device>>,
}

/// See the module's header.
#[derive(Default)]
pub struct Bus {
    map: RwLock<Arc<Vec<Entry>>>,
    next_id: AtomicU64,
    /// Counters.
    pub stats: IoStats,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts region `region` of `device` at `base`.
    pub fn insert(
        &self,
        base: u64,
        bytes: u64,
        device: Arc<Mutex<dyn Device>>,
        region: usize,
    ) -> Result<RegionId, BusError> {
        let id = RegionId(self.next_id.fetch_add(1, Ordering::Relaxed));
        self.place(Entry { id, base, bytes, region, device })?;
        Ok(id)
    }

    fn place(&self, entry: Entry) -> Result<(), BusError> {
        let end = entry.base.checked_add(entry.bytes).filter(|_| entry.bytes != 0).ok_or(BusError::Range)?;
        let mut map = self.map.write();
        if let Some(other) = map.iter().find(|o| entry.base < o.base + o.bytes && o.base < end) {
            return Err(BusError::Overlap { other: other.base });
        }
        let mut new = (**map).clone();
        let at = new.partition_point(|o| o.base < entry.base);
        new.insert(at, entry);
        *map = Arc::new(new);
        Ok(())
    }

    /// Takes a region off the bus; returns whether it was there.
    pub fn remove(&self, id: RegionId) -> bool {
        let mut map = self.map.write();
        let before = map.len();
        let new: Vec<Entry> = map.iter().filter(|e| e.id != id).cloned().collect();
        let found = new.len() != before;
        *map = Arc::new(new);
        found
    }

    fn find(&self, address: u64) -> Option<(Entry, u64)> {
        let map = self.map.read();
        let entry = &map[map.partition_point(|e| e.base <= address).checked_sub(1)?];
        let offset = address - entry.base;
        (offset < entry.bytes).then(|| (entry.clone(), offset))
    }

    /// A read of 1–8 bytes; all ones where nothing answers. Returns whether a device took it.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xFF);
        self.access(address, data.len(), |device, region, offset| device.io_read(region, offset, data))
    }

    /// A write of 1–8 bytes; dropped where nothing answers. Returns whether a device took it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.access(address, data.len(), |device, region, offset| device.io_write(region, offset, data))
    }

    fn access(
        &self,
        address: u64,
        bytes: usize,
        run: impl FnOnce(&mut dyn crate::IoHandler, usize, u64) -> Result<(), IoError>,
    ) -> bool {
        let Some((entry, offset)) = self.find(address) else {
            self.stats.unclaimed.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let result = if offset + bytes as u64 > entry.bytes {
            Err(IoError::Offset)
        } else {
            match entry.device.lock().as_io() {
                Some(io) => run(io, entry.region, offset),
                None => Err(IoError::Offset),
            }
        };
        if result.is_err() {
            self.stats.refused.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}
