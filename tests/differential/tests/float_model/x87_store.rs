//! x87 instructions that write memory: FST, FSTP, FIST, FISTP, FISTTP, FBSTP.

use crate::lane::{INVALID, OVERFLOW, PRECISION, UNDERFLOW};
use crate::real::{self, Target};
use crate::value::{Class, Format, Value};
use crate::x87::Unit;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use rustc_apfloat::{Float, Round};

/// Packed BCD integer indefinite.
const DECIMAL_INDEFINITE: u128 = 0xFFFF_C000_0000_0000_0000;

/// Whether this module knows the instruction.
pub fn knows(insn: &Instruction) -> bool {
    insn.op0_kind() == OpKind::Memory
        && matches!(insn.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
}

/// What is stored, the flags, and whether it was rounded up; `None` if an unmasked exception keeps it back.
struct Stored {
    bits: Option<u128>,
    flags: u32,
    up: bool,
}

/// Runs it, if it is one of these.
pub fn run(u: &mut Unit<'_>) -> Option<()> {
    if !knows(u.insn) {
        return None;
    }
    let mnemonic = u.insn.mnemonic();
    let is_float = matches!(mnemonic, M::Fst | M::Fstp);
    let bytes = u.insn.memory_size().size();
    let stored = match u.st(0) {
        None => {
            let indefinite = match (is_float, bytes) {
                (true, 4) => Format::Single.indefinite(),
                (true, 8) => Format::Double.indefinite(),
                (true, _) => Format::Extended.indefinite(),
                (false, 10) => DECIMAL_INDEFINITE,
                (false, _) => 1 << (8 * bytes - 1),
            };
            if !u.stack_fault(false) {
                return Some(());
            }
            Stored { bits: Some(indefinite), flags: 0, up: false }
        }
        Some(bits) => {
            let a = Value::new(Format::Extended, bits);
            let stored = match (is_float, bytes) {
                (true, 4) => float(u, a, Format::Single),
                (true, 8) => float(u, a, Format::Double),
                (true, _) => Stored { bits: Some(bits), flags: 0, up: false },
                (false, 10) => decimal(u, a),
                (false, _) => integer(u, a, 8 * bytes as u32, mnemonic == M::Fisttp),
            };
            u.set_c1(stored.up);
            u.raise(stored.flags);
            stored
        }
    };
    if let Some(bits) = stored.bits {
        u.store(bits);
        if !matches!(mnemonic, M::Fst | M::Fist) {
            u.pop();
        }
    }
    Some(())
}

fn invalid(u: &Unit<'_>, response: u128) -> Stored {
    Stored { bits: u.masks(INVALID).then_some(response), flags: INVALID, up: false }
}

fn float(u: &Unit<'_>, a: Value, format: Format) -> Stored {
    match a.class {
        Class::Unsupported => return invalid(u, format.indefinite()),
        Class::Signaling => return invalid(u, a.quieted(format)),
        Class::Quiet => return Stored { bits: Some(a.quieted(format)), flags: 0, up: false },
        _ => {}
    }
    let target = if format == Format::Single { Target::Single } else { Target::Double };
    let r = target.round(a.real, u.round());
    let inexact = |inexact: bool| if inexact { PRECISION } else { 0 };
    // What is not stored is not reported as inexact (vol. 1, 4.9.1.6).
    if r.tiny && !u.masks(UNDERFLOW) {
        return Stored { bits: None, flags: UNDERFLOW, up: false };
    }
    if r.huge && !u.masks(OVERFLOW) {
        return Stored { bits: None, flags: OVERFLOW, up: false };
    }
    let flags = match (r.tiny && r.inexact, r.huge) {
        (true, _) => UNDERFLOW | PRECISION,
        (_, true) => OVERFLOW | PRECISION,
        _ => inexact(r.inexact),
    };
    Stored { bits: Some(r.bits), flags, up: r.up }
}

fn integer(u: &Unit<'_>, a: Value, bits: u32, truncates: bool) -> Stored {
    let round = if truncates { Round::TowardZero } else { u.round() };
    match real::to_integer(a.real, round, bits as usize) {
        Some((value, exact)) if !a.real.is_nan() => Stored {
            bits: Some(value as u128 & (u128::MAX >> (128 - bits))),
            flags: if exact { 0 } else { PRECISION },
            up: !exact && real::integer(value.abs()) > a.real.abs(),
        },
        _ => invalid(u, 1 << (bits - 1)),
    }
}

fn decimal(u: &Unit<'_>, a: Value) -> Stored {
    const LIMIT: i128 = 1_000_000_000_000_000_000;
    match real::to_integer(a.real, u.round(), 64) {
        Some((value, exact)) if !a.real.is_nan() && value.abs() < LIMIT => {
            let sign = u128::from(a.negative) << 79;
            let digits = (0..18).map(|i| ((value.abs() / 10i128.pow(i) % 10) as u128) << (4 * i));
            Stored {
                bits: Some(digits.fold(sign, |bcd, digit| bcd | digit)),
                flags: if exact { 0 } else { PRECISION },
                up: !exact && real::integer(value.abs()) > a.real.abs(),
            }
        }
        _ => invalid(u, DECIMAL_INDEFINITE),
    }
}
