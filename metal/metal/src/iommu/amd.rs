//! AMD's IOMMU (AMD I/O Virtualization Technology Specification, 48882, rev. 3.08): its tables, commands and events.
//!
//! Called by: [`crate::arch::iommu`], which has the registers.
//!
//! Invariants: a device reaches the one range that was granted, if it was granted to it, and otherwise nothing.

use super::pages::{Format, NEXT_LEVEL, PageTables};
use super::{DOMAIN, DeviceId, Kept, MAX_UNITS, PAGE, Table};
use alloc::boxed::Box;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

/// Device numbers of one bus take this many pages of the device table.
const PAGES_PER_BUS: usize = 2;
const ENTRY_WORDS: usize = 4;
/// Levels of page tables: 512 GiB.
const LEVELS: u64 = 3;
/// Device table entry (2.2.2.1): valid, translation valid, readable, writable.
const V: u64 = 1;
const TV: u64 = 1 << 1;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;

/// IVRS (5.2): these kinds of blocks describe an IOMMU: its own function is at offset 4.
const HARDWARE: [u8; 3] = [0x10, 0x11, 0x40];

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
    for block in super::blocks(ivrs).filter(|block| HARDWARE.contains(&block[0])) {
        let Some(registers) = super::registers(block) else { continue };
        // Several blocks, of later kinds, tell of one unit.
        if units.iter().all(|unit| unit.registers != registers) && units.len() < MAX_UNITS {
            let function = DeviceId(u16::from_le_bytes([block[4], block[5]]));
            units.push(Unit { registers, function });
        }
    }
    units
}

/// The device table and the page tables behind it.
pub struct Tables {
    devices: Box<[Table]>,
    pages: PageTables,
    /// Maps nothing: for all devices that nothing was granted to.
    nothing: PageTables,
}

impl Tables {
    /// For buses up to `last_bus`; no device reaches anything.
    pub fn new(last_bus: u8) -> Self {
        let [pages, nothing] = [(); 2].map(|()| PageTables::new(Format::Amd, LEVELS));
        let entry = device_entry(nothing.root());
        let table = || Table(core::array::from_fn(|n| entry[n % ENTRY_WORDS]));
        let devices = (0..(usize::from(last_bus) + 1) * PAGES_PER_BUS).map(|_| table());
        Self { devices: devices.collect(), pages, nothing }
    }

    /// Lets `device` reach what is mapped; `false`: it is on no bus of the table.
    pub fn grant(&mut self, device: DeviceId) -> bool {
        let at = usize::from(device.0) * ENTRY_WORDS;
        let entry =
            self.devices.get_mut(at / 512).and_then(|page| page.0.get_mut(at % 512..at % 512 + ENTRY_WORDS));
        entry.map(|entry| entry.copy_from_slice(&device_entry(self.pages.root()))).is_some()
    }

    /// Maps whole pages one to one.
    pub fn map(&mut self, range: Range<u64>) {
        self.pages.map(range);
    }

    /// Where an access of `device` to `address` goes; `None`: to a fault.
    pub fn translate(&self, device: DeviceId, address: u64) -> Option<u64> {
        let at = usize::from(device.0) * ENTRY_WORDS;
        let entry = self.devices.get(at / 512)?.0.get(at % 512..at % 512 + ENTRY_WORDS)?;
        let granted = *entry == device_entry(self.pages.root());
        if granted { &self.pages } else { &self.nothing }.translate(address)
    }

    /// The device table's register (3.4.1): where it is, and its pages less one.
    pub fn device_register(&self) -> u64 {
        (self.devices.as_ptr().expose_provenance() as u64) | (self.devices.len() as u64 - 1)
    }

    /// Bytes that the tables take.
    pub fn bytes(&self) -> u64 {
        self.devices.len() as u64 * PAGE + self.pages.bytes() + self.nothing.bytes()
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
        match code {
            2 => Kept { device, write: self.0[0] >> (32 + 21) & 1 != 0, address: self.0[1] }.fmt(f),
            _ => write!(f, "event {code} of device {device}: {:#x} {:#x}", self.0[0], self.0[1]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{firmware_table, leaves_out_what_is_odd};
    use super::*;
    use std::string::ToString;

    #[test]
    fn units_are_found_once() {
        let table = firmware_table(&[
            (0x10, 40, 0xFED8_0000),
            (0x20, 32, 7),
            (0x11, 48, 0xFED8_0000),
            (0x40, 40, 0xFEB8_0000),
        ]);
        let unit = |registers| Unit { registers, function: DeviceId(2) };
        assert_eq!(units(&table), [unit(0xFED8_0000), unit(0xFEB8_0000)]);
        for kind in HARDWARE {
            leaves_out_what_is_odd(kind, |ivrs| units(ivrs).iter().map(|unit| unit.registers).collect());
        }
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
