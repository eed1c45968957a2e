//! All devices of a machine, by name: what is done to all of them, in an order that always is the same.
//!
//! Called by: [`crate::Machine`], with all vCPUs stopped.
//!
//! Invariants: names are unique; devices are reset and restored in the order in which they were built, interrupt
//! controllers first, so that a line that is re-established finds its controller restored.

use crate::saved_vm::{LoadError, SaveError, SavedBlob, Writer};
use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::{Device, StateBlob};
use sync::Mutex;

/// A device of a machine.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// Kind of the records.
pub(crate) const KIND_DEVICE: crate::saved_vm::Kind = *b"DEVI";

/// See the module's header.
#[derive(Default)]
pub struct Devices {
    all: Vec<SharedDevice>,
}

impl Devices {
    /// Adds a device; refuses a name that is taken.
    pub fn add(&mut self, device: SharedDevice) -> Result<(), String> {
        let name = device.lock().name().to_string();
        if self.all.iter().any(|other| other.lock().name() == name) {
            return Err(name);
        }
        self.all.push(device);
        Ok(())
    }

    /// Removes those that were added after there were `count`.
    pub fn truncate(&mut self, count: usize) {
        self.all.truncate(count);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Asks all to stop working; ready when all have. Called again until ready.
    pub fn quiesce(&self) -> Poll<()> {
        let mut ready = Poll::Ready(());
        for device in &self.all {
            if device.lock().quiesce().is_pending() {
                ready = Poll::Pending;
            }
        }
        ready
    }

    /// Names of those that still work.
    pub fn busy(&self) -> Vec<String> {
        let busy = |d: &&SharedDevice| d.lock().quiesce().is_pending();
        self.all.iter().filter(busy).map(|d| d.lock().name().to_string()).collect()
    }

    /// All go on.
    pub fn resume(&self) {
        self.all.iter().for_each(|d| d.lock().resume());
    }

    /// All are as after power-up.
    pub fn reset(&self) {
        self.all.iter().for_each(|d| d.lock().reset());
    }

    /// Writes the state of each.
    pub fn save(&self, w: &mut Writer<'_>) -> Result<(), SaveError> {
        for device in &self.all {
            let device = device.lock();
            let blob = device
                .save()
                .map_err(|source| SaveError::Unsavable { part: device.name().to_string(), source })?;
            w.named(KIND_DEVICE, device.name(), blob)?;
        }
        Ok(())
    }

    /// Gives each its state. `saved` must name all of them and nobody else.
    pub fn restore(&self, saved: Vec<SavedBlob>) -> Result<(), LoadError> {
        let mut blobs: BTreeMap<String, StateBlob> = BTreeMap::new();
        for SavedBlob { name, blob } in saved {
            if blobs.insert(name.clone(), blob).is_some() {
                return Err(LoadError::Mismatch(format!("it has device `{name}` twice")));
            }
        }
        for device in &self.all {
            let mut device = device.lock();
            let name = device.name().to_string();
            let blob = blobs
                .remove(&name)
                .ok_or_else(|| LoadError::Mismatch(format!("it lacks device `{name}`")))?;
            device.restore(&blob).map_err(LoadError::state(name))?;
        }
        match blobs.pop_first() {
            None => Ok(()),
            Some((name, _)) => Err(LoadError::Mismatch(format!("there is no device `{name}` here"))),
        }
    }
}
