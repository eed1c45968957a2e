//! Where one device is put: regions, lines, PCI slots. A transaction: what was handed out is taken back when the site
//! is dropped without [`Site::commit`].
//!
//! Called by: the build files, one site for each device; the same at boot, restore and hot-plug.

use super::{BuildError, q35::Board};
use crate::devices::SharedDevice;
use crate::host::{DeviceSlot, HostServices};
use alloc::boxed::Box;
use alloc::string::ToString;
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::MessageSink;
use device::{Device, Doorbell, IrqLine, RegionId, Register, Waker};
use guest_memory::DmaSpace;
use guest_time::{GuestClock, Timer};
use hypervisor::MsiSink;
use machine_spec::{PciSlot, layout};
use pci::{Devfn, FunctionId, Parent, PciFunction, pirq_of};
use sync::Mutex;

/// A range of one of the two buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Ports: first, number.
    Ports(u16, u16),
    /// Memory-mapped registers: first address, bytes.
    Memory(u64, u64),
}

enum Undo {
    Port(RegionId),
    Memory(RegionId),
    Function(FunctionId),
}

/// See the module's header.
pub struct Site<'b> {
    board: &'b mut Board,
    host: &'b dyn HostServices,
    slot: DeviceSlot,
    devices_before: usize,
    slots_before: usize,
    undo: Vec<Undo>,
    committed: bool,
}

impl<'b> Site<'b> {
    /// A site on `board`.
    pub fn new(board: &'b mut Board, host: &'b dyn HostServices) -> Self {
        let (devices_before, slots_before) = (board.devices.len(), board.slots.len());
        Self {
            board,
            host,
            slot: DeviceSlot::new(),
            devices_before,
            slots_before,
            undo: Vec::new(),
            committed: false,
        }
    }

    /// All guest time.
    pub fn clock(&self) -> GuestClock {
        self.host.clock().clone()
    }
    /// A waker of the device that will be placed.
    pub fn waker(&self) -> Waker {
        self.host.waker(&self.slot)
    }
    /// A timer of the device that will be placed.
    pub fn timer(&self) -> Box<dyn Timer> {
        self.host.timer(&self.slot)
    }
    /// ISA interrupt `line`, shared with whoever else drives it.
    pub fn isa_irq(&self, line: u8) -> IrqLine {
        self.board.lines.isa(line)
    }
    /// A PIRQ (0 = A), shared with the PCI functions on it.
    pub fn pirq(&self, pirq: u8) -> IrqLine {
        self.board.pirq.line(pirq)
    }
    /// Where chips send message-signalled interrupts.
    pub fn messages(&self) -> Arc<dyn MessageSink> {
        self.board.messages.clone()
    }
    /// Guest RAM behind the bus-master bit of the function that will be placed.
    pub fn dma(&self) -> DmaSpace {
        DmaSpace::new(self.board.ram.clone())
    }
    /// Where the function's MSI routes come from.
    pub fn msi(&self) -> &dyn MsiSink {
        &*self.board.msi
    }

    /// A doorbell for a register of the device that will be placed, if the ground has bells.
    pub fn doorbell(&self, register: Register) -> Option<Arc<dyn Doorbell>> {
        let bell = self.host.bell(&self.slot, register)?;
        Some(self.board.doorbells.add(bell))
    }

    /// Puts `device` on the board; its regions are numbered in the order given.
    pub fn place<D: Device + 'static>(
        &mut self,
        device: D,
        regions: &[Range],
    ) -> Result<Arc<Mutex<D>>, BuildError> {
        let device = Arc::new(Mutex::new(device));
        self.place_shared(&device, regions)?;
        Ok(device)
    }

    /// As `place`, for a device that somebody else knows already.
    pub fn place_shared<D: Device + 'static>(
        &mut self,
        device: &Arc<Mutex<D>>,
        regions: &[Range],
    ) -> Result<(), BuildError> {
        self.enlist(device)?;
        for (number, range) in regions.iter().enumerate() {
            let shared: SharedDevice = device.clone();
            let (base, placed) = match *range {
                Range::Ports(first, count) => {
                    let placed = self.board.ports.insert(first.into(), count.into(), shared, number);
                    (u64::from(first), placed.map(Undo::Port))
                }
                Range::Memory(base, bytes) => {
                    let placed = self.board.memory.insert(base, bytes, shared, number);
                    (base, placed.map(Undo::Memory))
                }
            };
            let device = || device.lock().name().to_string();
            self.undo.push(placed.map_err(|source| BuildError::Region { device: device(), base, source })?);
        }
        Ok(())
    }

    /// Adds a device to those of the machine, and lets its wakers and timers find it.
    fn enlist<D: Device + 'static>(&mut self, device: &Arc<Mutex<D>>) -> Result<(), BuildError> {
        let shared: SharedDevice = device.clone();
        self.slot.fill(&shared);
        self.board.devices.add(shared).map_err(|name| BuildError::Name { name })
    }

    /// The slot asked for if it is free, or the first free one.
    pub fn pci_slot(&self, wanted: Option<PciSlot>) -> Result<PciSlot, BuildError> {
        let taken = |slot: &PciSlot| self.board.slots.contains(slot);
        let slot = match wanted {
            Some(slot) if slot.bus != 0 || taken(&slot) => return Err(BuildError::Slot { slot }),
            Some(slot) => slot,
            None => {
                let devices = layout::slot::FIRST_FREE..super::q35::FIRST_ROOT_PORT;
                let mut free =
                    devices.map(|device| PciSlot { bus: 0, device, function: 0 }).filter(|s| !taken(s));
                free.next().ok_or(BuildError::NoSlot)?
            }
        };
        Ok(slot)
    }

    /// INTA of a slot.
    pub fn intx(&self, slot: PciSlot) -> IrqLine {
        self.board.pirq.line(pirq_of(slot.device, 1))
    }

    /// Puts a PCI function into `slot` of the root bus.
    pub fn attach<F: PciFunction + 'static>(
        &mut self,
        function: F,
        slot: PciSlot,
    ) -> Result<Arc<Mutex<F>>, BuildError> {
        let function = Arc::new(Mutex::new(function));
        self.enlist(&function)?;
        let devfn = Devfn::new(slot.device, slot.function);
        let id =
            self.board.topology.attach(Parent::Root, devfn, function.clone()).map_err(BuildError::Attach)?;
        self.undo.push(Undo::Function(id));
        self.board.slots.push(slot);
        Ok(function)
    }

    /// Keeps what was handed out.
    pub fn commit(mut self) {
        self.committed = true;
    }
}

impl Drop for Site<'_> {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        for undo in self.undo.drain(..).rev() {
            match undo {
                Undo::Port(region) => _ = self.board.ports.remove(region),
                Undo::Memory(region) => _ = self.board.memory.remove(region),
                Undo::Function(id) => self.board.topology.detach(id),
            }
        }
        self.board.devices.truncate(self.devices_before);
        self.board.slots.truncate(self.slots_before);
    }
}
