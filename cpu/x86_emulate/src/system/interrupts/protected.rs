//! Delivery in 16- and 32-bit protected mode, from virtual-8086 mode too (SDM vol. 3, 6.12; INT n).

use super::{Event, enter};
use crate::core::{Core, Fault};
use crate::cpu::reg::RSP;
use crate::mode::ModeKey;
use crate::system::descriptor::{self, Descriptor, kind};
use crate::system::stack::Stack;
use crate::system::task;
use x86_defs::{Exception, Segment, SegmentIndex, flags};

pub(super) fn deliver<C: Core>(c: &mut C, event: &Event) -> Result<(), Fault> {
    if super::real::redirected(c, event)? {
        return Ok(());
    }
    let gate = read_gate(c, event)?;
    if gate.system_kind() == Some(kind::TASK_GATE) {
        return task::interrupt(c, gate.gate_selector(), event);
    }
    let wide = gate.system_kind().is_some_and(|k| k & 8 != 0);
    through_gate(c, event, &gate, if wide { 4 } else { 2 })
}

fn read_gate<C: Core>(c: &mut C, event: &Event) -> Result<Descriptor, Fault> {
    let at = u32::from(event.vector) * 8;
    let idtr = c.cpu().idtr;
    if at + 7 > u32::from(idtr.limit) {
        return Err(c.gp(event.idt_error()));
    }
    let address = descriptor::wrap(c, idtr.base.wrapping_add(u64::from(at)));
    let raw = c.load_system::<u64>(address)?;
    let gate = Descriptor { selector: 0, raw, upper: 0, address };
    use kind::*;
    if !matches!(gate.system_kind(), Some(TASK_GATE | INTERRUPT16 | TRAP16 | INTERRUPT32 | TRAP32)) {
        return Err(c.gp(event.idt_error()));
    }
    if event.kind.checks_dpl() && gate.attributes().dpl() < c.cpu().cpl {
        return Err(c.gp(event.idt_error()));
    }
    if !gate.attributes().present() {
        return Err(c.raise(Exception::SegmentNotPresent, event.idt_error()));
    }
    Ok(gate)
}

fn through_gate<C: Core>(c: &mut C, event: &Event, gate: &Descriptor, bytes: u8) -> Result<(), Fault> {
    let ext = event.kind.ext();
    let selector = gate.gate_selector();
    if descriptor::is_null(selector) {
        return Err(c.gp(ext));
    }
    let code = descriptor::fetch(c, selector, Exception::GeneralProtection, ext)?;
    let a = code.attributes();
    let cpl = c.cpu().cpl;
    let from_v86 = c.cpu().mode.has(ModeKey::V86);
    if !a.is_code() || a.dpl() > cpl {
        return Err(c.gp(code.error_code() | ext));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, code.error_code() | ext));
    }
    let new_cpl = if a.conforming_or_expand_down() { cpl } else { a.dpl() };
    if from_v86 && new_cpl != 0 {
        return Err(c.gp(code.error_code() | ext));
    }
    // A 16-bit gate has no upper half of the offset.
    let offset = gate.gate_offset() & if bytes == 2 { 0xFFFF } else { 0xFFFF_FFFF };
    if offset > u64::from(code.limit()) {
        return Err(c.gp(ext));
    }
    let (mut stack, new_ss) = if new_cpl < cpl {
        let (ss, sp) = inner_stack(c, new_cpl, ext)?;
        (Stack::inner(ss, sp, descriptor::selector_error(ss.selector) | ext), Some(ss))
    } else {
        (Stack::current(c, ext), None)
    };
    descriptor::mark_accessed(c, &code)?;
    push_frame(c, event, &mut stack, new_ss.is_some(), bytes)?;

    let cpu = c.cpu_mut();
    if let Some(ss) = new_ss {
        cpu.seg[SegmentIndex::Ss as usize] = ss;
    }
    if from_v86 {
        for index in [SegmentIndex::Es, SegmentIndex::Ds, SegmentIndex::Fs, SegmentIndex::Gs] {
            cpu.seg[index as usize] = descriptor::null_segment(0, 0);
        }
    }
    cpu.gpr[RSP] = stack.sp;
    let interrupt_gate = gate.system_kind().is_some_and(|k| k & 1 == 0);
    let cleared = flags::TF | flags::NT | flags::RF | flags::VM | if interrupt_gate { flags::IF } else { 0 };
    enter(c, code.segment(new_cpl), new_cpl, offset, cleared);
    Ok(())
}

fn push_frame<C: Core>(
    c: &mut C,
    event: &Event,
    stack: &mut Stack,
    switched: bool,
    bytes: u8,
) -> Result<(), Fault> {
    let cpu = c.cpu();
    let selector = |index: SegmentIndex| u64::from(cpu.segment(index).selector);
    let [es, cs, ss, ds, fs, gs] = [
        selector(SegmentIndex::Es),
        selector(SegmentIndex::Cs),
        selector(SegmentIndex::Ss),
        selector(SegmentIndex::Ds),
        selector(SegmentIndex::Fs),
        selector(SegmentIndex::Gs),
    ];
    let sp = cpu.gpr[RSP];
    if cpu.mode.has(ModeKey::V86) {
        for word in [gs, fs, ds, es] {
            stack.push(c, word, bytes)?;
        }
    }
    if switched {
        stack.push(c, ss, bytes)?;
        stack.push(c, sp, bytes)?;
    }
    let image = event.flags_image(c);
    stack.push(c, image, bytes)?;
    stack.push(c, cs, bytes)?;
    stack.push(c, event.return_ip, bytes)?;
    if let Some(code) = event.error_code {
        stack.push(c, u64::from(code), bytes)?;
    }
    Ok(())
}

/// Stack segment and pointer of privilege level `cpl` from the current TSS, checked (outside IA-32e mode).
pub(crate) fn inner_stack<C: Core>(c: &mut C, cpl: u8, ext: u32) -> Result<(Segment, u64), Fault> {
    let tr = c.cpu().tr;
    let wide = tr.attributes.kind() & 8 != 0;
    let (offset, bytes) = if wide { (4 + u32::from(cpl) * 8, 8) } else { (2 + u32::from(cpl) * 4, 4) };
    // Of the 8 bytes the last two are reserved.
    let needed = if wide { offset + 5 } else { offset + bytes - 1 };
    if needed > tr.limit {
        return Err(c.raise(Exception::InvalidTss, descriptor::selector_error(tr.selector) | ext));
    }
    let at = descriptor::wrap(c, tr.base.wrapping_add(u64::from(offset)));
    let (sp, selector) = if wide {
        let sp = c.load_system::<u32>(at)?;
        (u64::from(sp), c.load_system::<u16>(descriptor::wrap(c, at.wrapping_add(4)))?)
    } else {
        let sp = c.load_system::<u16>(at)?;
        (u64::from(sp), c.load_system::<u16>(descriptor::wrap(c, at.wrapping_add(2)))?)
    };
    let ss = descriptor::load_stack_segment(c, selector, cpl, Exception::InvalidTss, ext)?;
    Ok((ss, sp))
}
