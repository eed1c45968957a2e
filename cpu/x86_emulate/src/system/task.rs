//! Hardware task switches by JMP, CALL, IRET and task gates, 16- and 32-bit (SDM vol. 3, chapter 7).
//!
//! The outgoing state is saved and the new task's registers read before anything is committed; from then on
//! a fault happens in the new task, as the manual says (7.3, steps 8 to 11): `exc.is_trap` marks it, and
//! `gpr[RIP]` is the new task's.

use super::descriptor::{self, Descriptor, kind};
use super::interrupts::Event;
use super::iret::is_busy_tss;
use super::stack::Stack;
use crate::core::{Core, Fault, PagingChange};
use crate::cpu::{RIP, reg::RSP};
use x86_defs::control::{CR0_PG, CR0_TS, CR4_PAE, DR6_BT};
use x86_defs::{Exception, Segment, SegmentIndex, flags};

/// What switches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Jump,
    Call,
    /// An interrupt or exception through a task gate.
    Interrupt,
    /// IRET with NT.
    Return,
}

/// The registers that a TSS holds.
struct Image {
    cr3: Option<u64>,
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    /// ES, CS, SS, DS, FS, GS.
    selectors: [u16; 6],
    ldt: u16,
    debug_trap: bool,
}

/// Offsets in a TSS and width of its registers.
struct Layout {
    bytes: u8,
    limit: u32,
    ip: u64,
    selectors: u64,
    selector_count: usize,
    ldt: u64,
}

const TSS16: Layout =
    Layout { bytes: 2, limit: 0x2B, ip: 0x0E, selectors: 0x22, selector_count: 4, ldt: 0x2A };
const TSS32: Layout =
    Layout { bytes: 4, limit: 0x67, ip: 0x20, selectors: 0x48, selector_count: 6, ldt: 0x60 };
const TSS32_CR3: u64 = 0x1C;
const TSS32_TRAP: u64 = 0x64;

fn layout(tss: &Segment) -> &'static Layout {
    if tss.attributes.kind() & 8 != 0 { &TSS32 } else { &TSS16 }
}

/// An interrupt or exception through the task gate with selector `selector`.
pub(super) fn interrupt<C: Core>(c: &mut C, selector: u16, event: &Event) -> Result<(), Fault> {
    let ext = event.ext();
    let d = tss_of_gate(c, selector, ext)?;
    if event.resume {
        // The faulting instruction is retried when the task is resumed.
        c.cpu_mut().rflags |= flags::RF;
    }
    let switched = exchange(c, &d, Reason::Interrupt, event.return_ip, ext);
    if switched.is_err() {
        c.cpu_mut().rflags &= !flags::RF;
    }
    switched?;
    finish(c, ext)?;
    if let Some(code) = event.error_code {
        let bytes = layout(&c.cpu().tr).bytes;
        let mut stack = Stack::current(c, ext);
        if stack.push(c, u64::from(code), bytes).is_err() {
            c.cpu_mut().exc.is_trap = true;
            return Err(Fault);
        }
        c.cpu_mut().gpr[RSP] = stack.sp;
    }
    Ok(())
}

/// JMP or CALL to a task gate.
pub(super) fn switch_through_gate<C: Core>(
    c: &mut C,
    selector: u16,
    reason: Reason,
    next_ip: u64,
) -> Result<(), Fault> {
    let d = tss_of_gate(c, selector, 0)?;
    exchange(c, &d, reason, next_ip, 0)?;
    finish(c, 0)
}

/// The TSS that a task gate names: #GP or #NP with its selector.
fn tss_of_gate<C: Core>(c: &mut C, selector: u16, ext: u32) -> Result<Descriptor, Fault> {
    let error = descriptor::selector_error(selector) | ext;
    if selector & 4 != 0 || descriptor::is_null(selector) {
        return Err(c.gp(error));
    }
    let d = descriptor::fetch(c, selector, Exception::GeneralProtection, ext)?;
    if !matches!(d.system_kind(), Some(kind::TSS16 | kind::TSS32)) {
        return Err(c.gp(error));
    }
    if !d.attributes().present() {
        return Err(c.raise(Exception::SegmentNotPresent, error));
    }
    Ok(d)
}

/// JMP or CALL to the TSS `d`, whose privilege was checked.
pub(super) fn switch<C: Core>(c: &mut C, d: &Descriptor, reason: Reason, next_ip: u64) -> Result<(), Fault> {
    if d.selector & 4 != 0 || is_busy_tss(d) {
        return Err(c.gp(d.error_code()));
    }
    if !d.attributes().present() {
        return Err(c.raise(Exception::SegmentNotPresent, d.error_code()));
    }
    exchange(c, d, reason, next_ip, 0)?;
    finish(c, 0)
}

/// IRET with NT: back to the task that the current TSS links to.
pub(super) fn return_to_previous<C: Core>(c: &mut C, next_ip: u64) -> Result<(), Fault> {
    let tr = c.cpu().tr;
    let selector = c.load_system::<u16>(descriptor::wrap(c, tr.base))?;
    let error = descriptor::selector_error(selector);
    if selector & 4 != 0 || descriptor::is_null(selector) {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    let d = descriptor::fetch(c, selector, Exception::InvalidTss, 0)?;
    if !is_busy_tss(&d) {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    if !d.attributes().present() {
        return Err(c.raise(Exception::SegmentNotPresent, error));
    }
    exchange(c, &d, Reason::Return, next_ip, 0)?;
    finish(c, 0)
}

/// Saves the old task, loads the new one's registers and commits them with TR, CR3 and selectors; the
/// hidden parts of the segments are loaded by [`finish`].
fn exchange<C: Core>(c: &mut C, d: &Descriptor, reason: Reason, next_ip: u64, ext: u32) -> Result<(), Fault> {
    let new = d.system_segment();
    let to = layout(&new);
    if new.limit < to.limit {
        return Err(c.raise(Exception::InvalidTss, d.error_code() | ext));
    }
    let old = c.cpu().tr;
    let from = layout(&old);
    if old.limit < from.limit {
        return Err(c.raise(Exception::InvalidTss, descriptor::selector_error(old.selector) | ext));
    }
    let image = read_image(c, &new)?;
    save_image(c, &old, reason, next_ip)?;
    if matches!(reason, Reason::Call | Reason::Interrupt) {
        c.store_system::<u16>(descriptor::wrap(c, new.base), old.selector)?;
    }
    if matches!(reason, Reason::Jump | Reason::Return) {
        let address = c.cpu().gdtr.base.wrapping_add(u64::from(old.selector & !7));
        let address = descriptor::wrap(c, address);
        descriptor::set_busy(c, address, false)?;
    }
    if reason != Reason::Return {
        descriptor::set_busy(c, d.address, true)?;
    }
    let new =
        Segment { attributes: x86_defs::SegmentAttributes(new.attributes.0 | u16::from(kind::BUSY)), ..new };
    commit(c, new, &image, reason);
    Ok(())
}

fn read_image<C: Core>(c: &mut C, tss: &Segment) -> Result<Image, Fault> {
    let layout = layout(tss);
    let step = u64::from(layout.bytes);
    let at = |c: &C, offset: u64| descriptor::wrap(c, tss.base.wrapping_add(offset));
    let register = |c: &mut C, offset: u64| -> Result<u64, Fault> {
        let linear = at(c, offset);
        if layout.bytes == 4 {
            Ok(u64::from(c.load_system::<u32>(linear)?))
        } else {
            // The upper halves of a 16-bit task's registers are undefined; processors set them.
            Ok(u64::from(c.load_system::<u16>(linear)?) | 0xFFFF_0000)
        }
    };
    let ip = register(c, layout.ip)? & if layout.bytes == 2 { 0xFFFF } else { u64::MAX };
    let flags = register(c, layout.ip + step)? & if layout.bytes == 2 { 0xFFFF } else { u64::MAX };
    let mut gpr = [0; 8];
    for (i, r) in gpr.iter_mut().enumerate() {
        *r = register(c, layout.ip + step * (2 + i as u64))?;
    }
    let mut selectors = [0; 6];
    for (i, s) in selectors.iter_mut().take(layout.selector_count).enumerate() {
        let linear = at(c, layout.selectors + step * i as u64);
        *s = c.load_system::<u16>(linear)?;
    }
    let linear = at(c, layout.ldt);
    let ldt = c.load_system::<u16>(linear)?;
    let (mut cr3, mut debug_trap) = (None, false);
    if layout.bytes == 4 {
        cr3 = Some(register(c, TSS32_CR3)?);
        let linear = at(c, TSS32_TRAP);
        debug_trap = c.load_system::<u16>(linear)? & 1 != 0;
    }
    Ok(Image { cr3, ip, flags, gpr, selectors, ldt, debug_trap })
}

fn save_image<C: Core>(c: &mut C, tss: &Segment, reason: Reason, next_ip: u64) -> Result<(), Fault> {
    let layout = layout(tss);
    let step = u64::from(layout.bytes);
    let cpu = c.cpu();
    let mut image = cpu.rflags_all();
    if reason == Reason::Return {
        image &= !flags::NT;
    }
    let mut registers = [0; 10];
    registers[0] = next_ip;
    registers[1] = image;
    registers[2..].copy_from_slice(&cpu.gpr[..8]);
    let selectors: [u16; 6] = core::array::from_fn(|i| cpu.seg[i].selector);
    for (i, value) in registers.into_iter().enumerate() {
        let linear = descriptor::wrap(c, tss.base.wrapping_add(layout.ip + step * i as u64));
        if layout.bytes == 4 {
            c.store_system::<u32>(linear, value as u32)?;
        } else {
            c.store_system::<u16>(linear, value as u16)?;
        }
    }
    for (i, selector) in selectors.into_iter().take(layout.selector_count).enumerate() {
        let linear = descriptor::wrap(c, tss.base.wrapping_add(layout.selectors + step * i as u64));
        c.store_system::<u16>(linear, selector)?;
    }
    Ok(())
}

fn commit<C: Core>(c: &mut C, tr: Segment, image: &Image, reason: Reason) {
    let cpu = c.cpu_mut();
    cpu.tr = tr;
    cpu.cr0 |= CR0_TS;
    // Local breakpoints belong to the old task.
    cpu.dr[7] &= !0x155;
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    cpu.gpr[RIP] = image.ip;
    let nested = matches!(reason, Reason::Call | Reason::Interrupt);
    cpu.set_rflags_all(image.flags & flags::ALL | if nested { flags::NT } else { 0 });
    if image.debug_trap {
        cpu.pending_debug |= DR6_BT;
    }
    for (i, selector) in image.selectors.iter().enumerate() {
        cpu.seg[i] = Segment { selector: *selector, unusable: true, ..Segment::default() };
    }
    cpu.ldtr = Segment { selector: image.ldt, unusable: true, ..Segment::default() };
    cpu.cpl = (image.selectors[SegmentIndex::Cs as usize] & 3) as u8;
    if cpu.rflags & flags::VM != 0 {
        cpu.cpl = 3;
    }
    let paging = cpu.cr0 & CR0_PG != 0;
    if let (Some(cr3), true) = (image.cr3, paging) {
        cpu.cr3 = cr3;
        if cpu.cr4 & CR4_PAE != 0 {
            let base = cr3 & 0xFFFF_FFE0;
            let entries = core::array::from_fn(|i| c.load_physical(base + i as u64 * 8));
            c.cpu_mut().pdpte = entries;
        }
        c.paging_changed(PagingChange::Cr3 { keep: false });
    }
    c.cpu_mut().refresh();
}

/// Loads LDTR and the segments in the new task: #TS, #NP or #SS with the selector.
fn finish<C: Core>(c: &mut C, ext: u32) -> Result<(), Fault> {
    let done = load_segments(c, ext);
    if done.is_err() {
        c.cpu_mut().exc.is_trap = true;
    }
    done
}

fn load_segments<C: Core>(c: &mut C, ext: u32) -> Result<(), Fault> {
    load_ldt(c, ext)?;
    let selectors: [u16; 6] = core::array::from_fn(|i| c.cpu().seg[i].selector);
    if c.cpu().rflags & flags::VM != 0 {
        let cpu = c.cpu_mut();
        for (segment, selector) in cpu.seg.iter_mut().zip(selectors) {
            *segment = descriptor::v86_segment(selector);
        }
        cpu.refresh();
        return Ok(());
    }
    let cpl = c.cpu().cpl;
    let code = load_code(c, selectors[SegmentIndex::Cs as usize], ext)?;
    c.cpu_mut().seg[SegmentIndex::Cs as usize] = code;
    c.cpu_mut().refresh();
    let ss = selectors[SegmentIndex::Ss as usize];
    let stack = descriptor::load_stack_segment(c, ss, cpl, Exception::InvalidTss, ext)?;
    c.cpu_mut().seg[SegmentIndex::Ss as usize] = stack;
    c.cpu_mut().refresh();
    for index in [SegmentIndex::Ds, SegmentIndex::Es, SegmentIndex::Fs, SegmentIndex::Gs] {
        let segment = load_data(c, selectors[index as usize], cpl, ext)?;
        c.cpu_mut().seg[index as usize] = segment;
    }
    c.cpu_mut().refresh();
    let cpu = c.cpu();
    if cpu.gpr[RIP] > u64::from(cpu.segment(SegmentIndex::Cs).limit) {
        return Err(c.gp(ext));
    }
    Ok(())
}

fn load_ldt<C: Core>(c: &mut C, ext: u32) -> Result<(), Fault> {
    let selector = c.cpu().ldtr.selector;
    if descriptor::is_null(selector) {
        return Ok(());
    }
    let error = descriptor::selector_error(selector) | ext;
    if selector & 4 != 0 {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    let d = descriptor::fetch(c, selector, Exception::InvalidTss, ext)?;
    if d.system_kind() != Some(kind::LDT) || !d.attributes().present() {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    c.cpu_mut().ldtr = d.system_segment();
    Ok(())
}

fn load_code<C: Core>(c: &mut C, selector: u16, ext: u32) -> Result<Segment, Fault> {
    let error = descriptor::selector_error(selector) | ext;
    if descriptor::is_null(selector) {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    let d = descriptor::fetch(c, selector, Exception::InvalidTss, ext)?;
    let (a, rpl) = (d.attributes(), (selector & 3) as u8);
    let level_fits = if a.conforming_or_expand_down() { a.dpl() <= rpl } else { a.dpl() == rpl };
    if !a.is_code() || !level_fits {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, error));
    }
    descriptor::mark_accessed(c, &d)?;
    Ok(d.segment(rpl))
}

fn load_data<C: Core>(c: &mut C, selector: u16, cpl: u8, ext: u32) -> Result<Segment, Fault> {
    if descriptor::is_null(selector) {
        return Ok(descriptor::null_segment(selector, cpl));
    }
    let error = descriptor::selector_error(selector) | ext;
    let d = descriptor::fetch(c, selector, Exception::InvalidTss, ext)?;
    let (a, rpl) = (d.attributes(), (selector & 3) as u8);
    let readable = a.is_code_or_data() && (!a.is_code() || a.readable_or_writable());
    let conforming = a.is_code() && a.conforming_or_expand_down();
    if !readable || !conforming && (rpl > a.dpl() || cpl > a.dpl()) {
        return Err(c.raise(Exception::InvalidTss, error));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, error));
    }
    descriptor::mark_accessed(c, &d)?;
    Ok(d.segment(rpl))
}
