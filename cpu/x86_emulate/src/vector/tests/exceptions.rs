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

#[test]
fn pointers_of_the_last_x87_instruction() {
    let mut flat = Flat::long();
    flat.cpu.gpr[0] = 0x2000;
    flat.run_all(&[&[0xDD, 0x40, 0x08]]); // fld qword [rax+8]
    let x87 = &flat.cpu.x.x87;
    assert_eq!((x87.instruction_pointer, x87.data_pointer), (0x1000, 0x2008));
    assert_eq!(x87.opcode >> 8, 5);
    flat.cpu.gpr[crate::cpu::RIP] = 0x1100;
    flat.run_all(&[&[0xD9, 0xE0], FNCLEX]); // fchs; control instructions leave them
    let x87 = &flat.cpu.x.x87;
    assert_eq!((x87.instruction_pointer, x87.data_pointer, x87.opcode), (0x1100, 0x2008, 0x1E0));
}
