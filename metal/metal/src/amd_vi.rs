//! AMD's IOMMU (AMD I/O Virtualization Technology Specification, 48882, rev. 3.08): its tables, commands and events.
//!
//! Called by: [`crate::arch::iommu`], which has the registers. Plain data here, that any host can build and look into:
//! tables are kept by their address and never dereferenced.
//!
//! Invariants: a device reaches the one range that was granted, if it was granted to it, and otherwise nothing.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

const PAGE: u64 = 4096;
/// Device numbers of one bus take this many pages of the device table.
const PAGES_PER_BUS: usize = 2;
const ENTRY_WORDS: usize = 4;
/// Levels of page tables: 512 GiB.
const LEVELS: u64 = 3;
/// The domain of all our devices.
const DOMAIN: u64 = 1;
/// Device table entry (2.2.2.1), page table entry (2.2.3): valid, translation valid, readable, writable.
const V: u64 = 1;
const TV: u64 = 1 << 1;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;
const PRESENT: u64 = 1;
const NEXT_LEVEL: u32 = 9;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
/// What maps nothing. Hardware looks at the present bit only; QEMU tells of a fault if the rest is not zero, too.
const NOTHING: u64 = 1 << NEXT_LEVEL;

/// IVRS (5.2): its blocks start here, and these kinds describe an IOMMU: its own function at offset 4, registers at 8.
const BLOCKS_AT: usize = 48;
const HARDWARE: [u8; 3] = [0x10, 0x11, 0x40];
const MAX_UNITS: usize = 8;

/// An IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Address of its registers.
    pub registers: u64,
    /// The function of PCI that it is.
    pub function: DeviceId,
}

/// All IOMMUs that an IVRS table tells of. The table is firmware's: what is odd is left out.
pub fn units(ivrs: &[u8]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut rest = ivrs.get(BLOCKS_AT..).unwrap_or_default();
    while let [kind, _, low, high, ..] = *rest {
        let length = usize::from(u16::from_le_bytes([low, high]));
        let Some((block, later)) = rest.split_at_checked(length).filter(|_| length >= 4) else { break };
        if let Some(registers) = block.get(8..16).filter(|_| HARDWARE.contains(&kind)) {
            let at = registers.iter().rev().fold(0, |at, byte| at << 8 | u64::from(*byte));
            // Several blocks, of later kinds, tell of one unit.
            let known = units.iter().any(|unit| unit.registers == at);
            if at != 0 && at.is_multiple_of(PAGE) && !known && units.len() < MAX_UNITS {
                let function = DeviceId(u16::from_le_bytes([block[4], block[5]]));
                units.push(Unit { registers: at, function });
            }
        }
        rest = later;
    }
    units
}

/// A device as the IOMMU numbers it: bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId(pub u16);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}:{:02x}.{}", self.0 >> 8, self.0 >> 3 & 31, self.0 & 7)
    }
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

/// The device table and the page tables behind it.
pub struct Tables {
    devices: Box<[Table]>,
    root: u64,
    /// By physical address, which is their own.
    pages: BTreeMap<u64, Box<Table>>,
}

impl Tables {
    /// For buses up to `last_bus`; no device reaches anything.
    pub fn new(last_bus: u8) -> Self {
        let tables = (0..(usize::from(last_bus) + 1) * PAGES_PER_BUS).map(|_| Table([0; 512]));
        let mut tables = Self { devices: tables.collect(), root: 0, pages: BTreeMap::new() };
        tables.root = tables.new_page();
        // Translated by tables that map nothing.
        let empty = tables.new_page();
        tables.devices.iter_mut().for_each(|page| {
            page.0
                .chunks_exact_mut(ENTRY_WORDS)
                .for_each(|entry| entry.copy_from_slice(&device_entry(empty)));
        });
        tables
    }

    fn new_page(&mut self) -> u64 {
        let table = Box::new(Table([NOTHING; 512]));
        let at = (&raw const *table).expose_provenance() as u64;
        self.pages.insert(at, table);
        at
    }

    /// Lets `device` reach what is mapped; `false`: it is on no bus of the table.
    pub fn grant(&mut self, device: DeviceId) -> bool {
        let at = usize::from(device.0) * ENTRY_WORDS;
        let entry =
            self.devices.get_mut(at / 512).and_then(|page| page.0.get_mut(at % 512..at % 512 + ENTRY_WORDS));
        entry.map(|entry| entry.copy_from_slice(&device_entry(self.root))).is_some()
    }

    /// Maps whole pages one to one.
    pub fn map(&mut self, range: Range<u64>) {
        for page in range.step_by(PAGE as usize) {
            let mut table = self.root;
            for level in (2..=LEVELS).rev() {
                let entry = self.entry(table, page, level);
                table = if entry & PRESENT != 0 {
                    entry & ADDRESS
                } else {
                    let next = self.new_page();
                    self.set(table, page, level, next | (level - 1) << NEXT_LEVEL | PRESENT | READ | WRITE);
                    next
                };
            }
            self.set(table, page, 1, page | PRESENT | READ | WRITE);
        }
    }

    fn index(address: u64, level: u64) -> usize {
        (address >> (3 + 9 * level) & 511) as usize
    }

    fn entry(&self, table: u64, address: u64, level: u64) -> u64 {
        self.pages.get(&table).map_or(0, |t| t.0[Self::index(address, level)])
    }

    fn set(&mut self, table: u64, address: u64, level: u64, entry: u64) {
        if let Some(table) = self.pages.get_mut(&table) {
            table.0[Self::index(address, level)] = entry;
        }
    }

    /// Where an access of `device` to `address` goes; `None`: to a fault.
    pub fn translate(&self, device: DeviceId, address: u64) -> Option<u64> {
        let at = usize::from(device.0) * ENTRY_WORDS;
        let mut entry = *self.devices.get(at / 512)?.0.get(at % 512)?;
        for level in (1..=LEVELS).rev() {
            if entry & PRESENT == 0 || address >> (12 + 9 * LEVELS) != 0 {
                return None;
            }
            entry = self.entry(entry & ADDRESS, address, level);
        }
        (entry & PRESENT != 0).then_some(entry & ADDRESS | address & (PAGE - 1))
    }

    /// The device table's register (3.4.1): where it is, and its pages less one.
    pub fn device_register(&self) -> u64 {
        (self.devices.as_ptr().expose_provenance() as u64) | (self.devices.len() as u64 - 1)
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        (self.devices.len() + self.pages.len()) as u64 * PAGE
    }
}

/// Translated by the tables at `root`; interrupts pass.
fn device_entry(root: u64) -> [u64; ENTRY_WORDS] {
    [root | V | TV | LEVELS << NEXT_LEVEL | READ | WRITE, DOMAIN, 0, 0]
}

/// Commands (2.4).
pub mod command {
    use super::{DOMAIN, DeviceId};

    /// Forget a device's entry.
    pub fn invalidate_device(device: DeviceId) -> [u64; 2] {
        [2 << 60 | u64::from(device.0), 0]
    }
    /// Forget all translations.
    pub fn invalidate_pages() -> [u64; 2] {
        // All addresses, tables as well.
        [3 << 60 | DOMAIN << 32, 0x7FFF_FFFF_FFFF_F000 | 0b11]
    }
    /// Write `value` to `at`, a multiple of 8, when all before is done.
    pub fn completion(at: u64, value: u64) -> [u64; 2] {
        [1 << 60 | at | 1, value]
    }
}

/// An entry of the event log (2.5), for people.
pub struct Event(pub [u64; 2]);

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (device, code) = (DeviceId(self.0[0] as u16), self.0[0] >> 60);
        let write = self.0[0] >> (32 + 21) & 1 != 0;
        match code {
            2 if write => write!(f, "device {device} was kept from writing to {:#x}", self.0[1]),
            2 => write!(f, "device {device} was kept from reading {:#x}", self.0[1]),
            _ => write!(f, "event {code} of device {device}: {:#x} {:#x}", self.0[0], self.0[1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn ivrs(blocks: &[(u8, u16, u64)]) -> Vec<u8> {
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

    #[test]
    fn units_are_found_once() {
        let table =
            ivrs(&[(0x10, 40, 0xFED8_0000), (0x20, 32, 7), (0x11, 48, 0xFED8_0000), (0x40, 40, 0xFEB8_0000)]);
        let unit = |registers| Unit { registers, function: DeviceId(2) };
        assert_eq!(units(&table), [unit(0xFED8_0000), unit(0xFEB8_0000)]);
    }

    #[test]
    fn what_is_odd_is_left_out() {
        let table = ivrs(&[(0x10, 40, 0xFED8_0000)]);
        for end in 0..table.len() {
            assert_eq!(units(&table[..end]), [], "cut at {end}");
        }
        for odd in [
            (0x10, 40, 0),
            (0x10, 40, 0xFED8_0004),
            (0x10, 0, 0xFED8_0000),
            (0x10, 3, 0xFED8_0000),
            (0x10, 12, 4096),
        ] {
            assert_eq!(units(&ivrs(&[odd])), [], "{odd:x?}");
        }
        let many: Vec<_> = (1..100).map(|n| (0x10, 24, n * PAGE)).collect();
        assert_eq!(units(&ivrs(&many)).len(), MAX_UNITS);
        assert_eq!(units(&[0xFF; 300]), []);
    }

    #[test]
    fn a_device_reaches_what_it_was_granted() {
        let mut tables = Tables::new(1);
        tables.map(0x3FFF_E000..0x4000_2000);
        let (disk, other) = (DeviceId(0x0118), DeviceId(0x0020));
        assert!(tables.grant(disk) && !tables.grant(DeviceId(0x0200)));
        for at in [0x3FFF_E000, 0x3FFF_FFFF, 0x4000_0000, 0x4000_1FFF] {
            assert_eq!(
                (tables.translate(disk, at), tables.translate(other, at)),
                (Some(at), None),
                "{at:#x}"
            );
        }
        for at in [0, 0x3FFF_DFFF, 0x4000_2000, 0x80_3FFF_E000, u64::MAX] {
            assert_eq!(tables.translate(disk, at), None, "{at:#x}");
        }
        assert_eq!(tables.translate(DeviceId(0xFFFF), 0x4000_0000), None);
        assert_eq!((tables.device_register() & 0x1FF, tables.bytes() / PAGE), (3, 4 + 2 + 4));
    }

    #[test]
    fn commands_and_events_have_their_form() {
        assert_eq!(command::invalidate_device(DeviceId(0x18)), [0x2000_0000_0000_0018, 0]);
        assert_eq!(command::invalidate_pages(), [0x3000_0001_0000_0000, 0x7FFF_FFFF_FFFF_F003]);
        assert_eq!(command::completion(0x1238, 7), [0x1000_0000_0000_1239, 7]);
        let fault = Event([2 << 60 | 1 << 53 | 0x0118, 0x1234]);
        assert_eq!(fault.to_string(), "device 01:03.0 was kept from writing to 0x1234");
        assert_eq!(
            Event([1 << 60 | 0x18, 5]).to_string(),
            "event 1 of device 00:03.0: 0x1000000000000018 0x5"
        );
    }
}
