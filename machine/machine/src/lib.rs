//! One machine: a partition of some engine and the devices around it.
//!
//! Called by whoever owns the vCPU threads (`vmm` on a host, `metal` without one). The machine is wired
//! once, in [`build`], for every engine and every ground; the world comes in through [`HostServices`].
//!
//! - [`lifecycle`]: what a machine is doing and what it may do next; a queue of requests.
//! - [`requests`]: the queue through which everybody asks.
//! - [`saved_vm`]: the format of a saved VM.
//! - `switch`: the partition at present; `doorbells`: notification registers that its engine takes; `moving`: how a running machine gets another one.
//! - [`panic_watch`]: what a guest's kernel says last.
//! - [`host`]: what a machine needs from the ground it stands on.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod boot;
pub mod build;
mod cpu_model;
mod devices;
mod doorbells;
pub mod host;
mod interrupts;
mod io;
pub mod lifecycle;
mod machine;
mod moving;
pub mod panic_watch;
pub mod requests;
pub mod saved_vm;
mod switch;
#[cfg(feature = "testing")]
pub mod testing;

pub use boot::BootError;
pub use build::{BuildError, Parts};
pub use host::{DeviceSlot, HostError, HostServices, SerialInput};
pub use lifecycle::{AfterSave, Lifecycle, Origin, Refused, Request, State, Verdict};
pub use machine::{KIND_SPEC, Machine, Next};
pub use moving::MoveError;
pub use panic_watch::PanicWatch;
pub use requests::RequestQueue;
