//! Single step (SDM vol. 3, 17.3.1.4): a trap behind every instruction that began with TF set.

use crate::asm;
use crate::harness::guest::to_user64;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::{flags, msr};

const TF: i32 = flags::TF as i32;

/// Handler of #DB that reports the distance of the pushed RIP from `CODE` to port 1 and goes on.
fn report_steps(g: &mut Guest) {
    g.handler64(1, CODE + 0x1000, |a| {
        asm!(a; push(rax); mov(rax, qword_ptr(rsp + 8)); sub(eax, CODE as i32); out(1, eax); pop(rax); iretq(););
    });
}

/// Steps through `code` (which begins behind a POPFQ that sets TF) up to its HLT.
fn steps(code: impl FnOnce(&mut CodeAssembler)) -> (Vec<u32>, Guest) {
    let mut g = Guest::long();
    report_steps(&mut g);
    g.edit(|s| s.rflags |= flags::TF);
    g.code(code);
    // HLT is stepped, too: the trap wakes it. The end is a write to the port.
    assert_eq!(g.run(), Stop::Kicked);
    (g.io.outs(1), g)
}
fn end(a: &mut CodeAssembler) {
    asm!(a; out(i32::from(PORT_DONE), al););
}

#[test]
fn every_instruction_traps_once() {
    let (steps, _) = steps(|a| {
        asm!(a; nop(); mov(eax, 5); push(rax); pop(rcx););
        end(a);
    });
    assert_eq!(steps[..4], [1, 6, 7, 8]);
}

#[test]
fn popf_that_sets_tf_does_not_trap_itself() {
    let mut g = Guest::long();
    report_steps(&mut g);
    g.code(|a| {
        asm!(a; pushfq(); or(qword_ptr(rsp), TF); popfq(); nop(); pushfq(); and(qword_ptr(rsp), !TF); popfq(); nop(); hlt(););
    });
    g.run_to_halt();
    // pushfq 1, or 8, popfq 1: the next one traps first; the POPFQ that clears TF still does.
    assert_eq!(g.io.outs(1), [11, 12, 20, 21]);
}

#[test]
fn repeated_strings_trap_after_each_element() {
    let (steps, mut g) = steps(|a| {
        asm!(a; mov(ecx, 3); mov(esi, DATA as u32); mov(edi, (DATA + 64) as u32); db(&[0xF3, 0xA4]););
        asm!(a; mov(ecx, 2); db(&[0xF3, 0x48, 0xAB]); mov(ecx, 0); db(&[0xF3, 0xAA]););
        end(a);
    });
    // RIP stays at the instruction until the last element; with a count of zero it traps once.
    assert_eq!(steps[..10], [5, 10, 15, 15, 15, 17, 22, 22, 25, 30]);
    assert_eq!(steps[10], 32);
    assert_eq!(g.state().gpr[7], DATA + 64 + 3 + 16);
}

#[test]
fn the_handler_starts_without_tf() {
    let (_, mut g) = steps(|a| {
        asm!(a; nop(););
        end(a);
    });
    let s = g.state();
    assert_eq!(s.dr[4] & 0xE00F, DR6_BS);
}

#[test]
fn loads_of_ss_hold_the_trap_off() {
    let (steps, _) = steps(|a| {
        asm!(a; mov(eax, i32::from(KDATA)); mov(ss, ax); nop(); nop(););
        end(a);
    });
    assert_eq!(steps[..3], [5, 9, 10], "no trap behind MOV SS itself");
}

#[test]
fn sti_is_stepped_and_interrupts_wait() {
    let mut g = Guest::long().with_x2apic();
    report_steps(&mut g);
    g.edit(|s| s.rflags |= flags::TF);
    g.send(0x50);
    g.code(|a| asm!(a; sti(); nop(); hlt();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (0x50, CODE + 1), "the trap's handler returns with IF set");
    assert_eq!(g.io.outs(1), [1]);
}

#[test]
fn software_interrupts_clear_tf_and_lose_the_trap() {
    for (code, bytes) in [(&[0xCD, 0x60][..], 2), (&[0xCC], 1)] {
        let mut g = Guest::long();
        report_steps(&mut g);
        let vector = if bytes == 2 { 0x60 } else { 3 };
        g.handler64(vector, CODE + 0x1800, |a| asm!(a; mov(eax, 0x7777); out(1, eax); iretq();));
        g.edit(|s| s.rflags |= flags::TF);
        g.put(CODE, code);
        g.code_at(64, CODE + bytes, |a| {
            asm!(a; nop(););
            end(a);
        });
        assert_eq!(g.run(), Stop::Kicked);
        // IRETQ brings TF back without a trap of its own.
        assert_eq!(g.io.outs(1)[..2], [0x7777, bytes as u32 + 1], "{code:x?}");
    }
}

#[test]
fn faults_come_instead_of_the_trap() {
    let mut g = Guest::long();
    report_steps(&mut g);
    g.edit(|s| s.rflags |= flags::TF);
    g.code(|a| asm!(a; nop(); ud2();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, frame.rflags & flags::TF), (6, CODE + 1, flags::TF));
    assert_eq!(g.io.outs(1), [1]);
}

#[test]
fn hlt_is_woken_by_its_trap() {
    let (steps, _) = steps(|a| {
        asm!(a; hlt(); nop(););
        end(a);
    });
    assert_eq!(steps[..2], [1, 2]);
}

#[test]
fn syscall_with_tf() {
    // Masked by SFMASK: no trap. Not masked: a trap at the entry.
    for masked in [true, false] {
        let mut g = Guest::user64();
        g.edit(|s| {
            s.msrs = vec![
                (msr::STAR, u64::from(KCODE64) << 32 | u64::from(UCODE32) << 48),
                (msr::LSTAR, CODE + 0x800),
                (msr::SFMASK, if masked { flags::TF } else { 0 }),
            ];
            s.rflags |= flags::TF;
        });
        g.code(|a| asm!(a; syscall();));
        g.code_at(64, CODE + 0x800, |a| asm!(a; nop(); hlt();));
        if masked {
            let s = g.run_to_halt();
            assert_eq!((s.gpr[1], s.gpr[11] & flags::TF), (CODE + 2, flags::TF));
        } else {
            let frame = g.run_to_stub();
            assert_eq!((frame.vector, frame.rip, frame.cs), (1, CODE + 0x800, KCODE64));
        }
    }
}

#[test]
fn branches_only_with_btf() {
    let mut g = Guest::long();
    g.edit(|s| {
        s.rflags |= flags::TF;
        s.msrs = vec![(msr::DEBUGCTL, 2)];
    });
    g.code(|a| {
        let mut over = a.create_label();
        asm!(a; nop(); xor(eax, eax); jnz(over); nop(); jz(over); nop(););
        a.set_label(&mut over).unwrap();
        a.hlt().unwrap();
    });
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (1, CODE + 9), "behind the branch that was taken");
    assert!(!g.state().msrs.iter().any(|(n, v)| *n == msr::DEBUGCTL && *v != 0));
}

#[test]
fn user_code_is_stepped_from_the_kernel() {
    let mut g = Guest::user64();
    g.edit(|s| s.rflags |= flags::TF);
    g.code(|a| asm!(a; nop(); nop();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, frame.cs), (1, CODE + 1, UCODE64 | 3));
    // Return there once more.
    g.edit(|s| {
        to_user64(s);
        (s.rip, s.rflags, s.gpr[4], s.run_state) = (frame.rip, frame.rflags, STACK, RunState::Running);
    });
    assert_eq!(g.run_to_stub().rip, CODE + 2);
}

#[test]
fn sysret_that_loads_tf_traps_at_once() {
    let mut g = Guest::user64();
    g.edit(|s| {
        s.segments = guest::long_state(s.cr3).segments;
        s.efer |= EFER_SCE;
        s.msrs = vec![(msr::STAR, u64::from(KCODE64) << 32 | u64::from(UCODE32) << 48)];
        s.gpr[1] = CODE + 0x800;
        s.gpr[11] = flags::TF | flags::FIXED_1;
    });
    g.code(|a| asm!(a; sysretq();));
    g.code_at(64, CODE + 0x800, |a| asm!(a; inc(ebx); inc(ebx);));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, g.state().gpr[3]), (1, CODE + 0x800, 0));
}
