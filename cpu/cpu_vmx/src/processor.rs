//! Whether this processor has Intel's virtualization (SDM vol. 3C, 24.6 and 24.7), and switching it on.

use crate::controls::{Allowed, Controls, Offered, pin, primary, secondary};
use crate::switch;
use crate::vmcs::Region;
use alloc::boxed::Box;
use core::arch::asm;
use cpu_hardware::processor::{self, cpuid, read_msr, supported_xcr0, write_msr};
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::msr::FEATURE_CONTROL;

/// Capability registers (SDM vol. 3D, appendix A).
const VMX_BASIC: u32 = 0x480;
const VMX_MISC: u32 = 0x485;
/// The first of four: pin-based, primary, exit and entry controls.
const PIN: u32 = 0x481;
const TRUE_PIN: u32 = 0x48D;
const CR0_FIXED_0: u32 = 0x486;
const CR0_FIXED_1: u32 = 0x487;
const CR4_FIXED_0: u32 = 0x488;
const CR4_FIXED_1: u32 = 0x489;
const SECONDARY: u32 = 0x48B;
const EPT_VPID: u32 = 0x48C;
/// IA32_VMX_BASIC: the controls' registers have "true" ones beside them.
const TRUE_CONTROLS: u64 = 1 << 55;
/// FEATURE_CONTROL.
const LOCK: u64 = 1 << 0;
const VMXON_ALLOWED: u64 = 1 << 2;
/// Of IA32_VMX_EPT_VPID_CAP: four levels, write-back tables, large pages, accessed and dirty bits, INVEPT and INVVPID: of one
/// context, of all.
const EPT_4_LEVELS: u64 = 1 << 6;
const EPT_WRITE_BACK: u64 = 1 << 14;
const EPT_2M: u64 = 1 << 16;
const EPT_1G: u64 = 1 << 17;
const EPT_ACCESSED_DIRTY: u64 = 1 << 21;
const INVEPT: u64 = 1 << 20;
const INVEPT_ONE: u64 = 1 << 25;
const INVEPT_ALL: u64 = 1 << 26;
const INVVPID: u64 = 1 << 32;
const INVVPID_ONE: u64 = 1 << 41;
const INVVPID_ALL: u64 = 1 << 42;

/// Why guests cannot run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Not Intel's, or too old, or hidden by whoever runs us.
    #[error("this processor has no Intel virtualization (VMX)")]
    Absent,
    /// Firmware switched it off.
    #[error("firmware has locked Intel virtualization (VMX) off: switch it on in its set-up")]
    Locked,
    /// Before 2010.
    #[error("this processor's VMX has no nested paging (EPT) with unrestricted guests")]
    TooOld,
    /// Before 2011.
    #[error("this processor has no XSAVE")]
    NoXsave,
}

/// What this processor's VMX has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vmx {
    /// Of the memory that VMCSs are kept in.
    pub revision: u32,
    /// What every guest's processor is asked to do.
    pub controls: Controls,
    /// PAUSE in a loop can be told from others; otherwise each exits.
    pub pause_loop: bool,
    /// Pages of 1 GiB.
    pub huge_pages: bool,
    /// Accessed and dirty bits in EPT.
    pub accessed_dirty: bool,
    /// Translations of one EPT, and of one VPID, can be flushed by themselves.
    pub flush_one: (bool, bool),
    /// The preemption timer counts once in 2 to this many ticks of the TSC.
    pub timer_shift: u32,
    /// XCR0 with all that a guest may enable.
    pub xcr0: u64,
}

/// What decides whether firmware allows it: whether it is locked, and whether VMXON works outside SMX.
fn is_locked_off(feature_control: u64) -> bool {
    feature_control & LOCK != 0 && feature_control & VMXON_ALLOWED == 0
}

impl Vmx {
    /// Whether there is any.
    pub fn is_present() -> bool {
        cpuid(1, 0)[2] & 1 << 5 != 0
    }

    /// Looks. Only at privilege level 0, where MSRs can be read.
    pub fn detect() -> Result<Self, Unavailable> {
        // SAFETY: `judge` asks for registers that a processor of which it knows so much has.
        let msr = |number| unsafe { read_msr(number) };
        Self::judge(Self::is_present(), supported_xcr0(), msr)
    }

    /// What a processor is with these answers. Registers are read only where those before say that they exist.
    fn judge(present: bool, xcr0: Option<u64>, msr: impl Fn(u32) -> u64) -> Result<Self, Unavailable> {
        if !present {
            return Err(Unavailable::Absent);
        }
        if is_locked_off(msr(FEATURE_CONTROL)) {
            return Err(Unavailable::Locked);
        }
        let basic = msr(VMX_BASIC);
        let first = if basic & TRUE_CONTROLS != 0 { TRUE_PIN } else { PIN };
        let [pin, primary, leave, enter] = [0, 1, 2, 3].map(|n| Allowed(msr(first + n)));
        if !primary.has(primary::SECONDARY) {
            return Err(Unavailable::TooOld);
        }
        let secondary = Allowed(msr(SECONDARY));
        if !secondary.has(secondary::EPT | secondary::UNRESTRICTED_GUEST) {
            return Err(Unavailable::TooOld);
        }
        let offered = Offered { pin, primary, secondary, leave, enter };
        Self::of(basic, &offered, msr(EPT_VPID), msr(VMX_MISC), xcr0.ok_or(Unavailable::NoXsave)?)
    }

    /// From the capability registers.
    fn of(basic: u64, offered: &Offered, ept: u64, misc: u64, xcr0: u64) -> Result<Self, Unavailable> {
        let needed = EPT_4_LEVELS | EPT_WRITE_BACK | EPT_2M | INVEPT;
        let enough = ept & needed == needed && ept & (INVEPT_ONE | INVEPT_ALL) != 0;
        let mut controls = Controls::of(offered).filter(|_| enough).ok_or(Unavailable::TooOld)?;
        // Translations that cannot be flushed are not to be kept: without VPIDs every entry and exit flushes.
        if ept & INVVPID == 0 || ept & (INVVPID_ONE | INVVPID_ALL) == 0 {
            controls.secondary &= !secondary::VPID;
        }
        Ok(Self {
            revision: basic as u32 & 0x7FFF_FFFF,
            controls,
            pause_loop: offered.secondary.has(secondary::PAUSE_LOOP),
            huge_pages: ept & EPT_1G != 0,
            accessed_dirty: ept & EPT_ACCESSED_DIRTY != 0,
            flush_one: (ept & INVEPT_ONE != 0, ept & INVVPID_ONE != 0),
            timer_shift: misc as u32 & 31,
            xcr0,
        })
    }

    /// RDTSCP is the processor's, with the TSC_AUX that is loaded.
    pub fn has_rdtscp(&self) -> bool {
        self.controls.secondary & secondary::RDTSCP != 0 && cpuid(0x8000_0001, 0)[3] & 1 << 27 != 0
    }

    /// Features that a guest can be given.
    pub fn features(&self) -> FeatureSet {
        let mut not_given = alloc::vec![Feature::Rdpid, Feature::Xsaves];
        // An instruction that the guest's processor is not asked to have is not there.
        if self.controls.secondary & secondary::INVPCID == 0 {
            not_given.push(Feature::Invpcid);
        }
        if self.controls.secondary & secondary::RDTSCP == 0 {
            not_given.push(Feature::Rdtscp);
        }
        processor::features(&not_given)
    }

    /// The EPT pointer of tables whose first is at `root` (SDM vol. 3C, table 25-9).
    pub fn ept_pointer(&self, root: u64) -> u64 {
        // Write-back, four levels.
        root | 6 | 3 << 3 | if self.accessed_dirty { 1 << 6 } else { 0 }
    }

    /// The value of the preemption timer after which `ticks` of the TSC have passed; 0 if they have.
    pub fn timer_value(&self, ticks: u64) -> u64 {
        (ticks >> self.timer_shift).min(u64::from(u32::MAX))
    }

    /// Switches it on for the processor that runs this, and vector registers with it.
    ///
    /// # Safety
    /// Once a processor, at privilege level 0, with memory mapped one to one; nothing else uses VMX.
    pub unsafe fn enable(&self, physical: fn(usize) -> u64) {
        // The processor's own notes; they live for ever.
        let notes = Box::leak(Box::new(Region::new(self.revision)));
        let at = physical((&raw const *notes).addr());
        // SAFETY: the registers exist on a processor with VMX and XSAVE; what VMX operation wants of CR0 and CR4 (caches
        // and paging are on) has no effect on code without x87 instructions.
        unsafe {
            let feature_control = read_msr(FEATURE_CONTROL);
            if feature_control & LOCK == 0 {
                write_msr(FEATURE_CONTROL, feature_control | LOCK | VMXON_ALLOWED);
            }
            processor::enable_extended(self.xcr0);
            asm!(
                "mov {t}, cr0", "or {t}, {set0}", "and {t}, {keep0}", "mov cr0, {t}",
                "mov {t}, cr4", "or {t}, {set4}", "and {t}, {keep4}", "mov cr4, {t}",
                t = out(reg) _,
                set0 = in(reg) read_msr(CR0_FIXED_0),
                keep0 = in(reg) read_msr(CR0_FIXED_1),
                set4 = in(reg) read_msr(CR4_FIXED_0),
                keep4 = in(reg) read_msr(CR4_FIXED_1),
                options(nostack)
            );
            switch::vmxon(at);
        }
    }
}

/// The bits that a guest's kind adds to the controls.
impl Vmx {
    /// Primary controls of a guest: its TSC is the processor's plus an offset, or RDTSC exits; its vCPUs wait for each
    /// other in loops with PAUSE, or it has one.
    pub fn primary(&self, native_tsc: bool, vcpus: u32) -> u32 {
        let tsc = if native_tsc { 0 } else { primary::RDTSC };
        let pause = if vcpus > 1 && !self.pause_loop { primary::PAUSE } else { 0 };
        self.controls.primary | tsc | pause
    }

    /// Secondary controls.
    pub fn secondary(&self, vcpus: u32) -> u32 {
        self.controls.secondary | if vcpus > 1 && self.pause_loop { secondary::PAUSE_LOOP } else { 0 }
    }

    /// Pin-based controls: the timer runs only for those who have a use for it.
    pub fn pin(&self, timer: bool) -> u32 {
        self.controls.pin & !if timer { 0 } else { pin::PREEMPTION_TIMER }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::controls::tests::all;
    use std::string::ToString;

    /// What Bochs 2.7's `corei7_skylake_x` says.
    pub fn vmx() -> Vmx {
        Vmx::of(0x00DA_0400_0000_002B, &all(), 0x0F01_0633_4141, 0x0000_0000_2000_01E5, 7).unwrap()
    }

    #[test]
    fn capabilities_are_read_out() {
        let vmx = vmx();
        assert_eq!((vmx.revision, vmx.timer_shift), (0x2B, 5));
        assert!(vmx.huge_pages && vmx.accessed_dirty && vmx.pause_loop);
        assert_eq!(vmx.flush_one, (true, true));
        assert_eq!(vmx.ept_pointer(0x1234_5000), 0x1234_505E);
        assert_eq!(
            (vmx.timer_value(64), vmx.timer_value(31), vmx.timer_value(u64::MAX)),
            (2, 0, 0xFFFF_FFFF)
        );
        assert_eq!(Vmx::of(0x2B, &all(), 0x0F01_0633_4101, 0, 7), Err(Unavailable::TooOld));
    }

    #[test]
    fn what_cannot_be_flushed_is_not_used() {
        const BOCHS: u64 = 0x0F01_0633_4141;
        let without = |bits: u64| Vmx::of(0x2B, &all(), BOCHS & !bits, 0, 7);
        assert_eq!(without(INVEPT), Err(Unavailable::TooOld));
        assert_eq!(without(INVEPT_ONE | INVEPT_ALL), Err(Unavailable::TooOld));
        assert_eq!(without(INVEPT_ONE | INVVPID_ONE).unwrap().flush_one, (false, false));
        for bits in [INVVPID, INVVPID_ONE | INVVPID_ALL] {
            let vmx = without(bits).unwrap();
            assert!(!vmx.controls.has_vpid() && vmx.huge_pages);
        }
        assert!(without(INVVPID_ONE).unwrap().controls.has_vpid());
    }

    /// A processor's registers, without "true" controls; `missing` is a bit of the secondary ones.
    fn registers(number: u32, feature_control: u64, missing: u32) -> u64 {
        let offered = all();
        match number {
            FEATURE_CONTROL => feature_control,
            VMX_BASIC => 0x2B,
            PIN => offered.pin.0,
            0x482 => offered.primary.0,
            0x483 => offered.leave.0,
            0x484 => offered.enter.0,
            SECONDARY => offered.secondary.0 & !(u64::from(missing) << 32),
            EPT_VPID => 0x0F01_0633_4141,
            VMX_MISC => 5,
            other => panic!("it may have no register {other:#x}"),
        }
    }

    #[test]
    fn what_is_missing_is_told() {
        let judge = |feature_control, missing| {
            Vmx::judge(true, Some(7), |number| registers(number, feature_control, missing))
        };
        for allowed in [0, LOCK | VMXON_ALLOWED] {
            assert_eq!(judge(allowed, 0).unwrap().revision, 0x2B);
        }
        // Locked without VMX, or with VMX for SMX only: nothing else is looked at.
        for locked in [LOCK, LOCK | 2] {
            let only = |number| if number == FEATURE_CONTROL { locked } else { panic!("{number:#x}") };
            assert_eq!(Vmx::judge(true, Some(7), only), Err(Unavailable::Locked));
        }
        assert!(Unavailable::Locked.to_string().contains("locked"));
        assert_eq!(judge(0, secondary::EPT), Err(Unavailable::TooOld));
        assert_eq!(judge(0, secondary::UNRESTRICTED_GUEST), Err(Unavailable::TooOld));
        let no_vmx = Vmx::judge(false, Some(7), |_| panic!("it has no such register"));
        assert_eq!(no_vmx, Err(Unavailable::Absent));
        let no_xsave = Vmx::judge(true, None, |number| registers(number, 0, 0));
        assert_eq!(no_xsave, Err(Unavailable::NoXsave));
    }

    #[test]
    fn a_guests_kind_adds_controls() {
        let vmx = vmx();
        assert_eq!(vmx.primary(true, 1) & (primary::RDTSC | primary::PAUSE), 0);
        assert_ne!(vmx.primary(false, 1) & primary::RDTSC, 0);
        assert_eq!(vmx.primary(true, 2) & primary::PAUSE, 0);
        assert_ne!(vmx.secondary(2) & secondary::PAUSE_LOOP, 0);
        let plain = Vmx { pause_loop: false, ..vmx };
        assert_ne!(plain.primary(true, 2) & primary::PAUSE, 0);
        assert_eq!(vmx.pin(false) & pin::PREEMPTION_TIMER, 0);
    }
}
