//! Devices of the machine that guests get a share of: virtio disks and a virtio network card, by the `virtio-drivers`
//! crate. They are the hypervisor's: what they reach by DMA is its own memory, never a guest's.
//!
//! Called by: [`super::run`] at start, then by the scheduler ([`Uplink::poll`]) and by guests' disks. The card's interrupt
//! calls the scheduler; a disk's request is waited for.

use super::processor::Processor;
use crate::arch::dma::OneToOne;
use crate::arch::msix;
use crate::arch::pci::{ConfigPorts, VirtioFunction};
use crate::disk::Store;
use crate::switch::SwitchPort;
use alloc::vec::Vec;
use device::Waker;
use sync::Mutex;
use virtio_devices::{BlockError, BlockInfo, NetBackend};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};

/// A disk of the machine.
pub struct MachineDisk(VirtIOBlk<OneToOne, PciTransport>);

impl Store for MachineDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: self.0.capacity().saturating_mul(SECTOR_SIZE as u64),
            read_only: self.0.readonly(),
            block_bytes: SECTOR_SIZE as u32,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }
    fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), BlockError> {
        let sector = self.sector(at, to.len())?;
        self.0.read_blocks(sector, to).map_err(|_| BlockError::Io)
    }
    fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError> {
        let sector = self.sector(at, from.len())?;
        self.0.write_blocks(sector, from).map_err(|_| BlockError::Io)
    }
    fn flush(&mut self) -> Result<(), BlockError> {
        self.0.flush().map_err(|_| BlockError::Io)
    }
}

impl MachineDisk {
    /// The first sector of a transfer that is inside the disk, and whole sectors.
    fn sector(&self, at: u64, bytes: usize) -> Result<usize, BlockError> {
        let end = at.checked_add(bytes as u64).ok_or(BlockError::Io)?;
        let whole = (at | bytes as u64).is_multiple_of(SECTOR_SIZE as u64) && bytes > 0;
        if !whole || end > self.info().bytes {
            return Err(BlockError::Io);
        }
        usize::try_from(at / SECTOR_SIZE as u64).map_err(|_| BlockError::Io)
    }
}

const QUEUE: usize = 64;
const RECEIVE_QUEUE: u16 = 0;
const BUFFER_BYTES: usize = 2048;

/// The machine's network card, at a port of the switch.
pub struct Uplink {
    card: VirtIONet<OneToOne, PciTransport, QUEUE>,
    port: SwitchPort,
}

impl Uplink {
    /// Moves frames in both directions.
    pub fn poll(&mut self) {
        while let Some(frame) = self.port.next_frame() {
            // Without room it is lost, as on a wire.
            let _ = self.card.send(TxBuffer::from(&frame));
        }
        while let Ok(buffer) = self.card.receive() {
            self.port.give(buffer.packet());
            if self.card.recycle_rx_buffer(buffer).is_err() {
                break;
            }
        }
    }
}

/// See the module's header.
#[derive(Default)]
pub struct Devices {
    disks: Mutex<Vec<Option<MachineDisk>>>,
    /// The first network card.
    pub uplink: Option<Mutex<Uplink>>,
}

impl Devices {
    /// Starts those of `functions` that are known; `plug` makes a port of the switch.
    pub fn start(functions: &[VirtioFunction], plug: impl FnOnce() -> SwitchPort) -> Self {
        let mut devices = Self::default();
        let mut plug = Some(plug);
        for function in functions {
            let mut root = PciRoot::new(ConfigPorts);
            let wanted = Command::MEMORY_SPACE | Command::BUS_MASTER | Command::INTERRUPT_DISABLE;
            root.set_command(function.place, wanted);
            let transport = match PciTransport::new::<OneToOne, _>(&mut root, function.place) {
                Ok(transport) => transport,
                Err(error) => {
                    crate::log!("virtio device {}: {error}", function.place);
                    continue;
                }
            };
            match function.kind {
                DeviceType::Block => devices.add_disk(transport),
                DeviceType::Network => {
                    if let Some(plug) = plug.take() {
                        devices.add_uplink(transport, function.place, plug());
                    }
                }
                _ => {}
            }
        }
        devices
    }

    fn add_disk(&mut self, transport: PciTransport) {
        match VirtIOBlk::new(transport) {
            Ok(disk) => {
                let disks = self.disks.get_mut();
                crate::log!("disk {}: virtio, {} MiB", disks.len(), disk.capacity() >> 11);
                disks.push(Some(MachineDisk(disk)));
            }
            Err(error) => crate::log!("a virtio disk does not start: {error}"),
        }
    }

    fn add_uplink(&mut self, transport: PciTransport, place: DeviceFunction, mut port: SwitchPort) {
        match VirtIONet::new(transport, BUFFER_BYTES) {
            Ok(card) => {
                crate::log!("network card: virtio, {:02x?}", card.mac_address());
                // SAFETY: page tables map the registers; the driver has set its queues up and selects none again.
                let interrupts = unsafe { msix::enable(place, &[RECEIVE_QUEUE]) };
                if !interrupts {
                    crate::log!("it has no MSI-X, and will be looked at with every turn only");
                }
                port.set_waker(Waker::new(Processor::want_scheduler));
                self.uplink = Some(Mutex::new(Uplink { card, port }));
            }
            Err(error) => crate::log!("the virtio network card does not start: {error}"),
        }
    }

    /// Disk `number`, for one guest.
    pub fn take_disk(&self, number: usize) -> Option<MachineDisk> {
        self.disks.lock().get_mut(number)?.take()
    }

    /// Gives devices the processor.
    pub fn poll(&self) {
        if let Some(uplink) = &self.uplink {
            uplink.lock().poll();
        }
    }
}
