//! The CPUID leaves of a model (SDM vol. 2A, CPUID; KVM's paravirtual leaves).
//!
//! One package, one thread a core, every vCPU a core. Caches and the XSAVE layout are part of the model.

use super::CpuModel;
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::cpuid::Feature;
use x86_defs::paging::{LINEAR_ADDRESS_BITS, PHYSICAL_ADDRESS_BITS};

/// What CPUID depends on besides the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidContext {
    /// This processor's APIC id.
    pub apic_id: u32,
    /// Processors in the VM.
    pub cpus: u32,
    /// CR4.OSXSAVE.
    pub osxsave: bool,
    /// The local APIC is enabled in APIC_BASE.
    pub apic_enabled: bool,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// Frequency of the TSC.
    pub tsc_khz: u32,
}

impl CpuidContext {
    /// A VM's only processor after power-up.
    pub const fn alone(tsc_khz: u32) -> Self {
        Self { apic_id: 0, cpus: 1, osxsave: false, apic_enabled: true, xcr0: 1, xss: 0, tsc_khz }
    }
}

const VENDOR: [u32; 3] = [0x756E_6547, 0x4965_6E69, 0x6C65_746E];
/// Family 6, model 0x9F, stepping 0: no processor's (see the header of `cpu_model`).
const SIGNATURE: u32 = 0x0009_06F0;
const MAX_BASIC_LEAF: u32 = 0x16;
const MAX_EXTENDED_LEAF: u32 = 0x8000_0008;
/// Leaf 7 has features in subleaves 0 to 2.
const MAX_SUBLEAF_7: u32 = 2;
const HYPERVISOR_BASE: u32 = 0x4000_0000;
const MAX_HYPERVISOR_LEAF: u32 = 0x4000_0010;
/// "KVMKVMKVM": guests then use kvmclock.
const HYPERVISOR_SIGNATURE: [u32; 3] = [0x4B4D_564B, 0x564B_4D56, 0x0000_004D];
/// kvmclock at its old and new MSRs, no delay after port I/O, stable clock source.
const HYPERVISOR_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;
const BRAND: &[u8; 48] = b"Bedplate x86-64 processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Rate of the local APIC's timer, which leaf 0x15 calls the crystal.
const APIC_TIMER_KHZ: u32 = 1_000_000;
/// Leaf 1, ECX: XSAVE is enabled by the operating system.
const OSXSAVE: u32 = 1 << 27;
/// Size of the legacy area and header of an XSAVE image.
const XSAVE_LEGACY_BYTES: u32 = 576;
const AVX_BYTES: u32 = 256;

/// A cache as leaf 4 describes it.
struct Cache {
    /// 1 data, 2 instruction, 3 unified.
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
    shared: bool,
}

/// 32 KiB + 32 KiB, 2 MiB, and 16 MiB for all; lines of 64 bytes.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 2, level: 1, ways: 8, sets: 64, shared: false },
    Cache { kind: 3, level: 2, ways: 16, sets: 2048, shared: false },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384, shared: true },
];

impl CpuModel {
    /// EAX, EBX, ECX, EDX of a leaf. Leaves that do not exist are zero.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, ctx: &CpuidContext) -> [u32; 4] {
        let [a, b, c, d] = self.feature_words(leaf, subleaf);
        match leaf {
            0 => [MAX_BASIC_LEAF, VENDOR[0], VENDOR[2], VENDOR[1]],
            1 => self.leaf_1(c, d, ctx),
            // One byte of descriptors that counts: see leaf 4.
            2 => [0x00FF_0001, 0, 0, 0],
            4 => leaf_4(subleaf, ctx),
            6 => [a, b, c, d],
            7 if subleaf == 0 => [MAX_SUBLEAF_7, b, c, d],
            7 => [a, b, c, d],
            0xB => leaf_b(subleaf, ctx),
            0xD if self.features.has(Feature::Xsave) => self.leaf_d(subleaf, a, ctx),
            0x15 => leaf_15(ctx.tsc_khz),
            0x16 => [ctx.tsc_khz / 1000, ctx.tsc_khz / 1000, 100, 0],
            HYPERVISOR_BASE => {
                let [b, c, d] = HYPERVISOR_SIGNATURE;
                [MAX_HYPERVISOR_LEAF, b, c, d]
            }
            0x4000_0001 => [HYPERVISOR_FEATURES, 0, 0, 0],
            0x4000_0010 => [ctx.tsc_khz, APIC_TIMER_KHZ, 0, 0],
            0x8000_0000 => [MAX_EXTENDED_LEAF, 0, 0, 0],
            0x8000_0001 | 0x8000_0007 => [a, b, c, d],
            0x8000_0002..=0x8000_0004 => brand((leaf - 0x8000_0002) as usize),
            // L2: 2 MiB, 16 ways, lines of 64 bytes.
            0x8000_0006 => [0, 0, 2048 << 16 | 8 << 12 | 64, 0],
            0x8000_0008 => [LINEAR_ADDRESS_BITS << 8 | PHYSICAL_ADDRESS_BITS, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// The feature bits that a leaf shows.
    fn feature_words(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut words = [0; 4];
        for feature in self.features.iter() {
            let (at, sub, register, bit) = feature.place();
            if at == leaf && (sub == subleaf || leaf != 7 && leaf != 0xD) {
                words[register as usize] |= 1 << bit;
            }
        }
        words
    }

    fn leaf_1(&self, ecx: u32, edx: u32, ctx: &CpuidContext) -> [u32; 4] {
        const APIC: u32 = 1 << 9;
        const HTT: u32 = 1 << 28;
        let ecx = ecx | if ctx.osxsave { OSXSAVE } else { 0 };
        let edx = if ctx.apic_enabled { edx } else { edx & !APIC };
        let (edx, logical) = if ctx.cpus > 1 { (edx | HTT, ctx.cpus.min(255)) } else { (edx & !HTT, 1) };
        // Lines of CLFLUSH in units of 8 bytes; the initial APIC id has 8 bits.
        let ebx = (ctx.apic_id & 0xFF) << 24 | logical << 16 | 8 << 8;
        [SIGNATURE, ebx, ecx, edx]
    }

    fn leaf_d(&self, subleaf: u32, eax: u32, ctx: &CpuidContext) -> [u32; 4] {
        let avx = self.features.has(Feature::Avx);
        let supported = XCR0_X87 | XCR0_SSE | if avx { XCR0_AVX } else { 0 };
        let size = |enabled: u64| XSAVE_LEGACY_BYTES + if enabled & XCR0_AVX != 0 { AVX_BYTES } else { 0 };
        match subleaf {
            0 => [supported as u32, size(ctx.xcr0), size(supported), 0],
            1 => {
                let compacted = self.features.has(Feature::Xsavec) || self.features.has(Feature::Xsaves);
                [eax, if compacted { size(ctx.xcr0 | ctx.xss) } else { 0 }, 0, 0]
            }
            2 if avx => [AVX_BYTES, XSAVE_LEGACY_BYTES, 0, 0],
            _ => [0; 4],
        }
    }
}

/// Bits of an APIC id that tell the cores of the package apart.
fn core_bits(cpus: u32) -> u32 {
    cpus.clamp(1, 1 << 31).next_power_of_two().trailing_zeros()
}

fn leaf_4(subleaf: u32, ctx: &CpuidContext) -> [u32; 4] {
    let Some(cache) = CACHES.get(subleaf as usize) else { return [0; 4] };
    let cores = (1u32 << core_bits(ctx.cpus)) - 1;
    let sharing = if cache.shared { cores.min(0xFFF) } else { 0 };
    let eax = cache.kind | cache.level << 5 | 1 << 8 | sharing << 14 | cores.min(63) << 26;
    [eax, (cache.ways - 1) << 22 | 63, cache.sets - 1, 0]
}

fn leaf_b(subleaf: u32, ctx: &CpuidContext) -> [u32; 4] {
    let level = subleaf & 0xFF;
    match subleaf {
        0 => [0, 1, 1 << 8 | level, ctx.apic_id],
        1 => [core_bits(ctx.cpus), ctx.cpus.min(0xFFFF), 2 << 8 | level, ctx.apic_id],
        _ => [0, 0, level, ctx.apic_id],
    }
}

/// TSC frequency as a fraction of the crystal's; left out if kernels' 32-bit arithmetic would overflow.
fn leaf_15(tsc_khz: u32) -> [u32; 4] {
    if tsc_khz == 0 {
        return [0; 4];
    }
    let divisor = gcd(tsc_khz, APIC_TIMER_KHZ);
    let (numerator, denominator) = (tsc_khz / divisor, APIC_TIMER_KHZ / divisor);
    if numerator.checked_mul(APIC_TIMER_KHZ).is_none() {
        return [0; 4];
    }
    [denominator, numerator, APIC_TIMER_KHZ * 1000, 0]
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn brand(part: usize) -> [u32; 4] {
    core::array::from_fn(|i| {
        let at = part * 16 + i * 4;
        u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
    })
}
