//! Branches whose way changes when the code that they are in is hot already.

use crate::asm;
use crate::harness::*;
use cpu_soft::SoftHypervisor;
use iced_x86::code_asm::*;
use std::sync::Arc;

fn guest(threshold: u32) -> Guest {
    let engine = SoftHypervisor::translating(Arc::new(cpu_translate::Factory { threshold }));
    let mut g = Guest::with_engine("max", &engine);
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, x86_defs::paging::PTE_P | x86_defs::paging::PTE_W);
    g.long_with(&tables);
    g
}

/// Taken until RDI reaches 300, then not, then now and then; flags and memory on both ways.
#[test]
fn a_branch_that_changes_its_mind() {
    for threshold in [0, 9, 16, 40] {
        let mut g = guest(threshold);
        g.code(|a| {
            let (mut top, mut over, mut odd, mut end) =
                (a.create_label(), a.create_label(), a.create_label(), a.create_label());
            asm!(a; mov(rsi, DATA); xor(ebx, ebx); xor(edi, edi); xor(ebp, ebp);
                set_label(&mut top); inc(edi); cmp(edi, 300); jb(over);
                // From 300 on it comes by here.
                inc(dword_ptr(rsi)); adc(rbp, 0); test(edi, 1); jne(odd); add(rbx, 1000);
                set_label(&mut over); inc(dword_ptr(rsi + 8)); adc(rbp, 0);
                set_label(&mut odd); add(rbx, 1); cmp(edi, 600); jb(top); jmp(end); ud2();
                set_label(&mut end); hlt(););
        });
        let s = g.run_to_halt();
        let even = 151;
        assert_eq!(s.gpr[3], 600 + even * 1000, "threshold {threshold}");
        assert_eq!((g.get32(DATA), g.get32(DATA + 8)), (301, 299 + even as u32));
        // CF of the comparison, while below 300.
        assert_eq!(s.gpr[5], 299);
    }
}

/// Addresses that nothing can be at, whichever place they have in a table of code.
#[test]
fn a_branch_to_an_address_that_is_not_canonical() {
    type Branch = fn(&mut CodeAssembler);
    let ways: [(&str, Branch); 3] = [
        ("jmp", |a| asm!(a; jmp(rax);)),
        ("call", |a| asm!(a; call(rax);)),
        ("ret", |a| asm!(a; push(rax); ret();)),
    ];
    for (name, branch) in ways {
        for target in [1u64 << 63, 1 << 47, 0x8000_0000_0001_0000, 0x7FFF_0000_0000_0000, 1 << 62] {
            for threshold in [0, 16] {
                let mut g = guest(threshold);
                g.code(|a| {
                    let (mut top, mut there) = (a.create_label(), a.create_label());
                    asm!(a; mov(ebx, 100); lea(rdx, ptr(there)); set_label(&mut top); mov(rax, rdx);
                        dec(ebx); mov(rcx, target); cmove(rax, rcx););
                    branch(a);
                    asm!(a; set_label(&mut there); mov(rsp, STACK); jmp(top););
                });
                let frame = g.run_to_stub();
                assert_eq!((frame.vector, frame.error), (13, Some(0)), "{name} to {target:#x}: {frame:x?}");
                assert_eq!(g.state().gpr[3], 0, "{name} to {target:#x}");
            }
        }
    }
}
