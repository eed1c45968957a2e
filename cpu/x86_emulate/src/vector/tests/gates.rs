//! Which control bits stand in the way of which instructions (SDM vol. 3, 2.5; vol. 2, 2.4).

use super::flat::Flat;
use x86_defs::Exception::{DeviceNotAvailable as Nm, GeneralProtection as Gp, InvalidOpcode as Ud};
use x86_defs::control::*;
use x86_defs::{Exception, flags};

const MOVAPS: &[u8] = &[0x0F, 0x28, 0xC1];
const PADDB_MMX: &[u8] = &[0x0F, 0xFC, 0xC1];
const EMMS: &[u8] = &[0x0F, 0x77];
const VPADDB: &[u8] = &[0xC5, 0xF1, 0xFC, 0xC2];
const FLD1: &[u8] = &[0xD9, 0xE8];
const FNSTCW: &[u8] = &[0xD9, 0x38];
const WAIT: &[u8] = &[0x9B];
const FXSAVE: &[u8] = &[0x0F, 0xAE, 0x00];
const XSAVE: &[u8] = &[0x0F, 0xAE, 0x20];
const STMXCSR: &[u8] = &[0x0F, 0xAE, 0x18];
const MOVNTI: &[u8] = &[0x0F, 0xC3, 0x08];
const CVTPI2PS: &[u8] = &[0x0F, 0x2A, 0xC1];

fn check(cr0: u64, without_cr4: u64, xcr0: u64, table: &[(&[u8], Option<Exception>)]) {
    for (code, expected) in table {
        let mut flat = Flat::long();
        flat.cpu.gpr[0] = 0x2000;
        flat.cpu.cr0 |= cr0;
        flat.cpu.cr4 &= !without_cr4;
        flat.cpu.xcr0 = xcr0;
        assert_eq!(flat.run(code), *expected, "{code:02x?} with CR0 {cr0:#x}");
    }
}

#[test]
fn everything_enabled() {
    let all = [MOVAPS, PADDB_MMX, EMMS, VPADDB, FLD1, FNSTCW, WAIT, FXSAVE, XSAVE, STMXCSR, MOVNTI, CVTPI2PS];
    check(0, 0, 7, &all.map(|code| (code, None)));
}

#[test]
fn task_switched() {
    let nm = [MOVAPS, PADDB_MMX, EMMS, VPADDB, FLD1, FNSTCW, WAIT, FXSAVE, XSAVE, STMXCSR, CVTPI2PS];
    check(CR0_TS, 0, 7, &nm.map(|code| (code, Some(Nm))));
    check(CR0_TS, 0, 7, &[(MOVNTI, None)]);
    // WAIT needs MP as well.
    let mut flat = Flat::long();
    flat.cpu.cr0 = flat.cpu.cr0 & !CR0_MP | CR0_TS;
    assert_eq!(flat.run(WAIT), None);
    assert_eq!(flat.run(FLD1), Some(Nm));
}

#[test]
fn emulation() {
    let ud = [MOVAPS, PADDB_MMX, EMMS, STMXCSR, CVTPI2PS].map(|code| (code, Some(Ud)));
    check(CR0_EM, 0, 7, &ud);
    // #UD comes before #NM.
    check(CR0_EM | CR0_TS, 0, 7, &ud);
    check(CR0_EM, 0, 7, &[FLD1, FNSTCW, FXSAVE].map(|code| (code, Some(Nm))));
    check(CR0_EM, 0, 7, &[(VPADDB, None), (WAIT, None), (MOVNTI, None), (XSAVE, None)]);
}

#[test]
fn no_fxsr() {
    check(0, CR4_OSFXSR, 7, &[MOVAPS, STMXCSR, CVTPI2PS].map(|code| (code, Some(Ud))));
    check(0, CR4_OSFXSR, 7, &[PADDB_MMX, EMMS, FLD1, FXSAVE, VPADDB, MOVNTI].map(|code| (code, None)));
}

#[test]
fn no_xsave_or_no_avx() {
    check(0, CR4_OSXSAVE, 7, &[(VPADDB, Some(Ud)), (XSAVE, Some(Ud)), (MOVAPS, None)]);
    check(0, 0, 3, &[(VPADDB, Some(Ud)), (XSAVE, None), (MOVAPS, None)]);
}

#[test]
fn real_mode_has_no_vex_and_saving_supervisor_state_needs_privilege() {
    assert_eq!(Flat::real().run(VPADDB), Some(Ud)); // LDS with a register
    let mut v86 = Flat::real();
    v86.cpu.cr0 |= CR0_PE;
    v86.cpu.rflags |= flags::VM;
    v86.cpu.cpl = 3;
    assert_eq!(v86.run(MOVAPS), None);
    assert_eq!(v86.run(VPADDB), Some(Ud));
    let xsaves: &[u8] = &[0x0F, 0xC7, 0x28];
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    assert_eq!(flat.run(xsaves), None);
    flat.cpu.cpl = 3;
    assert_eq!(flat.run(xsaves), Some(Gp));
    flat.cpu.cpl = 0;
    flat.cpu.gpr[0] = 0x2020;
    assert_eq!(flat.run(xsaves), Some(Gp), "not a multiple of 64");
}
