//! Which CPUID features an instruction needs.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use x86_defs::cpuid::{Feature, FeatureSet};

/// Whether a processor with `features` has `instruction`.
pub fn allowed(instruction: &Instruction, features: FeatureSet) -> bool {
    // CPUID shows a hypervisor; its calls belong to no feature bit.
    matches!(instruction.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall)
        || instruction.cpuid_features().iter().all(|f| has(*f, features))
}

fn has(needed: CpuidFeature, features: FeatureSet) -> bool {
    use CpuidFeature as C;
    use Feature as F;
    let feature = match needed {
        // Every processor of ours has these: there is no CPU model below the Pentium Pro.
        C::INTEL8086 | C::INTEL8086_ONLY | C::INTEL186 | C::INTEL286 | C::INTEL386 | C::INTEL486 => {
            return true;
        }
        C::FPU
        | C::FPU287
        | C::FPU387
        | C::CPUID
        | C::TSC
        | C::MSR
        | C::CMOV
        | C::CX8
        | C::RDPMC
        | C::SEP => return true,
        C::MULTIBYTENOP | C::PAUSE | C::SMM => return true,
        // Hints that older processors take as NOP.
        C::PREFETCHWT1 | C::PREFETCHITI | C::CET_IBT | C::CET_SS | C::CLDEMOTE | C::MPX => return true,
        C::X64 => F::Lm,
        C::SYSCALL => F::Syscall,
        C::MMX => F::Mmx,
        C::FXSR => F::Fxsr,
        C::CLFSH => F::Clflush,
        C::SSE => F::Sse,
        C::SSE2 => F::Sse2,
        C::SSE3 => F::Sse3,
        C::SSSE3 => F::Ssse3,
        C::SSE4_1 => F::Sse41,
        C::SSE4_2 => F::Sse42,
        C::PCLMULQDQ => F::Pclmulqdq,
        C::AES => F::Aes,
        C::AVX => F::Avx,
        C::AVX2 => F::Avx2,
        C::FMA => F::Fma,
        C::F16C => F::F16c,
        C::BMI1 => F::Bmi1,
        C::BMI2 => F::Bmi2,
        C::ADX => F::Adx,
        C::LZCNT => F::Lzcnt,
        C::POPCNT => F::Popcnt,
        C::MOVBE => F::Movbe,
        C::CMPXCHG16B => F::Cx16,
        C::SHA => F::Sha,
        C::VAES => F::Vaes,
        C::VPCLMULQDQ => F::Vpclmulqdq,
        C::GFNI => F::Gfni,
        C::RDRAND => F::Rdrand,
        C::RDSEED => F::Rdseed,
        C::RDTSCP => F::Rdtscp,
        C::RDPID => F::Rdpid,
        C::FSGSBASE => F::Fsgsbase,
        C::INVPCID => F::Invpcid,
        C::SMAP => F::Smap,
        C::XSAVE => F::Xsave,
        C::XSAVEOPT => F::Xsaveopt,
        C::XSAVEC => F::Xsavec,
        C::XSAVES => F::Xsaves,
        C::CLFLUSHOPT => F::Clflushopt,
        C::CLWB => F::Clwb,
        C::PREFETCHW | C::D3NOW => F::Prefetchw,
        _ => return false,
    };
    // Prefetches of 3DNow! stand alone; the rest of 3DNow! does not exist here.
    features.has(feature) && needed != C::D3NOW
}
