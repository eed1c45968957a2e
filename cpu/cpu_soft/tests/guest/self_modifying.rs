//! Self-modifying code: whatever way the bytes change, the next fetch sees them (SDM vol. 3, 12.6).

use crate::asm;
use crate::harness::*;
use guest_memory::DmaSpace;
use iced_x86::code_asm::*;
use x86_defs::flags;
use x86_defs::paging::*;

/// `mov eax, imm32`: one byte of opcode, then the immediate.
const MOV_EAX: usize = 5;

/// Runs `write` (which gets the address of an immediate in the block that is running) before `mov eax, 1`.
fn patched(write: impl FnOnce(&mut CodeAssembler, u64)) -> u64 {
    let mut g = Guest::long();
    // The distance to the patched instruction does not depend on what `write` assembles to.
    let target = CODE + 0x80;
    g.put(CODE, &[0x90; 0x80]);
    g.code(|a| {
        asm!(a; mov(ecx, 0x77); mov(edx, 0););
        write(a, target + 1);
    });
    g.code_at(64, target, |a| asm!(a; mov(eax, 1); hlt();));
    g.run_to_halt().gpr[0]
}

#[test]
fn a_store_into_the_running_block() {
    assert_eq!(patched(|a, at| asm!(a; mov(byte_ptr(at), 0x55u32);)), 0x55);
    assert_eq!(patched(|a, at| asm!(a; mov(dword_ptr(at - 3), ecx); mov(byte_ptr(at - 1), 0xB8u32);)), 0);
    assert_eq!(patched(|a, at| asm!(a; mov(word_ptr(at), cx);)), 0x77);
}

#[test]
fn every_kind_of_store_is_seen() {
    assert_eq!(patched(|a, at| asm!(a; add(byte_ptr(at), 4u32);)), 5);
    assert_eq!(patched(|a, at| asm!(a; db(&[0xF0]); add(byte_ptr(at), 4u32);)), 5);
    assert_eq!(patched(|a, at| asm!(a; xchg(dword_ptr(at), ecx);)), 0x77);
    assert_eq!(patched(|a, at| asm!(a; mov(eax, 1); db(&[0xF0]); cmpxchg(dword_ptr(at), ecx);)), 0x77);
    assert_eq!(patched(|a, at| asm!(a; db(&[0xF0]); xadd(dword_ptr(at), ecx);)), 0x78);
    assert_eq!(patched(|a, at| asm!(a; movd(xmm0, ecx); movd(dword_ptr(at), xmm0);)), 0x77);
    assert_eq!(patched(|a, at| asm!(a; mov(rdi, at); mov(al, cl); stosb();)), 0x77);
    assert_eq!(
        patched(|a, at| asm!(a; mov(rsp, at + 8); mov(rdx, 0xF4_3300_0000u64); add(rdx, 9); push(rdx);)),
        9 + 0x3300_0000
    );
    assert_eq!(patched(|a, at| asm!(a; bts(dword_ptr(at), 3u32);)), 9);
    assert_eq!(patched(|a, at| asm!(a; mov(rbx, at); mov(byte_ptr(rbx), cl); db(&[0x0F, 0xA2]);)), 0x77);
}

#[test]
fn cmpxchg16b_and_wide_vectors() {
    let wide = |write: fn(&mut CodeAssembler)| {
        let mut g = Guest::long();
        let target = CODE + 0x80;
        // What is written: the same code with another immediate, from DATA.
        let new = assemble(
            64,
            target,
            |a| asm!(a; mov(eax, 0x66); hlt(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop(); nop();),
        );
        g.put(DATA, &new);
        g.put(DATA + 16, &new);
        g.put(CODE, &[0x90; 0x100]);
        g.code_at(64, target, |a| asm!(a; mov(eax, 1); hlt();));
        g.code(|a| {
            asm!(a; mov(rdi, target););
            write(a);
        });
        g.run_to_halt().gpr[0]
    };
    assert_eq!(wide(|a| asm!(a; movups(xmm1, xmmword_ptr(DATA)); movaps(xmmword_ptr(rdi), xmm1);)), 0x66);
    assert_eq!(wide(|a| asm!(a; vmovups(ymm1, ymmword_ptr(DATA)); vmovups(ymmword_ptr(rdi), ymm1);)), 0x66);
    assert_eq!(
        wide(|a| asm!(a; mov(rax, qword_ptr(rdi)); mov(rdx, qword_ptr(rdi + 8)); mov(rbx, qword_ptr(DATA));
            mov(rcx, qword_ptr(DATA + 8)); db(&[0xF0]); cmpxchg16b(xmmword_ptr(rdi));)),
        0x66
    );
    assert_eq!(wide(|a| asm!(a; mov(esi, DATA as u32); mov(ecx, 4); db(&[0xF3, 0xA5]);)), 0x66);
}

#[test]
fn rep_stos_over_its_own_code() {
    let mut g = Guest::long();
    g.put(CODE, &[0xCC; 0x100]);
    // The fill begins before the instruction itself: it finishes all the same, then NOPs run.
    g.code(|a| asm!(a; mov(edi, CODE as u32); mov(ecx, 0x40); mov(al, 0x90); db(&[0xF3, 0xAA]); ud2();));
    g.put(CODE + 0x40, &[0xF4]);
    let s = g.run_to_halt();
    assert_eq!((s.rip, s.gpr[1], g.get(CODE)), (CODE + 0x41, 0, 0x9090_9090_9090_9090));
}

#[test]
fn a_loop_that_patches_itself() {
    let mut g = Guest::long();
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ecx, 1000); xor(ebx, ebx););
        a.set_label(&mut again).unwrap();
        // add ebx, imm32; the immediate counts up.
        a.db(&[0x81, 0xC3, 1, 0, 0, 0]).unwrap();
        asm!(a; inc(dword_ptr(CODE + 9)); loop_(again); hlt(););
    });
    assert_eq!(g.run_to_halt().gpr[3], (1..=1000).sum::<u64>());
}

#[test]
fn code_and_data_share_a_page() {
    let mut g = Guest::long();
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(ecx, 20_000););
        a.set_label(&mut again).unwrap();
        asm!(a; add(qword_ptr(CODE + 0x800), rcx); dec(ecx); jnz(again); hlt(););
    });
    g.run_to_halt();
    assert_eq!(g.get(CODE + 0x800), (1..=20_000).sum::<u64>());
}

/// Code that lies across the end of the page at `CODE + 0x1000`, called by a loop that patches it in between.
fn crossing(split: usize, patch: impl Fn(&mut CodeAssembler, u64)) -> Vec<u32> {
    let mut g = Guest::long();
    let place = CODE + 0x2000 - split as u64;
    g.code_at(64, place, |a| asm!(a; mov(eax, 0x0101_0101); ret();));
    g.code(|a| {
        asm!(a; mov(rbx, place); call(rbx); out(1, eax););
        patch(a, place);
        asm!(a; call(rbx); out(1, eax); hlt(););
    });
    g.run_to_halt();
    g.io.outs(1)
}

#[test]
fn instructions_across_a_page_end_change_in_either_half() {
    for split in 1..MOV_EAX {
        for byte in 1..MOV_EAX {
            let outs = crossing(split, |a, at| asm!(a; mov(byte_ptr(at + byte as u64), 0x44u32);));
            let want = 0x0101_0101u32 & !(0xFF << ((byte - 1) * 8)) | 0x44 << ((byte - 1) * 8);
            assert_eq!(outs, [0x0101_0101, want], "split {split} byte {byte}");
        }
        // One store over both pages.
        let outs = crossing(split, |a, at| asm!(a; mov(dword_ptr(at + 1), 0x0A0B_0C0Du32);));
        assert_eq!(outs, [0x0101_0101, 0x0A0B_0C0D], "split {split}");
    }
}

#[test]
fn a_store_across_the_page_end_changes_code_on_both_sides() {
    let mut g = Guest::long();
    let end = CODE + 0x2000;
    g.code_at(64, end - 6, |a| asm!(a; mov(eax, 1); nop(); mov(ebx, 1); ret();));
    g.code(|a| {
        asm!(a; mov(rsi, end - 6); call(rsi););
        // ... imm[2], imm[3], nop | opcode of mov, imm[0], imm[1]
        asm!(a; mov(rax, 0x01_0005_BB90_0000u64); mov(qword_ptr(end - 3), rax); call(rsi); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[3]), (1, 0x0001_0005));
}

#[test]
fn aliases_of_a_page() {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    const ALIAS: u64 = 0x4000_0000;
    tables.map(ALIAS, (CODE + 0x1000) | PTE_P | PTE_W, 1);
    g.long_with(&tables);
    g.code_at(64, CODE + 0x1000, |a| asm!(a; mov(eax, 1); ret();));
    g.code(|a| {
        asm!(a; mov(rbx, ALIAS); mov(rsi, CODE + 0x1000););
        // Write through one address, run through the other, and the other way round.
        asm!(a; call(rsi); out(1, eax); call(rbx); out(1, eax);
            mov(byte_ptr(rbx + 1), 2u32); call(rsi); out(1, eax);
            mov(byte_ptr(rsi + 1), 3u32); call(rbx); out(1, eax); call(rsi); out(1, eax); hlt(););
    });
    g.run_to_halt();
    assert_eq!(g.io.outs(1), [1, 1, 2, 3, 3]);
}

#[test]
fn dma_into_code() {
    let mut g = Guest::long();
    let dma = DmaSpace::new(g.ram.clone());
    dma.set_enabled(true);
    g.io.on_out(move |port, value| {
        if port == 9 {
            dma.write(CODE + 0x1001, &[value as u8]).unwrap();
        }
    });
    g.code_at(64, CODE + 0x1000, |a| asm!(a; mov(eax, 1); ret();));
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(rsi, CODE + 0x1000); mov(ecx, 5););
        a.set_label(&mut again).unwrap();
        asm!(a; mov(eax, ecx); out(9, al); call(rsi); out(1, eax); loop_(again); hlt(););
    });
    g.run_to_halt();
    assert_eq!(g.io.outs(1), [5, 4, 3, 2, 1]);
}

#[test]
fn remapped_code_without_any_store() {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    const WINDOW: u64 = 0x4000_0000;
    let entry = tables.map(WINDOW, DATA | PTE_P, 1);
    let mut other = tables.another();
    other.identity(RAM_BYTES, PTE_P | PTE_W);
    other.map(WINDOW, (DATA + 0x2000) | PTE_P, 1);
    g.long_with(&tables);
    for n in 0..3u32 {
        g.code_at(64, DATA + u64::from(n) * 0x1000, |a| asm!(a; mov(eax, n + 1); ret();));
    }
    let (first, second) = (tables.root, other.root);
    g.code(|a| {
        asm!(a; mov(rbx, WINDOW); call(rbx); out(1, eax);
            mov(rax, (DATA + 0x1000) | PTE_P); mov(qword_ptr(entry), rax); invlpg(ptr(rbx)); call(rbx); out(1, eax);
            mov(rax, second); mov(cr3, rax); call(rbx); out(1, eax);
            mov(rax, first); mov(cr3, rax); call(rbx); out(1, eax); hlt(););
    });
    g.run_to_halt();
    assert_eq!(g.io.outs(1), [1, 2, 3, 2]);
}

#[test]
fn the_stack_lies_in_the_code_page() {
    // Frames of INT n, of faults and of interrupts are stores into the running block's page, too.
    let mut g = Guest::long();
    g.edit(|s| s.gpr[4] = CODE + 0xF00);
    g.handler64(0x60, CODE + 0x400, |a| asm!(a; inc(esi); iretq();));
    g.handler64(6, CODE + 0x480, |a| asm!(a; inc(edi); add(qword_ptr(rsp), 2); iretq();));
    g.handler64(13, CODE + 0x500, |a| asm!(a; inc(r8d); add(rsp, 8); add(qword_ptr(rsp), 2); iretq();));
    g.code(|a| {
        let (mut f, mut past) = (a.create_label(), a.create_label());
        asm!(a; int(0x60); ud2(); push(rax); call(f); pop(rax); db(&[0x0F, 0x0B]); pushfq(); popfq(););
        // mov ds, cx with a selector beyond the table
        asm!(a; mov(ebp, CODE as u32 + 0xE00); mov(ecx, 0x1F0); db(&[0x8E, 0xD9]); jmp(past););
        a.set_label(&mut f).unwrap();
        asm!(a; inc(ebx); ret(););
        a.set_label(&mut past).unwrap();
        asm!(a; enter(16, 3); leave(); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[6], s.gpr[7], s.gpr[8], s.gpr[3], s.gpr[4]), (1, 2, 1, 1, CODE + 0xF00));
}

#[test]
fn interrupt_frames_in_the_code_page() {
    let mut g = Guest::long().with_x2apic();
    g.edit(|s| (s.gpr[4], s.rflags) = (CODE + 0xF00, s.rflags | flags::IF));
    g.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        asm!(a; inc(rbx); cmp(ebx, 100); jne(again); out(1, al); nop(); ud2(););
    });
    let sink = g.partition.irq_sink();
    g.io.on_out(move |_, _| apic::send(&sink, 0, 0x70));
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.stack), (0x70, Some((CODE + 0xF00, KDATA))));
}

/// A loop calls a function in another page. That page is written now and then: beside the function, and its immediate.
#[test]
fn calls_into_a_page_that_changes() {
    const FUNCTION: u64 = CODE + 0x1800;
    let mut g = Guest::long();
    g.code_at(64, FUNCTION, |a| asm!(a; mov(eax, 1); cmp(edi, 500); ret();));
    g.code(|a| {
        let (mut top, mut beside, mut patch, mut on) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        asm!(a; mov(edi, 1000); xor(ebx, ebx); xor(ebp, ebp);
            set_label(&mut top); call(FUNCTION); adc(rbp, 0); add(rbx, rax);
            test(edi, 0x1F); je(beside); test(edi, 0x3F); je(patch); jmp(on);
            set_label(&mut beside); inc(dword_ptr(FUNCTION + 0x100)); test(edi, 0x3F); jne(on);
            set_label(&mut patch); inc(dword_ptr(FUNCTION + 1));
            set_label(&mut on); dec(edi); jne(top); hlt(););
    });
    let s = g.run_to_halt();
    let mut immediate = 1;
    let sum: u64 = (1..=1000u64).rev().fold(0, |sum, n| {
        let before = immediate;
        immediate += u64::from(n % 64 == 0);
        sum + before
    });
    assert_eq!((s.gpr[3], s.gpr[5], g.get32(FUNCTION + 0x100)), (sum, 499, 31));
}
