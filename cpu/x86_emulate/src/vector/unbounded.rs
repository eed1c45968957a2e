//! The precision exception beside an unmasked overflow or underflow: it is raised if the result is inexact when it
//! is rounded with an exponent that has no bounds (SDM vol. 1, 4.9.1.6).
//!
//! The host computes with all exceptions masked and tells whether the masked response is inexact, which for an
//! overflow it always is. Here the exact result of each lane is looked at, in integers.

use super::unmasked::{OVERFLOW, UNDERFLOW, masks};
use x86_host_ops::{Kernel, Lanes, V};

/// `significand` × 2^`exponent`; zero has no significand.
#[derive(Clone, Copy)]
struct Number {
    negative: bool,
    significand: u128,
    exponent: i32,
}

/// Sizes of a format: bits of fraction and exponent.
#[derive(Clone, Copy)]
struct Format {
    fraction: u32,
    exponent: u32,
}

const HALF: Format = Format { fraction: 10, exponent: 5 };
const SINGLE: Format = Format { fraction: 23, exponent: 8 };
const DOUBLE: Format = Format { fraction: 52, exponent: 11 };

/// What a kernel does in a lane.
#[derive(Clone, Copy)]
enum Operation {
    /// `a` ± `b`: whether even lanes and odd lanes subtract.
    Sum([bool; 2]),
    /// Neighbours: whether it subtracts.
    Horizontal(bool),
    Product,
    Quotient,
    /// `b` in a narrower format.
    Narrow,
    /// Product and addend: which of `c`, `a`, `b` the addend is (the others are factors), and whether even lanes
    /// and odd lanes subtract, up to the sign of the whole.
    Fused(usize, [bool; 2]),
}

fn operation(kernel: Kernel) -> Option<Operation> {
    use Kernel::*;
    Some(match kernel {
        Addps | Addpd | Addss | Addsd => Operation::Sum([false; 2]),
        Subps | Subpd | Subss | Subsd => Operation::Sum([true; 2]),
        Addsubps | Addsubpd => Operation::Sum([true, false]),
        Haddps | Haddpd => Operation::Horizontal(false),
        Hsubps | Hsubpd => Operation::Horizontal(true),
        Mulps | Mulpd | Mulss | Mulsd => Operation::Product,
        Divps | Divpd | Divss | Divsd => Operation::Quotient,
        Cvtsd2ss | Cvtpd2ps | Vcvtps2ph => Operation::Narrow,
        _ => return fused(kernel),
    })
}

/// The list of kernels has the packed ones of each format by kind and order, then the scalar ones.
fn fused(kernel: Kernel) -> Option<Operation> {
    const FIRST: u16 = Kernel::Vfmadd132ps as u16;
    const PACKED: u16 = 18;
    const _: () = assert!(Kernel::Vfmsubadd231ps as u16 == FIRST + PACKED - 1);
    const _: () = assert!(Kernel::Vfmadd132ss as u16 == FIRST + 2 * PACKED);
    const _: () = assert!(Kernel::Vfnmsub231sd as u16 == FIRST + 2 * PACKED + 23);
    let n = (kernel as u16).checked_sub(FIRST).filter(|n| *n < 2 * PACKED + 24)?;
    let n = if n < 2 * PACKED { n % PACKED } else { (n - 2 * PACKED) % 12 };
    // FMADD, FMSUB, FNMADD, FNMSUB, FMADDSUB, FMSUBADD.
    let subtracts = match n / 3 {
        0 | 3 => [false; 2],
        1 | 2 => [true; 2],
        4 => [true, false],
        _ => [false, true],
    };
    // 132, 213, 231: the digit at the end is the addend.
    let addend = [1, 2, 0][usize::from(n % 3)];
    Some(Operation::Fused(addend, subtracts))
}

/// Whether some lane of `kernel`'s result raises the precision exception under the masks of `mxcsr`, of which one
/// leaves overflow or underflow unmasked. `words` are the result's 64-bit words.
pub fn is_inexact(kernel: Kernel, lanes: Lanes, words: usize, [a, b, c]: [&V; 3], mxcsr: u32) -> bool {
    let Some(operation) = operation(kernel) else { return true };
    let (to, count) = match lanes {
        Lanes::None => return true,
        Lanes::LowSingle => (SINGLE, 1),
        Lanes::LowDouble => (DOUBLE, 1),
        Lanes::Singles if kernel == Kernel::Cvtpd2ps => (SINGLE, words),
        Lanes::Singles => (SINGLE, 2 * words),
        Lanes::Doubles => (DOUBLE, words),
        Lanes::Halves => (HALF, 2 * words),
    };
    let from = match kernel {
        Kernel::Cvtsd2ss | Kernel::Cvtpd2ps => DOUBLE,
        Kernel::Vcvtps2ph => SINGLE,
        _ => to,
    };
    let number = |v: &V, i: usize| decode(v, i, from, mxcsr);
    (0..count).any(|i| {
        let exact = match operation {
            Operation::Sum(subtracts) => sum(number(a, i), number(b, i), subtracts[i & 1]),
            Operation::Horizontal(subtracts) => {
                let per_block = 128 / (1 + from.exponent + from.fraction) as usize;
                let (block, at) = (i / per_block * per_block, i % per_block);
                let (v, at) = if 2 * at < per_block { (a, 2 * at) } else { (b, 2 * at - per_block) };
                sum(number(v, block + at), number(v, block + at + 1), subtracts)
            }
            Operation::Product => product(number(a, i), number(b, i)),
            Operation::Quotient => return is_inexact_quotient(number(a, i), number(b, i), to, mxcsr),
            Operation::Narrow => number(b, i),
            Operation::Fused(addend, subtracts) => {
                let operands = [c, a, b].map(|v| number(v, i));
                let factors = product(operands[(addend + 1) % 3], operands[(addend + 2) % 3]);
                sum(factors, operands[addend], subtracts[i & 1])
            }
        };
        exact.is_some_and(|x| raises_precision(x, to, mxcsr))
    })
}

/// Lane `i` of `v`; `None`: infinity or NaN, which nothing inexact comes of.
fn decode(v: &V, i: usize, format: Format, mxcsr: u32) -> Option<Number> {
    const DENORMALS_ARE_ZEROS: u32 = 1 << 6;
    let width = 1 + format.exponent + format.fraction;
    let bit = i as u32 * width;
    let bits = v[(bit / 64) as usize & 3] >> (bit % 64);
    let top = (1 << format.exponent) - 1;
    let exponent = (bits >> format.fraction) as i32 & top;
    let fraction = bits & ((1 << format.fraction) - 1);
    let negative = bits >> (width - 1) & 1 != 0;
    let significand = match exponent {
        0 if mxcsr & DENORMALS_ARE_ZEROS != 0 => 0,
        0 => fraction,
        e if e == top => return None,
        _ => fraction | 1 << format.fraction,
    };
    let exponent = exponent.max(1) - top / 2 - format.fraction as i32;
    Some(Number { negative, significand: significand.into(), exponent }.odd())
}

fn bit_length(x: u128) -> u32 {
    128 - x.leading_zeros()
}

impl Number {
    /// The same number with an odd significand.
    fn odd(self) -> Self {
        let shift = if self.significand == 0 { 0 } else { self.significand.trailing_zeros() };
        Self { significand: self.significand >> shift, exponent: self.exponent + shift as i32, ..self }
    }
}

fn product(a: Option<Number>, b: Option<Number>) -> Option<Number> {
    let (a, b) = (a?, b?);
    Some(Number {
        negative: a.negative != b.negative,
        significand: a.significand * b.significand,
        exponent: a.exponent + b.exponent,
    })
}

/// `a` ± `b`, both with odd significands of at most 106 bits. If the sum is too long it is cut down to something
/// that is too long for any format.
fn sum(a: Option<Number>, b: Option<Number>, subtracts: bool) -> Option<Number> {
    const TOO_LONG: u128 = 1 << 120 | 1;
    let (a, b) = (a?, b?);
    let b = Number { negative: b.negative != subtracts, ..b };
    if a.significand == 0 || b.significand == 0 {
        return Some(if a.significand == 0 { b } else { a });
    }
    let (high, low) = if a.exponent >= b.exponent { (a, b) } else { (b, a) };
    let shift = high.exponent.abs_diff(low.exponent);
    if bit_length(high.significand) + shift > 120 {
        return Some(Number { significand: TOO_LONG, ..high });
    }
    let (x, y) = ((high.significand << shift) as i128, low.significand as i128);
    let total = if high.negative == low.negative { x + y } else { x - y };
    let negative = high.negative != (total < 0);
    Some(Number { negative, significand: total.unsigned_abs(), exponent: low.exponent }.odd())
}

fn is_inexact_quotient(a: Option<Number>, b: Option<Number>, to: Format, mxcsr: u32) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return false };
    if b.significand == 0 {
        return false;
    }
    if a.significand % b.significand != 0 {
        return true;
    }
    let exact = Number { significand: a.significand / b.significand, exponent: a.exponent - b.exponent, ..a };
    raises_precision(exact, to, mxcsr)
}

/// Whether rounding `x`, with an odd significand, raises the precision exception.
fn raises_precision(x: Number, to: Format, mxcsr: u32) -> bool {
    const FLUSH_TO_ZERO: u32 = 1 << 15;
    let length = bit_length(x.significand);
    if length > to.fraction + 1 {
        return true;
    }
    let bias = (1 << (to.exponent - 1)) - 1;
    let (lowest, highest) = (1 - bias, bias);
    let top = x.exponent + length as i32 - 1;
    if x.significand == 0 {
        false
    } else if top > highest {
        masks(mxcsr, OVERFLOW)
    } else if top < lowest && masks(mxcsr, UNDERFLOW) {
        // F16C does not flush.
        let flushes = mxcsr & FLUSH_TO_ZERO != 0 && to.exponent != HALF.exponent;
        flushes || x.exponent < lowest - to.fraction as i32
    } else {
        false
    }
}
