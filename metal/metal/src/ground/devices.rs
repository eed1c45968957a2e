//! Devices of the machine that guests get a share of: virtio disks and a virtio network card, by the `virtio-drivers`
//! crate. They are the hypervisor's: what they reach by DMA is its own memory, never a guest's; an IOMMU holds them to it.
//!
//! Called by: [`super::run`] at start, then by the scheduler ([`Uplink::poll`]) and by guests' disks. The card's interrupt
//! calls the scheduler; a disk's request is waited for.

use super::processor::Processor;
use crate::arch::dma::{NotGranted, OneToOne};
use crate::arch::pci::{ConfigPorts, VirtioFunction};
use crate::arch::transport::PlatformTransport;
use crate::arch::{clock, msix};
use crate::disk::Store;
use crate::switch::SwitchPort;
use alloc::boxed::Box;
use alloc::vec::Vec;
use device::Waker;
use sync::Mutex;
use virtio_devices::{BlockError, BlockInfo, NetBackend};
use virtio_drivers::device::blk::{BlkReq, BlkResp, SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::device::net::{TxBuffer, VirtIONet};
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{Command, DeviceFunction, PciRoot};

/// A disk of the machine.
pub struct MachineDisk(VirtIOBlk<OneToOne, PlatformTransport>, DeviceFunction);

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

/// What stands in memory that a disk is told to write though it must not, and how long that is waited for.
const UNTOUCHED: u8 = 0x5C;
const STRAY_NS: u64 = 50_000_000;
const QUEUE: usize = 64;
const RECEIVE_QUEUE: u16 = 0;
const BUFFER_BYTES: usize = 2048;

/// The machine's network card, at a port of the switch.
pub struct Uplink {
    card: VirtIONet<OneToOne, PlatformTransport, QUEUE>,
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
            let transport = match PlatformTransport::new::<OneToOne>(function.place) {
                Ok(transport) => transport,
                Err(error) => {
                    crate::log!("virtio device {}: {error}", function.place);
                    continue;
                }
            };
            match function.kind {
                DeviceType::Block => devices.add_disk(transport, function.place),
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

    fn add_disk(&mut self, transport: PlatformTransport, place: DeviceFunction) {
        match VirtIOBlk::new(transport) {
            Ok(disk) => {
                let disks = self.disks.get_mut();
                crate::log!("disk {}: virtio, {} MiB", disks.len(), disk.capacity() >> 11);
                disks.push(Some(MachineDisk(disk, place)));
            }
            Err(error) => crate::log!("a virtio disk does not start: {error}"),
        }
    }

    fn add_uplink(&mut self, transport: PlatformTransport, place: DeviceFunction, mut port: SwitchPort) {
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

    /// Has a disk that is no VM's read to where it must not write: an IOMMU keeps it from that, and tells. The disk is
    /// lost. For a test.
    pub fn stray(&self) -> Result<(), &'static str> {
        let mut disks = self.disks.lock();
        let disk = disks.iter_mut().find_map(Option::take).ok_or("no disk is left that is no VM's")?;
        drop(disks);
        let place = disk.1;
        drop(disk);
        let transport = PlatformTransport::new::<NotGranted>(place).map_err(|_| "the disk is gone")?;
        let disk = VirtIOBlk::<NotGranted, _>::new(transport).map_err(|_| "the disk does not start")?;
        // The device has their addresses for ever.
        let disk = Box::leak(Box::new(disk));
        let room = Box::leak(Box::new(([UNTOUCHED; SECTOR_SIZE], BlkReq::default(), BlkResp::default())));
        let (sector, request, answer) = (&mut room.0, &mut room.1, &mut room.2);
        // SAFETY: the buffers live for ever, and nobody looks at them.
        let asked = unsafe { disk.read_blocks_nb(0, request, sector, answer) };
        asked.map_err(|_| "the disk takes no request")?;
        let until = clock::now_ns() + STRAY_NS;
        while clock::now_ns() < until {
            core::hint::spin_loop();
        }
        let first = sector.as_ptr();
        // SAFETY: a byte of the buffer, which only the device may have written.
        let written = unsafe { first.read_volatile() } != UNTOUCHED;
        crate::log!(
            "a disk was told to write where it must not: it has{} written",
            if written { "" } else { " not" }
        );
        Ok(())
    }

    /// Gives devices the processor.
    pub fn poll(&self) {
        if let Some(uplink) = &self.uplink {
            uplink.lock().poll();
        }
    }
}
