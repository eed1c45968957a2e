//! Call gates: 64-bit, 32-bit and 16-bit, with and without a change of privilege.

use super::machine::*;
use crate::cpu::reg::{RBX, RSP};
use x86_defs::{Exception, SegmentIndex};

const CALL: &[u8] = &[0xFF, 0x1B];
const JMP: &[u8] = &[0xFF, 0x2B];
const CALL_GATE16: u8 = 4;
const CALL_GATE32: u8 = 0xC;
const TARGET: u64 = 0x7_1234;

fn point(m: &mut Machine, selector: u16) {
    m.poke(DATA + 4, &selector.to_le_bytes());
    m.cpu.gpr[RBX] = DATA;
}

/// A machine with a call gate in SLOT_A (DPL 3) to `code`, `parameters` words.
fn with_gate(mut m: Machine, kind: u8, code: u16, parameters: u8) -> Machine {
    m.set_descriptor(SLOT_A, gate(kind, code, TARGET, 3, parameters));
    point(&mut m, SLOT_A | 3);
    m
}

#[test]
fn a_32_bit_gate_inwards_copies_parameters() {
    let mut m = with_gate(Machine::protected(3), CALL_GATE32, CODE0, 2);
    m.push32(&[0x2222, 0x1111]);
    m.step(CALL);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (TARGET, 0, KERNEL_STACK - 24));
    let frame: [u64; 6] = core::array::from_fn(|i| m.stacked::<u32>(i as u64));
    assert_eq!(frame, [CODE + 2, u64::from(CODE3), 0x1111, 0x2222, USER_STACK - 8, u64::from(DATA3)]);
    assert_eq!((m.cpu.seg[1].selector, m.cpu.seg[2].selector), (CODE0, DATA0));
    // RETF 8 goes back and releases them on both stacks.
    m.step(&[0xCA, 8, 0]);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (CODE + 2, 3, USER_STACK));
}

#[test]
fn a_16_bit_gate_pushes_words_and_has_a_16_bit_offset() {
    let mut m = with_gate(Machine::protected(3), CALL_GATE16, CODE1, 1);
    m.push32(&[0x3333_4444]);
    m.step(CALL);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (TARGET & 0xFFFF, 1, RING1_STACK - 10));
    let frame: [u64; 5] = core::array::from_fn(|i| m.stacked::<u16>(i as u64));
    let expected =
        [(CODE + 2) & 0xFFFF, u64::from(CODE3), 0x4444, (USER_STACK - 4) & 0xFFFF, u64::from(DATA3)];
    assert_eq!(frame, expected);
}

#[test]
fn a_64_bit_gate_inwards() {
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.poke(GDT + u64::from(SLOT_A) + 8, &0xFFFF_8000u32.to_le_bytes());
    m.step(CALL);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (0xFFFF_8000_0000_0000 | TARGET, 0, KERNEL_STACK - 32));
    let frame: [u64; 4] = core::array::from_fn(|i| m.stacked::<u64>(i as u64));
    assert_eq!(frame, [CODE + 2, u64::from(CODE3), USER_STACK, u64::from(DATA3)]);
    let ss = m.cpu.segment(SegmentIndex::Ss);
    assert_eq!((ss.selector, ss.unusable), (0, true));
}

#[test]
fn the_same_level_uses_the_same_stack() {
    for bytes in [4, 8] {
        for code in [CODE3, CONFORMING] {
            let machine = if bytes == 8 { Machine::long(3) } else { Machine::protected(3) };
            let mut m = with_gate(machine, CALL_GATE32, code, 0);
            m.step(CALL);
            assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (TARGET, 3, USER_STACK - 2 * bytes));
            let (ip, cs) = if bytes == 8 {
                (m.stacked::<u64>(0), m.stacked::<u64>(1))
            } else {
                (m.stacked::<u32>(0), m.stacked::<u32>(1))
            };
            assert_eq!((ip, cs), (CODE + 2, u64::from(CODE3)));
        }
    }
}

#[test]
fn jmp_never_gains_privilege() {
    let mut m = with_gate(Machine::protected(3), CALL_GATE32, CODE0, 0);
    m.faults(JMP, Exception::GeneralProtection, u32::from(CODE0));
    let mut m = with_gate(Machine::protected(3), CALL_GATE32, CONFORMING, 0);
    m.step(JMP);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (TARGET, 3, USER_STACK));
    let mut m = with_gate(Machine::protected(0), CALL_GATE32, CODE0, 0);
    m.step(JMP);
    assert_eq!(m.rip(), TARGET);
}

#[test]
fn every_error_code() {
    use Exception::*;
    let gp = GeneralProtection;
    let slot = u32::from(SLOT_A);
    let case = |exception, code: u32, spoil: &dyn Fn(&mut Machine)| {
        let mut m = with_gate(Machine::protected(3), CALL_GATE32, CODE0, 1);
        spoil(&mut m);
        m.faults(CALL, exception, code);
    };
    let retarget =
        |m: &mut Machine, code: u16| m.set_descriptor(SLOT_A, gate(CALL_GATE32, code, TARGET, 3, 0));
    // The gate.
    case(gp, slot, &|m| m.set_descriptor(SLOT_A, gate(CALL_GATE32, CODE0, TARGET, 2, 0)));
    case(SegmentNotPresent, slot, &|m| {
        m.set_descriptor(SLOT_A, gate(CALL_GATE32, CODE0, TARGET, 3, 0) & !(0x80 << 40));
    });
    let mut m = with_gate(Machine::protected(0), CALL_GATE32, CODE0, 0);
    m.set_descriptor(SLOT_A, gate(CALL_GATE32, CODE0, TARGET, 0, 0));
    m.faults(CALL, gp, slot);
    // Its target.
    case(gp, 0, &|m| retarget(m, 3));
    case(gp, u32::from(BEYOND), &|m| retarget(m, BEYOND));
    case(gp, u32::from(DATA0), &|m| retarget(m, DATA0));
    case(SegmentNotPresent, u32::from(ABSENT_CODE), &|m| retarget(m, ABSENT_CODE));
    case(gp, 0, &|m| m.set_descriptor(SLOT_A, gate(CALL_GATE32, CODE0_16, 0x1_0000, 3, 0)));
    let mut m = with_gate(Machine::protected(0), CALL_GATE32, CODE3, 0);
    m.faults(CALL, gp, u32::from(CODE3 & !3));
    // The stack in the TSS.
    let ss0 = |m: &mut Machine, ss: u16| m.poke(TSS + 8, &ss.to_le_bytes());
    case(InvalidTss, u32::from(TR), &|m| m.cpu.tr.limit = 8);
    case(InvalidTss, 0, &|m| ss0(m, 0));
    case(InvalidTss, u32::from(DATA3 & !3), &|m| ss0(m, DATA3));
    case(InvalidTss, u32::from(CODE0), &|m| ss0(m, CODE0));
    case(StackFault, u32::from(SLOT_B), &|m| {
        m.set_descriptor(SLOT_B, segment(0, 0xF_FFFF, A_DATA & !PRESENT));
        ss0(m, SLOT_B);
    });
    case(StackFault, u32::from(STACK16), &|m| {
        ss0(m, STACK16);
        m.poke(TSS + 4, &6u32.to_le_bytes());
    });
    // A page fault while a parameter is read.
    let mut m = with_gate(Machine::protected(3), CALL_GATE32, CODE0, 1);
    m.pages.insert(USER_STACK >> 12, (false, false, false));
    m.faults(CALL, PageFault, 4);
}

#[test]
fn ia_32e_mode_has_only_64_bit_gates_to_64_bit_code() {
    use Exception::*;
    let gp = GeneralProtection;
    with_gate(Machine::long(3), CALL_GATE16, CODE0, 0).faults(CALL, gp, u32::from(SLOT_A));
    with_gate(Machine::long(3), CALL_GATE32, CODE0_32, 0).faults(CALL, gp, u32::from(CODE0_32));
    // The upper half has a type of its own, which must be zero.
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.poke(GDT + u64::from(SLOT_A) + 13, &[1]);
    m.faults(CALL, gp, u32::from(SLOT_A));
    // It must be within the table.
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.cpu.gdtr.limit = SLOT_A + 7;
    m.faults(CALL, gp, u32::from(SLOT_A));
    // A non-canonical target.
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.poke(GDT + u64::from(SLOT_A) + 8, &0x8000u32.to_le_bytes());
    m.faults(CALL, gp, 0);
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.cpu.tr.limit = 8;
    m.faults(CALL, InvalidTss, u32::from(TR));
    let mut m = with_gate(Machine::long(3), CALL_GATE32, CODE0, 0);
    m.poke(TSS + 4, &(1u64 << 48).to_le_bytes());
    m.faults(CALL, StackFault, 0);
}
