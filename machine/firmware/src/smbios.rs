//! SMBIOS: what management tools in the guest show of the machine.
//!
//! Called by `machine` with the spec; gives the 64-bit entry point and the structures as one segment
//! in the area that guests search. Minimal: types 0, 1, 3, 4, 16, 17, 19, 32, 127. The firmware is
//! named, and says that this is a virtual machine; host facts never appear. SMBIOS 3.2 (DSP0134).

use crate::Segment;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use machine_spec::Uuid;
use machine_spec::layout::{HIGH_RAM_START, RamLayout, SMBIOS_AREA};

const VENDOR: &str = "Bedplate";
const PRODUCT: &str = "Bedplate Machine";
/// Version of what is described here, not of the program: guests must not see an update.
const BOARD_VERSION: &str = "1";
const BIOS_DATE: &str = "01/01/2026";
const ENTRY_SIZE: usize = 24;
/// Where the structures begin, after the entry point.
const STRUCTURES: u64 = SMBIOS_AREA.start.0 + 32;
const NO_HANDLE: u16 = 0xFFFE;
const UNKNOWN: u8 = 2;
const OTHER: u8 = 1;
const SAFE: u8 = 3;

/// What the structures say.
#[derive(Clone, Debug)]
pub struct SmbiosConfig<'a> {
    /// The machine's identity.
    pub uuid: Uuid,
    /// Processors present.
    pub cpus: u32,
    /// Rate of the processors.
    pub cpu_mhz: u16,
    /// The address map.
    pub layout: &'a RamLayout,
}

/// Entry point and structures.
pub fn build(config: &SmbiosConfig<'_>) -> Segment<'static> {
    let mut table = Table::default();
    bios(&mut table);
    system(&mut table, config.uuid);
    chassis(&mut table);
    processor(&mut table, config);
    memory(&mut table, config.layout);
    table.add(32, 0, &[0; 7], &[]); // boot: no error
    table.add(127, 0, &[], &[]); // end

    let mut bytes = entry_point(table.0.len() as u32);
    bytes.resize((STRUCTURES - SMBIOS_AREA.start.0) as usize, 0);
    bytes.extend_from_slice(&table.0);
    Segment { gpa: SMBIOS_AREA.start, bytes: Cow::Owned(bytes), zeros_after: 0 }
}

fn entry_point(table_size: u32) -> Vec<u8> {
    let mut entry = Vec::with_capacity(ENTRY_SIZE);
    entry.extend_from_slice(b"_SM3_");
    // Checksum, own length, version 3.2.0, entry point revision 1, reserved.
    entry.extend_from_slice(&[0, ENTRY_SIZE as u8, 3, 2, 0, 1, 0]);
    entry.extend_from_slice(&table_size.to_le_bytes());
    entry.extend_from_slice(&STRUCTURES.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

/// Structures in a row.
#[derive(Default)]
struct Table(Vec<u8>);

impl Table {
    /// A structure: header, fields, strings. The handle is type and index.
    fn add(&mut self, kind: u8, index: u8, fields: &[u8], strings: &[&str]) {
        self.0.extend_from_slice(&[kind, (fields.len() + 4) as u8]);
        self.0.extend_from_slice(&handle(kind, index).to_le_bytes());
        self.0.extend_from_slice(fields);
        for string in strings {
            self.0.extend_from_slice(string.as_bytes());
            self.0.push(0);
        }
        if strings.is_empty() {
            self.0.push(0);
        }
        self.0.push(0);
    }
}

fn handle(kind: u8, index: u8) -> u16 {
    u16::from_be_bytes([kind, index])
}

/// Little-endian fields in a row.
macro_rules! fields {
    ($($value:expr),* $(,)?) => {{
        let mut bytes = Vec::new();
        $(bytes.extend_from_slice(&$value.to_le_bytes());)*
        bytes
    }};
}

fn bios(table: &mut Table) {
    const CHARACTERISTICS_NOT_SUPPORTED: u64 = 1 << 3;
    /// ACPI in the first byte, virtual machine in the second.
    const EXTENSION: [u8; 2] = [0x01, 0x10];
    let mut fields = fields!(1u8, 2u8, 0xE000u16, 3u8, 0u8, CHARACTERISTICS_NOT_SUPPORTED);
    fields.extend_from_slice(&EXTENSION);
    fields.extend_from_slice(&[1, 0, 0xFF, 0xFF]); // release 1.0, no embedded controller
    table.add(0, 0, &fields, &[VENDOR, BOARD_VERSION, BIOS_DATE]);
}

fn system(table: &mut Table, uuid: Uuid) {
    const POWER_SWITCH: u8 = 6;
    let mut fields = fields!(1u8, 2u8, 3u8, 0u8);
    // The first three parts of a UUID are little-endian here (7.2.1).
    let mut id = uuid.0;
    id[0..4].reverse();
    id[4..6].reverse();
    id[6..8].reverse();
    fields.extend_from_slice(&id);
    fields.extend_from_slice(&[POWER_SWITCH, 0, 0]);
    table.add(1, 0, &fields, &[VENDOR, PRODUCT, BOARD_VERSION]);
}

fn chassis(table: &mut Table) {
    let states = [SAFE, SAFE, SAFE, UNKNOWN];
    let mut fields = fields!(1u8, OTHER, 0u8, 0u8, 0u8);
    fields.extend_from_slice(&states);
    fields.extend_from_slice(&fields!(0u32, 0u8, 0u8, 0u8, 0u8, 0u8));
    table.add(3, 0, &fields, &[VENDOR]);
}

fn processor(table: &mut Table, config: &SmbiosConfig<'_>) {
    const CENTRAL: u8 = 3;
    const POPULATED_ENABLED: u8 = 0x41;
    const IS_64_BIT: u16 = 1 << 2;
    const NO_CACHE: u16 = 0xFFFF;
    let cores = config.cpus.min(0xFFFE) as u16;
    // 255 says: see the wide field.
    let short = cores.min(0xFF) as u8;
    let mut fields = fields!(1u8, CENTRAL, OTHER, 2u8, 0u64, 0u8, 0u8, 0u16, config.cpu_mhz, config.cpu_mhz);
    fields.extend_from_slice(&fields!(POPULATED_ENABLED, OTHER, NO_CACHE, NO_CACHE, NO_CACHE));
    fields.extend_from_slice(&fields!(0u8, 0u8, 0u8, short, short, short, IS_64_BIT));
    fields.extend_from_slice(&fields!(u16::from(OTHER), cores, cores, cores));
    table.add(4, 0, &fields, &["CPU 0", VENDOR]);
}

/// One array with one module, and where the guest sees it.
fn memory(table: &mut Table, layout: &RamLayout) {
    const SYSTEM_MEMORY: u8 = 3;
    const NO_ECC: u8 = 3;
    const SEE_EXTENDED: u32 = 0x8000_0000;
    let bytes = layout.ram_bytes();
    let kib = u32::try_from(bytes >> 10).ok().filter(|kib| *kib < SEE_EXTENDED);
    let extended = if kib.is_some() { 0 } else { bytes };
    let capacity = kib.unwrap_or(SEE_EXTENDED);
    let array = fields!(OTHER, SYSTEM_MEMORY, NO_ECC, capacity, NO_HANDLE, 1u16, extended);
    table.add(16, 0, &array, &[]);

    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    const DETAIL_OTHER: u16 = 1 << 1;
    const UNKNOWN_WIDTH: u16 = 0xFFFF;
    const SIZE_EXTENDED: u16 = 0x7FFF;
    let mib = bytes >> 20;
    let size = u16::try_from(mib).ok().filter(|mib| *mib < SIZE_EXTENDED);
    let extended = if size.is_some() { 0 } else { mib as u32 };
    let size = size.unwrap_or(SIZE_EXTENDED);
    let mut module = fields!(handle(16, 0), NO_HANDLE, UNKNOWN_WIDTH, UNKNOWN_WIDTH, size, DIMM, 0u8);
    module.extend_from_slice(&fields!(1u8, 0u8, RAM, DETAIL_OTHER, 0u16, 2u8, 0u8, 0u8, 0u8));
    module.extend_from_slice(&fields!(0u8, extended, 0u16, 0u16, 0u16, 0u16));
    table.add(17, 0, &module, &["DIMM 0", VENDOR]);

    let high = bytes - layout.low_end();
    mapped(table, 0, 0, layout.low_end());
    if high > 0 {
        mapped(table, 1, HIGH_RAM_START, high);
    }
}

/// Type 19: the span of the array at an address, in KiB or, if that is too much, in bytes.
fn mapped(table: &mut Table, index: u8, start: u64, bytes: u64) {
    const SEE_EXTENDED: u32 = u32::MAX;
    let last = start + bytes - 1;
    let short = u32::try_from(last >> 10).ok().filter(|kib| *kib < SEE_EXTENDED);
    let fields = match short {
        Some(last_kib) => fields!((start >> 10) as u32, last_kib, handle(16, 0), 1u8, 0u64, 0u64),
        None => fields!(SEE_EXTENDED, SEE_EXTENDED, handle(16, 0), 1u8, start, last),
    };
    table.add(19, index, &fields, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::String;
    use alloc::vec;

    const GIB: u64 = 1 << 30;

    /// Type, formatted length and strings of every structure.
    fn walk(table: &[u8]) -> Vec<(u8, u8, Vec<String>)> {
        let mut found = vec![];
        let mut at = 0;
        while at < table.len() {
            let (kind, len) = (table[at], table[at + 1]);
            let mut strings = vec![];
            let mut text = at + usize::from(len);
            loop {
                let end = text + table[text..].iter().position(|byte| *byte == 0).expect("terminated");
                if end == text {
                    break;
                }
                strings.push(String::from_utf8(table[text..end].to_vec()).expect("text"));
                text = end + 1;
            }
            at = text + if strings.is_empty() { 2 } else { 1 };
            found.push((kind, len, strings));
        }
        found
    }

    #[test]
    fn structures_follow_each_other() {
        for ram in [GIB, 5 * GIB, 4096 * GIB] {
            let layout = RamLayout::new(ram).expect("layout");
            let uuid: Uuid = "00112233-4455-6677-8899-aabbccddeeff".parse().expect("uuid");
            let config = SmbiosConfig { uuid, cpus: 300, cpu_mhz: 2000, layout: &layout };
            let segment = build(&config);
            assert!(segment.bytes.len() as u64 <= SMBIOS_AREA.size);
            let entry = &segment.bytes[..ENTRY_SIZE];
            assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            assert_eq!(&entry[..5], b"_SM3_");
            let table = &segment.bytes[32..];
            assert_eq!(entry[12..16], (table.len() as u32).to_le_bytes());
            assert_eq!(entry[16..24], 0xF_0020u64.to_le_bytes());
            let found = walk(table);
            let mut kinds =
                vec![(0, 0x18), (1, 0x1B), (3, 0x16), (4, 0x30), (16, 0x17), (17, 0x28), (19, 0x1F)];
            if ram > 3 * GIB {
                kinds.push((19, 0x1F));
            }
            kinds.extend([(32, 0x0B), (127, 0x04)]);
            assert_eq!(found.iter().map(|(kind, len, _)| (*kind, *len)).collect::<Vec<_>>(), kinds);
            assert_eq!(found[0].2, ["Bedplate", "1", "01/01/2026"]);
            let mixed =
                [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xAA, 0xBB, 0xCC, 0xDD, 0xEE, 0xFF];
            assert!(table.windows(16).any(|window| window == mixed));
        }
    }
}
