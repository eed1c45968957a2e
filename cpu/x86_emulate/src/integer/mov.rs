//! Moves and conversions: MOV, MOVZX, MOVSX, LEA, XCHG, BSWAP, MOVBE, CMOVcc, SETcc, CBW…, XLAT, LAHF, SAHF,
//! CLC/STC/CMC, CLD/STD, NOP.

use super::operand::{Form, attempt, by_width, operand_bytes, read_reg, two_operands, write_reg};
use crate::core::{Core, Word};
use crate::cpu::{ZERO, reg};
use crate::lower::{LowerContext, gpr};
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};
use x86_defs::flags;

fn mov_rr<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let v = read_reg::<W, C>(c, op.src);
    write_reg(c, op.dst, v);
    Step::Next
}
fn mov_ri<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    write_reg(c, op.dst, W::from_u64(op.imm));
    Step::Next
}
fn mov_rm<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_read(c, u64::from(W::BYTES)));
    let v = attempt!(c.load::<W>(at));
    write_reg(c, op.dst, v);
    Step::Next
}
fn mov_mr<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let v = read_reg::<W, C>(c, op.src);
    attempt!(c.store(at, v));
    Step::Next
}
fn mov_mi<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    attempt!(c.store(at, W::from_u64(op.imm)));
    Step::Next
}

/// MOV between the accumulator and a 64-bit offset: the offset is in `imm`.
fn mov_offset64_load<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = c.cpu().seg_base[(op.seg & 7) as usize].wrapping_add(op.imm);
    let v = attempt!(c.load::<W>(at));
    write_reg(c, op.dst, v);
    Step::Next
}
fn mov_offset64_store<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = c.cpu().seg_base[(op.seg & 7) as usize].wrapping_add(op.imm);
    let v = read_reg::<W, C>(c, op.src);
    attempt!(c.store(at, v));
    Step::Next
}

/// Extension from `S` to `W`.
fn extend_rr<C: Core, S: Word, W: Word, const SIGNED: bool>(c: &mut C, op: &Op<C>) -> Step {
    let v = read_reg::<S, C>(c, op.src);
    write_reg(c, op.dst, W::from_u64(if SIGNED { v.sext() } else { v.zext() }));
    Step::Next
}
fn extend_rm<C: Core, S: Word, W: Word, const SIGNED: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_read(c, u64::from(S::BYTES)));
    let v = attempt!(c.load::<S>(at));
    write_reg(c, op.dst, W::from_u64(if SIGNED { v.sext() } else { v.zext() }));
    Step::Next
}
fn pick_extend<C: Core, const SIGNED: bool>(source: u32, width: u32, memory: bool) -> Handler<C> {
    match (source, memory) {
        (1, false) => by_width!(width, extend_rr::<C, u8; W, SIGNED>),
        (1, true) => by_width!(width, extend_rm::<C, u8; W, SIGNED>),
        (2, false) => by_width!(width, extend_rr::<C, u16; W, SIGNED>),
        (2, true) => by_width!(width, extend_rm::<C, u16; W, SIGNED>),
        (_, false) => by_width!(width, extend_rr::<C, u32; W, SIGNED>),
        (_, true) => by_width!(width, extend_rm::<C, u32; W, SIGNED>),
    }
}

fn lea<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let ea = op.effective(c);
    write_reg(c, op.dst, W::from_u64(ea));
    Step::Next
}

fn xchg_rr<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let (a, b) = (read_reg::<W, C>(c, op.dst), read_reg::<W, C>(c, op.src));
    write_reg(c, op.dst, b);
    write_reg(c, op.src, a);
    Step::Next
}
/// XCHG with memory is locked, with or without the prefix.
fn xchg_mem<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let new = read_reg::<W, C>(c, op.src);
    let old = attempt!(c.modify_locked::<W>(at, |_| new));
    write_reg(c, op.src, old);
    Step::Next
}

fn swap_bytes<W: Word>(v: W) -> W {
    W::from_u64(v.zext().swap_bytes() >> (64 - W::BITS))
}
fn bswap<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    // BSWAP of a 16-bit register is undefined; processors clear it.
    let v = if W::BYTES == 2 { W::from_u64(0) } else { swap_bytes(read_reg::<W, C>(c, op.dst)) };
    write_reg(c, op.dst, v);
    Step::Next
}
fn movbe_load<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_read(c, u64::from(W::BYTES)));
    let v = attempt!(c.load::<W>(at));
    write_reg(c, op.dst, swap_bytes(v));
    Step::Next
}
fn movbe_store<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let v = swap_bytes(read_reg::<W, C>(c, op.src));
    attempt!(c.store(at, v));
    Step::Next
}

/// The source is read even if the condition is false; a 32-bit destination is cleared above either way.
fn cmov<C: Core, W: Word, const CC: u8, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(super::operand::read_source::<C, W, MEM>(c, op));
    let v = if c.cpu().flags.condition::<CC>() { v } else { read_reg(c, op.dst) };
    write_reg(c, op.dst, v);
    Step::Next
}
fn set_reg<C: Core, const CC: u8>(c: &mut C, op: &Op<C>) -> Step {
    let v = u8::from(c.cpu().flags.condition::<CC>());
    write_reg(c, op.dst, v);
    Step::Next
}
fn set_mem<C: Core, const CC: u8>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, 1));
    let v = u8::from(c.cpu().flags.condition::<CC>());
    attempt!(c.store(at, v));
    Step::Next
}

/// Chooses `$f` for a run-time condition code 0–15.
macro_rules! by_condition {
    ($cc:expr, |$k:ident| $f:expr) => {
        by_condition!(@ $cc, $k, $f, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $cc:expr, $k:ident, $f:expr, $($n:literal)*) => {
        match $cc { $($n => { const $k: u8 = $n; $f })* _ => { const $k: u8 = 15; $f } }
    };
}
pub(super) use by_condition;

/// Condition number of an instruction (the low four bits of its opcode).
pub(super) fn condition(insn: &Instruction) -> u8 {
    use x86_decode::ConditionCode as K;
    match insn.condition_code() {
        K::o => 0,
        K::no => 1,
        K::b => 2,
        K::ae => 3,
        K::e => 4,
        K::ne => 5,
        K::be => 6,
        K::a => 7,
        K::s => 8,
        K::ns => 9,
        K::p => 10,
        K::np => 11,
        K::l => 12,
        K::ge => 13,
        K::le => 14,
        _ => 15,
    }
}

/// CBW, CWDE, CDQE: sign-extends the accumulator in itself.
fn widen<C: Core, S: Word, W: Word>(c: &mut C, _: &Op<C>) -> Step {
    let v = read_reg::<S, C>(c, reg::RAX as u8).sext();
    write_reg(c, reg::RAX as u8, W::from_u64(v));
    Step::Next
}
/// CWD, CDQ, CQO: the accumulator's sign fills DX.
fn sign_to_dx<C: Core, W: Word>(c: &mut C, _: &Op<C>) -> Step {
    let v = read_reg::<W, C>(c, reg::RAX as u8).sext() as i64 >> 63;
    write_reg(c, reg::RDX as u8, W::from_u64(v as u64));
    Step::Next
}
/// [rBX + AL]: the operand's base is rBX; AL is added here, before the address wraps.
fn xlat<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let al = read_reg::<u8, C>(c, reg::RAX as u8);
    let with_al = Op { disp: i32::from(al), ..*op };
    let at = attempt!(with_al.linear_read(c, 1));
    let v = attempt!(c.load::<u8>(at));
    write_reg(c, reg::RAX as u8, v);
    Step::Next
}
fn lahf<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    let v = (c.cpu().flags.bits() & !flags::OF | flags::FIXED_1) as u8;
    write_reg(c, 0x20, v);
    Step::Next
}
fn sahf<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    let ah = read_reg::<u8, C>(c, 0x20);
    c.cpu_mut().flags.replace(flags::STATUS & !flags::OF, u64::from(ah));
    Step::Next
}
fn flag_cf<C: Core, const WHAT: u8>(c: &mut C, _: &Op<C>) -> Step {
    let f = &mut c.cpu_mut().flags;
    f.set_cf(match WHAT {
        0 => false,
        1 => true,
        _ => !f.cf(),
    });
    Step::Next
}
fn flag_df<C: Core, const ON: bool>(c: &mut C, _: &Op<C>) -> Step {
    let cpu = c.cpu_mut();
    cpu.rflags = if ON { cpu.rflags | flags::DF } else { cpu.rflags & !flags::DF };
    Step::Next
}
fn nop<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}
fn pause<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    c.pause();
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let simple = |run: Handler<C>| Some(ctx.op(insn, run));
    match insn.mnemonic() {
        Mnemonic::Mov => lower_mov(insn, ctx),
        Mnemonic::Movnti => {
            let (mut op, _, bytes) = two_operands(insn, ctx, nop)?;
            op.run = by_width!(bytes, mov_mr::<C; W>);
            Some(op)
        }
        Mnemonic::Movzx => lower_extend(insn, ctx, pick_extend::<C, false>),
        Mnemonic::Movsx | Mnemonic::Movsxd => lower_extend(insn, ctx, pick_extend::<C, true>),
        Mnemonic::Lea => {
            let mut op = ctx.op(insn, by_width!(operand_bytes(insn, 0), lea::<C; W>));
            op.dst = gpr(insn.op0_register());
            Some(op)
        }
        Mnemonic::Xchg => {
            let (mut op, form, bytes) = two_operands(insn, ctx, nop)?;
            op.run = if form == Form::RegReg {
                by_width!(bytes, xchg_rr::<C; W>)
            } else {
                by_width!(bytes, xchg_mem::<C; W>)
            };
            if form == Form::RegMem {
                op.src = op.dst;
            }
            Some(op)
        }
        Mnemonic::Bswap => {
            let mut op = ctx.op(insn, by_width!(operand_bytes(insn, 0), bswap::<C; W>));
            op.dst = gpr(insn.op0_register());
            Some(op)
        }
        Mnemonic::Movbe => {
            let (mut op, form, bytes) = two_operands(insn, ctx, nop)?;
            op.run = if form == Form::RegMem {
                by_width!(bytes, movbe_load::<C; W>)
            } else {
                by_width!(bytes, movbe_store::<C; W>)
            };
            Some(op)
        }
        Mnemonic::Cbw => simple(widen::<C, u8, u16>),
        Mnemonic::Cwde => simple(widen::<C, u16, u32>),
        Mnemonic::Cdqe => simple(widen::<C, u32, u64>),
        Mnemonic::Cwd => simple(sign_to_dx::<C, u16>),
        Mnemonic::Cdq => simple(sign_to_dx::<C, u32>),
        Mnemonic::Cqo => simple(sign_to_dx::<C, u64>),
        Mnemonic::Xlatb => {
            let mut op = ctx.op(insn, xlat::<C>);
            op.index = ZERO as u8;
            Some(op)
        }
        Mnemonic::Lahf => simple(lahf::<C>),
        Mnemonic::Sahf => simple(sahf::<C>),
        Mnemonic::Clc => simple(flag_cf::<C, 0>),
        Mnemonic::Stc => simple(flag_cf::<C, 1>),
        Mnemonic::Cmc => simple(flag_cf::<C, 2>),
        Mnemonic::Cld => simple(flag_df::<C, false>),
        Mnemonic::Std => simple(flag_df::<C, true>),
        Mnemonic::Pause => simple(pause::<C>),
        Mnemonic::Nop | Mnemonic::Reservednop | Mnemonic::Endbr64 | Mnemonic::Endbr32 => simple(nop::<C>),
        _ => lower_conditional(insn, ctx),
    }
}

fn lower_mov<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let is_gpr = |i| insn.op_kind(i) != OpKind::Register || insn.op_register(i).is_gpr();
    if !is_gpr(0) || !is_gpr(1) {
        return None; // segment, control and debug registers
    }
    let (mut op, form, bytes) = two_operands(insn, ctx, nop)?;
    let offset64 = insn.memory_displ_size() == 8 && ctx.mode.is_long() && op.base == ZERO as u8;
    op.run = match form {
        Form::RegMem if offset64 && op.index == ZERO as u8 => {
            op.imm = insn.memory_displacement64();
            by_width!(bytes, mov_offset64_load::<C; W>)
        }
        Form::MemReg if offset64 && op.index == ZERO as u8 => {
            op.imm = insn.memory_displacement64();
            by_width!(bytes, mov_offset64_store::<C; W>)
        }
        Form::RegReg => by_width!(bytes, mov_rr::<C; W>),
        Form::RegImm => by_width!(bytes, mov_ri::<C; W>),
        Form::RegMem => by_width!(bytes, mov_rm::<C; W>),
        Form::MemReg => by_width!(bytes, mov_mr::<C; W>),
        Form::MemImm => by_width!(bytes, mov_mi::<C; W>),
    };
    Some(op)
}

fn lower_extend<C: Core>(
    insn: &Instruction,
    ctx: &LowerContext,
    pick: fn(u32, u32, bool) -> Handler<C>,
) -> Option<Op<C>> {
    let (mut op, form, bytes) = two_operands(insn, ctx, nop)?;
    op.run = pick(operand_bytes(insn, 1), bytes, form == Form::RegMem);
    Some(op)
}

fn lower_conditional<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use x86_decode::ConditionCode;
    if insn.condition_code() == ConditionCode::None || insn.is_jcc_short_or_near() || insn.is_loopcc() {
        return None;
    }
    let cc = condition(insn);
    if insn.op_count() == 1 {
        let mut op = ctx.op(insn, nop);
        op.run = if insn.op_kind(0) == OpKind::Register {
            op.dst = gpr(insn.op0_register());
            by_condition!(cc, |K| set_reg::<C, K> as Handler<C>)
        } else {
            by_condition!(cc, |K| set_mem::<C, K> as Handler<C>)
        };
        return Some(op);
    }
    if !insn.op0_register().is_gpr() {
        return None; // FCMOVcc
    }
    let (mut op, form, bytes) = two_operands(insn, ctx, nop)?;
    op.run = match (bytes, form) {
        (2, Form::RegReg) => by_condition!(cc, |K| cmov::<C, u16, K, false> as Handler<C>),
        (2, _) => by_condition!(cc, |K| cmov::<C, u16, K, true> as Handler<C>),
        (4, Form::RegReg) => by_condition!(cc, |K| cmov::<C, u32, K, false> as Handler<C>),
        (4, _) => by_condition!(cc, |K| cmov::<C, u32, K, true> as Handler<C>),
        (_, Form::RegReg) => by_condition!(cc, |K| cmov::<C, u64, K, false> as Handler<C>),
        (_, _) => by_condition!(cc, |K| cmov::<C, u64, K, true> as Handler<C>),
    };
    Some(op)
}
