//! The x87 unit (SDM vol. 1, chapter 8).
//!
//! - `compute`: everything that computes or moves; the host runs it. `fast`: its usual cases. `encoding`: the
//!   bytes to run.
//! - `control`: instructions on control and status words. `environment`: FNSTENV, FNSAVE and back.
//! - `image`: FXSAVE's format.

mod compute;
mod control;
mod encoding;
mod environment;
mod fast;
pub mod image;

use crate::core::{Core, Fault};
use crate::lower::{LowerContext, raising};
use crate::op::{Op, Step};
use crate::vector::gate;
use x86_decode::Instruction;
use x86_defs::Exception;

/// Raises #MF if an unmasked exception is pending: what a waiting instruction does first.
///
/// Without CR0.NE a PC would signal IRQ 13 instead; nothing since the 80386 wants that.
#[inline(always)]
pub fn raise_pending<C: Core>(c: &mut C) -> Result<(), Fault> {
    if c.cpu().x.x87.status & 0x80 != 0 { Err(c.raise(Exception::X87, 0)) } else { Ok(()) }
}

/// Lowers an instruction of this family.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if let Some(op) = control::lower_wait(insn, ctx) {
        return Some(op);
    }
    let op = control::lower(insn, ctx)
        .or_else(|| compute::lower(insn, ctx))
        .or_else(|| environment::lower(insn, ctx))?;
    match gate::x87_exception(ctx) {
        Some(exception) => Some(Op { len: insn.len() as u8, ..raising(exception, ctx) }),
        None => Some(op),
    }
}

/// Whether `insn` computes with or moves registers of the unit, which is done with the host's own instruction: control and
/// state instructions do not.
pub fn computes(insn: &Instruction) -> bool {
    encoding::encoding(insn).is_some()
}

/// What a handler returns.
#[inline(always)]
fn step(done: Result<(), Fault>) -> Step {
    match done {
        Ok(()) => Step::Next,
        Err(Fault) => Step::Fault,
    }
}
