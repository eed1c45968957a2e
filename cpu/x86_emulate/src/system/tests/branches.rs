//! Far JMP and CALL via code segments.

use super::machine::*;
use crate::cpu::reg::{RBX, RSP};
use x86_defs::{Exception, SegmentIndex};

/// JMP (`/5`) or CALL (`/3`) FAR [RBX] with a 32-bit offset.
const JMP_RBX: &[u8] = &[0xFF, 0x2B];
const CALL_RBX: &[u8] = &[0xFF, 0x1B];
const JMP_RBX_64: &[u8] = &[0x48, 0xFF, 0x2B];
const CALL_RBX_64: &[u8] = &[0x48, 0xFF, 0x1B];

fn point(m: &mut Machine, selector: u16, offset: u64, offset_bytes: usize) {
    m.poke(DATA, &offset.to_le_bytes()[..offset_bytes]);
    m.poke(DATA + offset_bytes as u64, &selector.to_le_bytes());
    m.cpu.gpr[RBX] = DATA;
}

#[test]
fn between_the_sizes_of_ia_32e_mode() {
    let mut m = Machine::long(0);
    point(&mut m, CODE0_32, 0x1234, 4);
    m.step(JMP_RBX);
    assert_eq!((m.rip(), m.cpu.seg[1].selector), (0x1234, CODE0_32));
    assert!(!m.cpu.mode.is_long());
    // Back with a direct jump: EA id, offset, selector.
    m.step(&[0xEA, 0x78, 0x56, 0, 0, CODE0 as u8, 0]);
    assert_eq!(m.rip(), 0x5678);
    assert!(m.cpu.mode.is_long());
    // 64-bit offsets.
    point(&mut m, CODE0, 0xFFFF_8000_0000_0000, 8);
    m.step(JMP_RBX_64);
    assert_eq!(m.rip(), 0xFFFF_8000_0000_0000);
}

#[test]
fn calls_push_cs_and_the_return_address() {
    let mut m = Machine::long(0);
    let sp = m.gpr(RSP);
    point(&mut m, CODE0, 0x1234, 8);
    m.step(CALL_RBX_64);
    assert_eq!((m.rip(), m.gpr(RSP)), (0x1234, sp - 16));
    assert_eq!((m.stacked::<u64>(0), m.stacked::<u64>(1)), (CODE + 3, u64::from(CODE0)));
    let mut m = Machine::protected(0);
    point(&mut m, CODE0, 0x1234, 4);
    m.step(CALL_RBX);
    assert_eq!((m.stacked::<u32>(0), m.stacked::<u32>(1)), (CODE + 2, u64::from(CODE0)));
    // 9A with a 16-bit operand size: words, and a 16-bit offset.
    let mut m = Machine::protected(0);
    let sp = m.gpr(RSP);
    m.step(&[0x66, 0x9A, 0x34, 0x12, CODE0 as u8, 0]);
    assert_eq!((m.rip(), m.gpr(RSP)), (0x1234, sp - 4));
    assert_eq!((m.stacked::<u16>(0), m.stacked::<u16>(1)), ((CODE + 6) & 0xFFFF, u64::from(CODE0)));
}

#[test]
fn real_mode_far_branches() {
    let mut m = Machine::real();
    m.step(&[0xEA, 0x34, 0x12, 0x00, 0xF0]);
    assert_eq!((m.rip(), m.cpu.seg[1].selector, m.cpu.seg[1].base), (0x1234, 0xF000, 0xF_0000));
    let mut m = Machine::real();
    m.step(&[0x9A, 0x34, 0x12, 0x00, 0x70]);
    assert_eq!((m.stacked::<u16>(0), m.stacked::<u16>(1)), (5, CODE >> 4));
    assert_eq!(m.gpr(RSP), 0xFFC);
    Machine::real().faults(&[0x66, 0xEA, 0, 0, 1, 0, 0, 0], Exception::GeneralProtection, 0);
}

#[test]
fn conforming_code_keeps_the_privilege() {
    let mut m = Machine::long(3);
    point(&mut m, CONFORMING, 0x1234, 4);
    m.step(JMP_RBX);
    assert_eq!((m.cpu.cpl, m.cpu.seg[1].selector), (3, CONFORMING | 3));
    // Not outwards.
    let mut m = Machine::long(0);
    m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_CODE64 | DPL3 | 4));
    point(&mut m, SLOT_A | 3, 0x1234, 4);
    m.faults(JMP_RBX, Exception::GeneralProtection, u32::from(SLOT_A));
}

#[test]
fn every_error_code() {
    use Exception::*;
    let gp = GeneralProtection;
    let cases = [
        // CPL, selector, offset, exception, code.
        (0, 0, 0, gp, 0),
        (0, 3, 0, gp, 0),
        (0, BEYOND, 0, gp, BEYOND),
        (0, 0x0C, 0, gp, 0x0C),
        (0, DATA0, 0, gp, DATA0),
        (0, CODE3, 0, gp, CODE3 & !3),
        (3, CODE0, 0, gp, CODE0),
        (0, CODE0 | 3, 0, gp, CODE0),
        (0, ABSENT_CODE, 0, SegmentNotPresent, ABSENT_CODE),
        (0, CODE0_16, 0x1_0000, gp, 0),
        // A free slot is a reserved system descriptor.
        (0, SLOT_C, 0, gp, SLOT_C),
        // In IA-32e mode there are no TSSs to jump to.
        (0, TR, 0, gp, TR),
    ];
    for (cpl, selector, offset, exception, code) in cases {
        for insn in [JMP_RBX, CALL_RBX] {
            let mut m = Machine::long(cpl);
            point(&mut m, selector, offset, 4);
            m.faults(insn, exception, u32::from(code));
        }
    }
    let mut m = Machine::long(0);
    point(&mut m, CODE0, 1 << 47, 8);
    m.faults(JMP_RBX_64, gp, 0);
    // L and D are exclusive.
    let mut m = Machine::long(0);
    m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_CODE64 | 0x400));
    point(&mut m, SLOT_A, 0, 4);
    m.faults(JMP_RBX, gp, u32::from(SLOT_A));
    // No room for the return address.
    let mut m = Machine::protected(0);
    m.set_segment(SegmentIndex::Ss, STACK16);
    m.cpu.gpr[RSP] = 1;
    m.cpu.refresh();
    point(&mut m, CODE0, 0, 4);
    m.faults(CALL_RBX, StackFault, 0);
}
