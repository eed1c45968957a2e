//! The engine's face to the machine: [`SoftHypervisor`], [`SoftPartition`], and [`SoftVcpu`] as a `Vcpu`.

use crate::core::{NO_PAGE, SoftCore};
use crate::hardware::{HardwareEngine, HardwarePartition};
use crate::lockstep::{Lockstep, Report};
use crate::msr::EngineMsrs;
use crate::run::{SLICE, SoftVcpu};
use crate::shared::{Shared, VcpuShared, attention};
use crate::tlb::Tlb;
use crate::translate::{Hot, TranslatorFactory};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use apic::{ApicClock, LocalApic, Message};
use core::sync::atomic::AtomicU64;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};
use hypervisor::{
    Capabilities, EngineError, Hypervisor, IrqSink, Kicker, Msi, MsiRoute, MsiSink, Partition,
    PartitionLayout, Statistics, Trigger, Vcpu, VcpuExit, VcpuIo, VcpuState, Wake,
};
use saved_state::{RestoreError, StateBlob};
use sync::Mutex;
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_emulate::Cpu;

/// Most vCPUs in a partition: 8-bit APIC ids, without the broadcast one.
pub const MAX_VCPUS: u32 = 254;

/// The engine. It has no state of its own.
#[derive(Clone, Default)]
pub struct SoftHypervisor {
    slice: Option<u32>,
    translators: Option<Arc<dyn TranslatorFactory>>,
    hardware: Option<Arc<dyn HardwareEngine>>,
    lockstep: Option<Report>,
}

impl SoftHypervisor {
    /// Interprets everything.
    pub fn interpreter() -> Self {
        Self::default()
    }
    /// Hands hot code to translators.
    pub fn translating(factory: Arc<dyn TranslatorFactory>) -> Self {
        Self { translators: Some(factory), ..Self::default() }
    }
    /// As [`SoftHypervisor::translating`], with all that translated code does compared with the interpreter; for one vCPU.
    /// Differences, and at the end how much was compared, go to `report`.
    pub fn in_lockstep(factory: Arc<dyn TranslatorFactory>, report: Report) -> Self {
        Self { lockstep: Some(report), ..Self::translating(factory) }
    }
    /// Looks at the clock every `instructions`, or behind the block that they end in, instead of every 16,384: for tests
    /// that want interrupts everywhere.
    #[must_use]
    pub fn with_slice(self, instructions: u32) -> Self {
        Self { slice: Some(instructions), ..self }
    }
    /// Lets a processor with virtualization run guest code; the interpreter does what that hands back.
    pub fn on_hardware(engine: Arc<dyn HardwareEngine>) -> Self {
        Self { hardware: Some(engine), ..Self::default() }
    }
}

impl Hypervisor for SoftHypervisor {
    fn capabilities(&self) -> Capabilities {
        if let Some(hardware) = &self.hardware {
            return hardware.capabilities();
        }
        let mut features = FeatureSet::EMPTY;
        Feature::ALL.iter().for_each(|f| features.insert(*f));
        let name = if self.translators.is_some() { "soft" } else { "soft,tier=interp" };
        let (name, max_vcpus) = match self.lockstep {
            Some(_) => ("soft,lockstep", 1),
            None => (name, MAX_VCPUS),
        };
        Capabilities { name, max_vcpus, features, tsc_scaling: true, tsc_khz: None }
    }

    fn create_partition(&self, layout: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError> {
        let Capabilities { features, max_vcpus, .. } = self.capabilities();
        if layout.vcpus > max_vcpus {
            return Err(EngineError::TooManyVcpus { asked: layout.vcpus, max: max_vcpus });
        }
        let missing = features.missing_from(layout.cpu_model.features);
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(Feature::name).collect();
            return Err(EngineError::Features(names.join(", ")));
        }
        let (translators, lockstep) = (self.translators.clone(), self.lockstep.clone());
        let hardware = self.hardware.as_ref().map(|engine| engine.partition(layout)).transpose()?;
        Ok(Box::new(SoftPartition {
            translators,
            hardware,
            lockstep,
            slice: self.slice.map_or(SLICE, i64::from),
            ..SoftPartition::of(Shared::new(layout))
        }))
    }
}

/// A partition of the `soft` engine.
pub struct SoftPartition {
    pub(crate) shared: Arc<Shared>,
    translators: Option<Arc<dyn TranslatorFactory>>,
    hardware: Option<Box<dyn HardwarePartition>>,
    lockstep: Option<Report>,
    slice: i64,
}

impl SoftPartition {
    pub(crate) fn of(shared: Arc<Shared>) -> Self {
        Self { shared, translators: None, hardware: None, lockstep: None, slice: SLICE }
    }

    /// vCPU `id`, which others see as `me`.
    pub(crate) fn vcpu(&self, id: u32, me: Arc<VcpuShared>) -> SoftVcpu {
        let shared = self.shared.clone();
        let clock = ApicClock { clock: shared.clock.clone(), tsc_khz: shared.tsc_khz, tsc_offset: 0 };
        let core = SoftCore {
            cpu: Cpu::default(),
            hot: Hot::default(),
            tlb: Tlb::new(),
            ram: shared.ram.clone(),
            apic: LocalApic::new(id, id == 0, me.inbox.clone(), clock),
            me,
            id,
            io: None,
            block_page: NO_PAGE,
            single: false,
            stale_code: Vec::new(),
            msr: EngineMsrs::default(),
            random_state: shared.clock.wall_ns() ^ u64::from(id) << 56,
            paging_touched: true,
            pauses: 0,
            tape: None,
            shared,
        };
        let translator = self.translators.as_ref();
        let (features, vcpus) = (core.shared.model.features, core.shared.vcpus.len());
        let translator = translator.and_then(|t| t.create(&core.ram, features, vcpus));
        let mut vcpu = SoftVcpu::with_core(Box::new(core), translator, id != 0);
        vcpu.slice = self.slice;
        vcpu
    }
}

impl Partition for SoftPartition {
    fn create_vcpu(&self, id: u32, waker: Arc<dyn Wake>) -> Result<Box<dyn Vcpu>, EngineError> {
        let me = self.shared.vcpus.get(id as usize).ok_or(EngineError::VcpuNumber(id))?.clone();
        if !me.set_waker(waker) {
            return Err(EngineError::VcpuNumber(id));
        }
        let mut vcpu = self.vcpu(id, me);
        vcpu.lockstep = self.lockstep.clone().map(Lockstep::new);
        if let Some(hardware) = &self.hardware {
            vcpu.hardware = Some(hardware.vcpu(id)?);
        }
        Ok(Box::new(vcpu))
    }

    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        Arc::new(Sink(self.shared.clone()))
    }
    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(Sink(self.shared.clone()))
    }

    // Everything is in the vCPUs: local APICs, posted interrupts included.
    fn save(&self) -> Result<Vec<StateBlob>, EngineError> {
        Ok(Vec::new())
    }
    fn restore(&self, blobs: &[StateBlob]) -> Result<(), RestoreError> {
        match blobs.first() {
            None => Ok(()),
            Some(b) => Err(RestoreError::Kind { got: b.kind.clone(), expected: "nothing".into() }),
        }
    }
    fn reset(&self) {}

    fn statistics(&self) -> Statistics {
        let sum =
            |of: fn(&VcpuShared) -> &AtomicU64| self.shared.vcpus.iter().map(|v| of(v).load(Relaxed)).sum();
        let (instructions, busy_ns) = (sum(|v| &v.instructions), sum(|v| &v.busy_ns));
        match &self.hardware {
            None => Statistics { instructions: Some(instructions), busy_ns, ..Statistics::default() },
            Some(hardware) => {
                let mut counts = hardware.counts();
                counts.push(("interpreted".into(), instructions));
                Statistics { instructions: None, busy_ns, counts }
            }
        }
    }
}

struct Sink(Arc<Shared>);

impl IrqSink for Sink {
    fn deliver(&self, msi: Msi) {
        if let Some(message) = Message::from_msi(msi.address, msi.data) {
            self.0.deliver(&message);
        }
    }
    // EOIs of all level-triggered vectors are reported: no filter to keep.
    fn set_ioapic_route(&self, _pin: u32, _msi: Option<Msi>, _trigger: Trigger) {}
    fn pic_line_changed(&self, level: bool) {
        let Some(boot) = self.0.vcpus.first() else { return };
        if boot.inbox.set_extint_line(level) {
            boot.signal(attention::IRQ);
        }
    }
}

impl MsiSink for Sink {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(Box::new(Route { shared: self.0.clone(), state: Mutex::new((None, true)) }))
    }
}

/// The message (if it is one) and whether it is masked.
struct Route {
    shared: Arc<Shared>,
    state: Mutex<(Option<Message>, bool)>,
}

impl MsiRoute for Route {
    fn set(&self, msi: Msi) {
        *self.state.lock() = (Message::from_msi(msi.address, msi.data), false);
    }
    fn fire(&self) {
        let (message, masked) = *self.state.lock();
        if let Some(message) = message.filter(|_| !masked) {
            self.shared.deliver(&message);
        }
    }
    fn mask(&self, masked: bool) {
        self.state.lock().1 = masked;
    }
}

impl Vcpu for SoftVcpu {
    fn id(&self) -> u32 {
        self.core.id
    }
    fn run(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit {
        self.run_guest(io)
    }
    fn kicker(&self) -> Kicker {
        Kicker::new(self.core.me.clone())
    }
    fn save(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.state())
    }
    fn restore(&mut self, state: &VcpuState) -> Result<(), RestoreError> {
        self.set_state(state)
    }
    fn reset(&mut self) {
        let core = &mut *self.core;
        core.cpu = Cpu::default();
        core.apic.reset();
        core.apic.set_tsc_offset(0);
        core.msr = EngineMsrs::default();
        core.me.attention.fetch_or(attention::IRQ, SeqCst);
        self.wait_for_sipi = core.id != 0;
        self.nmi_pending = false;
        self.interrupt = None;
        self.shutdown = false;
        self.forget_code();
    }
}
