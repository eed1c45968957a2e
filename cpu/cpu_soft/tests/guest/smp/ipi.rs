//! Inter-processor interrupts of every kind, and wakes that must not get lost (SDM vol. 3, 11.6 and 11.12).

use crate::asm;
use crate::harness::apic::*;
use crate::harness::smp::*;
use crate::harness::*;
use hypervisor::Msi;
use iced_x86::code_asm::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc;

const VECTOR: u8 = 0x60;
/// One counter of 64 bytes for each vCPU: interrupts taken.
const COUNTS: u64 = SHARED + 0x1000;
/// Handlers of `VECTOR` and of NMIs.
const HANDLER: u64 = 0x1_8000;

/// Interrupts with `VECTOR` and NMIs count in the line of the vCPU that takes them (R13 points to it).
fn count_interrupts(smp: &Smp) {
    smp.handler(VECTOR, HANDLER, |a| {
        asm!(a; inc(dword_ptr(r13)););
        eoi(a);
        a.iretq().unwrap();
    });
    smp.handler(2, HANDLER + 0x100, |a| asm!(a; inc(dword_ptr(r13 + 8)); iretq();));
}
fn prologue(a: &mut CodeAssembler) {
    asm!(a; mov(r13d, edi); shl(r13d, 6); add(r13, COUNTS as i32););
}
fn counts(smp: &Smp, offset: u64) -> Vec<u32> {
    (0..smp.vcpus.len() as u64).map(|n| smp.get(COUNTS + n * 64 + offset) as u32).collect()
}

/// vCPU 0 of four writes `icr`; who gets how many interrupts of the kind counted at `offset`.
fn sent(icr: u64, offset: u64, expected: [u32; 4]) {
    let total: u32 = expected.iter().sum();
    let mut smp = Smp::long(4, |a| {
        let (mut wait, mut others) = (a.create_label(), a.create_label());
        prologue(a);
        asm!(a; sti(););
        barrier(a, SHARED + 0x400, 4);
        asm!(a; test(edi, edi); jnz(others););
        wrmsr(a, X2_ICR, icr);
        a.set_label(&mut others).unwrap();
        // Until as many arrived as were sent; one too many is found afterwards.
        a.nop().unwrap();
        a.set_label(&mut wait).unwrap();
        asm!(a; pause(); mov(eax, dword_ptr(COUNTS + offset)););
        for n in 1..4u64 {
            asm!(a; add(eax, dword_ptr(COUNTS + n * 64 + offset)););
        }
        asm!(a; cmp(eax, total as i32); jb(wait););
        barrier(a, SHARED + 0x440, 4);
    });
    count_interrupts(&smp);
    smp.run();
    assert_eq!(counts(&smp, offset), expected, "ICR {icr:#x}");
}

#[test]
fn destinations_in_x2apic_mode() {
    let v = u64::from(VECTOR);
    // Physical.
    sent(2 << 32 | v, 0, [0, 0, 1, 0]);
    sent(v, 0, [1, 0, 0, 0]);
    sent(0xFFFF_FFFF << 32 | v, 0, [1, 1, 1, 1]);
    // Shorthands: self, all, all but self.
    sent(1 << 18 | v, 0, [1, 0, 0, 0]);
    sent(2 << 18 | v, 0, [1, 1, 1, 1]);
    sent(3 << 18 | v, 0, [0, 1, 1, 1]);
    // Logical: cluster 0, bits 1 and 3.
    sent(0b1010 << 32 | 1 << 11 | v, 0, [0, 1, 0, 1]);
    sent(0xFFFF_FFFF << 32 | 1 << 11 | v, 0, [1, 1, 1, 1]);
    // NMI by the same ways.
    sent(3 << 32 | 4 << 8, 8, [0, 0, 0, 1]);
    sent(3 << 18 | 4 << 8, 8, [0, 1, 1, 1]);
}

#[test]
fn lowest_priority_reaches_exactly_one() {
    let mut smp = Smp::long(4, |a| {
        prologue(a);
        asm!(a; sti(););
        barrier(a, SHARED + 0x400, 4);
        let mut others = a.create_label();
        asm!(a; test(edi, edi); jnz(others););
        for _ in 0..20 {
            // Logical, bits 1 to 3, lowest priority; each waits for its arrival.
            let mut here = a.create_label();
            asm!(a; mov(esi, dword_ptr(COUNTS + 0x40)); add(esi, dword_ptr(COUNTS + 0x80)); add(esi, dword_ptr(COUNTS + 0xC0)););
            wrmsr(a, X2_ICR, 0b1110 << 32 | 1 << 11 | 1 << 8 | u64::from(VECTOR));
            a.set_label(&mut here).unwrap();
            asm!(a; pause(); mov(eax, dword_ptr(COUNTS + 0x40)); add(eax, dword_ptr(COUNTS + 0x80)); add(eax, dword_ptr(COUNTS + 0xC0));
                cmp(eax, esi); je(here););
        }
        a.set_label(&mut others).unwrap();
        barrier(a, SHARED + 0x440, 4);
    });
    count_interrupts(&smp);
    smp.run();
    let counts = counts(&smp, 0);
    assert_eq!((counts[0], counts.iter().sum::<u32>()), (0, 20), "{counts:?}");
}

#[test]
fn xapic_mode_by_memory() {
    // The registers at 0xFEE00000 are seen by each vCPU as its own. Flat logical ids: 1 << n.
    const APIC: u64 = 0xFEE0_0000;
    let v = u64::from(VECTOR) as i32;
    for (high, low, expected) in [
        (2 << 24, v, [0, 0, 1, 0]),
        (0b0101 << 24, 1 << 11 | v, [1, 0, 1, 0]),
        (0xFF << 24, v, [1, 1, 1, 1]),
        (0, 3 << 18 | v, [0, 1, 1, 1]),
    ] {
        let total: u32 = expected.iter().sum();
        let mut smp = Smp::long(4, |a| {
            let (mut wait, mut others, mut wrong, mut end) =
                (a.create_label(), a.create_label(), a.create_label(), a.create_label());
            prologue(a);
            // Back to xAPIC mode through the disabled state.
            asm!(a; mov(ecx, 0x1B); rdmsr(); and(eax, !0xC00); wrmsr(); or(eax, 0x800); wrmsr();
                mov(rbx, 0xFFFF_8000_FEE0_0000u64); mov(dword_ptr(rbx + 0xF0), 0x1FF);
                mov(ecx, edi); mov(eax, 1 << 24); shl(eax, cl); mov(dword_ptr(rbx + 0xD0), eax);
                mov(dword_ptr(rbx + 0xE0), -1); mov(eax, dword_ptr(rbx + 0x20)); shr(eax, 24); cmp(eax, edi); jne(wrong); sti(););
            barrier(a, SHARED + 0x400, 4);
            asm!(a; test(edi, edi); jnz(others); mov(dword_ptr(rbx + 0x310), high); mov(dword_ptr(rbx + 0x300), low););
            a.set_label(&mut others).unwrap();
            a.nop().unwrap();
            a.set_label(&mut wait).unwrap();
            asm!(a; pause(); mov(eax, dword_ptr(COUNTS)););
            for n in 1..4u64 {
                asm!(a; add(eax, dword_ptr(COUNTS + n * 64)););
            }
            asm!(a; cmp(eax, total as i32); jb(wait););
            barrier(a, SHARED + 0x440, 4);
            a.jmp(end).unwrap();
            a.set_label(&mut wrong).unwrap();
            a.ud2().unwrap();
            a.set_label(&mut end).unwrap();
            a.nop().unwrap();
        });
        smp.tables.map(0xFFFF_8000_FEE0_0000, APIC | 3, 1);
        smp.handler(
            VECTOR,
            HANDLER,
            |a| asm!(a; inc(dword_ptr(r13)); mov(dword_ptr(rbx + 0xB0), 0); iretq();),
        );
        smp.run();
        assert_eq!(counts(&smp, 0), expected, "{high:#x} {low:#x}");
    }
}

/// Waits in HLT until R15D interrupts were taken. Interrupts are let in only in front of the HLT.
fn sleep_until_count(a: &mut CodeAssembler) {
    let (mut sleep, mut got) = (a.create_label(), a.create_label());
    a.set_label(&mut sleep).unwrap();
    asm!(a; cli(); cmp(dword_ptr(r13), r15d); jae(got); sti(); hlt(); jmp(sleep););
    a.set_label(&mut got).unwrap();
    a.nop().unwrap();
}

/// A token goes round by IPIs: who has it sends it on and halts until it comes back. Kicks all the while.
fn ring(vcpus: u32, rounds: u32) {
    let send_on = |a: &mut CodeAssembler| {
        asm!(a; mov(edx, r14d); mov(eax, u32::from(VECTOR)); mov(ecx, X2_ICR); wrmsr(););
    };
    let mut smp = Smp::long(vcpus, |a| {
        let (mut again, mut first, mut next) = (a.create_label(), a.create_label(), a.create_label());
        prologue(a);
        // R14: who is next. R15: rounds.
        asm!(a; xor(r15d, r15d); xor(eax, eax); lea(r14d, ptr(rdi + 1)); cmp(r14d, vcpus as i32); cmove(r14d, eax););
        barrier(a, SHARED + 0x400, vcpus);
        a.set_label(&mut again).unwrap();
        asm!(a; inc(r15d); test(edi, edi); jz(first););
        sleep_until_count(a);
        send_on(a);
        a.jmp(next).unwrap();
        a.set_label(&mut first).unwrap();
        send_on(a);
        sleep_until_count(a);
        a.set_label(&mut next).unwrap();
        asm!(a; cmp(r15d, rounds as i32); jb(again););
    });
    count_interrupts(&smp);
    let (kickers, over) = (smp.kickers(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0.. {
                if over.load(SeqCst) {
                    break;
                }
                kickers[n % kickers.len()].kick();
                std::thread::sleep(std::time::Duration::from_micros(if n % 8 == 0 { 200 } else { 0 }));
            }
        });
        smp.run();
        over.store(true, SeqCst);
    });
    assert_eq!(counts(&smp, 0), vec![rounds; vcpus as usize]);
}

#[test]
fn thousands_of_halts_and_wakes() {
    ring(2, 5000);
    ring(4, 1500);
}

#[test]
fn messages_of_device_threads() {
    // Each message is acknowledged through a port before the next comes; in between the vCPU halts.
    const MESSAGES: u32 = 3000;
    let mut smp = Smp::long(2, |a| {
        let mut again = a.create_label();
        prologue(a);
        asm!(a; xor(r15d, r15d); xor(eax, eax););
        a.set_label(&mut again).unwrap();
        asm!(a; inc(r15d); lea(edx, ptr(rdi + 0x40)); out(dx, al););
        sleep_until_count(a);
        asm!(a; cmp(r15d, MESSAGES as i32); jb(again););
    });
    count_interrupts(&smp);
    let (to, from): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::sync_channel::<()>(8)).unzip();
    smp.io.on_out(move |port, _| {
        if let Some(to) = to.get(usize::from(port.wrapping_sub(0x40))) {
            to.send(()).unwrap();
        }
    });
    let route = smp.partition.msi_sink().route().unwrap();
    route.set(Msi { address: 0xFEE0_0000, data: u32::from(VECTOR) });
    let sink = smp.sink();
    smp.run_beside(|| {
        std::thread::scope(|scope| {
            let mut from = from.into_iter();
            let (first, second) = (from.next().unwrap(), from.next().unwrap());
            // One by an MSI route, the other as the I/O APIC sends.
            scope.spawn(move || first.iter().take(MESSAGES as usize).for_each(|()| route.fire()));
            scope.spawn(move || {
                second.iter().take(MESSAGES as usize).for_each(|()| send(&sink, 1, u32::from(VECTOR)));
            });
        });
    });
    assert_eq!(counts(&smp, 0), [MESSAGES; 2]);
}

#[test]
fn a_masked_route_is_silent() {
    let mut g = Guest::long().with_x2apic();
    let route = g.partition.msi_sink().route().unwrap();
    let msi = Msi { address: 0xFEE0_0000, data: 0x77 };
    route.fire();
    route.set(msi);
    route.mask(true);
    route.fire();
    g.code(|a| asm!(a; sti(); nop(); nop(); cli(); hlt();));
    g.run_to_halt();
    route.mask(false);
    route.fire();
    g.edit(|s| (s.rip, s.run_state) = (CODE, hypervisor::state::RunState::Running));
    assert_eq!(g.run_to_stub().vector, 0x77);
}
