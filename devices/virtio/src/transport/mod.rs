//! How drivers find and configure a device.

pub mod pci;
