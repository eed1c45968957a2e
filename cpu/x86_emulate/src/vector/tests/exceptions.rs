//! Exceptions of both floating-point units: when they are raised, and what is committed.

use super::flat::Flat;
use x86_defs::Exception::{InvalidOpcode as Ud, Simd, X87 as Mf};
use x86_defs::control::CR4_OSXMMEXCPT;

const DIVSS: &[u8] = &[0xF3, 0x0F, 0x5E, 0xC1];
const ADDSS: &[u8] = &[0xF3, 0x0F, 0x58, 0xC1];
const FLDZ: &[u8] = &[0xD9, 0xEE];
const FLD1: &[u8] = &[0xD9, 0xE8];
const FDIV: &[u8] = &[0xD8, 0xF1]; // st0 / st1
const FNSTSW_AX: &[u8] = &[0xDF, 0xE0];
const FNCLEX: &[u8] = &[0xDB, 0xE2];
const FLDCW: &[u8] = &[0xD9, 0x28];
const WAIT: &[u8] = &[0x9B];

#[test]
fn an_unmasked_simd_exception_leaves_the_destination() {
    let mut flat = Flat::long();
    flat.cpu.x.ymm[0] = [0x3F80_0000, 7, 8, 9]; // 1 / 0
    flat.cpu.x.mxcsr = 0x1F80 & !(1 << 9);
    assert_eq!(flat.run(DIVSS), Some(Simd));
    assert_eq!(flat.cpu.x.ymm[0], [0x3F80_0000, 7, 8, 9]);
    assert_eq!(flat.cpu.x.mxcsr & 0x3F, 4);
    flat.cpu.cr4 &= !CR4_OSXMMEXCPT;
    assert_eq!(flat.run(DIVSS), Some(Ud));
    flat.cpu.x.mxcsr = 0x1F80;
    assert_eq!(flat.run(DIVSS), None);
    assert_eq!(flat.cpu.x.ymm[0], [0x7F80_0000, 7, 8, 9]);
}

#[test]
fn without_a_handler_enabled_the_exception_is_undefined_opcode_and_commits_nothing() {
    // Each way to run float instructions: registers, memory, to and from general registers, flags, a store.
    let signaling = 0x7F80_0001u32;
    let table: [&[u8]; 6] = [
        &[0xF3, 0x0F, 0x58, 0xC1],             // addss xmm0, xmm1
        &[0xF3, 0x0F, 0x58, 0x00],             // addss xmm0, [rax]
        &[0xF3, 0x0F, 0x2D, 0xD9],             // cvtss2si ebx, xmm1
        &[0x0F, 0x2E, 0xC1],                   // ucomiss xmm0, xmm1
        &[0xC4, 0xE3, 0x79, 0x1D, 0x08, 0x00], // vcvtps2ph [rax], xmm1, 0
        &[0x0F, 0x2D, 0xC1],                   // cvtps2pi mm0, xmm1
    ];
    for (code, enabled) in table.into_iter().flat_map(|code| [(code, true), (code, false)]) {
        let mut flat = Flat::long();
        flat.cpu.gpr[0] = 0x2000;
        flat.ram[0x2000..0x2004].copy_from_slice(&signaling.to_le_bytes());
        flat.cpu.x.ymm[1][0] = signaling.into();
        flat.cpu.x.mxcsr = 0x1F00;
        if !enabled {
            flat.cpu.cr4 &= !CR4_OSXMMEXCPT;
        }
        let (ymm, gpr, ram) = (flat.cpu.x.ymm, flat.cpu.gpr, flat.ram.clone());
        let (flags, registers) = (flat.cpu.rflags_all(), flat.cpu.x.x87.regs);
        assert_eq!(flat.run(code), Some(if enabled { Simd } else { Ud }), "{code:02x?}");
        assert_eq!(flat.cpu.x.mxcsr, 0x1F01, "{code:02x?}");
        assert!(flat.cpu.x.ymm == ymm && flat.cpu.gpr == gpr && flat.ram == ram, "{code:02x?}");
        assert!(flat.cpu.rflags_all() == flags && flat.cpu.x.x87.regs == registers, "{code:02x?}");
    }
}

#[test]
fn a_loaded_simd_flag_is_not_pending() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.ram[0x2000..0x2004].copy_from_slice(&0x003Fu32.to_le_bytes()); // all flags set, none masked
    flat.cpu.x.ymm[0][0] = 0x3F80_0000;
    flat.cpu.x.ymm[1][0] = 0x3F80_0000;
    flat.run_all(&[&[0x0F, 0xAE, 0x10], ADDSS]); // ldmxcsr [rax]
    assert_eq!(flat.cpu.x.ymm[0][0], 0x4000_0000);
    assert_eq!(flat.cpu.x.mxcsr, 0x3F);
}

#[test]
fn flushing_and_denormals_as_zeros_with_exceptions_unmasked() {
    const FTZ: u32 = 1 << 15;
    const DAZ: u32 = 1 << 6;
    // The smallest normal number times a half, a denormal times one.
    let (smallest, half, one, denormal) = (0x0080_0000u64, 0x3F00_0000u64, 0x3F80_0000u64, 1u64);
    let table = [
        (smallest, half, 0x1F80, None, 0x0040_0000, 0), // exact: no exception
        (smallest, half, 0x1F80 | FTZ, None, 0, 0x30),  // flushed
        (smallest, half, 0x1780 | FTZ, Some(Simd), smallest, 0x10), // underflow unmasked: FTZ does nothing
        (denormal, one, 0x1E80, Some(Simd), denormal, 2),
        (denormal, one, 0x1E80 | DAZ, None, 0, 0), // a zero is no denormal operand
        (denormal, one, 0x1F80 | FTZ, None, 0, 0x32),
        (denormal, one, 0x1680 | FTZ | DAZ, None, 0, 0),
    ];
    for (a, b, mxcsr, exception, result, flags) in table {
        let mut flat = Flat::long();
        (flat.cpu.x.ymm[0][0], flat.cpu.x.ymm[1][0], flat.cpu.x.mxcsr) = (a, b, mxcsr);
        assert_eq!(flat.run(&[0xF3, 0x0F, 0x59, 0xC1]), exception, "{a:#x} {b:#x} {mxcsr:#x}"); // mulss
        assert_eq!(flat.cpu.x.ymm[0][0], result, "{a:#x} {b:#x} {mxcsr:#x}");
        assert_eq!(flat.cpu.x.mxcsr, mxcsr | flags, "{a:#x} {b:#x} {mxcsr:#x}");
    }
}

#[test]
fn precision_beside_an_unmasked_overflow_needs_an_inexact_result() {
    const MULSS: &[u8] = &[0xF3, 0x0F, 0x59, 0xC1];
    const DIVSD: &[u8] = &[0xF2, 0x0F, 0x5E, 0xC1];
    const CVTSD2SS: &[u8] = &[0xF2, 0x0F, 0x5A, 0xC1];
    const FMADD231SS: &[u8] = &[0xC4, 0xE2, 0x79, 0xB9, 0xC1]; // xmm0 += xmm0 × xmm1
    let big = 0x7F00_0000;
    let table = [
        (MULSS, big, 0x4000_0000, 8), // 2^127 × 2
        (MULSS, big | 1, 0x4000_0001, 0x28),
        (DIVSD, 0x7FE0 << 48, 0x3FD0 << 48, 8),
        (DIVSD, 0x7FE0 << 48, 0x3FD8 << 48, 0x28),
        (CVTSD2SS, 0, 0x47F0 << 48, 8),
        (CVTSD2SS, 0, 0x47F0 << 48 | 1, 0x28),
        (FMADD231SS, big, 0x3F80_0000, 8),    // 2^127 + 2^127
        (FMADD231SS, big, 0x3F80_0001, 0x28), // one bit too long
    ];
    for (code, a, b, flags) in table {
        let mut flat = Flat::long();
        (flat.cpu.x.ymm[0][0], flat.cpu.x.ymm[1][0]) = (a, b);
        flat.cpu.x.mxcsr = 0x1F80 & !(1 << 10);
        assert_eq!(flat.run(code), Some(Simd), "{code:02x?} {b:#x}");
        assert_eq!(flat.cpu.x.mxcsr & 0x3F, flags, "{code:02x?} {b:#x}");
        assert_eq!(flat.cpu.x.ymm[0][0], a, "{code:02x?} {b:#x}");
    }
}

#[test]
fn an_exact_tiny_result_is_an_underflow_only_if_that_is_unmasked() {
    let mut flat = Flat::long();
    (flat.cpu.x.ymm[0][0], flat.cpu.x.ymm[1][0]) = (0x0080_0000, 0x8000_0001 | 0x0040_0000);
    flat.run_all(&[ADDSS]);
    assert_eq!(flat.cpu.x.mxcsr, 0x1F80 | 2, "a denormal operand, no underflow");
    flat.cpu.x.ymm[0][0] = 0x0080_0000;
    flat.cpu.x.mxcsr = 0x1F80 & !(1 << 11);
    assert_eq!(flat.run(ADDSS), Some(Simd));
    assert_eq!(flat.cpu.x.mxcsr & 0x3F, 2 | 0x10);
}

#[test]
fn an_unmasked_x87_exception_waits_for_the_next_waiting_instruction() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.ram[0x2000..0x2002].copy_from_slice(&0x37Bu16.to_le_bytes());
    flat.run_all(&[FLDCW, FLDZ, FLD1, FDIV]);
    assert_eq!(flat.cpu.x.x87.status & 0x80FF, 0x8084, "division by zero, summary, busy");
    let before = flat.cpu.x.x87;
    for waiting in [FLD1, WAIT, FLDCW] {
        assert_eq!(flat.run(waiting), Some(Mf));
        assert_eq!(flat.cpu.x.x87, before);
    }
    assert_eq!(flat.run(&[0x0F, 0xFC, 0xC1]), Some(Mf), "MMX waits too");
    flat.run_all(&[FNSTSW_AX]);
    assert_eq!(flat.cpu.gpr[0] & 0x80FF, 0x8084);
    flat.run_all(&[FNCLEX, WAIT]);
}

#[test]
fn unmasking_a_recorded_exception_makes_it_pending() {
    let mut flat = Flat::long();
    flat.run_all(&[FLDZ, FLD1, FDIV]);
    assert_eq!(flat.cpu.x.x87.status & 0x80, 0);
    flat.cpu.gpr[0] = 0x2000;
    flat.ram[0x2000..0x2002].copy_from_slice(&0x340u16.to_le_bytes());
    flat.run_all(&[FLDCW]);
    assert_eq!(flat.run(WAIT), Some(Mf));
}
