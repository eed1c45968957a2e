//! Accesses across two pages of which one cannot be used: the fault names the right page and nothing of the
//! instruction is committed; once the page is there, the instruction does all of its work.

use crate::asm;
use crate::harness::*;
use hypervisor::VcpuState;
use hypervisor::state::RunState;
use iced_x86::code_asm::*;
use x86_defs::control::*;
use x86_defs::exception::*;
use x86_defs::paging::*;

const WINDOW: u64 = 0x80_0000_0000;
/// End of the first page.
const EDGE: u64 = WINDOW + 0x1000;
const RW: u64 = PTE_P | PTE_W;

/// An instruction with a memory operand of `bytes` at [RBX] (or around RSP: `below` bytes under it).
struct Form {
    name: &'static str,
    bytes: u64,
    write: bool,
    align: u64,
    /// RSP, RSI and RDI are the operand's address plus this.
    above: u64,
    code: fn(&mut CodeAssembler),
}

const fn form(name: &'static str, bytes: u64, write: bool, code: fn(&mut CodeAssembler)) -> Form {
    Form { name, bytes, write, align: 1, above: 0, code }
}
const fn push(name: &'static str, bytes: u64, code: fn(&mut CodeAssembler)) -> Form {
    Form { above: bytes, ..form(name, bytes, true, code) }
}
const fn aligned(align: u64, form: Form) -> Form {
    Form { align, ..form }
}

const R: bool = false;
const W: bool = true;

fn forms() -> Vec<Form> {
    vec![
        form("mov load 2", 2, R, |a| asm!(a; mov(ax, word_ptr(rbx));)),
        form("mov load 4", 4, R, |a| asm!(a; mov(eax, dword_ptr(rbx));)),
        form("mov load 8", 8, R, |a| asm!(a; mov(rax, qword_ptr(rbx));)),
        form("movsx", 4, R, |a| asm!(a; movsxd(rax, dword_ptr(rbx));)),
        form("mov store 2", 2, W, |a| asm!(a; mov(word_ptr(rbx), cx);)),
        form("mov store 8", 8, W, |a| asm!(a; mov(qword_ptr(rbx), rcx);)),
        form("mov store imm", 8, W, |a| asm!(a; mov(qword_ptr(rbx), -2);)),
        form("movbe", 8, W, |a| asm!(a; movbe(qword_ptr(rbx), rcx);)),
        form("movnti", 8, W, |a| asm!(a; movnti(qword_ptr(rbx), rcx);)),
        form("add", 8, W, |a| asm!(a; add(qword_ptr(rbx), rcx);)),
        form("adc from", 8, R, |a| asm!(a; adc(rax, qword_ptr(rbx));)),
        form("lock add", 4, W, |a| asm!(a; db(&[0xF0]); add(dword_ptr(rbx), ecx);)),
        form("lock neg", 8, W, |a| asm!(a; db(&[0xF0]); neg(qword_ptr(rbx));)),
        form("xchg", 8, W, |a| asm!(a; xchg(qword_ptr(rbx), rcx);)),
        form("xadd", 4, W, |a| asm!(a; xadd(dword_ptr(rbx), ecx);)),
        form("lock xadd", 8, W, |a| asm!(a; db(&[0xF0]); xadd(qword_ptr(rbx), rcx);)),
        form("cmpxchg", 8, W, |a| asm!(a; cmpxchg(qword_ptr(rbx), rcx);)),
        form("lock cmpxchg", 4, W, |a| asm!(a; db(&[0xF0]); cmpxchg(dword_ptr(rbx), ecx);)),
        form("cmpxchg8b", 8, W, |a| asm!(a; cmpxchg8b(qword_ptr(rbx));)),
        form("not", 4, W, |a| asm!(a; not(dword_ptr(rbx));)),
        form("shl", 8, W, |a| asm!(a; shl(qword_ptr(rbx), 3);)),
        form("rcr", 4, W, |a| asm!(a; rcr(dword_ptr(rbx), cl);)),
        form("shld", 8, W, |a| asm!(a; shld(qword_ptr(rbx), rcx, 5);)),
        form("btc", 8, W, |a| asm!(a; btc(qword_ptr(rbx), 7);)),
        form("mul", 8, R, |a| asm!(a; mul(qword_ptr(rbx));)),
        form("push mem", 8, R, |a| asm!(a; push(qword_ptr(rbx));)),
        form("pop mem", 8, W, |a| asm!(a; mov(rsp, STACK - 64); pop(qword_ptr(rbx));)),
        push("push", 8, |a| asm!(a; push(rcx);)),
        push("pushfq", 8, |a| asm!(a; pushfq();)),
        push("push imm", 8, |a| asm!(a; push(5);)),
        push("call", 8, |a| asm!(a; mov(rax, CODE + 0x300); call(rax);)),
        push("enter", 8, |a| asm!(a; enter(0, 0);)),
        Form { above: 16, ..form("enter 1", 16, W, |a| asm!(a; enter(0, 1);)) },
        form("pop", 8, R, |a| asm!(a; pop(rcx);)),
        form("popfq", 8, R, |a| asm!(a; popfq();)),
        form("leave", 8, R, |a| asm!(a; mov(rbp, rsp); leave();)),
        form("ret", 8, R, |a| asm!(a; ret();)),
        form("iretq", 40, R, |a| asm!(a; iretq();)),
        form("lodsq", 8, R, |a| asm!(a; lodsq();)),
        form("stosd", 4, W, |a| asm!(a; stosd();)),
        form("scasq", 8, R, |a| asm!(a; scasq();)),
        form("movsw", 2, W, |a| asm!(a; mov(esi, DATA as u32); movsw();)),
        form("cmpsd", 4, R, |a| asm!(a; mov(esi, DATA as u32); cmpsd();)),
        form("insd", 4, W, |a| asm!(a; insd();)),
        form("outsd", 4, R, |a| asm!(a; outsd();)),
        form("lgdt", 10, R, |a| asm!(a; lgdt(ptr(rbx));)),
        form("sgdt", 10, W, |a| asm!(a; sgdt(ptr(rbx));)),
        form("lss", 10, R, |a| asm!(a; db(&[0x48, 0x0F, 0xB5, 0x0B]);)),
        form("jmp far", 10, R, |a| asm!(a; db(&[0x48, 0xFF, 0x2B]);)),
        form("movups load", 16, R, |a| asm!(a; movups(xmm3, xmmword_ptr(rbx));)),
        form("movups store", 16, W, |a| asm!(a; movups(xmmword_ptr(rbx), xmm1);)),
        form("movhps store", 8, W, |a| asm!(a; movhps(qword_ptr(rbx), xmm1);)),
        form("movsd store", 8, W, |a| asm!(a; movsd_2(qword_ptr(rbx), xmm1);)),
        form("pextrw", 2, W, |a| asm!(a; pextrw(word_ptr(rbx), xmm1, 3);)),
        form("addsd", 8, R, |a| asm!(a; addsd(xmm1, qword_ptr(rbx));)),
        form("vmovups load", 32, R, |a| asm!(a; vmovups(ymm3, ymmword_ptr(rbx));)),
        form("vmovups store", 32, W, |a| asm!(a; vmovups(ymmword_ptr(rbx), ymm1);)),
        form("vaddps", 32, R, |a| asm!(a; vaddps(ymm1, ymm2, ymmword_ptr(rbx));)),
        form("vmaskmovps", 32, W, |a| asm!(a; vmaskmovps(ymmword_ptr(rbx), ymm15, ymm1);)),
        form("maskmovdqu", 16, W, |a| asm!(a; maskmovdqu(xmm1, xmm15);)),
        form("fld m80", 10, R, |a| asm!(a; fld(tbyte_ptr(rbx));)),
        form("fstp m80", 10, W, |a| asm!(a; fstp(tbyte_ptr(rbx));)),
        form("fist m32", 4, W, |a| asm!(a; fist(dword_ptr(rbx));)),
        form("fbstp", 10, W, |a| asm!(a; fbstp(tbyte_ptr(rbx));)),
        form("fnstenv", 28, W, |a| asm!(a; fnstenv(ptr(rbx));)),
        form("fldenv", 28, R, |a| asm!(a; fldenv(ptr(rbx));)),
        form("fnsave", 108, W, |a| asm!(a; fnsave(ptr(rbx));)),
        form("frstor", 108, R, |a| asm!(a; frstor(ptr(rbx));)),
        form("fnstcw", 2, W, |a| asm!(a; fnstcw(word_ptr(rbx));)),
        form("stmxcsr", 4, W, |a| asm!(a; stmxcsr(dword_ptr(rbx));)),
        aligned(16, form("fxsave", 416, W, |a| asm!(a; fxsave(ptr(rbx));))),
        aligned(16, form("fxrstor", 416, R, |a| asm!(a; fxrstor(ptr(rbx));))),
        aligned(64, form("xsave", 832, W, |a| asm!(a; mov(eax, 7); xor(edx, edx); xsave(ptr(rbx));))),
        aligned(64, form("xrstor", 832, R, |a| asm!(a; mov(eax, 7); xor(edx, edx); xrstor(ptr(rbx));))),
    ]
}

struct Run {
    g: Guest,
    second: u64,
}

impl Run {
    /// `first` and `second` are the entries of the two pages.
    fn new(form: &Form, at: u64, first: u64, second: u64) -> Self {
        let mut g = Guest::at_reset();
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, RW);
        tables.map(WINDOW, first, 1);
        let place = tables.map(EDGE, second, 1);
        g.long_with(&tables);
        let [low, high] = gate64(KCODE64, STUBS + 14 * 8, 0x8E, 1);
        g.ram.store(IDT + 14 * 16, low);
        g.ram.store(IDT + 14 * 16 + 8, high);
        g.ram.store::<u64>(TSS + 0x24, KERNEL_STACK);
        for n in 0..0x400u64 {
            // A return address, a selector, flags: whatever is read makes sense or is compared as it is.
            g.ram.store::<u64>(DATA + n * 8, n.wrapping_mul(0x0101_0101_0101_0101));
        }
        let operand = DATA + (at - WINDOW);
        match form.name {
            "ret" => g.put(operand, &(CODE + 0x300).to_le_bytes()),
            "popfq" => g.put(operand, &0x2u64.to_le_bytes()),
            "iretq" => {
                let words = [CODE + 0x300, u64::from(KCODE64), 2, STACK, u64::from(KDATA)];
                words.iter().zip(0..).for_each(|(w, i)| g.put(operand + i * 8, &w.to_le_bytes()));
            }
            "lgdt" => g.put(operand, &[0xFF, 0, 0, 0x10, 0, 0, 0, 0, 0, 0]),
            "lss" => g.put(operand, &[1, 2, 3, 4, 5, 6, 7, 0, KDATA as u8, 0]),
            "jmp far" => {
                let mut raw = (CODE + 0x300).to_le_bytes().to_vec();
                raw.extend(KCODE64.to_le_bytes());
                g.put(operand, &raw);
            }
            "frstor" | "fldenv" | "fxrstor" => g.put(operand, &[0; 512]),
            "xrstor" => {
                g.put(operand, &[0; 832]);
                // XSTATE_BV: all three components are there.
                g.put(operand + 512, &[7]);
            }
            _ => {}
        }
        g.code_at(64, CODE + 0x300, |a| asm!(a; mov(edx, 0x1234); hlt();));
        g.code(|a| {
            (form.code)(a);
            a.hlt().unwrap();
        });
        g.edit(|s| registers(s, at, form.above));
        Self { g, second: place }
    }
}

fn registers(s: &mut VcpuState, at: u64, above: u64) {
    for (n, r) in s.gpr.iter_mut().enumerate() {
        *r = 0x1111_1111_1111 * n as u64;
    }
    // cl, dx and eax are small.
    (s.gpr[0], s.gpr[1], s.gpr[2], s.gpr[3]) = (0x7777, 0x0403_0201, 0x10, at);
    (s.gpr[4], s.gpr[6], s.gpr[7]) = (at + above, at, at);
    for (n, x) in s.sse.xmm.iter_mut().enumerate() {
        *x = [0x3FF0_1122_3344_5566 + n as u64, 0xFFEE_DDCC_BBAA_9988];
    }
    s.avx = [[0x8877_6655_4433_2211, 0xFFFF_FFFF_FFFF_FFFF]; 16];
    s.sse.xmm[15] = [u64::MAX; 2];
    s.avx[15] = [u64::MAX; 2];
    s.x87.registers[0] = hypervisor::state::Float80 { mantissa: 1 << 63, sign_exponent: 0x4000 };
    (s.x87.in_use, s.cr4) = (1, s.cr4 | CR4_OSXSAVE);
}

/// What a run left: registers but for RIP of the halt, and the two pages.
fn result(run: &mut Run) -> (VcpuState, Vec<u8>) {
    let mut s = run.g.state();
    (s.apic, s.cr2, s.segments[1].selector) = (None, 0, 0);
    let mut pages = vec![0; 0x2000];
    run.g.ram.load_bytes(DATA, &mut pages);
    (s, pages)
}

#[test]
fn one_side_absent_or_read_only() {
    for form in forms() {
        for split in (1..form.bytes).filter(|s| s % form.align == 0) {
            // Of the long ones not every byte.
            if split > 9 && split + 2 < form.bytes && split % 64 != 0 {
                continue;
            }
            let at = EDGE - split;
            let mut whole = Run::new(&form, at, DATA | RW, (DATA + 0x1000) | RW);
            whole.g.run_to_halt();
            let done = result(&mut whole);

            let mut kinds = vec![(0, 0)];
            if form.write {
                kinds.push(((DATA + 0x1000) | PTE_P, PF_PRESENT));
            }
            for (entry, present) in kinds {
                let what = format!("{} at -{split}, second page {entry:#x}", form.name);
                let mut run = Run::new(&form, at, DATA | RW, entry);
                let before = result(&mut run);
                let frame = run.g.run_to_stub();
                let code = present | if form.write { PF_WRITE } else { 0 };
                assert_eq!((frame.vector, frame.error), (14, Some(code)), "{what}: {frame:x?}");
                let fault_at = if form.name == "enter 1" { EDGE.max(at + 8) } else { EDGE };
                assert_eq!(run.g.state().cr2, fault_at, "{what}");
                let after = result(&mut run);
                // `call` and its like set a register first: compare what the instruction itself changes.
                let setup = frame.rip != CODE;
                for r in (0..16).filter(|r| *r != 4 && !setup) {
                    assert_eq!(after.0.gpr[r], before.0.gpr[r], "{what}: register {r}");
                }
                assert_eq!(
                    (&after.0.sse, &after.0.avx, &after.0.x87),
                    (&before.0.sse, &before.0.avx, &before.0.x87),
                    "{what}"
                );
                assert!(after.1 == before.1, "{what}: memory changed");
                // With the page there it runs as if nothing had happened.
                run.g.ram.store::<u64>(run.second, (DATA + 0x1000) | RW);
                let pointer = frame.stack.unwrap().0;
                run.g.edit(|s| (s.rip, s.gpr[4], s.run_state) = (frame.rip, pointer, RunState::Running));
                run.g.run_to_halt();
                let again = result(&mut run);
                assert!(again == done, "{what}: {:x?} instead of {:x?}", again.0, done.0);
            }
            // The first page absent: the fault is at the operand itself.
            let mut run = Run::new(&form, at, 0, (DATA + 0x1000) | RW);
            let frame = run.g.run_to_stub();
            assert_eq!(
                (frame.vector, run.g.state().cr2),
                (14, first_touched(&form, at)),
                "{} at -{split}",
                form.name
            );
        }
    }
}

/// ENTER pushes downwards and IRET pops upwards: the word that holds the first byte of the absent page.
fn first_touched(form: &Form, at: u64) -> u64 {
    match form.name {
        // The first push may lie wholly in the second page.
        "enter 1" if at + 8 < EDGE => at + 8,
        _ => at,
    }
}

#[test]
fn instructions_across_the_edge() {
    // mov rax, imm64: ten bytes.
    let code = assemble(64, 0, |a| asm!(a; mov(rax, 0x1122_3344_5566_7788u64); hlt();));
    for split in 1..=10u64 {
        for (second, code_bits) in [(0, PF_FETCH), ((DATA + 0x1000) | RW | PTE_NX, PF_FETCH | PF_PRESENT)] {
            let mut g = Guest::at_reset();
            let mut tables = Tables::long(&g.ram);
            tables.identity(RAM_BYTES, RW);
            tables.map(WINDOW, DATA | RW, 1);
            let place = tables.map(EDGE, second, 1);
            g.long_with(&tables);
            g.put(DATA + 0x1000 - split, &code);
            g.edit(|s| s.rip = EDGE - split);
            let frame = g.run_to_stub();
            let s = g.state();
            assert_eq!((frame.vector, frame.error, s.cr2), (14, Some(code_bits), EDGE), "split {split}");
            // Whole in the first page: it ran, and the next one faults.
            let ran = split == 10;
            assert_eq!(frame.rip, if ran { EDGE } else { EDGE - split });
            assert_eq!(s.gpr[0], if ran { 0x1122_3344_5566_7788 } else { 0 });
            g.ram.store::<u64>(place, (DATA + 0x1000) | RW);
            g.edit(|s| (s.rip, s.gpr[4], s.run_state) = (frame.rip, STACK, RunState::Running));
            assert_eq!(g.run_to_halt().gpr[0], 0x1122_3344_5566_7788, "split {split}");
        }
    }
}

#[test]
fn what_is_known_from_the_first_page_is_not_fetched_from_the_second() {
    for (bytes, vector) in [(&[0x0F, 0x0B][..], 6), (&[0xCC][..], 3), (&[0xF4][..], 0)] {
        let mut g = Guest::at_reset();
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, RW);
        tables.map(WINDOW, DATA | RW, 1);
        g.long_with(&tables);
        g.put(DATA + 0x1000 - bytes.len() as u64, bytes);
        g.edit(|s| s.rip = EDGE - bytes.len() as u64);
        if vector == 0 {
            g.run_to_halt();
        } else {
            assert_eq!(g.run_to_stub().vector, vector, "{bytes:x?}");
        }
    }
}

#[test]
fn repeated_strings_stop_at_the_edge() {
    for (name, code) in [
        ("movsb", &[0xF3, 0xA4][..]),
        ("stosb", &[0xF3, 0xAA]),
        ("movsq", &[0xF3, 0x48, 0xA5]),
        ("stosw", &[0xF3, 0x66, 0xAB]),
    ] {
        let size = match name {
            "movsq" => 8u64,
            "stosw" => 2,
            _ => 1,
        };
        for offset in [0u64, 1] {
            let form = form("rep", 1, W, |_| {});
            // Starts `offset` bytes off an element's boundary before the edge.
            let at = EDGE - 64 - offset;
            let mut run = Run::new(&form, at, DATA | RW, 0);
            run.g.put(CODE, code);
            run.g.put(CODE + code.len() as u64, &[0xF4]);
            let count = 100;
            run.g.edit(|s| (s.gpr[1], s.gpr[6], s.gpr[0]) = (count, CODE + 0x800, 0x5A5A));
            let frame = run.g.run_to_stub();
            let s = run.g.state();
            let done = (64 + offset) / size;
            assert_eq!((frame.vector, frame.rip, s.cr2), (14, CODE, EDGE), "{name}");
            assert_eq!((s.gpr[1], s.gpr[7]), (count - done, at + done * size), "{name} {offset}");
            run.g.ram.store::<u64>(run.second, (DATA + 0x1000) | RW);
            run.g.edit(|s| (s.rip, s.gpr[4], s.run_state) = (frame.rip, STACK, RunState::Running));
            let s = run.g.run_to_halt();
            assert_eq!((s.gpr[1], s.gpr[7]), (0, at + count * size), "{name} {offset}");
        }
    }
}
