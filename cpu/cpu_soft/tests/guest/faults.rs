//! Faults during delivery: double fault, shutdown, and what combines to what (SDM vol. 3, table 6-5).

use crate::asm;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::Exception;
use x86_defs::paging::*;

/// A long-mode guest in which delivering vector `n` faults: with #GP (a gate of a type that does not exist),
/// #NP (a gate that is not present) or #PF (the handler's segment... the IST stack on an absent page).
fn breaking(vector: u8, by: Exception) -> Guest {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    tables.map(ABSENT, 0, 1);
    g.long_with(&tables);
    break_gate(&g, vector, by);
    g
}
const ABSENT: u64 = 0x4000_0000;

fn break_gate(g: &Guest, vector: u8, by: Exception) {
    let at = IDT + u64::from(vector) * 16;
    let target = STUBS + u64::from(vector) * 8;
    let [low, high] = match by {
        Exception::GeneralProtection => gate64(KCODE64, target, 0xE1, 0),
        Exception::SegmentNotPresent => gate64(KCODE64, target, 0x6E, 0),
        _ => {
            g.ram.store::<u64>(TSS + 0x24, ABSENT + 0x800);
            gate64(KCODE64, target, 0xEE, 1)
        }
    };
    g.ram.store(at, low);
    g.ram.store(at + 8, high);
}

/// Code that raises `vector`.
fn raise(a: &mut CodeAssembler, vector: u8) {
    match vector {
        0 => asm!(a; xor(ecx, ecx); div(ecx);),
        3 => asm!(a; int3();),
        6 => asm!(a; ud2();),
        13 => asm!(a; mov(ecx, 0x1F0); mov(ds, cx);),
        14 => asm!(a; mov(rax, qword_ptr(ABSENT));),
        _ => asm!(a; int(i32::from(vector));),
    }
    a.hlt().unwrap();
}

#[test]
fn what_combines_to_a_double_fault() {
    use Exception::*;
    // (first, met while delivering it, delivered in the end)
    for (first, second, result) in [
        (DivideError, GeneralProtection, DoubleFault),
        (DivideError, SegmentNotPresent, DoubleFault),
        (DivideError, PageFault, PageFault),
        (GeneralProtection, SegmentNotPresent, DoubleFault),
        (GeneralProtection, PageFault, PageFault),
        (PageFault, GeneralProtection, DoubleFault),
        (PageFault, SegmentNotPresent, DoubleFault),
        (PageFault, PageFault, DoubleFault),
        (InvalidOpcode, GeneralProtection, GeneralProtection),
        (InvalidOpcode, SegmentNotPresent, SegmentNotPresent),
        (InvalidOpcode, PageFault, PageFault),
        (Breakpoint, GeneralProtection, GeneralProtection),
    ] {
        let mut g = breaking(first.vector(), second);
        g.code(|a| raise(a, first.vector()));
        let frame = g.run_to_stub();
        assert_eq!(frame.vector, result.vector(), "{first:?} then {second:?}");
        let idt_error = u32::from(first.vector()) << 3 | 2;
        // EXT: the first was not a software interrupt.
        let ext = u32::from(first != Breakpoint);
        match result {
            DoubleFault => assert_eq!(frame.error, Some(0)),
            PageFault => assert_eq!((frame.error, g.state().cr2 >> 12), (Some(PF_WRITE), ABSENT >> 12)),
            _ => assert_eq!(frame.error, Some(idt_error | ext), "{first:?} then {second:?}"),
        }
    }
}
const PF_WRITE: u32 = x86_defs::exception::PF_WRITE;

#[test]
fn external_interrupts_are_benign() {
    use Exception::*;
    for (by, vector) in [(GeneralProtection, 13), (SegmentNotPresent, 11), (PageFault, 14)] {
        let mut g = breaking(0x50, by).with_x2apic();
        g.send(0x50);
        g.code(|a| asm!(a; sti(); nop(); nop(); hlt();));
        let frame = g.run_to_stub();
        assert_eq!((frame.vector, frame.rip), (vector, CODE + 2));
        if by != PageFault {
            assert_eq!(frame.error, Some(0x50 << 3 | 2 | 1), "EXT is set");
        }
    }
}

#[test]
fn triple_fault_shuts_down() {
    let mut g = breaking(8, Exception::GeneralProtection);
    break_gate(&g, 13, Exception::SegmentNotPresent);
    g.code(|a| raise(a, 13));
    assert_eq!(g.run(), Stop::TripleFault);
    assert_eq!(g.state().run_state, RunState::Shutdown);
    assert_eq!(g.run(), Stop::TripleFault, "it stays there");
    // A restored shutdown is one.
    let state = g.state();
    let mut other = Guest::long();
    other.vcpu.restore(&state).unwrap();
    assert_eq!(other.run(), Stop::TripleFault);
    // Reset leads out.
    g.vcpu.reset();
    g.put(ROM + 0xFFF0, &[0xF4]);
    assert_eq!(g.run_to_halt().rip, 0xFFF1);
}

#[test]
fn an_empty_idt_is_a_triple_fault() {
    for vector in [0u8, 6, 13, 0x80] {
        let mut g = Guest::long();
        g.edit(|s| s.idtr.limit = 0);
        g.code(|a| raise(a, vector));
        assert_eq!(g.run(), Stop::TripleFault, "{vector}");
    }
    let mut g = Guest::long();
    g.edit(|s| s.idtr.limit = 0);
    let sink = g.partition.irq_sink();
    g.io.on_out(move |_, _| apic::send(&sink, 0, apic::NMI));
    g.code(|a| asm!(a; out(1, al); nop(); hlt();));
    assert_eq!(g.run(), Stop::TripleFault, "by an NMI");
}

#[test]
fn a_double_fault_keeps_the_state_of_the_first() {
    let mut g = breaking(14, Exception::PageFault);
    g.code(|a| asm!(a; mov(eax, 7); mov(qword_ptr(ABSENT + 0x10), rax); hlt();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (8, CODE + 5));
    assert_eq!(g.state().gpr[0], 7);
    assert_eq!(g.state().cr2, ABSENT + 0x800 - 8, "the second page fault's");
}
