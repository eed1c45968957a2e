//! Descriptors in the GDT and LDT, and loads of data segments (SDM vol. 3, 3.4 and 5).
//!
//! Reads are supervisor reads whatever the CPL. Nothing here commits: loads return the new hidden part.

use crate::core::{Core, Fault};
use crate::mode::ModeKey;
use x86_defs::{Exception, Segment, SegmentAttributes, SegmentIndex};

/// System descriptor types (SDM vol. 3, table 3-2).
pub(crate) mod kind {
    pub const TSS16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT16: u8 = 6;
    pub const TRAP16: u8 = 7;
    pub const TSS32: u8 = 9;
    pub const TSS32_BUSY: u8 = 11;
    pub const CALL32: u8 = 12;
    pub const INTERRUPT32: u8 = 14;
    pub const TRAP32: u8 = 15;
    /// Turns an available TSS into a busy one.
    pub const BUSY: u8 = 2;
}

/// A descriptor as read from its table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// The selector that named it.
    pub selector: u16,
    /// Its 8 bytes.
    pub raw: u64,
    /// The following 8 bytes of a 16-byte system descriptor in IA-32e mode.
    pub upper: u64,
    /// Linear address of it.
    pub address: u64,
}

impl Descriptor {
    pub fn attributes(&self) -> SegmentAttributes {
        SegmentAttributes::from_descriptor_high((self.raw >> 32) as u32)
    }
    /// Type, if it is a system descriptor (LDT, TSS, gate).
    pub fn system_kind(&self) -> Option<u8> {
        let a = self.attributes();
        (!a.is_code_or_data()).then(|| a.kind())
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xFFFF | self.raw >> 32 & 0xF_0000) as u32;
        if self.attributes().granular() { limit << 12 | 0xFFF } else { limit }
    }
    pub fn base(&self) -> u64 {
        let low = self.raw >> 16 & 0xFF_FFFF | self.raw >> 32 & 0xFF00_0000;
        low | self.upper << 32
    }
    /// The error code that names it.
    pub fn error_code(&self) -> u32 {
        selector_error(self.selector)
    }
    /// The segment register after loading it; `rpl` becomes the selector's RPL.
    pub fn segment(&self, rpl: u8) -> Segment {
        Segment {
            selector: self.selector & !3 | u16::from(rpl),
            attributes: SegmentAttributes(self.attributes().0 | 1),
            limit: self.limit(),
            base: self.base(),
            unusable: false,
        }
    }
    /// A TSS or LDT in a register: as `segment`, without touching the type.
    pub fn system_segment(&self) -> Segment {
        Segment { selector: self.selector, attributes: self.attributes(), ..self.segment(0) }
    }
    /// Offset and selector of a call, interrupt or trap gate.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xFFFF | self.raw >> 32 & 0xFFFF_0000 | self.upper << 32
    }
}

/// A selector as an error code.
pub(crate) fn selector_error(selector: u16) -> u32 {
    u32::from(selector & !3)
}

/// Whether `selector` is null.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

/// Linear address of the `bytes` that `selector` names, if they are within the table.
fn place<C: Core>(c: &C, selector: u16, bytes: u32) -> Option<u64> {
    let cpu = c.cpu();
    let (base, limit) = if selector & 4 != 0 {
        if cpu.ldtr.unusable {
            return None;
        }
        (cpu.ldtr.base, cpu.ldtr.limit)
    } else {
        (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
    };
    let offset = u32::from(selector & !7);
    if offset + (bytes - 1) > limit {
        return None;
    }
    Some(wrap(c, base.wrapping_add(u64::from(offset))))
}

/// Linear addresses of system structures wrap at 4 GiB outside IA-32e mode.
pub(crate) fn wrap<C: Core>(c: &C, linear: u64) -> u64 {
    if c.cpu().long_mode_active() { linear } else { linear & 0xFFFF_FFFF }
}

/// The descriptor that `selector` names; `None` if null or beyond its table.
pub(crate) fn read<C: Core>(c: &mut C, selector: u16) -> Result<Option<Descriptor>, Fault> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(address) = place(c, selector, 8) else { return Ok(None) };
    let raw = c.load_system::<u64>(address)?;
    Ok(Some(Descriptor { selector, raw, upper: 0, address }))
}

/// The descriptor that `selector` (not null) names; `exception` with the selector (and `ext`) if it is
/// beyond its table.
pub(crate) fn fetch<C: Core>(
    c: &mut C,
    selector: u16,
    exception: Exception,
    ext: u32,
) -> Result<Descriptor, Fault> {
    match read(c, selector)? {
        Some(descriptor) => Ok(descriptor),
        None => Err(c.raise(exception, selector_error(selector) | ext)),
    }
}

/// Adds the upper half of a system descriptor in IA-32e mode; `None` if it is beyond the table or its
/// type field is not zero.
pub(crate) fn extend<C: Core>(c: &mut C, d: Descriptor) -> Result<Option<Descriptor>, Fault> {
    if !c.cpu().long_mode_active() {
        return Ok(Some(d));
    }
    if place(c, d.selector, 16).is_none() {
        return Ok(None);
    }
    let upper = c.load_system::<u64>(d.address.wrapping_add(8))?;
    if upper >> 40 & 0x1F != 0 {
        return Ok(None);
    }
    Ok(Some(Descriptor { upper: upper & 0xFFFF_FFFF, ..d }))
}

/// Sets the accessed bit of a code or data descriptor in memory, if it is clear.
pub(crate) fn mark_accessed<C: Core>(c: &mut C, d: &Descriptor) -> Result<(), Fault> {
    if d.raw >> 40 & 1 == 0 {
        c.store_system::<u8>(d.address.wrapping_add(5), (d.raw >> 40) as u8 | 1)?;
    }
    Ok(())
}

/// Sets or clears the busy bit of a TSS descriptor in memory.
pub(crate) fn set_busy<C: Core>(c: &mut C, address: u64, busy: bool) -> Result<(), Fault> {
    let access = c.load_system::<u8>(address.wrapping_add(5))?;
    let new = if busy { access | kind::BUSY } else { access & !kind::BUSY };
    c.store_system::<u8>(address.wrapping_add(5), new)
}

/// A null selector in a data segment register. SS keeps the privilege level as its DPL.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        attributes: SegmentAttributes(0xC93 | u16::from(dpl) << 5),
        limit: 0xFFFF_FFFF,
        base: 0,
        unusable: true,
    }
}

/// A segment register loaded in real or virtual-8086 mode.
pub(crate) fn real_segment<C: Core>(c: &C, index: SegmentIndex, selector: u16) -> Segment {
    let old = *c.cpu().segment(index);
    let base = u64::from(selector) << 4;
    if c.cpu().mode.has(ModeKey::V86) {
        return v86_segment(selector);
    }
    if old.unusable {
        let attributes = SegmentAttributes(0x93);
        return Segment { selector, attributes, limit: 0xFFFF, base, unusable: false };
    }
    // Limit and attributes stay: that is what "unreal" mode lives on.
    Segment { selector, base, ..old }
}

/// A segment of virtual-8086 mode.
pub(crate) fn v86_segment(selector: u16) -> Segment {
    let base = u64::from(selector) << 4;
    Segment { selector, attributes: SegmentAttributes(0xF3), limit: 0xFFFF, base, unusable: false }
}

/// Loads DS, ES, FS, GS or SS with all checks of the current mode.
pub(crate) fn load_segment<C: Core>(c: &mut C, index: SegmentIndex, selector: u16) -> Result<Segment, Fault> {
    let mode = c.cpu().mode;
    if !mode.has(ModeKey::PROTECTED) || mode.has(ModeKey::V86) {
        return Ok(real_segment(c, index, selector));
    }
    let cpl = c.cpu().cpl;
    if index == SegmentIndex::Ss {
        if is_null(selector) {
            // 64-bit kernels run without a stack segment.
            return if mode.is_long() && cpl < 3 && selector as u8 == cpl {
                Ok(null_segment(selector, cpl))
            } else {
                Err(c.gp(0))
            };
        }
        return load_stack_segment(c, selector, cpl, Exception::GeneralProtection, 0);
    }
    if is_null(selector) {
        return Ok(null_segment(selector, cpl));
    }
    let d = fetch(c, selector, Exception::GeneralProtection, 0)?;
    let a = d.attributes();
    let readable = a.is_code_or_data() && (!a.is_code() || a.readable_or_writable());
    let conforming = a.is_code() && a.conforming_or_expand_down();
    let rpl = (selector & 3) as u8;
    if !readable || !conforming && (rpl > a.dpl() || cpl > a.dpl()) {
        return Err(c.gp(d.error_code()));
    }
    if !a.present() {
        return Err(c.raise(Exception::SegmentNotPresent, d.error_code()));
    }
    mark_accessed(c, &d)?;
    Ok(d.segment(rpl))
}

/// Loads a stack segment for privilege level `cpl`: RPL and DPL must equal it. `exception` says how what is
/// wrong is reported (#GP, or #TS when the selector comes from a TSS).
pub(crate) fn load_stack_segment<C: Core>(
    c: &mut C,
    selector: u16,
    cpl: u8,
    exception: Exception,
    ext: u32,
) -> Result<Segment, Fault> {
    if is_null(selector) {
        return Err(c.raise(exception, ext));
    }
    let d = fetch(c, selector, exception, ext)?;
    let a = d.attributes();
    let writable = a.is_code_or_data() && !a.is_code() && a.readable_or_writable();
    if (selector & 3) as u8 != cpl || !writable || a.dpl() != cpl {
        return Err(c.raise(exception, d.error_code() | ext));
    }
    if !a.present() {
        return Err(c.raise(Exception::StackFault, d.error_code() | ext));
    }
    mark_accessed(c, &d)?;
    Ok(d.segment(cpl))
}
