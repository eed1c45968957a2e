//! IOMMUs, which hold the machine's devices to their memory: AMD's and Intel's, as what ACPI tells of them and as tables that
//! they read. Plain data, that any host can build and look into; [`crate::arch::iommu`] has the registers.
//!
//! Called by: [`crate::acpi`] for what there is, [`crate::arch::iommu`] for the tables.

pub mod amd;
pub mod intel;
pub mod pages;

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;

/// Bytes of a page, and of a table of any kind.
pub const PAGE: u64 = 4096;
/// The domain of all our devices.
const DOMAIN: u64 = 1;
/// Units of one kind that are kept.
const MAX_UNITS: usize = 8;
/// IVRS (AMD 48882, 5.2) and DMAR (VT-d, 8.1): their blocks start here, each with its length at offset 2. One that is a
/// unit has the address of its registers at offset 8.
const BLOCKS_AT: usize = 48;

/// The machine's: all units of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Iommu {
    /// AMD's (table IVRS).
    Amd(Vec<amd::Unit>),
    /// Intel's VT-d (table DMAR): addresses of the registers.
    Intel(Vec<u64>),
}

impl Iommu {
    /// For people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Amd(_) => "AMD-Vi",
            Self::Intel(_) => "Intel VT-d",
        }
    }

    /// Where units' registers are.
    pub fn registers(&self) -> Vec<u64> {
        match self {
            Self::Amd(units) => units.iter().map(|unit| unit.registers).collect(),
            Self::Intel(units) => units.clone(),
        }
    }
}

/// A device as IOMMUs number it: bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub u16);

impl DeviceId {
    /// Its bus.
    pub fn bus(self) -> u8 {
        (self.0 >> 8) as u8
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.bus(), self.0 >> 3 & 31, self.0 & 7)
    }
}

/// What a device was not let do, for people.
struct Kept {
    device: DeviceId,
    write: bool,
    address: u64,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.write { "writing to" } else { "reading" };
        write!(f, "device {} was kept from {what} {:#x}", self.device, self.address)
    }
}

/// A table that hardware reads, at its physical address.
#[repr(C, align(4096))]
struct Table([u64; 512]);

impl Table {
    fn new(entry: u64) -> Box<Self> {
        Box::new(Self([entry; 512]))
    }
    /// Memory is mapped one to one.
    fn address(&self) -> u64 {
        (&raw const *self).expose_provenance() as u64
    }
}

/// The blocks of IVRS or DMAR, with at least 4 bytes each. The table is firmware's: the first that is odd is the end.
fn blocks(table: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = table.get(BLOCKS_AT..).unwrap_or_default();
    core::iter::from_fn(move || {
        let length = usize::from(u16::from_le_bytes([*rest.get(2)?, *rest.get(3)?]));
        let (block, later) = rest.split_at_checked(length).filter(|_| length >= 4)?;
        rest = later;
        Some(block)
    })
}

/// Address of the registers of a block that is a unit, if it can be one.
fn registers(block: &[u8]) -> Option<u64> {
    let at = block.get(8..16)?.iter().rev().fold(0, |at, byte| at << 8 | u64::from(*byte));
    (at != 0 && at.is_multiple_of(PAGE)).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table with blocks of a kind, a length and an address; their function is 0x0002.
    pub fn firmware_table(blocks: &[(u8, u16, u64)]) -> Vec<u8> {
        let mut table = alloc::vec![0; BLOCKS_AT];
        for (kind, length, at) in blocks {
            let start = table.len();
            table.extend([*kind, 0]);
            table.extend(length.to_le_bytes());
            table.extend([0x02, 0, 0x40, 0]);
            table.extend(at.to_le_bytes());
            table.resize(start + usize::from(*length).max(16), 0);
        }
        table
    }

    /// What `units` finds in one block, of the kind that is a unit, is nothing if the block is odd.
    pub fn leaves_out_what_is_odd(kind: u8, units: impl Fn(&[u8]) -> Vec<u64>) {
        let table = firmware_table(&[(kind, 40, 0xFED8_0000)]);
        for end in 0..table.len() {
            assert_eq!(units(&table[..end]), [], "cut at {end}");
        }
        for odd in [(40, 0), (40, 0xFED8_0004), (0, 0xFED8_0000), (3, 0xFED8_0000), (12, 4096)] {
            assert_eq!(units(&firmware_table(&[(kind, odd.0, odd.1)])), [], "{odd:x?}");
        }
        let many: Vec<_> = (1..100).map(|n| (kind, 24, n * PAGE)).collect();
        assert_eq!(units(&firmware_table(&many)).len(), MAX_UNITS);
        assert_eq!(units(&[0xFF; 300]), []);
    }
}
