//! What a device type implements, without knowing its transport.
//!
//! ```text
//!            DRIVER_OK                     status := 0, all runners quiesced
//! [configuring] ── start(queues) ──► [running: runners own the queues] ── drop runners, reset ──► [configuring]
//! ```
//!
//! A runner serves one or more queues of its device. In this version the transport calls runners
//! synchronously, under its own lock, from notifications and polls; they hold everything they need, so that
//! they can move to threads of their own.

use crate::queue::{Queue, QueueState};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::{RestoreError, StateBlob, Waker};
use guest_memory::DmaSpace;

/// What a device is, to its transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceType {
    /// Number of VIRTIO 1.2, section 5.
    pub id: u16,
    /// PCI class code.
    pub pci_class: u32,
}

impl DeviceType {
    /// Network card.
    pub const NET: Self = Self { id: 1, pci_class: 0x02_0000 };
    /// Disk.
    pub const BLOCK: Self = Self { id: 2, pci_class: 0x01_0000 };
    /// Console.
    pub const CONSOLE: Self = Self { id: 3, pci_class: 0x07_8000 };
    /// Entropy source.
    pub const ENTROPY: Self = Self { id: 4, pci_class: 0x00_FF00 };
}

/// How devices and runners reach the driver. Callable from any thread, under any of their locks.
pub trait Signals: Send + Sync {
    /// Buffers of `queue` were used and the driver wants to hear of it.
    fn used(&self, queue: u16);
    /// The device's configuration changed.
    fn config_changed(&self);
    /// The driver broke the protocol: nothing goes on until it resets the device.
    fn needs_reset(&self);
}

/// What a device gets when the driver is ready.
pub struct Activation {
    /// Features that the driver accepted.
    pub features: u64,
    /// Guest memory.
    pub dma: DmaSpace,
    /// All queues by number; those that the driver left out never have work.
    pub queues: Vec<Queue>,
    /// The way back to the driver.
    pub signals: Arc<dyn Signals>,
    /// Asks for a poll of this device.
    pub waker: Waker,
}

/// A device type.
pub trait VirtioDevice: Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;
    /// Features of its type that it offers. They do not change while a driver may look.
    fn features(&self) -> u64;
    /// Largest size of each queue: powers of two.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads its configuration; `data` arrives zeroed.
    fn config_read(&self, offset: usize, data: &mut [u8]);
    /// Writes its configuration.
    fn config_write(&mut self, offset: usize, data: &[u8]);
    /// The driver is ready. Must not touch guest memory yet: after a restore it may not be there. The
    /// transport calls `kick` or `resume` next.
    fn start(&mut self, activation: Activation) -> Vec<Runner>;
    /// The waker fired, whether started or not; runners are polled besides.
    fn poll(&mut self, signals: &dyn Signals);
    /// As after power-up. Runners are gone.
    fn reset(&mut self);
    /// Its own state; features and queues are the transport's.
    fn save(&self) -> StateBlob;
    /// Takes over a saved state; called before `start`. An error leaves it as after reset.
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError>;
}

/// A runner with the queues it serves.
pub struct Runner {
    /// Numbers of its queues.
    pub queues: Vec<u16>,
    /// The runner.
    pub run: Box<dyn QueueRunner>,
}

/// What serves queues. One call does a bounded amount of work: what is left is asked for with the waker.
pub trait QueueRunner: Send {
    /// The driver notified `queue`.
    fn kick(&mut self, queue: u16);
    /// The waker fired.
    fn poll(&mut self);
    /// Starts nothing new; ready when nothing is in flight at the backend. Called again until ready.
    fn quiesce(&mut self) -> Poll<()>;
    /// Goes on after `quiesce` or a restore: reissues what was in flight, looks at all queues.
    fn resume(&mut self);
    /// Where its queues stand, with the heads that were taken but not used yet.
    fn queue_states(&self) -> Vec<(u16, QueueState)>;
}
