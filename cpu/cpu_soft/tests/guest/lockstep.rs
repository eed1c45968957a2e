//! Lockstep finds what a translator does wrong, and nothing else.

use crate::asm;
use crate::harness::*;
use cpu_soft::translate::{Exit, Heat, Place, Translator, TranslatorFactory};
use cpu_soft::{SoftCore, SoftHypervisor};
use guest_memory::GuestRam;
use hypervisor::VcpuExit;
use iced_x86::code_asm::*;
use std::sync::{Arc, Mutex};
use x86_defs::cpuid::FeatureSet;
use x86_defs::flags::{AF, CF, PF, STATUS};
use x86_defs::msr;
use x86_emulate::Core;
use x86_emulate::cpu::RIP;

/// Takes `mov eax, 1; mov [DATA], eax` at CODE, of 5 and 9 bytes, and does it in its own way.
#[derive(Clone, Copy)]
struct Wrong {
    eax: u64,
    stored: u32,
}

impl TranslatorFactory for Wrong {
    fn create(&self, _: &GuestRam, _: FeatureSet, _: usize) -> Option<Box<dyn Translator>> {
        Some(Box::new(*self))
    }
}

impl Translator for Wrong {
    fn threshold(&self) -> u32 {
        0
    }
    fn run(&mut self, core: &mut SoftCore, place: &Place, _: &Heat<'_>) -> Option<Exit> {
        if place.linear != CODE {
            return None;
        }
        core.cpu.gpr[0] = self.eax;
        assert!(core.store::<u32>(DATA, self.stored).is_ok());
        core.cpu.gpr[RIP] = CODE + 14;
        core.hot.budget -= 2;
        Some(Exit::Branch)
    }
    fn forget_page(&mut self, _: u64) {}
    fn forget_all(&mut self) {}
}

/// How it ends and what is said when `factory` runs the program that is made by `code`.
fn ending(factory: Arc<dyn TranslatorFactory>, code: impl FnOnce(&mut CodeAssembler)) -> (VcpuExit, String) {
    let said = Arc::new(Mutex::new(String::new()));
    let hears = said.clone();
    let engine = SoftHypervisor::in_lockstep(factory, Arc::new(move |text| *hears.lock().unwrap() += text));
    let mut g = Guest::with_engine("max", &engine).into_user64();
    g.edit(|s| s.segments = guest::long_state(0).segments);
    g.code(code);
    let exit = g.exit();
    drop(g);
    (exit, said.lock().unwrap().clone())
}

fn wrong(register: u64, stored: u32) -> (VcpuExit, String) {
    ending(Arc::new(Wrong { eax: register, stored }), |a| {
        asm!(a; mov(eax, 1); mov(dword_ptr(DATA), eax); hlt(););
    })
}

#[test]
fn wrong_registers_and_memory_are_told_and_end_the_vm() {
    let (exit, right) = wrong(1, 1);
    assert!(matches!(exit, VcpuExit::Halted { .. }), "{exit:?}");
    assert!(right.contains("2 instructions in 1 runs compared, 0 runs not, 0 differences"), "{right}");
    let (exit, register) = wrong(2, 1);
    assert!(matches!(exit, VcpuExit::Fatal(_)), "{exit:?}");
    assert!(register.contains("register 0: 0x2, interpreter 0x1") && register.contains(", 1 differences"));
    assert!(register.contains("Mov_r32_imm32"), "{register}");
    let (exit, memory) = wrong(1, 3);
    assert!(matches!(exit, VcpuExit::Fatal(_)), "{exit:?}");
    assert!(memory.contains("memory at 0x30000: 0x3, interpreter 0x1"), "{memory}");
}

/// Does `mov edx, 48h; shr edx, 2; pushfq; pop rax` of 10 bytes at CODE, and leaves these flags.
#[derive(Clone, Copy)]
struct Shifts(u64);

impl TranslatorFactory for Shifts {
    fn create(&self, _: &GuestRam, _: FeatureSet, _: usize) -> Option<Box<dyn Translator>> {
        Some(Box::new(*self))
    }
}

impl Translator for Shifts {
    fn threshold(&self) -> u32 {
        0
    }
    fn run(&mut self, core: &mut SoftCore, place: &Place, _: &Heat<'_>) -> Option<Exit> {
        if place.linear != CODE {
            return None;
        }
        core.cpu.gpr[2] = 0x12;
        core.cpu.flags.replace(STATUS, self.0);
        core.cpu.gpr[0] = core.cpu.rflags_all();
        let (stack, flags) = (core.cpu.gpr[4] - 8, core.cpu.gpr[0]);
        assert!(core.store::<u64>(stack, flags).is_ok());
        core.cpu.gpr[RIP] = CODE + 10;
        core.hot.budget -= 4;
        Some(Exit::Branch)
    }
    fn forget_page(&mut self, _: u64) {}
    fn forget_all(&mut self) {}
}

/// A processor sets AF behind a shift (AMD's do), the interpreter clears it; who looks at it is not told a lie by either.
#[test]
fn undefined_flags_that_a_program_stores_are_no_difference() {
    let shifts = |flags| {
        ending(Arc::new(Shifts(flags)), |a| {
            asm!(a; mov(edx, 0x48); shr(edx, 2); pushfq(); pop(rax); hlt(););
        })
    };
    for undefined in [0, AF] {
        let (exit, said) = shifts(PF | undefined);
        assert!(matches!(exit, VcpuExit::Halted { .. }), "{exit:?} {said}");
        assert!(said.contains("4 instructions in 1 runs compared, 0 runs not, 0 differences"), "{said}");
    }
    let (exit, said) = shifts(PF | CF);
    assert!(matches!(exit, VcpuExit::Fatal(_)), "{exit:?}");
    assert!(said.contains("register 0: 0x7, interpreter 0x6") && said.contains(", 1 differences"), "{said}");
}

#[test]
fn the_translator_in_lockstep() {
    // Ports, time, faults, code that changes, pages that go: whatever a run has to do with the world.
    let factory = Arc::new(cpu_translate::Factory { threshold: 0 });
    let (_, said) = ending(factory, |a| {
        let (mut again, mut target) = (a.create_label(), a.create_label());
        asm!(a; mov(ebp, 400););
        a.set_label(&mut again).unwrap();
        asm!(a; rdtsc(); out(0x80, al); in_(al, 0x71); add(dword_ptr(DATA + 8), eax);
            mov(edi, DATA as u32); mov(ecx, 5000); db(&[0xF3, 0xAA]); push(rax); pop(rcx);
            lea(rsi, ptr(target)); mov(byte_ptr(rsi + 1), bpl); invlpg(ptr(DATA));
            mov(ecx, msr::TSC); rdmsr(); shl(rdx, 32); add(rax, rdx); add(rax, 1000); mov(rdx, rax); shr(rdx, 32);
            wrmsr(); cpuid(););
        a.set_label(&mut target).unwrap();
        asm!(a; mov(eax, 7); dec(ebp); jne(again); hlt(););
    });
    assert!(said.contains(" 0 differences"), "{said}");
    assert!(!said.contains("lockstep: 0 instructions"), "{said}");
}
