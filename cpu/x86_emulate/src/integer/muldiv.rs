//! MUL, IMUL, DIV, IDIV, MULX.

use super::operand::{attempt, by_width, operand_bytes, read_reg, read_source, write_reg};
use crate::core::{Core, Fault, Word};
use crate::cpu::reg::{RAX, RDX};
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};
use x86_defs::Exception;

/// High half of the double-width accumulator: AH for bytes, rDX otherwise.
#[inline(always)]
fn high_register<W: Word>() -> u8 {
    if W::BYTES == 1 { 0x20 } else { RDX as u8 }
}

fn write_pair<C: Core, W: Word>(c: &mut C, value: u128) {
    write_reg(c, RAX as u8, W::from_u64(value as u64));
    write_reg(c, high_register::<W>(), W::from_u64((value >> W::BITS) as u64));
}

/// CF and OF as given; SF and PF from the low half, ZF and AF clear: what processors leave.
fn set_flags<C: Core, W: Word>(c: &mut C, low: W, overflow: bool) {
    c.cpu_mut().flags.set_result_cf_of(low.sext(), overflow, overflow);
}

fn mul<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op));
    let r = u128::from(read_reg::<W, C>(c, RAX as u8).zext()) * u128::from(b.zext());
    write_pair::<C, W>(c, r);
    set_flags(c, W::from_u64(r as u64), r >> W::BITS != 0);
    Step::Next
}
/// Signed product and whether it does not fit `W`.
#[inline(always)]
fn signed_product<W: Word>(a: W, b: W) -> (u128, bool) {
    let r = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    (r as u128, i128::from(W::from_u64(r as u64).sext() as i64) != r)
}
fn imul_wide<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op));
    let (r, overflow) = signed_product(read_reg::<W, C>(c, RAX as u8), b);
    write_pair::<C, W>(c, r);
    set_flags(c, W::from_u64(r as u64), overflow);
    Step::Next
}
fn imul_two<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op));
    let (r, overflow) = signed_product(read_reg::<W, C>(c, op.dst), b);
    let r = W::from_u64(r as u64);
    write_reg(c, op.dst, r);
    set_flags(c, r, overflow);
    Step::Next
}
fn imul_three<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let a = attempt!(read_source::<C, W, MEM>(c, op));
    let (r, overflow) = signed_product(a, W::from_u64(op.imm));
    let r = W::from_u64(r as u64);
    write_reg(c, op.dst, r);
    set_flags(c, r, overflow);
    Step::Next
}

fn divide_error<C: Core>(c: &mut C) -> Fault {
    c.raise(Exception::DivideError, 0)
}
fn dividend<C: Core, W: Word>(c: &C) -> u128 {
    let low = read_reg::<W, C>(c, RAX as u8).zext();
    let high = read_reg::<W, C>(c, high_register::<W>()).zext();
    u128::from(high) << W::BITS | u128::from(low)
}
fn div<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = u128::from(attempt!(read_source::<C, W, MEM>(c, op)).zext());
    let a = dividend::<C, W>(c);
    let quotient = a.checked_div(b).filter(|q| q >> W::BITS == 0);
    let quotient = attempt!(quotient.ok_or_else(|| divide_error(c)));
    let remainder = a - quotient * b;
    write_reg(c, RAX as u8, W::from_u64(quotient as u64));
    write_reg(c, high_register::<W>(), W::from_u64(remainder as u64));
    Step::Next
}
fn idiv<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = i128::from(attempt!(read_source::<C, W, MEM>(c, op)).sext() as i64);
    let spare = 128 - 2 * W::BITS;
    let a = (dividend::<C, W>(c) << spare) as i128 >> spare;
    let fits = |q: &i128| i128::from(W::from_u64(*q as u64).sext() as i64) == *q;
    let quotient = a.checked_div(b).filter(fits);
    let quotient = attempt!(quotient.ok_or_else(|| divide_error(c)));
    let remainder = a - quotient * b;
    write_reg(c, RAX as u8, W::from_u64(quotient as u64));
    write_reg(c, high_register::<W>(), W::from_u64(remainder as u64));
    Step::Next
}
/// MULX: `dst` gets the high half, `aux` the low one; the high half wins if they are the same.
fn mulx<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op));
    let r = u128::from(read_reg::<W, C>(c, RDX as u8).zext()) * u128::from(b.zext());
    write_reg(c, op.aux, W::from_u64(r as u64));
    write_reg(c, op.dst, W::from_u64((r >> W::BITS) as u64));
    Step::Next
}

fn unused<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let mnemonic = insn.mnemonic();
    if !matches!(mnemonic, Mnemonic::Mul | Mnemonic::Imul | Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Mulx) {
        return None;
    }
    let mut op = ctx.op(insn, unused);
    let bytes = operand_bytes(insn, 0);
    // The multiplied operand: the only one, the second, or MULX's third.
    let source = match (mnemonic, insn.op_count()) {
        (Mnemonic::Mulx, _) => 2,
        (_, 1) => 0,
        _ => 1,
    };
    let memory = insn.op_kind(source) == OpKind::Memory;
    if !memory {
        op.src = gpr(insn.op_register(source));
    }
    if insn.op_count() > 1 {
        op.dst = gpr(insn.op0_register());
    }
    op.run = match (mnemonic, insn.op_count(), memory) {
        (Mnemonic::Mul, _, false) => by_width!(bytes, mul::<C; W, false>),
        (Mnemonic::Mul, _, true) => by_width!(bytes, mul::<C; W, true>),
        (Mnemonic::Imul, 1, false) => by_width!(bytes, imul_wide::<C; W, false>),
        (Mnemonic::Imul, 1, true) => by_width!(bytes, imul_wide::<C; W, true>),
        (Mnemonic::Imul, 2, false) => by_width!(bytes, imul_two::<C; W, false>),
        (Mnemonic::Imul, 2, true) => by_width!(bytes, imul_two::<C; W, true>),
        (Mnemonic::Imul, _, false) => by_width!(bytes, imul_three::<C; W, false>),
        (Mnemonic::Imul, _, true) => by_width!(bytes, imul_three::<C; W, true>),
        (Mnemonic::Div, _, false) => by_width!(bytes, div::<C; W, false>),
        (Mnemonic::Div, _, true) => by_width!(bytes, div::<C; W, true>),
        (Mnemonic::Idiv, _, false) => by_width!(bytes, idiv::<C; W, false>),
        (Mnemonic::Idiv, _, true) => by_width!(bytes, idiv::<C; W, true>),
        (_, _, in_memory) => {
            op.aux = gpr(insn.op1_register());
            if in_memory {
                by_width!(bytes, mulx::<C; W, true>)
            } else {
                by_width!(bytes, mulx::<C; W, false>)
            }
        }
    };
    Some(op)
}
