//! Alignment checks (CR0.AM, RFLAGS.AC, CPL 3): #AC with error code 0 (SDM vol. 3, 6.15).

use crate::asm;
use crate::harness::guest::to_user32;
use crate::harness::images::*;
use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::control::CR0_AM;
use x86_defs::{Exception, flags};

/// Runs `f` in user mode with alignment checks on; RBX holds an aligned address of user data.
fn checked(f: impl FnOnce(&mut CodeAssembler)) -> Frame {
    let mut g = Guest::user64();
    g.edit(|s| {
        s.cr0 |= CR0_AM;
        s.rflags |= flags::AC;
        s.gpr[3] = DATA;
    });
    g.code(f);
    g.run_to_stub()
}

#[test]
fn misaligned_words_fault_and_aligned_ones_do_not() {
    const AC: u8 = Exception::AlignmentCheck as u8;
    let frame = checked(|a| asm!(a; mov(eax, dword_ptr(rbx + 2)); ud2();));
    assert_eq!((frame.vector, frame.error), (AC, Some(0)));
    let frame = checked(|a| asm!(a; mov(qword_ptr(rbx + 4), rax); ud2();));
    assert_eq!(frame.vector, AC);
    let frame = checked(|a| asm!(a; add(word_ptr(rbx + 1), ax); ud2();));
    assert_eq!(frame.vector, AC);
    let frame = checked(|a| {
        a.lock().add(dword_ptr(rbx + 1), eax).unwrap();
    });
    assert_eq!(frame.vector, AC);
    let frame = checked(
        |a| asm!(a; mov(eax, dword_ptr(rbx + 4)); mov(qword_ptr(rbx + 8), rax); mov(al, byte_ptr(rbx + 3)); ud2();),
    );
    assert_eq!(frame.vector, Exception::InvalidOpcode as u8);
}

#[test]
fn strings_are_checked_element_by_element() {
    let copy = |from: i32| {
        checked(move |a| {
            asm!(a; lea(rsi, ptr(rbx + from)); lea(rdi, ptr(rbx + 256)); mov(ecx, 4););
            a.rep().movsd().unwrap();
            a.ud2().unwrap();
        })
    };
    assert_eq!(copy(2).vector, Exception::AlignmentCheck as u8);
    assert_eq!(copy(4).vector, Exception::InvalidOpcode as u8);
}

/// Faults for handlers at CPL 3 whose frames go to a misaligned stack: `set_gate` writes the gate of #AC.
fn a_storm_can_be_stopped(set_gate: impl Fn(&Guest, u64)) {
    let mut g = Guest::protected();
    g.edit(|s| {
        to_user32(s);
        s.cr0 |= CR0_AM;
        s.rflags |= flags::AC;
        (s.gpr[3], s.gpr[4], s.rip) = (DATA, DATA + 0x1001, CODE);
    });
    for exception in [Exception::AlignmentCheck, Exception::SegmentNotPresent] {
        let at = IDT + u64::from(exception.vector()) * 8;
        g.ram.store(at, gate(UCODE32 | 3, CODE + 0x100, 0xEE));
    }
    set_gate(&g, IDT + u64::from(Exception::AlignmentCheck.vector()) * 8);
    g.code_at(32, CODE, |a| asm!(a; mov(eax, dword_ptr(ebx + 2)); ud2();));
    g.code_at(32, CODE + 0x100, |a| asm!(a; nop(); ud2();));
    let state = g.run_until_kicked(|_| true);
    assert_eq!((state.rip, state.gpr[4]), (CODE, DATA + 0x1001), "nothing was committed");
    g.edit(|s| s.gpr[4] -= 1);
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip), (Exception::InvalidOpcode.vector(), CODE + 0x101));
}

/// A processor hangs (CVE-2015-5307). Here the vCPU can be stopped and saved, and goes on once the stack is aligned.
#[test]
fn a_fault_that_raises_itself() {
    a_storm_can_be_stopped(|_, _| {});
}

/// #AC has no handler that is present, and the frame of #NP raises #AC.
#[test]
fn two_faults_that_raise_each_other() {
    a_storm_can_be_stopped(|g, at| g.ram.store(at, gate(UCODE32 | 3, CODE + 0x100, 0x6E)));
}
