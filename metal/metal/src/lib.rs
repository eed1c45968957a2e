//! The type-1 hypervisor: boots without an operating system underneath and owns the machine.
//!
//! Entered by `main.rs`'s boot code through [`start`]. Logic that needs no privilege (what firmware says of memory,
//! page tables, the bundle) is plain Rust and is tested on any host; whatever touches the processor or a port is in
//! [`arch`].
//!
//! - [`boot_info`], [`memory`], [`acpi`]: what the loader handed over, which memory is free, what firmware tells.
//! - [`iommu`]: what holds devices to their memory.
//! - [`arch`]: ports, registers, own page tables, descriptor tables, timer.
//! - [`disk`], [`switch`]: what guests' disks and networks are connected to.
//! - [`bundle`], [`vm_spec`]: what to run. `ground`: how machines of `machine` run here;
//!   [`monitor`], [`line_editor`]: what people ask them.
//! - [`log`], [`panic`], [`screen`]: the serial line, the last words on it and on the screen.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod acpi;
pub mod arch;
pub mod boot_info;
pub mod bundle;
pub mod disk;
mod ground;
pub mod heap;
pub mod iommu;
pub mod line_editor;
#[macro_use]
pub mod log;
pub mod memory;
pub mod monitor;
pub mod panic;
pub mod screen;
mod start;
pub mod switch;
pub mod turns;
pub mod vm_spec;

pub use start::start;

/// What this build calls itself.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
