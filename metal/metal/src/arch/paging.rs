//! Our own page tables: memory one to one, and no page both writable and executable.
//!
//! Called by: [`crate::start`], once there is a heap. [`PageTables`] is plain data that any host can build and look
//! into; only [`PageTables::activate`] needs the processor.
//!
//! Invariants: page 0 and stacks' guard pages are not mapped; code is read-only, everything else not executable;
//! what is no RAM is not cached.

use super::image::Image;
use crate::memory::{MemoryKind, MemoryMap};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Range;
use spin::Once;
use x86_defs::paging::{PTE_ADDR, PTE_NX, PTE_P, PTE_PS, PTE_W};

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
const FOUR_GIB: u64 = 4 << 30;
/// Behind the last address that four levels of tables map in the lower half.
const MAX_ADDRESS: u64 = 1 << 47;
/// PWT and PCD: uncached.
const UNCACHED: u64 = 1 << 3 | 1 << 4;

/// Those of all our processors.
static OWN: Once<PageTables> = Once::new();

/// Makes `tables` those of all our processors; they live for ever.
pub fn set_own(tables: PageTables) -> &'static PageTables {
    OWN.call_once(|| tables)
}

/// Those that were set; before, none that map anything.
pub fn own() -> &'static PageTables {
    OWN.call_once(PageTables::default)
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

/// See the module's header.
pub struct PageTables {
    root: u64,
    /// By physical address, which is their own.
    tables: BTreeMap<u64, Box<Table>>,
}

impl Default for PageTables {
    fn default() -> Self {
        let mut tables = Self { root: 0, tables: BTreeMap::new() };
        tables.root = tables.new_table();
        tables
    }
}

impl PageTables {
    fn new_table(&mut self) -> u64 {
        let table = Box::new(Table([0; 512]));
        let at = (&raw const *table).expose_provenance() as u64;
        self.tables.insert(at, table);
        at
    }

    /// Index in a table of `level` (4 is the root).
    fn index(address: u64, level: u32) -> usize {
        (address >> (12 + 9 * (level - 1)) & 511) as usize
    }

    /// Maps the page of `address` at `level` (1: 4 KiB, 2: 2 MiB) with `flags`.
    fn map(&mut self, address: u64, level: u32, flags: u64) {
        let mut table = self.root;
        for step in (level + 1..=4).rev() {
            let index = Self::index(address, step);
            let entry = self.tables.get(&table).map_or(0, |t| t.0[index]);
            table = if entry & PTE_P != 0 {
                entry & PTE_ADDR
            } else {
                let next = self.new_table();
                if let Some(t) = self.tables.get_mut(&table) {
                    t.0[index] = next | PTE_P | PTE_W;
                }
                next
            };
        }
        if let Some(t) = self.tables.get_mut(&table) {
            t.0[Self::index(address, level)] = address | flags | PTE_P | if level == 2 { PTE_PS } else { 0 };
        }
    }

    /// The entry that maps `address`; 0 if none does.
    pub fn entry(&self, address: u64) -> u64 {
        let mut table = self.root;
        for level in (1..=4).rev() {
            let entry = self.tables.get(&table).map_or(0, |t| t.0[Self::index(address, level)]);
            if entry & PTE_P == 0 || level == 1 || entry & PTE_PS != 0 {
                return if entry & PTE_P != 0 { entry } else { 0 };
            }
            table = entry & PTE_ADDR;
        }
        0
    }

    /// Tables for a machine of this memory, with our image in it, and devices' `registers` wherever they are; without the
    /// pages `guards`.
    pub fn one_to_one(map: &MemoryMap, image: &Image, registers: &[Range<u64>], guards: &[u64]) -> Self {
        let plan = Plan::new(map, image, guards);
        let mut tables = Self::default();
        let top = map.top().max(FOUR_GIB).next_multiple_of(LARGE);
        for range in registers.iter().filter(|range| range.start >= top && range.end <= MAX_ADDRESS) {
            for page in (range.start & !(PAGE - 1)..range.end).step_by(PAGE as usize) {
                tables.map(page, 1, PTE_W | PTE_NX | UNCACHED);
            }
        }
        for block in (0..top).step_by(LARGE as usize) {
            if plan.is_uniform(block..block + LARGE) {
                if let Some(flags) = plan.flags(block) {
                    tables.map(block, 2, flags);
                }
                continue;
            }
            for page in (block..block + LARGE).step_by(PAGE as usize) {
                if let Some(flags) = plan.flags(page) {
                    tables.map(page, 1, flags);
                }
            }
        }
        tables
    }

    /// Physical address of the root.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// From now on this processor uses them.
    ///
    /// # Safety
    /// They map whatever is in use where it is, and live as long as any processor uses them.
    pub unsafe fn activate(&self) {
        // SAFETY: the caller vouches for the tables; EFER and CR0 exist.
        unsafe {
            let efer = super::read_msr(x86_defs::msr::EFER);
            super::write_msr(x86_defs::msr::EFER, efer | x86_defs::control::EFER_NXE);
            core::arch::asm!(
                "mov cr3, {root}",
                "mov {t}, cr0",
                "or {t}, {wp}",
                "mov cr0, {t}",
                root = in(reg) self.root,
                t = out(reg) _,
                wp = const 1 << 16,
                options(nostack)
            );
        }
    }
}

/// What each page gets.
struct Plan<'a> {
    map: &'a MemoryMap,
    image: &'a Image,
    guards: &'a [u64],
    /// Addresses where something changes.
    borders: Vec<u64>,
}

impl<'a> Plan<'a> {
    fn new(map: &'a MemoryMap, image: &'a Image, guards: &'a [u64]) -> Self {
        let mut borders: Vec<u64> = alloc::vec![PAGE];
        let mut add = |range: Range<u64>| borders.extend([range.start, range.end]);
        map.ranges().iter().for_each(|r| add(r.start..r.end()));
        [&image.all, &image.text, &image.constants, &image.guard].into_iter().for_each(|r| add(r.clone()));
        guards.iter().for_each(|at| add(*at..at + PAGE));
        Self { map, image, guards, borders }
    }

    fn is_uniform(&self, block: Range<u64>) -> bool {
        !self.borders.iter().any(|border| *border > block.start && *border < block.end)
    }

    /// Flags of the page at `page`; `None`: not mapped.
    fn flags(&self, page: u64) -> Option<u64> {
        let inside = |range: &Range<u64>| page < range.end && page + PAGE > range.start;
        if page == 0 || inside(&self.image.guard) || self.guards.contains(&page) {
            return None;
        }
        if inside(&self.image.text) {
            return Some(0);
        }
        if inside(&self.image.constants) {
            return Some(PTE_NX);
        }
        let ram =
            |r: &&crate::memory::MemoryRange| r.kind != MemoryKind::Reserved && inside(&(r.start..r.end()));
        match self.map.ranges().iter().find(ram) {
            Some(_) => Some(PTE_W | PTE_NX),
            // Behind all of it there is nothing that we know.
            None if page >= FOUR_GIB => None,
            None => Some(PTE_W | PTE_NX | UNCACHED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRange;

    #[test]
    fn no_page_is_writable_and_executable() {
        let mut map = MemoryMap::default();
        map.add(MemoryRange { start: 0, bytes: 0xA_0000, kind: MemoryKind::Usable });
        map.add(MemoryRange { start: 0x10_0000, bytes: 0x3FE0_0000, kind: MemoryKind::Usable });
        map.add(MemoryRange { start: 5 << 30, bytes: 1 << 30, kind: MemoryKind::Usable });
        let image = Image {
            all: 0x10_0000..0x18_0000,
            text: 0x10_0000..0x12_0000,
            constants: 0x12_0000..0x13_0000,
            guard: 0x13_0000..0x13_1000,
            stack: 0x13_1000..0x14_0000,
        };
        let registers = [0x80_0000_1000..0x80_0000_2000, 0..u64::MAX];
        let tables = PageTables::one_to_one(&map, &image, &registers, &[0x60_3000]);
        let writable = |at| tables.entry(at) & PTE_W != 0;
        let executable = |at| tables.entry(at) != 0 && tables.entry(at) & PTE_NX == 0;
        for page in (0..0x40_0000).step_by(4096) {
            assert!(!(writable(page) && executable(page)), "{page:#x}");
            assert_eq!(executable(page), image.text.contains(&page), "{page:#x}");
        }
        assert_eq!((tables.entry(0), tables.entry(0x13_0FFF)), (0, 0));
        assert_eq!(tables.entry(0x60_3FFF), 0);
        assert!(writable(0x60_2FFF) && writable(0x60_4000));
        assert!(!writable(0x12_8000) && writable(0x13_1000) && writable(0x20_0000));
        assert_eq!(tables.entry(0x3000_0000), 0x3000_0000 | PTE_P | PTE_W | PTE_NX | PTE_PS);
        assert_eq!(tables.entry(0xFEE0_0000) & UNCACHED, UNCACHED);
        assert_eq!(tables.entry(0x10_0000_0000), 0);
        let registers = tables.entry(0x80_0000_1FFF);
        assert_eq!(registers & (PTE_ADDR | UNCACHED), 0x80_0000_1000 | UNCACHED);
        assert_eq!((tables.entry(0x80_0000_0FFF), tables.entry(0x80_0000_2000)), (0, 0));
        assert_eq!(tables.entry(0x1_0000_0000), 0);
        assert_eq!(tables.entry(0x1_4000_0000) & PTE_ADDR, 0x1_4000_0000);
    }
}
