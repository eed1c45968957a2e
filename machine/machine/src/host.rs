//! What a machine needs from the ground it stands on: time, wake-ups, and later its disks and networks.
//!
//! Implemented by `vmm` (threads, epoll, files) and `metal`. Called by [`crate::build`] only: afterwards a
//! device talks to what it was given.

use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use device::{Device, Waker};
use guest_time::{GuestClock, Timer};
use sync::{Mutex, Once};

/// A device that is about to exist: its wakers and timers are made before it. Clones are the same slot.
#[derive(Clone, Default)]
pub struct DeviceSlot(Arc<Once<Weak<Mutex<dyn Device>>>>);

impl DeviceSlot {
    /// An empty slot.
    pub fn new() -> Self {
        Self::default()
    }
    /// The device exists now. Only the first call counts. The slot does not keep it alive.
    pub fn fill(&self, device: &Arc<Mutex<dyn Device>>) {
        self.0.call_once(|| Arc::downgrade(device));
    }
    /// Polls the device, if it exists (still). Takes its lock: never call it with any lock held.
    pub fn poll(&self) {
        if let Some(device) = self.0.get().and_then(Weak::upgrade) {
            device.lock().poll();
        }
    }
}

/// See the module's header.
pub trait HostServices: Send + Sync {
    /// All guest time.
    fn clock(&self) -> &GuestClock;
    /// A waker that has [`DeviceSlot::poll`] called soon, on a thread that holds no lock.
    fn waker(&self, slot: &DeviceSlot) -> Waker;
    /// A timer that has [`DeviceSlot::poll`] called when it expires.
    fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer>;
}
