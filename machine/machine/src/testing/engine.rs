//! A hypervisor whose vCPUs play a list of accesses instead of executing instructions.

use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use hypervisor::{
    Bell, Capabilities, Doorbells, EngineError, Gpa, Hypervisor, IrqSink, Kick, Kicker, Msi, MsiRoute,
    MsiSink, Partition, PartitionLayout, Statistics, Trigger, Vcpu, VcpuExit, VcpuIo, VcpuState, Wake,
};
use saved_state::{RestoreError, StateBlob};
use sync::Mutex;

/// What a vCPU does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// IN of so many bytes; the value is kept in [`Played`].
    In(u16, usize),
    /// OUT of so many bytes.
    Out(u16, usize, u32),
    /// A read of memory-mapped I/O.
    Read(u64, usize),
    /// A write.
    Write(u64, usize, u64),
    /// The acknowledge cycle of the 8259.
    Acknowledge,
    /// End of a level-triggered interrupt.
    Eoi(u8),
    /// `run` returns.
    Exit(VcpuExit),
}

/// What came of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Played {
    /// Values read, in order.
    pub values: Vec<u64>,
    /// Vectors acknowledged.
    pub acknowledged: Vec<Option<u8>>,
}

/// What reached the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    /// Messages of the I/O APIC, other chips, and MSI routes.
    pub messages: Vec<Msi>,
    /// Level of the 8259's INTR.
    pub pic_level: bool,
}

#[derive(Default)]
struct Shared {
    heard: Mutex<Heard>,
    steps: Mutex<VecDeque<Step>>,
    played: Mutex<Played>,
    bells: Mutex<BTreeMap<u64, i32>>,
}

/// See the module's header. Clones are the same engine.
#[derive(Clone, Default)]
pub struct ScriptEngine(Arc<Shared>);

impl ScriptEngine {
    /// Adds steps; whichever vCPU runs first plays them.
    pub fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.0.steps.lock().extend(steps);
    }
    /// What came of the steps so far; forgets it.
    pub fn take_played(&self) -> Played {
        core::mem::take(&mut self.0.played.lock())
    }
    /// Messages that arrived since the last call.
    pub fn take_messages(&self) -> Vec<Msi> {
        core::mem::take(&mut self.0.heard.lock().messages)
    }
    /// Bells by their addresses.
    pub fn bells(&self) -> BTreeMap<u64, i32> {
        self.0.bells.lock().clone()
    }
    /// Level of the 8259's INTR.
    pub fn pic_level(&self) -> bool {
        self.0.heard.lock().pic_level
    }
}

impl Hypervisor for ScriptEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "script",
            max_vcpus: 8,
            features: hypervisor::CpuModel::max().features,
            tsc_scaling: true,
            tsc_khz: None,
        }
    }
    fn create_partition(&self, _: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError> {
        Ok(Box::new(self.clone()))
    }
}

impl Partition for ScriptEngine {
    fn create_vcpu(&self, id: u32, _: Arc<dyn Wake>) -> Result<Box<dyn Vcpu>, EngineError> {
        Ok(Box::new(ScriptVcpu { id, shared: self.0.clone(), state: VcpuState::default() }))
    }
    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        Arc::new(self.clone())
    }
    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(self.clone())
    }
    fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        Some(Arc::new(self.clone()))
    }
    fn save(&self) -> Result<Vec<StateBlob>, EngineError> {
        Ok(Vec::new())
    }
    fn restore(&self, _: &[StateBlob]) -> Result<(), RestoreError> {
        Ok(())
    }
    fn reset(&self) {}
    fn statistics(&self) -> Statistics {
        Statistics::default()
    }
}

impl Doorbells for ScriptEngine {
    fn attach(&self, at: Gpa, bell: &dyn Bell) -> Result<(), EngineError> {
        match self.0.bells.lock().insert(at.0, bell.descriptor()) {
            None => Ok(()),
            Some(_) => Err(EngineError::Exhausted("room at this address")),
        }
    }
    fn detach(&self, at: Gpa, bell: &dyn Bell) {
        let was = self.0.bells.lock().remove(&at.0);
        assert_eq!(was, Some(bell.descriptor()), "another bell stands at {at}");
    }
}

impl IrqSink for ScriptEngine {
    fn deliver(&self, msi: Msi) {
        self.0.heard.lock().messages.push(msi);
    }
    fn set_ioapic_route(&self, _: u32, _: Option<Msi>, _: Trigger) {}
    fn pic_line_changed(&self, level: bool) {
        self.0.heard.lock().pic_level = level;
    }
}

impl MsiSink for ScriptEngine {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(Box::new(Route { shared: self.0.clone(), state: Mutex::new((Msi::default(), true)) }))
    }
}

struct Route {
    shared: Arc<Shared>,
    state: Mutex<(Msi, bool)>,
}

impl MsiRoute for Route {
    fn set(&self, msi: Msi) {
        *self.state.lock() = (msi, false);
    }
    fn fire(&self) {
        let (msi, masked) = *self.state.lock();
        if !masked {
            self.shared.heard.lock().messages.push(msi);
        }
    }
    fn mask(&self, masked: bool) {
        self.state.lock().1 = masked;
    }
}

struct ScriptVcpu {
    id: u32,
    shared: Arc<Shared>,
    state: VcpuState,
}

struct NoKick;

impl Kick for NoKick {
    fn kick(&self) {}
}

impl Vcpu for ScriptVcpu {
    fn id(&self) -> u32 {
        self.id
    }
    fn run(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit {
        loop {
            let Some(step) = self.shared.steps.lock().pop_front() else {
                return VcpuExit::Halted { wake_at: None };
            };
            let mut data = [0; 8];
            let value = |value: u64| self.shared.played.lock().values.push(value);
            match step {
                Step::In(port, width) => {
                    io.pio_read(port, &mut data[..width]);
                    value(device::read_le(&data[..width]));
                }
                Step::Out(port, width, v) => io.pio_write(port, &v.to_le_bytes()[..width]),
                Step::Read(at, width) => {
                    io.mmio_read(Gpa(at), &mut data[..width]);
                    value(device::read_le(&data[..width]));
                }
                Step::Write(at, width, v) => io.mmio_write(Gpa(at), &v.to_le_bytes()[..width]),
                Step::Acknowledge => {
                    let vector = io.pic_ack();
                    self.shared.played.lock().acknowledged.push(vector);
                }
                Step::Eoi(vector) => io.eoi(vector),
                Step::Exit(exit) => return exit,
            }
        }
    }
    fn kicker(&self) -> Kicker {
        Kicker::new(Arc::new(NoKick))
    }
    fn save(&mut self) -> Result<VcpuState, EngineError> {
        Ok(self.state.clone())
    }
    fn restore(&mut self, state: &VcpuState) -> Result<(), RestoreError> {
        self.state = state.clone();
        Ok(())
    }
    fn reset(&mut self) {
        self.state = VcpuState::default();
    }
}
