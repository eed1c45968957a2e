//! The local APIC's timer and the time-stamp counter, in guest time that moves only when the test says so.

use crate::asm;
use crate::harness::apic::*;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::flags;
use x86_defs::msr;

const VECTOR: u8 = 0x55;
/// Divide by 1: a count is a nanosecond.
const BY_1: u64 = 0xB;

fn with_timer(lvt: u64, program: impl FnOnce(&mut CodeAssembler)) -> Guest {
    let mut g = Guest::long().with_x2apic();
    g.handler64(VECTOR, CODE + 0x1000, |a| {
        asm!(a; inc(ebx););
        eoi(a);
        a.iretq().unwrap();
    });
    g.code(|a| {
        let mut sleep = a.create_label();
        asm!(a; xor(ebx, ebx););
        wrmsr(a, X2_DIVIDE, BY_1);
        wrmsr(a, X2_LVT_TIMER, lvt | u64::from(VECTOR));
        program(a);
        a.set_label(&mut sleep).unwrap();
        asm!(a; sti(); hlt(); jmp(sleep););
    });
    g
}

#[test]
fn one_shot() {
    let mut g = with_timer(0, |a| wrmsr(a, X2_INITIAL, 1000));
    assert_eq!(g.run(), Stop::Halted(Some(1000)));
    g.time.advance(999);
    assert_eq!(g.run(), Stop::Halted(Some(1000)));
    assert_eq!(g.state().gpr[3], 0);
    g.time.advance(1);
    assert_eq!(g.run(), Stop::Halted(None));
    assert_eq!(g.state().gpr[3], 1);
    g.time.advance(100_000);
    assert_eq!(g.run(), Stop::Halted(None));
    assert_eq!(g.state().gpr[3], 1, "once");
}

#[test]
fn periodic_coalesces_what_was_missed() {
    let mut g = with_timer(1 << 17, |a| wrmsr(a, X2_INITIAL, 1000));
    assert_eq!(g.run(), Stop::Halted(Some(1000)));
    for n in 1..=5 {
        g.time.advance(1000);
        assert_eq!(g.run(), Stop::Halted(Some((n + 1) * 1000)));
        assert_eq!(g.state().gpr[3], n);
    }
    g.time.advance(7_300);
    assert_eq!(g.run(), Stop::Halted(Some(13_000)), "in phase");
    assert_eq!(g.state().gpr[3], 6);
}

#[test]
fn tsc_deadline() {
    // The TSC has 1 GHz: a tick is a nanosecond.
    let mut g = with_timer(2 << 17, |a| {
        asm!(a; rdtsc(); add(eax, 5000); mov(ecx, msr::TSC_DEADLINE); wrmsr(); rdmsr(); mov(esi, eax););
    });
    g.time.advance(1_000_000);
    assert_eq!(g.run(), Stop::Halted(Some(1_005_000)));
    assert_eq!(g.state().gpr[6], 1_005_000);
    g.time.advance(5000);
    assert_eq!(g.run(), Stop::Halted(None));
    let s = g.state();
    assert_eq!(s.gpr[3], 1);
    // A deadline that has passed fires at once; zero disarms.
    let mut g = with_timer(2 << 17, |a| wrmsr(a, msr::TSC_DEADLINE, 1));
    g.time.advance(1000);
    assert_eq!(g.run(), Stop::Halted(None));
    assert_eq!(g.state().gpr[3], 1);
    let mut g = with_timer(2 << 17, |a| {
        wrmsr(a, msr::TSC_DEADLINE, 500);
        wrmsr(a, msr::TSC_DEADLINE, 0);
    });
    g.time.advance(100);
    assert_eq!(g.run(), Stop::Halted(None));
}

#[test]
fn a_running_guest_is_interrupted() {
    // No HLT: the timer must be seen by a loop that does nothing else.
    let mut g = with_timer(0, |a| {
        let mut spin = a.create_label();
        wrmsr(a, X2_INITIAL, 1000);
        asm!(a; sti(); mov(al, 1); out(1, al););
        a.set_label(&mut spin).unwrap();
        asm!(a; test(ebx, ebx); jz(spin););
    });
    let time = g.time.clone();
    g.io.on_out(move |_, _| time.advance(2000));
    assert_eq!(g.run(), Stop::Halted(None));
    assert_eq!(g.state().gpr[3], 1);
}

#[test]
fn a_guest_that_only_faults_is_interrupted() {
    // UD2, and an opcode that is none.
    [&[0x0F, 0x0B], &[0x06][..]].into_iter().for_each(only_faults);
}

/// The handler of #UD is `undefined`, entered with interrupts on and always on the same stack.
fn only_faults(undefined: &[u8]) {
    let mut g = with_timer(0, |a| {
        wrmsr(a, X2_INITIAL, 1000);
        asm!(a; sti(); nop(); ud2(););
    });
    g.handler64(VECTOR, CODE + 0x1000, |a| asm!(a; hlt();));
    g.put(CODE + 0x2000, undefined);
    let [low, high] = images::gate64(KCODE64, CODE + 0x2000, 0x8F, 1);
    g.ram.store(IDT + 16 * 6, low);
    g.ram.store(IDT + 16 * 6 + 8, high);
    g.ram.store(TSS + 0x24, KERNEL_STACK);
    let (time, ram) = (g.time.clone(), g.ram.clone());
    let later = std::thread::spawn(move || {
        // The handler has faulted: the frame has its address.
        while ram.load::<u64>(KERNEL_STACK - 40) != CODE + 0x2000 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        time.advance(2000);
    });
    assert_eq!(g.run(), Stop::Halted(None));
    assert_eq!(g.state().rip, CODE + 0x1001);
    later.join().unwrap();
}

#[test]
fn masked_and_counting() {
    let mut g = with_timer(1 << 16, |a| {
        wrmsr(a, X2_INITIAL, 1000);
        asm!(a; out(1, al); mov(ecx, X2_CURRENT); rdmsr(); mov(esi, eax););
    });
    let time = g.time.clone();
    g.io.on_out(move |_, _| time.advance(400));
    assert_eq!(g.run(), Stop::Halted(None), "a masked timer wakes nobody");
    assert_eq!(g.state().gpr[6], 600);
}

#[test]
fn tsc_follows_the_clock_and_its_adjustments() {
    let mut g = Guest::long();
    g.code(|a| {
        let read = |a: &mut CodeAssembler, to: AsmRegister64| {
            asm!(a; rdtsc(); shl(rdx, 32); or(rax, rdx); mov(to, rax););
        };
        read(a, rbx);
        wrmsr(a, msr::TSC, 0x5_0000_0000);
        read(a, rsi);
        asm!(a; mov(ecx, msr::TSC_ADJUST); rdmsr(); shl(rdx, 32); or(rax, rdx); mov(rdi, rax););
        wrmsr(a, msr::TSC_ADJUST, 7);
        read(a, r8);
        asm!(a; mov(eax, 1); out(1, al););
        read(a, r9);
        wrmsr(a, msr::TSC_AUX, 0x33);
        asm!(a; rdtscp(); mov(r10d, ecx); rdpid(r11); hlt(););
    });
    let time = g.time.clone();
    time.advance(100);
    g.io.on_out(move |_, _| time.advance(50));
    let s = g.run_to_halt();
    assert_eq!([s.gpr[3], s.gpr[6], s.gpr[7]], [100, 0x5_0000_0000, 0x5_0000_0000 - 100]);
    assert_eq!([s.gpr[8], s.gpr[9], s.gpr[10], s.gpr[11]], [107, 157, 0x33, 0x33]);
    assert_eq!((s.tsc_offset, s.tsc_adjust), (7, 7));
}

#[test]
fn time_stamps_may_be_forbidden() {
    for cr4_tsd in [false, true] {
        let mut g = Guest::user64();
        g.edit(|s| s.cr4 |= if cr4_tsd { x86_defs::control::CR4_TSD } else { 0 });
        g.code(|a| asm!(a; rdtsc(); int(0x80);));
        assert_eq!(g.run_to_stub().vector, if cr4_tsd { 13 } else { 0x80 });
    }
}

#[test]
fn kvmclock_agrees_with_the_clock() {
    let mut g = Guest::long();
    g.time.advance(123_456_789);
    g.code(|a| {
        wrmsr(a, msr::KVM_WALL_CLOCK_NEW, DATA + 0x100);
        wrmsr(a, msr::KVM_SYSTEM_TIME_NEW, DATA | 1);
        asm!(a; rdtsc(); hlt(););
    });
    let s = g.run_to_halt();
    let tsc = s.gpr[0] | s.gpr[2] << 32;
    let time_at = |g: &Guest, tsc: u64| {
        let (version, stamp, system) = (g.get32(DATA), g.get(DATA + 8), g.get(DATA + 16));
        let (multiplier, shift) = (g.get32(DATA + 24), g.get(DATA + 28) as i8);
        assert_eq!(version % 2, 0);
        let delta = tsc - stamp;
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        system + ((u128::from(delta) * u128::from(multiplier)) >> 32) as u64
    };
    assert!(time_at(&g, tsc).abs_diff(123_456_789) <= 1);
    assert!(time_at(&g, tsc + 1_000_000_000).abs_diff(1_123_456_789) < 1000);
    assert_eq!(g.get(DATA + 28) >> 8 & 0xFF, 1, "stable");
    // The wall clock at guest time 0.
    assert_eq!((g.get32(DATA + 0x104), g.get32(DATA + 0x108)), (1_700_000_000, 0));
    // After a restore the guest is told that it was stopped, and the stamp is new.
    let state = g.state();
    g.time.advance(1000);
    g.vcpu.restore(&state).unwrap();
    assert_eq!(g.get(DATA + 28) >> 8 & 0xFF, 3);
}

#[test]
fn a_timer_goes_on_after_a_restore() {
    for lvt in [0, 1 << 17, 2 << 17] {
        let mut g = with_timer(lvt, |a| {
            if lvt == 2 << 17 {
                wrmsr(a, msr::TSC_DEADLINE, 3000);
            } else {
                wrmsr(a, X2_INITIAL, 3000);
            }
        });
        assert_eq!(g.run(), Stop::Halted(Some(3000)));
        let state = g.state();
        // Another partition whose clock stands elsewhere: the guest clock is restored with the machine.
        let mut other = Guest::long();
        other.ram.store_bytes(0, &{
            let mut all = vec![0; RAM_BYTES as usize];
            g.ram.load_bytes(0, &mut all);
            all
        });
        other.vcpu.restore(&state).unwrap();
        assert_eq!(other.run(), Stop::Halted(Some(3000)), "{lvt:#x}");
        other.time.advance(3000);
        other.run();
        assert_eq!(other.state().gpr[3], 1);
        assert_eq!(other.state().run_state, RunState::Halted);
        assert_ne!(other.state().rflags & flags::IF, 0);
    }
}
