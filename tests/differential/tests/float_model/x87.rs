//! What an x87 instruction does with a case (SDM vol. 1, 8.1 to 8.5).
//!
//! Sources are read first: an empty register is a stack fault. Then exceptions found before the computation; an
//! unmasked one ends the instruction with nothing but the flags changed. Then the result is rounded and written.

use crate::check::Expected;
use crate::lane::{BEFORE, INVALID, OVERFLOW, PRECISION, UNDERFLOW};
use crate::place;
use crate::real::{self, Real, Target};
use crate::value::{Format, Value};
use crate::{x87_compare, x87_compute, x87_store};
use differential::state::{Case, Outcome, Raised, Registers};
use iced_x86::{Instruction, MemorySize, OpKind, Register};
use rustc_apfloat::{Float, Round};

/// #MF.
pub const EXCEPTION: u64 = 16;
/// Status word: stack fault, error summary and busy, condition codes.
const STACK_FAULT: u16 = 0x40;
const SUMMARY: u16 = 0x8080;
pub const C0: u16 = 0x100;
pub const C1: u16 = 0x200;
pub const C2: u16 = 0x400;
pub const C3: u16 = 0x4000;
/// What an unmasked overflow or underflow adds to or takes from the exponent (vol. 1, 8.5.4).
const BIAS: i32 = 24576;

/// Whether an unmasked exception waits.
pub fn is_pending(r: &Registers) -> bool {
    r.x87_status() & 0x80 != 0
}

/// A result before its last rounding.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// An encoding: NaN, infinity of a division by zero, something moved.
    Bits(u128),
    /// The exact result, to be rounded to a register.
    Exact(Real, Target),
}

/// A result and the exceptions found before it.
#[derive(Clone, Copy, Debug)]
pub struct Computed {
    pub number: Number,
    pub before: u32,
}

impl Computed {
    pub fn bits(bits: u128, before: u32) -> Self {
        Self { number: Number::Bits(bits), before }
    }
    pub fn indefinite() -> Self {
        Self::bits(Format::Extended.indefinite(), INVALID)
    }
    pub fn exact(real: Real, target: Target, before: u32) -> Self {
        Self { number: Number::Exact(real, target), before }
    }
}

/// An x87 instruction on its way.
pub struct Unit<'a> {
    pub case: &'a Case,
    pub insn: &'a Instruction,
    pub outcome: Outcome,
    pub control: u16,
    pub status: u16,
    in_use: u8,
    registers: [u128; 8],
    /// Bits of the status word and of RFLAGS that the manual leaves open.
    pub open_status: u16,
    pub open_flags: u64,
    /// Results in ST(0) of which each would be right; none: the one that is there.
    pub choices: Vec<u128>,
}

impl<'a> Unit<'a> {
    fn new(case: &'a Case, insn: &'a Instruction) -> Self {
        let r = &case.registers;
        let status = r.x87_status();
        let top = usize::from(status >> 11 & 7);
        let registers = std::array::from_fn(|i| {
            let (significand, sign_exponent) = r.st((i + 8 - top) & 7);
            u128::from(sign_exponent) << 64 | u128::from(significand)
        });
        let mut outcome = Outcome { registers: *r, window: case.window, raised: Raised::default() };
        outcome.raised.vector = Raised::NONE;
        let (control, in_use) = (r.x87_control(), r.x87_in_use());
        Self {
            case,
            insn,
            outcome,
            control,
            status,
            in_use,
            registers,
            open_status: 0,
            open_flags: 0,
            choices: Vec::new(),
        }
    }

    fn finish(mut self) -> Outcome {
        let r = &mut self.outcome.registers;
        r.set_x87(self.control, self.status, self.in_use);
        let top = usize::from(self.status >> 11 & 7);
        for i in 0..8 {
            let bits = self.registers[(top + i) & 7];
            r.set_st(i, (bits as u64, (bits >> 64) as u16));
        }
        self.outcome
    }

    fn physical(&self, i: usize) -> usize {
        (usize::from(self.status >> 11 & 7) + i) & 7
    }
    /// ST(i), unless it is empty.
    pub fn st(&self, i: usize) -> Option<u128> {
        let at = self.physical(i);
        (self.in_use >> at & 1 != 0).then_some(self.registers[at])
    }
    /// What lies in ST(i), empty or not.
    pub fn raw(&self, i: usize) -> u128 {
        self.registers[self.physical(i)]
    }
    pub fn set(&mut self, i: usize, bits: u128) {
        let at = self.physical(i);
        self.registers[at] = bits;
        self.in_use |= 1 << at;
    }
    pub fn pop(&mut self) {
        let at = self.physical(0);
        self.in_use &= !(1 << at);
        self.set_top(at + 1);
    }
    pub fn push(&mut self, bits: u128) {
        self.set_top(self.physical(7));
        self.set(0, bits);
    }
    fn set_top(&mut self, top: usize) {
        self.status = self.status & !0x3800 | (top as u16 & 7) << 11;
    }

    pub fn round(&self) -> Round {
        real::rounding(u32::from(self.control >> 10))
    }
    /// What arithmetic rounds to under the precision control.
    pub fn precision(&self) -> Target {
        match self.control >> 8 & 3 {
            0 => Target::Extended24,
            2 => Target::Extended53,
            _ => Target::Extended,
        }
    }
    pub fn masks(&self, flag: u32) -> bool {
        u32::from(self.control) & flag != 0
    }
    /// Records exceptions; whether all of them are masked.
    pub fn raise(&mut self, flags: u32) -> bool {
        self.status |= flags as u16;
        let unmasked = flags as u16 & !self.control & 0x3F != 0;
        if unmasked {
            self.status |= SUMMARY;
        }
        !unmasked
    }
    /// A stack fault: C1 says whether it is an overflow. Whether it is masked.
    pub fn stack_fault(&mut self, overflow: bool) -> bool {
        self.status = self.status & !C1 | if overflow { C1 } else { 0 } | STACK_FAULT;
        self.raise(INVALID)
    }
    pub fn set_c1(&mut self, on: bool) {
        self.status = self.status & !C1 | if on { C1 } else { 0 };
    }

    /// The exceptions found before the computation: whether it goes on.
    pub fn goes_on(&mut self, before: u32) -> bool {
        self.set_c1(false);
        self.raise(before & BEFORE)
    }

    /// Rounds for a register: the encoding. Records the exceptions.
    pub fn rounded(&mut self, number: Number) -> u128 {
        let (exact, target) = match number {
            Number::Bits(bits) => return bits,
            Number::Exact(exact, target) => (exact, target),
        };
        let r = target.round(exact, self.round());
        let unmasked = if r.tiny && !self.masks(UNDERFLOW) {
            Some((UNDERFLOW, BIAS))
        } else if r.huge && !self.masks(OVERFLOW) {
            Some((OVERFLOW, -BIAS))
        } else {
            None
        };
        if let Some((flag, bias)) = unmasked {
            let back = target.round(r.unbounded.scalbn(bias), Round::TowardZero);
            // Only FSCALE can be so far out that this does not bring the result back: infinity then, or zero.
            let far = back.tiny || back.huge;
            self.raise(flag | if r.unbounded_inexact || far { PRECISION } else { 0 });
            self.set_c1(if far { back.huge } else { r.unbounded_up });
            return match (far, back.huge) {
                (false, _) => back.bits,
                (_, true) => Format::Extended.infinity(exact.is_negative()),
                _ => Format::Extended.zero(exact.is_negative()),
            };
        }
        let flags = match (r.tiny && r.inexact, r.huge) {
            (true, _) => UNDERFLOW | PRECISION,
            (_, true) => OVERFLOW | PRECISION,
            _ if r.inexact => PRECISION,
            _ => 0,
        };
        self.raise(flags);
        self.set_c1(r.up);
        r.bits
    }

    /// Writes a result into ST(i), unless an unmasked exception was found before; whether it was written.
    pub fn deliver(&mut self, i: usize, computed: Computed) -> bool {
        if !self.goes_on(computed.before) {
            return false;
        }
        let bits = self.rounded(computed.number);
        self.set(i, bits);
        true
    }

    /// Pushes a result, unless an invalid operation was found before and is not masked. An unmasked denormal operand
    /// does not keep processors from loading it, whatever vol. 1, 8.5.2 says about TOP.
    pub fn deliver_push(&mut self, computed: Computed) {
        if self.st(7).is_some() {
            if self.stack_fault(true) {
                self.push(Format::Extended.indefinite());
            }
        } else if self.goes_on(computed.before) || computed.before & INVALID == 0 {
            let bits = self.rounded(computed.number);
            self.push(bits);
        }
    }

    /// The memory operand's bytes as a number.
    pub fn memory_bits(&self) -> u128 {
        let bytes = place::read(self.case, self.insn, 0);
        let len = self.insn.memory_size().size().min(16);
        bytes[..len].iter().rev().fold(0, |acc, b| acc << 8 | u128::from(*b))
    }
    /// The memory operand as a number; integers are exact.
    pub fn memory_value(&self) -> Value {
        let bits = self.memory_bits();
        let integer = |value: i64| {
            let real = real::integer(value.into());
            let bits = Target::Extended.round(real, Round::TowardZero).bits;
            Value::new(Format::Extended, bits)
        };
        match self.insn.memory_size() {
            MemorySize::Float32 => Value::new(Format::Single, bits),
            MemorySize::Float64 => Value::new(Format::Double, bits),
            MemorySize::Int16 => integer((bits as i16).into()),
            MemorySize::Int32 => integer((bits as i32).into()),
            MemorySize::Int64 => integer(bits as i64),
            _ => Value::new(Format::Extended, bits),
        }
    }
    /// Writes the memory operand.
    pub fn store(&mut self, bits: u128) {
        let len = self.insn.memory_size().size().min(16);
        if let Some(at) = place::memory(self.case, self.insn) {
            self.outcome.window[at..at + len].copy_from_slice(&bits.to_le_bytes()[..len]);
        }
    }
}

/// Stack index of operand `i`, if it is a register.
pub fn index(insn: &Instruction, i: u32) -> Option<usize> {
    (insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_st())
        .then(|| insn.op_register(i) as usize - Register::ST0 as usize)
}

/// Whether the model knows the instruction.
pub fn knows(insn: &Instruction) -> bool {
    x87_compute::knows(insn) || x87_compare::knows(insn) || x87_store::knows(insn)
}

/// What `insn` makes of `case`.
pub fn expected(case: &Case, insn: &Instruction) -> Option<Expected> {
    let mut unit = Unit::new(case, insn);
    if is_pending(&case.registers) {
        unit.outcome.raised.vector = EXCEPTION;
        return Some(Expected::one(unit.outcome));
    }
    let ran = x87_compute::run(&mut unit)
        .or_else(|| x87_compare::run(&mut unit))
        .or_else(|| x87_store::run(&mut unit));
    ran?;
    unit.outcome.registers.rip += insn.len() as u64;
    let choices = std::mem::take(&mut unit.choices);
    let (open_status, open_flags) = (unit.open_status, unit.open_flags);
    Some(Expected { choices, open_status, open_flags, ..Expected::one(unit.finish()) })
}
