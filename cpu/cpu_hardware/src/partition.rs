//! What the vCPUs of a partition share, whatever kind of processor runs them.

use crate::exit::Counts;
use crate::ground::Ground;
use crate::nested::{Format, NestedTables};
use crate::tsc::TscOffset;
use alloc::string::ToString;
use hypervisor::{EngineError, GuestRam, PartitionLayout};

/// See the module's header.
pub struct GuestShare {
    /// Guest RAM, which the tables name: dropped after them.
    pub tables: NestedTables,
    _ram: GuestRam,
    /// How many vCPUs there are.
    pub vcpus: u32,
    /// Their TSC.
    pub tsc: TscOffset,
    /// What their exits were.
    pub exits: Counts,
}

impl GuestShare {
    /// Maps the partition's RAM, and nothing else.
    pub fn new(
        ground: &dyn Ground,
        layout: &PartitionLayout,
        format: Format,
        huge_pages: bool,
    ) -> Result<Self, EngineError> {
        let physical = ground.physical();
        let mut tables = NestedTables::new(physical, format, huge_pages);
        let base = physical(layout.ram.host_base().addr());
        for region in layout.ram.regions() {
            tables
                .map(region.gpa, base + region.offset, region.bytes)
                .map_err(|error| EngineError::Host(error.to_string()))?;
        }
        let native = ground.tsc_khz() == layout.tsc_khz && layout.clock.rate() == (1, 1);
        Ok(Self {
            tables,
            _ram: layout.ram.clone(),
            vcpus: layout.vcpus,
            tsc: TscOffset::new(native),
            exits: Counts::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Nowhere, layout};

    #[test]
    fn the_tables_map_guest_ram() {
        let layout = layout(2_000_000);
        let share = GuestShare::new(&Nowhere::default(), &layout, Format::Ept, false).unwrap();
        let base = layout.ram.host_base().addr() as u64;
        assert_eq!(share.tables.lookup(0x5123).map(|found| found.0), Some(base + 0x5123));
        assert_eq!(share.tables.lookup(0x10_0000), None);
        assert!(share.tsc.native && share.vcpus == 3);
        let other = PartitionLayout { tsc_khz: 1_000_000, ..layout };
        let share = GuestShare::new(&Nowhere::default(), &other, Format::Npt, false).unwrap();
        assert!(!share.tsc.native, "another rate than the processor's");
    }
}
