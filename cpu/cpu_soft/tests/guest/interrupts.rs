//! Interrupts: shadows, blocking, priorities, the 8259's, end of interrupt (SDM vol. 3, 6.8 and 11.8).

use crate::asm;
use crate::harness::apic::*;
use crate::harness::guest::to_user64;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::flags;

const VECTOR: u32 = 0x50;

/// An APIC guest with `data` posted before it starts.
fn with_pending(data: u32) -> Guest {
    let g = Guest::long().with_x2apic();
    g.send(data);
    g
}

/// Runs `code` with vector 0x50 pending and gives how far it came before the interrupt, in bytes.
fn taken_at(code: impl FnOnce(&mut CodeAssembler)) -> u64 {
    let mut g = with_pending(VECTOR);
    g.code(code);
    let frame = g.run_to_stub();
    assert_eq!(u32::from(frame.vector), VECTOR);
    frame.rip - CODE
}

#[test]
fn sti_holds_off_for_one_instruction() {
    assert_eq!(taken_at(|a| asm!(a; sti(); nop(); nop(); hlt();)), 2);
    // The next instruction is HLT: it halts and wakes at once.
    assert_eq!(taken_at(|a| asm!(a; sti(); hlt(); ud2();)), 2);
    // With IF set already there is no shadow; the interrupt comes before the first instruction anyway.
    let mut g = with_pending(VECTOR);
    g.edit(|s| s.rflags |= flags::IF);
    g.code(|a| asm!(a; sti(); nop(); hlt();));
    assert_eq!(g.run_to_stub().rip, CODE);
}

#[test]
fn sti_and_cli_let_nothing_through() {
    let mut g = with_pending(VECTOR);
    g.code(|a| asm!(a; sti(); cli(); nop(); hlt();));
    assert_eq!(g.run_to_halt().rip, CODE + 4);
}

#[test]
fn loads_of_ss_hold_off_for_one_instruction() {
    assert_eq!(
        taken_at(|a| asm!(a; mov(eax, i32::from(KDATA as i16)); sti(); mov(ss, ax); nop(); nop(); hlt();)),
        10
    );
    // LSS brings its own stack pointer: no shadow.
    let mut g = with_pending(VECTOR);
    g.ram.store::<u64>(DATA, STACK | u64::from(KDATA) << 32);
    g.code(|a| asm!(a; sti(); lss(esp, dword_ptr(DATA)); nop(); nop(); hlt();));
    let lss_length = 8;
    assert_eq!(g.run_to_stub().rip - CODE, 1 + lss_length);
}

#[test]
fn popf_and_iret_let_it_in_at_once() {
    assert_eq!(taken_at(|a| asm!(a; pushfq(); or(qword_ptr(rsp), 0x200); popfq(); nop(); hlt();)), 10);
    let mut g = with_pending(VECTOR);
    g.code(|a| {
        let mut to = a.create_label();
        asm!(a; mov(rcx, rsp); push(KDATA as i32); push(rcx); pushfq(); or(qword_ptr(rsp), 0x200);
            push(KCODE64 as i32); lea(rax, qword_ptr(to)); push(rax); iretq(); ud2(););
        a.set_label(&mut to).unwrap();
        asm!(a; inc(rbx); hlt(););
    });
    let frame = g.run_to_stub();
    assert_eq!((u32::from(frame.vector), g.state().gpr[3]), (VECTOR, 0));
}

#[test]
fn nmi_is_blocked_until_iret() {
    let mut g = Guest::long().with_x2apic();
    let sink = g.partition.irq_sink();
    // Port 1 sends an NMI.
    g.io.on_out(move |port, _| {
        if port == 1 {
            send(&sink, 0, NMI);
        }
    });
    g.handler64(2, CODE + 0x1000, |a| {
        let mut second = a.create_label();
        asm!(a; inc(ebx); mov(eax, ebx); out(2, eax); cmp(ebx, 2); jae(second);
            // Two more arrive: one is kept, and waits for the IRET.
            out(1, al); out(1, al); nop(); mov(eax, 0x10); out(2, eax););
        a.set_label(&mut second).unwrap();
        asm!(a; mov(eax, 0x20); out(2, eax); iretq(););
    });
    g.code(|a| asm!(a; xor(ebx, ebx); out(1, al); nop(); mov(eax, 0x99); out(2, eax); hlt();));
    g.run_to_halt();
    assert_eq!(g.io.outs(2), [1, 0x10, 0x20, 2, 0x20, 0x99], "with IF clear all the way");
    assert!(!g.state().nmi_blocked);
}

#[test]
fn nmi_wakes_hlt_with_interrupts_off() {
    let mut g = Guest::long().with_x2apic();
    g.code(|a| asm!(a; hlt(); ud2();));
    g.run_to_halt();
    g.send(VECTOR);
    assert_eq!(g.run(), Stop::Halted(None), "IF is clear");
    g.send(NMI);
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (2, CODE + 1));
    assert!(g.state().nmi_blocked);
}

#[test]
fn cr8_masks_by_class() {
    let mut g = with_pending(VECTOR);
    g.code(|a| {
        asm!(a; mov(eax, 5); mov(cr8, rax); mov(rbx, cr8); sti(); nop(); nop(); mov(esi, 1);
            mov(eax, 4); mov(cr8, rax); mov(esi, 2); hlt(););
    });
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!((u32::from(frame.vector), s.gpr[3], s.gpr[6]), (VECTOR, 5, 1));
}

#[test]
fn cr8_and_tpr_are_one_register() {
    let mut g = Guest::long().with_x2apic();
    g.code(|a| {
        asm!(a; mov(eax, 0xB); mov(cr8, rax); mov(ecx, X2_TPR); rdmsr(); mov(ebx, eax););
        wrmsr(a, X2_TPR, 0x3C);
        asm!(a; mov(rsi, cr8); mov(eax, 16); mov(cr8, rax););
    });
    assert_eq!(g.run_to_stub().vector, 13, "values above 15 are #GP");
    let s = g.state();
    assert_eq!((s.gpr[3], s.gpr[6]), (0xB0, 3));
}

#[test]
fn the_higher_vector_goes_first_and_nests() {
    let mut g = Guest::long().with_x2apic();
    for vector in [0x41, 0x45, 0x61] {
        g.handler64(vector, CODE + 0x1000 + u64::from(vector) * 0x20, |a| {
            asm!(a; mov(al, u32::from(vector)); out(2, al););
            eoi(a);
            asm!(a; iretq(););
        });
        g.send(u32::from(vector));
    }
    g.code(|a| asm!(a; sti(); nop(); nop(); cli(); hlt();));
    g.run_to_halt();
    assert_eq!(g.io.outs(2), [0x61, 0x45, 0x41]);
    // Without an EOI the same class stays blocked, a higher one does not.
    let mut g = with_pending(0x45);
    g.handler64(0x45, CODE + 0x1000, |a| asm!(a; mov(al, 0x45); out(2, al); sti(); nop(); nop(); hlt();));
    g.code(|a| asm!(a; sti(); nop(); nop(); cli(); hlt();));
    g.run_to_halt();
    g.send(0x41);
    assert!(matches!(g.run(), Stop::Halted(_)));
    assert_eq!(g.io.outs(2), [0x45]);
    g.send(0x51);
    assert_eq!(g.run_to_stub().vector, 0x51);
}

#[test]
fn level_triggered_eoi_is_reported() {
    let mut g = Guest::long().with_x2apic();
    for vector in [0x33u8, 0x44] {
        g.handler64(vector, CODE + 0x1000 + u64::from(vector) * 0x20, |a| {
            eoi(a);
            asm!(a; iretq(););
        });
    }
    g.send(0x33 | LEVEL);
    g.send(0x44);
    g.code(|a| asm!(a; sti(); nop(); nop(); nop(); cli(); hlt();));
    g.run_to_halt();
    assert_eq!(g.io.eois(), [0x33]);
}

#[test]
fn the_8259_gives_its_vector_by_acknowledge() {
    let mut g = Guest::long();
    g.io.pic.lock().unwrap().push(0x30);
    g.partition.irq_sink().pic_line_changed(true);
    g.code(|a| asm!(a; nop(); sti(); nop(); nop(); hlt();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (0x30, CODE + 3));
    assert_eq!(g.io.take(), [io::Event::PicAck]);
}

#[test]
fn an_8259_that_no_longer_asks_hides_nothing() {
    // The 8259 withdraws: the local APIC's own interrupt must still be taken, from HLT too.
    let mut g = Guest::long().with_x2apic();
    g.code(|a| asm!(a; sti(); hlt(); ud2();));
    assert!(matches!(g.run(), Stop::Halted(_)));
    g.partition.irq_sink().pic_line_changed(true);
    g.send(VECTOR);
    assert_eq!(u32::from(g.run_to_stub().vector), VECTOR);
}

#[test]
fn rep_is_interrupted_in_the_middle() {
    let mut g = Guest::long().with_x2apic();
    let sink = g.partition.irq_sink();
    let seen = std::sync::atomic::AtomicU32::new(0);
    g.io.on_out(move |_, _| {
        if seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == 9 {
            send(&sink, 0, VECTOR);
        }
    });
    g.code(|a| asm!(a; mov(esi, DATA as u32); mov(ecx, 5000); mov(dx, 7); sti(); nop(); db(&[0xF3, 0x6E]); hlt();));
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!(u32::from(frame.vector), VECTOR);
    assert_eq!(s.gpr[6] - DATA + s.gpr[1], 5000);
    assert!(s.gpr[1] > 0 && s.gpr[1] < 5000, "{}", s.gpr[1]);
    assert_eq!(g.io.outs(7).len() as u64, 5000 - s.gpr[1]);
    // It goes on where it stopped.
    g.edit(|s| {
        (s.rip, s.run_state, s.gpr[4]) = (frame.rip, RunState::Running, STACK);
    });
    assert!(matches!(g.run(), Stop::Halted(_)));
    assert_eq!(g.io.outs(7).len(), 5000);
}

#[test]
fn from_user_mode_to_the_kernel_stack() {
    let mut g = Guest::user64().with_x2apic_kernel();
    g.edit(|s| {
        s.gpr[4] = STACK - 5;
        s.rflags |= flags::IF;
    });
    g.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        asm!(a; inc(rbx); jmp(again););
    });
    g.send(VECTOR);
    let frame = g.run_to_stub();
    assert_eq!(frame.cs, UCODE64 | 3);
    assert_eq!(frame.stack, Some((STACK - 5, UDATA | 3)));
    let s = g.state();
    assert_eq!(s.gpr[4], KERNEL_STACK - 40);
    assert!(s.segments[2].unusable && s.segments[2].selector == 0);
    assert_eq!(s.rflags & (flags::IF | flags::TF), 0);
}

#[test]
fn stacks_of_the_interrupt_stack_table_are_aligned() {
    let mut g = with_pending(VECTOR);
    let [low, high] = gate64(KCODE64, STUBS + u64::from(VECTOR) * 8, 0x8E, 3);
    g.ram.store(IDT + u64::from(VECTOR) * 16, low);
    g.ram.store(IDT + u64::from(VECTOR) * 16 + 8, high);
    g.ram.store::<u64>(TSS + 0x24 + 2 * 8, DATA + 0x80B);
    g.code(|a| asm!(a; sti(); nop(); nop(); hlt();));
    let frame = g.run_to_stub();
    assert_eq!(frame.stack, Some((STACK, KDATA)));
    assert_eq!(g.state().gpr[4], DATA + 0x800 - 40);
}

impl Guest {
    /// As `with_x2apic`, for a guest that runs at CPL 3.
    fn with_x2apic_kernel(mut self) -> Self {
        self.edit(|s| {
            let kernel = guest::long_state(s.cr3);
            s.segments = kernel.segments;
        });
        let mut g = self.with_x2apic();
        g.edit(to_user64);
        g
    }
}

#[test]
fn ipi_to_oneself() {
    for shorthand in [false, true] {
        let mut g = Guest::long().with_x2apic();
        g.code(|a| {
            if shorthand {
                wrmsr(a, X2_ICR, 1 << 18 | u64::from(VECTOR));
            } else {
                wrmsr(a, X2_SELF_IPI, u64::from(VECTOR));
            }
            asm!(a; mov(ebx, 1); sti(); nop(); mov(ebx, 2); hlt(););
        });
        let frame = g.run_to_stub();
        assert_eq!((u32::from(frame.vector), g.state().gpr[3]), (VECTOR, 1));
    }
}
