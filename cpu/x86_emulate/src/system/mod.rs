//! placeholder
use crate::core::Core;
use crate::lower::LowerContext;
use crate::op::Op;
use x86_decode::Instruction;
/// Lowers an instruction of this family.
pub fn lower<C: Core>(_insn: &Instruction, _ctx: &LowerContext) -> Option<Op<C>> {
    None
}
