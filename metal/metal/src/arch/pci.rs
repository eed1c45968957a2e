//! PCI configuration space through the ports that every PC has (PCI Local Bus 3.0, 3.2.2.3.2), and the virtio functions
//! that are found there.
//!
//! Called by: [`crate::start`], before page tables are made, because firmware may have put registers above all RAM.

use super::{in32, out32};
use alloc::vec::Vec;
use core::ops::Range;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    BarInfo, ConfigurationAccess, DeviceFunction, HeaderType, PciRoot,
};
use virtio_drivers::transport::pci::virtio_device_type;

const ADDRESS: u16 = 0xCF8;
const DATA: u16 = 0xCFC;
/// Most functions that are kept.
const MAX_FUNCTIONS: usize = 32;
/// Register with the bus behind a bridge, in its second byte.
const BRIDGE_BUSES: u8 = 0x18;

static PORTS: spin::Mutex<()> = spin::Mutex::new(());

/// The ports.
pub struct ConfigPorts;

fn select(function: DeviceFunction, register: u8) {
    let DeviceFunction { bus, device, function } = function;
    let place = u32::from(bus) << 16 | u32::from(device & 31) << 11 | u32::from(function & 7) << 8;
    out32(ADDRESS, 1 << 31 | place | u32::from(register & !3));
}

impl ConfigurationAccess for ConfigPorts {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        let _alone = PORTS.lock();
        select(function, register);
        in32(DATA)
    }
    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        let _alone = PORTS.lock();
        select(function, register);
        out32(DATA, data);
    }
    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// A virtio function of the machine.
#[derive(Clone, Debug)]
pub struct VirtioFunction {
    /// Where it is.
    pub place: DeviceFunction,
    /// What it is.
    pub kind: DeviceType,
    /// Its registers in memory.
    pub registers: Vec<Range<u64>>,
}

/// All that there are, bridge by bridge.
pub fn virtio_functions() -> Vec<VirtioFunction> {
    let mut root = PciRoot::new(ConfigPorts);
    let (mut found, mut buses, mut next) = (Vec::new(), alloc::vec![0u8], 0);
    while let Some(bus) = buses.get(next).copied() {
        next += 1;
        let functions: Vec<_> = root.enumerate_bus(bus).collect();
        for (place, info) in functions {
            if info.header_type == HeaderType::PciPciBridge {
                let behind = (ConfigPorts.read_word(place, BRIDGE_BUSES) >> 8) as u8;
                // Firmware numbers buses upwards; what it did not number is not looked behind.
                if behind > bus && !buses.contains(&behind) {
                    buses.push(behind);
                }
            }
            let Some(kind) = virtio_device_type(&info).filter(|_| found.len() < MAX_FUNCTIONS) else {
                continue;
            };
            let bars = root.bars(place).unwrap_or_default();
            let registers = bars.into_iter().flatten().filter_map(|bar| match bar {
                BarInfo::Memory { address, size, .. } if address != 0 => {
                    Some(address..address.saturating_add(size))
                }
                _ => None,
            });
            found.push(VirtioFunction { place, kind, registers: registers.collect() });
        }
    }
    found
}
