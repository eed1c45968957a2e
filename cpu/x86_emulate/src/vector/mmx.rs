//! MMX: 64-bit registers that lie in the significands of the x87 registers (SDM vol. 1, 9.2 and 9.5).
//!
//! Every MMX instruction waits for x87 exceptions, then sets TOP to 0 and marks all registers in use; a
//! write fills the exponent with ones.

use super::{gate, kernels, memory};
use crate::core::{Core, Fault};
use crate::cpu::F80;
use crate::lower::{LowerContext, gpr, memory_bytes};
use crate::op::{Handler, Op, Step};
use crate::x87::raise_pending;
use x86_decode::{Instruction, Mnemonic as M, OpKind, Register};
use x86_host_ops::{Entry, Form, Kernel, Shape, V};

/// Number of an MMX register.
pub fn number(register: Register) -> u8 {
    if register.is_mm() { register as u8 - Register::MM0 as u8 } else { 0 }
}

/// The value of register `n`.
pub fn get<C: Core>(c: &C, n: u8) -> u64 {
    c.cpu().x.x87.regs[usize::from(n & 7)].mantissa
}

/// Enters MMX use: TOP = 0, all tags valid.
pub fn enter<C: Core>(c: &mut C) {
    let x87 = &mut c.cpu_mut().x.x87;
    x87.status &= !(7 << 11);
    x87.in_use = 0xFF;
}

/// Writes register `n`.
pub fn set<C: Core>(c: &mut C, n: u8, value: u64) {
    enter(c);
    c.cpu_mut().x.x87.regs[usize::from(n & 7)] = F80 { mantissa: value, sign_exponent: 0xFFFF };
}

/// Lowers an MMX instruction that is a kernel: register (`dst` and `a`), then register, memory or count.
pub fn lower_kernel<C: Core>(insn: &Instruction, ctx: &LowerContext, kernel: Kernel) -> Op<C> {
    let mut op = ctx.op(insn, run_kernel::<C, false> as Handler<C>);
    let imm = op.imm as u8;
    op.imm = kernels::pack(kernel, 0, imm);
    op.dst = number(insn.op0_register());
    match insn.op1_kind() {
        OpKind::Memory => {
            op.width = memory_bytes(insn) as u8;
            op.run = run_kernel::<C, true>;
        }
        OpKind::Register => op.src = number(insn.op1_register()),
        _ => op.run = run_count::<C>,
    }
    op
}

fn run_kernel<C: Core, const MEMORY: bool>(c: &mut C, op: &Op<C>) -> Step {
    let done = (|| {
        raise_pending(c)?;
        let b = if MEMORY {
            let linear = op.linear_read(c, u64::from(op.width))?;
            memory::load(c, linear, op.width)?
        } else {
            [get(c, op.src), 0, 0, 0]
        };
        apply(c, op, &b);
        Ok(())
    })();
    super::step(done)
}

fn run_count<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    debug_assert!(Entry::of((op.imm >> 16) as u16).shape == Shape::Shift);
    apply(c, op, &[op.imm & 0xFF, 0, 0, 0]);
    Step::Next
}

fn apply<C: Core>(c: &mut C, op: &Op<C>, b: &V) {
    let a = [get(c, op.dst), 0, 0, 0];
    let out = Entry::of((op.imm >> 16) as u16).run_values(Form::Mmx, &a, b, &[0; 4], op.imm as u8);
    set(c, op.dst, out[0]);
}

/// Lowers moves with MMX registers, and EMMS.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if insn.mnemonic() == M::Emms {
        return Some(ctx.op(insn, emms::<C> as Handler<C>));
    }
    if !gate::has_mmx(insn) {
        return None;
    }
    let run: Handler<C> = match (insn.mnemonic(), insn.op0_kind(), insn.op1_kind()) {
        (M::Movd | M::Movq, OpKind::Memory, _) | (M::Movntq, ..) => store::<C>,
        (M::Movd | M::Movq, _, OpKind::Memory) => load::<C>,
        (M::Movd | M::Movq, ..) if insn.op0_register().is_gpr() => to_general::<C>,
        (M::Movd | M::Movq, ..) if insn.op1_register().is_gpr() => from_general::<C>,
        (M::Movq, ..) => copy::<C>,
        (M::Movq2dq, ..) => to_xmm::<C>,
        (M::Movdq2q, ..) => from_xmm::<C>,
        _ => return None,
    };
    let mut op = ctx.op(insn, run);
    op.width = if insn.mnemonic() == M::Movd { 4 } else { 8 };
    let field = |r: Register| match r {
        r if r.is_mm() => number(r),
        r if r.is_gpr() => gpr(r),
        r => crate::lower::vector_register(r),
    };
    op.dst = field(insn.op0_register());
    op.src = field(insn.op1_register());
    Some(op)
}

fn emms<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    enter(c);
    c.cpu_mut().x.x87.in_use = 0;
    Step::Next
}

fn load<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = raise_pending(c)
        .and_then(|()| op.linear_read(c, u64::from(op.width)))
        .and_then(|linear| memory::load(c, linear, op.width));
    match value {
        Ok(value) => {
            set(c, op.dst, value[0]);
            Step::Next
        }
        Err(Fault) => Step::Fault,
    }
}

fn store<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = [get(c, op.src), 0, 0, 0];
    let done = raise_pending(c)
        .and_then(|()| op.linear_write(c, u64::from(op.width)))
        .and_then(|linear| memory::store(c, linear, &value, op.width));
    if done.is_ok() {
        enter(c);
    }
    super::step(done)
}

/// A register move: `f` after the wait.
fn after_wait<C: Core>(c: &mut C, f: impl FnOnce(&mut C)) -> Step {
    let done = raise_pending(c).map(|()| f(c));
    super::step(done)
}

fn copy<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    after_wait(c, |c| set(c, op.dst, get(c, op.src)))
}

fn to_general<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    after_wait(c, |c| {
        let value = get(c, op.src);
        enter(c);
        c.cpu_mut().gpr[usize::from(op.dst & 15)] = if op.width == 4 { value & 0xFFFF_FFFF } else { value };
    })
}

fn from_general<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    after_wait(c, |c| {
        let value = c.cpu().gpr[usize::from(op.src & 31)];
        set(c, op.dst, if op.width == 4 { value & 0xFFFF_FFFF } else { value });
    })
}

fn to_xmm<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    after_wait(c, |c| {
        let value = get(c, op.src);
        enter(c);
        let dst = &mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)];
        (dst[0], dst[1]) = (value, 0);
    })
}

fn from_xmm<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    after_wait(c, |c| {
        let value = c.cpu().x.ymm[usize::from(op.src & 15)][0];
        set(c, op.dst, value);
    })
}
