//! VIRTIO 1.2, device side: split virtqueues and the modern PCI transport.
//!
//! - [`queue`]: a [`Queue`] hands out descriptor [`Chain`]s and publishes used ones; everything that the driver
//!   writes is hostile.
//! - [`device`]: [`VirtioDevice`] is what a device type implements; when the driver is ready it turns its
//!   queues into [`QueueRunner`]s.
//! - [`transport::pci`]: [`VirtioPci`] is the PCI function: feature and queue configuration, interrupts, state.
//!
//! Lock order: transport (the device's lock) → backend → interrupts. Runners and devices never call the
//! transport; they reach it through [`Signals`].
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod device;
pub mod feature;
pub mod queue;
pub mod transport;

pub use crate::device::{Activation, DeviceType, QueueRunner, Runner, Signals, VirtioDevice};
pub use queue::{Buffer, Chain, ChainReader, ChainWriter, Queue, QueueLayout, QueueState};
pub use transport::pci::{VirtioPci, VirtioPciConfig};
