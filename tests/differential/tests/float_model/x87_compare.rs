//! FCOM, FUCOM, FTST, FCOMI and FXAM.

use crate::lane::{INVALID, denormal_flag};
use crate::place;
use crate::value::{Class, Format, Value};
use crate::x87::{C0, C1, C2, C3, Unit, index};
use iced_x86::{Instruction, Mnemonic as M, OpKind};

/// How a comparison treats quiet NaNs, what it writes, how often it pops.
fn comparison(mnemonic: M) -> Option<(bool, bool, u32)> {
    Some(match mnemonic {
        M::Fcom | M::Ficom | M::Ftst => (true, false, 0),
        M::Fcomp | M::Ficomp => (true, false, 1),
        M::Fcompp => (true, false, 2),
        M::Fucom => (false, false, 0),
        M::Fucomp => (false, false, 1),
        M::Fucompp => (false, false, 2),
        M::Fcomi => (true, true, 0),
        M::Fcomip => (true, true, 1),
        M::Fucomi => (false, true, 0),
        M::Fucomip => (false, true, 1),
        _ => return None,
    })
}

/// Whether this module knows the instruction.
pub fn knows(insn: &Instruction) -> bool {
    insn.mnemonic() == M::Fxam || comparison(insn.mnemonic()).is_some()
}

/// Runs it, if it is one of these.
pub fn run(u: &mut Unit<'_>) -> Option<()> {
    if u.insn.mnemonic() == M::Fxam {
        examine(u);
        return Some(());
    }
    let (signals, flags, pops) = comparison(u.insn.mnemonic())?;
    compare(u, signals, flags, pops);
    Some(())
}

fn compare(u: &mut Unit<'_>, signals: bool, flags: bool, pops: u32) {
    let register = |i: usize| u.st(i).map(|bits| Value::new(Format::Extended, bits));
    let other = match u.insn.mnemonic() {
        M::Ftst => Some(Value::new(Format::Extended, 0)),
        M::Fcompp | M::Fucompp => register(1),
        _ if u.insn.op0_kind() == OpKind::Memory => Some(u.memory_value()),
        _ => register(index(u.insn, u.insn.op_count() - 1).unwrap_or(0)),
    };
    let (relation, goes_on) = match (register(0), other) {
        (Some(a), Some(b)) => {
            let is = |class| a.is(class) || b.is(class);
            let unordered = a.is_nan() || b.is_nan() || is(Class::Unsupported);
            let invalid = unordered && (signals || is(Class::Signaling) || is(Class::Unsupported));
            let before = match (unordered, invalid) {
                (_, true) => INVALID,
                (true, _) => 0,
                _ => denormal_flag(&[a, b]),
            };
            let relation = if unordered { None } else { a.real.partial_cmp(&b.real) };
            (relation, u.goes_on(before))
        }
        _ => (None, u.stack_fault(false)),
    };
    if !goes_on {
        // The manual says that an unmasked invalid operation leaves them; processors set them.
        u.open_status = if flags { 0 } else { C0 | C2 | C3 };
        u.open_flags = if flags { 0x8D5 } else { 0 };
        return;
    }
    let result = place::comparison_flags(relation);
    if flags {
        let r = &mut u.outcome.registers;
        r.flags = r.flags & !0x8D5 | result;
    } else {
        let bit = |flag: u64, code: u16| if result & flag != 0 { code } else { 0 };
        u.status = u.status & !(C0 | C2 | C3) | bit(1, C0) | bit(4, C2) | bit(0x40, C3);
    }
    for _ in 0..pops {
        u.pop();
    }
}

/// FXAM: C3, C2, C0 are the class, C1 the sign, of an empty register too.
fn examine(u: &mut Unit<'_>) {
    let value = Value::new(Format::Extended, u.raw(0));
    let codes = match value.class {
        _ if u.st(0).is_none() => C3 | C0,
        Class::Unsupported => 0,
        Class::Quiet | Class::Signaling => C0,
        Class::Normal => C2,
        Class::Infinite => C2 | C0,
        Class::Zero => C3,
        Class::Denormal => C3 | C2,
    };
    u.status &= !(C0 | C1 | C2 | C3);
    u.status |= codes | if value.negative { C1 } else { 0 };
}
