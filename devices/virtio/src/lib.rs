//! VIRTIO 1.2, device side.
#![no_std]
#![forbid(unsafe_code)]

pub mod queue;
pub use queue::Buffer;
