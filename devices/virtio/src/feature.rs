//! Feature bits that do not belong to a device type (VIRTIO 1.2, section 6).

/// Chains may continue in a table of their own.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts are asked for by index.
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// The device follows version 1 or later; always required.
pub const VERSION_1: u64 = 1 << 32;

/// What the transport offers for every device.
pub const TRANSPORT: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;
