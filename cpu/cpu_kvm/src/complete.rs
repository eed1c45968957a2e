//! Completion: the interpreter executes the instruction at RIP that KVM cannot emulate.
//!
//! Called by: the loop of a vCPU, for KVM_EXIT_INTERNAL_ERROR (emulation), when KVM has left the state as it was before
//! the instruction.
//!
//! Invariant: an instruction that cannot be completed has done nothing.

use crate::msr::KeptMsrs;
use crate::partition::Shared;
use crate::state::Processor;
use apic::DEFAULT_BASE;
use cpu_soft::Completer;
use hypervisor::state::RunState;
use hypervisor::{Gpa, VcpuIo, VcpuState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use x86_defs::Exception;

/// Why an instruction cannot be completed.
#[derive(Debug, thiserror::Error)]
pub enum CompleteError {
    /// KVM does not give or take the state.
    #[error("its state: {0}")]
    State(#[from] std::io::Error),
    /// The interpreter does not take it.
    #[error("its state: {0}")]
    Refused(#[from] saved_state::RestoreError),
    /// It accesses the local APIC, which is KVM's.
    #[error("{0} accesses the local APIC in a way that KVM cannot emulate")]
    Apic(String),
}

/// Completes instructions of one vCPU.
pub struct Completion {
    completer: Completer,
    guard: Arc<Guard>,
}

impl Completion {
    /// For vCPU `id`.
    pub fn new(shared: &Shared, id: u32, io: &Arc<dyn VcpuIo>) -> Self {
        let guard = Arc::new(Guard { io: io.clone(), touched: AtomicBool::new(false) });
        Self { completer: Completer::new(&shared.layout, id), guard }
    }

    /// Executes the instruction at RIP and writes back what it changed. Gives its mnemonic and whether the processor is
    /// in shutdown now.
    pub fn run(
        &mut self,
        processor: &Processor<'_>,
        kept: &mut KeptMsrs,
        tsc_offset: u64,
    ) -> Result<(String, bool), CompleteError> {
        let mut before = VcpuState { tsc_offset, ..processor.read(kept)? };
        debug_assert_eq!(
            before,
            VcpuState { tsc_offset, ..processor.asked().read(kept)? },
            "what came with the exit"
        );
        // Older kernels raise #UD for it, too (`Partition`'s KVM_CAP_EXIT_ON_EMULATION_FAILURE).
        let raised = before.exception.take_if(|event| event.exception == Exception::InvalidOpcode);
        self.guard.touched.store(false, Ordering::Relaxed);
        let io: Arc<dyn VcpuIo> = self.guard.clone();
        let done = self.completer.complete(&before, &io)?;
        let (mnemonic, after) = (done.mnemonic(), done.state);
        if self.guard.touched.load(Ordering::Relaxed) {
            return Err(CompleteError::Apic(mnemonic));
        }
        processor.write(&after, Some(&before), kept)?;
        if raised.is_some() || events_of(&after) != events_of(&before) {
            processor.write_events(&after)?;
        }
        Ok((mnemonic, after.run_state == RunState::Shutdown))
    }
}

/// What [`Processor::write_events`] writes.
fn events_of(s: &VcpuState) -> impl PartialEq + '_ {
    (s.run_state, s.shadow, s.nmi_pending, s.nmi_blocked, &s.exception, s.interrupt)
}

/// The machine but for the local APIC's page.
struct Guard {
    io: Arc<dyn VcpuIo>,
    touched: AtomicBool,
}

impl Guard {
    fn is_apic(&self, at: Gpa) -> bool {
        let apic = at.0 & !0xFFF == DEFAULT_BASE;
        if apic {
            self.touched.store(true, Ordering::Relaxed);
        }
        apic
    }
}

impl VcpuIo for Guard {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.io.pio_read(port, data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.io.pio_write(port, data);
    }
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        if !self.is_apic(at) {
            self.io.mmio_read(at, data);
        }
    }
    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        if !self.is_apic(at) {
            self.io.mmio_write(at, data);
        }
    }
    fn pic_ack(&self) -> Option<u8> {
        self.io.pic_ack()
    }
    fn eoi(&self, vector: u8) {
        self.io.eoi(vector);
    }
}
