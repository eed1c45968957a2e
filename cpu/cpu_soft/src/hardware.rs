//! The seam to a processor with virtualization (docs/adr/0009-bare-metal.md).
//!
//! An engine on hardware is this engine with guest code run by the processor: local APIC, MSRs, CPUID, INIT and SIPI,
//! the delivery of interrupts, saved state and the mailboxes between vCPUs are the same. The hardware is given a
//! [`SoftCore`], runs guest code on its state, and leaves it as the interpreter would between two instructions; what it
//! does not handle itself is the interpreter's next instruction.

use crate::core::SoftCore;
use crate::run::{SoftVcpu, Stop};
use crate::shared::attention;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::AtomicU32;
use core::sync::atomic::Ordering::Relaxed;
use hypervisor::{Capabilities, EngineError, PartitionLayout};

/// Bits of [`SoftCore::attention`] for which guest code is left.
pub const WANTED: u32 = attention::IRQ | attention::STOP | attention::CODE;

/// A kind of processor with virtualization.
pub trait HardwareEngine: Send + Sync {
    /// What the engine can do on it, the interpreter's help included.
    fn capabilities(&self) -> Capabilities;
    /// What a partition of `layout` needs of it.
    fn partition(&self, layout: &PartitionLayout) -> Result<Box<dyn HardwarePartition>, EngineError>;
}

/// A partition's share of the hardware: its second-level page tables and the like.
pub trait HardwarePartition: Send + Sync {
    /// For vCPU `id`.
    fn vcpu(&self, id: u32) -> Result<Box<dyn Hardware>, EngineError>;
    /// What its vCPUs did, by name, for people.
    fn counts(&self) -> Vec<(String, u64)>;
}

/// Why the hardware left guest code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// Something may be due: a timer, an interrupt and its window, a request.
    Service,
    /// The instruction at RIP is the interpreter's.
    Interpret,
    /// So is this one, a PAUSE, and the guest has time: others may have the processor that we run on.
    Spins,
    /// The processor is in shutdown.
    TripleFault,
    /// Others want the processor that we run on.
    Yield,
    /// It cannot go on; the text says why.
    Failed(String),
}

/// One vCPU's hardware.
pub trait Hardware: Send {
    /// Runs guest code. Before and after, all state but that of [`Hardware::park`] is in `core`.
    fn run(&mut self, core: &mut SoftCore) -> Left;
    /// Puts what stayed in the processor's registers (x87, vectors) back into `core`.
    fn park(&mut self, core: &mut SoftCore);
    /// Puts back whatever stayed in the processor: the next one to run this vCPU may be another.
    fn leave(&mut self, core: &mut SoftCore) {
        self.park(core);
    }
    /// RAM and state may be another's now: nothing that was cached of them holds.
    fn forget(&mut self);
}

impl SoftVcpu {
    /// Lets the hardware run guest code until something else has to be looked at; what it hands back is interpreted.
    pub(crate) fn execute_on_hardware(&mut self) -> Stop {
        // An NMI that waits for the end of another keeps attention raised: step by step up to the IRET. One that waits for
        // the end of STI's or MOV SS's shadow is due behind the next instruction, and the hardware is not asked for that.
        if self.nmi_pending && (self.core.cpu.nmi_blocked || self.core.cpu.interrupt_shadow) {
            return self.interpret_one();
        }
        loop {
            let core = &mut *self.core;
            if core.is_wanted() {
                return Stop::Service;
            }
            let Some(hardware) = &mut self.hardware else { return Stop::Service };
            let left = hardware.run(core);
            // The guest changes its page tables unseen.
            core.tlb.flush_all();
            match left {
                Left::Service => return Stop::Service,
                Left::Interpret => match self.interpret_one() {
                    Stop::Service if !self.core.cpu.halted => {}
                    stop => return stop,
                },
                Left::Spins => match self.interpret_one() {
                    Stop::Service => return Stop::Yield,
                    stop => return stop,
                },
                Left::TripleFault => return Stop::TripleFault,
                Left::Yield => return Stop::Yield,
                Left::Failed(reason) => return Stop::Failed(reason),
            }
        }
    }

    /// Runs the one instruction at RIP, with all of the state here.
    fn interpret_one(&mut self) -> Stop {
        if let Some(hardware) = &mut self.hardware {
            hardware.park(&mut self.core);
        }
        let stop = self.run_single();
        self.core.stale_code.clear();
        stop
    }
}

impl SoftCore {
    /// This vCPU's number.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Raised by others when they want something; see [`WANTED`].
    pub fn attention(&self) -> &AtomicU32 {
        &self.me.attention
    }

    /// The general registers, and the word beside them.
    pub fn registers_and_attention(&mut self) -> (&mut [u64; 32], &AtomicU32) {
        (&mut self.cpu.gpr, &self.me.attention)
    }

    /// Whether somebody wants something.
    pub fn is_wanted(&self) -> bool {
        self.attention().load(Relaxed) & WANTED != 0
    }

    /// Whether an interrupt waits for the guest to take interrupts.
    pub fn interrupt_waits(&mut self) -> bool {
        self.apic.pending_vector().is_some() || self.apic.wants_extint()
    }

    /// How many of the host's nanoseconds from now the local APIC's timer is due; `None`: not.
    pub fn timer_due_in(&self) -> Option<u64> {
        self.shared.clock.host_ns_until(self.apic.timer_deadline()?)
    }

    /// What the guest's TSC is made of changes with these: the clock's epoch and this vCPU's own offset.
    pub fn tsc_basis(&self) -> (u64, u64) {
        (self.shared.clock.epoch(), self.apic.clock().tsc_offset)
    }

    /// Whether something happened, since the last call, that makes cached translations of the guest's paging stale.
    pub fn take_paging_touched(&mut self) -> bool {
        core::mem::take(&mut self.paging_touched)
    }
}
