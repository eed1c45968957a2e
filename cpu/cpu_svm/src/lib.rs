//! The `svm` engine: guest code on AMD's virtualization (APM vol. 2, chapter 15), on bare metal.
//!
//! It is the hardware behind `cpu_soft`'s seam (docs/adr/0009-bare-metal.md): local APIC, MSRs, CPUID and saved state
//! are `cpu_soft`'s, and so is every instruction that the processor hands back. Called by: `metal`, through
//! [`SvmEngine`].
//!
//! - [`processor`]: whether this processor can, and switching it on.
//! - [`vmcb`], [`registers`]: the guest's state, to and from `x86_emulate::Cpu`.
//! - [`permission`]: what the guest reaches without an exit, besides its RAM.
//! - [`exit`]: what an exit means. `switch`: VMRUN and what must be around it. `vcpu`: the loop; `at_once`: exits that
//!   are served without moving the guest's state.
//!
//! What other processors have as well is `cpu_hardware`'s.
//!
//! Unsafe code is in `processor` and `switch` alone.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod at_once;
pub mod engine;
pub mod exit;
pub mod permission;
pub mod processor;
pub mod registers;
mod switch;
mod vcpu;
pub mod vmcb;

pub use cpu_hardware::Ground;
pub use engine::SvmEngine;
pub use processor::{Svm, Unavailable};
