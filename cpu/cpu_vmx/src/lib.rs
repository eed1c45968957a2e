//! The `vmx` engine: guest code on Intel's virtualization (SDM vol. 3C, chapters 24 to 31), on bare metal.
//!
//! It is the hardware behind `cpu_soft`'s seam (docs/adr/0009-bare-metal.md, 0019-vmx.md): local APIC, MSRs, CPUID and
//! saved state are `cpu_soft`'s, and so is every instruction that the processor hands back, and the delivery of every
//! event that the guest's own code did not raise. Called by: `metal`, through [`VmxEngine`].
//!
//! - [`processor`]: whether this processor can, and switching it on. [`controls`]: what it is asked to do.
//! - [`vmcs`]: fields by their encodings. [`registers`], [`segments`]: the guest's state, to and from `x86_emulate::Cpu`.
//! - [`permission`]: what the guest reaches without an exit, besides its RAM.
//! - [`exit`]: what an exit means. `switch`: VMLAUNCH and what must be around it. `host`: the state that an exit comes back
//!   to. `vcpu`: the loop.
//!
//! Unsafe code is in `processor`, `switch`, `host`, and where `vcpu` calls them.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod controls;
pub mod engine;
pub mod exit;
mod host;
pub mod permission;
pub mod processor;
pub mod registers;
pub mod segments;
mod switch;
mod vcpu;
pub mod vmcs;

pub use engine::VmxEngine;
pub use processor::{Unavailable, Vmx};
