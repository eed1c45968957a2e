//! Random programs: translated code and the interpreter must leave the same registers and memory.
//!
//! A program is straight code with short forward branches, calls and memory operands near page ends; it ends with HLT
//! or in the stub of an exception. Flags that the manual leaves undefined are overwritten before anything reads them; a
//! page fault's frame may show other arithmetic flags (ADR 6). A failing case is one number: `SEED=n`.

#[path = "../../../cpu_soft/tests/guest/harness/mod.rs"]
#[allow(dead_code, unused_imports, unused_macros)]
mod harness;
mod program;

use cpu_soft::SoftHypervisor;
use harness::{CODE, DATA, Guest, KERNEL_STACK, Random, STACK, Stop};
use hypervisor::VcpuState;
use hypervisor::state::X87State;
use program::Program;
use x86_defs::flags::{AF, STATUS};

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

struct Side {
    guest: Guest,
    fresh: VcpuState,
}

impl Side {
    fn new(engine: &SoftHypervisor) -> Self {
        let mut guest = Guest::with_engine("max", engine).into_user64();
        let fresh = guest.state();
        Self { guest, fresh }
    }

    fn run(&mut self, p: &Program) -> Result {
        let g = &mut self.guest;
        let mut state = self.fresh.clone();
        state.gpr = p.gpr;
        state.rip = CODE + u64::from(p.offset);
        state.sse.xmm = p.xmm;
        state.x87 = p.x87;
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
        let at = 0x40 - 24;
        let flags = u64::from_le_bytes(frame[at..at + 8].try_into().unwrap()) & !STATUS;
        frame[at..at + 8].copy_from_slice(&flags.to_le_bytes());
        let through = frame[0x40 - 40..0x40 - 32] == p.end().to_le_bytes();
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

#[test]
fn random_programs_end_alike() {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u64>().ok());
    let programs = number("PROGRAMS").unwrap_or(DEFAULT_PROGRAMS);
    let seeds = match number("SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..programs,
    };
    let mut reference = Side::new(&SoftHypervisor::interpreter());
    let mut translator = Side::new(&harness::translator());
    let (mut faults, mut instructions) = (0, 0);
    for seed in seeds {
        let p = Program::random(&mut Random(seed.wrapping_mul(0xD134_2543_DE82_EF95)));
        let want = reference.run(&p);
        let got = translator.run(&p);
        faults += u64::from(!want.through);
        instructions += p.instructions as u64;
        if want != got {
            let both = want.memory.iter().zip(&got.memory).enumerate();
            let differ: Vec<_> = both.filter(|(_, (a, b))| a != b).take(32).collect();
            panic!(
                "SEED={seed}: {}\nmemory differs at {differ:x?}\ninterpreter {:x?}\ntranslator  {:x?}",
                p,
                Result { memory: Vec::new(), ..want },
                Result { memory: Vec::new(), ..got }
            );
        }
    }
    println!("{programs} programs, {instructions} instructions, {faults} ended in an exception");
}
