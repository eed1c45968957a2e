//! ADD, ADC, SUB, SBB, CMP, AND, OR, XOR, TEST, INC, DEC, NEG, NOT.

use super::operand::{Form, attempt, by_width, one_operand, read_reg, two_operands, write_reg};
use crate::core::{Core, Word};
use crate::flags::LazyFlags;
use crate::lower::LowerContext;
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic};
use x86_defs::flags::STATUS;

/// A two-operand operation. Operands come zero-extended; results may have rubbish above the width.
pub(super) trait Alu: 'static {
    /// Whether the destination is written (CMP and TEST do not).
    const WRITES: bool = true;
    /// Whether CF goes in.
    const CARRY_IN: bool = false;
    /// Result and carries.
    fn apply(a: u64, b: u64, cf: u64) -> (u64, u64);
    /// Logical operations clear CF, OF, AF.
    const LOGIC: bool = false;
}

macro_rules! alu {
    ($($name:ident { $($body:tt)* })*) => {$(
        pub(super) struct $name;
        impl Alu for $name { $($body)* }
    )*};
}

#[inline(always)]
fn add(a: u64, b: u64, c: u64) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(c);
    (r, (a & b) | ((a | b) & !r))
}
#[inline(always)]
fn sub(a: u64, b: u64, c: u64) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(c);
    (r, (!a & b) | ((!a | b) & r))
}

alu! {
    Add { #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { add(a, b, 0) } }
    Adc { const CARRY_IN: bool = true;
          #[inline(always)] fn apply(a: u64, b: u64, c: u64) -> (u64, u64) { add(a, b, c) } }
    Sub { #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { sub(a, b, 0) } }
    Sbb { const CARRY_IN: bool = true;
          #[inline(always)] fn apply(a: u64, b: u64, c: u64) -> (u64, u64) { sub(a, b, c) } }
    Cmp { const WRITES: bool = false;
          #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { sub(a, b, 0) } }
    And { const LOGIC: bool = true;
          #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { (a & b, 0) } }
    Or { const LOGIC: bool = true;
         #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { (a | b, 0) } }
    Xor { const LOGIC: bool = true;
          #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { (a ^ b, 0) } }
    Test { const LOGIC: bool = true; const WRITES: bool = false;
           #[inline(always)] fn apply(a: u64, b: u64, _: u64) -> (u64, u64) { (a & b, 0) } }
}

/// Runs `A` on `a` and `b`; stores flags if `F`.
#[inline(always)]
pub(super) fn compute<A: Alu, W: Word, const F: bool>(flags: &mut LazyFlags, a: W, b: W) -> W {
    let cf = if A::CARRY_IN { u64::from(flags.cf()) } else { 0 };
    let (r, carries) = A::apply(a.zext(), b.zext(), cf);
    let r = W::from_u64(r);
    if F {
        if A::LOGIC { flags.set_logic(r.sext()) } else { flags.set_arithmetic(r.sext(), carries, W::BITS) }
    }
    r
}

fn reg_reg<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>) -> Step {
    let (a, b) = (read_reg::<W, C>(c, op.dst), read_reg::<W, C>(c, op.src));
    let r = compute::<A, W, F>(&mut c.cpu_mut().flags, a, b);
    if A::WRITES {
        write_reg(c, op.dst, r);
    }
    Step::Next
}

fn reg_imm<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>) -> Step {
    let a = read_reg::<W, C>(c, op.dst);
    let r = compute::<A, W, F>(&mut c.cpu_mut().flags, a, W::from_u64(op.imm));
    if A::WRITES {
        write_reg(c, op.dst, r);
    }
    Step::Next
}

fn reg_mem<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_read(c, u64::from(W::BYTES)));
    let b = attempt!(c.load::<W>(at));
    let a = read_reg::<W, C>(c, op.dst);
    let r = compute::<A, W, F>(&mut c.cpu_mut().flags, a, b);
    if A::WRITES {
        write_reg(c, op.dst, r);
    }
    Step::Next
}

fn mem_reg<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = read_reg::<W, C>(c, op.src);
    mem_any::<C, A, W, F>(c, op, b)
}

fn mem_imm<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>) -> Step {
    mem_any::<C, A, W, F>(c, op, W::from_u64(op.imm))
}

#[inline(always)]
fn mem_any<C: Core, A: Alu, W: Word, const F: bool>(c: &mut C, op: &Op<C>, b: W) -> Step {
    if A::WRITES {
        let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
        let mut flags = c.cpu().flags;
        attempt!(c.modify::<W>(at, |a| compute::<A, W, F>(&mut flags, a, b)));
        if F {
            c.cpu_mut().flags = flags;
        }
    } else {
        let at = attempt!(op.linear_read(c, u64::from(W::BYTES)));
        let a = attempt!(c.load::<W>(at));
        compute::<A, W, F>(&mut c.cpu_mut().flags, a, b);
    }
    Step::Next
}

fn pick<C: Core, A: Alu>(form: Form, bytes: u32, flags: bool) -> Handler<C> {
    match (form, flags) {
        (Form::RegReg, true) => by_width!(bytes, reg_reg::<C, A; W, true>),
        (Form::RegReg, false) => by_width!(bytes, reg_reg::<C, A; W, false>),
        (Form::RegImm, true) => by_width!(bytes, reg_imm::<C, A; W, true>),
        (Form::RegImm, false) => by_width!(bytes, reg_imm::<C, A; W, false>),
        (Form::RegMem, true) => by_width!(bytes, reg_mem::<C, A; W, true>),
        (Form::RegMem, false) => by_width!(bytes, reg_mem::<C, A; W, false>),
        (Form::MemReg, true) => by_width!(bytes, mem_reg::<C, A; W, true>),
        (Form::MemReg, false) => by_width!(bytes, mem_reg::<C, A; W, false>),
        (Form::MemImm, true) => by_width!(bytes, mem_imm::<C, A; W, true>),
        (Form::MemImm, false) => by_width!(bytes, mem_imm::<C, A; W, false>),
    }
}

/// One-operand operations.
trait Unary: 'static {
    fn apply<W: Word>(flags: &mut LazyFlags, a: W) -> W;
}
struct Inc;
struct Dec;
struct Neg;
struct Not;
impl Unary for Inc {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W) -> W {
        let (r, carries) = add(a.zext(), 1, 0);
        let r = W::from_u64(r);
        flags.set_arithmetic_keep_cf(r.sext(), carries, W::BITS);
        r
    }
}
impl Unary for Dec {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W) -> W {
        let (r, carries) = sub(a.zext(), 1, 0);
        let r = W::from_u64(r);
        flags.set_arithmetic_keep_cf(r.sext(), carries, W::BITS);
        r
    }
}
impl Unary for Neg {
    #[inline(always)]
    fn apply<W: Word>(flags: &mut LazyFlags, a: W) -> W {
        let (r, carries) = sub(0, a.zext(), 0);
        let r = W::from_u64(r);
        flags.set_arithmetic(r.sext(), carries, W::BITS);
        r
    }
}
impl Unary for Not {
    #[inline(always)]
    fn apply<W: Word>(_: &mut LazyFlags, a: W) -> W {
        W::from_u64(!a.zext())
    }
}

fn unary_reg<C: Core, U: Unary, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let a = read_reg::<W, C>(c, op.dst);
    let r = U::apply(&mut c.cpu_mut().flags, a);
    write_reg(c, op.dst, r);
    Step::Next
}

fn unary_mem<C: Core, U: Unary, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let mut flags = c.cpu().flags;
    attempt!(c.modify::<W>(at, |a| U::apply(&mut flags, a)));
    c.cpu_mut().flags = flags;
    Step::Next
}

fn unary_locked<C: Core, U: Unary, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let before = c.cpu().flags;
    let mut flags = before;
    attempt!(c.modify_locked::<W>(at, |a| {
        flags = before;
        U::apply(&mut flags, a)
    }));
    c.cpu_mut().flags = flags;
    Step::Next
}

fn pick_unary<C: Core, U: Unary>(in_memory: bool, locked: bool, bytes: u32) -> Handler<C> {
    match (in_memory, locked) {
        (_, true) => by_width!(bytes, unary_locked::<C, U; W>),
        (true, false) => by_width!(bytes, unary_mem::<C, U; W>),
        (false, false) => by_width!(bytes, unary_reg::<C, U; W>),
    }
}

fn locked_reg<C: Core, A: Alu, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    let b = read_reg::<W, C>(c, op.src);
    locked_any::<C, A, W>(c, op, b)
}
fn locked_imm<C: Core, A: Alu, W: Word>(c: &mut C, op: &Op<C>) -> Step {
    locked_any::<C, A, W>(c, op, W::from_u64(op.imm))
}
#[inline(always)]
fn locked_any<C: Core, A: Alu, W: Word>(c: &mut C, op: &Op<C>, b: W) -> Step {
    let at = attempt!(op.linear_write(c, u64::from(W::BYTES)));
    let before = c.cpu().flags;
    let mut flags = before;
    attempt!(c.modify_locked::<W>(at, |a| {
        flags = before;
        compute::<A, W, true>(&mut flags, a, b)
    }));
    c.cpu_mut().flags = flags;
    Step::Next
}

fn pick_locked<C: Core, A: Alu>(form: Form, bytes: u32) -> Handler<C> {
    if form == Form::MemReg {
        by_width!(bytes, locked_reg::<C, A; W>)
    } else {
        by_width!(bytes, locked_imm::<C, A; W>)
    }
}

fn unused<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if let Some(op) = lower_unary(insn, ctx, false) {
        return Some(op);
    }
    let live = ctx.live_flags & STATUS != 0;
    let pick: fn(Form, u32, bool) -> Handler<C> = match insn.mnemonic() {
        Mnemonic::Add => pick::<C, Add>,
        Mnemonic::Adc => pick::<C, Adc>,
        Mnemonic::Sub => pick::<C, Sub>,
        Mnemonic::Sbb => pick::<C, Sbb>,
        Mnemonic::Cmp => pick::<C, Cmp>,
        Mnemonic::And => pick::<C, And>,
        Mnemonic::Or => pick::<C, Or>,
        Mnemonic::Xor => pick::<C, Xor>,
        Mnemonic::Test => pick::<C, Test>,
        _ => return None,
    };
    let (mut op, form, bytes) = two_operands(insn, ctx, unused)?;
    op.run = pick(form, bytes, live);
    Some(op)
}

fn lower_unary<C: Core>(insn: &Instruction, ctx: &LowerContext, locked: bool) -> Option<Op<C>> {
    let pick: fn(bool, bool, u32) -> Handler<C> = match insn.mnemonic() {
        Mnemonic::Inc => pick_unary::<C, Inc>,
        Mnemonic::Dec => pick_unary::<C, Dec>,
        Mnemonic::Neg => pick_unary::<C, Neg>,
        Mnemonic::Not => pick_unary::<C, Not>,
        _ => return None,
    };
    let (mut op, in_memory, bytes) = one_operand(insn, ctx, unused);
    op.run = pick(in_memory, locked, bytes);
    Some(op)
}

/// LOCK forms.
pub(super) fn lower_locked<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if let Some(op) = lower_unary(insn, ctx, true) {
        return Some(op);
    }
    let pick: fn(Form, u32) -> Handler<C> = match insn.mnemonic() {
        Mnemonic::Add => pick_locked::<C, Add>,
        Mnemonic::Adc => pick_locked::<C, Adc>,
        Mnemonic::Sub => pick_locked::<C, Sub>,
        Mnemonic::Sbb => pick_locked::<C, Sbb>,
        Mnemonic::And => pick_locked::<C, And>,
        Mnemonic::Or => pick_locked::<C, Or>,
        Mnemonic::Xor => pick_locked::<C, Xor>,
        _ => return None,
    };
    let (mut op, form, bytes) = two_operands(insn, ctx, unused)?;
    op.run = pick(form, bytes);
    Some(op)
}
