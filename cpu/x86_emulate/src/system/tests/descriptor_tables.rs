//! LGDT, SGDT, LLDT, LTR, SLDT, STR, LAR, LSL, VERR, VERW, ARPL.

use super::machine::*;
use crate::cpu::reg::*;
use x86_defs::control::*;
use x86_defs::flags::ZF;
use x86_defs::{DescriptorTable, Exception, SegmentIndex};

const LGDT_RBX: &[u8] = &[0x0F, 0x01, 0x13];
const LIDT_RBX: &[u8] = &[0x0F, 0x01, 0x1B];
const SGDT_RBX: &[u8] = &[0x0F, 0x01, 0x03];
const SIDT_RBX: &[u8] = &[0x0F, 0x01, 0x0B];
const LLDT_AX: &[u8] = &[0x0F, 0x00, 0xD0];
const LTR_AX: &[u8] = &[0x0F, 0x00, 0xD8];

#[test]
fn tables_are_loaded_and_stored() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0x34, 0x12, 0x78, 0x56, 0x34, 0x12, 0x00, 0x80, 0xFF, 0xFF]);
    let table = DescriptorTable { base: 0xFFFF_8000_1234_5678, limit: 0x1234 };
    m.step(LGDT_RBX);
    m.step(LIDT_RBX);
    assert_eq!((m.cpu.gdtr, m.cpu.idtr), (table, table));
    m.poke(DATA, &[0; 10]);
    m.step(SGDT_RBX);
    assert_eq!(m.peek::<u64>(DATA + 2), table.base);
    m.poke(DATA, &[0; 10]);
    m.step(SIDT_RBX);
    assert_eq!((m.peek::<u16>(DATA), m.peek::<u64>(DATA + 2)), (0x1234, table.base));
    // A non-canonical base.
    m.poke(DATA + 2, &(1u64 << 47).to_le_bytes());
    m.faults(LGDT_RBX, Exception::GeneralProtection, 0);
    // 16-bit operand size: 24 bits of base are loaded, 32 stored.
    let mut m = Machine::protected(0);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0xFF, 0xFF, 0x78, 0x56, 0x34, 0x12]);
    m.step(&[0x66, 0x0F, 0x01, 0x13]);
    assert_eq!(m.cpu.gdtr, DescriptorTable { base: 0x34_5678, limit: 0xFFFF });
    m.cpu.gdtr.base = 0x1234_5678;
    m.poke(DATA + 6, &[0xAA; 4]);
    m.step(&[0x66, 0x0F, 0x01, 0x03]);
    assert_eq!((m.peek::<u32>(DATA + 2), m.peek::<u32>(DATA + 6)), (0x1234_5678, 0xAAAA_AAAA));
}

#[test]
fn privilege_and_umip() {
    let gp = Exception::GeneralProtection;
    for code in [LGDT_RBX, LIDT_RBX, LLDT_AX, LTR_AX] {
        let mut m = Machine::long(3);
        m.cpu.gpr[RBX] = DATA;
        m.faults(code, gp, 0);
    }
    // SGDT, SIDT, SLDT, STR, SMSW.
    for code in [SGDT_RBX, SIDT_RBX, &[0x0F, 0x00, 0xC0], &[0x0F, 0x00, 0xC8], &[0x0F, 0x01, 0xE0]] {
        let mut m = Machine::long(3);
        m.cpu.gpr[RBX] = DATA;
        m.step(code);
        m.cpu.cr4 |= CR4_UMIP;
        m.cpu.refresh();
        m.faults(code, gp, 0);
        let mut m = Machine::long(0);
        m.cpu.gpr[RBX] = DATA;
        m.cpu.cr4 |= CR4_UMIP;
        m.cpu.refresh();
        m.step(code);
    }
}

#[test]
fn lldt() {
    use Exception::*;
    for long in [true, false] {
        let machine = || if long { Machine::long(0) } else { Machine::protected(0) };
        let mut m = machine();
        m.cpu.gpr[RAX] = u64::from(LDTR);
        m.step(LLDT_AX);
        assert_eq!((m.cpu.ldtr.base, m.cpu.ldtr.limit, m.cpu.ldtr.unusable), (LDT, 0xFF, false));
        m.cpu.gpr[RAX] = 0;
        m.step(LLDT_AX);
        assert!(m.cpu.ldtr.unusable);
        for (selector, exception, code) in [
            (0x0C, GeneralProtection, 0x0C),
            (BEYOND, GeneralProtection, BEYOND),
            (DATA0, GeneralProtection, DATA0),
            (TR, GeneralProtection, TR),
            (SLOT_A, SegmentNotPresent, SLOT_A),
        ] {
            let mut m = machine();
            m.set_descriptor(SLOT_A, segment(LDT as u32, 0xFF, 0x002));
            m.cpu.gpr[RAX] = u64::from(selector);
            m.faults(LLDT_AX, exception, u32::from(code));
        }
    }
    // Bases of 64 bits in IA-32e mode.
    let mut m = Machine::long(0);
    m.poke(GDT + u64::from(LDTR) + 8, &0xFFFF_8000u32.to_le_bytes());
    m.cpu.gpr[RAX] = u64::from(LDTR);
    m.step(LLDT_AX);
    assert_eq!(m.cpu.ldtr.base, 0xFFFF_8000_0000_0000 | LDT);
    m.poke(GDT + u64::from(LDTR) + 8, &0x8000u32.to_le_bytes());
    m.faults(LLDT_AX, GeneralProtection, u32::from(LDTR));
    m.poke(GDT + u64::from(LDTR) + 8, &[0, 0, 0, 0, 0, 1]);
    m.faults(LLDT_AX, GeneralProtection, u32::from(LDTR));
}

#[test]
fn ltr_makes_the_tss_busy() {
    use Exception::*;
    for long in [true, false] {
        let machine = || {
            let mut m = if long { Machine::long(0) } else { Machine::protected(0) };
            m.set_descriptor(TR, segment(TSS as u32, 0x67, 0x089));
            m
        };
        let mut m = machine();
        m.cpu.gpr[RAX] = u64::from(TR);
        m.step(LTR_AX);
        assert_eq!(m.descriptor(TR), segment(TSS as u32, 0x67, 0x08B));
        assert_eq!((m.cpu.tr.selector, m.cpu.tr.base, m.cpu.tr.attributes.kind()), (TR, TSS, 11));
        // Busy already.
        m.faults(LTR_AX, GeneralProtection, u32::from(TR));
        for (selector, exception, code) in [
            (0, GeneralProtection, 0),
            (3, GeneralProtection, 0),
            (TR | 4, GeneralProtection, TR | 4),
            (BEYOND, GeneralProtection, BEYOND),
            (DATA0, GeneralProtection, DATA0),
            (LDTR, GeneralProtection, LDTR),
            (SLOT_A, SegmentNotPresent, SLOT_A),
        ] {
            let mut m = machine();
            m.set_descriptor(SLOT_A, segment(TSS as u32, 0x67, 0x009));
            m.cpu.gpr[RAX] = u64::from(selector);
            m.faults(LTR_AX, exception, u32::from(code));
        }
        // A 16-bit TSS only outside IA-32e mode.
        let mut m = machine();
        m.set_descriptor(SLOT_A, segment(TSS as u32, 0x2B, 0x081));
        m.cpu.gpr[RAX] = u64::from(SLOT_A);
        if long {
            m.faults(LTR_AX, GeneralProtection, u32::from(SLOT_A));
        } else {
            m.step(LTR_AX);
            assert_eq!(m.cpu.tr.attributes.kind(), 3);
        }
    }
}

#[test]
fn sldt_and_str_by_width() {
    let mut m = Machine::long(0);
    m.cpu.ldtr.selector = 0x1234;
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x0F, 0x00, 0xC0]); // sldt eax
    assert_eq!(m.gpr(RAX), 0x1234);
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x66, 0x0F, 0x00, 0xC8]); // str ax
    assert_eq!(m.gpr(RAX), !0xFFFF | u64::from(TR));
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0xAA; 8]);
    m.step(&[0x0F, 0x00, 0x0B]); // str [rbx]
    assert_eq!(m.peek::<u32>(DATA), 0xAAAA_0000 | u64::from(TR));
}

/// `insn` EAX, ECX for `selector` at `cpl`: the value, if ZF says that there is one.
fn inspect(m: &mut Machine, opcode: u8, selector: u16) -> Option<u64> {
    m.cpu.gpr[RAX] = 0xDEAD;
    m.cpu.gpr[RCX] = u64::from(selector);
    m.cpu.flags.replace(ZF, 0);
    m.step(&[0x0F, opcode, 0xC1]);
    if m.cpu.rflags_all() & ZF != 0 {
        Some(m.gpr(RAX))
    } else {
        assert_eq!(m.gpr(RAX), 0xDEAD);
        None
    }
}
const LAR: u8 = 2;
const LSL: u8 = 3;

#[test]
fn lar_and_lsl() {
    for long in [true, false] {
        let at = |cpl| if long { Machine::long(cpl) } else { Machine::protected(cpl) };
        let mut m = at(0);
        assert_eq!(inspect(&mut m, LAR, DATA0), Some(0x00CF_9300));
        assert_eq!(inspect(&mut m, LSL, DATA0), Some(0xFFFF_FFFF));
        assert_eq!(inspect(&mut m, LSL, CODE0_16), Some(0xFFFF));
        assert_eq!(inspect(&mut m, LAR, TR), Some(0x0000_8B00));
        assert_eq!(inspect(&mut m, LSL, TR), Some(0x67));
        // Not present does not matter.
        assert_eq!(inspect(&mut m, LAR, ABSENT_DATA), Some(0x00CF_7300));
        for selector in [0, 3, BEYOND, 0x0C, DATA0 | 1] {
            assert_eq!(inspect(&mut m, LAR, selector), None, "{selector:#x}");
            assert_eq!(inspect(&mut m, LSL, selector), None, "{selector:#x}");
        }
        let mut m = at(3);
        assert_eq!(inspect(&mut m, LAR, DATA0), None);
        assert!(inspect(&mut m, LAR, CONFORMING).is_some());
        assert_eq!(inspect(&mut m, LAR, DATA3), Some(0x00CF_F300));
        // System descriptors by type: which ones LAR and LSL take.
        for kind in 0..16u8 {
            let mut m = at(0);
            m.set_descriptor(SLOT_A, segment(0, 0x67, 0x80 | u16::from(kind)));
            let lar = match kind {
                2 | 9 | 11 | 12 => true,
                1 | 3 | 4 | 5 => !long,
                _ => false,
            };
            let lsl = match kind {
                2 | 9 | 11 => true,
                1 | 3 => !long,
                _ => false,
            };
            assert_eq!(inspect(&mut m, LAR, SLOT_A).is_some(), lar, "LAR of type {kind}");
            assert_eq!(inspect(&mut m, LSL, SLOT_A).is_some(), lsl, "LSL of type {kind}");
        }
    }
    // A 16-bit destination takes the low half.
    let mut m = Machine::protected(0);
    m.cpu.gpr[RAX] = 0;
    m.cpu.gpr[RCX] = u64::from(DATA0);
    m.step(&[0x66, 0x0F, LAR, 0xC1]);
    assert_eq!(m.gpr(RAX), 0x9300);
}

#[test]
fn verr_and_verw() {
    let cases = [
        // CPL, selector, readable, writable.
        (0, DATA0, true, true),
        (0, READ_ONLY, true, false),
        (0, CODE0, true, false),
        (0, EXECUTE_ONLY, false, false),
        (0, TR, false, false),
        (0, 0, false, false),
        (0, BEYOND, false, false),
        (3, DATA0, false, false),
        (3, DATA3, true, true),
        (3, CONFORMING, true, false),
        (0, DATA0 | 3, false, false),
    ];
    for (cpl, selector, readable, writable) in cases {
        for (insn, expected) in [([0x0F, 0x00, 0xE1], readable), ([0x0F, 0x00, 0xE9], writable)] {
            let mut m = Machine::protected(cpl);
            m.cpu.gpr[RCX] = u64::from(selector);
            m.cpu.flags.replace(ZF, if expected { 0 } else { ZF });
            m.step(&insn);
            assert_eq!(m.cpu.rflags_all() & ZF != 0, expected, "CPL {cpl}, {selector:#x}, {insn:02X?}");
        }
    }
}

#[test]
fn arpl() {
    let mut m = Machine::protected(0);
    m.cpu.gpr[RAX] = 0x1230;
    m.cpu.gpr[RCX] = 0x3;
    m.step(&[0x63, 0xC8]); // arpl ax, cx
    assert_eq!((m.gpr(RAX), m.cpu.rflags_all() & ZF), (0x1233, ZF));
    m.cpu.gpr[RCX] = 0x1;
    m.step(&[0x63, 0xC8]);
    assert_eq!((m.gpr(RAX), m.cpu.rflags_all() & ZF), (0x1233, 0));
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0xF0, 0xFF]);
    m.step(&[0x63, 0x0B]); // arpl [ebx], cx
    assert_eq!((m.peek::<u16>(DATA), m.cpu.rflags_all() & ZF), (0xFFF1, ZF));
    assert_eq!(m.cpu.segment(SegmentIndex::Cs).selector, CODE0);
}
