//! The host: which of its instructions may stand in emitted code, and its GS base.

use std::arch::x86_64::__cpuid_count;
use std::cell::Cell;
use x86_defs::cpuid::{Feature, FeatureSet};

/// Features of the host processor, as far as CPUID tells.
pub fn features() -> FeatureSet {
    let mut set = FeatureSet::EMPTY;
    for &feature in Feature::ALL {
        let (leaf, subleaf, register, bit) = feature.place();
        if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
            continue;
        }
        let r = __cpuid_count(leaf, subleaf);
        let value = [r.eax, r.ebx, r.ecx, r.edx][register as usize];
        if value >> bit & 1 != 0 {
            set.insert(feature);
        }
    }
    set
}

/// What the host can run on vector registers; `None` if it has no AVX, which the saving of them uses.
pub fn vector_features() -> Option<FeatureSet> {
    let set = x86_host_ops::supported();
    // Features that every instruction may name besides.
    let more = features();
    let mut all = more;
    for &feature in Feature::ALL {
        if x86_host_ops::executed().has(feature) && !set.has(feature) {
            all.remove(feature);
        }
    }
    all.has(Feature::Avx).then_some(all)
}

thread_local! {
    static GS_BASE: Cell<u64> = const { Cell::new(0) };
}

/// Makes `base` the GS base of this thread. Nothing else in a Linux process of ours uses GS.
pub fn set_gs_base(base: u64) {
    const ARCH_SET_GS: i32 = 0x1001;
    if GS_BASE.get() == base {
        return;
    }
    // SAFETY: it changes a register that no compiled code uses.
    let done = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
    assert_eq!(done, 0, "the kernel refuses a GS base");
    GS_BASE.set(base);
}
