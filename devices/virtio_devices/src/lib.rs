//! The VIRTIO devices, each against a small backend trait that the host side implements.
//!
//! [`backend`]: the traits. [`Blk`]: a disk, [`Net`]: a network card, [`Console`]: terminals, [`Rng`]:
//! entropy. Every device is a [`virtio::VirtioDevice`]; `machine` puts it
//! behind a transport. A backend is shared between a device, which keeps it across resets, and its runner, which
//! uses it while the driver is ready; nobody else locks it.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod backend;
pub mod blk;
mod config_bytes;
pub mod console;
pub mod net;
mod rng;

pub use backend::{
    BlockBackend, BlockError, BlockInfo, BlockOp, BlockRequest, Busy, Completion, ConsoleBackend,
    EntropySource, NetBackend,
};
pub use blk::{Blk, BlkConfig};
pub use console::{Console, ConsolePort};
pub use net::{Net, NetConfig};
pub use rng::Rng;
