//! Save and restore: a guest that is cut into slices, each run in a fresh partition, ends as one that was left
//! alone; and everything that a vCPU has survives.

use crate::asm;
use crate::harness::apic::*;
use crate::harness::smp::Smp;
use crate::harness::*;
use hypervisor::VcpuState;
use hypervisor::state::{Float80, InterruptShadow, PendingEvent, RunState};
use iced_x86::code_asm::*;
use proptest::prelude::*;
use saved_state::{from_blob, to_blob};
use std::sync::{Arc, Mutex};
use x86_defs::control::*;
use x86_defs::paging::*;
use x86_defs::{Exception, flags, msr};

/// Port on which a slice may end, and port that posts an interrupt.
const SLICE: i32 = 0x20;
const POST: i32 = 0x30;
const ROUNDS: u32 = 60;

/// Works with every unit, takes interrupts, copies pages, and says after each round that it may be cut.
fn busy_guest() -> Guest {
    let mut g = Guest::long().with_x2apic();
    g.handler64(0x50, CODE + 0x1000, |a| {
        asm!(a; inc(qword_ptr(DATA + 0x3000)); add(qword_ptr(DATA + 0x3008), r15););
        eoi(a);
        a.iretq().unwrap();
    });
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; mov(r15d, ROUNDS); mov(rbp, 0x9E37_79B9_7F4A_7C15u64); fninit(); fldpi(););
        a.set_label(&mut again).unwrap();
        asm!(a; imul_2(rbp, r15); ror(rbp, 13); adc(rbp, r15); mov(rax, rbp); mul(rbp); xor(rbx, rdx););
        asm!(a; movq(xmm0, rbp); paddq(xmm1, xmm0); vpaddq(ymm2, ymm2, ymm1); vpermq(ymm2, ymm2, 0x93); cvtsi2sd(xmm3, r15); mulsd(xmm3, xmm3); addsd(xmm4, xmm3););
        asm!(a; mov(qword_ptr(DATA + 0x3100), r15); fild(qword_ptr(DATA + 0x3100)); fsqrt(); fld1(); faddp(st1, st0); fadd_2(st1, st0); fstp(qword_ptr(DATA + 0x3108)););
        asm!(a; mov(eax, r15d); and(eax, 0x1FF); mov(qword_ptr(rax * 8 + DATA), rbp););
        asm!(a; mov(esi, DATA as u32); mov(edi, (DATA + 0x4001) as u32); mov(ecx, 9000); db(&[0xF3, 0xA4]););
        // The interrupt waits until STI; the slice may end in between, and behind STI and MOV SS.
        asm!(a; out(POST, al); out(SLICE, al); sti(); out(SLICE, al); nop(); cli(););
        asm!(a; mov(eax, i32::from(KDATA)); mov(ss, ax); out(SLICE, al); pushfq(); pop(r8); add(r9, r8););
        asm!(a; dec(r15d); jnz(again); out(i32::from(PORT_DONE), al););
    });
    g
}

/// Lets OUT to `POST` send an interrupt, and OUT to `SLICE` kick when the generator says so.
fn wire(g: &Guest, random: Option<Arc<Mutex<Random>>>) {
    let (sink, kicker) = (g.partition.irq_sink(), g.vcpu.kicker());
    g.io.on_out(move |port, _| {
        if i32::from(port) == POST {
            send(&sink, 0, 0x50);
        }
        let cut = || random.as_ref().is_some_and(|r| r.lock().unwrap().one_in(6));
        if i32::from(port) == SLICE && cut() {
            kicker.kick();
        }
    });
}

/// The same guest in a new partition.
fn moved(g: &mut Guest) -> Guest {
    let state: VcpuState = from_blob(&to_blob(&g.state())).unwrap();
    let mut fresh = Guest::at_reset();
    let mut all = vec![0; RAM_BYTES as usize];
    g.ram.load_bytes(0, &mut all);
    fresh.ram.store_bytes(0, &all);
    fresh.clock.pause();
    fresh.clock.set(g.clock.now());
    fresh.clock.resume();
    fresh.vcpu.restore(&state).unwrap();
    let again = fresh.state();
    assert_eq!(again, state, "a restored state is what was saved");
    fresh
}

fn ending(g: &mut Guest) -> (VcpuState, Vec<u8>) {
    let mut memory = vec![0; 0x1_0000];
    g.ram.load_bytes(DATA, &mut memory);
    (g.state(), memory)
}

fn undisturbed() -> (VcpuState, Vec<u8>) {
    let mut g = busy_guest();
    wire(&g, None);
    assert_eq!(g.run(), Stop::Kicked);
    assert_eq!(g.get(DATA + 0x3000), u64::from(ROUNDS), "all interrupts were taken");
    ending(&mut g)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 10, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn slices_end_as_the_whole(seed: u64) {
        let want = undisturbed();
        let random = Arc::new(Mutex::new(Random(seed)));
        let mut g = busy_guest();
        let mut slices = 0;
        loop {
            wire(&g, Some(random.clone()));
            prop_assert_eq!(g.run(), Stop::Kicked);
            if g.io.done() {
                break;
            }
            slices += 1;
            g = moved(&mut g);
        }
        prop_assert!(slices > 5, "{slices} slices");
        let got = ending(&mut g);
        prop_assert_eq!(got.0, want.0);
        prop_assert!(got.1 == want.1, "memory differs");
    }
}

#[test]
fn kicks_of_another_thread_cut_anywhere() {
    let want = undisturbed();
    for round in 0..6u64 {
        let mut g = busy_guest();
        let mut random = Random(round);
        loop {
            wire(&g, None);
            let kicker = g.vcpu.kicker();
            let pause = std::time::Duration::from_micros(random.below(600));
            let stop = std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(pause);
                    kicker.kick();
                });
                g.run()
            });
            assert_eq!(stop, Stop::Kicked);
            if g.io.done() {
                break;
            }
            g = moved(&mut g);
        }
        let got = ending(&mut g);
        // A kick may still wait: it is no state.
        assert_eq!(got.0, want.0, "round {round}");
        assert!(got.1 == want.1, "round {round}: memory differs");
    }
}

/// A state in which everything has a value of its own.
fn full_state(g: &mut Guest) -> VcpuState {
    let mut s = g.state();
    for (n, r) in s.gpr.iter_mut().enumerate() {
        *r = 0x0101_0101_0101_0101 * (n as u64 + 1);
    }
    s.rflags = flags::FIXED_1 | flags::STATUS | flags::DF | flags::ID | flags::AC;
    s.segments[4].base = 0x1234_5678_9000;
    s.segments[5].base = 0xFFFF_8000_1234_5000;
    s.ldtr = segment(0x58, 0x7000, 0xFFF, 0x82);
    s.cr2 = 0xDEAD_B000;
    s.cr4 |= CR4_PGE | CR4_FSGSBASE | CR4_SMEP;
    s.dr = [1, 2, 3, 4, DR6_FIXED_1 | DR6_BS, DR7_FIXED_1];
    s.pdpte = [0x1001, 0x2001, 0x3001, 0];
    s.msrs = [
        (msr::SYSENTER_CS, 8),
        (msr::SYSENTER_ESP, 0x11),
        (msr::SYSENTER_EIP, 0x22),
        (msr::DEBUGCTL, 1),
        (msr::MTRR_PHYSBASE0, 6),
        (msr::MTRR_PHYSMASK7, 0x800),
        (msr::MTRR_FIX64K_00000, 0x0606_0606_0606_0606),
        (msr::MTRR_FIX16K_80000, 0x0606_0606_0606_0605),
        (msr::MTRR_FIX16K_A0000, 0x0606_0606_0606_0604),
        (msr::MTRR_FIX4K_C0000, 0x0606_0606_0606_0601),
        (msr::MTRR_FIX4K_F8000, 0x0606_0606_0606_0600),
        (msr::PAT, msr::PAT_RESET),
        (msr::MTRR_DEF_TYPE, 0xC06),
        (msr::MC0_CTL, 5),
        (msr::MC0_CTL + 15, 0),
        (msr::KVM_WALL_CLOCK_NEW, DATA),
        (msr::STAR, 0x0023_0010_0000_0000),
        (msr::LSTAR, 0xFFFF_8000_0000_0000),
        (msr::CSTAR, 0xFFFF_8000_0000_1000),
        (msr::SFMASK, 0x4_7700),
        (msr::KERNEL_GS_BASE, 0x77),
        (msr::TSC_AUX, 3),
        (msr::SPEC_CTRL, 1),
        (msr::MISC_ENABLE, 1),
        (msr::MCG_STATUS, 4),
    ]
    .into_iter()
    .filter(|(_, v)| *v != 0)
    .collect();
    s.msrs.sort_unstable();
    for n in 0..8 {
        s.x87.registers[n] = Float80 { mantissa: 1 << 63 | n as u64, sign_exponent: 0x4000 + n as u16 };
    }
    (s.x87.control, s.x87.status, s.x87.in_use, s.x87.opcode) = (0x27F, 0x2800, 0xA5, 0x123);
    (s.x87.instruction_pointer, s.x87.data_pointer) = (0x1234_5678_9ABC, 0xCBA9_8765_4321);
    (s.x87.instruction_selector, s.x87.data_selector) = (0x10, 0x18);
    s.sse.mxcsr = 0x9FC0;
    for n in 0..16 {
        s.sse.xmm[n] = [n as u64 * 3 + 1, n as u64 * 5 + 2];
        s.avx[n] = [n as u64 * 7 + 3, !(n as u64)];
    }
    (s.nmi_pending, s.nmi_blocked) = (true, true);
    (s.tsc_offset, s.tsc_adjust) = (0x1_2345, 0x999);
    s
}

#[test]
fn everything_survives() {
    for run_state in [RunState::Running, RunState::Halted, RunState::WaitForSipi, RunState::Shutdown] {
        for shadow in [InterruptShadow::None, InterruptShadow::Sti, InterruptShadow::MovSs] {
            for exception in [
                None,
                Some(PendingEvent {
                    exception: Exception::PageFault,
                    error_code: Some(5),
                    address: 0x1234,
                    is_trap: false,
                }),
                Some(PendingEvent {
                    exception: Exception::InvalidOpcode,
                    error_code: None,
                    address: 0,
                    is_trap: false,
                }),
                Some(PendingEvent {
                    exception: Exception::Debug,
                    error_code: None,
                    address: DR6_BS,
                    is_trap: true,
                }),
            ] {
                let mut g = Guest::long().with_x2apic();
                // Interrupts of every kind in the APIC.
                g.send(0x50);
                g.send(0x51 | LEVEL);
                g.send(NMI);
                let mut s = full_state(&mut g);
                (s.run_state, s.shadow, s.exception) = (run_state, shadow, exception);
                let s: VcpuState = from_blob(&to_blob(&s)).unwrap();
                let mut other = Guest::at_reset();
                other.vcpu.restore(&s).unwrap();
                assert_eq!(other.state(), s);
            }
        }
    }
}

#[test]
fn a_waiting_exception_is_delivered_first() {
    for (event, vector, error) in [
        (
            PendingEvent {
                exception: Exception::PageFault,
                error_code: Some(2),
                address: 0x5000,
                is_trap: false,
            },
            14,
            Some(2),
        ),
        (
            PendingEvent {
                exception: Exception::GeneralProtection,
                error_code: Some(0x18),
                address: 0,
                is_trap: false,
            },
            13,
            Some(0x18),
        ),
        (
            PendingEvent { exception: Exception::Debug, error_code: None, address: DR6_BS, is_trap: true },
            1,
            None,
        ),
    ] {
        let mut g = Guest::long();
        g.code(|a| asm!(a; ud2();));
        g.edit(|s| s.exception = Some(event));
        let frame = g.run_to_stub();
        assert_eq!((frame.vector, frame.error, frame.rip), (vector, error, CODE));
        if vector == 14 {
            assert_eq!(g.state().cr2, 0x5000);
        }
    }
}

#[test]
fn what_waits_is_taken_after_the_restore() {
    let mut g = Guest::long().with_x2apic();
    g.send(0x50);
    g.send(NMI);
    g.code(|a| asm!(a; sti(); nop(); nop(); hlt();));
    let mut g = moved(&mut g);
    assert_eq!(g.run_to_stub().vector, 2, "the NMI first");
    let mut g = moved(&mut g);
    assert!(g.state().nmi_blocked);
    g.send(NMI);
    assert!(matches!(g.run(), Stop::Halted(_)), "blocked still");
    assert!(moved(&mut g).state().nmi_blocked);
}

#[test]
fn privilege_levels_come_back() {
    // CPL is the DPL of SS, in 64-bit code with a null SS, too.
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
    g.long_with(&tables);
    // A 64-bit code segment of DPL 1.
    g.ram.store(GDT + u64::from(FREE_SELECTOR), descriptor(0, u32::MAX, images::CODE64 | 0x20));
    g.code(|a| {
        asm!(a; push(1); push(STACK as i32); pushfq(); push(i32::from(FREE_SELECTOR) | 1); push((CODE + 0x100) as i32); iretq(););
    });
    g.code_at(64, CODE + 0x100, |a| {
        let mut spin = a.create_label();
        asm!(a; mov(ebx, 1););
        a.set_label(&mut spin).unwrap();
        a.jmp(spin).unwrap();
    });
    g.run_until_kicked(|s| s.gpr[3] == 1);
    let mut g = moved(&mut g);
    g.put(CODE + 0x105, &[0xF4]);
    assert_eq!(g.run_to_stub().vector, 13, "HLT needs CPL 0");
    assert_eq!(g.state().gpr[3], 1);
}

#[test]
fn states_of_other_processors_and_cut_blobs_are_refused() {
    let mut g = Guest::long().with_x2apic();
    let state = g.state();
    let mut smp = Smp::at_reset(2);
    assert!(smp.vcpus[1].restore(&state).is_err(), "the local APIC of another processor");
    let blob = to_blob(&state);
    for cut in (0..blob.data.len()).step_by(7) {
        let mut short = blob.clone();
        short.data.truncate(cut);
        if let Ok(state) = from_blob::<VcpuState>(&short) {
            let _ = g.vcpu.restore(&state);
        }
    }
}

#[test]
fn a_stale_summary_of_x87_exceptions_is_corrected() {
    // IE raised and not masked, but ES clear: no instruction leaves it so. The next one must raise #MF in the
    // guest, never a signal in the host.
    let mut g = Guest::long();
    g.edit(|s| (s.x87.control, s.x87.status) = (0x37E, 1));
    g.code(|a| asm!(a; fld1(); fsin(); hlt();));
    assert_eq!(g.run_to_stub().vector, 16);
    // And ES set without a reason.
    let mut g = Guest::long();
    g.edit(|s| (s.x87.control, s.x87.status) = (0x37F, 0x81));
    g.code(|a| asm!(a; fld1(); fsin(); hlt();));
    g.run_to_halt();
}
