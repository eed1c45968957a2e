//! The usual cases of x87 instructions: all exceptions masked, the registers that are read in use, the one
//! that is pushed to empty. Anything else goes to `compute`.
//!
//! Beside what `compute` keeps in `Op::imm`: bits 16–25 are the instruction that the host runs, 32–34 the
//! stack index of `a`, 36–37 how often it pops, 40 whether all condition codes are its own, 41 whether it sets
//! EFLAGS. `Op::dst` is the stack index of the result ([`NOWHERE`]: none), `Op::src` that of `b`.

use super::compute::{self, LOADS, NONE, SETS_FLAGS, STORES, load_operand, note_pointers, store_operand};
use super::encoding::Encoding;
use super::raise_pending;
use crate::core::{Core, Fault};
use crate::cpu::{F80, X87};
use crate::op::{Op, Step};
use x86_defs::flags::STATUS;
use x86_host_ops::{Extended, X87_MASKS, X87Instruction, x87_compute, x87_load, x87_store};

const NOWHERE: u8 = 0xFF;
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
const CODES: u16 = C0 | C1 | C2 | C3;
/// The exception flags of the status word, stack fault aside.
const FLAGS: u16 = 0x3F;

/// Compares ST(0) with ST(1): FCOM and FUCOM.
const FCOM: X87Instruction = X87Instruction::register(0, 0xD1);
const FUCOM: X87Instruction = X87Instruction::register(5, 0xE1);

/// What the usual case of an instruction is.
enum Plan {
    /// The host computes `dst` = `a` op `b` (or op memory).
    Compute { run: X87Instruction, dst: u8, a: u8, b: u8, pops: u8, all_codes: bool, flags: bool },
    /// The host makes a number of memory or out of nothing, which is pushed.
    Load,
    /// The host makes memory out of ST(0).
    Store { run: X87Instruction, pops: u8 },
    /// No computation.
    Move(Move),
}

#[derive(Clone, Copy, PartialEq)]
enum Move {
    Push,
    Exchange,
    StoreRegister { pops: u8 },
    ChangeSign,
    Absolute,
    LoadMemory,
    StoreMemory,
}

fn binary(run: X87Instruction, dst: u8, a: u8, b: u8, pops: u8) -> Option<Plan> {
    Some(Plan::Compute { run, dst, a, b, pops, all_codes: false, flags: false })
}
fn compare(run: X87Instruction, b: u8, pops: u8) -> Option<Plan> {
    Some(Plan::Compute { run, dst: NOWHERE, a: 0, b, pops, all_codes: true, flags: false })
}
fn compare_flags(run: X87Instruction, b: u8, pops: u8) -> Option<Plan> {
    Some(Plan::Compute { run, dst: NOWHERE, a: 0, b, pops, all_codes: false, flags: true })
}
fn move_(kind: Move) -> Option<Plan> {
    Some(Plan::Move(kind))
}

fn register_plan(opcode: u8, modrm: u8) -> Option<Plan> {
    let (reg, i) = (modrm >> 3 & 7, modrm & 7);
    // ST(1) as the second operand of D8.
    let with_st1 = |reg: u8| X87Instruction::register(0, 0xC1 | reg << 3);
    match (opcode, modrm) {
        (0, 0xD0..=0xDF) => compare(FCOM, i, reg - 2),
        (0, _) => binary(with_st1(reg), 0, 0, i, 0),
        (1, 0xC0..=0xC7) => move_(Move::Push),
        (1, 0xC8..=0xCF) => move_(Move::Exchange),
        (1, 0xE0) => move_(Move::ChangeSign),
        (1, 0xE1) => move_(Move::Absolute),
        (1, 0xE4 | 0xE5) => compare(X87Instruction::register(1, modrm), 0, 0),
        (1, 0xE8..=0xEE) => Some(Plan::Load),
        (1, 0xFA | 0xFC) => binary(X87Instruction::register(1, modrm), 0, 0, 0, 0),
        (1, 0xFD) => binary(X87Instruction::register(1, modrm), 0, 0, 1, 0),
        (2, 0xE9) => compare(FUCOM, 1, 2),
        (3, 0xE8..=0xEF) => compare_flags(FUCOM, i, 0),
        (3, 0xF0..=0xF7) => compare_flags(FCOM, i, 0),
        // The destination is ST(i), so `a` and `b` change places; subtraction and division are reversed.
        (4 | 6, 0xC0..=0xCF) => binary(with_st1(reg), i, i, 0, (opcode == 6).into()),
        (4 | 6, 0xE0..=0xFF) => binary(with_st1(reg ^ 1), i, i, 0, (opcode == 6).into()),
        (5, 0xD0..=0xDF) => move_(Move::StoreRegister { pops: reg - 2 }),
        (5, 0xE0..=0xEF) => compare(FUCOM, i, reg - 4),
        (6, 0xD9) => compare(FCOM, 1, 2),
        (7, 0xE8..=0xEF) => compare_flags(FUCOM, i, 1),
        (7, 0xF0..=0xF7) => compare_flags(FCOM, i, 1),
        _ => None,
    }
}

fn memory_plan(opcode: u8, reg: u8) -> Option<Plan> {
    let run = X87Instruction::memory(opcode, reg);
    let popping = |reg: u8| X87Instruction::memory(opcode, reg);
    match (opcode, reg) {
        (0 | 2 | 4 | 6, 2 | 3) => compare(X87Instruction::memory(opcode, 2), 0, reg - 2),
        (0 | 2 | 4 | 6, _) => binary(run, 0, 0, 0, 0),
        (1 | 3 | 5 | 7, 0) | (7, 4 | 5) => Some(Plan::Load),
        (1 | 3 | 5 | 7, 2) => Some(Plan::Store { run: popping(3), pops: 0 }),
        (1 | 3 | 5 | 7, 3) | (3 | 5 | 7, 1) | (7, 6 | 7) => Some(Plan::Store { run, pops: 1 }),
        (3, 5) => move_(Move::LoadMemory),
        (3, 7) => move_(Move::StoreMemory),
        _ => None,
    }
}

/// Gives `op` a handler for the usual case, if there is one.
pub fn choose<C: Core>(op: &mut Op<C>, encoding: Encoding) {
    let (plan, in_memory, index) = match encoding {
        Encoding::Register(opcode, modrm) => (register_plan(opcode, modrm), false, modrm & 7),
        Encoding::Memory(opcode, reg) => (memory_plan(opcode, reg), true, 0),
    };
    let set_instruction = |op: &mut Op<C>, run: X87Instruction| {
        op.imm = op.imm & !(0x3FF << 16) | u64::from(run.number()) << 16;
    };
    match plan {
        None => {}
        Some(Plan::Compute { run, dst, a, b, pops, all_codes, flags }) => {
            // The slow way runs the instruction itself: keep its number.
            op.imm |= op.imm >> 16 << 48;
            set_instruction(op, run);
            op.imm |= u64::from(a) << 32 | u64::from(pops) << 36;
            op.imm |= u64::from(all_codes) << 40 | u64::from(flags) << 41;
            (op.dst, op.src) = (dst, b);
            op.run = match (in_memory, flags) {
                (true, _) => compute_memory::<C>,
                (false, true) => compute_registers::<C, true>,
                (false, false) => compute_registers::<C, false>,
            };
        }
        Some(Plan::Load) => {
            op.imm |= op.imm >> 16 << 48;
            op.run = if in_memory { load::<C, true> } else { load::<C, false> };
        }
        Some(Plan::Store { run, pops }) => {
            op.imm |= op.imm >> 16 << 48;
            set_instruction(op, run);
            op.imm |= u64::from(pops) << 36;
            op.run = store::<C>;
        }
        Some(Plan::Move(kind)) => {
            op.imm |= op.imm >> 16 << 48;
            op.src = index;
            op.run = match kind {
                Move::Push => push_register::<C>,
                Move::Exchange => exchange::<C>,
                Move::StoreRegister { pops: 0 } => store_register::<C, false>,
                Move::StoreRegister { .. } => store_register::<C, true>,
                Move::ChangeSign => change_sign::<C, 0x8000>,
                Move::Absolute => change_sign::<C, 0>,
                Move::LoadMemory => load_memory::<C>,
                Move::StoreMemory => store_memory::<C>,
            };
        }
    }
}

/// Runs the instruction the slow way.
#[cold]
#[inline(never)]
fn slow<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    let plain = Op { imm: op.imm & 0xFFFF | op.imm >> 48 << 16, ..*op };
    compute::run::<C, KIND>(c, &plain)
}

impl X87 {
    #[inline(always)]
    fn physical(&self, i: u8) -> usize {
        self.top().wrapping_add(i.into()) & 7
    }
    #[inline(always)]
    fn uses(&self, i: u8) -> bool {
        self.in_use >> self.physical(i) & 1 != 0
    }
    #[inline(always)]
    fn masks_all(&self) -> bool {
        self.control & X87_MASKS == X87_MASKS
    }
    #[inline(always)]
    fn value(&self, i: u8) -> Extended {
        let r = &self.regs[self.physical(i)];
        Extended { mantissa: r.mantissa, sign_exponent: r.sign_exponent }
    }
    #[inline(always)]
    fn set(&mut self, i: u8, value: Extended) {
        let at = self.physical(i);
        self.regs[at] = F80 { mantissa: value.mantissa, sign_exponent: value.sign_exponent };
        self.in_use |= 1 << at;
    }
    #[inline(always)]
    fn pop(&mut self) {
        let top = self.top();
        self.in_use &= !(1 << top);
        self.status = self.status & !(7 << 11) | (((top + 1) & 7) as u16) << 11;
    }
    #[inline(always)]
    fn push(&mut self, value: Extended) {
        let top = (self.top() + 7) & 7;
        self.status = self.status & !(7 << 11) | (top as u16) << 11;
        self.set(0, value);
    }
    /// Takes flags, and the condition codes in `codes`, from `status`.
    #[inline(always)]
    fn take_status(&mut self, status: u16, codes: u16) {
        self.status = self.status & !codes | status & (codes | FLAGS);
    }
}

#[inline(always)]
fn instruction<C>(op: &Op<C>) -> X87Instruction {
    X87Instruction::from_number((op.imm >> 16) as u16 & 0x3FF)
}

/// Computes and commits.
#[inline(always)]
fn apply<C: Core>(c: &mut C, op: &Op<C>, operand: &[u8; 16], in_memory: bool) {
    let cpu = c.cpu_mut();
    let x87 = &mut cpu.x.x87;
    let a = (op.imm >> 32) as u8 & 7;
    let result = x87_compute(instruction(op), operand, x87.value(a), x87.value(op.src & 7), x87.control);
    x87.take_status(result.status, if op.imm >> 40 & 1 != 0 { CODES } else { C1 });
    if op.dst != NOWHERE {
        x87.set(op.dst, result.value);
    }
    for _ in 0..op.imm >> 36 & 3 {
        x87.pop();
    }
    if op.imm >> 41 & 1 != 0 {
        let bit = |code: u16, flag: u64| if result.status & code != 0 { flag } else { 0 };
        cpu.flags.replace(STATUS, bit(C0, 1) | bit(C2, 4) | bit(C3, 0x40));
    }
    note_pointers(c, op, in_memory);
}

fn compute_registers<C: Core, const SETS: bool>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    let x87 = &c.cpu().x.x87;
    if !(x87.masks_all() && x87.uses((op.imm >> 32) as u8 & 7) && x87.uses(op.src & 7)) {
        return if SETS { slow::<C, SETS_FLAGS>(c, op) } else { slow::<C, NONE>(c, op) };
    }
    apply(c, op, &[0; 16], false);
    Step::Next
}

fn compute_memory<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    let x87 = &c.cpu().x.x87;
    if !(x87.masks_all() && x87.uses(0)) {
        return slow::<C, LOADS>(c, op);
    }
    let done = load_operand(c, op).map(|operand| apply(c, op, &operand, true));
    super::step(done)
}

fn load<C: Core, const MEMORY: bool>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    let x87 = &c.cpu().x.x87;
    if !x87.masks_all() || x87.uses(7) {
        return if MEMORY { slow::<C, LOADS>(c, op) } else { slow::<C, NONE>(c, op) };
    }
    let operand = if MEMORY {
        match load_operand(c, op) {
            Ok(operand) => operand,
            Err(Fault) => return Step::Fault,
        }
    } else {
        [0; 16]
    };
    let x87 = &mut c.cpu_mut().x.x87;
    let result = x87_load(instruction(op), &operand, x87.control);
    x87.take_status(result.status, C1);
    x87.push(result.value);
    note_pointers(c, op, MEMORY);
    Step::Next
}

fn store<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    let x87 = &c.cpu().x.x87;
    if !(x87.masks_all() && x87.uses(0)) {
        return slow::<C, STORES>(c, op);
    }
    let (bytes, status) = x87_store(instruction(op), x87.value(0), x87.control);
    let stored =
        op.linear_write(c, u64::from(op.width)).and_then(|linear| store_operand(c, op, linear, &bytes));
    if stored.is_err() {
        return Step::Fault;
    }
    let x87 = &mut c.cpu_mut().x.x87;
    x87.take_status(status, C1);
    if op.imm >> 36 & 3 != 0 {
        x87.pop();
    }
    note_pointers(c, op, true);
    Step::Next
}

/// A move among registers: `f` gets the stack index and says whether it is the usual case.
#[inline(always)]
fn among_registers<C: Core>(c: &mut C, op: &Op<C>, f: impl FnOnce(&mut X87, u8) -> bool) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    if !f(&mut c.cpu_mut().x.x87, op.src & 7) {
        return slow::<C, NONE>(c, op);
    }
    c.cpu_mut().x.x87.status &= !C1;
    note_pointers(c, op, false);
    Step::Next
}

fn push_register<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    among_registers(c, op, |x87, i| {
        let usual = x87.uses(i) && !x87.uses(7);
        if usual {
            x87.push(x87.value(i));
        }
        usual
    })
}

fn exchange<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    among_registers(c, op, |x87, i| {
        let usual = x87.uses(i) && x87.uses(0);
        if usual {
            let (a, b) = (x87.value(0), x87.value(i));
            x87.set(0, b);
            x87.set(i, a);
        }
        usual
    })
}

fn store_register<C: Core, const POP: bool>(c: &mut C, op: &Op<C>) -> Step {
    among_registers(c, op, |x87, i| {
        let usual = x87.uses(0);
        if usual {
            x87.set(i, x87.value(0));
            if POP {
                x87.pop();
            }
        }
        usual
    })
}

/// FCHS (`FLIP` is the sign) and FABS (0).
fn change_sign<C: Core, const FLIP: u16>(c: &mut C, op: &Op<C>) -> Step {
    among_registers(c, op, |x87, _| {
        let usual = x87.uses(0);
        if usual {
            let mut value = x87.value(0);
            value.sign_exponent =
                if FLIP == 0 { value.sign_exponent & 0x7FFF } else { value.sign_exponent ^ FLIP };
            x87.set(0, value);
        }
        usual
    })
}

fn load_memory<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    if c.cpu().x.x87.uses(7) {
        return slow::<C, LOADS>(c, op);
    }
    let done = load_operand(c, op).map(|bytes| {
        let value = u128::from_le_bytes(bytes);
        let x87 = &mut c.cpu_mut().x.x87;
        x87.push(Extended { mantissa: value as u64, sign_exponent: (value >> 64) as u16 });
        x87.status &= !C1;
        note_pointers(c, op, true);
    });
    super::step(done)
}

fn store_memory<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    if raise_pending(c).is_err() {
        return Step::Fault;
    }
    if !c.cpu().x.x87.uses(0) {
        return slow::<C, STORES>(c, op);
    }
    let value = c.cpu().x.x87.value(0);
    let bytes = (u128::from(value.mantissa) | u128::from(value.sign_exponent) << 64).to_le_bytes();
    let done = op.linear_write(c, 10).and_then(|linear| store_operand(c, op, linear, &bytes)).map(|()| {
        let x87 = &mut c.cpu_mut().x.x87;
        x87.pop();
        x87.status &= !C1;
        note_pointers(c, op, true);
    });
    super::step(done)
}
