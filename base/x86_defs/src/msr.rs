//! Model-specific registers (SDM vol. 4; AMD APM vol. 2 appendix A; KVM's paravirtual ones).
#![allow(missing_docs)] // the names are the manuals'

pub const TSC: u32 = 0x10;
pub const PLATFORM_ID: u32 = 0x17;
pub const APIC_BASE: u32 = 0x1B;
pub const FEATURE_CONTROL: u32 = 0x3A;
pub const TSC_ADJUST: u32 = 0x3B;
pub const SPEC_CTRL: u32 = 0x48;
pub const PRED_CMD: u32 = 0x49;
pub const BIOS_SIGN_ID: u32 = 0x8B;
pub const MTRR_CAP: u32 = 0xFE;
pub const ARCH_CAPABILITIES: u32 = 0x10A;
pub const FLUSH_CMD: u32 = 0x10B;
pub const SYSENTER_CS: u32 = 0x174;
pub const SYSENTER_ESP: u32 = 0x175;
pub const SYSENTER_EIP: u32 = 0x176;
pub const MCG_CAP: u32 = 0x179;
pub const MCG_STATUS: u32 = 0x17A;
pub const MCG_CTL: u32 = 0x17B;
pub const PLATFORM_INFO: u32 = 0xCE;
pub const MISC_FEATURES_ENABLES: u32 = 0x140;
pub const PERF_STATUS: u32 = 0x198;
pub const MISC_ENABLE: u32 = 0x1A0;
pub const DEBUGCTL: u32 = 0x1D9;
pub const MTRR_PHYSBASE0: u32 = 0x200;
pub const MTRR_PHYSMASK7: u32 = 0x20F;
pub const MTRR_FIX64K_00000: u32 = 0x250;
pub const MTRR_FIX16K_80000: u32 = 0x258;
pub const MTRR_FIX16K_A0000: u32 = 0x259;
pub const MTRR_FIX4K_C0000: u32 = 0x268;
pub const MTRR_FIX4K_F8000: u32 = 0x26F;
pub const PAT: u32 = 0x277;
pub const MTRR_DEF_TYPE: u32 = 0x2FF;
pub const MC0_CTL: u32 = 0x400;
pub const MC_LAST: u32 = 0x47F;
pub const TSC_DEADLINE: u32 = 0x6E0;
pub const X2APIC_FIRST: u32 = 0x800;
pub const X2APIC_LAST: u32 = 0x8FF;
pub const XSS: u32 = 0xDA0;
pub const EFER: u32 = 0xC000_0080;
pub const STAR: u32 = 0xC000_0081;
pub const LSTAR: u32 = 0xC000_0082;
pub const CSTAR: u32 = 0xC000_0083;
pub const SFMASK: u32 = 0xC000_0084;
pub const FS_BASE: u32 = 0xC000_0100;
pub const GS_BASE: u32 = 0xC000_0101;
pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
pub const TSC_AUX: u32 = 0xC000_0103;
pub const KVM_WALL_CLOCK: u32 = 0x11;
pub const KVM_SYSTEM_TIME: u32 = 0x12;
pub const KVM_WALL_CLOCK_NEW: u32 = 0x4B56_4D00;
pub const KVM_SYSTEM_TIME_NEW: u32 = 0x4B56_4D01;

/// PAT at reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// APIC_BASE: this is the boot processor.
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// APIC_BASE: x2APIC mode.
pub const APIC_BASE_X2APIC: u64 = 1 << 10;
/// APIC_BASE: globally enabled.
pub const APIC_BASE_ENABLE: u64 = 1 << 11;

/// ARCH_CAPABILITIES: not susceptible to Meltdown.
pub const ARCH_RDCL_NO: u64 = 1 << 0;
/// ARCH_CAPABILITIES: enhanced IBRS.
pub const ARCH_IBRS_ALL: u64 = 1 << 1;
/// ARCH_CAPABILITIES: no L1D flush needed at VM entry.
pub const ARCH_SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
/// ARCH_CAPABILITIES: no speculative store bypass.
pub const ARCH_SSB_NO: u64 = 1 << 4;
/// ARCH_CAPABILITIES: no microarchitectural data sampling.
pub const ARCH_MDS_NO: u64 = 1 << 5;
/// ARCH_CAPABILITIES: no machine check on page size changes.
pub const ARCH_PSCHANGE_MC_NO: u64 = 1 << 6;
/// ARCH_CAPABILITIES: no TSX asynchronous abort.
pub const ARCH_TAA_NO: u64 = 1 << 8;
/// ARCH_CAPABILITIES: no shared buffers data read.
pub const ARCH_SBDR_SSDP_NO: u64 = 1 << 13;
/// ARCH_CAPABILITIES: no fill buffer stale data propagation.
pub const ARCH_FBSDP_NO: u64 = 1 << 14;
/// ARCH_CAPABILITIES: no primary stale data propagation.
pub const ARCH_PSDP_NO: u64 = 1 << 15;
/// ARCH_CAPABILITIES: no branch history injection.
pub const ARCH_BHI_NO: u64 = 1 << 20;
/// ARCH_CAPABILITIES: no post-barrier return stack predictions.
pub const ARCH_PBRSB_NO: u64 = 1 << 24;
/// ARCH_CAPABILITIES: no gather data sampling.
pub const ARCH_GDS_NO: u64 = 1 << 26;
/// ARCH_CAPABILITIES: no register file data sampling.
pub const ARCH_RFDS_NO: u64 = 1 << 27;
/// ARCH_CAPABILITIES: no indirect target selection.
pub const ARCH_ITS_NO: u64 = 1 << 62;
/// ARCH_CAPABILITIES of every CPU model of ours that has it. A promise about the host, too.
pub const ARCH_CAPABILITIES_VALUE: u64 = ARCH_RDCL_NO
    | ARCH_IBRS_ALL
    | ARCH_SKIP_L1DFL_VMENTRY
    | ARCH_SSB_NO
    | ARCH_MDS_NO
    | ARCH_PSCHANGE_MC_NO
    | ARCH_TAA_NO
    | ARCH_SBDR_SSDP_NO
    | ARCH_FBSDP_NO
    | ARCH_PSDP_NO
    | ARCH_BHI_NO
    | ARCH_PBRSB_NO
    | ARCH_GDS_NO
    | ARCH_RFDS_NO
    | ARCH_ITS_NO;
