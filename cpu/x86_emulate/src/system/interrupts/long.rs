//! Delivery in IA-32e mode (SDM vol. 3, 6.14).

use super::{Event, enter};
use crate::core::{Core, Fault};
use crate::cpu::reg::RSP;
use crate::system::descriptor::{self, kind};
use crate::system::is_canonical;
use crate::system::stack::Stack;
use x86_defs::{Exception, SegmentIndex, flags};

/// Offset of RSP0 in a 64-bit TSS.
const TSS_RSP0: u32 = 4;
/// Offset of IST1.
const TSS_IST1: u32 = 0x24;

pub(super) fn deliver<C: Core>(c: &mut C, event: &Event) -> Result<(), Fault> {
    let ext = event.kind.ext();
    let (gate, attributes) = read_gate(c, event)?;
    let selector = gate.gate_selector();
    if descriptor::is_null(selector) {
        return Err(c.gp(ext));
    }
    let code = descriptor::fetch(c, selector, Exception::GeneralProtection, ext)?;
    let a = code.attributes();
    let cpl = c.cpu().cpl;
    if !a.is_code() || a.dpl() > cpl {
        return Err(c.gp(code.error_code() | ext));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, code.error_code() | ext));
    }
    if !a.long() || a.big() {
        return Err(c.gp(code.error_code() | ext));
    }
    let new_cpl = if a.conforming_or_expand_down() { cpl } else { a.dpl() };
    let ist = (gate.raw >> 32 & 7) as u32;
    let sp = if ist != 0 {
        tss_stack(c, TSS_IST1 + (ist - 1) * 8, ext)?
    } else if new_cpl < cpl {
        tss_stack(c, TSS_RSP0 + u32::from(new_cpl) * 8, ext)?
    } else {
        c.cpu().gpr[RSP]
    };
    let old_ss = *c.cpu().segment(SegmentIndex::Ss);
    let mut stack = Stack::flat64(sp & !0xF, new_cpl < cpl, ext);
    let offset = gate.gate_offset();
    if !is_canonical(offset) {
        return Err(c.gp(ext));
    }
    descriptor::mark_accessed(c, &code)?;
    let cs = c.cpu().segment(SegmentIndex::Cs).selector;
    let words =
        [u64::from(old_ss.selector), c.cpu().gpr[RSP], event.flags_image(c), u64::from(cs), event.return_ip];
    for word in words.into_iter().chain(event.error_code.map(u64::from)) {
        stack.push(c, word, 8)?;
    }
    if new_cpl < cpl {
        c.cpu_mut().seg[SegmentIndex::Ss as usize] = descriptor::null_segment(u16::from(new_cpl), new_cpl);
    }
    c.cpu_mut().gpr[RSP] = stack.sp;
    let mask_interrupts = if attributes == kind::INTERRUPT32 { flags::IF } else { 0 };
    let cleared = flags::TF | flags::NT | flags::RF | flags::VM | mask_interrupts;
    enter(c, code.segment(new_cpl), new_cpl, offset, cleared);
    Ok(())
}

/// The IDT's gate and its type, with the checks that do not need the code segment.
fn read_gate<C: Core>(c: &mut C, event: &Event) -> Result<(descriptor::Descriptor, u8), Fault> {
    let at = u32::from(event.vector) * 16;
    let idtr = c.cpu().idtr;
    if at + 15 > u32::from(idtr.limit) {
        return Err(c.gp(event.idt_error()));
    }
    let address = idtr.base.wrapping_add(u64::from(at));
    let raw = c.load_system::<u64>(address)?;
    let upper = c.load_system::<u64>(address.wrapping_add(8))? & 0xFFFF_FFFF;
    let gate = descriptor::Descriptor { selector: 0, raw, upper, address };
    let a = gate.attributes();
    let Some(kind @ (kind::INTERRUPT32 | kind::TRAP32)) = gate.system_kind() else {
        return Err(c.gp(event.idt_error()));
    };
    if event.kind.checks_dpl() && a.dpl() < c.cpu().cpl {
        return Err(c.gp(event.idt_error()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, event.idt_error()));
    }
    Ok((gate, kind))
}

/// A stack pointer from the 64-bit TSS.
pub(crate) fn tss_stack<C: Core>(c: &mut C, offset: u32, ext: u32) -> Result<u64, Fault> {
    let tr = c.cpu().tr;
    if offset + 7 > tr.limit {
        return Err(c.raise(Exception::InvalidTss, descriptor::selector_error(tr.selector) | ext));
    }
    c.load_system::<u64>(tr.base.wrapping_add(u64::from(offset)))
}

/// The stack pointer of privilege level `cpl` from the 64-bit TSS.
pub(crate) fn tss_rsp<C: Core>(c: &mut C, cpl: u8, ext: u32) -> Result<u64, Fault> {
    tss_stack(c, TSS_RSP0 + u32::from(cpl & 3) * 8, ext)
}
