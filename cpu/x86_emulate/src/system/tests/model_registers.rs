//! RDMSR and WRMSR: values that are taken, refused, or belong to the engine.

use super::machine::*;
use crate::core::PagingChange;
use crate::cpu::reg::*;
use x86_defs::control::*;
use x86_defs::cpuid::Feature;
use x86_defs::{Exception, msr};

const RDMSR: &[u8] = &[0x0F, 0x32];
const WRMSR: &[u8] = &[0x0F, 0x30];

fn select(m: &mut Machine, number: u32, value: u64) {
    m.cpu.gpr[RCX] = u64::from(number);
    m.cpu.gpr[RAX] = value & 0xFFFF_FFFF;
    m.cpu.gpr[RDX] = value >> 32;
}
fn write(m: &mut Machine, number: u32, value: u64) {
    select(m, number, value);
    m.step(WRMSR);
}
fn read(m: &mut Machine, number: u32) -> u64 {
    select(m, number, 0);
    m.step(RDMSR);
    m.gpr(RDX) << 32 | m.gpr(RAX)
}
#[track_caller]
fn refused(m: &mut Machine, number: u32, value: u64) {
    select(m, number, value);
    m.faults(WRMSR, Exception::GeneralProtection, 0);
}

#[test]
fn ring_0_only_and_unknown_ones_fault() {
    let mut m = Machine::long(3);
    select(&mut m, msr::EFER, 0);
    m.faults(RDMSR, Exception::GeneralProtection, 0);
    m.faults(WRMSR, Exception::GeneralProtection, 0);
    let mut m = Machine::long(0);
    for number in [0x2A, 0x33, 0x186, 0x345, 0x480, 0x606, 0xC001_0015, 0xC000_0104, u32::MAX] {
        refused(&mut m, number, 0);
        select(&mut m, number, 0);
        m.faults(RDMSR, Exception::GeneralProtection, 0);
    }
    // The engine's own.
    assert_eq!(read(&mut m, msr::TSC), 0x1_2345_6789);
    write(&mut m, msr::TSC, 5);
}

/// (number, a value that is taken, values that are refused).
const TABLE: &[(u32, u64, &[u64])] = &[
    (msr::STAR, 0x0023_0010_0000_0001, &[]),
    (msr::LSTAR, 0xFFFF_8000_0000_0000, &[1 << 47]),
    (msr::CSTAR, 0x7FFF_FFFF_FFFF, &[1 << 63]),
    (msr::SFMASK, 0x47700, &[]),
    (msr::KERNEL_GS_BASE, 0x7000_0000_0000, &[1 << 47]),
    (msr::FS_BASE, 0x7000_0000_0000, &[1 << 47]),
    (msr::GS_BASE, 0xFFFF_8000_0000_0000, &[1 << 62]),
    (msr::SYSENTER_CS, 0x10, &[]),
    (msr::SYSENTER_ESP, 0xFFFF_8000_0000_0000, &[1 << 47]),
    (msr::SYSENTER_EIP, 0xFFFF_8000_0000_0000, &[1 << 47]),
    (msr::PAT, 0x0007_0406_0105_0406, &[0x0207_0406_0007_0406, 3, 0x80]),
    (msr::TSC_AUX, 0xFFFF_FFFF, &[1 << 32]),
    (msr::MISC_ENABLE, 0x40_0001, &[1 << 34, 1 << 63]),
    (msr::SPEC_CTRL, 0x407, &[8, 1 << 11]),
    (msr::DEBUGCTL, 3, &[4, 1 << 14]),
    (msr::XSS, 0, &[1, 1 << 8]),
    (msr::MISC_FEATURES_ENABLES, 0, &[1]),
    (msr::MCG_STATUS, 7, &[8]),
    (msr::MTRR_DEF_TYPE, 0xC06, &[2, 7, 0x100, 1 << 12]),
    (msr::MTRR_PHYSBASE0, 0x3FFF_FFFF_F006, &[0x100, 2, 1 << 46]),
    (msr::MTRR_PHYSBASE0 + 1, 0x3FFF_FFFF_F800, &[1, 0x400, 1 << 46]),
    (msr::MTRR_PHYSMASK7, 0x800, &[1]),
    (msr::MTRR_FIX64K_00000, 0x0606_0606_0606_0606, &[2, 0x0700_0000_0000_0000]),
    (msr::MTRR_FIX16K_A0000, 0x0000_0105_0406_0000, &[3]),
    (msr::MTRR_FIX4K_F8000, 0x0505_0505_0505_0505, &[0xFF]),
    (msr::MC0_CTL, !0, &[]),
    (msr::MC0_CTL + 1, 0, &[1]),
    (msr::MC0_CTL + 15, 0, &[1]),
    (msr::EFER, EFER_SCE | EFER_LME | EFER_LMA, &[1 << 1, 1 << 12, 1 << 14, EFER_SCE]),
];

#[test]
fn values_taken_and_refused() {
    let mut m = Machine::long(0);
    for (number, good, bad) in TABLE {
        write(&mut m, *number, *good);
        assert_eq!(read(&mut m, *number), *good, "{number:#x}");
        for value in *bad {
            refused(&mut m, *number, *value);
            assert_eq!(read(&mut m, *number), *good, "{number:#x}");
        }
    }
    assert_eq!((m.cpu.seg_base[4], m.cpu.seg_base[5]), (0x7000_0000_0000, 0xFFFF_8000_0000_0000));
    write(&mut m, msr::SYSENTER_CS, 0xFFFF_FFFF_0000_0010);
    assert_eq!(read(&mut m, msr::SYSENTER_CS), 0x10);
    // There is no fifth bank.
    refused(&mut m, msr::MC0_CTL + 16, 0);
}

#[test]
fn constants() {
    let mut m = Machine::long(0);
    for (number, value) in [
        (msr::MTRR_CAP, 0x508),
        (msr::MCG_CAP, 4),
        (msr::FEATURE_CONTROL, 1),
        (msr::PLATFORM_INFO, 0),
        (msr::PLATFORM_ID, 0),
        (msr::PERF_STATUS, 0),
        (msr::ARCH_CAPABILITIES, msr::ARCH_CAPABILITIES_VALUE),
    ] {
        assert_eq!(read(&mut m, number), value, "{number:#x}");
        refused(&mut m, number, value);
    }
    // The way to ask for the microcode revision.
    write(&mut m, msr::BIOS_SIGN_ID, 0);
    assert_eq!(read(&mut m, msr::BIOS_SIGN_ID), 1 << 32);
    refused(&mut m, msr::BIOS_SIGN_ID, 1);
    write(&mut m, msr::PRED_CMD, 1);
    refused(&mut m, msr::PRED_CMD, 2);
    select(&mut m, msr::PRED_CMD, 0);
    m.faults(RDMSR, Exception::GeneralProtection, 0);
}

#[test]
fn features_bring_their_registers() {
    for (feature, number) in [
        (Feature::Syscall, msr::STAR),
        (Feature::Lm, msr::KERNEL_GS_BASE),
        (Feature::Sep, msr::SYSENTER_CS),
        (Feature::Pat, msr::PAT),
        (Feature::Rdtscp, msr::TSC_AUX),
        (Feature::SpecCtrl, msr::SPEC_CTRL),
        (Feature::ArchCapabilities, msr::ARCH_CAPABILITIES),
        (Feature::Xsaves, msr::XSS),
        (Feature::Mtrr, msr::MTRR_CAP),
        (Feature::Mca, msr::MCG_CAP),
    ] {
        let mut m = Machine::long(0);
        m.features.remove(feature);
        select(&mut m, number, 0);
        m.faults(RDMSR, Exception::GeneralProtection, 0);
        m.faults(WRMSR, Exception::GeneralProtection, 0);
    }
    let mut m = Machine::long(0);
    m.features.remove(Feature::Nx);
    refused(&mut m, msr::EFER, EFER_SCE | EFER_LME | EFER_NXE);
    m.features.remove(Feature::Ssbd);
    refused(&mut m, msr::SPEC_CTRL, 4);
    m.features.remove(Feature::BhiCtrl);
    refused(&mut m, msr::SPEC_CTRL, 1 << 10);
}

#[test]
fn efer_keeps_lma_and_tells_the_tlb_of_nxe() {
    let mut m = Machine::long(0);
    write(&mut m, msr::EFER, EFER_SCE | EFER_LME | EFER_NXE);
    assert_eq!(read(&mut m, msr::EFER), EFER_SCE | EFER_LME | EFER_NXE | EFER_LMA);
    assert!(m.changes.is_empty());
    write(&mut m, msr::EFER, EFER_SCE | EFER_LME);
    assert_eq!(m.changes, [PagingChange::All]);
}
