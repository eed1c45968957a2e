//! Which virtualization the processors have: the one place that knows both engines.

use super::processor::physical;
use alloc::sync::Arc;
use cpu_hardware::Ground;
use cpu_soft::hardware::HardwareEngine;
use cpu_svm::{Svm, SvmEngine};
use cpu_vmx::{Vmx, VmxEngine};

/// AMD's or Intel's.
#[derive(Clone, Copy, Debug)]
pub enum Virtualization {
    /// AMD's.
    Svm(Svm),
    /// Intel's.
    Vmx(Vmx),
}

/// Why guests cannot run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Neither.
    #[error("this processor has no virtualization: neither AMD's (SVM) nor Intel's (VMX)")]
    Absent,
    /// AMD's is there, but not to be used.
    #[error("{0}")]
    Svm(cpu_svm::Unavailable),
    /// Intel's is there, but not to be used.
    #[error("{0}")]
    Vmx(cpu_vmx::Unavailable),
}

impl Virtualization {
    /// Looks, by CPUID first.
    pub fn detect() -> Result<Self, Unavailable> {
        if Vmx::is_present() {
            return Vmx::detect().map(Self::Vmx).map_err(Unavailable::Vmx);
        }
        Svm::detect().map(Self::Svm).map_err(|error| match error {
            cpu_svm::Unavailable::Absent => Unavailable::Absent,
            other => Unavailable::Svm(other),
        })
    }

    /// Says what there is.
    pub fn show(&self) {
        match self {
            Self::Svm(svm) => crate::log!(
                "SVM: {} address spaces, next RIP {}, flush by space {}",
                svm.asids,
                svm.next_rip,
                svm.flush_by_asid
            ),
            Self::Vmx(vmx) => crate::log!(
                "VMX: EPT with pages of {}, accessed and dirty bits {}, VPID {}, preemption timer {}",
                if vmx.huge_pages { "1 GiB" } else { "2 MiB" },
                vmx.accessed_dirty,
                vmx.controls.has_vpid(),
                vmx.controls.has_preemption_timer()
            ),
        }
    }

    /// Switches it on for the processor that runs this.
    ///
    /// # Safety
    /// Once a processor, at privilege level 0, with memory mapped one to one.
    pub unsafe fn enable(&self) {
        // SAFETY: the caller vouches for the processor.
        unsafe {
            match self {
                Self::Svm(svm) => svm.enable(physical),
                Self::Vmx(vmx) => vmx.enable(physical),
            }
        }
    }

    /// The engine on it.
    pub fn engine(self, ground: Arc<dyn Ground>) -> Arc<dyn HardwareEngine> {
        match self {
            Self::Svm(svm) => Arc::new(SvmEngine::new(svm, ground)),
            Self::Vmx(vmx) => Arc::new(VmxEngine::new(vmx, ground)),
        }
    }
}
