//! PCI Express: what a function is, and the tree that connects functions to the machine's buses.
//!
//! - [`ConfigSpace`]: registers with write masks, BARs, capabilities. [`FunctionCore`] adds interrupts,
//!   the bus-master bit and placement: every function owns one and lends it through [`PciFunction`].
//! - [`Interrupts`]: INTx, MSI and MSI-X of one function behind a lock of their own, so that queue
//!   runners may fire from any thread.
//! - [`Topology`]: the tree. It finds a function by its address, and puts decoded BARs on the machine's
//!   buses whenever a BAR, a command register or a bridge window changes.
//! - [`ConfigAccess`]: ECAM and the ports 0xCF8–0xCFF. [`HostBridge`], [`RootPort`], [`LpcBridge`].
//!
//! Lock order: configuration access → function → topology → bus; function → interrupts → controller.
//! A function never reaches the configuration access device, so neither order can close a circle.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod access;
mod address;
mod assign;
mod config;
mod core_state;
pub mod express;
mod host_bridge;
mod interrupts;
mod lpc;
mod msi;
mod msix;
mod pirq;
pub mod regs;
mod root_port;
mod topology;

pub use access::{ConfigAccess, ECAM_REGION, PORTS_REGION};
pub use address::{Bdf, Devfn};
pub use assign::AssignError;
pub use config::{BarKind, ConfigSpace, Decoded, Identity, Space};
pub use core_state::{FunctionCore, PciFunction, SavedFunction, Written};
pub use host_bridge::HostBridge;
pub use interrupts::Interrupts;
pub use lpc::{LpcBridge, PIRQ_ROUTES};
pub use msix::msix_bar_bytes;
pub use pirq::{PIRQ_OFF, PIRQS, PirqLines, PirqRouter, pirq_of};
pub use root_port::RootPort;
pub use topology::{AttachError, FunctionId, Parent, Topology, TopologyStats, Windows};

#[cfg(test)]
mod tests;
