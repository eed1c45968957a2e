//! The tables other than the DSDT, and the builder that strings them into blobs.
//!
//! Called by `acpi::build`. ACPI 6.3 section 5.2; MCFG: PCI Firmware Specification 3.2, 4.1.2;
//! HPET: IA-PC HPET 1.0a, 3.2.4.

use super::AcpiCpu;
use super::loader::{AcpiTables, Blob, BlobKind, Fixup};
use alloc::vec;
use alloc::vec::Vec;
use machine_spec::layout::{ECAM, ECAM_BUSES, HPET, IOAPIC, LAPIC, irq, port, power};

const OEM_ID: &[u8; 6] = b"BEDPLT";
const OEM_TABLE_ID: &[u8; 8] = b"BEDPLATE";
const CREATOR_ID: &[u8; 4] = b"BEDP";
const HEADER: usize = 36;
const CHECKSUM: usize = 9;
const RSDP_SIZE: usize = 36;
const FACS_SIZE: usize = 64;

/// Collects tables in one blob; a table is named by its offset there.
pub(super) struct Builder {
    tables: Vec<u8>,
    facs: Vec<u8>,
    fixups: Vec<Fixup>,
}

/// Little-endian fields in a row.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u8(&mut self, value: u8) -> &mut Self {
        self.bytes(&[value])
    }
    fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// Generic address structure of an I/O port block; `access` is the access size code.
    fn io(&mut self, address: u16, bytes: u8, access: u8) -> &mut Self {
        self.u8(1).u8(bytes * 8).u8(0).u8(access).u64(address.into())
    }
    /// Generic address structure of nothing.
    fn no_address(&mut self) -> &mut Self {
        self.bytes(&[0; 12])
    }
}

impl Builder {
    pub fn new() -> Self {
        Self { tables: Vec::new(), facs: Vec::new(), fixups: Vec::new() }
    }

    /// Appends a table with the common header; its checksum is computed last.
    pub fn table(&mut self, signature: &[u8; 4], revision: u8, body: &[u8]) -> usize {
        self.tables.resize(self.tables.len().next_multiple_of(8), 0);
        let at = self.tables.len();
        let mut header = Fields::default();
        header.bytes(signature).u32((HEADER + body.len()) as u32).u8(revision).u8(0);
        header.bytes(OEM_ID).bytes(OEM_TABLE_ID).u32(1).bytes(CREATOR_ID).u32(1);
        self.tables.extend_from_slice(&header.0);
        self.tables.extend_from_slice(body);
        at
    }

    /// The FACS has a blob of its own, because the guest writes into it.
    pub fn facs(&mut self) -> usize {
        let mut facs = Fields::default();
        facs.bytes(b"FACS").u32(FACS_SIZE as u32);
        self.facs = facs.0;
        self.facs.resize(FACS_SIZE, 0);
        self.facs[32] = 2; // version
        0
    }

    /// Remembers that the field at `offset` of the tables points into `target`.
    fn pointer(&mut self, offset: usize, size: usize, target: BlobKind) {
        self.fixups.push(Fixup::AddPointer { blob: BlobKind::Tables, offset, size, target });
    }

    /// The fixed description: power management ports, interrupts, boot architecture.
    pub fn fadt(&mut self, dsdt: usize, facs: usize, i8042: bool) -> usize {
        let body = fadt_body(dsdt, facs, i8042);
        let at = self.table(b"FACP", 6, &body);
        self.pointer(at + 36, 4, BlobKind::Facs);
        self.pointer(at + 40, 4, BlobKind::Tables);
        self.pointer(at + 140, 8, BlobKind::Tables);
        at
    }

    /// XSDT over `listed` tables, RSDP, checksums.
    pub fn finish(mut self, listed: &[usize]) -> AcpiTables {
        let mut entries = Fields::default();
        for table in listed {
            entries.u64(*table as u64);
        }
        let xsdt = self.table(b"XSDT", 1, &entries.0);
        for index in 0..listed.len() {
            self.pointer(xsdt + HEADER + index * 8, 8, BlobKind::Tables);
        }
        self.checksum_tables();

        let mut rsdp = Fields::default();
        rsdp.bytes(b"RSD PTR ").u8(0).bytes(OEM_ID).u8(2).u32(0);
        rsdp.u32(RSDP_SIZE as u32).u64(xsdt as u64).u8(0).bytes(&[0; 3]);
        let blob = BlobKind::Rsdp;
        self.fixups.push(Fixup::AddPointer { blob, offset: 24, size: 8, target: BlobKind::Tables });
        self.fixups.push(Fixup::AddChecksum { blob, offset: 8, start: 0, len: 20 });
        self.fixups.push(Fixup::AddChecksum { blob, offset: 32, start: 0, len: RSDP_SIZE });
        let blobs = vec![
            Blob { kind: BlobKind::Rsdp, bytes: rsdp.0, align: 16 },
            Blob { kind: BlobKind::Tables, bytes: self.tables, align: 64 },
            Blob { kind: BlobKind::Facs, bytes: self.facs, align: 64 },
        ];
        AcpiTables { blobs, fixups: self.fixups }
    }

    /// One checksum for each table, walking by the lengths in their headers.
    fn checksum_tables(&mut self) {
        let mut at = 0;
        while let Some(field) = self.tables.get(at + 4..at + 8) {
            let len = field.iter().rev().fold(0, |len, byte| len << 8 | usize::from(*byte));
            let blob = BlobKind::Tables;
            self.fixups.push(Fixup::AddChecksum { blob, offset: at + CHECKSUM, start: at, len });
            at = (at + len).next_multiple_of(8);
        }
    }
}

/// FADT flags (5.2.9, table 5-35).
mod fadt_flag {
    pub const WBINVD: u32 = 1 << 0;
    pub const C1_ON_ALL: u32 = 1 << 2;
    pub const NO_FIXED_SLEEP_BUTTON: u32 = 1 << 5;
    pub const NO_FIXED_RTC_WAKE: u32 = 1 << 6;
    pub const TIMER_IS_32_BIT: u32 = 1 << 8;
    pub const RESET_REGISTER: u32 = 1 << 10;
}

/// IA-PC boot architecture flags (5.2.9.3).
mod boot_flag {
    pub const LEGACY_DEVICES: u16 = 1 << 0;
    pub const I8042: u16 = 1 << 1;
    pub const NO_VGA: u16 = 1 << 2;
}

fn fadt_body(dsdt: usize, facs: usize, i8042: bool) -> Vec<u8> {
    use fadt_flag::*;
    let mut f = Fields::default();
    f.u32(facs as u32).u32(dsdt as u32).u8(0).u8(0); // reserved, profile: unspecified
    f.u16(irq::SCI.into()).u32(0).u8(0).u8(0).u8(0).u8(0); // no SMI command: always in ACPI mode
    f.u32(port::PM1A_EVENT.into()).u32(0).u32(port::PM1A_CONTROL.into()).u32(0).u32(0);
    f.u32(port::PM_TIMER.into()).u32(port::GPE0.into()).u32(0);
    f.u8(4).u8(2).u8(0).u8(4).u8(port::GPE0_SIZE).u8(0).u8(0).u8(0); // block lengths
    f.u16(0xFFF).u16(0xFFF); // no C2, no C3
    f.u16(0).u16(0).u8(0).u8(0); // flush, duty
    f.u8(0).u8(0).u8(power::RTC_CENTURY);
    let keyboard = if i8042 { boot_flag::I8042 } else { 0 };
    f.u16(boot_flag::LEGACY_DEVICES | boot_flag::NO_VGA | keyboard).u8(0);
    f.u32(WBINVD | C1_ON_ALL | NO_FIXED_SLEEP_BUTTON | NO_FIXED_RTC_WAKE | TIMER_IS_32_BIT | RESET_REGISTER);
    f.io(port::RESET, 1, 1).u8(power::RESET_VALUE);
    f.u16(0).u8(3); // ARM flags, minor revision
    f.u64(0).u64(dsdt as u64); // FIRMWARE_CTRL is the 32-bit one
    f.io(port::PM1A_EVENT, 4, 2).no_address();
    f.io(port::PM1A_CONTROL, 2, 2).no_address().no_address();
    f.io(port::PM_TIMER, 4, 3);
    f.io(port::GPE0, port::GPE0_SIZE, 1).no_address();
    f.no_address().no_address(); // sleep control and status: reduced hardware only
    f.u64(0); // hypervisor vendor identity
    f.0
}

/// Interrupt controllers (5.2.12).
pub(super) fn madt(cpus: &[AcpiCpu]) -> Vec<u8> {
    const PCAT_COMPATIBLE: u32 = 1;
    const ENABLED: u32 = 1;
    const ONLINE_CAPABLE: u32 = 2;
    const ALL_BYTE: u8 = 0xFF;
    /// From here on an APIC number does not fit the 8-bit entry (255 is the broadcast).
    const FIRST_X2APIC: u32 = 255;
    const LEVEL_HIGH: u16 = 0x000D;
    const NMI_LINT: u8 = 1;

    let mut m = Fields::default();
    m.u32(LAPIC.start.0 as u32).u32(PCAT_COMPATIBLE);
    for (uid, cpu) in cpus.iter().enumerate() {
        let flags = if cpu.present { ENABLED } else { ONLINE_CAPABLE };
        if cpu.apic_id < FIRST_X2APIC && uid < usize::from(ALL_BYTE) {
            m.u8(0).u8(8).u8(uid as u8).u8(cpu.apic_id as u8).u32(flags);
        } else {
            m.u8(9).u8(16).u16(0).u32(cpu.apic_id).u32(flags).u32(uid as u32);
        }
    }
    m.u8(1).u8(12).u8(0).u8(0).u32(IOAPIC.start.0 as u32).u32(0);
    m.u8(2).u8(10).u8(0).u8(irq::TIMER).u32(irq::TIMER_GSI).u16(0);
    m.u8(2).u8(10).u8(0).u8(irq::SCI).u32(irq::SCI.into()).u16(LEVEL_HIGH);
    m.u8(4).u8(6).u8(ALL_BYTE).u16(0).u8(NMI_LINT);
    if cpus.iter().any(|cpu| cpu.apic_id >= FIRST_X2APIC) {
        m.u8(10).u8(12).u16(0).u32(u32::MAX).u8(NMI_LINT).bytes(&[0; 3]);
    }
    m.0
}

/// High precision event timer.
pub(super) fn hpet() -> Vec<u8> {
    /// Revision 1, three comparators, 64-bit counter, legacy replacement, vendor 8086h: as the
    /// capability register says.
    const BLOCK_ID: u32 = 0x8086_A201;
    let mut h = Fields::default();
    h.u32(BLOCK_ID).u8(0).u8(64).u8(0).u8(0).u64(HPET.start.0); // memory, 64 bits wide
    h.u8(0).u16(0x80).u8(0); // number, least periodic tick, page protection
    h.0
}

/// PCI Express configuration space.
pub(super) fn mcfg() -> Vec<u8> {
    let mut m = Fields::default();
    m.u64(0).u64(ECAM.start.0).u16(0).u8(0).u8((ECAM_BUSES - 1) as u8).u32(0);
    m.0
}
