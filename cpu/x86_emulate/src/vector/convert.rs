//! Conversions between vector registers and general or MMX registers, and comparisons that set flags.

use super::kernels::{commit, form_of};
use super::unmasked::settle;
use super::{gate, memory, mmx, unmasked};
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, gpr, memory_bytes, vector_register};
use crate::op::{Handler, Op, Step};
use crate::x87::raise_pending;
use x86_decode::{Instruction, Mnemonic as M, OpKind};
use x86_defs::flags::STATUS;
use x86_host_ops::{Special, V};

/// What the operation reads and writes beside a vector register.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    ToGeneral,
    FromGeneral,
    Compare,
    ToMmx,
    FromMmx,
}

/// Specials by number, as `Op::imm` holds them.
const SPECIALS: [Special; 22] = [
    Special::Cvtss2si32,
    Special::Cvtss2si64,
    Special::Cvttss2si32,
    Special::Cvttss2si64,
    Special::Cvtsd2si32,
    Special::Cvtsd2si64,
    Special::Cvttsd2si32,
    Special::Cvttsd2si64,
    Special::Cvtsi2ss32,
    Special::Cvtsi2ss64,
    Special::Cvtsi2sd32,
    Special::Cvtsi2sd64,
    Special::Comiss,
    Special::Comisd,
    Special::Ucomiss,
    Special::Ucomisd,
    Special::Cvtpi2ps,
    Special::Cvtpi2pd,
    Special::Cvtps2pi,
    Special::Cvttps2pi,
    Special::Cvtpd2pi,
    Special::Cvttpd2pi,
];

fn special_of(insn: &Instruction) -> Option<(Special, Kind)> {
    use Kind::*;
    use Special::*;
    // The general operand's width: register or memory.
    let source = if insn.op_count() == 3 { 2 } else { 1 };
    let wide = |i: u32| match insn.op_kind(i) {
        OpKind::Memory => memory_bytes(insn) == 8,
        _ => insn.op_register(i).is_gpr64(),
    };
    let pick = |narrow, other, wide: bool| if wide { other } else { narrow };
    Some(match insn.mnemonic() {
        M::Cvtss2si | M::Vcvtss2si => (pick(Cvtss2si32, Cvtss2si64, wide(0)), ToGeneral),
        M::Cvttss2si | M::Vcvttss2si => (pick(Cvttss2si32, Cvttss2si64, wide(0)), ToGeneral),
        M::Cvtsd2si | M::Vcvtsd2si => (pick(Cvtsd2si32, Cvtsd2si64, wide(0)), ToGeneral),
        M::Cvttsd2si | M::Vcvttsd2si => (pick(Cvttsd2si32, Cvttsd2si64, wide(0)), ToGeneral),
        M::Cvtsi2ss | M::Vcvtsi2ss => (pick(Cvtsi2ss32, Cvtsi2ss64, wide(source)), FromGeneral),
        M::Cvtsi2sd | M::Vcvtsi2sd => (pick(Cvtsi2sd32, Cvtsi2sd64, wide(source)), FromGeneral),
        M::Comiss | M::Vcomiss => (Comiss, Compare),
        M::Comisd | M::Vcomisd => (Comisd, Compare),
        M::Ucomiss | M::Vucomiss => (Ucomiss, Compare),
        M::Ucomisd | M::Vucomisd => (Ucomisd, Compare),
        M::Cvtpi2ps => (Cvtpi2ps, FromMmx),
        M::Cvtpi2pd => (Cvtpi2pd, FromMmx),
        M::Cvtps2pi => (Cvtps2pi, ToMmx),
        M::Cvttps2pi => (Cvttps2pi, ToMmx),
        M::Cvtpd2pi => (Cvtpd2pi, ToMmx),
        M::Cvttpd2pi => (Cvttpd2pi, ToMmx),
        _ => return None,
    })
}

/// Lowers a conversion or comparison.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let (special, kind) = special_of(insn)?;
    let run: Handler<C> = match kind {
        Kind::ToGeneral => to_general::<C>,
        Kind::FromGeneral => by_form!(form_of(insn), from_general),
        Kind::Compare => compare::<C>,
        Kind::ToMmx => to_mmx::<C>,
        Kind::FromMmx => from_mmx::<C>,
    };
    let mut op = ctx.op(insn, run);
    op.imm = special as u64;
    let register = |i: u32| match insn.op_register(i) {
        r if r.is_gpr() => gpr(r),
        r if r.is_mm() => mmx::number(r),
        r => vector_register(r),
    };
    let last = insn.op_count() - 1;
    op.dst = register(0);
    op.aux = if last == 2 { register(1) } else { op.dst };
    if insn.op_kind(last) == OpKind::Memory {
        op.width = memory_bytes(insn) as u8;
    } else {
        op.src = register(last);
        // Bit 1: the register is an MMX one, so the x87 unit is involved.
        op.imm |= u64::from(gate::is_mmx(insn, last)) << 8;
    }
    Some(op)
}

fn special<C>(op: &Op<C>) -> Special {
    SPECIALS[usize::from(op.imm as u8).min(SPECIALS.len() - 1)]
}

/// The last operand: memory of `width` bytes, or `register`'s value.
#[inline(always)]
fn source<C: Core>(c: &mut C, op: &Op<C>, register: impl FnOnce(&C) -> V) -> Result<V, Fault> {
    if op.width == 0 {
        return Ok(register(c));
    }
    let mut linear = op.linear_read(c, u64::from(op.width))?;
    if op.width == 16 {
        linear = memory::aligned(c, linear, 16)?; // CVTPD2PI and CVTTPD2PI only
    }
    memory::load(c, linear, op.width)
}

/// Runs the special on `a` and `b`; exceptions are settled.
#[inline(always)]
fn compute<C: Core>(c: &mut C, op: &Op<C>, a: &V, b: &V) -> Result<V, Fault> {
    let mxcsr = c.cpu().x.mxcsr;
    if mxcsr & super::kernels::MASKS == super::kernels::MASKS {
        let (out, flags) = special(op).run(a, b, &[0; 4], 0, mxcsr);
        c.cpu_mut().x.mxcsr |= flags;
        Ok(out)
    } else {
        // No result of these can be tiny.
        let (out, flags) = special(op).run(a, b, &[0; 4], 0, unmasked::controls(mxcsr));
        settle(c, flags)?;
        Ok(out)
    }
}

fn xmm<C: Core>(c: &C, n: u8) -> V {
    c.cpu().x.ymm[usize::from(n & 15)]
}

fn to_general<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let out = source(c, op, |c| xmm(c, op.src)).and_then(|b| compute(c, op, &[0; 4], &b));
    super::step(out.map(|out| c.cpu_mut().gpr[usize::from(op.dst & 15)] = out[0]))
}

fn from_general<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let a = xmm(c, op.aux);
    let out = source(c, op, |c| [c.cpu().gpr[usize::from(op.src & 31)], 0, 0, 0])
        .and_then(|b| compute(c, op, &a, &b));
    super::step(out.map(|out| commit(&mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)], &out, FORM)))
}

fn compare<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let a = xmm(c, op.dst);
    let out = source(c, op, |c| xmm(c, op.src)).and_then(|b| compute(c, op, &a, &b));
    super::step(out.map(|out| c.cpu_mut().flags.replace(STATUS, out[0])))
}

fn to_mmx<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let out = raise_pending(c).and_then(|()| source(c, op, |c| xmm(c, op.src))).and_then(|b| {
        mmx::enter(c); // even if the conversion then raises an exception
        compute(c, op, &[0; 4], &b)
    });
    super::step(out.map(|out| mmx::set(c, op.dst, out[0])))
}

fn from_mmx<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let uses_mmx = op.imm >> 8 & 1 != 0;
    let a = xmm(c, op.dst);
    let out = if uses_mmx { raise_pending(c) } else { Ok(()) }
        .and_then(|()| source(c, op, |c| [mmx::get(c, op.src), 0, 0, 0]))
        .and_then(|b| {
            if uses_mmx {
                mmx::enter(c);
            }
            compute(c, op, &a, &b)
        });
    let done = out.map(|out| {
        let dst = &mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)];
        (dst[0], dst[1]) = (out[0], out[1]);
    });
    super::step(done)
}
