//! The `kvm` engine: runs a guest on the host's `/dev/kvm`.
//!
//! - `engine.rs`: [`KvmHypervisor`], what this host's KVM can give. `partition.rs`: memory, interrupts in; `routing.rs`:
//!   those that KVM knows by number.
//!   `doorbells.rs`: writes that do not stop a vCPU. `dirty_log/`: which pages were written.
//! - `probe.rs`: whether this KVM runs real guests.
//! - `vcpu.rs`: the loop of a vCPU: KVM_RUN, and what it returns for. `kick.rs`: how others stop it.
//! - `state/`: to and from `VcpuState`, part by part; the order of a restore stands in `state/mod.rs`.
//! - `time.rs`: guest time is the machine's; KVM's clocks follow it. `cpuid.rs`; `msr.rs`: MSRs kept here.
//! - `complete.rs`: what KVM cannot emulate is done by the interpreter. `statistics.rs`: how often.
//! - `watch.rs`: whether another engine would serve the guest better.
//! - `ioctls.rs`: system calls that `kvm-ioctls` lacks.
//!
//! The local APICs are KVM's ("split irqchip"); I/O APIC, 8259 and timers are the machine's devices.
//! Manual: Linux, Documentation/virt/kvm/api.rst.

mod complete;
mod cpuid;
mod dirty_log;
mod doorbells;
mod engine;
mod ioctls;
mod kick;
mod msr;
mod partition;
mod probe;
mod routing;
mod state;
mod statistics;
mod time;
mod vcpu;
mod watch;

pub use engine::{KvmDevice, KvmHypervisor, KvmUnavailable};
pub use probe::Probe;
pub use watch::on_thread_start;
