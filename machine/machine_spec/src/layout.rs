//! The board's address map: a q35-like PC, as one table of constants and the ranges derived from
//! the amount of RAM.
//!
//! Called by the board file of `machine`, by `firmware` (E820, ACPI) and by spec validation.
//!
//! ```text
//! 0x0000_0000  low RAM, min(ram, 3 GiB)         0x000A_0000  hole: VGA, later SMRAM
//! 0xC000_0000  PCI memory, 32-bit, part 1       0xE000_0000  ECAM, 256 buses
//! 0xF000_0000  PCI memory, 32-bit, part 2       0xFEC0_0000  IOAPIC
//! 0xFED0_0000  HPET                             0xFED4_0000  TPM (reserved)
//! 0xFEE0_0000  local APIC and MSI               0xFF00_0000  firmware flash (reserved)
//! 4 GiB        high RAM                         then         memory hot-add range (1 GiB aligned)
//! then         PCI memory, 64-bit, aligned to its size, 32 GiB to 512 GiB
//! ```
//!
//! Invariants: ranges never overlap; the map is a pure function of (RAM, hot-add size, physical
//! address bits), so that restore and migration find every address where it was.

use alloc::vec::Vec;
use guest_memory::Gpa;

/// A span of guest-physical addresses: `start`, and how many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Span {
    /// First address.
    pub start: Gpa,
    /// Length in bytes.
    pub size: u64,
}

impl Span {
    /// From first address and length.
    pub const fn new(start: u64, size: u64) -> Self {
        Self { start: Gpa(start), size }
    }
    /// From first address to the address after the last.
    pub const fn between(start: u64, end: u64) -> Self {
        Self { start: Gpa(start), size: end - start }
    }
    /// The address after the last (saturating: no span of ours ends at 2^64).
    pub const fn end(&self) -> u64 {
        self.start.0.saturating_add(self.size)
    }
    /// Whether `other` lies wholly inside.
    pub const fn contains(&self, other: &Span) -> bool {
        other.start.0 >= self.start.0 && other.end() <= self.end()
    }
    /// Whether the two share a byte.
    pub const fn overlaps(&self, other: &Span) -> bool {
        self.start.0 < other.end() && other.start.0 < self.end()
    }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Where low RAM ends at the latest.
pub const LOW_RAM_LIMIT: u64 = 0xC000_0000;
/// VGA memory; no RAM answers here (the RAM behind it is reserved for SMRAM).
pub const VGA_HOLE: Span = Span::between(0xA_0000, 0xC_0000);
/// Extended BIOS data area, the last KiB of conventional memory.
pub const EBDA: Span = Span::between(0x9_FC00, 0xA_0000);
/// Option ROMs and BIOS: RAM, but not the guest's to use.
pub const BIOS_AREA: Span = Span::between(0xC_0000, 0x10_0000);
/// Where the ACPI RSDP stands (guests search 0xE0000–0xFFFFF on 16-byte boundaries).
pub const RSDP_AREA: Span = Span::between(0xE_0000, 0xE_1000);
/// Where SMBIOS entry point and structures stand (guests search 0xF0000–0xFFFFF).
pub const SMBIOS_AREA: Span = Span::between(0xF_0000, 0x10_0000);
/// PCI memory window below 4 GiB, first part.
pub const PCI_MMIO32: Span = Span::between(0xC000_0000, 0xE000_0000);
/// PCI Express configuration space.
pub const ECAM: Span = Span::between(0xE000_0000, 0xF000_0000);
/// Buses that [`ECAM`] covers.
pub const ECAM_BUSES: u16 = 256;
/// PCI memory window below 4 GiB, second part.
pub const PCI_MMIO32_UPPER: Span = Span::between(0xF000_0000, 0xFEC0_0000);
/// I/O APIC registers.
pub const IOAPIC: Span = Span::new(0xFEC0_0000, 0x1000);
/// HPET registers.
pub const HPET: Span = Span::new(0xFED0_0000, 0x400);
/// TPM localities: reserved, nothing there yet.
pub const TPM: Span = Span::new(0xFED4_0000, 0x5000);
/// Local APIC page; with the rest of the MiB the target of MSI writes.
pub const LAPIC: Span = Span::new(0xFEE0_0000, 0x10_0000);
/// Firmware flash: reserved, nothing there with direct boot.
pub const FLASH: Span = Span::between(0xFF00_0000, 0x1_0000_0000);
/// Where high RAM begins.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// Room for ACPI tables at the top of low RAM (E820 type ACPI).
pub const ACPI_TABLES_SIZE: u64 = MIB;
/// Room for the FACS above the tables (E820 type NVS).
pub const ACPI_NVS_SIZE: u64 = 64 * KIB;

/// Granule of RAM sizes: a large page.
pub const RAM_GRANULE: u64 = 2 * MIB;
/// Least RAM of a machine.
pub const RAM_MIN: u64 = 16 * MIB;
/// Most RAM of a machine; the physical address bits may allow less.
pub const RAM_MAX: u64 = 16 << 40;
/// Alignment and granule of the hot-add range.
pub const HOT_ADD_ALIGN: u64 = GIB;
/// Smallest 64-bit PCI window that we accept.
pub const PCI_MMIO64_MIN: u64 = 32 * GIB;
/// Largest 64-bit PCI window that we ask for.
pub const PCI_MMIO64_MAX: u64 = 512 * GIB;
/// Physical address bits of a CPU model that says nothing else.
pub const DEFAULT_PHYSICAL_ADDRESS_BITS: u8 = 46;

/// I/O ports.
pub mod port {
    /// Primary 8259, two ports.
    pub const PIC1: u16 = 0x20;
    /// Secondary 8259, two ports.
    pub const PIC2: u16 = 0xA0;
    /// Edge/level control of both 8259, two ports.
    pub const ELCR: u16 = 0x4D0;
    /// 8254 timer, four ports.
    pub const PIT: u16 = 0x40;
    /// Port B: timer 2 gate and speaker.
    pub const PORT_B: u16 = 0x61;
    /// i8042 data.
    pub const I8042_DATA: u16 = 0x60;
    /// i8042 command and status.
    pub const I8042_COMMAND: u16 = 0x64;
    /// RTC index and data, two ports.
    pub const RTC: u16 = 0x70;
    /// The UARTs COM1 to COM4, eight ports each.
    pub const COM: [u16; 4] = [0x3F8, 0x2F8, 0x3E8, 0x2E8];
    /// PCI configuration address, four ports, data in the next four.
    pub const PCI_CONFIG: u16 = 0xCF8;
    /// Reset control.
    pub const RESET: u16 = 0xCF9;
    /// First port of the power management block.
    pub const PM_BASE: u16 = 0x600;
    /// Ports of the power management block.
    pub const PM_SIZE: u16 = 0x80;
    /// PM1a event block: status and enable, 4 bytes.
    pub const PM1A_EVENT: u16 = 0x600;
    /// PM1a control, 2 bytes.
    pub const PM1A_CONTROL: u16 = 0x604;
    /// PM timer, 4 bytes.
    pub const PM_TIMER: u16 = 0x608;
    /// GPE0 block: status then enable.
    pub const GPE0: u16 = 0x620;
    /// Bytes of the GPE0 block.
    pub const GPE0_SIZE: u8 = 16;
    /// First port of the PCI I/O window given to devices.
    pub const PCI_IO_START: u16 = 0x1000;
}

/// Interrupts.
pub mod irq {
    /// PIT and HPET legacy replacement: ISA IRQ 0, GSI 2 at the IOAPIC.
    pub const TIMER: u8 = 0;
    /// GSI of ISA IRQ 0.
    pub const TIMER_GSI: u32 = 2;
    /// i8042 keyboard.
    pub const KEYBOARD: u8 = 1;
    /// The UARTs COM1 to COM4.
    pub const COM: [u8; 4] = [4, 3, 4, 3];
    /// RTC.
    pub const RTC: u8 = 8;
    /// ACPI system control interrupt: level, active high.
    pub const SCI: u8 = 9;
    /// Pins of the IOAPIC.
    pub const IOAPIC_PINS: u32 = 24;
    /// GSI of PIRQA; PIRQB to PIRQH follow.
    pub const PIRQ_GSI: u32 = 16;
    /// ISA interrupts a PIRQ may be routed to (PIC mode).
    pub const PIRQ_ISA_CHOICES: [u8; 3] = [5, 10, 11];
    /// Where direct boot routes PIRQA to PIRQH, as a BIOS would; each is one of [`PIRQ_ISA_CHOICES`].
    pub const PIRQ_ISA_DEFAULT: [u8; 8] = [10, 10, 11, 11, 10, 10, 11, 11];
}

/// Power management.
pub mod power {
    /// SLP_TYP that turns the machine off.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// What to write to [`super::port::RESET`] for a reset.
    pub const RESET_VALUE: u8 = 0x06;
    /// CMOS byte of the century.
    pub const RTC_CENTURY: u8 = 0x32;
}

/// PCI slots of the root bus that are not the user's.
pub mod slot {
    /// Bus 0, device 31: ISA bridge with the PIRQ routing registers.
    pub const LPC_DEVICE: u8 = 31;
    /// First device number handed out.
    pub const FIRST_FREE: u8 = 1;
}

/// A piece of guest RAM: where the guest sees it, and where it lies in the RAM's backing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical span.
    pub span: Span,
    /// Offset of its first byte in the backing.
    pub backing_offset: u64,
}

/// What cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM size out of limits.
    #[error("memory of {bytes} bytes: must be a multiple of 2 MiB between {RAM_MIN} and {RAM_MAX} bytes")]
    Ram {
        /// As asked.
        bytes: u64,
    },
    /// Hot-add size out of limits.
    #[error("memory hot-add range of {bytes} bytes: must be a multiple of 1 GiB up to {RAM_MAX} bytes")]
    HotAdd {
        /// As asked.
        bytes: u64,
    },
    /// The CPU model's addresses are too short.
    #[error("the map ends at {end:#x}, beyond the {bits} physical address bits of the CPU model")]
    AddressBits {
        /// Where the smallest possible map would end.
        end: u64,
        /// What the model has.
        bits: u8,
    },
}

/// The address map of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ram_bytes: u64,
    low_end: u64,
    high: Option<Span>,
    hot_add: Span,
    pci_mmio64: Span,
}

impl RamLayout {
    /// The map for `ram_bytes` without hot-add, with the default physical address bits.
    pub fn new(ram_bytes: u64) -> Result<Self, LayoutError> {
        Self::with_hot_add(ram_bytes, 0, DEFAULT_PHYSICAL_ADDRESS_BITS)
    }

    /// The map for `ram_bytes` now and `hot_add_bytes` later.
    pub fn with_hot_add(ram_bytes: u64, hot_add_bytes: u64, address_bits: u8) -> Result<Self, LayoutError> {
        if !(RAM_MIN..=RAM_MAX).contains(&ram_bytes) || !ram_bytes.is_multiple_of(RAM_GRANULE) {
            return Err(LayoutError::Ram { bytes: ram_bytes });
        }
        if hot_add_bytes > RAM_MAX || !hot_add_bytes.is_multiple_of(HOT_ADD_ALIGN) {
            return Err(LayoutError::HotAdd { bytes: hot_add_bytes });
        }
        let low_end = ram_bytes.min(LOW_RAM_LIMIT);
        let high_bytes = ram_bytes - low_end;
        let high = (high_bytes > 0).then(|| Span::new(HIGH_RAM_START, high_bytes));
        let hot_start = (HIGH_RAM_START + high_bytes).next_multiple_of(HOT_ADD_ALIGN);
        let hot_add = Span::new(hot_start, hot_add_bytes);
        let limit = 1u64 << address_bits.clamp(32, 52);
        let pci_mmio64 = pci_window(hot_add.end(), limit).ok_or(LayoutError::AddressBits {
            end: hot_add.end().next_multiple_of(PCI_MMIO64_MIN) + PCI_MMIO64_MIN,
            bits: address_bits,
        })?;
        Ok(Self { ram_bytes, low_end, high, hot_add, pci_mmio64 })
    }

    /// All RAM in bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.ram_bytes
    }

    /// Where RAM below 4 GiB ends.
    pub fn low_end(&self) -> u64 {
        self.low_end
    }

    /// RAM as the guest sees it, ascending. The backing bytes behind [`VGA_HOLE`] are not mapped.
    pub fn ranges(&self) -> Vec<RamRange> {
        let below = Span::between(0, VGA_HOLE.start.0);
        let above = Span::between(VGA_HOLE.end(), self.low_end);
        let mut ranges = Vec::with_capacity(3);
        for span in [below, above] {
            ranges.push(RamRange { span, backing_offset: span.start.0 });
        }
        if let Some(span) = self.high {
            ranges.push(RamRange { span, backing_offset: self.low_end });
        }
        ranges
    }

    /// Addresses where memory can be added later; may be empty.
    pub fn hot_add(&self) -> Span {
        self.hot_add
    }

    /// PCI memory window above 4 GiB.
    pub fn pci_mmio64(&self) -> Span {
        self.pci_mmio64
    }

    /// Where ACPI tables are loaded.
    pub fn acpi_tables(&self) -> Span {
        Span::new(self.low_end - ACPI_NVS_SIZE - ACPI_TABLES_SIZE, ACPI_TABLES_SIZE)
    }

    /// Where the FACS is loaded.
    pub fn acpi_nvs(&self) -> Span {
        Span::new(self.low_end - ACPI_NVS_SIZE, ACPI_NVS_SIZE)
    }

    /// The map as a BIOS would report it, ascending.
    pub fn e820(&self) -> Vec<E820Entry> {
        use E820Kind::{Acpi, Nvs, Ram, Reserved};
        let tables = self.acpi_tables();
        let mut map = Vec::with_capacity(12);
        let mut add = |span, kind| map.push(E820Entry { span, kind });
        add(Span::between(0, EBDA.start.0), Ram);
        add(Span::between(EBDA.start.0, BIOS_AREA.end()), Reserved);
        add(Span::between(BIOS_AREA.end(), tables.start.0), Ram);
        add(tables, Acpi);
        add(self.acpi_nvs(), Nvs);
        add(ECAM, Reserved);
        add(IOAPIC, Reserved);
        add(Span::new(LAPIC.start.0, 0x1000), Reserved);
        add(FLASH, Reserved);
        if let Some(high) = self.high {
            add(high, Ram);
        }
        map
    }
}

/// The largest window, aligned to its size, that lies above `from` and ends by `limit`.
fn pci_window(from: u64, limit: u64) -> Option<Span> {
    let mut size = PCI_MMIO64_MAX;
    while size >= PCI_MMIO64_MIN {
        let start = from.next_multiple_of(size);
        if start + size <= limit {
            return Some(Span::new(start, size));
        }
        size /= 2;
    }
    None
}

/// What an E820 range is for; the values are the BIOS interface's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum E820Kind {
    /// Usable memory.
    Ram = 1,
    /// Not usable.
    Reserved = 2,
    /// ACPI tables, usable once they were read.
    Acpi = 3,
    /// ACPI non-volatile storage.
    Nvs = 4,
}

/// One range of the firmware's memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct E820Entry {
    /// Where.
    pub span: Span,
    /// What for.
    pub kind: E820Kind,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every fixed range of the map, with every one of `layout`.
    fn all_spans(layout: &RamLayout) -> Vec<Span> {
        let mut spans: Vec<Span> = layout.ranges().iter().map(|r| r.span).collect();
        spans.extend([VGA_HOLE, PCI_MMIO32, ECAM, PCI_MMIO32_UPPER, IOAPIC, HPET, TPM, LAPIC, FLASH]);
        spans.extend([layout.hot_add(), layout.pci_mmio64()]);
        spans
    }

    #[test]
    fn spans_never_overlap_and_ram_is_all_there() {
        for (ram, hot, bits) in [
            (RAM_MIN, 0, 46),
            (GIB, 0, 46),
            (3 * GIB, 0, 46),
            (3 * GIB + RAM_GRANULE, 0, 46),
            (4 * GIB, 8 * GIB, 40),
            (8 * GIB, 16 * GIB, 36),
            (RAM_MAX, RAM_MAX, 46),
        ] {
            let layout = RamLayout::with_hot_add(ram, hot, bits).expect("layout");
            let spans = all_spans(&layout);
            for (i, a) in spans.iter().enumerate() {
                assert!(a.end() <= 1 << bits, "{a:x?}");
                for b in &spans[i + 1..] {
                    assert!(!a.overlaps(b), "{a:x?} {b:x?}");
                }
            }
            let mapped: u64 = layout.ranges().iter().map(|r| r.span.size).sum();
            assert_eq!(mapped + VGA_HOLE.size, ram);
            let last = layout.ranges().last().map(|r| r.backing_offset + r.span.size);
            assert_eq!(last, Some(ram));
        }
    }

    #[test]
    fn e820_is_ascending_and_covers_ram() {
        let layout = RamLayout::new(5 * GIB).expect("layout");
        let map = layout.e820();
        for pair in map.windows(2) {
            assert!(pair[0].span.end() <= pair[1].span.start.0);
        }
        let ram: u64 = map.iter().filter(|e| e.kind == E820Kind::Ram).map(|e| e.span.size).sum();
        let reserved = (BIOS_AREA.end() - EBDA.start.0) + ACPI_TABLES_SIZE + ACPI_NVS_SIZE;
        assert_eq!(ram + reserved, 5 * GIB);
        assert!(map.iter().any(|e| e.span == ECAM && e.kind == E820Kind::Reserved));
    }

    #[test]
    fn impossible_maps_are_refused() {
        assert_eq!(RamLayout::new(0), Err(LayoutError::Ram { bytes: 0 }));
        assert_eq!(RamLayout::new(GIB + 1), Err(LayoutError::Ram { bytes: GIB + 1 }));
        assert!(matches!(RamLayout::new(u64::MAX), Err(LayoutError::Ram { .. })));
        assert!(matches!(RamLayout::with_hot_add(GIB, 5, 46), Err(LayoutError::HotAdd { .. })));
        let short = RamLayout::with_hot_add(60 * GIB, 0, 36);
        assert!(matches!(short, Err(LayoutError::AddressBits { bits: 36, .. })), "{short:?}");
        assert!(matches!(RamLayout::with_hot_add(GIB, 0, 32), Err(LayoutError::AddressBits { .. })));
    }

    #[test]
    fn window_grows_with_the_address_bits() {
        let small = RamLayout::with_hot_add(GIB, 0, 36).expect("36 bits").pci_mmio64();
        assert_eq!(small, Span::new(32 * GIB, 32 * GIB));
        let large = RamLayout::new(GIB).expect("46 bits").pci_mmio64();
        assert_eq!(large, Span::new(512 * GIB, 512 * GIB));
    }
}
