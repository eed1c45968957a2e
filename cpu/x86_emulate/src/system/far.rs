//! Far JMP, CALL and RET, through code segments, call gates, task gates and TSSs (SDM vol. 2A, JMP, CALL,
//! RET; vol. 3, 5.8).

use super::descriptor::{self, Descriptor, kind};
use super::interrupts::{inner_stack, tss_rsp};
use super::iret::{
    check_return_ip, commit_return, is_64_bit, merge_sp, return_code_segment, return_stack_segment, set_stack,
};
use super::stack::Stack;
use super::task::{self, Reason};
use crate::core::{Core, Fault};
use crate::cpu::{RIP, reg::RSP};
use crate::mode::ModeKey;
use crate::op::Step;
use x86_defs::{Exception, Segment, SegmentIndex};

/// Where a far transfer goes, and from where.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    pub selector: u16,
    pub offset: u64,
    /// Operand size in bytes.
    pub bytes: u8,
    pub call: bool,
    /// RIP behind the instruction.
    pub next_ip: u64,
}

/// Far JMP or CALL.
pub(super) fn transfer<C: Core>(c: &mut C, t: &Transfer) -> Result<Step, Fault> {
    let mode = c.cpu().mode;
    if !mode.has(ModeKey::PROTECTED) || mode.has(ModeKey::V86) {
        return in_real_mode(c, t);
    }
    if descriptor::is_null(t.selector) {
        return Err(c.gp(0));
    }
    let d = descriptor::fetch(c, t.selector, Exception::GeneralProtection, 0)?;
    let rpl = (t.selector & 3) as u8;
    let long = mode.has(ModeKey::LMA);
    match d.system_kind() {
        None if d.attributes().is_code() => to_code(c, t, &d),
        Some(kind::CALL32) => through_call_gate(c, t, d),
        Some(kind::CALL16) if !long => through_call_gate(c, t, d),
        Some(kind::TASK_GATE) if !long => {
            check_gate_privilege(c, &d, rpl)?;
            task::switch_through_gate(c, d.gate_selector(), reason(t), t.next_ip)?;
            Ok(Step::Branch)
        }
        Some(kind::TSS16 | kind::TSS32 | kind::TSS16_BUSY | kind::TSS32_BUSY) if !long => {
            let a = d.attributes();
            if a.dpl() < c.cpu().cpl || a.dpl() < rpl {
                return Err(c.gp(d.error_code()));
            }
            task::switch(c, &d, reason(t), t.next_ip)?;
            Ok(Step::Branch)
        }
        _ => Err(c.gp(d.error_code())),
    }
}

fn reason(t: &Transfer) -> Reason {
    if t.call { Reason::Call } else { Reason::Jump }
}

fn in_real_mode<C: Core>(c: &mut C, t: &Transfer) -> Result<Step, Fault> {
    let cs = *c.cpu().segment(SegmentIndex::Cs);
    if t.offset > u64::from(cs.limit) {
        return Err(c.gp(0));
    }
    if t.call {
        let mut stack = Stack::current(c, 0);
        stack.push(c, u64::from(cs.selector), t.bytes)?;
        stack.push(c, t.next_ip, t.bytes)?;
        c.cpu_mut().gpr[RSP] = stack.sp;
    }
    let code = descriptor::real_segment(c, SegmentIndex::Cs, t.selector);
    enter(c, code, t.offset);
    Ok(Step::Branch)
}

fn enter<C: Core>(c: &mut C, code: Segment, ip: u64) {
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Cs as usize] = code;
    cpu.gpr[RIP] = ip;
    cpu.refresh();
}

/// To a code segment of the same privilege (or a conforming one).
fn to_code<C: Core>(c: &mut C, t: &Transfer, code: &Descriptor) -> Result<Step, Fault> {
    let a = code.attributes();
    let cpl = c.cpu().cpl;
    let rpl = (t.selector & 3) as u8;
    let allowed = if a.conforming_or_expand_down() { a.dpl() <= cpl } else { rpl <= cpl && a.dpl() == cpl };
    if !allowed || c.cpu().long_mode_active() && a.long() && a.big() {
        return Err(c.gp(code.error_code()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, code.error_code()));
    }
    check_return_ip(c, code, t.offset)?;
    descriptor::mark_accessed(c, code)?;
    if t.call {
        let cs = c.cpu().segment(SegmentIndex::Cs).selector;
        let mut stack = Stack::current(c, 0);
        stack.push(c, u64::from(cs), t.bytes)?;
        stack.push(c, t.next_ip, t.bytes)?;
        let before = c.cpu().gpr[RSP];
        c.cpu_mut().gpr[RSP] = merge_sp(c, before, stack.sp);
    }
    enter(c, code.segment(cpl), t.offset);
    Ok(Step::Branch)
}

/// #GP or #NP (with the gate's selector) unless CPL and RPL may use the gate `d`.
fn check_gate_privilege<C: Core>(c: &mut C, d: &Descriptor, rpl: u8) -> Result<(), Fault> {
    let a = d.attributes();
    if a.dpl() < c.cpu().cpl || a.dpl() < rpl {
        return Err(c.gp(d.error_code()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, d.error_code()));
    }
    Ok(())
}

fn through_call_gate<C: Core>(c: &mut C, t: &Transfer, gate: Descriptor) -> Result<Step, Fault> {
    check_gate_privilege(c, &gate, (t.selector & 3) as u8)?;
    let Some(gate) = descriptor::extend(c, gate)? else { return Err(c.gp(gate.error_code())) };
    let long = c.cpu().long_mode_active();
    let bytes = match (long, gate.system_kind()) {
        (true, _) => 8,
        (false, Some(kind::CALL32)) => 4,
        _ => 2,
    };
    let selector = gate.gate_selector();
    if descriptor::is_null(selector) {
        return Err(c.gp(0));
    }
    let code = descriptor::fetch(c, selector, Exception::GeneralProtection, 0)?;
    let a = code.attributes();
    let cpl = c.cpu().cpl;
    let conforming = a.conforming_or_expand_down();
    // Only a CALL may gain privilege.
    let allowed = if t.call || conforming { a.dpl() <= cpl } else { a.dpl() == cpl };
    if !a.is_code() || !allowed || long && (!a.long() || a.big()) {
        return Err(c.gp(code.error_code()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, code.error_code()));
    }
    let offset = gate.gate_offset() & if bytes == 2 { 0xFFFF } else { u64::MAX };
    check_return_ip(c, &code, offset)?;
    let new_cpl = if conforming { cpl } else { a.dpl() };
    if t.call && new_cpl < cpl {
        return call_inner(c, t, &gate, &code, bytes, offset);
    }
    descriptor::mark_accessed(c, &code)?;
    if t.call {
        let cs = c.cpu().segment(SegmentIndex::Cs).selector;
        let mut stack = if long { Stack::flat64(c.cpu().gpr[RSP], false, 0) } else { Stack::current(c, 0) };
        stack.push(c, u64::from(cs), bytes)?;
        stack.push(c, t.next_ip, bytes)?;
        c.cpu_mut().gpr[RSP] = stack.sp;
    }
    enter(c, code.segment(new_cpl), offset);
    Ok(Step::Branch)
}

/// A call gate to a more privileged level: new stack, old SS:SP, parameters, return address.
fn call_inner<C: Core>(
    c: &mut C,
    t: &Transfer,
    gate: &Descriptor,
    code: &Descriptor,
    bytes: u8,
    offset: u64,
) -> Result<Step, Fault> {
    let new_cpl = code.attributes().dpl();
    let (ss, mut stack) = if bytes == 8 {
        let sp = tss_rsp(c, new_cpl, 0)?;
        (descriptor::null_segment(u16::from(new_cpl), new_cpl), Stack::flat64(sp, true, 0))
    } else {
        let (ss, sp) = inner_stack(c, new_cpl, 0)?;
        (ss, Stack::inner(ss, sp, descriptor::selector_error(ss.selector)))
    };
    let cpu = c.cpu();
    let old_ss = cpu.segment(SegmentIndex::Ss).selector;
    let old_cs = cpu.segment(SegmentIndex::Cs).selector;
    let old_sp = cpu.gpr[RSP];
    descriptor::mark_accessed(c, code)?;
    stack.push(c, u64::from(old_ss), bytes)?;
    stack.push(c, old_sp, bytes)?;
    if bytes < 8 {
        // Parameters keep their order.
        let count = (gate.raw >> 32 & 31) as usize;
        let mut parameters = [0u64; 31];
        let mut outer = Stack::current(c, 0);
        for p in &mut parameters[..count] {
            *p = outer.pop(c, bytes)?;
        }
        for p in parameters[..count].iter().rev() {
            stack.push(c, *p, bytes)?;
        }
    }
    stack.push(c, u64::from(old_cs), bytes)?;
    stack.push(c, t.next_ip, bytes)?;
    let cpu = c.cpu_mut();
    cpu.seg[SegmentIndex::Ss as usize] = ss;
    cpu.gpr[RSP] = stack.sp;
    cpu.cpl = new_cpl;
    enter(c, code.segment(new_cpl), offset);
    Ok(Step::Branch)
}

/// RETF: `bytes` is the operand size, `released` the bytes of parameters to free.
pub(super) fn return_far<C: Core>(c: &mut C, bytes: u8, released: u16) -> Result<Step, Fault> {
    let mode = c.cpu().mode;
    let released = u64::from(released);
    let mut stack = Stack::current(c, 0);
    let ip = stack.pop(c, bytes)?;
    let selector = stack.pop(c, bytes)? as u16;
    if !mode.has(ModeKey::PROTECTED) || mode.has(ModeKey::V86) {
        if ip > u64::from(c.cpu().segment(SegmentIndex::Cs).limit) {
            return Err(c.gp(0));
        }
        stack.advance(released);
        c.cpu_mut().gpr[RSP] = stack.sp;
        let code = descriptor::real_segment(c, SegmentIndex::Cs, selector);
        enter(c, code, ip);
        return Ok(Step::Branch);
    }
    let code = return_code_segment(c, selector)?;
    check_return_ip(c, &code, ip)?;
    let rpl = (selector & 3) as u8;
    stack.advance(released);
    if rpl == c.cpu().cpl {
        descriptor::mark_accessed(c, &code)?;
        let before = c.cpu().gpr[RSP];
        c.cpu_mut().gpr[RSP] = merge_sp(c, before, stack.sp);
        commit_return(c, &code, rpl, ip);
        return Ok(Step::Branch);
    }
    let sp = stack.pop(c, bytes)?;
    let ss = stack.pop(c, bytes)? as u16;
    let ss = return_stack_segment(c, ss, rpl, &code)?;
    descriptor::mark_accessed(c, &code)?;
    commit_return(c, &code, rpl, ip);
    set_stack(c, ss, sp, bytes);
    let mut outer =
        if is_64_bit(c, &code) { Stack::flat64(c.cpu().gpr[RSP], false, 0) } else { Stack::current(c, 0) };
    outer.advance(released);
    c.cpu_mut().gpr[RSP] = outer.sp;
    Ok(Step::Branch)
}
