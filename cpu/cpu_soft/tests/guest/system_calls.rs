//! SYSCALL and SYSRET between running code of both modes, and what they find changed (SDM vol. 2B).

use crate::asm;
use crate::harness::images::*;
use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::control::{CR0_AM, CR4_SMAP, EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE};
use x86_defs::flags::{AC, CF, FIXED_1, IF, TF};
use x86_defs::paging::{PTE_P, PTE_U, PTE_W};
use x86_defs::{Exception, msr};

const USER: u64 = 0x1_4000;
const KERNEL: u64 = 0x1_8000;
const SELECTORS: u64 = (0x20 << 16 | KCODE64 as u64) << 32;
const USER_CS: u16 = UCODE64 | 3;
const USER_SS: u16 = UDATA | 3;

fn write_msr(a: &mut CodeAssembler, number: u32, value: u64) {
    asm!(a; mov(ecx, number); mov(eax, value as u32); mov(edx, (value >> 32) as u32); wrmsr(););
}

/// Sets system calls up and goes to [`USER`] with `flags`.
fn start(g: &mut Guest, flags: u64, mask: u64) {
    g.code(|a| {
        write_msr(a, msr::STAR, SELECTORS);
        write_msr(a, msr::LSTAR, KERNEL);
        write_msr(a, msr::SFMASK, mask);
        asm!(a; mov(rcx, USER); mov(r11, flags); sysretq(););
    });
}

/// `user` at [`USER`], `kernel` at [`KERNEL`], interrupts masked in the latter.
fn guest(user: impl FnOnce(&mut CodeAssembler), kernel: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
    g.long_with(&tables);
    start(&mut g, FIXED_1, IF | TF | AC);
    g.code_at(64, USER, user);
    g.code_at(64, KERNEL, kernel);
    g
}

/// Ends at an UD2 of the user's.
fn run_to_the_end(g: &mut Guest) -> Frame {
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.cs), (Exception::InvalidOpcode.vector(), USER_CS), "{frame:x?}");
    assert_eq!(frame.stack.map(|s| s.1), Some(USER_SS));
    frame
}

#[test]
fn there_and_back_many_times() {
    let mut g = guest(
        |a| {
            let mut top = a.create_label();
            asm!(a; mov(edi, 300); xor(ebx, ebx); xor(ebp, ebp);
                set_label(&mut top); mov(eax, edi); cmp(edi, 100); syscall(););
            // CF of the comparison, as the kernel gave it back.
            asm!(a; adc(rbp, 0); add(rbx, rax); dec(edi); jne(top); ud2(););
        },
        |a| {
            asm!(a; lea(rax, ptr(rax + rax + 1)); mov(r12d, cs); mov(r13d, ss); pushfq(); pop(r14);
                mov(r15, r11); stc(); sysretq(););
        },
    );
    run_to_the_end(&mut g);
    let s = g.state();
    assert_eq!((s.gpr[3], s.gpr[5]), (300 * 301 + 300, 99));
    assert_eq!((s.gpr[12], s.gpr[13]), (u64::from(KCODE64), u64::from(KDATA)));
    // The last comparison was of 1 with 100.
    assert_eq!((s.gpr[14] & (CF | IF), s.gpr[15] & (CF | IF)), (CF, CF));
    assert_eq!(s.gpr[15], s.gpr[11]);
}

#[test]
fn the_entry_may_move() {
    let mut g = guest(
        |a| {
            let mut top = a.create_label();
            asm!(a; mov(edi, 10); xor(ebx, ebx); set_label(&mut top); syscall(); add(rbx, rsi); dec(edi); jne(top);
                ud2(););
        },
        |a| {
            let mut stays = a.create_label();
            asm!(a; mov(r8, rcx); mov(r9, r11); mov(esi, 1); cmp(edi, 5); jne(stays););
            write_msr(a, msr::LSTAR, KERNEL + 0x1000);
            asm!(a; set_label(&mut stays); mov(rcx, r8); mov(r11, r9); sysretq(););
        },
    );
    g.code_at(64, KERNEL + 0x1000, |a| asm!(a; mov(esi, 100); sysretq();));
    run_to_the_end(&mut g);
    assert_eq!(g.state().gpr[3], 6 + 400);
}

#[test]
fn without_sce_both_are_undefined() {
    let off = EFER_LME | EFER_LMA | EFER_NXE;
    for in_kernel in [true, false] {
        let mut g = guest(
            |a| asm!(a; xor(edi, edi); syscall(); inc(edi); syscall(); hlt();),
            |a| {
                let mut stays = a.create_label();
                asm!(a; mov(r8, rcx); mov(r9, r11); test(edi, edi); je(stays););
                write_msr(a, msr::EFER, off);
                asm!(a; set_label(&mut stays); mov(rcx, r8); mov(r11, r9););
                if in_kernel {
                    a.sysretq().unwrap();
                } else {
                    let mut first = a.create_label();
                    asm!(a; test(edi, edi); je(first); push(i32::from(USER_SS)); push(STACK as i32); push(2);
                        push(i32::from(USER_CS)); push(USER as i32 + 2); iretq(); set_label(&mut first); sysretq(););
                }
            },
        );
        let frame = g.run_to_stub();
        let level = if in_kernel { KCODE64 } else { USER_CS };
        assert_eq!((frame.vector, frame.cs), (Exception::InvalidOpcode.vector(), level), "{frame:x?}");
        assert_eq!(g.state().efer & EFER_SCE, 0);
    }
}

#[test]
fn a_target_that_is_not_canonical() {
    for target in [1u64 << 47, 1 << 63, 0x8000_0000_0001_0000] {
        let mut g = guest(
            |a| asm!(a; mov(edi, 3); syscall(); dec(edi); syscall(); hlt();),
            |a| {
                let mut good = a.create_label();
                asm!(a; cmp(edi, 3); je(good); mov(rcx, target); set_label(&mut good); sysretq(););
            },
        );
        let frame = g.run_to_stub();
        assert_eq!((frame.vector, frame.error, frame.cs), (13, Some(0), KCODE64), "{target:#x}");
        assert_eq!(g.state().gpr[1], target);
    }
}

#[test]
fn flags_that_change_how_user_code_runs() {
    // Single step: it traps behind itself.
    let kernel = |set: u64| {
        move |a: &mut CodeAssembler| {
            let mut first = a.create_label();
            asm!(a; cmp(edi, 3); je(first); or(r11d, set as u32); set_label(&mut first); sysretq(););
        }
    };
    let user = |a: &mut CodeAssembler| asm!(a; mov(edi, 3); syscall(); dec(edi); syscall(); nop(); ud2(););
    let mut g = guest(user, kernel(TF));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, frame.cs), (1, USER + 5 + 2 + 2 + 2, USER_CS));
    // Alignment checks.
    let mut g = guest(
        |a| asm!(a; mov(edi, 3); syscall(); mov(eax, dword_ptr(DATA + 1)); dec(edi); syscall(); mov(eax, dword_ptr(DATA + 1)); hlt();),
        kernel(AC),
    );
    g.edit(|s| s.cr0 |= CR0_AM);
    assert_eq!(g.run_to_stub().vector, Exception::AlignmentCheck.vector());
    assert_eq!(g.state().gpr[7], 2);
}

#[test]
fn an_interrupt_that_waits_comes_at_once() {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
    g.long_with(&tables);
    let mut g = g.with_x2apic();
    start(&mut g, FIXED_1, IF);
    g.code_at(64, USER, |a| asm!(a; mov(edi, 3); syscall(); dec(edi); syscall(); nop(); ud2();));
    // The second time one is pending.
    g.code_at(64, KERNEL, |a| {
        let mut first = a.create_label();
        asm!(a; cmp(edi, 3); je(first); mov(r8, rcx); mov(r9, r11););
        write_msr(a, 0x83F, 0x50); // SELF IPI
        asm!(a; mov(rcx, r8); mov(r11, r9); or(r11d, IF as u32); set_label(&mut first); sysretq(););
    });
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, frame.cs), (0x50, USER + 11, USER_CS));
    assert_ne!(frame.rflags & IF, 0);
}

/// The kernel reads a user page: with AC from the user only if SYSCALL leaves it.
#[test]
fn smap_behind_syscall() {
    for mask in [AC, 0] {
        let mut g = Guest::at_reset();
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, PTE_P | PTE_W);
        for page in [USER, DATA] {
            tables.map(page, page | PTE_P | PTE_W | PTE_U, 1);
        }
        g.long_with(&tables);
        g.edit(|s| s.cr4 |= CR4_SMAP);
        start(&mut g, FIXED_1 | AC, mask);
        g.ram.store::<u64>(DATA, 77);
        g.code_at(64, USER, |a| asm!(a; syscall(); mov(ebx, eax); syscall(); ud2();));
        g.code_at(64, KERNEL, |a| asm!(a; mov(rax, qword_ptr(DATA)); sysretq();));
        let frame = g.run_to_stub();
        if mask == AC {
            assert_eq!((frame.vector, frame.cs, g.state().cr2), (14, KCODE64, DATA));
        } else {
            assert_eq!((frame.vector, g.state().gpr[3]), (6, 77));
        }
    }
}

#[test]
fn both_in_one_page() {
    let mut g =
        guest(|a| asm!(a; mov(edi, 50); syscall(); dec(edi); jne(USER + 5); ud2();), |a| asm!(a; hlt();));
    start(&mut g, FIXED_1, 0);
    g.code_at(64, CODE + 0x800, |a| {
        write_msr(a, msr::LSTAR, USER + 0x800);
        asm!(a; mov(rcx, USER); mov(r11, FIXED_1); sysretq(););
    });
    g.code_at(64, KERNEL, |a| asm!(a; mov(r10, CODE + 0x800); jmp(r10);));
    g.code_at(64, USER + 0x800, |a| asm!(a; inc(ebx); sysretq();));
    run_to_the_end(&mut g);
    assert_eq!(g.state().gpr[3], 50);
}

/// Faults that a handler mends, one behind the other.
#[test]
fn page_faults_that_are_mended() {
    const AREA: u64 = 0x4000_0000;
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
    let entries = tables.entry(AREA, 1);
    g.long_with(&tables);
    // Maps the page by the frame at DATA.
    g.handler64(14, KERNEL, |a| {
        asm!(a; push(rax); push(rbx); mov(rax, cr2); sub(rax, AREA as i32); shr(rax, 12);
            mov(rbx, DATA | PTE_P | PTE_W | PTE_U); mov(qword_ptr(rax * 8 + entries), rbx); inc(r12);
            pop(rbx); pop(rax); add(rsp, 8); iretq(););
    });
    g.code(|a| {
        let mut top = a.create_label();
        asm!(a; mov(edi, AREA as u32); mov(ecx, 200); stc(); set_label(&mut top); mov(eax, 0);
            adc(qword_ptr(rdi), rcx); lea(rdi, ptr(rdi + 4096)); dec(ecx); jne(top); hlt(););
    });
    assert_eq!(g.run_to_halt().gpr[12], 200);
    // CF goes through the faults: DEC keeps it, ADC clears it.
    assert_eq!(g.get(DATA), 200 * 201 / 2 + 1);
}

/// POP RSP, and stack accesses on both sides of it.
#[test]
fn the_stack_pointer_from_the_stack() {
    let mut g = Guest::long();
    g.ram.store::<u64>(DATA + 0x100, 11);
    g.code(|a| {
        asm!(a; mov(rax, DATA + 0x100); push(5); push(rax); mov(rbx, qword_ptr(rsp + 8)); pop(rsp);
            mov(rcx, qword_ptr(rsp)); pop(rdx); push(7); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3], s.gpr[1], s.gpr[2], s.gpr[4]), (5, 11, 11, DATA + 0x100));
    assert_eq!(g.get(DATA + 0x100), 7);
}

/// Bits far before and behind the operand, across page ends, and where nothing is mapped.
#[test]
fn bit_strings() {
    let mut g = Guest::long();
    g.code(|a| {
        asm!(a; mov(rsi, DATA + 0xFFC); mov(rax, -1i64 as u64); bts(qword_ptr(rsi), rax); setb(bl);
            mov(ecx, 37); bts(dword_ptr(rsi), ecx); mov(r11d, 37); bt(dword_ptr(rsi), r11d); setb(bh);
            bt(qword_ptr(rsi), rax); setb(dl);
            mov(edi, 64 * 1000 + 3); bts(qword_ptr(rsi), rdi); db(&[0xF0]); btc(qword_ptr(rsi), rdi); setb(dh);
            hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3] & 0xFFFF, s.gpr[2] & 0xFFFF), (0x0100, 0x0101));
    assert_eq!(g.get(DATA + 0xFF4), 1 << 63);
    assert_eq!((g.get(DATA + 0x1000) as u32, g.get(DATA + 0xFFC + 8000)), (1 << 5, 0));
    let mut g = Guest::long();
    g.code(|a| asm!(a; mov(rsi, DATA); mov(rax, RAM_BYTES * 8); stc(); btr(qword_ptr(rsi), rax); hlt();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, g.state().cr2, frame.rflags & CF), (14, DATA + RAM_BYTES, CF));
}

/// CMPXCHG16B takes aligned operands only.
#[test]
fn wide_exchanges() {
    let mut g = Guest::long();
    g.ram.store::<u64>(DATA + 16, 5);
    g.ram.store::<u64>(DATA + 24, 6);
    g.code(|a| {
        let mut top = a.create_label();
        asm!(a; mov(rsi, DATA); mov(ecx, 9); mov(ebx, 8); mov(edi, 3); stc();
            set_label(&mut top); db(&[0xF0]); cmpxchg16b(xmmword_ptr(rsi + 16)); sete(r9b); setb(r10b); dec(edi); jne(top);
            cmpxchg16b(xmmword_ptr(rsi + 8)); hlt(););
    });
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!((frame.vector, frame.error, s.gpr[9] & 1, s.gpr[10] & 1), (13, Some(0), 0, 1));
    // Loaded, exchanged, and found other again.
    assert_eq!((s.gpr[0], s.gpr[2], g.get(DATA + 16), g.get(DATA + 24)), (8, 9, 8, 9));
}

/// What the x87 unit remembers is of the segments that its last instruction ran with.
#[test]
fn the_last_instruction_of_the_unit() {
    let mut g = guest(
        |a| asm!(a; mov(edi, 2); fld1(); fld(qword_ptr(DATA)); syscall(); dec(edi); jne(USER + 5); ud2();),
        |a| asm!(a; fxsave(ptr(DATA + 0x200)); sysretq();),
    );
    // FXSAVE of 32 bits shows selectors.
    run_to_the_end(&mut g);
    assert_eq!(g.get(DATA + 0x208), u64::from(USER_CS) << 32 | (USER + 7));
    let mut g = guest(|a| asm!(a; fld(qword_ptr(DATA)); ud2(); hlt();), |a| asm!(a; hlt();));
    g.handler64(6, KERNEL, |a| asm!(a; fxsave(ptr(DATA + 0x200)); hlt();));
    g.run_to_halt();
    assert_eq!(g.get(DATA + 0x208), u64::from(USER_CS) << 32 | USER);
}

/// Loops of indirect branches alone can be stopped.
#[test]
fn loops_without_direct_branches_can_be_stopped() {
    const TOP: u64 = CODE + 0x40;
    let jumps: fn(&mut CodeAssembler) = |a| asm!(a; inc(rbx); jmp(rax););
    let calls: fn(&mut CodeAssembler) = |a| asm!(a; inc(rbx); mov(rsp, STACK); call(rax););
    let returns: fn(&mut CodeAssembler) = |a| asm!(a; inc(rbx); push(rax); ret(););
    for (name, code) in [("jumps", jumps), ("calls", calls), ("returns", returns)] {
        let mut g = Guest::long();
        g.code(|a| asm!(a; mov(rax, TOP); jmp(rax);));
        g.code_at(64, TOP, code);
        let s = g.run_until_kicked(|s| s.gpr[3] > 1000);
        assert!((TOP..TOP + 16).contains(&s.rip), "{name}: {:x}", s.rip);
    }
    let mut g = guest(|a| asm!(a; inc(rbx); syscall(); jmp(USER);), |a| asm!(a; sysretq();));
    g.run_until_kicked(|s| s.gpr[3] > 1000);
}
