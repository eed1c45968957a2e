//! Float kernels while some exception is unmasked: nothing is committed if one of those is raised.
//!
//! The host computes with all exceptions masked. Two things differ from that: a tiny result raises an underflow also
//! if it is exact, and an unmasked overflow or underflow raises the precision exception for other results than a
//! masked one does (`unbounded`).

use super::kernels::{VEX256, commit, host_form, kernel_number, operands_of};
use super::unbounded;
use crate::core::{Core, Fault};
use crate::op::Op;
use x86_defs::{Exception, control};
use x86_host_ops::{Entry, Environment, Kernel, Lanes, Operands, Source, V};

/// Exception flags of MXCSR found before the computation: invalid, denormal, division by zero.
const BEFORE: u32 = 0x7;
/// Those found after it.
pub const OVERFLOW: u32 = 1 << 3;
pub const UNDERFLOW: u32 = 1 << 4;
const PRECISION: u32 = 1 << 5;
const FLUSH_TO_ZERO: u32 = 1 << 15;

/// Whether MXCSR masks the exception with this flag.
pub fn masks(mxcsr: u32, flag: u32) -> bool {
    mxcsr & flag << 7 != 0
}

/// MXCSR to compute with while exceptions are unmasked: no flags, and flushing only if underflow is masked.
pub fn controls(mxcsr: u32) -> u32 {
    let flush = if masks(mxcsr, UNDERFLOW) { mxcsr & FLUSH_TO_ZERO } else { 0 };
    mxcsr & !0x3F & !FLUSH_TO_ZERO | flush
}

/// Runs the operation's kernel and commits.
#[cold]
#[inline(never)]
pub fn run<C: Core, const FORM: u8>(c: &mut C, op: &Op<C>, b: Source<'_>) -> Result<(), Fault> {
    let operands = operands_of(op, b);
    let number = kernel_number(op);
    let is = |kernel: Kernel| number == kernel as u16;
    let out = if is(Kernel::Dpps) || is(Kernel::Dppd) {
        dot::<C, FORM>(c, number, &operands)?
    } else {
        compute::<C, FORM>(c, number, &operands)?
    };
    commit(&mut c.cpu_mut().x.ymm[usize::from(op.dst & 15)], &out, FORM);
    Ok(())
}

/// Runs the kernel, which is not a dot product. Fails if it raises an unmasked exception.
pub fn compute<C: Core, const FORM: u8>(c: &mut C, number: u16, operands: &Operands<'_>) -> Result<V, Fault> {
    let entry = Entry::of(number);
    let x = &mut c.cpu_mut().x;
    let mxcsr = x.mxcsr;
    let (out, mut raised) = entry.compute_float(host_form(FORM), &mut x.ymm, operands, controls(mxcsr));
    if let Environment::Float(lanes) = entry.environment {
        if !masks(mxcsr, UNDERFLOW) && is_tiny(&out, lanes, FORM) {
            raised |= UNDERFLOW; // a tiny exact result is no masked underflow, but an unmasked one
        }
        let unmasked = raised & (OVERFLOW | UNDERFLOW) & !(mxcsr >> 7);
        if unmasked != 0 && raised & PRECISION != 0 {
            let b = match operands.b {
                Source::Register(n) => &x.ymm[usize::from(n & 15)],
                Source::Value(v) => v,
            };
            let sources = [&x.ymm[usize::from(operands.a & 15)], b, &x.ymm[usize::from(operands.c & 15)]];
            let kernel = Kernel::ALL[usize::from(number).min(Kernel::ALL.len() - 1)];
            if !unbounded::is_inexact(kernel, lanes, words(FORM), sources, mxcsr) {
                raised &= !PRECISION;
            }
        }
    }
    settle(c, raised)?;
    Ok(out)
}

/// DPPS and DPPD: each of their stages raises its exceptions before the next one starts.
fn dot<C: Core, const FORM: u8>(c: &mut C, number: u16, operands: &Operands<'_>) -> Result<V, Fault> {
    let singles = number == Kernel::Dpps as u16;
    let chosen: V = core::array::from_fn(|i| {
        let lane = |n: usize| if operands.imm >> (4 + n) & 1 != 0 { u64::MAX } else { 0 };
        let word = i & 1;
        if singles { lane(2 * word) >> 32 | lane(2 * word + 1) << 32 } else { lane(word) }
    });
    let x = &mut c.cpu_mut().x;
    let b = match operands.b {
        Source::Register(n) => x.ymm[usize::from(n & 15)],
        Source::Value(v) => *v,
    };
    let a = x.ymm[usize::from(operands.a & 15)];
    let masked = |v: V| -> V { core::array::from_fn(|i| v[i] & chosen[i]) };
    let (multiply, add, sums) =
        if singles { (Kernel::Mulps, Kernel::Haddps, 2) } else { (Kernel::Mulpd, Kernel::Haddpd, 1) };
    let mut value = stage::<C, FORM>(c, multiply, masked(a), masked(b))?;
    for _ in 0..sums {
        value = stage::<C, FORM>(c, add, value, value)?;
    }
    // The host knows what a NaN is; the exceptions are settled.
    let x = &mut c.cpu_mut().x;
    let (out, _) = Entry::of(number).compute_float(host_form(FORM), &mut x.ymm, operands, controls(x.mxcsr));
    Ok(out)
}

/// `kernel` on values, exceptions settled.
fn stage<C: Core, const FORM: u8>(c: &mut C, kernel: Kernel, a: V, b: V) -> Result<V, Fault> {
    // Its first operand is a register: it stands in one for a moment.
    let saved = core::mem::replace(&mut c.cpu_mut().x.ymm[0], a);
    let operands = Operands { dst: 0, a: 0, b: Source::Value(&b), c: 0, imm: 0 };
    let out = compute::<C, FORM>(c, kernel as u16, &operands);
    c.cpu_mut().x.ymm[0] = saved;
    out
}

/// Records the exceptions that an instruction raised. Fails if one of them is unmasked (SDM vol. 1, 11.5.3:
/// then those found after the computation are not recorded if one found before it is unmasked).
pub fn settle<C: Core>(c: &mut C, raised: u32) -> Result<(), Fault> {
    let cpu = c.cpu_mut();
    let unmasked = raised & !(cpu.x.mxcsr >> 7) & 0x3F;
    let recorded = if unmasked & BEFORE != 0 { raised & BEFORE } else { raised };
    cpu.x.mxcsr |= recorded;
    if unmasked == 0 {
        return Ok(());
    }
    let has_handler = cpu.cr4 & control::CR4_OSXMMEXCPT != 0;
    Err(c.raise(if has_handler { Exception::Simd } else { Exception::InvalidOpcode }, 0))
}

/// 64-bit words of a form's registers.
fn words(form: u8) -> usize {
    if form == VEX256 { 4 } else { 2 }
}

/// Whether a lane of `v` holds a denormal number.
fn is_tiny(v: &V, lanes: Lanes, form: u8) -> bool {
    fn denormal(bits: u64, exponent: u64, fraction: u64) -> bool {
        bits & exponent == 0 && bits & fraction != 0
    }
    let words = &v[..words(form)];
    let single = |bits: u64| denormal(bits, 0x7F80_0000, 0x7F_FFFF);
    let double = |bits: u64| denormal(bits, 0x7FF << 52, (1 << 52) - 1);
    match lanes {
        Lanes::None => false,
        Lanes::LowSingle => single(v[0]),
        Lanes::LowDouble => double(v[0]),
        Lanes::Singles => words.iter().any(|w| single(*w) || single(w >> 32)),
        Lanes::Doubles => words.iter().any(|w| double(*w)),
        Lanes::Halves => v.iter().any(|w| (0..4).any(|i| denormal(w >> (16 * i), 0x7C00, 0x3FF))),
    }
}
