//! Segment registers: MOV and POP to them, MOV and PUSH from them, LDS and its kin (SDM vol. 2).

use super::descriptor::load_segment;
use super::handler;
use super::iret::merge_sp;
use super::stack::Stack;
use crate::core::{Core, Fault};
use crate::cpu::reg::RSP;
use crate::integer::write_reg;
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction, Mnemonic, OpKind, Register};
use x86_defs::{Segment, SegmentIndex};

const INDICES: [SegmentIndex; 6] = [
    SegmentIndex::Es,
    SegmentIndex::Cs,
    SegmentIndex::Ss,
    SegmentIndex::Ds,
    SegmentIndex::Fs,
    SegmentIndex::Gs,
];

fn index_of(register: Register) -> u8 {
    (register as u8).wrapping_sub(Register::ES as u8).min(5)
}

fn commit<C: Core>(c: &mut C, index: SegmentIndex, segment: Segment) {
    let cpu = c.cpu_mut();
    cpu.seg[index as usize] = segment;
    cpu.refresh();
    if index == SegmentIndex::Ss {
        cpu.interrupt_shadow = true;
        cpu.shadow_blocks_debug = true;
    }
}

/// Ends the block if the mode key changed, or for the shadow of a load of SS.
fn after_load<C: Core>(c: &mut C, op: &Op<C>, before: crate::ModeKey, index: SegmentIndex) -> Step {
    if c.cpu().mode == before && index != SegmentIndex::Ss { Step::Next } else { op.end_block(c) }
}

/// MOV Sreg, r/m16: `aux` is the segment.
fn mov_to<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let index = INDICES[op.aux as usize];
    let selector = if MEM {
        let at = op.linear_read(c, 2)?;
        c.load::<u16>(at)?
    } else {
        c.cpu().gpr[(op.src & 31) as usize] as u16
    };
    let before = c.cpu().mode;
    let segment = load_segment(c, index, selector)?;
    commit(c, index, segment);
    Ok(after_load(c, op, before, index))
}

fn pop_to<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let index = INDICES[op.aux as usize];
    let mut stack = Stack::current(c, 0);
    // Only the selector is read; the pointer moves by the operand size.
    let selector = stack.pop_low_16(c, op.width)?;
    let before = c.cpu().mode;
    let segment = load_segment(c, index, selector)?;
    let sp = merge_sp(c, c.cpu().gpr[RSP], stack.sp);
    c.cpu_mut().gpr[RSP] = sp;
    commit(c, index, segment);
    Ok(after_load(c, op, before, index))
}

/// MOV r/m, Sreg: memory gets 16 bits, registers are zero-extended from the operand size.
fn mov_from<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let selector = c.cpu().seg[(op.aux as usize).min(5)].selector;
    if MEM {
        let at = op.linear_write(c, 2)?;
        c.store(at, selector)?;
    } else if op.width == 2 {
        write_reg(c, op.dst, selector);
    } else {
        write_reg(c, op.dst, u64::from(selector));
    }
    Ok(Step::Next)
}

/// PUSH Sreg: with a 32-bit operand size only 16 bits are written, as processors do.
fn push_from<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let selector = c.cpu().seg[(op.aux as usize).min(5)].selector;
    let mut stack = Stack::current(c, 0);
    if op.width == 8 {
        stack.push(c, u64::from(selector), 8)?;
    } else {
        stack.push_low_16(c, selector, op.width)?;
    }
    c.cpu_mut().gpr[RSP] = stack.sp;
    Ok(Step::Next)
}

/// LDS, LES, LSS, LFS, LGS: offset, then selector, from memory.
fn load_far<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let index = INDICES[op.aux as usize];
    let bytes = usize::from(op.width);
    let at = op.linear_read(c, bytes as u64 + 2)?;
    let mut raw = [0; 10];
    c.load_bytes(at, &mut raw[..bytes + 2])?;
    let selector = u16::from_le_bytes([raw[bytes], raw[bytes + 1]]);
    let mut offset = [0; 8];
    offset[..bytes].copy_from_slice(&raw[..bytes]);
    let offset = u64::from_le_bytes(offset);
    let before = c.cpu().mode;
    let segment = load_segment(c, index, selector)?;
    let shadow = (c.cpu().interrupt_shadow, c.cpu().shadow_blocks_debug);
    commit(c, index, segment);
    // LSS needs no shadow: it loads SP in the same instruction.
    (c.cpu_mut().interrupt_shadow, c.cpu_mut().shadow_blocks_debug) = shadow;
    match op.width {
        2 => write_reg(c, op.dst, offset as u16),
        _ => write_reg(c, op.dst, offset),
    }
    Ok(after_load(c, op, before, index))
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    let register_form = insn.op_count() > 0 && insn.op0_kind() == OpKind::Register;
    match insn.mnemonic() {
        M::Mov => match insn.code() {
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
                if insn.op0_register() == Register::CS {
                    return None;
                }
                let memory = insn.op1_kind() == OpKind::Memory;
                let run = if memory { handler!(mov_to::<C, true>) } else { handler!(mov_to::<C, false>) };
                let mut op = ctx.op(insn, run);
                op.aux = index_of(insn.op0_register());
                if !memory {
                    op.src = gpr(insn.op1_register());
                }
                Some(op)
            }
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
                let run = if register_form {
                    handler!(mov_from::<C, false>)
                } else {
                    handler!(mov_from::<C, true>)
                };
                let mut op = ctx.op(insn, run);
                op.aux = index_of(insn.op1_register());
                if register_form {
                    op.dst = gpr(insn.op0_register());
                    op.width = insn.op0_register().size() as u8;
                }
                Some(op)
            }
            _ => None,
        },
        M::Push | M::Pop if register_form && insn.op0_register().is_segment_register() => {
            use Code::*;
            let bytes = match insn.code() {
                Pushw_ES | Pushw_CS | Pushw_SS | Pushw_DS | Pushw_FS | Pushw_GS => 2,
                Popw_ES | Popw_SS | Popw_DS | Popw_FS | Popw_GS => 2,
                Pushq_FS | Pushq_GS | Popq_FS | Popq_GS => 8,
                _ => 4,
            };
            let push = insn.mnemonic() == M::Push;
            if !push && insn.op0_register() == Register::CS {
                return None;
            }
            let run = if push { handler!(push_from) } else { handler!(pop_to) };
            Some(Op { aux: index_of(insn.op0_register()), width: bytes, ..ctx.op(insn, run) })
        }
        M::Lds | M::Les | M::Lss | M::Lfs | M::Lgs => {
            let mut op = ctx.op(insn, handler!(load_far));
            op.aux = match insn.mnemonic() {
                M::Les => SegmentIndex::Es,
                M::Lss => SegmentIndex::Ss,
                M::Lfs => SegmentIndex::Fs,
                M::Lgs => SegmentIndex::Gs,
                _ => SegmentIndex::Ds,
            } as u8;
            op.dst = gpr(insn.op0_register());
            op.width = insn.op0_register().size() as u8;
            Some(op)
        }
        _ => None,
    }
}
