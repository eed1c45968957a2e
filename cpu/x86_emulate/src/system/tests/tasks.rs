//! Hardware task switches: 32- and 16-bit, by JMP, CALL, IRET and gates.

use super::machine::*;
use crate::ModeKey;
use crate::core::PagingChange;
use crate::cpu::{PendingException, reg::*};
use crate::system::interrupts::Outcome::*;
use x86_defs::Exception;
use x86_defs::control::*;
use x86_defs::flags::*;

/// Descriptor of the second task's TSS.
const OTHER: u16 = SLOT_B;
const GATE: u16 = SLOT_A;
const AVAILABLE: u8 = 9;
const BUSY: u8 = 11;
const OTHER_CODE: u64 = 0x7_0000;
const IRET: &[u8] = &[0xCF];

/// JMP (EA) or CALL (9A) to a selector.
fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let [low, high] = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, low, high]
}
const JMP: u8 = 0xEA;
const CALL: u8 = 0x9A;

fn kind(m: &Machine, selector: u16) -> u8 {
    (m.descriptor(selector) >> 40 & 0xF) as u8
}

/// Fills the 32-bit TSS at TSS_B; `cs` decides the privilege.
fn fill_tss32(m: &mut Machine, cs: u16, ds: u16, flags: u64) {
    m.set_descriptor(OTHER, segment(TSS_B as u32, 0x67, 0x089 | DPL3));
    let words: [(u64, u32); 18] = [
        (0x1C, 0x9000),
        (0x20, OTHER_CODE as u32),
        (0x24, flags as u32),
        (0x28, 0xA0),
        (0x2C, 0xA1),
        (0x30, 0xA2),
        (0x34, 0xA3),
        (0x38, USER_STACK as u32),
        (0x3C, 0xA5),
        (0x40, 0xA6),
        (0x44, 0xA7),
        (0x48, u32::from(ds)),
        (0x4C, u32::from(cs)),
        (0x50, u32::from(ds)),
        (0x54, u32::from(ds)),
        (0x58, 0),
        (0x5C, 0),
        (0x60, 0),
    ];
    for (at, value) in words {
        m.poke(TSS_B + at, &value.to_le_bytes());
    }
    m.poke(TSS_B + 0x64, &[0, 0, 0x68, 0]);
}

fn two_tasks(cpl: u8) -> Machine {
    let mut m = Machine::protected(cpl);
    let (cs, ds) = if cpl == 0 { (CODE0, DATA0) } else { (CODE3, DATA3) };
    fill_tss32(&mut m, cs, ds, IF | FIXED_1);
    m.cpu.gpr[RAX] = 0x1111_1111;
    m.cpu.gpr[RDI] = 0x7777_7777;
    m.cpu.set_rflags_all(CF | FIXED_1);
    m
}

#[test]
fn jmp_to_a_tss() {
    let mut m = two_tasks(0);
    m.cpu.dr[7] = DR7_FIXED_1 | 0xFF;
    m.step(&far(JMP, OTHER));
    assert_eq!((m.rip(), m.gpr(RSP), m.gpr(RAX), m.gpr(RDI)), (OTHER_CODE, USER_STACK, 0xA0, 0xA7));
    assert_eq!((m.cpu.rflags_all(), m.cpu.tr.selector, m.cpu.tr.base), (IF | FIXED_1, OTHER, TSS_B));
    // The old task is available again, the new one busy.
    assert_eq!((kind(&m, TR), kind(&m, OTHER)), (AVAILABLE, BUSY));
    assert!(m.cpu.mode.has(ModeKey::TS));
    assert_eq!(m.cpu.dr[7], DR7_FIXED_1 | 0xAA, "local breakpoints are off");
    assert_eq!((m.cpu.cr3, m.changes.as_slice()), (0x9000, &[PagingChange::Cr3 { keep: false }][..]));
    // What was saved: EIP behind the JMP, flags, registers, selectors.
    for (at, value) in [(0x20, CODE + 7), (0x24, CF | FIXED_1), (0x28, 0x1111_1111), (0x44, 0x7777_7777)] {
        assert_eq!(m.peek::<u32>(TSS + at), value, "TSS + {at:#x}");
    }
    assert_eq!((m.peek::<u16>(TSS + 0x4C), m.peek::<u16>(TSS + 0x50)), (u64::from(CODE0), u64::from(DATA0)));
    assert_eq!(m.peek::<u16>(TSS_B), 0, "no link");
    // Back by JMP: everything is as it was.
    m.step(&far(JMP, TR));
    assert_eq!((m.rip(), m.gpr(RAX), m.cpu.rflags_all()), (CODE + 7, 0x1111_1111, CF | FIXED_1));
    assert_eq!((kind(&m, TR), kind(&m, OTHER)), (BUSY, AVAILABLE));
}

#[test]
fn call_nests_and_iret_returns() {
    let mut m = two_tasks(0);
    m.step(&far(CALL, OTHER));
    assert_eq!(m.cpu.rflags_all(), NT | IF | FIXED_1);
    assert_eq!((m.peek::<u16>(TSS_B), kind(&m, TR), kind(&m, OTHER)), (u64::from(TR), BUSY, BUSY));
    m.step(IRET);
    assert_eq!((m.rip(), m.cpu.tr.selector), (CODE + 7, TR));
    assert_eq!((kind(&m, TR), kind(&m, OTHER)), (BUSY, AVAILABLE));
    assert_eq!(m.cpu.rflags_all(), CF | FIXED_1);
    // NT was cleared in the image of the task that returned; its EIP is behind the IRET.
    assert_eq!(m.peek::<u32>(TSS_B + 0x24), IF | FIXED_1);
    assert_eq!(m.peek::<u32>(TSS_B + 0x20), OTHER_CODE + 1);
}

#[test]
fn through_task_gates() {
    let mut m = two_tasks(3);
    m.set_descriptor(GATE, gate(5, OTHER, 0, 3, 0));
    // The TSS's own DPL does not matter then.
    m.set_descriptor(OTHER, segment(TSS_B as u32, 0x67, 0x089));
    m.step(&far(CALL, GATE | 3));
    assert_eq!((m.rip(), m.cpu.cpl, m.cpu.tr.selector), (OTHER_CODE, 3, OTHER));
    // Interrupts: IDT task gates, with an error code on the new task's stack.
    let mut m = two_tasks(3);
    m.set_gate(0x40, gate(5, OTHER, 0, 0, 0));
    m.cpu.halted = true;
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.halted), (OTHER_CODE, USER_STACK, false));
    assert_eq!(m.peek::<u32>(TSS + 0x20), CODE);
    let mut m = two_tasks(0);
    m.set_gate(13, gate(5, OTHER, 0, 0, 0));
    assert_eq!(m.exception(Exception::GeneralProtection, 0x1234), Delivered);
    assert_eq!((m.rip(), m.gpr(RSP), m.stacked::<u32>(0)), (OTHER_CODE, USER_STACK - 4, 0x1234));
    // The faulting task is resumed with RF.
    assert_eq!(m.peek::<u32>(TSS + 0x24) & RF, RF);
    assert_eq!(m.cpu.rflags_all(), NT | IF | FIXED_1);
}

#[test]
fn sixteen_bit_tasks() {
    let mut m = two_tasks(0);
    m.set_descriptor(OTHER, segment(TSS_B as u32, 0x2B, 0x081));
    for (i, word) in
        [0x5678u16, 0x0202, 0xB0, 0xB1, 0xB2, 0xB3, 0x9000, 0xB5, 0xB6, 0xB7, DATA0, CODE0, DATA0, DATA0, 0]
            .into_iter()
            .enumerate()
    {
        m.poke(TSS_B + 0x0E + 2 * i as u64, &word.to_le_bytes());
    }
    let cr3 = m.cpu.cr3;
    m.step(&far(CALL, OTHER));
    assert_eq!((m.rip(), m.cpu.rflags_all(), m.cpu.cr3), (0x5678, NT | 0x202, cr3));
    assert_eq!((m.gpr(RAX) & 0xFFFF, m.gpr(RDI) & 0xFFFF, m.gpr(RSP) & 0xFFFF), (0xB0, 0xB7, 0x9000));
    assert_eq!((kind(&m, OTHER), m.peek::<u16>(TSS_B)), (3, u64::from(TR)));
    // FS and GS, which a 16-bit TSS lacks, are null.
    assert!(m.cpu.seg[4].unusable && m.cpu.seg[5].unusable);
    m.cpu.gpr[RAX] = 0xFFFF_4444;
    m.step(IRET);
    assert_eq!((m.rip(), m.gpr(RAX)), (CODE + 7, 0x1111_1111));
    assert_eq!((m.peek::<u16>(TSS_B + 0x0E), m.peek::<u16>(TSS_B + 0x12)), (0x5679, 0x4444));
    assert_eq!(kind(&m, OTHER), 1);
}

#[test]
fn a_virtual_8086_task_and_the_debug_trap() {
    let mut m = two_tasks(0);
    fill_tss32(&mut m, 0x7000, 0x5000, VM | FIXED_1);
    m.poke(TSS_B + 0x64, &[1, 0]);
    m.step(&far(JMP, OTHER));
    assert!(m.cpu.mode.has(ModeKey::V86));
    assert_eq!((m.cpu.cpl, m.cpu.seg[1].base, m.cpu.seg[3].base), (3, 0x7_0000, 0x5_0000));
    assert_eq!(m.cpu.pending_debug, DR6_BT);
    let trap = crate::system::debug::after_instruction(&mut m.cpu, false, true);
    let expected =
        PendingException { vector: Some(Exception::Debug), error_code: 0, address: DR6_BT, is_trap: true };
    assert_eq!(trap, Some(expected));
}

#[test]
fn checks_before_the_switch() {
    use Exception::*;
    let gp = GeneralProtection;
    let other = u32::from(OTHER);
    let case = |cpl: u8, code: &[u8], exception, error: u32, spoil: &dyn Fn(&mut Machine)| {
        let mut m = two_tasks(cpl);
        spoil(&mut m);
        m.faults(code, exception, error);
        // Whose task it was is unchanged.
        assert_eq!(m.cpu.tr.selector, TR);
    };
    let tss = |m: &mut Machine, limit, attributes| {
        m.set_descriptor(OTHER, segment(TSS_B as u32, limit, attributes));
    };
    for op in [JMP, CALL] {
        let (go, gate_go) = (far(op, OTHER | 3), far(op, GATE | 3));
        case(3, &go, gp, other, &|m| tss(m, 0x67, 0x089));
        case(0, &far(op, OTHER | 3), gp, other, &|m| tss(m, 0x67, 0x089));
        case(3, &go, gp, other, &|m| tss(m, 0x67, 0x08B | DPL3));
        case(3, &go, SegmentNotPresent, other, &|m| tss(m, 0x67, 0x009 | DPL3));
        case(3, &go, InvalidTss, other, &|m| tss(m, 0x66, 0x089 | DPL3));
        case(3, &go, InvalidTss, other, &|m| tss(m, 0x2A, 0x081 | DPL3));
        // Gates.
        let to = |m: &mut Machine, selector, dpl| m.set_descriptor(GATE, gate(5, selector, 0, dpl, 0));
        case(3, &gate_go, gp, u32::from(GATE), &|m| to(m, OTHER, 2));
        case(3, &gate_go, SegmentNotPresent, u32::from(GATE), &|m| {
            m.set_descriptor(GATE, gate(5, OTHER, 0, 3, 0) & !(0x80 << 40));
        });
        case(3, &gate_go, gp, 0, &|m| to(m, 0, 3));
        case(3, &gate_go, gp, 0x0C, &|m| to(m, 0x0C, 3));
        case(3, &gate_go, gp, u32::from(BEYOND), &|m| to(m, BEYOND, 3));
        case(3, &gate_go, gp, u32::from(DATA0), &|m| to(m, DATA0, 3));
        case(3, &gate_go, gp, other, &|m| {
            to(m, OTHER, 3);
            tss(m, 0x67, 0x08B);
        });
        case(3, &gate_go, SegmentNotPresent, other, &|m| {
            to(m, OTHER, 3);
            tss(m, 0x67, 0x009);
        });
        // A page fault in the new TSS.
        case(3, &go, PageFault, 0, &|m| {
            m.pages.insert(TSS_B >> 12, (false, false, false));
        });
    }
    // IRET: the link.
    for (link, exception, error) in [
        (0, InvalidTss, 0),
        (OTHER | 4, InvalidTss, u32::from(OTHER | 4)),
        (BEYOND, InvalidTss, u32::from(BEYOND)),
        (DATA0, InvalidTss, u32::from(DATA0)),
        // Not busy.
        (OTHER, InvalidTss, other),
        (GATE, SegmentNotPresent, u32::from(GATE)),
    ] {
        case(0, IRET, exception, error, &|m: &mut Machine| {
            m.cpu.rflags |= NT;
            m.set_descriptor(GATE, segment(TSS_B as u32, 0x67, 0x00B));
            m.poke(TSS, &link.to_le_bytes());
        });
    }
    // EXT when an interrupt comes through the gate.
    let mut m = two_tasks(0);
    m.set_gate(0x40, gate(5, OTHER, 0, 0, 0));
    m.set_descriptor(OTHER, segment(TSS_B as u32, 0x66, 0x089));
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(10, Some(other | 1));
}

/// After the registers are loaded a fault belongs to the new task.
#[test]
fn checks_in_the_new_task() {
    use Exception::*;
    let sel = |s: u16| u32::from(s & !3);
    let cases = [
        // Field of the TSS, its value, exception, error code.
        (0x60, 0x0C, InvalidTss, 0x0C),
        (0x60, DATA0, InvalidTss, sel(DATA0)),
        (0x60, SLOT_C, InvalidTss, sel(SLOT_C)),
        (0x4C, 0, InvalidTss, 0),
        (0x4C, BEYOND, InvalidTss, sel(BEYOND)),
        (0x4C, DATA0, InvalidTss, sel(DATA0)),
        (0x4C, CODE0 | 3, InvalidTss, sel(CODE0)),
        (0x4C, ABSENT_CODE, SegmentNotPresent, sel(ABSENT_CODE)),
        (0x50, 0, InvalidTss, 0),
        (0x50, DATA3, InvalidTss, sel(DATA3)),
        (0x50, READ_ONLY, InvalidTss, sel(READ_ONLY)),
        (0x50, SLOT_A, StackFault, sel(SLOT_A)),
        (0x54, BEYOND, InvalidTss, sel(BEYOND)),
        (0x48, EXECUTE_ONLY, InvalidTss, sel(EXECUTE_ONLY)),
        (0x58, DATA0 | 3, InvalidTss, sel(DATA0)),
        (0x5C, ABSENT_DATA, SegmentNotPresent, sel(ABSENT_DATA)),
    ];
    for (field, value, exception, code) in cases {
        let mut m = two_tasks(0);
        m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_DATA & !PRESENT));
        m.set_descriptor(SLOT_C, segment(LDT as u32, 0xFF, 0x002));
        m.poke(TSS_B + field, &value.to_le_bytes());
        let pending = m.try_step(&far(JMP, OTHER)).unwrap_err();
        assert_eq!((pending.vector, pending.error_code), (Some(exception), code), "TSS + {field:#x}");
        assert_eq!((m.cpu.tr.selector, m.gpr(RAX), m.rip()), (OTHER, 0xA0, OTHER_CODE), "TSS + {field:#x}");
    }
    let mut m = two_tasks(0);
    m.poke(TSS_B + 0x4C, &CODE0_16.to_le_bytes());
    m.poke(TSS_B + 0x20, &0x1_0000u32.to_le_bytes());
    let pending = m.try_step(&far(JMP, OTHER)).unwrap_err();
    assert_eq!((pending.vector, pending.error_code), (Some(GeneralProtection), 0));
}
