//! Bitmaps (SDM vol. 3C, 25.6.4 and 25.6.9): which ports and MSRs the guest reaches without an exit.
//!
//! No port is: devices are the machine's. Of the MSRs, those that are the guest's own while it runs.

use alloc::boxed::Box;
use x86_defs::msr;

/// One bit a port: bitmap A, and B behind it.
#[repr(C, align(4096))]
pub struct IoBitmaps([u8; 8 << 10]);

impl IoBitmaps {
    /// Every port exits.
    pub fn closed() -> Box<Self> {
        Box::new(Self([0xFF; 8 << 10]))
    }
}

/// One bit an MSR: low ones for reading, high ones for reading, and the same for writing.
#[repr(C, align(4096))]
pub struct MsrBitmap([u8; 4 << 10]);

/// MSRs that are loaded with the guest's values, and without effect on anything else.
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

impl MsrBitmap {
    /// Every MSR exits but for [`PASSED`].
    pub fn of_guest() -> Box<Self> {
        let mut map = Box::new(Self([0xFF; 4 << 10]));
        PASSED.iter().filter_map(|number| Self::place(*number)).for_each(|(byte, bit)| {
            map.0[byte] &= !bit;
            map.0[byte + 2048] &= !bit;
        });
        map
    }

    /// Byte and bit of an MSR's reading; `None`: it always exits.
    fn place(number: u32) -> Option<(usize, u8)> {
        let base = match number {
            0..=0x1FFF => 0,
            0xC000_0000..=0xC000_1FFF => 1024,
            _ => return None,
        };
        let inside = number & 0x1FFF;
        Some((base + inside as usize / 8, 1 << (inside % 8)))
    }

    /// Whether reading and writing of an MSR exit.
    pub fn exits(&self, number: u32) -> (bool, bool) {
        let set = |byte: usize, bit| self.0[byte] & bit != 0;
        Self::place(number).map_or((true, true), |(byte, bit)| (set(byte, bit), set(byte + 2048, bit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_own_registers_pass() {
        let map = MsrBitmap::of_guest();
        for number in (0..0x2000).chain(0xC000_0000..0xC000_2000) {
            let exits = !PASSED.contains(&number);
            assert_eq!(map.exits(number), (exits, exits), "{number:#x}");
        }
        assert_eq!(map.exits(msr::KVM_SYSTEM_TIME_NEW), (true, true));
        // LSTAR is 0xC0000082: bit 2 of byte 0x10 behind the low ones, and 2 KiB further.
        assert_eq!((map.0[1024 + 0x10] & 4, map.0[3072 + 0x10] & 4), (0, 0));
    }

    #[test]
    fn what_passes_is_loaded_and_stored() {
        // Fields of the VMCS: bases of FS and GS, SYSENTER's three.
        let fields = [msr::FS_BASE, msr::GS_BASE, msr::SYSENTER_CS, msr::SYSENTER_ESP, msr::SYSENTER_EIP];
        let mut moved = [crate::vcpu::MSRS, fields].concat();
        let mut passed = PASSED;
        moved.sort_unstable();
        passed.sort_unstable();
        assert_eq!(moved, passed);
    }

    #[test]
    fn no_port_passes() {
        assert!(IoBitmaps::closed().0.iter().all(|byte| *byte == 0xFF));
    }
}
