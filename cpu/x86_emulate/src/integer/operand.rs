//! Operands of integer instructions: registers by width, and which form (register, memory, immediate)
//! an instruction has.

use crate::core::{Core, Fault, Word};
use crate::lower::{LowerContext, gpr};
use crate::op::{Handler, Op};
use x86_decode::{Instruction, OpKind};

/// Reads a general register at width `W`; high bytes are marked in `r`.
#[inline(always)]
pub(crate) fn read_reg<W: Word, C: Core>(c: &C, r: u8) -> W {
    let full = c.cpu().gpr[(r & 31) as usize];
    if W::BYTES == 1 { W::from_u64(full >> ((r >> 5) << 3)) } else { W::from_u64(full) }
}

/// Writes a general register at width `W`: 4 bytes clear the upper half, 1 and 2 bytes keep the rest.
#[inline(always)]
pub(crate) fn write_reg<W: Word, C: Core>(c: &mut C, r: u8, value: W) {
    let slot = &mut c.cpu_mut().gpr[(r & 31) as usize];
    *slot = match W::BYTES {
        1 => {
            let shift = (r >> 5) << 3;
            (*slot & !(0xFF << shift)) | value.zext() << shift
        }
        2 => (*slot & !0xFFFF) | value.zext(),
        _ => value.zext(),
    };
}

/// Where the operands of a two-operand instruction are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    RegReg,
    RegImm,
    RegMem,
    MemReg,
    MemImm,
}

/// Shape of an instruction's operands: form and width in bytes; `op.dst`/`op.src` are filled in.
pub(crate) fn two_operands<C: Core>(
    insn: &Instruction,
    ctx: &LowerContext,
    run: Handler<C>,
) -> Option<(Op<C>, Form, u32)> {
    let mut op = ctx.op(insn, run);
    let (first, second) = (insn.op_kind(0), insn.op_kind(1));
    let width = operand_bytes(insn, 0);
    let form = match (first, second) {
        (OpKind::Register, OpKind::Register) => Form::RegReg,
        (OpKind::Register, OpKind::Memory) => Form::RegMem,
        (OpKind::Memory, OpKind::Register) => Form::MemReg,
        (OpKind::Register, _) => Form::RegImm,
        (OpKind::Memory, _) => Form::MemImm,
        _ => return None,
    };
    if first == OpKind::Register {
        op.dst = gpr(insn.op0_register());
    }
    if second == OpKind::Register {
        op.src = gpr(insn.op1_register());
    }
    Some((op, form, width))
}

/// Width in bytes of operand `i` (a register or memory).
pub(crate) fn operand_bytes(insn: &Instruction, i: u32) -> u32 {
    match insn.op_kind(i) {
        OpKind::Register => insn.op_register(i).size() as u32,
        _ => insn.memory_size().size() as u32,
    }
}

/// One operand in a register (`op.dst`) or in memory.
pub(crate) fn one_operand<C: Core>(
    insn: &Instruction,
    ctx: &LowerContext,
    run: Handler<C>,
) -> (Op<C>, bool, u32) {
    let mut op = ctx.op(insn, run);
    let in_memory = insn.op_kind(0) == OpKind::Memory;
    if !in_memory {
        op.dst = gpr(insn.op0_register());
    }
    (op, in_memory, operand_bytes(insn, 0))
}

/// Reads the operand that is `op.src`, or memory if `MEM`.
#[inline(always)]
pub(crate) fn read_source<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<W, Fault> {
    if MEM {
        let at = op.linear_read(c, u64::from(W::BYTES))?;
        c.load(at)
    } else {
        Ok(read_reg(c, op.src))
    }
}

/// Unwraps a `Result<_, Fault>` in a handler.
macro_rules! attempt {
    ($e:expr) => {
        match $e {
            Ok(v) => v,
            Err(crate::core::Fault) => return crate::op::Step::Fault,
        }
    };
}
pub(crate) use attempt;

/// Chooses the handler `$f::<C, $($t,)* W $(, $c)*>` for a width in bytes.
macro_rules! by_width {
    ($bytes:expr, $f:ident :: <C $(, $t:ty)* ; W $(, $k:tt)*>) => {
        match $bytes {
            1 => $f::<C, $($t,)* u8 $(, $k)*> as crate::op::Handler<C>,
            2 => $f::<C, $($t,)* u16 $(, $k)*>,
            4 => $f::<C, $($t,)* u32 $(, $k)*>,
            _ => $f::<C, $($t,)* u64 $(, $k)*>,
        }
    };
}
pub(crate) use by_width;
