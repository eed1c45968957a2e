//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the bases of FS and GS.

use super::machine::*;
use crate::cpu::reg::*;
use x86_defs::control::*;
use x86_defs::flags::*;
use x86_defs::{Exception, SegmentIndex};

const SYSCALL: &[u8] = &[0x0F, 0x05];
const SYSRETQ: &[u8] = &[0x48, 0x0F, 0x07];
const SYSRETD: &[u8] = &[0x0F, 0x07];
const SYSENTER: &[u8] = &[0x0F, 0x34];
const SYSEXIT: &[u8] = &[0x0F, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0F, 0x35];
const SWAPGS: &[u8] = &[0x0F, 0x01, 0xF8];

fn machine(cpl: u8) -> Machine {
    let mut m = Machine::long(cpl);
    m.cpu.msrs.star = 0x001B_0008 << 32;
    m.cpu.msrs.lstar = 0xFFFF_8000_1234_0000;
    m.cpu.msrs.sfmask = IF | TF | DF | AC;
    m.cpu.msrs.sysenter_cs = 8;
    m.cpu.msrs.sysenter_eip = 0xFFFF_8000_0000_1000;
    m.cpu.msrs.sysenter_esp = 0xFFFF_8000_0000_2000;
    m
}

#[test]
fn syscall_and_sysret() {
    let mut m = machine(3);
    m.cpu.set_rflags_all(IF | DF | CF | ZF | FIXED_1);
    m.step(SYSCALL);
    assert_eq!((m.rip(), m.cpu.cpl, m.gpr(RSP)), (0xFFFF_8000_1234_0000, 0, USER_STACK));
    assert_eq!((m.gpr(RCX), m.gpr(R11)), (CODE + 2, IF | DF | CF | ZF | FIXED_1));
    assert_eq!(m.cpu.rflags_all(), CF | ZF | FIXED_1);
    let (cs, ss) = (m.cpu.seg[1], m.cpu.seg[2]);
    assert_eq!((cs.selector, cs.attributes.0, ss.selector, ss.attributes.0), (8, 0xA9B, 0x10, 0xC93));
    assert_eq!(m.cpu.mmu_index, 2);

    m.cpu.gpr[RCX] = 0x1234;
    m.cpu.gpr[R11] = !0;
    m.step(SYSRETQ);
    assert_eq!((m.rip(), m.cpu.cpl), (0x1234, 3));
    // VM, RF and reserved bits stay zero.
    assert_eq!(m.cpu.rflags_all(), 0x003C_7FD7);
    let (cs, ss) = (m.cpu.seg[1], m.cpu.seg[2]);
    assert_eq!((cs.selector, cs.attributes.0, ss.selector, ss.attributes.0), (0x2B, 0xAFB, 0x23, 0xCF3));
    assert_eq!(m.cpu.mmu_index, 0);

    let mut m = machine(0);
    m.cpu.gpr[RCX] = 0xFFFF_FFFF_0000_1234;
    m.cpu.gpr[R11] = FIXED_1;
    m.step(SYSRETD);
    assert_eq!((m.rip(), m.cpu.seg[1].selector, m.cpu.seg[1].attributes.0), (0x1234, 0x1B, 0xCFB));
    assert!(!m.cpu.mode.is_long());
}

#[test]
fn where_syscall_and_sysret_are_refused() {
    use Exception::*;
    let mut m = machine(3);
    m.cpu.efer &= !EFER_SCE;
    m.faults(SYSCALL, InvalidOpcode, 0);
    m.faults(SYSRETQ, InvalidOpcode, 0);
    // As Intel's processors: not in compatibility or protected mode.
    let mut m = machine(3);
    m.set_segment(SegmentIndex::Cs, CODE3_32);
    m.cpu.refresh();
    m.faults(SYSCALL, InvalidOpcode, 0);
    let mut m = Machine::protected(3);
    m.cpu.efer = EFER_SCE;
    m.faults(SYSCALL, InvalidOpcode, 0);
    machine(3).faults(SYSRETQ, GeneralProtection, 0);
    // A non-canonical target faults in ring 0.
    let mut m = machine(0);
    m.cpu.gpr[RCX] = 1 << 47;
    m.faults(SYSRETQ, GeneralProtection, 0);
    m.step(SYSRETD);
}

#[test]
fn sysenter_and_sysexit() {
    let mut m = machine(3);
    m.cpu.set_rflags_all(IF | CF | FIXED_1);
    m.step(SYSENTER);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0xFFFF_8000_0000_1000, 0xFFFF_8000_0000_2000, 0));
    assert_eq!((m.cpu.rflags_all(), m.cpu.seg[1].selector, m.cpu.seg[2].selector), (CF | FIXED_1, 8, 0x10));
    m.cpu.gpr[RDX] = 0x1111;
    m.cpu.gpr[RCX] = 0x2222;
    m.step(SYSEXITQ);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x1111, 0x2222, 3));
    assert_eq!((m.cpu.seg[1].selector, m.cpu.seg[2].selector), (8 + 32 + 3, 8 + 40 + 3));
    assert!(m.cpu.mode.is_long());

    // From compatibility mode into 64-bit code, and back to it.
    let mut m = machine(3);
    m.set_segment(SegmentIndex::Cs, CODE3_32);
    m.cpu.refresh();
    m.step(SYSENTER);
    assert!(m.cpu.mode.is_long());
    m.cpu.gpr[RDX] = 0xFFFF_FFFF_0000_1111;
    m.step(SYSEXIT);
    assert_eq!((m.rip(), m.cpu.seg[1].selector), (0x1111, 8 + 16 + 3));
    assert!(!m.cpu.mode.is_long());

    // In protected mode 32 bits are loaded.
    let mut m = Machine::protected(3);
    m.cpu.msrs = machine(3).cpu.msrs;
    m.step(SYSENTER);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x1000, 0x2000, 0));
}

#[test]
fn where_sysenter_and_sysexit_are_refused() {
    let gp = Exception::GeneralProtection;
    let mut m = machine(3);
    m.faults(SYSEXIT, gp, 0);
    m.cpu.msrs.sysenter_cs = 3;
    m.faults(SYSENTER, gp, 0);
    let mut m = machine(0);
    m.cpu.msrs.sysenter_cs = 0;
    m.faults(SYSEXIT, gp, 0);
    Machine::real().faults(SYSENTER, gp, 0);
    let mut m = machine(0);
    m.cpu.gpr[RDX] = 1 << 47;
    m.faults(SYSEXITQ, gp, 0);
    m.cpu.gpr[RDX] = 0;
    m.cpu.gpr[RCX] = 1 << 47;
    m.faults(SYSEXITQ, gp, 0);
}

#[test]
fn swapgs_and_the_bases() {
    let mut m = Machine::long(0);
    m.cpu.msrs.kernel_gs_base = 0xFFFF_8000_0000_0000;
    m.cpu.seg[5].base = 0x1000;
    m.step(SWAPGS);
    assert_eq!((m.cpu.seg[5].base, m.cpu.seg_base[5]), (0xFFFF_8000_0000_0000, 0xFFFF_8000_0000_0000));
    assert_eq!(m.cpu.msrs.kernel_gs_base, 0x1000);
    Machine::long(3).faults(SWAPGS, Exception::GeneralProtection, 0);

    let mut m = Machine::long(3);
    let wrfsbase_rax: &[u8] = &[0xF3, 0x48, 0x0F, 0xAE, 0xD0];
    m.faults(wrfsbase_rax, Exception::InvalidOpcode, 0);
    m.cpu.cr4 |= CR4_FSGSBASE;
    m.cpu.gpr[RAX] = 0x7000_1234_5678;
    m.step(wrfsbase_rax);
    assert_eq!((m.cpu.seg[4].base, m.cpu.seg_base[4]), (0x7000_1234_5678, 0x7000_1234_5678));
    m.step(&[0xF3, 0x48, 0x0F, 0xAE, 0xC3]); // rdfsbase rbx
    assert_eq!(m.gpr(RBX), 0x7000_1234_5678);
    m.step(&[0xF3, 0x0F, 0xAE, 0xC1]); // rdfsbase ecx
    assert_eq!(m.gpr(RCX), 0x1234_5678);
    m.step(&[0xF3, 0x0F, 0xAE, 0xD8]); // wrgsbase eax
    assert_eq!(m.cpu.seg[5].base, 0x1234_5678);
    m.cpu.gpr[RAX] = 1 << 47;
    m.faults(wrfsbase_rax, Exception::GeneralProtection, 0);
}
