//! MSRs: which of a state's KVM holds, and which this engine keeps itself.
//!
//! The promise about the host's weaknesses (ARCH_CAPABILITIES) and the switches that go with it (SPEC_CTRL, PRED_CMD,
//! FLUSH_CMD) are the CPU model's: a filter brings every access of the guest here. So are MSRs that KVM does not know.

use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use std::collections::BTreeMap;
use std::io;
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::msr::*;

/// Machine-check banks of every engine.
pub const MC_BANKS: u32 = 4;

/// Plain MSRs of a `VcpuState`, ascending: those that the software engine has, too.
pub fn plain() -> Vec<u32> {
    let mut all = vec![
        SYSENTER_CS,
        SYSENTER_ESP,
        SYSENTER_EIP,
        SPEC_CTRL,
        MISC_FEATURES_ENABLES,
        MCG_STATUS,
        MISC_ENABLE,
        DEBUGCTL,
        MTRR_FIX64K_00000,
        MTRR_FIX16K_80000,
        MTRR_FIX16K_A0000,
        PAT,
        MTRR_DEF_TYPE,
        XSS,
        KVM_WALL_CLOCK_NEW,
        KVM_SYSTEM_TIME_NEW,
        STAR,
        LSTAR,
        CSTAR,
        SFMASK,
        KERNEL_GS_BASE,
        TSC_AUX,
    ];
    all.extend(MTRR_PHYSBASE0..=MTRR_PHYSMASK7);
    all.extend(MTRR_FIX4K_C0000..=MTRR_FIX4K_F8000);
    all.extend(MC0_CTL..MC0_CTL + 4 * MC_BANKS);
    all.sort_unstable();
    all
}

/// MSRs that no guest reaches in KVM: the filter sends them here.
const FILTERED: [(u32, Feature); 4] = [
    (SPEC_CTRL, Feature::SpecCtrl),
    (PRED_CMD, Feature::SpecCtrl),
    (ARCH_CAPABILITIES, Feature::ArchCapabilities),
    (FLUSH_CMD, Feature::ArchCapabilities),
];
/// SPEC_CTRL bits that may be set: IBRS, STIBP, SSBD, and BHI_DIS_S.
const SPEC_CTRL_WRITABLE: u64 = 0b111 | 1 << 10;

/// Sends the guest's accesses to MSRs that are ours, or that KVM does not know, to user space.
pub fn divert(vm: &VmFd) -> io::Result<()> {
    let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_UNKNOWN;
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..kvm_enable_cap::default() };
    cap.args[0] = reasons.into();
    vm.enable_cap(&cap).map_err(crate::ioctls::error)?;
    // A bit of 0 denies: the access leaves the kernel.
    let denied = [0u8; 1];
    let range = |base| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count: 1,
        bitmap: &denied,
    };
    let ranges: Vec<_> = FILTERED.iter().map(|(number, _)| range(*number)).collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(crate::ioctls::error)
}

/// MSRs that are kept here, of one vCPU.
#[derive(Clone, Debug, Default)]
pub struct KeptMsrs {
    features: FeatureSet,
    values: BTreeMap<u32, u64>,
}

impl KeptMsrs {
    /// None yet, for a CPU model's features.
    pub fn new(features: FeatureSet) -> Self {
        Self { features, values: BTreeMap::new() }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.values.clear();
    }

    /// Keeps one that KVM does not take.
    pub fn keep(&mut self, number: u32, value: u64) {
        self.values.insert(number, value);
    }

    /// Those kept that are state.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u64)> + '_ {
        self.values.iter().map(|(number, value)| (*number, *value)).filter(|(_, value)| *value != 0)
    }

    /// Whether KVM is not to be asked for it.
    pub fn is_ours(number: u32) -> bool {
        FILTERED.iter().any(|(filtered, _)| *filtered == number)
    }

    fn exists(&self, number: u32) -> bool {
        match FILTERED.iter().find(|(filtered, _)| *filtered == number) {
            Some((_, feature)) => self.features.has(*feature),
            None => self.values.contains_key(&number),
        }
    }

    /// The guest reads; `None` is #GP(0).
    pub fn guest_read(&self, number: u32) -> Option<u64> {
        match number {
            _ if !self.exists(number) => None,
            ARCH_CAPABILITIES => Some(ARCH_CAPABILITIES_VALUE),
            PRED_CMD | FLUSH_CMD => None,
            _ => Some(self.values.get(&number).copied().unwrap_or(0)),
        }
    }

    /// The guest writes; `None` is #GP(0).
    pub fn guest_write(&mut self, number: u32, value: u64) -> Option<()> {
        match number {
            _ if !self.exists(number) => None,
            ARCH_CAPABILITIES => None,
            // Nothing of the predictors is shared that a barrier would clear for this engine's promise.
            PRED_CMD | FLUSH_CMD => (value & !1 == 0).then_some(()),
            SPEC_CTRL if value & !SPEC_CTRL_WRITABLE != 0 => None,
            _ => {
                self.values.insert(number, value);
                Some(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_promises_are_kept_here() {
        let mut kept = KeptMsrs::new(FeatureSet::of(&[Feature::SpecCtrl, Feature::ArchCapabilities]));
        assert_eq!(kept.guest_read(ARCH_CAPABILITIES), Some(ARCH_CAPABILITIES_VALUE));
        assert_eq!(kept.guest_write(ARCH_CAPABILITIES, 0), None);
        assert_eq!(kept.guest_write(SPEC_CTRL, 1 << 10 | 1), Some(()));
        assert_eq!(kept.guest_write(SPEC_CTRL, 1 << 20), None);
        assert_eq!(kept.guest_read(SPEC_CTRL), Some(0x401));
        assert_eq!((kept.guest_write(PRED_CMD, 1), kept.guest_read(PRED_CMD)), (Some(()), None));
        assert_eq!(kept.guest_read(0x999), None);
        assert_eq!(KeptMsrs::default().guest_read(SPEC_CTRL), None);
    }

    #[test]
    fn the_list_ascends_without_repetition() {
        assert!(plain().windows(2).all(|pair| pair[0] < pair[1]));
    }
}
