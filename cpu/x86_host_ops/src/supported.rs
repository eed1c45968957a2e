//! Which instruction sets the host processor has and its operating system has enabled.

use core::arch::x86_64::{__cpuid_count, _xgetbv};
use x86_defs::cpuid::{CpuidRegister, Feature, FeatureSet};

/// The features whose instructions the thunks of this crate execute.
const EXECUTED: &[Feature] = &[
    Feature::Fpu,
    Feature::Mmx,
    Feature::Sse,
    Feature::Sse2,
    Feature::Sse3,
    Feature::Ssse3,
    Feature::Sse41,
    Feature::Sse42,
    Feature::Aes,
    Feature::Pclmulqdq,
    Feature::Sha,
    Feature::Gfni,
    Feature::Avx,
    Feature::Avx2,
    Feature::Fma,
    Feature::F16c,
    Feature::Vaes,
    Feature::Vpclmulqdq,
];

/// Those that need the upper halves of the YMM registers.
const NEED_YMM: &[Feature] =
    &[Feature::Avx, Feature::Avx2, Feature::Fma, Feature::F16c, Feature::Vaes, Feature::Vpclmulqdq];

/// The features of which this host can run every instruction. A CPU model must not promise any other of
/// those that the thunks execute ([`executed`]).
pub fn supported() -> FeatureSet {
    let ymm_enabled = has_bit(1, 0, CpuidRegister::Ecx, 27) && {
        // SAFETY: OSXSAVE (leaf 1, ECX bit 27) says that XGETBV exists.
        unsafe { xcr0() & 6 == 6 }
    };
    let mut set = FeatureSet::EMPTY;
    for &feature in EXECUTED {
        let (leaf, subleaf, register, bit) = feature.place();
        if has_bit(leaf, subleaf, register, bit) && (ymm_enabled || !NEED_YMM.contains(&feature)) {
            set.insert(feature);
        }
    }
    set
}

/// The features that depend on the host at all.
pub fn executed() -> FeatureSet {
    FeatureSet::of(EXECUTED)
}

fn has_bit(leaf: u32, subleaf: u32, register: CpuidRegister, bit: u8) -> bool {
    if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
        return false;
    }
    let r = __cpuid_count(leaf, subleaf);
    let value = match register {
        CpuidRegister::Eax => r.eax,
        CpuidRegister::Ebx => r.ebx,
        CpuidRegister::Ecx => r.ecx,
        CpuidRegister::Edx => r.edx,
    };
    value >> bit & 1 != 0
}

/// # Safety
/// CR4.OSXSAVE is set.
#[target_feature(enable = "xsave")]
unsafe fn xcr0() -> u64 {
    // SAFETY: the caller vouches for OSXSAVE.
    unsafe { _xgetbv(0) }
}
