//! Guest RAM, and the only code that dereferences it.
//!
//! All RAM of a machine is one span of host memory ([`HostSpan`]); a table of [`Region`]s says which
//! guest-physical ranges it backs. The span never moves or shrinks while a [`GuestRam`] exists, so an
//! offset that once was inside stays inside: engines keep offsets in their TLBs, every access checks the
//! offset against the span's length, and no bug above this crate reaches other host memory.
//!
//! Guest and devices touch RAM concurrently. Accesses of 1–8 bytes are single host instructions (inline
//! assembly: outside Rust's memory model, unaligned-safe, TSO as the guest expects), and so are aligned ones of 16.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod access;
mod dma;
mod ram;

pub use access::Word;
pub use dma::{DmaSpace, NotRam};
pub use ram::{GuestRam, HostSpan, LayoutError, Region, Track, WriteListener};

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on, if it does not wrap.
    pub fn checked_add(self, bytes: u64) -> Option<Gpa> {
        self.0.checked_add(bytes).map(Gpa)
    }
    /// Its page number.
    pub fn page(self) -> u64 {
        self.0 >> 12
    }
}

impl core::fmt::Display for Gpa {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
