//! As `system.rs`, in 32-bit code at CPL 0 or 3, with PAE's or 32-bit paging: besides, SYSENTER, and far calls of 16-bit
//! code, which is interpreted.
//!
//! At CPL 0 frames lie below the program's own stack: what is there is not compared.

use super::harness::*;
use super::program::{self, value};
use super::system::*;
use crate::asm;
use crate::harness::images::{CODE32, DATA32, DPL3, gate};
use hypervisor::VcpuState;
use iced_x86::code_asm::*;
use x86_decode::{Decoded, Register, decode};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::{flags, msr};

/// Selectors of SYSENTER and SYSEXIT, from this one on.
const SYSENTER_CS: u16 = FREE_SELECTOR;
/// 16-bit code, within the limit of its segment.
const CODE_16: u64 = 0x8000;

/// What random instructions access memory by: another register may lead to the program's own code, and below the stack pointer
/// lies what interrupts left.
const POINTERS: [Register; 3] = [Register::EBP, Register::ESI, Register::EDI];

/// What is compared; of the stack what is above its start.
pub const COMPARED_32: [(u64, u64); 4] =
    [(CODE, 0x7000), (STACK - 0x400, 0x400), (DATA - 0x1000, 0xA000), (FRAMES, WINDOW_PAGES << 12)];

/// The window's page table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Window {
    pub table: u64,
    /// Bytes of an entry.
    pub entry: u64,
}

/// Gates and segments.
pub fn prepare(g: &mut Guest) {
    g.idt32();
    for (vector, n) in [(14, 0), (IRQ, 1), (CALL_GATE, 2)] {
        g.ram.store(IDT + u64::from(vector) * 8, gate(KCODE32, HANDLERS + n * 0x80, 0xEE));
    }
    for (n, attributes) in [CODE32, DATA32, CODE32 | DPL3, DATA32 | DPL3].into_iter().enumerate() {
        g.ram.store(GDT + u64::from(SYSENTER_CS) + 8 * n as u64, descriptor(0, u32::MAX, attributes));
    }
}

/// Registers of the system's that programs count on.
pub fn state(s: &mut VcpuState) {
    let all = [
        (msr::SYSENTER_CS, u64::from(SYSENTER_CS)),
        (msr::SYSENTER_ESP, KERNEL_STACK),
        (msr::SYSENTER_EIP, HANDLERS + 0x180),
    ];
    s.msrs.retain(|m| all.iter().all(|a| a.0 != m.0));
    s.msrs.extend(all);
    s.msrs.sort_unstable();
}

/// A program under way.
struct Writer<'a> {
    r: &'a mut Random,
    a: CodeAssembler,
    window: Window,
    user: bool,
    loops: u64,
}

impl System {
    pub fn random_32(r: &mut Random, window: Window) -> Self {
        let user = r.one_in(2);
        let offset = if r.one_in(2) { 0xF00 + r.below(0x100) } else { r.below(0x1000) };
        let mut gpr = [0; 16];
        gpr.iter_mut().for_each(|g| *g = value(r));
        gpr[4] = STACK - 0x400;
        let mut data = vec![0; (WINDOW_PAGES << 12) as usize];
        r.fill(&mut data);
        let mut parts = handlers(window);
        for n in 0..SUBROUTINE_COUNT {
            let at = subroutine(n);
            let mut w = Writer::new(r, window, user, 20 + n);
            w.a.mov(eax, 0x1111u32).unwrap();
            (0..w.r.below(4)).for_each(|_| w.instruction());
            w.a.ret().unwrap();
            parts.push((at, w.a.assemble(at).unwrap()));
            parts.push((TABLE + n * 8, at.to_le_bytes().to_vec()));
        }
        let start = CODE + offset;
        let mut w = Writer::new(r, window, user, 0);
        let count = 4 + w.r.below(16);
        (0..count).for_each(|_| w.fragment(2));
        if !user {
            // What is pending comes.
            let a = &mut w.a;
            asm!(a; sti(); nop(); nop(); cli(););
        }
        w.a.hlt().unwrap();
        parts.push((start, w.a.assemble(start).unwrap()));
        let bytes = window.entry as usize;
        for n in 0..WINDOW_PAGES {
            let frame = if n == WINDOW_PAGES - 1 { entry_of(CODE) } else { entry(r) };
            parts.push((DESIRED + n * 4, frame.to_le_bytes()[..4].to_vec()));
            let now = if r.one_in(4) { 0 } else { frame };
            parts.push((window.table + n * window.entry, now.to_le_bytes()[..bytes].to_vec()));
        }
        Self { bits: 32, user, offset, gpr, parts, data }
    }
}

/// Handlers, and the 16-bit code.
fn handlers(window: Window) -> Vec<(u64, Vec<u8>)> {
    let mut parts = Vec::new();
    let mut add = |n: u64, f: &dyn Fn(&mut CodeAssembler)| {
        let at = HANDLERS + n * 0x80;
        parts.push((at, assemble(32, at, f)));
    };
    // A page of the window becomes what it is meant to be; any other fault is the end.
    add(0, &|a| {
        let mut end = a.create_label();
        asm!(a; push(eax); push(ecx); mov(eax, cr2); sub(eax, WINDOW as i32); shr(eax, 12);
            cmp(eax, WINDOW_PAGES as i32); jae(end); mov(ecx, dword_ptr(eax * 4 + DESIRED));
            mov(dword_ptr(eax * window.entry as u32 + window.table), ecx); inc(dword_ptr(COUNTERS));
            pop(ecx); pop(eax); add(esp, 4); iretd(););
        a.set_label(&mut end).unwrap();
        a.hlt().unwrap();
    });
    add(1, &|a| {
        asm!(a; inc(dword_ptr(COUNTERS + 4)); pushad(););
        apic::wrmsr(a, apic::X2_EOI, 0);
        asm!(a; popad(); iretd(););
    });
    add(2, &|a| asm!(a; inc(dword_ptr(COUNTERS + 8)); iretd();));
    add(3, &|a| asm!(a; inc(dword_ptr(COUNTERS + 12)); sysexit();));
    let far = assemble(
        16,
        CODE_16,
        |a| asm!(a; add(ax, 0x1234); inc(cx); push(ax); pop(dx); cmp(ax, ax); db(&[0x66, 0xCB]);),
    );
    parts.push((CODE_16, far));
    let mut pointer = (CODE_16 as u32).to_le_bytes().to_vec();
    pointer.extend(KCODE16.to_le_bytes());
    parts.push((FAR, pointer));
    parts
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
            12 if self.user => self.sysenter(),
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
    fn new(r: &'a mut Random, window: Window, user: bool, loops: u64) -> Self {
        Self { r, a: CodeAssembler::new(32).unwrap(), window, user, loops }
    }

    /// One instruction of the kind that the other programs are made of, on memory of the window or the data.
    fn instruction(&mut self) {
        let (bytes, insn) = loop {
            let bytes = program::instruction(self.r, 32);
            if let Decoded::Instruction(insn) = decode(&bytes, 32, 0, FeatureSet::of(Feature::ALL))
                && !uses_stack(&insn)
                && insn.memory_index() == Register::None
                && (!insn.memory_base().is_gpr() || POINTERS.contains(&insn.memory_base()))
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
            match insn.memory_base() {
                Register::ESI => self.a.mov(esi, at).unwrap(),
                Register::EDI => self.a.mov(edi, at).unwrap(),
                _ => self.a.mov(ebp, at).unwrap(),
            }
        }
        self.a.db(&bytes).unwrap();
        if program::leaves_undefined(&bytes, 32) {
            self.a.cmp(eax, eax).unwrap();
        }
    }

    fn string(&mut self) {
        let (from, to, count) = (place(self.r) as u32, place(self.r) as u32, self.r.below(70) as u32);
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
            _ => self.a.db(&[repeat, 0x66, op]),
        }
        .unwrap();
        if down {
            self.a.cld().unwrap();
        }
    }

    fn call(&mut self) {
        let n = self.r.below(SUBROUTINE_COUNT);
        match self.r.below(3) {
            0 => self.a.call(subroutine(n)).unwrap(),
            1 => {
                self.a.mov(eax, subroutine(n) as u32).unwrap();
                self.a.call(eax).unwrap();
            }
            _ => self.a.call(dword_ptr(TABLE + n * 8)).unwrap(),
        }
    }

    /// Writes an immediate of code: of a subroutine, of the next instruction, or by the other name of the first page.
    fn patch(&mut self) {
        let byte = self.r.next() as u8;
        self.a.inc(dword_ptr(DONE)).unwrap();
        match self.r.below(3) {
            0 => {
                let n = self.r.below(SUBROUTINE_COUNT);
                self.a.mov(byte_ptr(subroutine(n) + PATCHED), u32::from(byte)).unwrap();
                self.call();
            }
            1 => {
                // call next; pop ebx; mov byte [ebx + 7], byte; nop; mov eax, 0x2222
                self.a.db(&[0xE8, 0, 0, 0, 0, 0x5B, 0xC6, 0x43, 7, byte, 0x90]).unwrap();
                self.a.db(&[0xB8, 0x22, 0x22, 0, 0]).unwrap();
                self.a.mov(dword_ptr(DATA + 0x3010), eax).unwrap();
            }
            _ => {
                let alias = (WINDOW + ((WINDOW_PAGES - 1) << 12)) as i32;
                self.a.db(&[0xE8, 0, 0, 0, 0, 0x5B]).unwrap();
                let a = &mut self.a;
                asm!(a; and(ebx, 0xFFF); or(ebx, alias););
                // mov byte [ebx + 18], byte; mov eax, 0x3333
                self.a.db(&[0xC6, 0x43, 18, byte, 0xB8, 0x33, 0x33, 0, 0]).unwrap();
                self.a.mov(dword_ptr(DATA + 0x3018), eax).unwrap();
            }
        }
    }

    fn flags(&mut self) {
        let a = &mut self.a;
        match self.r.below(3) {
            0 => asm!(a; cmp(ecx, edx); pushfd(); pop(eax); mov(dword_ptr(DATA + 0x3020), eax);),
            1 => {
                let bits = self.r.next() & flags::STATUS | flags::FIXED_1;
                asm!(a; pushfd(); and(dword_ptr(esp), !(flags::STATUS as i32)); or(dword_ptr(esp), bits as i32);
                    popfd(););
            }
            _ => asm!(a; cmp(cl, dl); lahf(); mov(byte_ptr(DATA + 0x3028), ah);),
        }
    }

    /// Of 16-bit code.
    fn far_call(&mut self) {
        // call far [FAR], m16:32
        self.a.db(&[0xFF, 0x1D]).unwrap();
        self.a.db(&(FAR as u32).to_le_bytes()).unwrap();
    }

    /// It comes back behind itself.
    fn sysenter(&mut self) {
        // call next; pop edx; add edx, 8; mov ecx, esp; sysenter
        self.a.db(&[0xE8, 0, 0, 0, 0, 0x5A, 0x83, 0xC2, 8, 0x89, 0xE1, 0x0F, 0x34]).unwrap();
    }

    /// Another mapping of a page of the window, at once or by a fault, and what the processor knew of it is dropped.
    fn remap(&mut self) {
        let n = self.r.below(WINDOW_PAGES - 1);
        let (desired, now) = new_entry(self.r);
        let at = self.window.table + n * self.window.entry;
        let a = &mut self.a;
        asm!(a; mov(dword_ptr(DESIRED + n * 4), desired as u32); mov(dword_ptr(at), now as u32);
            inc(dword_ptr(DONE + 4)););
        if self.r.one_in(3) {
            let a = &mut self.a;
            asm!(a; mov(eax, cr3); mov(cr3, eax); inc(dword_ptr(DONE + 8)););
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
