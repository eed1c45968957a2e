//! When #MF is raised and what the x87 unit remembers of its last instruction (SDM vol. 1, 8.1.8 and 8.7; vol. 3,
//! 6.9).

use super::flat::Flat;
use crate::cpu::RIP;
use x86_defs::Exception::{DeviceNotAvailable as Nm, PageFault as Pf, X87 as Mf};
use x86_defs::control::CR0_TS;

const FLD1: &[u8] = &[0xD9, 0xE8];
const FLDZ: &[u8] = &[0xD9, 0xEE];
const FDIV: &[u8] = &[0xD8, 0xF1]; // st0 / st1
const FNINIT: &[u8] = &[0xDB, 0xE3];
const FNCLEX: &[u8] = &[0xDB, 0xE2];
const WAIT: &[u8] = &[0x9B];
const FNSTENV: &[u8] = &[0xD9, 0x30]; // [rax]
const FLDENV: &[u8] = &[0xD9, 0x20];
const FXSAVE64: &[u8] = &[0x48, 0x0F, 0xAE, 0x00];
const FXRSTOR: &[u8] = &[0x0F, 0xAE, 0x08];

/// A CPU with a division by zero pending, RAX at 0x2000.
fn pending() -> Flat {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.cpu.x.x87.control = 0x37B;
    flat.run_all(&[FLDZ, FLD1, FDIV]);
    assert_eq!(flat.cpu.x.x87.status & 0x80, 0x80);
    flat
}

#[test]
fn what_waits_for_exceptions() {
    let waiting: [&[u8]; 14] = [
        WAIT,
        FLD1,
        &[0xD9, 0xD0], // fnop
        &[0xD9, 0xF7], // fincstp
        &[0xDD, 0xC0], // ffree st0
        &[0xDB, 0xE9], // fucomi st0, st1
        &[0xDD, 0x18], // fstp qword [rax]
        &[0xD9, 0x28], // fldcw [rax]
        FLDENV,
        &[0xDD, 0x20],             // frstor [rax]
        &[0x0F, 0xFC, 0xC1],       // paddb mm0, mm1
        &[0x0F, 0x77],             // emms
        &[0xF2, 0x0F, 0xD6, 0xC1], // movdq2q mm0, xmm1
        &[0x0F, 0x2A, 0xC1],       // cvtpi2ps xmm0, mm1
    ];
    for code in waiting {
        let mut flat = pending();
        let (before, ymm, ram) = (flat.cpu.x.x87, flat.cpu.x.ymm, flat.ram.clone());
        assert_eq!(flat.run(code), Some(Mf), "{code:02x?}");
        assert!(flat.cpu.x.x87 == before && flat.cpu.x.ymm == ymm && flat.ram == ram, "{code:02x?}");
    }
}

#[test]
fn what_does_not_wait() {
    let others: [&[u8]; 11] = [
        FNINIT,
        FNCLEX,
        FNSTENV,
        &[0xDD, 0x30], // fnsave [rax]
        &[0xD9, 0x38], // fnstcw [rax]
        &[0xDD, 0x38], // fnstsw [rax]
        &[0xDF, 0xE0], // fnstsw ax
        FXSAVE64,
        FXRSTOR,
        &[0x0F, 0xAE, 0x18],       // stmxcsr [rax]
        &[0xF3, 0x0F, 0x58, 0xC1], // addss xmm0, xmm1
    ];
    for code in others {
        assert_eq!(pending().run(code), None, "{code:02x?}");
    }
}

#[test]
fn which_exception_comes_first() {
    let absent: &[u8] = &[0xDD, 0x03]; // fld qword [rbx]
    let mut flat = pending();
    flat.cpu.gpr[3] = 0x10_0000;
    assert_eq!(flat.run(absent), Some(Mf), "before the operand is looked at");
    flat.cpu.cr0 |= CR0_TS;
    assert_eq!(flat.run(absent), Some(Nm));
    assert_eq!(flat.run(WAIT), Some(Nm));
    flat.cpu.cr0 &= !CR0_TS;
    flat.run_all(&[FNCLEX]);
    let before = flat.cpu.x.x87;
    assert_eq!(flat.run(absent), Some(Pf));
    assert_eq!(flat.cpu.x.x87, before, "the pointers too");
    // A memory fault comes before what the operands would raise.
    flat.cpu.x.mxcsr = 0;
    assert_eq!(flat.run(&[0xF3, 0x0F, 0x5E, 0x03]), Some(Pf)); // divss xmm0, [rbx]
    assert_eq!(flat.cpu.x.mxcsr, 0);
}

#[test]
fn a_restored_exception_is_pending() {
    // An environment and an FXSAVE image with the flag set and not masked, the summary bit clear.
    for (code, status_at) in [(FLDENV, 4), (FXRSTOR, 2)] {
        let mut flat = Flat::long();
        flat.cpu.gpr[0] = 0x2000;
        flat.ram[0x2000..0x2002].copy_from_slice(&0x37Bu16.to_le_bytes());
        flat.ram[0x2000 + status_at] = 4;
        flat.run_all(&[code]);
        assert_eq!(flat.run(WAIT), Some(Mf), "{code:02x?}");
        flat.run_all(&[FNCLEX, WAIT]);
    }
}

#[test]
fn an_exception_points_to_its_instruction() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.cpu.x.x87.control = 0x37B;
    flat.run_all(&[FLD1]);
    flat.cpu.gpr[RIP] = 0x1100;
    flat.run_all(&[&[0x65, 0xDC, 0x70, 0x10]]); // fdiv qword gs:[rax+16], a zero: GS's base is 0
    for (at, code) in [FLD1, WAIT].into_iter().enumerate() {
        flat.cpu.gpr[RIP] = 0x1200 + at as u64;
        assert_eq!(flat.run(code), Some(Mf));
    }
    let x87 = &flat.cpu.x.x87;
    assert_eq!((x87.instruction_pointer, x87.data_pointer), (0x1100, 0x2010), "prefixes included");
    assert_eq!(x87.opcode, 0x470);
}

#[test]
fn which_instructions_leave_the_pointers() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.run_all(&[&[0xDD, 0x40, 0x08]]); // fld qword [rax+8]
    let pointers = |flat: &Flat| {
        let x = &flat.cpu.x.x87;
        (x.instruction_pointer, x.instruction_selector, x.data_pointer, x.opcode)
    };
    assert_eq!(pointers(&flat), (0x1000, 8, 0x2008, 0x540));
    flat.cpu.gpr[RIP] = 0x1100;
    flat.run_all(&[&[0xD9, 0xE0]]); // fchs
    assert_eq!(pointers(&flat), (0x1100, 8, 0x2008, 0x1E0), "no operand in memory: that pointer stays");
    flat.cpu.gpr[RIP] = 0x1200;
    let before = pointers(&flat);
    let store = &[0xD9, 0x38][..]; // fnstcw
    for code in [FNCLEX, store, &[0xD9, 0x28], &[0xDD, 0x38], &[0xDF, 0xE0], WAIT, FNSTENV, FXSAVE64] {
        flat.run_all(&[code]);
        assert_eq!(pointers(&flat), before, "{code:02x?}");
    }
    flat.run_all(&[&[0x0F, 0xFC, 0xC1]]); // MMX
    assert_eq!(pointers(&flat), before);
    flat.run_all(&[FNINIT]);
    assert_eq!(pointers(&flat), (0, 0, 0, 0));
}

#[test]
fn the_pointers_are_saved_and_come_back() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.run_all(&[&[0xDD, 0x40, 0x08]]); // fld qword [rax+8]
    flat.run_all(&[FNSTENV]);
    assert_eq!(flat.word::<u32>(0x200C), 0x1000);
    assert_eq!(flat.word::<u32>(0x2010), 0x540 << 16 | 8, "opcode and CS");
    assert_eq!(flat.word::<u32>(0x2014), 0x2008);
    let saved = flat.cpu.x.x87;
    flat.run_all(&[FNINIT, FLDENV]);
    let x = &flat.cpu.x.x87;
    assert_eq!((x.instruction_pointer, x.data_pointer, x.opcode), (0x1000, 0x2008, 0x540));
    assert_eq!((x.instruction_selector, x.data_selector), (saved.instruction_selector, saved.data_selector));
    flat.run_all(&[FXSAVE64]);
    assert_eq!(flat.word::<u64>(0x2008), 0x1000);
    assert_eq!(flat.word::<u64>(0x2010), 0x2008);
    assert_eq!(flat.word::<u16>(0x2006), 0x540);
}

/// The instruction DD /0 (FLD) with a ModRM byte, and what it needs behind that.
fn with_modrm(modrm: u8, bits: u32) -> [u8; 8] {
    let mut code = [0; 8];
    (code[0], code[1]) = (0xDD, modrm);
    if bits == 64 && modrm & 7 == 4 {
        code[2] = 0x24; // [rsp]
    }
    code
}

#[test]
fn the_opcode_register_has_the_modrm_byte() {
    for (bits, modrm) in [16, 64].into_iter().flat_map(|bits| (0..0xC0).map(move |modrm| (bits, modrm))) {
        if modrm >> 3 & 7 != 0 {
            continue; // FLD only
        }
        let mut flat = if bits == 64 { Flat::long() } else { Flat::real() };
        flat.cpu.gpr[..16].fill(0x100);
        flat.run_all(&[&with_modrm(modrm, bits)]);
        assert_eq!(flat.cpu.x.x87.opcode, 0x500 | u16::from(modrm), "{bits} bits, {modrm:#x}");
    }
}
