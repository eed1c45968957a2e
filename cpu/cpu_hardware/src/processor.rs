//! The parts of the processor that every kind of virtualization leaves to software: MSRs, XCR0 and what it governs,
//! breakpoint registers.
//!
//! Called by: the engines, with the rights of privilege level 0. The host's own code uses no vector registers; the
//! interpreter's thunks do, and the guest's are parked before.

use crate::extended::XsaveArea;
use core::arch::asm;
use core::arch::x86_64::__cpuid_count;
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::cpuid::{Feature, FeatureSet};

const CR0_MP_NE: u64 = 1 << 1 | 1 << 5;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_OSFXSR: u64 = 1 << 9 | 1 << 10;

/// CPUID: EAX, EBX, ECX, EDX.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // Harmless on any x86-64 processor.
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// XCR0 with all that a guest may enable; `None`: there is no XSAVE.
pub fn supported_xcr0() -> Option<u64> {
    let features = cpuid(1, 0)[2];
    let avx = if features & 1 << 28 != 0 { XCR0_AVX } else { 0 };
    (features & 1 << 26 != 0).then_some(XCR0_X87 | XCR0_SSE | avx)
}

/// Features that a guest can be given: those of the processor, and those that are the hypervisor's own work; without
/// those `not_given`.
pub fn features(not_given: &[Feature]) -> FeatureSet {
    let mut set = FeatureSet::EMPTY;
    for feature in Feature::ALL {
        let (leaf, subleaf, register, bit) = feature.place();
        if EMULATED.contains(feature) || cpuid(leaf, subleaf)[register as usize] & 1 << bit != 0 {
            set.insert(*feature);
        }
    }
    not_given.iter().for_each(|feature| set.remove(*feature));
    set
}

/// What the hypervisor does itself, whatever the processor has.
const EMULATED: &[Feature] = &[
    Feature::Apic,
    Feature::X2apic,
    Feature::TscDeadline,
    Feature::TscAdjust,
    Feature::InvariantTsc,
    Feature::Arat,
    Feature::Mtrr,
    Feature::Mce,
    Feature::Mca,
    Feature::Pat,
    Feature::Hypervisor,
    Feature::ArchCapabilities,
    Feature::SpecCtrl,
    Feature::BhiCtrl,
    Feature::Ssbd,
    Feature::Rdtscp,
];

/// Switches vector registers and XSAVE on for the processor that runs this, and gives it an x87 unit as [`store_extended`]
/// leaves it: after a reset its registers count as in use. An error there is an exception, and told.
///
/// # Safety
/// Once a processor, at privilege level 0, on one with XSAVE; vector registers are nobody's yet.
pub unsafe fn enable_extended(xcr0: u64) {
    // SAFETY: the caller vouches for the processor.
    unsafe {
        asm!(
            "mov {t}, cr4",
            "or {t}, {bits}",
            "mov cr4, {t}",
            "mov {t}, cr0",
            "and {t}, -13", // no EM, no TS
            "or {t}, {mp_ne}",
            "mov cr0, {t}",
            "fninit",
            t = out(reg) _,
            mp_ne = const CR0_MP_NE,
            bits = const CR4_OSXSAVE | CR4_OSFXSR,
            options(nostack)
        );
        set_xcr0(xcr0);
    }
}

/// XSETBV of XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set and the processor has the components.
pub unsafe fn set_xcr0(value: u64) {
    // SAFETY: the caller vouches for the value.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

/// XGETBV of XCR0.
///
/// # Safety
/// CR4.OSXSAVE is set.
pub unsafe fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for it.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// Loads the extended state, then enables what the guest has enabled.
///
/// # Safety
/// As [`set_xcr0`], for both; the area is well-formed. The vector registers are nobody's.
pub unsafe fn load_extended(area: &XsaveArea, all: u64, guest: u64) {
    // SAFETY: the caller vouches for both; the area is aligned and as long as its components need.
    unsafe {
        set_xcr0(all);
        asm!("xrstor64 [{}]", in(reg) area, in("eax") all as u32, in("edx") 0, options(nostack));
        if guest != all {
            set_xcr0(guest);
        }
    }
}

/// Enables all again and stores the extended state. The x87 unit is left empty, with nothing that waits there: the
/// interpreter's thunks push numbers and wait for exceptions, and must not find the guest's. Of MXCSR they load what they
/// need.
///
/// # Safety
/// As [`load_extended`].
pub unsafe fn store_extended(area: &mut XsaveArea, all: u64) {
    // SAFETY: as above.
    unsafe {
        set_xcr0(all);
        asm!("xsave64 [{}]", "fninit", in(reg) area, in("eax") all as u32, in("edx") 0, options(nostack));
    }
}

/// DR7: breakpoints enabled.
pub const DR7_ENABLED: u64 = 0xFF;

/// DR0 to DR3, for a guest with breakpoints.
///
/// # Safety
/// DR7 of the host has none enabled.
pub unsafe fn set_breakpoints(addresses: [u64; 4]) {
    let [a, b, c, d] = addresses;
    // SAFETY: without an enable bit they have no effect on the host.
    unsafe {
        asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}", in(reg) a, in(reg) b, in(reg) c, in(reg) d,
            options(nomem, nostack));
    }
}

/// Hands a machine check that exited a guest to the machine's own handler.
pub fn take_machine_check() {
    // SAFETY: the host has a handler for vector 18, on a stack of its own.
    unsafe { asm!("int 18") };
}

/// The processor's time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RDMSR.
///
/// # Safety
/// The register exists.
#[inline]
pub unsafe fn read_msr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the caller vouches for the register.
    unsafe { asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR.
///
/// # Safety
/// The register exists, takes the value, and what it changes is meant.
pub unsafe fn write_msr(number: u32, value: u64) {
    // SAFETY: the caller vouches for register and value.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}
