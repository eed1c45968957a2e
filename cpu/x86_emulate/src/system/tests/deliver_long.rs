//! Interrupts and exceptions in IA-32e mode: frames, stacks, error codes, double and triple faults.

use super::machine::*;
use crate::cpu::{PendingException, RIP, reg::RSP};
use crate::system::interrupts::{self, Kind, Outcome::*};
use x86_defs::control::*;
use x86_defs::flags::*;
use x86_defs::{Exception, SegmentIndex};

#[test]
fn same_privilege_keeps_the_stack_and_aligns_it() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RSP] = KERNEL_STACK - 3;
    m.cpu.set_rflags_all(IF | TF | NT | CF | DF | FIXED_1);
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(0x40, None);
    assert_eq!(m.gpr(RSP), KERNEL_STACK - 0x10 - 40);
    let frame: [u64; 5] = core::array::from_fn(|i| m.stacked::<u64>(i as u64));
    let expected =
        [CODE, u64::from(CODE0), IF | TF | NT | CF | DF | FIXED_1, KERNEL_STACK - 3, u64::from(DATA0)];
    assert_eq!(frame, expected);
    assert_eq!(m.cpu.rflags_all(), CF | DF | FIXED_1);
    assert_eq!(m.cpu.segment(SegmentIndex::Ss).selector, DATA0);
}

#[test]
fn trap_gates_keep_if() {
    let mut m = Machine::long(0);
    m.set_gate(0x40, gate(0xF, CODE0, handler(0x40), 0, 0));
    m.cpu.set_rflags_all(IF | FIXED_1);
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!(m.cpu.rflags_all(), IF | FIXED_1);
}

#[test]
fn from_user_mode_the_stack_comes_from_the_tss() {
    let mut m = Machine::long(3);
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(0x40, None);
    let frame: [u64; 5] = core::array::from_fn(|i| m.stacked::<u64>(i as u64));
    assert_eq!(frame, [CODE, u64::from(CODE3), FIXED_1, USER_STACK, u64::from(DATA3)]);
    assert_eq!(m.gpr(RSP), KERNEL_STACK - 40);
    let (cs, ss) = (m.cpu.segment(SegmentIndex::Cs), m.cpu.segment(SegmentIndex::Ss));
    assert_eq!((cs.selector, ss.selector, ss.unusable, m.cpu.cpl), (CODE0, 0, true, 0));
    // Ring 1: RSP1 and a null selector with RPL 1.
    let mut m = Machine::long(3);
    m.set_gate(0x40, gate(0xE, CODE1, handler(0x40), 0, 0));
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!((m.gpr(RSP), m.cpu.cpl), (RING1_STACK - 40, 1));
    let (cs, ss) = (m.cpu.segment(SegmentIndex::Cs), m.cpu.segment(SegmentIndex::Ss));
    assert_eq!((cs.selector, ss.selector, ss.attributes.dpl()), (CODE1 | 1, 1, 1));
}

#[test]
fn ist_is_used_at_any_privilege() {
    for cpl in [0, 3] {
        let mut m = Machine::long(cpl);
        m.set_gate(0x40, gate(0xE, CODE0, handler(0x40), 0, 1));
        assert_eq!(m.interrupt(0x40), Delivered);
        assert_eq!(m.gpr(RSP), (IST1_STACK & !0xF) - 40);
        // Without a change of privilege SS stays.
        let ss = if cpl == 0 { DATA0 } else { 0 };
        assert_eq!(m.cpu.segment(SegmentIndex::Ss).selector, ss);
    }
}

#[test]
fn conforming_handlers_run_at_the_interrupted_privilege() {
    let mut m = Machine::long(3);
    m.set_gate(0x40, gate(0xE, CONFORMING, handler(0x40), 0, 0));
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!((m.cpu.cpl, m.gpr(RSP)), (3, USER_STACK - 40));
    assert_eq!(m.cpu.segment(SegmentIndex::Cs).selector, CONFORMING | 3);
}

#[test]
fn compatibility_mode_is_left_for_64_bit_code() {
    let mut m = Machine::long(3);
    m.set_segment(SegmentIndex::Cs, CODE3_32);
    m.cpu.refresh();
    assert!(!m.cpu.mode.is_long());
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(0x40, None);
    assert!(m.cpu.mode.is_long());
    assert_eq!(m.stacked::<u64>(1), u64::from(CODE3_32));
}

#[test]
fn error_codes_are_pushed_and_faults_set_rf_in_the_image() {
    let cases = [
        (Exception::DivideError, None, true),
        (Exception::InvalidOpcode, None, true),
        (Exception::InvalidTss, Some(0x30), true),
        (Exception::GeneralProtection, Some(0x18), true),
        (Exception::PageFault, Some(7), true),
        (Exception::AlignmentCheck, Some(0), true),
        (Exception::Simd, None, true),
        (Exception::MachineCheck, None, false),
        (Exception::DoubleFault, Some(0), false),
    ];
    for (exception, code, rf) in cases {
        let mut m = Machine::long(0);
        assert_eq!(m.exception(exception, code.unwrap_or(0)), Delivered);
        m.reached(exception.vector(), code);
        let frame = u64::from(code.is_some());
        assert_eq!(m.stacked::<u64>(frame), CODE);
        assert_eq!(m.stacked::<u64>(frame + 2) & RF != 0, rf, "{exception:?}");
    }
    // A trap's image keeps RF as it was.
    let mut m = Machine::long(0);
    let trap =
        PendingException { vector: Some(Exception::Debug), error_code: 0, address: DR6_BS, is_trap: true };
    assert_eq!(m.deliver(trap), Delivered);
    assert_eq!(m.stacked::<u64>(2) & RF, 0);
}

#[test]
fn page_faults_set_cr2_and_debug_exceptions_dr6() {
    let mut m = Machine::long(0);
    let fault = PendingException {
        vector: Some(Exception::PageFault),
        error_code: 2,
        address: 0x1234_5678,
        is_trap: false,
    };
    assert_eq!(m.deliver(fault), Delivered);
    assert_eq!(m.cpu.cr2, 0x1234_5678);

    let mut m = Machine::long(0);
    m.cpu.dr[6] |= 0xF | DR6_BD;
    m.cpu.dr[7] |= DR7_GD;
    m.cpu.msrs.debugctl = 3;
    let trap = PendingException {
        vector: Some(Exception::Debug),
        error_code: 0,
        address: DR6_BS | 4,
        is_trap: true,
    };
    assert_eq!(m.deliver(trap), Delivered);
    // B0–B3 are replaced, the others gather.
    assert_eq!(m.cpu.dr[6], DR6_FIXED_1 | DR6_BS | DR6_BD | 4);
    assert_eq!((m.cpu.dr[7] & DR7_GD, m.cpu.msrs.debugctl), (0, 0));
}

/// An external interrupt on vector 0x40 that cannot be delivered raises `exception(code)` instead.
#[track_caller]
fn external_raises(exception: Exception, code: u32, cpl: u8, spoil: impl Fn(&mut Machine)) {
    let mut m = Machine::long(cpl);
    // The handlers of the resulting exceptions work on a stack of their own.
    for vector in [8, 10, 11, 12, 13] {
        m.set_gate(vector, gate(0xE, CODE0, handler(vector), 0, 1));
    }
    spoil(&mut m);
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(exception.vector(), Some(code));
}

#[test]
fn every_error_code_of_a_bad_gate() {
    use Exception::*;
    const IDT_40: u32 = 0x40 << 3 | 2 | 1;
    let sel = |s: u16| u32::from(s) | 1;
    let gp = GeneralProtection;
    external_raises(gp, IDT_40, 0, |m| m.cpu.idtr.limit = 0x40F - 1);
    for kind in [0, 2, 5, 6, 7, 9, 0xB, 0xC, 0x1E] {
        external_raises(gp, IDT_40, 0, |m| m.set_gate(0x40, gate(kind, CODE0, handler(0x40), 0, 0)));
    }
    external_raises(SegmentNotPresent, IDT_40, 0, |m| {
        m.set_gate(0x40, gate(0xE, CODE0, handler(0x40), 0, 0) & !(0x80 << 40));
    });
    external_raises(gp, 1, 0, |m| m.set_gate(0x40, gate(0xE, 3, handler(0x40), 0, 0)));
    external_raises(gp, sel(BEYOND), 0, |m| m.set_gate(0x40, gate(0xE, BEYOND, handler(0x40), 0, 0)));
    // LDT not loaded.
    external_raises(gp, sel(0x0C), 0, |m| m.set_gate(0x40, gate(0xE, 0x0C, handler(0x40), 0, 0)));
    external_raises(gp, sel(DATA0), 0, |m| m.set_gate(0x40, gate(0xE, DATA0, handler(0x40), 0, 0)));
    external_raises(gp, sel(CODE0_32), 0, |m| m.set_gate(0x40, gate(0xE, CODE0_32, handler(0x40), 0, 0)));
    external_raises(gp, sel(CODE3 & !3), 0, |m| m.set_gate(0x40, gate(0xE, CODE3, handler(0x40), 0, 0)));
    external_raises(SegmentNotPresent, sel(ABSENT_CODE), 0, |m| {
        m.set_gate(0x40, gate(0xE, ABSENT_CODE, handler(0x40), 0, 0));
    });
    // A handler at a non-canonical address.
    external_raises(gp, 1, 0, |m| m.poke(IDT + 0x408, &0x0001_0000u32.to_le_bytes()));
    external_raises(InvalidTss, sel(TR), 3, |m| {
        m.cpu.tr.limit = 0x2B;
        m.set_gate(0x40, gate(0xE, CODE0, handler(0x40), 0, 2));
    });
    external_raises(StackFault, 1, 3, |m| m.poke(TSS + 4, &(0x8000_0000_1000u64).to_le_bytes()));
    external_raises(StackFault, 1, 0, |m| m.cpu.gpr[RSP] = 0x1234_0000_0000_0000);
}

#[test]
fn a_fault_while_pushing_reports_the_supervisor_access() {
    let mut m = Machine::long(3);
    m.pages.insert((KERNEL_STACK >> 12) - 1, (true, false, false));
    m.set_gate(14, gate(0xE, CODE0, handler(14), 0, 1));
    assert_eq!(m.interrupt(0x40), Delivered);
    // Present, write, not user.
    m.reached(14, Some(3));
    assert_eq!(m.cpu.cr2, KERNEL_STACK - 8);
    assert_eq!(m.stacked::<u64>(2), u64::from(CODE3), "the interrupted context is what it was");
}

#[test]
fn software_interrupts_need_the_gates_dpl_and_clear_ext() {
    let mut m = Machine::long(3);
    m.step(&[0xCD, 0x80]);
    m.reached(0x80, None);
    assert_eq!(m.stacked::<u64>(0), CODE + 2);
    Machine::long(3).faults(&[0xCD, 0x40], Exception::GeneralProtection, 0x40 << 3 | 2);
    // At CPL 0 any gate will do, and hardware interrupts never look at the DPL.
    Machine::long(0).step(&[0xCD, 0x40]);
    let mut m = Machine::long(0);
    m.set_gate(0x40, gate(0xE, ABSENT_CODE, handler(0x40), 0, 0));
    m.faults(&[0xCD, 0x40], Exception::SegmentNotPresent, u32::from(ABSENT_CODE));
    let mut m = Machine::long(3);
    m.step(&[0xCC]);
    m.reached(3, None);
    assert_eq!(m.stacked::<u64>(0), CODE + 1);
    // INT1 does not look at the DPL.
    let mut m = Machine::long(3);
    m.step(&[0xF1]);
    m.reached(1, None);
    assert_eq!(m.stacked::<u64>(0), CODE + 1);
}

/// Which exception results from `second` while delivering `first`: spoils first's gate so that it raises
/// `second`.
#[test]
fn the_double_fault_table() {
    use Exception::*;
    let np = |m: &mut Machine, v: Exception| {
        let raw = gate(0xE, CODE0, handler(v.vector()), 0, 0) & !(0x80 << 40);
        m.set_gate(v.vector(), raw);
    };
    // Benign, then contributory: the second alone.
    for first in [InvalidOpcode, Breakpoint, X87, AlignmentCheck, DeviceNotAvailable] {
        let mut m = Machine::long(0);
        np(&mut m, first);
        assert_eq!(m.exception(first, 0), Delivered);
        m.reached(SegmentNotPresent.vector(), Some(u32::from(first.vector()) << 3 | 3));
    }
    // Contributory or page fault, then contributory: double fault.
    for first in [DivideError, InvalidTss, StackFault, GeneralProtection, PageFault] {
        let mut m = Machine::long(0);
        np(&mut m, first);
        assert_eq!(m.exception(first, 0), Delivered);
        m.reached(DoubleFault.vector(), Some(0));
        assert_eq!(m.stacked::<u64>(1), CODE);
    }
    // Contributory, then page fault: the page fault; page fault, then page fault: double fault.
    for (first, result) in [(GeneralProtection, PageFault), (PageFault, DoubleFault)] {
        let mut m = Machine::long(3);
        m.pages.insert((KERNEL_STACK >> 12) - 1, (false, false, false));
        for vector in [PageFault.vector(), DoubleFault.vector()] {
            // Only `first` uses the broken stack.
            if first.vector() != vector {
                m.set_gate(vector, gate(0xE, CODE0, handler(vector), 0, 1));
            }
        }
        assert_eq!(m.exception(first, 0), Delivered);
        m.reached(result.vector(), Some(if result == PageFault { 2 } else { 0 }));
        assert_eq!(m.cpu.cr2, KERNEL_STACK - 8);
    }
}

#[test]
fn a_fault_in_delivering_a_double_fault_is_shutdown() {
    let mut m = Machine::long(0);
    m.cpu.idtr.limit = 0;
    assert_eq!(m.exception(Exception::GeneralProtection, 0), TripleFault);
    assert_eq!(m.interrupt(0x20), TripleFault);
    let mut m = Machine::long(0);
    m.set_gate(8, 0);
    assert_eq!(m.exception(Exception::DoubleFault, 0), TripleFault);
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut m = Machine::long(0);
    m.cpu.halted = true;
    m.cpu.interrupt_shadow = true;
    assert_eq!(interrupts::deliver_interrupt(&mut m, 2, Kind::Nmi), Delivered);
    assert!(m.cpu.nmi_blocked && !m.cpu.halted && !m.cpu.interrupt_shadow);
    m.step(&[0x48, 0xCF]);
    assert!(!m.cpu.nmi_blocked);
    assert_eq!(m.cpu.gpr[RIP], CODE);
}

#[test]
fn the_code_segment_gets_its_accessed_bit() {
    let mut m = Machine::long(0);
    m.set_descriptor(SLOT_A, segment(0, 0xF_FFFF, A_CODE64 & !1));
    m.set_gate(0x40, gate(0xE, SLOT_A, handler(0x40), 0, 0));
    assert_eq!(m.interrupt(0x40), Delivered);
    assert_eq!(m.descriptor(SLOT_A) >> 40 & 1, 1);
    assert_eq!(m.cpu.segment(SegmentIndex::Cs).attributes.0 & 1, 1);
}
