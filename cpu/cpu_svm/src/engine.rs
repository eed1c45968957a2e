//! The engine's face to `cpu_soft`: what the hardware can do, and a partition's share of it.

use crate::exit::NAMES;
use crate::npt::Npt;
use crate::permission::{IoMap, MsrMap};
use crate::processor::Svm;
use crate::vcpu::SvmVcpu;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use cpu_soft::hardware::{Hardware, HardwareEngine, HardwarePartition};
use hypervisor::{Capabilities, EngineError, GuestRam, PartitionLayout};
use sync::Mutex;

/// What the engine needs of the ground that it stands on.
pub trait Ground: Send + Sync {
    /// Physical address of the hypervisor's own memory.
    fn physical(&self) -> fn(usize) -> u64;
    /// Rate of the processors' TSC.
    fn tsc_khz(&self) -> u32;
    /// Called before the guest is entered: an interrupt is to come at the latest `due_in` nanoseconds from now, or
    /// whenever the ground wants its processor back. `false`: it wants it at once.
    fn before_entry(&self, due_in: Option<u64>) -> bool;
    /// Set by every interrupt that is to be seen before a guest is entered; cleared by `before_entry`.
    fn interrupted(&self) -> &AtomicU32;
}

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
    /// Address-space identifiers in use.
    asids: Mutex<Vec<bool>>,
}

/// Most identifiers that are kept account of.
const MAX_ASIDS: u32 = 4096;

impl SvmEngine {
    /// On processors where [`Svm::enable`] was called, or will be before a guest runs.
    pub fn new(svm: Svm, ground: Arc<dyn Ground>) -> Self {
        let mut asids = alloc::vec![false; svm.asids.clamp(1, MAX_ASIDS) as usize];
        // The hypervisor's own.
        asids[0] = true;
        let (io_map, msr_map) = (IoMap::closed(), MsrMap::of_guest());
        Self { shared: Arc::new(EngineShared { svm, ground, io_map, msr_map, asids: Mutex::new(asids) }) }
    }
}

impl EngineShared {
    fn take_asid(&self) -> Result<u32, EngineError> {
        let mut asids = self.asids.lock();
        let free =
            asids.iter().position(|used| !used).ok_or(EngineError::Exhausted("address-space identifiers"))?;
        asids[free] = true;
        Ok(free as u32)
    }

    /// Gives an identifier back.
    pub fn free_asid(&self, asid: u32) {
        if let Some(used) = self.asids.lock().get_mut(asid as usize) {
            *used = false;
        }
    }
}

impl HardwareEngine for SvmEngine {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "svm",
            max_vcpus: self.shared.svm.asids.clamp(1, MAX_ASIDS) - 1,
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
    /// Guest RAM, which the tables name: dropped after them.
    pub npt: Npt,
    _ram: GuestRam,
    /// How many there are.
    pub vcpus: u32,
    /// The guest's TSC runs at the processor's rate: an offset does, no exit.
    pub native_tsc: bool,
    /// Guest TSC minus the processor's, and the epoch of the guest's clock that this holds for.
    pub tsc_base: Mutex<Option<(u64, u64)>>,
    /// Exits by [`crate::exit::Exit::number`].
    pub exits: [AtomicU64; NAMES.len()],
}

impl PartitionShared {
    fn new(engine: Arc<EngineShared>, layout: &PartitionLayout) -> Result<Self, EngineError> {
        let physical = engine.ground.physical();
        let mut npt = Npt::new(physical, engine.svm.huge_pages);
        let base = physical(layout.ram.host_base().addr());
        for region in layout.ram.regions() {
            npt.map(region.gpa, base + region.offset, region.bytes)
                .map_err(|error| EngineError::Host(error.to_string()))?;
        }
        let native_tsc = engine.ground.tsc_khz() == layout.tsc_khz && layout.clock.rate() == (1, 1);
        Ok(Self {
            engine,
            npt,
            _ram: layout.ram.clone(),
            vcpus: layout.vcpus,
            native_tsc,
            tsc_base: Mutex::new(None),
            exits: [const { AtomicU64::new(0) }; NAMES.len()],
        })
    }
}

struct SvmPartition(Arc<PartitionShared>);

impl HardwarePartition for SvmPartition {
    fn vcpu(&self, _: u32) -> Result<Box<dyn Hardware>, EngineError> {
        let asid = self.0.engine.take_asid()?;
        Ok(Box::new(SvmVcpu::new(self.0.clone(), asid)))
    }

    fn counts(&self) -> Vec<(String, u64)> {
        let named = NAMES
            .iter()
            .zip(&self.0.exits)
            .map(|(name, count)| (format!("exits: {name}"), count.load(Relaxed)));
        named.filter(|(_, count)| *count > 0).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    struct Nowhere(AtomicU32);

    impl Ground for Nowhere {
        fn physical(&self) -> fn(usize) -> u64 {
            |address| address as u64
        }
        fn tsc_khz(&self) -> u32 {
            2_000_000
        }
        fn before_entry(&self, _: Option<u64>) -> bool {
            false
        }
        fn interrupted(&self) -> &AtomicU32 {
            &self.0
        }
    }

    fn engine() -> SvmEngine {
        let svm = Svm { asids: 3, next_rip: false, flush_by_asid: false, huge_pages: false, xcr0: 7 };
        SvmEngine::new(svm, Arc::new(Nowhere(AtomicU32::new(0))))
    }

    fn layout(tsc_khz: u32) -> PartitionLayout {
        let (_, clock) = guest_time::manual::ManualTime::clock();
        let (ram, cpu_model) = (GuestRam::for_test(0x10_0000), hypervisor::CpuModel::max());
        PartitionLayout { ram, vcpus: 3, cpu_model, tsc_khz, clock }
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

    #[test]
    fn the_tables_map_guest_ram() {
        let layout = layout(1_000_000);
        let shared = PartitionShared::new(engine().shared, &layout).unwrap();
        let base = layout.ram.host_base().addr() as u64;
        assert_eq!(shared.npt.lookup(0x5123).map(|found| found.0), Some(base + 0x5123));
        assert_eq!(shared.npt.lookup(0x10_0000), None);
    }
}
