//! Memory types as firmware leaves them in every processor: RAM is cached, the legacy hole and the PCI windows
//! below 4 GiB are not (SDM vol. 3, 12.11). Without them Linux turns PAT off and says so.
//!
//! Called by `machine` at start and at every reset.

use alloc::vec::Vec;
use machine_spec::layout::{HIGH_RAM_START, LOW_RAM_LIMIT, Span, VGA_HOLE};
use x86_defs::msr;

const UNCACHED: u64 = 0;
const WRITE_PROTECTED: u64 = 5;
const WRITE_BACK: u64 = 6;
const ENABLE: u64 = 1 << 11;
const ENABLE_FIXED: u64 = 1 << 10;
const VALID: u64 = 1 << 11;
/// Below 4 GiB all that is not low RAM: PCI windows, ECAM, chipset, flash.
const MMIO: Span = Span::between(LOW_RAM_LIMIT, HIGH_RAM_START);
const _: () = assert!(MMIO.size.is_power_of_two() && MMIO.start.0.is_multiple_of(MMIO.size));

/// The registers by number, for a processor with so many physical address bits.
pub fn registers(address_bits: u8) -> Vec<(u32, u64)> {
    let everywhere = |kind: u64| kind * 0x0101_0101_0101_0101;
    let mut all = Vec::from([
        (msr::MTRR_PHYSBASE0, MMIO.start.0 | UNCACHED),
        (msr::MTRR_PHYSBASE0 + 1, ((1 << address_bits) - 1) & !(MMIO.size - 1) | VALID),
        (msr::MTRR_FIX64K_00000, everywhere(WRITE_BACK)),
        (msr::MTRR_FIX16K_80000, everywhere(WRITE_BACK)),
        (msr::MTRR_FIX16K_A0000, everywhere(UNCACHED)),
        (msr::MTRR_DEF_TYPE, ENABLE | ENABLE_FIXED | WRITE_BACK),
    ]);
    all.extend((msr::MTRR_FIX4K_C0000..=msr::MTRR_FIX4K_F8000).map(|n| (n, everywhere(WRITE_PROTECTED))));
    all
}

const _: () = assert!(VGA_HOLE.start.0 == 0xA_0000 && VGA_HOLE.size == 8 * 0x4000, "one register covers it");

#[cfg(test)]
mod tests {
    use super::*;

    /// The memory type of an address by the manual's rules.
    fn kind(registers: &[(u32, u64)], at: u64) -> u64 {
        let get = |n: u32| registers.iter().find(|r| r.0 == n).map_or(0, |r| r.1);
        let byte = |register: u32, index: u64| get(register) >> (index * 8) & 0xFF;
        match at {
            0..0x8_0000 => byte(msr::MTRR_FIX64K_00000, at >> 16),
            0x8_0000..0xA_0000 => byte(msr::MTRR_FIX16K_80000, (at - 0x8_0000) >> 14),
            0xA_0000..0xC_0000 => byte(msr::MTRR_FIX16K_A0000, (at - 0xA_0000) >> 14),
            0xC_0000..0x10_0000 => byte(msr::MTRR_FIX4K_C0000 + ((at - 0xC_0000) >> 15) as u32, at >> 12 & 7),
            _ => {
                let (base, mask) = (get(msr::MTRR_PHYSBASE0), get(msr::MTRR_PHYSBASE0 + 1));
                let inside = mask & VALID != 0 && at & mask & !0xFFF == base & mask & !0xFFF;
                if inside { base & 0xFF } else { get(msr::MTRR_DEF_TYPE) & 0xFF }
            }
        }
    }

    #[test]
    fn memory_is_cached_and_devices_are_not() {
        let registers = registers(46);
        for at in [0, 0x9_FFFF, 0x10_0000, LOW_RAM_LIMIT - 1, HIGH_RAM_START, 1 << 40] {
            assert_eq!(kind(&registers, at), WRITE_BACK, "{at:#x}");
        }
        for at in [0xA_0000, 0xB_FFFF, LOW_RAM_LIMIT, 0xE000_0000, 0xFEE0_0000, HIGH_RAM_START - 1] {
            assert_eq!(kind(&registers, at), UNCACHED, "{at:#x}");
        }
        assert_eq!(kind(&registers, 0xF_FFFF), WRITE_PROTECTED);
    }
}
