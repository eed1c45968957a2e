//! From real mode through every mode and back, by the guest's own instructions; virtual-8086 mode
//! (SDM vol. 3, 10.8, 10.9 and 21.2).

use crate::asm;
use crate::harness::guest::{CODE_16, STACK_16, protected_state};
use crate::harness::images::*;
use crate::harness::*;
use hypervisor::VcpuState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::paging::*;
use x86_defs::{flags, msr};

/// Far jump with a 32-bit offset (`66 EA` in 16-bit code, `EA` in 32-bit code).
fn far_jump(a: &mut CodeAssembler, bits: u32, selector: u16, offset: u64) {
    if bits == 16 {
        a.db(&[0x66]).unwrap();
    }
    a.db(&[0xEA]).unwrap();
    a.db(&(offset as u32).to_le_bytes()).unwrap();
    a.db(&selector.to_le_bytes()).unwrap();
}
fn say(a: &mut CodeAssembler, n: u32) {
    asm!(a; mov(al, n); out(1, al););
}

const STAGE: u64 = 0x400;
const fn stage(n: u64) -> u64 {
    CODE + n * STAGE
}

#[test]
fn through_all_modes_and_back() {
    let mut g = Guest::real();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    let mut pae = tables.another_pae();
    pae.identity(RAM_BYTES, PTE_P | PTE_W);
    let (long_root, pae_root) = (tables.root as u32, pae.root as u32);
    let mut pseudo = GDT_LIMIT.to_le_bytes().to_vec();
    pseudo.extend((GDT as u32).to_le_bytes());
    g.put(0x9000, &pseudo);
    // 16-bit segments of protected mode whose base is not 0.
    g.ram.store(GDT + u64::from(FREE_SELECTOR), descriptor(stage(1), 0xFFFF, CODE16));
    // Real mode.
    g.code_at(16, CODE_16, |a| {
        say(a, 1);
        asm!(a; lgdt(ptr(0x9000)); mov(eax, cr0); or(al, 1); mov(cr0, eax););
        // PE is set, CS is still real mode's: that works until the jump.
        asm!(a; nop(); mov(bx, i32::from(KDATA16)); mov(ds, bx););
        far_jump(a, 16, FREE_SELECTOR, 0);
    });
    // 16-bit protected mode, with a base.
    g.put(
        stage(1),
        &assemble(16, 0, |a| {
            say(a, 2);
            asm!(a; call(0x100u64);); // near, within the segment
            far_jump(a, 16, KCODE32, stage(2));
        }),
    );
    g.put(stage(1) + 0x100, &assemble(16, 0x100, |a| asm!(a; inc(si); ret();)));
    // 32-bit protected mode, then PAE paging.
    g.code_at(32, stage(2), |a| {
        say(a, 3);
        asm!(a; mov(ax, i32::from(KDATA)); mov(ds, eax); mov(es, eax); mov(ss, eax); mov(esp, STACK as u32););
        asm!(a; mov(eax, pae_root); mov(cr3, eax); mov(eax, CR4_PAE as u32); mov(cr4, eax);
            mov(eax, cr0); or(eax, CR0_PG as u32); mov(cr0, eax););
        say(a, 4);
        asm!(a; push(0x1234); pop(edi););
        // Long mode needs paging off first.
        asm!(a; mov(eax, cr0); and(eax, !(CR0_PG as u32)); mov(cr0, eax); mov(eax, long_root); mov(cr3, eax););
        asm!(a; mov(ecx, msr::EFER); rdmsr(); or(eax, EFER_LME as i32); wrmsr(); mov(eax, cr0); or(eax, CR0_PG as u32); mov(cr0, eax););
        // Compatibility mode now.
        say(a, 5);
        far_jump(a, 32, KCODE64, stage(3));
    });
    // 64-bit mode, compatibility mode and back.
    g.code_at(64, stage(3), |a| {
        say(a, 6);
        asm!(a; mov(r8, 0x1111_2222_3333_4444u64); push(i32::from(KCODE32)); push(stage(4) as i32); db(&[0x48, 0xCB]););
    });
    g.code_at(32, stage(4), |a| {
        say(a, 7);
        far_jump(a, 32, KCODE64, stage(5));
    });
    g.code_at(64, stage(5), |a| {
        say(a, 8);
        asm!(a; mov(r9, r8); push(i32::from(KCODE32)); push(stage(6) as i32); db(&[0x48, 0xCB]););
    });
    // Out of long mode: paging off, LME off, then to real mode through 16-bit code.
    g.code_at(32, stage(6), |a| {
        asm!(a; mov(eax, cr0); and(eax, !(CR0_PG as u32)); mov(cr0, eax); mov(ecx, msr::EFER); rdmsr(); mov(ebp, eax);
            and(eax, !(EFER_LME as i32)); wrmsr(); xor(eax, eax); mov(cr4, eax););
        say(a, 9);
        asm!(a; mov(ax, i32::from(KDATA16)); mov(ds, eax); mov(ss, eax); mov(es, eax););
        far_jump(a, 32, KCODE16, 0x9800);
    });
    g.code_at(16, 0x9800, |a| {
        asm!(a; mov(eax, cr0); and(al, 0xFE); mov(cr0, eax); db(&[0xEA, 0x00, 0x9C, 0x00, 0x00]););
    });
    g.code_at(16, 0x9C00, |a| {
        say(a, 10);
        asm!(a; xor(ax, ax); mov(ds, ax); mov(ss, ax); mov(sp, STACK_16 as u32); int(0x21); hlt(););
    });
    // A real-mode handler.
    g.put(0x21 * 4, &[0x00, 0x9D, 0, 0]);
    g.code_at(16, 0x9D00, |a| {
        say(a, 11);
        asm!(a; iret(););
    });
    let s = g.run_to_halt();
    assert_eq!(g.io.outs(1), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!((s.gpr[9], s.gpr[6] & 0xFFFF), (0x1111_2222_3333_4444, 1));
    assert_eq!((s.cr0 & (CR0_PE | CR0_PG), s.efer & EFER_LMA, s.gpr[5] & EFER_LMA), (0, 0, 0));
}

#[test]
fn unreal_mode_keeps_its_limits() {
    let mut g = Guest::real();
    g.ram.store::<u32>(0x20_0000, 0xABCD);
    g.edit(|s| {
        s.segments[3] = segment(0, 0, u32::MAX, DATA32);
    });
    g.code(|a| {
        asm!(a; mov(ebx, 0x20_0000); mov(eax, dword_ptr(ebx)););
        // A load of the selector keeps limit and rights.
        asm!(a; xor(cx, cx); mov(ds, cx); mov(edx, dword_ptr(ebx)); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[2]), (0xABCD, 0xABCD));
}

#[test]
fn forbidden_steps_between_modes() {
    // (control registers and EFER before, what is written to CR0 or CR4, allowed)
    let try_cr0 = |cr4_before: u64, efer: u64, value: u32| {
        let mut g = Guest::protected();
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, PTE_P | PTE_W);
        g.edit(|s| (s.cr3, s.cr4, s.efer) = (tables.root, cr4_before, efer));
        // The IDT is one of 32-bit mode: what is allowed ends in HLT.
        g.code(|a| asm!(a; mov(eax, value); mov(cr0, eax); hlt();));
        let stop = g.run();
        assert!(matches!(stop, Stop::Halted(_)), "{stop:?}");
        let rip = g.state().rip;
        if rip == CODE + 9 { 0 } else { (rip - STUBS) / 8 }
    };
    let pe = (CR0_PE | CR0_ET) as u32;
    assert_eq!(try_cr0(0, EFER_LME, pe | CR0_PG as u32), 13, "long mode without PAE");
    assert_eq!(try_cr0(CR4_PAE, EFER_LME, pe | CR0_PG as u32), 0);
    assert_eq!(try_cr0(0, 0, (CR0_PG | CR0_ET) as u32), 13, "PG without PE");
    assert_eq!(try_cr0(0, 0, pe | CR0_NW as u32), 13, "NW without CD");
    let in_long = |f: &dyn Fn(&mut CodeAssembler)| {
        let mut g = Guest::long();
        g.code(|a| {
            f(a);
            a.int(0x80).unwrap();
        });
        g.run_to_stub().vector
    };
    assert_eq!(in_long(&|a| asm!(a; mov(rax, cr4); btr(rax, 5); mov(cr4, rax);)), 13, "PAE must stay");
    assert_eq!(in_long(&|a| asm!(a; mov(rax, cr0); btr(rax, 31); mov(cr0, rax);)), 13, "PG in 64-bit code");
    assert_eq!(
        in_long(&|a| asm!(a; mov(rax, cr3); bts(rax, 50); mov(cr3, rax);)),
        13,
        "bits above the address"
    );
    assert_eq!(in_long(&|a| asm!(a; mov(rax, cr4); bts(rax, 12); mov(cr4, rax);)), 13, "LA57 does not exist");
    assert_eq!(
        in_long(&|a| asm!(a; mov(ecx, msr::EFER); rdmsr(); btr(eax, 8); wrmsr();)),
        13,
        "LME under paging"
    );
    assert_eq!(in_long(&|a| asm!(a; mov(rax, cr0); bts(rax, 40); mov(cr0, rax);)), 13);
    assert_eq!(in_long(&|a| asm!(a; mov(ecx, msr::LSTAR); mov(edx, 0x8000); wrmsr();)), 13, "not canonical");
}

fn v86(iopl: u64) -> Guest {
    let mut g = Guest::protected();
    g.edit(|s| {
        let v86 = |selector: u16| segment(selector, u64::from(selector) << 4, 0xFFFF, 0xF3);
        s.segments = [v86(0x3000), v86(0x1000), v86(0x1800), v86(0x3000), v86(0x3000), v86(0x3000)];
        s.rflags = flags::FIXED_1 | flags::VM | iopl << flags::IOPL_SHIFT;
        (s.rip, s.gpr[4]) = (0, 0x1000);
    });
    g
}
fn v86_code(g: &Guest, f: impl FnOnce(&mut CodeAssembler)) {
    g.put(0x1_0000, &assemble(16, 0, f));
}

#[test]
fn v86_addresses_and_exits() {
    let g = v86(3);
    v86_code(&g, |a| {
        asm!(a; mov(ax, 0x1234); mov(word_ptr(0x10), ax); push(ax); mov(bx, 0x3800); mov(ds, bx); mov(cx, word_ptr(0x10)); int(0x30););
    });
    g.put(0x3_8010, &[0x78, 0x56]);
    let mut g = g;
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.cs, frame.rflags & flags::VM), (0x30, 0x1000, flags::VM));
    assert_eq!(frame.stack, Some((0xFFE, 0x1800)));
    let s = g.state();
    assert_eq!((g.get(0x3_0010) & 0xFFFF, s.gpr[1] & 0xFFFF), (0x1234, 0x5678));
    // ES, DS, FS, GS lie above SS; the registers are null now.
    let at = s.gpr[4] + 20;
    assert_eq!(
        [g.get32(at), g.get32(at + 4), g.get32(at + 8), g.get32(at + 12)],
        [0x3000, 0x3800, 0x3000, 0x3000]
    );
    assert!([0, 3, 4, 5].iter().all(|n| s.segments[*n].selector == 0 && s.segments[*n].unusable));
    assert_eq!((s.segments[1].selector, s.rflags & (flags::VM | flags::IF)), (KCODE32, 0));
}

#[test]
fn v86_is_sensitive_to_iopl() {
    for (iopl, vector) in [(3, 0x30), (0, 13)] {
        for code in [&[0xFA][..], &[0xFB, 0xFA], &[0x9C, 0x9D], &[0xCD, 0x30]] {
            let mut g = v86(iopl);
            let mut bytes = code.to_vec();
            bytes.extend([0xCD, 0x30]);
            g.put(0x1_0000, &bytes);
            let frame = g.run_to_stub();
            assert_eq!(frame.vector, vector, "{code:x?} with IOPL {iopl}");
        }
        // Always forbidden.
        for code in [&[0xF4][..], &[0x0F, 0x20, 0xC0], &[0x0F, 0x32]] {
            let mut g = v86(iopl);
            g.put(0x1_0000, code);
            assert_eq!(g.run_to_stub().vector, 13, "{code:x?}");
        }
    }
}

#[test]
fn iret_to_v86_and_ports_by_the_bitmap() {
    let mut g = Guest::protected();
    // Port 0x71 is allowed, 0x70 is not.
    g.ram.store::<u8>(TSS + 0x68 + 0xE, !2);
    g.code(|a| {
        for word in [0x3000, 0x3000, 0x3000, 0x3000, 0x1800, 0x1000, (flags::VM | 2) as i32, 0x1400, 0] {
            a.push(word).unwrap();
        }
        a.iretd().unwrap();
    });
    g.put(0x1_4000, &assemble(16, 0, |a| asm!(a; out(0x71, al); nop(); out(0x70, al);)));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.error, frame.rip, frame.cs), (13, Some(0), 3, 0x1400));
    assert_eq!((g.io.outs(0x71).len(), g.io.outs(0x70).len()), (1, 0));
}

#[test]
fn an_interrupt_in_compatibility_mode_is_64_bit() {
    let mut g = Guest::long();
    g.edit(|s| {
        let p: VcpuState = protected_state();
        s.segments = p.segments;
        s.gpr[4] = STACK - 3;
    });
    g.code(|a| asm!(a; mov(eax, 5); int(0x44);));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.cs, frame.rip), (0x44, KCODE32, CODE + 7));
    assert_eq!(frame.stack, Some((STACK - 3, KDATA)));
    let s = g.state();
    assert_eq!((s.segments[1].selector, s.gpr[4]), (KCODE64, STACK - 16 - 40), "aligned to 16 bytes");
}
