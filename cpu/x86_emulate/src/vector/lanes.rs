//! Single lanes, byte shifts, masks to general registers, tests, broadcasts, halves of YMM registers.

use super::kernels::{SSE, VEX256, commit, form_of};
use super::{gate, memory, mmx};
use crate::core::{Core, Fault};
use crate::lower::{LowerContext, gpr, memory_bytes, vector_register};
use crate::op::{Handler, Op, Step};
use crate::x87::raise_pending;
use x86_decode::{Instruction, Mnemonic as M, OpKind};
use x86_defs::flags::{CF, STATUS, ZF};
use x86_host_ops::V;

/// Lowers these instructions. MMX has forms of PINSRW, PEXTRW and PMOVMSKB.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    lower_insert_extract(insn, ctx)
        .or_else(|| lower_mask(insn, ctx))
        .or_else(|| lower_test(insn, ctx))
        .or_else(|| lower_shift_bytes(insn, ctx))
        .or_else(|| lower_broadcast(insn, ctx))
        .or_else(|| lower_half(insn, ctx))
}

/// Bytes of the lane that an insertion or extraction moves.
fn lane_bytes(mnemonic: M) -> Option<u8> {
    Some(match mnemonic {
        M::Pinsrb | M::Vpinsrb | M::Pextrb | M::Vpextrb => 1,
        M::Pinsrw | M::Vpinsrw | M::Pextrw | M::Vpextrw => 2,
        M::Pinsrd | M::Vpinsrd | M::Pextrd | M::Vpextrd | M::Extractps | M::Vextractps => 4,
        M::Pinsrq | M::Vpinsrq | M::Pextrq | M::Vpextrq => 8,
        _ => return None,
    })
}

fn lower_insert_extract<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let bytes = lane_bytes(insn.mnemonic())?;
    let last = insn.op_count() - 2;
    let register = |i: u32| match insn.op_register(i) {
        r if r.is_gpr() => gpr(r),
        r if r.is_mm() => mmx::number(r),
        r => vector_register(r),
    };
    let vector_destination =
        insn.op0_kind() == OpKind::Register && (insn.op0_register().is_xmm() || insn.op0_register().is_mm());
    let in_memory = insn.op0_kind() == OpKind::Memory || insn.op_kind(last) == OpKind::Memory;
    let run: Handler<C> = match (vector_destination, gate::has_mmx(insn), in_memory) {
        (true, true, _) => insert_mmx::<C>,
        (true, false, _) => by_form!(form_of(insn), insert),
        (false, true, _) => extract_mmx::<C>,
        (false, false, true) => extract_to_memory::<C>,
        (false, false, false) => extract::<C>,
    };
    let mut op = ctx.op(insn, run);
    op.dst = register(0);
    op.aux = if last == 2 { register(1) } else { op.dst };
    op.src = register(last);
    op.width = bytes;
    // Bit 8: the general operand is memory.
    op.imm = op.imm & 0xFF | u64::from(in_memory) << 8;
    Some(op)
}

/// `bytes` wide lane of the low 16 bytes, chosen by `imm`: word, shift and mask.
fn place(bytes: u8, imm: u64) -> (usize, u32, u64) {
    let bit = imm.wrapping_mul(8 * u64::from(bytes)) as usize & 127;
    (bit / 64, bit as u32 % 64, u64::MAX >> (64 - 8 * u32::from(bytes)))
}

fn lane(v: &V, bytes: u8, imm: u64) -> u64 {
    let (word, shift, mask) = place(bytes, imm);
    v[word] >> shift & mask
}

fn set_lane(v: &mut V, bytes: u8, imm: u64, value: u64) {
    let (word, shift, mask) = place(bytes, imm);
    v[word] = v[word] & !(mask << shift) | (value & mask) << shift;
}

/// The general operand: register or memory.
fn inserted<C: Core>(c: &mut C, op: &Op<C>) -> Result<u64, Fault> {
    if op.imm >> 8 == 0 {
        return Ok(c.cpu().gpr[usize::from(op.src & 31)]);
    }
    let linear = op.linear_read(c, u64::from(op.width))?;
    Ok(memory::load(c, linear, op.width)?[0])
}

fn insert<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let done = inserted(c, op).map(|value| {
        let ymm = &mut c.cpu_mut().x.ymm;
        let mut out = ymm[usize::from(op.aux & 15)];
        set_lane(&mut out, op.width, op.imm & 0xFF, value);
        commit(&mut ymm[usize::from(op.dst & 15)], &out, FORM);
    });
    super::step(done)
}

fn insert_mmx<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let done = raise_pending(c).and_then(|()| inserted(c, op)).map(|value| {
        let mut out = [mmx::get(c, op.dst), 0, 0, 0];
        set_lane(&mut out, 2, op.imm & 3, value);
        mmx::set(c, op.dst, out[0]);
    });
    super::step(done)
}

fn extract<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = lane(&c.cpu().x.ymm[usize::from(op.src & 15)], op.width, op.imm & 0xFF);
    c.cpu_mut().gpr[usize::from(op.dst & 15)] = value;
    Step::Next
}

fn extract_to_memory<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    // The register is the second operand here.
    let value = lane(&c.cpu().x.ymm[usize::from(op.src & 15)], op.width, op.imm & 0xFF);
    let done = op
        .linear_write(c, u64::from(op.width))
        .and_then(|linear| memory::store(c, linear, &[value, 0, 0, 0], op.width));
    super::step(done)
}

fn extract_mmx<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let done = raise_pending(c).map(|()| {
        let value = lane(&[mmx::get(c, op.src), 0, 0, 0], 2, op.imm & 3);
        mmx::enter(c);
        c.cpu_mut().gpr[usize::from(op.dst & 15)] = value;
    });
    super::step(done)
}

fn lower_mask<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let lane = match insn.mnemonic() {
        M::Pmovmskb | M::Vpmovmskb => 1,
        M::Movmskps | M::Vmovmskps => 4,
        M::Movmskpd | M::Vmovmskpd => 8,
        _ => return None,
    };
    let is_mmx = gate::has_mmx(insn);
    let mut op = ctx.op(insn, if is_mmx { mask_mmx::<C> } else { mask::<C> } as Handler<C>);
    op.dst = gpr(insn.op0_register());
    op.src = if is_mmx { mmx::number(insn.op1_register()) } else { vector_register(insn.op1_register()) };
    op.aux = lane;
    op.width = if form_of(insn) == VEX256 { 4 } else { 2 };
    Some(op)
}

/// The sign bits of the lanes of a word, packed.
#[inline(always)]
fn signs(word: u64, lane: u8) -> u64 {
    match lane {
        1 => (word >> 7 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56,
        4 => word >> 31 & 1 | (word >> 63) << 1,
        _ => word >> 63,
    }
}

fn mask<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let cpu = c.cpu_mut();
    let v = &cpu.x.ymm[usize::from(op.src & 15)];
    let lanes = 8 / u32::from(op.aux.max(1));
    let words = usize::from(op.width.min(4));
    let bits = v[..words].iter().rev().fold(0, |acc, word| acc << lanes | signs(*word, op.aux));
    cpu.gpr[usize::from(op.dst & 15)] = bits;
    Step::Next
}

fn mask_mmx<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let done = raise_pending(c).map(|()| {
        let bits = signs(mmx::get(c, op.src), 1);
        mmx::enter(c);
        c.cpu_mut().gpr[usize::from(op.dst & 15)] = bits;
    });
    super::step(done)
}

fn lower_test<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let relevant = match insn.mnemonic() {
        M::Ptest | M::Vptest => u64::MAX,
        M::Vtestps => 0x8000_0000_8000_0000,
        M::Vtestpd => 1 << 63,
        _ => return None,
    };
    let mut op = ctx.op(insn, by_form!(form_of(insn), test) as Handler<C>);
    op.dst = vector_register(insn.op0_register());
    op.imm = relevant;
    if insn.op1_kind() == OpKind::Memory {
        op.width = memory_bytes(insn) as u8;
    } else {
        op.src = vector_register(insn.op1_register());
    }
    Some(op)
}

/// A vector operand: register if `width` is 0, otherwise memory.
#[inline(always)]
fn operand<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Result<V, Fault> {
    if op.width == 0 {
        return Ok(c.cpu().x.ymm[usize::from(op.src & 15)]);
    }
    let mut linear = op.linear_read(c, u64::from(op.width))?;
    if FORM == SSE && op.width == 16 {
        linear = memory::aligned(c, linear, 16)?;
    }
    memory::load(c, linear, op.width)
}

fn test<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let done = operand::<C, FORM>(c, op).map(|b| {
        let cpu = c.cpu_mut();
        let a = &cpu.x.ymm[usize::from(op.dst & 15)];
        let words = if FORM == VEX256 { 4 } else { 2 };
        let (mut and, mut and_not) = (0, 0);
        for (a, b) in a.iter().zip(&b).take(words) {
            and |= a & b;
            and_not |= !a & b;
        }
        let zf = if and & op.imm == 0 { ZF } else { 0 };
        let cf = if and_not & op.imm == 0 { CF } else { 0 };
        cpu.flags.replace(STATUS, zf | cf);
    });
    super::step(done)
}

fn lower_shift_bytes<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let form = form_of(insn);
    let run: Handler<C> = match insn.mnemonic() {
        M::Pslldq | M::Vpslldq => by_form!(form, shift_bytes::<true>),
        M::Psrldq | M::Vpsrldq => by_form!(form, shift_bytes::<false>),
        _ => return None,
    };
    let mut op = ctx.op(insn, run);
    op.dst = vector_register(insn.op0_register());
    op.src = if insn.op_count() == 3 { vector_register(insn.op1_register()) } else { op.dst };
    Some(op)
}

fn shift_bytes<C: Core, const LEFT: bool, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let ymm = &mut c.cpu_mut().x.ymm;
    let mut out = ymm[usize::from(op.src & 15)];
    let bits = (op.imm as u8).min(16) as u32 * 8;
    for half in out.chunks_exact_mut(2) {
        let value = u128::from(half[0]) | u128::from(half[1]) << 64;
        let value = if LEFT { value.checked_shl(bits) } else { value.checked_shr(bits) }.unwrap_or_default();
        (half[0], half[1]) = (value as u64, (value >> 64) as u64);
    }
    commit(&mut ymm[usize::from(op.dst & 15)], &out, FORM);
    Step::Next
}

fn lower_broadcast<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let bytes = match insn.mnemonic() {
        M::Vpbroadcastb => 1,
        M::Vpbroadcastw => 2,
        M::Vpbroadcastd | M::Vbroadcastss => 4,
        M::Vpbroadcastq | M::Vbroadcastsd => 8,
        M::Vbroadcastf128 | M::Vbroadcasti128 => 16,
        _ => return None,
    };
    let mut op = ctx.op(insn, by_form!(form_of(insn), broadcast) as Handler<C>);
    op.dst = vector_register(insn.op0_register());
    op.aux = bytes;
    if insn.op1_kind() == OpKind::Memory {
        op.width = bytes;
    } else {
        op.src = vector_register(insn.op1_register());
    }
    Some(op)
}

fn broadcast<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let done = operand::<C, FORM>(c, op).map(|v| {
        let out = match op.aux {
            1 => [(v[0] & 0xFF).wrapping_mul(0x0101_0101_0101_0101); 4],
            2 => [(v[0] & 0xFFFF).wrapping_mul(0x0001_0001_0001_0001); 4],
            4 => [(v[0] & 0xFFFF_FFFF).wrapping_mul(0x0000_0001_0000_0001); 4],
            8 => [v[0]; 4],
            _ => [v[0], v[1], v[0], v[1]],
        };
        commit(&mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)], &out, FORM);
    });
    super::step(done)
}

fn lower_half<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let insert = match insn.mnemonic() {
        M::Vinsertf128 | M::Vinserti128 => true,
        M::Vextractf128 | M::Vextracti128 => false,
        _ => return None,
    };
    let run: Handler<C> = if insert { insert_half::<C> } else { extract_half::<C> };
    let mut op = ctx.op(insn, run);
    op.dst = if insn.op0_kind() == OpKind::Register { vector_register(insn.op0_register()) } else { 0 };
    op.aux = vector_register(insn.op1_register());
    let memory_operand = if insert { 2 } else { 0 };
    if insn.op_kind(memory_operand) == OpKind::Memory {
        op.width = 16;
    } else if insert {
        op.src = vector_register(insn.op2_register());
    }
    Some(op)
}

fn insert_half<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let done = operand::<C, VEX256>(c, op).map(|half| {
        let ymm = &mut c.cpu_mut().x.ymm;
        let a = ymm[usize::from(op.aux & 15)];
        ymm[usize::from(op.dst & 15)] =
            if op.imm & 1 == 0 { [half[0], half[1], a[2], a[3]] } else { [a[0], a[1], half[0], half[1]] };
    });
    super::step(done)
}

fn extract_half<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let v = c.cpu().x.ymm[usize::from(op.aux & 15)];
    let half = if op.imm & 1 == 0 { [v[0], v[1], 0, 0] } else { [v[2], v[3], 0, 0] };
    if op.width != 0 {
        let done = op.linear_write(c, 16).and_then(|linear| memory::store(c, linear, &half, 16));
        return super::step(done);
    }
    c.cpu_mut().x.ymm[usize::from(op.dst & 15)] = half;
    Step::Next
}
