//! Random operands with a taste for corners: limits of formats, halfway cases, results near over- and underflow.

use crate::value::Format;
use differential::values::Random;

/// Three operands, related to one another in a way that makes their sum, product, quotient or order interesting.
pub fn triple(random: &mut Random, formats: [Format; 3]) -> [u128; 3] {
    let narrow = formats.into_iter().min_by_key(|f| f.top_exponent()).unwrap_or(Format::Single);
    let any = |random: &mut Random| random_exponent(random, narrow);
    let style = random.below(9);
    let first = any(random);
    let edge = edge(random, narrow);
    let exponents = match style {
        0..3 => return formats.map(|f| if random.one_in(2) { corner(random, f) } else { free(random, f) }),
        // Sums that cancel or lose bits.
        3 => [first, first + spread(random, narrow), first + spread(random, narrow)],
        // Products at the limits, and an addend near the product.
        4 => [first, edge - first, edge + spread(random, narrow)],
        // Quotients at the limits.
        5 => [first, first - edge, first - edge],
        // Partial remainders, scales.
        6 => [first + random.below(80) as i32, first, first],
        // Integers with a fraction.
        7 => [0; 3].map(|_| random.below(67) as i32 - 2),
        _ => {
            let one = number(random, formats[0], first);
            return [0, 1, 2].map(|i| {
                if formats[i] == formats[0] { near(random, one) } else { corner(random, formats[i]) }
            });
        }
    };
    [0, 1, 2].map(|i| {
        if random.one_in(12) { corner(random, formats[i]) } else { number(random, formats[i], exponents[i]) }
    })
}

fn bias(format: Format) -> i32 {
    format.top_exponent() as i32 / 2
}

fn random_exponent(random: &mut Random, format: Format) -> i32 {
    let bias = bias(format);
    if random.one_in(2) {
        random.below(40) as i32 - 20
    } else {
        random.below(2 * bias as u64 + 1) as i32 - bias
    }
}

/// An exponent near one of the limits.
fn edge(random: &mut Random, format: Format) -> i32 {
    let width = format.fraction_bits() as i32;
    match random.below(3) {
        0 => bias(format) + random.below(4) as i32 - 1,
        1 => 1 - bias(format) + random.below(4) as i32 - 2,
        _ => 1 - bias(format) - random.below(width as u64 + 3) as i32,
    }
}

fn spread(random: &mut Random, format: Format) -> i32 {
    let width = u64::from(format.fraction_bits()) + 4;
    if random.one_in(2) { random.below(5) as i32 - 2 } else { random.below(2 * width) as i32 - width as i32 }
}

/// A fraction: few bits, long runs, halfway between numbers of a narrower format, or random.
fn fraction(random: &mut Random, width: u32) -> u64 {
    let mask = (1 << width) - 1;
    let bits = random.bits() & mask;
    let cut = random.below(u64::from(width));
    match random.below(8) {
        0 => 0,
        1 => mask,
        2 => bits & !((1 << cut) - 1),
        3 => bits | ((1 << cut) - 1),
        4 => 1 << cut,
        5 => {
            // Exactly half of the last place of a narrower format, or one beside it.
            let rest = width - random.pick(&[10, 23, 31, 52, 53, 23]).min(width);
            let half = if rest == 0 { 0 } else { 1 << (rest - 1) };
            (bits & !((1 << rest) - 1) | half).wrapping_add(random.below(3)).wrapping_sub(1) & mask
        }
        _ => bits,
    }
}

/// A finite number with about this exponent: denormal below the format's range, at its upper end above.
fn number(random: &mut Random, format: Format, exponent: i32) -> u128 {
    let (width, negative) = (format.fraction_bits(), random.one_in(2));
    let field = exponent + bias(format);
    let fraction = fraction(random, width);
    if field > 0 {
        return format.encode(negative, field.min(format.top_exponent() as i32 - 1) as u32, fraction);
    }
    let shift = 1 - field;
    let significand = 1 << width | fraction;
    format.encode(negative, 0, if shift < 64 { significand >> shift } else { 0 })
}

/// A number of any magnitude.
fn free(random: &mut Random, format: Format) -> u128 {
    let exponent = random_exponent(random, format);
    number(random, format, exponent)
}

/// `one`, its negation, or a number beside it.
fn near(random: &mut Random, one: u128) -> u128 {
    match random.below(4) {
        0 => one,
        1 => one ^ 1,
        2 => one.wrapping_add(u128::from(random.below(9))).wrapping_sub(4),
        _ => one.wrapping_sub(u128::from(random.below(3))),
    }
}

/// A number of each kind, NaNs and unsupported encodings included.
pub fn corner(random: &mut Random, format: Format) -> u128 {
    let (width, top, negative) = (format.fraction_bits(), format.top_exponent(), random.one_in(2));
    let (all, quiet) = ((1 << width) - 1, 1 << (width - 1));
    let payload = random.bits() & (quiet - 1);
    let denormal = fraction(random, width);
    let (exponent, fraction) = match random.below(14) {
        0 | 1 => (0, 0),
        2 => (0, 1),
        3 => (0, all),
        4 => (0, denormal),
        5 => (1, 0),
        6 => (top - 1, all),
        7 | 8 => (top, 0),
        9 => (top, quiet | payload),
        10 => (top, payload | 1),
        11 => (top, quiet),
        12 => (bias(format) as u32, 0),
        _ if format == Format::Extended => return contradictory(random),
        _ => (bias(format) as u32 + random.below(3) as u32, 0),
    };
    format.encode(negative, exponent, fraction)
}

/// An 80-bit encoding whose integer bit does not fit its exponent; pseudo-denormals are numbers nevertheless.
fn contradictory(random: &mut Random) -> u128 {
    let sign_exponent = random.pick(&[0u16, 0x8000, 1, 0x3FFF, 0xBFFF, 0x7FFF, 0xFFFF, 0x7FFE]);
    let significand = if random.one_in(3) { 0 } else { random.bits() >> 1 };
    let integer = if sign_exponent & 0x7FFF == 0 { 1 << 63 } else { 0 };
    u128::from(sign_exponent) << 64 | u128::from(significand | integer)
}

/// Ten bytes of packed decimal.
pub fn decimal(random: &mut Random) -> u128 {
    let digits = random.below(19) as u32;
    let value =
        if random.one_in(4) { 10u64.pow(digits) - 1 } else { random.bits() % 10u64.pow(digits).max(1) };
    let sign = u128::from(random.bits() as u8) << 72; // all but the uppermost bit mean nothing
    (0..18).fold(sign, |bcd, i| bcd | u128::from(value / 10u64.pow(i) % 10) << (4 * i))
}
