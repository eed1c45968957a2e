//! The `soft` engine: runs a whole guest in software, on any host.
//!
//! - [`SoftHypervisor`] makes partitions; `engine.rs` is its face to the machine.
//! - `run.rs`: the loop of a vCPU: find a block, run it, take interrupts in between; `single.rs`: one instruction by itself.
//! - `block.rs`: decoded code; `cache.rs`: what is kept of it, found by `places.rs`. `mmu.rs`, `tlb.rs` and `walked.rs`: paging; `core.rs`: memory as instructions see it;
//!   `pieces.rs`: what of it crosses pages or is no RAM.
//! - `shared.rs`: what vCPUs share, and how self-modifying code is noticed; `mixed.rs`: where that costs too much.
//! - `complete.rs`: single instructions for other engines.
//! - `stack_fault.rs`: #SS for non-canonical addresses.
//! - `translate.rs`: the seam to a translator (`cpu_translate`), which takes over hot code.
//! - `lockstep.rs`: translated code and the interpreter side by side.
//! - `hardware.rs`: the seam to a processor with virtualization (`cpu_svm`), which runs all code but what it hands back.
//! - `msr.rs`: MSRs of the engine, kvmclock; `cpuid.rs`; `state.rs`: to and from `VcpuState`.
//!
//! What instructions do is `x86_emulate`'s. Safe Rust: guest RAM is reached through checked offsets.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod block;
mod cache;
mod complete;
mod core;
mod cpuid;
mod engine;
pub mod hardware;
mod lockstep;
mod mixed;
mod mmu;
mod msr;
mod pieces;
pub mod places;
mod run;
mod shared;
mod single;
mod stack_fault;
mod state;
mod tlb;
pub mod translate;
mod walked;

pub use complete::{Completed, Completer, power_up_state};
pub use core::SoftCore;
pub use engine::{SoftHypervisor, SoftPartition};
pub use lockstep::Report;
pub use mixed::may_change_code;
pub use run::SoftVcpu;

/// Bytes of one of `vcpus`, its translator's apart: what it may come to have resident.
pub const fn vcpu_bytes(vcpus: usize) -> usize {
    cache::most_bytes(vcpus) + walked::BYTES + size_of::<SoftCore>()
}
