//! Descriptor-table registers and descriptor inspection: LGDT, SGDT, LLDT, LTR, LAR, LSL, VERR, VERW, ARPL
//! (SDM vol. 2, vol. 3 5.10).

use super::descriptor::{self, Descriptor, kind};
use super::{handler, is_canonical, require_cpl0, require_no_umip, require_protected};
use crate::core::{Core, Fault};
use crate::integer::write_reg;
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction, Mnemonic, OpKind};
use x86_defs::{DescriptorTable, Exception, Segment, flags};

/// LGDT (`IDT` false), LIDT: `width` is 2 (24-bit base), 4 or 8.
fn load_table<C: Core, const IDT: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let base_bytes = if op.width == 8 { 8 } else { 4 };
    let at = op.linear_read(c, 2 + base_bytes as u64)?;
    let mut raw = [0; 10];
    c.load_bytes(at, &mut raw[..2 + base_bytes])?;
    let mut base = [0; 8];
    base[..base_bytes].copy_from_slice(&raw[2..2 + base_bytes]);
    let base = u64::from_le_bytes(base) & if op.width == 2 { 0xFF_FFFF } else { u64::MAX };
    if !is_canonical(base) {
        return Err(c.gp(0));
    }
    let table = DescriptorTable { base, limit: u16::from_le_bytes([raw[0], raw[1]]) };
    if IDT {
        c.cpu_mut().idtr = table;
    } else {
        c.cpu_mut().gdtr = table;
    }
    Ok(Step::Next)
}

/// SGDT, SIDT.
fn store_table<C: Core, const IDT: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_no_umip(c)?;
    let table = if IDT { c.cpu().idtr } else { c.cpu().gdtr };
    let bytes = if op.width == 8 { 10 } else { 6 };
    let at = op.linear_write(c, bytes as u64)?;
    let mut raw = [0; 10];
    raw[..2].copy_from_slice(&table.limit.to_le_bytes());
    raw[2..].copy_from_slice(&table.base.to_le_bytes());
    c.store_bytes(at, &raw[..bytes])?;
    Ok(Step::Next)
}

/// A 16-bit operand in a register (`src`) or in memory.
fn selector_operand<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<u16, Fault> {
    if MEM {
        let at = op.linear_read(c, 2)?;
        c.load(at)
    } else {
        Ok(c.cpu().gpr[(op.src & 31) as usize] as u16)
    }
}

fn lldt<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    require_cpl0(c)?;
    let selector = selector_operand::<C, MEM>(c, op)?;
    if descriptor::is_null(selector) {
        c.cpu_mut().ldtr = Segment { selector, unusable: true, ..Segment::default() };
        return Ok(Step::Next);
    }
    let d = global_system(c, selector)?;
    if d.system_kind() != Some(kind::LDT) {
        return Err(c.gp(d.error_code()));
    }
    c.cpu_mut().ldtr = present_system(c, &d)?;
    Ok(Step::Next)
}

fn ltr<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    require_cpl0(c)?;
    let selector = selector_operand::<C, MEM>(c, op)?;
    if descriptor::is_null(selector) {
        return Err(c.gp(0));
    }
    let d = global_system(c, selector)?;
    let long = c.cpu().long_mode_active();
    if !matches!(d.system_kind(), Some(kind::TSS32)) && (long || d.system_kind() != Some(kind::TSS16)) {
        return Err(c.gp(d.error_code()));
    }
    let mut tr = present_system(c, &d)?;
    descriptor::set_busy(c, d.address, true)?;
    tr.attributes.0 |= u16::from(kind::BUSY);
    c.cpu_mut().tr = tr;
    Ok(Step::Next)
}

/// A descriptor of the GDT with its upper half in IA-32e mode.
fn global_system<C: Core>(c: &mut C, selector: u16) -> Result<Descriptor, Fault> {
    if selector & 4 != 0 {
        return Err(c.gp(descriptor::selector_error(selector)));
    }
    let d = descriptor::fetch(c, selector, Exception::GeneralProtection, 0)?;
    match descriptor::extend(c, d)? {
        Some(d) => Ok(d),
        None => Err(c.gp(d.error_code())),
    }
}

fn present_system<C: Core>(c: &mut C, d: &Descriptor) -> Result<Segment, Fault> {
    if !d.attributes().present() {
        return Err(c.raise(Exception::SegmentNotPresent, d.error_code()));
    }
    if !is_canonical(d.base()) {
        return Err(c.gp(d.error_code()));
    }
    Ok(d.system_segment())
}

/// SLDT, STR (`TASK`).
fn store_selector<C: Core, const TASK: bool, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    require_no_umip(c)?;
    let selector = if TASK { c.cpu().tr.selector } else { c.cpu().ldtr.selector };
    if MEM {
        let at = op.linear_write(c, 2)?;
        c.store(at, selector)?;
    } else if op.width == 2 {
        write_reg(c, op.dst, selector);
    } else {
        write_reg(c, op.dst, u64::from(selector));
    }
    Ok(Step::Next)
}

/// The descriptor that LAR, LSL, VERR and VERW look at, if the current privilege may see it.
fn visible<C: Core>(c: &mut C, selector: u16) -> Result<Option<Descriptor>, Fault> {
    let Some(d) = descriptor::read(c, selector)? else { return Ok(None) };
    let a = d.attributes();
    let conforming = a.is_code() && a.conforming_or_expand_down();
    let level = c.cpu().cpl.max((selector & 3) as u8);
    Ok((conforming || a.dpl() >= level).then_some(d))
}

/// LAR, LSL (`LIMIT`). ZF says whether the destination was written.
fn inspect<C: Core, const LIMIT: bool, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    let selector = selector_operand::<C, MEM>(c, op)?;
    let long = c.cpu().long_mode_active();
    let allowed = |k: u8| match k {
        kind::TSS16 | kind::TSS16_BUSY => !long,
        kind::LDT | kind::TSS32 | kind::TSS32_BUSY => true,
        kind::CALL16 | kind::TASK_GATE => !long && !LIMIT,
        kind::CALL32 => !LIMIT,
        _ => false,
    };
    let mut value = None;
    if let Some(d) = visible(c, selector)? {
        let d = match d.system_kind() {
            None => Some(d),
            Some(k) if allowed(k) => descriptor::extend(c, d)?,
            Some(_) => None,
        };
        value = d.map(|d| if LIMIT { d.limit() } else { (d.raw >> 32) as u32 & 0x00FF_FF00 });
    }
    if let Some(value) = value {
        match op.width {
            2 => write_reg(c, op.dst, value as u16),
            _ => write_reg(c, op.dst, value),
        }
    }
    set_zf(c, value.is_some());
    Ok(Step::Next)
}

/// VERR, VERW (`WRITE`).
fn verify<C: Core, const WRITE: bool, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    let selector = selector_operand::<C, MEM>(c, op)?;
    let usable = visible(c, selector)?.is_some_and(|d| {
        let a = d.attributes();
        let fits = if WRITE {
            !a.is_code() && a.readable_or_writable()
        } else {
            !a.is_code() || a.readable_or_writable()
        };
        a.is_code_or_data() && fits
    });
    set_zf(c, usable);
    Ok(Step::Next)
}

fn set_zf<C: Core>(c: &mut C, on: bool) {
    c.cpu_mut().flags.replace(flags::ZF, if on { flags::ZF } else { 0 });
}

/// ARPL: raises the RPL of the first operand to that of the second.
fn arpl<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_protected(c)?;
    let rpl = c.cpu().gpr[(op.src & 31) as usize] as u16 & 3;
    let raise = |v: u16| if v & 3 < rpl { v & !3 | rpl } else { v };
    let old = if MEM {
        let at = op.linear_write(c, 2)?;
        let old = c.load::<u16>(at)?;
        if raise(old) != old {
            c.store(at, raise(old))?;
        }
        old
    } else {
        let old = c.cpu().gpr[(op.dst & 31) as usize] as u16;
        write_reg(c, op.dst, raise(old));
        old
    };
    set_zf(c, raise(old) != old);
    Ok(Step::Next)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    let table = |run| {
        use Code::*;
        let width = match insn.code() {
            Lgdt_m1632_16 | Lidt_m1632_16 | Sgdt_m1632_16 | Sidt_m1632_16 => 2,
            Lgdt_m1664 | Lidt_m1664 | Sgdt_m1664 | Sidt_m1664 => 8,
            _ => 4,
        };
        Some(Op { width, ..ctx.op(insn, run) })
    };
    // The selector operand's place and whether it is in memory.
    let memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    macro_rules! by_place {
        ($f:ident $(, $k:literal)*) => {
            if memory { handler!($f::<C, $($k,)* true>) } else { handler!($f::<C, $($k,)* false>) }
        };
    }
    let source = |run, operand: u32| {
        let mut op = ctx.op(insn, run);
        if insn.op_kind(operand) == OpKind::Register {
            op.src = gpr(insn.op_register(operand));
        }
        if operand == 1 || !memory && insn.op_kind(0) == OpKind::Register {
            op.dst = gpr(insn.op0_register());
            op.width = insn.op0_register().size() as u8;
        }
        Some(op)
    };
    match insn.mnemonic() {
        M::Lgdt => table(handler!(load_table::<C, false>)),
        M::Lidt => table(handler!(load_table::<C, true>)),
        M::Sgdt => table(handler!(store_table::<C, false>)),
        M::Sidt => table(handler!(store_table::<C, true>)),
        M::Lldt => source(by_place!(lldt), 0),
        M::Ltr => source(by_place!(ltr), 0),
        M::Sldt => source(by_place!(store_selector, false), 0),
        M::Str => source(by_place!(store_selector, true), 0),
        M::Lar => source(by_place!(inspect, false), 1),
        M::Lsl => source(by_place!(inspect, true), 1),
        M::Verr => source(by_place!(verify, false), 0),
        M::Verw => source(by_place!(verify, true), 0),
        M::Arpl => {
            let op = source(by_place!(arpl), 1)?;
            Some(if memory { Op { dst: crate::cpu::ZERO as u8, ..op } } else { op })
        }
        _ => None,
    }
}
