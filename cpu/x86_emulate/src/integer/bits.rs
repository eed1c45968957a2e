//! Bits: BT, BTS, BTR, BTC, BSF, BSR, TZCNT, LZCNT, POPCNT, ANDN, BEXTR, BLSI, BLSMSK, BLSR, BZHI, PDEP, PEXT, CRC32,
//! ADCX, ADOX.

use super::operand::{attempt, by_width, operand_bytes, read_reg, read_source, write_reg};
use crate::core::{Core, Fault, Word};
use crate::lower::{LowerContext, gpr};
use crate::op::{Handler, Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};

const BT: u8 = 0;
const BTS: u8 = 1;
const BTR: u8 = 2;
const BTC: u8 = 3;

#[inline(always)]
fn changed<const KIND: u8>(v: u64, bit: u32) -> u64 {
    match KIND {
        BTS => v | 1 << bit,
        BTR => v & !(1 << bit),
        BTC => v ^ 1 << bit,
        _ => v,
    }
}

fn bt_reg<C: Core, W: Word, const KIND: u8, const IMM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let index = if IMM { op.imm } else { read_reg::<W, C>(c, op.src).zext() };
    let bit = index as u32 & (W::BITS - 1);
    let v = read_reg::<W, C>(c, op.dst).zext();
    c.cpu_mut().flags.set_cf(v >> bit & 1 != 0);
    if KIND != BT {
        write_reg(c, op.dst, W::from_u64(changed::<KIND>(v, bit)));
    }
    Step::Next
}

/// A register's bit index reaches beyond the operand; an immediate one does not.
fn bt_place<C: Core, W: Word, const IMM: bool>(
    c: &mut C,
    op: &Op<C>,
    write: bool,
) -> Result<(u64, u32), Fault> {
    let index = if IMM { op.imm & u64::from(W::BITS - 1) } else { read_reg::<W, C>(c, op.src).sext() };
    let words = (index as i64 >> W::BITS.trailing_zeros()) as u64;
    let ea = op.effective_plus(c, words.wrapping_mul(u64::from(W::BYTES)));
    let at = op.linear_at(c, ea, u64::from(W::BYTES), write)?;
    Ok((at, index as u32 & (W::BITS - 1)))
}
fn bt_mem<C: Core, W: Word, const KIND: u8, const IMM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let (at, bit) = attempt!(bt_place::<C, W, IMM>(c, op, KIND != BT));
    let old = if KIND == BT {
        attempt!(c.load::<W>(at))
    } else {
        attempt!(c.modify::<W>(at, |v| W::from_u64(changed::<KIND>(v.zext(), bit))))
    };
    c.cpu_mut().flags.set_cf(old.zext() >> bit & 1 != 0);
    Step::Next
}
fn bt_locked<C: Core, W: Word, const KIND: u8, const IMM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let (at, bit) = attempt!(bt_place::<C, W, IMM>(c, op, true));
    let old = attempt!(c.modify_locked::<W>(at, |v| W::from_u64(changed::<KIND>(v.zext(), bit))));
    c.cpu_mut().flags.set_cf(old.zext() >> bit & 1 != 0);
    Step::Next
}
fn pick_bt<C: Core, const KIND: u8>(memory: bool, imm: bool, locked: bool, bytes: u32) -> Handler<C> {
    match (memory, imm, locked) {
        (_, true, true) => by_width!(bytes, bt_locked::<C; W, KIND, true>),
        (_, false, true) => by_width!(bytes, bt_locked::<C; W, KIND, false>),
        (true, true, _) => by_width!(bytes, bt_mem::<C; W, KIND, true>),
        (true, false, _) => by_width!(bytes, bt_mem::<C; W, KIND, false>),
        (false, true, _) => by_width!(bytes, bt_reg::<C; W, KIND, true>),
        (false, false, _) => by_width!(bytes, bt_reg::<C; W, KIND, false>),
    }
}

/// BT, BTS, BTR and BTC; LOCK forms when `locked`.
pub(super) fn lower_bt<C: Core>(insn: &Instruction, ctx: &LowerContext, locked: bool) -> Option<Op<C>> {
    let pick = match insn.mnemonic() {
        Mnemonic::Bt => pick_bt::<C, BT>,
        Mnemonic::Bts => pick_bt::<C, BTS>,
        Mnemonic::Btr => pick_bt::<C, BTR>,
        Mnemonic::Btc => pick_bt::<C, BTC>,
        _ => return None,
    };
    let mut op = ctx.op(insn, unused);
    let memory = insn.op0_kind() == OpKind::Memory;
    if !memory {
        op.dst = gpr(insn.op0_register());
    }
    let imm = insn.op1_kind() != OpKind::Register;
    if !imm {
        op.src = gpr(insn.op1_register());
    }
    op.run = pick(memory, imm, locked, operand_bytes(insn, 0));
    Some(op)
}

/// BSF and BSR: a zero source leaves the destination alone and sets ZF.
fn bit_scan<C: Core, W: Word, const MEM: bool, const REVERSE: bool>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let f = &mut c.cpu_mut().flags;
    if v == 0 {
        f.set_result_cf_of(0, false, false);
        return Step::Next;
    }
    let r = u64::from(if REVERSE { 63 - v.leading_zeros() } else { v.trailing_zeros() });
    // Only ZF is defined; this result has ZF clear whatever the index is.
    f.set_result_cf_of(v, false, false);
    write_reg(c, op.dst, W::from_u64(r));
    Step::Next
}
/// TZCNT (0), LZCNT (1), POPCNT (2).
fn count<C: Core, W: Word, const MEM: bool, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let r = match KIND {
        0 => v.trailing_zeros().min(W::BITS),
        1 => v.leading_zeros() - (64 - W::BITS),
        _ => v.count_ones(),
    };
    let f = &mut c.cpu_mut().flags;
    if KIND == 2 {
        // ZF says that the source is zero; all others are clear.
        f.replace(x86_defs::flags::STATUS, if v == 0 { x86_defs::flags::ZF } else { 0 });
    } else {
        f.set_result_cf_of(u64::from(r), v == 0, false);
    }
    write_reg(c, op.dst, W::from_u64(u64::from(r)));
    Step::Next
}

/// ANDN: `aux` is the inverted first source.
fn andn<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let r = W::from_u64(!read_reg::<W, C>(c, op.aux).zext() & b);
    c.cpu_mut().flags.set_logic(r.sext());
    write_reg(c, op.dst, r);
    Step::Next
}
/// BEXTR (0) and BZHI (1): control in `aux`.
fn extract<C: Core, W: Word, const MEM: bool, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let control = read_reg::<W, C>(c, op.aux).zext();
    let low_bits = |v: u64, n: u32| if n >= 64 { v } else { v & ((1 << n) - 1) };
    let index = control as u32 & 0xFF;
    let (r, cf) = if KIND == 0 {
        let shifted = if index >= W::BITS { 0 } else { v >> index };
        (low_bits(shifted, control as u32 >> 8 & 0xFF), false)
    } else {
        (low_bits(v, index), index >= W::BITS)
    };
    let r = W::from_u64(r);
    c.cpu_mut().flags.set_result_cf_of(r.sext(), cf, false);
    write_reg(c, op.dst, r);
    Step::Next
}
/// BLSI (0), BLSMSK (1), BLSR (2).
fn lowest<C: Core, W: Word, const MEM: bool, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let (r, cf) = match KIND {
        0 => (v & v.wrapping_neg(), v != 0),
        1 => (v ^ v.wrapping_sub(1), v == 0),
        _ => (v & v.wrapping_sub(1), v == 0),
    };
    let r = W::from_u64(r);
    c.cpu_mut().flags.set_result_cf_of(r.sext(), cf, false);
    write_reg(c, op.dst, r);
    Step::Next
}
/// PDEP (`DEPOSIT`) and PEXT: `aux` is the source, the last operand the mask.
fn parallel<C: Core, W: Word, const MEM: bool, const DEPOSIT: bool>(c: &mut C, op: &Op<C>) -> Step {
    let mut mask = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let source = read_reg::<W, C>(c, op.aux).zext();
    let (mut r, mut k) = (0u64, 0u32);
    while mask != 0 {
        let bit = mask.trailing_zeros();
        if DEPOSIT {
            r |= (source >> k & 1) << bit;
        } else {
            r |= (source >> bit & 1) << k;
        }
        k += 1;
        mask &= mask - 1;
    }
    write_reg(c, op.dst, W::from_u64(r));
    Step::Next
}
/// CRC32 with the Castagnoli polynomial, bits reflected.
fn crc32<C: Core, W: Word, const MEM: bool>(c: &mut C, op: &Op<C>) -> Step {
    let v = attempt!(read_source::<C, W, MEM>(c, op)).zext();
    let mut crc = u64::from(read_reg::<u32, C>(c, op.dst)) ^ v;
    for _ in 0..W::BITS {
        crc = crc >> 1 ^ if crc & 1 != 0 { 0x82F6_3B78 } else { 0 };
    }
    // Shorter operands leave the upper bits of the sum to be moved down, which the shifts did.
    write_reg(c, op.dst, crc as u32);
    Step::Next
}
/// ADCX (`CARRY`) and ADOX.
fn add_one_flag<C: Core, W: Word, const MEM: bool, const CARRY: bool>(c: &mut C, op: &Op<C>) -> Step {
    let b = attempt!(read_source::<C, W, MEM>(c, op));
    let f = c.cpu().flags;
    let carry_in = if CARRY { f.cf() } else { f.of() };
    let sum = u128::from(read_reg::<W, C>(c, op.dst).zext()) + u128::from(b.zext()) + u128::from(carry_in);
    let out = sum >> W::BITS & 1 != 0;
    let (cf, of) = if CARRY { (out, f.of()) } else { (f.cf(), out) };
    c.cpu_mut().flags.set_cf_of(cf, of);
    write_reg(c, op.dst, W::from_u64(sum as u64));
    Step::Next
}

fn unused<C: Core>(_: &mut C, _: &Op<C>) -> Step {
    Step::Next
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    if let Some(op) = lower_bt(insn, ctx, false) {
        return Some(op);
    }
    // Which operand may be memory, and where the other source is.
    let (source, other) = match insn.mnemonic() {
        M::Bsf | M::Bsr | M::Tzcnt | M::Lzcnt | M::Popcnt | M::Blsi | M::Blsmsk | M::Blsr => (1, None),
        M::Crc32 | M::Adcx | M::Adox => (1, None),
        M::Andn | M::Pdep | M::Pext => (2, Some(1)),
        M::Bextr | M::Bzhi => (1, Some(2)),
        _ => return None,
    };
    let mut op = ctx.op(insn, unused);
    op.dst = gpr(insn.op0_register());
    let memory = insn.op_kind(source) == OpKind::Memory;
    if !memory {
        op.src = gpr(insn.op_register(source));
    }
    if let Some(other) = other {
        op.aux = gpr(insn.op_register(other));
    }
    let w = operand_bytes(insn, source);
    macro_rules! pick {
        ($f:ident $(, $k:tt)*) => {
            if memory { by_width!(w, $f::<C; W, true $(, $k)*>) } else { by_width!(w, $f::<C; W, false $(, $k)*>) }
        };
    }
    op.run = match insn.mnemonic() {
        M::Bsf => pick!(bit_scan, false),
        M::Bsr => pick!(bit_scan, true),
        M::Tzcnt => pick!(count, 0),
        M::Lzcnt => pick!(count, 1),
        M::Popcnt => pick!(count, 2),
        M::Andn => pick!(andn),
        M::Bextr => pick!(extract, 0),
        M::Bzhi => pick!(extract, 1),
        M::Blsi => pick!(lowest, 0),
        M::Blsmsk => pick!(lowest, 1),
        M::Blsr => pick!(lowest, 2),
        M::Pdep => pick!(parallel, true),
        M::Pext => pick!(parallel, false),
        M::Crc32 => pick!(crc32),
        M::Adcx => pick!(add_one_flag, true),
        _ => pick!(add_one_flag, false),
    };
    Some(op)
}
