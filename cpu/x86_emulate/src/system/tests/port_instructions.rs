//! IN, OUT, INS, OUTS: permission, widths, repetition, faults before the port is touched.

use super::machine::*;
use crate::cpu::RIP;
use crate::cpu::reg::*;
use crate::op::Step;
use x86_defs::Exception;
use x86_defs::control::CR4_DE;
use x86_defs::flags::*;

const OUT_DX_AL: &[u8] = &[0xEE];

#[test]
fn widths_and_forms() {
    let mut m = Machine::long(0);
    m.in_value = 0x8765_4321;
    m.cpu.gpr[RDX] = 0xFFFF_0CF8;
    let reads: [(&[u8], u64); 4] = [
        (&[0xEC], !0xFF | 0x21),
        (&[0x66, 0xED], !0xFFFF | 0x4321),
        (&[0xED], 0x8765_4321),
        (&[0xE4, 0x80], !0xFF | 0x21),
    ];
    for (code, value) in reads {
        m.cpu.gpr[RAX] = !0;
        m.step(code);
        assert_eq!(m.gpr(RAX), value, "{code:02X?}");
    }
    assert_eq!(m.ins, [(0xCF8, 1), (0xCF8, 2), (0xCF8, 4), (0x80, 1)]);
    m.cpu.gpr[RAX] = 0xFFFF_FFFF_1234_5678;
    for code in [&[0xEE][..], &[0x66, 0xEF], &[0xEF], &[0xE7, 0xFF]] {
        m.step(code);
    }
    let expected = [(0xCF8, 1, 0x78), (0xCF8, 2, 0x5678), (0xCF8, 4, 0x1234_5678), (0xFF, 4, 0x1234_5678)];
    assert_eq!(m.outs, expected);
}

/// A user program with an I/O map of 0x100 bytes in its TSS that allows port 0x60 only.
fn with_bitmap(mut m: Machine) -> Machine {
    m.cpu.tr.limit = 0x68 + 0x100;
    m.poke(TSS + 0x66, &0x68u16.to_le_bytes());
    m.poke(TSS + 0x68, &[0xFF; 0x101]);
    m.poke(TSS + 0x68 + 0x60 / 8, &[0xFE]);
    m
}

#[test]
fn iopl_and_the_bitmap() {
    let gp = Exception::GeneralProtection;
    for machine in [Machine::long, Machine::protected] {
        let mut m = machine(3);
        m.faults(OUT_DX_AL, gp, 0);
        m.cpu.rflags |= IOPL;
        m.step(OUT_DX_AL);
        let mut m = with_bitmap(machine(3));
        for (port, code, allowed) in [
            (0x60, &[0xEE][..], true),
            (0x60, &[0xEC], true),
            (0x61, &[0xEE], false),
            (0x60, &[0x66, 0xEF], false),
            (0x5F, &[0x66, 0xEF], false),
            // Beyond the map.
            (0x7F8, &[0xEE], false),
            (0x800, &[0xEE], false),
            (0xFFFF, &[0xEE], false),
        ] {
            m.cpu.gpr[RDX] = port;
            if allowed {
                m.step(code);
            } else {
                m.faults(code, gp, 0);
            }
        }
        assert_eq!((m.outs.len(), m.ins.len()), (1, 1));
    }
    // The bitmap matters in virtual-8086 mode whatever the IOPL.
    let mut m = Machine::v86(3);
    m.poke(TSS + 0x88, &[0xFF; 0x100]);
    m.cpu.gpr[RDX] = 0x60;
    m.faults(OUT_DX_AL, gp, 0);
    m.poke(TSS + 0x88 + 0x60 / 8, &[0]);
    m.step(OUT_DX_AL);
    // A 16-bit TSS has none.
    let mut m = with_bitmap(Machine::protected(3));
    m.cpu.tr.attributes.0 = 0x83;
    m.cpu.gpr[RDX] = 0x60;
    m.faults(OUT_DX_AL, gp, 0);
}

#[test]
fn strings_and_direction() {
    let mut m = Machine::long(0);
    m.poke(DATA, b"abcdefgh");
    m.cpu.gpr[RSI] = DATA;
    m.cpu.gpr[RDX] = 0x3F8;
    m.cpu.gpr[RCX] = 3;
    m.step(&[0xF3, 0x6E]); // rep outsb
    assert_eq!(m.outs, [(0x3F8, 1, 0x61), (0x3F8, 1, 0x62), (0x3F8, 1, 0x63)]);
    assert_eq!((m.gpr(RSI), m.gpr(RCX), m.rip()), (DATA + 3, 0, CODE + 2));
    m.cpu.rflags |= DF;
    m.cpu.gpr[RDI] = DATA + 0x100;
    m.cpu.gpr[RCX] = 2;
    m.in_value = 0x1122_3344;
    m.step(&[0xF3, 0x6D]); // rep insd
    assert_eq!((m.gpr(RDI), m.peek::<u64>(DATA + 0xFC)), (DATA + 0xF8, 0x1122_3344_1122_3344));
    // A count of zero does nothing, with the address size deciding which count.
    m.cpu.gpr[RCX] = 1 << 32;
    m.step(&[0x67, 0xF3, 0x6C]);
    assert_eq!(m.gpr(RDI), DATA + 0xF8);
    // Without REP once.
    m.cpu.rflags &= !DF;
    m.step(&[0x66, 0x6D]);
    assert_eq!((m.gpr(RDI), m.gpr(RCX)), (DATA + 0xFA, 1 << 32));
}

#[test]
fn long_repetitions_let_interrupts_in() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RSI] = DATA;
    m.cpu.gpr[RCX] = 100;
    assert_eq!(m.step(&[0xF3, 0x6E]), Step::Branch);
    assert_eq!((m.gpr(RCX), m.rip()), (36, CODE));
    m.step(&[0xF3, 0x6E]);
    assert_eq!((m.gpr(RCX), m.rip(), m.outs.len()), (0, CODE + 2, 100));
}

#[test]
fn memory_is_checked_before_the_port() {
    let mut m = Machine::long(0);
    m.pages.insert((DATA >> 12) + 1, (true, false, true));
    m.cpu.gpr[RDI] = DATA + 0xFFE;
    m.cpu.gpr[RCX] = 3;
    let pending = m.try_step(&[0xF3, 0x6C]).unwrap_err(); // rep insb
    assert_eq!((pending.vector, pending.address), (Some(Exception::PageFault), DATA + 0x1000));
    // Two elements are done, the third has not touched the port.
    assert_eq!((m.ins.len(), m.gpr(RCX), m.gpr(RDI), m.cpu.gpr[RIP]), (2, 1, DATA + 0x1000, CODE));
    m.faults(&[0x6C], Exception::PageFault, 3);
    assert_eq!(m.ins.len(), 2);
    // A read-only segment.
    let mut m = Machine::protected(0);
    m.set_segment(x86_defs::SegmentIndex::Es, READ_ONLY);
    m.cpu.refresh();
    m.faults(&[0x6C], Exception::GeneralProtection, 0);
    assert!(m.ins.is_empty());
}

#[test]
fn io_breakpoints() {
    let mut m = Machine::long(0);
    m.cpu.dr[1] = 0x80;
    m.cpu.dr[7] |= 1 << 2 | 2 << 20;
    m.cpu.gpr[RDX] = 0x80;
    m.step(OUT_DX_AL);
    assert_eq!(m.cpu.pending_debug, 0, "only with CR4.DE");
    m.cpu.cr4 |= CR4_DE;
    m.step(OUT_DX_AL);
    assert_eq!(m.cpu.pending_debug, 2);
}
