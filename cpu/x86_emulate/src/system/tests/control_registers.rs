//! MOV CR, LMSW, SMSW, CLTS, XGETBV, XSETBV: what is allowed, and what changes with it.

use super::machine::*;
use crate::ModeKey;
use crate::core::PagingChange;
use crate::cpu::reg::*;
use x86_defs::control::*;
use x86_defs::cpuid::Feature;
use x86_defs::{Exception, SegmentIndex};

/// MOV CRn, RAX and MOV RAX, CRn.
fn to_cr(n: u8) -> [u8; 3] {
    [0x0F, 0x22, 0xC0 | n << 3]
}
fn from_cr(n: u8) -> [u8; 3] {
    [0x0F, 0x20, 0xC0 | n << 3]
}
const XSETBV: &[u8] = &[0x0F, 0x01, 0xD1];
const XGETBV: &[u8] = &[0x0F, 0x01, 0xD0];

#[track_caller]
fn refuses(mut m: Machine, cr: u8, value: u64) {
    m.cpu.gpr[RAX] = value;
    m.faults(&to_cr(cr), Exception::GeneralProtection, 0);
    assert!(m.changes.is_empty());
}
fn set(m: &mut Machine, cr: u8, value: u64) {
    m.cpu.gpr[RAX] = value;
    m.step(&to_cr(cr));
}

#[test]
fn only_in_ring_0_and_only_those_that_exist() {
    for n in [0, 2, 3, 4] {
        Machine::long(3).faults(&to_cr(n), Exception::GeneralProtection, 0);
        Machine::long(3).faults(&from_cr(n), Exception::GeneralProtection, 0);
    }
    for n in [1, 5, 6, 7] {
        Machine::long(0).faults(&to_cr(n), Exception::InvalidOpcode, 0);
        Machine::long(0).faults(&from_cr(n), Exception::InvalidOpcode, 0);
    }
}

#[test]
fn cr0_combinations() {
    let on = CR0_PE | CR0_PG | CR0_ET;
    refuses(Machine::long(0), 0, on & !CR0_PE);
    refuses(Machine::long(0), 0, on | CR0_NW);
    refuses(Machine::long(0), 0, on | 1 << 32);
    // 64-bit code cannot turn paging off.
    refuses(Machine::long(0), 0, CR0_PE);
    // Reserved bits in the lower half are ignored, ET is fixed.
    let mut m = Machine::long(0);
    set(&mut m, 0, 0x8000_0001 | 1 << 15);
    assert_eq!(m.cpu.cr0, on);
    assert_eq!(m.changes, [PagingChange::All], "WP was cleared");
    set(&mut m, 0, on | CR0_TS | CR0_EM | CR0_MP);
    assert!(m.cpu.mode.has(ModeKey::TS | ModeKey::EM | ModeKey::MP));
    assert_eq!(m.changes.len(), 1);
    m.step(&[0x0F, 0x06]); // clts
    assert!(!m.cpu.mode.has(ModeKey::TS));
    Machine::long(3).faults(&[0x0F, 0x06], Exception::GeneralProtection, 0);
}

#[test]
fn entering_and_leaving_ia_32e_mode() {
    let mut m = Machine::protected(0);
    set(&mut m, 0, CR0_PE);
    m.cpu.efer = EFER_LME;
    // Without PAE.
    m.cpu.gpr[RAX] = CR0_PE | CR0_PG;
    m.faults(&to_cr(0), Exception::GeneralProtection, 0);
    set(&mut m, 4, CR4_PAE);
    // From a code segment with L set.
    m.cpu.seg[1].attributes.0 |= 0x200;
    m.cpu.refresh();
    m.cpu.gpr[RAX] = CR0_PE | CR0_PG;
    m.faults(&to_cr(0), Exception::GeneralProtection, 0);
    m.cpu.seg[1].attributes.0 &= !0x200;
    // With a 16-bit TSS.
    m.cpu.tr.attributes.0 = 0x83;
    m.faults(&to_cr(0), Exception::GeneralProtection, 0);
    m.cpu.tr.attributes.0 = 0x8B;
    m.step(&to_cr(0));
    assert_eq!(m.cpu.efer, EFER_LME | EFER_LMA);
    assert!(m.cpu.mode.has(ModeKey::LMA) && !m.cpu.mode.is_long());
    // PAE stays on, LME too.
    refuses_in(&mut m, 4, 0);
    m.cpu.gpr[RCX] = 0xC000_0080;
    m.cpu.gpr[RAX] = 0;
    m.cpu.gpr[RDX] = 0;
    m.faults(&[0x0F, 0x30], Exception::GeneralProtection, 0);
    // Compatibility code may turn paging off again.
    set(&mut m, 0, CR0_PE);
    assert_eq!(m.cpu.efer, EFER_LME);
    assert!(!m.cpu.mode.has(ModeKey::LMA));
}

#[track_caller]
fn refuses_in(m: &mut Machine, cr: u8, value: u64) {
    m.cpu.gpr[RAX] = value;
    m.faults(&to_cr(cr), Exception::GeneralProtection, 0);
}

#[test]
fn protected_mode_on_and_off() {
    let mut m = Machine::real();
    set(&mut m, 0, CR0_PE);
    assert!(m.cpu.mode.has(ModeKey::PROTECTED));
    set(&mut m, 0, 0);
    assert!(!m.cpu.mode.has(ModeKey::PROTECTED));
    // LMSW can set PE and not clear it.
    m.cpu.gpr[RAX] = 0xFFFF;
    m.step(&[0x0F, 0x01, 0xF0]);
    assert_eq!(m.cpu.cr0 & 0xF, 0xF);
    m.cpu.gpr[RAX] = 0;
    m.step(&[0x0F, 0x01, 0xF0]);
    assert_eq!(m.cpu.cr0 & 0xF, CR0_PE);
    Machine::long(3).faults(&[0x0F, 0x01, 0xF0], Exception::GeneralProtection, 0);
}

#[test]
fn smsw_widths() {
    let mut m = Machine::long(3);
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x0F, 0x01, 0xE0]);
    assert_eq!(m.gpr(RAX), m.cpu.cr0);
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x66, 0x0F, 0x01, 0xE0]);
    assert_eq!(m.gpr(RAX), !0xFFFF | m.cpu.cr0 & 0xFFFF);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0xAA; 4]);
    m.step(&[0x0F, 0x01, 0x23]);
    assert_eq!(m.peek::<u32>(DATA), 0xAAAA_0000 | m.cpu.cr0 & 0xFFFF);
}

#[test]
fn cr3_with_and_without_pcids() {
    let mut m = Machine::long(0);
    set(&mut m, 3, 0x1234_5018);
    assert_eq!((m.cpu.cr3, m.changes.as_slice()), (0x1234_5018, &[PagingChange::Cr3 { keep: false }][..]));
    refuses(Machine::long(0), 3, 1 << 46);
    refuses(Machine::long(0), 3, 1 << 63);
    let mut m = Machine::long(0);
    m.cpu.cr4 |= CR4_PCIDE;
    set(&mut m, 3, 1 << 63 | 0x5007);
    assert_eq!((m.cpu.cr3, m.changes.as_slice()), (0x5007, &[PagingChange::Cr3 { keep: true }][..]));
    m.cpu.gpr[RAX] = 1 << 62;
    m.faults(&to_cr(3), Exception::GeneralProtection, 0);
}

#[test]
fn cr4_bits_follow_the_model() {
    for (feature, bit) in [
        (Feature::Vme, CR4_VME),
        (Feature::Vme, CR4_PVI),
        (Feature::De, CR4_DE),
        (Feature::Umip, CR4_UMIP),
        (Feature::Fsgsbase, CR4_FSGSBASE),
        (Feature::Pcid, CR4_PCIDE),
        (Feature::Xsave, CR4_OSXSAVE),
        (Feature::Smep, CR4_SMEP),
        (Feature::Smap, CR4_SMAP),
    ] {
        let mut m = Machine::long(0);
        let value = m.cpu.cr4 | bit;
        set(&mut m, 4, value);
        assert_eq!(m.cpu.cr4, value);
        let mut m = Machine::long(0);
        m.features.remove(feature);
        refuses(m, 4, value);
    }
    // VMXE, SMXE, LA57, PKE, reserved.
    for bit in [12, 13, 14, 15, 22, 23, 31, 32, 63] {
        let m = Machine::long(0);
        let value = m.cpu.cr4 | 1 << bit;
        refuses(m, 4, value);
    }
}

#[test]
fn pcids_need_ia_32e_mode_and_pcid_0() {
    let mut m = Machine::long(0);
    m.cpu.cr3 = 0x1001;
    let value = m.cpu.cr4 | CR4_PCIDE;
    refuses(m, 4, value);
    let mut m = Machine::protected(0);
    m.cpu.cr4 |= CR4_PAE;
    refuses(m, 4, CR4_PAE | CR4_PCIDE);
    // Paging stays on while PCIDs are.
    let mut m = Machine::long(0);
    set(&mut m, 4, value);
    m.set_segment(SegmentIndex::Cs, CODE0_32);
    m.cpu.refresh();
    m.changes.clear();
    refuses(m, 0, CR0_PE);
}

#[test]
fn what_makes_translations_stale() {
    let bits = [
        (CR4_PGE, true),
        (CR4_SMEP, true),
        (CR4_SMAP, true),
        (CR4_PCIDE, true),
        (CR4_OSXSAVE, false),
        (CR4_UMIP, false),
        (CR4_TSD, false),
        (CR4_FSGSBASE, false),
    ];
    for (bit, stale) in bits {
        let mut m = Machine::long(0);
        let value = m.cpu.cr4 ^ bit;
        set(&mut m, 4, value);
        assert_eq!(m.changes.is_empty(), !stale, "{bit:#x}");
    }
}

#[test]
fn pae_loads_the_page_directory_pointers() {
    let table = DATA;
    let mut m = Machine::protected(0);
    m.poke(table, &[0x01, 0x10, 0, 0, 0, 0, 0, 0]);
    // Not present: anything goes.
    m.poke(table + 8, &(!1u64).to_le_bytes());
    m.cpu.cr3 = table;
    set(&mut m, 4, CR4_PAE);
    assert_eq!(m.cpu.pdpte, [0x1001, !1, 0, 0]);
    // Reserved bits in a present one: nothing is loaded.
    for bit in [1, 2, 5, 8, 46, 63] {
        m.poke(table + 16, &(1u64 | 1 << bit).to_le_bytes());
        m.cpu.gpr[RAX] = table;
        m.faults(&to_cr(3), Exception::GeneralProtection, 0);
        assert_eq!(m.cpu.pdpte[2], 0);
    }
    // PWT, PCD and the ignored bits are no obstacle.
    m.poke(table + 16, &(0xE19u64 | 0x2000).to_le_bytes());
    set(&mut m, 3, table);
    assert_eq!(m.cpu.pdpte[2], 0x2E19);
}

#[test]
fn cr2_and_cr8() {
    let mut m = Machine::long(0);
    set(&mut m, 2, 0xFFFF_1234_5678_9ABC);
    m.step(&from_cr(2));
    assert_eq!(m.gpr(RAX), 0xFFFF_1234_5678_9ABC);
    m.cpu.gpr[RAX] = 9;
    m.step(&[0x44, 0x0F, 0x22, 0xC0]);
    assert_eq!(m.tpr, 0x90);
    m.cpu.gpr[RAX] = 0;
    m.step(&[0x44, 0x0F, 0x20, 0xC0]);
    assert_eq!(m.gpr(RAX), 9);
    m.cpu.gpr[RAX] = 16;
    m.faults(&[0x44, 0x0F, 0x22, 0xC0], Exception::GeneralProtection, 0);
}

#[test]
fn xcr0() {
    let gp = Exception::GeneralProtection;
    let mut m = Machine::long(0);
    m.faults(XSETBV, Exception::InvalidOpcode, 0);
    m.faults(XGETBV, Exception::InvalidOpcode, 0);
    m.cpu.cr4 |= CR4_OSXSAVE;
    m.cpu.refresh();
    for (ecx, eax, edx) in [(0, 0, 0), (0, 6, 0), (0, 5, 0), (0, 9, 0), (0, 7, 1), (1, 7, 0)] {
        (m.cpu.gpr[RCX], m.cpu.gpr[RAX], m.cpu.gpr[RDX]) = (ecx, eax, edx);
        m.faults(XSETBV, gp, 0);
    }
    (m.cpu.gpr[RCX], m.cpu.gpr[RAX], m.cpu.gpr[RDX]) = (0, 7, 0);
    m.step(XSETBV);
    assert!(m.cpu.xcr0 == 7 && m.cpu.mode.has(ModeKey::AVX));
    (m.cpu.gpr[RAX], m.cpu.gpr[RDX]) = (!0, !0);
    m.step(XGETBV);
    assert_eq!((m.gpr(RAX), m.gpr(RDX)), (7, 0));
    // ECX = 1: what is in use.
    m.cpu.x.x87 = crate::cpu::X87::default();
    m.cpu.gpr[RCX] = 1;
    m.step(XGETBV);
    assert_eq!(m.gpr(RAX), 0);
    m.cpu.x.ymm[15][3] = 1;
    m.step(XGETBV);
    assert_eq!(m.gpr(RAX), 4);
    m.cpu.gpr[RCX] = 2;
    m.faults(XGETBV, gp, 0);
    // Without AVX in the model its bit is reserved; ring 3 may read.
    let mut m = Machine::long(3);
    m.cpu.cr4 |= CR4_OSXSAVE;
    m.cpu.refresh();
    m.cpu.gpr[RAX] = 7;
    m.faults(XSETBV, gp, 0);
    m.step(XGETBV);
    m.features.remove(Feature::Avx);
    m.cpu.cpl = 0;
    m.cpu.gpr[RAX] = 7;
    m.faults(XSETBV, gp, 0);
}
