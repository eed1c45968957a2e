//! Page tables of devices, in AMD's format (48882, 2.2.3) or as Intel's second-level ones (VT-d 3.6, 9.8): levels, indices and
//! addresses are the same.
//!
//! Called by: [`super::amd`] and [`super::intel`]. Tables are kept by their address and never dereferenced by it.
//! Invariant: what was not mapped leads to a fault.

use super::{PAGE, Table};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use core::ops::Range;

const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

/// Who reads the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// AMD's.
    Amd,
    /// Intel's.
    Intel,
}

/// AMD: present, readable, writable; the level of what an entry names.
const PRESENT: u64 = 1;
const AMD_ACCESS: u64 = 1 << 61 | 1 << 62;
pub(super) const NEXT_LEVEL: u32 = 9;
/// Intel: readable, writable. An entry without both is not present.
const INTEL_ACCESS: u64 = 0b11;

impl Format {
    /// An entry that maps nothing. AMD's hardware looks at the present bit only; QEMU tells of a fault if the rest is not
    /// zero, too.
    fn nothing(self) -> u64 {
        if self == Self::Amd { 1 << NEXT_LEVEL } else { 0 }
    }
    /// What names the table (`level` 1 and more) or the page (0) at `address`.
    fn entry(self, address: u64, level: u64) -> u64 {
        match self {
            Self::Amd => address | level << NEXT_LEVEL | PRESENT | AMD_ACCESS,
            Self::Intel => address | INTEL_ACCESS,
        }
    }
    /// What an entry names.
    fn address(self, entry: u64) -> Option<u64> {
        let present = if self == Self::Amd { PRESENT } else { INTEL_ACCESS };
        (entry & present != 0).then_some(entry & ADDRESS)
    }
}

/// See the module's header.
pub struct PageTables {
    format: Format,
    levels: u64,
    root: u64,
    /// By physical address, which is their own.
    tables: BTreeMap<u64, Box<Table>>,
}

impl PageTables {
    /// Of so many levels (3: 512 GiB); they map nothing.
    pub fn new(format: Format, levels: u64) -> Self {
        let mut new = Self { format, levels, root: 0, tables: BTreeMap::new() };
        new.root = new.new_table();
        new
    }

    fn new_table(&mut self) -> u64 {
        let table = Table::new(self.format.nothing());
        let at = table.address();
        self.tables.insert(at, table);
        at
    }

    /// Maps whole pages one to one.
    pub fn map(&mut self, range: Range<u64>) {
        for page in range.step_by(PAGE as usize) {
            let mut table = self.root;
            for level in (2..=self.levels).rev() {
                table = self.next(table, page, level).unwrap_or_else(|| {
                    let next = self.new_table();
                    self.set(table, page, level, next);
                    next
                });
            }
            self.set(table, page, 1, page);
        }
    }

    fn index(address: u64, level: u64) -> usize {
        (address >> (3 + 9 * level) & 511) as usize
    }

    /// What the entry of a table names.
    fn next(&self, table: u64, address: u64, level: u64) -> Option<u64> {
        self.format.address(self.tables.get(&table)?.0[Self::index(address, level)])
    }

    fn set(&mut self, table: u64, address: u64, level: u64, next: u64) {
        if let Some(table) = self.tables.get_mut(&table) {
            table.0[Self::index(address, level)] = self.format.entry(next, level - 1);
        }
    }

    /// Where an access to `address` goes; `None`: to a fault.
    pub fn translate(&self, address: u64) -> Option<u64> {
        if address >> (12 + 9 * self.levels) != 0 {
            return None;
        }
        let page = (1..=self.levels).rev().try_fold(self.root, |at, level| self.next(at, address, level));
        page.map(|page| page | address & (PAGE - 1))
    }

    /// Physical address of the root.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Its levels.
    pub fn levels(&self) -> u64 {
        self.levels
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        self.tables.len() as u64 * PAGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mapped_is_reached_and_nothing_else() {
        for (format, levels) in [(Format::Amd, 3), (Format::Intel, 3), (Format::Intel, 4)] {
            let mut tables = PageTables::new(format, levels);
            tables.map(0x3FFF_E000..0x4000_2000);
            for at in [0x3FFF_E000, 0x3FFF_FFFF, 0x4000_0000, 0x4000_1FFF] {
                assert_eq!(tables.translate(at), Some(at), "{format:?} {at:#x}");
            }
            for at in [0, 0x3FFF_DFFF, 0x4000_2000, 0x80_3FFF_E000, 1 << 48, u64::MAX] {
                assert_eq!(tables.translate(at), None, "{format:?} {at:#x}");
            }
            assert_eq!(tables.bytes() / PAGE, 2 * levels - if levels == 4 { 2 } else { 1 });
        }
    }

    #[test]
    fn entries_have_their_format() {
        assert_eq!(Format::Amd.entry(0x5000, 2), 0x6000_0000_0000_5401);
        assert_eq!(Format::Amd.entry(0x5000, 0), 0x6000_0000_0000_5001);
        assert_eq!(Format::Intel.entry(0x5000, 2), 0x5003);
        assert_eq!((Format::Amd.nothing(), Format::Intel.nothing()), (0x200, 0));
    }
}
