//! What SSE, AVX and FMA do with the numbers of one lane (SDM vol. 1, 4.8.3.5, 4.9 and 11.5).

use crate::real::{self, Real, Target};
use crate::value::{Class, Format, Value};
use rustc_apfloat::{Float, Round};
use std::cmp::Ordering;

/// Exception flags of MXCSR, and of the x87 status word.
pub const INVALID: u32 = 1;
pub const DENORMAL: u32 = 2;
pub const ZERO_DIVIDE: u32 = 4;
pub const OVERFLOW: u32 = 8;
pub const UNDERFLOW: u32 = 0x10;
pub const PRECISION: u32 = 0x20;
/// Those found before the computation.
pub const BEFORE: u32 = INVALID | DENORMAL | ZERO_DIVIDE;

/// The control bits of MXCSR.
#[derive(Clone, Copy, Debug)]
pub struct Control(pub u32);

impl Control {
    pub fn round(self) -> Round {
        real::rounding(self.0 >> 13)
    }
    pub fn denormals_are_zeros(self) -> bool {
        self.0 & 0x40 != 0
    }
    fn flushes_to_zero(self) -> bool {
        self.0 & 0x8000 != 0
    }
    /// Whether the exception with this flag is masked.
    pub fn masks(self, flag: u32) -> bool {
        self.0 & flag << 7 != 0
    }
    /// An operand: a denormal number is zero under DAZ.
    pub fn operand(self, format: Format, bits: u64) -> Value {
        let value = Value::new(format, bits.into());
        if self.denormals_are_zeros() && value.is(Class::Denormal) {
            return Value::new(format, format.zero(value.negative));
        }
        value
    }
}

/// A result and the flags it raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lane {
    pub bits: u64,
    pub flags: u32,
}

impl Lane {
    pub fn new(bits: u128, flags: u32) -> Self {
        Self { bits: bits as u64, flags }
    }
}

/// An operation with two operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
}

/// The result of a NaN among `operands`, by their order: the first one, quieted.
fn nan_of(operands: &[Value], to: Format) -> Option<Lane> {
    let nan = operands.iter().find(|v| v.is_nan())?;
    let signaling = operands.iter().any(|v| v.is(Class::Signaling));
    Some(Lane::new(nan.quieted(to), if signaling { INVALID } else { 0 }))
}

pub fn denormal_flag(operands: &[Value]) -> u32 {
    if operands.iter().any(|v| v.is(Class::Denormal)) { DENORMAL } else { 0 }
}

/// Whether the operation is invalid on operands that are numbers.
pub fn is_invalid(op: Binary, a: &Value, b: &Value) -> bool {
    let both = |f: fn(&Value) -> bool| f(a) && f(b);
    match op {
        Binary::Add => both(Value::is_infinite) && a.negative != b.negative,
        Binary::Sub => both(Value::is_infinite) && a.negative == b.negative,
        Binary::Mul => a.is_infinite() && b.is_zero() || a.is_zero() && b.is_infinite(),
        Binary::Div => both(Value::is_infinite) || both(Value::is_zero),
    }
}

/// The exact result (see `real`).
pub fn exact(op: Binary, a: Real, b: Real, round: Round) -> Real {
    match op {
        Binary::Add => real::add(a, b, round),
        Binary::Sub => real::add(a, -b, round),
        Binary::Mul => real::mul(a, b),
        Binary::Div => real::div(a, b),
    }
}

/// ADD, SUB, MUL, DIV.
pub fn binary(op: Binary, format: Format, a: u64, b: u64, control: Control) -> Lane {
    let (a, b) = (control.operand(format, a), control.operand(format, b));
    if let Some(nan) = nan_of(&[a, b], format) {
        return nan;
    }
    if is_invalid(op, &a, &b) {
        return Lane::new(format.indefinite(), INVALID);
    }
    if op == Binary::Div && b.is_zero() && !a.is_infinite() {
        return Lane::new(format.infinity(a.negative != b.negative), ZERO_DIVIDE);
    }
    let exact = exact(op, a.real, b.real, control.round());
    finish(exact, format, control, denormal_flag(&[a, b]))
}

/// SQRT.
pub fn sqrt(format: Format, a: u64, control: Control) -> Lane {
    let a = control.operand(format, a);
    if let Some(nan) = nan_of(&[a], format) {
        return nan;
    }
    if a.negative && !a.is_zero() {
        return Lane::new(format.indefinite(), INVALID);
    }
    finish(real::sqrt(a.real), format, control, denormal_flag(&[a]))
}

/// `x × y`, then plus or minus `z`; `negate` is the sign of the product.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fused {
    pub negate: bool,
    pub subtract: bool,
}

/// FMADD and its kin. A NaN is taken from the multiplicand, the multiplier, the addend, in this order.
pub fn fused(op: Fused, format: Format, [x, y, z]: [u64; 3], control: Control) -> Lane {
    let [x, y, z] = [x, y, z].map(|bits| control.operand(format, bits));
    let mut product_invalid = is_invalid(Binary::Mul, &x, &y);
    if let Some(nan) = nan_of(&[x, y, z], format) {
        return nan;
    }
    let negative = (x.negative != y.negative) != op.negate;
    let infinite = x.is_infinite() || y.is_infinite();
    product_invalid |= infinite && z.is_infinite() && negative == (z.negative == op.subtract);
    if product_invalid {
        return Lane::new(format.indefinite(), INVALID);
    }
    let (x_signed, z_signed) =
        (if op.negate { -x.real } else { x.real }, if op.subtract { -z.real } else { z.real });
    let exact = real::mul_add(x_signed, y.real, z_signed, control.round());
    finish(exact, format, control, denormal_flag(&[x, y, z]))
}

/// Rounds `exact` to `format`, with the exceptions that this raises, beside `flags`.
pub fn finish(exact: Real, format: Format, control: Control, flags: u32) -> Lane {
    let target = match format {
        Format::Half => Target::Half,
        Format::Single => Target::Single,
        Format::Double => Target::Double,
        Format::Extended => Target::Extended,
    };
    let r = target.round(exact, control.round());
    let if_inexact = |inexact: bool| if inexact { PRECISION } else { 0 };
    if r.tiny && !control.masks(UNDERFLOW) {
        return Lane::new(r.bits, flags | UNDERFLOW | if_inexact(r.unbounded_inexact));
    }
    // F16C ignores FTZ (vol. 1, 14.4.1).
    if r.tiny && control.flushes_to_zero() && format != Format::Half {
        return Lane::new(format.zero(exact.is_negative()), flags | UNDERFLOW | PRECISION);
    }
    let raised = match (r.tiny && r.inexact, r.huge) {
        (true, _) => UNDERFLOW | PRECISION,
        (_, true) if control.masks(OVERFLOW) => OVERFLOW | PRECISION,
        (_, true) => OVERFLOW | if_inexact(r.unbounded_inexact),
        _ => if_inexact(r.inexact),
    };
    Lane::new(r.bits, flags | raised)
}

/// MIN and MAX: the second operand unless the first one is truly below (above) it.
pub fn extreme(maximum: bool, format: Format, a: u64, b: u64, control: Control) -> Lane {
    let (va, vb) = (control.operand(format, a), control.operand(format, b));
    let flushed = |v: Value, bits: u64| if v.is_zero() { format.zero(v.negative) } else { bits.into() };
    if va.is_nan() || vb.is_nan() {
        return Lane::new(flushed(vb, b), INVALID);
    }
    let wanted = if maximum { Ordering::Greater } else { Ordering::Less };
    let bits = if va.real.partial_cmp(&vb.real) == Some(wanted) { flushed(va, a) } else { flushed(vb, b) };
    Lane::new(bits, denormal_flag(&[va, vb]))
}

/// Compares: the relation (`None`: unordered) and the flags. `signals`: a quiet NaN is invalid too.
pub fn compare(signals: bool, format: Format, a: u64, b: u64, control: Control) -> (Option<Ordering>, u32) {
    let (a, b) = (control.operand(format, a), control.operand(format, b));
    if a.is_nan() || b.is_nan() {
        let invalid = signals || a.is(Class::Signaling) || b.is(Class::Signaling);
        return (None, if invalid { INVALID } else { 0 });
    }
    (a.real.partial_cmp(&b.real), denormal_flag(&[a, b]))
}

/// The predicates of CMPPS and VCMPPS (vol. 2, table 3-1): true if greater, less, equal, unordered; whether a quiet
/// NaN is invalid. Numbers from 16 turn that about.
const PREDICATES: [(bool, bool, bool, bool, bool); 16] = {
    const T: bool = true;
    const F: bool = false;
    [
        (F, F, T, F, F), // EQ_OQ
        (F, T, F, F, T), // LT_OS
        (F, T, T, F, T), // LE_OS
        (F, F, F, T, F), // UNORD_Q
        (T, T, F, T, F), // NEQ_UQ
        (T, F, T, T, T), // NLT_US
        (T, F, F, T, T), // NLE_US
        (T, T, T, F, F), // ORD_Q
        (F, F, T, T, F), // EQ_UQ
        (F, T, F, T, T), // NGE_US
        (F, T, T, T, T), // NGT_US
        (F, F, F, F, F), // FALSE_OQ
        (T, T, F, F, F), // NEQ_OQ
        (T, F, T, F, T), // GE_OS
        (T, F, F, F, T), // GT_OS
        (T, T, T, T, F), // TRUE_UQ
    ]
};

/// CMP with a predicate of 5 bits.
pub fn predicate(number: u8, format: Format, a: u64, b: u64, control: Control) -> Lane {
    let (greater, less, equal, unordered, signals) = PREDICATES[usize::from(number) & 15];
    let signals = signals != (number & 16 != 0);
    let (relation, flags) = compare(signals, format, a, b, control);
    let holds = match relation {
        None => unordered,
        Some(Ordering::Less) => less,
        Some(Ordering::Equal) => equal,
        Some(Ordering::Greater) => greater,
    };
    let ones = u64::MAX >> (64 - 8 * format.bytes());
    Lane::new(if holds { ones.into() } else { 0 }, flags)
}

/// ROUND: bits 0–1 of `imm` are the mode, bit 2 takes MXCSR's, bit 3 suppresses the precision exception.
pub fn round(imm: u8, format: Format, a: u64, control: Control) -> Lane {
    let a = control.operand(format, a);
    if let Some(nan) = nan_of(&[a], format) {
        return nan;
    }
    let mode = if imm & 4 != 0 { control.round() } else { real::rounding(imm.into()) };
    let whole = a.real.round_to_integral(mode).value;
    let inexact = whole != a.real && imm & 8 == 0;
    Lane::new(exact_bits(whole, format), if inexact { PRECISION } else { 0 })
}

/// The encoding of a number that fits `format` exactly.
fn exact_bits(x: Real, format: Format) -> u128 {
    // Nothing of it is rounded, so the controls do not matter.
    finish(x, format, Control(0x1F80), 0).bits.into()
}

/// Conversion between formats.
pub fn convert(from: Format, to: Format, a: u64, control: Control) -> Lane {
    // Half-precision denormals are numbers like others (vol. 1, 14.4.1).
    let a = if from == Format::Half { Value::new(from, a.into()) } else { control.operand(from, a) };
    if let Some(nan) = nan_of(&[a], to) {
        return nan;
    }
    let flags = if from == Format::Half { 0 } else { denormal_flag(&[a]) };
    finish(a.real, to, control, flags)
}

/// Conversion of a signed integer.
pub fn from_integer(value: i64, to: Format, control: Control) -> Lane {
    finish(real::integer(value.into()), to, control, 0)
}

/// Conversion to a signed integer of `bits` bits; the indefinite integer if it has no such value.
pub fn to_integer(from: Format, a: u64, bits: u32, round: Round, control: Control) -> Lane {
    let a = control.operand(from, a);
    let mask = u128::MAX >> (128 - bits);
    match real::to_integer(a.real, round, bits as usize) {
        Some((value, exact)) if !a.is_nan() => {
            Lane::new(value as u128 & mask, if exact { 0 } else { PRECISION })
        }
        _ => Lane::new(1 << (bits - 1), INVALID),
    }
}
