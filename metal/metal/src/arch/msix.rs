//! Interrupts of a virtio function by MSI-X (PCI Local Bus 3.0, 6.8.2; virtio 1.2, 4.1.4.3): all queues that are asked
//! for raise one vector at this processor.
//!
//! Called by: whoever started the function's driver, which knows nothing of them.

use super::interrupts::DEVICE_VECTOR;
use super::lapic;
use super::pci::ConfigPorts;
use virtio_drivers::transport::pci::VIRTIO_PCI_CAP_COMMON_CFG;
use virtio_drivers::transport::pci::bus::{ConfigurationAccess, DeviceFunction, PciRoot};

const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
/// First base-address register.
const BAR_0: u8 = 0x10;
/// Message control: on.
const ENABLE: u32 = 1 << 31;
/// Message control: every vector masked.
const MASK_ALL: u32 = 1 << 30;
/// Where interrupts are written to.
const MESSAGE_ADDRESS: u32 = 0xFEE0_0000;
/// In virtio's common configuration.
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_VECTOR: u64 = 0x1A;

/// The address in a base-address register.
fn base(function: DeviceFunction, number: u32) -> Option<u64> {
    let register = BAR_0 + 4 * u8::try_from(number).ok().filter(|n| *n < 6)?;
    let low = ConfigPorts.read_word(function, register);
    // Memory, of 32 or 64 bits.
    let high = match low & 7 {
        0 => 0,
        4 if number < 5 => ConfigPorts.read_word(function, register + 4),
        _ => return None,
    };
    Some(u64::from(high) << 32 | u64::from(low & !0xF)).filter(|at| *at != 0)
}

/// Has `queues` of a function raise [`DEVICE_VECTOR`]; `false`: it has no MSI-X.
///
/// # Safety
/// A virtio function whose registers are mapped, with a driver that does not select queues meanwhile.
pub unsafe fn enable(function: DeviceFunction, queues: &[u16]) -> bool {
    let root = PciRoot::new(ConfigPorts);
    let (mut table, mut common) = (None, None);
    for capability in root.capabilities(function) {
        let word = |at: u8| ConfigPorts.read_word(function, capability.offset + at);
        match capability.id {
            CAP_MSIX => {
                let place = word(4);
                table = base(function, place & 7).map(|at| (capability.offset, at + u64::from(place & !7)));
            }
            CAP_VENDOR if capability.private_header >> 8 == u16::from(VIRTIO_PCI_CAP_COMMON_CFG) => {
                common = base(function, word(4) & 0xFF).map(|at| at + u64::from(word(8)));
            }
            _ => {}
        }
    }
    let (Some((capability, table)), Some(common)) = (table, common) else { return false };
    let message = [MESSAGE_ADDRESS | lapic::id() << 12, 0, u32::from(DEVICE_VECTOR), 0];
    for (n, word) in (0..).zip(message) {
        let at = core::ptr::with_exposed_provenance_mut::<u32>((table + 4 * n) as usize);
        // SAFETY: the first entry of the function's table, in registers that the caller says are mapped.
        unsafe { at.write_volatile(word) };
    }
    let control = ConfigPorts.read_word(function, capability);
    ConfigPorts.write_word(function, capability, control & !MASK_ALL | ENABLE);
    for queue in queues {
        for (register, value) in [(QUEUE_SELECT, *queue), (QUEUE_VECTOR, 0)] {
            let at = core::ptr::with_exposed_provenance_mut::<u16>((common + register) as usize);
            // SAFETY: registers of the common configuration, as above.
            unsafe { at.write_volatile(value) };
        }
    }
    true
}
