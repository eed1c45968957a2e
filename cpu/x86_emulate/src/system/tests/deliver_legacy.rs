//! Interrupts and exceptions in real mode and in 16/32-bit protected mode.

use super::machine::*;
use crate::cpu::reg::RSP;
use crate::system::interrupts::Outcome::*;
use x86_defs::flags::*;
use x86_defs::{Exception, SegmentIndex};

#[test]
fn real_mode_pushes_three_words_and_no_error_code() {
    let mut m = Machine::real();
    m.cpu.set_rflags_all(IF | TF | AC | CF | FIXED_1);
    assert_eq!(m.exception(Exception::GeneralProtection, 0x1234), Delivered);
    m.reached(13, None);
    assert_eq!(m.gpr(RSP), 0x1000 - 6);
    let frame: [u64; 3] = core::array::from_fn(|i| m.stacked::<u16>(i as u64));
    assert_eq!(frame, [0, CODE >> 4, IF | TF | CF | FIXED_1]);
    assert_eq!(m.cpu.rflags_all(), CF | FIXED_1);
    assert_eq!(m.cpu.seg[1].base, HANDLERS);
}

#[test]
fn real_mode_stack_wraps_at_64_kib() {
    let mut m = Machine::real();
    m.cpu.gpr[RSP] = 0xABCD_0000;
    assert_eq!(m.interrupt(8), Delivered);
    assert_eq!(m.gpr(RSP), 0xABCD_FFFA);
    m.cpu.gpr[RSP] = 1;
    // A word across the end of the segment: #SS, which cannot be pushed either.
    assert_eq!(m.interrupt(8), TripleFault);
}

#[test]
fn real_mode_vectors_beyond_the_table_are_faults() {
    let mut m = Machine::real();
    m.cpu.idtr.limit = 0x40 * 4 - 1;
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(13, None);
    m.cpu.idtr.limit = 3;
    assert_eq!(m.interrupt(0x40), TripleFault);
}

#[test]
fn int_n_in_real_mode() {
    let mut m = Machine::real();
    m.step(&[0xCD, 0x21]);
    m.reached(0x21, None);
    assert_eq!(m.stacked::<u16>(0), 2);
    // INTO only with OF.
    let mut m = Machine::real();
    m.step(&[0xCE]);
    assert_eq!(m.rip(), 1);
    m.cpu.set_rflags_all(OF | FIXED_1);
    m.step(&[0xCE]);
    m.reached(4, None);
}

#[test]
fn same_privilege_in_protected_mode() {
    let mut m = Machine::protected(0);
    let sp = m.gpr(RSP);
    m.cpu.set_rflags_all(IF | TF | NT | FIXED_1);
    assert_eq!(m.exception(Exception::GeneralProtection, 0x18), Delivered);
    m.reached(13, Some(0x18));
    let frame: [u64; 4] = core::array::from_fn(|i| m.stacked::<u32>(i as u64));
    assert_eq!(frame, [0x18, CODE, u64::from(CODE0), IF | TF | NT | RF | FIXED_1]);
    assert_eq!(m.gpr(RSP), sp - 16);
    assert_eq!(m.cpu.rflags_all(), FIXED_1);
}

#[test]
fn inner_privilege_switches_the_stack() {
    for (code, data, cpl, top) in [(CODE0, DATA0, 0, KERNEL_STACK), (CODE1, DATA1 | 1, 1, RING1_STACK)] {
        let mut m = Machine::protected(3);
        m.set_gate(0x40, gate(0xF, code, handler(0x40), 0, 0));
        m.cpu.set_rflags_all(IF | FIXED_1);
        assert_eq!(m.interrupt(0x40), Delivered);
        let frame: [u64; 5] = core::array::from_fn(|i| m.stacked::<u32>(i as u64));
        assert_eq!(frame, [CODE, u64::from(CODE3), IF | FIXED_1, USER_STACK, u64::from(DATA3)]);
        assert_eq!((m.gpr(RSP), m.cpu.cpl), (top - 20, cpl));
        assert_eq!(m.cpu.segment(SegmentIndex::Ss).selector, data);
        // A trap gate keeps IF.
        assert_eq!(m.cpu.rflags_all(), IF | FIXED_1);
    }
}

#[test]
fn sixteen_bit_gates_push_words() {
    let mut m = Machine::protected(3);
    m.set_gate(13, gate(6, CODE0, handler(13) & 0xFFFF | 0x77_0000, 0, 0));
    assert_eq!(m.exception(Exception::GeneralProtection, 0x1_0010), Delivered);
    assert_eq!(m.rip(), handler(13) & 0xFFFF);
    let frame: [u64; 6] = core::array::from_fn(|i| m.stacked::<u16>(i as u64));
    assert_eq!(
        frame,
        [0x10, CODE & 0xFFFF, u64::from(CODE3), FIXED_1, USER_STACK & 0xFFFF, u64::from(DATA3)]
    );
    assert_eq!(m.gpr(RSP), KERNEL_STACK - 12);
}

#[test]
fn a_16_bit_tss_gives_16_bit_stacks() {
    let mut m = Machine::protected(3);
    m.cpu.tr.attributes.0 = 0x83;
    m.cpu.tr.limit = 0x2B;
    m.poke(TSS + 2, &[0x00, 0x90, DATA0 as u8, 0]);
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!(m.gpr(RSP), 0x9000 - 20);
}

/// An external interrupt on vector 0x40 from ring 3 raises `exception(code)` instead.
#[track_caller]
fn external_raises(exception: Exception, code: u32, spoil: impl Fn(&mut Machine)) {
    let mut m = Machine::protected(3);
    // Handlers in ring 1, whose stack stays good.
    for vector in [8, 10, 11, 12, 13] {
        m.set_gate(vector, gate(0xE, CODE1, handler(vector), 0, 0));
    }
    spoil(&mut m);
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(exception.vector(), Some(code));
}

#[test]
fn every_error_code_of_a_bad_gate_or_stack() {
    use Exception::*;
    const IDT_40: u32 = 0x40 << 3 | 3;
    let gp = GeneralProtection;
    let sel = |s: u16| u32::from(s & !3) | 1;
    let point = |m: &mut Machine, selector| m.set_gate(0x40, gate(0xE, selector, handler(0x40), 0, 0));
    let ss0 = |m: &mut Machine, selector: u16| m.poke(TSS + 8, &selector.to_le_bytes());
    external_raises(gp, IDT_40, |m| m.cpu.idtr.limit = 0x40 * 8 + 6);
    for kind in [0, 1, 2, 3, 4, 8, 9, 0xB, 0xC, 0xD, 0x1E] {
        external_raises(gp, IDT_40, |m| m.set_gate(0x40, gate(kind, CODE0, handler(0x40), 0, 0)));
    }
    external_raises(SegmentNotPresent, IDT_40, |m| {
        m.set_gate(0x40, gate(0xE, CODE0, handler(0x40), 0, 0) & !(0x80 << 40));
    });
    external_raises(gp, 1, |m| point(m, 0));
    external_raises(gp, sel(BEYOND), |m| point(m, BEYOND));
    external_raises(gp, sel(DATA0), |m| point(m, DATA0));
    external_raises(SegmentNotPresent, sel(ABSENT_CODE), |m| point(m, ABSENT_CODE));
    // Beyond the limit of the code segment.
    external_raises(gp, 1, |m| m.set_gate(0x40, gate(0xE, CODE0_16, 0x1_0000, 0, 0)));
    external_raises(InvalidTss, sel(TR), |m| {
        m.cpu.tr.limit = 0x10;
        m.set_gate(0x40, gate(0xE, CODE1, handler(0x40), 0, 0));
        m.set_gate(10, gate(0xE, CODE0, handler(10), 0, 0));
    });
    external_raises(InvalidTss, 1, |m| ss0(m, 0));
    external_raises(InvalidTss, sel(BEYOND), |m| ss0(m, BEYOND));
    external_raises(InvalidTss, sel(DATA0), |m| ss0(m, DATA0 | 1));
    external_raises(InvalidTss, sel(DATA3), |m| ss0(m, DATA3 & !3));
    external_raises(InvalidTss, sel(CODE0), |m| ss0(m, CODE0));
    external_raises(InvalidTss, sel(READ_ONLY), |m| ss0(m, READ_ONLY));
    external_raises(StackFault, sel(SLOT_A), |m| {
        m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_DATA & !PRESENT));
        ss0(m, SLOT_A);
    });
    // No room on the new stack.
    external_raises(StackFault, sel(STACK16), |m| {
        ss0(m, STACK16);
        m.poke(TSS + 4, &2u32.to_le_bytes());
    });
    // Expand-down: below the limit is outside.
    external_raises(StackFault, sel(SLOT_A), |m| {
        m.set_descriptor(SLOT_A, segment(0, 0x4_0000 >> 12, 0xC97));
        ss0(m, SLOT_A);
    });
}

#[test]
fn no_room_on_the_current_stack_is_ss_0() {
    let mut m = Machine::protected(0);
    m.set_segment(SegmentIndex::Ss, STACK16);
    m.cpu.refresh();
    m.cpu.gpr[RSP] = 2;
    // The #SS handler cannot push either: double fault, and its handler neither.
    assert_eq!(m.interrupt(0x40), TripleFault);
}

#[test]
fn software_interrupts_check_dpl() {
    let mut m = Machine::protected(3);
    m.step(&[0xCD, 0x80]);
    m.reached(0x80, None);
    assert_eq!(m.stacked::<u32>(0), CODE + 2);
    Machine::protected(3).faults(&[0xCD, 0x40], Exception::GeneralProtection, 0x40 << 3 | 2);
}
