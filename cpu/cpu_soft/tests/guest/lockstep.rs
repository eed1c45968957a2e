//! Lockstep finds what a translator does wrong, and nothing else.

use crate::asm;
use crate::harness::*;
use cpu_soft::translate::{Exit, Heat, Note, Place, Translator, TranslatorFactory};
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

/// Does the `instructions` at CODE, of so many `bytes`, in its own way.
#[derive(Clone)]
struct Fake {
    bytes: u64,
    instructions: i64,
    does: Arc<dyn Fn(&mut SoftCore) + Send + Sync>,
}

impl TranslatorFactory for Fake {
    fn create(&self, _: &GuestRam, _: FeatureSet, _: usize) -> Option<Box<dyn Translator>> {
        Some(Box::new(self.clone()))
    }
}

impl Translator for Fake {
    fn threshold(&self) -> u32 {
        0
    }
    fn run(&mut self, core: &mut SoftCore, place: &Place, _: &Heat<'_>, _: &mut Note) -> Option<Exit> {
        if place.linear != CODE {
            return None;
        }
        (self.does)(core);
        core.cpu.gpr[RIP] = CODE + self.bytes;
        core.hot.budget -= self.instructions;
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
    let does = move |core: &mut SoftCore| {
        core.cpu.gpr[0] = register;
        assert!(core.store::<u32>(DATA, stored).is_ok());
    };
    ending(Arc::new(Fake { bytes: 14, instructions: 2, does: Arc::new(does) }), |a| {
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

/// A shift, behind which `stored` are the flags that PUSHF finds and `left` those at the end.
fn shifts(stored: u64, left: u64) -> (VcpuExit, String) {
    let does = move |core: &mut SoftCore| {
        core.cpu.flags.replace(STATUS, stored);
        let (stack, flags) = (core.cpu.gpr[4] - 8, core.cpu.rflags_all());
        (core.cpu.gpr[0], core.cpu.gpr[2]) = (flags, 0x12);
        assert!(core.store::<u64>(stack, flags).is_ok());
        core.cpu.flags.replace(STATUS, left);
    };
    ending(Arc::new(Fake { bytes: 10, instructions: 4, does: Arc::new(does) }), |a| {
        let mut carry = a.create_label();
        asm!(a; mov(edx, 0x48); shr(edx, 2); pushfq(); pop(rax); jb(carry); cmp(rax, 0x16); je(carry); ud2(););
        a.set_label(&mut carry).unwrap();
        asm!(a; hlt(););
    })
}

/// A processor sets AF behind a shift (AMD's do), the interpreter clears it; who looks at it is not told a lie by either.
#[test]
fn undefined_flags_that_a_program_stores_are_no_difference() {
    let (exit, said) = shifts(PF | AF, PF | AF);
    assert!(matches!(exit, VcpuExit::Halted { .. }), "{exit:?} {said}");
    assert!(said.contains("4 instructions in 1 runs compared, 0 runs not, 0 differences"), "{said}");
    for stored in [PF | CF, PF | CF | AF] {
        let (exit, said) = shifts(stored, PF | AF);
        assert!(matches!(exit, VcpuExit::Fatal(_)), "{exit:?}");
        assert!(said.contains("register 0: ") && said.contains(", 1 differences"), "{said}");
    }
}

/// The interpreter goes astray (to UD2) where its own AF is stored; that does not excuse a wrong carry at the end.
#[test]
fn a_wrong_flag_behind_undefined_ones_is_a_difference() {
    let (exit, said) = shifts(PF | AF, PF | CF | AF);
    assert!(matches!(exit, VcpuExit::Fatal(_)), "{exit:?} {said}");
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
