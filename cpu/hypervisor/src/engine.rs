//! Engines, partitions and vCPUs.
//!
//! A vCPU is run by the thread that owns it: `run` executes guest code until the machine has something to
//! decide. Accesses to ports and devices do not end `run`; they go through [`VcpuIo`], because one
//! instruction may make several.

use crate::cpu_model::CpuModel;
use crate::dirty_log::DirtyLog;
use crate::doorbell::Doorbells;
use crate::interrupt::{IrqSink, MsiSink};
use crate::state::VcpuState;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use guest_memory::{Gpa, GuestRam};
use guest_time::{GuestClock, GuestNs};
use saved_state::{RestoreError, StateBlob, Unsavable};

/// Why an engine refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// More vCPUs than it can run.
    #[error("{asked} vCPUs asked for, this engine runs at most {max}")]
    TooManyVcpus {
        /// Vcpus asked for.
        asked: u32,
        /// Most that it runs.
        max: u32,
    },
    /// A vCPU number outside the layout, or used twice.
    #[error("there is no free vCPU number {0}")]
    VcpuNumber(u32),
    /// The CPU model has something that this engine cannot give.
    #[error("this engine cannot give the CPU features {0}")]
    Features(String),
    /// No more of something.
    #[error("no {0} left")]
    Exhausted(&'static str),
    /// The state cannot be saved.
    #[error(transparent)]
    Unsavable(#[from] Unsavable),
    /// The host's part of the engine failed.
    #[error("the engine failed: {0}")]
    Host(String),
}

/// What an engine can do, known before anything is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Stable name of the engine (`soft`, `kvm`, …).
    pub name: &'static str,
    /// Most vCPUs in a partition.
    pub max_vcpus: u32,
    /// CPU features that it can give a guest.
    pub features: x86_defs::cpuid::FeatureSet,
    /// Whether the guest's TSC may run at a rate other than the host's.
    pub tsc_scaling: bool,
    /// The rate at which the guest's TSC runs best; `None`: any.
    pub tsc_khz: Option<u32>,
}

/// What a partition is made of.
#[derive(Clone)]
pub struct PartitionLayout {
    /// Guest RAM; everything else in the physical address space goes to [`VcpuIo`].
    pub ram: GuestRam,
    /// vCPUs that may be created: numbers 0 to `vcpus - 1`, which are also their APIC ids.
    pub vcpus: u32,
    /// What CPUID says.
    pub cpu_model: CpuModel,
    /// Frequency of the guest's TSC.
    pub tsc_khz: u32,
    /// All guest time.
    pub clock: GuestClock,
}

/// An engine.
pub trait Hypervisor: Send + Sync {
    /// What it can do.
    fn capabilities(&self) -> Capabilities;
    /// Makes a partition.
    fn create_partition(&self, layout: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError>;
}

/// What the vCPUs of a partition have done since it was made. The numbers only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Instructions executed, if the engine counts them.
    pub instructions: Option<u64>,
    /// Time that vCPUs spent executing, summed over them.
    pub busy_ns: GuestNs,
    /// Other things that this engine counts, by name, for people.
    pub counts: Vec<(String, u64)>,
}

impl Statistics {
    /// Adds what was done elsewhere. Instructions stay counted only if all were.
    pub fn add(&mut self, other: &Self) {
        let nothing_yet = *self == Self::default();
        self.instructions = match (self.instructions, other.instructions) {
            (Some(a), Some(b)) => Some(a + b),
            (None, b) if nothing_yet => b,
            _ => None,
        };
        self.busy_ns += other.busy_ns;
        for (name, count) in &other.counts {
            match self.counts.iter_mut().find(|(known, _)| known == name) {
                Some((_, sum)) => *sum += count,
                None => self.counts.push((name.clone(), *count)),
            }
        }
    }

    /// Millions of instructions per second of execution; `None` if they are not counted or nothing ran.
    pub fn mips(&self) -> Option<f64> {
        let instructions = self.instructions.filter(|_| self.busy_ns > 0)?;
        Some(instructions as f64 * 1000.0 / self.busy_ns as f64)
    }
}

/// An engine's VM: vCPUs with their local APICs and a physical address space.
pub trait Partition: Send + Sync {
    /// Creates vCPU `id`. `waker` is called when something arrives for it while it is halted.
    fn create_vcpu(&self, id: u32, waker: Arc<dyn Wake>) -> Result<Box<dyn Vcpu>, EngineError>;
    /// Where the chipset's interrupt controllers send.
    fn irq_sink(&self) -> Arc<dyn IrqSink>;
    /// Where MSI routes come from.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;
    /// Its doorbells, if it has any.
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        None
    }
    /// Its log of written pages, if it has one.
    fn dirty_log(&self) -> Option<Arc<dyn DirtyLog>> {
        None
    }
    /// State of the partition beyond its vCPUs, with all of them stopped.
    fn save(&self) -> Result<Vec<StateBlob>, EngineError>;
    /// Takes over what `save` gave.
    fn restore(&self, blobs: &[StateBlob]) -> Result<(), RestoreError>;
    /// Back to power-on, with all vCPUs stopped.
    fn reset(&self);
    /// What its vCPUs have done so far; also while they run, and then a little late.
    fn statistics(&self) -> Statistics;
}

/// One virtual processor with its local APIC. Owned by the thread that runs it.
pub trait Vcpu: Send {
    /// Its number and APIC id.
    fn id(&self) -> u32;
    /// Runs guest code until the machine has something to decide. Returns at once with
    /// [`VcpuExit::Kicked`] if it was kicked since the last return. (`Arc`: software engines keep it where
    /// instruction handlers find it while they run.)
    fn run(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit;
    /// A handle that makes `run` return.
    fn kicker(&self) -> Kicker;
    /// The whole architectural state. Not while it runs.
    fn save(&mut self) -> Result<VcpuState, EngineError>;
    /// Takes over `state`.
    fn restore(&mut self, state: &VcpuState) -> Result<(), RestoreError>;
    /// Back to power-on: vCPU 0 at the reset vector, others waiting for SIPI.
    fn reset(&mut self);
}

/// The machine as a running vCPU sees it. Called from many vCPU threads at once.
pub trait VcpuIo: Send + Sync {
    /// IN: fills 1, 2 or 4 bytes.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT of 1, 2 or 4 bytes.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// Reads 1 to 8 bytes outside RAM (longer guest accesses come in pieces).
    fn mmio_read(&self, at: Gpa, data: &mut [u8]);
    /// Writes 1 to 8 bytes outside RAM.
    fn mmio_write(&self, at: Gpa, data: &[u8]);
    /// The interrupt acknowledge cycle of the 8259: its vector, `None` if it no longer asks.
    fn pic_ack(&self) -> Option<u8>;
    /// A local APIC ended a level-triggered interrupt.
    fn eoi(&self, vector: u8);
}

/// Why `run` returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// [`Kicker::kick`].
    Kicked,
    /// Nothing to do (HLT, or waiting for SIPI): run again after the waker was called or at `wake_at` in
    /// guest time, whichever comes first. Too early is harmless.
    Halted {
        /// When its timer fires.
        wake_at: Option<GuestNs>,
    },
    /// A fault that nobody could handle: the processor is in shutdown.
    TripleFault,
    /// Another engine would serve this guest better. Unless it is stuck it goes on when `run` is called again, slowly or
    /// not for long, and this is returned once.
    Unsuited {
        /// Why, for people.
        reason: String,
        /// Whether the state can go on elsewhere; otherwise the guest saw things that no other engine has.
        sound: bool,
        /// It cannot go on here: `run` does nothing more until it is kicked.
        stuck: bool,
    },
    /// A breakpoint set from outside the guest.
    DebugStop,
    /// The engine cannot go on; the text says why.
    Fatal(String),
}

/// Makes a halted vCPU's thread (or task) call `run` again. Called from any thread; a wake before the wait
/// must not be lost.
pub trait Wake: Send + Sync {
    /// Wakes it.
    fn wake(&self);
    /// It executes, and something was put where it looks between instructions: a ground on which guest code runs for long
    /// without a look brings it out of there.
    fn interrupt(&self) {}
}

/// The engine's end of a [`Kicker`].
pub trait Kick: Send + Sync {
    /// Makes the vCPU's `run` return [`VcpuExit::Kicked`] soon, or at once when it is next called.
    fn kick(&self);
}

/// Makes one vCPU's `run` return. Clones kick the same vCPU.
#[derive(Clone)]
pub struct Kicker(Arc<dyn Kick>);

impl Kicker {
    /// For engines.
    pub fn new(target: Arc<dyn Kick>) -> Self {
        Self(target)
    }
    /// Kicks; returns without waiting for it.
    pub fn kick(&self) {
        self.0.kick();
    }
}

impl core::fmt::Debug for Kicker {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Kicker")
    }
}
