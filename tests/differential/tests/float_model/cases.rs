//! Random cases: the generator's, with numbers of interest as operands and control words of all kinds.

use crate::forms::{self, Unit};
use crate::real::{self, Target};
use crate::value::{Format, Value};
use crate::vector::{Bytes, set_lane};
use crate::{conversion, numbers, place};
use differential::compare::decode;
use differential::forms::Form;
use differential::generate;
use differential::state::Case;
use differential::values::Random;
use iced_x86::{EncodingKind, Instruction, MemorySize, Mnemonic as M};

/// Attempts to find a case whose memory operand can be accessed.
const ATTEMPTS: usize = 200;

/// A case of `form` with numbers as operands.
pub fn random(unit: Unit, form: Form, random: &mut Random) -> Option<Case> {
    (0..ATTEMPTS).find_map(|_| attempt(unit, form, random))
}

fn attempt(unit: Unit, form: Form, random: &mut Random) -> Option<Case> {
    let mut case = generate::case(form, 0, random)?;
    let insn = decode(&case);
    assert!(forms::is_modelled(unit, &insn), "{:?} is neither computed nor left out", form.code);
    if place::in_memory(&insn) {
        let at = place::memory(&case, &insn)? as u64 + case.window_at;
        let legacy = insn.encoding() == EncodingKind::Legacy;
        if unit == Unit::Vector && legacy && insn.memory_size().size() == 16 && at & 15 != 0 {
            return None;
        }
    }
    const ALIGNMENT_CHECK: u64 = 1 << 18;
    case.registers.flags &= !ALIGNMENT_CHECK;
    match unit {
        Unit::Vector => vector_operands(&mut case, &insn, random),
        Unit::X87 => x87_operands(&mut case, &insn, random),
    }
    Some(case)
}

fn vector_operands(case: &mut Case, insn: &Instruction, random: &mut Random) {
    let format = conversion::source_format(insn.mnemonic()).or(match insn.memory_size().element_type() {
        MemorySize::Float32 => Some(Format::Single),
        MemorySize::Float64 => Some(Format::Double),
        _ => form_format(insn),
    });
    // Everything masked, or anything.
    let bits = random.bits() as u32;
    case.registers.set_mxcsr(if random.one_in(2) { 0x1F80 | bits & 0xE040 } else { bits & 0xFFFF });
    let mut operands: [Bytes; 3] = [[0; 32]; 3];
    match format {
        Some(format) => {
            for i in 0..32 / format.bytes() {
                let lanes = numbers::triple(random, [format; 3]);
                for (operand, lane) in operands.iter_mut().zip(lanes) {
                    set_lane(operand, i, format.bytes(), lane as u64);
                }
            }
        }
        None => {
            for operand in &mut operands {
                for i in 0..4 {
                    set_lane(operand, i, 8, random.integer());
                }
            }
        }
    }
    for (i, value) in operands.iter().enumerate() {
        place::patch(case, insn, i as u32, value);
    }
}

/// The lanes' format where the instruction has no memory operand.
fn form_format(insn: &Instruction) -> Option<Format> {
    match insn.code().op_code().memory_size().element_type() {
        MemorySize::Float32 => Some(Format::Single),
        MemorySize::Float64 => Some(Format::Double),
        _ => None,
    }
}

fn x87_operands(case: &mut Case, insn: &Instruction, random: &mut Random) {
    let memory = match insn.memory_size() {
        MemorySize::Float32 => Format::Single,
        MemorySize::Float64 => Format::Double,
        _ => Format::Extended,
    };
    let [top, other, operand] = numbers::triple(random, [Format::Extended, Format::Extended, memory]);
    let r = &mut case.registers;
    for i in 0..8 {
        let bits = if i == 0 { top } else { other };
        r.set_st(i, (bits as u64, (bits >> 64) as u16));
    }
    if insn.mnemonic() == M::Fscale && random.one_in(2) {
        // A scale that matters.
        let by = (random.below(70_000) as f32 - 35_000.0) / 4.0;
        let bits = scale_bits(f64::from(by));
        r.set_st(1, bits);
    }
    // Everything masked, or anything; precision control 1 is reserved.
    let bits = random.bits() as u16;
    let masks = if random.one_in(3) { bits & 0x3F } else { 0x3F };
    let precision = random.pick(&[0, 2, 3, 3]) << 8;
    let control = 0x40 | masks | precision | bits & 0xC00;
    let mut status = r.x87_status() & !0x80C0 | random.bits() as u16 & 0x40;
    let pending = status & !control & 0x3F != 0;
    if pending && random.one_in(8) {
        status |= 0x8080;
    } else {
        status &= !0x3F | control & 0x3F;
    }
    let mut in_use = if random.one_in(4) { random.bits() as u8 } else { 0xFF };
    if random.one_in(4) || pushes(insn) && !random.one_in(4) {
        in_use &= !(1 << ((status >> 11).wrapping_sub(1) & 7));
    }
    r.set_x87(control, status, in_use);
    match insn.memory_size() {
        MemorySize::Bcd => patch_word(case, insn, numbers::decimal(random)),
        MemorySize::Float32 | MemorySize::Float64 | MemorySize::Float80 => patch_word(case, insn, operand),
        _ if place::in_memory(insn) => patch_word(case, insn, random.integer().into()),
        _ => {}
    }
}

fn pushes(insn: &Instruction) -> bool {
    let name = format!("{:?}", insn.mnemonic());
    name.starts_with("Fld") || matches!(insn.mnemonic(), M::Fild | M::Fbld | M::Fxtract)
}

/// An extended number from a double.
fn scale_bits(by: f64) -> (u64, u16) {
    let value = Value::new(Format::Double, by.to_bits().into());
    let bits = Target::Extended.round(value.real, real::rounding(0)).bits;
    (bits as u64, (bits >> 64) as u16)
}

fn patch_word(case: &mut Case, insn: &Instruction, bits: u128) {
    let mut value = [0; 32];
    value[..16].copy_from_slice(&bits.to_le_bytes());
    place::patch(case, insn, 0, &value);
}
