//! Permission maps (APM vol. 2, 15.10 and 15.11): which ports and MSRs the guest reaches without an exit.
//!
//! No port is: devices are the machine's. Of the MSRs, those are that VMLOAD and VMSAVE move anyway.

use alloc::boxed::Box;
use x86_defs::msr;

/// One bit a port, and the word behind 0xFFFF.
#[repr(C, align(4096))]
pub struct IoMap([u8; 12 << 10]);

impl IoMap {
    /// Every port exits.
    pub fn closed() -> Box<Self> {
        Box::new(Self([0xFF; 12 << 10]))
    }
}

/// Two bits an MSR: read and write.
#[repr(C, align(4096))]
pub struct MsrMap([u8; 8 << 10]);

/// MSRs that are the guest's own registers: in the save area, and without effect on anything else.
pub const PASSED: [u32; 10] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::SFMASK,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
];

impl MsrMap {
    /// Every MSR exits but for [`PASSED`].
    pub fn of_guest() -> Box<Self> {
        let mut map = Box::new(Self([0xFF; 8 << 10]));
        PASSED.iter().for_each(|number| map.pass(*number));
        map
    }

    /// Byte and shift of an MSR's two bits; `None`: it always exits.
    fn place(number: u32) -> Option<(usize, u32)> {
        let (range, inside) = match number {
            0..=0x1FFF => (0, number),
            0xC000_0000..=0xC000_1FFF => (0x800, number & 0x1FFF),
            0xC001_0000..=0xC001_1FFF => (0x1000, number & 0x1FFF),
            _ => return None,
        };
        Some((range + inside as usize / 4, inside % 4 * 2))
    }

    fn pass(&mut self, number: u32) {
        if let Some((byte, shift)) = Self::place(number) {
            self.0[byte] &= !(3 << shift);
        }
    }

    /// Whether reading (bit 0) and writing (bit 1) of an MSR exits.
    pub fn exits(&self, number: u32) -> u8 {
        Self::place(number).map_or(3, |(byte, shift)| self.0[byte] >> shift & 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_own_registers_pass() {
        let map = MsrMap::of_guest();
        for number in (0..0x2000).chain(0xC000_0000..0xC000_2000).chain(0xC001_0000..0xC001_2000) {
            let expected = if PASSED.contains(&number) { 0 } else { 3 };
            assert_eq!(map.exits(number), expected, "{number:#x}");
        }
        assert_eq!(map.exits(msr::KVM_SYSTEM_TIME_NEW), 3);
        // LSTAR is 0xC0000082: byte 0x800 + 0x20, bits 5:4 (APM vol. 2, 15.11).
        assert_eq!(map.0[0x820] & 0b0011_0000, 0);
    }

    #[test]
    fn no_port_passes() {
        assert!(IoMap::closed().0.iter().all(|byte| *byte == 0xFF));
    }
}
