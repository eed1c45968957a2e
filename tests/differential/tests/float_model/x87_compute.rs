//! x87 instructions that compute a register: arithmetic, loads, constants, partial remainder, scale, extract.

use crate::lane::{self, Binary, DENORMAL, INVALID, PRECISION, ZERO_DIVIDE, denormal_flag};
use crate::real::{self, Real, Target};
use crate::value::{Class, Format, Value};
use crate::x87::{C0, C1, C2, C3, Computed, Unit, index};
use differential::native::is_amd;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use rustc_apfloat::{Float, Round};
use std::cmp::Ordering;

/// Constants: their first 64 bits, the next 64 bits, the exponent of the first bit.
const CONSTANTS: [(M, u64, u64, i32); 5] = [
    (M::Fldpi, 0xC90F_DAA2_2168_C234, 0xC4C6_628B_80DC_1CD1, 1),
    (M::Fldl2t, 0xD49A_784B_CD1B_8AFE, 0x492B_F6FF_4DAF_DB4C, 1),
    (M::Fldl2e, 0xB8AA_3B29_5C17_F0BB, 0xBE87_FED0_691D_3E88, 0),
    (M::Fldlg2, 0x9A20_9A84_FBCF_F798, 0x8F89_59AC_0B7C_9178, -2),
    (M::Fldln2, 0xB172_17F7_D1CF_79AB, 0xC9E3_B398_03F2_F6AF, -1),
];

/// An operation on two operands: which, whether the operands change places, whether it pops.
fn binary(mnemonic: M) -> Option<(Binary, bool, bool)> {
    Some(match mnemonic {
        M::Fadd | M::Fiadd => (Binary::Add, false, false),
        M::Faddp => (Binary::Add, false, true),
        M::Fmul | M::Fimul => (Binary::Mul, false, false),
        M::Fmulp => (Binary::Mul, false, true),
        M::Fsub | M::Fisub => (Binary::Sub, false, false),
        M::Fsubp => (Binary::Sub, false, true),
        M::Fsubr | M::Fisubr => (Binary::Sub, true, false),
        M::Fsubrp => (Binary::Sub, true, true),
        M::Fdiv | M::Fidiv => (Binary::Div, false, false),
        M::Fdivp => (Binary::Div, false, true),
        M::Fdivr | M::Fidivr => (Binary::Div, true, false),
        M::Fdivrp => (Binary::Div, true, true),
        _ => return None,
    })
}

/// Whether this module knows the instruction.
pub fn knows(insn: &Instruction) -> bool {
    binary(insn.mnemonic()).is_some()
        || CONSTANTS.iter().any(|c| c.0 == insn.mnemonic())
        || is_load(insn)
        || matches!(
            insn.mnemonic(),
            M::Fld1
                | M::Fldz
                | M::Fsqrt
                | M::Frndint
                | M::Fscale
                | M::Fxtract
                | M::Fprem
                | M::Fprem1
                | M::Fabs
                | M::Fchs
        )
}

fn is_load(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Fild | M::Fbld)
        || insn.mnemonic() == M::Fld && insn.op0_kind() == OpKind::Memory
}

/// Runs it, if it is one of these.
pub fn run(u: &mut Unit<'_>) -> Option<()> {
    if !knows(u.insn) {
        return None;
    }
    let mnemonic = u.insn.mnemonic();
    if let Some((op, reversed, pops)) = binary(mnemonic) {
        arithmetic(u, op, reversed, pops);
    } else if let Some(&(_, high, low, exponent)) = CONSTANTS.iter().find(|c| c.0 == mnemonic) {
        constant(u, u128::from(high) << 64 | u128::from(low), exponent);
    } else {
        match mnemonic {
            M::Fld | M::Fild | M::Fbld => load(u),
            M::Fld1 => u.deliver_push(Computed::bits(0x3FFF << 64 | 1 << 63, 0)),
            M::Fldz => u.deliver_push(Computed::bits(0, 0)),
            M::Fsqrt => on_top(u, |u, a| square_root(a, u.precision())),
            M::Frndint => round_to_integral(u),
            M::Fabs | M::Fchs => sign(u, mnemonic == M::Fchs),
            M::Fscale => with_st1(u, scale),
            M::Fprem | M::Fprem1 => remainder(u, mnemonic == M::Fprem1),
            _ => extract(u),
        }
    }
    Some(())
}

/// What NaNs and unsupported encodings give, if there are any (vol. 1, table 4-7): of two quiet NaNs the one with
/// the larger significand, the positive one if these are equal; a quiet one before a signaling one.
fn special(operands: &[Value]) -> Option<Computed> {
    if operands.iter().any(|v| v.is(Class::Unsupported)) {
        return Some(Computed::indefinite());
    }
    let signaling = operands.iter().any(|v| v.is(Class::Signaling));
    let rank = |v: &&Value| (v.significand & !(3 << 62), !v.negative);
    let quiet = operands.iter().filter(|v| v.is(Class::Quiet)).max_by_key(rank);
    let nan = quiet.or_else(|| operands.iter().filter(|v| v.is(Class::Signaling)).max_by_key(rank))?;
    Some(Computed::bits(nan.quieted(Format::Extended), if signaling { INVALID } else { 0 }))
}

/// `a` op `b`, rounded to `target`.
fn compute(op: Binary, a: Value, b: Value, target: Target, round: Round) -> Computed {
    if let Some(special) = special(&[a, b]) {
        return special;
    }
    if lane::is_invalid(op, &a, &b) {
        return Computed::indefinite();
    }
    if op == Binary::Div && b.is_zero() && !a.is_infinite() {
        return Computed::bits(Format::Extended.infinity(a.negative != b.negative), ZERO_DIVIDE);
    }
    Computed::exact(lane::exact(op, a.real, b.real, round), target, denormal_flag(&[a, b]))
}

fn arithmetic(u: &mut Unit<'_>, op: Binary, reversed: bool, pops: bool) {
    let (dst, src) = match u.insn.op0_kind() {
        OpKind::Memory => (0, None),
        _ => (index(u.insn, 0).unwrap_or(0), index(u.insn, 1)),
    };
    let a = u.st(dst).map(|bits| Value::new(Format::Extended, bits));
    let b = match src {
        Some(i) => u.st(i).map(|bits| Value::new(Format::Extended, bits)),
        None => Some(u.memory_value()),
    };
    let written = match (a, b) {
        (Some(a), Some(b)) => {
            let (a, b) = if reversed { (b, a) } else { (a, b) };
            u.deliver(dst, compute(op, a, b, u.precision(), u.round()))
        }
        _ => underflow(u, dst),
    };
    if written && pops {
        u.pop();
    }
}

/// A source is empty: the masked response goes to ST(dst).
fn underflow(u: &mut Unit<'_>, dst: usize) -> bool {
    let masked = u.stack_fault(false);
    if masked {
        u.set(dst, Format::Extended.indefinite());
    }
    masked
}

/// ST(0) = f(ST(0)), for numbers; denormals raise the exception.
fn on_top(u: &mut Unit<'_>, f: impl Fn(&Unit<'_>, Value) -> Computed) {
    let Some(bits) = u.st(0) else {
        underflow(u, 0);
        return;
    };
    let a = Value::new(Format::Extended, bits);
    let mut computed = special(&[a]).unwrap_or_else(|| f(u, a));
    if computed.before & INVALID == 0 {
        computed.before |= denormal_flag(&[a]);
    }
    u.deliver(0, computed);
}

/// ST(0) = f(ST(0), ST(1)).
fn with_st1(u: &mut Unit<'_>, f: impl Fn(&Unit<'_>, Value, Value) -> Computed) {
    let (Some(a), Some(b)) = (u.st(0), u.st(1)) else {
        underflow(u, 0);
        return;
    };
    let (a, b) = (Value::new(Format::Extended, a), Value::new(Format::Extended, b));
    let computed = special(&[a, b]).unwrap_or_else(|| f(u, a, b));
    u.deliver(0, computed);
}

fn square_root(a: Value, target: Target) -> Computed {
    if a.negative && !a.is_zero() {
        return Computed::indefinite();
    }
    Computed::exact(real::sqrt(a.real), target, 0)
}

/// FRNDINT.
fn round_to_integral(u: &mut Unit<'_>) {
    let value = u.st(0).map(|bits| Value::new(Format::Extended, bits));
    let round = u.round();
    let whole = |a: Value| a.real.round_to_integral(round).value;
    on_top(u, |_, a| Computed::exact(whole(a), Target::Extended, 0));
    // What is written is exact; what was lost before is not.
    let Some(a) = value.filter(|a| a.real.is_finite()) else { return };
    if !a.is(Class::Denormal) || u.masks(DENORMAL) {
        let inexact = whole(a) != a.real;
        u.raise(if inexact { PRECISION } else { 0 });
        u.set_c1(inexact && whole(a).abs() > a.real.abs());
    }
}

/// FABS and FCHS: any encoding.
fn sign(u: &mut Unit<'_>, change: bool) {
    match u.st(0) {
        None => {
            underflow(u, 0);
        }
        Some(bits) => {
            let sign = 1 << 79;
            u.set_c1(false);
            u.set(0, if change { bits ^ sign } else { bits & !sign });
        }
    }
}

fn load(u: &mut Unit<'_>) {
    let bits = u.memory_bits();
    let computed = if u.insn.mnemonic() == M::Fbld {
        let magnitude = (0..18).rev().fold(0, |value, i| value * 10 + (bits >> (4 * i) & 15) as i128);
        let real = real::integer(magnitude);
        let negative = bits >> 79 & 1 != 0;
        Computed::exact(if negative { -real } else { real }, Target::Extended, 0)
    } else {
        let value = u.memory_value();
        match value.format {
            Format::Extended => Computed::exact(value.real, Target::Extended, 0),
            _ => special(&[value])
                .unwrap_or_else(|| Computed::exact(value.real, Target::Extended, denormal_flag(&[value]))),
        }
    };
    // FLD m80 takes any encoding as it is.
    let is_copy = u.insn.mnemonic() == M::Fld && u.insn.memory_size().size() == 10;
    u.deliver_push(if is_copy { Computed::bits(bits, 0) } else { computed });
}

/// A constant obeys the rounding control, not the precision control, and raises nothing.
fn constant(u: &mut Unit<'_>, bits: u128, exponent: i32) {
    let exact = Real::from_u128(bits >> 29 | 1).value.scalbn(exponent - 98);
    let rounded = Target::Extended.round(exact, u.round()).bits;
    u.deliver_push(Computed::bits(rounded, 0));
}

/// FSCALE: ST(0) × 2^trunc(ST(1)).
fn scale(_: &Unit<'_>, a: Value, b: Value) -> Computed {
    let before = denormal_flag(&[a, b]);
    if b.is_infinite() {
        return match (b.negative, a.is_zero(), a.is_infinite()) {
            (false, true, _) | (true, _, true) => Computed::indefinite(),
            (false, ..) => Computed::bits(Format::Extended.infinity(a.negative), before),
            (true, ..) => Computed::bits(Format::Extended.zero(a.negative), before),
        };
    }
    if b.is_zero() {
        return unchanged(a, before);
    }
    const FAR: i128 = 0x1_0000;
    let by = real::to_integer(b.real, Round::TowardZero, 64).map_or(i128::MAX, |(value, _)| value);
    let by = if by == i128::MAX && b.negative { -FAR } else { by.clamp(-FAR, FAR) };
    let real = if a.real.is_finite_non_zero() { a.real.scalbn(by as i32) } else { a.real };
    Computed::exact(real, Target::Extended, before)
}

/// The operand is the result. For AMD's processors it is computed, and a denormal underflows, if that is not masked;
/// for Intel's it is not. The interpreter's unit is the host's.
fn unchanged(a: Value, before: u32) -> Computed {
    if is_amd() && a.real.is_finite() {
        Computed::exact(a.real, Target::Extended, before)
    } else {
        Computed::bits(encode(a.real), before)
    }
}

/// The encoding of a number that needs no rounding.
fn encode(x: Real) -> u128 {
    Target::Extended.round(x, Round::TowardZero).bits
}

/// FXTRACT: the exponent stays in ST(0), the significand is pushed.
fn extract(u: &mut Unit<'_>) {
    let indefinite = Format::Extended.indefinite();
    let (top, room) = (u.st(0), u.st(7).is_none());
    let Some(bits) = top.filter(|_| room) else {
        if u.stack_fault(top.is_some()) {
            u.set(0, indefinite);
            u.push(indefinite);
        }
        return;
    };
    let a = Value::new(Format::Extended, bits);
    let infinity = |negative| Format::Extended.infinity(negative);
    let (exponent, significand, before) = match special(&[a]) {
        Some(Computed { number: crate::x87::Number::Bits(nan), before }) => (nan, nan, before),
        _ if a.is_zero() => (infinity(true), bits, ZERO_DIVIDE),
        _ if a.is_infinite() => (infinity(false), bits, 0),
        _ => {
            let exponent = a.real.ilogb();
            let significand = encode(a.real.scalbn(-exponent));
            (encode(real::integer(exponent.into())), significand, denormal_flag(&[a]))
        }
    };
    if u.goes_on(before) {
        u.set(0, exponent);
        u.push(significand);
    }
}

/// FPREM and FPREM1. Quotient bits 0, 1, 2 go to C1, C3, C0; C2 says that the reduction is not complete.
fn remainder(u: &mut Unit<'_>, nearest: bool) {
    let (Some(a), Some(b)) = (u.st(0), u.st(1)) else {
        u.open_status = C0 | C2 | C3;
        underflow(u, 0);
        return;
    };
    let (a, b) = (Value::new(Format::Extended, a), Value::new(Format::Extended, b));
    let invalid = a.is_infinite() || b.is_zero();
    let computed = special(&[a, b]).or(invalid.then(Computed::indefinite));
    if let Some(computed) = computed {
        u.open_status = C0 | C2 | C3;
        u.deliver(0, computed);
        return;
    }
    let before = denormal_flag(&[a, b]);
    if before != 0 && !u.masks(DENORMAL) {
        u.open_status = C0 | C2 | C3;
    }
    let (rest, quotient) = if a.is_zero() || b.is_infinite() {
        (unchanged(a, before), 0)
    } else {
        match whole_remainder(a.real, b.real, nearest) {
            Some((rest, quotient)) => (Computed::exact(rest, Target::Extended, before), quotient),
            None => return partial(u, a.real, b.real, before),
        }
    };
    if u.deliver(0, rest) {
        let bit = |n: u32, code: u16| if quotient >> n & 1 != 0 { code } else { 0 };
        u.status &= !(C0 | C1 | C2 | C3);
        u.status |= bit(0, C1) | bit(1, C3) | bit(2, C0);
    }
}

/// The remainder and the quotient's low three bits, if the exponents differ by less than 64.
fn whole_remainder(a: Real, b: Real, nearest: bool) -> Option<(Real, u32)> {
    if a.ilogb() - b.ilogb() >= 64 {
        return None;
    }
    let mut rest = a.abs().c_fmod(b.abs().scalbn(3)).value;
    let mut quotient = 0;
    while rest >= b.abs() {
        rest = rest.sub_r(b.abs(), Round::TowardZero).value;
        quotient += 1;
    }
    let twice = if rest.is_zero() { rest } else { rest.scalbn(1) };
    let above = match twice.partial_cmp(&b.abs()) {
        Some(Ordering::Greater) => true,
        Some(Ordering::Equal) => quotient & 1 != 0,
        _ => false,
    };
    if nearest && above {
        rest = rest.sub_r(b.abs(), Round::TowardZero).value;
        quotient += 1;
    }
    // A zero has the dividend's sign.
    let rest = if rest.is_zero() { Real::ZERO } else { rest };
    Some((if a.is_negative() { -rest } else { rest }, quotient))
}

/// A partial reduction takes 32 to 63 bits from the exponents' difference, as many as the processor likes (vol. 2,
/// FPREM): the interpreter's choice is taken over if it is one of those.
fn partial(u: &mut Unit<'_>, a: Real, b: Real, before: u32) {
    let distance = a.ilogb() - b.ilogb();
    let choices = (32..64).map(|n| {
        let divisor = b.abs().scalbn(distance - n);
        a.c_fmod(divisor).value
    });
    let choices: Vec<u128> = choices.map(encode).collect();
    u.choices = choices;
    if u.goes_on(before) {
        u.set(0, u.choices[0]);
        u.status = u.status & !(C0 | C1 | C3) | C2;
    }
}
