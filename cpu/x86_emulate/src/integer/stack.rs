//! The stack: PUSH, POP, PUSHA, POPA, ENTER, LEAVE; and the primitives that calls and `system` use.

use super::operand::{attempt, by_width, operand_bytes, read_reg, write_reg};
use crate::core::{Core, Fault, Word, check_segment};
use crate::cpu::reg::{RBP, RSP};
use crate::lower::{LowerContext, gpr};
use crate::mode::ModeKey;
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};
use x86_defs::SegmentIndex;

/// Stack pointer moved by `delta`, as the stack's address size wraps it.
#[inline(always)]
fn moved<C: Core>(c: &C, from: u64, delta: u64) -> u64 {
    let sp = from.wrapping_add(delta);
    match c.cpu().mode.0 & (ModeKey::LONG | ModeKey::BIG_STACK) {
        0 => (from & !0xFFFF) | (sp & 0xFFFF),
        ModeKey::BIG_STACK => sp & 0xFFFF_FFFF,
        _ => sp,
    }
}

/// Linear address of stack offset `sp` for an access of `bytes`.
#[inline(always)]
fn linear<C: Core>(c: &mut C, sp: u64, bytes: u64, write: bool) -> Result<u64, Fault> {
    let mode = c.cpu().mode;
    if mode.has(ModeKey::LONG) {
        return Ok(sp);
    }
    let offset = if mode.has(ModeKey::BIG_STACK) { sp & 0xFFFF_FFFF } else { sp & 0xFFFF };
    if mode.has(ModeKey::FLAT_SS) {
        return Ok(offset);
    }
    check_segment(c, SegmentIndex::Ss as u8, offset, bytes, write)
}

/// Pushes a word; on a fault nothing changes.
#[inline(always)]
pub(crate) fn push<C: Core, W: Word>(c: &mut C, value: W) -> Result<(), Fault> {
    let sp = moved(c, c.cpu().gpr[RSP], 0u64.wrapping_sub(u64::from(W::BYTES)));
    let at = linear(c, sp, u64::from(W::BYTES), true)?;
    c.store(at, value)?;
    c.cpu_mut().gpr[RSP] = sp;
    Ok(())
}

/// Reads the word at `offset` bytes above the stack pointer.
#[inline(always)]
pub(crate) fn peek<C: Core, W: Word>(c: &mut C, offset: u64) -> Result<W, Fault> {
    let sp = moved(c, c.cpu().gpr[RSP], offset);
    let at = linear(c, sp, u64::from(W::BYTES), false)?;
    c.load(at)
}

/// Frees `bytes` of the stack.
#[inline(always)]
pub(crate) fn advance<C: Core>(c: &mut C, bytes: u64) {
    let sp = moved(c, c.cpu().gpr[RSP], bytes);
    c.cpu_mut().gpr[RSP] = sp;
}

/// Pops a word.
#[inline(always)]
pub(crate) fn pop<C: Core, W: Word>(c: &mut C) -> Result<W, Fault> {
    let v = peek::<C, W>(c, 0)?;
    advance(c, u64::from(W::BYTES));
    Ok(v)
}

fn push_reg<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let v = read_reg::<W, C>(c, op.dst);
    attempt!(push(c, v));
    Step::Next
}
fn push_imm<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    attempt!(push(c, W::from_u64(op.imm)));
    Step::Next
}
fn push_mem<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_read(c, u64::from(W::BYTES)));
    let v = attempt!(c.load::<W>(at));
    attempt!(push(c, v));
    Step::Next
}
fn pop_reg<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(pop::<C, W>(c));
    write_reg(c, op.dst, v);
    Step::Next
}
/// The address of POP's memory operand counts from the stack pointer after the pop.
fn pop_mem<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(peek::<C, W>(c, 0));
    let before = c.cpu().gpr[RSP];
    advance(c, u64::from(W::BYTES));
    let done = match op.linear_write(c, u64::from(W::BYTES)) {
        Ok(at) => c.store(at, v),
        Err(fault) => Err(fault),
    };
    if done.is_err() {
        c.cpu_mut().gpr[RSP] = before;
        return Step::Fault;
    }
    Step::Next
}

fn pusha<C: Core, W: Word>(c: &mut C, _: &Op<C>) -> Step {
    let before = c.cpu().gpr[RSP];
    for r in 0..8 {
        let v = if usize::from(r) == RSP { W::from_u64(before) } else { read_reg::<W, C>(c, r) };
        if push(c, v).is_err() {
            c.cpu_mut().gpr[RSP] = before;
            return Step::Fault;
        }
    }
    Step::Next
}
fn popa<C: Core, W: Word>(c: &mut C, _: &Op<C>) -> Step {
    let mut values = [W::from_u64(0); 8];
    for (i, v) in values.iter_mut().enumerate() {
        *v = attempt!(peek::<C, W>(c, i as u64 * u64::from(W::BYTES)));
    }
    for (i, v) in values.into_iter().enumerate() {
        if 7 - i != RSP {
            write_reg(c, (7 - i) as u8, v);
        }
    }
    advance(c, 8 * u64::from(W::BYTES));
    Step::Next
}

fn leave<C: Core, W: Word>(c: &mut C, _: &Op<C>) -> Step {
    let before = c.cpu().gpr[RSP];
    let rbp = c.cpu().gpr[RBP];
    c.cpu_mut().gpr[RSP] = match c.cpu().mode.stack_bytes() {
        2 => (before & !0xFFFF) | (rbp & 0xFFFF),
        4 => rbp & 0xFFFF_FFFF,
        _ => rbp,
    };
    match pop::<C, W>(c) {
        Ok(v) => {
            write_reg(c, RBP as u8, v);
            Step::Next
        }
        Err(Fault) => {
            c.cpu_mut().gpr[RSP] = before;
            Step::Fault
        }
    }
}

/// ENTER (SDM vol. 2A): `imm` is the frame's size, `aux` the nesting level.
fn enter<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let (sp, bp) = (c.cpu().gpr[RSP], c.cpu().gpr[RBP]);
    match enter_frame::<C, W>(c, op) {
        Ok(()) => Step::Next,
        Err(Fault) => {
            let gpr = &mut c.cpu_mut().gpr;
            (gpr[RSP], gpr[RBP]) = (sp, bp);
            Step::Fault
        }
    }
}
fn enter_frame<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    let level = u64::from(op.aux & 31);
    let bp = read_reg::<W, C>(c, RBP as u8);
    push(c, bp)?;
    let frame = c.cpu().gpr[RSP];
    if level > 0 {
        let mut display = c.cpu().gpr[RBP];
        for _ in 1..level {
            display = moved(c, display, 0u64.wrapping_sub(u64::from(W::BYTES)));
            let at = linear(c, display, u64::from(W::BYTES), false)?;
            let v = c.load::<W>(at)?;
            push(c, v)?;
        }
        push(c, W::from_u64(frame))?;
    }
    let sp = moved(c, c.cpu().gpr[RSP], 0u64.wrapping_sub(op.imm & 0xFFFF));
    // The processor checks that the new top of the stack could be written.
    let at = linear(c, sp, u64::from(W::BYTES), true)?;
    c.probe(at, u64::from(W::BYTES), true)?;
    c.cpu_mut().gpr[RSP] = sp;
    write_reg(c, RBP as u8, W::from_u64(frame));
    Ok(())
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use x86_decode::Code as K;
    let is_segment = insn.op_count() > 0
        && insn.op0_kind() == OpKind::Register
        && insn.op0_register().is_segment_register();
    match insn.mnemonic() {
        Mnemonic::Push if !is_segment => {
            let (run, dst) = match insn.op0_kind() {
                OpKind::Register => {
                    (by_width!(operand_bytes(insn, 0), push_reg::<C; W>), gpr(insn.op0_register()))
                }
                OpKind::Memory => (by_width!(operand_bytes(insn, 0), push_mem::<C; W>), 0),
                _ => {
                    let bytes = match insn.code() {
                        K::Push_imm16 | K::Pushw_imm8 => 2,
                        K::Pushd_imm32 | K::Pushd_imm8 => 4,
                        _ => 8,
                    };
                    (by_width!(bytes, push_imm::<C; W>), 0)
                }
            };
            Some(Op { dst, ..ctx.op(insn, run) })
        }
        Mnemonic::Pop if !is_segment => Some(match insn.op0_kind() {
            OpKind::Register => Op {
                dst: gpr(insn.op0_register()),
                ..ctx.op(insn, by_width!(operand_bytes(insn, 0), pop_reg::<C; W>))
            },
            _ => ctx.op(insn, by_width!(operand_bytes(insn, 0), pop_mem::<C; W>)),
        }),
        Mnemonic::Pusha => Some(ctx.op(insn, pusha::<C, u16>)),
        Mnemonic::Pushad => Some(ctx.op(insn, pusha::<C, u32>)),
        Mnemonic::Popa => Some(ctx.op(insn, popa::<C, u16>)),
        Mnemonic::Popad => Some(ctx.op(insn, popa::<C, u32>)),
        Mnemonic::Leave => {
            let bytes = match insn.code() {
                K::Leavew => 2,
                K::Leaved => 4,
                _ => 8,
            };
            Some(ctx.op(insn, by_width!(bytes, leave::<C; W>)))
        }
        Mnemonic::Enter => {
            let bytes = match insn.code() {
                K::Enterw_imm16_imm8 => 2,
                K::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            Some(ctx.op(insn, by_width!(bytes, enter::<C; W>)))
        }
        _ => None,
    }
}
