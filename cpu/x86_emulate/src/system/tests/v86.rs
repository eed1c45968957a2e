//! Virtual-8086 mode: interrupts out of it, IRET into it, VME.

use super::machine::*;
use crate::ModeKey;
use crate::cpu::reg::RSP;
use crate::system::interrupts::Outcome::*;
use x86_defs::Exception;
use x86_defs::control::*;
use x86_defs::flags::*;

#[test]
fn interrupts_save_all_segments_on_the_ring_0_stack() {
    let mut m = Machine::v86(0);
    for (i, s) in m.cpu.seg.iter_mut().enumerate() {
        s.selector = 0x100 * (i as u16 + 1);
    }
    assert_eq!(m.interrupt(0x40), Delivered);
    m.reached(0x40, None);
    assert!(!m.cpu.mode.has(ModeKey::V86));
    assert_eq!((m.cpu.cpl, m.gpr(RSP)), (0, KERNEL_STACK - 36));
    let frame: [u64; 9] = core::array::from_fn(|i| m.stacked::<u32>(i as u64));
    // EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
    assert_eq!(frame, [0, 0x200, VM | FIXED_1, 0x1000, 0x300, 0x100, 0x400, 0x500, 0x600]);
    for i in [0, 3, 4, 5] {
        assert!(m.cpu.seg[i].unusable && m.cpu.seg[i].selector == 0);
    }
    // And back.
    m.step(&[0xCF]);
    assert!(m.cpu.mode.has(ModeKey::V86));
    assert_eq!((m.cpu.cpl, m.gpr(RSP), m.rip()), (3, 0x1000, 0));
    let selectors: [u16; 6] = core::array::from_fn(|i| m.cpu.seg[i].selector);
    assert_eq!(selectors, [0x100, 0x200, 0x300, 0x400, 0x500, 0x600]);
    assert_eq!(m.cpu.seg[5].base, 0x6000);
    assert_eq!((m.cpu.seg[5].limit, m.cpu.seg[5].attributes.0), (0xFFFF, 0xF3));
}

#[test]
fn the_handler_must_be_in_ring_0() {
    for selector in [CODE1, CONFORMING] {
        let mut m = Machine::v86(0);
        m.set_gate(0x40, gate(0xE, selector, handler(0x40), 0, 0));
        assert_eq!(m.interrupt(0x40), Delivered);
        m.reached(13, Some(u32::from(selector) | 1));
    }
}

#[test]
fn iopl_decides_over_int_n_pushf_popf_cli_sti_iret() {
    let gp = Exception::GeneralProtection;
    for code in [&[0xCD, 0x80][..], &[0x9C], &[0x9D], &[0xFA], &[0xFB], &[0xCF], &[0x66, 0x9C], &[0x66, 0x9D]]
    {
        Machine::v86(0).faults(code, gp, 0);
        Machine::v86(3).step(code);
    }
    // INT3 is not IOPL-sensitive.
    let mut m = Machine::v86(0);
    m.step(&[0xCC]);
    m.reached(3, None);
    // A gate below DPL 3 refuses INT n even with IOPL 3.
    Machine::v86(3).faults(&[0xCD, 0x40], gp, 0x40 << 3 | 2);
}

fn vme(iopl: u64) -> Machine {
    let mut m = Machine::v86(iopl);
    m.cpu.cr4 |= CR4_VME;
    // Vector 0x21 of the guest's own table: 0x7000:0x0123.
    m.poke(0x21 * 4, &[0x23, 0x01, 0x00, 0x70]);
    m
}

#[test]
fn vme_redirects_to_the_guests_own_table() {
    let mut m = vme(0);
    m.cpu.rflags |= VIF | TF | IF;
    m.step(&[0xCD, 0x21]);
    assert!(m.cpu.mode.has(ModeKey::V86));
    assert_eq!((m.cpu.seg[1].selector, m.cpu.seg[1].base, m.rip()), (0x7000, 0x7_0000, 0x123));
    let frame: [u64; 3] = core::array::from_fn(|i| m.stacked::<u16>(i as u64));
    // IOPL as 3, IF as VIF was.
    assert_eq!(frame, [2, CODE >> 4, IOPL | IF | TF | FIXED_1]);
    assert_eq!(m.cpu.rflags & (VIF | TF | IF), IF);
    // With IOPL 3 the real IF is pushed and cleared.
    let mut m = vme(3);
    m.cpu.rflags |= IF;
    m.step(&[0xCD, 0x21]);
    assert_eq!(m.stacked::<u16>(2), IOPL | IF | FIXED_1);
    assert_eq!(m.cpu.rflags & IF, 0);
}

#[test]
fn a_set_bit_in_the_bitmap_keeps_the_monitor_in_charge() {
    let set = |m: &mut Machine| m.poke(TSS + 0x68 + 0x21 / 8, &[1 << (0x21 & 7)]);
    let mut m = vme(0);
    set(&mut m);
    m.faults(&[0xCD, 0x21], Exception::GeneralProtection, 0);
    let mut m = vme(3);
    set(&mut m);
    m.set_gate(0x21, gate(0xE, CODE0, handler(0x21), 3, 0));
    m.step(&[0xCD, 0x21]);
    m.reached(0x21, None);
    // The bitmap must be within the TSS.
    let mut m = vme(0);
    m.poke(TSS + 0x66, &0x10u16.to_le_bytes());
    m.faults(&[0xCD, 0x21], Exception::GeneralProtection, 0);
}

#[test]
fn vme_virtualises_if() {
    let mut m = vme(0);
    m.step(&[0xFB]); // STI
    assert_eq!(m.cpu.rflags & (VIF | IF), VIF);
    m.step(&[0x9C]); // PUSHF
    assert_eq!(m.stacked::<u16>(0), IOPL | IF | FIXED_1);
    m.step(&[0xFA]); // CLI
    assert_eq!(m.cpu.rflags & VIF, 0);
    m.step(&[0x9D]); // POPF
    assert_eq!(m.cpu.rflags & (VIF | IF | IOPL), VIF);
    // A pending virtual interrupt must be seen when VIF is set.
    m.cpu.rflags = m.cpu.rflags & !VIF | VIP;
    m.faults(&[0xFB], Exception::GeneralProtection, 0);
    m.step(&[0x9C]);
    m.poke(0x2_0000 + m.gpr(RSP), &(IF as u16).to_le_bytes());
    m.faults(&[0x9D], Exception::GeneralProtection, 0);
    m.poke(0x2_0000 + m.gpr(RSP), &(TF as u16).to_le_bytes());
    m.faults(&[0x9D], Exception::GeneralProtection, 0);
    // 32-bit forms are not virtualised.
    for code in [&[0x66, 0x9C][..], &[0x66, 0x9D], &[0x66, 0xCF]] {
        vme(0).faults(code, Exception::GeneralProtection, 0);
    }
}

#[test]
fn vme_iret_loads_vif() {
    let mut m = vme(0);
    m.poke(0x2_0F00, &[0x34, 0x12, 0x00, 0x60, 0x03, 0x02]);
    m.cpu.gpr[RSP] = 0xF00;
    m.step(&[0xCF]);
    assert_eq!((m.rip(), m.cpu.seg[1].selector, m.gpr(RSP)), (0x1234, 0x6000, 0xF06));
    assert_eq!(m.cpu.rflags_all(), VM | VIF | CF | FIXED_1);
    m.cpu.rflags = m.cpu.rflags & !VIF | VIP;
    m.cpu.gpr[RSP] = 0xF00;
    m.faults(&[0xCF], Exception::GeneralProtection, 0);
}

#[test]
fn iret_to_v86_needs_a_16_bit_ip_and_ring_0() {
    let words = |flags: u32, ip: u32| [0x6000, 0x5000, 0x4000, 0x3000, 0x2000, 0x800, flags, 0x1000, ip];
    let mut m = Machine::protected(0);
    m.push32(&words(VM as u32 | 0x3202, 0x1_0000));
    m.faults(&[0xCF], Exception::GeneralProtection, 0);
    let mut m = Machine::protected(0);
    m.push32(&words(VM as u32 | 0x3202, 0x55));
    m.step(&[0xCF]);
    assert_eq!((m.rip(), m.gpr(RSP), m.cpu.cpl), (0x55, 0x800, 3));
    assert_eq!(m.cpu.rflags_all(), VM | 0x3202);
    assert_eq!(m.cpu.seg[1].base, 0x1_0000);
    // Elsewhere VM in the image is ignored.
    let mut m = Machine::protected(3);
    m.push32(&[VM as u32 | 2, u32::from(CODE3), 0x55]);
    m.step(&[0xCF]);
    assert!(!m.cpu.mode.has(ModeKey::V86));
}

#[test]
fn instructions_that_v86_does_not_have() {
    // SLDT, STR, LLDT, LTR, LAR, LSL, VERR, VERW, ARPL.
    for code in [
        &[0x0F, 0x00, 0xC0][..],
        &[0x0F, 0x00, 0xC8],
        &[0x0F, 0x00, 0xD0],
        &[0x0F, 0x00, 0xD8],
        &[0x0F, 0x02, 0xC0],
        &[0x0F, 0x03, 0xC0],
        &[0x0F, 0x00, 0xE0],
        &[0x0F, 0x00, 0xE8],
        &[0x63, 0xC0],
    ] {
        Machine::v86(3).faults(code, Exception::InvalidOpcode, 0);
        Machine::real().faults(code, Exception::InvalidOpcode, 0);
    }
    // Privileged ones are #GP whatever the IOPL: HLT, MOV CR, LGDT, WRMSR, INVLPG.
    for code in [&[0xF4][..], &[0x0F, 0x20, 0xC0], &[0x0F, 0x01, 0x17], &[0x0F, 0x30], &[0x0F, 0x01, 0x3F]] {
        Machine::v86(3).faults(code, Exception::GeneralProtection, 0);
    }
}
