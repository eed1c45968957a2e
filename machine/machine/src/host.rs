//! What a machine needs from the ground it stands on: time and wake-ups, memory, files, and the host's ends of its
//! devices.
//!
//! Implemented by `vmm` (threads, epoll, files) and `metal`. Called by [`crate::build`] mostly; a device then talks to
//! what it was given. Everything of the host is named by the spec's [`HostKey`]s.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use chipset::{SerialOut, Uart16550};
use core::ops::Range;
use device::{Device, Register, Waker};
use guest_memory::HostSpan;
use guest_time::{GuestClock, Timer};
use hypervisor::{Bell, Wake};
use machine_spec::{HostKey, RamSpec};
use sync::{Mutex, Once};
use virtio_devices::{BlockBackend, ConsoleBackend, EntropySource, NetBackend};

/// Something of the host cannot be had: its words, for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HostError(pub String);

/// See the module's header.
pub trait HostServices: Send + Sync {
    /// All guest time.
    fn clock(&self) -> &GuestClock;
    /// A waker that has [`DeviceSlot::poll`] called soon, on a thread that holds no lock.
    fn waker(&self, slot: &DeviceSlot) -> Waker;
    /// A timer that has [`DeviceSlot::poll`] called when it expires.
    fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer>;
    /// A bell that has [`DeviceSlot::ring`] called soon for `register`, on a thread that holds no lock; `None`: this
    /// ground has none.
    fn bell(&self, slot: &DeviceSlot, register: Register) -> Option<Arc<dyn Bell>> {
        let _ = (slot, register);
        None
    }
    /// What makes vCPU `id`'s thread go on when it is halted.
    fn vcpu_wake(&self, id: u32) -> Arc<dyn Wake>;

    /// Zeroed memory for all RAM.
    fn allocate_ram(&self, spec: &RamSpec) -> Result<HostSpan, HostError>;
    /// Makes all RAM zero again.
    fn clear_ram(&self) -> Result<(), HostError>;
    /// Which bytes of RAM may be other than zero: ascending ranges.
    fn populated_ram(&self) -> Result<Vec<Range<u64>>, HostError>;

    /// The whole content of a file: kernel or initial RAM disk. An error names the file.
    fn read_file(&self, file: &HostKey) -> Result<Vec<u8>, HostError>;
    /// How people call that file.
    fn file_name(&self, file: &HostKey) -> String {
        file.0.clone()
    }
    /// The other end of a serial port. Input goes to `input`; `waker` is for output that found no room.
    fn open_serial(
        &self,
        stream: Option<&HostKey>,
        input: SerialInput,
        waker: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError>;
    /// The other end of a virtio console.
    fn open_console(&self, stream: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError>;
    /// A disk.
    fn open_disk(&self, disk: &HostKey) -> Result<Box<dyn BlockBackend>, HostError>;
    /// A network, with the largest packet that it carries.
    fn open_net(&self, net: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError>;
    /// Random bytes fit for keys.
    fn entropy(&self) -> Result<Box<dyn EntropySource>, HostError>;
}

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
    /// The doorbell of `register` rang: writes to it in place of the vCPU that did not stop for it. Takes the device's
    /// lock.
    pub fn ring(&self, register: Register) {
        if let Some(device) = self.0.get().and_then(Weak::upgrade)
            && let Some(io) = device.lock().as_io()
        {
            // What the device has no register for is dropped, as on the bus.
            let _ = io.io_write(register.region, register.offset, &[0; 2]);
        }
    }
}

/// Where a serial port's other end puts bytes. Clones are the same port.
#[derive(Clone, Default)]
pub struct SerialInput(Arc<Once<Weak<Mutex<Uart16550>>>>);

impl SerialInput {
    pub(crate) fn fill(&self, uart: &Arc<Mutex<Uart16550>>) {
        self.0.call_once(|| Arc::downgrade(uart));
    }
    /// Gives bytes to the guest; returns how many it took. The rest is for after [`SerialOut::input_room`].
    /// Takes the port's lock.
    pub fn receive(&self, bytes: &[u8]) -> usize {
        match self.0.get().and_then(Weak::upgrade) {
            Some(uart) => uart.lock().receive(bytes),
            // Nobody will ever take them.
            None => bytes.len(),
        }
    }
}
