//! Limits and wraps: the instruction at the end of its segment, 64 KiB, 4 GiB, expand-down segments
//! (SDM vol. 3, 5.3), and far transfers that change privilege in 64-bit mode.

use crate::asm;
use crate::harness::guest::{to_user32, to_user64};
use crate::harness::images::*;
use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::flags;

#[test]
fn the_instruction_at_the_limit() {
    // A limit in the middle of `mov eax, imm32`, at its last byte, and behind it.
    for limit in 0..8u32 {
        let mut g = Guest::protected();
        g.edit(|s| {
            s.segments[1] = segment(KCODE32, CODE, limit, 0x49B);
            s.rip = 0;
        });
        g.put(CODE, &assemble(32, 0, |a| asm!(a; mov(eax, 0x1234); nop(); int3(); hlt();)));
        let frame = g.run_to_stub();
        let expected = match limit {
            0..=3 => (13, 0, 0),
            4 => (13, 5, 0x1234),
            5 => (13, 6, 0x1234),
            _ => (3, 7, 0x1234),
        };
        assert_eq!((frame.vector, frame.rip, g.state().gpr[0]), expected, "limit {limit}");
    }
}

#[test]
fn blocks_of_flat_code_do_not_serve_limited_segments() {
    // The same code, first through a flat segment (it is cached), then through a short one.
    let mut g = Guest::protected();
    g.ram.store(GDT + u64::from(FREE_SELECTOR), descriptor(0, CODE as u32 + 0x102, 0x49B));
    g.code(|a| {
        asm!(a; mov(ecx, (CODE + 0x100) as u32); call(ecx); inc(ebx););
        a.db(&[0xEA]).unwrap();
        a.db(&((CODE + 0x100) as u32).to_le_bytes()).unwrap();
        a.db(&FREE_SELECTOR.to_le_bytes()).unwrap();
    });
    g.code_at(32, CODE + 0x100, |a| asm!(a; nop(); nop(); nop(); ret();));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.rip, frame.cs, g.state().gpr[3]), (13, CODE + 0x103, FREE_SELECTOR, 1));
}

#[test]
fn sixteen_bit_addresses_wrap_and_words_at_the_end_fault() {
    let mut g = Guest::real();
    g.put(0x10, &[0x77]);
    // BX + displacement wraps at 64 KiB.
    g.code(|a| asm!(a; mov(bx, 0xFFF0); mov(al, byte_ptr(bx + 0x20)); hlt();));
    assert_eq!(g.run_to_halt().gpr[0] & 0xFF, 0x77);
    // A word at 0xFFFF is beyond the limit: #GP; through SS #SS; a byte is not.
    for (code, vector) in
        [(&[0x8B, 0x07][..], 13), (&[0x36, 0x8B, 0x07], 12), (&[0x89, 0x07], 13), (&[0x8A, 0x07], 3)]
    {
        let mut g = Guest::real();
        g.edit(|s| s.gpr[3] = 0xFFFF);
        let mut bytes = code.to_vec();
        bytes.push(0xCC);
        g.put(guest::CODE_16, &bytes);
        assert_eq!(g.run_to_stub().vector, vector, "{code:x?}");
    }
}

#[test]
fn the_stack_pointer_wraps_at_64k() {
    let mut g = Guest::real();
    g.edit(|s| (s.gpr[4], s.segments[2].selector, s.segments[2].base) = (0xABCD_0000, 0x3000, 0x3_0000));
    g.code(|a| asm!(a; push(ax); mov(bx, sp); pop(cx); mov(dx, sp); hlt();));
    let s = g.run_to_halt();
    assert_eq!((s.gpr[3] & 0xFFFF, s.gpr[2] & 0xFFFF, s.gpr[4]), (0xFFFE, 0, 0xABCD_0000));
    // PUSH with SP = 1 would lie across the end.
    let mut g = Guest::real();
    g.edit(|s| (s.gpr[4], s.segments[2].selector, s.segments[2].base) = (1, 0x3000, 0x3_0000));
    g.edit(|s| s.idtr.limit = 0x3FF);
    g.code(|a| asm!(a; push(ax); hlt();));
    assert_eq!(g.run(), Stop::TripleFault, "the frame of #SS does not fit, either");
}

#[test]
fn code_runs_up_to_64k_and_not_beyond() {
    let mut g = Guest::real();
    g.edit(|s| {
        (s.segments[1].selector, s.segments[1].base) = (0x2000, 0x2_0000);
        s.rip = 0xFFFD;
    });
    g.put(0x2_FFFD, &[0x40, 0x40, 0x40]);
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, g.state().gpr[0]), (13, 3));
    // A jump wraps by its operand size.
    let mut g = Guest::real();
    g.edit(|s| {
        (s.segments[1].selector, s.segments[1].base) = (0x2000, 0x2_0000);
        s.rip = 0xFFF0;
    });
    g.put(0x2_FFF0, &[0xEB, 0x20]);
    g.put(0x2_0012, &[0xF4]);
    assert_eq!(g.run_to_halt().rip, 0x13);
}

#[test]
fn linear_addresses_wrap_at_4g() {
    let mut g = Guest::protected();
    g.put(ROM + 0xFFFE, &[0x11, 0x22]);
    g.put(0, &[0x33, 0x44]);
    g.code(|a| asm!(a; mov(ebx, 0xFFFF_FFFEu32); mov(eax, dword_ptr(ebx)); mov(ecx, 0x1000_0000); lea(edx, ptr(ebx + 4)); hlt();));
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[2]), (0x4433_2211, 2));
    // A base that carries over.
    let mut g = Guest::protected();
    g.put(DATA, &[0x5A]);
    g.edit(|s| s.segments[0] = segment(FREE_SELECTOR, 0xFFFF_0000, 0xFFFF_FFFF, DATA32));
    g.code(|a| asm!(a; mov(ebx, (DATA + 0x1_0000) as u32); mov(al, byte_ptr(ebx).es()); hlt();));
    assert_eq!(g.run_to_halt().gpr[0], 0x5A);
}

/// Per-CPU data and TLS: FS with one base and another, below which data lies, too, and then with a limit.
#[test]
fn the_same_code_through_another_fs() {
    let mut g = Guest::protected();
    let selectors = [0u16, 8, 16].map(|n| FREE_SELECTOR + n);
    let segments = [(DATA, u32::MAX), (DATA + 0x108, u32::MAX), (DATA, 7)];
    for (selector, (base, limit)) in selectors.into_iter().zip(segments) {
        let attributes = if limit == u32::MAX { DATA32 } else { 0x493 };
        g.ram.store(GDT + u64::from(selector), descriptor(base, limit, attributes));
    }
    g.put(DATA + 8, &5u32.to_le_bytes());
    g.put(DATA + 4, &100u32.to_le_bytes());
    g.put(DATA + 0x110, &7u32.to_le_bytes());
    g.put(DATA + 0x10C, &1000u32.to_le_bytes());
    g.put(DATA + 0x104, &1u32.to_le_bytes());
    g.code(|a| {
        let (mut top, mut sum) = (a.create_label(), a.create_label());
        let [one, other, short] = selectors.map(u32::from);
        asm!(a; xor(ebx, ebx); mov(ecx, 300););
        a.set_label(&mut top).unwrap();
        asm!(a; mov(eax, one); mov(fs, eax); call(sum); mov(eax, other); mov(fs, eax); call(sum);
            add(ebx, dword_ptr(0xFFFF_FFFCu32).fs()); dec(ecx); jne(top);
            mov(eax, short); mov(fs, eax); call(sum); hlt(););
        a.set_label(&mut sum).unwrap();
        asm!(a; mov(edx, dword_ptr(8).fs()); add(ebx, edx); add(ebx, dword_ptr(4).fs()); ret(););
    });
    assert_eq!(g.run_to_stub().vector, 13);
    assert_eq!(g.state().gpr[3], 300 * (5 + 100 + 7 + 1000 + 1));
}

#[test]
fn expand_down_and_rights() {
    // Valid offsets of an expand-down segment are above the limit.
    for (offset, ok) in [(0x1000u32, true), (0xFFF, false), (0xFFFE, true), (0xFFFF, false)] {
        let mut g = Guest::protected();
        g.edit(|s| s.segments[0] = segment(FREE_SELECTOR, DATA, 0xFFF, 0x097));
        g.code(|a| asm!(a; mov(ebx, offset); mov(ax, word_ptr(ebx).es()); int3();));
        assert_eq!(g.run_to_stub().vector, if ok { 3 } else { 13 }, "{offset:#x}");
    }
    // Read-only data, execute-only code, a null selector.
    for (attributes, unusable, write, ok) in [
        (0xC91, false, false, true),
        (0xC91, false, true, false),
        (0xC99, false, false, false),
        (0xC9B, false, false, true),
        (0xC9B, false, true, false),
        (0xC93, true, false, false),
    ] {
        let mut g = Guest::protected();
        g.edit(|s| {
            s.segments[0] = segment(FREE_SELECTOR, 0, u32::MAX, attributes);
            s.segments[0].unusable = unusable;
        });
        g.code(|a| {
            asm!(a; mov(ebx, DATA as u32););
            if write {
                asm!(a; mov(byte_ptr(ebx).es(), al););
            } else {
                asm!(a; mov(al, byte_ptr(ebx).es()););
            }
            a.int3().unwrap();
        });
        assert_eq!(g.run_to_stub().vector, if ok { 3 } else { 13 }, "{attributes:#x} write {write}");
    }
}

#[test]
fn syscall_and_sysret_both_ways() {
    let mut g = Guest::user64();
    g.edit(|s| {
        s.msrs = vec![
            (x86_defs::msr::STAR, u64::from(KCODE64) << 32 | u64::from(UCODE32) << 48),
            (x86_defs::msr::LSTAR, CODE + 0x800),
            (x86_defs::msr::SFMASK, flags::IF | flags::DF),
        ];
        s.rflags |= flags::DF | flags::CF;
    });
    g.code(|a| asm!(a; syscall(); mov(ebx, 1); syscall(); hlt();));
    g.code_at(64, CODE + 0x800, |a| {
        let mut compatible = a.create_label();
        asm!(a; inc(esi); mov(r8, r11); cmp(ebx, 1); je(compatible); sysretq(););
        a.set_label(&mut compatible).unwrap();
        // Back to 32-bit code.
        asm!(a; mov(ecx, (CODE + 0x900) as u32); sysret(););
    });
    g.code_at(32, CODE + 0x900, |a| asm!(a; mov(edx, 7); int(0x33);));
    let frame = g.run_to_stub();
    let s = g.state();
    assert_eq!((frame.vector, frame.cs, frame.stack.map(|x| x.1)), (0x33, UCODE32 | 3, Some(UDATA | 3)));
    assert_eq!((s.gpr[6], s.gpr[2], s.gpr[8] & (flags::DF | flags::CF)), (2, 7, flags::DF | flags::CF));
}

#[test]
fn calls_through_a_gate_to_the_kernel_and_back() {
    // A 64-bit call gate of DPL 3 at FREE_SELECTOR.
    for long in [true, false] {
        let mut g = Guest::user64();
        let raw = gate(KCODE64, CODE + 0x800, 0xEC);
        g.ram.store(GDT + u64::from(FREE_SELECTOR), raw);
        g.ram.store::<u64>(GDT + u64::from(FREE_SELECTOR) + 8, 0);
        g.edit(if long { to_user64 } else { to_user32 });
        g.put(DATA, &[0, 0, 0, 0, FREE_SELECTOR as u8 | 3, 0, 0, 0]);
        if long {
            g.code(|a| asm!(a; db(&[0xFF, 0x1C, 0x25]); dd_(DATA as u32); mov(ebx, 5); int(0x33);));
        } else {
            g.code(|a| asm!(a; db(&[0xFF, 0x1D]); dd_(DATA as u32); mov(ebx, 5); int(0x33);));
        }
        g.code_at(64, CODE + 0x800, |a| asm!(a; mov(r9, rsp); mov(ax, cs); db(&[0x48, 0xCB]);));
        let frame = g.run_to_stub();
        let s = g.state();
        assert_eq!(
            (frame.vector, frame.cs & 3, s.gpr[3], s.gpr[0] & 0xFFFF),
            (0x33, 3, 5, u64::from(KCODE64))
        );
        assert_eq!((s.gpr[9], frame.stack.unwrap().0), (KERNEL_STACK - 32, STACK), "long {long}");
    }
}

/// `dd` of one word, as an instruction of the macro.
trait Word32 {
    fn dd_(&mut self, word: u32) -> Result<(), iced_x86::IcedError>;
}
impl Word32 for CodeAssembler {
    fn dd_(&mut self, word: u32) -> Result<(), iced_x86::IcedError> {
        self.db(&word.to_le_bytes())
    }
}
