//! Round trip: tables loaded by their fix-ups must be found and must sum to zero.

use super::*;
use alloc::vec;
use machine_spec::layout::RSDP_AREA;

const MIB: u64 = 1 << 20;

fn loaded(ram_mib: u64, cpus: &[AcpiCpu]) -> (LoadedTables, RamLayout) {
    let layout = RamLayout::new(ram_mib * MIB).expect("layout");
    let config = AcpiConfig { layout: &layout, cpus, uarts: &[0, 1], i8042_keyboard: true };
    (build(&config).load(&layout).expect("load"), layout)
}

fn cpus(count: u32) -> Vec<AcpiCpu> {
    (0..count).map(|apic_id| AcpiCpu { apic_id, present: apic_id % 2 == 0 }).collect()
}

/// Bytes at a guest-physical address, from the segments.
fn read(tables: &LoadedTables, at: u64, len: usize) -> &[u8] {
    for segment in &tables.segments {
        if let Some(offset) = at.checked_sub(segment.gpa.0)
            && let Some(bytes) = segment.bytes.get(offset as usize..offset as usize + len)
        {
            return bytes;
        }
    }
    panic!("{at:#x} is not loaded");
}

fn u32_at(tables: &LoadedTables, at: u64) -> u32 {
    u32::from_le_bytes(read(tables, at, 4).try_into().expect("4"))
}

fn u64_at(tables: &LoadedTables, at: u64) -> u64 {
    u64::from_le_bytes(read(tables, at, 8).try_into().expect("8"))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// Checks a table's checksum and gives its signature.
fn check_table(tables: &LoadedTables, at: u64) -> [u8; 4] {
    let len = u32_at(tables, at + 4) as usize;
    assert_eq!(sum(read(tables, at, len)), 0, "table at {at:#x}");
    read(tables, at, 4).try_into().expect("4")
}

#[test]
fn every_table_is_reached_from_the_rsdp() {
    for (ram, count) in [(16, 1), (3072, 3), (8192, 300)] {
        let (tables, layout) = loaded(ram, &cpus(count));
        assert_eq!(tables.rsdp, RSDP_AREA.start);
        let rsdp = tables.rsdp.0;
        assert_eq!(read(&tables, rsdp, 8), b"RSD PTR ");
        assert_eq!((sum(read(&tables, rsdp, 20)), sum(read(&tables, rsdp, 36))), (0, 0));
        let xsdt = u64_at(&tables, rsdp + 24);
        assert_eq!(&check_table(&tables, xsdt), b"XSDT");
        let count = (u32_at(&tables, xsdt + 4) as u64 - 36) / 8;
        let listed: Vec<u64> = (0..count).map(|i| u64_at(&tables, xsdt + 36 + i * 8)).collect();
        let signatures: Vec<[u8; 4]> = listed.iter().map(|at| check_table(&tables, *at)).collect();
        assert_eq!(signatures, [*b"FACP", *b"APIC", *b"HPET", *b"MCFG"]);
        let fadt = listed[0];
        assert_eq!(u32_at(&tables, fadt + 4), 276);
        let dsdt = u64_at(&tables, fadt + 140);
        assert_eq!(u64::from(u32_at(&tables, fadt + 40)), dsdt);
        assert_eq!(&check_table(&tables, dsdt), b"DSDT");
        let facs = u64::from(u32_at(&tables, fadt + 36));
        assert_eq!((read(&tables, facs, 4), facs % 64), (&b"FACS"[..], 0));
        assert!(layout.acpi_nvs().start.0 == facs && facs % 64 == 0);
        assert!(
            listed.iter().all(|at| (layout.acpi_tables().start.0..layout.acpi_nvs().start.0).contains(at))
        );
    }
}

#[test]
fn madt_names_every_processor() {
    let body = tables::madt(&cpus(300));
    let (mut at, mut local, mut x2apic, mut overrides) = (8, 0u32, 0u32, vec![]);
    while at < body.len() {
        match body[at] {
            0 => local += 1,
            9 => {
                x2apic += 1;
                assert!(u32::from_le_bytes(body[at + 4..at + 8].try_into().expect("4")) >= 255);
            }
            2 => overrides.push((body[at + 3], body[at + 4], body[at + 8])),
            _ => {}
        }
        at += usize::from(body[at + 1]);
    }
    assert_eq!((at, local, x2apic), (body.len(), 255, 45));
    assert_eq!(overrides, [(0, 2, 0), (9, 9, 0x0D)]);
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let layout = RamLayout::new(64 * MIB).expect("layout");
    let config = AcpiConfig { layout: &layout, cpus: &cpus(1), uarts: &[0], i8042_keyboard: false };
    let mut tables = build(&config);
    tables.blobs[1].bytes.resize(2 << 20, 0);
    assert!(matches!(tables.load(&layout), Err(LoadTablesError::NoRoom { kind: BlobKind::Tables, .. })));
    let mut tables = build(&config);
    tables.fixups.push(Fixup::AddChecksum { blob: BlobKind::Rsdp, offset: 36, start: 0, len: 1 });
    assert!(matches!(tables.load(&layout), Err(LoadTablesError::Fixup { offset: 36, .. })));
    let mut tables = build(&config);
    let blob = BlobKind::Facs;
    tables.fixups.push(Fixup::AddPointer { blob, offset: usize::MAX, size: 8, target: blob });
    assert!(matches!(tables.load(&layout), Err(LoadTablesError::Fixup { .. })));
}
