//! What a device sees of guest memory: RAM only, and only while it may master the bus.

use crate::access::Word;
use crate::ram::GuestRam;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering};

/// The range is not RAM, or the device may not access memory now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DMA of {bytes} bytes at {gpa:#x} is outside of guest RAM or not enabled")]
pub struct NotRam {
    /// Where it started.
    pub gpa: u64,
    /// How long it was.
    pub bytes: u64,
}

/// The memory of one PCI function: guest RAM behind its bus-master bit. Clones share the bit.
#[derive(Clone, Debug)]
pub struct DmaSpace {
    ram: GuestRam,
    bus_master: Arc<AtomicBool>,
}

impl DmaSpace {
    /// A space that is closed until [`DmaSpace::set_enabled`].
    pub fn new(ram: GuestRam) -> Self {
        Self { ram, bus_master: Arc::new(AtomicBool::new(false)) }
    }
    /// Follows the function's bus-master bit.
    pub fn set_enabled(&self, enabled: bool) {
        self.bus_master.store(enabled, Ordering::SeqCst);
    }
    /// Whether the function may access memory.
    pub fn is_enabled(&self) -> bool {
        self.bus_master.load(Ordering::Acquire)
    }
    /// The RAM itself.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Offset in the span of a range that lies in one RAM region.
    pub fn offset(&self, gpa: u64, bytes: u64) -> Result<u64, NotRam> {
        let denied = NotRam { gpa, bytes };
        if !self.is_enabled() {
            return Err(denied);
        }
        self.ram.offset(gpa, bytes).ok_or(denied)
    }
    /// Reads a word.
    pub fn load<T: Word>(&self, gpa: u64) -> Result<T, NotRam> {
        Ok(self.ram.load(self.offset(gpa, u64::from(T::BYTES))?))
    }
    /// Writes a word.
    pub fn store<T: Word>(&self, gpa: u64, value: T) -> Result<(), NotRam> {
        let offset = self.offset(gpa, u64::from(T::BYTES))?;
        self.ram.store(offset, value);
        self.ram.note_write(offset, u64::from(T::BYTES));
        Ok(())
    }
    /// Reads `to.len()` bytes.
    pub fn read(&self, gpa: u64, to: &mut [u8]) -> Result<(), NotRam> {
        let offset = self.offset(gpa, to.len() as u64)?;
        self.ram.load_bytes(offset, to);
        Ok(())
    }
    /// Writes `from`.
    pub fn write(&self, gpa: u64, from: &[u8]) -> Result<(), NotRam> {
        let offset = self.offset(gpa, from.len() as u64)?;
        self.ram.store_bytes(offset, from);
        self.ram.note_write(offset, from.len() as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Track, WriteListener};
    use std::sync::Mutex;

    #[test]
    fn closed_until_bus_master() {
        let dma = DmaSpace::new(GuestRam::for_test(0x2000));
        assert!(dma.store(0x10, 1u32).is_err());
        dma.set_enabled(true);
        dma.store(0x10, 0xAABB_CCDDu32).unwrap();
        assert_eq!(dma.load::<u16>(0x12).unwrap(), 0xAABB);
        assert!(dma.write(0x1FFF, &[0, 0]).is_err());
        assert!(dma.read(u64::MAX, &mut [0]).is_err());
    }

    #[test]
    fn writes_to_tracked_pages_are_told() {
        struct Log(Arc<Mutex<std::vec::Vec<(u64, u8)>>>);
        impl WriteListener for Log {
            fn page_written(&self, page: u64, tracks: u8) {
                self.0.lock().unwrap().push((page, tracks));
            }
        }
        let log = Arc::new(Mutex::new(std::vec::Vec::new()));
        let ram = GuestRam::for_test(0x3000);
        ram.set_listener(Arc::new(Log(log.clone())));
        assert!(ram.track(1, Track::Code));
        assert!(!ram.track(1, Track::Code));
        let dma = DmaSpace::new(ram.clone());
        dma.set_enabled(true);
        dma.write(0, &[1; 16]).unwrap();
        dma.write(0xFFF, &[1, 2]).unwrap();
        assert!(ram.untrack(1, Track::Code));
        dma.write(0x1000, &[1]).unwrap();
        assert_eq!(*log.lock().unwrap(), [(1, Track::Code as u8)]);
    }
}
