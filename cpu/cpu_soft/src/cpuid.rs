//! CPUID: the CPU model's leaves with what changes at run time.

use crate::core::SoftCore;
use hypervisor::cpu_model::CpuidContext;
use x86_defs::control::CR4_OSXSAVE;

impl SoftCore {
    pub(crate) fn cpuid_leaf(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let context = CpuidContext {
            apic_id: self.id,
            cpus: self.shared.vcpus.len() as u32,
            osxsave: self.cpu.cr4 & CR4_OSXSAVE != 0,
            apic_enabled: self.apic.is_enabled(),
            xcr0: self.cpu.xcr0,
            xss: self.cpu.msrs.xss,
            tsc_khz: self.shared.tsc_khz,
        };
        self.shared.model.cpuid(leaf, subleaf, &context)
    }
}
