//! Decimal adjustments: AAA, AAS, AAM, AAD, DAA, DAS, and SALC (none exist in 64-bit mode).

use super::{read_reg, write_reg};
use crate::core::Core;
use crate::cpu::reg::RAX;
use crate::lower::LowerContext;
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic};
use x86_defs::Exception;
use x86_defs::flags::{AF, CF};

fn ax<C: Core>(c: &C) -> u16 {
    read_reg::<u16, C>(c, RAX as u8)
}
/// SF, ZF and PF from AL; AF and CF as given, OF clear.
fn set_flags<C: Core>(c: &mut C, al: u8, af: bool, cf: bool) {
    let f = &mut c.cpu_mut().flags;
    f.set_logic(al as i8 as u64);
    f.replace(AF | CF, (u64::from(af) * AF) | (u64::from(cf) * CF));
}

fn aaa_aas<C: Core, const SUBTRACT: bool>(c: &mut C, _: &Op<C>) -> Step {
    let v = ax(c);
    let adjust = v & 0xF > 9 || c.cpu().flags.af();
    let v = match (adjust, SUBTRACT) {
        (false, _) => v,
        (true, false) => v.wrapping_add(0x106),
        (true, true) => v.wrapping_sub(0x106),
    };
    let v = v & 0xFF0F;
    write_reg(c, RAX as u8, v);
    set_flags(c, v as u8, adjust, adjust);
    Step::Next
}
fn daa_das<C: Core, const SUBTRACT: bool>(c: &mut C, _: &Op<C>) -> Step {
    let old = ax(c) as u8;
    let (old_cf, old_af) = (c.cpu().flags.cf(), c.cpu().flags.af());
    let by = |v: u8, n: u8| if SUBTRACT { v.overflowing_sub(n) } else { v.overflowing_add(n) };
    let mut al = old;
    let mut cf = false;
    let af = old & 0xF > 9 || old_af;
    if af {
        let (v, carry) = by(al, 6);
        al = v;
        cf = SUBTRACT && (old_cf || carry);
    }
    if old > 0x99 || old_cf {
        al = by(al, 0x60).0;
        cf = true;
    }
    write_reg(c, RAX as u8, al);
    set_flags(c, al, af, cf);
    Step::Next
}
fn aam<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let (al, base) = (ax(c) as u8, op.imm as u8);
    if base == 0 {
        c.raise(Exception::DivideError, 0);
        return Step::Fault;
    }
    write_reg(c, RAX as u8, u16::from(al / base) << 8 | u16::from(al % base));
    set_flags(c, al % base, false, false);
    Step::Next
}
fn aad<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let v = ax(c);
    let al = (v as u8).wrapping_add(((v >> 8) as u8).wrapping_mul(op.imm as u8));
    write_reg(c, RAX as u8, u16::from(al));
    set_flags(c, al, false, false);
    Step::Next
}
fn salc<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    let v = if c.cpu().flags.cf() { 0xFFu8 } else { 0 };
    write_reg(c, RAX as u8, v);
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    Some(match insn.mnemonic() {
        Mnemonic::Aaa => ctx.op(insn, aaa_aas::<C, false>),
        Mnemonic::Aas => ctx.op(insn, aaa_aas::<C, true>),
        Mnemonic::Daa => ctx.op(insn, daa_das::<C, false>),
        Mnemonic::Das => ctx.op(insn, daa_das::<C, true>),
        Mnemonic::Aam => ctx.op(insn, aam::<C>),
        Mnemonic::Aad => ctx.op(insn, aad::<C>),
        Mnemonic::Salc => ctx.op(insn, salc::<C>),
        _ => return None,
    })
}
