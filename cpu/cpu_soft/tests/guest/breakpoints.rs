//! Debug registers (SDM vol. 3, 17.2): instruction, data and I/O breakpoints, general detect.

use crate::asm;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::flags;

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const ACCESS: u64 = 3;
/// Lengths by their code in DR7.
const LEN: [(u64, u64); 4] = [(1, 0), (2, 1), (4, 3), (8, 2)];

/// DR7 with breakpoint `n` on (locally), of a kind and a length in bytes.
fn control(n: u64, kind: u64, bytes: u64) -> u64 {
    let len = LEN.iter().find(|(b, _)| *b == bytes).unwrap().1;
    1 << (2 * n) | kind << (16 + 4 * n) | len << (18 + 4 * n) | DR7_FIXED_1
}

fn watching(n: usize, at: u64, kind: u64, bytes: u64) -> Guest {
    let mut g = Guest::long();
    g.edit(|s| {
        s.dr[n] = at;
        s.dr[5] = control(n as u64, kind, bytes);
        s.cr4 |= CR4_DE;
    });
    g
}

#[test]
fn instruction_breakpoints_are_faults() {
    let mut g = watching(1, CODE + 6, EXECUTE, 1);
    g.code(|a| asm!(a; mov(eax, 1); nop(); mov(eax, 2); hlt();));
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!((frame.vector, frame.rip, s.gpr[0], s.dr[4] & 0xE00F), (1, CODE + 6, 1, 2));
    assert_eq!(frame.rflags & flags::RF, 0);
    // With RF the instruction runs, and RF is gone: the next time it hits again.
    g.edit(|s| {
        (s.rip, s.rflags, s.gpr[4], s.run_state) =
            (CODE + 6, frame.rflags | flags::RF, STACK, RunState::Running)
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.rflags & flags::RF), (2, 0));
    g.edit(|s| (s.rip, s.run_state) = (CODE, RunState::Running));
    assert_eq!(g.run_to_stub().rip, CODE + 6);
}

#[test]
fn iret_with_rf_steps_over_a_breakpoint() {
    let mut g = watching(0, CODE + 1, EXECUTE, 1);
    g.handler64(1, CODE + 0x1000, |a| asm!(a; inc(ebx); or(dword_ptr(rsp + 16), flags::RF as i32); iretq();));
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; nop(););
        a.set_label(&mut again).unwrap();
        // The breakpoint is here, three times.
        asm!(a; inc(ecx); cmp(ecx, 3); jb(again); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[1], s.gpr[3]), (3, 3));
}

#[test]
fn a_breakpoint_set_in_code_that_is_cached() {
    let mut g = Guest::long();
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(ecx, ecx););
        a.set_label(&mut again).unwrap();
        asm!(a; inc(ecx); nop(); cmp(ecx, 100); jne(again););
        asm!(a; mov(eax, (CODE + 4) as u32); mov(dr3, rax); mov(eax, 1 << 6); mov(dr7, rax); jmp(again););
    });
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, g.state().gpr[1]), (1, CODE + 4, 101));
    assert_eq!(g.state().dr[4] & 0xF, 8);
}

#[test]
fn data_breakpoints_are_traps_and_overlap_counts() {
    // (watched offset and length, accessed offset and length, hit)
    for (watched, len, at, bytes, hit) in [
        (0u64, 1u64, 0u64, 1u64, true),
        (0, 1, 1, 1, false),
        (1, 1, 0, 4, true),
        (4, 4, 0, 4, false),
        (4, 4, 1, 4, true),
        (8, 8, 15, 1, true),
        (8, 8, 16, 8, false),
        (8, 8, 4, 8, true),
        (2, 2, 3, 1, true),
    ] {
        for kind in [WRITE, ACCESS] {
            for write in [false, true] {
                let mut g = watching(2, DATA + watched, kind, len);
                g.edit(|s| s.gpr[3] = DATA + at);
                g.code(|a| {
                    asm!(a; nop(););
                    match (write, bytes) {
                        (false, 1) => asm!(a; mov(al, byte_ptr(rbx));),
                        (false, 4) => asm!(a; mov(eax, dword_ptr(rbx));),
                        (false, _) => asm!(a; mov(rax, qword_ptr(rbx));),
                        (true, 1) => asm!(a; mov(byte_ptr(rbx), al);),
                        (true, 4) => asm!(a; mov(dword_ptr(rbx), eax);),
                        (true, _) => asm!(a; mov(qword_ptr(rbx), rax);),
                    }
                    asm!(a; mov(ecx, 1); hlt(););
                });
                let what = format!("{watched}+{len}, access {at}+{bytes}, kind {kind}, write {write}");
                if hit && (write || kind == ACCESS) {
                    let frame = g.run_to_stub();
                    assert_eq!((frame.vector, g.state().gpr[1], g.state().dr[4] & 0xF), (1, 0, 4), "{what}");
                    assert!(frame.rip > CODE + 1, "{what}: a trap is behind the instruction");
                } else {
                    assert_eq!(g.run_to_halt().gpr[1], 1, "{what}");
                }
            }
        }
    }
}

#[test]
fn every_kind_of_access_is_watched() {
    type Form = (&'static str, bool, fn(&mut CodeAssembler));
    let forms: [Form; 14] = [
        ("push", true, |a| asm!(a; lea(rsp, ptr(rbx + 8)); push(rax);)),
        ("pop", false, |a| asm!(a; mov(rsp, rbx); pop(rax);)),
        ("call", true, |a| asm!(a; lea(rsp, ptr(rbx + 8)); mov(eax, (CODE + 0x100) as u32); call(rax);)),
        ("inc", true, |a| asm!(a; inc(dword_ptr(rbx));)),
        ("lock inc", true, |a| asm!(a; db(&[0xF0]); inc(dword_ptr(rbx));)),
        ("xchg", true, |a| asm!(a; xchg(qword_ptr(rbx), rax);)),
        ("cmpxchg16b", true, |a| asm!(a; mov(rdi, rbx); db(&[0xF0]); cmpxchg16b(xmmword_ptr(rdi));)),
        ("movups load", false, |a| asm!(a; movups(xmm0, xmmword_ptr(rbx));)),
        ("vmovups store", true, |a| asm!(a; vmovups(ymmword_ptr(rbx - 16), ymm0);)),
        ("stosb", true, |a| asm!(a; mov(rdi, rbx); stosb();)),
        (
            "rep movsq",
            true,
            |a| asm!(a; lea(rdi, ptr(rbx - 64)); mov(esi, (DATA + 0x800) as u32); mov(ecx, 100); db(&[0xF3, 0x48, 0xA5]);),
        ),
        ("rep stosb", true, |a| asm!(a; lea(rdi, ptr(rbx - 8)); mov(ecx, 100); db(&[0xF3, 0xAA]);)),
        ("fld", false, |a| asm!(a; fld(qword_ptr(rbx));)),
        ("insb", true, |a| asm!(a; mov(rdi, rbx); mov(edx, 5); insb();)),
    ];
    for (name, write, form) in forms {
        for kind in [WRITE, ACCESS] {
            let mut g = watching(0, DATA + 0x100, kind, 1);
            g.edit(|s| s.gpr[3] = DATA + 0x100);
            g.code(|a| {
                form(a);
                a.nop().unwrap();
                a.hlt().unwrap();
            });
            g.code_at(64, CODE + 0x100, |a| asm!(a; nop(); hlt();));
            if write || kind == ACCESS {
                assert_eq!(g.run_to_stub().vector, 1, "{name} {kind}");
                let s = g.state();
                assert_eq!(s.dr[4] & 0xF, 1, "{name}");
                match name {
                    // Behind the element that touched it.
                    "rep movsq" => assert_eq!((s.gpr[7], s.gpr[1]), (DATA + 0x108, 91), "{name}"),
                    "rep stosb" => assert_eq!((s.gpr[7], s.gpr[1]), (DATA + 0x101, 91), "{name}"),
                    _ => {}
                }
            } else {
                g.run_to_halt();
            }
        }
    }
}

#[test]
fn port_breakpoints() {
    for (port, hit) in [(0x70, true), (0x71, true), (0x72, false)] {
        let mut g = watching(1, 0x70, PORT, 2);
        g.code(|a| asm!(a; nop(); in_(al, port); nop(); hlt();));
        if hit {
            let frame = g.run_to_stub();
            assert_eq!((frame.vector, frame.rip, g.state().dr[4] & 0xF), (1, CODE + 3, 2));
        } else {
            g.run_to_halt();
        }
    }
}

#[test]
fn general_detect_and_its_privilege() {
    let mut g = Guest::long();
    g.edit(|s| s.dr[5] = DR7_GD | DR7_FIXED_1);
    g.code(|a| asm!(a; mov(rax, dr0); hlt();));
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!((frame.vector, frame.rip, s.dr[4] & 0xE00F, s.dr[5] & DR7_GD), (1, CODE, DR6_BD, 0));
    let mut g = Guest::user64();
    g.code(|a| asm!(a; mov(rax, dr0);));
    assert_eq!(g.run_to_stub().vector, 13);
}

#[test]
fn breakpoint_and_single_step_come_together() {
    let mut g = watching(0, DATA, WRITE, 4);
    g.edit(|s| s.rflags |= flags::TF);
    g.code(|a| asm!(a; mov(dword_ptr(DATA), 1); hlt();));
    g.run_to_stub();
    assert_eq!(g.state().dr[4] & 0xE00F, DR6_BS | 1);
}

#[test]
fn a_load_of_ss_delays_a_data_breakpoint() {
    let mut g = watching(0, DATA, ACCESS, 2);
    g.ram.store::<u64>(DATA, u64::from(KDATA));
    g.code(|a| asm!(a; mov(ss, word_ptr(DATA)); mov(ecx, 1); mov(ecx, 2); hlt();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, g.state().gpr[1]), (1, 1), "behind the instruction in the shadow");
}

#[test]
fn int1_reports_what_a_load_of_ss_delayed() {
    // One exception, not a second one in the handler's first instruction, on the same stack.
    let mut g = watching(0, DATA, ACCESS, 2);
    g.ram.store::<u64>(DATA, u64::from(KDATA));
    g.handler64(1, CODE + 0x1000, |a| asm!(a; inc(ebx); iretq();));
    g.code(|a| asm!(a; xor(ebx, ebx); mov(ss, word_ptr(DATA)); int1(); hlt();));
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3], s.dr[4] & 0xF), (1, 1));
}

#[test]
fn a_waiting_trap_is_saved() {
    // Stop between MOV SS and the next instruction by a state that says so.
    let mut g = watching(0, DATA, ACCESS, 2);
    g.code(|a| asm!(a; nop(); nop(); hlt();));
    g.edit(|s| {
        s.shadow = hypervisor::state::InterruptShadow::MovSs;
        s.exception = Some(hypervisor::state::PendingEvent {
            exception: x86_defs::Exception::Debug,
            error_code: None,
            address: 1,
            is_trap: true,
        });
    });
    let state = g.state();
    assert_eq!(state.exception.map(|e| (e.exception, e.address)), Some((x86_defs::Exception::Debug, 1)));
    assert_eq!(g.run_to_stub().rip, CODE + 1);
}
