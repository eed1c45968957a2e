//! Whether this processor has AMD's virtualization (APM vol. 2, 15.4), and switching it on.

use crate::vmcb::Vmcb;
use alloc::boxed::Box;
use core::arch::asm;
use cpu_hardware::processor::{self, cpuid, read_msr, supported_xcr0, write_msr};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::msr;

const VM_CR: u32 = 0xC001_0114;
/// VM_CR: SVM is disabled.
const VM_CR_SVMDIS: u64 = 1 << 4;
const VM_HSAVE_PA: u32 = 0xC001_0117;
const EFER_SVME: u64 = 1 << 12;

/// Why guests cannot run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Not AMD's, or too old, or hidden by whoever runs us.
    #[error("this processor has no AMD virtualization (SVM)")]
    Absent,
    /// Firmware switched it off.
    #[error("firmware has locked AMD virtualization (SVM) off: switch it on in its set-up")]
    Locked,
    /// Before 2008.
    #[error("this processor's SVM has no nested paging")]
    NoNestedPaging,
    /// Before 2011.
    #[error("this processor has no XSAVE")]
    NoXsave,
}

/// What this processor's SVM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Svm {
    /// Address-space identifiers, the hypervisor's own (0) among them.
    pub asids: u32,
    /// It tells where the next instruction is.
    pub next_rip: bool,
    /// It can flush one guest's translations.
    pub flush_by_asid: bool,
    /// Pages of 1 GiB.
    pub huge_pages: bool,
    /// XCR0 with all that a guest may enable.
    pub xcr0: u64,
}

impl Svm {
    /// Looks. Only at privilege level 0, where MSRs can be read.
    pub fn detect() -> Result<Self, Unavailable> {
        // SAFETY: `judge` asks for it on a processor with SVM only, which has it.
        Self::judge(cpuid, || unsafe { read_msr(VM_CR) })
    }

    /// What a processor is that answers so.
    fn judge(cpuid: fn(u32, u32) -> [u32; 4], vm_cr: impl FnOnce() -> u64) -> Result<Self, Unavailable> {
        let extended = cpuid(0x8000_0000, 0)[0];
        if extended < 0x8000_000A || cpuid(0x8000_0001, 0)[2] & 1 << 2 == 0 {
            return Err(Unavailable::Absent);
        }
        if vm_cr() & VM_CR_SVMDIS != 0 {
            return Err(Unavailable::Locked);
        }
        let [_, asids, _, features] = cpuid(0x8000_000A, 0);
        if features & 1 == 0 {
            return Err(Unavailable::NoNestedPaging);
        }
        let xcr0 = supported_xcr0().ok_or(Unavailable::NoXsave)?;
        Ok(Self {
            asids,
            next_rip: features & 1 << 3 != 0,
            flush_by_asid: features & 1 << 6 != 0,
            huge_pages: cpuid(0x8000_0001, 0)[3] & 1 << 26 != 0,
            xcr0,
        })
    }

    /// Features that a guest can be given: those of the processor, and those that are the hypervisor's own work.
    pub fn features(&self) -> FeatureSet {
        processor::features(NOT_GIVEN)
    }

    /// Switches it on for the processor that runs this, and vector registers with it.
    ///
    /// # Safety
    /// Once a processor, at privilege level 0, with memory mapped one to one; nothing else uses SVM.
    pub unsafe fn enable(&self, physical: fn(usize) -> u64) {
        // The processor's own area, and behind it ours for what VMRUN leaves to VMSAVE.
        let areas = Box::leak(Box::new([Vmcb::default(), Vmcb::default()]));
        let at = physical((&raw const areas[0]).addr());
        // SAFETY: the registers exist on a processor with SVM and XSAVE; the area is for the processor alone and lives
        // for ever. Vector registers are nobody's yet.
        unsafe {
            write_msr(msr::EFER, read_msr(msr::EFER) | EFER_SVME);
            write_msr(VM_HSAVE_PA, at);
            asm!("vmsave rax", in("rax") host_area(), options(nostack));
            processor::enable_extended(self.xcr0);
        }
    }
}

/// Where this processor's VMSAVE area is: behind the one whose address it keeps itself.
///
/// # Safety
/// On a processor where SVM is on.
pub(crate) unsafe fn host_area() -> u64 {
    // SAFETY: the caller vouches for SVM, and with it for the register.
    unsafe { read_msr(VM_HSAVE_PA) + size_of::<Vmcb>() as u64 }
}

/// Without an exit these show the processor, or need state that is not moved: TSC_AUX, XSS, INVPCID's and XSAVES' exits.
const NOT_GIVEN: &[Feature] = &[Feature::Rdpid, Feature::Xsaves];

#[cfg(test)]
mod tests {
    use super::*;

    /// A processor with all of it, but for `missing` at leaf, register and bit.
    fn answers<const LEAF: u32, const REGISTER: usize, const BIT: u32>(leaf: u32, _: u32) -> [u32; 4] {
        let mut all = match leaf {
            0x8000_0000 => [0x8000_001F, 0, 0, 0],
            0x8000_000A => [1, 16, 0, u32::MAX],
            _ => [u32::MAX; 4],
        };
        if leaf == LEAF {
            all[REGISTER] &= !(1 << BIT);
        }
        all
    }

    #[test]
    fn what_is_missing_is_told() {
        let whole = Svm::judge(answers::<0, 0, 0>, || 0).unwrap();
        assert_eq!((whole.asids, whole.next_rip), (16, true));
        assert!(!Svm::judge(answers::<0x8000_000A, 3, 3>, || 0).unwrap().next_rip);
        assert_eq!(Svm::judge(answers::<0, 0, 0>, || VM_CR_SVMDIS), Err(Unavailable::Locked));
        let no_svm = Svm::judge(answers::<0x8000_0001, 2, 2>, || panic!("it has no such register"));
        assert_eq!(no_svm, Err(Unavailable::Absent));
        let no_paging = Svm::judge(answers::<0x8000_000A, 3, 0>, || 0);
        assert_eq!(no_paging, Err(Unavailable::NoNestedPaging));
    }
}
