//! The engine's face to `cpu_soft`: what the hardware can do, and a partition's share of it.

use crate::permission::{IoMap, MsrMap};
use crate::processor::Svm;
use crate::vcpu::SvmVcpu;
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use cpu_hardware::identifiers::Identifiers;
use cpu_hardware::nested::Format;
use cpu_hardware::{Ground, GuestShare};
use cpu_soft::hardware::{Hardware, HardwareEngine, HardwarePartition};
use hypervisor::{Capabilities, EngineError, PartitionLayout};

/// See the module's header.
pub struct SvmEngine {
    shared: Arc<EngineShared>,
}

/// What all partitions share.
pub struct EngineShared {
    /// The processors'.
    pub svm: Svm,
    /// The ground.
    pub ground: Arc<dyn Ground>,
    /// No port without an exit.
    pub io_map: Box<IoMap>,
    /// Few MSRs.
    pub msr_map: Box<MsrMap>,
    /// Address-space identifiers.
    pub asids: Identifiers,
}

impl SvmEngine {
    /// On processors where [`Svm::enable`] was called, or will be before a guest runs.
    pub fn new(svm: Svm, ground: Arc<dyn Ground>) -> Self {
        let asids = Identifiers::new(svm.asids);
        let (io_map, msr_map) = (IoMap::closed(), MsrMap::of_guest());
        Self { shared: Arc::new(EngineShared { svm, ground, io_map, msr_map, asids }) }
    }
}

impl HardwareEngine for SvmEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "svm",
            max_vcpus: self.shared.asids.for_guests(),
            features: self.shared.svm.features(),
            tsc_scaling: true,
            tsc_khz: Some(self.shared.ground.tsc_khz()),
        }
    }

    fn partition(&self, layout: &PartitionLayout) -> Result<Box<dyn HardwarePartition>, EngineError> {
        let partition = PartitionShared::new(self.shared.clone(), layout)?;
        Ok(Box::new(SvmPartition(Arc::new(partition))))
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
        let guest = GuestShare::new(&*engine.ground, layout, Format::Npt, engine.svm.huge_pages)?;
        Ok(Self { engine, guest })
    }
}

struct SvmPartition(Arc<PartitionShared>);

impl HardwarePartition for SvmPartition {
    fn vcpu(&self, _: u32) -> Result<Box<dyn Hardware>, EngineError> {
        let asid = self.0.engine.asids.take()?;
        Ok(Box::new(SvmVcpu::new(self.0.clone(), asid)))
    }

    fn counts(&self) -> Vec<(String, u64)> {
        self.0.guest.exits.named()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use cpu_hardware::testing::{Nowhere, layout};

    fn engine() -> SvmEngine {
        let svm = Svm { asids: 3, next_rip: false, flush_by_asid: false, huge_pages: false, xcr0: 7 };
        SvmEngine::new(svm, Arc::new(Nowhere::default()))
    }

    /// A partition on a processor of 2 GHz.
    pub fn partition(tsc_khz: u32) -> Arc<PartitionShared> {
        Arc::new(PartitionShared::new(engine().shared, &layout(tsc_khz)).unwrap())
    }

    #[test]
    fn identifiers_run_out_and_come_back() {
        let engine = engine();
        let partition = engine.partition(&layout(1_000_000)).unwrap();
        let vcpus = [partition.vcpu(0).unwrap(), partition.vcpu(1).unwrap()];
        assert!(matches!(partition.vcpu(2), Err(EngineError::Exhausted(_))));
        drop(vcpus);
        assert!(partition.vcpu(2).is_ok());
    }
}
