//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS, and FS/GS base access (SDM vol. 2B).
//!
//! SYSCALL and SYSRET behave as Intel's: 64-bit mode only. Kernels for such processors use SYSENTER in
//! compatibility mode.

use super::{handler, is_canonical, require_cpl0};
use crate::core::{Core, Fault};
use crate::cpu::{RIP, reg};
use crate::lower::{LowerContext, gpr};
use crate::mode::ModeKey;
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic};
use x86_defs::control::{CR4_FSGSBASE, DR6_BS, EFER_LMA, EFER_SCE};
use x86_defs::{Segment, SegmentAttributes, SegmentIndex, flags};

/// Flags that SYSRET takes from R11.
pub const SYSRET_FLAGS: u64 = 0x003C_7FD7;
/// Attributes of a flat segment of 64-bit code at DPL 0.
pub const CODE_64: u16 = FLAT_CODE | 0x200;
/// Attributes of a flat stack segment at DPL 0.
pub const STACK: u16 = 0xC93;
const FLAT_CODE: u16 = 0x89B;

/// A flat code segment at `dpl`: 64-bit or 32-bit.
fn flat_code(selector: u16, dpl: u8, long: bool) -> Segment {
    let attributes = if long { CODE_64 } else { FLAT_CODE | 0x400 };
    Segment {
        selector,
        attributes: SegmentAttributes(attributes | u16::from(dpl) << 5),
        limit: u32::MAX,
        base: 0,
        unusable: false,
    }
}

/// A flat stack segment at `dpl`.
fn flat_stack(selector: u16, dpl: u8) -> Segment {
    let attributes = SegmentAttributes(STACK | u16::from(dpl) << 5);
    Segment { selector, attributes, limit: u32::MAX, base: 0, unusable: false }
}

fn enter<C: Core>(c: &mut C, code: Segment, stack: Segment, cpl: u8, ip: u64) -> Step {
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Cs as usize] = code;
    cpu.seg[SegmentIndex::Ss as usize] = stack;
    cpu.seg_base[SegmentIndex::Cs as usize] = 0;
    cpu.seg_base[SegmentIndex::Ss as usize] = 0;
    cpu.cpl = cpl;
    cpu.gpr[RIP] = ip;
    cpu.update_mode();
    Step::Branch
}

fn syscall<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if !c.cpu().mode.is_long() || c.cpu().efer & EFER_SCE == 0 {
        return Err(c.ud());
    }
    let next = op.next_ip(c);
    let cpu = c.cpu_mut();
    let rflags = cpu.rflags_all() & !flags::RF;
    cpu.gpr[reg::RCX] = next;
    cpu.gpr[reg::R11] = rflags;
    let kept = rflags & !cpu.msrs.sfmask;
    if rflags & !kept & flags::TF != 0 {
        cpu.pending_debug |= super::debug::NO_STEP;
    }
    cpu.flags = crate::flags::LazyFlags::from_bits(kept);
    cpu.rflags = kept & !flags::STATUS | flags::FIXED_1;
    let selector = (cpu.msrs.star >> 32) as u16 & !3;
    let ip = cpu.msrs.lstar;
    Ok(enter(c, flat_code(selector, 0, true), flat_stack(selector.wrapping_add(8), 0), 0, ip))
}

fn sysret<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if !c.cpu().mode.is_long() || c.cpu().efer & EFER_SCE == 0 {
        return Err(c.ud());
    }
    require_cpl0(c)?;
    let long = op.width == 8;
    let rcx = c.cpu().gpr[reg::RCX];
    if long && !is_canonical(rcx) {
        return Err(c.gp(0));
    }
    let cpu = c.cpu_mut();
    let image = cpu.gpr[reg::R11] & SYSRET_FLAGS;
    cpu.flags = crate::flags::LazyFlags::from_bits(image);
    cpu.rflags = image & !flags::STATUS | flags::FIXED_1;
    if image & flags::TF != 0 {
        // Other than IRET and POPF it traps behind itself already.
        cpu.pending_debug |= DR6_BS;
    }
    let base = (cpu.msrs.star >> 48) as u16;
    let code = if long { base.wrapping_add(16) } else { base } | 3;
    let ip = if long { rcx } else { rcx & 0xFFFF_FFFF };
    Ok(enter(c, flat_code(code, 3, long), flat_stack(base.wrapping_add(8) | 3, 3), 3, ip))
}

fn sysenter<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    let selector = c.cpu().msrs.sysenter_cs as u16 & !3;
    if !c.cpu().mode.has(ModeKey::PROTECTED) || selector == 0 {
        return Err(c.gp(0));
    }
    let cpu = c.cpu_mut();
    let long = cpu.efer & EFER_LMA != 0;
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    cpu.rflags &= !(flags::VM | flags::IF | flags::RF);
    cpu.gpr[reg::RSP] = cpu.msrs.sysenter_esp & mask;
    let ip = cpu.msrs.sysenter_eip & mask;
    Ok(enter(c, flat_code(selector, 0, long), flat_stack(selector.wrapping_add(8), 0), 0, ip))
}

fn sysexit<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let base = c.cpu().msrs.sysenter_cs as u16 & !3;
    if base == 0 || !c.cpu().mode.has(ModeKey::PROTECTED) {
        return Err(c.gp(0));
    }
    require_cpl0(c)?;
    let long = op.width == 8;
    let (ip, sp) = (c.cpu().gpr[reg::RDX], c.cpu().gpr[reg::RCX]);
    if long && !(is_canonical(ip) && is_canonical(sp)) {
        return Err(c.gp(0));
    }
    let mask = if long { u64::MAX } else { 0xFFFF_FFFF };
    c.cpu_mut().gpr[reg::RSP] = sp & mask;
    let code = base.wrapping_add(if long { 32 } else { 16 }) | 3;
    let stack = base.wrapping_add(if long { 40 } else { 24 }) | 3;
    Ok(enter(c, flat_code(code, 3, long), flat_stack(stack, 3), 3, ip & mask))
}

fn swapgs<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let cpu = c.cpu_mut();
    let gs = &mut cpu.seg[SegmentIndex::Gs as usize].base;
    core::mem::swap(gs, &mut cpu.msrs.kernel_gs_base);
    cpu.seg_base[SegmentIndex::Gs as usize] = *gs;
    Ok(Step::Next)
}

/// RDFSBASE, RDGSBASE: `aux` is the segment.
fn read_base<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if c.cpu().cr4 & CR4_FSGSBASE == 0 {
        return Err(c.ud());
    }
    let base = c.cpu().seg[(op.aux as usize).min(5)].base;
    c.cpu_mut().gpr[(op.dst & 31) as usize] = if op.width == 8 { base } else { base & 0xFFFF_FFFF };
    Ok(Step::Next)
}

/// WRFSBASE, WRGSBASE.
fn write_base<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if c.cpu().cr4 & CR4_FSGSBASE == 0 {
        return Err(c.ud());
    }
    let value = c.cpu().gpr[(op.dst & 31) as usize];
    let value = if op.width == 8 { value } else { value & 0xFFFF_FFFF };
    if !is_canonical(value) {
        return Err(c.gp(0));
    }
    let (cpu, segment) = (c.cpu_mut(), (op.aux as usize).min(5));
    cpu.seg[segment].base = value;
    cpu.seg_base[segment] = value;
    Ok(Step::Next)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    let base = |run, segment: SegmentIndex| {
        let register = insn.op0_register();
        Some(Op { dst: gpr(register), width: register.size() as u8, aux: segment as u8, ..ctx.op(insn, run) })
    };
    let sized = |run, bytes| Some(Op { width: bytes, ..ctx.op(insn, run) });
    match insn.mnemonic() {
        M::Syscall => sized(handler!(syscall), 8),
        M::Sysret => sized(handler!(sysret), 4),
        M::Sysretq => sized(handler!(sysret), 8),
        M::Sysenter => sized(handler!(sysenter), 8),
        M::Sysexit => sized(handler!(sysexit), 4),
        M::Sysexitq => sized(handler!(sysexit), 8),
        M::Swapgs => sized(handler!(swapgs), 8),
        M::Rdfsbase => base(handler!(read_base), SegmentIndex::Fs),
        M::Rdgsbase => base(handler!(read_base), SegmentIndex::Gs),
        M::Wrfsbase => base(handler!(write_base), SegmentIndex::Fs),
        M::Wrgsbase => base(handler!(write_base), SegmentIndex::Gs),
        _ => None,
    }
}
