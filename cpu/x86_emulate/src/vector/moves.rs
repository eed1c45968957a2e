//! Moves between vector registers, memory and general registers.

use super::kernels::{SSE, VEX128, VEX256, commit, form_of};
use super::memory;
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, gpr, memory_bytes, vector_register};
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic as M, OpKind};

/// Lowers a move.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonics::*;
    let kind = kind_of(insn.mnemonic())?;
    let form = form_of(insn);
    let is_vector = |i: u32| {
        insn.op_kind(i) == OpKind::Register && (insn.op_register(i).is_xmm() || insn.op_register(i).is_ymm())
    };
    if !is_vector(0) && !is_vector(1) {
        return None; // MMX, or MOVSD as a string instruction
    }
    let memory_destination = insn.op0_kind() == OpKind::Memory;
    let last = insn.op_count() - 1;
    let memory_source = insn.op_kind(last) == OpKind::Memory;
    let run: Handler<C> = match (kind, memory_source, memory_destination) {
        (Full { aligned }, true, _) => full_load(form, aligned),
        (Full { aligned }, _, true) => full_store(form, aligned),
        (Full { .. }, ..) => by_form!(form, copy),
        (Scalar | General, true, _) => by_form!(form, load_low),
        (Scalar | General, _, true) => store_low::<C>,
        // Two operands without memory occur only in the legacy form; VEX has three.
        (Scalar, ..) => by_form!(form, merge_low),
        (General, ..) if !is_vector(0) => to_general::<C>,
        (General, ..) if !is_vector(1) => by_form!(form, from_general),
        (General, ..) => by_form!(form, copy_low),
        (Half { high: false }, true, _) => by_form!(form, load_half::<false>),
        (Half { high: true }, true, _) => by_form!(form, load_half::<true>),
        (Half { high: false }, ..) => store_low::<C>,
        (Half { high: true }, ..) => store_high::<C>,
        (CrossHalf { high_to_low: true }, ..) => by_form!(form, cross::<true>),
        (CrossHalf { high_to_low: false }, ..) => by_form!(form, cross::<false>),
    };
    let mut op = ctx.op(insn, run);
    let register = |i: u32| {
        if is_vector(i) { vector_register(insn.op_register(i)) } else { gpr(insn.op_register(i)) }
    };
    if memory_destination {
        op.width = memory_bytes(insn) as u8;
        op.src = register(1);
        return Some(op);
    }
    op.dst = register(0);
    op.aux = if last == 2 { register(1) } else { op.dst };
    if memory_source {
        op.width = memory_bytes(insn) as u8;
    } else {
        op.src = register(last);
        op.width = match insn.mnemonic() {
            M::Movss | M::Vmovss | M::Movd | M::Vmovd => 4,
            _ => 8,
        };
    }
    Some(op)
}

#[derive(Clone, Copy)]
enum Mnemonics {
    /// The whole register.
    Full { aligned: bool },
    /// MOVSS and MOVSD: merge between registers.
    Scalar,
    /// MOVD and MOVQ: a general register or memory; they clear the rest.
    General,
    /// MOVLPS, MOVHPS and their like: one half with memory.
    Half { high: bool },
    /// MOVHLPS and MOVLHPS.
    CrossHalf { high_to_low: bool },
}

fn kind_of(mnemonic: M) -> Option<Mnemonics> {
    use Mnemonics::*;
    Some(match mnemonic {
        M::Movaps | M::Vmovaps | M::Movapd | M::Vmovapd | M::Movdqa | M::Vmovdqa => Full { aligned: true },
        M::Movntps
        | M::Vmovntps
        | M::Movntpd
        | M::Vmovntpd
        | M::Movntdq
        | M::Vmovntdq
        | M::Movntdqa
        | M::Vmovntdqa => Full { aligned: true },
        M::Movups | M::Vmovups | M::Movupd | M::Vmovupd | M::Movdqu | M::Vmovdqu | M::Lddqu | M::Vlddqu => {
            Full { aligned: false }
        }
        M::Movss | M::Vmovss | M::Movsd | M::Vmovsd => Scalar,
        M::Movd | M::Vmovd | M::Movq | M::Vmovq => General,
        M::Movlps | M::Vmovlps | M::Movlpd | M::Vmovlpd => Half { high: false },
        M::Movhps | M::Vmovhps | M::Movhpd | M::Vmovhpd => Half { high: true },
        M::Movhlps | M::Vmovhlps => CrossHalf { high_to_low: true },
        M::Movlhps | M::Vmovlhps => CrossHalf { high_to_low: false },
        _ => return None,
    })
}

fn full_load<C: Core>(form: u8, aligned: bool) -> Handler<C> {
    match (form, aligned) {
        (SSE, false) => load::<C, SSE, false>,
        (SSE, true) => load::<C, SSE, true>,
        (VEX128, false) => load::<C, VEX128, false>,
        (VEX128, true) => load::<C, VEX128, true>,
        (_, false) => load::<C, VEX256, false>,
        (_, true) => load::<C, VEX256, true>,
    }
}

fn full_store<C: Core>(form: u8, aligned: bool) -> Handler<C> {
    match (form, aligned) {
        (VEX256, false) => store::<C, 32, false>,
        (VEX256, true) => store::<C, 32, true>,
        (_, false) => store::<C, 16, false>,
        (_, true) => store::<C, 16, true>,
    }
}

fn load<C: Core, const FORM: u8, const ALIGNED: bool>(c: &mut C, op: &Op<C>) -> Step {
    let bytes = if FORM == VEX256 { 32 } else { 16 };
    let value = (|| {
        let mut linear = op.linear_read(c, u64::from(bytes))?;
        if ALIGNED {
            linear = memory::aligned(c, linear, u64::from(bytes))?;
        }
        memory::load(c, linear, bytes)
    })();
    finish::<C, FORM>(c, op, value)
}

fn store<C: Core, const BYTES: u8, const ALIGNED: bool>(c: &mut C, op: &Op<C>) -> Step {
    let done = (|| {
        let mut linear = op.linear_write(c, u64::from(BYTES))?;
        if ALIGNED {
            linear = memory::aligned(c, linear, u64::from(BYTES))?;
        }
        let value = c.cpu().x.ymm[usize::from(op.src & 15)];
        memory::store(c, linear, &value, BYTES)
    })();
    super::step(done)
}

/// Commits what was loaded.
#[inline(always)]
fn finish<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>, value: Result<[u64; 4], Fault>) -> Step {
    match value {
        Ok(value) => {
            commit(&mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)], &value, FORM);
            Step::Next
        }
        Err(Fault) => Step::Fault,
    }
}

fn copy<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.ymm[usize::from(op.src & 15)];
    finish::<C, FORM>(c, op, Ok(value))
}

fn copy_low<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.ymm[usize::from(op.src & 15)];
    finish::<C, FORM>(c, op, Ok([value[0], 0, 0, 0]))
}

fn load_low<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let value = op.linear_read(c, u64::from(op.width)).and_then(|linear| memory::load(c, linear, op.width));
    finish::<C, FORM>(c, op, value)
}

fn store_low<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.ymm[usize::from(op.src & 15)];
    let done = op.linear_write(c, u64::from(op.width)).and_then(|at| memory::store(c, at, &value, op.width));
    super::step(done)
}

fn store_high<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.ymm[usize::from(op.src & 15)][1];
    super::step(op.linear_write(c, 8).and_then(|at| c.store(at, value)))
}

fn merge_low<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let ymm = &c.cpu().x.ymm;
    let (mut value, low) = (ymm[usize::from(op.aux & 15)], ymm[usize::from(op.src & 15)][0]);
    value[0] = if op.width == 4 { value[0] & !0xFFFF_FFFF | low & 0xFFFF_FFFF } else { low };
    finish::<C, FORM>(c, op, Ok(value))
}

fn load_half<C: Core, const HIGH: bool, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let half = op.linear_read(c, 8).and_then(|linear| c.load::<u64>(linear));
    let mut value = c.cpu().x.ymm[usize::from(op.aux & 15)];
    let value = half.map(|half| {
        value[usize::from(HIGH)] = half;
        value
    });
    finish::<C, FORM>(c, op, value)
}

fn cross<C: Core, const HIGH_TO_LOW: bool, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let ymm = &c.cpu().x.ymm;
    let (mut value, from) = (ymm[usize::from(op.aux & 15)], ymm[usize::from(op.src & 15)]);
    if HIGH_TO_LOW {
        value[0] = from[1];
    } else {
        value[1] = from[0];
    }
    finish::<C, FORM>(c, op, Ok(value))
}

fn to_general<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.ymm[usize::from(op.src & 15)][0];
    c.cpu_mut().gpr[usize::from(op.dst & 15)] = if op.width == 4 { value & 0xFFFF_FFFF } else { value };
    Step::Next
}

fn from_general<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().gpr[usize::from(op.src & 31)];
    let value = if op.width == 4 { value & 0xFFFF_FFFF } else { value };
    finish::<C, FORM>(c, op, Ok([value, 0, 0, 0]))
}
