//! The move of a running machine to another engine: the same devices, the same RAM, other processors.
//!
//! Called by: `vmm`'s driver, with vCPUs parked, devices quiet and guest time standing still.
//!
//! Invariant: until all of the new engine's vCPUs have taken their states nothing of the old one has changed.

use crate::host::HostServices;
use crate::machine::{Machine, VcpuSlot};
use alloc::vec::Vec;
use apic::ApicState;
use hypervisor::{EngineError, Hypervisor, Statistics, VcpuState};
use saved_state::RestoreError;

/// Why a machine cannot move.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// It runs there already.
    #[error("it runs on {0} already")]
    SameEngine(&'static str),
    /// One of the engines refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The new engine does not take a vCPU's state.
    #[error("state of vCPU {id}: {source}")]
    State {
        /// Which vCPU.
        id: u32,
        /// Why.
        source: RestoreError,
    },
}

/// The engine that a machine runs on.
pub(crate) struct Engine {
    name: &'static str,
    /// What its vCPUs did on engines before.
    pub(crate) past: Statistics,
}

impl Engine {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, past: Statistics::default() }
    }
}

impl Machine {
    /// Name of the engine that it runs on.
    pub fn engine_name(&self) -> &'static str {
        self.engine.lock().name
    }

    /// Goes over to `engine`. After an error it is as before.
    pub fn move_to(&self, engine: &dyn Hypervisor, host: &dyn HostServices) -> Result<(), MoveError> {
        let name = engine.capabilities().name;
        if name == self.engine_name() {
            return Err(MoveError::SameEngine(name));
        }
        let states = self.vcpu_states()?;
        let partition = engine.create_partition(&self.partition_layout)?;
        let mut vcpus = Vec::new();
        for (id, state) in (0..).zip(&states) {
            let mut vcpu = partition.create_vcpu(id, host.vcpu_wake(id))?;
            vcpu.restore(state).map_err(|source| MoveError::State { id, source })?;
            vcpus.push(vcpu);
        }
        let done = self.switch.partition().statistics();
        self.switch.replace(partition)?;
        self.vcpus.iter().zip(vcpus).for_each(|(slot, vcpu)| slot.replace(vcpu));
        let mut here = self.engine.lock();
        here.name = name;
        here.past.add(&done);
        drop(here);
        self.settle_ends_of(&states).map_err(|source| MoveError::State { id: 0, source })
    }

    fn vcpu_states(&self) -> Result<Vec<VcpuState>, EngineError> {
        let save = |slot: &VcpuSlot| slot.vcpu.lock().save();
        self.vcpus.iter().map(save).collect()
    }

    /// Ends level-triggered interrupts that no processor has any more: their EOI was under way from an engine to the
    /// I/O APIC when the machine was saved.
    pub(crate) fn settle_ends(&self) -> Result<(), RestoreError> {
        match self.vcpu_states() {
            Ok(states) => self.settle_ends_of(&states),
            Err(_) => Ok(()),
        }
    }

    fn settle_ends_of(&self, states: &[VcpuState]) -> Result<(), RestoreError> {
        let mut had = [0u32; 8];
        for state in states {
            let Some(blob) = &state.apic else { return Ok(()) };
            let apic: ApicState = saved_state::from_blob(blob)?;
            for ((word, isr), irr) in had.iter_mut().zip(apic.isr).zip(apic.irr) {
                *word |= isr | irr;
            }
            if let Some(vector) = state.interrupt {
                had[usize::from(vector / 32)] |= 1 << (vector % 32);
            }
        }
        let mut ioapic = self.ioapic.lock();
        for vector in ioapic.awaited_ends() {
            if had[usize::from(vector / 32)] & 1 << (vector % 32) == 0 {
                ioapic.end_of_interrupt(vector);
            }
        }
        Ok(())
    }
}
