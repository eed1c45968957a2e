//! Flags: PUSHF, POPF, CLI, STI, CLAC, STAC, with the virtual interrupt flag of VME and PVI
//! (SDM vol. 2; vol. 3, 20.3 and 20.4).

use super::handler;
use super::stack::Stack;
use crate::core::{Core, Fault};
use crate::cpu::reg::RSP;
use crate::lower::LowerContext;
use crate::mode::ModeKey;
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction};
use x86_defs::{control, flags};

fn iopl<C: Core>(c: &C) -> u8 {
    (c.cpu().rflags >> flags::IOPL_SHIFT & 3) as u8
}

fn pushf<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let mut image = c.cpu().rflags_all() & !(flags::VM | flags::RF);
    if c.cpu().mode.has(ModeKey::V86) && iopl(c) < 3 {
        if op.width != 2 || c.cpu().cr4 & control::CR4_VME == 0 {
            return Err(c.gp(0));
        }
        let vif = image & flags::VIF != 0;
        image = image & !flags::IF | flags::IOPL | if vif { flags::IF } else { 0 };
    }
    let mut stack = Stack::current(c, 0);
    stack.push(c, image, op.width)?;
    c.cpu_mut().gpr[RSP] = stack.sp;
    Ok(Step::Next)
}

fn popf<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let v86 = c.cpu().mode.has(ModeKey::V86);
    let virtual_if = v86 && iopl(c) < 3;
    if virtual_if && (op.width != 2 || c.cpu().cr4 & control::CR4_VME == 0) {
        return Err(c.gp(0));
    }
    let mut stack = Stack::current(c, 0);
    let mut image = stack.pop(c, op.width)?;
    let mut mask = flags::STATUS | flags::TF | flags::DF | flags::NT;
    if virtual_if {
        let pending = c.cpu().rflags & flags::VIP != 0;
        if image & flags::TF != 0 || pending && image & flags::IF != 0 {
            return Err(c.gp(0));
        }
        mask |= flags::VIF;
        image = image & !flags::VIF | if image & flags::IF != 0 { flags::VIF } else { 0 };
    } else {
        if c.cpu().cpl <= iopl(c) {
            mask |= flags::IF;
        }
        if c.cpu().cpl == 0 {
            mask |= flags::IOPL;
        }
        if op.width > 2 {
            mask |= flags::AC | flags::ID;
        }
    }
    let cpu = c.cpu_mut();
    cpu.gpr[RSP] = stack.sp;
    let old = cpu.rflags_all();
    let new = (old & !mask | image & mask) & !flags::RF;
    // Arithmetic flags alone change nothing that a block depends on.
    if (old ^ new) & !(flags::STATUS | flags::DF) == 0 {
        cpu.flags = crate::flags::LazyFlags::from_bits(new);
        cpu.rflags = new & !flags::STATUS;
        return Ok(Step::Next);
    }
    cpu.set_rflags_all(new);
    Ok(op.end_block(c))
}

/// Whether CLI and STI change IF (`Some(true)`) or VIF (`Some(false)`) now; `None`: #GP.
fn which_interrupt_flag<C: Core>(c: &C) -> Option<bool> {
    let cpu = c.cpu();
    if cpu.cpl <= iopl(c) {
        return Some(true);
    }
    let extension = if cpu.mode.has(ModeKey::V86) { control::CR4_VME } else { control::CR4_PVI };
    (cpu.cpl == 3 && cpu.cr4 & extension != 0).then_some(false)
}

fn cli<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    match which_interrupt_flag(c) {
        Some(true) => c.cpu_mut().rflags &= !flags::IF,
        Some(false) => c.cpu_mut().rflags &= !flags::VIF,
        None => return Err(c.gp(0)),
    }
    Ok(Step::Next)
}

fn sti<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    match which_interrupt_flag(c) {
        Some(true) => {
            if c.cpu().rflags & flags::IF != 0 {
                return Ok(Step::Next);
            }
            let cpu = c.cpu_mut();
            cpu.rflags |= flags::IF;
            cpu.interrupt_shadow = true;
            Ok(op.end_block(c))
        }
        Some(false) if c.cpu().rflags & flags::VIP == 0 => {
            c.cpu_mut().rflags |= flags::VIF;
            Ok(Step::Next)
        }
        _ => Err(c.gp(0)),
    }
}

/// CLAC and STAC. AC decides nothing at CPL 0 but which TLB data accesses use.
fn set_ac<C: Core, const ON: bool>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    if c.cpu().cpl != 0 {
        return Err(c.ud());
    }
    let cpu = c.cpu_mut();
    if ON {
        cpu.rflags |= flags::AC;
    } else {
        cpu.rflags &= !flags::AC;
    }
    cpu.mmu_index = if ON || cpu.cr4 & control::CR4_SMAP == 0 { 2 } else { 1 };
    Ok(Step::Next)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let sized = |run, bytes| Some(Op { width: bytes, ..ctx.op(insn, run) });
    match insn.code() {
        Code::Pushfw => sized(handler!(pushf), 2),
        Code::Pushfd => sized(handler!(pushf), 4),
        Code::Pushfq => sized(handler!(pushf), 8),
        Code::Popfw => sized(handler!(popf), 2),
        Code::Popfd => sized(handler!(popf), 4),
        Code::Popfq => sized(handler!(popf), 8),
        Code::Cli => sized(handler!(cli), 0),
        Code::Sti => sized(handler!(sti), 0),
        Code::Clac => sized(handler!(set_ac::<C, false>), 0),
        Code::Stac => sized(handler!(set_ac::<C, true>), 0),
        _ => None,
    }
}
