//! LOCK forms, XADD, CMPXCHG, CMPXCHG8B, CMPXCHG16B.

use super::operand::{Form, attempt, by_width, read_reg, two_operands, write_reg};
use super::{alu, bits};
use crate::core::{Core, Word};
use crate::cpu::reg::{RAX, RBX, RCX, RDX};
use crate::lower::LowerContext;
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic};
use x86_defs::flags::ZF;

fn xadd_reg<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let (a, b) = (read_reg::<W, C>(c, op.dst), read_reg::<W, C>(c, op.src));
    let sum = alu::compute::<alu::Add, W, true>(&mut c.cpu_mut().flags, a, b);
    write_reg(c, op.src, a);
    write_reg(c, op.dst, sum);
    Step::Next
}
fn xadd_mem<C: Core, W: Word, const LOCK: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let b = read_reg::<W, C>(c, op.src);
    let mut flags = c.cpu().flags;
    let old = if LOCK {
        attempt!(c.modify_locked::<W>(at, |a| alu::compute::<alu::Add, W, true>(&mut flags, a, b)))
    } else {
        attempt!(c.modify::<W>(at, |a| alu::compute::<alu::Add, W, true>(&mut flags, a, b)))
    };
    c.cpu_mut().flags = flags;
    write_reg(c, op.src, old);
    Step::Next
}

fn cmpxchg_reg<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let (expected, current) = (read_reg::<W, C>(c, RAX as u8), read_reg::<W, C>(c, op.dst));
    let new = read_reg::<W, C>(c, op.src);
    alu::compute::<alu::Cmp, W, true>(&mut c.cpu_mut().flags, expected, current);
    if expected == current {
        write_reg(c, op.dst, new);
    } else {
        write_reg(c, RAX as u8, current);
    }
    Step::Next
}
fn cmpxchg_mem<C: Core, W: Word, const LOCK: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let (expected, new) = (read_reg::<W, C>(c, RAX as u8), read_reg::<W, C>(c, op.src));
    // The destination is written in either case, as the processor does.
    let change = |current: W| if current == expected { new } else { current };
    let current = if LOCK { attempt!(c.modify_locked(at, change)) } else { attempt!(c.modify(at, change)) };
    alu::compute::<alu::Cmp, W, true>(&mut c.cpu_mut().flags, expected, current);
    if current != expected {
        write_reg(c, RAX as u8, current);
    }
    Step::Next
}

fn pair<C: Core>(c: &C, high: usize, low: usize) -> u64 {
    u64::from(read_reg::<u32, C>(c, high as u8)) << 32 | u64::from(read_reg::<u32, C>(c, low as u8))
}
fn cmpxchg8b<C: Core, const LOCK: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, 8));
    let (expected, new) = (pair(c, RDX, RAX), pair(c, RCX, RBX));
    let change = |current: u64| if current == expected { new } else { current };
    let current = if LOCK { attempt!(c.modify_locked(at, change)) } else { attempt!(c.modify(at, change)) };
    c.cpu_mut().flags.replace(ZF, if current == expected { ZF } else { 0 });
    if current != expected {
        write_reg::<u32, C>(c, RAX as u8, current as u32);
        write_reg::<u32, C>(c, RDX as u8, (current >> 32) as u32);
    }
    Step::Next
}
fn cmpxchg16b<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, 16));
    if at & 15 != 0 {
        c.gp(0);
        return Step::Fault;
    }
    let gpr = &c.cpu().gpr;
    let expected = u128::from(gpr[RDX]) << 64 | u128::from(gpr[RAX]);
    let new = u128::from(gpr[RCX]) << 64 | u128::from(gpr[RBX]);
    let current = attempt!(c.compare_exchange_16(at, expected, new));
    c.cpu_mut().flags.replace(ZF, if current == expected { ZF } else { 0 });
    if current != expected {
        let gpr = &mut c.cpu_mut().gpr;
        (gpr[RAX], gpr[RDX]) = (current as u64, (current >> 64) as u64);
    }
    Step::Next
}

fn unused<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

/// Instructions with a LOCK prefix (the decoder accepts it only where it is allowed).
pub(super) fn lower_locked<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    alu::lower_locked(insn, ctx).or_else(|| bits::lower_bt(insn, ctx, true)).or_else(|| {
        match insn.mnemonic() {
            Mnemonic::Xchg => super::mov::lower(insn, ctx),
            _ => lower_with(insn, ctx, true),
        }
    })
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    lower_with(insn, ctx, false)
}

fn lower_with<C: Core>(insn: &Instruction, ctx: &LowerContext, lock: bool) -> Option<Op<C>> {
    match insn.mnemonic() {
        Mnemonic::Xadd | Mnemonic::Cmpxchg => {
            let (mut op, form, bytes) = two_operands(insn, ctx, unused)?;
            let xadd = insn.mnemonic() == Mnemonic::Xadd;
            op.run = match (xadd, form == Form::RegReg, lock) {
                (true, true, _) => by_width!(bytes, xadd_reg::<C; W>),
                (true, false, true) => by_width!(bytes, xadd_mem::<C; W, true>),
                (true, false, false) => by_width!(bytes, xadd_mem::<C; W, false>),
                (false, true, _) => by_width!(bytes, cmpxchg_reg::<C; W>),
                (false, false, true) => by_width!(bytes, cmpxchg_mem::<C; W, true>),
                (false, false, false) => by_width!(bytes, cmpxchg_mem::<C; W, false>),
            };
            Some(op)
        }
        Mnemonic::Cmpxchg8b if lock => Some(ctx.op(insn, cmpxchg8b::<C, true>)),
        Mnemonic::Cmpxchg8b => Some(ctx.op(insn, cmpxchg8b::<C, false>)),
        Mnemonic::Cmpxchg16b => Some(ctx.op(insn, cmpxchg16b::<C>)),
        _ => None,
    }
}
