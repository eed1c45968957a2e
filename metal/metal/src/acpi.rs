//! What ACPI's tables tell of the machine (ACPI 6.5, 5.2): its processors, and its IOMMUs.
//!
//! Called by: [`crate::start`]. The tables are firmware's: every length is capped, a checksum that is wrong drops its
//! table. Physical memory is read through a function of the caller's, so that this runs on any host.

use crate::boot_info::ReadPhysical;
use crate::iommu::{Iommu, amd, intel};
use alloc::vec::Vec;

/// Most processors that are started.
pub const MAX_PROCESSORS: usize = 64;
const MAX_TABLES: u64 = 256;
const MAX_TABLE_BYTES: u32 = 1 << 20;
const HEADER_BYTES: u64 = 36;
/// Where a BIOS leaves the root pointer if nobody tells where it is (5.2.5.1).
const BIOS_AREA: core::ops::Range<u64> = 0xE_0000..0x10_0000;

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Acpi {
    /// Local APICs' numbers of the processors that can be used; empty: not told.
    pub processors: Vec<u32>,
    /// The first that is told of.
    pub iommu: Option<Iommu>,
}

impl Acpi {
    /// Reads the tables below the root pointer at `rsdp`; 0: it is looked for. What cannot be read is left out.
    pub fn read(memory: &dyn ReadPhysical, rsdp: u64) -> Self {
        let mut acpi = Self::default();
        let found = if rsdp != 0 { Some(rsdp) } else { find_root(memory) };
        let Some(rsdp) = found.filter(|at| is_root(memory, *at)) else { return acpi };
        let mut revision = [0];
        memory.read(rsdp + 15, &mut revision);
        let (root, entry_bytes) = match memory.u64(rsdp + 24) {
            xsdt if revision[0] >= 2 && xsdt != 0 => (xsdt, 8),
            _ => (u64::from(memory.u32(rsdp + 16)), 4),
        };
        let Some(entries) = table(memory, root) else { return acpi };
        let entries = entries[HEADER_BYTES as usize..].chunks_exact(entry_bytes);
        for entry in entries.take(MAX_TABLES as usize) {
            let at = entry.iter().rev().fold(0, |at, byte| at << 8 | u64::from(*byte));
            if let Some(table) = table(memory, at) {
                acpi.take(&table);
            }
        }
        acpi
    }

    fn take(&mut self, table: &[u8]) {
        match &table[..4] {
            b"APIC" => self.take_processors(table),
            b"IVRS" if self.iommu.is_none() => self.iommu = Some(Iommu::Amd(amd::units(table))),
            b"DMAR" if self.iommu.is_none() => self.iommu = Some(Iommu::Intel(intel::units(table))),
            _ => {}
        }
    }

    /// The MADT's entries (5.2.12): types 0 (local APIC) and 9 (x2APIC).
    fn take_processors(&mut self, table: &[u8]) {
        let word = |bytes: &[u8]| u32::from_le_bytes(core::array::from_fn(|n| bytes[n]));
        let mut rest = table.get(HEADER_BYTES as usize + 8..).unwrap_or_default();
        while let [kind, length, ..] = *rest {
            let Some((entry, later)) = rest.split_at_checked(usize::from(length)) else { return };
            let found = match (kind, entry.len()) {
                (0, 8..) => Some((u32::from(entry[3]), word(&entry[4..]))),
                (9, 16..) => Some((word(&entry[4..]), word(&entry[8..]))),
                (_, 0..2) => return,
                _ => None,
            };
            if let Some((id, flags)) = found
                && flags & 1 != 0
                && self.processors.len() < MAX_PROCESSORS
                && !self.processors.contains(&id)
            {
                self.processors.push(id);
            }
            rest = later;
        }
    }
}

fn sum(memory: &dyn ReadPhysical, at: u64, bytes: usize) -> u8 {
    let mut all = alloc::vec![0; bytes];
    memory.read(at, &mut all);
    all.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn is_root(memory: &dyn ReadPhysical, at: u64) -> bool {
    memory.u64(at) == u64::from_le_bytes(*b"RSD PTR ") && sum(memory, at, 20) == 0
}

fn find_root(memory: &dyn ReadPhysical) -> Option<u64> {
    BIOS_AREA.step_by(16).find(|at| is_root(memory, *at))
}

/// A whole table whose checksum is right; at least a header.
fn table(memory: &dyn ReadPhysical, at: u64) -> Option<Vec<u8>> {
    let bytes = memory.u32(at.checked_add(4)?);
    if !(HEADER_BYTES as u32..=MAX_TABLE_BYTES).contains(&bytes) {
        return None;
    }
    let mut all = alloc::vec![0; bytes as usize];
    memory.read(at, &mut all);
    (all.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0).then_some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory(Vec<u8>);

    impl ReadPhysical for Memory {
        fn read(&self, at: u64, to: &mut [u8]) {
            for (n, byte) in to.iter_mut().enumerate() {
                *byte = self.0.get(at as usize + n).copied().unwrap_or(0xFF);
            }
        }
    }

    impl Memory {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
        fn correct(&mut self, range: core::ops::Range<usize>, check: usize) {
            self.0[range.start + check] = 0;
            let sum = self.0[range.clone()].iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            self.0[range.start + check] = 0u8.wrapping_sub(sum);
        }
        fn table(&mut self, at: usize, name: &[u8; 4], body: &[u8]) {
            let bytes = HEADER_BYTES as usize + body.len();
            self.put(at, name);
            self.put(at + 4, &(bytes as u32).to_le_bytes());
            self.put(at + HEADER_BYTES as usize, body);
            self.correct(at..at + bytes, 9);
        }
        fn root(&mut self, at: usize, revision: u8, rsdt: u32, xsdt: u64) {
            self.put(at, b"RSD PTR ");
            self.put(at + 15, &[revision]);
            self.put(at + 16, &rsdt.to_le_bytes());
            self.put(at + 24, &xsdt.to_le_bytes());
            self.correct(at..at + 20, 8);
        }
    }

    /// Three processors, of which one is off, one twice; an IOMMU.
    fn example() -> Memory {
        let mut memory = Memory(alloc::vec![0; 1 << 20]);
        let mut body = alloc::vec![0, 0, 0xE0, 0xFE, 1, 0, 0, 0];
        body.extend([0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 5, 1, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0, 0]);
        body.extend([1, 12, 0, 0, 0, 0, 0xC0, 0xFE, 0, 0, 0, 0]);
        body.extend([9, 16, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0]);
        body.extend([0, 8, 3, 5, 1, 0, 0, 0]);
        memory.table(0x2000, b"APIC", &body);
        let mut unit = alloc::vec![0; 12];
        unit.extend([0x10, 0, 24, 0, 2, 0, 0x40, 0, 0, 0, 0xD8, 0xFE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        memory.table(0x3000, b"IVRS", &unit);
        let entries: Vec<u8> =
            [0x2000u64, 0x3000, 0x7FFF_0000].into_iter().flat_map(u64::to_le_bytes).collect();
        memory.table(0x1000, b"XSDT", &entries);
        memory.root(0xF_0010, 2, 0, 0x1000);
        memory
    }

    fn amd_unit() -> Iommu {
        let function = crate::iommu::DeviceId(2);
        Iommu::Amd(alloc::vec![amd::Unit { registers: 0xFED8_0000, function }])
    }

    #[test]
    fn processors_and_iommus_are_found() {
        let expected = Acpi { processors: alloc::vec![0, 5, 0x100], iommu: Some(amd_unit()) };
        assert_eq!(Acpi::read(&example(), 0), expected);
        assert_eq!(Acpi::read(&example(), 0xF_0010), expected);
        let mut old = example();
        old.table(0x1800, b"RSDT", &[0, 0x20, 0, 0]);
        old.root(0xF_0010, 0, 0x1800, 0);
        assert_eq!(Acpi::read(&old, 0), Acpi { iommu: None, ..expected });
        let mut intel = example();
        intel.0[0x3000..0x4000].fill(0);
        let mut unit = alloc::vec![0; 12];
        unit.extend([0, 0, 16, 0, 1, 0, 0, 0, 0, 0, 0xD9, 0xFE, 0, 0, 0, 0]);
        intel.table(0x3000, b"DMAR", &unit);
        let found = Acpi::read(&intel, 0).iommu;
        assert_eq!(found, Some(Iommu::Intel(alloc::vec![0xFED9_0000])));
    }

    #[test]
    fn what_is_damaged_is_left_out() {
        let mut memory = example();
        memory.0[0x2030] ^= 1;
        let left = Acpi::read(&memory, 0);
        assert_eq!((left.processors, left.iommu), (Vec::new(), Some(amd_unit())));
        memory.0[0x1004] = 0;
        memory.0[0x1005] = 0xFF;
        memory.0[0x1007] = 0xFF;
        assert_eq!(Acpi::read(&memory, 0), Acpi::default());
        assert_eq!(Acpi::read(&memory, 0x5000), Acpi::default());
        let mut endless = example();
        endless.table(0x2000, b"APIC", &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0]);
        assert_eq!(Acpi::read(&endless, 0).processors, []);
    }
}
