//! Tests of CPU models and their leaves.

use super::*;
use alloc::format;
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};

fn ctx() -> CpuidContext {
    CpuidContext {
        apic_id: 3,
        cpus: 6,
        osxsave: true,
        apic_enabled: true,
        xcr0: XCR0_X87 | XCR0_SSE | XCR0_AVX,
        xss: 0,
        tsc_khz: 2_400_000,
    }
}

#[test]
fn every_feature_shows_exactly_where_it_belongs() {
    for model in
        [CpuModel::parse("x86-64-v2").unwrap(), CpuModel::parse("x86-64-v3").unwrap(), CpuModel::max()]
    {
        for feature in Feature::ALL.iter().copied().filter(|f| *f != Feature::Htt) {
            let (leaf, sub, register, bit) = feature.place();
            let shown = model.cpuid(leaf, sub, &ctx())[register as usize] >> bit & 1 != 0;
            assert_eq!(shown, model.features.has(feature), "{model}: {}", feature.name());
        }
    }
}

#[test]
fn levels_are_nested_and_complete() {
    let [v2, v3, max] = ["x86-64-v2", "x86-64-v3", "max"].map(|n| CpuModel::parse(n).unwrap().features);
    assert!(v3.missing_from(v2).is_empty() && max.missing_from(v3).is_empty());
    for f in ["avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"] {
        let f = feature(f).unwrap();
        assert!(v3.has(f) && !v2.has(f));
    }
    for f in ["cx16", "lahf-lm", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2"] {
        assert!(v2.has(feature(f).unwrap()));
    }
    assert!(max.has(Feature::Pcid) && !v3.has(Feature::Pcid));
}

/// A released model never changes: change the version instead.
#[test]
fn released_models_are_frozen() {
    let golden = [
        (
            "x86-64-v2@1",
            "fpu, vme, de, pse, tsc, msr, pae, mce, cx8, apic, sep, mtrr, pge, mca, cmov, pat, pse36, clflush, mmx, fxsr, sse, sse2, sse3, ssse3, cx16, sse4.1, sse4.2, x2apic, popcnt, tsc-deadline, hypervisor, arat, tsc-adjust, arch-capabilities, spec-ctrl, bhi-ctrl, lahf-lm, syscall, nx, rdtscp, lm, invtsc",
        ),
        (
            "x86-64-v3@1",
            "fpu, vme, de, pse, tsc, msr, pae, mce, cx8, apic, sep, mtrr, pge, mca, cmov, pat, pse36, clflush, mmx, fxsr, sse, sse2, sse3, pclmulqdq, ssse3, fma, cx16, sse4.1, sse4.2, x2apic, movbe, popcnt, tsc-deadline, aes, xsave, avx, f16c, rdrand, hypervisor, arat, fsgsbase, tsc-adjust, bmi1, avx2, smep, bmi2, arch-capabilities, spec-ctrl, bhi-ctrl, xsaveopt, lahf-lm, lzcnt, syscall, nx, pdpe1gb, rdtscp, lm, invtsc",
        ),
        (
            "max@1",
            "fpu, vme, de, pse, tsc, msr, pae, mce, cx8, apic, sep, mtrr, pge, mca, cmov, pat, pse36, clflush, mmx, fxsr, sse, sse2, sse3, pclmulqdq, ssse3, fma, cx16, pcid, sse4.1, sse4.2, x2apic, movbe, popcnt, tsc-deadline, aes, xsave, avx, f16c, rdrand, hypervisor, arat, fsgsbase, tsc-adjust, bmi1, avx2, smep, bmi2, erms, invpcid, rdseed, adx, smap, clflushopt, clwb, sha, umip, rdpid, fsrm, arch-capabilities, spec-ctrl, ssbd, bhi-ctrl, xsaveopt, xsavec, xgetbv1, xsaves, lahf-lm, lzcnt, 3dnowprefetch, syscall, nx, pdpe1gb, rdtscp, lm, invtsc",
        ),
    ];
    for (name, features) in golden {
        assert_eq!(list(CpuModel::parse(name).unwrap().features), features, "{name}");
    }
}

#[test]
fn features_are_added_and_removed_with_what_belongs_to_them() {
    let model = CpuModel::parse("x86-64-v2,+invpcid,+sha").unwrap();
    assert!(model.features.has(Feature::Pcid) && model.features.has(Feature::Sha));
    let model = CpuModel::parse("x86-64-v3,-xsave").unwrap();
    for gone in [Feature::Xsave, Feature::Avx, Feature::Avx2, Feature::Fma, Feature::F16c, Feature::Xsaveopt]
    {
        assert!(!model.features.has(gone));
    }
    assert_eq!(model.cpuid(0xD, 0, &ctx()), [0; 4]);
}

#[test]
fn text_round_trips() {
    for text in ["x86-64-v2", "x86-64-v3@1, +pcid ,-aes", "max,-avx,-nx", "x86-64-v2,+avx2"] {
        let model = CpuModel::parse(text).unwrap();
        assert_eq!(CpuModel::parse(&format!("{model}")).unwrap(), model, "{text}");
    }
    assert_eq!(format!("{}", CpuModel::parse("x86-64-v3,+pcid").unwrap()), "x86-64-v3@1,+pcid");
}

#[test]
fn errors_name_the_choices() {
    let text = |t: &str| CpuModel::parse(t).unwrap_err().to_string();
    assert_eq!(text("haswell"), "no CPU model is called `haswell`; choose one of: x86-64-v2, x86-64-v3, max");
    assert_eq!(text("max@9"), "CPU model `max` has no version `9`; its newest is 1");
    assert!(text("max,+avx512f").starts_with("no CPU feature is called `avx512f`; choose from: fpu, "));
    assert_eq!(text("max,aes"), "`aes` in a CPU model: write +feature or -feature");
    assert_eq!(text("max,-tsc"), "the CPU feature `tsc` cannot be taken away");
}

#[test]
fn identity_topology_and_time() {
    let model = CpuModel::max();
    let [max, b, c, d] = model.cpuid(0, 0, &ctx());
    let mut vendor = Vec::new();
    for word in [b, d, c] {
        vendor.extend_from_slice(&word.to_le_bytes());
    }
    assert_eq!((max, vendor.as_slice()), (0x16, b"GenuineIntel".as_slice()));
    let [signature, ebx, ecx, edx] = model.cpuid(1, 0, &ctx());
    assert_eq!((signature, ebx), (0x906F0, 0x0306_0800));
    assert!(ecx >> 27 & 1 == 1 && edx >> 28 & 1 == 1);
    let alone = CpuidContext { cpus: 1, osxsave: false, apic_enabled: false, ..ctx() };
    let [_, _, ecx, edx] = model.cpuid(1, 0, &alone);
    assert!(ecx >> 27 & 1 == 0 && edx >> 28 & 1 == 0 && edx >> 9 & 1 == 0);

    assert_eq!(model.cpuid(0xB, 0, &ctx()), [0, 1, 0x100, 3]);
    assert_eq!(model.cpuid(0xB, 1, &ctx()), [3, 6, 0x201, 3]);
    assert_eq!(model.cpuid(0xB, 2, &ctx()), [0, 0, 2, 3]);
    // L3: 16 ways of 16384 lines of 64 bytes, shared by eight ids.
    assert_eq!(model.cpuid(4, 3, &ctx()), [0x1C01_C163, 0x03C0_003F, 16383, 0]);
    assert_eq!(model.cpuid(4, 4, &ctx()), [0; 4]);

    // 2.4 GHz = 12/5 of the 1 GHz at which the APIC timer counts.
    assert_eq!(model.cpuid(0x15, 0, &ctx()), [5, 12, 1_000_000_000, 0]);
    assert_eq!(model.cpuid(0x15, 0, &CpuidContext { tsc_khz: 2_399_999, ..ctx() }), [0; 4]);
    assert_eq!(model.cpuid(0x16, 0, &ctx()), [2400, 2400, 100, 0]);
    assert_eq!(model.cpuid(0x4000_0010, 0, &ctx()), [2_400_000, 1_000_000, 0, 0]);
    assert_eq!(model.cpuid(0x8000_0008, 0, &ctx())[0], 0x302E);
}

/// Programs choose code by family and model alone: GCC's `target_clones("arch=...")` and `__builtin_cpu_is` look
/// at no feature bit. With the number of a real processor they would use all that it has.
#[test]
fn family_and_model_promise_no_instruction() {
    const KNOWN: [u32; 75] = [
        0x0E, 0x0F, 0x16, 0x17, 0x1A, 0x1C, 0x1D, 0x1E, 0x1F, 0x25, 0x26, 0x27, 0x2A, 0x2C, 0x2D, 0x2E, 0x2F,
        0x35, 0x36, 0x37, 0x3A, 0x3C, 0x3D, 0x3E, 0x3F, 0x45, 0x46, 0x47, 0x4A, 0x4C, 0x4D, 0x4E, 0x4F, 0x55,
        0x56, 0x57, 0x5A, 0x5C, 0x5D, 0x5E, 0x5F, 0x66, 0x6A, 0x6C, 0x75, 0x7A, 0x7D, 0x7E, 0x85, 0x86, 0x8A,
        0x8C, 0x8D, 0x8E, 0x8F, 0x96, 0x97, 0x9A, 0x9C, 0x9D, 0x9E, 0xA5, 0xA6, 0xA7, 0xAA, 0xAC, 0xAD, 0xAE,
        0xAF, 0xB5, 0xB6, 0xB7, 0xBA, 0xBD, 0xBE,
    ];
    for name in CpuModel::names() {
        let [signature, ..] = CpuModel::parse(name).unwrap().cpuid(1, 0, &ctx());
        let (family, model) = (signature >> 8 & 0xF, signature >> 12 & 0xF0 | signature >> 4 & 0xF);
        assert_eq!(family, 6);
        assert!(model < 0xBF && !KNOWN.contains(&model), "{name}: model {model:#x}");
    }
}

#[test]
fn hypervisor_and_brand_strings() {
    let model = CpuModel::max();
    let [max, b, c, d] = model.cpuid(0x4000_0000, 0, &ctx());
    let mut signature = Vec::new();
    for word in [b, c, d] {
        signature.extend_from_slice(&word.to_le_bytes());
    }
    assert_eq!((max, signature.as_slice()), (0x4000_0010, b"KVMKVMKVM\0\0\0".as_slice()));
    let mut name = Vec::new();
    for leaf in 0x8000_0002..=0x8000_0004 {
        for word in model.cpuid(leaf, 0, &ctx()) {
            name.extend_from_slice(&word.to_le_bytes());
        }
    }
    assert!(name.starts_with(b"Bedplate x86-64 processor\0"));
}

#[test]
fn xsave_sizes_follow_xcr0() {
    let model = CpuModel::max();
    let at = |xcr0, sub| model.cpuid(0xD, sub, &CpuidContext { xcr0, ..ctx() });
    assert_eq!(at(XCR0_X87, 0), [7, 576, 832, 0]);
    assert_eq!(at(7, 0), [7, 832, 832, 0]);
    assert_eq!(at(7, 1), [0xF, 832, 0, 0]);
    assert_eq!(at(7, 2), [256, 576, 0, 0]);
    assert_eq!(at(7, 3), [0; 4]);
}

#[test]
fn any_leaf_is_answered() {
    let model = CpuModel::max();
    for cpus in [0, 1, 255, 4096, u32::MAX] {
        for leaf in
            (0..0x40).chain(0x4000_0000..0x4000_0100).chain(0x8000_0000..0x8000_0030).chain([u32::MAX])
        {
            for sub in [0, 1, 2, 3, 4, 63, u32::MAX] {
                let c = CpuidContext { cpus, apic_id: u32::MAX, tsc_khz: u32::MAX, ..ctx() };
                let _ = model.cpuid(leaf, sub, &c);
            }
        }
    }
}
