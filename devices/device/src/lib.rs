//! What a device is, and how the machine reaches it.
//!
//! A device is a synchronous state machine: it is called with I/O from a vCPU ([`IoHandler`]), or with
//! [`Device::poll`] after its [`Waker`] or timer fired, never in a loop, and it answers through an
//! [`IrqLine`], MSI or guest memory. Threads, epoll and files belong to the host's side.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod bus;
pub mod conformance;
mod doorbell;
mod irq;

pub use bus::{Bus, BusError, IoStats, RegionId};
pub use doorbell::{Doorbell, Register};
pub use irq::{IrqLine, LineSink, SharedLine};
pub use saved_state::{RestoreError, StateBlob, Unsavable};

use alloc::sync::Arc;
use core::task::Poll;

/// A device that lives on a bus. `save`, `restore` and `reset` have no default: what cannot be saved does
/// not compile.
pub trait Device: Send {
    /// Stable, unique name in its machine (e.g. `uart0`); saved state is keyed by it.
    fn name(&self) -> &str;
    /// Its registers, if it has any on a bus.
    fn as_io(&mut self) -> Option<&mut dyn IoHandler>;
    /// Its waker or timer fired: take what arrived, complete what finished.
    fn poll(&mut self);
    /// Stop starting work; ready when nothing is in flight. Called again until ready.
    fn quiesce(&mut self) -> Poll<()>;
    /// Goes on after `quiesce`.
    fn resume(&mut self);
    /// As after power-up. Lines are lowered, timers cancelled.
    fn reset(&mut self);
    /// Its state; only called when quiesced.
    fn save(&self) -> Result<StateBlob, Unsavable>;
    /// Takes over a state saved before. Lines and timers are re-established without new edges. An error
    /// leaves the device as after reset.
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError>;
}

/// Registers on a bus. `region` is the number the device was registered with; `offset` lies inside it.
pub trait IoHandler {
    /// A read of 1, 2, 4 or 8 bytes. `data` arrives as all ones; what is not a register stays so.
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError>;
    /// A write of 1, 2, 4 or 8 bytes.
    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError>;
}

/// An access that the device has no register for: counted, then as real hardware would do (reads are all
/// ones, writes are dropped).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoError {
    /// No register there.
    Offset,
    /// The register does not take this width.
    Width,
}

/// Asks for a `poll` of the device it was made for. Cheap, callable from any thread, coalesced.
#[derive(Clone)]
pub struct Waker(Arc<dyn Fn() + Send + Sync>);

impl Waker {
    /// A waker that calls `wake`.
    pub fn new(wake: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(wake))
    }
    /// Asks for a poll.
    pub fn wake(&self) {
        (self.0)()
    }
}

impl core::fmt::Debug for Waker {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Waker")
    }
}

/// Reads `data` (1, 2, 4 or 8 bytes) as a little-endian number.
pub fn read_le(data: &[u8]) -> u64 {
    let mut raw = [0; 8];
    let n = data.len().min(8);
    raw[..n].copy_from_slice(&data[..n]);
    u64::from_le_bytes(raw)
}

/// Writes the low bytes of `value` to all of `data` (at most 8 bytes; more stay as they are).
pub fn write_le(data: &mut [u8], value: u64) {
    let n = data.len().min(8);
    data[..n].copy_from_slice(&value.to_le_bytes()[..n]);
}
