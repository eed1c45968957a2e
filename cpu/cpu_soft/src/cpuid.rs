//! CPUID: the CPU model's leaves with what changes at run time.

use crate::core::SoftCore;
use x86_defs::control::CR4_OSXSAVE;
use x86_defs::cpuid::{Feature, FeatureSet};

impl SoftCore {
    pub(crate) fn cpuid_leaf(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        provisional(
            self.shared.model.features,
            leaf,
            subleaf,
            self.id,
            self.shared.vcpus.len() as u32,
            self.shared.tsc_khz,
            self.cpu.cr4 & CR4_OSXSAVE != 0,
            self.cpu.xcr0,
        )
    }
}

#[allow(clippy::too_many_arguments)]
fn provisional(
    features: FeatureSet,
    leaf: u32,
    subleaf: u32,
    id: u32,
    cpus: u32,
    tsc_khz: u32,
    osxsave: bool,
    xcr0: u64,
) -> [u32; 4] {
    let mut r = [0u32; 4];
    let mut mask = [0u32; 4];
    for f in features.iter() {
        let (l, s, reg, bit) = f.place();
        if l == leaf && (s == subleaf || !matches!(leaf, 7 | 0xD)) {
            mask[reg as usize] |= 1 << bit;
        }
    }
    match leaf {
        0 => return [0x16, 0x756E_6547, 0x6C65_746E, 0x4965_6E69],
        1 => {
            r = [0x000A_0F10 & 0 | 0x306C1, id << 24 | cpus << 16 | 8 << 8, mask[2], mask[3]];
            if osxsave {
                r[2] |= 1 << 27;
            }
        }
        4 => r = [0; 4],
        7 if subleaf == 0 => r = [0, mask[1], mask[2], mask[3]],
        0xD if features.has(Feature::Xsave) => match subleaf {
            0 => {
                let size = if xcr0 & 4 != 0 { 832 } else { 576 };
                let avx = features.has(Feature::Avx);
                r = [if avx { 7 } else { 3 }, size, if avx { 832 } else { 576 }, 0];
            }
            1 => r = [mask[0], if xcr0 & 4 != 0 { 832 } else { 576 }, 0, 0],
            2 if features.has(Feature::Avx) => r = [256, 576, 0, 0],
            _ => {}
        },
        0x15 => r = [1, tsc_khz / 1000, 1_000_000, 0],
        0x16 => r = [tsc_khz / 1000, tsc_khz / 1000, 1000, 0],
        0x4000_0000 => return [0x4000_0010, 0x4B4D_564B, 0x564B_4D56, 0x4D],
        0x4000_0001 => return [1 << 3 | 1 << 24, 0, 0, 0],
        0x4000_0010 => return [tsc_khz, 1_000_000, 0, 0],
        0x8000_0000 => return [0x8000_0008, 0, 0, 0],
        0x8000_0001 => r = [0, 0, mask[2], mask[3]],
        0x8000_0007 => r = [0, 0, 0, mask[3]],
        0x8000_0008 => r = [46 | 48 << 8, 0, 0, 0],
        6 => r = [mask[0], 0, 0, 0],
        _ => {}
    }
    r
}
