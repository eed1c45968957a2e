//! The UEFI application `bedplate-metal.efi`: it holds the image of `metal`, reads the bundle from its own volume, leaves
//! boot services and enters the image as a PVH loader would, but in 64-bit mode.
//!
//! - [`elf`]: where the image's segments go. [`start_info`]: what is handed over. Both run on any host.
//! - `firmware.rs`: what talks to the firmware. `main.rs` and, for a test, `locked.rs` start it.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod elf;
pub mod start_info;
