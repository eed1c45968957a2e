//! Each mode of the processor, with port and memory-mapped accesses.

use crate::harness::*;
use hypervisor::VcpuExit;
use iced_x86::code_asm::*;

#[test]
fn real_mode_with_string_io() {
    let Some(mut g) = Guest::new(1) else { return };
    g.assemble(16, CODE, |a| {
        a.mov(ax, 0x1234).unwrap();
        a.out(0x10, ax).unwrap();
        a.in_(al, 0x11).unwrap();
        a.out(0x12, al).unwrap();
        a.mov(si, 0x100).unwrap();
        a.mov(cx, 3).unwrap();
        a.mov(dx, 0x13).unwrap();
        a.db(&[0xF3, 0x6E]).unwrap(); // rep outsb
        a.out(i32::from(DONE), al).unwrap();
    });
    g.store(DATA + 0x100, b"abc");
    g.board.answers.lock().unwrap().push_back(0x77);
    g.set(0, |s| {
        s.segments[1] = segment((CODE >> 4) as u16, 0x9B, 0xFFFF);
        s.segments[1].base = CODE;
        s.segments[3] = segment((DATA >> 4) as u16, 0x93, 0xFFFF);
        s.segments[3].base = DATA;
        s.rip = 0;
    });
    // Assembled for CODE, but position-independent.
    g.run_to_done();
    let outs = [(0x10, 0x1234), (0x12, 0x77), (0x13, 0x61), (0x13, 0x62), (0x13, 0x63)];
    assert_eq!(g.board.outs(), outs);
}

#[test]
fn protected_mode_without_paging() {
    let Some(mut g) = Guest::new(1) else { return };
    g.assemble(32, CODE, |a| {
        a.mov(ebx, MMIO as u32).unwrap();
        a.mov(eax, dword_ptr(ebx)).unwrap();
        a.mov(dword_ptr(ebx + 4), eax).unwrap();
        a.mov(byte_ptr(ebx + 8), 5).unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
    g.board.answers.lock().unwrap().push_back(0xAABB_CCDD);
    g.set(0, |s| {
        s.cr0 |= 1;
        let data = segment(0x18, 0xC93, u32::MAX);
        s.segments = [data, segment(8, 0xC9B, u32::MAX), data, data, data, data];
        s.rip = CODE;
    });
    g.run_to_done();
    let expected = [Event::Read(MMIO), Event::Write(MMIO + 4, 0xAABB_CCDD), Event::Write(MMIO + 8, 5)];
    assert_eq!(*g.board.events.lock().unwrap(), expected);
}

#[test]
fn long_mode_loops_and_halts_until_kicked() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, 1000).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.out(i32::from(DONE), al).unwrap();
        a.hlt().unwrap();
    });
    g.run_to_done();
    assert_eq!(g.load(DATA), 500_500);
    // In HLT with interrupts off: only a kick ends it.
    let kicker = g.vcpus[0].kicker();
    let kick = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        kicker.kick();
    });
    assert_eq!(g.run(), VcpuExit::Kicked);
    kick.join().unwrap();
    assert_eq!(g.vcpus[0].save().unwrap().run_state, hypervisor::state::RunState::Halted);
}

#[test]
fn a_kick_before_run_is_not_lost_and_counts_once() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| a.out(i32::from(DONE), al).unwrap());
    g.vcpus[0].kicker().kick();
    assert_eq!(g.run(), VcpuExit::Kicked);
    assert_eq!(g.vcpus[0].save().unwrap().rip, CODE);
    g.run_to_done();
}

#[test]
fn faults_and_triple_faults() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| {
        a.xor(ecx, ecx).unwrap();
        a.div(ecx).unwrap();
    });
    g.run_to_done();
    assert_eq!(g.board.outs(), [(0xF0, 0)]);
    g.set(0, |s| {
        long_registers(s);
        s.idtr.limit = 0;
    });
    g.assemble(64, CODE, |a| a.ud2().unwrap());
    let exit = g.run();
    if cpu_kvm::KvmHypervisor::open().unwrap().probe().problems.is_empty() {
        assert_eq!((exit, g.run()), (VcpuExit::TripleFault, VcpuExit::TripleFault));
    } else {
        // Such a KVM may have caused it: the guest is to start again elsewhere.
        let VcpuExit::Unsuited { reason, sound: false, stuck: true } = exit else { panic!("{exit:?}") };
        assert!(reason.contains("shutdown"), "{reason}");
        g.vcpus[0].kicker().kick();
        assert_eq!(g.run(), VcpuExit::Kicked);
    }
    g.vcpus[0].reset();
    let state = g.vcpus[0].save().unwrap();
    assert_eq!((state.rip, state.cr0, state.segments[1].base), (0xFFF0, 0x6000_0010, 0xFFFF_0000));
}

/// What the guest sees is the model's, whatever this host has; where KVM cannot do that, the probe says so.
#[test]
fn cpuid_is_the_models() {
    let Some(mut g) = Guest::new(1) else { return };
    let probe = cpu_kvm::KvmHypervisor::open().unwrap().probe().clone();
    let leaves: [(u32, u32); 9] =
        [(0, 0), (1, 0), (4, 0), (7, 0), (7, 1), (0xB, 1), (0x16, 0), (0x4000_0001, 0), (0x8000_0001, 0)];
    g.long();
    g.assemble(64, CODE, |a| {
        a.mov(edi, DATA as u32).unwrap();
        for (leaf, subleaf) in leaves {
            a.mov(eax, leaf).unwrap();
            a.mov(ecx, subleaf).unwrap();
            a.cpuid().unwrap();
            for (n, register) in [eax, ebx, ecx, edx].into_iter().enumerate() {
                a.mov(dword_ptr(rdi + 4 * n), register).unwrap();
            }
            a.add(rdi, 16).unwrap();
        }
        a.out(i32::from(DONE), al).unwrap();
    });
    g.run_to_done();
    let context = hypervisor::CpuidContext::alone(g.tsc_khz);
    for (n, (leaf, subleaf)) in (0u64..).zip(leaves) {
        let at = DATA + 16 * n;
        let seen: [u32; 4] = std::array::from_fn(|i| g.ram.load::<u32>(at + 4 * i as u64));
        let expected = model().unwrap().cpuid(leaf, subleaf, &context);
        if probe.cpuid_is_the_models {
            assert_eq!(seen, expected, "leaf {leaf:x}.{subleaf}: {seen:x?}, the model has {expected:x?}");
        } else if (leaf, subleaf) == (1, 0) {
            assert_ne!(seen, expected, "the probe found another processor: {probe:?}");
        }
    }
    assert_eq!(probe.cpuid_is_the_models, probe.problems.iter().all(|problem| !problem.contains("CPUID")));
}
