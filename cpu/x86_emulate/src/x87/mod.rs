//! The x87 unit.
use crate::core::{Core, Fault};
use crate::lower::LowerContext;
use crate::op::Op;
use x86_decode::Instruction;
use x86_defs::Exception;

/// Raises #MF if an unmasked exception is pending: what a waiting instruction does first.
#[inline(always)]
pub fn raise_pending<C: Core>(c: &mut C) -> Result<(), Fault> {
    if c.cpu().x.x87.status & 0x80 != 0 { Err(c.raise(Exception::X87, 0)) } else { Ok(()) }
}

/// Lowers an instruction of this family.
pub fn lower<C: Core>(_insn: &Instruction, _ctx: &LowerContext) -> Option<Op<C>> {
    None
}
