//! A random program of the kind that kernels are: pages that change under it, faults that are mended, code that changes
//! itself, interrupts, calls of every kind, strings, and other modes on the way.
//!
//! Exceptions and interrupts have a stack of their own (IST 1), which is not compared: a frame may show flags that nothing reads,
//! and an interrupt may come in between any two blocks.

use super::harness::guest::{to_user32, to_user64};
use super::harness::*;
use super::program::{self, value};
use crate::asm;
use hypervisor::VcpuState;
use iced_x86::code_asm::*;
use x86_decode::{Decoded, Instruction, Mnemonic, OpKind, Register, decode};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::paging::*;
use x86_defs::{flags, msr};

/// Pages whose mappings change.
pub const WINDOW: u64 = 0x60_0000;
pub const WINDOW_PAGES: u64 = 8;
/// RAM behind them. The last page of the window starts as another name of the code's first.
pub const FRAMES: u64 = 0x2A_0000;
/// The program's own variables: never a random instruction's.
const OWN: u64 = DATA + 0x8000;
/// What the page-fault handler puts into the window's page table.
pub const DESIRED: u64 = OWN;
/// Counters: page faults, interrupts, system calls, then those of loops.
pub const COUNTERS: u64 = OWN + 0x100;
/// Addresses of the subroutines.
pub const TABLE: u64 = OWN + 0x200;
/// A far pointer to 32-bit code.
pub const FAR: u64 = OWN + 0x300;
/// Handlers lie here, 0x80 bytes each; behind them the 32-bit code.
pub const HANDLERS: u64 = CODE + 0x6000;
const FAR_CODE: u64 = HANDLERS + 0x800;
/// Subroutines lie here, one a page.
const SUBROUTINES: u64 = CODE + 0x2000;
pub const SUBROUTINE_COUNT: u64 = 3;
/// Stack of exceptions and interrupts.
const IST: u64 = 0x2_C000;
pub const IRQ: u8 = 0x41;
pub const CALL_GATE: u8 = 0x80;
/// Counters of what programs did: writes to code, changes of mappings, loads of CR3, INVLPG.
pub const DONE: u64 = OWN + 0x340;
/// Where a subroutine starts: `mov eax, imm32`, whose immediate others write.
pub const PATCHED: u64 = 1;

/// What is compared: code, stacks, data, variables.
pub const COMPARED: [(u64, u64); 4] =
    [(CODE, 0x7000), (STACK - 0x1000, 0x1000), (DATA - 0x1000, 0xA000), (FRAMES, WINDOW_PAGES << 12)];

/// See the module's header.
pub struct System {
    /// 64 or 32.
    pub bits: u32,
    pub user: bool,
    pub offset: u64,
    pub gpr: [u64; 16],
    pub parts: Vec<(u64, Vec<u8>)>,
    pub data: Vec<u8>,
}

/// Where the window's page table is, once the guest's tables are made.
pub fn prepare(g: &mut Guest, tables: &mut Tables) -> u64 {
    let table = tables.entry(WINDOW, 1);
    for vector in 0..=255u8 {
        let at = match vector {
            14 => HANDLERS,
            IRQ => HANDLERS + 0x80,
            CALL_GATE => HANDLERS + 0x100,
            _ => STUBS + u64::from(vector) * 8,
        };
        let [low, high] = gate64(KCODE64, at, 0xEE, 1);
        g.ram.store(IDT + u64::from(vector) * 16, low);
        g.ram.store(IDT + u64::from(vector) * 16 + 8, high);
    }
    g.ram.store(TSS + 0x24, IST);
    table
}

/// What [`counters`] counts.
pub const COUNTED: [&str; 8] = [
    "page faults mended",
    "interrupts",
    "calls of a gate",
    "system calls",
    "writes to code",
    "changed mappings",
    "loads of CR3",
    "INVLPG",
];

/// What a program did.
pub fn counters(g: &Guest) -> [u32; 8] {
    std::array::from_fn(|n| g.get32(if n < 4 { COUNTERS } else { DONE - 16 } + 4 * n as u64))
}

/// Registers of the system's that programs count on.
pub fn state(s: &mut VcpuState) {
    let star = u64::from(KCODE64) << 32 | u64::from(UCODE32 | 3) << 48;
    let all = [(msr::STAR, star), (msr::LSTAR, HANDLERS + 0x180), (msr::SFMASK, flags::IF)];
    s.msrs.retain(|m| all.iter().all(|a| a.0 != m.0));
    s.msrs.extend(all);
    s.msrs.sort_unstable();
}

/// Where subroutine `n` starts.
pub fn subroutine(n: u64) -> u64 {
    SUBROUTINES + (n << 12) + [0x10, 0xFE8, 0xFFC][n as usize]
}

/// A mapping that allows everything.
pub fn entry_of(page: u64) -> u64 {
    page | PTE_P | PTE_W | PTE_U
}

pub fn entry(r: &mut Random) -> u64 {
    entry_of(FRAMES + (r.below(WINDOW_PAGES) << 12))
}

/// What a page of the window is meant to be, and what its table says at first.
pub fn new_entry(r: &mut Random) -> (u64, u64) {
    let desired = entry(r);
    let now = match r.below(4) {
        0 => 0,
        1 => desired & !PTE_W,
        _ => desired,
    };
    (desired, now)
}

/// Somewhere in the window or the data, often near the end of a page.
pub fn place(r: &mut Random) -> u64 {
    let page = if r.one_in(3) { DATA } else { WINDOW + (r.below(WINDOW_PAGES - 2) << 12) };
    match r.below(5) {
        0..=2 => (page + r.below(0x1000)) & !15,
        3 => page + 0x1000 - r.below(40),
        _ => page + r.below(0x1000),
    }
}

/// A program under way.
struct Writer<'a> {
    r: &'a mut Random,
    a: CodeAssembler,
    /// Page table of the window.
    table: u64,
    user: bool,
    loops: u64,
}

impl System {
    pub fn random(r: &mut Random, table: u64) -> Self {
        let user = r.one_in(3);
        let offset = if r.one_in(2) { 0xF00 + r.below(0x100) } else { r.below(0x1000) };
        let mut gpr = [0; 16];
        gpr.iter_mut().for_each(|g| *g = value(r));
        gpr[4] = STACK - 0x400;
        let mut data = vec![0; (WINDOW_PAGES << 12) as usize];
        r.fill(&mut data);
        let mut parts = handlers(table);
        for n in 0..SUBROUTINE_COUNT {
            let at = subroutine(n);
            let mut w = Writer::new(r, table, user, 20 + n);
            w.a.mov(eax, 0x1111u32).unwrap();
            (0..w.r.below(4)).for_each(|_| w.instruction());
            w.a.ret().unwrap();
            parts.push((at, w.a.assemble(at).unwrap()));
            parts.push((TABLE + n * 8, at.to_le_bytes().to_vec()));
        }
        let start = CODE + offset;
        let mut w = Writer::new(r, table, user, 0);
        let count = 4 + w.r.below(16);
        (0..count).for_each(|_| w.fragment(2));
        if !user {
            // What is pending comes.
            let a = &mut w.a;
            asm!(a; sti(); nop(); nop(); cli(););
        }
        w.a.hlt().unwrap();
        parts.push((start, w.a.assemble(start).unwrap()));
        for n in 0..WINDOW_PAGES {
            let frame = if n == WINDOW_PAGES - 1 { entry_of(CODE) } else { entry(r) };
            parts.push((DESIRED + n * 8, frame.to_le_bytes().to_vec()));
            parts.push((table + n * 8, if r.one_in(4) { 0 } else { frame }.to_le_bytes().to_vec()));
        }
        Self { bits: 64, user, offset, gpr, parts, data }
    }

    /// What it starts with.
    pub fn start(&self, fresh: &VcpuState) -> VcpuState {
        let mut s = fresh.clone();
        (s.gpr, s.rip) = (self.gpr, CODE + self.offset);
        match self.bits {
            _ if !self.user => {}
            64 => to_user64(&mut s),
            _ => to_user32(&mut s),
        }
        s
    }

    /// Puts everything into RAM.
    pub fn load(&self, g: &Guest) {
        for (at, len) in COMPARED {
            g.put(at, &vec![0xCC; len as usize]);
        }
        g.put(OWN, &[0; 0x400]);
        g.put(FRAMES, &self.data);
        g.put(DATA - 0x1000, &self.data[..0x4000]);
        self.parts.iter().for_each(|(at, bytes)| g.put(*at, bytes));
    }

    /// The subroutines and the program itself, for people.
    pub fn listing(&self) -> String {
        let program = self.parts.len() - 1 - 2 * WINDOW_PAGES as usize;
        let subroutines = (0..SUBROUTINE_COUNT).map(subroutine);
        let subroutines = subroutines.flat_map(|at| self.parts.iter().find(|part| part.0 == at));
        let all = subroutines.chain([&self.parts[program]]);
        all.map(|(start, code)| program::listing(self.bits, *start, code) + "\n").collect()
    }
}

/// Handlers, and the 32-bit code.
fn handlers(table: u64) -> Vec<(u64, Vec<u8>)> {
    let mut parts = Vec::new();
    let mut add = |n: u64, f: &dyn Fn(&mut CodeAssembler)| {
        let at = HANDLERS + n * 0x80;
        parts.push((at, assemble(64, at, f)));
    };
    // A page of the window becomes what it is meant to be; any other fault is the end.
    add(0, &|a| {
        let mut end = a.create_label();
        asm!(a; push(rax); push(rcx); mov(rax, cr2); sub(rax, WINDOW as i32); shr(rax, 12);
            cmp(rax, WINDOW_PAGES as i32); jae(end); mov(rcx, qword_ptr(rax * 8 + DESIRED));
            mov(qword_ptr(rax * 8 + table), rcx); inc(dword_ptr(COUNTERS)); pop(rcx); pop(rax);
            add(rsp, 8); iretq(););
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    });
    add(1, &|a| {
        asm!(a; inc(dword_ptr(COUNTERS + 4)););
        apic::eoi(a);
        a.iretq().unwrap();
    });
    add(2, &|a| asm!(a; inc(dword_ptr(COUNTERS + 8)); iretq();));
    add(3, &|a| asm!(a; inc(dword_ptr(COUNTERS + 12)); sysretq();));
    let far = assemble(32, FAR_CODE, |a| {
        asm!(a; add(eax, 0x1234); inc(ecx); push(eax); pop(edx); mov(dword_ptr(DATA + 0x3000), ebx);
            cmp(eax, eax); retf(););
    });
    parts.push((FAR_CODE, far));
    let mut pointer = (FAR_CODE as u32).to_le_bytes().to_vec();
    pointer.extend(KCODE32.to_le_bytes());
    parts.push((FAR, pointer));
    parts
}

/// What programs of 64-bit and of 32-bit code are put together by alike.
pub trait Shapes {
    fn parts(&mut self) -> (&mut Random, &mut CodeAssembler);
    /// Number of the next loop.
    fn next_loop(&mut self) -> u64;
    fn fragment(&mut self, depth: u32);

    /// A loop.
    fn turns(&mut self, depth: u32) {
        let counter = COUNTERS + 0x10 + self.next_loop() * 4;
        let (r, a) = self.parts();
        let (n, fragments) = (1 + r.below(40) as u32, 1 + r.below(3));
        a.mov(dword_ptr(counter), n).unwrap();
        let mut top = a.create_label();
        a.set_label(&mut top).unwrap();
        (0..fragments).for_each(|_| self.fragment(depth - 1));
        let (_, a) = self.parts();
        asm!(a; sub(dword_ptr(counter), 1); jne(top););
    }

    /// A branch forwards.
    fn over(&mut self, depth: u32) {
        let (r, a) = self.parts();
        let mut behind = a.create_label();
        match r.below(5) {
            0 => a.jb(behind),
            1 => a.je(behind),
            2 => a.js(behind),
            3 => a.jg(behind),
            _ => a.jmp(behind),
        }
        .unwrap();
        self.fragment(depth - 1);
        // A label needs an instruction of its own.
        let (_, a) = self.parts();
        a.set_label(&mut behind).unwrap();
        a.nop().unwrap();
    }
}

impl Shapes for Writer<'_> {
    fn parts(&mut self) -> (&mut Random, &mut CodeAssembler) {
        (self.r, &mut self.a)
    }
    fn next_loop(&mut self) -> u64 {
        self.loops += 1;
        self.loops - 1
    }
    fn fragment(&mut self, depth: u32) {
        match self.r.below(if self.user { 14 } else { 20 }) {
            0..=4 => self.instruction(),
            5 if depth > 0 => self.turns(depth),
            6 if depth > 0 => self.over(depth),
            7 => self.string(),
            8 | 9 => self.call(),
            10 => self.patch(),
            11 => self.flags(),
            12 if self.user => {
                // R11 shows them all.
                self.a.cmp(r8, r8).unwrap();
                self.a.syscall().unwrap();
            }
            12 => self.far_call(),
            13 => self.a.int(u32::from(CALL_GATE)).unwrap(),
            14 | 15 => self.remap(),
            16 => self.own_interrupt(),
            17 => self.a.sti().unwrap(),
            18 => self.a.cli().unwrap(),
            _ => self.instruction(),
        }
    }
}

impl<'a> Writer<'a> {
    fn new(r: &'a mut Random, table: u64, user: bool, loops: u64) -> Self {
        Self { r, a: CodeAssembler::new(64).unwrap(), table, user, loops }
    }

    /// One instruction of the kind that the other programs are made of, on memory of the window.
    fn instruction(&mut self) {
        let (bytes, insn) = loop {
            let bytes = program::instruction(self.r, 64);
            if let Decoded::Instruction(insn) = decode(&bytes, 64, 0, FeatureSet::of(Feature::ALL))
                && !uses_stack(&insn)
            {
                break (bytes, insn);
            }
        };
        let at = place(self.r);
        if insn.is_string_instruction() {
            let other = place(self.r);
            let a = &mut self.a;
            asm!(a; mov(esi, at as u32); mov(edi, other as u32););
        } else if insn.memory_base().is_gpr() {
            let at = at & if insn.memory_size().size() >= 16 { !15 } else { u64::MAX };
            let at = at.wrapping_sub(insn.memory_displacement64() & 15) as u32;
            match insn.memory_base().full_register() {
                Register::RSI => self.a.mov(esi, at).unwrap(),
                Register::RDI => self.a.mov(edi, at).unwrap(),
                Register::R13 => self.a.mov(r13d, at).unwrap(),
                Register::R14 => self.a.mov(r14d, at).unwrap(),
                Register::R15 => self.a.mov(r15d, at).unwrap(),
                _ => self.a.mov(ebp, at).unwrap(),
            }
        }
        self.a.db(&bytes).unwrap();
        if program::leaves_undefined(&bytes, 64) {
            self.a.cmp(r8, r8).unwrap();
        }
    }

    fn string(&mut self) {
        let (from, mut to, mut count) = (place(self.r) as u32, place(self.r) as u32, self.r.below(70) as u32);
        if self.r.one_in(5) {
            // Onto itself, a little further up or down.
            to = from + self.r.below(20) as u32 - 10;
        }
        if self.r.one_in(6) {
            count = self.r.below(0x280) as u32;
        }
        if self.r.one_in(4) {
            self.a.xor(eax, eax).unwrap();
        }
        let down = self.r.one_in(4);
        if down {
            self.a.std().unwrap();
        }
        let a = &mut self.a;
        asm!(a; mov(esi, from); mov(edi, to); mov(ecx, count););
        let repeat = self.r.pick(&[0xF3u8, 0xF3, 0xF2]);
        let op = self.r.pick(&[0xA4u8, 0xA5, 0xAA, 0xAB, 0xAC, 0xAD, 0xAE, 0xA6]);
        match self.r.below(3) {
            0 => self.a.db(&[op]),
            1 => self.a.db(&[repeat, op]),
            _ => self.a.db(&[repeat, 0x48, op]),
        }
        .unwrap();
        if down {
            self.a.cld().unwrap();
        }
    }

    fn call(&mut self) {
        let n = self.r.below(SUBROUTINE_COUNT);
        let at = subroutine(n);
        match self.r.below(3) {
            0 => self.a.call(at).unwrap(),
            1 => {
                self.a.mov(eax, at as u32).unwrap();
                self.a.call(rax).unwrap();
            }
            _ => self.a.call(qword_ptr(TABLE + n * 8)).unwrap(),
        }
    }

    /// Writes an immediate of code: of a subroutine, of the next instruction, or by the other name of the first page.
    fn patch(&mut self) {
        let byte = self.r.next() as u32 & 0xFF;
        self.a.inc(dword_ptr(DONE)).unwrap();
        match self.r.below(3) {
            0 => {
                let n = self.r.below(SUBROUTINE_COUNT);
                self.a.mov(byte_ptr(subroutine(n) + PATCHED), byte).unwrap();
                self.call();
            }
            1 => {
                let mut target = self.a.create_label();
                let a = &mut self.a;
                asm!(a; lea(rbx, ptr(target)); mov(byte_ptr(rbx + 1), byte); nop(););
                self.a.set_label(&mut target).unwrap();
                let a = &mut self.a;
                asm!(a; mov(eax, 0x2222u32); mov(dword_ptr(DATA + 0x3010), eax););
            }
            _ => {
                let mut target = self.a.create_label();
                let alias = (WINDOW + ((WINDOW_PAGES - 1) << 12)) as u32;
                let a = &mut self.a;
                asm!(a; lea(rbx, ptr(target)); and(ebx, 0xFFF); or(ebx, alias as i32);
                    mov(byte_ptr(rbx + 1), byte););
                self.a.set_label(&mut target).unwrap();
                let a = &mut self.a;
                asm!(a; mov(eax, 0x3333u32); mov(dword_ptr(DATA + 0x3018), eax););
            }
        }
    }

    fn flags(&mut self) {
        let a = &mut self.a;
        match self.r.below(3) {
            0 => asm!(a; cmp(r9, r10); pushfq(); pop(rax); mov(qword_ptr(DATA + 0x3020), rax);),
            1 => {
                let bits = self.r.next() & (flags::STATUS | flags::DF) | flags::FIXED_1;
                let a = &mut self.a;
                asm!(a; pushfq(); and(qword_ptr(rsp), !(flags::STATUS) as i32);
                    or(qword_ptr(rsp), (bits & !flags::DF) as i32); popfq(););
            }
            _ => asm!(a; cmp(r9b, r10b); lahf(); mov(byte_ptr(DATA + 0x3028), ah);),
        }
    }

    fn far_call(&mut self) {
        // call far [FAR], m16:32
        self.a.db(&[0xFF, 0x1C, 0x25]).unwrap();
        let at = (FAR as u32).to_le_bytes();
        self.a.db(&at).unwrap();
    }

    /// Another mapping of a page of the window, at once or by a fault, and what the processor knew of it is dropped.
    fn remap(&mut self) {
        let n = self.r.below(WINDOW_PAGES - 1);
        let (desired, now) = new_entry(self.r);
        let a = &mut self.a;
        asm!(a; mov(rax, desired); mov(qword_ptr(DESIRED + n * 8), rax); mov(rax, now);
            mov(qword_ptr(self.table + n * 8), rax); inc(dword_ptr(DONE + 4)););
        if self.r.one_in(3) {
            let a = &mut self.a;
            asm!(a; mov(rax, cr3); mov(cr3, rax); inc(dword_ptr(DONE + 8)););
        } else {
            let a = &mut self.a;
            asm!(a; invlpg(ptr(WINDOW + (n << 12))); inc(dword_ptr(DONE + 12)););
        }
    }

    fn own_interrupt(&mut self) {
        apic::wrmsr(&mut self.a, apic::X2_SELF_IPI, IRQ.into());
        // The end of a block: there it comes, if it may.
        let mut next = self.a.create_label();
        self.a.jmp(next).unwrap();
        self.a.set_label(&mut next).unwrap();
        self.a.nop().unwrap();
    }
}

/// Instructions that move the stack, or could move it away.
pub fn uses_stack(insn: &Instruction) -> bool {
    insn.is_stack_instruction()
        || (0..insn.op_count()).any(|i| {
            insn.op_kind(i) == OpKind::Register && insn.op_register(i).full_register() == Register::RSP
        })
        || insn.memory_base() == Register::RSP
        // A bit far away may be in a table of the system's.
        || matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && insn.op0_kind() == OpKind::Memory
}
