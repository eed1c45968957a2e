//! Locked instructions are atomic among vCPUs at any alignment (SDM vol. 3, 9.1.2).

use crate::asm;
use crate::harness::smp::*;
use iced_x86::code_asm::*;

const ROUNDS: u32 = 20_000;

/// Locked accesses (of up to 8 bytes) of each vCPU at `at`. Across a line they are few: Linux hosts may let each wait
/// for 10 ms (`kernel.split_lock_mitigate`).
fn rounds(at: u64) -> u32 {
    if at % 64 > 56 { ROUNDS / 40 } else { ROUNDS }
}

/// All vCPUs run `body` (with RBX at `at`) `rounds(at)` times.
fn hammer(vcpus: u32, at: u64, body: impl FnOnce(&mut CodeAssembler)) -> Smp {
    let mut smp = Smp::long(vcpus, |a| {
        let mut again = a.create_label();
        asm!(a; mov(rbx, at); mov(r15d, rounds(at)););
        a.set_label(&mut again).unwrap();
        a.nop().unwrap();
        body(a);
        asm!(a; dec(r15d); jnz(again););
    });
    smp.run();
    smp
}

#[test]
fn increments_at_every_alignment_sum_up() {
    for vcpus in [2, 4] {
        // In a line, unaligned, across lines, across pages.
        for offset in [0x100, 0x103, 0x13E, 0xFFE] {
            let at = SHARED + offset;
            let smp = hammer(vcpus, at, |a| {
                lock(a);
                asm!(a; inc(dword_ptr(rbx)););
            });
            assert_eq!(smp.get(at) as u32, vcpus * rounds(at), "{vcpus} vCPUs at {offset:#x}");
        }
    }
}

#[test]
fn every_locked_form_sums_up() {
    type Form = (&'static str, fn(&mut CodeAssembler));
    let forms: [Form; 5] = [
        ("add", |a| asm!(a; db(&[0xF0]); add(qword_ptr(rbx), 1);)),
        ("sub", |a| asm!(a; db(&[0xF0]); sub(qword_ptr(rbx), -1);)),
        ("adc", |a| asm!(a; stc(); db(&[0xF0]); adc(qword_ptr(rbx), 0);)),
        ("xadd", |a| asm!(a; mov(eax, 1); db(&[0xF0]); xadd(qword_ptr(rbx), rax);)),
        ("cmpxchg", |a| {
            let mut retry = a.create_label();
            asm!(a; mov(rax, qword_ptr(rbx)););
            a.set_label(&mut retry).unwrap();
            asm!(a; lea(rcx, ptr(rax + 1)); db(&[0xF0]); cmpxchg(qword_ptr(rbx), rcx); jne(retry););
        }),
    ];
    for (name, form) in forms {
        for offset in [0x200, 0x3FC, 0xFFC] {
            let at = SHARED + offset;
            let smp = hammer(2, at, form);
            assert_eq!(smp.get(at), 2 * u64::from(rounds(at)), "{name} at {offset:#x}");
        }
    }
}

#[test]
fn across_two_pages_and_within_one_exclude_each_other() {
    // vCPU 0 adds to a quadword across two pages, the others to its lower half, which lies in one.
    // Few across: each may cost the others' time slices.
    const ACROSS: u32 = 1_000;
    const WITHIN: u32 = 30_000;
    for vcpus in [2, 4] {
        let at = SHARED + 0xFFC;
        let mut smp = Smp::long(vcpus, |a| {
            let (mut within, mut again, mut end) = (a.create_label(), a.create_label(), a.create_label());
            asm!(a; mov(rbx, at); mov(r15d, WITHIN); test(edi, edi); jnz(within); mov(r15d, ACROSS););
            a.set_label(&mut again).unwrap();
            asm!(a; db(&[0xF0]); add(qword_ptr(rbx), 1); dec(r15d); jnz(again); jmp(end););
            a.set_label(&mut within).unwrap();
            asm!(a; db(&[0xF0]); inc(dword_ptr(rbx)); dec(r15d); jnz(within););
            a.set_label(&mut end).unwrap();
            a.nop().unwrap();
        });
        smp.run();
        assert_eq!(smp.get(at), u64::from(ACROSS + (vcpus - 1) * WITHIN), "{vcpus} vCPUs");
    }
}

#[test]
fn bits_that_each_flips_alone() {
    // Each vCPU complements its own bit an even number of times and once more.
    let smp = hammer(4, SHARED + 0x300, |a| {
        lock(a);
        asm!(a; btc(dword_ptr(rbx), edi););
    });
    assert_eq!(smp.get(SHARED + 0x300), 0, "an even number of flips");
    let smp = hammer(4, SHARED + 0x300, |a| {
        asm!(a; db(&[0xF0]); bts(dword_ptr(rbx), edi); db(&[0xF0]); btr(dword_ptr(rbx), edi); db(&[0xF0]); bts(dword_ptr(rbx), edi););
    });
    assert_eq!(smp.get(SHARED + 0x300), 0xF);
}

#[test]
fn exchange_makes_a_lock() {
    // XCHG locks by itself; what it guards is a plain increment, in another page.
    let smp = hammer(4, SHARED, |a| {
        let (mut acquire, mut have) = (a.create_label(), a.create_label());
        a.set_label(&mut acquire).unwrap();
        asm!(a; mov(eax, 1); xchg(dword_ptr(rbx), eax); test(eax, eax); jz(have); pause(); jmp(acquire););
        a.set_label(&mut have).unwrap();
        asm!(a; mov(rax, qword_ptr(rbx + 0x1000)); inc(rax); mov(qword_ptr(rbx + 0x1000), rax); mov(dword_ptr(rbx), 0););
    });
    assert_eq!(smp.get(SHARED + 0x1000), 4 * u64::from(ROUNDS));
}

#[test]
fn cmpxchg16b_and_cmpxchg8b() {
    // Both halves count together; a torn exchange would leave them different.
    for wide in [false, true] {
        let smp = hammer(2, SHARED + 0x400, |a| {
            let mut retry = a.create_label();
            // RCX:RBX is the new value, so that the address is in RSI.
            asm!(a; mov(rsi, SHARED + 0x400););
            if wide {
                asm!(a; mov(rax, qword_ptr(rsi)); mov(rdx, qword_ptr(rsi + 8)););
            } else {
                asm!(a; mov(eax, dword_ptr(rsi)); mov(edx, dword_ptr(rsi + 4)););
            }
            a.set_label(&mut retry).unwrap();
            asm!(a; lea(rbx, ptr(rax + 1)); lea(rcx, ptr(rdx + 1)););
            lock(a);
            if wide {
                a.cmpxchg16b(xmmword_ptr(rsi)).unwrap();
            } else {
                a.cmpxchg8b(qword_ptr(rsi)).unwrap();
            }
            a.jne(retry).unwrap();
        });
        let (low, high) = if wide {
            (smp.get(SHARED + 0x400), smp.get(SHARED + 0x408))
        } else {
            let both = smp.get(SHARED + 0x400);
            (both & 0xFFFF_FFFF, both >> 32)
        };
        assert_eq!((low, high), (2 * u64::from(ROUNDS), 2 * u64::from(ROUNDS)), "wide {wide}");
    }
}

#[test]
fn stores_are_seen_in_order() {
    // Message passing: data before flag, always (TSO). vCPU 0 writes, vCPU 1 checks.
    let mut smp = Smp::long(2, |a| {
        let (mut reader, mut end) = (a.create_label(), a.create_label());
        let (mut w, mut wait, mut r) = (a.create_label(), a.create_label(), a.create_label());
        asm!(a; mov(ebx, SHARED as u32); mov(r15d, 1); test(edi, edi); jnz(reader););
        a.set_label(&mut w).unwrap();
        asm!(a; mov(dword_ptr(rbx + 0x800), r15d); mov(dword_ptr(rbx), r15d););
        a.set_label(&mut wait).unwrap();
        asm!(a; pause(); cmp(dword_ptr(rbx + 0x40), r15d); jne(wait); inc(r15d); cmp(r15d, 3000); jb(w); jmp(end););
        a.set_label(&mut reader).unwrap();
        a.nop().unwrap();
        a.set_label(&mut r).unwrap();
        asm!(a; pause(); cmp(dword_ptr(rbx), r15d); jne(r); mov(eax, dword_ptr(rbx + 0x800)); sub(eax, r15d);
            or(dword_ptr(rbx + 0x80), eax); mov(dword_ptr(rbx + 0x40), r15d); inc(r15d); cmp(r15d, 3000); jb(r););
        a.set_label(&mut end).unwrap();
        a.nop().unwrap();
    });
    smp.run();
    assert_eq!(smp.get(SHARED + 0x80) as u32, 0);
}

/// Aligned loads and stores of 16 bytes are one access (SDM vol. 3, 9.1.1: what processors with AVX guarantee).
#[test]
fn aligned_vectors_are_never_torn() {
    type Form = (&'static str, fn(&mut CodeAssembler), fn(&mut CodeAssembler));
    let forms: [Form; 3] = [
        (
            "movaps",
            |a| asm!(a; movaps(xmmword_ptr(rbx), xmm0);),
            |a| asm!(a; movaps(xmm1, xmmword_ptr(rbx));),
        ),
        (
            "movdqa",
            |a| asm!(a; movdqa(xmmword_ptr(rbx), xmm0);),
            |a| asm!(a; movdqa(xmm1, xmmword_ptr(rbx));),
        ),
        (
            "vmovdqa",
            |a| asm!(a; vmovdqa(xmmword_ptr(rbx), xmm0);),
            |a| asm!(a; vmovdqa(xmm1, xmmword_ptr(rbx));),
        ),
    ];
    for (name, store, load) in forms {
        // Each stores its number into both halves, and every load finds two equal ones.
        let smp = hammer(2, SHARED + 0x500, |a| {
            let mut again = a.create_label();
            asm!(a; movq(xmm0, rdi); movlhps(xmm0, xmm0); mov(ecx, 20););
            a.set_label(&mut again).unwrap();
            store(a);
            load(a);
            asm!(a; movq(rax, xmm1); pextrq(rdx, xmm1, 1); xor(rax, rdx); or(qword_ptr(rbx + 0x40), rax);
                dec(ecx); jnz(again););
        });
        assert_eq!(smp.get(SHARED + 0x540), 0, "{name}");
    }
}
