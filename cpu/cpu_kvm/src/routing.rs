//! Messages that KVM knows by number (api.rst, KVM_SET_GSI_ROUTING): those of the I/O APIC's level-triggered pins, so that it
//! reports their EOIs, and those of MSI routes with a bell (KVM_IRQFD).
//!
//! Called by: interrupt sinks and routes of the partition; `time.rs`, around the APICs' registers.
//!
//! Invariants: a bell is with KVM exactly while its route is unmasked and nobody silences all of them; what rings meanwhile
//! stays in the bell's eventfd, and fires when it is back.

use crate::engine::host;
use crate::ioctls::{error, irqfd};
use hypervisor::{Bell, EngineError, Msi};
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use sync::{Mutex, MutexGuard};

/// Pins of the I/O APIC: the first numbers.
pub const PINS: usize = 24;
/// Numbers that there are at most.
const NUMBERS: u32 = 1024;
/// MSI data: the level is asserted; level-triggered.
const ASSERTED_LEVEL: u32 = 1 << 14 | 1 << 15;

/// A route's bell.
struct Belled {
    bell: Arc<dyn Bell>,
    msi: Msi,
    masked: bool,
}

#[derive(Default)]
struct Table {
    pins: [Option<Msi>; PINS],
    bells: BTreeMap<u32, Belled>,
}

/// See the module's header.
#[derive(Default)]
pub struct Routing(Mutex<Table>);

impl Routing {
    /// The message of a level-triggered pin.
    pub fn set_pin(&self, vm: &VmFd, pin: u32, msi: Msi) -> Result<(), EngineError> {
        let mut table = self.0.lock();
        match table.pins.get_mut(pin as usize).filter(|place| **place != Some(msi)) {
            Some(place) => *place = Some(msi),
            None => return Ok(()),
        }
        table.tell(vm)
    }

    /// A number for a route that `bell` fires; masked.
    pub fn add(&self, vm: &VmFd, bell: Arc<dyn Bell>, msi: Msi) -> Result<u32, EngineError> {
        let mut table = self.0.lock();
        let number = (PINS as u32..NUMBERS).find(|number| !table.bells.contains_key(number));
        let number = number.ok_or(EngineError::Exhausted("numbers for interrupts"))?;
        table.bells.insert(number, Belled { bell, msi, masked: true });
        let told = table.tell(vm);
        if told.is_err() {
            table.bells.remove(&number);
        }
        told.map(|()| number)
    }

    /// Its message and whether it is masked, from now on.
    pub fn change(&self, vm: &VmFd, number: u32, msi: Msi, masked: bool) -> Result<(), EngineError> {
        let mut table = self.0.lock();
        let Some(belled) = table.bells.get_mut(&number) else { return Ok(()) };
        let (moved, turned) = (belled.msi != msi, belled.masked != masked);
        (belled.msi, belled.masked) = (msi, masked);
        let bell = belled.bell.clone();
        // Taken away before its message changes, given back after.
        if turned && masked {
            irqfd(vm, number, bell.descriptor(), false).map_err(host)?;
        }
        if moved {
            table.tell(vm)?;
        }
        if turned && !masked {
            irqfd(vm, number, bell.descriptor(), true).map_err(host)?;
        }
        Ok(())
    }

    /// The route is gone.
    pub fn remove(&self, vm: &VmFd, number: u32) {
        let mut table = self.0.lock();
        if let Some(belled) = table.bells.remove(&number).filter(|belled| !belled.masked) {
            // Fails only for what is not there.
            let _ = irqfd(vm, number, belled.bell.descriptor(), false);
        }
    }

    /// No bell is heard until the guard is dropped.
    pub fn silence<'a>(&'a self, vm: &'a VmFd) -> io::Result<Silence<'a>> {
        let silence = Silence { table: self.0.lock(), vm };
        silence.table.all(vm, false)?;
        Ok(silence)
    }
}

impl Table {
    fn tell(&self, vm: &VmFd) -> Result<(), EngineError> {
        let pins = self.pins.iter().enumerate().filter_map(|(pin, msi)| {
            let msi = (*msi)?;
            Some((pin as u32, Msi { data: msi.data | ASSERTED_LEVEL, ..msi }))
        });
        let bells = self.bells.iter().map(|(number, belled)| (*number, belled.msi));
        let entries: Vec<_> = pins.chain(bells).map(entry).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|e| EngineError::Host(format!("{e:?}")))?;
        vm.set_gsi_routing(&table).map_err(|e| host(error(e)))
    }

    fn all(&self, vm: &VmFd, assign: bool) -> io::Result<()> {
        let mut heard = self.bells.iter().filter(|(_, belled)| !belled.masked);
        heard.try_for_each(|(number, belled)| irqfd(vm, *number, belled.bell.descriptor(), assign))
    }
}

fn entry((gsi, msi): (u32, Msi)) -> kvm_irq_routing_entry {
    let mut entry =
        kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..kvm_irq_routing_entry::default() };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

/// See [`Routing::silence`].
pub struct Silence<'a> {
    table: MutexGuard<'a, Table>,
    vm: &'a VmFd,
}

impl Drop for Silence<'_> {
    fn drop(&mut self) {
        // They were there before.
        let _ = self.table.all(self.vm, true);
    }
}
