//! Debug registers, breakpoints, single step, shadows.

use super::machine::*;
use crate::cpu::reg::*;
use crate::system::debug;
use x86_defs::Exception;
use x86_defs::control::*;
use x86_defs::flags::{RF, TF};

fn to_dr(n: u8) -> [u8; 3] {
    [0x0F, 0x23, 0xC0 | n << 3]
}
fn from_dr(n: u8) -> [u8; 3] {
    [0x0F, 0x21, 0xC0 | n << 3]
}

#[test]
fn registers_and_their_fixed_bits() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RAX] = 0xFFFF_FFFF;
    for n in [0, 1, 2, 3, 6, 7] {
        m.step(&to_dr(n));
    }
    assert_eq!(m.cpu.dr[3], 0xFFFF_FFFF);
    assert_eq!(m.cpu.dr[6], 0xFFFF_EFFF);
    // GD is on now: the next access traps.
    assert_eq!(m.cpu.dr[7], 0xFFFF_27FF);
    m.cpu.dr[7] = DR7_FIXED_1;
    m.cpu.gpr[RAX] = 0;
    m.step(&to_dr(6));
    assert_eq!(m.cpu.dr[6], DR6_FIXED_1);
    m.cpu.gpr[RAX] = 1 << 32;
    m.faults(&to_dr(6), Exception::GeneralProtection, 0);
    m.faults(&to_dr(7), Exception::GeneralProtection, 0);
    m.step(&to_dr(0));
    m.step(&from_dr(0));
    assert_eq!(m.gpr(RAX), 1 << 32);
    Machine::long(3).faults(&from_dr(0), Exception::GeneralProtection, 0);
}

#[test]
fn dr4_and_dr5_are_aliases_without_de() {
    let mut m = Machine::long(0);
    m.step(&from_dr(5));
    assert_eq!(m.gpr(RAX), m.cpu.dr[7]);
    m.cpu.cr4 |= CR4_DE;
    m.faults(&from_dr(5), Exception::InvalidOpcode, 0);
    m.faults(&to_dr(4), Exception::InvalidOpcode, 0);
    // Even at CPL 3, where the others are #GP.
    let mut m = Machine::long(3);
    m.cpu.cr4 |= CR4_DE;
    m.faults(&from_dr(4), Exception::InvalidOpcode, 0);
}

#[test]
fn general_detect() {
    let mut m = Machine::long(0);
    m.cpu.dr[7] |= DR7_GD;
    let pending = m.try_step(&from_dr(0)).unwrap_err();
    assert_eq!((pending.vector, pending.address, pending.is_trap), (Some(Exception::Debug), DR6_BD, false));
    let _ = m.deliver(pending);
    assert_eq!((m.cpu.dr[6], m.cpu.dr[7]), (DR6_FIXED_1 | DR6_BD, DR7_FIXED_1));
    // A fault: RF in the image, RIP at the instruction.
    assert_eq!((m.stacked::<u64>(0), m.stacked::<u64>(2) & RF), (CODE, RF));
}

/// DR7 with breakpoint 0 enabled locally: kind and length code.
fn dr7(kind: u64, len: u64) -> u64 {
    DR7_FIXED_1 | 1 | kind << 16 | len << 18
}

#[test]
fn instruction_breakpoints_are_faults_that_rf_suppresses() {
    let mut m = Machine::long(0);
    m.cpu.dr[0] = 0x1234;
    assert_eq!(debug::breakpoint_at(&m.cpu, 0x1234), None);
    m.cpu.dr[7] = dr7(0, 0);
    let hit = debug::breakpoint_at(&m.cpu, 0x1234).expect("enabled");
    assert_eq!((hit.vector, hit.address, hit.is_trap), (Some(Exception::Debug), 1, false));
    assert_eq!(debug::breakpoint_at(&m.cpu, 0x1235), None);
    m.cpu.rflags |= RF;
    assert_eq!(debug::breakpoint_at(&m.cpu, 0x1234), None);
    // RF lives for one instruction.
    assert_eq!(debug::after_instruction(&mut m.cpu, false, false), None);
    assert!(debug::breakpoint_at(&m.cpu, 0x1234).is_some());
    // Delivery of an instruction breakpoint does not set RF in the image.
    let _ = m.deliver(hit);
    assert_eq!(m.stacked::<u64>(2) & RF, 0);
    // After MOV SS it does not hit.
    m.cpu.shadow_blocks_debug = true;
    assert_eq!(debug::breakpoint_at(&m.cpu, 0x1234), None);
}

#[test]
fn data_breakpoints_by_kind_length_and_overlap() {
    let mut m = Machine::long(0);
    m.cpu.dr[0] = 0x1004;
    // Kind, length code, access (address, bytes, write), hit.
    let cases = [
        (1, 3, (0x1004, 4, true), true),
        (1, 3, (0x1004, 4, false), false),
        (3, 3, (0x1004, 4, false), true),
        (3, 3, (0x1007, 1, false), true),
        (3, 3, (0x1008, 1, false), false),
        (3, 3, (0x1000, 8, false), true),
        (3, 3, (0x1000, 4, false), false),
        (1, 0, (0x1005, 1, true), false),
        (1, 0, (0x1004, 1, true), true),
        (1, 1, (0x1005, 1, true), true),
        // Eight bytes: the low bits of the address do not count.
        (1, 2, (0x1000, 1, true), true),
        (1, 2, (0x0FFF, 1, true), false),
        (0, 0, (0x1004, 1, true), false),
    ];
    for (kind, len, (at, bytes, write), hit) in cases {
        m.cpu.dr[7] = dr7(kind, len);
        let found = debug::data_access(&m.cpu, at, bytes, write);
        assert_eq!(found, u64::from(hit), "kind {kind} length {len} at {at:#x}");
    }
    m.cpu.dr[7] = dr7(3, 3);
    assert!(debug::watches_page(&m.cpu, 0x1000) && !debug::watches_page(&m.cpu, 0x2000));
    m.cpu.dr[7] = dr7(0, 0);
    assert!(!debug::watches_page(&m.cpu, 0x1000));
}

#[test]
fn traps_gather_until_the_instruction_ends() {
    let mut m = Machine::long(0);
    m.cpu.pending_debug = 2;
    let trap = debug::after_instruction(&mut m.cpu, true, false).expect("both");
    assert_eq!((trap.vector, trap.address, trap.is_trap), (Some(Exception::Debug), 2 | DR6_BS, true));
    assert_eq!(debug::after_instruction(&mut m.cpu, false, false), None);
    // A load of SS holds them off for one instruction, and loses none.
    m.cpu.pending_debug = 1;
    m.cpu.shadow_blocks_debug = true;
    assert_eq!(debug::after_instruction(&mut m.cpu, true, false), None);
    m.cpu.shadow_blocks_debug = false;
    assert_eq!(debug::after_instruction(&mut m.cpu, false, false).map(|t| t.address), Some(1));
}

#[test]
fn changes_of_watched_addresses_flush_the_tlb() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RAX] = 0x5000;
    m.step(&to_dr(0));
    assert!(m.changes.is_empty());
    m.cpu.gpr[RAX] = dr7(1, 0);
    m.step(&to_dr(7));
    m.step(&to_dr(1));
    m.cpu.gpr[RAX] = DR7_FIXED_1;
    m.step(&to_dr(7));
    assert_eq!(m.changes.len(), 3);
}

#[test]
fn single_step_on_branches_only() {
    let mut m = Machine::long(0);
    m.cpu.msrs.debugctl = 2;
    assert_eq!(debug::after_instruction(&mut m.cpu, true, false), None);
    assert_eq!(debug::after_instruction(&mut m.cpu, true, true).map(|t| t.address), Some(DR6_BS));
}

#[test]
fn entering_a_handler_without_tf_is_not_stepped() {
    let tf = |m: &mut Machine| {
        m.cpu.rflags |= TF;
        m.cpu.refresh();
    };
    // INT n and SYSCALL with TF in the mask: no trap at the handler's first instruction.
    let mut m = Machine::long(3);
    tf(&mut m);
    m.step(&[0xCD, 0x80]);
    assert_eq!(debug::after_instruction(&mut m.cpu, true, true), None);
    for (mask, trap) in [(TF, false), (0, true)] {
        let mut m = Machine::long(3);
        tf(&mut m);
        m.cpu.msrs.sfmask = mask;
        m.step(&[0x0F, 0x05]);
        assert_eq!(debug::after_instruction(&mut m.cpu, true, true).is_some(), trap);
    }
    // SYSENTER leaves TF alone: kernels know.
    let mut m = Machine::long(3);
    tf(&mut m);
    m.cpu.msrs.sysenter_cs = 8;
    m.step(&[0x0F, 0x34]);
    assert!(debug::after_instruction(&mut m.cpu, true, true).is_some());
    // Nothing stays behind when TF was clear.
    let mut m = Machine::long(3);
    m.step(&[0xCD, 0x80]);
    assert_eq!(m.cpu.pending_debug, 0);
}
