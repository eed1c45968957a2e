//! What every virtio device has around it: a PCI function on the root bus, guest memory, interrupts.

use super::BuildError;
use super::site::Site;
use alloc::boxed::Box;
use machine_spec::PciSlot;
use pci::PciFunction;
use virtio::VirtioDevice;
use virtio::transport::pci::{VirtioPci, VirtioPciConfig};

/// Puts `device` into `slot`, or into the first free one, which is written back.
pub fn place(
    id: &str,
    slot: &mut Option<PciSlot>,
    device: Box<dyn VirtioDevice>,
    site: &mut Site<'_>,
) -> Result<(), BuildError> {
    let at = site.pci_slot(*slot)?;
    let config = VirtioPciConfig {
        name: id.into(),
        dma: site.dma(),
        line: site.intx(at),
        waker: site.waker(),
        on_root_bus: at.bus == 0,
    };
    let mut function = VirtioPci::new(device, config, site.msi())?;
    for register in function.notification_registers() {
        if let Some(doorbell) = site.doorbell(register) {
            function.core_mut().add_doorbell(register, doorbell);
        }
    }
    site.attach(function, at)?;
    *slot = Some(at);
    Ok(())
}
