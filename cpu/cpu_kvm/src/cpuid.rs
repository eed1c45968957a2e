//! CPUID: from the CPU model to KVM's table, and from what KVM supports to features.
//!
//! KVM fills in what changes at run time (OSXSAVE, APIC, the size of the XSAVE area).

use hypervisor::CpuModel;
use hypervisor::cpu_model::CpuidContext;
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use std::io;
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::cpuid::{CpuidRegister, Feature, FeatureSet};

/// Leaves that a model may have, with the number of their subleaves where these matter.
const LEAVES: &[(u32, u32)] = &[
    (0, 0),
    (1, 0),
    (2, 0),
    (4, 5),
    (6, 0),
    (7, 3),
    (0xB, 3),
    (0xD, 3),
    (0x15, 0),
    (0x16, 0),
    (0x4000_0000, 0),
    (0x4000_0001, 0),
    (0x4000_0010, 0),
    (0x8000_0000, 0),
    (0x8000_0001, 0),
    (0x8000_0002, 0),
    (0x8000_0003, 0),
    (0x8000_0004, 0),
    (0x8000_0006, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
];

/// What KVM or this engine gives whatever KVM's list says: the engine keeps the MSRs of the last four itself.
const ALWAYS: &[Feature] = &[
    Feature::Hypervisor,
    Feature::Htt,
    Feature::ArchCapabilities,
    Feature::SpecCtrl,
    Feature::BhiCtrl,
    Feature::Ssbd,
];

/// The table for vCPU `id` of `cpus`.
pub fn table(model: &CpuModel, id: u32, cpus: u32, tsc_khz: u32) -> io::Result<CpuId> {
    let xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    let context = CpuidContext { apic_id: id, cpus, xcr0, ..CpuidContext::alone(tsc_khz) };
    let mut entries = Vec::new();
    for (leaf, subleaves) in LEAVES {
        for index in 0..(*subleaves).max(1) {
            let [eax, ebx, ecx, edx] = model.cpuid(*leaf, index, &context);
            let flags = if *subleaves > 0 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            entries.push(kvm_cpuid_entry2 {
                function: *leaf,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                ..kvm_cpuid_entry2::default()
            });
        }
    }
    CpuId::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))
}

/// The features that a guest can have on this KVM.
pub fn features(kvm: &Kvm) -> io::Result<FeatureSet> {
    let supported =
        kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(crate::ioctls::error)?;
    let mut features = FeatureSet::of(ALWAYS);
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        features.insert(Feature::TscDeadline);
    }
    for feature in Feature::ALL {
        let (leaf, subleaf, register, bit) = feature.place();
        let entry = supported.as_slice().iter().find(|e| e.function == leaf && e.index == subleaf);
        let word = entry.map_or(0, |e| match register {
            CpuidRegister::Eax => e.eax,
            CpuidRegister::Ebx => e.ebx,
            CpuidRegister::Ecx => e.ecx,
            CpuidRegister::Edx => e.edx,
        });
        if word >> bit & 1 != 0 {
            features.insert(*feature);
        }
    }
    Ok(features)
}
