//! Where the structures stand, and the capabilities that say so (VIRTIO 1.2, 4.1.4).

use crate::device::DeviceType;
use pci::{BarKind, ConfigSpace, Identity, regs};

/// BAR with the structures.
pub const STRUCTURES_BAR: u8 = 0;
/// BAR with the MSI-X table.
pub const MSIX_BAR: u8 = 1;

pub const STRUCTURES_BYTES: u64 = 0x4000;
pub const COMMON: u64 = 0x0000;
pub const ISR: u64 = 0x1000;
pub const DEVICE: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
pub const PART_BYTES: u64 = 0x1000;
/// Bytes from one queue's notification address to the next: room for a doorbell each.
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Queues that the notification structure has room for.
pub const MAX_QUEUES: usize = (PART_BYTES / NOTIFY_MULTIPLIER as u64) as usize;

const VENDOR: u16 = 0x1AF4;
/// PCI device IDs of modern devices start here.
const DEVICE_BASE: u16 = 0x1040;

const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Offsets in the PCI configuration access capability.
pub mod window {
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    pub const DATA: u16 = 16;
    pub const END: u16 = 20;
}

/// The configuration space of a device of `kind`, with the offset of its configuration access capability.
pub fn config_space(kind: DeviceType) -> (ConfigSpace, u16) {
    let device = DEVICE_BASE + kind.id;
    let identity =
        Identity { vendor: VENDOR, device, class: kind.pci_class, revision: 1, subsystem: (VENDOR, device) };
    let mut config = ConfigSpace::endpoint(identity);
    config.add_bar(STRUCTURES_BAR, BarKind::Memory32, STRUCTURES_BYTES);
    let mut add = |cfg_type: u8, offset: u64, bytes: u64, extra: &[u8]| {
        // Behind vendor and next: length, type, BAR, id and padding, offset, length.
        let mut body = [0u8; 18];
        body[0] = 16 + extra.len() as u8;
        body[1] = cfg_type;
        body[2] = STRUCTURES_BAR;
        body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
        body[10..14].copy_from_slice(&(bytes as u32).to_le_bytes());
        body[14..14 + extra.len()].copy_from_slice(extra);
        config.add_capability(regs::CAP_VENDOR, &body[..14 + extra.len()])
    };
    add(CFG_COMMON, COMMON, PART_BYTES, &[]);
    add(CFG_NOTIFY, NOTIFY, PART_BYTES, &NOTIFY_MULTIPLIER.to_le_bytes());
    add(CFG_ISR, ISR, PART_BYTES, &[]);
    add(CFG_DEVICE, DEVICE, PART_BYTES, &[]);
    let at = add(CFG_PCI, 0, 0, &[0; 4]);
    config.allow(at + window::BAR, 1, 0xFF);
    config.allow(at + window::OFFSET, 8, u64::MAX);
    config.allow(at + window::DATA, 4, u64::MAX);
    (config, at)
}
