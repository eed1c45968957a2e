//! Physical memory: the map that firmware gave, and what of it is free.
//!
//! Called by: [`crate::start`] (image, modules and tables are taken out first), then by whoever needs whole pages:
//! heap and guest RAM. Nothing here dereferences anything.
//!
//! Invariants: a page is handed out once; the first MiB never is (firmware's, and where application processors start).

/// What a range is (ACPI 6.5, 15.1: E820).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemoryKind {
    /// RAM.
    Usable,
    /// Firmware's or hardware's.
    #[default]
    Reserved,
    /// ACPI tables: RAM once they were read.
    AcpiTables,
    /// ACPI's non-volatile storage.
    AcpiStorage,
    /// Broken RAM.
    Unusable,
}

impl MemoryKind {
    /// From E820's number; those that are not known are not ours.
    pub fn from_e820(number: u32) -> Self {
        match number {
            1 => Self::Usable,
            3 => Self::AcpiTables,
            4 => Self::AcpiStorage,
            5 => Self::Unusable,
            _ => Self::Reserved,
        }
    }

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Usable => "usable",
            Self::Reserved => "reserved",
            Self::AcpiTables => "ACPI tables",
            Self::AcpiStorage => "ACPI storage",
            Self::Unusable => "broken",
        }
    }
}

/// A range of the map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// Length.
    pub bytes: u64,
    /// What it is.
    pub kind: MemoryKind,
}

impl MemoryRange {
    /// First byte behind it; the last address if it wraps.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }
}

/// Firmware's map, before there is a heap.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    ranges: [MemoryRange; Self::MAX_RANGES],
    count: usize,
}

impl Default for MemoryMap {
    fn default() -> Self {
        Self { ranges: [MemoryRange::default(); Self::MAX_RANGES], count: 0 }
    }
}

impl MemoryMap {
    /// Most ranges that are kept.
    pub const MAX_RANGES: usize = 128;

    /// Adds one; what finds no room or is empty is left out.
    pub fn add(&mut self, range: MemoryRange) {
        if range.bytes > 0 && self.count < Self::MAX_RANGES {
            self.ranges[self.count] = range;
            self.count += 1;
        }
    }

    /// The ranges in firmware's order.
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges[..self.count]
    }

    /// Bytes of RAM.
    pub fn usable_bytes(&self) -> u64 {
        let usable = self.ranges().iter().filter(|r| r.kind == MemoryKind::Usable);
        usable.fold(0, |sum: u64, r| sum.saturating_add(r.bytes))
    }

    /// First address behind all RAM and tables: as far as memory is mapped.
    pub fn top(&self) -> u64 {
        let known = self.ranges().iter().filter(|r| r.kind != MemoryKind::Reserved);
        known.map(MemoryRange::end).max().unwrap_or(0)
    }
}

const PAGE: u64 = 4096;
/// Below this nothing is handed out.
const FIRST_FREE: u64 = 1 << 20;
/// Most pieces that free memory is in.
const MAX_PIECES: usize = 160;

/// Free memory, in pieces.
#[derive(Debug)]
pub struct FreeMemory {
    /// Start and end.
    pieces: [(u64, u64); MAX_PIECES],
    count: usize,
}

impl FreeMemory {
    /// All usable whole pages of `map` from 1 MiB on.
    pub fn of(map: &MemoryMap) -> Self {
        let mut free = Self { pieces: [(0, 0); MAX_PIECES], count: 0 };
        for range in map.ranges().iter().filter(|r| r.kind == MemoryKind::Usable) {
            let first = range.start.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
            free.add(first.max(FIRST_FREE), range.end() & !(PAGE - 1));
        }
        // Firmware's ranges may overlap; what something else claims is not free.
        for range in map.ranges().iter().filter(|r| r.kind != MemoryKind::Usable) {
            free.reserve(range.start, range.bytes);
        }
        free
    }

    fn add(&mut self, start: u64, end: u64) {
        if start < end && self.count < MAX_PIECES {
            self.pieces[self.count] = (start, end);
            self.count += 1;
        }
    }

    /// Takes the pages of a range out.
    pub fn reserve(&mut self, start: u64, bytes: u64) {
        let (from, to) =
            (start & !(PAGE - 1), start.saturating_add(bytes).saturating_add(PAGE - 1) & !(PAGE - 1));
        for n in 0..self.count {
            let (a, b) = self.pieces[n];
            if from >= b || to <= a {
                continue;
            }
            self.pieces[n] = (a, from.max(a));
            self.add(to, b);
        }
    }

    /// Takes `bytes` (rounded up to pages) at a multiple of `align` below `limit`; as low as possible.
    pub fn take(&mut self, bytes: u64, align: u64, limit: u64) -> Option<u64> {
        let bytes = bytes.checked_next_multiple_of(PAGE)?;
        let fits = |(start, end): (u64, u64)| {
            let at = start.checked_next_multiple_of(align.max(PAGE))?;
            let last = at.checked_add(bytes)?;
            (bytes > 0 && start < end && last <= end.min(limit)).then_some(at)
        };
        let at = self.pieces[..self.count].iter().filter_map(|piece| fits(*piece)).min()?;
        self.reserve(at, bytes);
        Some(at)
    }

    /// Bytes left.
    pub fn bytes(&self) -> u64 {
        self.pieces[..self.count].iter().map(|(a, b)| b.saturating_sub(*a)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(ranges: &[(u64, u64, MemoryKind)]) -> MemoryMap {
        let mut map = MemoryMap::default();
        ranges.iter().for_each(|(start, bytes, kind)| {
            map.add(MemoryRange { start: *start, bytes: *bytes, kind: *kind })
        });
        map
    }

    #[test]
    fn what_is_taken_is_free_no_more() {
        use MemoryKind::*;
        let map =
            map(&[(0, 0xA_0000, Usable), (0x10_0000, 0x100_0000, Usable), (0x80_0800, 0x100, AcpiTables)]);
        let mut free = FreeMemory::of(&map);
        assert_eq!(free.bytes(), 0x100_0000 - PAGE);
        free.reserve(0x10_0000, 0x1801);
        assert_eq!(free.take(1, 1, u64::MAX), Some(0x10_2000));
        assert_eq!(free.take(0x20_0000, 0x20_0000, u64::MAX), Some(0x20_0000));
        // The hole of the tables is not crossed.
        assert_eq!(free.take(0x60_0000, PAGE, u64::MAX), Some(0x80_1000));
        assert_eq!(free.take(0x40_0000, PAGE, 0x50_0000), None);
        let left = free.bytes();
        assert!(free.take(left, PAGE, u64::MAX).is_none(), "it is in pieces");
        assert_eq!(free.take(u64::MAX, PAGE, u64::MAX), None);
        assert_eq!(free.take(0, PAGE, u64::MAX), None);
    }

    #[test]
    fn hostile_maps_do_no_harm() {
        let map = map(&[(u64::MAX - 5, u64::MAX, MemoryKind::Usable), (0x10_0001, 10, MemoryKind::Usable)]);
        let mut free = FreeMemory::of(&map);
        assert_eq!(free.bytes(), 0);
        free.reserve(u64::MAX, u64::MAX);
        assert_eq!(free.take(PAGE, 1 << 63, u64::MAX), None);
    }
}
