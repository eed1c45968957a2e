//! CVT*: conversions between formats and with integers, over vector, general and MMX registers and memory.

use crate::lane::{self, Lane, OVERFLOW, PRECISION, UNDERFLOW};
use crate::value::{Class, Format};
use crate::vector::{Machine, Raise, lane_of};
use crate::{place, x87};
use iced_x86::{Mnemonic as M, OpKind};
use rustc_apfloat::Round;

/// What stands on either side of the "2" of a mnemonic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Vector lanes of a format, or one of them.
    Lanes(Format, bool),
    /// 32-bit integers in a vector register.
    Integers,
    /// A general register.
    General,
    /// Two 32-bit integers in an MMX register.
    Mmx,
}

fn side(name: &str) -> Option<Side> {
    Some(match name {
        "ps" => Side::Lanes(Format::Single, false),
        "pd" => Side::Lanes(Format::Double, false),
        "ph" => Side::Lanes(Format::Half, false),
        "ss" => Side::Lanes(Format::Single, true),
        "sd" => Side::Lanes(Format::Double, true),
        "dq" => Side::Integers,
        "si" => Side::General,
        "pi" => Side::Mmx,
        _ => return None,
    })
}

/// From what to what, and whether it truncates.
fn split(mnemonic: M) -> Option<(Side, Side, bool)> {
    let name = format!("{mnemonic:?}").to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name).strip_prefix("cvt")?;
    let (name, truncates) = match name.strip_prefix('t') {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    let (from, to) = name.split_once('2')?;
    Some((side(from)?, side(to)?, truncates))
}

/// Whether this is a conversion.
pub fn knows(mnemonic: M) -> bool {
    split(mnemonic).is_some()
}

/// The format of the source's lanes, if it holds any.
pub fn source_format(mnemonic: M) -> Option<Format> {
    match split(mnemonic)?.0 {
        Side::Lanes(format, _) => Some(format),
        _ => None,
    }
}

/// Runs it.
pub fn run(m: &mut Machine<'_>) -> Option<Result<(), Raise>> {
    let (from, to, truncates) = split(m.insn.mnemonic())?;
    let mmx = (0..m.insn.op_count())
        .any(|i| m.insn.op_kind(i) == OpKind::Register && m.insn.op_register(i).is_mm());
    if mmx && x87::is_pending(&m.case.registers) {
        m.outcome.raised.vector = x87::EXCEPTION;
        return Some(Err(Raise));
    }
    if mmx {
        place::enter_mmx(&mut m.outcome.registers);
    }
    Some(convert(m, from, to, truncates))
}

/// Bytes of an element; of a general operand, its width.
fn bytes(m: &Machine<'_>, side: Side, operand: u32) -> usize {
    match side {
        Side::Lanes(format, _) => format.bytes(),
        Side::Integers | Side::Mmx => 4,
        Side::General => match m.insn.op_kind(operand) {
            OpKind::Memory => m.insn.memory_size().size(),
            _ => m.insn.op_register(operand).size(),
        },
    }
}

fn convert(m: &mut Machine<'_>, from: Side, to: Side, truncates: bool) -> Result<(), Raise> {
    let to_half = to == Side::Lanes(Format::Half, false);
    let last = if to_half { 1 } else { m.insn.op_count() - 1 };
    let source = m.operand(last);
    let (wide_from, wide_to) = (bytes(m, from, last), bytes(m, to, 0));
    let scalar = [from, to].iter().any(|s| matches!(s, Side::Lanes(_, true) | Side::General));
    let count = match (from, to) {
        _ if scalar => 1,
        (Side::Mmx, _) | (_, Side::Mmx) => 2,
        _ => m.width / wide_from.max(wide_to),
    };
    let mut control = m.control();
    if to_half && m.insn.immediate8() & 4 == 0 {
        // The immediate's rounding mode instead of MXCSR's.
        control.0 = control.0 & !0x6000 | u32::from(m.insn.immediate8() & 3) << 13;
    }
    if to_half
        && (0..count).any(|i| control.operand(Format::Single, lane_of(&source, i, 4)).is(Class::Denormal))
    {
        // Processors call a single-precision denormal inexact beside an unmasked overflow or underflow, though with an
        // unbounded exponent it is not.
        let unmasked = |flag| !control.masks(flag);
        m.open_mxcsr = if unmasked(OVERFLOW) || unmasked(UNDERFLOW) { PRECISION } else { 0 };
    }
    let round = if truncates { Round::TowardZero } else { control.round() };
    let out = m.lanes(count, wide_to, |i| {
        let bits = lane_of(&source, i, wide_from);
        match (from, to) {
            (Side::Lanes(from, _), Side::Lanes(to, _)) => lane::convert(from, to, bits, control),
            (Side::Lanes(from, _), _) => lane::to_integer(from, bits, 8 * wide_to as u32, round, control),
            (_, Side::Lanes(to, _)) => {
                let value = if wide_from == 4 { i64::from(bits as i32) } else { bits as i64 };
                lane::from_integer(value, to, control)
            }
            _ => Lane::new(0, 0),
        }
    })?;
    let written = count * wide_to;
    match to {
        Side::General => place::write_general(&mut m.outcome.registers, m.insn, lane_of(&out, 0, 8)),
        Side::Mmx => place::write_mmx(&mut m.outcome.registers, m.insn, lane_of(&out, 0, 8)),
        _ if m.insn.op0_kind() == OpKind::Memory => {
            if let Some(at) = place::memory(m.case, m.insn) {
                m.outcome.window[at..at + written].copy_from_slice(&out[..written]);
            }
        }
        // One lane, or the two of an MMX register: the rest of the first source stays.
        _ if scalar || from == Side::Mmx => {
            let rest = m.operand(m.insn.op_count().saturating_sub(2));
            m.write(&out[..written], &rest);
        }
        _ => m.write(&out[..written.max(16)], &[0; 32]),
    }
    Ok(())
}
