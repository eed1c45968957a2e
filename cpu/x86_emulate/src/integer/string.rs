//! String instructions: MOVS, STOS, LODS, CMPS, SCAS with and without REP.
//!
//! A repeated one runs for a page or some hundred elements at most, then ends its block with RIP at itself, so
//! that interrupts are taken in between. Registers are current after each element: a fault in the middle
//! restarts where it stopped.

use super::operand::{attempt, by_width};
use super::{read_reg, write_reg};
use crate::core::{Core, Fault, Word};
use crate::cpu::RIP;
use crate::cpu::reg::{RAX, RCX, RDI, RSI};
use crate::lower::LowerContext;
use crate::mode::ModeKey;
use crate::op::{Handler, Op, SEG_CHECKED, Step, segment_linear};
use x86_decode::{Instruction, Mnemonic, Register};
use x86_defs::flags::DF;

const MOVS: u8 = 0;
const STOS: u8 = 1;
const LODS: u8 = 2;
const CMPS: u8 = 3;
const SCAS: u8 = 4;

/// Without a prefix, REP/REPE, REPNE.
const ONCE: u8 = 0;
const REPE: u8 = 1;
const REPNE: u8 = 2;

/// Runs within pages between two looks at interrupts.
const PAGES_AT_ONCE: u32 = 16;
/// Elements done one by one before interrupts are looked at.
const ELEMENTS_AT_ONCE: u32 = 256;

/// Index registers masked by the address size (`aux` holds its shift, as `addr_shift`).
#[inline(always)]
fn masked<C>(op: &Op<C>, value: u64) -> u64 {
    (value << (op.aux & 63)) >> (op.aux & 63)
}
fn set_masked<C: Core>(c: &mut C, op: &Op<C>, r: usize, value: u64) {
    match op.aux {
        48 => write_reg::<u16, C>(c, r as u8, value as u16),
        32 => write_reg::<u32, C>(c, r as u8, value as u32),
        _ => c.cpu_mut().gpr[r] = value,
    }
}
fn step_register<C: Core, W: Word>(c: &mut C, op: &Op<C>, r: usize) {
    let by = u64::from(W::BYTES);
    let v = c.cpu().gpr[r];
    let v = if c.cpu().rflags & DF != 0 { v.wrapping_sub(by) } else { v.wrapping_add(by) };
    set_masked(c, op, r, v);
}
fn source<C: Core, W: Word>(c: &mut C, op: &Op<C>) -> Result<W, Fault> {
    let at = masked(op, c.cpu().gpr[RSI]);
    let at = segment_linear(c, op.seg, at, u64::from(W::BYTES), false)?;
    c.load(at)
}
fn destination<C: Core, W: Word>(c: &mut C, op: &Op<C>, write: bool) -> Result<u64, Fault> {
    let at = masked(op, c.cpu().gpr[RDI]);
    segment_linear(c, op.dst, at, u64::from(W::BYTES), write)
}

/// One element.
#[inline(always)]
fn element<C: Core, W: Word, const KIND: u8>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    match KIND {
        MOVS => {
            let v = source::<C, W>(c, op)?;
            let at = destination::<C, W>(c, op, true)?;
            c.store(at, v)?;
        }
        STOS => {
            let at = destination::<C, W>(c, op, true)?;
            let v = read_reg::<W, C>(c, RAX as u8);
            c.store(at, v)?;
        }
        LODS => {
            let v = source::<C, W>(c, op)?;
            write_reg(c, RAX as u8, v);
        }
        CMPS => {
            let a = source::<C, W>(c, op)?;
            let at = destination::<C, W>(c, op, false)?;
            let b = c.load::<W>(at)?;
            super::alu::compute::<super::alu::Cmp, W, true>(&mut c.cpu_mut().flags, a, b);
        }
        _ => {
            let at = destination::<C, W>(c, op, false)?;
            let b = c.load::<W>(at)?;
            let a = read_reg::<W, C>(c, RAX as u8);
            super::alu::compute::<super::alu::Cmp, W, true>(&mut c.cpu_mut().flags, a, b);
        }
    }
    if matches!(KIND, MOVS | LODS | CMPS) {
        step_register::<C, W>(c, op, RSI);
    }
    if KIND != LODS {
        step_register::<C, W>(c, op, RDI);
    }
    Ok(())
}

/// MOVS and STOS upwards in flat segments, as much as lies in the pages at hand. 0: not possible now.
fn block<C: Core, W: Word, const KIND: u8>(c: &mut C, op: &Op<C>, count: u64) -> Result<u64, Fault> {
    let flat = op.dst & SEG_CHECKED == 0 && (KIND == STOS || op.seg & SEG_CHECKED == 0);
    if !flat || c.cpu().rflags & DF != 0 || op.aux == 48 {
        return Ok(0);
    }
    let size = u64::from(W::BYTES);
    let to = destination::<C, W>(c, op, true)?;
    let mut bytes = (4096 - (to & 0xFFF)).min(count.saturating_mul(size));
    let done = if KIND == MOVS {
        let from = masked(op, c.cpu().gpr[RSI]);
        let from = segment_linear(c, op.seg, from, size, false)?;
        bytes = bytes.min(4096 - (from & 0xFFF)) & !(size - 1);
        // Onto itself, closer than an element: not what a copy byte by byte does.
        if bytes == 0 || to.wrapping_sub(from) < size {
            return Ok(0);
        }
        c.copy(to, from, bytes)?
    } else {
        bytes &= !(size - 1);
        if bytes == 0 {
            return Ok(0);
        }
        let v = read_reg::<W, C>(c, RAX as u8);
        c.fill(to, v, bytes)?
    };
    if KIND == MOVS {
        let v = c.cpu().gpr[RSI].wrapping_add(done);
        set_masked(c, op, RSI, v);
    }
    let v = c.cpu().gpr[RDI].wrapping_add(done);
    set_masked(c, op, RDI, v);
    Ok(done / size)
}

fn string<C: Core, W: Word, const KIND: u8, const REP: u8>(c: &mut C, op: &Op<C>) -> Step {
    if REP == ONCE {
        attempt!(element::<C, W, KIND>(c, op));
        return Step::Next;
    }
    let mut left = masked(op, c.cpu().gpr[RCX]);
    if left == 0 {
        return Step::Next;
    }
    let stepping = c.cpu().mode.has(ModeKey::TRAP);
    if matches!(KIND, MOVS | STOS) && left > 1 && !stepping {
        let before = left;
        for _ in 0..PAGES_AT_ONCE {
            let done = attempt!(block::<C, W, KIND>(c, op, left));
            left -= done;
            set_masked(c, op, RCX, left);
            if done == 0 || left == 0 {
                break;
            }
        }
        if left < before {
            return if left == 0 { Step::Next } else { again(c, op) };
        }
    }
    for _ in 0..if stepping { 1 } else { ELEMENTS_AT_ONCE } {
        attempt!(element::<C, W, KIND>(c, op));
        left -= 1;
        set_masked(c, op, RCX, left);
        let compared = matches!(KIND, CMPS | SCAS);
        if left == 0 || (compared && c.cpu().flags.zf() != (REP == REPE)) {
            return Step::Next;
        }
        if c.cpu().pending_debug != 0 {
            break; // a data breakpoint traps between elements
        }
    }
    again(c, op)
}

/// Ends the block with RIP at this instruction: it goes on after a look at interrupts.
fn again<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    c.cpu_mut().gpr[RIP] = op.ip(c);
    Step::Branch
}

fn pick<C: Core, const KIND: u8>(bytes: u32, rep: u8) -> Handler<C> {
    match rep {
        ONCE => by_width!(bytes, string::<C; W, KIND, ONCE>),
        REPE => by_width!(bytes, string::<C; W, KIND, REPE>),
        _ => by_width!(bytes, string::<C; W, KIND, REPNE>),
    }
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    if !insn.is_string_instruction() {
        return None; // MOVSD and CMPSD are also vector instructions
    }
    let (kind, bytes) = match insn.mnemonic() {
        M::Movsb => (MOVS, 1),
        M::Movsw => (MOVS, 2),
        M::Movsd => (MOVS, 4),
        M::Movsq => (MOVS, 8),
        M::Stosb => (STOS, 1),
        M::Stosw => (STOS, 2),
        M::Stosd => (STOS, 4),
        M::Stosq => (STOS, 8),
        M::Lodsb => (LODS, 1),
        M::Lodsw => (LODS, 2),
        M::Lodsd => (LODS, 4),
        M::Lodsq => (LODS, 8),
        M::Cmpsb => (CMPS, 1),
        M::Cmpsw => (CMPS, 2),
        M::Cmpsd => (CMPS, 4),
        M::Cmpsq => (CMPS, 8),
        M::Scasb => (SCAS, 1),
        M::Scasw => (SCAS, 2),
        M::Scasd => (SCAS, 4),
        M::Scasq => (SCAS, 8),
        _ => return None,
    };
    let rep = if insn.has_repne_prefix() {
        REPNE
    } else if insn.has_rep_prefix() {
        REPE
    } else {
        ONCE
    };
    let run = match kind {
        MOVS => pick::<C, MOVS>(bytes, rep),
        STOS => pick::<C, STOS>(bytes, rep),
        LODS => pick::<C, LODS>(bytes, rep),
        CMPS => pick::<C, CMPS>(bytes, rep),
        _ => pick::<C, SCAS>(bytes, rep),
    };
    let mut op = ctx.op(insn, run);
    op.aux = address_shift(insn);
    op.dst = ctx.segment(Register::ES);
    if matches!(kind, MOVS | LODS | CMPS) {
        op.seg = ctx.segment(insn.memory_segment());
    }
    Some(op)
}

/// 64 minus the address size in bits, from the implied operands.
fn address_shift(insn: &Instruction) -> u8 {
    use x86_decode::OpKind as K;
    for i in 0..insn.op_count() {
        match insn.op_kind(i) {
            K::MemorySegSI | K::MemorySegDI | K::MemoryESDI => return 48,
            K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI => return 32,
            _ => {}
        }
    }
    0
}
