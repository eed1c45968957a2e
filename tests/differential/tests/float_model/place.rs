//! Where the operands of a case are.

use crate::vector::Bytes;
use differential::generate::linear;
use differential::layout::{QUIET_BOUNDARY, WINDOW};
use differential::state::{Case, Registers};
use iced_x86::{Instruction, InstructionInfoFactory, OpKind, Register};
use std::cmp::Ordering;

/// Offset of the memory operand in the window, if all of it can be read and written.
pub fn memory(case: &Case, insn: &Instruction) -> Option<usize> {
    if case.window_at != QUIET_BOUNDARY - WINDOW as u64 / 2 {
        return None;
    }
    let used = InstructionInfoFactory::new().info(insn).used_memory().first().copied()?;
    let at = linear(&used, case).wrapping_sub(case.window_at);
    (at < (WINDOW - 32) as u64).then_some(at as usize)
}

/// Whether the instruction has an operand in memory.
pub fn in_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
}

fn general(r: Register) -> usize {
    r.full_register() as usize - Register::RAX as usize
}

/// The physical place of an MMX register among ST(i): TOP decides.
fn mmx(registers: &Registers, r: Register) -> usize {
    let top = usize::from(registers.x87_status() >> 11 & 7);
    (r as usize - Register::MM0 as usize + 8 - top) & 7
}

/// Operand `i` of `insn`; what is beyond its size means nothing.
pub fn read(case: &Case, insn: &Instruction, i: u32) -> Bytes {
    let mut bytes = [0; 32];
    let words = |words: &[u64], bytes: &mut Bytes| {
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    };
    let r = &case.registers;
    match insn.op_kind(i) {
        OpKind::Memory => {
            let at = memory(case, insn).unwrap_or(0);
            let len = insn.memory_size().size().min(32);
            bytes[..len].copy_from_slice(&case.window[at..at + len]);
        }
        OpKind::Register => match insn.op_register(i) {
            x if x.is_vector_register() => words(&r.ymm(x.number()), &mut bytes),
            x if x.is_mm() => words(&[r.st(mmx(r, x)).0], &mut bytes),
            x if x.is_gpr() => words(&[r.gpr[general(x)]], &mut bytes),
            _ => {}
        },
        _ => {}
    }
    bytes
}

/// Puts `value` where operand `i` is read from.
pub fn patch(case: &mut Case, insn: &Instruction, i: u32, value: &Bytes) {
    let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|k| value[8 * n + k]));
    match insn.op_kind(i) {
        OpKind::Memory => {
            let len = insn.memory_size().size().min(32);
            if let Some(at) = memory(case, insn) {
                case.window[at..at + len].copy_from_slice(&value[..len]);
            }
        }
        OpKind::Register => match insn.op_register(i) {
            x if x.is_vector_register() => {
                case.registers.set_ymm(x.number(), [word(0), word(1), word(2), word(3)]);
            }
            x if x.is_mm() => {
                let at = mmx(&case.registers, x);
                case.registers.set_st(at, (word(0), 0xFFFF));
            }
            x if x.is_gpr() && !in_memory(insn) => case.registers.gpr[general(x)] = word(0),
            _ => {}
        },
        _ => {}
    }
}

/// Writes the vector register that is operand 0.
pub fn write_vector(r: &mut Registers, insn: &Instruction, value: Bytes) {
    let word = |n: usize| u64::from_le_bytes(std::array::from_fn(|k| value[8 * n + k]));
    r.set_ymm(insn.op0_register().number(), [word(0), word(1), word(2), word(3)]);
}

/// Writes the general register that is operand 0; 32 bits clear the upper half.
pub fn write_general(r: &mut Registers, insn: &Instruction, value: u64) {
    r.gpr[general(insn.op0_register())] = value;
}

/// What every instruction on MMX registers does: TOP becomes 0, all registers are in use. Registers keep their
/// physical places.
pub fn enter_mmx(r: &mut Registers) {
    let top = usize::from(r.x87_status() >> 11 & 7);
    let physical: [_; 8] = std::array::from_fn(|i| r.st((i + 8 - top) & 7));
    r.set_x87(r.x87_control(), r.x87_status() & !0x3800, 0xFF);
    for (i, value) in physical.into_iter().enumerate() {
        r.set_st(i, value);
    }
}

/// Writes the MMX register that is operand 0, after [`enter_mmx`].
pub fn write_mmx(r: &mut Registers, insn: &Instruction, value: u64) {
    r.set_st(insn.op0_register() as usize - Register::MM0 as usize, (value, 0xFFFF));
}

/// ZF, PF and CF of a comparison's result.
pub fn comparison_flags(relation: Option<Ordering>) -> u64 {
    const CF: u64 = 1;
    const PF: u64 = 4;
    const ZF: u64 = 0x40;
    match relation {
        None => ZF | PF | CF,
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
    }
}
