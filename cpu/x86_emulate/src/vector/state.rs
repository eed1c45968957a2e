//! LDMXCSR, STMXCSR, VZEROUPPER, VZEROALL.

use crate::core::{Core, Fault};
use crate::lower::LowerContext;
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic as M};
use x86_defs::flags;

/// Lowers these instructions.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let run: Handler<C> = match insn.mnemonic() {
        M::Ldmxcsr | M::Vldmxcsr => ldmxcsr::<C>,
        M::Stmxcsr | M::Vstmxcsr => stmxcsr::<C>,
        M::Vzeroupper => zero::<C, false>,
        M::Vzeroall => zero::<C, true>,
        _ => return None,
    };
    Some(ctx.op(insn, run))
}

fn ldmxcsr<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let load = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_read(c, 4)?;
        let value: u32 = c.load(linear)?;
        if value & !flags::MXCSR_MASK != 0 {
            return Err(c.gp(0));
        }
        c.cpu_mut().x.mxcsr = value;
        Ok(())
    };
    super::step(load(c))
}

fn stmxcsr<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.mxcsr;
    super::step(op.linear_write(c, 4).and_then(|linear| c.store(linear, value)))
}

fn zero<C: Core, const ALL: bool>(c: &mut C, _: &Op<C>) -> Step {
    let count = if c.cpu().mode.is_long() { 16 } else { 8 };
    for v in &mut c.cpu_mut().x.ymm[..count] {
        let low = if ALL { [0, 0] } else { [v[0], v[1]] };
        *v = [low[0], low[1], 0, 0];
    }
    Step::Next
}
