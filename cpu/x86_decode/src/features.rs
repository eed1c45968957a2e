//! Which CPUID features an instruction needs.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use x86_defs::cpuid::{Feature, FeatureSet};

/// Whether a processor with `features` has `instruction`.
pub fn allowed(instruction: &Instruction, features: FeatureSet) -> bool {
    // CPUID shows a hypervisor; its calls belong to no feature bit.
    matches!(instruction.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall)
        || instruction.cpuid_features().iter().all(|f| match NEEDS[*f as usize & 0xFF] {
            ALWAYS => true,
            NEVER => false,
            needed => features.has_number(needed),
        })
}

/// Which [`Feature`] each of iced's needs, by its number; a table, because most of them are asked for at every instruction.
static NEEDS: [u8; 256] = needs();
/// Every processor of ours has it.
const ALWAYS: u8 = 0xFE;
/// No processor of ours does.
const NEVER: u8 = 0xFF;

const fn needs() -> [u8; 256] {
    use CpuidFeature as C;
    use Feature as F;
    // There is no CPU model below the Pentium Pro.
    let always = [
        C::INTEL8086,
        C::INTEL8086_ONLY,
        C::INTEL186,
        C::INTEL286,
        C::INTEL386,
        C::INTEL486,
        C::FPU,
        C::FPU287,
        C::FPU387,
        C::CPUID,
        C::TSC,
        C::MSR,
        C::CMOV,
        C::CX8,
        C::RDPMC,
        C::SEP,
        C::MULTIBYTENOP,
        C::PAUSE,
        C::SMM,
        // Hints that older processors take as NOP.
        C::PREFETCHWT1,
        C::PREFETCHITI,
        C::CET_IBT,
        C::CET_SS,
        C::CLDEMOTE,
        C::MPX,
    ];
    // The rest of 3DNow! than its prefetches, which stand alone, does not exist here.
    let needs = [
        (C::PREFETCHW, F::Prefetchw),
        (C::X64, F::Lm),
        (C::SYSCALL, F::Syscall),
        (C::MMX, F::Mmx),
        (C::FXSR, F::Fxsr),
        (C::CLFSH, F::Clflush),
        (C::SSE, F::Sse),
        (C::SSE2, F::Sse2),
        (C::SSE3, F::Sse3),
        (C::SSSE3, F::Ssse3),
        (C::SSE4_1, F::Sse41),
        (C::SSE4_2, F::Sse42),
        (C::PCLMULQDQ, F::Pclmulqdq),
        (C::AES, F::Aes),
        (C::AVX, F::Avx),
        (C::AVX2, F::Avx2),
        (C::FMA, F::Fma),
        (C::F16C, F::F16c),
        (C::BMI1, F::Bmi1),
        (C::BMI2, F::Bmi2),
        (C::ADX, F::Adx),
        (C::LZCNT, F::Lzcnt),
        (C::POPCNT, F::Popcnt),
        (C::MOVBE, F::Movbe),
        (C::CMPXCHG16B, F::Cx16),
        (C::SHA, F::Sha),
        (C::VAES, F::Vaes),
        (C::VPCLMULQDQ, F::Vpclmulqdq),
        (C::GFNI, F::Gfni),
        (C::RDRAND, F::Rdrand),
        (C::RDSEED, F::Rdseed),
        (C::RDTSCP, F::Rdtscp),
        (C::RDPID, F::Rdpid),
        (C::FSGSBASE, F::Fsgsbase),
        (C::INVPCID, F::Invpcid),
        (C::SMAP, F::Smap),
        (C::XSAVE, F::Xsave),
        (C::XSAVEOPT, F::Xsaveopt),
        (C::XSAVEC, F::Xsavec),
        (C::XSAVES, F::Xsaves),
        (C::CLFLUSHOPT, F::Clflushopt),
        (C::CLWB, F::Clwb),
    ];
    let mut table = [NEVER; 256];
    let mut n = 0;
    while n < always.len() {
        table[always[n] as usize] = ALWAYS;
        n += 1;
    }
    n = 0;
    while n < needs.len() {
        table[needs[n].0 as usize] = needs[n].1 as u8;
        n += 1;
    }
    table
}
