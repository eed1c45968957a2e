//! Doorbells of the machine's devices: where each stands, and the engine that rings it at present.
//!
//! ```text
//! guest writes ─► engine (Doorbells) ─► Bell ─► host's event loop ─► DeviceSlot::ring ─► IoHandler::io_write
//! ```
//!
//! Called by: `pci::Topology`, when a BAR moves; [`crate::switch::Switch`], when the machine gets another engine.
//!
//! Invariant: what an engine does not take (it has no doorbells, or no room) reaches the device through `VcpuIo`.
//!
//! Lock order: the place → the partition.

use crate::switch::Switch;
use alloc::sync::{Arc, Weak};
use device::Doorbell;
use hypervisor::{Bell, Doorbells, Gpa};
use sync::Mutex;

/// See the module's header.
pub struct MachineDoorbell {
    switch: Weak<Switch>,
    bell: Arc<dyn Bell>,
    place: Mutex<Place>,
}

#[derive(Default)]
struct Place {
    at: Option<Gpa>,
    /// The engine rings it.
    attached: bool,
}

impl MachineDoorbell {
    /// One that stands nowhere.
    pub fn new(switch: &Arc<Switch>, bell: Arc<dyn Bell>) -> Arc<Self> {
        Arc::new(Self { switch: Arc::downgrade(switch), bell, place: Mutex::default() })
    }

    /// From now on `engine` rings it. The one before is no longer asked for anything.
    pub fn attach_to(&self, engine: Option<&dyn Doorbells>) {
        let mut place = self.place.lock();
        place.attached = self.attach(place.at, engine);
    }

    fn attach(&self, at: Option<Gpa>, engine: Option<&dyn Doorbells>) -> bool {
        matches!((at, engine), (Some(at), Some(engine)) if engine.attach(at, &*self.bell).is_ok())
    }
}

impl Doorbell for MachineDoorbell {
    fn set_place(&self, at: Option<u64>) {
        let engine = self.switch.upgrade().and_then(|switch| switch.doorbells());
        let mut place = self.place.lock();
        if let (true, Some(at), Some(engine)) = (place.attached, place.at, &engine) {
            engine.detach(at, &*self.bell);
        }
        place.at = at.map(Gpa);
        place.attached = self.attach(place.at, engine.as_deref());
    }
}
