//! The harness itself: each mode runs a few instructions and reports an exception.

use crate::asm;

use crate::harness::*;
use iced_x86::code_asm::*;

#[test]
fn long_mode_runs_and_faults() {
    let mut g = Guest::long();
    g.code(|a| {
        asm!(a; mov(rax, 0x1234_5678_9ABCu64); mov(rcx, rax); hlt(); ud2(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[1]), (0x1234_5678_9ABC, 0x1234_5678_9ABC));
    g.edit(|s| s.run_state = hypervisor::state::RunState::Running);
    let frame = g.run_to_stub();
    assert_eq!((frame.vector, frame.error, frame.cs), (6, None, KCODE64));
    assert_eq!(frame.stack, Some((STACK, KDATA)));
}
