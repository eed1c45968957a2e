//! Instructions are counted one by one, whatever runs them.

use crate::asm;
use crate::harness::*;
use iced_x86::code_asm::*;

#[test]
fn branches_calls_and_loops_count_what_they_ran() {
    const ROUNDS: u64 = 30_000;
    let mut g = Guest::long();
    g.code(|a| {
        let mut again = a.create_label();
        let mut even = a.create_label();
        let mut inner = a.create_label();
        let mut function = a.create_label();
        asm!(a; mov(ecx, ROUNDS as u32); lea(rdi, ptr(function)););
        a.set_label(&mut again).unwrap();
        asm!(a; test(ecx, 1); jz(even); inc(rax););
        a.set_label(&mut even).unwrap();
        asm!(a; call(function); call(rdi); mov(edx, 3););
        a.set_label(&mut inner).unwrap();
        asm!(a; add(qword_ptr(DATA), rdx); dec(edx); jnz(inner); cpuid(); xor(ecx, ecx););
        asm!(a; dec(r8d); mov(ecx, r8d); jnz(again); hlt(););
        a.set_label(&mut function).unwrap();
        asm!(a; push(rbx); pop(rbx); ret(););
    });
    g.edit(|s| s.gpr[8] = ROUNDS);
    g.run_to_halt();
    let rounds = 2 + ROUNDS * (2 + 2 * 4 + 1 + 3 * 3 + 5) + ROUNDS / 2 + 1;
    assert_eq!(g.partition.statistics().instructions, Some(rounds));
}
