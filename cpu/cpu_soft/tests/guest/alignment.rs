//! Alignment checks (CR0.AM, RFLAGS.AC, CPL 3): #AC with error code 0 (SDM vol. 3, 6.15).

use crate::asm;
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
