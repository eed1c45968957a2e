//! The models and their features. A released (name, version) stays as it is; new features come as a new
//! version.

use x86_defs::cpuid::{Feature, Feature::*, FeatureSet};

/// One version of a model.
pub(super) struct Model {
    pub name: &'static str,
    pub version: u32,
    lists: &'static [&'static [Feature]],
}

impl Model {
    pub fn features(&self) -> FeatureSet {
        self.lists.iter().fold(FeatureSet::EMPTY, |set, list| set.union(FeatureSet::of(list)))
    }
}

/// What every model has: x86-64's baseline, the platform's timers and interrupt controllers, and the promise
/// not to be susceptible to what ARCH_CAPABILITIES lists.
const BASELINE: &[Feature] = &[
    Fpu,
    Vme,
    De,
    Pse,
    Tsc,
    Msr,
    Pae,
    Mce,
    Cx8,
    Apic,
    Sep,
    Mtrr,
    Pge,
    Mca,
    Cmov,
    Pat,
    Pse36,
    Clflush,
    Mmx,
    Fxsr,
    Sse,
    Sse2,
    Syscall,
    Nx,
    Lm,
    Hypervisor,
    X2apic,
    TscDeadline,
    Arat,
    TscAdjust,
    InvariantTsc,
    Rdtscp,
    ArchCapabilities,
    SpecCtrl,
    BhiCtrl,
];
/// psABI level 2.
const LEVEL2: &[Feature] = &[Cx16, LahfLm, Popcnt, Sse3, Ssse3, Sse41, Sse42];
/// psABI level 3.
const LEVEL3: &[Feature] = &[Avx, Avx2, Bmi1, Bmi2, F16c, Fma, Lzcnt, Movbe, Xsave];
/// What every processor of level 3 has beyond it, of whatever vendor.
const WITH_LEVEL3: &[Feature] = &[Aes, Pclmulqdq, Rdrand, Fsgsbase, Smep, Xsaveopt, Pdpe1gb];
/// What the interpreter implements beyond that.
const EXTRAS: &[Feature] = &[
    Pcid, Invpcid, Smap, Umip, Erms, Fsrm, Rdseed, Adx, Sha, Clflushopt, Clwb, Rdpid, Prefetchw, Xsavec,
    Xgetbv1, Xsaves, Ssbd,
];

/// psABI level 2 and the baseline.
const V2: [Model; 1] = [Model { name: "x86-64-v2", version: 1, lists: &[BASELINE, LEVEL2] }];
/// psABI level 3 and what comes with it.
const V3: [Model; 1] =
    [Model { name: "x86-64-v3", version: 1, lists: &[BASELINE, LEVEL2, LEVEL3, WITH_LEVEL3] }];
/// All that the interpreter implements.
pub(super) const MAX: [Model; 1] =
    [Model { name: "max", version: 1, lists: &[BASELINE, LEVEL2, LEVEL3, WITH_LEVEL3, EXTRAS] }];

/// All models; within one, versions ascend.
pub(super) static ALL: &[&[Model]] = &[&V2, &V3, &MAX];

/// The newest of a model's versions.
pub(super) fn newest(versions: &[Model]) -> &Model {
    &versions[versions.len() - 1]
}

/// Features that cannot be taken away: the decoder and every guest rely on them.
pub(super) const FIXED: &[Feature] = &[Fpu, Tsc, Msr, Cx8, Cmov, Apic, Pae, Hypervisor];

/// What a feature needs.
pub(super) const NEEDS: &[(Feature, Feature)] = &[
    (Sse, Fxsr),
    (Sse2, Sse),
    (Sse3, Sse2),
    (Ssse3, Sse3),
    (Sse41, Ssse3),
    (Sse42, Sse41),
    (Aes, Sse2),
    (Pclmulqdq, Sse2),
    (Sha, Sse2),
    (Gfni, Sse2),
    (Avx, Xsave),
    (Avx, Sse42),
    (Avx2, Avx),
    (Fma, Avx),
    (F16c, Avx),
    (Vaes, Avx),
    (Vaes, Aes),
    (Vpclmulqdq, Avx),
    (Vpclmulqdq, Pclmulqdq),
    (Xsaveopt, Xsave),
    (Xsavec, Xsave),
    (Xgetbv1, Xsave),
    (Xsaves, Xsavec),
    (Pcid, Lm),
    (Invpcid, Pcid),
    (Lm, Nx),
    (Lm, Sse2),
    (Lm, Syscall),
    (Pdpe1gb, Lm),
    (Fsgsbase, Lm),
    (LahfLm, Lm),
    (Cx16, Lm),
    (Rdpid, Rdtscp),
    (Mca, Mce),
    (Pse36, Pse),
    (Ssbd, SpecCtrl),
    (BhiCtrl, SpecCtrl),
    (ArchCapabilities, SpecCtrl),
    (TscDeadline, Tsc),
];
