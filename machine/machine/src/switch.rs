//! The partition that a machine has at present, behind sinks that stay when it gets another one.
//!
//! Called by: devices and controllers (through [`IrqSink`], [`MsiSink`] and their routes), the machine (everything else).
//!
//! Invariants: what was told to the engine and outlives a message (routes, pins, the 8259's line, doorbells) is remembered
//! here and told to the next one; it is replaced only while vCPUs are parked and devices are quiet.
//!
//! Lock order: a route, or the pins → the partition's.

use crate::doorbells::MachineDoorbell;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use device::Doorbell;
use hypervisor::{Bell, Doorbells, EngineError, IrqSink, Msi, MsiRoute, MsiSink, Partition, Trigger};
use sync::{Mutex, RwLock};

struct Current {
    partition: Arc<dyn Partition>,
    irq: Arc<dyn IrqSink>,
    msi: Arc<dyn MsiSink>,
    doorbells: Option<Arc<dyn Doorbells>>,
}

impl Current {
    fn new(partition: Box<dyn Partition>) -> Self {
        let partition: Arc<dyn Partition> = partition.into();
        Self {
            irq: partition.irq_sink(),
            msi: partition.msi_sink(),
            doorbells: partition.doorbells(),
            partition,
        }
    }
}

/// What a pin of the I/O APIC sends.
type Pin = (Option<Msi>, Trigger);

/// See the module's header.
pub struct Switch {
    current: RwLock<Current>,
    pins: Mutex<BTreeMap<u32, Pin>>,
    pic_line: AtomicBool,
    routes: Mutex<Vec<Weak<Route>>>,
    bells: Mutex<Vec<Weak<MachineDoorbell>>>,
}

impl Switch {
    /// Around a machine's first partition.
    pub fn new(partition: Box<dyn Partition>) -> Arc<Self> {
        Arc::new(Self {
            current: RwLock::new(Current::new(partition)),
            pins: Mutex::default(),
            pic_line: AtomicBool::new(false),
            routes: Mutex::default(),
            bells: Mutex::default(),
        })
    }

    /// The partition at present.
    pub fn partition(&self) -> Arc<dyn Partition> {
        self.current.read().partition.clone()
    }

    fn irq(&self) -> Arc<dyn IrqSink> {
        self.current.read().irq.clone()
    }

    /// Where the chipset's interrupt controllers send.
    pub fn irq_sink(self: &Arc<Self>) -> Arc<dyn IrqSink> {
        Arc::new(Sinks(self.clone()))
    }

    /// Where MSI routes come from.
    pub fn msi_sink(self: &Arc<Self>) -> Arc<dyn MsiSink> {
        Arc::new(Sinks(self.clone()))
    }

    /// The engine's doorbells, if it has any.
    pub fn doorbells(&self) -> Option<Arc<dyn Doorbells>> {
        self.current.read().doorbells.clone()
    }

    /// A doorbell that whichever engine there is rings `bell` for.
    pub fn add(self: &Arc<Self>, bell: Arc<dyn Bell>) -> Arc<dyn Doorbell> {
        let doorbell = MachineDoorbell::new(self, bell);
        live(&mut self.bells.lock()).push(Arc::downgrade(&doorbell));
        doorbell
    }

    /// From now on `partition`; on an error all is as before.
    pub fn replace(&self, partition: Box<dyn Partition>) -> Result<(), EngineError> {
        let next = Current::new(partition);
        let routes: Vec<_> = self.routes.lock().iter().filter_map(Weak::upgrade).collect();
        // All of them first: any may fail.
        let renewed =
            routes.iter().map(|route| route.0.lock().on(&*next.msi)).collect::<Result<Vec<_>, _>>()?;
        for (route, renewed) in routes.iter().zip(renewed) {
            route.0.lock().route = renewed;
        }
        for (pin, (msi, trigger)) in &*self.pins.lock() {
            next.irq.set_ioapic_route(*pin, *msi, *trigger);
        }
        next.irq.pic_line_changed(self.pic_line.load(Ordering::SeqCst));
        for bell in self.bells.lock().iter().filter_map(Weak::upgrade) {
            bell.attach_to(next.doorbells.as_deref());
        }
        *self.current.write() = next;
        Ok(())
    }
}

/// Those that somebody still has.
fn live<T>(all: &mut Vec<Weak<T>>) -> &mut Vec<Weak<T>> {
    all.retain(|one| one.strong_count() > 0);
    all
}

struct Sinks(Arc<Switch>);

impl IrqSink for Sinks {
    fn deliver(&self, msi: Msi) {
        self.0.irq().deliver(msi);
    }
    fn set_ioapic_route(&self, pin: u32, msi: Option<Msi>, trigger: Trigger) {
        self.0.pins.lock().insert(pin, (msi, trigger));
        self.0.irq().set_ioapic_route(pin, msi, trigger);
    }
    fn pic_line_changed(&self, level: bool) {
        self.0.pic_line.store(level, Ordering::SeqCst);
        self.0.irq().pic_line_changed(level);
    }
}

impl MsiSink for Sinks {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        let route = self.0.current.read().msi.route()?;
        let route = Arc::new(Route(Mutex::new(RouteState { route, msi: None, masked: true, bell: None })));
        live(&mut self.0.routes.lock()).push(Arc::downgrade(&route));
        Ok(Box::new(Handle(route)))
    }
}

struct RouteState {
    route: Box<dyn MsiRoute>,
    /// As last set.
    msi: Option<Msi>,
    masked: bool,
    /// What fires it from elsewhere.
    bell: Option<Arc<dyn Bell>>,
}

impl RouteState {
    /// The same route of another engine.
    fn on(&self, engine: &dyn MsiSink) -> Result<Box<dyn MsiRoute>, EngineError> {
        let route = engine.route()?;
        if let Some(msi) = self.msi {
            route.set(msi);
            route.mask(self.masked);
        }
        if let Some(bell) = &self.bell {
            route.attach(bell)?;
        }
        Ok(route)
    }
}

struct Route(Mutex<RouteState>);

struct Handle(Arc<Route>);

impl MsiRoute for Handle {
    fn set(&self, msi: Msi) {
        let mut state = self.0.0.lock();
        (state.msi, state.masked) = (Some(msi), false);
        state.route.set(msi);
    }
    fn fire(&self) {
        self.0.0.lock().route.fire();
    }
    fn mask(&self, masked: bool) {
        let mut state = self.0.0.lock();
        state.masked = masked;
        state.route.mask(masked);
    }
    fn attach(&self, bell: &Arc<dyn Bell>) -> Result<(), EngineError> {
        let mut state = self.0.0.lock();
        state.route.attach(bell)?;
        state.bell = Some(bell.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::engine::ScriptEngine;

    struct Silent;
    impl Bell for Silent {
        fn descriptor(&self) -> i32 {
            0
        }
    }

    /// The second route has a bell, which the next engine has no way for.
    #[test]
    fn a_partition_that_cannot_take_everything_takes_nothing() {
        let (first, next) = (ScriptEngine::default(), ScriptEngine::default());
        let switch = Switch::new(Box::new(first.clone()));
        let msi = Msi { address: 0xFEE0_0000, data: 0x31 };
        let routes = [0, 1].map(|_| switch.msi_sink().route().unwrap());
        routes.iter().for_each(|route| route.set(msi));
        switch.routes.lock()[1].upgrade().unwrap().0.lock().bell = Some(Arc::new(Silent));
        switch.replace(Box::new(next.clone())).unwrap_err();
        routes.iter().for_each(|route| route.fire());
        assert_eq!((first.take_messages(), next.take_messages()), (alloc::vec![msi; 2], Vec::new()));
    }
}
