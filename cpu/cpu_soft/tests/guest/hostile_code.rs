//! Code that is made to confuse whoever decodes it once and keeps what it found.

use crate::asm;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use std::sync::atomic::Ordering::SeqCst;
use x86_defs::Exception;
use x86_defs::paging::*;

const LONGEST: usize = 15;

#[test]
fn jumps_into_the_midst_of_instructions() {
    let mut g = Guest::long();
    let inside = CODE + 0x200;
    // mov rax, imm64, whose immediate is: inc ebx; jmp to its end
    g.put(inside, &[0x48, 0xB8, 0xFF, 0xC3, 0xEB, 0x04, 0x90, 0x90, 0x90, 0x90]);
    g.code_at(64, inside + 10, |a| asm!(a; inc(esi); ret();));
    // lock inc dword [rdi], and the same behind its prefix
    g.put(inside + 0x40, &[0xF0, 0xFF, 0x07, 0xC3]);
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(ebx, ebx); xor(esi, esi); mov(ecx, 300); mov(edi, DATA as u32););
        a.set_label(&mut again).unwrap();
        asm!(a; mov(eax, 0); call(inside); mov(rdx, inside + 2); call(rdx);
            call(inside + 0x40); call(inside + 0x41); dec(ecx); jne(again); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[3], s.gpr[6]), (0x9090_9090_04EB_C3FF, 300, 600));
    assert_eq!(g.get32(DATA), 600);
}

#[test]
fn code_in_device_memory() {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    let linear = 0x70_0000;
    // No RAM is there; a device answers with RET.
    tables.map(linear, 0x1000_0000 | PTE_P | PTE_W, 1);
    g.long_with(&tables);
    g.io.answer.store(0xC3, SeqCst);
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; xor(eax, eax); mov(ecx, 200););
        a.set_label(&mut again).unwrap();
        asm!(a; call(linear + 0x10); inc(eax); dec(ecx); jne(again); hlt(););
    });
    assert_eq!(g.run_to_halt().gpr[0], 200);
}

/// How `n` prefixes in front of a NOP end, at `at`.
fn prefixed(n: usize, at: u64) -> (u8, u64) {
    let mut g = Guest::long();
    let mut bytes = vec![0x66; n];
    bytes.extend([0x90, 0x0F, 0x0B]);
    g.put(at, &bytes);
    g.edit(|s| s.rip = at);
    // Whoever translates does so the second time at the latest.
    let mut end = None;
    for _ in 0..2 {
        let frame = g.run_to_stub();
        assert!(end.is_none_or(|before| before == (frame.vector, frame.rip)));
        end = Some((frame.vector, frame.rip));
        g.edit(|s| {
            *s = guest::long_state(s.cr3);
            s.rip = at;
        });
    }
    end.unwrap()
}

#[test]
fn instructions_longer_than_fifteen_bytes() {
    for at in [CODE, CODE + 0xFF0, CODE + 0xFFF] {
        for n in [0, 1, 13, 14, 15, 16, 40, 5000] {
            let want = if n < LONGEST {
                (Exception::InvalidOpcode.vector(), at + n as u64 + 1)
            } else {
                (Exception::GeneralProtection.vector(), at)
            };
            assert_eq!(prefixed(n, at), want, "{n} prefixes at {at:#x}");
        }
    }
}

/// Memory of this process in MiB, as far as it is in RAM.
fn resident_mib() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() >> 8
}

#[test]
fn more_code_than_any_cache_holds() {
    const FROM: u64 = 0x20_0000;
    const BYTES: u64 = 1 << 20;
    let mut g = Guest::long();
    let mut before = 0;
    for turn in 0..4 {
        // Blocks of 16 bytes, each another one: add eax, n; lea rdx, [the next]; jmp rdx
        let mut code = Vec::new();
        for block in 0..BYTES as u32 / 16 {
            code.extend([
                0x05,
                (block & 1) as u8 + turn,
                0,
                0,
                0,
                0x48,
                0x8D,
                0x15,
                4,
                0,
                0,
                0,
                0xFF,
                0xE2,
                0x90,
                0x90,
            ]);
        }
        g.put(FROM, &code);
        g.put(FROM + BYTES, &[0xF4]);
        g.edit(|s| (s.rip, s.gpr[0], s.run_state) = (FROM, 0, RunState::Running));
        let sum = g.run_to_halt().gpr[0];
        assert_eq!(sum, BYTES / 16 * u64::from(turn) + BYTES / 32);
        if turn == 0 {
            before = resident_mib();
        }
    }
    let grown = resident_mib().saturating_sub(before);
    assert!(grown < 150, "{grown} MiB more");
}
