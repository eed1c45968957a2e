//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM, and MOVNTI, which is a plain store.

use super::kernels::SSE;
use super::{kernels, memory};
use crate::core::{Core, Fault};
use crate::cpu::reg;
use crate::lower::{LowerContext, gpr, memory_bytes, vector_register};
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic as M, OpKind};
use x86_defs::flags::STATUS;
use x86_host_ops::{Special, V};

/// Which instruction.
const EXPLICIT: u8 = 1;
const WIDE_LENGTHS: u8 = 2;
const INDEX: u8 = 4;

/// Lowers these instructions.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let kind = match insn.mnemonic() {
        M::Pcmpistrm | M::Vpcmpistrm => 0,
        M::Pcmpistri | M::Vpcmpistri => INDEX,
        M::Pcmpestrm | M::Vpcmpestrm => EXPLICIT,
        M::Pcmpestri | M::Vpcmpestri => EXPLICIT | INDEX,
        M::Pcmpestrm64 | M::Vpcmpestrm64 => EXPLICIT | WIDE_LENGTHS,
        M::Pcmpestri64 | M::Vpcmpestri64 => EXPLICIT | WIDE_LENGTHS | INDEX,
        _ => return None,
    };
    let mut op = ctx.op(insn, by_form!(kernels::form_of(insn), compare) as Handler<C>);
    op.dst = vector_register(insn.op0_register());
    op.aux = kind;
    if insn.op1_kind() == OpKind::Memory {
        op.width = memory_bytes(insn) as u8;
    } else {
        op.src = vector_register(insn.op1_register());
    }
    Some(op)
}

/// An explicit length as 32 bits: what is beyond ±16 means 16 or the number of words.
fn length(register: u64, wide: bool) -> u64 {
    let value = if wide { register as i64 } else { i64::from(register as i32) };
    value.clamp(-16, 16) as u64
}

fn compare<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>) -> Step {
    let b: Result<V, Fault> = if op.width == 0 {
        Ok(c.cpu().x.ymm[usize::from(op.src & 15)])
    } else {
        op.linear_read(c, 16).and_then(|linear| memory::load(c, linear, 16)) // need not be aligned
    };
    let done = b.map(|b| {
        let cpu = c.cpu_mut();
        let a = cpu.x.ymm[usize::from(op.dst & 15)];
        let special = match (op.aux & EXPLICIT != 0, op.aux & INDEX != 0) {
            (false, false) => Special::Pcmpistrm,
            (false, true) => Special::Pcmpistri,
            (true, false) => Special::Pcmpestrm,
            (true, true) => Special::Pcmpestri,
        };
        let wide = op.aux & WIDE_LENGTHS != 0;
        let lengths = [length(cpu.gpr[reg::RAX], wide), length(cpu.gpr[reg::RDX], wide), 0, 0];
        let (out, _) = special.run(&a, &b, &lengths, op.imm as u8, x86_defs::flags::MXCSR_RESET);
        cpu.flags.replace(STATUS, out[3]);
        if op.aux & INDEX != 0 {
            cpu.gpr[reg::RCX] = out[2] & 0xFFFF_FFFF;
        } else {
            kernels::commit(&mut cpu.x.ymm[0], &out, if FORM == SSE { SSE } else { kernels::VEX128 });
        }
    });
    super::step(done)
}

/// Lowers MOVNTI: no vector register, so none of their conditions.
pub fn lower_movnti<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if insn.mnemonic() != M::Movnti {
        return None;
    }
    let mut op = ctx.op(insn, movnti::<C> as Handler<C>);
    op.src = gpr(insn.op1_register());
    op.width = memory_bytes(insn) as u8;
    Some(op)
}

fn movnti<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = [c.cpu().gpr[usize::from(op.src & 31)], 0, 0, 0];
    super::step(op.linear_write(c, u64::from(op.width)).and_then(|at| memory::store(c, at, &value, op.width)))
}
