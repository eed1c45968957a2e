//! What a machine is made of.
//!
//! Filled by `vmm` from its wire types and by `machine`, which writes back what it assigned (PCI
//! slots), so that restore and migration rebuild the same shape. Host resources (files, networks,
//! terminals) appear only as [`HostKey`]s: what they are is the host's business, and may be
//! different on the target of a migration.

use crate::identity::{Mac, Uuid};
use crate::layout::{DEFAULT_PHYSICAL_ADDRESS_BITS, LayoutError, RamLayout};
use alloc::string::String;
use alloc::vec::Vec;

/// The name by which `HostServices` knows a resource of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostKey(pub String);

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// Name for people.
    pub name: String,
    /// Identity, as the guest sees it in SMBIOS.
    pub uuid: Uuid,
    /// Processors.
    pub cpus: CpuSpec,
    /// Memory.
    pub ram: RamSpec,
    /// What starts it.
    pub boot: BootSpec,
    /// Time.
    pub clock: ClockSpec,
    /// Devices; their order is the order in which free slots are handed out.
    pub devices: Vec<DeviceSpec>,
}

impl MachineSpec {
    /// The address map.
    pub fn layout(&self) -> Result<RamLayout, LayoutError> {
        RamLayout::with_hot_add(self.ram.bytes, self.ram.hotplug_bytes, self.cpus.address_bits)
    }
}

/// Processors of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// Present at start.
    pub count: u32,
    /// The most that there may ever be; reserved in the ACPI tables.
    pub max: u32,
    /// Named and versioned CPU model, such as `x86-64-v3`.
    pub model: String,
    /// Changes to the model.
    pub features: Vec<CpuFeature>,
    /// Physical address bits of the model.
    pub address_bits: u8,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self {
            count: 1,
            max: 1,
            model: "x86-64-v3".into(),
            features: Vec::new(),
            address_bits: DEFAULT_PHYSICAL_ADDRESS_BITS,
        }
    }
}

/// One `+feature` or `-feature`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuFeature {
    /// Name without sign.
    pub name: String,
    /// `+` or `-`.
    pub enabled: bool,
}

/// Memory of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamSpec {
    /// Present at start.
    pub bytes: u64,
    /// Room in the address map for memory that is added later.
    pub hotplug_bytes: u64,
    /// Where the host takes it from.
    pub backing: RamBacking,
}

/// Where guest RAM comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RamBacking {
    /// A memory file, which other processes may map.
    #[default]
    Memfd,
    /// Private memory of the VM's process.
    Anonymous,
    /// Huge pages of the given size.
    Huge {
        /// 2 MiB or 1 GiB.
        page_bytes: u64,
    },
}

/// Direct boot of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootSpec {
    /// bzImage or PVH ELF.
    pub kernel: HostKey,
    /// Initial RAM disk.
    pub initrd: Option<HostKey>,
    /// Kernel command line.
    pub command_line: String,
}

/// Time in a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockSpec {
    /// Rate of the guest's time stamp counter.
    pub tsc_khz: u32,
    /// Guest time per host time.
    pub rate: ClockRate,
    /// What periodic timers do with ticks that nobody took.
    pub missed_ticks: MissedTicks,
}

impl Default for ClockSpec {
    fn default() -> Self {
        Self { tsc_khz: 1_000_000, rate: ClockRate::default(), missed_ticks: MissedTicks::default() }
    }
}

/// Guest nanoseconds per host nanosecond, as a fraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockRate {
    /// Guest.
    pub numerator: u32,
    /// Host.
    pub denominator: u32,
}

impl Default for ClockRate {
    fn default() -> Self {
        Self { numerator: 1, denominator: 1 }
    }
}

/// A policy for ticks of a periodic timer that were not delivered in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MissedTicks {
    /// Forget them: right for guests that read a clock.
    #[default]
    Discard,
    /// Deliver them later, one after the other: right for guests that count ticks.
    Reinject,
}

/// A place on a PCI bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PciSlot {
    /// Bus; 0 is the root bus.
    pub bus: u8,
    /// Device on it.
    pub device: u8,
    /// Function of the device.
    pub function: u8,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceSpec {
    /// Serial port.
    Uart(UartSpec),
    /// virtio-blk.
    Blk(BlkSpec),
    /// virtio-net.
    Net(NetSpec),
    /// virtio-console.
    Console(ConsoleSpec),
    /// virtio-rng.
    Rng(RngSpec),
}

impl DeviceSpec {
    /// The name by which management speaks of it; serial ports are named by their port.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Uart(_) => None,
            Self::Blk(spec) => Some(&spec.id),
            Self::Net(spec) => Some(&spec.id),
            Self::Console(spec) => Some(&spec.id),
            Self::Rng(spec) => Some(&spec.id),
        }
    }

    /// Its PCI slot, where it has one: `None` inside means that `machine` assigns it.
    pub fn slot(&self) -> Option<Option<PciSlot>> {
        match self {
            Self::Uart(_) => None,
            Self::Blk(spec) => Some(spec.slot),
            Self::Net(spec) => Some(spec.slot),
            Self::Console(spec) => Some(spec.slot),
            Self::Rng(spec) => Some(spec.slot),
        }
    }

    /// Writes back the slot that was assigned; a serial port has none and stays as it is.
    pub fn set_slot(&mut self, assigned: PciSlot) {
        match self {
            Self::Uart(_) => {}
            Self::Blk(spec) => spec.slot = Some(assigned),
            Self::Net(spec) => spec.slot = Some(assigned),
            Self::Console(spec) => spec.slot = Some(assigned),
            Self::Rng(spec) => spec.slot = Some(assigned),
        }
    }
}

/// A 16550 serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UartSpec {
    /// 0 is COM1, 3 is COM4.
    pub port: u8,
    /// What it is connected to; nothing if absent.
    pub stream: Option<HostKey>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlkSpec {
    /// Name for management.
    pub id: String,
    /// The host's disk.
    pub disk: HostKey,
    /// The guest may not write.
    pub read_only: bool,
    /// Serial number that the guest sees; may be empty.
    pub serial: String,
    /// The guest may give blocks back.
    pub discard: bool,
    /// PCI slot; assigned if absent.
    pub slot: Option<PciSlot>,
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Name for management.
    pub id: String,
    /// Address that the guest sees.
    pub mac: Mac,
    /// The host's network.
    pub backend: HostKey,
    /// PCI slot; assigned if absent.
    pub slot: Option<PciSlot>,
}

/// A paravirtual console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Name for management.
    pub id: String,
    /// What it is connected to; nothing if absent.
    pub stream: Option<HostKey>,
    /// PCI slot; assigned if absent.
    pub slot: Option<PciSlot>,
}

/// A source of random numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngSpec {
    /// Name for management.
    pub id: String,
    /// PCI slot; assigned if absent.
    pub slot: Option<PciSlot>,
}
