//! RDMSR and WRMSR (SDM vol. 4). What is neither here nor the engine's (APIC, TSC, kvmclock) is #GP(0), as
//! are reserved bits: kernels probe with fault handlers.

use super::misc::{edx_eax, set_edx_eax};
use super::{handler, is_canonical, require_cpl0};
use crate::core::{Core, Fault, PagingChange};
use crate::cpu::{Msrs, reg};
use crate::lower::LowerContext;
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic};
use x86_defs::control::*;
use x86_defs::cpuid::Feature;
use x86_defs::msr::*;
use x86_defs::paging::PHYSICAL_ADDRESS_BITS;

/// Variable-range MTRRs, fixed ranges and write-combining.
const MTRR_CAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// Machine-check banks.
const MCG_CAP_VALUE: u64 = 4;

/// MISC_ENABLE bits that may be written: fast strings, thermal, performance, BTS and PEBS unavailable,
/// SpeedStep, MONITOR, CPUID limit, xTPR, XD disable.
const MISC_ENABLE_WRITABLE: u64 =
    1 | 1 << 3 | 1 << 7 | 1 << 11 | 1 << 12 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23;
/// Microcode revision in the upper half, as BIOS_SIGN_ID shows it.
const MICROCODE_REVISION: u64 = 1 << 32;
/// FEATURE_CONTROL: locked, nothing enabled.
const FEATURE_CONTROL_LOCKED: u64 = 1;

fn rdmsr<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let number = c.cpu().gpr[reg::RCX] as u32;
    let value = match read(c, number) {
        Some(value) => value,
        None => match c.engine_msr_read(number) {
            Some(value) => value?,
            None => return Err(c.gp(0)),
        },
    };
    set_edx_eax(c, value);
    Ok(Step::Next)
}

fn wrmsr<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let number = c.cpu().gpr[reg::RCX] as u32;
    let value = edx_eax(c);
    match write(c, number, value) {
        Written::Done => {}
        Written::Refused => return Err(c.gp(0)),
        Written::Unknown => match c.engine_msr_write(number, value) {
            Some(done) => done?,
            None => return Err(c.gp(0)),
        },
    }
    Ok(op.end_block(c))
}

/// Where a plain MSR lives in [`Msrs`].
fn plain(msrs: &mut Msrs, number: u32) -> Option<&mut u64> {
    Some(match number {
        STAR => &mut msrs.star,
        LSTAR => &mut msrs.lstar,
        CSTAR => &mut msrs.cstar,
        SFMASK => &mut msrs.sfmask,
        KERNEL_GS_BASE => &mut msrs.kernel_gs_base,
        SYSENTER_CS => &mut msrs.sysenter_cs,
        SYSENTER_ESP => &mut msrs.sysenter_esp,
        SYSENTER_EIP => &mut msrs.sysenter_eip,
        PAT => &mut msrs.pat,
        TSC_AUX => &mut msrs.tsc_aux,
        MISC_ENABLE => &mut msrs.misc_enable,
        SPEC_CTRL => &mut msrs.spec_ctrl,
        DEBUGCTL => &mut msrs.debugctl,
        XSS => &mut msrs.xss,
        MISC_FEATURES_ENABLES => &mut msrs.misc_features_enables,
        MCG_STATUS => &mut msrs.mcg_status,
        MTRR_DEF_TYPE => &mut msrs.mtrr_def_type,
        MTRR_PHYSBASE0..=MTRR_PHYSMASK7 => &mut msrs.mtrr_variable[(number - MTRR_PHYSBASE0) as usize],
        MTRR_FIX64K_00000 => &mut msrs.mtrr_fixed[0],
        MTRR_FIX16K_80000..=MTRR_FIX16K_A0000 => {
            &mut msrs.mtrr_fixed[1 + (number - MTRR_FIX16K_80000) as usize]
        }
        MTRR_FIX4K_C0000..=MTRR_FIX4K_F8000 => &mut msrs.mtrr_fixed[3 + (number - MTRR_FIX4K_C0000) as usize],
        MC0_CTL..=MC_LAST => {
            let at = (number - MC0_CTL) as usize;
            msrs.mc_banks.get_mut(at / 4)?.get_mut(at % 4)?
        }
        _ => return None,
    })
}

/// The feature without which an MSR does not exist.
fn feature_of(number: u32) -> Option<Feature> {
    Some(match number {
        STAR | LSTAR | CSTAR | SFMASK => Feature::Syscall,
        KERNEL_GS_BASE | FS_BASE | GS_BASE => Feature::Lm,
        SYSENTER_CS | SYSENTER_ESP | SYSENTER_EIP => Feature::Sep,
        PAT => Feature::Pat,
        TSC_AUX => Feature::Rdtscp,
        SPEC_CTRL | PRED_CMD => Feature::SpecCtrl,
        ARCH_CAPABILITIES => Feature::ArchCapabilities,
        XSS => Feature::Xsaves,
        MTRR_CAP | MTRR_DEF_TYPE | MTRR_PHYSBASE0..=MTRR_PHYSMASK7 => Feature::Mtrr,
        MTRR_FIX64K_00000..=MTRR_FIX4K_F8000 => Feature::Mtrr,
        MCG_CAP | MCG_STATUS | MC0_CTL..=MC_LAST => Feature::Mca,
        _ => return None,
    })
}

fn read<C: Core>(c: &mut C, number: u32) -> Option<u64> {
    if feature_of(number).is_some_and(|f| !c.has_feature(f)) {
        return None;
    }
    Some(match number {
        EFER => c.cpu().efer,
        FS_BASE => c.cpu().seg[4].base,
        GS_BASE => c.cpu().seg[5].base,
        ARCH_CAPABILITIES => ARCH_CAPABILITIES_VALUE,
        MTRR_CAP => MTRR_CAP_VALUE,
        MCG_CAP => MCG_CAP_VALUE,
        FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
        BIOS_SIGN_ID => MICROCODE_REVISION,
        PLATFORM_ID | PLATFORM_INFO | PERF_STATUS => 0,
        _ => return plain(&mut c.cpu_mut().msrs, number).copied(),
    })
}

enum Written {
    Done,
    Refused,
    Unknown,
}

fn write<C: Core>(c: &mut C, number: u32, value: u64) -> Written {
    if feature_of(number).is_some_and(|f| !c.has_feature(f)) {
        return Written::Unknown;
    }
    match number {
        EFER => return write_efer(c, value),
        FS_BASE | GS_BASE => {
            if !is_canonical(value) {
                return Written::Refused;
            }
            let index = if number == FS_BASE { 4 } else { 5 };
            let cpu = c.cpu_mut();
            cpu.seg[index].base = value;
            cpu.seg_base[index] = value;
            return Written::Done;
        }
        // Commands without state: predictors and caches of the guest's do not exist.
        PRED_CMD => return if value <= 1 { Written::Done } else { Written::Refused },
        // The way to ask for the microcode revision begins with writing zero.
        BIOS_SIGN_ID => return if value == 0 { Written::Done } else { Written::Refused },
        ARCH_CAPABILITIES | MTRR_CAP | MCG_CAP | FEATURE_CONTROL | PLATFORM_ID | PLATFORM_INFO
        | PERF_STATUS => {
            return Written::Refused;
        }
        _ => {}
    }
    if !valid(c, number, value) {
        return Written::Refused;
    }
    let value = if matches!(number, SYSENTER_CS | SFMASK) { value & 0xFFFF_FFFF } else { value };
    match plain(&mut c.cpu_mut().msrs, number) {
        Some(place) => *place = value,
        None => return Written::Unknown,
    }
    if matches!(number, PAT | MTRR_DEF_TYPE) {
        c.paging_changed(PagingChange::All);
    }
    Written::Done
}

/// Whether a plain MSR may hold `value`.
fn valid<C: Core>(c: &C, number: u32, value: u64) -> bool {
    let memory_type = |t: u64| matches!(t, 0 | 1 | 4 | 5 | 6);
    match number {
        LSTAR | CSTAR | KERNEL_GS_BASE | SYSENTER_ESP | SYSENTER_EIP => is_canonical(value),
        PAT => value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6 | 7)),
        TSC_AUX => value >> 32 == 0,
        MISC_ENABLE => value & !MISC_ENABLE_WRITABLE == 0,
        SPEC_CTRL => {
            let ssbd = if c.has_feature(Feature::Ssbd) { 1 << 2 } else { 0 };
            let bhi_dis_s = if c.has_feature(Feature::BhiCtrl) { 1 << 10 } else { 0 };
            value & !(3 | ssbd | bhi_dis_s) == 0
        }
        DEBUGCTL => value & !3 == 0,
        // There are no supervisor components, and CPUID faulting does not exist.
        XSS | MISC_FEATURES_ENABLES => value == 0,
        MCG_STATUS => value & !7 == 0,
        MTRR_DEF_TYPE => value & !0xCFF == 0 && memory_type(value & 0xFF),
        MTRR_PHYSBASE0..=MTRR_PHYSMASK7 if number & 1 == 0 => {
            value >> PHYSICAL_ADDRESS_BITS == 0 && value & 0xF00 == 0 && memory_type(value & 0xFF)
        }
        MTRR_PHYSBASE0..=MTRR_PHYSMASK7 => value >> PHYSICAL_ADDRESS_BITS == 0 && value & 0x7FF == 0,
        MTRR_FIX64K_00000..=MTRR_FIX4K_F8000 => {
            value.to_le_bytes().iter().all(|t| memory_type(u64::from(*t)))
        }
        // Control registers take all ones or anything; the others can only be cleared.
        MC0_CTL..=MC_LAST => number & 3 == 0 || value == 0,
        _ => true,
    }
}

fn write_efer<C: Core>(c: &mut C, value: u64) -> Written {
    let mut allowed = EFER_LMA;
    for (feature, bit) in [(Feature::Syscall, EFER_SCE), (Feature::Lm, EFER_LME), (Feature::Nx, EFER_NXE)] {
        if c.has_feature(feature) {
            allowed |= bit;
        }
    }
    let cpu = c.cpu();
    let (old, paging) = (cpu.efer, cpu.cr0 & CR0_PG != 0);
    if value & !allowed != 0 || paging && (old ^ value) & EFER_LME != 0 {
        return Written::Refused;
    }
    let cpu = c.cpu_mut();
    cpu.efer = value & !EFER_LMA | old & EFER_LMA;
    cpu.update_mode();
    if (old ^ value) & EFER_NXE != 0 {
        c.paging_changed(PagingChange::All);
    }
    Written::Done
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    match insn.mnemonic() {
        Mnemonic::Rdmsr => Some(ctx.op(insn, handler!(rdmsr))),
        Mnemonic::Wrmsr => Some(ctx.op(insn, handler!(wrmsr))),
        _ => None,
    }
}
