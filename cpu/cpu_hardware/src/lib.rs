//! What the engines on processors with virtualization (`cpu_svm`, `cpu_vmx`) have in common: one concept, one place. They
//! differ in how a processor is told these things.
//!
//! - [`ground`]: what an engine needs of whoever owns the machine. [`partition`]: what a VM's vCPUs share.
//! - [`nested`]: second-level page tables. [`exit`]: why a guest was left. [`at_once`]: exits that are served where
//!   they arrive. [`tsc`]: the guest's time-stamp counter. [`identifiers`]: tags of translations.
//! - [`extended`], [`processor`]: x87 and vector registers, CPUID, MSRs.
//! - `testing`: for the engines' tests.
//!
//! Unsafe code is in [`processor`] alone.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod at_once;
pub mod exit;
pub mod extended;
pub mod ground;
pub mod identifiers;
pub mod nested;
pub mod partition;
pub mod processor;
#[cfg(feature = "testing")]
pub mod testing;
pub mod tsc;

pub use exit::{Exit, Port};
pub use ground::{Gate, Ground};
pub use partition::GuestShare;
