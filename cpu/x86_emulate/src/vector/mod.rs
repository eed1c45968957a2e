//! Vector instructions: MMX, SSE to SSE4.2, AVX, AVX2, FMA, F16C, AES, PCLMUL, SHA, GFNI, and the
//! instructions that save and restore their registers.
//!
//! - `gate`: whether they may run. `kernels`: whatever is one instruction of the host on vector registers.
//!   `unmasked`, `unbounded`: while exceptions are unmasked.
//! - `moves`, `lanes`: data movement in plain Rust. `convert`: with general registers and flags.
//! - `mmx`: the 64-bit registers. `state`, `xsave`: MXCSR, FXSAVE and the XSAVE family.

/// The handler `$name` for a form.
macro_rules! by_form {
    ($form:expr, $name:ident) => {
        match $form {
            $crate::vector::kernels::SSE => $name::<C, { $crate::vector::kernels::SSE }>,
            $crate::vector::kernels::VEX128 => $name::<C, { $crate::vector::kernels::VEX128 }>,
            _ => $name::<C, { $crate::vector::kernels::VEX256 }>,
        }
    };
    ($form:expr, $name:ident::<$arg:literal>) => {
        match $form {
            $crate::vector::kernels::SSE => $name::<C, $arg, { $crate::vector::kernels::SSE }>,
            $crate::vector::kernels::VEX128 => $name::<C, $arg, { $crate::vector::kernels::VEX128 }>,
            _ => $name::<C, $arg, { $crate::vector::kernels::VEX256 }>,
        }
    };
}

mod convert;
pub mod gate;
mod kernels;
mod lanes;
mod masked;
pub(crate) mod memory;
mod mmx;
mod moves;
mod state;
mod strings;
#[cfg(test)]
pub(crate) mod tests;
mod unbounded;
mod unmasked;
mod xsave;

use crate::core::{Core, Fault};
use crate::lower::{LowerContext, raising};
use crate::op::{Op, Step};
use x86_decode::Instruction;

/// Lowers an instruction of this family.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    if let Some(op) = xsave::lower(insn, ctx).or_else(|| strings::lower_movnti(insn, ctx)) {
        return Some(op);
    }
    let op = moves::lower(insn, ctx)
        .or_else(|| kernels::lower(insn, ctx))
        .or_else(|| convert::lower(insn, ctx))
        .or_else(|| lanes::lower(insn, ctx))
        .or_else(|| masked::lower(insn, ctx))
        .or_else(|| strings::lower(insn, ctx))
        .or_else(|| state::lower(insn, ctx))
        .or_else(|| mmx::lower(insn, ctx))?;
    match gate::exception(insn, ctx) {
        Some(exception) => Some(Op { len: insn.len() as u8, ..raising(exception, ctx) }),
        None => Some(op),
    }
}

/// What a handler returns.
#[inline(always)]
fn step(done: Result<(), Fault>) -> Step {
    match done {
        Ok(()) => Step::Next,
        Err(Fault) => Step::Fault,
    }
}
