//! A KVM that executes guests in software says so, and leaves the state as it is. A real one runs the same guests to their
//! ends.

use crate::harness::*;
use cpu_kvm::KvmHypervisor;
use cpu_soft::SoftHypervisor;
use hypervisor::VcpuExit;
use iced_x86::code_asm::*;

/// Instructions before which nothing is said.
const AT_LEAST: u64 = 1_000_000;

/// Of the loop: three instructions each.
const TURNS: u64 = 6_000_000;

/// Runs it; `true` if another engine is asked for, which a KVM does whose probe found problems.
fn unsuited(g: &mut Guest) -> bool {
    let problems = KvmHypervisor::open().unwrap().probe().problems.clone();
    match g.run() {
        VcpuExit::Kicked => {
            assert!(problems.is_empty(), "{problems:?}");
            false
        }
        VcpuExit::Unsuited { reason, stuck: false, .. } => {
            assert!(!problems.is_empty() && reason.contains("in software"), "{reason}");
            let statistics = g.partition.statistics();
            let count =
                |name| statistics.counts.iter().find(|(n, _)| n == name).map_or(0, |(_, count)| *count);
            assert!(count("emulated") >= AT_LEAST, "{statistics:?}");
            true
        }
        exit => panic!("{exit:?}"),
    }
}

/// It asks once, after a million instructions, and the guest goes on where it is not heard.
#[test]
fn a_kernel_that_is_emulated() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.mov(ecx, TURNS as u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.add(rax, rcx).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.mov(qword_ptr(DATA), rax).unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
    let whole = TURNS * (TURNS + 1) / 2;
    if !unsuited(&mut g) {
        assert_eq!(g.load(DATA), whole);
        return;
    }
    let state = g.vcpus[0].save().unwrap();
    let left = state.gpr[1];
    assert!((1..TURNS).contains(&left), "{left} turns are left");
    // Not all of them: one.
    g.set(0, |s| s.gpr[1] = 1);
    g.run_to_done();
    let last = g.load(DATA) - state.gpr[0];
    assert!(g.load(DATA) < whole && last <= 1, "{last}");
}

/// An instruction that such a KVM never ends (VMCALL at ring 0): the state that is left is the one before it.
#[test]
fn an_instruction_without_an_end() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.assemble(64, CODE, |a| {
        a.mov(eax, 77).unwrap();
        a.vmcall().unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
    if unsuited(&mut g) {
        let state = g.vcpus[0].save().unwrap();
        assert_eq!((state.rip, state.gpr[0]), (CODE + 5, 77));
    }
}

/// Reads of a device by the x87 unit.
const READS: u64 = 300_000;

/// Completed instructions that are too many to stay, on any KVM: no processor and no emulator of KVM's can read a device
/// with the x87 unit. The guest goes on on the interpreter where it was.
#[test]
fn instructions_that_are_completed_too_often() {
    let Some(mut g) = Guest::new(1) else { return };
    g.long();
    g.board.answers.lock().unwrap().extend((0..READS).map(|_| 3));
    g.assemble(64, CODE, |a| {
        let mut again = a.create_label();
        a.fninit().unwrap();
        a.fldz().unwrap();
        a.mov(ebx, MMIO as u32).unwrap();
        a.mov(ecx, READS as u32).unwrap();
        a.set_label(&mut again).unwrap();
        a.fiadd(dword_ptr(rbx)).unwrap();
        a.dec(ecx).unwrap();
        a.jnz(again).unwrap();
        a.fistp(qword_ptr(DATA)).unwrap();
        a.out(i32::from(DONE), al).unwrap();
    });
    let VcpuExit::Unsuited { reason, sound, stuck: false } = g.run() else {
        panic!("{:?}", g.partition.statistics())
    };
    assert!(reason.contains("in software"), "{reason}");
    let probe = KvmHypervisor::open().unwrap();
    assert_eq!(sound, probe.probe().cpuid_is_the_models);

    let state = g.vcpus[0].save().unwrap();
    let answers = std::mem::take(&mut *g.board.answers.lock().unwrap());
    assert!(!answers.is_empty() && answers.len() < READS as usize, "{}", answers.len());
    let mut ram = vec![0; RAM_BYTES as usize];
    g.ram.load_bytes(0, &mut ram);
    let mut soft = Guest::on(&SoftHypervisor::interpreter(), g.clock.clone(), 1);
    soft.store(0, &ram);
    *soft.board.answers.lock().unwrap() = answers;
    soft.vcpus[0].restore(&state).unwrap();
    soft.run_to_done();
    assert_eq!(soft.load(DATA), 3 * READS);
}
