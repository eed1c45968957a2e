//! From a spec to a machine: the order of steps.
//!
//! Called by: `vmm` and `metal`, through [`Machine::build`]. A new device is one variant of the spec, one file here,
//! one device file.

mod blk;
pub(crate) mod chips;
mod console;
mod net;
pub mod q35;
mod rng;
pub mod site;
mod uart;
mod virtio_pci;

use crate::boot::BootError;
use crate::host::{HostError, HostServices};
use crate::machine::{Machine, VcpuSlot};
use crate::moving::Engine;
use crate::requests::RequestQueue;
use crate::switch::Switch;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use guest_memory::{GuestRam, Region};
use hypervisor::{EngineError, Hypervisor, Partition, PartitionLayout};
use machine_spec::layout::RamLayout;
use machine_spec::{DeviceSpec, MachineSpec, PciSlot, SpecError};
use q35::Board;
use site::Site;
use sync::Mutex;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The spec is wrong.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The address map is impossible.
    #[error(transparent)]
    Layout(#[from] machine_spec::layout::LayoutError),
    /// The CPU model is not known, or this engine cannot give it.
    #[error("cpu model: {0}")]
    CpuModel(String),
    /// The engine refuses.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host's memory does not fit the map.
    #[error(transparent)]
    Ram(#[from] guest_memory::LayoutError),
    /// The host cannot give something.
    #[error("{what}: {source}")]
    Host {
        /// What for.
        what: String,
        /// Its words.
        source: HostError,
    },
    /// Registers that find no place.
    #[error("registers of {device} at {base:#x}: {source}")]
    Region {
        /// Whose.
        device: String,
        /// Where.
        base: u64,
        /// Why.
        source: device::BusError,
    },
    /// Two devices of one name.
    #[error("there is already a device `{name}`")]
    Name {
        /// The name.
        name: String,
    },
    /// A slot that is not free, or not on the root bus.
    #[error("PCI slot {:02x}:{:02x}.{} is not free for a device", slot.bus, slot.device, slot.function)]
    Slot {
        /// The slot.
        slot: PciSlot,
    },
    /// Too many PCI devices.
    #[error("no free PCI slot is left")]
    NoSlot,
    /// A function that cannot be attached.
    #[error(transparent)]
    Attach(pci::AttachError),
    /// What is to be booted cannot be.
    #[error(transparent)]
    Boot(#[from] BootError),
}

/// What a machine is built from.
pub struct Parts<'a> {
    /// The engine.
    pub engine: &'a dyn Hypervisor,
    /// The ground.
    pub host: &'a dyn HostServices,
    /// Where the guest's own requests go.
    pub requests: Arc<RequestQueue>,
}

impl Machine {
    /// Builds the machine of `spec` and leaves it as after power-up, without anything booted.
    pub fn build(mut spec: MachineSpec, parts: &Parts<'_>) -> Result<Self, BuildError> {
        spec.validate()?;
        let layout = spec.layout()?;
        let ram = ram(&spec, &layout, parts.host)?;
        let partition_layout = partition_layout(&mut spec, &ram, parts)?;
        let switch = Switch::new(parts.engine.create_partition(&partition_layout)?);
        let missed = match spec.clock.missed_ticks {
            machine_spec::MissedTicks::Discard => chipset::MissedTicks::Discard,
            machine_spec::MissedTicks::Reinject => chipset::MissedTicks::Reinject,
        };
        let (mut board, chips) = Board::new(&layout, ram, &switch, missed, parts)?;
        for device in &mut spec.devices {
            build_device(device, &mut board, parts)?;
        }
        let vcpus = vcpus(&spec, &*switch.partition(), parts)?;
        let tables = crate::boot::tables(&spec, &layout);
        Ok(Self {
            spec,
            layout,
            ram: partition_layout.ram.clone(),
            clock: parts.host.clock().clone(),
            partition_layout,
            switch,
            engine: Mutex::new(Engine::new(parts.engine.capabilities().name)),
            vcpus,
            io: Arc::new(board.io(&chips)),
            ioapic: board.ioapic.clone(),
            devices: board.devices,
            topology: board.topology,
            tables,
            power: chips.power,
            requests: parts.requests.clone(),
        })
    }
}

fn ram(spec: &MachineSpec, layout: &RamLayout, host: &dyn HostServices) -> Result<GuestRam, BuildError> {
    let span =
        host.allocate_ram(&spec.ram).map_err(|source| BuildError::Host { what: "ram".into(), source })?;
    let regions = layout.ranges().into_iter().map(|range| Region {
        gpa: range.span.start.0,
        bytes: range.span.size,
        offset: range.backing_offset,
    });
    Ok(GuestRam::new(span, regions.collect())?)
}

fn partition_layout(
    spec: &mut MachineSpec,
    ram: &GuestRam,
    parts: &Parts<'_>,
) -> Result<PartitionLayout, BuildError> {
    Ok(PartitionLayout {
        ram: ram.clone(),
        vcpus: spec.cpus.count,
        cpu_model: crate::cpu_model::resolve(&mut spec.cpus).map_err(BuildError::CpuModel)?,
        tsc_khz: spec.clock.tsc_khz,
        clock: parts.host.clock().clone(),
    })
}

fn vcpus(
    spec: &MachineSpec,
    partition: &dyn Partition,
    parts: &Parts<'_>,
) -> Result<Vec<VcpuSlot>, BuildError> {
    let create = |id| Ok(VcpuSlot::new(partition.create_vcpu(id, parts.host.vcpu_wake(id))?));
    (0..spec.cpus.count).map(create).collect()
}

fn build_device(spec: &mut DeviceSpec, board: &mut Board, parts: &Parts<'_>) -> Result<(), BuildError> {
    let mut site = Site::new(board, parts.host);
    match spec {
        DeviceSpec::Uart(spec) => uart::build(spec, &mut site, parts.host)?,
        DeviceSpec::Blk(spec) => blk::build(spec, &mut site, parts.host)?,
        DeviceSpec::Net(spec) => net::build(spec, &mut site, parts.host)?,
        DeviceSpec::Console(spec) => console::build(spec, &mut site, parts.host)?,
        DeviceSpec::Rng(spec) => rng::build(spec, &mut site, parts.host)?,
    }
    site.commit();
    Ok(())
}
