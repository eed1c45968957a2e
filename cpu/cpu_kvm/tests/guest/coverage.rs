//! Every class of instructions at ring 0 comes out as the interpreter has it: executed by the processor, emulated by KVM, or
//! completed, whatever this host's KVM does with it.

use crate::harness::*;
use crate::instruction_classes::{CLASSES, Class};
use cpu_soft::SoftHypervisor;
use hypervisor::VcpuExit;
use hypervisor::state::Float80;
use x86_defs::control::{CR4_OSXSAVE, XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::cpuid::Feature;

/// What they give depends on time, on chance, or on the host's processor.
const VARIES: &[&str] =
    &["rdtsc", "rdtscp", "rdpid", "rdrand", "rdseed", "rdmsr", "cpuid", "sgdt", "sidt", "smsw/lmsw"];
/// What QEMU's translator has otherwise, on which the laboratory's KVM stands: counters that are read, vectors of #DB and
/// #GP, and exponents of registers that MMX wrote.
const OTHER_IN_QEMU: &[&str] = &["rdpmc", "int1/icebp", "monitor", "movd mm0,[rdi]"];
/// Bytes of a save area that hold where the last x87 instruction was: processors differ.
const X87_POINTERS: std::ops::Range<usize> = 8..24;
/// MXCSR_MASK in a save area, its third byte: AMD's processors also have bit 17, MM (APM volume 1, 4.2.2 MXCSR Register).
const MXCSR_MASK: usize = 30;
const MXCSR_MASK_MM: u8 = 1 << 1;
const FLAGS: u64 = 0xCC1;

/// What an instruction left behind.
#[derive(Debug, PartialEq)]
struct Result {
    exit: VcpuExit,
    /// Vectors of exceptions.
    vectors: Vec<u32>,
    rip: u64,
    gpr: [u64; 16],
    /// Carry, zero, sign, overflow and direction.
    flags: u64,
    x87: ([Float80; 8], u16, u16, u8),
    xmm: [[u64; 2]; 16],
    mxcsr: u32,
    avx: [[u64; 2]; 16],
    memory: Vec<u8>,
}

fn run(g: &mut Guest, (name, code): &Class) -> Result {
    let features = model().unwrap().features;
    g.store(DATA, &[0; 0x3000]);
    g.store(DATA + 24, &0x1F80u32.to_le_bytes());
    g.store(DATA, &if name.contains("mxcsr") { 0x1F80u32 } else { 0x37F }.to_le_bytes());
    if name.contains("xrstors") {
        g.store(DATA + 520, &(1u64 << 63).to_le_bytes());
    }
    g.store(CODE, &[code, &[0xE6, DONE as u8][..]].concat());
    g.board.events.lock().unwrap().clear();
    g.set(0, |s| {
        let (apic, tsc_offset) = (s.apic.take(), s.tsc_offset);
        *s = hypervisor::VcpuState { apic, tsc_offset, ..Default::default() };
        long_registers(s);
        if features.has(Feature::Xsave) {
            s.cr4 |= CR4_OSXSAVE;
            s.xcr0 = XCR0_X87 | XCR0_SSE | if features.has(Feature::Avx) { XCR0_AVX } else { 0 };
        }
        s.gpr = [5, 2, 7, DATA + 0x20, STACK, 0x55, DATA + 0x1000, DATA, 1, 2, 3, 4, 5, 6, 7, 8];
        s.sse.xmm = std::array::from_fn(|n| [n as u64, 0x0102_0304_0506_0708]);
        s.segments[4].base = 0;
    });
    let exit = g.run();
    let state = g.vcpus[0].save().unwrap();
    let mut memory = vec![0; 0x2000];
    g.ram.load_bytes(DATA, &mut memory);
    if saves(name) {
        memory[X87_POINTERS].fill(0);
    }
    let x = &state.x87;
    let vectors =
        g.board.outs().iter().filter(|(port, _)| *port == 0xF0).map(|(_, vector)| *vector).collect();
    Result {
        exit,
        vectors,
        rip: state.rip,
        gpr: state.gpr,
        flags: state.rflags & FLAGS,
        x87: (x.registers, x.control, x.status, x.in_use),
        xmm: state.sse.xmm,
        mxcsr: state.sse.mxcsr,
        avx: state.avx,
        memory,
    }
}

/// Whether there is a save area behind it.
fn saves(name: &str) -> bool {
    name.contains("save") || name.contains("xrstor")
}

#[test]
fn every_class_of_instructions_comes_out_as_on_the_interpreter() {
    let Some(mut kvm) = Guest::new(1) else { return };
    let mut soft = Guest::on(&SoftHypervisor::interpreter(), running_clock(), 1);
    for g in [&kvm, &soft] {
        g.long_tables();
    }
    let in_qemu = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"));
    let (mut wrong, mut more) = (Vec::new(), Vec::new());
    for class in CLASSES {
        let name = class.0;
        let (mut expected, mut seen) = (run(&mut soft, class), run(&mut kvm, class));
        if expected.vectors == [6] && seen.vectors.is_empty() {
            // A processor may have more than the CPU model says; KVM does not hide that.
            more.push(name);
            continue;
        }
        if saves(name) {
            // Only what is more there: the interpreter does not have it.
            seen.memory[MXCSR_MASK] &= expected.memory[MXCSR_MASK] | !MXCSR_MASK_MM;
        }
        if VARIES.iter().any(|other| name.starts_with(other)) {
            for result in [&mut expected, &mut seen] {
                (result.gpr, result.flags) = ([0; 16], 0);
                result.memory.clear();
            }
        }
        if expected != seen && !(in_qemu && OTHER_IN_QEMU.contains(&name)) {
            wrong.push(format!("{name}:\n{}", difference(&expected, &seen)));
        }
    }
    eprintln!("the CPU model lacks what is here: {}", more.join(", "));
    eprintln!("{:?}", kvm.partition.statistics());
    assert!(wrong.is_empty(), "{} of {}\n{}", wrong.len(), CLASSES.len(), wrong.join("\n"));
}

/// The lines in which they differ.
fn difference(expected: &Result, seen: &Result) -> String {
    let text = |result: &Result| format!("{:x?}", Result { memory: Vec::new(), ..copy(result) });
    let at = expected.memory.iter().zip(&seen.memory).position(|(a, b)| a != b);
    format!("  interpreter {}\n  kvm         {}\n  memory differs at {at:x?}", text(expected), text(seen))
}

fn copy(r: &Result) -> Result {
    let Result { exit, vectors, memory, .. } = r;
    Result { exit: exit.clone(), vectors: vectors.clone(), memory: memory.clone(), ..*r }
}
