//! Random programs: translated code and the interpreter must leave the same registers and memory.
//!
//! `PROGRAMS` says how many of each kind. `program.rs`: straight code with short forward branches, calls and memory operands
//! near page ends; it ends with HLT or in the stub of an exception. `systems.rs`: programs as kernels are, in 64-bit and in
//! 32-bit code, and once more with interrupts between any two blocks. 32-bit code is straight in compatibility mode
//! and in every kind of paging.
//! Flags that the manual leaves undefined are overwritten before anything reads them; a page fault's frame may show other
//! arithmetic flags (ADR 6). A failing case is one number: `SEED=n`.

#[path = "../../../cpu_soft/tests/guest/harness/mod.rs"]
#[allow(dead_code, unused_imports, unused_macros)]
mod harness;
mod program;
mod system;
mod system32;
mod systems;

use cpu_soft::SoftHypervisor;
use harness::{CODE, DATA, GDT, Guest, KERNEL_STACK, RAM_BYTES, Random, STACK, Stop, TABLES, Tables, guest};
use hypervisor::VcpuState;
use hypervisor::state::X87State;
use program::Program;
use std::ops::Range;
use std::sync::atomic::Ordering::SeqCst;
use x86_defs::control::*;
use x86_defs::flags::{AF, STATUS};
use x86_defs::paging::{PTE_P, PTE_U, PTE_W};

const DEFAULT_PROGRAMS: u64 = 4000;

/// What a program leaves.
#[derive(PartialEq, Debug)]
struct Result {
    stop: Stop,
    rip: u64,
    /// It came to its HLT.
    through: bool,
    gpr: [u64; 16],
    flags: u64,
    vector: [[u64; 2]; 16],
    upper: [[u64; 2]; 16],
    mxcsr: u32,
    x87: X87State,
    memory: Vec<u8>,
}

/// Where programs run, at CPL 3.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Long,
    Compatibility,
    Pae,
    Legacy,
    Unpaged,
}

impl Mode {
    fn bits(self) -> u32 {
        if self == Mode::Long { 64 } else { 32 }
    }
    /// Bytes of a word of an exception's frame.
    fn word(self) -> usize {
        if matches!(self, Mode::Long | Mode::Compatibility) { 8 } else { 4 }
    }
}

/// What programs, which may write everywhere, must find as it was: tables of the processor, and page tables.
const TABLE_RANGES: [Range<u64>; 2] = [GDT..CODE, TABLES..TABLES + 0x10000];
/// HLT: code that leads out of RAM ends there.
const NOWHERE: u32 = 0xF4;

struct Side {
    mode: Mode,
    guest: Guest,
    fresh: VcpuState,
    /// Memory of `TABLE_RANGES`.
    tables: [Vec<u8>; 2],
}

fn load(guest: &Guest, range: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (range.end - range.start) as usize];
    guest.ram.load_bytes(range.start, &mut bytes);
    bytes
}

impl Side {
    fn new(engine: &SoftHypervisor, mode: Mode) -> Self {
        let mut guest = Guest::with_engine("max", engine);
        if mode.word() == 8 {
            guest = guest.into_user64();
        } else {
            guest.idt32();
            let mut s = match mode {
                Mode::Pae => paged_state(&guest, &mut Tables::pae(&guest.ram), mode),
                Mode::Legacy => paged_state(&guest, &mut Tables::legacy(&guest.ram), mode),
                _ => guest::protected_state(),
            };
            s.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
            s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
            guest.vcpu.restore(&s).unwrap();
        }
        if mode.bits() == 32 {
            guest.edit(guest::to_user32);
        }
        let fresh = guest.state();
        guest.io.answer.store(NOWHERE, SeqCst);
        let tables = TABLE_RANGES.map(|range| load(&guest, range));
        Self { mode, guest, fresh, tables }
    }

    fn run(&mut self, p: &Program) -> Result {
        let g = &mut self.guest;
        for (range, was) in TABLE_RANGES.into_iter().zip(&self.tables) {
            if load(g, range.clone()) != *was {
                g.put(range.start, was);
            }
        }
        let mut state = self.fresh.clone();
        state.gpr = p.gpr;
        state.rip = CODE + u64::from(p.offset);
        state.sse.xmm = p.xmm;
        state.x87 = p.x87;
        if let Some(segments) = p.segments {
            state.segments[4..6].copy_from_slice(&segments);
        }
        g.vcpu.restore(&state).unwrap();
        g.put(DATA - 0x1000, &p.data);
        g.put(STACK - 0x1000, &[0x5A; 0x1000]);
        g.put(KERNEL_STACK - 0x100, &[0; 0x100]);
        g.put(CODE + u64::from(p.offset), &p.code);
        let stop = g.run();
        let s = g.state();
        let mut memory = vec![0; 0x3000];
        g.ram.load_bytes(DATA - 0x1000, &mut memory);
        let mut stacks = vec![0; 0x1000];
        g.ram.load_bytes(STACK - 0x1000, &mut stacks);
        memory.extend(&stacks);
        let mut frame = vec![0; 0x40];
        g.ram.load_bytes(KERNEL_STACK - 0x40, &mut frame);
        // SS, RSP, RFLAGS, CS, RIP, code from the top.
        let word = self.mode.word();
        let at = 0x40 - 3 * word;
        let flags = u32::from_le_bytes(frame[at..at + 4].try_into().unwrap()) & !(STATUS as u32);
        frame[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        let through = frame[at - 2 * word..at - word] == p.end().to_le_bytes()[..word];
        memory.extend(&frame);
        Result {
            stop,
            rip: s.rip,
            gpr: s.gpr,
            // Delivery keeps flags: where the frame's may differ, these may, too.
            flags: s.rflags & !(if through { AF } else { STATUS }),
            through,
            vector: s.sse.xmm,
            upper: s.avx,
            mxcsr: s.sse.mxcsr,
            x87: s.x87,
            memory,
        }
    }
}

/// Paging with all of RAM where it is, for everybody; `mode` is `Pae` or `Legacy`.
fn paged_state(guest: &Guest, tables: &mut Tables, mode: Mode) -> VcpuState {
    let mut s = guest::protected_state();
    tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
    s.cr0 |= CR0_PG | CR0_WP;
    s.cr3 = tables.root;
    s.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    if mode == Mode::Pae {
        s.cr4 |= CR4_PAE;
        s.pdpte = std::array::from_fn(|n| guest.ram.load(tables.root + 8 * n as u64));
    }
    s
}

fn seeds() -> Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("PROGRAMS").unwrap_or(DEFAULT_PROGRAMS),
    }
}

#[test]
fn random_programs_end_alike() {
    end_alike(Mode::Long, 1, 0);
}

#[test]
fn random_32_bit_programs_end_alike() {
    let modes = [Mode::Compatibility, Mode::Pae, Mode::Legacy, Mode::Unpaged];
    for (n, mode) in modes.into_iter().enumerate() {
        end_alike(mode, modes.len() as u64, n as u64);
    }
}

/// Every `of`-th program, from the `first` on.
fn end_alike(mode: Mode, of: u64, first: u64) {
    let seeds = seeds().filter(|seed| seed % of == first);
    let mut reference = Side::new(&SoftHypervisor::interpreter(), mode);
    let mut translator = Side::new(&harness::translator(), mode);
    let mut programs = 0;
    let (mut faults, mut instructions) = (0, 0);
    for seed in seeds {
        let p = Program::random(&mut Random(seed.wrapping_mul(0xD134_2543_DE82_EF95)), mode.bits());
        let want = reference.run(&p);
        let got = translator.run(&p);
        faults += u64::from(!want.through);
        (programs, instructions) = (programs + 1, instructions + p.instructions as u64);
        if want != got {
            let both = want.memory.iter().zip(&got.memory).enumerate();
            let differ: Vec<_> = both.filter(|(_, (a, b))| a != b).take(32).collect();
            panic!(
                "SEED={seed} in {mode:?}: {}\nmemory differs at {differ:x?}\ninterpreter {:x?}\ntranslator  {:x?}",
                p,
                Result { memory: Vec::new(), ..want },
                Result { memory: Vec::new(), ..got }
            );
        }
    }
    println!("{mode:?}: {programs} programs, {instructions} instructions, {faults} ended in an exception");
}
