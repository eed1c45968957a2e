//! The queue that everybody puts requests into, and that one driver empties.
//!
//! Called by: devices of the guest (power, reset), vCPU threads (triple fault), consoles and control sockets
//! from outside; `vmm`'s driver. Lock order: last of all; the bell is rung without the lock.

use crate::lifecycle::{Lifecycle, Origin, Refused, Request, State, Verdict};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use sync::Mutex;

/// See the module's header.
pub struct RequestQueue {
    life: Mutex<Lifecycle>,
    bell: Box<dyn Fn() + Send + Sync>,
}

impl RequestQueue {
    /// The queue of a machine that was just built; `bell` is called after every change, from any thread.
    pub fn new(bell: impl Fn() + Send + Sync + 'static) -> Self {
        Self { life: Mutex::new(Lifecycle::new()), bell: Box::new(bell) }
    }

    /// Asks for something from outside.
    pub fn ask(&self, request: Request) -> Result<(), Refused> {
        self.put(Origin::Outside, request)
    }

    /// The guest asks. What makes no sense (any more) is dropped: the guest's processors run on until the driver
    /// comes.
    pub fn guest_asks(&self, request: Request) {
        let _ = self.put(Origin::Guest, request);
    }

    fn put(&self, origin: Origin, request: Request) -> Result<(), Refused> {
        let result = self.life.lock().request(origin, request);
        (self.bell)();
        result
    }

    /// For the driver: the next thing to do, and who asked.
    pub fn begin(&self) -> Option<(Origin, Request)> {
        self.life.lock().begin()
    }

    /// For the driver: it is done. Returns what was dropped.
    pub fn finish(&self, ok: bool) -> VecDeque<Request> {
        let dropped = self.life.lock().finish(ok);
        (self.bell)();
        dropped
    }

    /// What the machine is doing.
    pub fn state(&self) -> State {
        self.life.lock().state()
    }

    /// Whether nothing waits and nothing is being done.
    pub fn is_idle(&self) -> bool {
        self.life.lock().is_idle()
    }

    /// Why the machine ended, if it has.
    pub fn verdict(&self) -> Option<Verdict> {
        self.life.lock().verdict().cloned()
    }
}

impl core::fmt::Debug for RequestQueue {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("RequestQueue").field("life", &*self.life.lock()).finish()
    }
}
