//! Instructions on the control and status words.
//!
//! iced gives the waiting forms (FSTCW, …) their own mnemonics, but only where FWAIT stands as a prefix byte;
//! decoding yields FWAIT and the non-waiting form as two instructions.

use super::raise_pending;
use crate::core::{Core, Fault};
use crate::cpu::{X87, reg};
use crate::lower::{LowerContext, raising};
use crate::mode::ModeKey;
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic as M, OpKind};
use x86_defs::Exception;

/// Lowers WAIT: it obeys CR0.MP and TS, not EM.
pub fn lower_wait<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if insn.mnemonic() != M::Wait {
        return None;
    }
    if ctx.mode.has(ModeKey::MP | ModeKey::TS) {
        return Some(Op { len: insn.len() as u8, ..raising(Exception::DeviceNotAvailable, ctx) });
    }
    Some(ctx.op(insn, wait::<C> as Handler<C>))
}

/// Lowers the others.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let run: Handler<C> = match (insn.mnemonic(), insn.op0_kind()) {
        (M::Fninit, _) => init::<C>,
        (M::Fnclex, _) => clear_exceptions::<C>,
        (M::Fldcw, _) => load_control::<C>,
        (M::Fnstcw, _) => store_control::<C>,
        (M::Fnstsw, OpKind::Memory) => store_status::<C>,
        (M::Fnstsw, _) => status_to_ax::<C>,
        // The 8087's and 80287's: no operation since.
        (M::Fneni | M::Fndisi | M::Fnsetpm | M::Frstpm, _) => nothing::<C>,
        _ => return None,
    };
    Some(ctx.op(insn, run))
}

fn wait<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    super::step(raise_pending(c))
}

fn nothing<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

fn init<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    let x87 = &mut c.cpu_mut().x.x87;
    *x87 = X87 { regs: x87.regs, ..X87::default() };
    Step::Next
}

fn clear_exceptions<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    c.cpu_mut().x.x87.status &= 0x7F00;
    Step::Next
}

fn load_control<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let load = |c: &mut C| -> Result<(), Fault> {
        raise_pending(c)?;
        let linear = op.linear_read(c, 2)?;
        let value: u16 = c.load(linear)?;
        c.cpu_mut().x.x87.set_control(value);
        Ok(())
    };
    super::step(load(c))
}

fn store_control<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.x87.control;
    super::step(op.linear_write(c, 2).and_then(|linear| c.store(linear, value)))
}

fn store_status<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let value = c.cpu().x.x87.status;
    super::step(op.linear_write(c, 2).and_then(|linear| c.store(linear, value)))
}

fn status_to_ax<C: Core>(c: &mut C, _: &Op<C>) -> Step {
    let cpu = c.cpu_mut();
    cpu.gpr[reg::RAX] = cpu.gpr[reg::RAX] & !0xFFFF | u64::from(cpu.x.x87.status);
    Step::Next
}
