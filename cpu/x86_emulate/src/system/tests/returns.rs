//! IRET and RETF in IA-32e and protected mode: checks, stacks, flags.

use super::machine::*;
use crate::cpu::{RIP, reg::RSP};
use crate::system::descriptor;
use x86_defs::control::*;
use x86_defs::flags::*;
use x86_defs::{Exception, SegmentIndex};

const IRETQ: &[u8] = &[0x48, 0xCF];
const IRETD: &[u8] = &[0xCF];
const RETFQ: &[u8] = &[0x48, 0xCB];

fn frame64(m: &mut Machine, rip: u64, cs: u16, flags: u64, rsp: u64, ss: u16) {
    m.push64(&[u64::from(ss), rsp, flags, u64::from(cs), rip]);
}

#[test]
fn iretq_to_user_mode() {
    let mut m = Machine::long(0);
    m.set_segment(SegmentIndex::Fs, DATA3);
    m.set_segment(SegmentIndex::Gs, CONFORMING);
    frame64(&mut m, 0x1234, CODE3, IF | CF | FIXED_1, USER_STACK, DATA3);
    m.step(IRETQ);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x1234, USER_STACK, 3));
    assert_eq!(m.cpu.rflags_all(), IF | CF | FIXED_1);
    assert_eq!(m.cpu.mmu_index, 0);
    // What ring 3 must not use has become null; its own and conforming segments stay.
    let selector = |i: SegmentIndex| (m.cpu.segment(i).selector, m.cpu.segment(i).unusable);
    assert_eq!(selector(SegmentIndex::Ds), (0, true));
    assert_eq!(selector(SegmentIndex::Es), (0, true));
    assert_eq!(selector(SegmentIndex::Fs), (DATA3, false));
    assert_eq!(selector(SegmentIndex::Gs), (CONFORMING, false));
}

#[test]
fn null_selectors_lose_their_rpl_on_the_way_out() {
    let mut m = Machine::long(0);
    for index in [SegmentIndex::Ds, SegmentIndex::Es, SegmentIndex::Fs, SegmentIndex::Gs] {
        m.cpu.seg[index as usize] = descriptor::null_segment(3, 3);
    }
    m.cpu.seg[SegmentIndex::Fs as usize].base = 0x1234_5000;
    m.cpu.refresh();
    frame64(&mut m, 0x1234, CODE3, IF | FIXED_1, USER_STACK, DATA3);
    m.step(IRETQ);
    for index in [SegmentIndex::Ds, SegmentIndex::Es, SegmentIndex::Fs, SegmentIndex::Gs] {
        assert_eq!((m.cpu.segment(index).selector, m.cpu.segment(index).unusable), (0, true), "{index:?}");
    }
    assert_eq!(m.cpu.segment(SegmentIndex::Fs).base, 0x1234_5000, "the base is not the selector's");
}

#[test]
fn iretq_within_ring_0_pops_the_stack_too() {
    let mut m = Machine::long(0);
    frame64(&mut m, 0x4444, CODE0, FIXED_1, 0x3_0123, DATA0);
    m.step(IRETQ);
    assert_eq!((m.rip(), m.gpr(RSP)), (0x4444, 0x3_0123));
    // SS may be null in 64-bit code above ring 3, with RPL = CPL.
    let mut m = Machine::long(0);
    frame64(&mut m, 0x4444, CODE0, FIXED_1, 0x3_0123, 0);
    m.step(IRETQ);
    assert_eq!(m.cpu.segment(SegmentIndex::Ss).selector, 0);
}

#[test]
fn iretd_in_64_bit_mode_pops_five_words_of_32_bits() {
    let mut m = Machine::long(0);
    m.push32(&[u32::from(DATA3), USER_STACK as u32, 0x202, u32::from(CODE3_32), 0x7777]);
    m.step(IRETD);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x7777, USER_STACK, 3));
    assert!(!m.cpu.mode.is_long() && m.cpu.mode.has(crate::ModeKey::BIG_CODE | crate::ModeKey::FLAT_CS));
}

#[test]
fn every_error_code_of_iretq() {
    use Exception::*;
    let np_ss = ABSENT_DATA | 3;
    let cases = [
        (GeneralProtection, 0, 0, CODE, USER_STACK, 0),
        (GeneralProtection, 0, 3, CODE, USER_STACK, DATA3),
        (GeneralProtection, BEYOND, BEYOND, CODE, USER_STACK, DATA3),
        (GeneralProtection, DATA0, DATA0, CODE, USER_STACK, DATA3),
        (GeneralProtection, CODE0, CODE0 | 3, CODE, USER_STACK, DATA3),
        (GeneralProtection, CODE3 & !3, CODE3 & !3, CODE, USER_STACK, DATA3),
        (SegmentNotPresent, ABSENT_CODE, ABSENT_CODE, CODE, USER_STACK, DATA0),
        (GeneralProtection, 0, CODE3, 1 << 47, USER_STACK, DATA3),
        (GeneralProtection, 0, CODE3_32, 1 << 32, USER_STACK, DATA3),
        (GeneralProtection, 0, CODE3, CODE, USER_STACK, 3),
        (GeneralProtection, 0, CODE0, CODE, USER_STACK, 1),
        (GeneralProtection, BEYOND, CODE3, CODE, USER_STACK, BEYOND | 3),
        (GeneralProtection, DATA0, CODE3, CODE, USER_STACK, DATA0),
        (GeneralProtection, DATA3 & !3, CODE3, CODE, USER_STACK, DATA3 & !3),
        (GeneralProtection, READ_ONLY, CODE0, CODE, USER_STACK, READ_ONLY),
        (StackFault, ABSENT_DATA, CODE3, CODE, USER_STACK, np_ss),
    ];
    for (exception, code, cs, rip, rsp, ss) in cases {
        let mut m = Machine::long(0);
        frame64(&mut m, rip, cs, FIXED_1, rsp, ss);
        m.faults(IRETQ, exception, u32::from(code));
    }
    // From ring 3 nothing leads inwards.
    let mut m = Machine::long(3);
    frame64(&mut m, CODE, CODE0, FIXED_1, USER_STACK, DATA0);
    m.faults(IRETQ, GeneralProtection, u32::from(CODE0));
    // There are no nested tasks in IA-32e mode.
    let mut m = Machine::long(0);
    m.cpu.rflags |= NT;
    frame64(&mut m, CODE, CODE0, FIXED_1, USER_STACK, DATA0);
    m.faults(IRETQ, GeneralProtection, 0);
    // L and D both set is reserved.
    let mut m = Machine::long(0);
    m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_CODE64 | 0x400));
    frame64(&mut m, CODE, SLOT_A, FIXED_1, USER_STACK, DATA0);
    m.faults(IRETQ, GeneralProtection, u32::from(SLOT_A));
    // The frame itself.
    let mut m = Machine::long(0);
    m.pages.insert((KERNEL_STACK - 0x1000) >> 12, (false, false, false));
    m.faults(IRETQ, PageFault, 0);
    let mut m = Machine::long(0);
    m.cpu.gpr[RSP] = 1 << 63;
    m.faults(IRETQ, StackFault, 0);
}

#[test]
fn flags_that_iret_changes_by_privilege() {
    let image = ALL & !VM & !RF | FIXED_1;
    let cases = [
        // CPL, IOPL before, flags after.
        (0, 0, image),
        (3, 3, image & !(VIF | VIP)),
        (3, 0, image & !(VIF | VIP | IOPL | IF)),
    ];
    for (cpl, iopl, expected) in cases {
        let mut m = Machine::long(cpl);
        m.cpu.rflags |= iopl << IOPL_SHIFT;
        let (cs, ss) = if cpl == 0 { (CODE0, DATA0) } else { (CODE3, DATA3) };
        frame64(&mut m, CODE, cs, image, USER_STACK, ss);
        m.step(IRETQ);
        assert_eq!(m.cpu.rflags_all(), expected, "CPL {cpl}, IOPL {iopl}");
    }
    // 16 bits leave the upper flags alone.
    let mut m = Machine::long(0);
    m.cpu.rflags |= AC | ID;
    let sp = m.gpr(RSP) - 10;
    for (i, word) in [CODE as u16, CODE0, 0x0001, 0x8000, DATA0].into_iter().enumerate() {
        m.poke(sp + 2 * i as u64, &word.to_le_bytes());
    }
    m.cpu.gpr[RSP] = sp;
    m.step(&[0x66, 0xCF]);
    assert_eq!(m.cpu.rflags_all(), AC | ID | CF | FIXED_1);
    assert_eq!(m.rip(), CODE & 0xFFFF);
    assert_eq!(m.gpr(RSP), 0x8000);
}

#[test]
fn rf_is_loaded_only_while_breakpoints_can_hit() {
    for (dr7, rf) in [(DR7_FIXED_1, 0), (DR7_FIXED_1 | 1, RF)] {
        let mut m = Machine::long(0);
        m.cpu.dr[7] = dr7;
        frame64(&mut m, CODE, CODE0, RF | FIXED_1, USER_STACK, DATA0);
        m.step(IRETQ);
        assert_eq!(m.cpu.rflags_all() & RF, rf);
    }
}

#[test]
fn protected_mode_returns_to_the_same_and_the_outer_level() {
    let mut m = Machine::protected(0);
    let sp = m.gpr(RSP);
    m.push32(&[0x202, u32::from(CODE0), 0x1111]);
    m.step(IRETD);
    // The same level: no stack is popped.
    assert_eq!((m.rip(), m.gpr(RSP)), (0x1111, sp));
    m.push32(&[u32::from(DATA3), 0x2_0F00, 0x3202, u32::from(CODE3), 0x2222]);
    m.step(IRETD);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x2222, 0x2_0F00, 3));
    assert_eq!(m.cpu.rflags_all(), 0x3202);
    // A 16-bit stack segment takes only the low half of ESP.
    let mut m = Machine::protected(0);
    m.set_descriptor(SLOT_A, segment(0, 0xFFFF, 0x093 | DPL3));
    m.push32(&[u32::from(SLOT_A | 3), 0x0009_0F00, 0x202, u32::from(CODE3), 0x2222]);
    let before = m.gpr(RSP);
    m.step(IRETD);
    assert_eq!(m.gpr(RSP), before & !0xFFFF | 0x0F00);
    // EIP beyond the limit of a 16-bit segment.
    let mut m = Machine::protected(0);
    m.push32(&[0x202, u32::from(CODE0_16), 0x1_0000]);
    m.faults(IRETD, Exception::GeneralProtection, 0);
}

#[test]
fn far_returns_release_parameters_on_both_stacks() {
    let mut m = Machine::long(0);
    m.push64(&[u64::from(DATA3), USER_STACK, 0xAAAA, u64::from(CODE3), 0x5555]);
    // RETFQ 8: one parameter.
    m.step(&[0x48, 0xCA, 8, 0]);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x5555, USER_STACK + 8, 3));
    let mut m = Machine::protected(0);
    let sp = m.gpr(RSP);
    m.push32(&[0xAAAA, u32::from(CODE0), 0x5555]);
    m.step(&[0xCA, 4, 0]);
    assert_eq!((m.rip(), m.gpr(RSP)), (0x5555, sp));
    let mut m = Machine::long(0);
    m.push64(&[u64::from(DATA3), USER_STACK, u64::from(CODE0 | 3), 0x5555]);
    m.faults(RETFQ, Exception::GeneralProtection, u32::from(CODE0));
    let mut m = Machine::long(0);
    m.push64(&[3, USER_STACK, u64::from(CODE3), 0x5555]);
    m.faults(RETFQ, Exception::GeneralProtection, 0);
    let mut m = Machine::long(0);
    m.push64(&[0, 0x5555]);
    m.faults(RETFQ, Exception::GeneralProtection, 0);
}

#[test]
fn real_mode_far_return_and_iret() {
    let mut m = Machine::real();
    // RETF 2
    for (i, word) in [0x0123u16, 0x5000, 0, 0x0F00].into_iter().enumerate() {
        m.poke(0x2_0000 + 0x800 + 2 * i as u64, &word.to_le_bytes());
    }
    m.cpu.gpr[RSP] = 0x800;
    m.step(&[0xCA, 2, 0]);
    assert_eq!((m.rip(), m.gpr(RSP)), (0x123, 0x806));
    assert_eq!((m.cpu.seg[1].selector, m.cpu.seg[1].base), (0x5000, 0x5_0000));
    // IRET
    m.cpu.gpr[RSP] = 0x800;
    m.poke(0x2_0804, &0xF0D5u16.to_le_bytes());
    m.step(&[0xCF]);
    assert_eq!(m.gpr(RSP), 0x806);
    assert_eq!(m.cpu.rflags_all(), 0x70D7 & !0x8000);
    assert_eq!(m.cpu.gpr[RIP], 0x123);
}
