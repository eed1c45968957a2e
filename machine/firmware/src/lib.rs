//! What firmware gives a guest: direct boot of kernels, ACPI tables, SMBIOS.
//!
//! Called by `machine` when it is built and when it is reset. Everything here is a pure function
//! from a description to bytes and addresses; `machine` writes them into guest RAM. Kernels,
//! initial RAM disks and command lines come from a user: they are hostile input.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod acpi;
pub mod direct_boot;
pub mod mtrr;
mod segment;
pub mod smbios;

pub use segment::Segment;
