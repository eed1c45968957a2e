//! Second-level page tables: guest-physical to host-physical, in the format of long mode (APM vol. 2, 15.25) or of EPT
//! (SDM vol. 3C, 29.3.2), whose levels, indices and addresses are the same.
//!
//! They map guest RAM and nothing else: the hypervisor's own memory and the devices' cannot be reached through them.
//! Tables are kept by their physical address, so that nothing here dereferences one. The processor sets accessed and
//! dirty bits behind our back, hence the atomics.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use x86_defs::paging::{PTE_ADDR, PTE_P, PTE_PS, PTE_U, PTE_W};

const PAGE: u64 = 1 << 12;
/// Bytes that an entry of a level maps.
const fn reach(level: u32) -> u64 {
    PAGE << (9 * (level - 1))
}
/// Every access of a guest is a user access here. In EPT the same bits are read, write and execute.
const ACCESS: u64 = PTE_P | PTE_W | PTE_U;
/// EPT, in an entry that maps: write-back, whatever the guest's PAT says.
const WRITE_BACK: u64 = 6 << 3 | 1 << 6;

/// Who reads the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AMD's nested paging.
    Npt,
    /// Intel's EPT.
    Ept,
}

impl Format {
    /// Bits of an entry that maps, at a level.
    fn leaf(self, level: u32) -> u64 {
        let size = if level > 1 { PTE_PS } else { 0 };
        ACCESS | size | if self == Self::Ept { WRITE_BACK } else { 0 }
    }
}

/// A range that cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest RAM at {0:#x} cannot be mapped: it is not made of whole pages, or lies too high")]
pub struct NotMappable(pub u64);

#[repr(C, align(4096))]
struct Table([AtomicU64; 512]);

/// See the module's header.
pub struct NestedTables {
    root: u64,
    tables: BTreeMap<u64, Box<Table>>,
    physical: fn(usize) -> u64,
    format: Format,
    /// Highest level whose entries may map: 3 with pages of 1 GiB, otherwise 2.
    largest: u32,
}

impl NestedTables {
    /// Maps nothing. `physical` gives the physical address of the hypervisor's own memory.
    pub fn new(physical: fn(usize) -> u64, format: Format, huge_pages: bool) -> Self {
        let largest = if huge_pages { 3 } else { 2 };
        let mut new = Self { root: 0, tables: BTreeMap::new(), physical, format, largest };
        new.root = new.new_table();
        new
    }

    fn new_table(&mut self) -> u64 {
        let table = Box::new(Table([const { AtomicU64::new(0) }; 512]));
        let at = (self.physical)((&raw const *table).addr());
        self.tables.insert(at, table);
        at
    }

    fn slot(&self, table: u64, gpa: u64, level: u32) -> Option<&AtomicU64> {
        let index = gpa >> (12 + 9 * (level - 1)) & 511;
        self.tables.get(&table).map(|t| &t.0[index as usize])
    }

    /// Maps `bytes` at `gpa` to `hpa`, with the largest pages that fit.
    pub fn map(&mut self, gpa: u64, hpa: u64, bytes: u64) -> Result<(), NotMappable> {
        let end = gpa.checked_add(bytes).filter(|end| *end <= reach(5)).ok_or(NotMappable(gpa))?;
        if (gpa | hpa | bytes) & (PAGE - 1) != 0
            || hpa.checked_add(bytes).is_none_or(|end| end > PTE_ADDR + PAGE)
        {
            return Err(NotMappable(gpa));
        }
        let mut at = gpa;
        while at < end {
            let to = hpa + (at - gpa);
            let fits = |level: &u32| (at | to) & (reach(*level) - 1) == 0 && end - at >= reach(*level);
            let level = (1..=self.largest).rev().find(fits).unwrap_or(1);
            self.set(at, to, level);
            at += reach(level);
        }
        Ok(())
    }

    fn set(&mut self, gpa: u64, hpa: u64, level: u32) {
        let mut table = self.root;
        for step in (level + 1..=4).rev() {
            let entry = self.slot(table, gpa, step).map_or(0, |slot| slot.load(Relaxed));
            table = if entry & PTE_P != 0 {
                entry & PTE_ADDR
            } else {
                let next = self.new_table();
                if let Some(slot) = self.slot(table, gpa, step) {
                    slot.store(next | ACCESS, Relaxed);
                }
                next
            };
        }
        if let Some(slot) = self.slot(table, gpa, level) {
            slot.store(hpa | self.format.leaf(level), Relaxed);
        }
    }

    /// Where `gpa` is mapped to, and the size of its page.
    pub fn lookup(&self, gpa: u64) -> Option<(u64, u64)> {
        let mut table = self.root;
        for level in (1..=4).rev() {
            let entry = self.slot(table, gpa, level)?.load(Relaxed);
            if entry & PTE_P == 0 {
                return None;
            }
            if level == 1 || entry & PTE_PS != 0 {
                let inside = reach(level) - 1;
                return Some((entry & PTE_ADDR & !inside | gpa & inside, reach(level)));
            }
            table = entry & PTE_ADDR;
        }
        None
    }

    /// Physical address of the first table.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        self.tables.len() as u64 * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn npt(huge: bool) -> NestedTables {
        NestedTables::new(|address| address as u64, Format::Npt, huge)
    }

    #[test]
    fn entries_are_what_the_manuals_say() {
        let entry = |format, gpa, level| {
            let mut tables = NestedTables::new(|address| address as u64, format, true);
            tables.map(0, 0x4000_0000, 0x6000_0000).unwrap();
            let mut table = tables.root;
            for step in (level + 1..=4).rev() {
                let entry = tables.slot(table, gpa, step).unwrap().load(Relaxed);
                assert_eq!(entry & !PTE_ADDR, 7, "tables are reached by every access");
                table = entry & PTE_ADDR;
            }
            tables.slot(table, gpa, level).unwrap().load(Relaxed)
        };
        // SDM vol. 3C, tables 29-3 and 29-5: write-back in bits 5:3, PAT ignored in bit 6, a page in bit 7.
        assert_eq!(entry(Format::Ept, 0, 3), 0x4000_0000 | 0x77 | 0x80);
        assert_eq!(entry(Format::Ept, 0x4000_0000, 2), 0x8000_0000 | 0x77 | 0x80);
        assert_eq!(entry(Format::Npt, 0, 3), 0x4000_0000 | 0x87);
        assert_eq!(Format::Ept.leaf(1), 0x77);
    }

    #[test]
    fn ram_is_mapped_and_nothing_else() {
        let mut npt = npt(true);
        npt.map(0, 0x4000_0000, 0xA_0000).unwrap();
        npt.map(0x10_0000, 0x4010_0000, 0x1FF0_0000).unwrap();
        npt.map(4 << 30, 0x8000_0000, 1 << 30).unwrap();
        assert_eq!(npt.lookup(0x9_FFFF), Some((0x4009_FFFF, 4096)));
        assert_eq!(npt.lookup(0xA_0000), None);
        assert_eq!(npt.lookup(0xF_FFFF), None);
        assert_eq!(npt.lookup(0x10_0123), Some((0x4010_0123, 4096)));
        assert_eq!(npt.lookup(0x20_0000), Some((0x4020_0000, 2 << 20)));
        assert_eq!(npt.lookup(0x1FFF_FFFF), Some((0x5FFF_FFFF, 2 << 20)));
        assert_eq!(npt.lookup(0x2000_0000), None);
        assert_eq!(npt.lookup((4 << 30) + 5), Some((0x8000_0005, 1 << 30)));
        assert_eq!(npt.lookup(0xFEE0_0000), None);
    }

    #[test]
    fn pages_are_as_large_as_both_sides_allow() {
        let mut small = npt(false);
        small.map(1 << 30, 1 << 30, 1 << 30).unwrap();
        assert_eq!(small.lookup(1 << 30), Some((1 << 30, 2 << 20)));
        let mut skewed = npt(true);
        skewed.map(0x20_0000, 0x30_1000, 0x40_0000).unwrap();
        assert_eq!(skewed.lookup(0x40_0000), Some((0x50_1000, 4096)));
        assert_eq!(skewed.bytes(), (3 + 2) * 4096);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let mut npt = npt(true);
        for (gpa, hpa, bytes) in
            [(1, 0, 4096), (0, 1, 4096), (0, 0, 4095), (!0xFFF, 0, 4096), (0, !0xFFF, 4096)]
        {
            assert_eq!(npt.map(gpa, hpa, bytes), Err(NotMappable(gpa)));
        }
        assert_eq!(npt.lookup(0), None);
    }
}
