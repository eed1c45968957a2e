//! Segment registers as the processor wants them before it enters a guest (SDM vol. 3C, 27.3.1.2), and back.
//!
//! It refuses more than processors check when they load a segment. What it cares about and no guest can see (accessed
//! bits, G of a limit that fits both ways, a task register before the first LTR) is put right here.

use crate::vmcs::{Fields, guest};
use x86_defs::{Segment, SegmentAttributes, SegmentIndex};

/// Access rights: unusable.
const UNUSABLE: u64 = 1 << 16;
const PRESENT: u16 = 1 << 7;
const CODE_OR_DATA: u16 = 1 << 4;
const LONG: u16 = 1 << 9;
const BIG: u16 = 1 << 10;
const GRANULAR: u16 = 1 << 11;
const ACCESSED: u16 = 1;
/// A busy 32-bit or 64-bit TSS, present.
const BUSY_TSS: u16 = 0x8B;
/// A read and write data segment for privilege level 3, as all are in virtual-8086 mode.
const VIRTUAL_8086: u16 = 0xF3;

/// What else decides what is allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// EFER.LMA.
    pub long: bool,
    /// RFLAGS.VM.
    pub virtual_8086: bool,
    /// Current privilege level.
    pub cpl: u8,
}

/// Bits of the rights: those of a descriptor's second word, without the limit's.
fn rights(attributes: u16) -> u64 {
    u64::from(attributes & 0xFF) | u64::from(attributes & 0xF00) << 4
}

fn attributes(rights: u64) -> SegmentAttributes {
    SegmentAttributes((rights & 0xFF) as u16 | (rights >> 4 & 0xF00) as u16)
}

/// Limit, and the attributes with the G that it has.
fn with_granularity(limit: u32, attributes: u16) -> (u32, u16) {
    match (limit > 0xF_FFFF, limit & 0xFFF == 0xFFF) {
        (false, false) => (limit, attributes & !GRANULAR),
        (true, _) => (limit | 0xFFF, attributes | GRANULAR),
        (false, true) => (limit, attributes),
    }
}

/// Segment register `index` as it is entered with.
fn entered(index: usize, segment: &Segment, mode: Mode) -> (Segment, u64) {
    let mut s = *segment;
    let (cs, ss) = (index == SegmentIndex::Cs as usize, index == SegmentIndex::Ss as usize);
    if mode.virtual_8086 {
        s.attributes.0 = VIRTUAL_8086;
        (s.base, s.limit) = (u64::from(s.selector) << 4, 0xFFFF);
        return (s, rights(VIRTUAL_8086));
    }
    let mut bits = s.attributes.0;
    // CPL is SS's DPL, usable or not.
    if ss {
        bits = bits & !0x60 | u16::from(mode.cpl & 3) << 5;
    }
    if s.unusable && !cs {
        return (s, rights(bits) | UNUSABLE);
    }
    bits |= ACCESSED | CODE_OR_DATA | PRESENT;
    if cs && mode.long && bits & LONG != 0 {
        bits &= !BIG;
    }
    // Bits 63:32 of these are not used, but looked at.
    if !matches!(index, i if i == SegmentIndex::Fs as usize || i == SegmentIndex::Gs as usize) {
        s.base &= 0xFFFF_FFFF;
    }
    (s.limit, bits) = with_granularity(s.limit, bits);
    (s, rights(bits))
}

fn write(fields: &mut impl Fields, n: u32, segment: &Segment, rights: u64) {
    fields.set(guest::selector(n), u64::from(segment.selector));
    fields.set(guest::limit(n), u64::from(segment.limit));
    fields.set(guest::rights(n), rights);
    fields.set(guest::base(n), segment.base);
}

fn read(fields: &impl Fields, n: u32) -> Segment {
    let rights = fields.get(guest::rights(n));
    Segment {
        selector: fields.get(guest::selector(n)) as u16,
        attributes: attributes(rights),
        limit: fields.get(guest::limit(n)) as u32,
        base: fields.get(guest::base(n)),
        unusable: rights & UNUSABLE != 0,
    }
}

/// Into the fields.
pub fn load(fields: &mut impl Fields, segments: &[Segment; 6], mode: Mode) {
    for (index, segment) in segments.iter().enumerate() {
        let (segment, rights) = entered(index, segment, mode);
        write(fields, index as u32, &segment, rights);
    }
}

/// Out of the fields.
pub fn store(fields: &impl Fields, segments: &mut [Segment; 6]) {
    for (index, segment) in segments.iter_mut().enumerate() {
        *segment = read(fields, index as u32);
    }
}

/// LDTR: without a descriptor of an LDT it is unusable.
pub fn load_ldtr(fields: &mut impl Fields, ldtr: &Segment) {
    let usable = !ldtr.unusable && ldtr.attributes.0 & 0x9F == 0x82 && ldtr.selector & 4 == 0;
    let (limit, bits) = with_granularity(ldtr.limit, ldtr.attributes.0);
    let rights = rights(bits) | if usable { 0 } else { UNUSABLE };
    write(fields, guest::LDTR, &Segment { limit, ..*ldtr }, rights);
}

/// LDTR as the guest left it.
pub fn ldtr(fields: &impl Fields) -> Segment {
    read(fields, guest::LDTR)
}

/// What stands in for a task register that the guest has not loaded.
fn stand_in(tr: &Segment) -> Segment {
    Segment { attributes: SegmentAttributes(BUSY_TSS), unusable: false, selector: tr.selector & !4, ..*tr }
}

/// The task register as it is entered with: it must be a busy TSS, in long mode a 64-bit one.
fn entered_tr(tr: &Segment, long: bool) -> Segment {
    let kind = tr.attributes.0 & 0x9F;
    let fits = !tr.unusable && (kind == 0x8B || kind == 0x83 && !long) && tr.selector & 4 == 0;
    let mut s = if fits { *tr } else { stand_in(tr) };
    let bits;
    (s.limit, bits) = with_granularity(s.limit, s.attributes.0);
    s.attributes.0 = bits;
    s
}

/// TR into the fields.
pub fn load_tr(fields: &mut impl Fields, tr: &Segment, long: bool) {
    let s = entered_tr(tr, long);
    write(fields, guest::TR, &s, rights(s.attributes.0));
}

/// TR as the guest left it; what stood in for `before` is not the guest's.
pub fn tr(fields: &impl Fields, before: &Segment, long: bool) -> Segment {
    let now = read(fields, guest::TR);
    if now == entered_tr(before, long) { *before } else { now }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmcs::tests::Table;

    fn segment(attributes: u16, limit: u32) -> Segment {
        Segment {
            selector: 8,
            attributes: SegmentAttributes(attributes),
            limit,
            base: 0x1_0000_2000,
            unusable: false,
        }
    }

    const LONG_MODE: Mode = Mode { long: true, virtual_8086: false, cpl: 0 };

    fn loaded(index: usize, s: Segment, mode: Mode) -> (Table, Segment) {
        let mut segments = [segment(0xC93, u32::MAX); 6];
        segments[index] = s;
        let mut table = Table::default();
        load(&mut table, &segments, mode);
        store(&table, &mut segments);
        (table, segments[index])
    }

    #[test]
    fn rights_are_a_descriptors() {
        let (table, back) = loaded(1, segment(0xA9B, u32::MAX), LONG_MODE);
        assert_eq!(table.get(guest::rights(1)), 0xA09B);
        assert_eq!((back.attributes.0, back.base), (0xA9B, 0x2000));
        let (_, fs) = loaded(4, segment(0xC93, u32::MAX), LONG_MODE);
        assert_eq!(fs, segment(0xC93, u32::MAX), "FS and GS have all of their base");
    }

    #[test]
    fn the_privilege_level_is_ss_dpl() {
        let null = Segment { selector: 0, unusable: true, ..segment(0, 0) };
        let (table, back) = loaded(2, null, Mode { cpl: 3, ..LONG_MODE });
        assert_eq!(table.get(guest::rights(2)), 1 << 16 | 0x60);
        assert!(back.unusable && back.attributes.dpl() == 3);
    }

    #[test]
    fn what_the_processor_would_refuse_is_put_right() {
        // Not accessed; a limit that G says is too large; D beside L.
        let (_, back) = loaded(3, segment(0x892, 0x1234), LONG_MODE);
        assert_eq!((back.attributes.0, back.limit), (0x093, 0x1234));
        let (_, back) = loaded(3, segment(0x093, 0x12_3456), LONG_MODE);
        assert_eq!((back.attributes.0, back.limit), (0x893, 0x12_3FFF));
        let (_, back) = loaded(1, segment(0xE9B, u32::MAX), LONG_MODE);
        assert_eq!(back.attributes.0, 0xA9B);
        let mode = Mode { virtual_8086: true, long: false, cpl: 3 };
        let (_, back) = loaded(0, segment(0, 5), mode);
        assert_eq!((back.attributes.0, back.base, back.limit), (0xF3, 0x80, 0xFFFF));
    }

    #[test]
    fn a_task_register_that_was_not_loaded_stays_so() {
        let mut table = Table::default();
        let none = Segment { unusable: true, ..segment(0, 0xFFFF) };
        load_tr(&mut table, &none, true);
        assert_eq!(table.get(guest::rights(guest::TR)), 0x8B);
        assert_eq!(tr(&table, &none, true), none);
        table.set(guest::selector(guest::TR), 0x40);
        assert_eq!(tr(&table, &none, true).selector, 0x40);
        // A 16-bit TSS, kept into long mode.
        load_tr(&mut table, &segment(0x83, 0x2B), true);
        assert_eq!(table.get(guest::rights(guest::TR)), 0x8B);
        load_tr(&mut table, &segment(0x83, 0x2B), false);
        assert_eq!(table.get(guest::rights(guest::TR)), 0x83);
    }

    #[test]
    fn an_ldt_that_is_none_is_unusable() {
        let mut table = Table::default();
        load_ldtr(&mut table, &segment(0x82, 0xFFF));
        assert_eq!(table.get(guest::rights(guest::LDTR)), 0x82);
        assert!(!ldtr(&table).unusable);
        load_ldtr(&mut table, &segment(0, 0));
        assert!(ldtr(&table).unusable);
    }
}
