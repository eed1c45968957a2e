//! Emitted code is a contract: how many host instructions each guest instruction of some snippets becomes stands in
//! `golden/snippets.txt`. `GOLDEN=write cargo nextest run -p cpu_translate golden` writes it anew; the diff is what is reviewed.

use crate::block::{self, Source};
use crate::elide;
use crate::emit::Emitter;
use crate::engine::{Engine, FLAT_32};
use crate::path::{self, Ways};
use cpu_soft::translate::{Heat, Place};
use guest_memory::GuestRam;
use iced_x86::code_asm::*;
use std::fmt::Write;
use x86_decode::{Decoded, decode};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_emulate::ModeKey;

/// Snippets lie here in their page, at CPL 0.
const AT: u64 = 0x40_0100;
const LONG: u32 = ModeKey::LONG | ModeKey::LMA;
/// In another page.
const AWAY: u64 = AT + 0x1000;
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/snippets.txt");

type Snippet = (&'static str, fn(&mut CodeAssembler) -> Result<(), IcedError>);

const SNIPPETS: &[Snippet] = &[
    ("registers", |a| {
        a.add(rax, rbx)?;
        a.lea(rcx, ptr(rax + rdx * 4 + 8))?;
        a.mov(r10, rax)?;
        a.add(r9, r11)?;
        a.imul_2(ecx, esi)?;
        a.sete(al)?;
        a.movzx(eax, ah)?;
        a.jmp(AWAY)
    }),
    ("memory", |a| {
        a.mov(rax, qword_ptr(rdi))?;
        a.mov(dword_ptr(rsi + rcx * 4 + 16), eax)?;
        a.add(qword_ptr(rbx), 1)?;
        a.mov(r10, qword_ptr(r11))?;
        a.mov(rax, qword_ptr(AT + 0x800))?;
        a.mov(rax, qword_ptr(0x28).gs())?;
        a.lock().xadd(qword_ptr(rdi), rax)?;
        a.jmp(AWAY)
    }),
    ("flags that matter across memory", |a| {
        a.cmp(rax, rbx)?;
        a.mov(rcx, qword_ptr(rdi))?;
        a.cmovb(rax, rcx)?;
        a.adc(rdx, qword_ptr(rsi))?;
        a.jmp(AWAY)
    }),
    ("a loop", |a| {
        a.add(rax, qword_ptr(rdi))?;
        a.add(rdi, 8)?;
        a.dec(rcx)?;
        a.jne(AT)?;
        a.jmp(AWAY)
    }),
    ("a function", |a| {
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.push(r12)?;
        a.sub(rsp, 0x20)?;
        a.call(AT + 0x200)?;
        Ok(())
    }),
    ("its end", |a| {
        a.add(rsp, 0x20)?;
        a.pop(r12)?;
        a.leave()?;
        a.ret()
    }),
    ("a call that is followed", |a| {
        let mut f = a.create_label();
        a.push(rbx)?;
        a.call(f)?;
        a.pop(rbx)?;
        a.jmp(AWAY)?;
        a.set_label(&mut f)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.ret()
    }),
    ("the system's part", |a| {
        a.pushfq()?;
        a.cli()?;
        a.push(qword_ptr(rdi))?;
        a.swapgs()?;
        a.sti()?;
        a.nop()?;
        a.jmp(AWAY)
    }),
    ("more of it", |a| {
        a.cld()?;
        a.bts(qword_ptr(rdi), rsi)?;
        a.bt(dword_ptr(rdi), r11d)?;
        a.lock().cmpxchg16b(xmmword_ptr(rbp))?;
        a.prefetcht0(byte_ptr(rax))?;
        a.pop(rsp)?;
        a.sysretq()
    }),
    ("strings, and what a page fault begins with", |a| {
        a.mov(rax, cr2)?;
        a.rep().stosq()?;
        a.rep().stosb()?;
        a.rep().movsq()?;
        a.rep().movsb()?;
        a.jmp(AWAY)
    }),
    ("indirect", |a| a.jmp(qword_ptr(rax + rcx * 8))),
    ("division", |a| {
        a.div(rcx)?;
        a.cdq()?;
        a.idiv(dword_ptr(rdi))?;
        a.jmp(AWAY)
    }),
    ("vectors", |a| {
        a.movups(xmm0, xmmword_ptr(rdi))?;
        a.mulps(xmm0, xmm1)?;
        a.vfmadd231ps(ymm1, ymm2, ymmword_ptr(rsi))?;
        a.cvtsi2sd(xmm3, rax)?;
        a.ucomisd(xmm3, qword_ptr(rsi))?;
        a.vzeroupper()?;
        a.ja(AT + 0x80)?;
        a.jmp(AWAY)
    }),
    ("x87", |a| {
        a.fld(qword_ptr(rdi))?;
        a.fmul(qword_ptr(rsi + 8))?;
        a.faddp(st1, st0)?;
        a.fucomi(st0, st1)?;
        a.fstp(tword_ptr(rdi + 16))?;
        a.fldcw(word_ptr(rsp))?;
        a.jmp(AWAY)
    }),
];

/// As `SNIPPETS`, at CPL 3.
const OF_THE_USER: &[Snippet] = &[("a system call", |a| a.syscall())];

/// As `SNIPPETS`, of 32-bit code.
const OF_32_BITS: &[Snippet] = &[
    ("32-bit code: registers and memory", |a| {
        a.mov(eax, dword_ptr(ebp - 8))?;
        a.add(eax, dword_ptr(ebp - 4))?;
        a.lea(ecx, ptr(eax + edx * 4 + 8))?;
        a.mov(dword_ptr(AT + 0x800), eax)?;
        a.inc(ecx)?;
        a.mov(edx, dword_ptr(esi + ecx * 4))?;
        a.movzx(eax, ah)?;
        a.jmp(AWAY)
    }),
    ("32-bit code: FS and GS", |a| {
        a.mov(eax, dword_ptr(0x14).gs())?;
        a.inc(dword_ptr(ecx + 8).fs())?;
        a.mov(eax, dword_ptr(edi).cs())?;
        a.jmp(AWAY)
    }),
    ("32-bit code: a loop", |a| {
        a.add(eax, dword_ptr(edi))?;
        a.add(edi, 4)?;
        a.dec(ecx)?;
        a.jne(AT)?;
        a.jmp(AWAY)
    }),
    ("32-bit code: a function", |a| {
        a.push(ebp)?;
        a.mov(ebp, esp)?;
        a.push(ebx)?;
        a.push(dword_ptr(ebp + 8))?;
        a.push(1)?;
        a.call(AT + 0x200)?;
        Ok(())
    }),
    ("32-bit code: its end", |a| {
        a.add(esp, 8)?;
        a.pop(ebx)?;
        a.leave()?;
        a.ret_1(4)
    }),
    ("32-bit code: the system's part", |a| {
        a.pushfd()?;
        a.cli()?;
        a.push(ds)?;
        a.call(dword_ptr(eax * 4 + 0x1000))?;
        Ok(())
    }),
];

/// A branch over what never ran.
fn mostly_taken() -> String {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut over = a.create_label();
    a.test(rdi, rdi).unwrap();
    a.jne(over).unwrap();
    a.ud2().unwrap();
    a.set_label(&mut over).unwrap();
    a.inc(rax).unwrap();
    a.jmp(AWAY).unwrap();
    let code = a.assemble(AT).unwrap();
    describe("a branch that is mostly taken", &code, LONG, &|at| if at == AT & 0xFFF { 16 } else { 0 })
}

/// What is translated of `code`, as a careful translation or not.
fn read(
    code: &[u8],
    mode: u32,
    heat: &Heat<'_>,
    careful: bool,
    extent: path::Extent,
) -> (Engine, Place, Source) {
    let ram = GuestRam::for_test(1 << 20);
    let engine = Engine::for_golden(&ram, FeatureSet::of(Feature::ALL));
    let mut scratch = block::Scratch::default();
    scratch.page.fill(0xF4);
    let offset = AT as usize & 0xFFF;
    scratch.page[offset..offset + code.len()].copy_from_slice(code);
    let mode = ModeKey(mode | ModeKey::PROTECTED | ModeKey::OSFXSR | ModeKey::AVX);
    let place = Place { linear: AT, at: offset as u64, mode, checks_itself: false };
    let mut source: Source =
        block::read(&engine, &place, &engine.host(0), scratch, None, Ways::counted(heat, extent));
    elide::find_groups(&mut source, AT & !0xFFF, mode.is_long(), careful);
    (engine, place, source)
}

/// What was emitted, in numbers.
fn describe(name: &str, code: &[u8], mode: u32, heat: &Heat<'_>) -> String {
    let (mut engine, place, source) = read(code, mode, heat, false, path::HOT);
    let base = engine.memory.next();
    let mut emitter = Emitter::new(base, &place, 2, 0, &mut engine);
    emitter.block(&source);
    let finished = emitter.finish();
    let mut text = format!("{name}\n");
    let bounds = &finished.marks;
    let count = |from: usize, to: usize| instructions(&finished.code[from..to]);
    writeln!(text, "  {:>3}  (entry)", count(0, bounds[0])).unwrap();
    for (item, pair) in source.items.iter().zip(bounds.windows(2)) {
        writeln!(text, "  {:>3}  {:?}", count(pair[0], pair[1]), item.insn.code()).unwrap();
    }
    let end = bounds[bounds.len() - 1];
    writeln!(text, "  {:>3}  (out of line)", count(end, finished.code.len())).unwrap();
    text
}

fn instructions(code: &[u8]) -> usize {
    let (mut at, mut n) = (0, 0);
    while at < code.len() {
        match decode(&code[at..], 64, 0, FeatureSet::of(Feature::ALL)) {
            Decoded::Instruction(insn) => at += insn.len(),
            other => panic!("emitted {other:?} at {at} of {code:x?}"),
        }
        n += 1;
    }
    n
}

#[test]
fn emitted_code_is_as_written_down() {
    let all = SNIPPETS.iter().map(|s| (s, LONG)).chain(OF_THE_USER.iter().map(|s| (s, LONG | 3 << 3)));
    let text: String = all
        .chain(OF_32_BITS.iter().map(|s| (s, FLAT_32)))
        .map(|((name, snippet), mode)| {
            let mut a = CodeAssembler::new(ModeKey(mode).bitness()).unwrap();
            snippet(&mut a).unwrap();
            describe(name, &a.assemble(AT).unwrap(), mode, &|_| 0)
        })
        .chain([mostly_taken()])
        .collect();
    if std::env::var("GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(FILE, &text).unwrap();
    }
    let want = std::fs::read_to_string(FILE).unwrap();
    assert!(want == text, "emitted code differs from {FILE}:\n{text}");
}

#[test]
fn what_could_not_be_had_as_a_range_is_not_tried_again() {
    let mut a = CodeAssembler::new(64).unwrap();
    for offset in [0, 8, 16] {
        a.mov(rax, qword_ptr(rbx + offset)).unwrap();
        a.mov(rdx, qword_ptr(rcx + offset)).unwrap();
    }
    a.jmp(AWAY).unwrap();
    let code = a.assemble(AT).unwrap();
    let grouped = |careful| -> Vec<bool> {
        let (_, _, source) = read(&code, LONG, &|_| 0, careful, path::HOT);
        source.items[..6].iter().map(|item| item.operand.is_some()).collect()
    };
    assert_eq!(grouped(false), [true; 6]);
    assert_eq!(grouped(true), [false, true, false, true, false, true]);
}

#[test]
fn code_that_is_not_hot_goes_less_far() {
    let mut a = CodeAssembler::new(64).unwrap();
    for _ in 0..6 {
        a.inc(rax).unwrap();
        a.jz(AWAY).unwrap();
    }
    a.jmp(AWAY).unwrap();
    let code = a.assemble(AT).unwrap();
    let read = |extent| {
        let (_, _, source) = read(&code, LONG, &|_| 0, false, extent);
        (source.items.len(), source.is_long)
    };
    // Up to the fifth branch, and to the end.
    assert_eq!([read(path::LUKEWARM), read(path::HOT)], [(10, false), (13, true)]);
}
