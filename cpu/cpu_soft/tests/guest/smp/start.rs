//! INIT and start-up messages (SDM vol. 3, 10.4 and 11.6).

use crate::asm;
use crate::harness::apic::*;
use crate::harness::guest::CODE_16;
use crate::harness::smp::*;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::paging::*;

/// Page of the start-up vector.
const SIPI: u64 = CODE_16 >> 12;
const INIT: u64 = 5 << 8 | 1 << 14;
const START: u64 = 6 << 8 | SIPI;
const ALL_BUT_SELF: u64 = 3 << 18;
const LONG_ENTRY: u64 = 0x9000;

/// From real mode at `CODE_16` to 64-bit code at `LONG_ENTRY`, as a kernel's trampoline does.
fn trampoline(smp: &Smp) {
    let at = CODE_16;
    let mut pseudo = GDT_LIMIT.to_le_bytes().to_vec();
    pseudo.extend((GDT as u32).to_le_bytes());
    smp.put(at + 0x80, &pseudo);
    let root = smp.tables.root as u32;
    smp.put(
        at,
        &assemble(16, 0, |a| {
            asm!(a; cli(); mov(ax, cs); mov(ds, ax); lgdt(ptr(0x80)););
            asm!(a; mov(eax, CR4_PAE as u32); mov(cr4, eax); mov(eax, root); mov(cr3, eax);
            mov(ecx, x86_defs::msr::EFER); rdmsr(); or(eax, (EFER_LME | EFER_NXE) as i32); wrmsr();
            mov(eax, (CR0_PE | CR0_PG | CR0_ET) as u32); mov(cr0, eax););
            // jmp far KCODE64:LONG_ENTRY with a 32-bit offset
            a.db(&[0x66, 0xEA]).unwrap();
            a.dd(&[LONG_ENTRY as u32]).unwrap();
            a.dw(&[KCODE64]).unwrap();
        }),
    );
}

fn booted(vcpus: u32, boot: impl FnOnce(&mut CodeAssembler), ap: impl FnOnce(&mut CodeAssembler)) -> Smp {
    let mut smp = Smp::at_reset(vcpus);
    smp.tables.identity(RAM_BYTES, PTE_P | PTE_W);
    smp.idt();
    trampoline(&smp);
    smp.set(0, |_| {});
    smp.code(CODE, |a| {
        enable_x2apic(a);
        boot(a);
    });
    smp.code(LONG_ENTRY, ap);
    smp
}

/// Counts, and halts for ever.
fn count_and_halt(a: &mut CodeAssembler) {
    let mut idle = a.create_label();
    lock(a);
    asm!(a; inc(dword_ptr(SHARED)););
    a.set_label(&mut idle).unwrap();
    asm!(a; hlt(); jmp(idle););
}

fn wait_for(a: &mut CodeAssembler, count: u32) {
    let mut wait = a.create_label();
    a.set_label(&mut wait).unwrap();
    asm!(a; pause(); cmp(dword_ptr(SHARED), count as i32); jne(wait););
}
fn done(a: &mut CodeAssembler) {
    asm!(a; mov(edx, i32::from(PORT_DONE)); out(dx, al); hlt(););
}

#[test]
fn all_start_from_real_mode_to_long_mode() {
    let mut smp = booted(
        4,
        |a| {
            wrmsr(a, X2_ICR, ALL_BUT_SELF | INIT);
            wrmsr(a, X2_ICR, ALL_BUT_SELF | START);
            // The second one finds nobody waiting.
            wrmsr(a, X2_ICR, ALL_BUT_SELF | START);
            wait_for(a, 3);
            done(a);
        },
        count_and_halt,
    );
    smp.run();
    for n in 1..4 {
        let s = smp.vcpus[n].save().unwrap();
        assert_eq!(
            (s.run_state, s.segments[1].selector, s.efer & EFER_LMA),
            (RunState::Halted, KCODE64, EFER_LMA)
        );
    }
    assert_eq!(smp.get(SHARED), 3);
}

#[test]
fn init_stops_and_a_sipi_starts_anew() {
    // vCPU 1 spins, halts, or hammers memory; each time it is stopped by INIT and started again.
    let ways: [fn(&mut CodeAssembler); 3] = [
        count_and_halt,
        |a| {
            let mut spin = a.create_label();
            lock(a);
            asm!(a; inc(dword_ptr(SHARED)););
            a.set_label(&mut spin).unwrap();
            a.jmp(spin).unwrap();
        },
        |a| {
            let mut spin = a.create_label();
            lock(a);
            asm!(a; inc(dword_ptr(SHARED)););
            a.set_label(&mut spin).unwrap();
            asm!(a; mov(edi, (SHARED + 0x800) as u32); mov(ecx, 0x400); db(&[0xF3, 0xAA]); jmp(spin););
        },
    ];
    for way in ways {
        let mut smp = booted(
            2,
            |a| {
                for n in 1..=40 {
                    wrmsr(a, X2_ICR, 1 << 32 | INIT);
                    wrmsr(a, X2_ICR, 1 << 32 | START);
                    wait_for(a, n);
                }
                done(a);
            },
            way,
        );
        smp.run();
        assert_eq!(smp.get(SHARED), 40);
    }
}

#[test]
fn what_init_resets_and_what_it_keeps() {
    let mut smp = booted(
        2,
        |a| {
            wrmsr(a, X2_ICR, 1 << 32 | INIT);
            wrmsr(a, X2_ICR, 1 << 32 | START);
            wait_for(a, 1);
            wrmsr(a, X2_ICR, 1 << 32 | INIT);
            done(a);
        },
        |a| {
            // State of every kind.
            asm!(a; mov(rax, cr4); or(eax, (CR4_OSFXSR | CR4_OSXSAVE) as i32); mov(cr4, rax););
            asm!(a; xor(ecx, ecx); mov(eax, 7); xor(edx, edx); xsetbv(););
            wrmsr(a, x86_defs::msr::LSTAR, 0x1234);
            wrmsr(a, x86_defs::msr::TSC_AUX, 0x77);
            asm!(a; mov(eax, 0x55); mov(dr0, rax); vpcmpeqb(ymm3, ymm3, ymm3); mov(rbp, -1i64 as u64););
            count_and_halt(a);
        },
    );
    smp.run();
    // The INIT is perhaps still posted: one look takes it.
    let io: std::sync::Arc<dyn hypervisor::VcpuIo> = smp.io.clone();
    while smp.vcpus[1].run(&io) == hypervisor::VcpuExit::Kicked {}
    let s = smp.vcpus[1].save().unwrap();
    assert_eq!(s.run_state, RunState::WaitForSipi);
    assert_eq!((s.cr0 & !(CR0_CD | CR0_NW), s.cr4, s.efer, s.gpr[5], s.dr[0]), (CR0_ET, 0, 0, 0, 0));
    assert_eq!(
        (s.rip, s.segments[1].selector, s.segments[1].base, s.rflags),
        (0xFFF0, 0xF000, 0xFFFF_0000, 2)
    );
    // MSRs, XCR0 and the vector registers stay.
    let find = |n: u32| s.msrs.iter().find(|(m, _)| *m == n).map(|(_, v)| *v);
    assert_eq!((find(x86_defs::msr::LSTAR), find(x86_defs::msr::TSC_AUX)), (Some(0x1234), Some(0x77)));
    assert_eq!((s.xcr0, s.sse.xmm[3], s.avx[3]), (7, [u64::MAX; 2], [u64::MAX; 2]));
}

#[test]
fn init_of_the_boot_processor_starts_it_at_the_reset_vector() {
    let mut smp = booted(
        1,
        |a| {
            wrmsr(a, X2_ICR, INIT | 2 << 18);
            a.nop().unwrap();
            a.ud2().unwrap();
        },
        count_and_halt,
    );
    smp.put(
        ROM + 0xFFF0,
        &assemble(16, 0xFFF0, |a| asm!(a; mov(dx, u32::from(PORT_DONE)); out(dx, al); hlt();)),
    );
    smp.run();
}
