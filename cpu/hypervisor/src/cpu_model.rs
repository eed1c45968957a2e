//! CPU models: what CPUID says, by name and version, never what the host has.

use x86_defs::cpuid::FeatureSet;

/// What a VM's processors are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuModel {
    /// Features that CPUID shows and instructions may use.
    pub features: FeatureSet,
}
