//! What an engine is, without naming one: partitions, vCPUs, interrupts in, exits out.
//!
//! Implemented by the engines (`cpu_soft`, later KVM and bare metal), used by `machine` and by whoever
//! owns the vCPU threads. Devices see its interrupts alone ([`Msi`], [`MsiSink`]); they meet engines in
//! `machine`.
//!
//! - [`engine`]: [`Hypervisor`] makes a [`Partition`], a partition makes [`Vcpu`]s.
//! - [`state`]: the whole architectural state of a vCPU. [`cpu_model`]: what CPUID says.
//! - [`interrupt`]: how the machine interrupts a partition: [`IrqSink`], [`MsiSink`].
//! - [`doorbell`], [`dirty_log`]: what not every engine can: writes that ring a bell, pages that were written.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod cpu_model;
pub mod dirty_log;
pub mod doorbell;
pub mod engine;
pub mod interrupt;
pub mod state;

pub use cpu_model::{CpuModel, CpuModelError, CpuidContext};
pub use dirty_log::{DirtyLog, PageSet};
pub use doorbell::{Bell, Doorbells};
pub use engine::{
    Capabilities, EngineError, Hypervisor, Kick, Kicker, Partition, PartitionLayout, Statistics, Vcpu,
    VcpuExit, VcpuIo, Wake,
};
pub use guest_memory::{Gpa, GuestRam};
pub use interrupt::{IrqSink, Msi, MsiRoute, MsiSink, Trigger};
pub use state::VcpuState;
