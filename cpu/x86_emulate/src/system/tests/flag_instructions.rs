//! PUSHF, POPF, CLI, STI, CLAC, STAC outside virtual-8086 mode.

use super::machine::*;
use crate::cpu::reg::RSP;
use crate::op::Step;
use x86_defs::Exception;
use x86_defs::control::*;
use x86_defs::flags::*;

#[test]
fn pushf_hides_rf() {
    let mut m = Machine::long(0);
    m.cpu.rflags |= RF | IF;
    m.step(&[0x9C]);
    assert_eq!(m.stacked::<u64>(0), IF | FIXED_1);
}

#[test]
fn popf_by_privilege() {
    let image = ALL | FIXED_1;
    let kept = VM | RF | VIF | VIP;
    for (cpl, iopl, changeable) in
        [(0, 0, image & !kept), (3, 3, image & !kept & !IOPL), (3, 0, image & !kept & !IOPL & !IF)]
    {
        let mut m = Machine::long(cpl);
        m.cpu.rflags |= iopl << IOPL_SHIFT;
        let before = m.cpu.rflags;
        m.push64(&[image]);
        m.step(&[0x9D]);
        assert_eq!(m.cpu.rflags_all(), before & !changeable | image & changeable, "CPL {cpl}, IOPL {iopl}");
    }
    // 16 bits change nothing above.
    let mut m = Machine::long(0);
    m.cpu.rflags |= AC;
    m.push64(&[!0]);
    m.step(&[0x66, 0x9D]);
    assert_eq!(m.cpu.rflags_all(), 0x7FD7 | AC);
    assert_eq!(m.gpr(RSP) & 7, 2);
}

#[test]
fn popf_ends_the_block_only_if_something_depends_on_it() {
    let mut m = Machine::long(0);
    m.push64(&[IF | FIXED_1, CF | DF | FIXED_1]);
    assert_eq!(m.step(&[0x9D]), Step::Next);
    assert_eq!(m.cpu.rflags_all(), CF | DF | FIXED_1);
    assert_eq!(m.step(&[0x9D]), Step::Branch);
    assert_eq!(m.cpu.rflags_all(), IF | FIXED_1);
}

#[test]
fn cli_and_sti_follow_iopl_and_pvi() {
    let gp = Exception::GeneralProtection;
    for (cpl, iopl, allowed) in [(0, 0, true), (3, 3, true), (3, 0, false), (1, 0, false), (1, 1, true)] {
        let mut m = Machine::protected(cpl);
        m.cpu.rflags |= iopl << IOPL_SHIFT;
        if allowed {
            m.step(&[0xFB]);
            assert!(m.cpu.rflags & IF != 0 && m.cpu.interrupt_shadow);
            // No shadow if interrupts were on.
            m.step(&[0xFB]);
            assert!(!m.cpu.interrupt_shadow);
            m.step(&[0xFA]);
            assert_eq!(m.cpu.rflags & IF, 0);
        } else {
            m.faults(&[0xFB], gp, 0);
            m.faults(&[0xFA], gp, 0);
        }
    }
    let mut m = Machine::protected(3);
    m.cpu.cr4 |= CR4_PVI;
    m.step(&[0xFB]);
    assert_eq!(m.cpu.rflags & (IF | VIF), VIF);
    m.step(&[0xFA]);
    assert_eq!(m.cpu.rflags & (IF | VIF), 0);
    m.cpu.rflags |= VIP;
    m.faults(&[0xFB], gp, 0);
    // PVI is for ring 3 only.
    let mut m = Machine::protected(1);
    m.cpu.cr4 |= CR4_PVI;
    m.faults(&[0xFB], gp, 0);
}

#[test]
fn clac_and_stac_choose_the_tlb() {
    let (clac, stac): (&[u8], &[u8]) = (&[0x0F, 0x01, 0xCA], &[0x0F, 0x01, 0xCB]);
    let mut m = Machine::long(0);
    m.cpu.cr4 |= CR4_SMAP;
    m.cpu.refresh();
    assert_eq!(m.cpu.mmu_index, 1);
    m.step(stac);
    assert_eq!((m.cpu.mmu_index, m.cpu.rflags & AC), (2, AC));
    m.step(clac);
    assert_eq!((m.cpu.mmu_index, m.cpu.rflags & AC), (1, 0));
    Machine::long(3).faults(stac, Exception::InvalidOpcode, 0);
    let mut m = Machine::long(0);
    m.features.remove(x86_defs::cpuid::Feature::Smap);
    m.faults(stac, Exception::InvalidOpcode, 0);
}
