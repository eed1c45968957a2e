//! The engine's face to `cpu_soft`: what the hardware can do, and a partition's share of it.

use crate::permission::{IoBitmaps, MsrBitmap};
use crate::processor::Vmx;
use crate::vcpu::VmxVcpu;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use cpu_hardware::identifiers::Identifiers;
use cpu_hardware::nested::Format;
use cpu_hardware::{Ground, GuestShare};
use cpu_soft::hardware::{Hardware, HardwareEngine, HardwarePartition};
use hypervisor::{Capabilities, EngineError, PartitionLayout};

/// VPIDs have 16 bits.
const VPIDS: u32 = 1 << 16;

/// See the module's header.
pub struct VmxEngine {
    shared: Arc<EngineShared>,
}

/// What all partitions share.
pub struct EngineShared {
    /// The processors'.
    pub vmx: Vmx,
    /// The ground.
    pub ground: Arc<dyn Ground>,
    /// No port without an exit.
    pub io_bitmaps: Box<IoBitmaps>,
    /// Few MSRs.
    pub msr_bitmap: Box<MsrBitmap>,
    /// VPIDs, whether or not the processor tags translations.
    pub vpids: Identifiers,
}

impl VmxEngine {
    /// On processors where [`Vmx::enable`] was called, or will be before a guest runs.
    pub fn new(vmx: Vmx, ground: Arc<dyn Ground>) -> Self {
        let (io_bitmaps, msr_bitmap) = (IoBitmaps::closed(), MsrBitmap::of_guest());
        let vpids = Identifiers::new(VPIDS);
        Self { shared: Arc::new(EngineShared { vmx, ground, io_bitmaps, msr_bitmap, vpids }) }
    }
}

impl HardwareEngine for VmxEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "vmx",
            max_vcpus: self.shared.vpids.for_guests(),
            features: self.shared.vmx.features(),
            tsc_scaling: true,
            tsc_khz: Some(self.shared.ground.tsc_khz()),
        }
    }

    fn partition(&self, layout: &PartitionLayout) -> Result<Box<dyn HardwarePartition>, EngineError> {
        let partition = PartitionShared::new(self.shared.clone(), layout)?;
        Ok(Box::new(VmxPartition(Arc::new(partition))))
    }
}

/// What the vCPUs of a partition share.
pub struct PartitionShared {
    /// The engine's.
    pub engine: Arc<EngineShared>,
    /// What is the same on any processor.
    pub guest: GuestShare,
}

impl PartitionShared {
    fn new(engine: Arc<EngineShared>, layout: &PartitionLayout) -> Result<Self, EngineError> {
        let guest = GuestShare::new(&*engine.ground, layout, Format::Ept, engine.vmx.huge_pages)?;
        Ok(Self { engine, guest })
    }

    /// For the VMCS and for INVEPT.
    pub fn ept_pointer(&self) -> u64 {
        self.engine.vmx.ept_pointer(self.guest.tables.root())
    }
}

struct VmxPartition(Arc<PartitionShared>);

impl HardwarePartition for VmxPartition {
    fn vcpu(&self, _: u32) -> Result<Box<dyn Hardware>, EngineError> {
        let vpid = self.0.engine.vpids.take()?;
        Ok(Box::new(VmxVcpu::new(self.0.clone(), vpid)))
    }

    fn counts(&self) -> Vec<(String, u64)> {
        self.0.guest.exits.named()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::processor::tests::vmx;
    use cpu_hardware::testing::{Nowhere, layout};

    /// A partition on a processor of 2 GHz.
    pub fn partition(tsc_khz: u32) -> Arc<PartitionShared> {
        let engine = VmxEngine::new(vmx(), Arc::new(Nowhere::default()));
        Arc::new(PartitionShared::new(engine.shared, &layout(tsc_khz)).unwrap())
    }

    #[test]
    fn a_partition_names_its_ram_in_ept() {
        let engine = VmxEngine::new(vmx(), Arc::new(Nowhere::default()));
        assert_eq!((engine.capabilities().name, engine.capabilities().max_vcpus), ("vmx", 4095));
        let vcpu = engine.partition(&layout(1_000_000)).unwrap().vcpu(0);
        assert!(vcpu.is_ok());
        let shared = partition(1_000_000);
        assert_eq!(shared.ept_pointer(), shared.guest.tables.root() | 0x5E);
    }
}
