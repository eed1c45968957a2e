//! System instructions, and the delivery of interrupts and exceptions.
//!
//! A file a family. Handlers check everything before they commit; what changes mode, segments or IF ends
//! its block. Run loops call [`interrupts`] to deliver events and [`debug`] around instructions while
//! breakpoints or single stepping are on.

mod branch;
mod control;
pub mod debug;
mod descriptor;
mod far;
mod flags;
pub mod interrupts;
mod iret;
mod misc;
mod msr;
mod ports;
mod segments;
mod stack;
pub mod syscall;
mod tables;
mod task;
#[cfg(test)]
mod tests;

use crate::core::{Core, Fault};
use crate::lower::LowerContext;
use crate::mode::ModeKey;
use crate::op::Op;
use x86_decode::Instruction;

/// Lowers an instruction of this family.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    segments::lower(insn, ctx)
        .or_else(|| flags::lower(insn, ctx))
        .or_else(|| syscall::lower(insn, ctx))
        .or_else(|| misc::lower(insn, ctx))
        .or_else(|| control::lower(insn, ctx))
        .or_else(|| debug::lower(insn, ctx))
        .or_else(|| msr::lower(insn, ctx))
        .or_else(|| ports::lower(insn, ctx))
        .or_else(|| branch::lower(insn, ctx))
        .or_else(|| tables::lower(insn, ctx))
}

/// A [`Handler`](crate::op::Handler) from a function that returns `Result<Step, Fault>`.
macro_rules! handler {
    ($f:expr) => {
        (|c: &mut C, op: &crate::op::Op<C>| $f(c, op).unwrap_or(crate::op::Step::Fault))
            as crate::op::Handler<C>
    };
}
pub(crate) use handler;

/// Whether a 48-bit linear address is canonical.
#[inline(always)]
pub(crate) fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// #GP(0) unless at CPL 0.
#[inline(always)]
fn require_cpl0<C: Core>(c: &mut C) -> Result<(), Fault> {
    if c.cpu().cpl == 0 { Ok(()) } else { Err(c.gp(0)) }
}

/// #UD in real and virtual-8086 mode.
fn require_protected<C: Core>(c: &mut C) -> Result<(), Fault> {
    let mode = c.cpu().mode;
    if mode.has(ModeKey::PROTECTED) && !mode.has(ModeKey::V86) { Ok(()) } else { Err(c.ud()) }
}

/// #GP(0) if UMIP hides the descriptor tables' registers.
fn require_no_umip<C: Core>(c: &mut C) -> Result<(), Fault> {
    if c.cpu().mode.has(ModeKey::UMIP) && c.cpu().cpl > 0 { Err(c.gp(0)) } else { Ok(()) }
}
