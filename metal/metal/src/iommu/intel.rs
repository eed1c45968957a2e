//! Intel's IOMMU (Virtualization Technology for Directed I/O, D51397, rev. 3.4): its tables in legacy mode, what its capability
//! registers tell, and its fault records.
//!
//! Called by: [`crate::arch::iommu`], which has the registers.
//!
//! Invariants: a device reaches the one range that was granted, if it was granted to it, and otherwise nothing.

use super::pages::{Format, PageTables};
use super::{DOMAIN, DeviceId, Kept, MAX_UNITS, PAGE, Table};
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// DMAR (8.3): a remapping unit.
const UNIT: [u8; 2] = [0, 0];
/// Root and context entries (9.1, 9.3).
const PRESENT: u64 = 1;
const ENTRY_WORDS: usize = 2;

/// Registers of all units that a DMAR table tells of. The table is firmware's: what is odd is left out. (What it reserves for
/// devices that firmware itself uses is not granted: firmware has left them.)
pub fn units(dmar: &[u8]) -> Vec<u64> {
    let mut units = Vec::new();
    for at in super::blocks(dmar).filter(|block| block[..2] == UNIT).filter_map(super::registers) {
        if !units.contains(&at) && units.len() < MAX_UNITS {
            units.push(at);
        }
    }
    units
}

/// A unit's capability register and the extended one (11.4.2, 11.4.3).
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Of offset 0x08.
    pub capability: u64,
    /// Of offset 0x10.
    pub extended: u64,
}

impl Abilities {
    /// Whether it walks page tables of so many levels.
    fn walks(self, levels: u64) -> bool {
        self.capability >> (8 + levels - 2) & 1 != 0
    }
    /// Whether its write buffer must be flushed by hand before it looks at tables.
    pub fn buffers_writes(self) -> bool {
        self.capability >> 4 & 1 != 0
    }
    /// Whether it has ranges that firmware may have protected from all devices.
    pub fn protects_ranges(self) -> bool {
        self.capability >> 5 & 0b11 != 0
    }
    /// Whether it sees tables that are in a processor's cache only.
    pub fn is_coherent(self) -> bool {
        self.extended & 1 != 0
    }
    /// Offset of the fault records, of 16 bytes each, and how many there are.
    pub fn faults(self) -> (u64, u64) {
        ((self.capability >> 24 & 0x3FF) * 16, (self.capability >> 40 & 0xFF) + 1)
    }
    /// Offset of the register that invalidates translations.
    pub fn invalidation(self) -> u64 {
        (self.extended >> 8 & 0x3FF) * 16 + 8
    }
}

/// The least levels of page tables that all units walk.
pub fn common_levels(units: &[Abilities]) -> Option<u64> {
    [3, 4, 5].into_iter().find(|levels| units.iter().all(|unit| unit.walks(*levels)))
}

/// The root table, context tables and the page tables behind them.
pub struct Tables {
    root: Box<Table>,
    /// By bus.
    contexts: BTreeMap<u8, Box<Table>>,
    pages: PageTables,
}

impl Tables {
    /// With page tables of so many levels; no device reaches anything.
    pub fn new(levels: u64) -> Self {
        let pages = PageTables::new(Format::Intel, levels);
        Self { root: Table::new(0), contexts: BTreeMap::new(), pages }
    }

    /// Maps whole pages one to one.
    pub fn map(&mut self, range: Range<u64>) {
        self.pages.map(range);
    }

    /// Lets `device` reach what is mapped.
    pub fn grant(&mut self, device: DeviceId) {
        let context = self.contexts.entry(device.bus()).or_insert_with(|| Table::new(0));
        self.root.0[usize::from(device.bus()) * ENTRY_WORDS] = context.address() | PRESENT;
        let at = usize::from(device.0 & 0xFF) * ENTRY_WORDS;
        context.0[at] = self.pages.root() | PRESENT;
        // The width of addresses is told by the levels: 1 for three.
        context.0[at + 1] = DOMAIN << 8 | (self.pages.levels() - 2);
    }

    /// Where an access of `device` to `address` goes; `None`: to a fault.
    pub fn translate(&self, device: DeviceId, address: u64) -> Option<u64> {
        let entry = self.contexts.get(&device.bus())?.0[usize::from(device.0 & 0xFF) * ENTRY_WORDS];
        if entry & PRESENT != 0 { self.pages.translate(address) } else { None }
    }

    /// The root table's register (11.4.5): legacy mode.
    pub fn root_register(&self) -> u64 {
        self.root.address()
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        (1 + self.contexts.len() as u64) * PAGE + self.pages.bytes()
    }
}

/// A fault record (11.4.14), for people.
#[derive(Clone, Copy, Debug)]
pub struct Fault(pub [u64; 2]);

impl Fault {
    /// In the upper half: there is one; it is cleared by writing it.
    pub const VALID: u64 = 1 << 63;
    const READ: u64 = 1 << 62;
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [address, what] = self.0;
        let kept = Kept {
            device: DeviceId(what as u16),
            write: what & Self::READ == 0,
            address: address & !(PAGE - 1),
        };
        write!(f, "{kept} (reason {})", what >> 32 & 0xFF)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{firmware_table, leaves_out_what_is_odd};
    use super::*;
    use std::string::ToString;

    /// What QEMU 7.2 tells: three levels, a record at 0x220, invalidation at 0xF0.
    const QEMU: Abilities = Abilities { capability: 0x00D2_008C_2226_0206, extended: 0x0F02 };

    #[test]
    fn units_are_found_once() {
        let table = firmware_table(&[
            (0, 24, 0xFED9_0000),
            (1, 32, 0xFED7_0000),
            (0, 16, 0xFED9_0000),
            (0, 16, 0xFED9_1000),
        ]);
        assert_eq!(units(&table), [0xFED9_0000, 0xFED9_1000]);
        leaves_out_what_is_odd(0, units);
    }

    #[test]
    fn capabilities_are_read_out() {
        assert_eq!((QEMU.faults(), QEMU.invalidation()), ((0x220, 1), 0xF8));
        assert!(!QEMU.is_coherent() && !QEMU.buffers_writes() && !QEMU.protects_ranges());
        let four = Abilities { capability: 4 << 8, ..QEMU };
        let both = Abilities { capability: 6 << 8 | 1 << 4 | 1 << 6, extended: 1 };
        assert!(both.is_coherent() && both.buffers_writes() && both.protects_ranges());
        assert_eq!(
            [&[QEMU][..], &[four, both], &[both, QEMU]].map(common_levels),
            [Some(3), Some(4), Some(3)]
        );
        assert_eq!(common_levels(&[QEMU, four]), None);
    }

    #[test]
    fn a_device_reaches_what_it_was_granted() {
        let mut tables = Tables::new(3);
        tables.map(0x4000_0000..0x4000_2000);
        let (disk, other) = (DeviceId(0x0118), DeviceId(0x0110));
        tables.grant(disk);
        let reached = |device, at| tables.translate(device, at);
        assert_eq!(reached(disk, 0x4000_1234), Some(0x4000_1234));
        assert_eq!((reached(disk, 0x4000_2000), reached(other, 0x4000_0000)), (None, None));
        assert_eq!(reached(DeviceId(0x0018), 0x4000_0000), None);
        assert_eq!(tables.bytes() / PAGE, 2 + 3);
    }

    #[test]
    fn entries_and_records_have_their_form() {
        let mut tables = Tables::new(4);
        tables.grant(DeviceId(0x0118));
        let context = &tables.contexts[&1];
        assert_eq!(tables.root.0[2], context.address() | 1);
        assert_eq!(context.0[0x30..0x32], [tables.pages.root() | 1, 0x102]);
        assert_eq!(tables.root.0.iter().chain(&context.0).filter(|word| **word != 0).count(), 3);
        let fault = Fault([0x1234_5FFF, Fault::VALID | 5 << 32 | 0x0118]);
        assert_eq!(fault.to_string(), "device 01:03.0 was kept from writing to 0x12345000 (reason 5)");
    }
}
