//! Loads and stores of chosen lanes: MASKMOVQ, MASKMOVDQU, VMASKMOV*, VPMASKMOV*, gathers.
//!
//! Lanes that are not chosen are not accessed and cannot fault.

use super::kernels::{VEX256, form_of};
use super::{memory, mmx};
use crate::core::{Core, Fault, check_segment};
use crate::cpu::reg;
use crate::lower::{LowerContext, vector_register};
use crate::op::{Handler, Op, SEG_CHECKED, Step};
use crate::x87::raise_pending;
use x86_decode::{Instruction, Mnemonic as M, OpKind, Register};
use x86_host_ops::V;

/// Lowers these instructions.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    lower_byte_mask(insn, ctx).or_else(|| lower_mask_move(insn, ctx)).or_else(|| lower_gather(insn, ctx))
}

/// Lane `i` of `bytes`.
fn lane(v: &V, i: usize, bytes: usize) -> u64 {
    let bit = i * bytes * 8;
    (v[(bit / 64) & 3] >> (bit % 64)) & (u64::MAX >> (64 - 8 * bytes))
}

fn set_lane(v: &mut V, i: usize, bytes: usize, value: u64) {
    let bit = i * bytes * 8;
    let mask = u64::MAX >> (64 - 8 * bytes);
    let word = &mut v[(bit / 64) & 3];
    *word = (*word & !(mask << (bit % 64))) | ((value & mask) << (bit % 64));
}

/// Whether the sign bit of lane `i` is set.
fn chosen(mask: &V, i: usize, bytes: usize) -> bool {
    lane(mask, i, bytes) >> (8 * bytes - 1) != 0
}

fn masked_load<C: Core>(c: &mut C, linear: u64, mask: &V, bytes: usize, count: usize) -> Result<V, Fault> {
    let mut out = [0; 4];
    for i in (0..count).filter(|i| chosen(mask, *i, bytes)) {
        let value = memory::load_lane(c, linear.wrapping_add((i * bytes) as u64), bytes as u8)?;
        set_lane(&mut out, i, bytes, value);
    }
    Ok(out)
}

fn masked_store<C: Core>(
    c: &mut C,
    linear: u64,
    value: &V,
    mask: &V,
    bytes: usize,
    count: usize,
) -> Result<(), Fault> {
    for i in (0..count).filter(|i| chosen(mask, *i, bytes)) {
        c.probe(linear.wrapping_add((i * bytes) as u64), bytes as u64, true)?;
    }
    for i in (0..count).filter(|i| chosen(mask, *i, bytes)) {
        let at = linear.wrapping_add((i * bytes) as u64);
        memory::store_lane(c, at, lane(value, i, bytes), bytes as u8)?;
    }
    Ok(())
}

fn lower_byte_mask<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let run: Handler<C> = match insn.mnemonic() {
        M::Maskmovq => mask_bytes::<C, true>,
        M::Maskmovdqu | M::Vmaskmovdqu => mask_bytes::<C, false>,
        _ => return None,
    };
    let mut op = ctx.op(insn, run);
    op.base = reg::RDI as u8;
    op.addr_shift = match insn.op0_kind() {
        OpKind::MemorySegDI => 48,
        OpKind::MemorySegEDI => 32,
        _ => 0,
    };
    op.seg = ctx.segment(insn.memory_segment());
    let number = |r: Register| if r.is_mm() { mmx::number(r) } else { vector_register(r) };
    op.dst = number(insn.op1_register());
    op.src = number(insn.op2_register());
    Some(op)
}

fn mask_bytes<C: Core, const MMX: bool>(c: &mut C, op: &Op<C>) -> Step {
    let store = |c: &mut C| -> Result<(), Fault> {
        if !MMX {
            let linear = op.linear_write(c, 16)?;
            memory::check_alignment(c, linear, 8)?;
            let ymm = &c.cpu().x.ymm;
            let (value, mask) = (ymm[usize::from(op.dst & 15)], ymm[usize::from(op.src & 15)]);
            return masked_store(c, linear, &value, &mask, 1, 16);
        }
        raise_pending(c)?;
        mmx::enter(c); // processors do so even if the store then faults
        let linear = op.linear_write(c, 8)?;
        memory::check_alignment(c, linear, 8)?;
        let (value, mask) = (mmx::get(c, op.dst), mmx::get(c, op.src));
        masked_store(c, linear, &[value, 0, 0, 0], &[mask, 0, 0, 0], 1, 8)
    };
    super::step(store(c))
}

fn lower_mask_move<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let lane = match insn.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        _ => return None,
    };
    let is_store = insn.op0_kind() == OpKind::Memory;
    let mut op = ctx.op(insn, if is_store { mask_store::<C> } else { mask_load::<C> } as Handler<C>);
    op.aux = vector_register(insn.op1_register());
    if is_store {
        op.src = vector_register(insn.op2_register());
    } else {
        op.dst = vector_register(insn.op0_register());
    }
    op.width = if form_of(insn) == VEX256 { 32 } else { 16 };
    op.imm = lane;
    Some(op)
}

fn mask_load<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let load = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_read(c, u64::from(op.width))?;
        let mask = c.cpu().x.ymm[usize::from(op.aux & 15)];
        let bytes = op.imm as usize & 15;
        let out = masked_load(c, linear, &mask, bytes, usize::from(op.width) / bytes.max(1))?;
        c.cpu_mut().x.ymm[usize::from(op.dst & 15)] = out;
        Ok(())
    };
    super::step(load(c))
}

fn mask_store<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let store = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_write(c, u64::from(op.width))?;
        let ymm = &c.cpu().x.ymm;
        let (mask, value) = (ymm[usize::from(op.aux & 15)], ymm[usize::from(op.src & 15)]);
        let bytes = op.imm as usize & 15;
        masked_store(c, linear, &value, &mask, bytes, usize::from(op.width) / bytes.max(1))
    };
    super::step(store(c))
}

fn lower_gather<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let (index_bytes, lane_bytes): (u64, u64) = match insn.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (8, 8),
        _ => return None,
    };
    let index = insn.memory_index();
    let mut scalar = *insn;
    scalar.set_memory_index(Register::None);
    let mut op = ctx.op(&scalar, gather::<C> as Handler<C>);
    op.dst = vector_register(insn.op0_register());
    op.src = vector_register(insn.op2_register());
    op.aux = vector_register(index);
    op.scale = insn.memory_index_scale().trailing_zeros() as u8;
    let wide = insn.op0_register().is_ymm() || index.is_ymm();
    let vector_bytes = if wide { 32 } else { 16 };
    op.width = (vector_bytes / index_bytes.max(lane_bytes)) as u8;
    op.imm = index_bytes << 8 | lane_bytes;
    Some(op)
}

/// `width` lanes; `dst`, mask in `src`, indices in `aux`. What was gathered before a fault stays, and its
/// mask is clear, so that the instruction goes on where it stopped.
fn gather<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let (index_bytes, bytes) = ((op.imm >> 8) as usize & 15, op.imm as usize & 15);
    let ymm = &c.cpu().x.ymm;
    let (mut out, mut mask) = (ymm[usize::from(op.dst & 15)], ymm[usize::from(op.src & 15)]);
    let indices = ymm[usize::from(op.aux & 15)];
    let count = usize::from(op.width.min(8));
    let mut fault = false;
    for i in 0..count {
        if !chosen(&mask, i, bytes) {
            set_lane(&mut mask, i, bytes, 0);
            continue;
        }
        let index = lane(&indices, i, index_bytes);
        let index = if index_bytes == 4 { index as i32 as u64 } else { index };
        match gather_lane(c, op, index, bytes) {
            Ok(value) => {
                set_lane(&mut out, i, bytes, value);
                set_lane(&mut mask, i, bytes, 0);
            }
            Err(Fault) => {
                fault = true;
                break;
            }
        }
    }
    let ymm = &mut c.cpu_mut().x.ymm;
    if !fault {
        for i in count * bytes / 4..8 {
            set_lane(&mut out, i, 4, 0);
        }
        mask = [0; 4];
    }
    ymm[usize::from(op.dst & 15)] = out;
    ymm[usize::from(op.src & 15)] = mask;
    if fault { Step::Fault } else { Step::Next }
}

fn gather_lane<C: Core>(c: &mut C, op: &Op<C>, index: u64, bytes: usize) -> Result<u64, Fault> {
    let base = c.cpu().gpr[usize::from(op.base & 31)];
    let offset = base.wrapping_add(index << (op.scale & 63)).wrapping_add(op.disp as i64 as u64);
    let offset = offset << (op.addr_shift & 63) >> (op.addr_shift & 63);
    let linear = if op.seg & SEG_CHECKED != 0 {
        check_segment(c, op.seg & 7, offset, bytes as u64, false)?
    } else {
        c.cpu().seg_base[usize::from(op.seg & 7)].wrapping_add(offset)
    };
    memory::load_lane(c, linear, bytes as u8)
}
