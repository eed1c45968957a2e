//! What must be forgotten when: INVLPG, CR3, CR4.PGE, INVPCID, and what may be remembered (SDM vol. 3, 4.10).

use crate::asm;
use crate::harness::guest::to_user64;
use crate::harness::*;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::exception::*;
use x86_defs::flags;
use x86_defs::paging::*;

const WINDOW: u64 = 0x80_0000_0000;
const RW: u64 = PTE_P | PTE_W;

fn guest_with(build: impl FnOnce(&mut Guest, &mut Tables)) -> Guest {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, RW);
    build(&mut g, &mut tables);
    g.long_with(&tables);
    g
}

/// How a guest drops a translation of the address in RBX.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flush {
    Invlpg,
    Cr3,
    Pge,
    Invpcid(u64),
    Cr3WithPcid,
}

fn drop_by(a: &mut CodeAssembler, how: Flush) {
    match how {
        Flush::Invlpg => asm!(a; invlpg(ptr(rbx));),
        Flush::Cr3 | Flush::Cr3WithPcid => asm!(a; mov(rax, cr3); mov(cr3, rax);),
        Flush::Pge => {
            asm!(a; mov(rax, cr4); mov(rdx, rax); xor(rax, CR4_PGE as i32); mov(cr4, rax); mov(cr4, rdx);)
        }
        Flush::Invpcid(kind) => {
            asm!(a; mov(qword_ptr(DATA + 0x800), rbp); mov(qword_ptr(DATA + 0x808), rbx); mov(eax, kind as u32);
                invpcid(rax, xmmword_ptr(DATA + 0x800)););
        }
    }
}

#[test]
fn every_way_of_dropping_works_for_every_size() {
    use Flush::*;
    let all = [Invlpg, Cr3, Pge, Invpcid(0), Invpcid(1), Invpcid(2), Invpcid(3), Cr3WithPcid];
    for (level, bytes) in [(1, 4096u64), (2, 2 << 20), (3, 1 << 30)] {
        for how in all {
            for global in [false, true] {
                // Only these drop global translations.
                if global && !matches!(how, Invlpg | Pge | Invpcid(2)) {
                    continue;
                }
                let bits = RW | if global { PTE_G } else { 0 };
                let mut entry = 0;
                // Large pages reach the marks through a different frame: 0 or 2 MiB.
                let mut g =
                    guest_with(|_, t| entry = t.map(WINDOW, if level == 1 { DATA } else { 0 } | bits, level));
                let (first, second) = if level == 1 { (DATA, DATA + 0x1000) } else { (0, 2 << 20) };
                if level == 3 {
                    // There is one gigabyte only: the mapping goes instead.
                    g.put(DATA + 0x10, &[1]);
                } else {
                    g.put(first + 0x3_0010 % bytes, &[1]);
                    g.put(second + 0x3_0010 % bytes, &[2]);
                }
                let pcid = if matches!(how, Invpcid(_) | Cr3WithPcid) { 5 } else { 0 };
                g.edit(|s| {
                    s.cr4 |= CR4_PGE | if pcid != 0 { CR4_PCIDE } else { 0 };
                    s.cr3 |= pcid;
                    s.gpr[5] = pcid;
                    s.gpr[3] = WINDOW;
                    s.gpr[6] = WINDOW + 0x3_0010 % bytes;
                });
                let new = if level == 3 { 0 } else { second | bits | if level == 2 { PTE_PS } else { 0 } };
                g.code(|a| {
                    asm!(a; movzx(ecx, byte_ptr(rsi)); out(1, al); mov(rax, new); mov(rdx, entry); mov(qword_ptr(rdx), rax););
                    drop_by(a, how);
                    asm!(a; movzx(edi, byte_ptr(rsi)); hlt(););
                });
                let what = format!("level {level} {how:?} global {global}");
                if level == 3 {
                    assert_eq!(g.run_to_stub().vector, 14, "{what}");
                    assert_eq!(g.state().gpr[1], 1, "{what}");
                } else {
                    let s = g.run_to_halt();
                    assert_eq!((s.gpr[1], s.gpr[7]), (1, 2), "{what}");
                }
            }
        }
    }
}

#[test]
fn cr3_with_the_keep_bit_and_two_pcids() {
    // Two address spaces, each with its own frame at the window: never the other's, keep bit or not.
    let mut other_root = 0;
    let mut g = guest_with(|_, t| {
        t.map(WINDOW, DATA | RW, 1);
        let mut other = t.another();
        other.identity(RAM_BYTES, RW);
        other.map(WINDOW, (DATA + 0x1000) | RW, 1);
        other_root = other.root;
    });
    g.put(DATA, &[1]);
    g.put(DATA + 0x1000, &[2]);
    g.edit(|s| {
        s.cr4 |= CR4_PCIDE;
        (s.gpr[3], s.gpr[8], s.gpr[9]) = (WINDOW, s.cr3, other_root | 1);
    });
    g.code(|a| {
        for keep in [0u32, 1] {
            for to in [r9, r8, r9, r8] {
                asm!(a; mov(rax, to); mov(edx, keep); shl(rdx, 63); or(rax, rdx); mov(cr3, rax);
                    movzx(eax, byte_ptr(rbx)); out(1, eax););
            }
        }
        asm!(a; mov(rax, cr3); hlt(););
    });
    let s = g.run_to_halt();
    assert_eq!(g.io.outs(1), [2, 1, 2, 1, 2, 1, 2, 1]);
    assert_eq!(s.gpr[0], s.gpr[8], "bit 63 is not stored");
}

#[test]
fn more_rights_need_no_flush() {
    let mut entry = 0;
    let mut g = guest_with(|_, t| entry = t.map(WINDOW, DATA | PTE_P | PTE_NX, 1));
    g.put(DATA, &[0xC3]);
    g.edit(|s| s.gpr[3] = WINDOW);
    g.code(|a| {
        asm!(a; mov(rdx, entry); mov(al, byte_ptr(rbx));
            or(qword_ptr(rdx), PTE_W as i32); mov(byte_ptr(rbx), al);
            btr(qword_ptr(rdx), 63); call(rbx); hlt(););
    });
    g.run_to_halt();
}

#[test]
fn absent_translations_are_not_remembered() {
    let mut entry = 0;
    let mut g = guest_with(|_, t| entry = t.map(WINDOW, 0, 1));
    g.handler64(14, CODE + 0x800, |a| {
        asm!(a; inc(esi); mov(rdx, entry); mov(qword_ptr(rdx), (DATA | RW) as i32); add(rsp, 8); iretq(););
    });
    g.edit(|s| s.gpr[3] = WINDOW);
    g.code(|a| asm!(a; mov(dword_ptr(rbx), 5); mov(eax, dword_ptr(rbx)); hlt();));
    let s = g.run_to_halt();
    assert_eq!((s.gpr[0], s.gpr[6]), (5, 1));
}

#[test]
fn accessed_and_dirty_come_back_after_they_were_cleared() {
    for (level, frame) in [(1, DATA), (2, 0), (3, 0)] {
        let mut entry = 0;
        let mut g = guest_with(|_, t| entry = t.map(WINDOW, frame | RW, level));
        g.edit(|s| (s.gpr[3], s.gpr[2]) = (WINDOW + 0x3_0000 - if level == 1 { 0x3_0000 } else { 0 }, entry));
        g.code(|a| {
            let report = |a: &mut CodeAssembler| asm!(a; mov(eax, dword_ptr(rdx)); and(eax, 0x60); out(1, eax););
            asm!(a; mov(al, byte_ptr(rbx)););
            report(a);
            asm!(a; mov(byte_ptr(rbx), al););
            report(a);
            asm!(a; and(dword_ptr(rdx), !0x60); invlpg(ptr(rbx)); mov(al, byte_ptr(rbx)););
            report(a);
            asm!(a; mov(byte_ptr(rbx), al););
            report(a);
            // A write that also reads sets both at once.
            asm!(a; and(dword_ptr(rdx), !0x60); invlpg(ptr(rbx)); inc(byte_ptr(rbx)););
            report(a);
            asm!(a; and(dword_ptr(rdx), !0x60); invlpg(ptr(rbx)); db(&[0xF0, 0xFE, 0x03]););
            report(a);
            // A compare-exchange that does not match writes all the same.
            asm!(a; and(dword_ptr(rdx), !0x60); invlpg(ptr(rbx)); mov(al, byte_ptr(rbx)); inc(al); db(&[0xF0, 0x0F, 0xB0, 0x0B]););
            report(a);
            a.hlt().unwrap();
        });
        g.run_to_halt();
        assert_eq!(g.io.outs(1), [0x20, 0x60, 0x20, 0x60, 0x60, 0x60, 0x60], "level {level}");
    }
}

#[test]
fn rights_change_with_control_bits_at_once() {
    // A read-only user page: the supervisor's rights follow CR0.WP, CR4.SMAP and AC; each fault is counted.
    let mut g = guest_with(|_, t| {
        t.map(WINDOW, DATA | PTE_P | PTE_U, 1);
    });
    g.handler64(14, CODE + 0x800, |a| {
        asm!(a; pop(rax); out(1, eax); mov(rax, r15); mov(qword_ptr(rsp), rax); iretq(););
    });
    g.edit(|s| {
        s.gpr[3] = WINDOW;
        s.cr4 |= CR4_SMAP;
        s.rflags |= flags::AC;
    });
    g.code(|a| {
        let step = |a: &mut CodeAssembler, write: bool| {
            let mut next = a.create_label();
            asm!(a; lea(r15, qword_ptr(next)););
            if write {
                asm!(a; mov(byte_ptr(rbx), cl););
            } else {
                asm!(a; mov(cl, byte_ptr(rbx)););
            }
            asm!(a; mov(eax, 0x77); out(1, eax););
            a.set_label(&mut next).unwrap();
            asm!(a; nop(););
        };
        step(a, false);
        a.clac().unwrap();
        step(a, false);
        step(a, true);
        a.stac().unwrap();
        step(a, false);
        step(a, true);
        asm!(a; mov(rax, cr0); btr(rax, 16); mov(cr0, rax););
        step(a, true);
        a.clac().unwrap();
        step(a, true);
        // AC by POPF.
        asm!(a; pushfq(); or(qword_ptr(rsp), flags::AC as i32); popfq(););
        step(a, true);
        asm!(a; pushfq(); and(qword_ptr(rsp), !(flags::AC as i32)); popfq(); mov(rax, cr4); btr(rax, 21); mov(cr4, rax););
        step(a, true);
        asm!(a; mov(rax, cr0); bts(rax, 16); mov(cr0, rax););
        step(a, true);
        a.hlt().unwrap();
    });
    g.run_to_halt();
    let (ok, read, write) = (0x77, PF_PRESENT, PF_PRESENT | PF_WRITE);
    assert_eq!(g.io.outs(1), [ok, read, write, ok, write, ok, write, ok, ok, write]);
}

#[test]
fn what_the_kernel_touched_stays_closed_to_user_code() {
    let mut g = guest_with(|_, t| {
        t.map(WINDOW, DATA | RW, 1);
        t.map(CODE, CODE | RW | PTE_U, 1);
    });
    g.put(DATA, &[0xF4]);
    g.edit(|s| s.gpr[3] = WINDOW);
    g.code(|a| asm!(a; mov(byte_ptr(rbx + 0x800), al); mov(al, byte_ptr(rbx)); jmp(rbx);));
    g.run_to_halt();
    for (offset, code) in [(0x80, PF_USER), (0x90, PF_USER | PF_WRITE), (0xA0, PF_USER | PF_FETCH)] {
        g.code_at(64, CODE + 0x80, |a| asm!(a; mov(al, byte_ptr(rbx));));
        g.code_at(64, CODE + 0x90, |a| asm!(a; mov(byte_ptr(rbx), al);));
        g.code_at(64, CODE + 0xA0, |a| asm!(a; jmp(rbx);));
        // Without a restore of the vCPU in between the TLB stays warm: IRETQ goes to user mode.
        g.code_at(64, DATA + 1, |a| {
            asm!(a; push((UDATA | 3) as i32); push(STACK as i32); pushfq(); push((UCODE64 | 3) as i32);
                push((CODE + offset) as i32); iretq(););
        });
        g.edit(|s| (s.run_state, s.rip) = (RunState::Running, CODE));
        g.put(DATA, &[0x90]);
        let frame = g.run_to_stub();
        assert_eq!((frame.vector, frame.error), (14, Some(code | PF_PRESENT)), "{offset:#x}");
        g.edit(|s| {
            let kernel = guest::long_state(s.cr3);
            (s.segments, s.gpr[4]) = (kernel.segments, STACK);
        });
    }
    // The other way round: what user code touched does not open SMEP or SMAP.
    let mut g = guest_with(|_, t| t.identity(RAM_BYTES, RW | PTE_U));
    g.edit(to_user64);
    g.code(|a| asm!(a; mov(eax, dword_ptr(DATA)); int(0x80);));
    assert_eq!(g.run_to_stub().vector, 0x80);
}

#[test]
fn thousands_of_pages_share_the_slots() {
    let mut g = guest_with(|g, t| {
        for n in 0..3000u64 {
            let frame = 0x20_0000 + (n * 7 % 256) * 4096;
            t.map(WINDOW + n * 4096, frame | RW, 1);
        }
        for n in 0..256u64 {
            g.ram.store::<u64>(0x20_0000 + n * 4096 + 0x120, n);
        }
    });
    g.edit(|s| s.gpr[3] = WINDOW + 0x120);
    g.code(|a| {
        let (mut pass, mut page) = (a.create_label(), a.create_label());
        asm!(a; mov(edi, 3); xor(eax, eax););
        a.set_label(&mut pass).unwrap();
        asm!(a; mov(rsi, rbx); mov(ecx, 3000););
        a.set_label(&mut page).unwrap();
        asm!(a; add(rax, qword_ptr(rsi)); add(rsi, 4096); loop_(page); dec(edi); jnz(pass); hlt(););
    });
    let want: u64 = (0..3000u64).map(|n| n * 7 % 256).sum();
    assert_eq!(g.run_to_halt().gpr[0], 3 * want);
}

#[test]
fn non_canonical_addresses() {
    let mut g = Guest::long();
    g.edit(|s| s.gpr[3] = 0x8000_0000_0000);
    // INVLPG ignores it; data is #GP(0), the stack #SS(0), whole or in part.
    g.code(|a| asm!(a; invlpg(ptr(rbx)); hlt();));
    g.run_to_halt();
    let fault = |f: &dyn Fn(&mut CodeAssembler)| {
        let mut g = Guest::long();
        g.ram.store::<u64>(TSS + 0x24, KERNEL_STACK);
        for vector in 12..=14 {
            let [low, high] = gate64(KCODE64, STUBS + vector * 8, 0x8E, 1);
            g.ram.store(IDT + vector * 16, low);
            g.ram.store(IDT + vector * 16 + 8, high);
        }
        g.edit(|s| (s.gpr[3], s.gpr[5]) = (0x8000_0000_0000, 0x8000_0000_0000));
        g.code(|a| f(a));
        let frame = g.run_to_stub();
        (frame.vector, frame.error, frame.rip)
    };
    assert_eq!(fault(&|a| asm!(a; mov(al, byte_ptr(rbx));)), (13, Some(0), CODE));
    assert_eq!(fault(&|a| asm!(a; mov(byte_ptr(rbx), al);)), (13, Some(0), CODE));
    assert_eq!(fault(&|a| asm!(a; mov(al, byte_ptr(rbp));)), (12, Some(0), CODE));
    assert_eq!(fault(&|a| asm!(a; mov(byte_ptr(rbp), al);)), (12, Some(0), CODE));
    assert_eq!(
        fault(&|a| asm!(a; mov(rsp, rbp); push(rax);)),
        (14, Some(2), CODE + 3),
        "below it is mapped to nothing"
    );
    assert_eq!(fault(&|a| asm!(a; lea(rsp, ptr(rbp + 8)); push(rax);)), (12, Some(0), CODE + 4));
    assert_eq!(fault(&|a| asm!(a; mov(rsp, rbp); pop(rax);)), (12, Some(0), CODE + 3));
    assert_eq!(fault(&|a| asm!(a; mov(rsp, rbp); ret();)), (12, Some(0), CODE + 3));
    assert_eq!(fault(&|a| asm!(a; lea(rsp, ptr(rbp + 64)); call(rax);)), (12, Some(0), CODE + 4));
    assert_eq!(fault(&|a| asm!(a; jmp(rbx);)), (13, Some(0), CODE), "a jump faults before it is taken");
    assert_eq!(fault(&|a| asm!(a; push(rbx); ret();)), (13, Some(0), CODE + 1));
}

/// With AC and without it, code is found by translations of its own; data with AC may take the place of the one but not
/// of the other, and code with AC must go on wherever a slice ends.
#[test]
fn code_with_ac_goes_on_when_data_took_its_place() {
    const ROUNDS: u64 = 30_000;
    let mut g = guest_with(|_, _| {});
    g.edit(|s| {
        s.cr4 |= CR4_SMAP;
        s.gpr[1] = ROUNDS;
        // In the same slot of the TLB as the code.
        s.gpr[6] = CODE + (2 << 20);
    });
    g.code(|a| {
        let (mut again, mut inner) = (a.create_label(), a.create_label());
        a.set_label(&mut again).unwrap();
        asm!(a; clac(); mov(rbx, qword_ptr(rdi)); stac(); mov(rax, qword_ptr(rsi)); clac(); nop(); stac(););
        asm!(a; mov(edx, 20););
        a.set_label(&mut inner).unwrap();
        asm!(a; dec(edx); jnz(inner); dec(rcx); jnz(again); hlt(););
    });
    assert_eq!(g.run_to_halt().gpr[1], 0);
}
