//! Single instructions on the state of another engine's vCPU: what its hardware or its kernel cannot emulate.
//!
//! Called by: `cpu_kvm`. The state that goes in is whole but for the local APIC, which stays with the other engine:
//! here it is switched off, so that an access to its page goes to `VcpuIo` like any other device's.
//!
//! Invariants: one instruction a call, faults delivered; nothing is cached between calls, because the other engine
//! writes RAM unseen.

use crate::engine::SoftPartition;
use crate::run::SoftVcpu;
use crate::shared::Shared;
use alloc::format;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use apic::ApicState;
use hypervisor::{PartitionLayout, VcpuIo, VcpuState};
use saved_state::{RestoreError, to_blob};
use x86_decode::{Decoded, Instruction, decode};
use x86_defs::msr;
use x86_emulate::ModeKey;

/// MSRs whose loading writes guest memory: the other engine's business.
const KVMCLOCK: [u32; 2] = [msr::KVM_SYSTEM_TIME_NEW, msr::KVM_WALL_CLOCK_NEW];

/// What became of an instruction.
#[derive(Clone, Debug)]
pub struct Completed {
    /// The state behind it.
    pub state: VcpuState,
    /// The instruction, unless it cannot be fetched or is none.
    pub instruction: Option<Instruction>,
}

impl Completed {
    /// Its mnemonic, for people.
    pub fn mnemonic(&self) -> String {
        self.instruction
            .map_or("undefined".into(), |insn| format!("{:?}", insn.mnemonic()).to_ascii_lowercase())
    }
}

/// vCPU `id` of a partition of `layout` as after power-up, whatever engine runs it.
pub fn power_up_state(layout: &PartitionLayout, id: u32) -> VcpuState {
    let partition = SoftPartition::of(Shared::without_listener(layout));
    let me = partition.shared.vcpus[id as usize].clone();
    partition.vcpu(id, me).state()
}

/// See the module's header.
pub struct Completer {
    vcpu: SoftVcpu,
    /// The local APIC, switched off.
    no_apic: saved_state::StateBlob,
}

impl Completer {
    /// For vCPU `id` of a partition of `layout`.
    pub fn new(layout: &PartitionLayout, id: u32) -> Self {
        let partition = SoftPartition::of(Shared::without_listener(layout));
        let me = partition.shared.vcpus[id as usize].clone();
        let vcpu = partition.vcpu(id, me);
        let off = ApicState { base: 0, ..vcpu.core.apic.state() };
        Self { vcpu, no_apic: to_blob(&off) }
    }

    /// Executes the instruction at RIP of `state`.
    pub fn complete(&mut self, state: &VcpuState, io: &Arc<dyn VcpuIo>) -> Result<Completed, RestoreError> {
        let mut inside = state.clone();
        inside.apic = Some(self.no_apic.clone());
        inside.msrs.retain(|(number, _)| !KVMCLOCK.contains(number));
        self.vcpu.set_state(&inside)?;
        self.vcpu.core.io = Some(io.clone());
        let instruction = self.instruction();
        self.vcpu.run_one();
        self.vcpu.core.io = None;
        let mut after = self.vcpu.state();
        after.apic.clone_from(&state.apic);
        after.msrs.extend(state.msrs.iter().filter(|(number, _)| KVMCLOCK.contains(number)));
        after.msrs.sort_unstable();
        (after.nmi_pending, after.interrupt) = (state.nmi_pending, state.interrupt);
        Ok(Completed { state: after, instruction })
    }

    fn instruction(&mut self) -> Option<Instruction> {
        let linear = self.vcpu.linear_ip();
        let core = &mut *self.vcpu.core;
        let mut bytes = Vec::with_capacity(x86_decode::MAX_LENGTH);
        for i in 0..x86_decode::MAX_LENGTH as u64 {
            if core.fetch_bytes(linear.wrapping_add(i), 1, &mut bytes).is_err() {
                core.cpu.exc = Default::default();
                break;
            }
        }
        let mode = core.cpu.mode;
        let big = core.cpu.segment(x86_defs::SegmentIndex::Cs).attributes.big();
        let bits = if mode.has(ModeKey::LONG) { 64 } else { 16 << u32::from(big) };
        match decode(&bytes, bits, core.cpu.gpr[x86_emulate::cpu::RIP], core.shared.model.features) {
            Decoded::Instruction(insn) => Some(insn),
            _ => None,
        }
    }
}
