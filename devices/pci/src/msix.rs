//! MSI-X: the vector table and the pending bits (PCI Express Base Specification 5.0, 6.1.4 and 7.7.2).
//!
//! Owned by [`crate::Interrupts`]. The capability's control register lives in configuration space; this
//! is told of it. A vector that fires while masked sets its pending bit and goes out at the unmask.

use alloc::boxed::Box;
use alloc::vec::Vec;
use device::{IoError, read_le, write_le};
use hypervisor::{Msi, MsiRoute, MsiSink};

const ENTRY_BYTES: u64 = 16;
/// Most vectors of a function.
pub(crate) const MAX_VECTORS: u16 = 2048;
/// The pending bits stand here, or behind a longer table.
const LEAST_PBA_OFFSET: u64 = 0x800;

/// Offset of the pending bits in the BAR.
pub(crate) fn pba_offset(vectors: u16) -> u64 {
    (u64::from(vectors) * ENTRY_BYTES).max(LEAST_PBA_OFFSET)
}

/// Size of the BAR that holds table and pending bits of `vectors` vectors.
pub fn msix_bar_bytes(vectors: u16) -> u64 {
    let pba = u64::from(vectors).div_ceil(64) * 8;
    (pba_offset(vectors) + pba).next_power_of_two().max(0x1000)
}

pub(crate) struct Vector {
    pub msi: Msi,
    pub masked: bool,
    pub pending: bool,
    route: Box<dyn MsiRoute>,
}

pub(crate) struct Msix {
    pub vectors: Vec<Vector>,
    pub enabled: bool,
    pub function_mask: bool,
}

impl Msix {
    pub fn new(sink: &dyn MsiSink, count: u16) -> Result<Self, hypervisor::EngineError> {
        let mut vectors = Vec::new();
        for _ in 0..count.clamp(1, MAX_VECTORS) {
            let route = sink.route()?;
            vectors.push(Vector { msi: Msi::default(), masked: true, pending: false, route });
        }
        Ok(Self { vectors, enabled: false, function_mask: false })
    }

    pub fn fire(&mut self, vector: u16) {
        let blocked = self.function_mask;
        let Some(v) = self.vectors.get_mut(usize::from(vector)) else { return };
        if blocked || v.masked {
            v.pending = true;
        } else {
            v.route.fire();
        }
    }

    /// The control register changed.
    pub fn control(&mut self, enabled: bool, function_mask: bool) {
        if (enabled, function_mask) == (self.enabled, self.function_mask) {
            return;
        }
        (self.enabled, self.function_mask) = (enabled, function_mask);
        for i in 0..self.vectors.len() {
            self.settle(i);
        }
    }

    /// Brings the route of vector `i` up to date, and sends what waited for the unmask.
    fn settle(&mut self, i: usize) {
        let (enabled, blocked) = (self.enabled, self.function_mask);
        let Some(v) = self.vectors.get_mut(i) else { return };
        let masked = !enabled || blocked || v.masked;
        if !masked {
            v.route.set(v.msi);
        }
        v.route.mask(masked);
        if !masked && core::mem::take(&mut v.pending) {
            v.route.fire();
        }
    }

    pub fn io_read(&self, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        check_width(offset, data.len())?;
        let mut value = 0;
        for half in 0..data.len() as u64 / 4 {
            value |= u64::from(self.dword(offset + 4 * half)) << (32 * half);
        }
        write_le(data, value);
        Ok(())
    }

    pub fn io_write(&mut self, offset: u64, data: &[u8]) -> Result<(), IoError> {
        check_width(offset, data.len())?;
        let value = read_le(data);
        for half in 0..data.len() as u64 / 4 {
            self.set_dword(offset + 4 * half, (value >> (32 * half)) as u32);
        }
        Ok(())
    }

    fn dword(&self, offset: u64) -> u32 {
        let pba = pba_offset(self.vectors.len() as u16);
        if offset >= pba {
            let first = (offset - pba) as usize * 8;
            let bits = self.vectors.iter().skip(first).take(32).enumerate();
            return bits.fold(0, |bits, (i, v)| bits | u32::from(v.pending) << i);
        }
        let Some(v) = self.vectors.get((offset / ENTRY_BYTES) as usize) else { return 0 };
        match offset % ENTRY_BYTES {
            0 => v.msi.address as u32,
            4 => (v.msi.address >> 32) as u32,
            8 => v.msi.data,
            _ => u32::from(v.masked),
        }
    }

    fn set_dword(&mut self, offset: u64, value: u32) {
        if offset >= pba_offset(self.vectors.len() as u16) {
            return;
        }
        let i = (offset / ENTRY_BYTES) as usize;
        let Some(v) = self.vectors.get_mut(i) else { return };
        match offset % ENTRY_BYTES {
            0 => v.msi.address = v.msi.address >> 32 << 32 | u64::from(value & !3),
            4 => v.msi.address = v.msi.address & 0xFFFF_FFFF | u64::from(value) << 32,
            8 => v.msi.data = value,
            _ => v.masked = value & 1 != 0,
        }
        self.settle(i);
    }

    pub fn reset(&mut self) {
        (self.enabled, self.function_mask) = (false, false);
        for v in &mut self.vectors {
            (v.msi, v.masked, v.pending) = (Msi::default(), true, false);
            v.route.mask(true);
        }
    }

    /// Puts a saved vector in place; its route follows with [`Msix::restore_control`].
    pub fn restore_vector(&mut self, i: usize, msi: Msi, masked: bool, pending: bool) {
        if let Some(v) = self.vectors.get_mut(i) {
            (v.msi, v.masked, v.pending) = (msi, masked, pending);
        }
    }

    pub fn restore_control(&mut self, enabled: bool, function_mask: bool) {
        (self.enabled, self.function_mask) = (enabled, function_mask);
        for i in 0..self.vectors.len() {
            self.settle(i);
        }
    }
}

/// Only aligned accesses of 4 and 8 bytes are defined.
fn check_width(offset: u64, bytes: usize) -> Result<(), IoError> {
    if matches!(bytes, 4 | 8) && offset.is_multiple_of(bytes as u64) { Ok(()) } else { Err(IoError::Width) }
}
