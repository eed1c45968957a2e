//! ACPI tables that describe the board to the guest.
//!
//! Called by `machine` with the layout and what is present; gives relocatable blobs (see
//! `loader`). ACPI 6.3; table revisions are those that `iasl` of the distributions knows.

mod aml;
mod dsdt;
mod loader;
mod tables;

pub use loader::{AcpiTables, Blob, BlobKind, Fixup, LoadTablesError, LoadedTables};

use alloc::vec::Vec;
use machine_spec::layout::RamLayout;
use tables::Builder;

/// A processor that the guest may ever see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiCpu {
    /// Its local APIC's number.
    pub apic_id: u32,
    /// There now; otherwise it may come later.
    pub present: bool,
}

/// What the tables say beyond the fixed board.
#[derive(Clone, Debug)]
pub struct AcpiConfig<'a> {
    /// The address map.
    pub layout: &'a RamLayout,
    /// All processors, present and possible; the processor's ACPI UID is its index.
    pub cpus: &'a [AcpiCpu],
    /// Which of COM1 to COM4 exist (0 is COM1).
    pub uarts: &'a [u8],
    /// A keyboard controller with a keyboard; false if it only resets.
    pub i8042_keyboard: bool,
}

/// Builds all tables.
pub fn build(config: &AcpiConfig<'_>) -> AcpiTables {
    let mut builder = Builder::new();
    let facs = builder.facs();
    let dsdt = builder.table(b"DSDT", 2, &dsdt::build(config));
    let fadt = builder.fadt(dsdt, facs, config.i8042_keyboard);
    let madt = builder.table(b"APIC", 5, &tables::madt(config.cpus));
    let hpet = builder.table(b"HPET", 1, &tables::hpet());
    let mcfg = builder.table(b"MCFG", 1, &tables::mcfg());
    let listed: Vec<usize> = [fadt, madt, hpet, mcfg].into();
    builder.finish(&listed)
}

#[cfg(test)]
mod tests;
