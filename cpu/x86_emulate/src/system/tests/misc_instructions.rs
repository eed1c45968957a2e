//! CPUID, time stamps, random numbers, HLT, cache and TLB instructions.

use super::machine::*;
use crate::core::PagingChange;
use crate::cpu::reg::*;
use crate::op::Step;
use x86_defs::Exception;
use x86_defs::control::*;
use x86_defs::flags::*;

#[test]
fn cpuid_writes_four_zero_extended_registers() {
    let mut m = Machine::long(3);
    m.cpu.gpr[RAX] = 0xFFFF_FFFF_0000_0007;
    m.cpu.gpr[RCX] = 0xFFFF_FFFF_0000_0002;
    m.step(&[0x0F, 0xA2]);
    assert_eq!([RAX, RBX, RCX, RDX].map(|r| m.gpr(r)), [7, 2, 0xCCCC_CCCC, 0xDDDD_DDDD]);
}

#[test]
fn time_stamps() {
    let gp = Exception::GeneralProtection;
    let mut m = Machine::long(3);
    m.cpu.msrs.tsc_aux = 5;
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x0F, 0x31]);
    assert_eq!((m.gpr(RAX), m.gpr(RDX)), (0x2345_6789, 1));
    m.step(&[0x0F, 0x01, 0xF9]);
    assert_eq!((m.gpr(RAX), m.gpr(RDX), m.gpr(RCX)), (0x2345_6789, 1, 5));
    m.step(&[0xF3, 0x0F, 0xC7, 0xFB]); // rdpid rbx
    assert_eq!(m.gpr(RBX), 5);
    m.cpu.cr4 |= CR4_TSD;
    m.faults(&[0x0F, 0x31], gp, 0);
    m.faults(&[0x0F, 0x01, 0xF9], gp, 0);
    // No counters.
    Machine::long(0).faults(&[0x0F, 0x33], gp, 0);
}

#[test]
fn random_numbers() {
    let mut m = Machine::long(3);
    m.cpu.set_rflags_all(OF | SF | ZF | AF | PF | FIXED_1);
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x66, 0x0F, 0xC7, 0xF0]); // rdrand ax
    assert_eq!((m.gpr(RAX), m.cpu.rflags_all()), (!0xFFFF | 0x3210, CF | FIXED_1));
    m.step(&[0x0F, 0xC7, 0xF8]); // rdseed eax
    assert_eq!(m.gpr(RAX), 0x7654_3210);
    m.step(&[0x48, 0x0F, 0xC7, 0xF0]);
    assert_eq!(m.gpr(RAX), 0xFEDC_BA98_7654_3210);
}

/// CPUID shows KVM's signature: guests may ask for hypercalls, of which there are none.
#[test]
fn hypercalls_are_answered() {
    for code in [[0x0F, 0x01, 0xC1], [0x0F, 0x01, 0xD9]] {
        for (cpl, answer) in [(0, -1000i64), (3, -1)] {
            let mut m = Machine::long(cpl);
            m.cpu.gpr[RAX] = 9;
            m.step(&code);
            assert_eq!(m.gpr(RAX), answer as u64);
        }
    }
}

/// Without WBNOINVD its prefix means nothing.
#[test]
fn wbnoinvd_is_wbinvd() {
    Machine::long(0).step(&[0xF3, 0x0F, 0x09]);
    Machine::long(3).faults(&[0xF3, 0x0F, 0x09], Exception::GeneralProtection, 0);
}

#[test]
fn hlt() {
    let mut m = Machine::long(0);
    assert_eq!(m.step(&[0xF4]), Step::Exit);
    assert!(m.cpu.halted);
    assert_eq!(m.rip(), CODE + 1);
    Machine::long(3).faults(&[0xF4], Exception::GeneralProtection, 0);
}

#[test]
fn tlb_instructions() {
    let gp = Exception::GeneralProtection;
    let mut m = Machine::long(0);
    m.cpu.gpr[RBX] = 0x1234_5678;
    m.cpu.seg[5].base = 0x1_0000_0000;
    m.cpu.refresh();
    m.step(&[0x65, 0x0F, 0x01, 0x3B]); // invlpg gs:[rbx]
    m.cpu.gpr[RBX] = 1 << 47;
    m.step(&[0x0F, 0x01, 0x3B]);
    assert_eq!(m.invalidated, [0x1_1234_5678]);
    Machine::long(3).faults(&[0x0F, 0x01, 0x3B], gp, 0);

    let invpcid: &[u8] = &[0x66, 0x0F, 0x38, 0x82, 0x03]; // invpcid rax, [rbx]
    Machine::long(3).faults(invpcid, gp, 0);
    // Type, PCID word, address, CR4.PCIDE, what happens.
    let cases = [
        (0, 5, 0x1000, true, Some(PagingChange::Address { pcid: 5, linear: 0x1000 })),
        (0, 0, 0x1000, false, Some(PagingChange::Address { pcid: 0, linear: 0x1000 })),
        (1, 7, 0, true, Some(PagingChange::Pcid(7))),
        (2, 0, 0, true, Some(PagingChange::All)),
        (3, 0, 0, true, Some(PagingChange::AllNonGlobal)),
        (0, 5, 0, false, None),
        (1, 5, 0, false, None),
        (0, 0x1000, 0, true, None),
        (0, 0, 1 << 47, true, None),
        (4, 0, 0, true, None),
        (1 << 32, 0, 0, true, None),
    ];
    for (kind, pcid, linear, pcide, change) in cases {
        let mut m = Machine::long(0);
        m.cpu.gpr[RAX] = kind;
        m.cpu.gpr[RBX] = DATA;
        m.poke(DATA, &u64::to_le_bytes(pcid));
        m.poke(DATA + 8, &u64::to_le_bytes(linear));
        m.cpu.cr4 |= if pcide { CR4_PCIDE } else { 0 };
        match change {
            Some(change) => {
                m.step(invpcid);
                assert_eq!(m.changes, [change]);
            }
            None => m.faults(invpcid, gp, 0),
        }
    }
}

#[test]
fn caches_fences_and_hints() {
    let gp = Exception::GeneralProtection;
    for code in [&[0x0F, 0x09][..], &[0x0F, 0x08]] {
        Machine::long(0).step(code);
        Machine::long(3).faults(code, gp, 0);
    }
    // CLFLUSH, CLFLUSHOPT, CLWB [rbx] fault as reads; prefetches never do.
    for code in [&[0x0F, 0xAE, 0x3B][..], &[0x66, 0x0F, 0xAE, 0x3B], &[0x66, 0x0F, 0xAE, 0x33]] {
        let mut m = Machine::long(3);
        m.cpu.gpr[RBX] = DATA;
        m.step(code);
        m.pages.insert(DATA >> 12, (false, false, false));
        m.faults(code, Exception::PageFault, 4);
    }
    for code in [&[0x0F, 0x18, 0x03][..], &[0x0F, 0x18, 0x0B], &[0x0F, 0x0D, 0x0B], &[0x0F, 0x0D, 0x03]] {
        let mut m = Machine::long(3);
        m.cpu.gpr[RBX] = 1 << 62;
        m.step(code);
    }
    for code in [[0x0F, 0xAE, 0xE8], [0x0F, 0xAE, 0xF0], [0x0F, 0xAE, 0xF8]] {
        Machine::long(3).step(&code);
    }
}

#[test]
fn what_the_models_do_not_have_is_undefined() {
    // MONITOR, MWAIT, VMLAUNCH, VMRUN, RSM, XBEGIN, UD0, UD1, UD2, GETSEC, ENCLS, RDPKRU, SERIALIZE.
    for code in [
        &[0x0F, 0x01, 0xC8][..],
        &[0x0F, 0x01, 0xC9],
        &[0x0F, 0x01, 0xC2],
        &[0x0F, 0x01, 0xD8],
        &[0x0F, 0xAA],
        &[0xC7, 0xF8, 0, 0, 0, 0],
        &[0x0F, 0xFF, 0xC0],
        &[0x0F, 0xB9, 0xC0],
        &[0x0F, 0x0B],
        &[0x0F, 0x37],
        &[0x0F, 0x01, 0xCF],
        &[0x0F, 0x01, 0xEE],
        &[0x0F, 0x01, 0xE8],
    ] {
        Machine::long(0).faults(code, Exception::InvalidOpcode, 0);
    }
}
