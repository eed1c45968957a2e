//! Near control flow: JMP, Jcc, CALL, RET, LOOP, JCXZ. Far transfers are in `system`.
//!
//! Branch targets are offsets from the block's start, as the instructions were decoded.

use super::mov::{by_condition, condition};
use super::operand::{attempt, by_width, one_operand};
use super::stack;
use crate::core::{Core, Fault, Word};
use crate::cpu::{RIP, reg};
use crate::lower::{LowerContext, gpr};
use crate::mode::ModeKey;
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};
use x86_defs::{Exception, SegmentIndex};

/// Whether a 48-bit linear address is canonical.
#[inline(always)]
pub(crate) fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// Checks that `ip` may be jumped to: canonical, or within CS's limit.
#[inline(always)]
pub(crate) fn check_target<C: Core>(c: &mut C, ip: u64) -> Result<(), Fault> {
    let cpu = c.cpu();
    let ok = if cpu.mode.has(ModeKey::LONG) {
        is_canonical(ip)
    } else {
        cpu.mode.has(ModeKey::FLAT_CS) || ip <= u64::from(cpu.segment(SegmentIndex::Cs).limit)
    };
    if ok { Ok(()) } else { Err(c.gp(0)) }
}

#[inline(always)]
fn jump_to<C: Core>(c: &mut C, ip: u64) -> Step {
    attempt!(check_target(c, ip));
    c.cpu_mut().gpr[RIP] = ip;
    Step::Branch
}

/// Target of a relative branch; `W` is the operand size.
#[inline(always)]
fn target<C: Core, W: Word>(c: &C, op: &Op<C>) -> u64 {
    W::from_u64(c.cpu().gpr[RIP].wrapping_add(op.imm)).zext()
}

fn jmp<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let ip = target::<C, W>(c, op);
    jump_to(c, ip)
}
fn jcc<C: Core, W: Word, const CC: u8>(c: &mut C, op: &Op<C>) -> Step {
    if c.cpu().flags.condition::<CC>() { jmp::<C, W>(c, op) } else { op.end_block(c) }
}
fn call<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let ip = target::<C, W>(c, op);
    attempt!(check_target(c, ip));
    let next = W::from_u64(op.next_ip(c));
    attempt!(stack::push::<C, W>(c, next));
    c.cpu_mut().gpr[RIP] = ip;
    Step::Branch
}
fn jmp_indirect<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let ip = attempt!(super::operand::read_source::<C, W, MEM>(c, op)).zext();
    jump_to(c, ip)
}
fn call_indirect<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let ip = attempt!(super::operand::read_source::<C, W, MEM>(c, op)).zext();
    attempt!(check_target(c, ip));
    let next = W::from_u64(op.next_ip(c));
    attempt!(stack::push::<C, W>(c, next));
    c.cpu_mut().gpr[RIP] = ip;
    Step::Branch
}
/// RET, RET imm16 (`imm` is zero without one).
fn ret<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let ip = attempt!(stack::peek::<C, W>(c, 0)).zext();
    attempt!(check_target(c, ip));
    stack::advance(c, u64::from(W::BYTES) + (op.imm & 0xFFFF));
    c.cpu_mut().gpr[RIP] = ip;
    Step::Branch
}

/// LOOP (`KIND` 0), LOOPE (1), LOOPNE (2), JCXZ (3). `A` is the address size, which counts rCX.
fn loop_<C: Core, A: Word, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    let count = super::read_reg::<A, C>(c, reg::RCX as u8).zext();
    let left = A::from_u64(count.wrapping_sub(if KIND == 3 { 0 } else { 1 }));
    let zf = c.cpu().flags.zf();
    let taken = match KIND {
        0 => left.zext() != 0,
        1 => left.zext() != 0 && zf,
        2 => left.zext() != 0 && !zf,
        _ => left.zext() == 0,
    };
    let step = if taken {
        let ip = match op.width {
            2 => target::<C, u16>(c, op),
            4 => target::<C, u32>(c, op),
            _ => target::<C, u64>(c, op),
        };
        attempt!(check_target(c, ip));
        c.cpu_mut().gpr[RIP] = ip;
        Step::Branch
    } else {
        op.end_block(c)
    };
    if KIND != 3 {
        super::write_reg(c, reg::RCX as u8, left);
    }
    step
}

/// BOUND: #BR if the signed index is outside of the two bounds in memory.
fn bound<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let bytes = u64::from(W::BYTES);
    let at = attempt!(op.linear_read(c, 2 * bytes));
    let low = attempt!(c.load::<W>(at)).sext() as i64;
    let high = attempt!(c.load::<W>(at.wrapping_add(bytes))).sext() as i64;
    let index = super::read_reg::<W, C>(c, op.dst).sext() as i64;
    if index < low || index > high {
        c.raise(Exception::BoundRange, 0);
        return Step::Fault;
    }
    Step::Next
}

/// Operand size in bytes of a near branch, and its target from the block's start.
fn near_target(insn: &Instruction) -> Option<(u32, u64)> {
    Some(match insn.op0_kind() {
        OpKind::NearBranch16 => (2, u64::from(insn.near_branch16())),
        OpKind::NearBranch32 => (4, u64::from(insn.near_branch32())),
        OpKind::NearBranch64 => (8, insn.near_branch64()),
        _ => return None,
    })
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let direct = |pick: fn(u32) -> Handler<C>| {
        let (bytes, target) = near_target(insn)?;
        let mut op = ctx.op(insn, pick(bytes));
        op.imm = target;
        op.width = bytes as u8;
        Some(op)
    };
    match insn.mnemonic() {
        Mnemonic::Jmp if near_target(insn).is_some() => direct(|bytes| by_width!(bytes, jmp::<C; W>)),
        Mnemonic::Call if near_target(insn).is_some() => direct(|bytes| by_width!(bytes, call::<C; W>)),
        Mnemonic::Jmp | Mnemonic::Call => lower_indirect(insn, ctx),
        Mnemonic::Ret => {
            use x86_decode::Code as K;
            let bytes = match insn.code() {
                K::Retnw | K::Retnw_imm16 => 2,
                K::Retnd | K::Retnd_imm16 => 4,
                _ => 8,
            };
            let mut op = ctx.op(insn, by_width!(bytes, ret::<C; W>));
            if insn.op_count() == 0 {
                op.imm = 0;
            }
            Some(op)
        }
        Mnemonic::Bound => {
            let wide = insn.op0_register().size() == 4;
            let run: Handler<C> = if wide { bound::<C, u32> } else { bound::<C, u16> };
            Some(Op { dst: gpr(insn.op0_register()), ..ctx.op(insn, run) })
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => lower_loop(insn, ctx),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => lower_loop(insn, ctx),
        _ if insn.is_jcc_short_or_near() => {
            let (bytes, target) = near_target(insn)?;
            let cc = condition(insn);
            let run = match bytes {
                2 => by_condition!(cc, |K| jcc::<C, u16, K> as Handler<C>),
                4 => by_condition!(cc, |K| jcc::<C, u32, K> as Handler<C>),
                _ => by_condition!(cc, |K| jcc::<C, u64, K> as Handler<C>),
            };
            let mut op = ctx.op(insn, run);
            op.imm = target;
            Some(op)
        }
        _ => None,
    }
}

fn lower_indirect<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use x86_decode::MemorySize as M;
    let in_memory = insn.op0_kind() == OpKind::Memory;
    if in_memory
        && !matches!(
            insn.memory_size(),
            M::UInt16 | M::UInt32 | M::UInt64 | M::QwordOffset | M::DwordOffset | M::WordOffset
        )
    {
        return None; // far
    }
    if !in_memory && insn.op0_kind() != OpKind::Register {
        return None;
    }
    let call = insn.mnemonic() == Mnemonic::Call;
    let (mut op, _, bytes) = one_operand(insn, ctx, jmp::<C, u64>);
    op.src = op.dst;
    op.run = match (call, in_memory) {
        (false, false) => by_width!(bytes, jmp_indirect::<C; W, false>),
        (false, true) => by_width!(bytes, jmp_indirect::<C; W, true>),
        (true, false) => by_width!(bytes, call_indirect::<C; W, false>),
        (true, true) => by_width!(bytes, call_indirect::<C; W, true>),
    };
    Some(op)
}

fn lower_loop<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use x86_decode::Code as K;
    let (bytes, target) = near_target(insn)?;
    // The count register's width is the address size.
    let count = match insn.code() {
        K::Loop_rel8_16_CX | K::Loop_rel8_32_CX | K::Loope_rel8_16_CX | K::Loope_rel8_32_CX => 2,
        K::Loopne_rel8_16_CX | K::Loopne_rel8_32_CX | K::Jcxz_rel8_16 | K::Jcxz_rel8_32 => 2,
        K::Loop_rel8_16_RCX | K::Loop_rel8_64_RCX | K::Loope_rel8_16_RCX | K::Loope_rel8_64_RCX => 8,
        K::Loopne_rel8_16_RCX | K::Loopne_rel8_64_RCX | K::Jrcxz_rel8_16 | K::Jrcxz_rel8_64 => 8,
        _ => 4,
    };
    let run = match insn.mnemonic() {
        Mnemonic::Loop => by_width!(count, loop_::<C; W, 0>),
        Mnemonic::Loope => by_width!(count, loop_::<C; W, 1>),
        Mnemonic::Loopne => by_width!(count, loop_::<C; W, 2>),
        _ => by_width!(count, loop_::<C; W, 3>),
    };
    let mut op = ctx.op(insn, run);
    op.imm = target;
    op.width = bytes as u8;
    Some(op)
}
