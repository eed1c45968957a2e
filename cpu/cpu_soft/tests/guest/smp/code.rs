//! Code and translations that other vCPUs, or devices, change while a vCPU runs them (SDM vol. 3, 9.1.3 and
//! 4.10.5).

use crate::asm;
use crate::harness::apic::*;
use crate::harness::smp::*;
use guest_memory::DmaSpace;
use iced_x86::code_asm::*;
use x86_defs::paging::*;

/// What the writer has published.
const PUBLISHED: u64 = SHARED;
/// Something was wrong.
const BROKEN: u64 = SHARED + 0x100;
/// A page with `mov eax, imm32; ret` at several places.
const TARGET: u64 = 0x5_0000;
const ROUNDS: i32 = 4000;
/// Rounds in which the vCPUs wait for each other.
const TURNS: i32 = 300;

/// Readers, vCPUs 1 and up: what was published before the call must be what the code says, or older.
fn read_and_call(a: &mut CodeAssembler, place: u64) {
    let mut again = a.create_label();
    asm!(a; mov(rsi, place); mov(ebp, BROKEN as u32););
    a.set_label(&mut again).unwrap();
    asm!(a; pause(); mov(r12d, dword_ptr(PUBLISHED)););
    // The serializing instruction of the protocol; it writes EBX.
    asm!(a; xor(eax, eax); cpuid(); call(rsi); cmp(eax, r12d); setb(al); or(byte_ptr(rbp), al););
    asm!(a; cmp(r12d, ROUNDS); jb(again););
}

fn write_and_publish(a: &mut CodeAssembler, place: u64, before: impl FnOnce(&mut CodeAssembler)) {
    let mut again = a.create_label();
    asm!(a; mov(r12d, 1); mov(rsi, place); mov(ebx, PUBLISHED as u32););
    a.set_label(&mut again).unwrap();
    // The immediate first, then the flag.
    before(a);
    asm!(a; mov(dword_ptr(rsi + 1), r12d); mov(dword_ptr(rbx), r12d); inc(r12d); cmp(r12d, ROUNDS); jbe(again););
}

fn cross_modified(vcpus: u32, place: u64, before: fn(&mut CodeAssembler)) {
    let mut smp = Smp::long(vcpus, |a| {
        let (mut reader, mut end) = (a.create_label(), a.create_label());
        asm!(a; test(edi, edi); jnz(reader););
        write_and_publish(a, place, before);
        a.jmp(end).unwrap();
        a.set_label(&mut reader).unwrap();
        read_and_call(a, place);
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    smp.code(place, |a| asm!(a; mov(eax, 0); ret();));
    smp.run();
    assert_eq!(smp.get(BROKEN) as u8, 0, "stale code was run");
}

#[test]
fn cross_modified_code_by_the_manuals_protocol() {
    for vcpus in [2, 3, 4] {
        cross_modified(vcpus, TARGET + 0x40, |a| a.nop().unwrap());
    }
}

#[test]
fn a_page_that_is_code_and_busy_data() {
    // Other stores into the page just before: the page is tracked and freed all the time.
    for vcpus in [2, 3, 4] {
        cross_modified(vcpus, TARGET + 0x40, |a| {
            asm!(a; mov(dword_ptr(rsi + 0x100), r12d); mov(dword_ptr(rsi + 0x200), r12d); inc(dword_ptr(rsi + 0x300)););
        });
        cross_modified(vcpus, TARGET + 0x40, |a| {
            let mut spin = a.create_label();
            asm!(a; mov(ecx, 30););
            a.set_label(&mut spin).unwrap();
            asm!(a; inc(dword_ptr(rsi + 0x300)); db(&[0xF0]); add(dword_ptr(rsi + 0x304), ecx); loop_(spin););
        });
    }
}

#[test]
fn an_instruction_across_pages_changes_in_the_second() {
    // Bytes of the immediate at the start of the second page: 4-byte stores there are one access.
    cross_modified(3, TARGET + 0xFFF, |a| a.nop().unwrap());
}

#[test]
fn several_readers_write_in_turn() {
    // Each vCPU in its turn rewrites the function and runs it; all run it in between.
    let vcpus = 3;
    let mut smp = Smp::long(vcpus, |a| {
        let (mut again, mut wait, mut mine) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; mov(esi, (TARGET + 0x80) as u32); mov(r12d, 0); mov(r13d, edi););
        a.set_label(&mut again).unwrap();
        asm!(a; nop(););
        a.set_label(&mut wait).unwrap();
        asm!(a; pause(); mov(r14d, dword_ptr(PUBLISHED)); xor(eax, eax); cpuid(); call(rsi); cmp(eax, r14d); setb(al);
            or(byte_ptr(BROKEN), al); cmp(r14d, TURNS); jae(mine);
            // turn = published % 3
            mov(eax, r14d); xor(edx, edx); mov(ecx, vcpus); div(ecx); cmp(edx, r13d); jne(wait);
            lea(eax, ptr(r14 + 1)); mov(dword_ptr(rsi + 1), eax); mov(dword_ptr(PUBLISHED), eax); jmp(again););
        a.set_label(&mut mine).unwrap();
        a.nop().unwrap();
    });
    smp.code(TARGET + 0x80, |a| asm!(a; mov(eax, 0); ret();));
    smp.run();
    assert_eq!(smp.get(BROKEN) as u8, 0, "stale code was run");
}

#[test]
fn dma_into_code_that_runs() {
    let mut smp = Smp::long(2, |a| {
        read_and_call(a, TARGET + 0x40);
    });
    smp.code(TARGET + 0x40, |a| asm!(a; mov(eax, 0); ret();));
    let dma = DmaSpace::new(smp.ram.clone());
    dma.set_enabled(true);
    smp.run_beside(|| {
        for n in 1..=ROUNDS {
            dma.write(TARGET + 0x41, &n.to_le_bytes()).unwrap();
            dma.write(PUBLISHED, &n.to_le_bytes()).unwrap();
            if n % 16 == 0 {
                std::thread::yield_now();
            }
        }
    });
    assert_eq!(smp.get(BROKEN) as u8, 0, "stale code was run");
}

#[test]
fn shootdown_by_ipi() {
    // vCPU 0 moves a page between frames and shoots the others' translations down; each frame holds its
    // number, and after the acknowledgement nobody may see the old one.
    const WINDOW: u64 = 0x80_0000_0000;
    const VECTOR: u8 = 0x60;
    const ACKS: u64 = SHARED + 0x200;
    let vcpus = 3;
    let mut entry = 0;
    let mut smp = Smp::long(vcpus, |a| {
        let (mut others, mut again, mut acks, mut end, mut look) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
        asm!(a; mov(rbx, WINDOW); sti(); test(edi, edi); jnz(others); mov(r12d, 1););
        a.set_label(&mut again).unwrap();
        // Frames 0x60000 and up hold their distance.
        asm!(a; mov(eax, r12d); and(eax, 63); shl(eax, 12); add(eax, 0x6_0003); mov(rdx, qword_ptr(SHARED + 0x80));
            mov(dword_ptr(ACKS), 0); mov(dword_ptr(rdx), eax); invlpg(ptr(rbx)););
        wrmsr(a, X2_ICR, 3 << 18 | u64::from(VECTOR));
        a.set_label(&mut acks).unwrap();
        asm!(a; pause(); cmp(dword_ptr(ACKS), vcpus as i32 - 1); jne(acks); mov(dword_ptr(PUBLISHED), r12d);
            inc(r12d); cmp(r12d, TURNS); jbe(again); jmp(end););
        a.set_label(&mut others).unwrap();
        a.nop().unwrap();
        a.set_label(&mut look).unwrap();
        // Older than what was published before the look is stale, whatever happened in between. What is seen may
        // be one ahead of what is published behind the look. Distances are modulo 64.
        asm!(a; pause(); mov(r12d, dword_ptr(PUBLISHED)); mov(eax, dword_ptr(rbx)); mov(r13d, dword_ptr(PUBLISHED));
            sub(eax, r12d); and(eax, 63); sub(r13d, r12d); inc(r13d); cmp(eax, r13d); seta(al);
            or(byte_ptr(BROKEN), al); cmp(r12d, TURNS); jb(look););
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    entry += smp.tables.map(WINDOW, 0x6_0000 | PTE_P | PTE_W, 1);
    smp.put(SHARED + 0x80, &entry.to_le_bytes());
    for n in 0..64u64 {
        smp.put(0x6_0000 + n * 0x1000, &n.to_le_bytes());
    }
    smp.handler(VECTOR, 0x1_8000, |a| {
        asm!(a; invlpg(ptr(rbx)););
        lock(a);
        asm!(a; inc(dword_ptr(ACKS)););
        eoi(a);
        a.iretq().unwrap();
    });
    smp.run();
    assert_eq!(smp.get(BROKEN) as u8, 0, "a translation outlived its shootdown");
}
