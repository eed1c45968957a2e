//! Local APIC from both sides: messages into the partition, and code that programs it in x2APIC mode.

use super::guest::Guest;
use super::layout::CODE;
use hypervisor::state::RunState;
use hypervisor::{IrqSink, Msi};
use iced_x86::code_asm::*;
use std::sync::Arc;
use x86_defs::msr;

/// x2APIC registers by MSR number.
pub const X2_TPR: u32 = 0x808;
pub const X2_EOI: u32 = 0x80B;
pub const X2_SVR: u32 = 0x80F;
pub const X2_ICR: u32 = 0x830;
pub const X2_LVT_TIMER: u32 = 0x832;
pub const X2_INITIAL: u32 = 0x838;
pub const X2_CURRENT: u32 = 0x839;
pub const X2_DIVIDE: u32 = 0x83E;
pub const X2_SELF_IPI: u32 = 0x83F;

/// Delivery modes in a message's data.
pub const NMI: u32 = 4 << 8;
pub const LEVEL: u32 = 3 << 14;

/// A message to physical APIC `id`.
pub fn send(sink: &Arc<dyn IrqSink>, id: u32, data: u32) {
    sink.deliver(Msi { address: 0xFEE0_0000 | u64::from(id) << 12, data });
}

/// WRMSR of a constant (64-bit or 32-bit code; RAX, RCX, RDX are lost).
pub fn wrmsr(a: &mut CodeAssembler, number: u32, value: u64) {
    a.mov(ecx, number).unwrap();
    a.mov(eax, value as u32).unwrap();
    a.mov(edx, (value >> 32) as u32).unwrap();
    a.wrmsr().unwrap();
}
/// End of interrupt; registers are kept.
pub fn eoi(a: &mut CodeAssembler) {
    a.push(rax).unwrap();
    a.push(rcx).unwrap();
    a.push(rdx).unwrap();
    wrmsr(a, X2_EOI, 0);
    a.pop(rdx).unwrap();
    a.pop(rcx).unwrap();
    a.pop(rax).unwrap();
}
/// Switches to x2APIC mode and enables the APIC.
pub fn enable_x2apic(a: &mut CodeAssembler) {
    a.mov(ecx, msr::APIC_BASE).unwrap();
    a.rdmsr().unwrap();
    a.or(eax, 0xC00).unwrap();
    a.wrmsr().unwrap();
    wrmsr(a, X2_SVR, 0x1FF);
}

impl Guest {
    /// With the local APIC in x2APIC mode and enabled, by a short program before the test's (64-bit mode).
    pub fn with_x2apic(mut self) -> Self {
        let before = self.state();
        self.code(|a| {
            enable_x2apic(a);
            a.hlt().unwrap();
        });
        self.run_to_halt();
        self.put(CODE, &[0; 256]);
        self.edit(|s| {
            let apic = s.apic.take();
            *s = before;
            (s.apic, s.run_state) = (apic, RunState::Running);
        });
        self
    }
    /// Sends a message with `data` to vCPU 0.
    pub fn send(&self, data: u32) {
        send(&self.partition.irq_sink(), 0, data);
    }
}
