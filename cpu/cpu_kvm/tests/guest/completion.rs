//! What KVM cannot emulate is completed by the interpreter: on this host's KVM that may be much or nothing, the result is
//! the same.

use crate::harness::*;
use iced_x86::code_asm::*;
use x86_defs::control::{CR4_OSXSAVE, XCR0_AVX, XCR0_SSE, XCR0_X87};

/// Runs `code` in long mode with SSE and AVX enabled, and gives the guest.
fn run(code: impl FnOnce(&mut CodeAssembler)) -> Option<Guest> {
    let mut g = Guest::new(1)?;
    g.long();
    let avx = model()?.features.has(x86_defs::cpuid::Feature::Avx);
    g.set(0, |s| {
        if avx {
            s.cr4 |= CR4_OSXSAVE;
            s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        }
        s.gpr[7] = DATA;
    });
    g.gate(3, HANDLERS + 0x9000);
    g.assemble(64, HANDLERS + 0x9000, |a| {
        a.inc(qword_ptr(DATA + 0x800)).unwrap();
        a.iretq().unwrap();
    });
    g.assemble(64, CODE, |a| {
        code(a);
        a.out(i32::from(DONE), al).unwrap();
    });
    g.run_to_done();
    Some(g)
}

#[test]
fn wide_exchange() {
    let Some(g) = run(|a| {
        a.mov(qword_ptr(rdi), 7).unwrap();
        a.mov(qword_ptr(rdi + 8), 9).unwrap();
        a.mov(eax, 7).unwrap();
        a.mov(edx, 9).unwrap();
        a.mov(ebx, 1).unwrap();
        a.mov(ecx, 2).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
        a.setz(byte_ptr(rdi + 16)).unwrap();
        a.lock().cmpxchg16b(xmmword_ptr(rdi)).unwrap();
        a.setz(byte_ptr(rdi + 17)).unwrap();
        a.mov(qword_ptr(rdi + 24), rax).unwrap();
    }) else {
        return;
    };
    assert_eq!([g.load(DATA), g.load(DATA + 8), g.load(DATA + 16), g.load(DATA + 24)], [1, 2, 1, 1]);
}

#[test]
fn breakpoint_through_the_idt() {
    let Some(g) = run(|a| {
        a.int3().unwrap();
        a.int3().unwrap();
    }) else {
        return;
    };
    assert_eq!(g.load(DATA + 0x800), 2);
}

#[test]
fn floating_point_and_vectors() {
    let Some(g) = run(|a| {
        a.fninit().unwrap();
        a.fld1().unwrap();
        a.fldpi().unwrap();
        a.faddp(st1, st0).unwrap();
        a.fstp(qword_ptr(rdi)).unwrap();
        a.fnstcw(word_ptr(rdi + 8)).unwrap();
        a.mov(eax, 5).unwrap();
        a.cvtsi2sd(xmm1, eax).unwrap();
        a.mulsd(xmm1, xmm1).unwrap();
        a.movups(xmmword_ptr(rdi + 16), xmm1).unwrap();
        a.movq(xmm2, rdi).unwrap();
        a.movups(xmmword_ptr(rdi + 32), xmm2).unwrap();
        a.stmxcsr(dword_ptr(rdi + 48)).unwrap();
    }) else {
        return;
    };
    assert_eq!(f64::from_bits(g.load(DATA)), 1.0 + std::f64::consts::PI);
    assert_eq!(g.load(DATA + 8) & 0xFFFF, 0x37F);
    assert_eq!([g.load(DATA + 16), g.load(DATA + 24)], [25.0f64.to_bits(), 0]);
    assert_eq!([g.load(DATA + 32), g.load(DATA + 40), g.load(DATA + 48)], [DATA, 0, 0x1F80]);
}

#[test]
fn avx_bits_and_counts() {
    use x86_defs::cpuid::Feature::{Avx2, Bmi1, Bmi2, Popcnt};
    let Some(model) = model() else { return };
    if [Avx2, Bmi1, Bmi2, Popcnt].iter().any(|f| !model.features.has(*f)) {
        eprintln!("not run: this processor has no AVX2, BMI or POPCNT");
        return;
    }
    let Some(g) = run(|a| {
        a.mov(rax, 0x0101_0101_0101_0101u64).unwrap();
        a.popcnt(rdx, rax).unwrap();
        a.mov(qword_ptr(rdi), rdx).unwrap();
        a.andn(rdx, rax, rdi).unwrap();
        a.mov(qword_ptr(rdi + 8), rdx).unwrap();
        a.rorx(rdx, rax, 4).unwrap();
        a.mov(qword_ptr(rdi + 16), rdx).unwrap();
        a.movq(xmm0, rax).unwrap();
        a.vpbroadcastq(ymm1, xmm0).unwrap();
        a.vpaddq(ymm1, ymm1, ymm1).unwrap();
        a.vmovdqu(ymmword_ptr(rdi + 32), ymm1).unwrap();
        a.vzeroupper().unwrap();
        a.xor(ecx, ecx).unwrap();
        a.xgetbv().unwrap();
        a.mov(qword_ptr(rdi + 24), rax).unwrap();
    }) else {
        return;
    };
    let ones = 0x0101_0101_0101_0101u64;
    assert_eq!([g.load(DATA), g.load(DATA + 8), g.load(DATA + 16)], [8, !ones & DATA, ones.rotate_right(4)]);
    assert_eq!(g.load(DATA + 24), 7);
    assert_eq!((0..4).map(|i| g.load(DATA + 32 + 8 * i)).collect::<Vec<_>>(), [2 * ones; 4]);
}

#[test]
fn segment_questions() {
    let Some(g) = run(|a| {
        a.mov(eax, 0x18).unwrap();
        a.lar(ecx, eax).unwrap();
        a.mov(dword_ptr(rdi), ecx).unwrap();
        a.lsl(ecx, eax).unwrap();
        a.mov(dword_ptr(rdi + 4), ecx).unwrap();
        a.verw(ax).unwrap();
        a.setz(byte_ptr(rdi + 8)).unwrap();
    }) else {
        return;
    };
    // LAR: bits 16 to 19 are left open (SDM, LAR).
    assert_eq!([g.load(DATA) & !0xF_0000, g.load(DATA + 8)], [0xFFFF_FFFF_00C0_9300, 1]);
}

#[test]
fn a_fault_of_a_completed_instruction_and_device_memory() {
    let Some(g) = run(|a| {
        a.mov(ebx, MMIO as u32).unwrap();
        a.movq(xmm0, rbx).unwrap();
        a.movups(xmm3, xmmword_ptr(rbx)).unwrap();
        a.paddd(xmm3, xmmword_ptr(rbx)).unwrap();
        a.movups(xmmword_ptr(rdi), xmm3).unwrap();
        // Not mapped: #PF in its handler.
        a.mov(rbx, 0x10_0000_0000u64).unwrap();
        a.paddd(xmm3, xmmword_ptr(rbx)).unwrap();
    }) else {
        return;
    };
    assert_eq!(g.board.outs(), [(0xF0, 14)]);
    let reads = |at| g.board.events.lock().unwrap().iter().filter(|e| **e == Event::Read(at)).count();
    assert!(reads(MMIO) >= 2, "{:?}", g.board.events.lock().unwrap());
    assert_eq!(g.load(DATA), 0);
}
