//! Shifts and rotates: SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD, and BMI2's SHLX, SHRX, SARX, RORX.
//!
//! A count of zero changes no flags. OF is defined for a count of one only; beyond that this follows what
//! processors do (the value it would have for the last one-bit step).

use super::operand::{attempt, by_width, one_operand, operand_bytes, read_reg, write_reg};
use crate::core::{Core, Word};
use crate::cpu::reg::RCX;
use crate::flags::LazyFlags;
use crate::lower::{LowerContext, gpr};
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};

trait Shift: 'static {
    /// `count` is masked to 5 (6) bits and not zero.
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W;
}

#[inline(always)]
fn msb<W: Word>(v: u64) -> bool {
    v >> (W::BITS - 1) & 1 != 0
}

struct Shl;
impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let wide = u128::from(a.zext()) << count;
        let r = W::from_u64(wide as u64);
        let cf = wide >> W::BITS & 1 != 0;
        flags.set_result_cf_of(r.sext(), cf, cf ^ msb::<W>(r.zext()));
        r
    }
}
struct Shr;
impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let before = a.zext() >> (count - 1);
        let r = W::from_u64(before >> 1);
        // For a count of one OF is the sign before; the last step of longer counts shifts a zero in.
        flags.set_result_cf_of(r.sext(), before & 1 != 0, msb::<W>(before));
        r
    }
}
struct Sar;
impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let before = a.sext() as i64 >> (count - 1);
        let r = W::from_u64((before >> 1) as u64);
        flags.set_result_cf_of(r.sext(), before & 1 != 0, false);
        r
    }
}

#[inline(always)]
fn rotated_left<W: Word>(a: u64, count: u32) -> u64 {
    if count == 0 { a } else { W::from_u64(a << count | a >> (W::BITS - count)).zext() }
}
struct Rol;
impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let r = rotated_left::<W>(a.zext(), count % W::BITS);
        let cf = r & 1 != 0;
        flags.set_cf_of(cf, cf ^ msb::<W>(r));
        W::from_u64(r)
    }
}
struct Ror;
impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let r = rotated_left::<W>(a.zext(), (W::BITS - count % W::BITS) % W::BITS);
        flags.set_cf_of(msb::<W>(r), msb::<W>(r) ^ msb::<W>(r << 1));
        W::from_u64(r)
    }
}
struct Rcl;
impl Shift for Rcl {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let count = count % (W::BITS + 1);
        if count == 0 {
            return a;
        }
        let wide = u128::from(flags.cf()) << W::BITS | u128::from(a.zext());
        let turned = wide << count | wide >> (W::BITS + 1 - count);
        let r = W::from_u64(turned as u64);
        let cf = turned >> W::BITS & 1 != 0;
        flags.set_cf_of(cf, cf ^ msb::<W>(r.zext()));
        r
    }
}
struct Rcr;
impl Shift for Rcr {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W, count: u32) -> W {
        let count = count % (W::BITS + 1);
        if count == 0 {
            return a;
        }
        let wide = u128::from(flags.cf()) << W::BITS | u128::from(a.zext());
        let turned = wide >> count | wide << (W::BITS + 1 - count);
        let r = W::from_u64(turned as u64);
        let cf = turned >> W::BITS & 1 != 0;
        flags.set_cf_of(cf, msb::<W>(r.zext()) ^ msb::<W>(r.zext() << 1));
        r
    }
}

#[inline(always)]
fn mask<W: Word>() -> u32 {
    if W::BYTES == 8 { 63 } else { 31 }
}

/// Count from CL (`CL`) or the immediate.
#[inline(always)]
fn count_of<C: Core, W: Word, const CL: bool>(c: &C, op: &Op<C>) -> u32 {
    let raw = if CL { c.cpu().gpr[RCX] } else { op.imm };
    raw as u32 & mask::<W>()
}

fn shift_reg<C: Core, S: Shift, W: Word, const CL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let count = count_of::<C, W, CL>(c, op);
    let a = read_reg::<W, C>(c, op.dst);
    // Even a count of zero clears the upper half of a 32-bit destination.
    let r = if count == 0 { a } else { S::apply(&mut c.cpu_mut().flags, a, count) };
    write_reg(c, op.dst, r);
    Step::Next
}
fn shift_mem<C: Core, S: Shift, W: Word, const CL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let count = count_of::<C, W, CL>(c, op);
    let mut flags = c.cpu().flags;
    attempt!(c.modify::<W>(at, |a| if count == 0 { a } else { S::apply(&mut flags, a, count) }));
    c.cpu_mut().flags = flags;
    Step::Next
}
fn pick<C: Core, S: Shift>(in_memory: bool, cl: bool, bytes: u32) -> Handler<C> {
    match (in_memory, cl) {
        (false, false) => by_width!(bytes, shift_reg::<C, S; W, false>),
        (false, true) => by_width!(bytes, shift_reg::<C, S; W, true>),
        (true, false) => by_width!(bytes, shift_mem::<C, S; W, false>),
        (true, true) => by_width!(bytes, shift_mem::<C, S; W, true>),
    }
}

/// SHLD (`LEFT`) and SHRD. For 16-bit operands a count above 16 is undefined: this shifts the
/// 48-bit string dst:src:dst, as processors do.
#[inline(always)]
fn double<W: Word, const LEFT: bool>(flags: &mut LazyFlags, a: W, b: W, count: u32) -> W {
    if count == 0 {
        return a;
    }
    let (a, b) = (u128::from(a.zext()), u128::from(b.zext()));
    let bits = W::BITS;
    let (r, cf) = if LEFT {
        let low = if bits == 16 { b << 16 | a } else { b };
        let low_bits = if bits == 16 { 32 } else { bits };
        let cf = if count <= bits { a >> (bits - count) & 1 } else { low >> (low_bits + bits - count) & 1 };
        let high = if count < 64 || bits == 64 { a << count } else { 0 };
        ((high | low >> (low_bits - count.min(low_bits))) as u64, cf != 0)
    } else {
        let wide = if bits == 16 { a << 32 | b << 16 | a } else { b << bits | a };
        ((wide >> count) as u64, wide >> (count - 1) & 1 != 0)
    };
    let r = W::from_u64(r);
    flags.set_result_cf_of(r.sext(), cf, msb::<W>(r.zext()) ^ msb::<W>(a as u64));
    r
}
fn double_reg<C: Core, W: Word, const LEFT: bool, const CL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let count = count_of::<C, W, CL>(c, op);
    let (a, b) = (read_reg::<W, C>(c, op.dst), read_reg::<W, C>(c, op.src));
    let r = double::<W, LEFT>(&mut c.cpu_mut().flags, a, b, count);
    write_reg(c, op.dst, r);
    Step::Next
}
fn double_mem<C: Core, W: Word, const LEFT: bool, const CL: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let count = count_of::<C, W, CL>(c, op);
    let b = read_reg::<W, C>(c, op.src);
    let mut flags = c.cpu().flags;
    attempt!(c.modify::<W>(at, |a| double::<W, LEFT>(&mut flags, a, b, count)));
    c.cpu_mut().flags = flags;
    Step::Next
}

/// SHLX (0), SHRX (1), SARX (2): no flags; count in a register (`aux`).
fn shift_x<C: Core, W: Word, const KIND: u8, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let a = attempt!(super::operand::read_source::<C, W, MEM>(c, op));
    let count = read_reg::<W, C>(c, op.aux).zext() as u32 & mask::<W>();
    let r = match KIND {
        0 => a.zext() << count,
        1 => a.zext() >> count,
        _ => (a.sext() as i64 >> count) as u64,
    };
    write_reg(c, op.dst, W::from_u64(r));
    Step::Next
}
fn rorx<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let a = attempt!(super::operand::read_source::<C, W, MEM>(c, op));
    let count = op.imm as u32 & mask::<W>();
    let r = rotated_left::<W>(a.zext(), (W::BITS - count) % W::BITS);
    write_reg(c, op.dst, W::from_u64(r));
    Step::Next
}

fn unused<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let pick: fn(bool, bool, u32) -> Handler<C> = match insn.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => pick::<C, Shl>,
        Mnemonic::Shr => pick::<C, Shr>,
        Mnemonic::Sar => pick::<C, Sar>,
        Mnemonic::Rol => pick::<C, Rol>,
        Mnemonic::Ror => pick::<C, Ror>,
        Mnemonic::Rcl => pick::<C, Rcl>,
        Mnemonic::Rcr => pick::<C, Rcr>,
        Mnemonic::Shld | Mnemonic::Shrd => return lower_double(insn, ctx),
        Mnemonic::Shlx | Mnemonic::Shrx | Mnemonic::Sarx | Mnemonic::Rorx => return lower_x(insn, ctx),
        _ => return None,
    };
    let (mut op, in_memory, bytes) = one_operand(insn, ctx, unused);
    let cl = insn.op1_kind() == OpKind::Register;
    op.run = pick(in_memory, cl, bytes);
    Some(op)
}

fn lower_double<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let (mut op, in_memory, bytes) = one_operand(insn, ctx, unused);
    op.src = gpr(insn.op1_register());
    let left = insn.mnemonic() == Mnemonic::Shld;
    let cl = insn.op2_kind() == OpKind::Register;
    op.run = match (in_memory, left, cl) {
        (false, true, false) => by_width!(bytes, double_reg::<C; W, true, false>),
        (false, true, true) => by_width!(bytes, double_reg::<C; W, true, true>),
        (false, false, false) => by_width!(bytes, double_reg::<C; W, false, false>),
        (false, false, true) => by_width!(bytes, double_reg::<C; W, false, true>),
        (true, true, false) => by_width!(bytes, double_mem::<C; W, true, false>),
        (true, true, true) => by_width!(bytes, double_mem::<C; W, true, true>),
        (true, false, false) => by_width!(bytes, double_mem::<C; W, false, false>),
        (true, false, true) => by_width!(bytes, double_mem::<C; W, false, true>),
    };
    Some(op)
}

fn lower_x<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let mut op = ctx.op(insn, unused);
    let bytes = operand_bytes(insn, 0);
    op.dst = gpr(insn.op0_register());
    let memory = insn.op1_kind() == OpKind::Memory;
    if !memory {
        op.src = gpr(insn.op1_register());
    }
    if insn.op2_kind() == OpKind::Register {
        op.aux = gpr(insn.op2_register());
    }
    op.run = match (insn.mnemonic(), memory) {
        (Mnemonic::Shlx, false) => by_width!(bytes, shift_x::<C; W, 0, false>),
        (Mnemonic::Shlx, true) => by_width!(bytes, shift_x::<C; W, 0, true>),
        (Mnemonic::Shrx, false) => by_width!(bytes, shift_x::<C; W, 1, false>),
        (Mnemonic::Shrx, true) => by_width!(bytes, shift_x::<C; W, 1, true>),
        (Mnemonic::Sarx, false) => by_width!(bytes, shift_x::<C; W, 2, false>),
        (Mnemonic::Sarx, true) => by_width!(bytes, shift_x::<C; W, 2, true>),
        (_, false) => by_width!(bytes, rorx::<C; W, false>),
        (_, true) => by_width!(bytes, rorx::<C; W, true>),
    };
    Some(op)
}
