//! [`KvmHypervisor`]: what this host's KVM can give.

use crate::cpuid;
use crate::dirty_log::ring;
use crate::ioctls::error;
use crate::partition::{KvmPartition, Options};
use crate::probe::{Probe, probe};
use hypervisor::{Capabilities, CpuModel, EngineError, Hypervisor, Partition, PartitionLayout};
use kvm_ioctls::{Cap, Kvm};
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use sync::Once;
use x86_defs::cpuid::{Feature, FeatureSet};

/// Most vCPUs in a partition: 8-bit APIC ids, without the broadcast one.
const MAX_VCPUS: u32 = 254;
/// The only version of KVM's interface that there ever was.
const API_VERSION: i32 = 12;

/// Why there is no KVM here.
#[derive(Debug, thiserror::Error)]
pub enum KvmUnavailable {
    /// The device cannot be opened.
    #[error("/dev/kvm: {0}")]
    Open(io::Error),
    /// Another interface.
    #[error("/dev/kvm has interface version {0}, not {API_VERSION}")]
    Version(i32),
    /// It lacks something that the engine needs.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// It does not answer.
    #[error("this host's KVM does not answer: {0}")]
    Ask(io::Error),
}

/// Extensions that the engine needs, by name.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

/// `/dev/kvm`, open: for an engine on it later, when the file may be out of reach.
pub struct KvmDevice(OwnedFd);

impl KvmDevice {
    /// Opens it.
    pub fn open() -> io::Result<Self> {
        Ok(Self(File::options().read(true).write(true).open("/dev/kvm")?.into()))
    }
}

/// The engine on this host's KVM.
pub struct KvmHypervisor {
    kvm: Kvm,
    features: FeatureSet,
    tsc_scaling: bool,
    tsc_khz: u32,
    probe: Once<Probe>,
    options: Options,
}

impl KvmHypervisor {
    /// Whether it runs real guests: found out once.
    pub fn probe(&self) -> &Probe {
        self.probe.call_once(|| {
            let mut model = CpuModel::max();
            for feature in self.features.missing_from(model.features).iter() {
                model.features.remove(feature);
            }
            probe(&self.kvm, model, self.tsc_khz)
        })
    }

    /// What a probe has found before, on the same kernel: it is not done again.
    pub fn remember(&self, probe: Probe) {
        self.probe.call_once(|| probe);
    }

    /// Tells `log` what people should know: once for each instruction that has to be completed.
    #[must_use]
    pub fn with_log(self, log: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self { options: Options { log: Arc::new(log), ..self.options }, ..self }
    }

    /// Partitions log writes in a ring of `entries` for each vCPU (a power of two, at least 1024), not in bitmaps. Where
    /// this KVM has none, it stays as it is. Not for a KVM whose probe found that it emulates the guest's kernel: that
    /// writes on when a ring is full, and loses pages.
    #[must_use]
    pub fn with_dirty_ring(self, entries: u32) -> Self {
        let dirty_ring = ring::is_there(&self.kvm).then_some(entries);
        Self { options: Options { dirty_ring, ..self.options }, ..self }
    }

    /// Opens `/dev/kvm` and looks what it can do.
    pub fn open() -> Result<Self, KvmUnavailable> {
        Self::on(&KvmDevice::open().map_err(KvmUnavailable::Open)?)
    }

    /// Looks what the device can do.
    pub fn on(device: &KvmDevice) -> Result<Self, KvmUnavailable> {
        let fd = device.0.try_clone().map_err(KvmUnavailable::Open)?;
        // SAFETY: the descriptor is a new one of `/dev/kvm`, and nobody else's from here on.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmUnavailable::Version(version));
        }
        if let Some((_, name)) = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(KvmUnavailable::Lacks(name));
        }
        for (number, name) in [
            (kvm_bindings::KVM_CAP_SREGS2, "KVM_CAP_SREGS2"),
            (kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"),
            (kvm_bindings::KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
        ] {
            if kvm.check_extension_raw(number.into()) <= 0 {
                return Err(KvmUnavailable::Lacks(name));
            }
        }
        let features = cpuid::features(&kvm).map_err(KvmUnavailable::Ask)?;
        let tsc_scaling = kvm.check_extension(Cap::TscControl);
        let tsc_khz = host_tsc_khz(&kvm).map_err(KvmUnavailable::Ask)?;
        let options = Options { log: Arc::new(|_| ()), dirty_ring: None };
        Ok(Self { kvm, features, tsc_scaling, tsc_khz, probe: Once::new(), options })
    }
}

/// The rate of a guest's TSC that nobody changed.
fn host_tsc_khz(kvm: &Kvm) -> io::Result<u32> {
    let vm = kvm.create_vm().map_err(error)?;
    vm.create_vcpu(0).map_err(error)?.get_tsc_khz().map_err(error)
}

impl Hypervisor for KvmHypervisor {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            name: "kvm",
            max_vcpus: MAX_VCPUS.min(self.kvm.get_max_vcpus() as u32),
            features: self.features,
            tsc_scaling: self.tsc_scaling,
            tsc_khz: Some(self.tsc_khz),
        }
    }

    fn create_partition(&self, layout: &PartitionLayout) -> Result<Box<dyn Partition>, EngineError> {
        let max = self.capabilities().max_vcpus;
        if layout.vcpus > max {
            return Err(EngineError::TooManyVcpus { asked: layout.vcpus, max });
        }
        let missing = self.features.missing_from(layout.cpu_model.features);
        if !missing.is_empty() {
            let names: Vec<&str> = missing.iter().map(Feature::name).collect();
            return Err(EngineError::Features(names.join(", ")));
        }
        if layout.clock.rate().0 != layout.clock.rate().1 {
            return Err(EngineError::Host("KVM's clocks cannot run slower than the host's".into()));
        }
        let near = self.tsc_khz.abs_diff(layout.tsc_khz) <= self.tsc_khz / 4000;
        if !near && !self.tsc_scaling {
            let (asked, here) = (layout.tsc_khz, self.tsc_khz);
            return Err(EngineError::Host(format!(
                "the guest's TSC runs at {asked} kHz; this host's KVM cannot scale it from {here} kHz"
            )));
        }
        let scale = (!near).then_some(layout.tsc_khz);
        let partition = KvmPartition::new(&self.kvm, layout, scale, self.options.clone()).map_err(host)?;
        let (shared, probe) = (partition.shared(), self.probe());
        shared.sound.store(probe.cpuid_is_the_models, Ordering::Relaxed);
        shared.doubted.store(!probe.problems.is_empty(), Ordering::Relaxed);
        Ok(Box::new(partition))
    }
}

/// An error of the host's.
pub fn host(error: io::Error) -> EngineError {
    EngineError::Host(error.to_string())
}
