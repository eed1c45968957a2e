//! A virtio function's transport that accepts what `virtio-drivers` does not know: that the device's addresses go through
//! an IOMMU (virtio 1.2, 6: VIRTIO_F_ACCESS_PLATFORM). A device that offers it does not work without.
//!
//! Called by: drivers, as their transport.

use super::pci::ConfigPorts;
use virtio_drivers::transport::pci::bus::{DeviceFunction, PciRoot};
use virtio_drivers::transport::pci::{PciTransport, VirtioPciError};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Hal, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

const ACCESS_PLATFORM: u64 = 1 << 33;

/// See the module's header.
pub struct PlatformTransport {
    pci: PciTransport,
    offered: u64,
}

impl PlatformTransport {
    /// Of the function at `place`.
    pub fn new<H: Hal>(place: DeviceFunction) -> core::result::Result<Self, VirtioPciError> {
        let pci = PciTransport::new::<H, _>(&mut PciRoot::new(ConfigPorts), place)?;
        Ok(Self { pci, offered: 0 })
    }
}

impl Transport for PlatformTransport {
    fn read_device_features(&mut self) -> u64 {
        self.offered = self.pci.read_device_features();
        self.offered
    }
    fn write_driver_features(&mut self, features: u64) {
        self.pci.write_driver_features(features | self.offered & ACCESS_PLATFORM);
    }
    fn device_type(&self) -> DeviceType {
        self.pci.device_type()
    }
    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.pci.max_queue_size(queue)
    }
    fn notify(&mut self, queue: u16) {
        self.pci.notify(queue);
    }
    fn get_status(&self) -> DeviceStatus {
        self.pci.get_status()
    }
    fn set_status(&mut self, status: DeviceStatus) {
        self.pci.set_status(status);
    }
    fn set_guest_page_size(&mut self, bytes: u32) {
        self.pci.set_guest_page_size(bytes);
    }
    fn requires_legacy_layout(&self) -> bool {
        self.pci.requires_legacy_layout()
    }
    fn queue_set(&mut self, queue: u16, size: u32, table: PhysAddr, driver: PhysAddr, device: PhysAddr) {
        self.pci.queue_set(queue, size, table, driver, device);
    }
    fn queue_unset(&mut self, queue: u16) {
        self.pci.queue_unset(queue);
    }
    fn queue_used(&mut self, queue: u16) -> bool {
        self.pci.queue_used(queue)
    }
    fn ack_interrupt(&mut self) -> InterruptStatus {
        self.pci.ack_interrupt()
    }
    fn read_config_generation(&self) -> u32 {
        self.pci.read_config_generation()
    }
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        self.pci.read_config_space(offset)
    }
    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        self.pci.write_config_space(offset, value)
    }
}
