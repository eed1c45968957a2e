//! What a vector instruction does with a case: which lanes it computes, which exceptions it raises, what it writes.

use crate::check::Expected;
use crate::lane::{self, BEFORE, Binary, Control, Fused, Lane};
use crate::value::{Format, Value};
use crate::{conversion, place};
use differential::state::{Case, Outcome, Raised};
use iced_x86::{EncodingKind, Instruction, Mnemonic as M, OpKind};

/// #XM.
const SIMD_EXCEPTION: u64 = 19;

/// An exception is raised: nothing more is done.
#[derive(Clone, Copy, Debug)]
pub struct Raise;

/// 32 bytes of a register or of memory.
pub type Bytes = [u8; 32];

/// Lane `i` of `v`, in lanes of `bytes`.
pub fn lane_of(v: &Bytes, i: usize, bytes: usize) -> u64 {
    v[i * bytes..(i + 1) * bytes].iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b))
}

/// Sets lane `i` of `v`.
pub fn set_lane(v: &mut Bytes, i: usize, bytes: usize, value: u64) {
    v[i * bytes..(i + 1) * bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
}

/// A vector instruction on its way.
pub struct Machine<'a> {
    pub case: &'a Case,
    pub insn: &'a Instruction,
    pub outcome: Outcome,
    /// VEX encoding: what is not written becomes zero.
    pub vex: bool,
    /// Bytes of the widest operand, 16 or 32.
    pub width: usize,
    /// NaNs of which a lane of the result may be each, and the lane's bytes.
    nans: (usize, Vec<u64>),
    /// Bits of MXCSR on which processors and the manual differ.
    pub open_mxcsr: u32,
}

impl<'a> Machine<'a> {
    fn new(case: &'a Case, insn: &'a Instruction) -> Self {
        let wide = (0..insn.op_count()).any(|i| match insn.op_kind(i) {
            OpKind::Register => insn.op_register(i).is_ymm(),
            OpKind::Memory => insn.memory_size().size() == 32,
            _ => false,
        });
        let mut outcome =
            Outcome { registers: case.registers, window: case.window, raised: Raised::default() };
        outcome.raised.vector = Raised::NONE;
        let vex = insn.encoding() == EncodingKind::VEX;
        Self {
            case,
            insn,
            outcome,
            vex,
            width: if wide { 32 } else { 16 },
            nans: (8, Vec::new()),
            open_mxcsr: 0,
        }
    }

    pub fn control(&self) -> Control {
        Control(self.case.registers.mxcsr())
    }

    /// Operand `i` as it was before.
    pub fn operand(&self, i: u32) -> Bytes {
        place::read(self.case, self.insn, i)
    }

    /// The first source and the second one: with two operands the first source is the destination.
    pub fn sources(&self) -> (Bytes, Bytes) {
        let immediate = (0..self.insn.op_count()).any(|i| self.insn.op_kind(i) == OpKind::Immediate8);
        let last = self.insn.op_count() - 1 - u32::from(immediate);
        (self.operand(last - 1), self.operand(last))
    }

    /// Records exceptions; fails if an unmasked one is among them. One found before the computation keeps those
    /// found after it from being recorded (vol. 1, 11.5.3).
    pub fn settle(&mut self, flags: u32) -> Result<(), Raise> {
        let mxcsr = self.outcome.registers.mxcsr();
        let unmasked = flags & !(mxcsr >> 7);
        let recorded = if unmasked & BEFORE != 0 { flags & BEFORE } else { flags };
        self.outcome.registers.set_mxcsr(mxcsr | recorded);
        if unmasked != 0 { Err(Raise) } else { Ok(()) }
    }

    /// Writes `low` into the destination's first bytes; the rest of 16 bytes comes from `rest`.
    pub fn write(&mut self, low: &[u8], rest: &Bytes) {
        let mut value = self.operand(0);
        value[..16].copy_from_slice(&rest[..16]);
        value[..low.len()].copy_from_slice(low);
        if self.vex {
            value[low.len().max(16)..].fill(0);
        }
        place::write_vector(&mut self.outcome.registers, self.insn, value);
    }

    /// Computes lanes `0..count` with `f`, settles, and returns the results.
    pub fn lanes(&mut self, count: usize, bytes: usize, f: impl Fn(usize) -> Lane) -> Result<Bytes, Raise> {
        let (mut out, mut flags) = ([0; 32], 0);
        for i in 0..count {
            let lane = f(i);
            set_lane(&mut out, i, bytes, lane.bits);
            flags |= lane.flags;
        }
        self.settle(flags)?;
        Ok(out)
    }
}

/// An arithmetic operation by the mnemonic's stem.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Binary(Binary),
    Sqrt,
    Extreme(bool),
    Compare,
    Round,
    /// ADDSUB.
    Alternate,
    /// HADD, HSUB.
    Horizontal(Binary),
    Dot,
    /// The operands' order as digits; the signs of even and odd lanes.
    Fused([u32; 3], [Fused; 2]),
}

/// Splits a mnemonic: the operation, the lanes' format, and whether there is one lane only.
fn split(mnemonic: M) -> Option<(Op, Format, bool)> {
    let name = format!("{mnemonic:?}").to_lowercase();
    let (stem, suffix) = name.split_at_checked(name.len().checked_sub(2)?)?;
    let (format, scalar) = match suffix {
        "ps" => (Format::Single, false),
        "pd" => (Format::Double, false),
        "ss" => (Format::Single, true),
        "sd" => (Format::Double, true),
        _ => return None,
    };
    let stem = stem.strip_prefix('v').unwrap_or(stem);
    let op = match stem {
        "add" => Op::Binary(Binary::Add),
        "sub" => Op::Binary(Binary::Sub),
        "mul" => Op::Binary(Binary::Mul),
        "div" => Op::Binary(Binary::Div),
        "sqrt" => Op::Sqrt,
        "min" => Op::Extreme(false),
        "max" => Op::Extreme(true),
        "cmp" => Op::Compare,
        "round" => Op::Round,
        "addsub" => Op::Alternate,
        "hadd" => Op::Horizontal(Binary::Add),
        "hsub" => Op::Horizontal(Binary::Sub),
        "dp" => Op::Dot,
        _ => fused(stem)?,
    };
    Some((op, format, scalar))
}

/// FMADD132 and its kin.
fn fused(stem: &str) -> Option<Op> {
    let (kind, order) = stem.split_at_checked(stem.len().checked_sub(3)?)?;
    let order = match order {
        "132" => [0, 2, 1],
        "213" => [1, 0, 2],
        "231" => [1, 2, 0],
        _ => return None,
    };
    let signs = |negate, subtract| Fused { negate, subtract };
    let lanes = match kind {
        "fmadd" => [signs(false, false); 2],
        "fmsub" => [signs(false, true); 2],
        "fnmadd" => [signs(true, false); 2],
        "fnmsub" => [signs(true, true); 2],
        "fmaddsub" => [signs(false, true), signs(false, false)],
        "fmsubadd" => [signs(false, false), signs(false, true)],
        _ => return None,
    };
    Some(Op::Fused(order, lanes))
}

/// Whether the model knows the instruction.
pub fn knows(mnemonic: M) -> bool {
    is_flag_comparison(mnemonic) || conversion::knows(mnemonic) || split(mnemonic).is_some()
}

fn is_flag_comparison(mnemonic: M) -> bool {
    matches!(
        mnemonic,
        M::Comiss | M::Comisd | M::Ucomiss | M::Ucomisd | M::Vcomiss | M::Vcomisd | M::Vucomiss | M::Vucomisd
    )
}

/// What `insn` makes of `case`.
pub fn expected(case: &Case, insn: &Instruction) -> Option<Expected> {
    let mut machine = Machine::new(case, insn);
    let done = if conversion::knows(insn.mnemonic()) {
        conversion::run(&mut machine)?
    } else if is_flag_comparison(insn.mnemonic()) {
        compare_flags(&mut machine)
    } else {
        let (op, format, scalar) = split(insn.mnemonic())?;
        arithmetic(&mut machine, op, format, scalar)
    };
    match done {
        Ok(()) => machine.outcome.registers.rip += insn.len() as u64,
        Err(Raise) if machine.outcome.raised.vector == Raised::NONE => {
            machine.outcome.raised.vector = SIMD_EXCEPTION;
        }
        Err(Raise) => {}
    }
    let (nans, open_mxcsr) = (machine.nans, machine.open_mxcsr);
    Some(Expected { nans, open_mxcsr, ..Expected::one(machine.outcome) })
}

fn arithmetic(m: &mut Machine<'_>, op: Op, format: Format, scalar: bool) -> Result<(), Raise> {
    let bytes = format.bytes();
    let count = if scalar { 1 } else { m.width / bytes };
    let (first, second) = m.sources();
    let (a, b) = (|i| lane_of(&first, i, bytes), |i| lane_of(&second, i, bytes));
    let control = m.control();
    let imm = m.insn.immediate8();
    // The legacy encoding has eight predicates.
    let predicate = imm & if m.vex { 31 } else { 7 };
    if op == Op::Dot {
        return dot(m, format, &first, &second);
    }
    let sources = [m.operand(0), m.operand(1), m.operand(2.min(m.insn.op_count() - 1))];
    let out = m.lanes(count, bytes, |i| match op {
        Op::Binary(op) => lane::binary(op, format, a(i), b(i), control),
        Op::Sqrt => lane::sqrt(format, b(i), control),
        Op::Extreme(maximum) => lane::extreme(maximum, format, a(i), b(i), control),
        Op::Compare => lane::predicate(predicate, format, a(i), b(i), control),
        Op::Round => lane::round(imm, format, b(i), control),
        Op::Alternate => {
            lane::binary(if i % 2 == 0 { Binary::Sub } else { Binary::Add }, format, a(i), b(i), control)
        }
        Op::Horizontal(op) => {
            // Within 128 bits: pairs of the first source, then of the second.
            let half = 16 / bytes;
            let (block, at) = (i / half * half, i % half);
            let (v, pair) = if at < half / 2 { (&first, 2 * at) } else { (&second, 2 * at - half) };
            let at = block + pair;
            lane::binary(op, format, lane_of(v, at, bytes), lane_of(v, at + 1, bytes), control)
        }
        Op::Fused(order, signs) => {
            let operands = order.map(|n| lane_of(&sources[n as usize], i, bytes));
            lane::fused(signs[i % 2], format, operands, control)
        }
        Op::Dot => Lane::new(0, 0),
    })?;
    let is_fused = matches!(op, Op::Fused(..));
    let rest = m.operand(u32::from(scalar && m.vex && !is_fused));
    m.write(&out[..count * bytes], &rest);
    Ok(())
}

/// DPPS and DPPD: products, which raise their exceptions first, then sums in pairs (vol. 2, DPPS).
fn dot(m: &mut Machine<'_>, format: Format, first: &Bytes, second: &Bytes) -> Result<(), Raise> {
    let (bytes, control, imm) = (format.bytes(), m.control(), m.insn.immediate8());
    let (count, half) = (m.width / bytes, 16 / bytes);
    let sum = |a: u64, b: u64| lane::binary(Binary::Add, format, a, b, control);
    let mut value = m.lanes(count, bytes, |i| {
        let chosen = imm >> (4 + i % half) & 1 != 0;
        let (a, b) = (lane_of(first, i, bytes), lane_of(second, i, bytes));
        if chosen { lane::binary(Binary::Mul, format, a, b, control) } else { Lane::new(0, 0) }
    })?;
    // Which of two NaNs a sum is depends on the order of its operands, which the manual does not give.
    m.nans = (bytes, (0..count).map(|i| lane_of(&value, i, bytes)).collect());
    m.nans.1.retain(|bits| Value::new(format, (*bits).into()).is_nan());
    m.nans.1.push(format.indefinite() as u64);
    let mut width = half;
    while width > 1 {
        // Neighbours: 0 + 1 and 2 + 3, then these two.
        let blocks = count / half;
        let sums = m.lanes(blocks * width / 2, bytes, |i| {
            let at = i / (width / 2) * half + i % (width / 2) * 2;
            sum(lane_of(&value, at, bytes), lane_of(&value, at + 1, bytes))
        })?;
        let mut next = [0; 32];
        for i in 0..blocks * width / 2 {
            let at = i / (width / 2) * half + i % (width / 2);
            set_lane(&mut next, at, bytes, lane_of(&sums, i, bytes));
        }
        value = next;
        width /= 2;
    }
    let mut out = [0; 32];
    for i in 0..count {
        let total = lane_of(&value, i / half * half, bytes);
        set_lane(&mut out, i, bytes, if imm >> (i % half) & 1 != 0 { total } else { 0 });
    }
    m.write(&out[..count * bytes], &[0; 32]);
    Ok(())
}

/// COMISS and its kin set ZF, PF and CF, and clear OF, SF and AF.
fn compare_flags(m: &mut Machine<'_>) -> Result<(), Raise> {
    let name = format!("{:?}", m.insn.mnemonic());
    let format = if name.ends_with("ss") { Format::Single } else { Format::Double };
    let signals = !name.to_lowercase().contains("ucom");
    let (a, b) = (m.operand(0), m.operand(1));
    let lane = |v: &Bytes| lane_of(v, 0, format.bytes());
    let (relation, flags) = lane::compare(signals, format, lane(&a), lane(&b), m.control());
    m.settle(flags)?;
    m.outcome.registers.flags = m.outcome.registers.flags & !0x8D5 | place::comparison_flags(relation);
    Ok(())
}
