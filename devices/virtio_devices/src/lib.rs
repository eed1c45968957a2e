//! The VIRTIO devices, each against a small backend trait that the host side implements.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod backend;
