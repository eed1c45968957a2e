//! Arithmetic without bounds by rustc_apfloat, and one rounding to a format of the processor.
//!
//! Operations are done in [`Real`]: 100 bits of precision and 20 bits of exponent, so that nothing that 80-bit
//! operands give overflows or underflows. A result with more bits is cut and its last bit set (rounding to odd):
//! rounding that once more, to at most 98 bits, gives what rounding the exact result would.

use rustc_apfloat::ieee::{Double, Half, IeeeFloat, Semantics, Single, X87DoubleExtended};
use rustc_apfloat::{Float, FloatConvert, Round, Status, StatusAnd};

/// A binary format with `P` bits of precision and `E` bits of exponent.
pub struct Binary<const P: usize, const E: usize>;

impl<const P: usize, const E: usize> Semantics for Binary<P, E> {
    const BITS: usize = P + E;
    const EXP_BITS: usize = E;
}

/// See the module's header.
pub type Real = IeeeFloat<Binary<100, 20>>;
/// A precision of `P` bits, no bound on the exponent.
type Unbounded<const P: usize> = IeeeFloat<Binary<P, 20>>;
/// An x87 register under a precision control of `P` bits.
type Register<const P: usize> = IeeeFloat<Binary<P, 15>>;

/// What a result is rounded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Half,
    Single,
    Double,
    /// An x87 register, rounded to 24 bits.
    Extended24,
    /// An x87 register, rounded to 53 bits.
    Extended53,
    /// An x87 register.
    Extended,
}

/// A rounded number.
#[derive(Clone, Copy, Debug)]
pub struct Rounded {
    /// The masked response, encoded.
    pub bits: u128,
    /// The masked response is not the exact result.
    pub inexact: bool,
    /// It is larger in magnitude.
    pub up: bool,
    /// Rounded with an unbounded exponent the result is below the smallest normal number.
    pub tiny: bool,
    /// Rounded with an unbounded exponent the result is above the largest number.
    pub huge: bool,
    /// The result rounded with an unbounded exponent.
    pub unbounded: Real,
    pub unbounded_inexact: bool,
    pub unbounded_up: bool,
}

/// Exact conversion between formats.
pub fn widen<A: Float + FloatConvert<B>, B: Float>(a: A) -> B {
    let mut loses = false;
    let b = a.convert_r(Round::TowardZero, &mut loses).value;
    assert!(!loses, "a number does not fit");
    b
}

impl Target {
    /// Rounds `x`, once.
    pub fn round(self, x: Real, round: Round) -> Rounded {
        let extended = |x: X87DoubleExtended| x.to_bits();
        match self {
            Self::Half => round_as::<Half, Unbounded<11>>(x, round, Float::to_bits),
            Self::Single => round_as::<Single, Unbounded<24>>(x, round, Float::to_bits),
            Self::Double => round_as::<Double, Unbounded<53>>(x, round, Float::to_bits),
            Self::Extended24 => round_as::<Register<24>, Unbounded<24>>(x, round, |b| extended(widen(b))),
            Self::Extended53 => round_as::<Register<53>, Unbounded<53>>(x, round, |b| extended(widen(b))),
            Self::Extended => round_as::<X87DoubleExtended, Unbounded<64>>(x, round, extended),
        }
    }
}

fn round_as<B, U>(x: Real, round: Round, encode: impl Fn(B) -> u128) -> Rounded
where
    B: Float + FloatConvert<Real>,
    U: Float + FloatConvert<Real>,
    Real: FloatConvert<B> + FloatConvert<U>,
{
    let mut loses = false;
    let bounded: B = x.convert_r(round, &mut loses).value;
    let inexact = loses;
    let unbounded: U = x.convert_r(round, &mut loses).value;
    let unbounded_inexact = loses;
    let is_up = |r: Real| r.abs() > x.abs();
    let nonzero = x.is_finite_non_zero();
    Rounded {
        bits: encode(bounded),
        inexact,
        up: inexact && is_up(widen(bounded)),
        tiny: nonzero && unbounded.ilogb() < B::MIN_EXP,
        huge: nonzero && unbounded.ilogb() > B::MAX_EXP,
        unbounded: widen(unbounded),
        unbounded_inexact,
        unbounded_up: unbounded_inexact && is_up(widen(unbounded)),
    }
}

/// Rounds to odd what was rounded toward zero.
fn odd(r: StatusAnd<Real>) -> Real {
    assert!(!r.status.intersects(Status::OVERFLOW | Status::UNDERFLOW), "beyond the model's exponents");
    if r.status.contains(Status::INEXACT) { Real::from_bits(r.value.to_bits() | 1) } else { r.value }
}

/// As [`odd`] where the sign of an exact zero depends on the rounding mode.
fn odd_sum(round: Round, f: impl Fn(Round) -> StatusAnd<Real>) -> Real {
    let r = f(Round::TowardZero);
    if r.value.is_zero() { f(round).value } else { odd(r) }
}

/// `a + b`.
pub fn add(a: Real, b: Real, round: Round) -> Real {
    odd_sum(round, |r| a.add_r(b, r))
}

/// `a × b`.
pub fn mul(a: Real, b: Real) -> Real {
    odd(a.mul_r(b, Round::TowardZero))
}

/// `a ÷ b`.
pub fn div(a: Real, b: Real) -> Real {
    odd(a.div_r(b, Round::TowardZero))
}

/// `a × b + c`, rounded once.
pub fn mul_add(a: Real, b: Real, c: Real, round: Round) -> Real {
    odd_sum(round, |r| a.mul_add_r(b, c, r))
}

/// The square root of a number that is not negative and has at most 64 significant bits: digit by digit on its
/// significand, which rustc_apfloat does not offer.
pub fn sqrt(x: Real) -> Real {
    if !x.is_finite_non_zero() {
        return x;
    }
    const DIGITS: i32 = 80;
    // x = significand × 2^(2 × exponent), the significand below 2^66.
    let exponent = (x.ilogb() - 64) >> 1;
    let mut exact = false;
    let significand = x.scalbn(-2 * exponent).to_u128_r(128, Round::TowardZero, &mut exact).value;
    assert!(exact && significand < 1 << 66);
    let (mut root, mut rest) = (0u128, 0u128);
    for digit in 0..DIGITS {
        let pair = if digit < 33 { significand >> (2 * (32 - digit)) & 3 } else { 0 };
        rest = rest << 2 | pair;
        let trial = root << 2 | 1;
        root <<= 1;
        if rest >= trial {
            rest -= trial;
            root |= 1;
        }
    }
    let sticky = u128::from(rest != 0);
    Real::from_u128(root << 1 | sticky).value.scalbn(exponent - (DIGITS - 33) - 1)
}

/// An integer of at most 100 bits.
pub fn integer(value: i128) -> Real {
    Real::from_i128(value).value
}

/// The integer that `x` rounds to, if it has at most `bits` bits as a signed number; whether it is `x`.
pub fn to_integer(x: Real, round: Round, bits: usize) -> Option<(i128, bool)> {
    let mut exact = false;
    let r = x.to_i128_r(bits, round, &mut exact);
    // -0 is an integer; apfloat says that it is not.
    (!r.status.contains(Status::INVALID_OP)).then_some((r.value, exact || x.is_zero()))
}

/// The rounding mode that the two bits of a control field mean.
pub fn rounding(bits: u32) -> Round {
    [Round::NearestTiesToEven, Round::TowardNegative, Round::TowardPositive, Round::TowardZero]
        [bits as usize & 3]
}
