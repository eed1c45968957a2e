//! IN, OUT, INS, OUTS with their permission checks (SDM vol. 1, 18.5).

use super::{debug, descriptor, handler};
use crate::core::{Core, Fault};
use crate::cpu::RIP;
use crate::cpu::reg::{RAX, RCX, RDI, RDX, RSI};
use crate::integer::{read_reg, write_reg};
use crate::lower::LowerContext;
use crate::mode::ModeKey;
use crate::op::{Op, Step, segment_linear};
use x86_decode::{Code, Instruction, OpKind, Register};
use x86_defs::flags;

/// Elements that a repeated instruction moves before interrupts are looked at.
const ELEMENTS_AT_ONCE: u32 = 64;

/// #GP(0) unless IOPL or the TSS's bitmap allow the `bytes` ports from `port`.
fn check_permission<C: Core>(c: &mut C, port: u16, bytes: u8) -> Result<(), Fault> {
    let cpu = c.cpu();
    if !cpu.mode.has(ModeKey::PROTECTED) {
        return Ok(());
    }
    let iopl = (cpu.rflags >> flags::IOPL_SHIFT & 3) as u8;
    if !cpu.mode.has(ModeKey::V86) && cpu.cpl <= iopl {
        return Ok(());
    }
    let tr = cpu.tr;
    // Only a 32- or 64-bit TSS has a bitmap.
    if tr.unusable || tr.attributes.kind() & 8 == 0 || tr.limit < 0x67 {
        return Err(c.gp(0));
    }
    let base = c.load_system::<u16>(descriptor::wrap(c, tr.base.wrapping_add(0x66)))?;
    let offset = u32::from(base) + u32::from(port / 8);
    if offset + 1 > tr.limit {
        return Err(c.gp(0));
    }
    let bits = c.load_system::<u16>(descriptor::wrap(c, tr.base.wrapping_add(u64::from(offset))))?;
    let mask = (1u16 << bytes) - 1;
    if bits >> (port & 7) & mask != 0 { Err(c.gp(0)) } else { Ok(()) }
}

fn port_of<C: Core>(c: &C, op: &Op<C>) -> u16 {
    if op.aux != 0 { c.cpu().gpr[RDX] as u16 } else { u16::from(op.imm as u8) }
}

/// IN: `aux` says that DX holds the port.
fn port_in<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let port = port_of(c, op);
    check_permission(c, port, op.width)?;
    debug::port_access(c.cpu_mut(), port, op.width);
    let value = c.port_in(port, op.width);
    match op.width {
        1 => write_reg(c, RAX as u8, value as u8),
        2 => write_reg(c, RAX as u8, value as u16),
        _ => write_reg(c, RAX as u8, value),
    }
    Ok(Step::Next)
}

/// OUT. What it changes (a reset, an interrupt) is looked at before the next instruction.
fn port_out<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let port = port_of(c, op);
    check_permission(c, port, op.width)?;
    debug::port_access(c.cpu_mut(), port, op.width);
    let value = c.cpu().gpr[RAX] as u32 & width_mask(op.width);
    c.port_out(port, op.width, value);
    Ok(op.end_block(c))
}

fn width_mask(bytes: u8) -> u32 {
    match bytes {
        1 => 0xFF,
        2 => 0xFFFF,
        _ => u32::MAX,
    }
}

/// An index register at the address size: `aux` is 64 minus its bits.
fn index<C: Core>(c: &C, op: &Op<C>, register: usize) -> u64 {
    c.cpu().gpr[register] << (op.aux & 63) >> (op.aux & 63)
}
fn set_index<C: Core>(c: &mut C, op: &Op<C>, register: usize, value: u64) {
    match op.aux {
        48 => write_reg(c, register as u8, value as u16),
        32 => write_reg(c, register as u8, value as u32),
        _ => c.cpu_mut().gpr[register] = value,
    }
}

/// One element of INS or OUTS. The memory operand is checked before the port is touched.
fn element<C: Core, const OUT: bool>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    let port = read_reg::<u16, C>(c, RDX as u8);
    check_permission(c, port, op.width)?;
    let register = if OUT { RSI } else { RDI };
    let offset = index(c, op, register);
    let at = segment_linear(c, op.seg, offset, u64::from(op.width), !OUT)?;
    if OUT {
        let value = match op.width {
            1 => u32::from(c.load::<u8>(at)?),
            2 => u32::from(c.load::<u16>(at)?),
            _ => c.load::<u32>(at)?,
        };
        c.port_out(port, op.width, value);
    } else {
        c.probe(at, u64::from(op.width), true)?;
        let value = c.port_in(port, op.width);
        match op.width {
            1 => c.store(at, value as u8)?,
            2 => c.store(at, value as u16)?,
            _ => c.store(at, value)?,
        }
    }
    debug::port_access(c.cpu_mut(), port, op.width);
    let down = c.cpu().rflags & flags::DF != 0;
    let step = u64::from(op.width);
    set_index(c, op, register, if down { offset.wrapping_sub(step) } else { offset.wrapping_add(step) });
    Ok(())
}

fn string<C: Core, const OUT: bool, const REP: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if !REP {
        element::<C, OUT>(c, op)?;
        return Ok(op.end_block(c));
    }
    let mut left = index(c, op, RCX);
    // Single step traps after each element.
    let at_once = if c.cpu().mode.has(ModeKey::TRAP) { 1 } else { ELEMENTS_AT_ONCE };
    for _ in 0..at_once {
        if left == 0 {
            return Ok(op.end_block(c));
        }
        element::<C, OUT>(c, op)?;
        left -= 1;
        set_index(c, op, RCX, left);
        if c.cpu().pending_debug != 0 {
            break;
        }
    }
    // Goes on at itself after a look at interrupts.
    let ip = if left == 0 { op.next_ip(c) } else { op.ip(c) };
    c.cpu_mut().gpr[RIP] = ip;
    Ok(Step::Branch)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Code::*;
    let port =
        |run, bytes: u8, in_dx: bool| Some(Op { width: bytes, aux: u8::from(in_dx), ..ctx.op(insn, run) });
    let bytes: u8 = match insn.code() {
        In_AL_imm8 => return port(handler!(port_in), 1, false),
        In_AX_imm8 => return port(handler!(port_in), 2, false),
        In_EAX_imm8 => return port(handler!(port_in), 4, false),
        In_AL_DX => return port(handler!(port_in), 1, true),
        In_AX_DX => return port(handler!(port_in), 2, true),
        In_EAX_DX => return port(handler!(port_in), 4, true),
        Out_imm8_AL => return port(handler!(port_out), 1, false),
        Out_imm8_AX => return port(handler!(port_out), 2, false),
        Out_imm8_EAX => return port(handler!(port_out), 4, false),
        Out_DX_AL => return port(handler!(port_out), 1, true),
        Out_DX_AX => return port(handler!(port_out), 2, true),
        Out_DX_EAX => return port(handler!(port_out), 4, true),
        Insb_m8_DX | Outsb_DX_m8 => 1,
        Insw_m16_DX | Outsw_DX_m16 => 2,
        Insd_m32_DX | Outsd_DX_m32 => 4,
        _ => return None,
    };
    let out = matches!(insn.code(), Outsb_DX_m8 | Outsw_DX_m16 | Outsd_DX_m32);
    let run = match (out, insn.has_rep_prefix() || insn.has_repne_prefix()) {
        (true, true) => handler!(string::<C, true, true>),
        (true, false) => handler!(string::<C, true, false>),
        (false, true) => handler!(string::<C, false, true>),
        (false, false) => handler!(string::<C, false, false>),
    };
    let mut op = ctx.op(insn, run);
    op.width = bytes;
    op.aux = match insn.op_kind(u32::from(out)) {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 48,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 32,
        _ => 0,
    };
    op.seg = ctx.segment(if out { insn.memory_segment() } else { Register::ES });
    Some(op)
}
