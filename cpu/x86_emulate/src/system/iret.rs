//! IRET in all modes (SDM vol. 2A, IRET), and the checks that it shares with far returns.

use super::descriptor::{self, Descriptor, kind};
use super::is_canonical;
use super::stack::Stack;
use super::task;
use crate::core::{Core, Fault};
use crate::cpu::{RIP, reg::RSP};
use crate::mode::ModeKey;
use crate::op::{Op, Step};
use x86_defs::{Exception, Segment, SegmentIndex, control, flags};

/// IRET, IRETD, IRETQ: `width` is the operand size.
pub(super) fn iret<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    // Even an IRET that faults ends the blocking of NMIs.
    c.cpu_mut().nmi_blocked = false;
    let mode = c.cpu().mode;
    let bytes = op.width;
    if mode.has(ModeKey::V86) {
        return from_v86(c, bytes);
    }
    if !mode.has(ModeKey::PROTECTED) {
        return real_mode(c, bytes);
    }
    if c.cpu().rflags & flags::NT != 0 {
        if mode.has(ModeKey::LMA) {
            return Err(c.gp(0));
        }
        let next = op.next_ip(c);
        task::return_to_previous(c, next)?;
        return Ok(Step::Branch);
    }
    let mut stack = Stack::current(c, 0);
    let ip = stack.pop(c, bytes)?;
    let cs = stack.pop(c, bytes)? as u16;
    let image = stack.pop(c, bytes)?;
    if image & flags::VM != 0 && bytes == 4 && c.cpu().cpl == 0 && !mode.has(ModeKey::LMA) {
        return to_v86(c, stack, ip, cs, image);
    }
    let code = return_code_segment(c, cs)?;
    check_return_ip(c, &code, ip)?;
    let rpl = (cs & 3) as u8;
    // 64-bit mode pops SS:RSP whatever the privilege.
    let outer = if rpl > c.cpu().cpl || mode.is_long() {
        let sp = stack.pop(c, bytes)?;
        let ss = stack.pop(c, bytes)? as u16;
        Some((return_stack_segment(c, ss, rpl, &code)?, sp))
    } else {
        None
    };
    descriptor::mark_accessed(c, &code)?;

    let changeable = changeable_flags(c, bytes);
    let cpu = c.cpu_mut();
    let sp_before = cpu.gpr[RSP];
    commit_return(c, &code, rpl, ip);
    match outer {
        Some((ss, sp)) => set_stack(c, ss, sp, bytes),
        None => c.cpu_mut().gpr[RSP] = merge_sp(c, sp_before, stack.sp),
    }
    load_flags(c, image, changeable);
    Ok(Step::Branch)
}

/// Flags that IRET and POPF-like returns may change at the current privilege.
fn changeable_flags<C: Core>(c: &C, bytes: u8) -> u64 {
    let cpu = c.cpu();
    let mut mask = flags::STATUS | flags::TF | flags::DF | flags::NT;
    let iopl = cpu.rflags >> flags::IOPL_SHIFT & 3;
    if u64::from(cpu.cpl) <= iopl {
        mask |= flags::IF;
    }
    if cpu.cpl == 0 {
        mask |= flags::IOPL;
    }
    if bytes > 2 {
        mask |= flags::RF | flags::AC | flags::ID;
        if cpu.cpl == 0 {
            mask |= flags::VIF | flags::VIP;
        }
    }
    mask
}

/// Loads the flags in `mask` from `image`. RF only matters while breakpoints are on, and would otherwise
/// stay set with nobody to clear it after one instruction.
fn load_flags<C: Core>(c: &mut C, image: u64, mask: u64) {
    let cpu = c.cpu_mut();
    let mask = if super::debug::breakpoints_enabled(cpu) { mask } else { mask & !flags::RF };
    let kept = cpu.rflags_all() & !mask & !flags::RF;
    cpu.set_rflags_all(kept | image & mask);
}

fn real_mode<C: Core>(c: &mut C, bytes: u8) -> Result<Step, Fault> {
    let mut stack = Stack::current(c, 0);
    let ip = stack.pop(c, bytes)?;
    let cs = stack.pop(c, bytes)? as u16;
    let image = stack.pop(c, bytes)?;
    if ip > u64::from(c.cpu().segment(SegmentIndex::Cs).limit) {
        return Err(c.gp(0));
    }
    let code = descriptor::real_segment(c, SegmentIndex::Cs, cs);
    let mask = changeable_flags(c, bytes) & !(flags::VIF | flags::VIP);
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Cs as usize] = code;
    cpu.gpr[RIP] = ip;
    cpu.gpr[RSP] = stack.sp;
    cpu.refresh();
    load_flags(c, image, mask);
    Ok(Step::Branch)
}

fn from_v86<C: Core>(c: &mut C, bytes: u8) -> Result<Step, Fault> {
    let iopl3 = c.cpu().rflags & flags::IOPL == flags::IOPL;
    let vme = c.cpu().cr4 & control::CR4_VME != 0;
    if !(iopl3 || vme && bytes == 2) {
        return Err(c.gp(0));
    }
    let mut stack = Stack::current(c, 0);
    let ip = stack.pop(c, bytes)?;
    let cs = stack.pop(c, bytes)? as u16;
    let mut image = stack.pop(c, bytes)?;
    if ip > u64::from(c.cpu().segment(SegmentIndex::Cs).limit) {
        return Err(c.gp(0));
    }
    let mut mask = flags::STATUS | flags::TF | flags::DF | flags::NT;
    if iopl3 {
        mask |= flags::IF;
        if bytes > 2 {
            mask |= flags::RF | flags::AC | flags::ID;
        }
    } else {
        let pending = c.cpu().rflags & flags::VIP != 0;
        if image & flags::TF != 0 || pending && image & flags::IF != 0 {
            return Err(c.gp(0));
        }
        mask |= flags::VIF;
        image = image & !flags::VIF | if image & flags::IF != 0 { flags::VIF } else { 0 };
    }
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Cs as usize] = descriptor::v86_segment(cs);
    cpu.gpr[RIP] = ip;
    cpu.gpr[RSP] = stack.sp;
    cpu.refresh();
    load_flags(c, image, mask);
    Ok(Step::Branch)
}

fn to_v86<C: Core>(c: &mut C, mut stack: Stack, ip: u64, cs: u16, image: u64) -> Result<Step, Fault> {
    let sp = stack.pop(c, 4)?;
    let mut selectors = [0u16; 5];
    for s in &mut selectors {
        *s = stack.pop(c, 4)? as u16;
    }
    if ip > 0xFFFF {
        return Err(c.gp(0));
    }
    let [ss, es, ds, fs, gs] = selectors;
    let cpu = c.cpu_mut();
    for (index, selector) in [
        (SegmentIndex::Es, es),
        (SegmentIndex::Cs, cs),
        (SegmentIndex::Ss, ss),
        (SegmentIndex::Ds, ds),
        (SegmentIndex::Fs, fs),
        (SegmentIndex::Gs, gs),
    ] {
        cpu.seg[index as usize] = descriptor::v86_segment(selector);
    }
    cpu.gpr[RIP] = ip;
    cpu.gpr[RSP] = sp;
    cpu.cpl = 3;
    load_flags(c, image, flags::ALL);
    c.cpu_mut().refresh();
    Ok(Step::Branch)
}

/// The code segment that a far return or IRET goes back to, checked.
pub(super) fn return_code_segment<C: Core>(c: &mut C, selector: u16) -> Result<Descriptor, Fault> {
    if descriptor::is_null(selector) {
        return Err(c.gp(0));
    }
    let code = descriptor::fetch(c, selector, Exception::GeneralProtection, 0)?;
    let a = code.attributes();
    let rpl = (selector & 3) as u8;
    let level_fits = if a.conforming_or_expand_down() { a.dpl() <= rpl } else { a.dpl() == rpl };
    let both_sizes = c.cpu().long_mode_active() && a.long() && a.big();
    if !a.is_code() || rpl < c.cpu().cpl || !level_fits || both_sizes {
        return Err(c.gp(code.error_code()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, code.error_code()));
    }
    Ok(code)
}

/// #GP(0) unless `ip` is within `code`.
pub(super) fn check_return_ip<C: Core>(c: &mut C, code: &Descriptor, ip: u64) -> Result<(), Fault> {
    let ok = if is_64_bit(c, code) { is_canonical(ip) } else { ip <= u64::from(code.limit()) };
    if ok { Ok(()) } else { Err(c.gp(0)) }
}

/// Whether `code` is a 64-bit code segment now.
pub(super) fn is_64_bit<C: Core>(c: &C, code: &Descriptor) -> bool {
    c.cpu().long_mode_active() && code.attributes().long()
}

/// The stack segment of privilege level `rpl` that a return with `code` goes back to.
pub(super) fn return_stack_segment<C: Core>(
    c: &mut C,
    selector: u16,
    rpl: u8,
    code: &Descriptor,
) -> Result<Segment, Fault> {
    if descriptor::is_null(selector) {
        // 64-bit code above CPL 3 may run without a stack segment.
        return if is_64_bit(c, code) && rpl < 3 && selector as u8 == rpl {
            Ok(descriptor::null_segment(selector, rpl))
        } else {
            Err(c.gp(0))
        };
    }
    descriptor::load_stack_segment(c, selector, rpl, Exception::GeneralProtection, 0)
}

/// Commits CS:RIP of a return to privilege level `rpl`; data segments that the outer level must not use
/// become null.
pub(super) fn commit_return<C: Core>(c: &mut C, code: &Descriptor, rpl: u8, ip: u64) {
    let segment = code.segment(rpl);
    let cpu = c.cpu_mut();
    let outer = rpl > cpu.cpl;
    cpu.seg[SegmentIndex::Cs as usize] = segment;
    cpu.cpl = rpl;
    cpu.gpr[RIP] = ip;
    if outer {
        for index in [SegmentIndex::Es, SegmentIndex::Ds, SegmentIndex::Fs, SegmentIndex::Gs] {
            let s = &mut cpu.seg[index as usize];
            let a = s.attributes;
            let conforming = a.is_code() && a.conforming_or_expand_down();
            if s.unusable {
                // A null selector loses its RPL; the base, which 64-bit code uses, stays (SDM vol. 2, IRET).
                s.selector = 0;
            } else if !conforming && a.dpl() < rpl {
                *s = descriptor::null_segment(0, rpl);
            }
        }
    }
    cpu.refresh();
}

/// Commits SS:RSP of a return to an outer level (after `commit_return`).
pub(super) fn set_stack<C: Core>(c: &mut C, ss: Segment, sp: u64, bytes: u8) {
    let cpu = c.cpu_mut();
    let before = cpu.gpr[RSP];
    cpu.seg[SegmentIndex::Ss as usize] = ss;
    cpu.refresh();
    let sp = if bytes == 2 { sp & 0xFFFF } else { sp };
    c.cpu_mut().gpr[RSP] = merge_sp(c, before, sp);
}

/// `sp` at the width of the stack pointer; a 16-bit one keeps the upper bits of `before`.
pub(super) fn merge_sp<C: Core>(c: &C, before: u64, sp: u64) -> u64 {
    match c.cpu().mode.stack_bytes() {
        2 => before & !0xFFFF | sp & 0xFFFF,
        4 => sp & 0xFFFF_FFFF,
        _ => sp,
    }
}

/// Whether `d` is a TSS of `kind`s busy form.
pub(super) fn is_busy_tss(d: &Descriptor) -> bool {
    matches!(d.system_kind(), Some(kind::TSS16_BUSY | kind::TSS32_BUSY))
}
