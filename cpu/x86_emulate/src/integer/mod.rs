//! Integer instructions: arithmetic, moves, shifts, multiplication, bits, control flow, stack, strings.
//!
//! A file a family. Most handlers are generic over width, operand form and whether flags are needed, so
//! that a running operation decides nothing again.

mod alu;
mod atomic;
mod bits;
mod control;
mod decimal;
mod mov;
mod muldiv;
mod operand;
mod shift;
mod stack;
mod string;

pub(crate) use operand::{read_reg, write_reg};

use crate::core::Core;
use crate::lower::LowerContext;
use crate::op::Op;
use x86_decode::Instruction;

/// Lowers an instruction of this family.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if insn.has_lock_prefix() {
        return atomic::lower_locked(insn, ctx);
    }
    alu::lower(insn, ctx)
        .or_else(|| mov::lower(insn, ctx))
        .or_else(|| control::lower(insn, ctx))
        .or_else(|| stack::lower(insn, ctx))
        .or_else(|| shift::lower(insn, ctx))
        .or_else(|| bits::lower(insn, ctx))
        .or_else(|| muldiv::lower(insn, ctx))
        .or_else(|| string::lower(insn, ctx))
        .or_else(|| atomic::lower(insn, ctx))
        .or_else(|| decimal::lower(insn, ctx))
}
