//! The seam to hardware, with hardware of our own behind it.

use crate::asm;
use crate::harness::apic::*;
use crate::harness::*;
use cpu_soft::hardware::{Hardware, HardwareEngine, HardwarePartition, Left};
use cpu_soft::{SoftCore, SoftHypervisor};
use hypervisor::state::InterruptShadow;
use hypervisor::{Capabilities, EngineError, Hypervisor, PartitionLayout};
use std::sync::Arc;
use x86_defs::flags;
use x86_defs::paging::{PTE_P, PTE_W};
use x86_emulate::cpu::RIP;

/// A processor that runs two NOPs where there is a shadow, and nothing else.
#[derive(Clone, Copy)]
struct Nops;

impl HardwareEngine for Nops {
    fn capabilities(&self) -> Capabilities {
        SoftHypervisor::interpreter().capabilities()
    }
    fn partition(&self, _: &PartitionLayout) -> Result<Box<dyn HardwarePartition>, EngineError> {
        Ok(Box::new(*self))
    }
}

impl HardwarePartition for Nops {
    fn vcpu(&self, _: u32) -> Result<Box<dyn Hardware>, EngineError> {
        Ok(Box::new(*self))
    }
    fn counts(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

impl Hardware for Nops {
    fn run(&mut self, core: &mut SoftCore) -> Left {
        if !core.cpu.interrupt_shadow {
            return Left::Interpret;
        }
        core.cpu.interrupt_shadow = false;
        core.cpu.gpr[RIP] += 2;
        Left::Service
    }
    fn park(&mut self, _: &mut SoftCore) {}
    fn forget(&mut self) {}
}

/// Vector and place of what comes while an instruction shadows interrupts.
fn behind(shadow: InterruptShadow) -> (u8, u64) {
    let engine = SoftHypervisor::on_hardware(Arc::new(Nops));
    let mut g = Guest::with_engine("max", &engine);
    let mut tables = Tables::long(&g.ram);
    tables.identity(RAM_BYTES, PTE_P | PTE_W);
    g.long_with(&tables);
    let mut g = g.with_x2apic();
    g.code(|a| asm!(a; nop(); nop(); nop(); hlt();));
    g.edit(|s| (s.shadow, s.rflags) = (shadow, s.rflags | flags::IF));
    g.send(NMI);
    let frame = g.run_to_stub();
    (frame.vector, frame.rip - CODE)
}

#[test]
fn an_nmi_comes_right_behind_a_shadow() {
    assert_eq!(behind(InterruptShadow::None), (2, 0));
    assert_eq!(behind(InterruptShadow::Sti), (2, 1));
    assert_eq!(behind(InterruptShadow::MovSs), (2, 1));
}
