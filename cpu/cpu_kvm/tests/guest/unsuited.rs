//! A KVM that executes guests in software says so, and leaves the state as it is. A real one runs the same guests to their
//! ends.

use crate::harness::*;
use cpu_kvm::KvmHypervisor;
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
