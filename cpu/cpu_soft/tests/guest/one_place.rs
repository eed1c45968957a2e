//! One instruction that accesses memory again and again: what may be remembered of where it went last time, and what not.

use crate::asm;
use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::exception::*;
use x86_defs::paging::*;

const WINDOW: u64 = 0x80_0000_0000;
const RW: u64 = PTE_P | PTE_W;
/// Often enough for whatever is learned.
const OFTEN: u32 = 300;

fn guest_with(build: impl FnOnce(&mut Tables)) -> Guest {
    let mut g = Guest::at_reset();
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, RW);
    build(&mut tables);
    g.long_with(&tables);
    g
}

/// Many accesses all over eight pages, which are two frames.
#[test]
fn from_page_to_page() {
    [false, true].into_iter().for_each(all_over);
}

fn all_over(by_stack_pointer: bool) {
    const ROUNDS: u32 = 1_200_000;
    let mut g = guest_with(|t| {
        for page in 0..8 {
            t.map(WINDOW + page * 4096, (DATA + page % 2 * 4096) | RW, 1);
        }
    });
    g.edit(|s| (s.gpr[0], s.gpr[1], s.gpr[2], s.gpr[3]) = (0, ROUNDS.into(), 7, WINDOW));
    g.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        asm!(a; imul_3(edx, edx, 1_664_525); add(edx, 1_013_904_223); mov(esi, edx); shr(esi, 17); and(esi, 0x7FF8);
            lea(rsp, ptr(rbx + rsi)););
        if by_stack_pointer {
            asm!(a; mov(rdi, qword_ptr(rsp)); add(rax, rdi); inc(rdi); mov(qword_ptr(rsp), rdi); xor(dword_ptr(rsp), edx););
        } else {
            asm!(a; mov(rdi, qword_ptr(rbx + rsi)); add(rax, rdi); inc(rdi); mov(qword_ptr(rbx + rsi), rdi);
                mov(r8, rsp); xor(dword_ptr(r8), edx););
        }
        asm!(a; dec(ecx); jne(again); hlt(););
    });
    let (mut frames, mut sum, mut x) = (vec![0u64; 1024], 0u64, 7u32);
    for _ in 0..ROUNDS {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let at = (x >> 17 & 0x7FF8) as usize / 8 % 1024;
        sum = sum.wrapping_add(frames[at]);
        frames[at] = frames[at].wrapping_add(1) ^ u64::from(x);
    }
    assert_eq!(g.run_to_halt().gpr[0], sum);
    assert!((0..1024).all(|n| g.get(DATA + n * 8) == frames[n as usize]));
}

/// The frame behind the page changes between two runs of the same loop.
#[test]
fn another_frame_when_the_page_was_dropped() {
    for by_cr3 in [false, true] {
        for writes in [false, true] {
            let mut entry = 0;
            let mut g = guest_with(|t| entry = t.map(WINDOW, DATA | RW, 1));
            g.put(DATA, &[1]);
            g.put(DATA + 0x1000, &[2]);
            g.edit(|s| (s.gpr[2], s.gpr[3], s.gpr[5], s.gpr[12]) = (0, WINDOW, entry, 2));
            g.code(|a| {
                let (mut run, mut again, mut end) = (a.create_label(), a.create_label(), a.create_label());
                asm!(a; set_label(&mut run); mov(ecx, OFTEN); set_label(&mut again););
                if writes {
                    asm!(a; add(qword_ptr(rbx), 1););
                } else {
                    asm!(a; add(rdx, qword_ptr(rbx)););
                }
                asm!(a; dec(ecx); jne(again); dec(r12); je(end);
                    mov(eax, ((DATA + 0x1000) | RW) as u32); mov(qword_ptr(rbp), rax););
                if by_cr3 {
                    asm!(a; mov(rax, cr3); mov(cr3, rax););
                } else {
                    asm!(a; invlpg(ptr(rbx)););
                }
                asm!(a; jmp(run); set_label(&mut end); hlt(););
            });
            let s = g.run_to_halt();
            let n = u64::from(OFTEN);
            if writes {
                assert_eq!((g.get(DATA), g.get(DATA + 0x1000)), (1 + n, 2 + n), "by CR3: {by_cr3}");
            } else {
                assert_eq!(s.gpr[2], n + 2 * n, "by CR3: {by_cr3}");
            }
        }
    }
}

/// The page goes, or the right to write to it.
#[test]
fn rights_that_were_taken() {
    for (left, writes, code) in [(0, false, 0), (0, true, PF_WRITE), (PTE_P, true, PF_WRITE | PF_PRESENT)] {
        let mut entry = 0;
        let mut g = guest_with(|t| entry = t.map(WINDOW, DATA | RW, 1));
        g.edit(|s| {
            s.cr0 |= x86_defs::control::CR0_WP;
            (s.gpr[3], s.gpr[5], s.gpr[12]) = (WINDOW, entry, 2);
        });
        g.code(|a| {
            let (mut run, mut again) = (a.create_label(), a.create_label());
            asm!(a; set_label(&mut run); mov(ecx, OFTEN); set_label(&mut again););
            if writes {
                asm!(a; mov(dword_ptr(rbx + rcx * 4), ecx););
            } else {
                asm!(a; mov(eax, dword_ptr(rbx + rcx * 4)););
            }
            asm!(a; dec(ecx); jne(again); mov(rax, DATA | left); mov(qword_ptr(rbp), rax); invlpg(ptr(rbx)); jmp(run););
        });
        let frame = g.run_to_stub();
        assert_eq!((frame.vector, frame.error), (14, Some(code)), "{left} {writes}");
        let s = g.state();
        assert_eq!((s.cr2, s.gpr[1]), (WINDOW + u64::from(OFTEN) * 4, OFTEN.into()));
    }
}

/// An instruction that wrote to a page often writes to it again when code of it runs.
#[test]
fn the_page_becomes_code() {
    let mut g = guest_with(|_| ());
    let function = DATA + 0x800;
    g.code_at(64, function, |a| asm!(a; mov(eax, 1); ret();));
    g.edit(|s| (s.gpr[0], s.gpr[6], s.gpr[12]) = (0, 0, 5));
    g.code(|a| {
        let (mut run, mut again) = (a.create_label(), a.create_label());
        asm!(a; set_label(&mut run); mov(ecx, OFTEN); mov(rdi, function + 1); sub(rdi, rcx); set_label(&mut again);
            mov(byte_ptr(rdi), r12b); inc(rdi); dec(ecx); jne(again);
            mov(byte_ptr(function), 0xB8u32); mov(byte_ptr(rdi), r12b); mov(rax, function); call(rax); add(rsi, rax);
            dec(r12); jne(run); hlt(););
    });
    // The loop itself ends at the opcode, which is put back.
    assert_eq!(g.run_to_halt().gpr[6], 5 + 4 + 3 + 2 + 1);
}

/// A loop's operand wanders over the end of a page whose next page lies in another frame.
#[test]
fn over_the_end_of_a_page() {
    let mut g = guest_with(|t| {
        t.map(WINDOW, (DATA + 0x1000) | RW, 1);
        t.map(WINDOW + 0x1000, DATA | RW, 1);
    });
    let bytes: Vec<u8> = (0..0x2000u32).map(|n| (n * 7 + n / 256) as u8).collect();
    g.put(DATA, &bytes);
    let start = 0x1000 - u64::from(OFTEN) / 2;
    g.edit(|s| (s.gpr[2], s.gpr[3], s.gpr[1]) = (0, WINDOW + start, OFTEN.into()));
    g.code(|a| {
        let mut again = a.create_label();
        asm!(a; set_label(&mut again); rol(rdx, 3); xor(rdx, qword_ptr(rbx)); add(word_ptr(rbx), 0x101); inc(rbx);
            dec(ecx); jne(again); hlt(););
    });
    let mut seen: Vec<u8> = [&bytes[0x1000..], &bytes[..0x1000]].concat();
    let mut want = 0u64;
    for at in start as usize..start as usize + OFTEN as usize {
        want = want.rotate_left(3) ^ u64::from_le_bytes(seen[at..at + 8].try_into().unwrap());
        let word = u16::from_le_bytes([seen[at], seen[at + 1]]).wrapping_add(0x101);
        seen[at..at + 2].copy_from_slice(&word.to_le_bytes());
    }
    assert_eq!(g.run_to_halt().gpr[2], want);
    let mut left = vec![0; 0x2000];
    g.ram.load_bytes(DATA, &mut left);
    assert!(left[0x1000..] == seen[..0x1000] && left[..0x1000] == seen[0x1000..]);
}

/// REP STOS of every width and at odd places, over page ends.
#[test]
fn filling_with_patterns() {
    for (size, count) in [(2u64, 0x901u64), (4, 0x483), (8, 0x245)] {
        let mut g = guest_with(|_| ());
        let to = DATA + 0x1000 - 0x123;
        let pattern = 0x8877_6655_4433_2211u64;
        g.edit(|s| (s.gpr[0], s.gpr[1], s.gpr[7]) = (pattern, count, to));
        g.code(|a| {
            match size {
                2 => a.rep().stosw().unwrap(),
                4 => a.rep().stosd().unwrap(),
                _ => a.rep().stosq().unwrap(),
            }
            asm!(a; hlt(););
        });
        let s = g.run_to_halt();
        assert_eq!((s.gpr[1], s.gpr[7]), (0, to + size * count));
        let mut bytes = vec![0; (size * count) as usize + 2];
        g.ram.load_bytes(to - 1, &mut bytes);
        assert_eq!((bytes[0], bytes[bytes.len() - 1]), (0, 0));
        let inside = &bytes[1..bytes.len() - 1];
        assert!(inside.chunks(size as usize).all(|c| *c == pattern.to_le_bytes()[..size as usize]), "{size}");
    }
}

/// REP MOVS onto itself, from far below to far above, and to the last byte of a page: the second time where the TLB knows all.
#[test]
fn copies_onto_themselves() {
    let bytes: Vec<u8> = (0..0x1000u32).map(|n| (n.wrapping_mul(0x9E37_79B9) >> 23) as u8).collect();
    for (size, count) in [(1u64, 75u64), (2, 40), (4, 21), (8, 13), (8, 0), (8, 1)] {
        for distance in [-100i64, -9, -8, -7, -4, -1, 0, 1, 2, 3, 4, 7, 8, 9, 16, 100] {
            let from = DATA + 0x1000 - size * count - distance.max(0) as u64;
            let to = from.wrapping_add_signed(distance);
            let mut g = guest_with(|_| ());
            g.put(DATA, &bytes);
            g.code(|a| {
                let mut again = a.create_label();
                asm!(a; mov(ebx, 2););
                a.set_label(&mut again).unwrap();
                asm!(a; mov(esi, from as u32); mov(edi, to as u32); mov(ecx, count as u32););
                match size {
                    1 => a.rep().movsb().unwrap(),
                    2 => a.rep().movsw().unwrap(),
                    4 => a.rep().movsd().unwrap(),
                    _ => a.rep().movsq().unwrap(),
                }
                asm!(a; dec(ebx); jne(again); hlt(););
            });
            let mut want = bytes.clone();
            for n in (0..2).flat_map(|_| 0..count) {
                let at = (from - DATA + n * size) as usize;
                let element = want[at..at + size as usize].to_vec();
                let at = (to - DATA + n * size) as usize;
                want[at..at + size as usize].copy_from_slice(&element);
            }
            let s = g.run_to_halt();
            let mut left = vec![0; 0x1000];
            g.ram.load_bytes(DATA, &mut left);
            assert_eq!((s.gpr[1], s.gpr[6], s.gpr[7]), (0, from + size * count, to + size * count));
            assert!(left == want, "{size} {count} {distance}");
        }
    }
}

/// Each access needs what the last one found: a ring of words in as many pages, or in one. The code becomes hot, is written, and becomes
/// hot again; the pages move meanwhile.
#[test]
fn from_link_to_link() {
    use std::sync::Arc;
    const TURNS: u32 = 300_000;
    for (threshold, stride, links) in [(0, 4096, 5), (16, 4096, 5), (16, 8, 500), (16, 4096 + 8, 300)] {
        let factory = Arc::new(cpu_translate::Factory { threshold });
        let mut g = Guest::with_engine("max", &cpu_soft::SoftHypervisor::translating(factory));
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, RW);
        for page in 0..301 {
            tables.map(WINDOW + page * 4096, (DATA + page % 8 * 4096) | RW, 1);
        }
        g.long_with(&tables);
        let at = |n: u64| n % links * stride;
        (0..links).for_each(|n| g.put(DATA + at(n) % 0x8000, &(WINDOW + at(n + 1)).to_le_bytes()));
        g.edit(|s| (s.gpr[0], s.gpr[1], s.gpr[2], s.gpr[3]) = (WINDOW, TURNS.into(), 0, 2));
        g.code(|a| {
            let (mut rounds, mut again) = (a.create_label(), a.create_label());
            a.set_label(&mut rounds).unwrap();
            asm!(a; mov(ecx, TURNS););
            a.set_label(&mut again).unwrap();
            asm!(a; mov(rax, qword_ptr(rax)); add(rdx, rax); dec(ecx); jne(again););
            // The immediate of `mov ecx`, as it is.
            asm!(a; mov(dword_ptr(CODE + 1), TURNS); dec(ebx); jne(rounds); hlt(););
        });
        let (mut n, mut sum) = (0, 0u64);
        for _ in 0..2 * TURNS {
            n += 1;
            sum = sum.wrapping_add(WINDOW + at(n));
        }
        let s = g.run_to_halt();
        assert_eq!((s.gpr[0], s.gpr[2]), (WINDOW + at(n), sum), "{threshold} {stride} {links}");
    }
}
